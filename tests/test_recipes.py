"""The recipes: every row of Table 1 asks for the paper's settings; dry runs need no weights, data or network."""
import os
import re
import subprocess
import sys

import pytest

import grpo
import sft
from conftest import ROOT

RECIPES = ROOT / "recipes"
MODELS = {"qwen2.5_7b": (350, 3584), "llama3.2_3b": (350, 3584), "qwen3_8b": (150, 4608), "qwen3_14b": (50, 4608)}
METHODS = {"grpo": "--plans 12 --cots 1 --beta 0", "pta_grpo": "--plans 4 --cots 3 --beta 0.5",
           "dapo": "--plans 12 --cots 1 --beta 0 --clip_high 0.28 --dynamic_sampling --overlong_buffer 512 --kl_coef 0"}


@pytest.fixture
def commands(tmp_path):
    """commands(script, *flags): the lines that a recipe would run, by stand-ins for python and torchrun that print them."""
    for name in ("python", "torchrun"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        stand_in.chmod(0o755)

    def commands(script, *flags):
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RUNS": str(tmp_path / "runs")}
        result = subprocess.run(["bash", str(RECIPES / script), *flags], env=environment, capture_output=True, text=True, timeout=60)
        return result.stdout.replace(str(tmp_path), "TMP").splitlines(), result.stderr
    return commands


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_table_1_has_its_script(commands, tmp_path, model, method):
    script = f"{model}_{method}.sh"
    assert "run recipes/cold_start.sh" in commands(script)[1]  # there is none yet
    (tmp_path / f"runs/{model}_sft/model").mkdir(parents=True)
    prepare, train, evaluate = commands(script, "--resume")[0]
    steps, tokens = MODELS[model]
    assert prepare == ("python -m data.sources deepmath --out TMP/runs/data/deepmath.jsonl --decontaminate math500 aime24 aime25 amc23 "
                       "--limit 60000")
    assert train == (f"torchrun --nproc_per_node=8 -- grpo.py --model TMP/runs/{model}_sft/model --data TMP/runs/data/deepmath.jsonl "
                     f"--out TMP/runs/{model}_{method} --steps {steps} --max_completion_tokens {tokens} {METHODS[method]} --resume")
    assert evaluate == (f"torchrun --nproc_per_node=8 -- eval.py --model TMP/runs/{model}_{method}/model --data math500 aime24 aime25 amc23 "
                        f"--out TMP/runs/{model}_{method}/eval --resume --max_completion_tokens {tokens}")


def test_cold_start(commands):
    lines = commands("cold_start.sh", "qwen3_8b", "--teacher", "Qwen/Qwen3-8B", "--lr", "2e-5")[0]
    assert lines[1:] == [
        "python distill.py --data TMP/runs/data/openthoughts.jsonl --out TMP/runs/plans_Qwen_Qwen3-8B.jsonl --teacher Qwen/Qwen3-8B --resume",
        "torchrun --nproc_per_node=8 -- sft.py --model Qwen/Qwen3-8B --data TMP/runs/plans_Qwen_Qwen3-8B.jsonl --out TMP/runs/qwen3_8b_sft --epochs 3 --lr 2e-5"]
    for flags in (("--teacher", "http://host:8000/v1", "--teacher_model", "some/Teacher"),
                  ("--teacher_model=some/Teacher", "--teacher=http://host:8000/v1")):
        server = commands("cold_start.sh", "qwen3_8b", *flags)[0]
        assert server[1].endswith("--out TMP/runs/plans_some_Teacher.jsonl --teacher http://host:8000/v1 --teacher_model some/Teacher --resume")
    assert "no model qwen9" in commands("cold_start.sh", "qwen9")[1]
    printed, said = commands("cold_start.sh", "qwen3_8b")
    assert not printed and "give a teacher" in said


def test_flags_are_read_with_their_values(commands, tmp_path):
    (tmp_path / "runs/qwen3_8b_sft/model").mkdir(parents=True)
    for flag in ("--dry_run", "--dry_run=true"):
        assert "recipes/shapes" in commands("qwen3_8b_grpo.sh", flag)[0][0]
    for flags in (["--dry_run", "false"], ["--dry_run=false"], []):
        assert len(commands("qwen3_8b_grpo.sh", *flags)[0]) == 3


@pytest.mark.parametrize("flags", [
    ["--out", "/there/x"], ["--out=/there/x"], ["--out", "/old", "--out=/there/x"]])
def test_what_is_evaluated_is_what_was_trained(commands, tmp_path, flags):
    (tmp_path / "runs/qwen3_8b_sft/model").mkdir(parents=True)
    _, train, evaluate = commands("qwen3_8b_grpo.sh", *flags, "--lr", "2e-6")[0]
    assert re.findall(r"--out[ =](\S+)", train)[-1] == "/there/x" and train.endswith(" --lr 2e-6")
    assert "eval.py --model /there/x/model " in evaluate and "--out /there/x/eval " in evaluate
    printed, said = commands("qwen3_8b_grpo.sh", "--out")
    assert not printed and "--out wants a folder" in said


@pytest.mark.parametrize("script", ["demo.sh", "toy_base.sh"])
def test_scripts_without_flags_refuse_them(commands, script):
    printed, said = commands(script, "--out", "/there/x")
    assert not printed and said.count("\n") == 1 and "takes no flags" in said and "set RUN" in said


def test_the_defaults_that_recipes_rely_on_are_the_papers():
    config = grpo.Config()
    assert (config.questions, config.lr, config.weight_decay, config.warmup_steps, config.temperature) == (128, 1e-6, 0.01, 0, 1.0)
    assert (config.plans, config.cots, config.beta, config.steps, config.limit) == (4, 3, 0.5, 350, 60000)


def run(script, monkeypatch, capsys, *flags):
    monkeypatch.setattr(script, "load_sharded", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(RECIPES / "shapes/qwen2.5_7b"), "--dry_run", *flags])
    monkeypatch.setenv("WORLD_SIZE", "8")
    script.main()
    return capsys.readouterr().out


def test_dry_run_by_hand(monkeypatch, capsys, tmp_path):
    out = run(grpo, monkeypatch, capsys, "--out", str(tmp_path / "out"), "--data", "nowhere.jsonl")
    figure = lambda name: re.search(rf"^{name}\s+([\d,.]+)", out, re.MULTILINE)[1]
    assert "--beta 0.5\n" in out and figure("completions a step") == "1,536" and figure("completions a rank") == "192"
    assert figure("completion tokens a step, at most") == f"{1536 * 3584:,}"
    parts = dict(re.findall(r"^  (weights|optimiser|reference|KV cache) +([\d.]+)$", out, re.MULTILINE))
    # 7.616e9 parameters: 4 bytes each over 8 ranks, the reference's 2; KV: 192 rows x 4,608 tokens x 28 layers x 4 heads x 128 x 2 (k, v) x 2 bytes.
    assert (parts["weights"], parts["optimiser"], parts["reference"]) == ("3.5", "7.1", "1.8")
    assert float(parts["KV cache"]) == pytest.approx(192 * 4608 * 28 * 4 * 128 * 4 / 2**30, abs=0.1)
    assert not (tmp_path / "out").exists()
    assert "sequences a rank" in run(sft, monkeypatch, capsys, "--out", str(tmp_path / "out"))


def test_dry_run_checks_divisibility(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--questions 100 does not divide over 8 ranks; legal values near it: 88, 96, 104"):
        run(grpo, monkeypatch, capsys, "--questions", "100")
    with pytest.raises(SystemExit, match="--batch_size 12 does not divide over 8 ranks"):
        run(sft, monkeypatch, capsys, "--batch_size", "12")


def test_the_readme_reports_on_runs_that_the_demo_writes():
    outs = re.findall(r'--out "\$RUN/(\w+)"', (RECIPES / "demo.sh").read_text())
    written = {"runs/demo", *(f"runs/demo/{name}" for name in outs)}
    text = (ROOT / "README.md").read_text() + (ROOT / "report.py").read_text()
    named = [word for line in re.findall("python report.py.*", text)
             for word in re.findall(r"(?<!--out )\bruns/[\w/]+", line)]
    assert {"runs/demo", "runs/demo/pta", "runs/demo/grpo"} == set(named) <= written
