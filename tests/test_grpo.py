"""Sampling, plan tree, advantages, loss: against an uncached loop, hand-worked numbers and plain autograd."""
import math
import types

import pytest
import torch

import grpo
import model_utils
from conftest import FAMILIES, make_tiny
from cuda_graph import replay_step
from grpo import (Config, Row, forward_step, group_advantages, keep_top_p, kl_k3, make_micros, plan_end, policy_loss, sample,
                  sample_token, sample_tree, token_weights)
from model_utils import make_optimizer, shard_model
from pretend_gpu import Capture, Graph
from rollout_log import rollout_metrics

PROMPTS = [[5], [9, 33, 12, 8, 70], [3] * 17, [40, 41, 42, 43, 44, 45, 46, 47, 48]]


def uncached_logprobs(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(-1)  # (len(completion), V)


# ---------------------------------------------------------------------------------------------------------------
# Sampling

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_rows", [3, 100])
def test_greedy_cached_decoding_equals_uncached(tiny, family, max_rows):
    """Ragged prompts, two stop ids, rows with limits of their own, and too few slots for all rows at once."""
    model, stop = tiny(family), [1, 6]
    limits = [1, 30, 30, 4, 30, 30, 17, 30]
    ids, logprobs = sample(model, PROMPTS, n=2, max_new_tokens=limits, temperature=0.0, stop_ids=stop, max_rows=max_rows)
    for row, limit in enumerate(limits):
        prompt, expected = list(PROMPTS[row // 2]), []
        while len(expected) < limit and not (expected and expected[-1] in stop):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([prompt + expected])).logits[0, -1].argmax()))
        assert ids[row] == expected
        dense = uncached_logprobs(model, prompt, expected)
        assert torch.allclose(torch.tensor(logprobs[row]), dense[range(len(expected)), expected], atol=1e-4)


@pytest.mark.parametrize("failure", [None, "its result differs", "not permitted"])
def test_replayed_decode_steps_equal_eager_ones(monkeypatch, capsys, failure):
    """On a pretended GPU's graphs, which run the captured operations again."""
    model, pools = make_tiny("qwen3"), []

    class TestGraph(Graph):
        def replay(self):
            super().replay()
            model.kv_cache.logits += failure == "its result differs"

    class TestCapture(Capture):
        def __init__(self, graph, pool):
            super().__init__(graph)
            pools.append(pool)

        def __enter__(self):
            if failure == "not permitted":
                raise RuntimeError(failure)
            return super().__enter__()

    def step(model, cache, ids, positions):
        inputs = model, cache, torch.tensor(ids), torch.tensor(positions), max(positions) + 1
        if not getattr(model, "cuda_graphs", True):
            return forward_step(*inputs)
        return replay_step(forward_step, *inputs, graph=TestGraph, capture=TestCapture)

    draw = lambda: sample(model, PROMPTS, n=3, max_new_tokens=[5, 30, 12] * 4, temperature=0.0, stop_ids=[1], max_rows=9)[0]
    expected = draw()
    monkeypatch.setattr(grpo, "decode_step", step)
    assert draw() == expected
    # None after a failure; else buckets of 9 and 8 rows, all in the first one's pool.
    assert (pools == [None]) if failure else (pools[:2] == [None, "pool"] and set(pools[1:]) == {"pool"})
    assert (f"rank 0 decodes without CUDA graphs, which is slower: {failure}" in capsys.readouterr().out) == bool(failure)


def test_prompts_are_computed_a_bounded_number_of_tokens_at_a_time(tiny, monkeypatch):
    model, prompts, seen = tiny("llama"), [[2] * 5, [3, 4], [5] * 9, [6] * 4, [7], [8] * 5], []
    draw = lambda: sample(model, prompts, n=2, max_new_tokens=6, temperature=0.0, stop_ids=[1])[0]
    expected = draw()
    monkeypatch.setattr(grpo, "PREFILL_TOKENS", 10)
    watch = model.register_forward_pre_hook(lambda module, args, options: seen.append(tuple(options["input_ids"].shape)),
                                            with_kwargs=True)
    assert draw() == expected
    watch.remove()
    assert [shape for shape in seen if shape[1] > 1 or shape[0] < 12] == [(1, 8), (2, 4), (2, 3)]


def test_the_cache_is_kept_and_bounded_by_free_memory(monkeypatch, capsys):
    """A row of 64 places takes 2 (keys, values) x 2 layers x 2 heads x 8 x 64 x 4 bytes = 16 KiB, and 12 x 4 bytes for
    each of 97 logits; half of the free memory is taken."""
    row = 16384 + 12 * 4 * 97
    model = make_tiny("qwen2")
    monkeypatch.setattr(model_utils, "free_memory", lambda device: 2 * 5 * row)
    draw = lambda **options: sample(model, PROMPTS, n=3, max_new_tokens=20, temperature=0.0, stop_ids=[1], **options)[0]
    bounded = draw()
    assert model.kv_cache.slots == 5 and "5 rows x 64 tokens" in capsys.readouterr().out
    cache = model.kv_cache
    assert draw() == bounded and model.kv_cache is cache  # kept, though 12 rows would like more
    monkeypatch.setattr(model_utils, "free_memory", lambda device: 10**9)
    model.kv_cache = None
    assert draw() == bounded and model.kv_cache.slots == 12
    monkeypatch.setattr(model_utils, "free_memory", lambda device: 2 * 2 * row)
    model.kv_cache = None
    assert draw() == bounded and model.kv_cache.slots == 2  # full, and too small for what follows
    with pytest.raises(SystemExit, match="3 sequences of 64 tokens need .* lower --max_completion_tokens"):
        sample_tree(model, PROMPTS, plans=2, cots=3, max_new_tokens=20, max_plan_tokens=9, plan_closed=lambda ids: False,
                    temperature=1.0, stop_ids=[1], seed=0)


def test_rows_stop_at_their_first_token_and_keep_it(tiny):
    model = tiny()
    first = [int(uncached_logprobs(model, p, [0])[0].argmax()) for p in PROMPTS]
    ids, _ = sample(model, PROMPTS, max_new_tokens=9, temperature=0.0, stop_ids=first)
    assert ids == [[token] for token in first]


def test_sampler_logprobs_are_those_of_the_tempered_full_forward(tiny):
    model = tiny("qwen3")
    ids, logprobs = sample(model, PROMPTS, n=3, max_new_tokens=20, temperature=0.7, stop_ids=[1], seed=3)
    for row, completion in enumerate(ids):
        dense = uncached_logprobs(model, PROMPTS[row // 3], completion, temperature=0.7)
        assert torch.allclose(torch.tensor(logprobs[row]), dense[range(len(completion)), completion], atol=1e-4)


def test_a_seed_fixes_the_rollouts_and_another_changes_them(tiny):
    draw = lambda seed: sample(tiny(), PROMPTS, n=2, max_new_tokens=12, stop_ids=[1], seed=seed)
    torch.manual_seed(0)
    first = draw(7)
    torch.manual_seed(1)  # the global RNG has no say
    assert draw(7) == first and draw(8)[0] != first[0]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.3, 0.8)])
def test_sampled_frequencies_match_the_softmax(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    expected = (logits / temperature).softmax(-1)
    if top_p < 1:  # by hand: the shortest head of the sorted probabilities that reaches top_p
        head, mass = [], 0.0
        for token in expected.argsort(descending=True).tolist():
            head.append(token)
            mass += float(expected[token])
            if mass >= top_p:
                break
        expected = torch.tensor([float(expected[t]) if t in head else 0.0 for t in range(6)]) / mass
    draws = 40_000
    tokens, _ = sample_token(logits.expand(draws, -1), temperature, top_p, torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=6).float()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    chi_square = float((((counts - draws * expected) ** 2)[seen] / (draws * expected[seen])).sum())
    assert chi_square < 20.5  # 0.999 quantile at 5 degrees of freedom


def test_top_p_keeps_the_token_that_crosses_the_line():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]])
    kept = keep_top_p(probs, 0.6)
    assert torch.equal(kept, torch.tensor([[0.5, 0.3, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0]]))


def test_bad_requests_are_refused(tiny):
    for prompts, limit in (([], 5), ([[3], []], 5), ([[3]], 0), ([[3]], [4, 4])):
        with pytest.raises(ValueError, match="prompts and a positive limit"):
            sample(tiny(), prompts, max_new_tokens=limit, stop_ids=[1])


# ---------------------------------------------------------------------------------------------------------------
# Plan tree

@pytest.mark.parametrize("max_rows", [3, 7, 1000])
def test_plan_tree_branches_share_the_plan_and_continue_from_it(tiny, max_rows):
    model, closed = tiny(), lambda ids: ids[-1] % 7 == 0
    trees = sample_tree(model, PROMPTS, plans=3, cots=3, max_new_tokens=24, max_plan_tokens=8, plan_closed=closed,
                        temperature=1.0, stop_ids=[1], seed=5, max_rows=max_rows)
    kinds = {"closed": 0, "open": 0}
    for prompt, rows in zip(PROMPTS, trees):
        assert len(rows) == 9
        for plan in (rows[0:3], rows[3:6], rows[6:9]):
            k = plan[0].plan_tokens
            if k:
                kinds["closed"] += 1
                assert closed(plan[0].ids[:k]) and not any(closed(plan[0].ids[:j]) for j in range(1, k))
                assert all(row.ids[:k] == plan[0].ids[:k] for row in plan)
                assert len({tuple(row.ids) for row in plan}) > 1  # CoTs are drawn independently
            else:  # never closed: no CoT, the same row z times
                kinds["open"] += 1
                assert plan[0] is plan[1] is plan[2]
                assert len(plan[0].ids) == 8 or plan[0].stopped
        for row in rows:  # the forked cache yields what a forward over the whole sequence yields
            dense = uncached_logprobs(model, prompt, row.ids)
            assert torch.allclose(torch.tensor(row.logprobs), dense[range(len(row.ids)), row.ids], atol=1e-4)
            assert row.stopped == (row.ids[-1] == 1)
    assert min(kinds.values()) > 0  # the draw has both


def test_each_plan_token_is_decoded_once(tiny, monkeypatch):
    """Rows fed to the model = tokens of plans, once, + tokens of CoTs: nothing is prefilled or decoded again."""
    model, fed, prefilled = tiny(), [], []
    step, fill = grpo.decode_step, grpo.prefill
    monkeypatch.setattr(grpo, "decode_step", lambda m, c, ids, positions: (fed.append(len(ids)), step(m, c, ids, positions))[1])
    monkeypatch.setattr(grpo, "prefill", lambda m, c, p, rows: (prefilled.extend(r.prompt for r in rows), fill(m, c, p, rows))[1])
    trees = sample_tree(model, PROMPTS, plans=2, cots=4, max_new_tokens=20, max_plan_tokens=19, temperature=1.0, seed=1,
                        plan_closed=lambda ids: len(ids) == 5, stop_ids=[], max_rows=1000)
    assert all(row.plan_tokens == 5 and len(row.ids) == 20 for rows in trees for row in rows)
    assert sum(fed) == 4 * 2 * (5 + 4 * 15)
    assert sorted(prefilled) == [0, 0, 1, 1, 2, 2, 3, 3]  # once a plan row, no more for its CoTs


def test_plan_end_is_found_when_the_tag_is_split_or_merged():
    pieces = {0: "</", 1: "plan", 2: ">\n<", 3: "think>", 4: " 2 > 1 ", 5: "</plan", 6: ">"}
    tokenizer = types.SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    closed = plan_end(tokenizer)
    assert not closed([4]) and not closed([0, 1])
    assert closed([4, 0, 1, 2]) and closed([5, 6])
    assert not closed([5])


def test_no_plan_phase(tiny):
    trees = sample_tree(tiny(), PROMPTS[:1], plans=4, cots=1, max_new_tokens=6, max_plan_tokens=0, plan_closed=None,
                        temperature=1.0, stop_ids=[], seed=0)
    assert [len(row.ids) for row in trees[0]] == [6] * 4 and all(row.plan_tokens == 0 for row in trees[0])


# ---------------------------------------------------------------------------------------------------------------
# Advantages and loss

def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    # Row 1: mean 1/2, population std 1/2. Row 2: mean 3/2, deviations 3/2 and -1/2, variance (9 + 3) / 16 = 3/4.
    s = math.sqrt(3) / 2
    expected = torch.tensor([[1, -1, -1, 1], [1.5 / s, -0.5 / s, -0.5 / s, -0.5 / s]])
    assert torch.allclose(group_advantages(rewards), expected)
    assert torch.allclose(group_advantages(rewards, std_norm=False)[1], torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_equal_rewards_give_exactly_zero_advantage():
    rewards = torch.full((1, 12), 0.1) * torch.tensor([[1.0 / 3.0]])
    rewards[0, 3] = torch.nextafter(rewards[0, 3], torch.tensor(1.0))  # rounding residue, as sums of terms leave it
    assert rewards.std(correction=0) > 0
    assert group_advantages(rewards).abs().max() == 0


def test_policy_loss_by_hand():
    log = math.log
    logprobs = torch.tensor([[log(1.5), log(1.1), log(0.5)], [log(1.5), log(0.5), 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss, metrics = policy_loss(logprobs, torch.zeros(2, 3), torch.tensor([2.0, -1.0]), mask, 0.2, 0.28)
    # A = 2: min(1.5 * 2, 1.28 * 2) = 2.56 (cut); 2.2; min(1.0, 1.6) = 1.0. A = -1: min(-1.5, -1.28) = -1.5; min(-.5, -.8).
    assert torch.allclose(loss, torch.tensor([[-2.56, -2.2, -1.0], [1.5, 0.8, 0.0]]))
    assert int(metrics["clip_frac"]) == 2
    per_token = torch.tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]])  # advantages may be (B, T-1) too
    assert torch.equal(policy_loss(logprobs, torch.zeros(2, 3), per_token, mask, 0.2, 0.28)[0], loss)


def test_masked_garbage_gives_no_nan():
    logprobs = torch.tensor([[0.0, float("inf")]], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1), torch.tensor([[True, False]]), 0.2, 0.2)
    loss.sum().backward()
    assert torch.equal(logprobs.grad, torch.tensor([[-1.0, 0.0]]))


def test_first_inner_step_has_ratio_one_and_a_policy_gradient():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    loss, metrics = policy_loss(logprobs, logprobs.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 2).bool(), 0.2, 0.2)
    assert torch.equal(loss, torch.tensor([[-1.0, -1.0], [1.0, 1.0]])) and metrics["clip_frac"] == 0
    loss.sum().backward()  # loss 0 in sum, gradient -A
    assert float(loss.detach().sum()) == 0 and torch.equal(logprobs.grad, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


def test_kl_k3_value_and_mean():
    # r = pi_ref / pi = 2: 2 - 1 - log 2. Equal: 0.
    assert torch.allclose(kl_k3(torch.tensor([0.0, -1.0]), torch.tensor([math.log(2.0), -1.0])),
                          torch.tensor([1 - math.log(2.0), 0.0]))
    torch.manual_seed(0)
    p, q = torch.randn(50).log_softmax(-1), torch.randn(50).log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * kl_k3(p, q)).sum()) == pytest.approx(exact, rel=1e-5)  # unbiased under pi


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True, True], [False, True, True, False]])
    total = torch.full((2, 4), 1 / 10) * mask
    assert torch.equal(token_weights(mask, "token", 10, 3, 100), total)
    sequence = token_weights(mask, "sequence", 10, 3, 100)
    assert torch.allclose(sequence, torch.tensor([[1 / 12] * 4, [0, 1 / 6, 1 / 6, 0]]))
    assert torch.allclose(token_weights(mask, "constant", 10, 3, 100), mask / 300)


def test_a_rank_without_groups_gets_empty_rewards_and_metrics():
    """Dynamic sampling may leave a rank with nothing, and it must still take part in the step."""
    rewards = grpo.group_rewards([], Config())
    assert rewards["total"].shape == (0, 4, 3)
    assert group_advantages(rewards["total"].flatten(1)).shape == (0, 12)
    metrics = rollout_metrics([], rewards, torch.device("cpu"))
    assert metrics["accuracy"] == 0 and metrics["zero_variance"] == 0


def test_the_format_reward_is_one_flag():
    row = Row(0, [9], ids=[3, 4], plan_tokens=1)
    group = grpo.Group({"answer": "7"}, [row] * 4, ["text"] * 4, [True, False, True, True], [True] * 4)
    whole, without = (grpo.group_rewards([group], Config(plans=2, cots=2, format_reward=on)) for on in (True, False))
    # T = T_max: the length reward is alpha. Structure 0.2, length 0.1; plan scores 1/2 and 1.
    assert torch.allclose(whole["total"] - without["total"], torch.full((1, 2, 2), 0.3))
    assert torch.allclose(without["total"], without["outcome"] + 0.5 * without["plan"])


def test_a_plan_that_never_closed_is_not_right_whatever_it_holds():
    text = "<plan> guess \\boxed{7}"
    tokenizer = types.SimpleNamespace(batch_decode=lambda completions: [text] * len(completions))
    rows = [Row(0, [9], ids=[2], plan_open=True), Row(0, [9], ids=[2], plan_tokens=1)]
    group, = grpo.make_groups(tokenizer, [{"answer": "7"}], [rows], [1])
    assert group.correct == [False, True]


# ---------------------------------------------------------------------------------------------------------------
# Update

def fake_rows(count: int = 7) -> tuple[list[Row], list[list[int]], list[float]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(2, 97, (n,), generator=generator).tolist()
    prompts = [draw(n) for n in (3, 8, 5)]
    rows = [Row(i % 3, [99], ids=draw(int(n)), stopped=i % 2 == 0)
            for i, n in enumerate(torch.randint(1, 20, (count,), generator=generator))]
    for row in rows:
        row.logprobs = [-1.0] * len(row.ids)
    return rows, prompts, torch.randn(count, generator=generator).tolist()


def nearby_model(family: str = "qwen2"):
    """The tiny model with every weight moved a little: a KL reference at a realistic distance."""
    model = make_tiny(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def gradients(config: Config, family: str = "qwen2") -> tuple[dict, dict]:
    """One update's gradients (the optimiser step is held back) and metrics."""
    model = shard_model(make_tiny(family))
    reference = shard_model(nearby_model(family))
    rows, prompts, advantages = fake_rows()
    micros = make_micros(rows, prompts, advantages, config, torch.device("cpu"))
    for micro, logprobs in zip(micros, grpo.score(reference, micros, config.temperature)):
        micro.ref_logprobs = logprobs
    held = {}

    def hold(model, optimizer, lr, max_grad_norm):
        held.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return 0.0

    original, grpo.optimizer_step = grpo.optimizer_step, hold
    try:
        metrics = grpo.update(model, make_optimizer(model, 1e-3, 0.0), micros, config, 1e-3)
    finally:
        grpo.optimizer_step = original
    return held, metrics


@pytest.mark.parametrize("loss_agg", ["token", "sequence", "constant"])
def test_gradient_depends_neither_on_micro_batch_size_nor_on_sharing(loss_agg):
    settings = dict(loss_agg=loss_agg, kl_coef=0.1, temperature=0.8, max_completion_tokens=20)
    whole, metrics = gradients(Config(tokens_per_micro_batch=10_000, **settings))
    for tokens, share in ((1, True), (60, True), (60, False), (10_000, False)):
        parts, part_metrics = gradients(Config(tokens_per_micro_batch=tokens, share_prefix=share, **settings))
        assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-5
        assert part_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
        assert part_metrics["kl"] == pytest.approx(metrics["kl"], rel=1e-4)


def test_gradient_equals_a_plain_loop_over_sequences():
    """An independent reference: one sequence at a time, full logits, no masks, no chunks."""
    config = Config(kl_coef=0.1, temperature=0.8, tokens_per_micro_batch=64)
    ours, _ = gradients(config)
    model, reference = make_tiny("qwen2"), nearby_model()
    rows, prompts, advantages = fake_rows()
    total = sum(len(row.ids) for row in rows)
    for row, advantage in zip(rows, advantages):
        prompt, ids = prompts[row.prompt], row.ids
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / 0.8
        logprobs = logits.log_softmax(-1)[range(len(ids)), ids]
        ref = uncached_logprobs(reference, prompt, ids, 0.8)[range(len(ids)), ids]
        ratio = (logprobs - logprobs.detach()).exp()
        kl = (ref - logprobs).exp() - 1 - (ref - logprobs)
        ((-ratio * advantage + 0.1 * kl).sum() / total).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, ours[name], atol=1e-5), name


def test_the_stop_token_is_in_the_loss_and_nothing_after_it():
    rows, prompts, advantages = fake_rows()
    micro, = make_micros(rows, prompts, advantages, Config(), torch.device("cpu"))
    ordered = sorted(range(len(rows)), key=lambda i: prompts[rows[i].prompt] + rows[i].ids)
    for line, i in enumerate(ordered):
        prompt, ids = prompts[rows[i].prompt], rows[i].ids
        columns = micro.packed.mask[line].nonzero().flatten()
        assert columns.tolist() == list(range(len(prompt) - 1, len(prompt) + len(ids) - 1))
        assert micro.packed.ids[micro.packed.targets[micro.packed.columns[line, columns]]].tolist() == ids
        assert (micro.sampler_logprobs[line] != 0).nonzero().flatten().tolist() == columns.tolist()


def test_truncated_completions_can_be_left_out_of_the_loss():
    rows, prompts, advantages = fake_rows()
    micro, = make_micros(rows, prompts, advantages, Config(mask_truncated=True), torch.device("cpu"))
    assert int(micro.packed.mask.sum()) == sum(len(row.ids) for row in rows if row.stopped)
    assert float(micro.weights.sum()) == pytest.approx(1.0)


def test_inner_epochs_use_the_policy_that_sampled():
    """With old logprobs stored, the second step on the same data sees a ratio that has moved away from 1."""
    model = shard_model(make_tiny("qwen2"))
    config = Config(kl_coef=0.0, clip_low=1e-4, clip_high=1e-4)
    rows, prompts, advantages = fake_rows()
    micros = make_micros(rows, prompts, advantages, config, torch.device("cpu"))
    for micro, logprobs in zip(micros, grpo.score(model, micros, config.temperature)):
        micro.old_logprobs = logprobs
    optimizer = make_optimizer(model, 1e-2, 0.0)
    first = grpo.update(model, optimizer, micros, config, 1e-2)
    second = grpo.update(model, optimizer, micros, config, 1e-2)
    assert first["clip_frac"] == 0 and second["clip_frac"] > 0.2
