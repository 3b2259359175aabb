"""Problem records: from JSONL, toy and (with the hub stubbed by rows of its schema) data sets."""
import json
import sys
import types

import pytest

from data.sources import HUB, deepmath, gsm8k, last_boxed, load_records, openthoughts


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


GOOD = {"id": "a", "problem": "1 + 1 = ?", "answer": "2", "solution": "count"}


def test_jsonl_round_trip(tmp_path):
    path = write(tmp_path / "p.jsonl", [GOOD, "", {"problem": "2 + 2 = ?", "answer": 4}])
    assert load_records(path) == [GOOD, {"id": "p-1", "problem": "2 + 2 = ?", "answer": "4"}]


@pytest.mark.parametrize("line, reason", [
    ("{oops", "line 2: not JSON"),
    ("[1, 2]", "line 2: want one JSON object a line, found a list"),
    ({"problem": "x"}, "line 2: 'answer' is missing"),
    ({"problem": "x", "answer": ""}, "line 2: 'answer' is empty"),
    ({"problem": "x", "answer": None}, "line 2: 'answer' is None"),
    ({"problem": ["x"], "answer": "1"}, "line 2: 'problem' is"),
    ({"id": "a", "problem": "x", "answer": "1"}, "line 2: the id 'a' stands twice"),
])
def test_a_malformed_record_is_refused_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "bad.jsonl", [GOOD, line])
    with pytest.raises(SystemExit) as stop:
        load_records(path)
    assert f"{path}, {reason}" in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("name, reason", [("nowhere.jsonl", "no data at 'nowhere.jsonl'"), ("toy:dev", "splits train"),
                                          ("someone/unknown", "give a JSONL file, toy")])
def test_unknown_names(name, reason):
    with pytest.raises(SystemExit, match=reason):
        load_records(name)


def test_empty_data(tmp_path):
    with pytest.raises(SystemExit, match="holds no records"):
        load_records(write(tmp_path / "none.jsonl", ["", ""]))


def test_limit_is_a_random_subset_in_file_order_fixed_by_the_seed(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"problem": str(i), "answer": "1"} for i in range(100)])
    drawn = [int(r["problem"]) for r in load_records(path, limit=10, seed=1)]
    assert drawn == sorted(drawn) and len(drawn) == 10 and drawn != list(range(10))
    assert drawn == [int(r["problem"]) for r in load_records(path, limit=10, seed=1)]
    assert drawn != [int(r["problem"]) for r in load_records(path, limit=10, seed=2)]


def test_toy_splits():
    assert len(load_records("toy", limit=5)) == 5
    assert load_records("toy:test", limit=3)[0]["id"].startswith("toy-test")


def test_schemas():
    assert gsm8k({"question": "q", "answer": "3 + <<3+4=7>>4 = 7\n#### 1,007"}) == {
        "problem": "q", "answer": "1007", "solution": "3 + <<3+4=7>>4 = 7"}
    row = {"question": "q", "final_answer": "\\frac{1}{2}", "difficulty": 5.0, "r1_solution_1": "Let me see.\n</think>\nSo 1/2."}
    assert deepmath(row) == {"problem": "q", "answer": "\\frac{1}{2}", "solution": "Let me see."}
    row = {"problem": "q", "domain": "math", "deepseek_reasoning": " hm ", "deepseek_solution": "so \\boxed{4}",
           "ground_truth_solution": "thus \\boxed{3} and \\boxed{\\frac{1}{2}}."}
    assert openthoughts(row) == {"problem": "q", "answer": "\\frac{1}{2}", "solution": "hm"}
    assert openthoughts({**row, "ground_truth_solution": None})["answer"] == "4"
    assert openthoughts({**row, "domain": "code"}) is None


@pytest.mark.parametrize("text, box", [("\\boxed{a{b}c}", "a{b}c"), ("\\boxed{1} \\boxed{2}", "2"), ("none", None),
                                       ("\\boxed{never closed", None)])
def test_last_boxed(text, box):
    assert last_boxed(text) == box


def test_hub_rows_go_through_datasets(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [{"question": "q", "answer": "a\n#### 5"}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    records = load_records("openai/gsm8k:test")
    assert calls == [("openai/gsm8k", "main", "test")]
    assert records == [{"id": "gsm8k-0", "problem": "q", "answer": "5", "solution": "a"}]


def test_no_network_is_one_sentence_with_a_remedy(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nlong trace")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in HUB:
        with pytest.raises(SystemExit, match=rf"cannot load {name}.*HF_HOME.*local JSONL") as stop:
            load_records(name)
        assert "\n" not in str(stop.value)
