"""Word problems from reasoning-gym: reading worked answers, plans by rule, splits."""

import argparse
import json
import re
import sys

import pytest

import distill
from data import gym
from rewards import build_completion, parse_completion

# Entries as the package writes them.
PENCILS = {
    "question": "A shop has 1,200 pencils and 30 boxes of 12 pens. It sells 200 pencils, and 2 "
    "more arrive. How many pencils and pens are there?" + gym.SUFFIX,
    "answer": "1362",
    "metadata": {
        "answer_cot": "It has 30 boxes x 12 pens/box = 360 pens.\nAfter sales, $1,200 - 200 = 1000 "
        "pencils remain, and then 1000 + 2 = 1002.\nIn all: 360 pens + 1,002 pencils = 1362 items."
        "\n#### 1362",
        "variables": {"name": "A", "pencils": 1200, "num_boxes": 30, "pens_per_box": 12,
                      "sold": 200, "amount1": 2, "total": 1362},
    },
}  # fmt: skip


def entry(**changes) -> dict:
    """PENCILS with other variables, or another text in place of one."""
    facts = {**PENCILS["metadata"]}
    facts["variables"] = facts["variables"] | changes.pop("variables", {})
    question, answer = changes.pop("question", PENCILS["question"]), changes.pop("answer", "1362")
    for old, new in changes.pop("worked", {}).items():
        facts["answer_cot"] = facts["answer_cot"].replace(old, new)
    return {"question": question, "answer": answer, "metadata": facts}


def test_a_worked_answer_becomes_a_plan_and_a_chain_of_thought():
    record = gym.read_entry(PENCILS)
    assert record["problem"].endswith("pencils and pens are there?") and record["answer"] == "1362"
    assert record["solution"] == (
        "A = 30 * 12 = 360; B = 1200 - 200 = 1000; C = 1000 + 2 = 1002; D = 360 + 1002 = 1362"
    )
    plan = "A = boxes * pens per box; B = pencils - sold; C = B + first amount; D = A + C"
    assert gym.plan_of(record) == distill.plan_of(record) == plan
    text = build_completion(plan, record["solution"], record["answer"])
    assert parse_completion(text) is not None


@pytest.mark.parametrize(
    "changes",
    [
        dict(variables={"other": 30}),  # two quantities are 30
        dict(variables={"boxes": "thirty", "num_boxes": 31}),  # 30 has no name
        dict(variables={"num_boxes": 31, "n1": 30}),  # n1 says nothing
        dict(worked={"= 360 pens": "= 361 pens"}),  # wrong
        dict(worked={"1,200 - 200": "1,200 - 100 - 100"}),  # 100 is not in the question
        dict(worked={"30 boxes x 12 pens/box": "30 boxes x 12 pens/box + 0"}),  # order matters
        dict(worked={"1000 + 2 = 1002": "1000 + 2.5 = 1002.5"}),  # no whole number
        dict(answer="1002"),  # the last result is another
        dict(question=PENCILS["question"].replace("2 more", "a few more")),  # 2 is not given
        dict(question=PENCILS["question"] + " Or twice?"),  # 2 may be the amount, or "twice"
    ],
)  # fmt: skip
def test_what_cannot_be_read_without_doubt_is_left_out(changes):
    assert gym.read_entry(entry()) is not None
    assert gym.read_entry(entry(**changes)) is None


@pytest.mark.parametrize(
    "worked, found",
    [
        ("He has 3 cats. 4 + 5 = 9 dogs", ["4 + 5 = 9"]),
        ("0.5*10 = 5 and 6÷3=2.", ["0.5 * 10 = 5", "6 / 3 = 2"]),
        ("£450,000 x 6/100 = £27,000.", ["450000 * 6 / 100 = 27000"]),
        ("3 + 4 + T = 7 + T = 9", []),  # an unknown
        ("2(21)=42 minutes, 5 = 5", []),
        ("2 + 3 = 1 + 4", []),
        ("10 km/hour * 2 hours = 20 km", ["10 * 2 = 20"]),
    ],
)
def test_equations_between_numbers_are_found_in_sentences(worked, found):
    equations = gym.equations_of(worked + "\n#### 1 + 1 = 2")
    assert [f"{' '.join(terms)} = {result}" for terms, result in equations] == found


@pytest.mark.parametrize(
    "terms, value",
    [("8 - 3 - 1", 4), ("8 / 4 * 3", 6), ("3 - 3", 0), ("1 + 2 * 3", None), ("1 / 0", None)],
)  # fmt: skip
def test_values(terms, value):
    assert gym.value_of(terms.split()) == value


def test_names():
    named = {
        "time_per_batch": "time per batch", "price2": "second price", "num_girls": "girls",
        "hobby1_count": "first hobby count", "n1": "", "mult1": "first multiplier",
    }  # fmt: skip
    assert {name: gym.name_of(name) for name in named} == named


def test_a_record_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="not a solution of data/gym.py: 'Add them up.'"):
        gym.plan_of({"quantities": {}, "solution": "Add them up."})


def legs(animals: dict[str, int], answer: str) -> dict:
    """An entry of leg_counting, as the package writes it."""
    listed = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in animals.items())
    question = f"Your task [...].\n\nNow, how many legs are there in total if you have {listed}?\n"
    return {"question": question, "answer": answer, "metadata": {"animals": animals}}


def test_legs_become_a_plan_that_says_how_many_an_animal_has():
    pytest.importorskip("reasoning_gym")
    # Counts may equal each other, the legs of an animal, or a result.
    record = gym.read_legs(legs({"cat": 4, "sea slug": 1, "woodlouse": 4}, "72"))
    asked = "How many legs are there in total if you have 4 cats, 1 sea slug, 4 woodlouses?"
    assert record["problem"] == asked and record["answer"] == "72"
    worked = "A = 4 * 4 = 16; B = 1 * 0 = 0; C = 4 * 14 = 56; D = 16 + 0 + 56 = 72"
    assert record["solution"] == worked
    plan = "A = cat * 4; B = sea slug * 0; C = woodlouse * 14; D = A + B + C"
    assert gym.plan_of(record) == distill.plan_of(record) == plan
    kinds = "dog cat cow horse lion tiger deer".split()
    assert gym.read_legs(legs(dict.fromkeys(kinds, 1), "28"))["solution"].endswith("= 28")
    assert gym.read_legs(legs(dict.fromkeys([*kinds, "bee"], 1), "34")) is None  # letters A to H


def write(monkeypatch, out, *flags) -> dict[str, list[dict]]:
    sizes = "--sft 40 --train 40 --validation 5 --test 8".split()
    monkeypatch.setattr(sys, "argv", ["gym.py", "--out", str(out), *sizes, *map(str, flags)])
    gym.main()
    load = lambda file: [json.loads(line) for line in file.read_text().splitlines()]
    return {file.stem: load(file) for file in sorted(out.glob("*.jsonl"))}


def test_the_files_of_the_package_itself(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    files = write(monkeypatch, tmp_path / "a", "--largest", 300)
    assert {name: len(records) for name, records in files.items()} == {
        "sft": 40, "train": 40, "validation": 5, "test": 8,
    }  # fmt: skip
    again = write(monkeypatch, tmp_path / "b")
    other = write(monkeypatch, tmp_path / "c", "--seed", 1)
    assert again["test"] != other["test"]
    assert again == write(monkeypatch, tmp_path / "b", "--overwrite")
    texts = [record["problem"] for records in files.values() for record in records]
    assert len(set(texts)) == len(texts) and not any("final answer" in text for text in texts)
    for record in files["sft"]:
        plan = gym.plan_of(record)
        assert re.fullmatch(r"A = [a-zA-Z0-9 +*/;=-]+", plan)
        assert record["solution"].endswith(f"= {record['answer']}")
        assert 2 <= plan.count("=") <= 3
        assert all(int(n) <= 300 for n in re.findall(r"\d+", record["solution"]))
    assert all("solution" not in r and "quantities" not in r for r in files["test"])
    # Whatever the seed, splits share no problem.
    test, train = {r["problem"] for r in other["test"]}, {r["problem"] for r in files["train"]}
    assert not test & train
    with pytest.raises(SystemExit, match="already holds .*test.jsonl"):
        write(monkeypatch, tmp_path / "a")


def test_files_of_legs(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    few = {"min_animals": 2, "max_animals": 2, "max_instances": 2}
    flags = ["--task", "leg_counting", "--config", json.dumps(few)]
    files = write(monkeypatch, tmp_path / "a", *flags)
    sizes = {"sft": 40, "train": 40, "validation": 5, "test": 8}
    assert {name: len(records) for name, records in files.items()} == sizes
    for record in files["sft"]:
        for step in record["solution"].split("; "):
            _, left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert int(right) == int(record["answer"])
    assert all(r.keys() == {"id", "problem", "answer"} for r in files["train"] + files["test"])
    # Animals in another order are in the same split, so splits share no problem, whatever the seed.
    pair = {"cat": 2, "bee": 1}
    orders = [legs(pair, "14"), legs(dict(reversed(pair.items())), "14")]
    monkeypatch.setattr(gym, "blocks", lambda *_: iter([orders]))
    (key, first), (other, second) = gym.leg_problems(argparse.Namespace(config={}, seed=0))
    assert key == other and first["problem"] != second["problem"]


def test_without_the_package_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit, match="run `pip install reasoning-gym`"):
        write(monkeypatch, tmp_path / "a")
