"""--dtype bf16 on a CPU: weights stay fp32, sampler and trainer compute in bf16, figures agree."""

import pytest
import torch
import torch.distributed as dist

import grpo
from conftest import make_tiny
from grpo import Config, Rollout, sample
from model_utils import compute_dtype, load_sharded, make_optimizer, optimizer_step, unsharded
from plumbing.ranks import init_distributed
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


def rows(seed: int) -> list[tuple[list[int], int]]:
    """Records with a shared beginning of 8 tokens; the rest counts up, which can be learned."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(10, 100, (6,), generator=generator).tolist()
    return [([*range(8), *range(start, start + 20)], 9) for start in starts]


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
