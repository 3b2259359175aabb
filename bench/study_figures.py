"""The figures of bench/STUDY.md: a test over seeds and problems, curves cut at a budget, costs.

Shapes: S seeds, P held-out problems. All shares are in 0..1.
"""

import math
from functools import lru_cache

import mpmath
import numpy as np

from data import doors
from plumbing.plans import best_cots

SAMPLES = 4  # per held-out problem, as in bench/study.py
UNITS = ("completions", "decoded", "seconds")
GRPO, PTA, BARE = "GRPO 12x1", "PTA-GRPO 4x3", "tree 4x3, beta 0"
SMALL = "GRPO, small groups"
SEGMENT, TAU = "segment 4x3, beta 0", "PTA-GRPO 4x3, tau 0.1"
CONTRASTS = {  # what is asked -> (row, the row it is compared with)
    "PTA-GRPO or GRPO": (PTA, GRPO),
    "a tree or as many steps of GRPO": (BARE, SMALL),
    "what the plan reward does": (PTA, BARE),
    "what unbiased credit does": (SEGMENT, BARE),
    "what it does beside a plan reward": ("segment 4x3, beta 0.5", PTA),
    "a large plan reward": ("PTA-GRPO 4x3, beta 0.9", BARE),
    "a sharp plan reward (tau 0.1 or 1)": (TAU, PTA),
    "leaving r_format out (structure and length)": ("PTA-GRPO 4x3, no format reward", PTA),
    "leaving the length reward out": ("PTA-GRPO 4x3, no length reward", PTA),
    "the length reward on right answers alone": ("PTA-GRPO 4x3, length reward if right", PTA),
}
TREES = {2: "PTA-GRPO 6x2", 3: PTA, 4: "PTA-GRPO 3x4", 6: "PTA-GRPO 2x6"}  # z -> row


# --------------------------------------------------------------------------------------------------
# Statistics


def t_tail(t: float, df: float) -> float:
    """Two-sided p-value of Student's t."""
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


@lru_cache
def t_quantile(df: float) -> float:
    """97.5 % quantile of Student's t, by bisection."""
    low, high = 1.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 0.05 else (low, middle)
    return high


def crossed_error(d: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean of d (S, P) over seeds and problems, and its degrees of freedom.

    Both are random: it speaks of other seeds and of other problems. From the mean squares of the
    two-way layout, Var(mean) = (MS_seed + MS_problem - MS_rest) / (S P), but at least the larger of
    the first two alone. Degrees of freedom by Satterthwaite (1946). Where rows are equally good, a
    t test with it rejects 2.7 to 6.5 % at 0.05 with 5 seeds, and 3 to 7.5 % with 3 (simulated for
    100 and 600 problems and several strengths of the effects). One seed: over problems only.
    """
    seeds, problems = d.shape
    ms_problem = seeds * d.mean(0).var(ddof=1)
    if seeds == 1:
        return math.sqrt(ms_problem / d.size), problems - 1
    ms_seed = problems * d.mean(1).var(ddof=1)
    rest = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    dfs = np.array([seeds - 1, problems - 1, (seeds - 1) * (problems - 1)])
    squares = np.array([ms_seed, ms_problem, (rest**2).sum() / dfs[2]])
    total, larger = squares @ [1, 1, -1], int(ms_problem > ms_seed)
    if total <= squares[larger]:
        return math.sqrt(squares[larger] / d.size), float(dfs[larger])
    return math.sqrt(total / d.size), float(total**2 / (squares**2 / dfs).sum())


def crossed_test(d: np.ndarray) -> dict:
    """Mean of paired differences (S, P), its 95 % interval, and p by Student's t."""
    mean, (error, df) = float(d.mean()), crossed_error(d)
    if error < 1e-12:  # no difference at all
        half, p = 0.0, float(not mean)
    else:
        half, p = t_quantile(df) * error, t_tail(mean / error, df)
    return {"seeds": len(d), "delta": mean, "low": mean - half, "high": mean + half, "p": p}


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for their number, by Holm's step-down method, in the order given."""
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = corrected[i] = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
    return corrected


def settled(test: dict) -> str:
    """ahead or behind if the corrected p says so for other seeds, too; else level."""
    if test["seeds"] == 1 or test["holm"] >= 0.05:
        return "level"
    return "ahead" if test["delta"] > 0 else "behind"


def shares(line: dict) -> np.ndarray:
    """Share of right samples per held-out problem, (P,)."""
    return np.array([int(digit) for digit in line["right"]]) / SAMPLES


def compare(runs: dict, pairs: dict) -> dict[str, dict]:
    """name -> crossed_test of its two rows, paired by seed, with the p corrected over all of them.

    Pairs without a common seed are left out.
    """
    found = {}
    for name, (row, base) in pairs.items():
        first, second = ({run["seed"]: shares(run) for run in runs.get(r, ())} for r in (row, base))
        if both := sorted(first.keys() & second.keys()):
            found[name] = crossed_test(np.stack([first[seed] - second[seed] for seed in both]))
    for test, p in zip(found.values(), holm([test["p"] for test in found.values()])):
        test["holm"] = p
    return found


def mean_of(values) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def spent(run: dict, unit: str) -> np.ndarray:
    """Completions, decoded tokens or seconds spent after each step."""
    steps = len(run["accuracy"])
    each = np.array(run["decoded" if unit == "seconds" else unit][:steps])
    return np.cumsum(each * run["token_seconds"] if unit == "seconds" else each)


def curve_at(run: dict, unit: str, budget: float) -> float:
    """Rollout accuracy over the last tenth of the run's curve, cut where the budget is spent."""
    kept = max(1, int((spent(run, unit) <= budget * (1 + 1e-9)).sum()))
    return float(np.mean(run["accuracy"][kept - max(1, kept // 10):kept]))


# --------------------------------------------------------------------------------------------------
# Figures of a task


def route_values(problems: int) -> tuple[float, float]:
    """Chance of the best route and of a random one, means over the test problems of `doors`."""
    records = doors.make_problems("test", problems)
    best = [doors.chance(r["problem"], r["answer"]) for r in records]
    halls = [hall for r in records for hall in doors.doors_of(r["problem"])]
    return float(np.mean(best)), float(np.mean([np.mean([*h.values()]) / 10 for h in halls]))


def plan_facts(start: dict) -> dict:
    """What `eval.py --analysis plans` found for the SFT model, with tau2, sigma2 and z*."""
    found = start.get("analysis") or {}
    found = found if "icc" in found else next(iter(found.values()), {})  # of the one benchmark
    if "icc" not in found:
        return {}
    tau2, sigma2 = found["plan_std"] ** 2, found["cot_std"] ** 2
    best = best_cots(tau2, sigma2, found["plan_tokens"], found["cot_tokens"])
    return {**found, "tau2": tau2, "sigma2": sigma2, "best": best}


def token_cost(facts: dict, z: int) -> float:
    """Tokens for a given precision of the plan gradient with z CoTs per plan, relative to z = 1.

    The variance is (tau2 + sigma2 / z) / m, and m plans decode m (c_p + z c_c) tokens: m cancels.
    """
    cost = lambda z: (facts["tau2"] + facts["sigma2"] / z) * (
        facts["plan_tokens"] + z * facts["cot_tokens"]
    )
    return cost(z) / cost(1) if cost(1) else 1.0


def cots_of(run: dict) -> int:
    words = run["flags"].split()
    return int(words[words.index("--cots") + 1])


def task_figures(task: str, lines: list[dict], rows: list[str]) -> dict:
    """Everything that the sections on a task show."""
    mine = {(line["row"], line["seed"]): line for line in lines if line["task"] == task}
    runs = {row: [mine[key] for key in sorted(mine) if key[0] == row] for row in rows}
    runs = {row: found for row, found in runs.items() if found}
    start = mine.get(("SFT", 0), {})
    # Without SFT completions are shorter at first: that row's end is no budget for the others.
    ends = [run for row, found in runs.items() if "no SFT" not in row for run in found]
    budgets = {u: min((spent(run, u)[-1] for run in ends), default=0.0) for u in UNITS}
    against = compare(runs, {row: (row, GRPO) for row in runs if row != GRPO})
    per_row = {}
    for row, found in runs.items():
        with_plan = [run for run in found if "with_plan" in run]
        per_row[row] = {
            "held_out": [float(shares(run).mean()) for run in found],
            "z": cots_of(found[0]),
            "decoded": np.mean([spent(run, "decoded")[-1] for run in found]),
            "curve": {u: np.mean([curve_at(r, u, budgets[u]) for r in found]) for u in UNITS},
            "icc": mean_of(run["icc"] for run in found),
            "credit_corr": mean_of(run["credit_corr"] for run in found),
            **plan_use(found, with_plan),
        }
    return {
        "task": task, "runs": runs, "start": start, "budgets": budgets, "rows": per_row,
        "facts": plan_facts(start), "against": against, "contrasts": compare(runs, CONTRASTS),
        "start_use": plan_use([start], [start]) if start else {},
    }


def plan_use(runs: list[dict], with_plan: list[dict]) -> dict:
    """Means over runs of `did`, and of accuracy with other plans where that was measured."""
    did = {name: mean_of(run["did"].get(name) for run in runs) for name in runs[0]["did"]}
    other = [run["with_plan"] for run in with_plan]
    swapped = {name: mean_of(w.get(name) for w in other) for name in ("true", "shuffled", "none")}
    own = [run.get("with_plan", {}).get("own") or shares(run).mean() for run in with_plan or runs]
    corr = mean_of(run.get("score_corr") for run in runs)
    return {"did": did, "own": float(np.mean(own)), "score_corr": corr, **swapped}


# --------------------------------------------------------------------------------------------------
# Figures as text


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f}"


def number(x: float | None, digits: int = 3) -> str:
    return "–" if x is None else "no limit" if math.isinf(x) else f"{x:.{digits}f}"


def p_text(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def interval(test: dict) -> str:
    delta, low, high = (100 * test[name] for name in ("delta", "low", "high"))
    return f"{delta:+z.1f} ({low:+z.1f} to {high:+z.1f}){'°' if test['seeds'] == 1 else ''}"
