"""Problem records: from JSONL, toy, and data sets in small files of the hub's schema."""

import functools
import json
import re
import sys
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest

from data import sources
from data.sources import (
    SOURCES,
    Overlap,
    clean_gold,
    gradable,
    hold_out,
    load_gradable,
    load_questions,
    load_records,
    parse_name,
    read_hub,
    split_cot,
    subset,
    unwrap,
)
from data.toy import make_tokenizer
from data.verifiers import verify
from data.vision import ENTRIES
from model_utils import encode_question
from plumbing.answers import last_box

WITH_COT = ("problem", "answer", "solution")


def write(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return str(path)


GOOD = {"id": "a", "problem": "1 + 1 = ?", "answer": "2", "solution": "count"}


def test_jsonl_round_trip(tmp_path):
    path = write(tmp_path / "p.jsonl", [GOOD, "", {"problem": "2 + 2 = ?", "answer": 4}])
    assert load_records(path) == [GOOD, {"id": "p-1", "problem": "2 + 2 = ?", "answer": "4"}]


NAN = "not JSON (NaN is no JSON number); mend or remove the line"
BAD_LINES = [
    ("{oops", "not JSON"),
    ('{"problem": "x", "answer": NaN}', NAN),
    (
        '{"problem": "x", "answer": "1", "difficulty": -Infinity}',
        "not JSON (-Infinity is no JSON number)",
    ),
    ('{"problem": "x", "answer": 1e999}', "'answer' is inf"),
    ('{"problem": "x", "answer": %s}' % ("9" * 5000), "not JSON"),
    ("[1, 2]", "want one JSON object per line, not a list"),
    ({"problem": "x"}, "'answer' is missing"),
    ({"problem": "x", "answer": ""}, "'answer' is empty"),
    ({"problem": "x", "answer": None}, "'answer' is None"),
    ({"problem": ["x"], "answer": "1"}, "'problem' is"),
    ({"id": "a", "problem": "x", "answer": "1"}, "the id 'a' occurs twice"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_malformed_record_is_refused_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "bad.jsonl", [GOOD, line])
    with pytest.raises(SystemExit) as stop:
        load_records(path)
    assert f"{path}, line 2: {reason}" in str(stop.value) and "\n" not in str(stop.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin1.jsonl"
    line = '{"problem": "Où est %s?", "answer": "1"}\n'
    path.write_bytes((line % "Zürich").encode() + (line % "Genève").encode("latin-1"))
    reason = f"{path}, line 2: not UTF-8; convert the file .*iconv -f LATIN1"
    with pytest.raises(SystemExit, match=reason):
        load_records(str(path))
    path.write_bytes((line % "Zürich").encode())
    assert load_records(str(path))[0]["problem"] == "Où est Zürich?"


UNKNOWN = {
    "nowhere.jsonl": "no data at 'nowhere.jsonl'",
    "toy:dev": "splits train",
    "someone/unknown": "give a JSONL file, toy",
}


@pytest.mark.parametrize("name, reason", UNKNOWN.items())
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


BOXES = {
    r"\boxed{a{b}c}": "a{b}c",
    r"\boxed{1} \boxed{2}": r"\{1, 2\}",
    "none": None,
    r"\boxed{never closed": None,
}


@pytest.mark.parametrize("text, box", BOXES.items())
def test_the_last_box_is_the_answer_of_a_solution(text, box):
    assert last_box(text) == box


GOLDS = [
    ("025", "25"), ("-007", "-7"), ("000", "0"), ("0.50", "0.50"), (27.0, "27"), (0.5, "0.5"),
    ("1,007", "1007"), (r"12,\!345", "12345"), ("1,234,567.5", "1234567.5"), ("1,23", r"\{1,23\}"),
    ("12, 345", r"\{12, 345\}"),
    ("3 + 4 = 7\n#### 1,007", "1007"), (7, "7"), (None, ""), ("  ", ""),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("$\\frac{1}{2}$", r"\frac{1}{2}"),
    (r"336^\circ", "336"), (r"60^{\circ}", "60"), ("90°", "90"), (r"x^\circ", r"x^\circ"),
    (["$2$", "3"], r"\{2, 3\}"), ("1,-2", r"\{1,-2\}"),
    (r"\boxed{\frac{1}{2}, 3}", r"\{\frac{1}{2}, 3\}"),
    ("1,234", "1234"), (["x", "y"], "x, y"), (r"x = 1, 2", "x = 1, 2"),
    (["(1, 2)"], "(1, 2)"), ([], ""), (r"\text{Yes}", r"\text{Yes}"),
]


@pytest.mark.parametrize("gold, clean", GOLDS)
def test_clean_gold(gold, clean):
    assert clean_gold(gold) == clean


def wrapped(thought, solution):
    """As OpenThoughts wraps a chain of thought."""
    thought = f"<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>"
    return f"{thought}\n\n<|begin_of_solution|>\n{solution}\n<|end_of_solution|>"


def test_three_ways_to_wrap_a_chain_of_thought():
    assert split_cot(wrapped("hm", "so 4")) == ("hm", "so 4")
    assert split_cot("<think>\nhm\n</think>\n\nso 4") == ("hm", "so 4")
    assert split_cot("hm\n</think>\n\nso 4") == ("hm", "so 4")
    assert split_cot("hm") == ("hm", "")


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}"
    '\n\nRemember to put your answer on its own line after "Answer:".'
)


def test_prompt_wrappers_are_stripped():
    assert unwrap(DAPO.format("Find x.\n\nGiven y.")) == "Find x.\n\nGiven y."
    assert unwrap("Return your final response within \\boxed{}. Find x.") == "Find x."
    after = "Please reason step by step, and put your final answer within \\boxed{}."
    assert unwrap(f"Find x. {after}") == "Find x."
    alone = "Solve the following math problem step by step."
    assert unwrap(alone) == alone


# --------------------------------------------------------------------------------------------------
# Every data set, from files with its columns and the hub's folders


def case(file, rows, **expected):
    """A file, its rows and the records they become: `gsm8k_0=(problem, answer, solution)`.

    Further fields may follow as a dict.
    """
    fields = ("problem", "answer", "solution", "difficulty")
    records = []
    for id, values in expected.items():
        more = values[-1] if isinstance(values[-1], dict) else {}
        named = dict(zip(fields, values[: len(values) - bool(more)]))
        records.append({"id": "-".join(id.rsplit("_", 1)), **named, **more})
    return file, rows, records


def openthoughts(problem, domain, thought, solution, ground_truth, **more):
    row = {"problem": problem, "domain": domain, "deepseek_reasoning": thought}
    return {**row, "deepseek_solution": solution, "ground_truth_solution": ground_truth, **more}


def openthoughts3(domain, reply):
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": reply}]
    return {"difficulty": 7, "source": "s", "domain": domain, "conversations": turns}


def deepmath(question, answer, difficulty, *thoughts):
    row = {"question": question, "final_answer": answer, "difficulty": difficulty, "topic": "t"}
    return {**row, **{f"r1_solution_{i}": text for i, text in enumerate(thoughts, 1)}}


def dapo(index, question):
    row = {"data_source": "d", "ability": "MATH", "extra_info": {"index": str(index)}}
    prompt = [{"content": DAPO.format(question), "role": "user"}]
    return {**row, "prompt": prompt, "reward_model": {"ground_truth": "034", "style": "rule"}}


BOXED = "Return your final response within \\boxed{}. 2 + 2?"
UNUSED = {"source": "s", "test_cases": None, "starter_code": None}
TRUTH = "thus \\boxed{3}, no, \\boxed{4}."
GPQA = {
    "Question": "Which?",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "w1",
    "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3",
}
MATH500 = {"problem": "q", "solution": "s", "answer": "\\pi", "subject": "Algebra", "level": 2}
AIME24 = {"id": 60, "problem": "q", "solution": "s", "answer": "025", "url": "u", "year": "2024"}
OLYMPIAD = {"id": 1, "question": "q", "final_answer": ["$2$", "$-3$"], "is_multiple_answer": True}
MMLU = {"question_id": 1, "question": "Which?", "options": list("abcdefghij"), "answer": "J"}
LETTER = "Answer with the letter of the right option."
OPTIONS = "\nA. $$1$$\nB.2 N\nC、3\nD. no"
MMK12 = [
    {"id": "x", "question": f"{subject}?{OPTIONS}", "answer": "ABCD"[i], "subject": subject,
     "image": None}
    for i, subject in enumerate(("math", "physics", "Chemistry", "biology"))
]  # fmt: skip
MMLU_OPTIONS = "\n".join(f"({x.upper()}) {x}" for x in "abcdefghij")

CASES = {
    "openthoughts": case(
        "metadata/train-00000-of-00001.parquet",
        [
            openthoughts(BOXED, "math", " hm ", "so \\boxed{5}", TRUTH, **UNUSED),
            openthoughts("code", "code", "x", "y", None),
            openthoughts("proof", "math", "x", "no box", None),
        ],
        openthoughts_0=("2 + 2?", "4", "hm"),
    ),
    "openthoughts3": case(
        "data/train-00000-of-00001.parquet",
        [
            openthoughts3("math", "<think>\nhm\n</think>\n\n\\boxed{4}"),
            openthoughts3("math", "<think>\nhm again\n</think>\n\n\\boxed{4}"),
            openthoughts3("code", "<think>\nhm\n</think>\n\nx"),
        ],
        openthoughts3_0=("2 + 2?", "4", "hm"),
    ),
    "deepmath": case(
        "data/train-00000-of-00002.parquet",
        [
            deepmath("q", "\\frac{1}{2}", 5.0, "Let me see.\n</think>\nSo 1/2.", "b", "c"),
            deepmath(" Q ", "7", 8.0, "x</think>y", "", ""),
        ],
        deepmath_0=("q", "\\frac{1}{2}", "Let me see.", 5.0),
    ),
    "dapo17k": case(
        "data/dapo-math-17k.parquet",
        [dapo(i, question) for i, question in enumerate(["Find x.", "Find x.", "Find y."])],
        dapo17k_0=("Find x.", "34"),
        dapo17k_2=("Find y.", "34"),
    ),
    "deepscaler": case(
        "deepscaler.json",
        [{"problem": "q", "answer": "x^2", "solution": "s"}],
        deepscaler_0=("q", "x^2", "s"),
    ),
    "gsm8k": case(
        "main/train-00000-of-00001.parquet",
        [{"question": "q", "answer": "3 + <<3+4=7>>4 = 7\n#### 1,007"}],
        gsm8k_0=("q", "1007", "3 + <<3+4=7>>4 = 7"),
    ),
    "math500": case(  # a benchmark keeps its rows
        "test.jsonl",
        [{**MATH500, "unique_id": "u"}] * 2,
        math500_0=("q", "\\pi"),
        math500_1=("q", "\\pi"),
    ),
    "aime24": case("data/train-00000-of-00001.parquet", [AIME24], aime24_0=("q", "25")),
    "aime25": case(
        "test.jsonl",
        [{"problem": "q", "answer": "336^\\circ", "id": "0"}],
        aime25_0=("q", "336"),
    ),
    "amc23": case(
        "data/test-00000-of-00001.parquet",
        [{"id": 0, "question": "q", "answer": 27.0, "url": "u"}],
        amc23_0=("q", "27"),
    ),
    "minerva": case(
        "test.jsonl", [{"question": "q", "answer": "4.5e33"}], minerva_0=("q", "4.5e33")
    ),
    "olympiadbench": case(
        "OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
        [{**OLYMPIAD, "unit": None}],
        olympiadbench_0=("q", r"\{2, -3\}"),
    ),
    **{
        f"mmk12_{subject.lower()}": case(
            "data/test-00000-of-00001.parquet",
            MMK12,
            **{f"mmk12_{subject.lower()}_{i}": (
                f"{subject}?{OPTIONS}\n\n{LETTER}", "ABCD"[i], {"verifier": "choice"}
            )},
        )  # fmt: skip
        for i, subject in enumerate(("physics", "Chemistry", "biology"), 1)
    },
    "mmlu_pro": case(
        "data/test-00000-of-00001.parquet",
        [{**MMLU, "answer_index": 9, "category": "physics"}],
        mmlu_pro_0=(
            f"Which?\n\n{MMLU_OPTIONS}\n\n{LETTER}", "J",
            {"verifier": "choice", "options": list("abcdefghij")},
        ),
    ),
}


def without_cots(records):
    return [{k: v for k, v in record.items() if k != "solution"} for record in records]


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
        other = [{"question": "other", "answer": "#### 1"}]
        store(tmp_path, "socratic/train-00000-of-00001.parquet", other)
    if name == "deepmath":  # rows 2 and 3 have both been seen before
        seen = [{**rows[1], "question": "q"}, rows[1]]
        store(tmp_path, "data/train-00001-of-00002.parquet", seen)
    has_cots = "solution" in expected[0]
    fields = WITH_COT if has_cots else ("problem", "answer")
    records = load_records(f"{name}={tmp_path}", fields)
    if name == "deepmath":
        assert [r["id"] for r in records] == ["deepmath-0"]
    assert records == expected
    if has_cots:  # long chains of thought are not held in memory unless asked for
        assert load_records(f"{name}={tmp_path}") == without_cots(expected)


def test_default_config_of_openthoughts(tmp_path):
    turns = [{"from": "user", "value": BOXED}]
    turns.append({"from": "assistant", "value": wrapped("hm", "thus \\boxed{4}")})
    row = {"system": "Your role …", "conversations": turns}
    store(tmp_path, "data/train-00000-of-00001.parquet", [row])
    expected = {"id": "openthoughts-0", "problem": "2 + 2?", "answer": "4", "solution": "hm"}
    assert load_records(f"openthoughts={tmp_path}", WITH_COT) == [expected]


def test_gpqa_options_are_shuffled_the_same_way_every_time(tmp_path):
    rows = [{**GPQA, "Question": f"Which {i}?"} for i in range(40)]
    store(tmp_path, "gpqa_diamond.jsonl", rows)
    records = load_records(f"gpqa_diamond={tmp_path}")
    assert records == load_records(f"gpqa_diamond={tmp_path}")
    assert all(f"({r['answer']}) right\n" in r["problem"] for r in records)
    letters = "".join(r["answer"] for r in records)
    # Published figures depend on these orders: no later version may change them.
    assert letters == "ABBCBCBCAACDAABBBAADDADCDBCACABDDADDCDCD"
    right, wrong = (verify(records, [text] * 40, [""] * 40) for text in ("right", "w1"))
    assert all(right) and not any(wrong)


def test_science_is_graded_by_its_options_and_bad_rows_are_left_out(tmp_path, capsys):
    rows = [{**MMK12[1], "answer": answer} for answer in ("B", "BD", "2 N", "E")]
    store(tmp_path, "data/test-00000-of-00001.parquet", rows)
    name = f"mmk12_physics={tmp_path}"
    records = load_gradable(name, lambda text: [1], max_prompt_tokens=9, limit=0, seed=0)
    first = "(first: mmk12_physics-1, 'BD' names no option (A to D))"
    assert f"2 of 4 records left out, because their answers cannot be graded {first}" in (
        capsys.readouterr().out
    )
    assert [r["id"] for r in records] == ["mmk12_physics-0", "mmk12_physics-2"]
    for answer, right in {"(B)": True, "B. 2 N": True, "2 N": True, "$$1$$": False}.items():
        assert verify(records, [answer] * 2, ["", ""]) == [right, right]
    assert parse_name("FanqingM/MMK12") is None  # three names share it


def test_every_name_of_the_documentation_is_covered():
    programs = {"verifiable_code", "taco", "livecodebench", "humaneval"}
    programs |= {"humanevalplus", "mbppplus"}
    assert set(CASES) | {"gpqa_diamond"} | programs | set(ENTRIES) == set(SOURCES)
    assert parse_name("openai/gsm8k:test") == parse_name("gsm8k:test") == ("gsm8k", "test", "")
    assert parse_name("gsm8k:test=some/folder") == ("gsm8k", "test", "some/folder")
    assert parse_name("gsm9k") is None
    for name, source in SOURCES.items():
        unknown = name in ENTRIES and source.revision == "main"
        assert unknown or re.fullmatch("[0-9a-f]{40}", source.revision)


def test_columns_of_another_revision_are_refused_in_one_sentence(tmp_path):
    store(tmp_path, "test.jsonl", [{"Problem": "q", "Answer": "1"}])
    reason = "aime25, row 0: not of the expected form|cannot load aime25"
    with pytest.raises(SystemExit, match=reason) as stop:
        load_records(f"aime25={tmp_path}")
    assert "\n" not in str(stop.value)


def test_limit_of_a_stream_is_a_fixed_random_subset_in_order(tmp_path):
    rows = [deepmath(f"q{i}", str(i), i % 10 / 1.0, "s</think>") for i in range(300)]
    store(tmp_path, "data/train-00000-of-00001.parquet", rows)
    name = f"deepmath={tmp_path}"
    drawn = [int(r["answer"]) for r in load_records(name, limit=30, seed=1)]
    assert len(drawn) == 30 and drawn == sorted(drawn) and drawn[-1] > 150
    assert drawn == [int(r["answer"]) for r in load_records(name, limit=30, seed=1)]
    assert drawn != [int(r["answer"]) for r in load_records(name, limit=30, seed=2)]
    assert len(load_records(name, limit=999)) == 300
    dropped = Counter()
    hard = list(read_hub(parse_name(name), difficulty=(8, float("inf")), dropped=dropped))
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


# --------------------------------------------------------------------------------------------------
# Held-out problems


def by_difficulty(n):
    return [{"id": str(i), "problem": f"{i} + 1 = ?", "answer": "1", "level": i} for i in range(n)]


def test_held_out_problems_of_a_sorted_file_are_as_hard_as_the_others():
    problems = by_difficulty(1000)
    training, held_out = hold_out(problems, 100, seed=3)
    levels = [[p["level"] for p in part] for part in (training, held_out)]
    assert sorted(levels[0] + levels[1]) == list(range(1000)) and len(levels[1]) == 100
    assert levels[0] == sorted(levels[0]) and levels[1] == sorted(levels[1])  # in file order
    # The mean of 100 of 0 ... 999 without replacement is 499.5, with a std of 27.4.
    means = [sum(p["level"] for p in hold_out(problems, 100, s)[1]) / 100 for s in range(20)]
    assert all(abs(mean - 499.5) < 4 * 27.4 for mean in means)
    assert abs(sum(means) / 20 - 499.5) < 4 * 27.4 / 20**0.5


def test_held_out_problems_depend_on_seed_and_texts_alone():
    problems = by_difficulty(300)
    ids = lambda size, seed: {p["id"] for p in hold_out(problems, size, seed)[1]}
    chosen = ids(20, 1)
    assert chosen == ids(20, 1) and chosen != ids(20, 2) and ids(5, 1) < chosen
    assert chosen == {p["id"] for p in hold_out(problems[::-1], 20, 1)[1]}
    assert len(ids(200, 1)) == 30 and not ids(0, 1)  # at most a tenth
    assert hold_out(problems[:9], 200, 1) == (problems[:9], [])


def test_no_copy_of_a_held_out_problem_stays_in_training(capsys):
    copies = [{"id": f"copy {i}", "problem": f" {i} +  1 = ?"} for i in range(0, 400, 2)]
    problems = by_difficulty(400) + copies
    training, held_out = hold_out(problems, 40, seed=0)
    text = lambda part: {" ".join(p["problem"].split()) for p in part}
    assert len(held_out) == len(text(held_out)) == 40 and not text(held_out) & text(training)
    gone = len(problems) - len(training) - 40
    assert gone == sum(p["level"] % 2 == 0 for p in held_out) > 0
    assert f"{gone} further copies of held-out problems" in capsys.readouterr().out
    assert hold_out([{"problem": "x"}] * 100, 5, seed=0)[1] == []  # one problem, a hundred times


def test_training_holds_out_by_seed(tmp_path, monkeypatch):
    path = write(tmp_path / "sorted.jsonl", by_difficulty(100))
    monkeypatch.setattr(sources, "load_config", lambda model: None)
    monkeypatch.setattr(sources, "check_context", lambda *lengths: None)
    sizes = dict(max_prompt_tokens=100, max_completion_tokens=10, limit=0, eval_size=200)
    split = lambda seed: load_questions(
        SimpleNamespace(model="", data=path, eval_data="", seed=seed, **sizes), lambda text: [1]
    )
    training, held_out = split(0)
    levels = [p["level"] for p in held_out]
    assert len(training) == 90 and len(levels) == 10 and min(levels) < 50 <= max(levels)
    assert split(0) == (training, held_out) and split(1)[1] != held_out


# --------------------------------------------------------------------------------------------------
# Decontamination

TEXT = (
    "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards "
    "to rest"
)
BOILERPLATE = "where m and n are relatively prime positive integers find the sum of m and n now"


def test_overlap_by_hand():
    evaluation = [{"id": "e1", "problem": TEXT}, {"id": "e2", "problem": "What is $1+1$?"}]
    for i in range(3):
        evaluation.append({"id": f"b{i}", "problem": f"Case {i}: {BOILERPLATE}"})
    overlap = Overlap(evaluation, n=13)
    shouted = TEXT.upper().replace(" ", ",  ")  # case, punctuation and space do not matter
    problem = f"Once upon a time: {shouted} and so on."
    assert overlap.find("t1", problem)
    shared = "every morning aya goes for a nine kilometer long walk and stops at"
    entry = {"id": "t1", "evaluation": "e1", "problem": problem, "shared": shared}
    assert overlap.report[0] == entry
    assert not overlap.find("t2", " ".join(TEXT.split()[:12]))  # twelve words are not thirteen
    assert overlap.find("t3", "what is 1+1")  # short ones: as a whole
    assert not overlap.find("t4", "what is 1+1 and 2+2")
    assert not overlap.find("t5", f"Case 9: {BOILERPLATE}")
    assert [entry["id"] for entry in overlap.report] == ["t1", "t3"]


def found(evaluation, problem):
    """The report's entry for a training problem, or None."""
    evaluation = [evaluation] if isinstance(evaluation, str) else evaluation
    overlap = Overlap({"id": f"e{i}", "problem": text} for i, text in enumerate(evaluation))
    assert overlap.find("t", problem) == bool(overlap.report)
    return overlap.report[0] if overlap.report else None


PYRAMID = (
    "A regular pyramid has a square base with side $6$ and height $4$. A sphere touches all five "
    "of its faces. The radius of the sphere is $r$. Find $10r$."
)
IN_SEVERAL_SETS = [
    [PYRAMID] * 3,
    [PYRAMID.replace("$", ""), PYRAMID.upper(), PYRAMID, PYRAMID.replace(" ", "\n")],
    [PYRAMID.replace("$6$", r"\(6\)"), PYRAMID.replace("10r", r"10\cdot r"), PYRAMID],
    [PYRAMID, PYRAMID + " Give a whole number.", PYRAMID + " The answer is at most 999."],
]


@pytest.mark.parametrize("evaluation", IN_SEVERAL_SETS)
def test_a_problem_in_several_evaluation_sets_is_not_boilerplate(evaluation):
    assert found(evaluation, f"Here is a riddle. {PYRAMID} Explain.")["evaluation"] == "e0"


@pytest.mark.parametrize("evaluation", IN_SEVERAL_SETS[:3])
def test_a_part_of_a_problem_in_several_sets_is_found_too(evaluation):
    entry = found(evaluation, PYRAMID.partition(" A sphere")[0] + " Find its surface.")
    assert entry["shared"] == "a regular pyramid has a square base with side 6 and height 4"


def test_different_problems_with_one_id_still_make_boilerplate():
    cases = [{"id": "0", "problem": f"Case {i}: {BOILERPLATE}"} for i in range(3)]
    assert not Overlap(cases).find("t", f"Case 9: {BOILERPLATE}")
    assert Overlap(cases[:2]).find("t", f"Case 9: {BOILERPLATE}")


WITH_A_SENTENCE_ADDED = [
    ("How many positive divisors does 196 have?", "{} Justify your answer."),
    ("How many positive divisors of $196$ are even?", "We ask: {}\nGive an integer."),
    ("Is every subgroup of an abelian group normal?", "Think of cosets, then say: {} Or not?"),
    ("What is the smallest prime greater than one hundred?", "Let me ask you: {} Thanks."),
    (r"Evaluate $\int \ln x\,dx$.", "{} Check the result."),
    (r"Compute $\sin 60^\circ$.", "This is easy. {} Give an exact value."),
    ("What is $2.43-1.2$?", "{} Write a decimal."),
    ("Let $x=3$. What is $x+5$?", "Think first. {} Show your work."),
]


@pytest.mark.parametrize("evaluation, frame", WITH_A_SENTENCE_ADDED)
def test_a_short_problem_is_found_with_a_sentence_added(evaluation, frame):
    assert found(evaluation, frame.format(evaluation))


def test_a_specific_short_problem_is_found_inside_a_sentence():
    short = "how many positive divisors of 196 are even"
    assert found(short, f"Tell me {short}, and why!")["shared"] == short


SPELLINGS = [
    (r"Simplify $\frac{1}{2}x + \frac{3}{4}y$.", r"Simplify \(\dfrac{1}{2}x + \tfrac34y\)"),
    (r"Compute $\frac{17}{19}+\frac{1}{3}$.", "Compute 17/19 + 1/3"),
    (r"Compute $\left(3+4\right)\cdot 5 \times x$.", r"Compute $\bigl( 3+4 \bigr)*5x$"),
    (r"Compute $\dbinom{8}{4} \pmod 5$.", r"compute \binom{8}{4} (mod 5)"),
    (r"Evaluate $\displaystyle\int_0^1 x^2\,dx$", r"Evaluate $$\int\limits_{0}^{1}x^{2}\;dx$$"),
    (r"Is $2\,000{,}000 \le x_1^{2}$ \text{ for } $x_1=3$", "Is 2000000 ≤ x_1^2 for x_{1} = 3"),
    (r"Find $\boxed{x}$ with $\mathrm{gcd}(x,12)=4$", r"Find x with $\gcd(x, 12)=4$"),
    (r"Is $\sqrt{2}\pi$ above $60^\circ$", "is √2π above ６０°"),
    (r"Square \begin{pmatrix}1&2\\3&4\end{pmatrix}", r"square $\begin{bmatrix} 1 & 2 \\ 3 & 4"),
]


@pytest.mark.parametrize("evaluation, problem", SPELLINGS)
def test_latex_spellings_of_one_problem_are_equal(evaluation, problem):
    assert found(evaluation, problem) and found(problem, evaluation)


def test_latex_spellings_do_not_hide_a_run():
    text = r"For $x>0$ let $f(x)=\frac{1}{x}+\frac{x}{2}\cdot\left(x+1\right)$ and let $y=f(1)$"
    other = text.replace(r"\frac", r"\dfrac").replace(r"\cdot\left(x+1\right)", "(x+1)")
    assert found(f"{text}. Find $y$.", f"Bob writes: {other}. He wants to know $2y$.")


CHINESE = "已知等差数列的前三项之和为12且公差为2求这个数列的第十项的值以及前十项的和"
SHORT_CHINESE = "求1到100的所有质数之和。"
SPACED = "Let $a$, $b$ be integers with $ab=2024$. How many such pairs are there in all?"
WITHOUT_SPACES = [
    (CHINESE, f"小明问老师一个问题,{CHINESE}请写出过程"),
    (CHINESE, f"题目。{CHINESE[2:-3]}吗"),  # a part of it
    (SHORT_CHINESE, f"{SHORT_CHINESE}请写出过程。"),
    (SHORT_CHINESE, "小明想知道，求 $1$ 到 $100$ 的所有质数之和，还有别的"),
    (SPACED, SPACED.replace(" ", "") + "Explain."),
    (SPACED.replace(" ", ""), f"Here we go: {SPACED} Explain."),
    (TEXT.replace(" ", ""), f"Once upon a time: {TEXT} and so on."),
    (TEXT, "onceuponatime" + TEXT.replace(" ", "") + "andsoon"),
    (r"Is $\alpha\beta\gamma+2xyz=7\delta$", r"is $\alpha \beta \gamma + 2x y z = 7 \delta$"),
]


@pytest.mark.parametrize("evaluation, problem", WITHOUT_SPACES)
def test_texts_without_spaces(evaluation, problem):
    assert found(evaluation, problem)


UNRELATED = [
    ("Find the value of x.", "Let 2x = 4. Find the value of x."),
    ("What is the value of x + y?", "If x - y = 3 and xy = 10, what is the value of x + y?"),
    ("If 2x + 3 = 7, find the value of x.", "If 5x - 2 = 8, find the value of x."),
    ("Find the sum of all values of x.", "Let |x - 2| = 3. Find the sum of all values of x."),
    ("Find the area of triangle ABC.", "ABC has sides 3, 4, 5. Find the area of triangle ABC."),
    ("What is 1+12?", "What is 11+2?"),
    ("What is 1+1?", "What is 1+1+5?"),
    ("How many primes are there below 10?", "How many primes are there below 100?"),
    ("Find the 5th prime p.", "Find the 5th prime power."),
    (r"Compute $\cos 60^\circ$.", r"Compute $\sin 60^\circ$."),
    (r"Compute $\binom{8}{4}$.", r"Compute $\frac{8}{4}$."),
    (r"Compute $\frac{1}{23}$.", r"Compute $\frac{12}{3}$."),
    ("求x的值。", "已知2x=4。求x的值。"),
    ("求函数的最小值。", "已知函数f(x)=x^2-2x。求函数的最小值。"),
    (CHINESE, CHINESE.replace("三", "五").replace("12", "30").replace("十", "七")),
    (PYRAMID, "A regular pyramid has a square base with side $7$ and height $9$. Find its volume."),
    ("1 + 2 + 3 = ?", "Write 1, 2, 3, 4 backwards."),
    (CHINESE, "已知等差数列的前三项之和为12且公差为2,证明它递增。"),
    ("", "?!"),
]


@pytest.mark.parametrize("evaluation, problem", UNRELATED)
def test_unrelated_problems_do_not_match(evaluation, problem):
    assert not found(evaluation, problem)


def test_preparing_a_file_with_a_report(tmp_path, monkeypatch, capsys):
    rows = [(TEXT + " and leave", "1", 6.0), ("easy", "2", 1.0), ("kept", "025", 6.0)]
    rows += [("KEPT ", "25", 6.0), ("no gold", "", 6.0)]
    rows = [deepmath(*row, "s</think>") for row in rows]
    store(tmp_path / "deep", "data/train-00000-of-00001.parquet", rows)
    store(tmp_path / "aime", "test.jsonl", [{"problem": TEXT, "answer": "1", "id": "0"}])
    out = tmp_path / "data/train.jsonl"
    words = ["sources", f"deepmath={tmp_path / 'deep'}", "--out", str(out)]
    flags = ["--min_difficulty", "5", "--decontaminate", f"aime25={tmp_path / 'aime'}"]
    monkeypatch.setattr(sys, "argv", words + flags)
    sources.main()
    kept = {"id": "deepmath-2", "problem": "kept", "answer": "25", "difficulty": 6.0}
    assert load_records(str(out)) == [kept]
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["kept"] == 1
    assert report["dropped"] == {
        "overlap with an evaluation set": 1,
        "difficulty outside the range": 1,
        "duplicate": 1,
        "no answer": 1,
    }
    [overlap] = report["overlaps"]
    assert overlap["id"] == "deepmath-0" and overlap["evaluation"] == "aime25-0"
    with pytest.raises(SystemExit, match="pass --overwrite"):
        sources.main()
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite", "--min_difficulty", "11"])
    with pytest.raises(SystemExit, match="no record of deepmath.*widen the filters"):
        sources.main()
    assert len(load_records(str(out))) == 1  # the old file stays


# --------------------------------------------------------------------------------------------------
# The hub itself


def test_no_network_is_one_sentence_with_a_remedy(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in SOURCES:
        sentence = rf"cannot load {name} .*HF_HOME.*{name}=FOLDER.*JSONL"
        with pytest.raises(SystemExit, match=sentence) as stop:
            load_records(name)
        assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match="no folder nowhere"):
        load_records("aime24=nowhere")


def test_a_gated_data_set_says_so(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        said = "Dataset 'x' is a gated dataset on the Hub. Visit the page"
        raise datasets.exceptions.DatasetNotFoundError(said)

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
    expected = {"id": "gsm8k-0", "problem": "q", "answer": "5", "solution": "a"}
    assert load_records("openai/gsm8k:test", WITH_COT) == [expected]
    options = {"split": "test", "revision": SOURCES["gsm8k"].revision}
    assert calls == [("openai/gsm8k", "main", options)]


def test_ungradable_golds_of_hub_data_are_left_out_and_counted(tmp_path, capsys):
    encode = functools.partial(encode_question, make_tokenizer())
    load = lambda name: load_gradable(name, encode, max_prompt_tokens=100, limit=0, seed=0)
    golds = ["1", "\\frac{1}{", "2", "\\frac{1}{"]
    rows = [{"problem": "A ?", "answer": gold, "id": str(i)} for i, gold in enumerate(golds)]
    store(tmp_path, "test.jsonl", rows)
    kept = load(f"aime25={tmp_path}")
    assert [p["id"] for p in kept] == ["aime25-0", "aime25-2"]
    assert "2 of 4 records left out" in capsys.readouterr().out
    kept = [{"id": str(i), "answer": gold} for i, gold in enumerate(["1", "\\frac{1}{", "x+1"])]
    dropped = Counter()
    assert [r["id"] for r in gradable(kept, dropped)] == ["0", "2"]
    assert dropped == {"gold that cannot be graded": 1}
    # A user's own file is to be mended.
    own = write(tmp_path / "own.jsonl", [{"id": "x", "problem": "A ?", "answer": "\\frac{1}{"}])
    reason = "1 of 1 answers cannot be graded, the first in record x: "
    with pytest.raises(SystemExit, match=reason):
        load(own)
    store(tmp_path / "all", "test.jsonl", rows[1:2])
    with pytest.raises(SystemExit, match="no record of aime25"):
        load(f"aime25={tmp_path / 'all'}")
