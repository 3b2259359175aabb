"""Confidence intervals and a paired test for accuracies of sampled answers.

bench/stats.py measures the intervals' coverage and the test's level. Shapes: N problems of a
benchmark, R runs (1, or 2 that are compared), b resamples at a time.
"""

import math

import numpy as np


def bootstrap_interval(
    benchmarks: list[np.ndarray], n, signs=(1,), seed: int = 0, resamples: int = 4000
) -> tuple[float, float]:
    """95 % interval of the mean over benchmarks of the mean over problems.

    `benchmarks`: for each, the counts of right samples (N, R). `n`: samples per problem, one number
    or one per run. `signs`: (1,) for an accuracy, (-1, 1) for the second run's minus the first's.
    Problems are paired across runs.

    Resampling problems *and* samples counts the sampling noise twice, because the observed shares
    hold it already. Plain percentiles of such resamples cover too often with few samples per
    problem, and too seldom with few problems. So each resample is divided by its own standard error
    (bootstrap-t), in which the surplus cancels. That ratio is useless with one sample per problem,
    or where more than one resample in 1,000 has no variance: then a score interval (one run) or
    pseudo-counts (two) take its place.
    """
    n, signs = np.broadcast_to(n, len(signs)), np.asarray(signs, dtype=float)
    rates = [counts.reshape(len(counts), -1) / n for counts in benchmarks]  # (N, R) each
    values = [rate @ signs for rate in rates]  # (N,) each
    size, several = sum(map(len, values)), max(n) > 1
    mean = float(np.mean([v.mean() for v in values]))
    squares = [v.var(ddof=1) / len(v) if len(v) > 1 else 0.0 for v in values]
    error = math.sqrt(sum(squares)) / len(values)  # the standard error of `mean`
    if several and min(map(len, values)) >= 2:
        means, errors = resample(rates, n, signs, seed, resamples)  # (resamples,) each
        if (errors < 1e-9).mean() <= 1e-3:
            errors = np.maximum(errors, 1e-9)
            if len(signs) == 1:
                return logit_bootstrap_t(mean, error, means, errors, size)
            return bootstrap_t(mean, error, means, errors)
    if len(signs) == 2:
        return pseudo_count_interval(values)
    if error and (several or len(values) > 1):
        # The effective size: this many independent samples would have as much variance.
        size = mean * (1 - mean) / error**2
    return score_interval(mean, size)


def resample(
    rates: list[np.ndarray], n: np.ndarray, signs: np.ndarray, seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hierarchical bootstrap: problems with replacement, then n new samples of each drawn problem.

    `rates`: for each benchmark, shares of right samples (N, R); `n` and `signs`: (R,). Returns the
    mean over benchmarks and problems of rates @ signs, and its standard error, (resamples,) each.
    """
    rng, means, squares = np.random.default_rng(seed), [], []
    for rate in rates:
        size, parts = len(rate), []
        chunk = max(1, 2_000_000 // size)  # bounds the memory
        for start in range(0, resamples, chunk):
            b = min(chunk, resamples - start)
            drawn = rate[rng.integers(0, size, (b, size))]  # (b, N, R)
            values = rng.binomial(n, drawn) / n @ signs  # (b, N)
            parts.append((values.mean(1), values.var(1, ddof=1) / size))
        means.append(np.concatenate([mean for mean, _ in parts]))
        squares.append(np.concatenate([square for _, square in parts]))
    return np.mean(means, axis=0), np.sqrt(np.sum(squares, axis=0)) / len(rates)


# --------------------------------------------------------------------------------------------------
# Bootstrap-t: an interval from resampled means and their standard errors


def t_quantiles(mean: float, means: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of t: how many of its errors a resampled mean is off."""
    low, high = np.quantile((means - mean) / errors, [0.025, 0.975])
    return low, high


def bootstrap_t(
    mean: float, error: float, means: np.ndarray, errors: np.ndarray
) -> tuple[float, float]:
    low, high = t_quantiles(mean, means, errors)
    return float(mean - high * error), float(mean - low * error)


def logit_bootstrap_t(
    mean: float, error: float, means: np.ndarray, errors: np.ndarray, size: int
) -> tuple[float, float]:
    """The interval of an accuracy over `size` problems, computed on the logit scale.

    On the scale of accuracies it would cover too often with few problems.
    """
    shift = 0.5 / size  # keeps the logits of 0 and 1 finite

    def logit(x):
        return np.log((x + shift) / (1 - x + shift))

    def slope(x):  # of the logit: an error of x is this many times as large on the logit scale
        return 1 / (x + shift) + 1 / (1 - x + shift)

    def accuracy(y):  # the inverse of the logit
        return min(max(float((1 + 2 * shift) / (1 + np.exp(-y)) - shift), 0.0), 1.0)

    low, high = t_quantiles(logit(mean), logit(means), slope(means) * errors)
    y, scale = logit(mean), slope(mean)
    return accuracy(y - high * scale * error), accuracy(y - low * scale * error)


# --------------------------------------------------------------------------------------------------
# Where resamples tell nothing


def score_interval(mean: float, size: float) -> tuple[float, float]:
    """Wilson's score interval of an accuracy over `size` independent samples."""
    half = 1.96 * math.sqrt(mean * (1 - mean) / size + 0.96 / size**2)
    centre, scale = mean + 1.92 / size, 1 + 3.84 / size
    return (centre - half) / scale, (centre + half) / scale


def pseudo_count_interval(values: list[np.ndarray]) -> tuple[float, float]:
    """Agresti and Min's interval of paired differences (N,), one array per benchmark.

    Two problems are added to every benchmark, one that speaks for each run.
    """
    mean = variance = 0.0
    for v in values:
        size = len(v) + 2
        centre, second = v.sum() / size, ((v**2).sum() + 1) / size
        mean += centre / len(values)
        variance += (second - centre**2) / size / len(values) ** 2
    half = 1.96 * math.sqrt(variance)
    return max(float(mean - half), -1.0), min(float(mean + half), 1.0)


# --------------------------------------------------------------------------------------------------
# Two runs


def permutation_p(benchmarks: list[np.ndarray], seed: int = 0, flips: int = 10_000) -> float:
    """Two-sided p-value of paired differences (N,), one array per benchmark, by random sign flips.

    If the two runs were equally good, each difference could as well have had the other sign. The
    statistic is the mean over benchmarks of the mean difference. The observed signs count as one of
    the flips, so p is never 0. It is 1 where the means are equal.

    Flips that tie with the observed signs count half (mid-p). With few problems and few samples,
    ties are common, and counting them in full would find too little: in bench/stats.py 1.9 % false
    positives at 0.05 for 30 problems x 1 sample.
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
    low, high = bootstrap_interval(counts, n, (-1, 1), seed)
    p = permutation_p([rate[:, 1] - rate[:, 0] for rate in rates], seed)
    size, delta = sum(map(len, counts)), second - first
    row = {"n_problems": size, "first": first, "second": second, "delta": delta}
    return {**row, "ci_low": low, "ci_high": high, "p": p}
