"""Other tasks of reasoning-gym: its scorers as verifiers, and a run from base to evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from data import gym
from data.sources import load_gradable
from data.verifiers import verify

pytest.importorskip("reasoning_gym")
SIZES = "--train 6 --validation 3 --test 3".split()


def write(monkeypatch, out, *flags) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["gym.py", "--out", str(out), *SIZES, *flags])
    gym.main()
    return load_gradable(str(out / "train.jsonl"), lambda text: [1], 9, 0, 0)


def test_any_shortest_way_is_right(tmp_path, monkeypatch):
    config = '{"min_rows": 4, "max_rows": 4, "min_cols": 4, "max_cols": 4, "p_blocked": 0}'
    records = write(monkeypatch, tmp_path, "--task", "shortest_path", "--config", config)
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["test", "train", "validation"]
    assert len(records) == 6
    other = lambda record: " ".join(reversed(record["answer"].split()))  # nothing is blocked
    for answer, right in [
        (lambda r: r["answer"], True),
        (other, True),
        (lambda r: r["answer"] + " up down", False),  # half marks: it leads there, but is longer
        (lambda r: r["answer"].split()[0] + " jump", False),
        (lambda r: None, False),
    ]:
        assert verify(records, list(map(answer, records)), [""] * 6) == [right] * 6
    assert any(other(r) != r["answer"] for r in records)


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--task no_such", "makes no no_such with {}: Dataset 'no_such' not registered"),
        ("--task shortest_path --config {\"rows\":3}", "unexpected keyword argument 'rows'"),
        ("--task n_queens", "scorer of n_queens evaluates what a model wrote: choose another"),
        ("--task shortest_path --config {", "invalid loads value"),
    ],
)
def test_tasks_that_cannot_be_made_or_judged(tmp_path, monkeypatch, flags, reason):
    with pytest.raises(SystemExit) as stop:
        write(monkeypatch, tmp_path, *flags.split())
    assert reason in str(stop.value)


def test_scorers_that_evaluate_answers_are_known():
    """All scorers that call Python's eval or a parse_expr are in EVALUATING."""
    import reasoning_gym

    found = set()
    for file in Path(reasoning_gym.__file__).parent.rglob("*.py"):
        scorer = file.read_text().partition("def score_answer")[2].partition("\n    def ")[0]
        if "eval(answer)" in scorer or "parse_expr(answer" in scorer:
            found.add(file.stem)
    assert found == set(gym.EVALUATING)


def test_a_scorer_that_raises_is_no_verdict_for_the_answer(monkeypatch):
    def odd(answer, entry):
        return 1.0 if answer == entry["answer"] else {}["missing"]

    monkeypatch.setattr(gym, "scorer", lambda task: odd)
    record = {"task": "t", "entry": {"answer": "7"}}
    assert gym.score([record] * 2, ["7", "x"]) == [True, False]


def test_the_recipe_runs_from_base_to_evaluation(tmp_path):
    """On the tiny base model: it cannot solve the task, but every stage asks the scorer."""
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MODEL": "data/toy_base",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RUN": str(tmp_path / "run"),
        "TRAIN": "8", "TEST": "3", "N": "2", "TOKENS": "16", "GPUS": "1",
        "CONFIG": '{"max_rows": 5, "max_cols": 5}',
    }  # fmt: skip
    flags = "--steps 1 --questions 2 --eval_size 2 --save_every 0 --kl_coef 0".split()
    command = ["bash", str(ROOT / "recipes" / "gym.sh"), *flags]
    options = dict(env=environment, capture_output=True, text=True, timeout=580)
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "run"
    (step,) = [json.loads(line) for line in (run / "pta" / "metrics.jsonl").open()]
    assert step["grader_own_graded"] == 24 and step["grader_graded"] == 0
    for name in ("eval_base", "eval_pta"):
        summary = json.loads((run / name / "summary.json").read_text())
        assert summary["grader"]["own_graded"] == 6 and summary["n_problems"] == 3
    assert "3 problems" in result.stdout and "delta" in result.stdout
    assert "shortest path" in (run / "report.html").read_text()
