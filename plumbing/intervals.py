"""Confidence intervals and a paired test for accuracies of sampled answers.

bench/stats.py measures the intervals' coverage and the test's level. N is the number of problems
of a benchmark, n the number of samples per problem.

Both intervals are Wilson's score interval over an effective number of independent answers: as many
as would give the mean the variance that it has. That number is between N (all answers to a problem
agree) and N n (they are independent). A bootstrap fails at a few percent of accuracy. There a
handful of problems holds nearly all right answers, and resamples know of no others: a sample of
problems that lacks one more of them has too small a mean and too small a variance at once.
"""

import math

import numpy as np

Z = 1.959964  # the normal distribution's 97.5 % quantile


# --------------------------------------------------------------------------------------------------
# Intervals


def accuracy_interval(shares: list[np.ndarray], n: int) -> tuple[float, float]:
    """95 % interval of the mean over benchmarks of the mean share of right samples.

    `shares`: for each benchmark, one number in 0..1 per problem (N,).
    """
    bounds = []
    for values in shares:
        mean = values.mean()
        bounds.append((mean, *score_interval(mean, effective_size(values, n))))
    low, high = mean_bounds(bounds)
    return max(low, 0.0), min(high, 1.0)  # rounding may put a bound outside by 1e-17


def difference_interval(differences: list[np.ndarray], n: int) -> tuple[float, float]:
    """95 % interval of the mean over benchmarks of the mean difference of two runs' shares.

    `differences`: for each benchmark, one number in -1..1 per problem (N,). What the second run
    gains on some problems and what it loses on others are two shares of the same answers. Their
    intervals are joined as in Newcombe, "Improved confidence intervals for the difference between
    binomial proportions based on paired data" (1998).
    """
    bounds = []
    for values in differences:
        gain, loss = np.maximum(values, 0).mean(), np.maximum(-values, 0).mean()
        size = effective_size(values, n)
        (gain_low, gain_high), (loss_low, loss_high) = (
            score_interval(share, size) for share in (gain, loss)
        )
        rest = (1 - gain) * (1 - loss)
        correlation = math.sqrt(gain * loss / rest) if rest else 0.0  # of a gain and minus a loss
        below = joint_distance(gain - gain_low, loss_high - loss, correlation)
        above = joint_distance(gain_high - gain, loss - loss_low, correlation)
        bounds.append((gain - loss, gain - loss - below, gain - loss + above))
    low, high = mean_bounds(bounds)
    return max(low, -1.0), min(high, 1.0)


def effective_size(values: np.ndarray, n: int) -> float:
    """How many independent answers would tell as much about the mean of these values (N,).

    The values are shares in 0..1 or differences in -1..1, and an answer counts -1, 0 or 1.
    """
    problems, mean, both = len(values), values.mean(), abs(values).mean()
    variance = both - mean**2  # of one answer
    if problems < 2 or variance < 1e-12:
        return problems
    size = variance / max(values.var(ddof=1) / problems, variance / (problems * n))
    # The estimated variance is too small where the mean is, so two answers of the rarer kind are
    # taken off. Only values that lean to one side are skewed like that: those of an accuracy all
    # do, the differences of two equal runs hardly.
    lean, rare = abs(mean) / both, max(min(both, 1 - both), 1e-12)
    return max(size - 2 * lean / rare, problems)


def score_interval(mean: float, size: float) -> tuple[float, float]:
    """Wilson's score interval of an accuracy over `size` independent samples."""
    half = Z * math.sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    centre, scale = mean + Z**2 / (2 * size), 1 + Z**2 / size
    return (centre - half) / scale, (centre + half) / scale


def joint_distance(a: float, b: float, correlation: float) -> float:
    """How far the bound of a sum is, from the distances of its terms to theirs."""
    return math.sqrt(a**2 + b**2 + 2 * correlation * a * b)


def mean_bounds(bounds: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The interval of a mean of independent estimates, from the (mean, low, high) of each.

    Squared distances from the estimate to its bound add up like variances (Zou and Donner,
    "Construction of confidence limits about effect measures", 2008).
    """
    means, lows, highs = np.array(bounds).T
    below, above = (math.sqrt(((x - means) ** 2).sum()) / len(means) for x in (lows, highs))
    return float(means.mean() - below), float(means.mean() + above)


# --------------------------------------------------------------------------------------------------
# The paired test, and the comparison of two runs


def permutation_p(benchmarks: list[np.ndarray], seed: int = 0, flips: int = 10_000) -> float:
    """Two-sided p-value of paired differences (N,), one array per benchmark, by random sign flips.

    If the two runs were equally good, each difference could as well have had the other sign. The
    statistic is the mean over benchmarks of the mean difference. The observed signs count as one of
    the flips, so p is never 0. It is 1 where the means are equal.

    Flips that tie with the observed signs count half (mid-p). With few problems and few samples,
    ties are common, and counting them in full would find too little: 1.9 % instead of 3.9 % false
    positives at 0.05 for 30 problems x 1 sample, computed exactly for that case of bench/stats.py.
    """
    rng = np.random.default_rng(seed)
    weights = np.concatenate([d / len(d) for d in benchmarks])
    observed, beyond, ties = abs(weights.sum()), 0, 1
    if observed < 1e-9:
        return 1.0
    chunk = max(1, 4_000_000 // len(weights))  # bounds the memory
    for start in range(0, flips, chunk):
        shape = min(chunk, flips - start), len(weights)
        signs = rng.integers(0, 2, shape, dtype=np.int8) * 2 - 1
        excess = abs(signs @ weights) - observed
        beyond += int((excess > 1e-9).sum())
        ties += int((abs(excess) <= 1e-9).sum())  # equal up to rounding
    return (beyond + ties / 2) / (1 + flips)


def paired_difference(counts: list[np.ndarray], n: list[int], seed: int = 0) -> dict:
    """The second run minus the first, from their counts of right samples (N, 2) per benchmark.

    `n`: samples per problem of either run. Returns n_problems, first and second (accuracies, means
    over benchmarks), delta, ci_low and ci_high (its 95 % interval) and p.
    """
    rates = [count / n for count in counts]
    first, second = (float(np.mean([rate[:, run].mean() for rate in rates])) for run in (0, 1))
    differences = [rate[:, 1] - rate[:, 0] for rate in rates]
    low, high = difference_interval(differences, max(n))
    p = permutation_p(differences, seed)
    size, delta = sum(map(len, counts)), second - first
    row = {"n_problems": size, "first": first, "second": second, "delta": delta}
    return {**row, "ci_low": low, "ci_high": high, "p": p}
