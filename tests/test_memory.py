"""plumbing/memory.py: published parameter counts, parts worked by hand, measured updates."""

import pytest

from bench.memory_plan import compare, tiny_configs
from conftest import ROOT
from plumbing.memory import Flags, estimate, table
from plumbing.weights import load_config

SETTINGS = dict(
    ranks=8, rows=192, prompt_tokens=1024, completion_tokens=3584, micro_tokens=1024
)
PUBLISHED = {"llama3.2_3b": 3.21, "qwen2.5_7b": 7.61, "qwen3_8b": 8.2, "qwen3_14b": 14.8}


@pytest.mark.parametrize("name, billions", PUBLISHED.items())
def test_the_configs_have_the_published_numbers_of_parameters(name, billions):
    parts = estimate(load_config(str(ROOT / f"recipes/shapes/{name}")), **SETTINGS)
    assert parts["parameters"] / 1e9 == pytest.approx(billions, rel=0.005)


def test_parts_by_hand():
    config = load_config(str(ROOT / "recipes/shapes/qwen2.5_7b"))
    parts = estimate(config, **SETTINGS)
    count = parts["parameters"]
    assert parts["weights"] == count / 2
    assert parts["optimiser"] == count
    assert parts["gathered for rollout"] == 2 * count
    # Keys and values, 28 layers, 4 heads of 128, 2 bytes: 57,344 bytes per token.
    assert parts["KV cache"] == 192 * 4608 * 57344
    offloaded = estimate(config, **SETTINGS, cpu_offload=True)
    assert offloaded["weights"] == offloaded["optimiser"] == 0
    assert offloaded["update"] < parts["update"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(tiny_configs()))
def test_the_estimate_is_within_15_percent_of_a_measured_update(name, checkpointing):
    estimated, measured = compare(tiny_configs()[name], checkpointing=checkpointing)
    assert estimated == pytest.approx(measured, rel=0.15)


def test_the_table_of_the_recipes_is_what_the_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert table(Flags()) in (ROOT / "recipes/memory.md").read_text()
