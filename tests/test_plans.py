"""The plan's share of the variance: by hand, by enumeration of all outcomes, and by simulation."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.plans import simulate
from grpo import Rollout, segment_advantages
from plumbing.plans import (
    MEMORY,
    advice,
    analyse,
    analysis_text,
    best_cots,
    best_within,
    credit_metrics,
    icc,
    icc_interval,
    plan_metrics,
    reliability,
    sibling_weight,
    variances,
)

VALUES, CHANCES = (0.2, 0.6, 0.9), (0.3, 0.5, 0.2)  # three kinds of plan, and how often each comes
MEAN = sum(p * v for p, v in zip(CHANCES, VALUES))
TAU2 = sum(p * (v - MEAN) ** 2 for p, v in zip(CHANCES, VALUES))
SIGMA2 = sum(p * v * (1 - v) for p, v in zip(CHANCES, VALUES))


def all_groups(m, z):
    """Every group of m plans and z outcomes each: probabilities (N,) and returns (N, m, z)."""
    chances, groups = [], []
    for kinds in itertools.product(range(3), repeat=m):
        for outcomes in itertools.product((0, 1), repeat=m * z):
            group = np.reshape(outcomes, (m, z))
            value = np.array([VALUES[kind] for kind in kinds])[:, None]
            chance = np.prod([CHANCES[kind] for kind in kinds])
            chances.append(chance * np.prod(np.where(group, value, 1 - value)))
            groups.append(group)
    assert sum(chances) == pytest.approx(1)
    return torch.tensor(chances, dtype=torch.float64), torch.tensor(np.array(groups)).double()


# --------------------------------------------------------------------------------------------------
# Estimates

BY_HAND = [  # outcomes of 2 plans x 2 CoTs, tau2, sigma2
    ([[1, 1], [0, 0]], 0.5, 0.0),  # means 1 and 0: variance 1/2; none within
    ([[1, 0], [0, 1]], -0.25, 0.5),  # equal means; variance 1/2 within each, 0 - 0.5 / 2
    ([[1, 1], [1, 0]], 0.0, 0.25),  # means 1 and 1/2: 1/8; (0 + 1/2) / 2 within; 1/8 - 1/8
    ([[1, 1], [1, 1]], 0.0, 0.0),
]


@pytest.mark.parametrize("outcomes, tau2, sigma2", BY_HAND)
def test_variances_by_hand(outcomes, tau2, sigma2):
    assert variances(torch.tensor([outcomes]))[0].tolist() == pytest.approx([tau2, sigma2])


def test_variances_equal_the_sums_of_squares():
    returns = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for group, found in zip(returns.tolist(), variances(returns).tolist()):
        mean = sum(map(sum, group)) / 15
        between = sum(5 * (sum(plan) / 5 - mean) ** 2 for plan in group) / 2  # MSB
        within = sum((r - sum(plan) / 5) ** 2 for plan in group for r in plan) / 12  # MSW
        assert found == pytest.approx([(between - within) / 5, within], abs=1e-12)


@pytest.mark.parametrize("m, z", [(2, 2), (3, 2), (2, 3)])
def test_variances_are_unbiased(m, z):
    chances, groups = all_groups(m, z)
    mean = (chances[:, None] * variances(groups)).sum(0)
    assert mean.tolist() == pytest.approx([TAU2, SIGMA2], abs=1e-12)


def test_variances_want_two_plans_of_two_cots():
    for shape in ((3, 1, 4), (3, 4, 1)):
        with pytest.raises(ValueError, match="at least 2 plans and 2 CoTs"):
            variances(torch.zeros(shape))


def test_icc_by_hand():
    assert icc(0.1, 0.3) == 0.25 and icc(0.2, 0.0) == 1
    assert icc(-0.1, 0.3) == icc(0.0, 0.0) == icc(-0.1, 0.05) == 0


@pytest.mark.parametrize("z", [1, 2, 3, 8])
def test_reliability_is_the_squared_correlation_of_score_and_value(z):
    points = []  # chance, value, score
    for chance, value in zip(CHANCES, VALUES):
        for right in range(z + 1):
            ways = math.comb(z, right) * value**right * (1 - value) ** (z - right)
            points.append((chance * ways, value, right / z))
    weight, value, score = np.array(points).T
    (a, b), (_, c) = np.cov(value, score, aweights=weight, bias=True)
    assert reliability(icc(TAU2, SIGMA2), z) == pytest.approx(b * b / (a * c))


@pytest.mark.parametrize("tau2, sigma2", [(0.01, 0.2), (0.1, 0.1), (0.2, 0.02)])
@pytest.mark.parametrize("plan, cot", [(13, 30), (200, 1500), (90, 10)])
def test_best_cots_has_the_smallest_variance_of_any_number_at_equal_tokens(tau2, sigma2, plan, cot):
    z = np.linspace(0.01, 30, 300_000)
    variance = (tau2 + sigma2 / z) * (plan + z * cot)  # times 1 / m, with m (plan + z cot) fixed
    expected = z[variance.argmin()]
    assert best_cots(tau2, sigma2, plan, cot) == pytest.approx(expected, abs=0.01)


def test_best_cots_where_plans_do_not_differ():
    assert best_cots(0.0, 0.2, 10, 20) == best_cots(-0.1, 0.2, 10, 20) == math.inf


@pytest.mark.parametrize("m, z", [(2, 2), (3, 2), (2, 3)])
def test_best_within_makes_the_smallest_advantages(m, z):
    """E[A^2] of the CoTs is a parabola in w, so three weights give its lowest point."""
    chances, groups = all_groups(m, z)
    bonus = torch.zeros(groups.shape[:2], dtype=torch.float64)

    def mean_square(w):
        cot = segment_advantages(groups, bonus, w, False)[1]
        return float((chances * cot.square().mean((1, 2))).sum())

    low, middle, high = map(mean_square, (0.0, 0.5, 1.0))
    slope, curve = 4 * middle - 3 * low - high, 2 * (low + high) - 4 * middle
    assert best_within(TAU2, SIGMA2, m, z) == pytest.approx(-slope / (2 * curve), abs=1e-6)


def test_best_within_at_its_ends():
    assert best_within(0.0, 0.3, 4, 3) == best_within(-0.1, 0.3, 4, 3) == pytest.approx(2 / 11)
    assert best_within(0.2, 0.0, 4, 3) == 1 and best_within(0.2, 0.1, 4, 1) == 0


# --------------------------------------------------------------------------------------------------
# The interval

def plain_percentiles(parts, seed):
    drawn = parts[np.random.default_rng(seed).integers(0, len(parts), (400, len(parts)))].mean(1)
    return np.quantile(drawn[:, 0] / np.maximum(drawn.sum(1), 1e-9), [0.025, 0.975])


# In 3,600 other simulations, the interval covered 94.4 % and percentiles 91.6 %. Shares of 1,200
# have a standard error of 0.7 %: the first bars are three of it away. bench/plans.py has more.
def test_the_interval_covers_and_percentiles_cover_less():
    rng, hits, plain, count = np.random.default_rng(0), 0, 0, 0
    for (m, z), share in itertools.product([(4, 4), (16, 4)], [0.02, 0.1, 0.3]):
        for seed, parts in enumerate(simulate(rng, (200, 20, m, z), share, 0.4, 0.75)):
            low, high = icc_interval(parts, seed, resamples=400)
            hits, count = hits + (low <= share <= high), count + 1
            low, high = plain_percentiles(parts, seed)
            plain += low <= share <= high
    assert 0.923 <= hits / count <= 0.965
    assert (hits - plain) / count > 0.015  # the two judge the same simulations


def test_the_interval_of_many_questions_is_the_delta_methods():
    parts = simulate(np.random.default_rng(1), (3000, 4, 4), 0.3)
    (tau2, total), share = (parts[:, 0], parts.sum(1)), parts[:, 0].mean() / parts.sum(1).mean()
    half = 1.96 * np.std(tau2 - share * total) / total.mean() / math.sqrt(3000)
    assert icc_interval(parts) == pytest.approx((share - half, share + half), abs=half / 8)


def test_the_interval_where_questions_say_little():
    assert icc_interval(np.zeros((5, 2))) == (0, 1)  # all right or all wrong
    assert icc_interval(np.array([[0.1, 0.2]])) == (0, 1)
    assert icc_interval(np.array([[0.3, 0.0]] * 9)) == (0, 1)  # as of plans that never close
    few = np.array([[0.2, 0.1], [0.0, 0.3], [-0.1, 0.4]])
    low, high = icc_interval(few)
    assert 0 <= low < icc(*few.mean(0)) < high <= 1
    many = simulate(np.random.default_rng(2), (40, 4, 4), 0.3)
    assert icc_interval(many, seed=1) != icc_interval(many) == icc_interval(many, seed=0)


# --------------------------------------------------------------------------------------------------
# Of an evaluation

def eval_record(benchmark, outcomes, plan_tokens=(4, 6), cot_tokens=10):
    """An eval record of two plans x two CoTs; of a plan that never closed, one whole completion."""
    samples = []
    for i, right in enumerate(outcomes):
        plan = plan_tokens[i // 2]
        samples.append({"correct": bool(right), "tokens": plan + cot_tokens, "plan_tokens": plan})
    return {"benchmark": benchmark, "samples": samples}


def test_analysis_by_hand():
    records = [eval_record("a", (1, 1, 0, 0)), eval_record("b", (1, 0, 1, 1))]
    records += [eval_record("a", (1, 1, 1, 0), (8, 0)), eval_record("a", (0, 0, 0, 0))]
    found = analyse(records, cots=2)
    assert list(found) == ["a", "b"]
    a = found["a"]
    # tau2 is 0.5, 0 and 0, sigma2 0, 0.25 and 0.
    assert a["icc"] == pytest.approx(2 / 3) and a["n_problems"] == 3
    assert (a["plans"], a["cots"], a["closed"]) == (2, 2, pytest.approx(10 / 12))
    assert a["plan_std"] == pytest.approx(math.sqrt(0.5 / 3))
    assert a["cot_std"] == pytest.approx(math.sqrt(0.25 / 3))
    assert a["plan_tokens"] == pytest.approx((2 * (4 + 6) + 2 * 8 + 2 * (4 + 6)) / 10)
    assert a["cot_tokens"] == 10
    assert a["best_cots"] == pytest.approx(math.sqrt(0.5 * 5.6 / 10))
    assert a["reliability"] == pytest.approx([2 * z / (3 + 2 * (z - 1)) for z in range(1, 9)])
    assert found["b"]["icc"] == 0 and found["b"]["best_cots"] is None
    text = analysis_text("a", a)
    assert "ICC 0.667" in text and "3 problems x 2 plans x 2 CoTs" in text and a["advice"] in text
    assert "z* unknown" in analysis_text("b", found["b"])


ADVICE = [
    ({}, "The plan decides 30 % of the outcome; at these lengths one CoT per plan is best."),
    ({"best_cots": 1.42}, "at these lengths 2 CoTs per plan are best."),  # 1 x 2 < 1.42^2 <= 2 x 3
    ({"best_cots": 1.41}, "at these lengths one CoT per plan is best."),
    ({"best_cots": 5.4}, "at these lengths 5 CoTs per plan are best."),
    ({"ci_low": 0.0}, "The plan decides at most 40 % of the outcome, and perhaps nothing"),
    ({"closed": 0.12}, "Only 12 % of the plans closed"),
    ({"plan_std": 0.0, "cot_std": 0.0}, "always right or always wrong"),
]


@pytest.mark.parametrize("change, sentence", ADVICE)
def test_advice(change, sentence):
    figures = {"icc": 0.3, "ci_low": 0.2, "ci_high": 0.4, "closed": 1.0, "best_cots": 1.0}
    assert sentence in advice({**figures, "plan_std": 0.2, "cot_std": 0.3, **change})


@pytest.mark.parametrize("tau2, sigma2, plan, cot", [(0.02, 0.2, 40, 60), (0.1, 0.1, 90, 40)])
def test_the_advised_number_of_cots_is_the_best_whole_one(tau2, sigma2, plan, cot):
    best = min(range(1, 50), key=lambda z: (tau2 + sigma2 / z) * (plan + z * cot))
    figures = {"icc": 0.3, "ci_low": 0.2, "ci_high": 0.4, "closed": 1.0, "plan_std": 0.2}
    figures |= {"cot_std": 0.3, "best_cots": best_cots(tau2, sigma2, plan, cot)}
    assert best > 1 and f"{best} CoTs per plan are best" in advice(figures)


# --------------------------------------------------------------------------------------------------
# In training

def step(outcomes, state, plan_tokens=5):
    """The plan metrics of a step with these outcomes, (N, m, z) nested lists."""
    correct = torch.tensor(outcomes, dtype=torch.bool)
    rollouts = [Rollout([], [], [0] * 20, plan_tokens=plan_tokens) for _ in range(4)]
    groups = [SimpleNamespace(rollouts=rollouts) for _ in correct]
    return plan_metrics(groups, {"correct": correct}, state, "cpu")


def test_plan_metrics_over_steps():
    state = {"variances": [0.0, 0.0, 0]}
    first = step([[[1, 1], [0, 0]], [[1, 0], [0, 1]]], state)  # tau2 0.5, -0.25; sigma2 0, 0.5
    assert first["plan_icc"] == first["plan_icc_mean"] == pytest.approx(0.125 / 0.375)
    assert first["plan_std"] == pytest.approx(math.sqrt(0.125)) and first["cot_std"] == 0.5
    assert first["best_cots"] == pytest.approx(math.sqrt(0.25 / 0.125 * 5 / 15))
    second = step([[[1, 0], [0, 1]]], state)  # tau2 -0.25, sigma2 0.5: the means are -1/16, 3/8
    assert state["variances"] == pytest.approx([-0.0625, 0.375, 2])
    assert second["plan_icc"] == second["plan_icc_mean"] == second["plan_std"] == 0
    assert "best_cots" not in second
    third = step([[[1, 1], [0, 0]]], state)  # tau2 0.5, sigma2 0: the means are 1/8 and 1/4
    assert third["plan_icc"] == 1 and third["plan_icc_mean"] == pytest.approx(1 / 3)
    assert third["best_cots"] == pytest.approx(math.sqrt(2 * 5 / 15))
    before = dict(state)
    assert step([[[1, 1], [1, 1]]], state) == {} and state == before  # no variance to share out
    assert step([[[1], [0]]], state) == {} and state == before  # no siblings
    for _ in range(300):  # the oldest steps are forgotten
        last = step([[[1, 1], [0, 0]]], state)
    assert state["variances"][2] == MEMORY and last["plan_icc_mean"] == pytest.approx(1)


def test_sibling_weight_comes_from_earlier_steps():
    config = SimpleNamespace(within="auto", plans=4, cots=3)
    assert sibling_weight(config, [0.0, 0.0, 0]) == pytest.approx(2 / 11)
    assert sibling_weight(config, [0.1, 0.2, 7]) == best_within(0.1, 0.2, 4, 3)
    config.within = "0.5"
    assert sibling_weight(config, [0.1, 0.2, 7]) == 0.5


def test_credit_metrics_by_hand():
    generator = torch.Generator().manual_seed(0)
    plan, cot, plan0, cot0 = torch.randn(4, 3, 2, 2, generator=generator).double()
    correct = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [1, 0]], [[0, 0], [0, 0]]]).bool()
    found = credit_metrics({"correct": correct}, (plan, cot), (plan0, cot0), "cpu")
    x, y = (torch.stack(pair).flatten().numpy() for pair in ((plan, cot), (plan0, cot0)))
    assert found["credit_corr"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    share = (plan[0].square().sum() + cot[0].square().sum()) / (x @ x)
    assert found["all_right_share"] == pytest.approx(float(share), abs=1e-12)
    nothing = torch.zeros(3, 2, 2)
    found = credit_metrics({"correct": correct}, (nothing, nothing), (plan0, cot0), "cpu")
    assert found == {"all_right_share": 0.0}
