"""The recipes: every row of Table 1 asks for the paper's settings.

Dry runs need no weights, data or network.
"""

import json
import os
import re
import subprocess
import sys

import pytest

import grpo
import sft
from conftest import ROOT
from data.vision import ENTRIES
from plumbing.flags import parse_config
from recipes import demo_tools

RECIPES = ROOT / "recipes"
MODELS = {
    "qwen2.5_7b": (350, 3584), "llama3.2_3b": (350, 3584), "qwen3_8b": (150, 4608),
    "qwen3_14b": (50, 4608),
}  # fmt: skip
DAPO = "--clip_high 0.28 --dynamic_sampling --overlong_buffer 512 --kl_coef 0 --mini_batches 4"
METHODS = {
    "grpo": "--plans 12 --cots 1 --beta 0",
    "pta_grpo": "--plans 4 --cots 3 --beta 0.5",
    "dapo": f"--plans 12 --cots 1 --beta 0 {DAPO}",
}
BENCHMARKS = "math500 aime24 aime25 amc23"
LAUNCH = "torchrun --nproc_per_node=8 --"


@pytest.fixture
def commands(tmp_path):
    """commands(script, *flags): the lines that a recipe would run, and what it says to stderr.

    Stand-ins for python and torchrun print the lines.
    """
    for name in ("python", "torchrun"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        stand_in.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RUNS": str(tmp_path / "runs")}

    def commands(script, *flags):
        command = ["bash", str(RECIPES / script), *flags]
        options = dict(env=environment, capture_output=True, text=True, timeout=60)
        result = subprocess.run(command, **options)
        return result.stdout.replace(str(tmp_path), "TMP").splitlines(), result.stderr

    return commands


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_table_1_has_its_script(commands, tmp_path, model, method):
    script, run = f"{model}_{method}.sh", f"TMP/runs/{model}_{method}"
    assert "run recipes/cold_start.sh" in commands(script)[1]  # there is none yet
    (tmp_path / f"runs/{model}_sft/model").mkdir(parents=True)
    prepare, train, evaluate = commands(script, "--resume")[0]
    steps, tokens = MODELS[model]
    data = "TMP/runs/data/deepmath.jsonl"
    assert prepare == (
        f"python -m data.sources deepmath --out {data} --decontaminate {BENCHMARKS} --limit 60000"
    )
    assert train == (
        f"{LAUNCH} grpo.py --model TMP/runs/{model}_sft/model --data {data} --out {run} "
        f"--steps {steps} --max_completion_tokens {tokens} {METHODS[method]} --resume"
    )
    assert evaluate == (
        f"{LAUNCH} eval.py --model {run}/model --data {BENCHMARKS} --out {run}/eval --resume "
        f"--max_completion_tokens {tokens}"
    )


def test_cold_start(commands):
    flags = "--teacher Qwen/Qwen3-8B --lr 2e-5".split()
    lines = commands("cold_start.sh", "qwen3_8b", *flags)[0]
    plans, data = "TMP/runs/plans_Qwen_Qwen3-8B.jsonl", "TMP/runs/data/openthoughts.jsonl"
    assert lines[1:] == [
        f"python distill.py --data {data} --out {plans} --teacher Qwen/Qwen3-8B --resume",
        f"{LAUNCH} sft.py --model Qwen/Qwen3-8B --data {plans} --out TMP/runs/qwen3_8b_sft "
        "--epochs 3 --lr 2e-5",
    ]
    for flags in (
        "--teacher http://host:8000/v1 --teacher_model some/Teacher",
        "--teacher_model=some/Teacher --teacher=http://host:8000/v1",
    ):
        server = commands("cold_start.sh", "qwen3_8b", *flags.split())[0]
        assert server[1].endswith(
            "--out TMP/runs/plans_some_Teacher.jsonl --teacher http://host:8000/v1 "
            "--teacher_model some/Teacher --resume"
        )
    assert "no model qwen9" in commands("cold_start.sh", "qwen9")[1]
    printed, said = commands("cold_start.sh", "qwen3_8b")
    assert not printed and "give a teacher" in said


def test_flags_are_read_with_their_values(commands, tmp_path):
    (tmp_path / "runs/qwen3_8b_sft/model").mkdir(parents=True)
    for flag in ("--dry_run", "--dry_run=true"):
        assert "recipes/shapes" in commands("qwen3_8b_grpo.sh", flag)[0][0]
    for flags in (["--dry_run", "false"], ["--dry_run=false"], []):
        assert len(commands("qwen3_8b_grpo.sh", *flags)[0]) == 3


@pytest.mark.parametrize("flags", ["--out /there/x", "--out=/there/x", "--out /old --out=/there/x"])
def test_what_is_evaluated_is_what_was_trained(commands, tmp_path, flags):
    (tmp_path / "runs/qwen3_8b_sft/model").mkdir(parents=True)
    _, train, evaluate = commands("qwen3_8b_grpo.sh", *flags.split(), "--lr", "2e-6")[0]
    assert re.findall(r"--out[ =](\S+)", train)[-1] == "/there/x" and train.endswith(" --lr 2e-6")
    assert "eval.py --model /there/x/model " in evaluate and "--out /there/x/eval " in evaluate
    printed, said = commands("qwen3_8b_grpo.sh", "--out")
    assert not printed and "--out wants a folder" in said


@pytest.mark.parametrize("method", ["grpo", "pta_grpo"])
def test_table_5(commands, tmp_path, method):
    """Four evaluations, as the figure of each is a mean over its names."""
    script, run = f"qwen2.5_vl_7b_{method}.sh", f"TMP/runs/qwen2.5_vl_7b_{method}"
    assert "run recipes/qwen2.5_vl_7b_cold_start.sh" in commands(script)[1]
    (tmp_path / "runs/qwen2.5_vl_7b_sft/model").mkdir(parents=True)
    prepare, train, *evaluations = commands(script, "--lr", "2e-6")[0]
    assert prepare.startswith("python -m data.sources mmk12 --out TMP/runs/data/mmk12.jsonl ")
    names = re.search("--decontaminate (.*)", prepare)[1].split()
    assert set(names) == {name for name, entry in ENTRIES.items() if entry.get("benchmark")}
    start = f"{LAUNCH} grpo.py --model TMP/runs/qwen2.5_vl_7b_sft/model --data "
    assert train.startswith(f"{start}TMP/runs/data/mmk12.jsonl --out {run} ")
    assert train.endswith(f" --max_pixels 401408 {METHODS[method]} --lr 2e-6")
    sets = [re.search(rf"--data (.*) --out {run}/eval/(\w+) --resume", e) for e in evaluations]
    assert [match[2] for match in sets] == ["mmmu", "mmmu_pro", "emma", "mmk12"]
    assert [name for match in sets for name in match[1].split()] == names


@pytest.mark.parametrize("script", ["demo.sh", "demo_images.sh", "toy_base.sh"])
def test_scripts_without_flags_refuse_them(commands, script):
    printed, said = commands(script, "--out", "/there/x")
    assert not printed and said.count("\n") == 1 and "takes no flags" in said and "set RUN" in said


# --------------------------------------------------------------------------------------------------
# The settings of the stages


def test_the_defaults_that_recipes_rely_on_are_the_papers():
    config = grpo.Config()
    assert (config.questions, config.steps, config.limit) == (128, 350, 60000)
    assert (config.plans, config.cots, config.beta, config.temperature) == (4, 3, 0.5, 1.0)
    assert (config.lr, config.weight_decay, config.warmup_steps) == (1e-6, 0.01, 0)


@pytest.mark.parametrize(
    "flags, taken",
    [
        ("", 512),  # 3,584 tokens in all
        ("--max_completion_tokens 1024", 512),
        ("--max_completion_tokens 60", 30),
        ("--max_completion_tokens 129", 64),
        ("--max_completion_tokens 60 --max_plan_tokens 48", 48),
        ("--max_completion_tokens 60 --max_plan_tokens 0 --cots 1", 0),
    ],
)
def test_the_default_plan_limit_leaves_half_of_the_completion_to_the_cot(flags, taken):
    config = parse_config(grpo.Config, ["--model", "any", *flags.split()])
    assert config.max_plan_tokens == taken


def run(script, monkeypatch, capsys, *flags):
    """What a dry run of the 7B model on 8 ranks prints."""
    words = ["--model", RECIPES / "shapes/qwen2.5_7b", "--dry_run", *flags]
    monkeypatch.setattr(script, "load_sharded", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
    monkeypatch.setenv("WORLD_SIZE", "8")
    script.main()
    return capsys.readouterr().out


def test_dry_run_by_hand(monkeypatch, capsys, tmp_path):
    flags = ["--out", tmp_path / "out", "--data", "nowhere.jsonl"]
    out = run(grpo, monkeypatch, capsys, *flags)
    figure = lambda name: re.search(rf"^{name}\s+([\d,.]+)", out, re.MULTILINE)[1]
    assert "--beta 0.5\n" in out
    assert figure("completions per step") == "1,536" and figure("completions per rank") == "192"
    assert figure("completion tokens per step, at most") == f"{1536 * 3584:,}"
    names = "weights|optimiser|reference|KV cache"
    parts = dict(re.findall(rf"^  ({names}) +([\d.]+)$", out, re.MULTILINE))
    # 7.616e9 parameters over 8 ranks, 4 bytes each; the reference's have 2.
    assert (parts["weights"], parts["optimiser"], parts["reference"]) == ("3.5", "7.1", "1.8")
    # 192 rows x 4,608 tokens x 28 layers x 4 heads x 128 x 2 (keys, values) x 2 bytes.
    cache = 192 * 4608 * 28 * 4 * 128 * 2 * 2
    assert float(parts["KV cache"]) == pytest.approx(cache / 2**30, abs=0.1)
    assert not (tmp_path / "out").exists()
    assert "sequences per rank" in run(sft, monkeypatch, capsys, "--out", tmp_path / "out")


def test_dry_run_checks_divisibility(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--questions must be a multiple of the 8 ranks"):
        run(grpo, monkeypatch, capsys, "--questions", "100")
    with pytest.raises(SystemExit, match="--batch_size must be a multiple of (the )?8 ranks"):
        run(sft, monkeypatch, capsys, "--batch_size", "12")


# --------------------------------------------------------------------------------------------------
# The demo


def test_the_readme_reports_on_runs_that_the_demo_writes():
    outs = re.findall(r'--out "\$RUN/(\w+)"', (RECIPES / "demo.sh").read_text())
    written = {"runs/demo", *(f"runs/demo/{name}" for name in outs)}
    text = (ROOT / "README.md").read_text() + (ROOT / "report/__main__.py").read_text()
    lines = re.findall("python -m report.*", text)
    named = [word for line in lines for word in re.findall(r"(?<!--out )\bruns/[\w/]+", line)]
    assert {"runs/demo", "runs/demo/pta", "runs/demo/grpo"} == set(named) <= written


@pytest.mark.parametrize(
    "delta, low, high, p, result",
    [
        (-0.017, -0.029, -0.005, 0.0072, "1.7 points below GRPO (-2.9 to -0.5, p 0.0072)"),
        (0.0211, 0.0104, 0.03, 0.00005, "2.1 points above GRPO (+1.0 to +3.0, p < 0.0001)"),
        (0.0042, -0.0081, 0.0166, 0.5234, "0.4 points above GRPO (-0.8 to +1.7, p 0.52), chance"),
        (-0.0002, -0.012, 0.0, 1.0, "level with GRPO (-1.2 to +0.0, p 1)"),
    ],
)
def test_the_demo_says_whatever_came_out(delta, low, high, p, result):
    row = {"delta": delta, "ci_low": low, "ci_high": high, "p": p}
    said = demo_tools.comparison_sentence(row)
    result = result.replace("(", "(paired 95 % interval ").replace("chance", "which may be chance")
    assert said == f"PTA-GRPO is {result}: one run, one seed."


def test_the_demos_summary(tmp_path, capsys):
    """Ten problems x 4. The first is wrong after SFT; GRPO has 2 of 4 right, PTA-GRPO 3."""
    right = {"base": 0, "sft": 0, "grpo": 2, "pta": 3}
    for name, count in right.items():
        texts = [f"<plan> {name} </plan> <think> {i} </think>" for i in range(4)]
        samples = [{"completion": text, "correct": i < count} for i, text in enumerate(texts)]
        record = {"benchmark": "toy", "problem": "A = 4 ; A ?", "answer": "4", "samples": samples}
        records = [{**record, "id": str(i)} for i in range(10)]
        figures = dict(accuracy=count / 4, ci_low=0.0, ci_high=0.9, n_problems=10, n_samples=4)
        figures |= dict(mean_length=20.0, format_rate=1.0, settings={})
        folder = tmp_path / f"eval_{name}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(figures))
        (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, steps in {"grpo": 2, "pta": 3}.items():
        (tmp_path / name).mkdir()
        step = json.dumps({"decoded_tokens": 600 // steps}) + "\n"
        (tmp_path / name / "metrics.jsonl").write_text(step * steps)
    demo_tools.stage(tmp_path, "data", [sys.executable, "-c", "pass"])
    with pytest.raises(SystemExit, match="3"):
        demo_tools.stage(tmp_path, "sft", [sys.executable, "-c", "raise SystemExit(3)"])
    demo_tools.summary(tmp_path)
    said = capsys.readouterr().out
    assert "GRPO decoded 600 tokens in 2 steps, PTA-GRPO decoded 600 tokens in 3 steps." in said
    assert "after SFT (wrong):\n    <plan> sft </plan>\n    <think> 0 </think>\n" in said
    assert "after PTA-GRPO (right):\n    <plan> pta </plan>\n" in said
    assert "after GRPO           50.0%        0.0 to 90.0%          20.0        100.0%\n" in said
    assert "PTA-GRPO is 25.0 points above GRPO (paired 95 % interval " in said
    result = json.loads((tmp_path / "summary.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["base", "sft", "grpo", "pta"]
    assert result["pta_minus_grpo"]["delta"] == pytest.approx(0.25)
    assert list(result["stage_seconds"]) == ["data"] and result["peak_mb"] > 0
