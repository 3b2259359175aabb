"""plumbing/kernels.py, and what else makes a GPU step cheaper, as far as a CPU can tell."""

import copy
import math
import types
from collections import Counter

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import grpo
import pretend_gpu
from conftest import ROOT, make_tiny
from grpo import Config, Rollout, sample
from plumbing import attention, decoder
from plumbing.attention import use_attention
from plumbing.decoder import KVCache, forward_step, reserve_cache
from plumbing.kernels import fuse_norms
from plumbing.weights import load_config

QWEN, QWEN3 = (str(ROOT / "recipes/shapes" / name) for name in ("qwen2.5_7b", "qwen3_8b"))


@pytest.mark.parametrize("family, norms", [("qwen2", 5), ("qwen3", 9), ("llama", 5), ("gemma", 0)])
def test_fused_norms_compute_what_the_modules_own_do(family, norms):
    """Two layers have two norms each, Qwen3's four, and one is last. Gemma adds 1 to weights."""
    model = make_tiny(family)
    with torch.no_grad():  # weights of one would not tell Gemma's form from Llama's
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    fused, ids = fuse_norms(copy.deepcopy(model)), torch.tensor([[3, 5, 8, 13]])
    changed = [m for m in fused.modules() if "forward" in vars(m)]
    assert len(changed) == norms
    outputs = [m(ids).logits for m in (model, fused)]
    assert torch.allclose(*outputs, atol=1e-4)
    for logits in outputs:
        logits.square().mean().backward()
    for (name, mine), theirs in zip(fused.named_parameters(), model.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3), name


VIEWS = set(
    "view _unsafe_view reshape transpose t permute expand slice select unsqueeze squeeze detach "
    "alias as_strided split split_with_sizes unbind empty empty_like empty_strided new_empty "
    "lift_fresh unflatten _reshape_alias narrow diagonal".split()
)
LARGE = {"mm", "addmm", "bmm", "linear", "_varlen_attn"}


class Kernels(TorchDispatchMode):
    """Counts what would be a small GPU kernel: no view, no product, no attention."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        same = name == "to" and result.dtype == args[0].dtype  # nothing to do
        if name not in VIEWS | LARGE and not same:
            self.count[name] += 1
        return result


def kernels_of_a_decode_step(layers: int, fused: bool, split: bool, monkeypatch) -> int:
    """Small kernels of a decode step of 192 rows, Qwen2.5-7B's shape, on the meta device."""
    config = AutoConfig.from_pretrained(QWEN)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    options = dict(dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.device("meta"):
        model = use_attention(AutoModelForCausalLM.from_config(config, **options).eval())
    model = fuse_norms(model) if fused else model
    attend = lambda query, key, value, **options: torch.empty_like(query)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    cache = KVCache(192, 2048, split)
    inputs = torch.zeros(3, 192, dtype=torch.long, device="meta")
    # In inference mode F.rms_norm reaches the mode whole. Elsewhere only CUDA keeps it whole.
    with torch.inference_mode(), Kernels() as kernels:
        forward_step(model, cache, inputs, 1024)
        first = kernels.count.total()
        forward_step(model, cache, inputs, 1024)  # the first one has made the cache
    return kernels.count.total() - first


def test_a_decode_step_has_at_most_twenty_small_kernels_per_layer(monkeypatch):
    count = lambda layers, *kind: kernels_of_a_decode_step(layers, *kind, monkeypatch)
    per_layer = lambda *kind: count(3, *kind) - count(2, *kind)
    assert per_layer(True, False) <= 20 < 30 <= per_layer(False, False)
    assert per_layer(True, True) <= 18  # split-KV


# --------------------------------------------------------------------------------------------------
# Slots and admission


def test_192_rows_of_qwen2_5_7b_fit_beside_its_weights_on_80_gb(monkeypatch):
    """Free: 85 GB without a seventh of 14 bytes per parameter and the whole model in bf16."""
    model = types.SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, config=load_config(QWEN)
    )
    parameters = 7.62e9
    free = 85e9 - 1.6e9 - 14 * parameters / 8 - 2 * parameters
    monkeypatch.setattr(decoder, "free_memory", lambda device: int(free))
    assert reserve_cache(model, 192, 512 + 3584).slots == 192


def places_reserved(decoder: decoder.Decoder, starts: list[int]) -> int:
    """Places of all extents. Asserts that they do not overlap, and that the cache has them."""
    lengths = {slot: units * decoder.unit for slot, units in decoder.extents.items()}
    assert sorted(lengths) == sorted(starts) and len(starts) <= decoder.cache.rows
    begin = decoder.cache.place(0)
    for slot in sorted(starts):
        assert slot >= begin
        begin = slot + lengths[slot]
    assert begin <= decoder.cache.place(decoder.cache.slots)
    return sum(lengths.values())


def decode_steps(
    monkeypatch, slots: int, rows: int = 0, split: bool = False, limit: int = 3584
) -> tuple[int, float]:
    """Decode steps of 64 plans x 3 CoTs of log-normal lengths; the model computes nothing.

    The second number is how many places are reserved for each that is used, on average over steps.
    """
    generator, shares = torch.Generator().manual_seed(1), []
    draw = lambda mean, sigma, most: int(min(most, max(40, torch.empty(1).log_normal_(
        mean, sigma, generator=generator).item())))
    plans = [draw(5.2, 0.35, 511) for _ in range(64)]
    totals = [[draw(7.0, 0.5, limit) for _ in range(3)] for _ in plans]
    totals[0], totals[-1] = [limit] * 3, [3100] * 3  # a long plan tree begins last
    model = types.SimpleNamespace(device=torch.device("cpu"))
    cache, decoders = KVCache(slots, 1024 + limit, split, rows), []

    class Noted(decoder.Decoder):
        def __init__(self, *args):
            decoders.append(self)
            super().__init__(*args)

    def step(model, cache, ids, positions, starts):
        shares.append(places_reserved(decoders[0], starts) / (sum(positions) + len(positions)))
        return torch.zeros(len(ids), 2)

    one = lambda logits, *args: (torch.zeros(len(logits), dtype=torch.long), logits[:, 0])
    monkeypatch.setattr(decoder, "reserve_cache", lambda *args: cache)
    monkeypatch.setattr(decoder, "prefill", lambda *args: None)
    monkeypatch.setattr(decoder, "decode_step", step)
    monkeypatch.setattr(grpo, "sample_token", one)
    monkeypatch.setattr(grpo, "Decoder", Noted)
    lengths = {}

    def closed(ids):
        return lengths.get(id(ids)) == len(ids)

    prompts = [[0] * int(150 + 7 * i % 200) for i in range(64)]
    roots = [Rollout(prompt, total, is_plan=True) for prompt, total in zip(prompts, totals)]
    lengths.update({id(root.ids): plan for root, plan in zip(roots, plans)})
    options = dict(temperature=1.0, top_p=1.0, stop_ids=[], seed=0, max_plan_tokens=512)
    grpo.decode(model, roots, plan_closed=closed, **options)
    cots = [cot for root in roots for cot in root.cots]
    assert len(cots) > 180 and all(len(cot.ids) == cot.limits[0] for cot in cots)
    return len(shares), sum(shares) / len(shares)


def test_rows_that_nearly_fit_cost_at_most_five_percent_more_steps(monkeypatch):
    whole, _ = decode_steps(monkeypatch, 192)
    assert whole == 3584
    assert decode_steps(monkeypatch, 183)[0] <= 1.05 * whole


def test_extents_that_grow_need_few_places_and_no_waves(monkeypatch):
    """56 rows of Qwen3-8B and 26 of Qwen3-14B would fit into 80 GB, as long as the longest."""
    steps, reserved = decode_steps(monkeypatch, 56)
    assert steps == 7168 and reserved > 3.5
    for slots, most in ((54, 3584), (25, 5200)):  # 26 slots would take 12,897 steps
        steps, reserved = decode_steps(monkeypatch, slots, 192, split=True)
        assert steps <= most and reserved <= 1.3


def test_memory_for_logits_is_taken_from_the_slots_that_more_rows_share(monkeypatch):
    """A slot of Qwen3-8B takes 2 x 36 layers x 8 heads x 128 x 2 bytes x 4,608 = 679.5 MB.

    A row's logits take 48 x 151,936 = 7.3 MB. 90 % of 42.8 GB are 56 slots with a row each, or 54
    with 192 rows.
    """
    model = types.SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, config=load_config(QWEN3)
    )
    for rows, gigabytes, slots, at_once in (
        (192, 42.8, 54, 192), (40, 42.8, 40, 40), (900, 42.8, 51, 448), (192, 200, 192, 192),
    ):
        model.kv_cache = None
        monkeypatch.setattr(decoder, "free_memory", lambda device: int(gigabytes * 1e9))
        cache = reserve_cache(model, rows, 1024 + 3584)
        assert (cache.slots, cache.rows, cache.split) == (slots, at_once, True)
        assert slots * 679.5e6 + at_once * 7.3e6 <= 0.9 * gigabytes * 1e9


# --------------------------------------------------------------------------------------------------
# Split-KV attention


@pytest.fixture
def split_kv(monkeypatch):
    """Lets models on a CPU decode by split-KV. Returns counts of what was used."""
    pretend_gpu.pretend_split_kv()
    monkeypatch.setattr(decoder, "may_split", lambda model: getattr(model, "split_kv", True))
    pretend_gpu.used.clear()
    return pretend_gpu.used


PROMPTS = [[5], [9, 33, 12, 8, 70], [3] * 17, [40, 41, 42, 43, 44, 45, 46, 47, 48]]


def draw(model, max_rows: int = 3) -> tuple[list, list]:
    """Greedy ids and logprobs: of few slots that are taken again, and of plans that fork."""
    options, limits = dict(temperature=0.0, stop_ids=[1, 6]), [1, 12, 9, 4, 12, 7, 11, 2]
    drawn = sample(model, PROMPTS, n=2, max_new_tokens=limits, max_rows=max_rows, **options)
    config = Config(plans=2, cots=3, max_plan_tokens=5, max_completion_tokens=11)
    config.temperature, config.rollout_rows = 0.0, 2 * max_rows
    closed = lambda ids: len(ids) == 3 + ids[0] % 3
    trees = grpo.sample_tree(model, PROMPTS, config, plan_closed=closed, stop_ids=[1], seed=0)
    rollouts = [rollout for tree in trees for rollout in tree]
    assert any(r.plan_tokens for r in rollouts)
    return drawn[0] + [r.ids for r in rollouts], drawn[1] + [r.logprobs for r in rollouts]


def is_same(drawn: tuple, expected: tuple) -> bool:
    return drawn[0] == expected[0] and all(
        a == pytest.approx(b, abs=1e-4) for a, b in zip(drawn[1], expected[1])
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_split_kv_draws_what_masked_attention_draws(family, split_kv, capsys):
    model = make_tiny(family)
    model.split_kv = False
    expected = draw(use_attention(model))
    assert not split_kv["split_kv"]
    del model.split_kv, model.kv_cache
    assert is_same(draw(model), expected)
    assert split_kv["split_kv"] > 50 and model.split_kv
    assert "slower" not in capsys.readouterr().out


def share_slots(slots: int, monkeypatch) -> list:
    """Let all rows share that many slots of 32 places. Returns the decoders that come to be."""
    decoders, rows_of = [], lambda model, rows, *_: KVCache(slots, 32, True, rows)
    monkeypatch.setattr(decoder, "reserve_cache", rows_of)

    class Noted(decoder.Decoder):
        def __init__(self, *args):
            decoders.append(self)
            self.again = 0
            super().__init__(*args)

        def keep(self, alive):
            before = len(self.waiting)
            active = super().keep(alive)
            self.again += len(self.waiting) - before
            return active

    monkeypatch.setattr(grpo, "Decoder", Noted)
    return decoders


@pytest.mark.parametrize("slots", [3, 4, 7])
def test_rows_that_share_slots_and_wait_again_draw_the_same(slots, split_kv, monkeypatch):
    model = use_attention(make_tiny("qwen3"))
    model.split_kv = False
    expected = draw(model, max_rows=0)
    del model.split_kv
    decoders = share_slots(slots, monkeypatch)
    assert is_same(draw(model, max_rows=0), expected)
    assert all(d.unit == 4 and d.units == 8 * slots for d in decoders)
    assert slots == 7 or any(d.again for d in decoders)


def test_rows_that_share_slots_see_their_own_tokens_only(split_kv, monkeypatch):
    """The sampler's logprobs are those of a forward over each sequence. A seed fixes them."""
    model, prompts = use_attention(make_tiny("qwen2")), [PROMPTS[i] for i in (2, 1, 3, 1, 2, 3)]
    options = dict(n=3, max_new_tokens=12, stop_ids=[1])
    decoders = share_slots(2, monkeypatch)
    drawn = [sample(model, prompts, seed=seed, **options) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[2][0]
    assert all(d.again > 3 for d in decoders)
    for i, (ids, logprobs) in enumerate(zip(*drawn[0])):
        prompt = prompts[i // 3]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
        dense = logits.log_softmax(-1)[range(len(ids)), ids]
        assert logprobs == pytest.approx(dense.tolist(), abs=1e-4)


def without_splits(*args, scale=None, window_size=(-1, -1)):
    """The signature of torch 2.10."""


def refuse(*args, **options):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nbacktrace")


def forget_a_key(*args, seqused_k, **options):
    return varlen.torch.ops.torch_attn._varlen_attn(
        *args, scale=options["scale"], enable_gqa=True, window_size=[-1, -1],
        seqused_k=(seqused_k - 1).clamp_min(1), num_splits=2,
    )[0]


@pytest.mark.parametrize("kernel, reason", [
    (without_splits, "unexpected keyword argument 'enable_gqa'"),
    (refuse, "FlashAttention only supports Ampere GPUs or newer.\n"),
    (forget_a_key, "its result differs"),
])
def test_a_split_kv_kernel_that_fails_costs_a_message(
    kernel, reason, split_kv, monkeypatch, capsys
):
    model = use_attention(make_tiny("qwen2"))
    model.split_kv = False
    expected = draw(model)
    del model.split_kv, model.kv_cache
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert is_same(draw(model), expected) and model.split_kv is False
    said = capsys.readouterr().out
    assert said.count("rank 0 decodes without split-KV attention, which is slower: ") == 1
    assert reason in said


def replay(model, cache, *inputs: list[int]) -> torch.Tensor:
    """decode_step as on a GPU, with CUDA graphs that are pretended."""
    inputs = torch.tensor(inputs), max(inputs[1]) + 1
    options = dict(graph=pretend_gpu.Graph, capture=pretend_gpu.Capture)
    return decoder.replay_step(model, cache, *inputs, **options)


def test_a_model_that_has_diverged_is_called_that(split_kv, monkeypatch, capsys):
    model = use_attention(make_tiny("qwen2"))
    monkeypatch.setattr(decoder, "decode_step", replay)
    with torch.no_grad():
        model.get_decoder().norm.weight[3] = math.nan
    draw(model)
    said = capsys.readouterr().out
    assert "rank 0 decodes with a model whose logits are not finite: its weights have" in said
    # Neither kernel nor graph is blamed.
    assert "slower" not in said and not hasattr(model, "split_kv") and split_kv["captures"]


def test_split_kv_needs_one_graph_per_bucket_of_rows(split_kv, monkeypatch):
    """Lengths from 3 to 301, and 20 rows that become 18 and 6: without it, each has graphs."""
    model, caches = use_attention(make_tiny("qwen2")), []
    model.split_kv = False
    prompts, limits = [[7] * 300, [8] * 299] + [[7, 9, 5]] * 18, [2, 2] + [5, 9, 4] * 6

    def step(model, cache, *inputs):
        caches.append(cache)
        return replay(model, cache, *inputs)

    options = dict(max_new_tokens=limits, temperature=0.0, stop_ids=[])
    drawing = lambda: sample(model, prompts, **options)
    monkeypatch.setattr(decoder, "decode_step", step)
    expected = drawing()
    assert sorted(caches[-1].graphs) == [(8, 256), (16, 256), (20, 256), (20, 320)]
    del model.split_kv, model.kv_cache
    assert is_same(drawing(), expected)
    assert sorted(caches[-1].graphs) == [(8, 320), (16, 320), (20, 320)]


@pytest.mark.parametrize("changes, fits", [
    ({}, True),
    (dict(num_key_value_heads=28), False),  # not grouped
    (dict(sliding_window=4096), False),
    (dict(head_dim=260), False),
    (dict(head_dim=36), False),
    (dict(head_dim=256), True),
    (dict(qk_nope_head_dim=128), False),  # DeepSeek: keys are wider than values
])
def test_split_kv_is_for_models_that_its_kernel_can_do(changes, fits):
    config = load_config(QWEN)
    for name, value in changes.items():
        setattr(config, name, value)
    model = types.SimpleNamespace(config=config, device=torch.device("cuda"))
    assert attention.may_split(model) == fits
    model.device = torch.device("cpu")
    assert not attention.may_split(model)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_numbers_of_a_copy_reach_the_gpu_once(layers, split, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", pretend_gpu.to)
    with pretend_gpu.PretendGPU():
        cache = KVCache(4, 16, split)
        cache.write_prompts([(cache.place(slot), 5) for slot in range(4)], pretend_gpu.GPU)
        for layer in range(layers):
            values = torch.randn(4, 2, 5, 8, device="cuda")
            cache.update(values, values, layer)
        before = pretend_gpu.used["copies"]
        cache.copy([(cache.place(1), cache.place(3), 4), (cache.place(2), cache.place(0), 5)])
        assert pretend_gpu.used["copies"] - before == 1


# --------------------------------------------------------------------------------------------------
# Attention and sampling


def test_a_mask_and_grouped_heads_never_reach_the_kernel_together(monkeypatch):
    """A window needs a mask, and with one the fused kernels refuse grouped heads."""
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, **options):
        seen.append((options["attn_mask"] is not None, options["enable_gqa"]))
        return original(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    options = dict(scaling=None, grouped=True)
    out = attention.attend(query, key, value, None, window=4, **options)
    attention.attend(query, key, value, None, window=None, **options)
    assert seen == [(True, False), (False, True)]
    for row in range(9):  # by hand: head h attends to key head h // 2, four positions back
        first = max(0, row - 3)
        for head in range(4):
            keys = key[:, head // 2, first:row + 1]
            scores = (query[:, head, row, None] * keys).sum(-1) / 8**0.5
            expected = (scores.softmax(-1)[..., None] * value[:, head // 2, first:row + 1]).sum(1)
            assert torch.allclose(out[:, row, head], expected, atol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.1, 4.0])
def test_top_p_is_the_same_by_the_likeliest_tokens_as_by_a_full_sort(spread):
    logits = spread * torch.randn(5, 3000, generator=torch.Generator().manual_seed(2))
    probs = (logits + 1e-3 * torch.linspace(0, 1, 3000)).softmax(-1)  # no two are equal
    for top_p in (0.05, 0.5, 0.95):
        kept = grpo.keep_top_p(probs, top_p)
        for row, chosen in zip(probs.tolist(), kept):
            mass, expected = 0.0, set()
            for token in sorted(range(3000), key=lambda t: -row[t]):
                if mass >= top_p:
                    break
                expected.add(token)
                mass += row[token]
            found = set(chosen.nonzero().flatten().tolist())
            assert len(found ^ expected) <= 1  # the last one, by rounding of the sums
