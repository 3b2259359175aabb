"""memory.py: parameter counts against the published ones, hand-worked parts, planned against measured bytes."""
import sys

import pytest

from bench import memory_plan
from bench.memory_plan import compare, tiny_configs
from conftest import ROOT
from memory import plan
from model_utils import load_config

SETTINGS = dict(ranks=8, rows=192, prompt_tokens=1024, completion_tokens=3584, micro_tokens=1024)


@pytest.mark.parametrize("name, billions", [("llama3.2_3b", 3.21), ("qwen2.5_7b", 7.61), ("qwen3_8b", 8.2), ("qwen3_14b", 14.8)])
def test_the_configs_have_the_published_numbers_of_parameters(name, billions):
    parts = plan(load_config(str(ROOT / f"recipes/shapes/{name}")), **SETTINGS)
    assert parts["parameters"] / 1e9 == pytest.approx(billions, rel=0.005)


def test_parts_by_hand():
    parts = plan(load_config(str(ROOT / "recipes/shapes/qwen2.5_7b")), **SETTINGS)
    count = parts["parameters"]
    assert (parts["weights"], parts["optimiser"], parts["gathered for rollout"]) == (count / 2, count, 2 * count)
    # keys and values, 28 layers, 4 heads of 128, 2 bytes: 57,344 bytes a token
    assert parts["KV cache"] == 192 * 4608 * 57344
    offloaded = plan(load_config(str(ROOT / "recipes/shapes/qwen2.5_7b")), **SETTINGS, cpu_offload=True)
    assert offloaded["weights"] == offloaded["optimiser"] == 0 and offloaded["update"] < parts["update"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(tiny_configs()))
def test_the_plan_is_within_15_percent_of_a_measured_update(name, checkpointing):
    planned, measured = compare(tiny_configs()[name], checkpointing=checkpointing)
    assert planned == pytest.approx(measured, rel=0.15)


def test_the_plan_without_flags_is_of_the_papers_main_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory_plan.py"])
    memory_plan.main()
    out = capsys.readouterr().out
    assert "qwen2.5_7b: 7.62 B parameters; GiB on each of 8 GPUs" in out
    assert "fits in 90 % of 80 GiB" in out
