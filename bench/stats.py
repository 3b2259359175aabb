"""Do eval.py's intervals cover, and does its permutation test keep its level?

    python -m bench.stats [--simulations 2000]        3 minutes on a free core; prints two tables

Runs are simulated with known accuracy. A benchmark is N problems whose chances of a right sample
are drawn from a beta distribution; its mean is the truth. Bars: the 95 % interval covers in 93 to
97 %, and false positives at 0.05 are 4 to 6 %. Cases outside the bars are marked.
"""

import argparse
import platform
import time

import numpy as np

from plumbing.intervals import accuracy_interval, difference_interval, permutation_p
from plumbing.ranks import fail

# Name, samples per problem, and for each benchmark its problems and beta parameters. AIME and AMC
# sizes at the paper's n = 64; MATH-500 and GSM8K sizes at n = 4 and 1; the demo's 600 x 4.
CASES = [
    ("AIME, 14 %", 64, [(30, 0.3, 1.8)]),
    ("AIME, 35 %", 64, [(30, 0.4, 0.75)]),
    ("AIME, 70 %", 64, [(30, 1.0, 0.43)]),
    ("AMC, 55 %", 64, [(40, 0.6, 0.5)]),
    ("AMC, 94 %", 64, [(40, 3.0, 0.2)]),
    ("AIME, 35 %, n 16", 16, [(30, 0.4, 0.75)]),
    ("AIME, 50 %, n 4", 4, [(30, 2.0, 2.0)]),
    ("AIME, 35 %, n 1", 1, [(30, 0.4, 0.75)]),
    ("MATH-500, 64 %", 4, [(500, 1.0, 0.56)]),
    ("MATH-500, 92 %", 4, [(500, 2.0, 0.17)]),
    ("MATH-500, n 1", 1, [(500, 1.0, 0.56)]),
    ("GSM8K, 90 %, n 1", 1, [(1319, 1.8, 0.2)]),
    ("demo, 56 %", 4, [(600, 1.2, 0.94)]),
    # A few percent: how steep is the fall from the few problems that are often solved?
    ("AIME, 1 %", 64, [(30, 0.1, 9.9)]),
    ("AIME, 1 %, flat", 64, [(30, 0.5, 49.5)]),
    ("AIME, 2 %", 64, [(30, 0.2, 9.8)]),
    ("AIME, 3 %", 64, [(30, 0.3, 9.7)]),
    ("AIME, 3 %, steep", 64, [(30, 0.1, 3.23)]),
    ("AIME, 4 %", 64, [(30, 0.2, 4.8)]),
    ("AIME, 4 %, flat", 64, [(30, 0.4, 9.6)]),
    ("AIME, 4 %, steep", 64, [(30, 0.08, 1.92)]),
    ("AIME, 1 %, steepest", 64, [(30, 0.02, 1.98)]),
    ("AIME, 96 %", 64, [(30, 4.8, 0.2)]),
    ("AIME, 98 %", 64, [(30, 9.8, 0.2)]),
    ("AIME, 99 %", 64, [(30, 9.9, 0.1)]),
    ("AIME, 3 %, n 16", 16, [(30, 0.3, 9.7)]),
    ("AIME, 3 %, n 4", 4, [(30, 0.3, 9.7)]),
    ("MATH-500, 1 %", 4, [(500, 0.1, 9.9)]),
    # Means over benchmarks. The third has the accuracies of LLaMA3.2-3B in the paper's Table 1.
    ("two AIMEs, 1 %", 64, [(30, 0.1, 9.9), (30, 0.1, 9.9)]),
    ("two AIMEs, 3 %", 64, [(30, 0.2, 4.8), (30, 0.2, 6.7)]),
    ("Table 1, 16 %", 64, [(500, 1.0, 1.73), (30, 0.2, 4.84), (30, 0.2, 6.74), (40, 0.4, 1.68)]),
    ("Table 1, n 1", 1, [(500, 1.0, 1.73), (30, 0.2, 4.84), (30, 0.2, 6.74), (40, 0.4, 1.68)]),
]


def naive_interval(right: list[np.ndarray], n: int, rng, b: int = 400) -> tuple[float, float]:
    """Percentiles of two-level resamples, for contrast. eval.py does not do this."""
    means = []
    for counts in right:
        drawn = (counts / n)[rng.integers(0, len(counts), (b, len(counts)))]
        means.append((rng.binomial(n, drawn) / n).mean(1))
    return tuple(np.percentile(np.mean(means, axis=0), [2.5, 97.5]))


def mark(value: float, low: float, high: float) -> str:
    return f"{100 * value:7.1f} %{'' if low <= value <= high else ' *'}"


def heading(name: str, benchmarks: list[tuple], n: int) -> str:
    return f"{name:20}{sum(part[0] for part in benchmarks):6}{n:4}  "


def one_run(simulations: int, rng):
    """Print for each case how often the interval of an accuracy covers it, and its mean width."""
    print(f"\n{'accuracy':20}{'N':>6}{'n':>4}  {'coverage':11}{'width':>7}   naive percentiles")
    few = max(1, simulations // 10)  # they are slow
    for name, n, benchmarks in CASES:
        truth, hits, naive, width = np.mean([a / (a + b) for _, a, b in benchmarks]), 0, 0, 0.0
        for i in range(simulations):
            right = [rng.binomial(n, rng.beta(a, b, problems)) for problems, a, b in benchmarks]
            low, high = accuracy_interval([counts / n for counts in right], n)
            hits, width = hits + (low <= truth <= high), width + high - low
            if i < few:
                low, high = naive_interval(right, n, rng)
                naive += low <= truth <= high
        coverage, width = mark(hits / simulations, 0.93, 0.97), width / simulations
        figures = f"{coverage:11}{width:7.3f}   {100 * naive / few:.1f} %"
        print(f"{heading(name, benchmarks, n)}{figures}", flush=True)


def as_good(chances: np.ndarray, a: float, b: float, rng) -> tuple:
    """A problem's log-odds get noise in either run. The runs are exchangeable."""
    chances = chances.clip(1e-12, 1 - 1e-12)
    odds = np.log(chances / (1 - chances)) + rng.normal(0, 1, (2, len(chances)))
    return *1 / (1 + np.exp(-odds)), 0.0


def higher(chances: np.ndarray, a: float, b: float, rng) -> tuple:
    """Each problem moves towards 1: by 5 points on average, or by half its way if that is less."""
    left = b / (a + b)
    part = min(0.05 / left, 0.5)
    return chances, chances + part * (1 - chances), part * left


def two_tries(chances: np.ndarray, a: float, b: float, rng) -> tuple:
    """The second run solves what the first would in two tries: nearly twice as much at a few %."""
    mean, square = a / (a + b), a * (a + 1) / ((a + b) * (a + b + 1))
    return chances, 1 - (1 - chances) ** 2, mean - square


def simulated_pair(make, benchmarks: list[tuple], n: int, rng) -> tuple[list[np.ndarray], float]:
    """Differences of two runs' shares (N,) for each benchmark, and the true mean difference."""
    differences, truths = [], []
    for problems, a, b in benchmarks:
        first, second, truth = make(rng.beta(a, b, problems), a, b, rng)
        differences.append((rng.binomial(n, second) - rng.binomial(n, first)) / n)
        truths.append(truth)
    return differences, float(np.mean(truths))


def two_runs(simulations: int, rng):
    """Print for each case the test's false positives, and the coverage of known differences."""
    columns = f"{'false positives':16}coverage: {'equal runs':14}{'+ 5 points':12}two tries"
    print(f"\n{'two runs':20}{'N':>6}{'n':>4}  {columns}")
    for name, n, benchmarks in CASES:
        alarms, hits = 0, dict.fromkeys((as_good, higher, two_tries), 0)
        for i in range(simulations):
            for make in hits:
                differences, truth = simulated_pair(make, benchmarks, n, rng)
                low, high = difference_interval(differences, n)
                hits[make] += low <= truth <= high
                if make is as_good:
                    alarms += permutation_p(differences, seed=i, flips=1000) < 0.05
        positives = mark(alarms / simulations, 0.04, 0.06)
        shares = [mark(count / simulations, 0.93, 0.97) for count in hits.values()]
        coverage = f"{shares[0]:14}{shares[1]:12}{shares[2]}"
        print(f"{heading(name, benchmarks, n)}{positives:16}{'':10}{coverage}", flush=True)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.error = fail
    args = parser.parse_args()
    rng, began = np.random.default_rng(args.seed), time.time()
    machine = f"{platform.system()} {platform.machine()}"
    print(f"numpy {np.__version__}, {machine}; {args.simulations} simulations per line")
    one_run(args.simulations, rng)
    two_runs(args.simulations, rng)
    print(f"\n* outside the bar. {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
