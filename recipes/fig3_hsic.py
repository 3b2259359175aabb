"""The paper's Fig. 3: how much predicted answers depend on true ones, by plan reward.

It reads the rollouts that grpo.py has logged:

    python -m recipes.fig3_hsic runs/pta/rollouts.jsonl

The paper's form rises by construction, also with worthless plans: a plan's reward is made of the
correctness of the very completions that its bin reports. So a second table bins a completion by
what it has no part in: the score of the plan's other CoTs, minus the mean score of the question's
other plans. Where plans are worthless, that table is flat if the questions are equally hard. If
they are not, the easiest and hardest ones gather in its middle. The slope below it is free of that.
"""

import math
import random
import sys
from pathlib import Path

import numpy as np

from plumbing.ranks import require
from plumbing.records import load_jsonl
from rewards import extract_answer

PAPER = """\
The paper's form, by plan reward. It rises by construction: a plan's reward is made of the
correctness of the completions that its bin reports."""
LEFT_OUT = """
By the score of the plan's other CoTs, minus the mean score of the question's other plans. The
completion itself is left out: this rises from the first to the last bin only where plans matter."""
SLOPE = """\
Slope of correctness on that score, within questions: {slope:z.3f} (0 where plans are worthless)."""
NO_OTHERS = """
The form that leaves the completion itself out needs rollouts with --cots >= 2 and --plans >= 2."""


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


def completion_points(rollouts: list[dict]) -> list[dict]:
    """plan_reward, left_out, predicted and true answer, and correct of every completion.

    `left_out` is s_{i,-k} - mean_{j != i} s_j for CoT k of plan i: the share of right answers among
    the plan's other CoTs, minus the mean share of the other plans. It is None where there are no
    others. Answers are compared by equality later, so a right one is written as its gold.
    """
    points = []
    for record in rollouts:
        gold, plans = str(record["answer"]), [plan["completions"] for plan in record["plans"]]
        right = [sum(c["correct"] for c in plan) for plan in plans]
        shares = [count / len(plan) for count, plan in zip(right, plans)]
        for i, plan in enumerate(plans):
            for c in plan:
                point = {"plan_reward": c["reward"]["plan"], "left_out": None, "true": gold}
                point["predicted"] = gold if c["correct"] else extract_answer(c["text"])
                if len(plan) > 1 and len(plans) > 1:
                    siblings = (right[i] - c["correct"]) / (len(plan) - 1)
                    others = (sum(shares) - shares[i]) / (len(plans) - 1)
                    point["left_out"] = siblings - others
                points.append({**point, "correct": c["correct"]})
    return points


def bin_row(points: list[dict], chosen: list[dict], by: str) -> dict:
    """The figures of one bin. HSIC is that of the `chosen` ones of its points."""
    predicted, true = (same([p[name] for p in chosen]) for name in ("predicted", "true"))
    value, scale = hsic(predicted, true), hsic(predicted, predicted) * hsic(true, true)
    normalised = value / math.sqrt(scale) if scale > 0 else 0.0
    score, accuracy = (float(np.mean([p[name] for p in points])) for name in (by, "correct"))
    return {by: score, "n": len(points), "accuracy": accuracy, "hsic": value, "nhsic": normalised}


def hsic_by_plan_reward(
    rollouts: list[dict], bins: int = 5, most: int = 2000, seed: int = 0, by: str = "plan_reward"
) -> list[dict]:
    """Dependence of predicted on true answers in bins of similar plan reward, lowest first.

    `rollouts`: grpo.py's records. With by="left_out", the bins are of completion_points' left_out,
    and there are none without it. Each row has the bin's mean under `by`, n, accuracy, hsic and
    nhsic = HSIC(p, t) / sqrt(HSIC(p, p) HSIC(t, t)), from 0 to 1. Gram matrices grow with the
    square of a bin's size, so HSIC is that of a random subset of at most `most` completions.
    """
    points = [point for point in completion_points(rollouts) if point[by] is not None]
    scores = np.array([point[by] for point in points]).round(9)  # equal up to rounding: one bin
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, bins + 1)))
    place = np.searchsorted(edges, scores, side="right") - 1
    place = np.clip(place, 0, max(len(edges) - 2, 0))
    rows = []
    for number in np.unique(place):
        inside = [points[i] for i in np.flatnonzero(place == number)]
        chosen = random.Random(seed).sample(inside, most) if len(inside) > most else inside
        if len(chosen) > 1:
            rows.append(bin_row(inside, chosen, by))
    return rows


def slope_within_questions(points: list[dict]) -> float:
    """How much more often a completion is right per unit of left_out. 0 where that is constant.

    left_out adds up to 0 over a question, so how hard the question is has no part in it. Given the
    question, worthless plans make it independent of correctness: the expected slope is 0.
    """
    score = np.array([point["left_out"] for point in points])
    correct = np.array([point["correct"] for point in points], float)
    return float(score @ correct / max(score @ score, 1e-12))


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


def print_table(name: str, rows: list[dict]):
    print(f"{name:>12}{'n':>8}{'accuracy':>10}{'HSIC':>10}{'normalised':>12}")
    for row in rows:
        score, n, accuracy, value, normalised = row.values()
        print(f"{score:12.3f}{n:8}{accuracy:10.3f}{value:10.4f}{normalised:12.3f}")


def main():
    rollouts = load_rollouts(sys.argv[1:])
    print(PAPER)
    print_table("plan reward", hsic_by_plan_reward(rollouts))
    points = [p for p in completion_points(rollouts) if p["left_out"] is not None]
    print(LEFT_OUT if points else NO_OTHERS)
    if points:
        print_table("left out", hsic_by_plan_reward(rollouts, by="left_out"))
        print(SLOPE.format(slope=slope_within_questions(points)))


if __name__ == "__main__":
    main()
