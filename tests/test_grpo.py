"""grpo.py: sampling, plan tree, advantages, loss, update.

They are held against an uncached loop, numbers worked by hand, and plain autograd.
"""

import functools
import math
import types

import pytest
import torch

import grpo
from conftest import FAMILIES, make_tiny
from grpo import Config, Rollout, group_advantages, kl_k3, policy_loss, sample, token_weights
from model_utils import make_optimizer, plan_marks, shard_model
from plumbing import decoder
from plumbing.balance import deal, decoded_tokens
from plumbing.log import rollout_metrics, step_metrics
from pretend_gpu import Capture, Graph

CPU = torch.device("cpu")
PROMPTS = [[5], [9, 33, 12, 8, 70], [3] * 17, [40, 41, 42, 43, 44, 45, 46, 47, 48]]


def uncached_logprobs(
    model, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """Logprobs of all tokens at each place of the completion (len(completion), V)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(-1)


def check_logprobs(model, prompt: list[int], ids: list[int], logprobs: list[float], **options):
    """Assert that the sampler's logprobs are those of a forward over the whole sequence."""
    dense = uncached_logprobs(model, prompt, ids, **options)[range(len(ids)), ids]
    assert torch.allclose(torch.tensor(logprobs), dense, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_rows", [3, 100])
def test_greedy_cached_decoding_equals_uncached(tiny, family, max_rows):
    """With prompts of all lengths, two stop ids, a limit per row, and too few slots for all."""
    model, stop = tiny(family), [1, 6]
    limits = [1, 30, 30, 4, 30, 30, 17, 30]
    options = dict(temperature=0.0, stop_ids=stop, max_rows=max_rows)
    ids, logprobs = sample(model, PROMPTS, n=2, max_new_tokens=limits, **options)
    for row, limit in enumerate(limits):
        prompt, expected = list(PROMPTS[row // 2]), []
        while len(expected) < limit and not (expected and expected[-1] in stop):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + expected])).logits
            expected.append(int(logits[0, -1].argmax()))
        assert ids[row] == expected
        check_logprobs(model, prompt, expected, logprobs[row])


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

    def step(model, cache, ids, positions, starts):
        inputs = torch.tensor([ids, positions, starts]), max(positions) + 1
        if not getattr(model, "cuda_graphs", True):
            return decoder.forward_step(model, cache, *inputs)
        return decoder.replay_step(model, cache, *inputs, graph=TestGraph, capture=TestCapture)

    options = dict(temperature=0.0, stop_ids=[1], max_rows=9)
    draw = lambda: sample(model, PROMPTS, n=3, max_new_tokens=[5, 30, 12] * 4, **options)[0]
    expected = draw()
    monkeypatch.setattr(decoder, "decode_step", step)
    assert draw() == expected
    if failure:
        assert pools == [None]
    else:  # buckets of 9 and 8 rows, all in the first one's pool
        assert pools[:2] == [None, "pool"] and set(pools[1:]) == {"pool"}
    said = f"rank 0 decodes without CUDA graphs, which is slower: {failure}"
    assert (said in capsys.readouterr().out) == bool(failure)


def test_prompts_are_computed_a_bounded_number_of_tokens_at_a_time(tiny, monkeypatch):
    prompts = [[2] * 5, [3, 4], [5] * 9, [6] * 4, [7], [8] * 5]
    model, seen = tiny("llama"), []
    options = dict(max_new_tokens=6, temperature=0.0, stop_ids=[1])
    draw = lambda: sample(model, prompts, n=2, **options)[0]
    expected = draw()
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 10)
    note = lambda module, args, options: seen.append(tuple(options["input_ids"].shape))
    watch = model.register_forward_pre_hook(note, with_kwargs=True)
    assert draw() == expected
    watch.remove()
    prefills = [shape for shape in seen if shape[1] > 1 or shape[0] < 12]
    assert prefills == [(1, 8), (2, 4), (2, 3)]


def test_the_cache_is_kept_and_bounded_by_free_memory(monkeypatch, capsys):
    """A row of 64 positions takes 16 KiB, and 12 x 4 bytes for each of 97 logits.

    16 KiB = 2 (keys, values) x 2 layers x 2 heads x 8 x 64 x 4 bytes. Half of the free memory is
    used.
    """
    row = 16384 + 12 * 4 * 97
    model = make_tiny("qwen2")
    has_free = lambda size: monkeypatch.setattr(decoder, "free_memory", lambda device: size)
    options = dict(max_new_tokens=20, temperature=0.0, stop_ids=[1])
    draw = lambda: sample(model, PROMPTS, n=3, **options)[0]
    has_free(2 * 5 * row)
    bounded = draw()
    assert model.kv_cache.slots == 5 and "5 rows x 64 tokens" in capsys.readouterr().out
    cache = model.kv_cache
    assert draw() == bounded and model.kv_cache is cache  # kept, though 12 rows would like more
    has_free(10**9)
    model.kv_cache = None
    assert draw() == bounded and model.kv_cache.slots == 12
    has_free(2 * 2 * row)
    model.kv_cache = None
    assert draw() == bounded and model.kv_cache.slots == 2  # full, and too small for what follows
    message = "3 sequences of 64 tokens need .* lower --max_completion_tokens"
    with pytest.raises(SystemExit, match=message):
        draw_tree(model, plans=2, cots=3, max_completion_tokens=20, max_plan_tokens=9)


def test_rows_stop_at_their_first_token_and_keep_it(tiny):
    model = tiny()
    first = [int(uncached_logprobs(model, p, [0])[0].argmax()) for p in PROMPTS]
    ids, _ = sample(model, PROMPTS, max_new_tokens=9, temperature=0.0, stop_ids=first)
    assert ids == [[token] for token in first]


def test_sampler_logprobs_are_those_of_the_tempered_full_forward(tiny):
    model, options = tiny("qwen3"), dict(max_new_tokens=20, stop_ids=[1], seed=3)
    ids, logprobs = sample(model, PROMPTS, n=3, temperature=0.7, **options)
    for row, completion in enumerate(ids):
        check_logprobs(model, PROMPTS[row // 3], completion, logprobs[row], temperature=0.7)


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
        kept = [float(expected[t]) if t in head else 0.0 for t in range(6)]
        expected = torch.tensor(kept) / mass
    draws, generator = 40_000, torch.Generator().manual_seed(0)
    tokens, _ = grpo.sample_token(logits.expand(draws, -1), temperature, top_p, generator)
    counts = torch.bincount(tokens, minlength=6).float()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    surprise = (counts - draws * expected)[seen] ** 2 / (draws * expected[seen])
    assert float(surprise.sum()) < 20.5  # chi-square's 0.999 quantile at 5 degrees of freedom


def test_draws_are_exact_over_blocks_of_the_vocabulary():
    """1,300 tokens are three blocks. Most have probability 0, and one has eight millionths."""
    probs = torch.zeros(1300)
    chosen = {0: 0.2, 511: 0.15, 512: 0.25, 700: 0.1, 1023: 0.1, 1024: 0.15, 1299: 0.05 - 8e-6}
    for token, share in {**chosen, 100: 8e-6}.items():
        probs[token] = share
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(1300)
    draws = 500_000
    for _ in range(50):
        tokens = grpo.draw_tokens(probs.expand(draws // 50, -1), generator)
        counts += torch.bincount(tokens, minlength=1300)
    assert set(counts.nonzero().flatten().tolist()) <= {*chosen, 100}
    expected = draws * probs[list(chosen)].double()
    surprise = ((counts[list(chosen)] - expected) ** 2 / expected).sum()
    assert float(surprise) < 24.3  # chi-square's 0.9995 quantile at 6 degrees of freedom
    assert 0 < counts[100] <= 14  # 4 are expected; more than 14 have a chance of 1 in 50,000


@pytest.mark.parametrize("place, token", [(0.0, 3), (1 - 2**-53, 1290)])
def test_the_ends_of_the_range_draw_tokens_that_can_be_drawn(monkeypatch, place, token):
    probs = torch.zeros(5, 1300)
    probs[:, [3, 600, 1290]] = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) + 0.1
    rand = lambda *shape, **options: torch.full(shape, place, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", rand)
    # The probabilities do not add up to 1, as after top-p.
    assert grpo.draw_tokens(probs, None).tolist() == [token] * 5


def test_top_p_keeps_the_token_that_crosses_the_line():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]])
    kept = grpo.keep_top_p(probs, 0.6)
    assert torch.equal(kept, torch.tensor([[0.5, 0.3, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0]]))


def test_bad_requests_are_refused(tiny):
    for prompts, limit in (([], 5), ([[3], []], 5), ([[3]], 0), ([[3]], [4, 4])):
        with pytest.raises(ValueError, match="prompts and a positive limit"):
            sample(tiny(), prompts, max_new_tokens=limit, stop_ids=[1])


# --------------------------------------------------------------------------------------------------
# Plan tree


def draw_tree(
    model, plan_closed=lambda ids: False, stop_ids=(1,), seed: int = 0,
    plan_opened=lambda ids: True, **settings
) -> list[list[Rollout]]:
    """Plan trees of PROMPTS; `settings` are Config's."""
    options = dict(plan_closed=plan_closed, stop_ids=list(stop_ids), seed=seed)
    options |= dict(plan_opened=plan_opened)
    return grpo.sample_tree(model, PROMPTS, Config(**settings), **options)


@pytest.mark.parametrize("max_rows", [3, 7, 1000])
def test_plan_tree_branches_share_the_plan_and_continue_from_it(tiny, max_rows):
    model, closed = tiny(), lambda ids: ids[-1] % 7 == 0
    limits = dict(max_completion_tokens=24, max_plan_tokens=8, rollout_rows=max_rows)
    trees = draw_tree(model, closed, seed=5, plans=3, cots=3, **limits)
    kinds = {"closed": 0, "open": 0}
    for prompt, rollouts in zip(PROMPTS, trees):
        assert len(rollouts) == 9
        for plan in (rollouts[0:3], rollouts[3:6], rollouts[6:9]):
            k = plan[0].plan_tokens
            if k:
                kinds["closed"] += 1
                assert closed(plan[0].ids[:k])
                assert not any(closed(plan[0].ids[:j]) for j in range(1, k))
                assert all(r.ids[:k] == plan[0].ids[:k] for r in plan)
                assert len({tuple(r.ids) for r in plan}) > 1  # CoTs are drawn independently
            else:  # never closed: no CoT, the same rollout z times
                kinds["open"] += 1
                assert plan[0] is plan[1] is plan[2]
                assert len(plan[0].ids) == 8 or plan[0].stopped
        for r in rollouts:  # the copied cache yields what a forward over the whole sequence yields
            check_logprobs(model, prompt, r.ids, r.logprobs)
            assert r.stopped == (r.ids[-1] == 1)
    assert min(kinds.values()) > 0  # the draw has both


def test_each_plan_token_is_decoded_once(tiny, monkeypatch):
    """Rows fed to the model = tokens of plans, once, + tokens of CoTs: nothing is done twice."""
    fed, prefilled = [], []
    step, fill = decoder.decode_step, decoder.prefill

    def noted_step(model, cache, ids, *where):
        fed.append(len(ids))
        return step(model, cache, ids, *where)

    def noted_fill(model, cache, rollouts):
        prefilled.extend(PROMPTS.index(r.prompt) for r in rollouts)
        fill(model, cache, rollouts)

    monkeypatch.setattr(decoder, "decode_step", noted_step)
    monkeypatch.setattr(decoder, "prefill", noted_fill)
    limits = dict(max_completion_tokens=20, max_plan_tokens=19, rollout_rows=1000)
    closed = lambda ids: len(ids) == 5
    trees = draw_tree(tiny(), closed, stop_ids=[], seed=1, plans=2, cots=4, **limits)
    assert all(r.plan_tokens == 5 and len(r.ids) == 20 for rollouts in trees for r in rollouts)
    assert sum(fed) == 4 * 2 * (5 + 4 * 15)
    assert sorted(prefilled) == [0, 0, 1, 1, 2, 2, 3, 3]  # once per plan, no more for its CoTs


def test_plan_marks_are_found_when_a_tag_is_split_or_merged():
    pieces = {0: "</", 1: "plan", 2: ">\n<", 3: "think>", 4: " 2 > 1 ", 5: "</plan", 6: ">", 7: "<"}

    class Tokenizer:
        def decode(self, ids):
            return "".join(pieces[i] for i in ids)

    opened, closed = plan_marks(Tokenizer())
    assert not closed([4]) and not closed([0, 1])
    assert closed([4, 0, 1, 2]) and closed([5, 6])
    assert not closed([5])
    assert opened([4, 7, 1, 6, 4]) and not opened([0, 1, 2, 4])


def test_a_completion_without_a_plan_has_no_plan_limit(tiny):
    """It goes on to its own limit, and stands alone in its z places; an open plan is cut."""
    limits = dict(max_completion_tokens=9, max_plan_tokens=4, plans=2, cots=3)
    odd = lambda ids: sum(ids[:4]) % 2 == 1
    trees = draw_tree(tiny(), stop_ids=[], plan_opened=odd, **limits)
    lengths = {bool(odd(r.ids)): (len(r.ids), r.is_plan) for tree in trees for r in tree}
    assert lengths == {True: (4, True), False: (9, False)}
    assert all(tree[0] is tree[2] and tree[3] is tree[5] for tree in trees)


def test_no_plan_phase(tiny):
    limits = dict(max_completion_tokens=6, max_plan_tokens=0)
    trees = draw_tree(tiny(), None, stop_ids=[], plans=4, cots=1, **limits)
    assert [len(r.ids) for r in trees[0]] == [6] * 4
    assert all(r.plan_tokens == 0 for r in trees[0])


# --------------------------------------------------------------------------------------------------
# Rewards and advantages


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    # Row 1: mean 1/2, population std 1/2. Row 2: mean 3/2, deviations 3/2 and -1/2, variance
    # (9 + 3) / 16 = 3/4.
    s = math.sqrt(3) / 2
    expected = torch.tensor([[1, -1, -1, 1], [1.5 / s, -0.5 / s, -0.5 / s, -0.5 / s]])
    assert torch.allclose(group_advantages(rewards), expected)
    centred = group_advantages(rewards, std_norm=False)
    assert torch.allclose(centred[1], torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_equal_rewards_give_exactly_zero_advantage():
    rewards = torch.full((1, 12), 0.1) * torch.tensor([[1.0 / 3.0]])
    # Rounding residue, as sums of terms leave it.
    rewards[0, 3] = torch.nextafter(rewards[0, 3], torch.tensor(1.0))
    assert rewards.std(correction=0) > 0
    assert group_advantages(rewards).abs().max() == 0


def test_a_rank_without_groups_gets_empty_rewards_and_metrics():
    """Dynamic sampling may leave a rank with nothing, and it must still take part in the step."""
    rewards = grpo.group_rewards([], Config())
    assert rewards["total"].shape == (0, 4, 3)
    assert group_advantages(rewards["total"].flatten(1)).shape == (0, 12)
    metrics = rollout_metrics([], rewards, CPU)
    assert metrics["accuracy"] == 0 and metrics["zero_variance"] == 0


@pytest.mark.parametrize("closed, cots, warns", [(0, 2, True), (1, 2, False), (0, 1, False)])
def test_a_first_step_without_closed_plans_says_so(capsys, closed, cots, warns):
    rollouts = [Rollout([3], [9], ids=[3, 4], plan_tokens=closed) for _ in range(2 * cots)]
    groups = [grpo.Group({"answer": "7"}, rollouts)]
    rewards = grpo.group_rewards(groups, Config(plans=2, cots=cots))
    step_metrics(groups, rewards, [{"sampler_gap": 0.0, "grad_norm": 1.0}], CPU, first=True)
    assert ("closed a plan, so each counts 2 times" in capsys.readouterr().out) == warns


def test_the_format_rewards_have_settings_of_their_own():
    """--structure 0 --alpha 0 leaves them out, and nothing else."""
    rollouts = [Rollout([3], [9], ids=[3, 4], plan_tokens=1, well_formed=True) for _ in range(4)]
    for rollout, correct in zip(rollouts, (True, False, True, True)):
        rollout.correct = correct
    groups = [grpo.Group({"answer": "7"}, rollouts)]
    whole = grpo.group_rewards(groups, Config(plans=2, cots=2))
    without = grpo.group_rewards(groups, Config(plans=2, cots=2, structure=0.0, alpha=0.0))
    # T = T_max: the length reward is alpha. Structure 0.2, length 0.1; plan scores 1/2 and 1.
    assert torch.allclose(whole["total"] - without["total"], torch.full((1, 2, 2), 0.3))
    assert torch.allclose(without["total"], without["outcome"] + 0.5 * without["plan"])


def test_a_plan_that_never_closed_is_not_right_whatever_it_holds():
    texts = ["<plan> guess \\boxed{7}", "<plan> guess </plan> \\boxed{7}", "\\boxed{7}"]
    tokenizer = types.SimpleNamespace(batch_decode=lambda completions: texts)
    rollouts = [Rollout([3], [9], ids=[2]) for _ in texts]
    grpo.grade_groups(tokenizer, [grpo.Group({"answer": "7"}, rollouts)], [1])
    assert [r.correct for r in rollouts] == [False, True, True]


# --------------------------------------------------------------------------------------------------
# Loss


def test_policy_loss_by_hand():
    log = math.log
    logprobs = torch.tensor([[log(1.5), log(1.1), log(0.5)], [log(1.5), log(0.5), 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old, clip = torch.zeros(2, 3), (0.2, 0.28)
    loss, metrics = policy_loss(logprobs, old, torch.tensor([2.0, -1.0]), mask, *clip)
    # A = 2: min(1.5 * 2, 1.28 * 2) = 2.56 (cut); 2.2; min(1.0, 1.6) = 1.0.
    # A = -1: min(-1.5, -1.28) = -1.5; min(-.5, -.8).
    assert torch.allclose(loss, torch.tensor([[-2.56, -2.2, -1.0], [1.5, 0.8, 0.0]]))
    assert int(metrics["clip_frac"]) == 2
    # Advantages may be (B, T-1), too.
    per_token = torch.tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]])
    assert torch.equal(policy_loss(logprobs, old, per_token, mask, *clip)[0], loss)


def test_masked_garbage_gives_no_nan():
    logprobs = torch.tensor([[0.0, float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss, _ = policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1), mask, 0.2, 0.2)
    loss.sum().backward()
    assert torch.equal(logprobs.grad, torch.tensor([[-1.0, 0.0]]))


def test_first_inner_step_has_ratio_one_and_a_policy_gradient():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    old, mask, advantages = logprobs.detach(), torch.ones(2, 2).bool(), torch.tensor([1.0, -1.0])
    loss, metrics = policy_loss(logprobs, old, advantages, mask, 0.2, 0.2)
    wanted = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    assert torch.equal(loss, wanted) and metrics["clip_frac"] == 0
    loss.sum().backward()  # loss 0 in sum, gradient -A
    assert float(loss.detach().sum()) == 0 and torch.equal(logprobs.grad, wanted)


def test_kl_k3_value_and_mean():
    # r = pi_ref / pi = 2: 2 - 1 - log 2. Equal: 0.
    logprobs, ref_logprobs = torch.tensor([0.0, -1.0]), torch.tensor([math.log(2.0), -1.0])
    expected = torch.tensor([1 - math.log(2.0), 0.0])
    assert torch.allclose(kl_k3(logprobs, ref_logprobs), expected)
    torch.manual_seed(0)
    p, q = torch.randn(50).log_softmax(-1), torch.randn(50).log_softmax(-1)
    exact, mean = float((p.exp() * (p - q)).sum()), float((p.exp() * kl_k3(p, q)).sum())
    assert mean == pytest.approx(exact, rel=1e-5)  # unbiased under pi


@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_in_expectation_over_a_whole_vocabulary(on_policy):
    """Value and gradient against KL(pi || pi_ref): exact means over what pi_old may sample."""
    torch.manual_seed(1)
    logits = torch.randn(6, dtype=torch.double, requires_grad=True)
    logprobs, ref = logits.log_softmax(-1), torch.randn(6, dtype=torch.double).log_softmax(-1)
    other = (logits.detach() + torch.randn(6, dtype=torch.double)).log_softmax(-1)
    old = logprobs.detach() if on_policy else other
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    divergence = float(exact.detach())
    wanted, = torch.autograd.grad(exact, logits, retain_graph=True)

    def value_and_error(estimate):
        mean = (old.exp() * estimate.double()).sum()
        gradient, = torch.autograd.grad(mean, logits, retain_graph=True)
        return float(mean.detach()), float((gradient - wanted).norm() / wanted.norm())

    value, error = value_and_error(kl_k3(logprobs, ref, old))
    assert value == pytest.approx(divergence, rel=1e-6) and error < 1e-5
    value, error = value_and_error(kl_k3(logprobs, ref))  # the original GRPO's form
    assert error > 0.3
    assert (value == pytest.approx(divergence, rel=1e-6)) == on_policy


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True, True], [False, True, True, False]])
    total = torch.full((2, 4), 1 / 10) * mask
    assert torch.equal(token_weights(mask, "token", 10, 3, 100), total)
    sequence = token_weights(mask, "sequence", 10, 3, 100)
    assert torch.allclose(sequence, torch.tensor([[1 / 12] * 4, [0, 1 / 6, 1 / 6, 0]]))
    assert torch.allclose(token_weights(mask, "constant", 10, 3, 100), mask / 300)


# --------------------------------------------------------------------------------------------------
# Update


def fake_rollouts(count: int = 7) -> list[Rollout]:
    """Random completions of three prompts, every other one cut off."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(2, 97, (n,), generator=generator).tolist()
    prompts, rollouts = [draw(n) for n in (3, 8, 5)], []
    for i, length in enumerate(torch.randint(1, 20, (count,), generator=generator).tolist()):
        rollout = Rollout(prompts[i % 3], [99], ids=draw(length), stopped=i % 2 == 0)
        rollout.logprobs = [-1.0] * length
        rollouts.append(rollout)
    for rollout, advantage in zip(rollouts, torch.randn(count, generator=generator).tolist()):
        rollout.advantage = advantage
    return rollouts


def nearby_model(family: str = "qwen2"):
    """The tiny model with every weight moved a little: a KL reference at a realistic distance."""
    model = make_tiny(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def gradients(config: Config, share: bool = True) -> tuple[dict, dict]:
    """One update's gradients (the optimiser step is held back) and metrics.

    `share=False` computes shared beginnings once per sequence.
    """
    held = {}

    def hold(model, optimizer, lr, max_grad_norm):
        held.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "optimizer_step", hold)
        for name in ("pack", "micro_batches"):
            patch.setattr(grpo, name, functools.partial(getattr(grpo, name), share=share))
        model, reference = shard_model(make_tiny("qwen2")), shard_model(nearby_model())
        mini, = grpo.make_mini_batches(model, reference, fake_rollouts(), config)
        metrics = grpo.update(model, make_optimizer(model, 1e-3, 0.0), mini, config, 1e-3)
    return held, metrics


@pytest.mark.parametrize("loss_agg", ["token", "sequence", "constant"])
def test_gradient_depends_neither_on_micro_batch_size_nor_on_sharing(loss_agg):
    settings = dict(loss_agg=loss_agg, kl_coef=0.1, temperature=0.8, max_completion_tokens=20)
    whole, metrics = gradients(Config(tokens_per_micro_batch=10_000, **settings))
    for tokens, share in ((1, True), (60, True), (60, False), (10_000, False)):
        config = Config(tokens_per_micro_batch=tokens, **settings)
        parts, part_metrics = gradients(config, share)
        assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-5
        assert part_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
        assert part_metrics["kl"] == pytest.approx(metrics["kl"], rel=1e-4)


@pytest.mark.parametrize("kl_ratio", [True, False])
def test_gradient_equals_a_plain_loop_over_sequences(kl_ratio):
    """An independent reference: one sequence at a time, full logits, no masks, no chunks."""
    config = Config(kl_coef=0.1, kl_ratio=kl_ratio, temperature=0.8, tokens_per_micro_batch=64)
    ours, _ = gradients(config)
    model, reference, rollouts = make_tiny("qwen2"), nearby_model(), fake_rollouts()
    total = sum(len(r.ids) for r in rollouts)
    for r in rollouts:
        logits = model(torch.tensor([r.prompt + r.ids])).logits[0, len(r.prompt) - 1:-1] / 0.8
        logprobs = logits.log_softmax(-1)[range(len(r.ids)), r.ids]
        ref = uncached_logprobs(reference, r.prompt, r.ids, 0.8)[range(len(r.ids)), r.ids]
        ratio = (logprobs - logprobs.detach()).exp()
        kl = ((ref - logprobs).exp() - 1 - (ref - logprobs)) * (ratio if kl_ratio else 1)
        ((-ratio * r.advantage + 0.1 * kl).sum() / total).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, ours[name], atol=1e-5), name


def test_the_stop_token_is_in_the_loss_and_nothing_after_it():
    rollouts = fake_rollouts()
    micro, = grpo.make_micro_batches(rollouts, Config(), CPU)
    packed, ordered = micro.packed, sorted(rollouts, key=lambda r: r.prompt + r.ids)
    assert micro.rollouts == ordered
    for credit, r in zip(micro.advantages, ordered):
        assert credit[len(r.prompt) - 1:].tolist() == pytest.approx(
            [r.advantage] * (len(credit) - len(r.prompt) + 1)
        )
    for row, r in enumerate(ordered):
        columns = packed.mask[row].nonzero().flatten()
        start = len(r.prompt) - 1
        assert columns.tolist() == list(range(start, start + len(r.ids)))
        assert packed.ids[packed.targets[packed.columns[row, columns]]].tolist() == r.ids
        with_logprob = (micro.sampler_logprobs[row] != 0).nonzero().flatten()
        assert with_logprob.tolist() == columns.tolist()


def test_truncated_completions_can_be_left_out_of_the_loss():
    rollouts = fake_rollouts()
    micro, = grpo.make_micro_batches(rollouts, Config(mask_truncated=True), CPU)
    assert int(micro.packed.mask.sum()) == sum(len(r.ids) for r in rollouts if r.stopped)
    assert float(micro.weights.sum()) == pytest.approx(1.0)


def test_inner_epochs_use_the_policy_that_sampled():
    """With old logprobs stored, the second step on the same data sees a ratio away from 1."""
    model = shard_model(make_tiny("qwen2"))
    config = Config(kl_coef=0.0, clip_low=1e-4, clip_high=1e-4, epochs=2)
    mini, = grpo.make_mini_batches(model, None, fake_rollouts(), config)
    assert all(micro.old_logprobs is not None for micro in mini)
    optimizer = make_optimizer(model, 1e-2, 0.0)
    first = grpo.update(model, optimizer, mini, config, 1e-2)
    second = grpo.update(model, optimizer, mini, config, 1e-2)
    assert first["clip_frac"] == 0 and second["clip_frac"] > 0.2


# --------------------------------------------------------------------------------------------------
# Questions are dealt out to ranks


def test_questions_are_dealt_out_by_tokens():
    # 9, 7, 6, 4, 3, 1: 9 to rank 0, 7 to 1, 6 to 1 (13), 4 to 0 (13), 3 to 0 (16), 1 to 1 (14).
    hands = deal([[7, 1, 9], [3, 6, 4]], 2)
    assert hands == [[(0, 2), (1, 0), (1, 2)], [(0, 0), (0, 1), (1, 1)]]
    assert deal([[5], [], []], 3) == [[(0, 0)], [], []]
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1000, 9000, (8, 16), generator=generator).tolist()
    loads = [sum(sizes[owner][n] for owner, n in hand) for hand in deal(sizes, 8)]
    assert max(loads) < 1.01 * sum(loads) / 8 < 1.05 * max(map(sum, sizes))


def test_tokens_count_a_plan_once_and_an_open_plan_once():
    plan = [3] * 5
    cots = [Rollout([1], [9], ids=plan + [4] * n, plan_tokens=5) for n in (2, 4)]
    open_plan = Rollout([1], [9], ids=[3] * 7, is_plan=True)
    assert decoded_tokens([*cots, open_plan, open_plan], cots=2) == 5 + 2 + 4 + 7
