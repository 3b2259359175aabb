"""How often does the interval of `eval.py --analysis plans` cover the ICC?

    python -m bench.plans [--simulations 1000]        7 minutes on a free core; prints two tables

Plan trees are simulated with a known ICC. A question's chance of a right answer is drawn from a
beta distribution, the values of its plans from another one around that chance, and the outcomes of
a plan's CoTs are Bernoulli. Bar: the 95 % interval covers in 93 to 97 %. Cases outside are marked.
"""

import argparse
import platform
import time

import numpy as np
import torch

from plumbing.plans import icc_interval, variances
from plumbing.ranks import fail

# Parameters of the beta distribution of a question's chance.
DIFFICULTIES = {"chances even from 0 to 1": (1.0, 1.0), "hard, as AIME, 35 %": (0.4, 0.75)}
SHAPES = [(4, 3), (4, 4), (16, 4)]  # plans, CoTs per plan
SHARES = (0.02, 0.1, 0.3, 0.6, 0.9)  # ICC


def simulate(rng, shape: tuple, share: float, a: float = 1.0, b: float = 1.0) -> np.ndarray:
    """Estimates of tau2 and sigma2, (..., 2), of simulated questions. `shape`: (..., m, z).

    With chance p, values are Beta(p k, (1 - p) k): tau2 = p (1 - p) / (k + 1), and tau2 + sigma2 =
    p (1 - p). So the ICC of every question is 1 / (k + 1) = `share`.
    """
    p = rng.beta(a, b, (*shape[:-2], 1)).clip(1e-6, 1 - 1e-6)
    k = 1 / share - 1
    values = np.nan_to_num(rng.beta(p * k, (1 - p) * k, shape[:-1]))  # NaN of two underflows
    right = rng.random(shape) < values[..., None]
    return variances(torch.from_numpy(right).flatten(0, -3)).numpy().reshape(*shape[:-2], 2)


def percentiles(parts: np.ndarray, rng, resamples: int = 500) -> tuple[float, float]:
    """The percentile bootstrap, for contrast. eval.py does not do this."""
    drawn = parts[rng.integers(0, len(parts), (resamples, len(parts)))].mean(1)
    return tuple(np.percentile(drawn[:, 0] / np.maximum(drawn.sum(1), 1e-9), [2.5, 97.5]))


def mark(value: float) -> str:
    return f"{100 * value:7.1f} %{'' if 0.93 <= value <= 0.97 else ' *'}"


def table(simulations: int, beta: tuple, rng):
    """Print how often the interval covers, its mean width, and the coverage of percentiles."""
    print(f"{'questions':>9}{'m x z':>8}{'ICC':>6}  {'coverage':11}{'width':>7}   percentiles")
    few = min(simulations, 300)
    for count in (30, 100, 300):
        for m, z in SHAPES:
            for share in SHARES:
                hits, plain, width = 0, 0, 0.0
                for seed in range(simulations):
                    parts = simulate(rng, (count, m, z), share, *beta)
                    low, high = icc_interval(parts, seed, resamples=1000)
                    hits, width = hits + (low <= share <= high), width + high - low
                    if seed < few:
                        low, high = percentiles(parts, rng)
                        plain += low <= share <= high
                figures = f"{mark(hits / simulations):11}{width / simulations:7.3f}"
                shown = f"{count:9}{m:5}x{z}{share:7.2f}  {figures}   {100 * plain / few:.1f} %"
                print(shown, flush=True)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.error = fail
    args = parser.parse_args()
    rng, began = np.random.default_rng(args.seed), time.time()
    machine = f"{platform.system()} {platform.machine()}"
    print(f"numpy {np.__version__}, {machine}; {args.simulations} simulations per line")
    for name, beta in DIFFICULTIES.items():
        print(f"\n{name}")
        table(args.simulations, beta, rng)
    print(f"\n* outside the bar. {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
