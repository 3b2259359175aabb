"""How much does the plan decide? The variance of outcomes between plans, and within a plan.

A question has m plans, and each plan z CoTs. r_ik is the return of CoT k of plan i (an outcome, 0
or 1, unless it says otherwise), and V(t) = E[r | t] the value of plan t. Then
    tau2    variance of V(t) over plans: what the choice of plan explains
    sigma2  mean variance of r within a plan: execution
    ICC     tau2 / (tau2 + sigma2), the intraclass correlation: 0 if plans do not matter, 1 if they
            decide everything
A plan that never closed has z equal returns, and counts like any other.
"""

import math

import numpy as np
import torch

from plumbing.ranks import all_sum

MEMORY = 20  # steps that the running mean looks back; the policy changes slowly


# --------------------------------------------------------------------------------------------------
# Estimates


def variances(returns: torch.Tensor) -> torch.Tensor:
    """Unbiased estimates of tau2 and sigma2 by nested analysis of variance. (N, m, z) -> (N, 2)

    MSB = z * variance of the plans' means, MSW = mean of the variances within plans; tau2 =
    (MSB - MSW) / z, which chance may make negative, and sigma2 = MSW. Float64. Raises ValueError
    unless m >= 2 and z >= 2.
    """
    _, m, z = returns.shape
    if m < 2 or z < 2:
        raise ValueError(f"variances wants at least 2 plans and 2 CoTs per plan, got {m} x {z}")
    within = returns.double().var(2, correction=1).mean(1)  # MSW, (N,)
    between = returns.double().mean(2).var(1, correction=1)  # MSB / z, (N,)
    return torch.stack([between - within / z, within], 1)


def icc(tau2: float, sigma2: float) -> float:
    """tau2 / (tau2 + sigma2), in 0..1. A negative estimate of tau2 counts as 0."""
    tau2 = max(tau2, 0.0)
    return tau2 / (tau2 + sigma2) if tau2 + sigma2 > 0 else 0.0


def reliability(share: float, z: int) -> float:
    """Squared correlation of a plan's score from z CoTs with its value, given the ICC `share`."""
    return z * share / (1 + (z - 1) * share)


def best_cots(tau2: float, sigma2: float, plan_tokens: float, cot_tokens: float) -> float:
    """z*: the CoTs per plan that make the plan gradient most precise at an equal token budget.

    A plan costs plan_tokens + z * cot_tokens, and its variance is tau2 + sigma2 / z (Cochran,
    Sampling Techniques, chapter 10). Infinite if plans do not differ.
    """
    if tau2 <= 0 or cot_tokens <= 0:
        return math.inf
    return math.sqrt(sigma2 / tau2 * plan_tokens / cot_tokens)


def best_within(tau2: float, sigma2: float, m: int, z: int) -> float:
    """w*: the weight of a CoT's siblings in its baseline that makes its advantage least noisy.

    The baseline is w * (mean of the z - 1 siblings) + (1 - w) * (mean of the m - 1 other plans).
    Their errors have the variances a and b. If plans do not differ, w* is (z - 1) / (m z - 1):
    all other completions count the same. 0 without siblings.
    """
    if z < 2:
        return 0.0
    tau2, sigma2 = (tau2, sigma2) if tau2 > 0 and sigma2 >= 0 else (0.0, 1.0)
    a = sigma2 / (z - 1)
    b = tau2 * m / (m - 1) + sigma2 / ((m - 1) * z)
    return b / (a + b)


def icc_interval(parts: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the ICC over the choice of questions. `parts`: their `variances` (N, 2).

    The mean of u = tau2 - ICC (tau2 + sigma2) is 0 at the true ICC, whatever the questions are. The
    interval holds each value at which the mean of u is no more of its standard errors away from 0
    than in resamples of the questions (bootstrap-t of an estimating function; Hu and Kalbfleisch,
    Canadian Journal of Statistics 28, 2000). It needs no variance of a ratio, which is skewed.
    bench/plans.py measures how often it covers. Percentiles of the resampled ICC cover too seldom.
    With 30 questions x 4 plans and an ICC near 0.9, where CoTs hardly differ, it covers too often.
    (0, 1) where the questions say nothing.
    """
    count, (tau2, total) = len(parts), (parts[:, 0], parts.sum(1))  # (N,) each
    u = tau2 - total * (tau2.mean() / max(total.mean(), 1e-9))
    if count < 2 or u.std() < 1e-9:
        return 0.0, 1.0
    errors_off = lambda mean, variance: mean / np.sqrt(np.maximum(variance, 1e-18) / count)
    resamples = max(200, min(resamples, 4_000_000 // count))  # bounds the memory
    drawn = u[np.random.default_rng(seed).integers(0, count, (resamples, count))]
    low, high = np.quantile(errors_off(drawn.mean(1), drawn.var(1)), [0.025, 0.975])
    shares = np.linspace(0, 1, 2001)
    (a, b), (_, c) = np.cov(tau2, total, bias=True)
    off = errors_off(tau2.mean() - shares * total.mean(), a - 2 * shares * b + shares**2 * c)
    inside = shares[(low <= off) & (off <= high)]
    return (float(inside[0]), float(inside[-1])) if len(inside) else (0.0, 0.0)


# --------------------------------------------------------------------------------------------------
# In evaluation: eval.py --analysis plans

ANALYSIS = """plans on {name}: {n_problems} problems x {plans} plans x {cots} CoTs
  ICC {icc:z.3f}  95 % interval {ci_low:z.3f} to {ci_high:z.3f}
  standard deviation of plans {plan_std:.3f}, of the CoTs of a plan {cot_std:.3f}
  mean length of plans {plan_tokens:.1f}, of CoTs {cot_tokens:.1f}  plans that closed {closed:.3f}
  z* {best} CoTs per plan make the plan gradient most precise at an equal token budget
  reliability of a plan's score for z = 1 to 8: {reliabilities}
  {advice}
  The accuracy's interval holds for plan trees, too. But maj@n and pass@k above k = 1 are those of
  samples that share plans: evaluate without --analysis for independent ones."""


def analyse(records: list[dict], cots: int, seed: int = 0) -> dict[str, dict]:
    """What the plans decide, for each benchmark: benchmark -> figures, from eval records.

    Their samples are plan-major, `cots` per plan, and have `correct`, `tokens` and `plan_tokens`,
    the length of a plan that closed, else 0. `best_cots` is None if plans do not differ.
    """
    groups = {}
    for record in records:
        groups.setdefault(record["benchmark"], []).append(record["samples"])
    return {name: benchmark_figures(group, cots, seed) for name, group in groups.items()}


def benchmark_figures(group: list[list[dict]], cots: int, seed: int) -> dict:
    """The figures of `analyse` for the samples of a benchmark's questions."""
    returns = torch.tensor([[float(s["correct"]) for s in samples] for samples in group])  # (N, G)
    parts = variances(returns.reshape(len(group), -1, cots)).numpy()  # (N, 2)
    tau2, sigma2 = parts.mean(0).tolist()
    share, (low, high) = icc(tau2, sigma2), icc_interval(parts, seed)
    closed = [s for samples in group for s in samples if s["plan_tokens"]]
    plan = sum(s["plan_tokens"] for s in closed) / max(len(closed), 1)
    cot = sum(s["tokens"] - s["plan_tokens"] for s in closed) / max(len(closed), 1)
    best = best_cots(tau2, sigma2, plan, cot)
    figures = {
        "n_problems": len(group), "plans": returns.shape[1] // cots, "cots": cots,
        "icc": share, "ci_low": low, "ci_high": high,
        "plan_std": math.sqrt(max(tau2, 0.0)), "cot_std": math.sqrt(sigma2),
        "plan_tokens": plan, "cot_tokens": cot, "closed": len(closed) / returns.numel(),
        "best_cots": best if math.isfinite(best) else None,
        "reliability": [reliability(share, z) for z in range(1, 9)],  # of z = 1 to 8
    }
    return {**figures, "advice": advice(figures)}


def advice(figures: dict) -> str:
    """One sentence on what the figures of `analyse` mean for training."""
    share, low, high = (100 * figures[name] for name in ("icc", "ci_low", "ci_high"))
    if figures["closed"] < 0.9:
        return (
            f"Only {100 * figures['closed']:.0f} % of the plans closed, so the figures say little "
            "about plans: train the model on plans first (sft.py), or raise --max_plan_tokens."
        )
    if figures["plan_std"] + figures["cot_std"] == 0:
        return "Each problem was always right or always wrong: choose others to learn about plans."
    if low == 0 or figures["best_cots"] is None:
        return (
            f"The plan decides at most {high:.0f} % of the outcome, and perhaps nothing: more "
            "problems would tell."
        )
    # The best whole number is the smallest z with z (z + 1) >= z*^2.
    best = max(1, math.ceil(math.sqrt(figures["best_cots"] ** 2 + 0.25) - 0.5))
    few = "one CoT per plan is best" if best == 1 else f"{best} CoTs per plan are best"
    return f"The plan decides {share:.0f} % of the outcome; at these lengths {few}."


def analysis_text(name: str, figures: dict) -> str:
    """The figures of a benchmark as eval.py prints them."""
    best = figures["best_cots"]
    best = "unknown: how many" if best is None else f"{best:.2f}"
    each = "  ".join(f"{share:.2f}" for share in figures["reliability"])
    return ANALYSIS.format(name=name, best=best, reliabilities=each, **figures)


# --------------------------------------------------------------------------------------------------
# In training


def sibling_weight(config, variances: list) -> float:
    """--within as a number. "auto" is w* from the running means of *earlier* steps.

    The weight must not depend on the returns that it weighs: only so is the gradient unbiased.
    """
    if config.within != "auto":
        return float(config.within)
    return best_within(*variances[:2], config.plans, config.cots)


def plan_metrics(groups: list, rewards: dict, state: dict, device) -> dict[str, float]:
    """What the plans of a step decide, over all ranks; updates state["variances"]. A collective.

    `rewards["correct"]`: (N, m, z). state["variances"]: running means of tau2 and sigma2, and the
    number of steps in them. Without siblings (z = 1) there are no figures. One that does not exist,
    where all groups are all right or all wrong, is left out.
    """
    correct = rewards["correct"]
    if correct.shape[2] < 2:
        return {}
    closed = [r for group in groups for r in group.rollouts if r.plan_tokens]
    plan_tokens = sum(r.plan_tokens for r in closed)  # a plan counts z times, and so does a CoT
    cot_tokens = sum(len(r.ids) - r.plan_tokens for r in closed)
    found = [*variances(correct).sum(0).tolist(), len(correct), plan_tokens, cot_tokens]
    sums = all_sum(torch.tensor(found, dtype=torch.float64, device=device)).tolist()
    tau2, sigma2 = (total / max(sums[2], 1) for total in sums[:2])
    if not tau2 + sigma2 > 1e-9:
        return {}
    steps = min(state["variances"][2] + 1, MEMORY)
    means = [old + (new - old) / steps for old, new in zip(state["variances"], (tau2, sigma2))]
    state["variances"] = [*means, steps]
    metrics = {
        "plan_icc": icc(tau2, sigma2),
        "plan_icc_mean": icc(*means),
        "plan_std": math.sqrt(max(tau2, 0.0)),
        "cot_std": math.sqrt(sigma2),
        "best_cots": best_cots(*means, *sums[3:]),
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def credit_metrics(rewards: dict, advantages: tuple, without: tuple, device) -> dict[str, float]:
    """Where the advantages of a step come from, over all ranks. A collective.

    `advantages` and `without` (as if beta were 0): of plan tokens and CoT tokens, (N, m, z) each.
    """
    new, old = (torch.stack(pair).double() for pair in (advantages, without))  # (2, N, m, z)
    all_right = rewards["correct"].flatten(1).all(1)  # (N,)
    squares = new.square().sum((0, 2, 3))  # (N,)
    x, y = new.flatten(), old.flatten()
    found = [squares[all_right].sum(), squares.sum(), x.new_tensor(len(x)), x.sum(), y.sum()]
    found = torch.stack([*found, x @ x, y @ y, x @ y]).to(device)
    right, total, n, sx, sy, xx, yy, xy = all_sum(found).tolist()
    metrics = {"all_right_share": right / total if total > 0 else 0.0}
    spread = (xx - sx * sx / max(n, 1)) * (yy - sy * sy / max(n, 1))
    if new.shape[3] > 1 and spread > 1e-20:
        metrics["credit_corr"] = (xy - sx * sy / n) / math.sqrt(spread)
    return metrics
