"""plumbing/memory.py: published parameter counts, parts worked by hand, measured updates."""

import pytest

from bench.memory_plan import compare, tiny_configs
from conftest import ROOT
from plumbing.memory import GIB, Flags, advice, estimate, largest_model, table
from plumbing.weights import load_config

SETTINGS = dict(
    ranks=8, rows=192, prompt_tokens=1024, completion_tokens=3584, micro_tokens=1024
)
PUBLISHED = {"llama3.2_3b": 3.21, "qwen2.5_7b": 7.61, "qwen3_8b": 8.2, "qwen3_14b": 14.8}


@pytest.mark.parametrize("name, billions", PUBLISHED.items())
def test_the_configs_have_the_published_numbers_of_parameters(name, billions):
    parts = estimate(load_config(str(ROOT / f"recipes/shapes/{name}")), **SETTINGS)
    assert parts["parameters"] / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_vision_tower_is_whole_on_every_gpu():
    """Qwen2.5-VL-7B has 8.29 B parameters in all, 0.68 B of them in tower and projector."""
    parts = estimate(load_config(str(ROOT / "recipes/shapes/qwen2.5_vl_7b")), **SETTINGS)
    assert parts["parameters"] / 1e9 == pytest.approx(7.616, rel=1e-3)  # as Qwen2.5-7B
    assert (parts["parameters"] + parts["vision tower"] / 4) / 1e9 == pytest.approx(8.292, rel=1e-3)
    text = estimate(load_config(str(ROOT / "recipes/shapes/qwen2.5_7b")), **SETTINGS)
    assert parts["peak"] - text["peak"] == pytest.approx(parts["vision tower"], rel=0.01)


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


def test_advice_by_hand():
    """A model of 10 parameters of 0.1 GiB each: 2 + 4 + 1 for the update's sake, 5 gathered.

    An update has 8, with gradients, and 7 besides.
    """
    parts = dict(weights=2, optimiser=4, reference=1, gradients=1, row=0.5)
    parts |= {"gathered for rollout": 5, "KV cache": 8, "sampling": 2, "rollout": 22, "update": 15}
    parts = {name: size * GIB for name, size in parts.items()} | {"parameters": 10}
    without = {"update": 40 * GIB}
    # 0.9 x 20 - 12 = 6 GiB for rows of 0.5: 12 of 20, two waves. Of 45 GiB, (45 - 0.5) / 1.2
    # parameters fit. Of 18 GiB the update allows fewer: 8 x^2 + 7 x = 18 for x = 9 / 8.
    assert largest_model(parts, 50) == pytest.approx(44.5 / 1.2)
    assert largest_model(parts, 20) == pytest.approx(10 * (9 / 8) ** 2)
    assert advice(parts, without, 20, 20).startswith(
        "on 20 GiB: 2 waves of up to 12 rows, or fewer, as rows share room while they are short; "
        "--activation_checkpointing is needed; models up to"
    )
    roomy = advice(parts, without, 20, 50)
    assert "1 wave of up to 20 rows; --activation_checkpointing false fits, and is faster" in roomy
    small = advice(parts, without, 20, 10)
    assert "not one row fits; an update does not fit: lower --tokens_per_micro_batch" in small
