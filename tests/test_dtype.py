"""--dtype bf16 on a CPU: weights stay fp32, sampler and trainer compute in bf16, figures agree."""

import types

import pytest
import torch
import torch.distributed as dist

import grpo
from conftest import ROOT, make_tiny
from grpo import Config, Rollout, sample
from model_utils import compute_dtype, load_sharded, make_optimizer, optimizer_step, unsharded
from plumbing import decoder, thin
from plumbing.memory import dry_run_rl
from plumbing.ranks import init_distributed
from plumbing.weights import load_config
from sft import sft_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(dtype) -> the tiny model as a run with --dtype loads it, in a process group of one."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", vocab_size=200).save_pretrained(folder)
    config = lambda dtype: Config(dtype=dtype)
    assert init_distributed("cpu", alone=True) == CPU and dist.get_world_size() == 1
    yield lambda dtype, **options: load_sharded(str(folder), CPU, config(dtype), **options)
    dist.destroy_process_group()


def test_what_the_flag_means():
    in_bf16 = lambda device: [
        name for name in ("auto", "bf16", "fp32") if compute_dtype(name, device) == torch.bfloat16
    ]
    assert in_bf16(CPU) == ["bf16"] and in_bf16(GPU) == ["auto", "bf16"]


def rows(seed: int) -> list[tuple]:
    """Records with a shared beginning of 8 tokens; the rest counts up, which can be learned."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(10, 100, (6,), generator=generator).tolist()
    return [([*range(8), *range(start, start + 20)], 9, []) for start in starts]


def test_losses_in_bf16_follow_those_in_fp32(models):
    losses, config = {}, Config(tokens_per_micro_batch=1000)
    for dtype in ("fp32", "bf16"):
        model = models(dtype)
        optimizer = make_optimizer(model, 1e-2, 0.0)
        losses[dtype] = []
        for step in range(12):
            losses[dtype].append(sft_loss(model, rows(step), config, train=True))
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            optimizer_step(model, optimizer, 1e-2, 1.0)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses["fp32"][-1] < 0.8 * losses["fp32"][0]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


@pytest.mark.parametrize("dtype, low, high", [("fp32", 0.0, 1e-5), ("bf16", 1e-5, 0.1)])
def test_sampler_and_trainer_agree_as_closely_as_the_dtype_allows(models, dtype, low, high):
    model, reference = models(dtype), models(dtype, frozen=True)
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert {p.dtype for p in reference.parameters()} == {stored}
    prompts, options = [[5, 9, 13, 2], [8, 1]], dict(n=4, max_new_tokens=24, stop_ids=[])
    with unsharded(model):
        ids, logprobs = sample(model, prompts, **options)
        again = sample(model, prompts, **options)
        assert {t.dtype for layer in model.kv_cache.layers for t in layer} == {stored}
    assert again == (ids, logprobs)
    rollouts = [Rollout(prompts[i // 4], [24], ids[i], logprobs[i]) for i in range(8)]
    config = Config(kl_coef=0.1)
    minis = grpo.make_mini_batches(model, reference, rollouts, config)
    metrics = grpo.update(model, make_optimizer(model, 1e-3, 0.0), minis[0], config, 1e-3)
    assert low <= metrics["sampler_gap"] <= high
    assert abs(metrics["kl"]) <= high  # policy and reference were the same


# --------------------------------------------------------------------------------------------------
# Whatever is sized by the dtype


@pytest.mark.parametrize("dtype, slots", [("fp32", 3), ("bf16", 4)])
def test_a_rollouts_cache_is_sized_by_the_dtype_that_it_holds(models, monkeypatch, dtype, slots):
    """A token's keys and values are 2 x 2 layers x 2 heads x 8 numbers, a row's 64 times as many.

    16,384 bytes in fp32, 8,192 in bf16. A row's logits take 48 x 200 = 9,600 bytes.
    """
    budget = 3 * (16384 + 9600)
    monkeypatch.setattr(decoder, "free_memory", lambda device: 2 * budget)  # half of it is used
    model = models(dtype)
    with unsharded(model):
        cache = decoder.reserve_cache(model, rows=100, length=60)
    assert cache.slots == slots and budget // (8192 + 9600) == 4


@pytest.mark.parametrize("dtype, slots", [(torch.float32, 28), (torch.bfloat16, 40)])
def test_on_a_gpu_fp32_takes_twice_the_room(monkeypatch, dtype, slots):
    """A slot of Qwen3-8B of 4,608 tokens takes 1,359.0 MB in fp32, a row's logits 7.3 MB.

    40 rows' logits leave 38.2 of 38.5 GB: 28 slots. In bf16, all 40 have one.
    """
    config = load_config(str(ROOT / "recipes/shapes/qwen3_8b"))
    model = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, config=config)
    monkeypatch.setattr(decoder, "free_memory", lambda device: int(42.8e9))
    assert decoder.reserve_cache(model, 40, 1024 + 3584).slots == slots


@pytest.mark.parametrize("dtype, stored", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_model_in_parts_has_the_dtype_that_the_whole_one_computes_in(
    models, monkeypatch, dtype, stored
):
    """The weights of the sharded one are fp32 with either."""
    monkeypatch.setattr(thin, "Lockstep", lambda tp: types.SimpleNamespace(add_up=None))
    part = thin.make_thin(models(dtype), 2)
    assert {parameter.dtype for parameter in part.parameters()} == {stored}


def test_the_dry_run_counts_fp32_where_that_is_asked_for(monkeypatch, capsys):
    """Weights and AdamW are in fp32 with either; the rest is in the dtype of computing."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = {}
    for dtype in ("auto", "bf16", "fp32"):
        model = str(ROOT / "recipes/shapes/qwen2.5_7b")
        dry_run_rl(Config(model=model, dtype=dtype, dry_run=True))
        lines = capsys.readouterr().out.splitlines()
        rows = [line.rsplit(maxsplit=1) for line in lines if line.startswith("  ")]
        found[dtype] = {name.strip(): float(size) for name, size in rows}
    assert found["auto"] == found["bf16"]
    # 192 rows of 4,608 tokens of 57,344 bytes, in GiB; 2 bytes for each of 7.616 B parameters.
    assert found["bf16"]["KV cache"] == pytest.approx(192 * 4608 * 57344 / 2**30, abs=0.06)
    assert found["bf16"]["gathered for rollout"] == pytest.approx(14.2, abs=0.05)
    for name in ("KV cache", "gathered for rollout", "reference"):
        assert found["fp32"][name] == pytest.approx(2 * found["bf16"][name], abs=0.11), name
    for name in ("weights", "optimiser", "gradients"):
        assert found["fp32"][name] == found["bf16"][name]
