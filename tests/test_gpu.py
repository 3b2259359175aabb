"""The stages on a pretended GPU (pretend_gpu.py): bf16 compute, FSDP2 on one rank, CUDA graphs, nothing on two devices."""
import json
import math
import os
import subprocess
import sys

import pytest

import sft
from conftest import ROOT
from data.sources import load_jsonl
from data.toy import make_problems, plan_of


def on_gpu(*arguments) -> dict:
    """Run a stage; returns what it used of the GPU."""
    done = subprocess.run([sys.executable, "tests/pretend_gpu.py", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def plans(tmp_path):
    records = [{**r, "plan": plan_of(r["solution"]), "think": r["solution"]} for r in make_problems("train", 1500)]
    (tmp_path / "plans.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "plans.jsonl"


def test_sft_grpo_and_eval(plans, tmp_path, monkeypatch):
    flags = ("sft.py", "--model", ROOT / "data/toy_base", "--data", plans, "--epochs", 1, "--lr", 2e-3, "--batch_size", 32,
             "--tokens_per_micro_batch", 2000, "--eval_every", 0, "--save_every", 0)
    short = (*flags, "--limit", 200, "--out")
    for command in ((*flags, "--out", tmp_path / "start"), (*short, tmp_path / "cpu")):
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        sft.main()
    assert on_gpu(*short, tmp_path / "sft", "--cpu_offload", "true")["operations"] > 1000
    in_bf16, in_fp32 = (load_jsonl(tmp_path / name / "metrics.jsonl")[-1]["val_loss"] for name in ("sft", "cpu"))
    assert in_bf16 == pytest.approx(in_fp32, rel=0.02) and in_bf16 != in_fp32

    used = on_gpu("grpo.py", "--model", tmp_path / "start/model", "--data", "toy", "--out", tmp_path / "grpo", "--steps", 2,
                  "--questions", 3, "--plans", 3, "--cots", 2, "--max_plan_tokens", 48, "--max_completion_tokens", 96,
                  "--tokens_per_micro_batch", 1000, "--eval_every", 2, "--eval_size", 10, "--save_every", 1, "--epochs", 2,
                  "--mini_batches", 2, "--show_tokens", 1)
    assert used["captures"] >= 4 and used["replays"] >= 10 * used["captures"]  # captured anew in each rollout
    steps = load_jsonl(tmp_path / "grpo/metrics.jsonl")
    assert len(steps) == 2 and all(0 < step["sampler_gap"] < 0.02 for step in steps)  # nats a token, of bf16
    assert all(math.isfinite(step["kl"]) and step["plan_tokens"] > 0 for step in steps)
    assert 0 < max(step["grad_norm"] for step in steps) < 100

    used = on_gpu("eval.py", "--model", tmp_path / "grpo/model", "--data", "toy", "--limit", 10, "--n", 2,
                  "--out", tmp_path / "eval", "--max_completion_tokens", 96)
    assert used["replays"] >= 20
