"""Problem records: from JSONL, toy, and data sets in small files of the hub's schema, loaded through `datasets`."""
import json
import re
import sys
import tracemalloc
from collections import Counter

import pytest

from data import sources
from data.sources import (SOURCES, Overlap, clean_gold, gradable, last_boxed, load_records, parse_name, read_hub, split_cot,
                          subset, unwrap)


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


GOOD = {"id": "a", "problem": "1 + 1 = ?", "answer": "2", "solution": "count"}


def test_jsonl_round_trip(tmp_path):
    path = write(tmp_path / "p.jsonl", [GOOD, "", {"problem": "2 + 2 = ?", "answer": 4}])
    assert load_records(path) == [GOOD, {"id": "p-1", "problem": "2 + 2 = ?", "answer": "4"}]


@pytest.mark.parametrize("line, reason", [
    ("{oops", "line 2: not JSON"),
    ('{"problem": "x", "answer": NaN}', "line 2: not JSON (NaN is no JSON number); mend or remove"),
    ('{"problem": "x", "answer": "1", "d": -Infinity}', "line 2: not JSON (-Infinity is no JSON number)"),
    ('{"problem": "x", "answer": 1e999}', "line 2: 'answer' is inf"),
    ('{"problem": "x", "answer": %s}' % ("9" * 5000), "line 2: not JSON"),
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


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin1.jsonl"
    line = '{"problem": "Où est %s?", "answer": "1"}\n'
    path.write_bytes((line % "Zürich").encode() + (line % "Genève").encode("latin-1"))
    with pytest.raises(SystemExit, match=f"{path}, line 2: not UTF-8; convert .*iconv -f LATIN1"):
        load_records(str(path))
    path.write_bytes((line % "Zürich").encode())
    assert load_records(str(path))[0]["problem"] == "Où est Zürich?"


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


@pytest.mark.parametrize("text, box", [("\\boxed{a{b}c}", "a{b}c"), ("\\boxed{1} \\boxed{2}", "2"), ("none", None),
                                       ("\\boxed{never closed", None)])
def test_last_boxed(text, box):
    assert last_boxed(text) == box


@pytest.mark.parametrize("gold, clean", [
    ("025", "25"), ("-007", "-7"), ("000", "0"), ("0.50", "0.50"), ("1,007", "1007"), (r"12,\!345", "12345"), ("1,234,567.5", "1234567.5"),
    ("1,23", "1,23"), ("12, 345", "12, 345"), ("3 + 4 = 7\n#### 1,007", "1007"), (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ("$\\frac{1}{2}$", r"\frac{1}{2}"), (r"336^\circ", "336"), (r"60^{\circ}", "60"), ("90°", "90"), (r"x^\circ", r"x^\circ"),
    (["$2$", "3"], "2, 3"), (["(1, 2)"], "(1, 2)"), ([], ""), (27.0, "27"), (0.5, "0.5"), (7, "7"), (None, ""), ("  ", ""),
    (r"\text{Yes}", r"\text{Yes}"),
])
def test_clean_gold(gold, clean):
    assert clean_gold(gold) == clean


def test_three_ways_to_wrap_a_chain_of_thought():
    assert split_cot("<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\nso 4\n<|end_of_solution|>") == ("hm", "so 4")
    assert split_cot("<think>\nhm\n</think>\n\nso 4") == ("hm", "so 4")
    assert split_cot("hm\n</think>\n\nso 4") == ("hm", "so 4")
    assert split_cot("hm") == ("hm", "")


DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\".")


def test_prompt_wrappers_are_stripped():
    assert unwrap(DAPO.format("Find x.\n\nGiven y.")) == "Find x.\n\nGiven y."
    assert unwrap("Return your final response within \\boxed{}. Find x.") == "Find x."
    assert unwrap("Find x. Please reason step by step, and put your final answer within \\boxed{}.") == "Find x."
    assert unwrap("Solve the following math problem step by step.") == "Solve the following math problem step by step."


# ---------------------------------------------------------------------------------------------------------------
# Every data set, from files with its columns and the hub's folders. name: (file, rows, records)

COT = "<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\nthus \\boxed{4}\n<|end_of_solution|>"
GPQA = {"Question": "Which?", "Correct Answer": "right\n", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2", "Incorrect Answer 3": "w3"}
CASES = {
    "openthoughts": ("metadata/train-00000-of-00001.parquet", [
        {"problem": "Return your final response within \\boxed{}. 2 + 2?", "domain": "math", "deepseek_reasoning": " hm ", "source": "s",
         "deepseek_solution": "so \\boxed{5}", "ground_truth_solution": "thus \\boxed{3} or \\boxed{4}.", "test_cases": None, "starter_code": None},
        {"problem": "code", "domain": "code", "deepseek_reasoning": "x", "deepseek_solution": "y", "ground_truth_solution": None},
        {"problem": "proof", "domain": "math", "deepseek_reasoning": "x", "deepseek_solution": "no box", "ground_truth_solution": None}],
        [{"id": "openthoughts-0", "problem": "2 + 2?", "answer": "4", "solution": "hm"}]),
    "openthoughts3": ("data/train-00000-of-00001.parquet", [
        {"difficulty": 7, "source": "s", "domain": d, "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": v}]}
        for d, v in (("math", "<think>\nhm\n</think>\n\n\\boxed{4}"), ("math", "<think>\nhm again\n</think>\n\n\\boxed{4}"),
                     ("code", "<think>\nhm\n</think>\n\nx"))],
        [{"id": "openthoughts3-0", "problem": "2 + 2?", "answer": "4", "solution": "hm"}]),
    "deepmath": ("data/train-00000-of-00002.parquet", [
        {"question": "q", "final_answer": "\\frac{1}{2}", "difficulty": 5.0, "topic": "t", "r1_solution_1": "Let me see.\n</think>\nSo 1/2.",
         "r1_solution_2": "b", "r1_solution_3": "c"},
        {"question": " Q ", "final_answer": "7", "difficulty": 8.0, "topic": "t", "r1_solution_1": "x</think>y", "r1_solution_2": "", "r1_solution_3": ""}],
        [{"id": "deepmath-0", "problem": "q", "answer": "\\frac{1}{2}", "difficulty": 5.0, "solution": "Let me see."}]),
    "dapo17k": ("data/dapo-math-17k.parquet", [
        {"data_source": "d", "prompt": [{"content": DAPO.format(q), "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "034", "style": "rule"}, "extra_info": {"index": str(i)}} for i, q in enumerate(["Find x.", "Find x.", "Find y."])],
        [{"id": "dapo17k-0", "problem": "Find x.", "answer": "34"}, {"id": "dapo17k-2", "problem": "Find y.", "answer": "34"}]),
    "deepscaler": ("deepscaler.json", [{"problem": "q", "answer": "x^2", "solution": "s"}],
                   [{"id": "deepscaler-0", "problem": "q", "answer": "x^2", "solution": "s"}]),
    "gsm8k": ("main/train-00000-of-00001.parquet", [{"question": "q", "answer": "3 + <<3+4=7>>4 = 7\n#### 1,007"}],
              [{"id": "gsm8k-0", "problem": "q", "answer": "1007", "solution": "3 + <<3+4=7>>4 = 7"}]),
    "math500": ("test.jsonl", [{"problem": "q", "solution": "s", "answer": "\\pi", "subject": "Algebra", "level": 2, "unique_id": "u"}] * 2,
                [{"id": f"math500-{i}", "problem": "q", "answer": "\\pi"} for i in (0, 1)]),  # a benchmark keeps its rows
    "aime24": ("data/train-00000-of-00001.parquet", [{"id": 60, "problem": "q", "solution": "s", "answer": "025", "url": "u", "year": "2024"}],
               [{"id": "aime24-0", "problem": "q", "answer": "25"}]),
    "aime25": ("test.jsonl", [{"problem": "q", "answer": "336^\\circ", "id": "0"}], [{"id": "aime25-0", "problem": "q", "answer": "336"}]),
    "amc23": ("data/test-00000-of-00001.parquet", [{"id": 0, "question": "q", "answer": 27.0, "url": "u"}],
              [{"id": "amc23-0", "problem": "q", "answer": "27"}]),
    "minerva": ("test.jsonl", [{"question": "q", "answer": "4.5e33"}], [{"id": "minerva-0", "problem": "q", "answer": "4.5e33"}]),
    "olympiadbench": ("OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet", [
        {"id": 1, "question": "q", "final_answer": ["$2$", "$-3$"], "is_multiple_answer": True, "unit": None}],
        [{"id": "olympiadbench-0", "problem": "q", "answer": "2, -3"}]),
    "mmlu_pro": ("data/test-00000-of-00001.parquet", [
        {"question_id": 1, "question": "Which?", "options": list("abcdefghij"), "answer": "J", "answer_index": 9, "category": "physics"}],
        [{"id": "mmlu_pro-0", "problem": "Which?\n\n" + "\n".join(f"({x.upper()}) {x}" for x in "abcdefghij")
          + "\n\nAnswer with the letter of the right option.", "answer": "J"}]),
}


def store(folder, file, rows):
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_data_sets_from_local_folders(tmp_path, name):
    file, rows, expected = CASES[name]
    store(tmp_path, file, rows)
    if name == "gsm8k":  # the folder of another config lies beside it
        store(tmp_path, "socratic/train-00000-of-00001.parquet", [{"question": "other", "answer": "#### 1"}])
    if name == "deepmath":
        store(tmp_path, "data/train-00001-of-00002.parquet", [{**rows[1], "question": "q"}, rows[1]])  # rows 2 and 3, both seen before
    fields = ("problem", "answer") + ("solution",) * ("solution" in expected[0])
    records = load_records(f"{name}={tmp_path}", fields)
    if name == "deepmath":
        assert [r["id"] for r in records] == ["deepmath-0"]
    assert records == expected
    if "solution" in fields:  # long chains of thought are not held in memory unless asked for
        assert load_records(f"{name}={tmp_path}") == [{k: v for k, v in r.items() if k != "solution"} for r in expected]


def test_default_config_of_openthoughts(tmp_path):
    row = {"system": "Your role …", "conversations": [{"from": "user", "value": "Return your final response within \\boxed{}. 2 + 2?"},
                                                     {"from": "assistant", "value": COT}]}
    store(tmp_path, "data/train-00000-of-00001.parquet", [row])
    assert load_records(f"openthoughts={tmp_path}", ("problem", "answer", "solution")) == [
        {"id": "openthoughts-0", "problem": "2 + 2?", "answer": "4", "solution": "hm"}]


def test_gpqa_options_are_shuffled_the_same_way_every_time(tmp_path):
    store(tmp_path, "gpqa_diamond.csv".replace("csv", "jsonl"), [{**GPQA, "Question": f"Which {i}?"} for i in range(40)])
    records = load_records(f"gpqa_diamond={tmp_path}")
    assert records == load_records(f"gpqa_diamond={tmp_path}")
    assert all(f"({r['answer']}) right\n" in r["problem"] for r in records)
    assert len({r["answer"] for r in records}) == 4


def test_every_name_of_the_documentation_is_covered():
    assert set(CASES) | {"gpqa_diamond"} == set(SOURCES)
    assert parse_name("openai/gsm8k:test") == parse_name("gsm8k:test") == ("gsm8k", "test", "")
    assert parse_name("gsm8k:test=some/folder") == ("gsm8k", "test", "some/folder") and parse_name("gsm9k") is None
    for source in SOURCES.values():
        assert re.fullmatch("[0-9a-f]{40}", source.revision)


def test_columns_of_another_revision_are_refused_in_one_sentence(tmp_path):
    store(tmp_path, "test.jsonl", [{"Problem": "q", "Answer": "1"}])
    with pytest.raises(SystemExit, match="aime25, row 0: not of the expected form|cannot load aime25") as stop:
        load_records(f"aime25={tmp_path}")
    assert "\n" not in str(stop.value)


def test_limit_of_a_stream_is_a_fixed_random_subset_in_order(tmp_path):
    store(tmp_path, "data/train-00000-of-00001.parquet", [{"question": f"q{i}", "final_answer": str(i), "difficulty": i % 10 / 1.0,
                                                           "r1_solution_1": "s</think>"} for i in range(300)])
    name = f"deepmath={tmp_path}"
    drawn = [int(r["answer"]) for r in load_records(name, limit=30, seed=1)]
    assert len(drawn) == 30 and drawn == sorted(drawn) and drawn[-1] > 150
    assert drawn == [int(r["answer"]) for r in load_records(name, limit=30, seed=1)]
    assert drawn != [int(r["answer"]) for r in load_records(name, limit=30, seed=2)]
    assert len(load_records(name, limit=999)) == 300
    hard = list(read_hub(parse_name(name), difficulty=(8, float("inf")), dropped=(dropped := Counter())))
    assert len(hard) == 60 and dropped == {"difficulty outside the range": 240}


def test_reservoir_is_uniform():
    hits = Counter(x for seed in range(3000) for x in subset(range(10), 3, seed))
    assert all(abs(hits[x] - 900) < 5 * (3000 * 0.3 * 0.7) ** 0.5 for x in range(10))


def test_memory_does_not_grow_with_the_data():
    def peak(rows):
        stream = ({"id": str(i), "problem": "x" * 5000 + str(i)} for i in range(rows))
        tracemalloc.start()
        subset(stream, 20, 0)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high
    assert peak(4000) < 1.5 * peak(400)


# ---------------------------------------------------------------------------------------------------------------
# Decontamination

TEXT = "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards to rest"


def test_overlap_by_hand():
    evaluation = [{"id": "e1", "problem": TEXT}, {"id": "e2", "problem": "What is $1+1$?"},
                  *({"id": f"b{i}", "problem": f"Case {i}: where m and n are relatively prime positive integers find the sum of m and n now"} for i in range(3))]
    overlap = Overlap(evaluation, n=13)
    assert overlap.find("t1", "Once upon a time: " + TEXT.upper().replace(" ", ",  ") + " and so on.")  # case, punctuation, space
    assert overlap.report[0] == {"id": "t1", "evaluation": "e1", "problem": overlap.report[0]["problem"],
                                 "shared": "every morning aya goes for a nine kilometer long walk and stops at"}
    assert not overlap.find("t2", " ".join(TEXT.split()[:12]))  # twelve words in a row are not thirteen
    assert overlap.find("t3", "what is 1+1") and not overlap.find("t4", "what is 1+1 and 2+2")  # short ones: as a whole
    assert not overlap.find("t5", "Case 9: where m and n are relatively prime positive integers find the sum of m and n now")
    assert [entry["id"] for entry in overlap.report] == ["t1", "t3"]


def test_preparing_a_file_with_a_report(tmp_path, monkeypatch, capsys):
    rows = [(TEXT + " and leave", "1", 6.0), ("easy", "2", 1.0), ("kept", "025", 6.0), ("KEPT ", "25", 6.0), ("no gold", "", 6.0)]
    store(tmp_path / "deep", "data/train-00000-of-00001.parquet",
          [{"question": q, "final_answer": a, "difficulty": d, "r1_solution_1": "s</think>"} for q, a, d in rows])
    store(tmp_path / "aime", "test.jsonl", [{"problem": TEXT, "answer": "1", "id": "0"}])
    out = tmp_path / "data/train.jsonl"
    words = ["sources", f"deepmath={tmp_path / 'deep'}", "--out", str(out), "--min_difficulty", "5", "--decontaminate", f"aime25={tmp_path / 'aime'}"]
    monkeypatch.setattr(sys, "argv", words)
    sources.main()
    assert load_records(str(out)) == [{"id": "deepmath-2", "problem": "kept", "answer": "25", "difficulty": 6.0}]
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["kept"] == 1 and report["dropped"] == {"overlap with an evaluation set": 1, "difficulty outside the range": 1,
                                                         "duplicate": 1, "no answer": 1}
    assert report["overlaps"][0]["id"] == "deepmath-0" and report["overlaps"][0]["evaluation"] == "aime25-0"
    with pytest.raises(SystemExit, match="pass --overwrite"):
        sources.main()
    monkeypatch.setattr(sys, "argv", ["sources", words[1], "--out", str(out), "--overwrite", "--min_difficulty", "11"])
    with pytest.raises(SystemExit, match="no record of deepmath.*widen the filters"):
        sources.main()
    assert len(load_records(str(out))) == 1  # the old file stays


# ---------------------------------------------------------------------------------------------------------------
# The hub itself

def test_no_network_is_one_sentence_with_a_remedy(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nlong trace")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in SOURCES:
        with pytest.raises(SystemExit, match=rf"cannot load {name} .*HF_HOME.*{name}=FOLDER.*JSONL") as stop:
            load_records(name)
        assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match="no folder nowhere"):
        load_records("aime24=nowhere")


def test_a_gated_data_set_says_so(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub. Visit the page")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SystemExit, match="accept its terms on its page and set HF_TOKEN"):
        load_records("gpqa_diamond")


def test_hub_data_comes_from_the_pinned_commit(monkeypatch):
    import datasets
    calls = []

    def load_dataset(name, config, **options):
        calls.append((name, config, options))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a\n#### 5", "extra": 1}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records("openai/gsm8k:test", ("problem", "answer", "solution")) == [
        {"id": "gsm8k-0", "problem": "q", "answer": "5", "solution": "a"}]
    assert calls == [("openai/gsm8k", "main", {"split": "test", "revision": SOURCES["gsm8k"].revision})]


def test_ungradable_golds_of_hub_data_are_left_out_and_counted(tmp_path, capsys):
    from data.toy import make_tokenizer
    from grpo import load_questions
    rows = [{"problem": "A ?", "answer": a, "id": str(i)} for i, a in enumerate(["1", "\\frac{1}{", "2", "\\frac{1}{"])]
    store(tmp_path, "test.jsonl", rows)
    kept = load_questions(f"aime25={tmp_path}", make_tokenizer(), 100, 0, 0)
    assert [p["id"] for p in kept] == ["aime25-0", "aime25-2"]
    assert "2 of 4 records left out" in capsys.readouterr().out
    kept, dropped = [{"id": str(i), "answer": answer} for i, answer in enumerate(["1", "\\frac{1}{", "x+1"])], Counter()
    assert [r["id"] for r in gradable(kept, dropped)] == ["0", "2"] and dropped == {"gold that cannot be graded": 1}
    own = write(tmp_path / "own.jsonl", [{"id": "x", "problem": "A ?", "answer": "\\frac{1}{"}])
    with pytest.raises(SystemExit, match="1 of 1 answers cannot be graded, the first in record x: "):  # a user's own file is to be mended
        load_questions(own, make_tokenizer(), 100, 0, 0)
    store(tmp_path / "all", "test.jsonl", rows[1:2])
    with pytest.raises(SystemExit, match="no record of aime25"):
        load_questions(f"aime25={tmp_path / 'all'}", make_tokenizer(), 100, 0, 0)
