"""The seam: records name their verifiers, and everything that is judged goes through them."""

import json
import re
import types

import pytest

import grpo
from conftest import ROOT
from data.moves import make_problems
from data.sources import load_gradable
from data.verifiers import plan_leaks, restated, same_answers, tally, verify
from distill import rejection
from grpo import Rollout

OWN = '''
"""Answers of at most `limit` letters."""
from dataclasses import dataclass

@dataclass
class Seen:  # a dataclass needs its module in sys.modules
    answers: list

def short(records, answers):
    assert len(records) == len(answers) and all(isinstance(a, str) for a in Seen(answers).answers)
    return [len(answer) <= record["limit"] for record, answer in zip(records, answers)]

def lucky(records, answers, salts):
    return [salt.endswith("7") for salt in salts]

def raises(records, answers):
    return [1 / 0]

def counts(records, answers):
    return len(answers)

def few(records, answers):
    return [True] * (len(answers) - 1)

def scores(records, answers):
    return [1.0] * len(answers)

def one(answer):
    return True

number = 7
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")

    def load(verifier, **fields):
        """Records of a file that lies beside own.py, as training and evaluation load them."""
        record = {"id": "r", "problem": "Say a word.", "answer": "-", "limit": 3, **fields}
        if verifier is not None:
            record["verifier"] = verifier
        (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
        return load_gradable(str(tmp_path / "p.jsonl"), lambda text: [1], 10, 0, 0)

    return load


def test_a_function_of_the_users_own(own):
    (record,) = own("own.py:short")
    answers = ["abc", None, "abcd", ""]
    assert verify([record] * 4, answers, list("abcd")) == [True, False, False, True]
    assert verify([record], [None], ["s"]) == [False]
    (record,) = own("own.py:lucky")
    assert verify([record] * 3, ["a", "b", None], ["s 7", "s 8", "s 7"]) == [True, False, False]


def test_it_is_found_beside_the_data_in_the_working_directory_or_here(own, tmp_path, monkeypatch):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "other.py").write_text(OWN)
    monkeypatch.chdir(tmp_path / "else")
    here = str(tmp_path / "else" / "other.py")
    assert own("other.py:short")[0]["verifier"] == own(f"{here}:short")[0]["verifier"]
    assert own("own.py:short")[0]["verifier"] == f"{tmp_path / 'own.py'}:short"
    monkeypatch.setattr("data.own.ROOT", tmp_path / "else")
    monkeypatch.chdir("/")
    assert own("other.py:short")[0]["verifier"] == f"{here}:short"


@pytest.mark.parametrize(
    "verifier, reason",
    [
        ("own.py:raises", "own.py:raises raised ZeroDivisionError in own.py, line 17: division by"),
        ("own.py:counts", "returned int for 1 answers; return a list with True or False for each"),
        ("own.py:few", "returned a list of 0 for 1 answers; return a list"),
        ("own.py:scores", r"returned 1.0 \(float\) as a verdict; return True or False"),
        ("own.py:one", "record r: .*one must take records and answers"),
        ("own.py:number", "record r: .*own.py has no function number"),
        ("own.py:nobody", "record r: .*own.py has no function nobody"),
        ("broken.py:f", "cannot be imported .ModuleNotFoundError in broken.py, line 1: "),
        ("missing.py:f", "record r: its verifier 'missing.py:f' cannot be used: no such file is"),
        ("choise", "record r: .*choose one of math, choice, moves, doors.*or file.py:function"),
        (7, "record r: its verifier is 7, not a name"),
        (["math"], r"record r: its verifier is \['math'\], not a name"),
        ("choice", "1 of 1 answers cannot be graded, the first in record r: '-' names no option"),
        ("moves", "record r: not a problem of the moves task: 'Say a word.'"),
        ("doors", "record r: not a problem of the doors task: 'Say a word.'"),
        (None, "record r: '-' can be read neither as mathematics nor as plain words; mend"),
    ],
)
def test_what_cannot_be_graded_is_refused_when_it_is_loaded(own, verifier, reason):
    with pytest.raises(SystemExit, match=reason) as stop:
        own(verifier)
    assert "\n" not in str(stop.value)


def test_later_verdicts_are_checked_too(own, tmp_path):
    (tmp_path / "late.py").write_text(
        "def f(records, answers):\n    return [True if a == '-' else None for a in answers]\n"
    )
    (record,) = own("late.py:f")
    with pytest.raises(SystemExit, match=r"returned None \(NoneType\) as a verdict"):
        verify([record] * 2, ["-", "x"], ["", ""])


def test_one_batch_may_mix_verifiers_and_each_counts_its_own(own):
    (mine,) = own("own.py:short")
    (maze,) = make_problems("test", 1)
    math, option = {"answer": "7"}, {"answer": "B", "options": ["x", "y"], "verifier": "choice"}
    tally()
    records = [math, mine, option, maze, option, math, option, maze, mine]
    answers = ["7.0", "abcd", "y", maze["answer"], "who knows", "8", None, "jump", None]
    expected = [True, False, True, True, False, False, False, False, False]
    assert verify(records, answers, answers) == expected
    counts = tally()
    seen = {name: count for name, count in counts.items() if count and not name.startswith("own")}
    assert seen == {
        "graded": 2, "choice_graded": 3, "choice_no_answer": 1, "choice_unparsed": 1,
        "moves_graded": 2, "moves_unparsed": 1,
    }  # fmt: skip
    assert counts["own_graded"] == 2 and counts["own_no_answer"] == 1
    assert set(tally().values()) == {0}  # counted once


def test_only_mathematics_asks_for_evaluated_answers(own):
    option = {"answer": "A", "options": [r"\binom{8}{4}", "3"], "verifier": "choice"}
    assert verify([option], [r"\binom{8}{4}"], ["s"], evaluated=True) == [True]
    assert not restated(option, r"\binom{8}{4}")
    assert restated({"answer": "70"}, r"\binom{8}{4}")
    assert verify([{"answer": "70"}], [r"\binom{8}{4}"], ["s"], evaluated=True) == [False]


def test_votes_and_leaks_without_a_reader_go_by_the_text(own):
    (mine,) = own("own.py:short", answer="horse")
    records = [{"answer": "7"}, {"answer": "7"}, mine]
    assert same_answers(records, ["0.5", "3", "0.5"], ["1/2", "4", "1/2"]) == [True, False, False]
    assert plan_leaks(mine, "say horse") and not plan_leaks(mine, "say a word")
    option = {"answer": "B", "options": ["x", "42"], "verifier": "choice"}
    assert rejection("Add them to 42 at last.", {"answer": "42"}, 30) == "gives the answer away"
    assert rejection("Add them to 42 at last.", option, 30) is None
    assert rejection("The answer is B.", option, 30) == "gives the answer away"


def test_training_grades_and_asks_for_leaks_through_the_seam():
    option = {"answer": "B", "options": ["3 N", "4 N"], "verifier": "choice"}
    form = "<plan>{}</plan><think>t</think><answer>\\boxed{{{}}}</answer>"
    texts = [form.format("p", "(B) 4 N"), form.format("The answer is B", "4 N"), "4 N",
             form.format("p", "A")]  # fmt: skip
    tokenizer = types.SimpleNamespace(batch_decode=lambda completions: texts)
    rollouts = [Rollout([3], [9], ids=[2]) for _ in texts]
    grpo.grade_groups(tokenizer, [grpo.Group(option, rollouts)], [1])
    assert [r.correct for r in rollouts] == [True, True, False, False]
    assert [r.leaks for r in rollouts] == [False, True, False, False]
    assert [r.well_formed for r in rollouts] == [True, True, False, True]


def test_the_example_of_the_readme_works(tmp_path):
    section = (ROOT / "README.md").read_text().partition("## Your own task")[2]
    code, line = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "words.py").write_text(code)
    (tmp_path / "words.jsonl").write_text(line)
    records = load_gradable(str(tmp_path / "words.jsonl"), lambda text: [1], 9, 0, 0)
    answers = ["A plan is a path.", "A plan is a path that you chose.", "A path.", None]
    assert verify(records * 4, answers, answers) == [True, False, False, False]
