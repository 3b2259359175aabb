"""Credit between plan and CoT: is the gradient that of the expected return?

Small cases are enumerated: every group that can be drawn, with its probability. So biases are exact
figures. The rest is held against numbers worked by hand, simulation, and slow references.
"""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

import grpo
from bench import credit as bench
from conftest import make_tiny
from data.toy import make_model, make_tokenizer
from grpo import Config, Rollout, advantages, group_advantages, segment_advantages
from model_utils import make_optimizer, shard_model
from plumbing.plans import (
    MEMORY,
    best_cots,
    best_within,
    credit_metrics,
    icc,
    plan_metrics,
    reliability,
    sibling_weight,
    variances,
)

CPU = torch.device("cpu")
SEGMENT = dict(credit="segment", std_norm=False, beta=0.0)
WEIGHTS = [None, 1.0, 0.5, 0.0]


def segment(returns, within):
    """Segment credit alone: no plan reward, no division."""
    return segment_advantages(returns, returns.new_zeros(returns.shape[:2]), within, False)


def shared(returns, within=None):
    """Eq. 10 without the division: every token of a completion has the same advantage."""
    both = group_advantages(returns.flatten(1), std_norm=False).reshape(returns.shape)
    return both.mean(2), both


# --------------------------------------------------------------------------------------------------
# Every group of a tabular policy


def expected_and_true(credit, seed: int, m: int, z: int, within=None) -> tuple[list, list]:
    """E g over all ordered groups of 2 plans x 2 CoTs, and the gradient of E r. Plain autograd."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    logits = [draw(2).requires_grad_(), draw(2, 2).requires_grad_()]
    table, (plan, cot) = draw(2, 2), (x.log_softmax(-1) for x in logits)
    true = torch.autograd.grad(((plan[:, None] + cot).exp() * table).sum(), logits, retain_graph=1)

    slots = [(t, *cots) for t in range(2) for cots in itertools.product(range(2), repeat=z)]
    groups = torch.tensor(list(itertools.product(slots, repeat=m)))  # (N, m, 1 + z)
    t, c = groups[:, :, :1], groups[:, :, 1:]
    assert len(groups) == (2 * 2**z) ** m
    a_plan, a_cot = credit(table[t, c], within)
    logprob = plan[t].sum((1, 2)) + cot[t, c].sum((1, 2))
    assert float(logprob.detach().exp().sum()) == pytest.approx(1.0, abs=1e-12)
    scores = (a_plan[:, :, None] * plan[t] + a_cot * cot[t, c]).sum((1, 2)) / (m * z)
    return torch.autograd.grad((logprob.detach().exp() * scores).sum(), logits), true


@pytest.mark.parametrize("within", WEIGHTS)
@pytest.mark.parametrize("seed", range(3))
def test_segment_credit_is_unbiased_over_all_groups(seed, within):
    for part, true in zip(*expected_and_true(segment, seed, 2, 2, within)):
        assert true.abs().max() > 1e-2 and (part - true).abs().max() < 1e-12


@pytest.mark.parametrize("m, z", [(2, 2), (3, 2)])
def test_a_shared_mean_scales_the_plan_part_by_more_than_the_cot_part(m, z):
    """Eq. 10's baseline holds what it judges: by (m - 1) / m and (m z - 1) / (m z)."""
    (plan, cot), (true_plan, true_cot) = expected_and_true(shared, 0, m, z)
    assert torch.allclose(plan, (m - 1) / m * true_plan, rtol=0, atol=1e-12)
    assert torch.allclose(cot, (m * z - 1) / (m * z) * true_cot, rtol=0, atol=1e-12)
    for part, true in zip(*expected_and_true(segment, 0, m, z)):
        assert (part - true).abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------
# By hand


def test_segment_advantages_by_hand():
    """Plan means 1/2 and 1. With w = 1/4, the first CoT's baseline is 0/4 + 3/4 * 1."""
    returns = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    plan, cot = segment_advantages(returns, torch.zeros(1, 2), 0.25, std_norm=False)
    assert torch.allclose(plan, torch.tensor([[-0.5, 0.5]]))
    # 1 - 3/4; 0 - (1/4 + 3/4); twice 1 - (1/4 * 1 + 3/4 * 1/2)
    assert torch.allclose(cot, torch.tensor([[[0.25, -1.0], [0.375, 0.375]]]))
    # Both are divided by the std of the four returns, sqrt(3) / 4.
    divided = segment_advantages(returns, torch.zeros(1, 2), 0.25, std_norm=True)
    assert torch.allclose(divided[0], plan * 4 / math.sqrt(3))
    assert torch.allclose(divided[1], cot * 4 / math.sqrt(3))


def test_without_a_weight_all_other_completions_count_the_same():
    returns = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    _, cot = segment(returns, None)
    for n, i, k in itertools.product(range(5), range(4), range(3)):
        own = float(returns[n, i, k])
        others = (float(returns[n].sum()) - own) / 11
        assert float(cot[n, i, k]) == pytest.approx(own - others, abs=1e-5)


def test_without_siblings_both_parts_are_rloo():
    returns = torch.randn(5, 6, 1, generator=torch.Generator().manual_seed(0))
    plan, cot = segment(returns, 1.0)  # a weight without siblings to give it to
    for n, i in itertools.product(range(5), range(6)):
        others = [float(returns[n, j]) for j in range(6) if j != i]
        rloo = float(returns[n, i]) - sum(others) / 5
        assert float(plan[n, i]) == pytest.approx(rloo, abs=1e-5)
        assert float(cot[n, i]) == pytest.approx(rloo, abs=1e-5)


def test_one_plan_has_no_baseline():
    with pytest.raises(ValueError, match="at least 2 plans"):
        segment(torch.ones(1, 1, 4), None)


@pytest.mark.parametrize("std_norm", [False, True])
def test_equal_returns_give_exactly_zero(std_norm):
    returns = torch.full((1, 4, 3), 0.1) * (1 / 3)
    returns[0, 0, 0] = torch.nextafter(returns[0, 0, 0], torch.tensor(1.0))
    for part in segment_advantages(returns, torch.zeros(1, 4), 0.5, std_norm):
        assert float(part.abs().max()) == 0


def test_the_plan_reward_reaches_plan_tokens_only_and_sums_to_zero():
    """Plan scores 0 and 1: softmax(0, 2) at tau 1/2 is 1 / (1 + e^2) and 1 minus that."""
    correct = torch.tensor([[[False, False], [True, True]]])
    options = dict(beta=0.5, tau=0.5, alpha=0.0, structure=0.0)
    rewards = grpo.total_reward(correct, correct, torch.ones(1, 2, 2).long(), **options)
    config = Config(plans=2, cots=2, credit="segment", std_norm=False, **options)
    plan, cot = advantages(rewards, config, 0.25, beta=0.5)
    bonus = 0.5 * (1 / (1 + math.exp(-2)) - 1 / 2)
    assert torch.allclose(plan, torch.tensor([[[-1.0], [1.0]]]).expand(1, 2, 2) * (1 + bonus))
    # 0 - 3/4 * 1, and 1 - 1/4 * 1
    assert torch.allclose(cot, torch.tensor([[[-0.75, -0.75], [0.75, 0.75]]]))
    without = advantages(rewards, config, 0.25, beta=0.0)
    assert torch.equal(without[1], cot)
    added = (plan - without[0])[0, :, 0]
    assert torch.allclose(added, torch.tensor([-bonus, bonus]))


@pytest.mark.parametrize("credit", ["group", "segment"])
def test_equal_plans_get_no_bonus(credit):
    """Their softmax is 1/m each. Rounding must leave nothing: of 6 it would leave 1e-8."""
    correct = torch.ones(1, 6, 2, dtype=torch.bool)
    rewards = grpo.total_reward(correct, correct, torch.full((1, 6, 2), 9), 0.9, 1.0, 0.1)
    config = Config(plans=6, cots=2, beta=0.9, credit=credit)
    for part in advantages(rewards, config, 0.5, beta=0.9):
        assert float(part.abs().max()) == 0


@pytest.mark.parametrize("credit", ["group", "segment"])
def test_the_std_of_the_outcome_alone(credit):
    """An all-right group is not divided: its length rewards stay as small as they are."""
    outcome = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
    total = outcome + torch.tensor([0.00, 0.04])  # the second CoT of each plan is shorter
    rewards = {"total": total, "outcome": outcome, "plan": torch.zeros(2, 2, 2)}
    config = Config(plans=2, cots=2, credit=credit, std_of="outcome", beta=0.0)
    plan, cot = advantages(rewards, config, 1.0, beta=0.0)
    whole = advantages(rewards, Config(plans=2, cots=2, credit=credit, beta=0.0), 1.0, beta=0.0)
    # Group 1: the shared mean is 1.02, a CoT's only sibling is 0.04 away. Its std is 0.02.
    each = 0.02 if credit == "group" else 0.04
    assert torch.allclose(cot[0], torch.tensor([[-each, each]] * 2), atol=1e-6)
    assert torch.allclose(whole[1][0], cot[0] / 0.02, rtol=1e-4)
    # Group 2: outcomes 1 0 0 0 have the std sqrt(3) / 4; returns 1.00 0.04 0.00 0.04.
    first = (1 - 0.27 if credit == "group" else 1 - 0.04) * 4 / math.sqrt(3)
    assert float(cot[1, 0, 0]) == pytest.approx(first, rel=1e-5)
    values = first if credit == "group" else (0.52 - 0.02) * 4 / math.sqrt(3)
    assert float(plan[1, 0, 0]) == pytest.approx(values, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Every group through the loss, on a tiny model

# Three token ids: 1 ends a completion, 2 closes a plan, 0 does nothing. A plan has at most 2
# tokens, a completion at most 3.
PROMPT, STOP, CLOSE = [0, 2], 1, 2
TREE = dict(plans=2, cots=2, max_plan_tokens=2, max_completion_tokens=3)


def continuations(limit: int, ends: tuple) -> list[list[int]]:
    """All token sequences that end with a token of `ends`, or at the limit."""
    found, growing = [], [[]]
    for length in range(1, limit + 1):
        longer = [ids + [token] for ids in growing for token in range(3)]
        found += [ids for ids in longer if ids[-1] in ends or length == limit]
        growing = [ids for ids in longer if ids[-1] not in ends]
    return found


def trees() -> list[list[Rollout]]:
    """Every plan with every pair of CoTs: the z = 2 completions that take its place."""
    found = []
    for plan in continuations(2, (STOP, CLOSE)):
        cots = continuations(3 - len(plan), (STOP,)) if plan[-1] == CLOSE else [None]
        for pair in itertools.product(cots, repeat=2):
            root = Rollout(PROMPT, [3, 3], list(plan), [0.0] * len(plan), is_plan=True)
            if pair[0] is not None:
                root.fork()
            for cot, ids in zip(root.cots, pair):
                cot.ids, cot.logprobs = cot.ids + ids, cot.logprobs + [0.0] * len(ids)
            found.append(root.cots or [root] * 2)
    return found


def sequence_logprobs(model, completions: list[tuple]) -> dict[tuple, torch.Tensor]:
    """Of every prefix of these completions: one plain forward per completion."""
    found = {}
    for ids in completions:
        logits = model(torch.tensor([PROMPT + list(ids)])).logits[0, len(PROMPT) - 1:-1]
        logprobs = logits.log_softmax(-1)[range(len(ids)), ids].cumsum(0)
        found |= {ids[:n + 1]: logprobs[n] for n in range(len(ids))}
    return found


@pytest.fixture(scope="module")
def tiny_groups():
    """All groups of two plans, their probabilities and returns; and the true gradient."""
    model, roots = make_tiny("qwen2", vocab_size=3), trees()
    whole = sorted({tuple(r.ids) for root in roots for r in root})
    logprobs = sequence_logprobs(model, whole)
    table = dict(zip(whole, torch.randn(len(whole), generator=torch.Generator().manual_seed(0))))
    objective = sum(logprobs[ids].exp() * table[ids] for ids in whole)
    true = torch.autograd.grad(objective, list(model.parameters()))
    logprobs = {ids: float(logprob.detach()) for ids, logprob in logprobs.items()}
    assert sum(math.exp(logprobs[ids]) for ids in whole) == pytest.approx(1, abs=1e-5)

    def chance(root):
        if root[0].is_plan:
            return math.exp(logprobs[tuple(root[0].ids)])
        plan = logprobs[tuple(root[0].ids[:root[0].plan_tokens])]
        return math.exp(plan + sum(logprobs[tuple(r.ids)] - plan for r in root))

    # Two plans that close, with 7 and 3 CoTs, and three that do not.
    assert len(roots) == 7**2 + 3**2 + 3
    pairs = list(itertools.product(roots, repeat=2))
    weights = torch.tensor([chance(a) * chance(b) for a, b in pairs])
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    groups = [[*a, *b] for a, b in pairs]
    returns = torch.tensor([[float(table[tuple(r.ids)]) for r in group] for group in groups])
    return model, groups, weights, returns.reshape(-1, 2, 2), torch.cat([g.flatten() for g in true])


def copies(groups: list[list[Rollout]]) -> list[Rollout]:
    """The groups' completions one after another, each group with rollouts of its own."""
    found = []
    for group in groups:
        own = {id(r): Rollout(**{**vars(r), "cots": []}) for r in group}
        found += [own[id(r)] for r in group]
    return found


def mean_gradient(tiny_groups, within, **settings) -> torch.Tensor:
    """E g over all groups, as the update computes it.

    It is linear in the advantages. So one update holds all groups, each one's advantages times its
    probability. `--loss_agg constant` divides by the number of completions and the token limit.
    """
    original, groups, weights, returns, _ = tiny_groups
    config = Config(**TREE, kl_coef=0.0, loss_agg="constant", **settings)
    config.tokens_per_micro_batch = 12
    rewards = {"total": returns, "outcome": returns, "plan": torch.zeros_like(returns)}
    parts = advantages(rewards, config, within, beta=0.0)
    rollouts, scale = copies(groups), (len(groups) * weights)[:, None, None]
    grpo.note_advantages(rollouts, *(part * scale for part in parts))
    held = []

    def hold(model, optimizer, lr, max_grad_norm):
        held.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "optimizer_step", hold)
        model = shard_model(make_tiny("qwen2", vocab_size=3))
        micros = grpo.make_micro_batches(rollouts, config, CPU)
        assert len(micros) > 1  # some groups are spread over micro-batches
        grpo.update(model, make_optimizer(model, 1e-3, 0.0), micros, config, 1e-3)
    return -config.max_completion_tokens * held[0]  # the loss is minimised


def relative_error(estimate: torch.Tensor, truth: torch.Tensor) -> float:
    return float((estimate - truth).norm() / truth.norm())


@pytest.mark.parametrize("within", WEIGHTS)
def test_the_update_follows_the_gradient_of_the_expected_return(tiny_groups, within):
    assert relative_error(mean_gradient(tiny_groups, within, **SEGMENT), tiny_groups[-1]) < 1e-5


def test_a_shared_mean_does_not(tiny_groups):
    estimate = mean_gradient(tiny_groups, None, credit="group", std_norm=False, beta=0.0)
    assert relative_error(estimate, tiny_groups[-1]) > 0.05
    # It is not a matter of scale: the direction differs, too.
    truth = tiny_groups[-1]
    assert relative_error(estimate * (truth @ estimate) / (estimate @ estimate), truth) > 0.02


def test_the_enumerated_trees_are_those_that_are_sampled(tiny_groups):
    describe = lambda root: tuple((tuple(r.ids), r.plan_tokens, r.is_plan) for r in root)
    options = dict(plan_closed=lambda ids: ids[-1] == CLOSE, stop_ids=[STOP], seed=0)
    drawn = grpo.sample_tree(shard_model(tiny_groups[0]), [PROMPT] * 200, Config(**TREE), **options)
    seen = {describe(group[i:i + 2]) for group in drawn for i in (0, 2)}
    assert seen <= {describe(root) for root in trees()} and len(seen) > 20


# --------------------------------------------------------------------------------------------------
# The weight of the siblings


def noise(w: float, tau2: float, sigma2: float, m: int, z: int) -> float:
    """E A^2 of a CoT: its own variance, and that of each part of its baseline around V."""
    siblings, others = sigma2 / (z - 1), tau2 * m / (m - 1) + sigma2 / ((m - 1) * z)
    return sigma2 + w**2 * siblings + (1 - w) ** 2 * others


@pytest.mark.parametrize("m, z", [(2, 2), (4, 3), (3, 8)])
def test_best_within_has_the_least_noise(m, z):
    for tau2, sigma2 in ((0.05, 0.2), (0.2, 0.05), (1.0, 3.0)):
        best = best_within(tau2, sigma2, m, z)
        grid = np.linspace(0, 1, 2001)
        assert grid[noise(grid, tau2, sigma2, m, z).argmin()] == pytest.approx(best, abs=1e-3)
    everyone = (z - 1) / (m * z - 1)
    assert best_within(0.0, 0.3, m, z) == pytest.approx(everyone)
    assert best_within(-0.1, 0.3, m, z) == pytest.approx(everyone)  # chance makes tau2 negative
    assert best_within(0.0, 0.0, m, z) == pytest.approx(everyone)  # nothing known yet
    assert best_within(1e9, 0.3, m, z) == pytest.approx(1.0)
    assert best_within(0.3, 0.0, m, z) == 1.0
    assert best_within(0.3, 0.1, m, 1) == 0.0  # no siblings


@pytest.mark.parametrize("within", [None, 1.0, 0.3, 0.0])
def test_the_noise_of_a_cots_advantage_is_the_formulas(within):
    m, z, tau2, sigma2 = 4, 3, 0.5, 1.0
    rng = np.random.default_rng(0)
    returns = math.sqrt(tau2) * rng.normal(size=(60_000, m, 1)) + rng.normal(size=(60_000, m, z))
    _, cot = segment(torch.tensor(returns), within)
    w = (z - 1) / (m * z - 1) if within is None else within
    assert float(cot.square().mean()) == pytest.approx(noise(w, tau2, sigma2, m, z), rel=0.01)
    found = variances(torch.tensor(returns)).mean(0).tolist()
    assert found == pytest.approx([tau2, sigma2], abs=0.01)


def test_variances_are_unbiased_over_all_groups():
    """Over all groups of 2 plans x 2 CoTs, exactly. One plan is right in 1 of 2, one in 1 of 10."""
    chances, tau2, sigma2, sums = (0.5, 0.1), 0.2**2, (0.25 + 0.09) / 2, np.zeros(2)
    for plans in itertools.product(range(2), repeat=2):
        for right in itertools.product((0, 1), repeat=4):
            p = [chances[plans[n // 2]] for n in range(4)]
            chance = math.prod(q if r else 1 - q for q, r in zip(p, right)) / 4
            sums += chance * variances(torch.tensor(right).reshape(1, 2, 2))[0].numpy()
    assert sums == pytest.approx([tau2, sigma2], abs=1e-12)
    for m, z in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match="at least 2 plans and 2 CoTs"):
            variances(torch.zeros(3, m, z))


def test_figures_of_a_question_by_hand():
    assert icc(0.1, 0.3) == pytest.approx(0.25)
    assert icc(-0.1, 0.3) == 0 and icc(0.0, 0.0) == 0
    assert [reliability(0.1, 3), reliability(0.3, 3)] == pytest.approx([0.25, 0.9 / 1.6])
    # Best in tokens: (plan + z cot) (tau2 + sigma2 / z) is least at z = sqrt(3 * 100 / 300) ...
    assert best_cots(0.1, 0.3, 100, 300) == pytest.approx(1.0)
    # ... and at every other z it is more.
    z, cost = best_cots(0.05, 0.2, 300, 50), lambda z: (300 + 50 * z) * (0.05 + 0.2 / z)
    assert cost(z) < min(cost(0.99 * z), cost(1.01 * z))
    assert best_cots(0.0, 0.3, 100, 300) == math.inf and best_cots(0.1, 0.3, 100, 0) == math.inf


# --------------------------------------------------------------------------------------------------
# Metrics


def random_groups(rng, questions: int = 5, m: int = 4, z: int = 3) -> tuple[list, torch.Tensor]:
    """Groups of random lengths, with a plan that never closed in each, and their verdicts."""
    groups = []
    for _ in range(questions):
        rollouts = []
        for i in range(m):
            root = Rollout([1], [99] * z, ids=[0] * int(rng.integers(2, 9)), is_plan=True)
            if i:
                root.fork()
            for cot in root.cots:
                cot.ids += [0] * int(rng.integers(1, 30))
            rollouts += root.cots or [root] * z
        groups.append(grpo.Group({}, rollouts))
    correct = torch.tensor(rng.random((questions, m, z)) < rng.random((questions, m, 1)))
    correct[:, 0] = False
    return groups, correct


def slow_variances(correct: np.ndarray) -> tuple[float, float]:
    """The two means over questions, with loops over plans."""
    tau2, sigma2 = [], []
    for group in correct.astype(float):
        msw = np.mean([np.var(plan, ddof=1) for plan in group])
        msb = group.shape[1] * np.var([np.mean(plan) for plan in group], ddof=1)
        tau2.append((msb - msw) / group.shape[1])
        sigma2.append(msw)
    return np.mean(tau2), np.mean(sigma2)


def test_plan_metrics_against_a_slow_reference():
    """Over more steps than the running mean looks back."""
    rng, state, seen = np.random.default_rng(0), {"variances": [0.0, 0.0, 0]}, []
    config, running = Config(within="auto"), np.zeros(2)
    for step in range(MEMORY + 3):
        weight = sibling_weight(config, state["variances"])
        assert weight == pytest.approx(best_within(*running, 4, 3))
        groups, correct = random_groups(rng)
        metrics = plan_metrics(groups, {"correct": correct}, state, CPU)
        tau2, sigma2 = slow_variances(correct.numpy())
        seen.append((tau2, sigma2))
        # A plain mean at first; then each step is a 20th of it.
        running = np.array(seen[0])
        for n, new in enumerate(seen[1:], start=2):
            running = running + (np.array(new) - running) / min(n, MEMORY)
        assert state["variances"] == pytest.approx([*running, min(step + 1, MEMORY)])
        assert metrics["plan_icc"] == pytest.approx(max(tau2, 0) / (max(tau2, 0) + sigma2))
        assert metrics["plan_icc_mean"] == pytest.approx(running[0] / running.sum())
        assert metrics["plan_std"] == pytest.approx(math.sqrt(max(tau2, 0)))
        assert metrics["cot_std"] == pytest.approx(math.sqrt(sigma2))
        closed = [r for group in groups for r in group.rollouts if not r.is_plan]
        plan = sum(r.plan_tokens for r in closed)
        cost = plan / (sum(len(r.ids) for r in closed) - plan)
        assert metrics["best_cots"] == pytest.approx(math.sqrt(running[1] / running[0] * cost))
    assert sibling_weight(Config(within="0.25"), state["variances"]) == 0.25


def test_plan_metrics_without_variance_or_siblings():
    groups, _ = random_groups(np.random.default_rng(0))
    state = {"variances": [0.1, 0.2, 3]}
    for correct in (torch.ones(5, 4, 3), torch.zeros(5, 12, 1)):
        assert plan_metrics(groups, {"correct": correct.bool()}, state, CPU) == {}
    assert state == {"variances": [0.1, 0.2, 3]}  # such a step says nothing


def test_credit_metrics_against_numpy():
    rng = np.random.default_rng(0)
    correct = torch.tensor(rng.random((6, 4, 3)) < 0.5)
    correct[2], correct[4] = True, True
    draw = lambda: torch.tensor(rng.normal(size=(6, 4, 3)))
    new, old = (draw(), draw()), (draw(), draw())
    metrics = credit_metrics({"correct": correct}, new, old, CPU)
    squares = sum(part.numpy() ** 2 for part in new).sum((1, 2))
    assert metrics["all_right_share"] == pytest.approx(squares[[2, 4]].sum() / squares.sum())
    flat = lambda pair: np.concatenate([part.numpy().ravel() for part in pair])
    corr = np.corrcoef(flat(new), flat(old))[0, 1]
    assert metrics["credit_corr"] == pytest.approx(corr, abs=1e-12)
    nothing = (torch.zeros(6, 4, 3),) * 2
    assert credit_metrics({"correct": correct}, nothing, old, CPU) == {"all_right_share": 0.0}


def test_a_steps_weight_knows_earlier_steps_only(tmp_path, monkeypatch):
    """In the main loop: the weight is read before the step's own variances are counted."""
    folder = tmp_path / "model"
    make_tokenizer().save_pretrained(folder)
    make_model(make_tokenizer()).save_pretrained(folder)
    problem = {"id": "a", "problem": "A = 4 ; A ?", "answer": "4"}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**problem, "id": i}) + "\n" for i in range(9)))
    generator, calls = torch.Generator().manual_seed(0), []

    def grade(tokenizer, groups, stop_ids, **options):  # an untrained model is never right
        for rollout in (r for group in groups for r in group.rollouts):
            rollout.correct = bool(torch.rand(1, generator=generator) < 0.5)

    def weight(config, known):
        calls.append(("weight", list(known)))
        return sibling_weight(config, known)

    def measure(groups, rewards, state, device):
        metrics = plan_metrics(groups, rewards, state, device)
        calls.append(("measured", list(state["variances"])))
        return metrics

    for name, double in (("grade_groups", grade), ("sibling_weight", weight)):
        monkeypatch.setattr(grpo, name, double)
    monkeypatch.setattr(grpo, "plan_metrics", measure)
    flags = f"--model {folder} --data {data} --out {tmp_path}/run --steps 3 --questions 2 --cots 2"
    flags += " --max_completion_tokens 8 --eval_size 0 --save_every 0 --credit segment"
    monkeypatch.setattr(sys, "argv", ["grpo.py", *flags.split()])
    grpo.main()
    assert [name for name, _ in calls] == ["weight", "measured"] * 3
    assert calls[0][1] == [0.0, 0.0, 0]
    assert calls[2][1] == calls[1][1] and calls[4][1] == calls[3][1] != calls[1][1]


# --------------------------------------------------------------------------------------------------
# Plans that never closed, and completions cut at their limit


@pytest.mark.parametrize("opened", [False, True])
def test_a_completion_that_opens_no_plan_is_none_that_never_closed(tiny, opened):
    """However early it stops: only an open plan's answer is wrong whatever it holds."""
    options = dict(plan_closed=lambda ids: False, plan_opened=lambda ids: opened, seed=0)
    config = Config(max_completion_tokens=40, max_plan_tokens=20)
    drawn = grpo.sample_tree(tiny(), [[5, 6]] * 3, config, stop_ids=list(range(10)), **options)
    rollouts = [r for group in drawn for r in group]
    assert min(len(r.ids) for r in rollouts) < 20 < 1 + max(len(r.ids) for r in rollouts)
    assert {r.is_plan for r in rollouts} == {opened}


def cut_rollouts() -> list[Rollout]:
    """A closed plan with a finished and a cut CoT; and one that was cut at its own limit."""
    make = lambda n, **known: Rollout([7, 8], [10], list(range(n)), [-1.0] * n, **known)
    finished, cut = make(5, plan_tokens=2, stopped=True), make(10, plan_tokens=2)
    return [finished, cut] + [make(4, is_plan=True)] * 2


def test_a_plan_cut_at_its_own_limit_gets_the_full_overlong_penalty():
    """4 of 10 tokens are far from the limit. What was cut has nevertheless met its limit."""
    config = Config(plans=2, cots=2, max_completion_tokens=10, overlong_buffer=4)
    rewards = grpo.group_rewards([grpo.Group({}, cut_rollouts())], config)
    assert rewards["overlong"].tolist() == [[[0.0, -1.0], [-1.0, -1.0]]]
    # No completion is right, so the length reward is 0, and all plans score the same.
    assert torch.allclose(rewards["total"], 0.25 + rewards["overlong"])
    assert rewards["lengths"].tolist() == [[[5, 10], [4, 4]]]  # the length reward sees true lengths


def test_mask_truncated_keeps_a_plan_that_never_closed():
    rollouts = cut_rollouts()
    plan, cot = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]), torch.tensor([[[5.0, 6.0], [7.0, 8.0]]])
    grpo.note_advantages(rollouts, plan, cot)
    micro, = grpo.make_micro_batches(rollouts, Config(mask_truncated=True), CPU)
    seen = [
        (len(r.ids), credit[mask].tolist())
        for r, credit, mask in zip(micro.rollouts, micro.advantages, micro.packed.mask)
    ]
    # The finished one: 2 plan tokens, 3 of the CoT. All tokens of the open plan are plan tokens.
    expected = [(4, [3.0] * 4)] * 2 + [(5, [1.0] * 2 + [5.0] * 3), (10, [])]
    assert sorted(seen) == sorted(expected)
    whole, = grpo.make_micro_batches(rollouts, Config(), CPU)
    cut = [r.ids for r in whole.rollouts].index(list(range(10)))
    assert whole.advantages[cut][whole.packed.mask[cut]].tolist() == [1.0] * 2 + [6.0] * 8


# --------------------------------------------------------------------------------------------------
# bench/credit.py


def test_the_bench_on_a_small_scale(capsys):
    """Its enumeration joins groups that differ in order; the one above does not."""
    rng = np.random.default_rng(0)
    question = bench.random_question(rng, 1.0)
    plans, cots, chance = bench.all_groups(question, 2, 2)
    assert len(chance) == 8 * 9 // 2 and float(chance.sum()) == pytest.approx(1, abs=1e-12)
    truth = question.true_gradient()
    for within in WEIGHTS:
        parts = bench.exact_parts(question, 2, 2, bench.segment(within))
        assert all((part - true).abs().max() < 1e-12 for part, true in zip(parts, truth))
    plan, cot = bench.exact_parts(question, 3, 2, bench.shared_mean)
    assert torch.allclose(plan, 2 / 3 * truth[0]) and torch.allclose(cot, 5 / 6 * truth[1])
    for share, seed in bench.TABLES.items():
        assert bench.icc_of(bench.outcome_question(share, seed)) == pytest.approx(share, abs=0.003)
    question = bench.outcome_question(0.81, bench.TABLES[0.81])
    group, _, others, siblings, best = bench.signal_to_noise(question, 4000)
    assert siblings > 1.1 * others > 1.1 * group and best > 1.1 * others
    # Eleven are at 1 / sqrt(11), one at -sqrt(11). Not divided, they are alpha (1 - 1/e) / 12 above
    # the mean.
    assert bench.one_token_longer("total")[-2:] == pytest.approx([11**-0.5, -(11**0.5)], rel=1e-3)
    above = 0.1 * (1 - 1 / math.e) / 12
    assert bench.one_token_longer("outcome")[0] == pytest.approx(above, rel=1e-4)
    bench.print_biases(rng)
    bench.print_correlation(500, rng)
    bench.print_all_right(500, rng)
    assert "12 x 1            0.9167      0.9167" in capsys.readouterr().out
