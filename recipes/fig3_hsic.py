"""The paper's Fig. 3: how much predicted answers depend on true ones, by plan reward.

It reads the rollouts that grpo.py has logged:

    python -m recipes.fig3_hsic runs/pta/rollouts.jsonl
"""

import math
import random
import sys
from pathlib import Path

import numpy as np

from plumbing.ranks import require
from plumbing.records import load_jsonl
from rewards import extract_answer


def hsic(k: np.ndarray, l: np.ndarray) -> float:
    """Empirical Hilbert-Schmidt independence criterion of two Gram matrices (N, N).

    tr(K H L H) / (N - 1)^2, as in Gretton et al., "Measuring statistical dependence with
    Hilbert-Schmidt norms" (2005). 0 where one side is constant.
    """
    centred = k - k.mean(0) - k.mean(1, keepdims=True) + k.mean()  # H K H
    return float((centred * l).sum() / (len(k) - 1) ** 2)


def same(items: list) -> np.ndarray:
    """Gram matrix (N, N) of the kernel that is 1 for equal items and 0 for others."""
    codes = np.unique(np.array([str(item) for item in items]), return_inverse=True)[1]
    return (codes[:, None] == codes).astype(float)


def completion_points(rollouts: list[dict]) -> list[tuple]:
    """(plan reward, predicted answer, true answer, correct) of every completion.

    Answers are compared by equality later, so a right one is written as its gold.
    """
    points = []
    for record in rollouts:
        gold = str(record["answer"])
        for completion in (c for plan in record["plans"] for c in plan["completions"]):
            correct = completion["correct"]
            predicted = gold if correct else extract_answer(completion["text"])
            points.append((completion["reward"]["plan"], predicted, gold, correct))
    return points


def bin_row(points: list[tuple], n: int) -> dict:
    """The figures of one bin that holds `n` completions, from these points of it."""
    rewards, predicted, true, correct = zip(*points)
    p, t = same(predicted), same(true)
    value, scale = hsic(p, t), hsic(p, p) * hsic(t, t)
    normalised = value / math.sqrt(scale) if scale > 0 else 0.0
    means = {"plan_reward": float(np.mean(rewards)), "n": n, "accuracy": float(np.mean(correct))}
    return {**means, "hsic": value, "nhsic": normalised}


def hsic_by_plan_reward(
    rollouts: list[dict], bins: int = 5, most: int = 2000, seed: int = 0
) -> list[dict]:
    """Dependence of predicted on true answers in bins of similar plan reward, lowest first.

    `rollouts`: grpo.py's records. Each row has plan_reward (mean), n, accuracy, hsic and nhsic =
    HSIC(p, t) / sqrt(HSIC(p, p) HSIC(t, t)), from 0 to 1. Gram matrices grow with the square of a
    bin's size, so a bin of more than `most` completions is represented by a random subset.
    """
    points = completion_points(rollouts)
    rewards = np.array([point[0] for point in points])
    edges = np.unique(np.quantile(rewards, np.linspace(0, 1, bins + 1)))
    place = np.searchsorted(edges, rewards, side="right") - 1
    place = np.clip(place, 0, max(len(edges) - 2, 0))
    rows = []
    for number in np.unique(place):
        inside = [points[i] for i in np.flatnonzero(place == number)]
        chosen = random.Random(seed).sample(inside, most) if len(inside) > most else inside
        if len(chosen) > 1:
            rows.append(bin_row(chosen, len(inside)))
    return rows


def load_rollouts(paths: list[str]) -> list[dict]:
    """The rollouts in the files. Raises SystemExit if there are none."""
    require(paths, "no rollouts given: pass a run's rollouts.jsonl")
    for path in paths:
        require(Path(path).is_file(), f"no rollouts at {path!r}: pass a run's rollouts.jsonl")
    rollouts = [record for path in paths for record in load_jsonl(Path(path))]
    require(
        rollouts and all("plans" in record for record in rollouts),
        f"{', '.join(paths)} does not hold rollouts (each line a question with its plans): pass a "
        "run's rollouts.jsonl",
    )
    return rollouts


def main():
    rollouts = load_rollouts(sys.argv[1:])
    print(f"{'plan reward':>12}{'n':>8}{'accuracy':>10}{'HSIC':>10}{'normalised':>12}")
    for row in hsic_by_plan_reward(rollouts):
        figures = f"{row['accuracy']:10.3f}{row['hsic']:10.4f}{row['nhsic']:12.3f}"
        print(f"{row['plan_reward']:12.3f}{row['n']:8}{figures}")


if __name__ == "__main__":
    main()
