"""Do eval.py's intervals cover, and does its permutation test keep its level?

    python -m bench.stats [--simulations 1000]        5 minutes on a free core; prints two tables

Runs are simulated with known accuracy. A benchmark is N problems whose chances of a right sample
are drawn from a beta distribution; its mean is the truth. Bars: the 95 % interval covers in 93 to
97 %, and false positives at 0.05 are 4 to 6 %. Cases outside the bars are marked.
"""

import argparse
import platform
import time

import numpy as np

from plumbing.intervals import bootstrap_interval, permutation_p

# Name, problems, samples, beta parameters. AIME and AMC sizes at the paper's n = 64; MATH-500 and
# GSM8K sizes at n = 4 and 1; the demo's 600 x 4.
CASES = [
    ("AIME, 14 %", 30, 64, (0.3, 1.8)),
    ("AIME, 35 %", 30, 64, (0.4, 0.75)),
    ("AIME, 70 %", 30, 64, (1.0, 0.43)),
    ("AIME, 4 %", 30, 64, (0.2, 4.8)),
    ("AMC, 55 %", 40, 64, (0.6, 0.5)),
    ("AMC, 94 %", 40, 64, (3.0, 0.2)),
    ("AIME, 35 %, n 16", 30, 16, (0.4, 0.75)),
    ("AIME, 50 %, n 4", 30, 4, (2.0, 2.0)),
    ("AIME, 35 %, n 1", 30, 1, (0.4, 0.75)),
    ("MATH-500, 64 %", 500, 4, (1.0, 0.56)),
    ("MATH-500, 92 %", 500, 4, (2.0, 0.17)),
    ("MATH-500, n 1", 500, 1, (1.0, 0.56)),
    ("GSM8K, 90 %, n 1", 1319, 1, (1.8, 0.2)),
    ("demo, 56 %", 600, 4, (1.2, 0.94)),
]


def resamples_for(problems: int) -> int:
    return 1000 if problems < 100 else 400


def naive_interval(right: np.ndarray, n: int, rng, resamples: int = 1000) -> tuple[float, float]:
    """Percentiles of two-level resamples, for contrast. eval.py does not do this."""
    drawn = (right / n)[rng.integers(0, len(right), (resamples, len(right)))]
    return tuple(np.percentile((rng.binomial(n, drawn) / n).mean(1), [2.5, 97.5]))


def mark(value: float, low: float, high: float) -> str:
    return f"{100 * value:7.1f} %{'' if low <= value <= high else ' *'}"


def one_run(simulations: int, rng):
    """Print for each case how often the interval of an accuracy covers it, and its mean width."""
    print(f"\n{'accuracy':20}{'N':>6}{'n':>4}  {'coverage':11}{'width':>7}   naive percentiles")
    few = min(simulations, 300)
    for name, problems, n, (a, b) in CASES:
        truth, options = a / (a + b), dict(resamples=resamples_for(problems))
        hits, naive, width = 0, 0, 0.0
        for seed in range(simulations):
            right = rng.binomial(n, rng.beta(a, b, problems))
            low, high = bootstrap_interval([right], n, seed=seed, **options)
            hits, width = hits + (low <= truth <= high), width + high - low
            if seed < few:
                low, high = naive_interval(right, n, rng)
                naive += low <= truth <= high
        coverage, width = mark(hits / simulations, 0.93, 0.97), width / simulations
        figures = f"{coverage:11}{width:7.3f}   {100 * naive / few:.1f} %"
        print(f"{name:20}{problems:6}{n:4}  {figures}", flush=True)


def two_runs(simulations: int, rng):
    """Print for each case the test's false positives, and the coverage of a known difference."""
    heading = f"{'false positives':16}coverage of a difference of 5 points"
    print(f"\n{'two runs':20}{'N':>6}{'n':>4}  {heading}")
    for name, problems, n, (a, b) in CASES:
        alarms, hits, options = 0, 0, dict(resamples=resamples_for(problems))
        for seed in range(simulations):
            # Null: a problem's two chances differ, but are exchangeable. The runs have different
            # strengths, and neither is stronger.
            noise = rng.beta(a, b, problems)[:, None] + rng.normal(0, 0.1, (problems, 2))
            right = rng.binomial(n, np.clip(noise, 0, 1)) / n
            p = permutation_p([right[:, 1] - right[:, 0]], seed=seed, flips=1000)
            alarms += p < 0.05
            base = rng.beta(a, b, problems)
            # The mean difference is exactly 5 points in the population.
            shifted = base + 0.05 * (1 - base) / (1 - a / (a + b))
            if shifted.max() <= 1:
                right = rng.binomial(n, np.stack([base, shifted], 1))
                low, high = bootstrap_interval([right], (n, n), (-1, 1), seed, **options)
                hits += low <= 0.05 <= high
        positives = mark(alarms / simulations, 0.04, 0.06)
        coverage = mark(hits / simulations, 0.93, 0.97) if hits else "   --"
        print(f"{name:20}{problems:6}{n:4}  {positives:16}{coverage}", flush=True)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, began = np.random.default_rng(args.seed), time.time()
    machine = f"{platform.system()} {platform.machine()}"
    print(f"numpy {np.__version__}, {machine}; {args.simulations} simulations per line")
    one_run(args.simulations, rng)
    two_runs(args.simulations, rng)
    print(f"\n* outside the bar. {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
