"""Distilling, SFT, GRPO and evaluation on tiny random models of real families.

The scripts are the same for all, and run a few steps each.
"""

import json
import math
import sys

import pytest
import torch

import distill
import eval as evaluation
import grpo
import sft
from data.toy import make_problems, make_tokenizer

MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES = {
    "qwen2": {}, "qwen3": {}, "llama": {}, "mistral": {"sliding_window": None}, "gemma": {},
    "qwen3_moe": MOE,
}  # fmt: skip


def make_folder(family: str, folder):
    """A two-layer model of the family on the toy task's tokenizer, in Hugging Face format."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if family != "qwen2":
        # See data/toy.py: transformers wants it for a Qwen2 model, and for no other.
        del tokenizer.init_kwargs["auto_map"]
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **FAMILIES[family],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, split, count in (("sft", "train", 40), ("rl", "validation", 12)):
        problems = make_problems(split, count, facts=(2, 2))
        text = "".join(json.dumps(problem) + "\n" for problem in problems)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def stage(monkeypatch):
    """stage(script, flags): run a stage in this process."""

    def stage(script, flags: str):
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
        script.main()

    return stage


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_runs(family, data, tmp_path, stage):
    start, plans, trained = tmp_path / "start", tmp_path / "plans.jsonl", tmp_path / "sft/model"
    make_folder(family, start)
    # The family itself is the teacher ("self-plan"). It writes random words, and those that pass
    # the filter are kept.
    flags = "--limit 40 --max_new_tokens 4 --temperature 1.0"
    stage(distill, f"--teacher {start} --data {data}/sft.jsonl --out {plans} {flags}")
    records = lines(plans)
    assert 12 <= len(records) and all(record["plan"] and record["think"] for record in records)

    flags = "--batch_size 4 --epochs 1 --lr 3e-3 --warmup_steps 0 --eval_every 100"
    stage(sft, f"--model {start} --data {plans} --out {tmp_path}/sft {flags}")
    losses = [step["loss"] for step in lines(tmp_path / "sft/metrics.jsonl")]
    assert losses[-1] < losses[0]

    flags = (
        "--steps 2 --questions 2 --plans 2 --cots 2 --max_plan_tokens 12 --lr 1e-3 --kl_coef 0.01 "
        "--max_completion_tokens 24 --eval_every 0 --save_every 0 --show_every 1"
    )
    stage(grpo, f"--model {trained} --data {data}/rl.jsonl --out {tmp_path}/rl {flags}")
    steps = lines(tmp_path / "rl/metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["grad_norm"]) for step in steps)
    # The sampler (KV cache, one token at a time) and the trainer (whole sequences) agree on every
    # token's probability.
    gaps = [step["sampler_gap"] for step in steps]
    assert max(gaps) < 1e-4, gaps

    model, flags = tmp_path / "rl/model", "--n 2 --max_completion_tokens 24 --limit 4"
    stage(evaluation, f"--model {model} --data {data}/rl.jsonl --out {tmp_path}/eval {flags}")
    assert json.loads((tmp_path / "eval/summary.json").read_text())["n_problems"] == 4

    from transformers import AutoModelForCausalLM

    # What was saved is an ordinary model of its family.
    assert AutoModelForCausalLM.from_pretrained(model).config.model_type == family
