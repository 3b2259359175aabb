"""The stages on a pretended GPU (pretend_gpu.py): bf16, FSDP2 on one rank, CUDA graphs, devices."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import sft
from conftest import ROOT
from data.toy import make_problems, plan_of
from plumbing.records import load_jsonl


def on_gpu(*arguments) -> dict:
    """Run a stage. Returns what it used of the GPU."""
    command = [sys.executable, "tests/pretend_gpu.py", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def plans(tmp_path):
    """A file of plan records of the toy task."""
    lines = []
    for problem in make_problems("train", 1500):
        solution = problem["solution"]
        record = {**problem, "plan": plan_of(solution), "think": solution}
        lines.append(json.dumps(record) + "\n")
    (tmp_path / "plans.jsonl").write_text("".join(lines))
    return tmp_path / "plans.jsonl"


def test_sft_grpo_and_eval(plans, tmp_path, monkeypatch):
    base = ["--model", ROOT / "data/toy_base", "--data", plans]
    flags = """--epochs 1 --lr 2e-3 --batch_size 32 --tokens_per_micro_batch 2000 --eval_every 0
        --save_every 0""".split()
    whole = ["sft.py", *base, *flags]
    short = [*whole, "--limit", 200, "--out"]
    for command in ([*whole, "--out", tmp_path / "start"], [*short, tmp_path / "cpu"]):
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        sft.main()
    assert on_gpu(*short, tmp_path / "sft", "--cpu_offload", "true")["operations"] > 1000
    loss = lambda name: load_jsonl(tmp_path / name / "metrics.jsonl")[-1]["val_loss"]
    in_bf16, in_fp32 = loss("sft"), loss("cpu")
    assert in_bf16 == pytest.approx(in_fp32, rel=0.02) and in_bf16 != in_fp32

    base = ["--model", tmp_path / "start/model", "--data", "toy", "--out", tmp_path / "grpo"]
    flags = """--steps 2 --questions 3 --plans 3 --cots 2 --max_plan_tokens 48 --epochs 2
        --max_completion_tokens 96 --tokens_per_micro_batch 1000 --mini_batches 2 --eval_every 2
        --eval_size 10 --save_every 1 --token_log_questions 1""".split()
    used = on_gpu("grpo.py", *base, *flags)
    # Steps are captured anew in each rollout.
    assert used["captures"] >= 4 and used["replays"] >= 10 * used["captures"]
    steps = load_jsonl(tmp_path / "grpo/metrics.jsonl")
    assert len(steps) == 2
    assert all(0 < step["sampler_gap"] < 0.02 for step in steps)  # nats per token, from bf16
    assert all(math.isfinite(step["kl"]) and step["plan_tokens"] > 0 for step in steps)
    assert 0 < max(step["grad_norm"] for step in steps) < 100

    base = ["--model", tmp_path / "grpo/model", "--data", "toy", "--out", tmp_path / "eval"]
    flags = "--limit 10 --n 2 --max_completion_tokens 96".split()
    assert on_gpu("eval.py", *base, *flags)["replays"] >= 20


def test_a_model_with_grouped_heads_decodes_by_split_kv(tmp_path):
    """The toy model on half as many key heads, with random weights: eight rows, one graph."""
    shutil.copytree(ROOT / "data/toy_base", tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", num_key_value_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    base = ["--model", tmp_path / "model", "--data", "toy", "--out", tmp_path / "eval"]
    used = on_gpu("eval.py", *base, *"--limit 4 --n 2 --max_completion_tokens 24".split())
    assert used["captures"] == 1 and used["split_kv"] >= 3 * used["replays"] >= 3 * 20
