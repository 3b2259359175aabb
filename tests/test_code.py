"""Programs as answers: the sandbox, the judge, data sets with tests, and the embedded task."""

import base64
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter

import pytest

import eval as evaluation
import grpo
import sft
from bench.rewards import ADD, HONEST, SUM, TAKES_TIME, Surroundings, filled
from conftest import ROOT
from data import code, formulas, sources, toy, verifiers
from data.sources import load_gradable, load_records, read_hub
from data.verifiers import boxed, verify
from plumbing import runner
from plumbing.sandbox import encode, eval_literal
from plumbing.votes import label_votes
from rewards import build_completion, extract_answer, parse_completion


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Little time for a program, so that hostile ones take little time."""
    monkeypatch.setattr(runner, "FIRST_LOOK", 0.2)
    monkeypatch.setattr(runner, "CPU_SECONDS", 0.4)
    runner.pool.verdicts.clear()
    runner.stats(reset=True)


def right(program, tests) -> bool:
    return runner.passes([tests], [program])[0]


# --------------------------------------------------------------------------------------------------
# Comparing

TEXTS = [  # gold, output, verdict
    ("7\n", "7", True),
    ("7\n8\n", "7 \n  8\n\n", True),
    ("7\n8\n", "7\n", False),  # a prefix of right lines
    ("7\n", "7\n8\n", False),
    ("7\n8", "7\n\n8", False),
    ("1 2 3", "1.0 2e0 03", True),
    ("1 2 3", "1 2", False),
    ("0.1", "0.10000000000000001", False),
    ("YES", "yes", False),
    ("", "\n \n", True),
    ("1", "sNaN", False),
    ("nan", "NaN", False),
    ("1e999999999", "1e-999999999", False),
    ("7", "7" * 20_000, False),
]


@pytest.mark.parametrize("gold, out, verdict", TEXTS)
def test_text_is_compared_line_by_line(gold, out, verdict):
    assert runner.same_text(gold, out) is verdict


VALUES = [
    ([1, [2, "a"], None], '[1, [2, "a"], null]', True),
    ([1, 2], "[1, 2, 3]", False),
    ([1, 2], "[1]", False),
    (5, "5.0", True),
    (1, "true", True),  # as in Python
    (1, '"1"', False),
    (0.5, "0.5000004", True),
    (0.5, "0.50001", False),
    (1e9, "1000000010", True),
    (1.0, "1" + "0" * 400, False),  # too large for a float
    (5, "5.0000001", False),
    ({"a": 1}, '{"a": 1, "b": 2}', False),
    ({"a": [1.0]}, '{"a": [1]}', True),
    ([], "{}", False),
    (7, "[" * 100_000, False),
    (7, "7\n7", False),
    (7, "", False),
]


@pytest.mark.parametrize("gold, out, verdict", VALUES)
def test_results_are_compared_as_values(gold, out, verdict):
    assert runner.same_results([gold], out + "\n") is verdict


def test_values_beyond_json_keep_what_makes_them_differ():
    pairs = [
        ((1, [2]), [1, [2]]),
        ({1, 2}, {"<set>": [1, 2]}),
        ({2: "b", 1: "a"}, {1: "a", 2: "b"}),
        (Counter("aab"), {"b": 1, "a": 2}),
        (3 + 4j, {"<complex>": [3.0, 4.0]}),
        (float("inf"), {"<float>": "inf"}),
    ]
    for value, other in pairs:
        assert runner.same_value(encode(value), encode(other))
    for value, other in [({1: 2}, {"1": 2}), ({1, 2}, [1, 2]), (b"ab", "ab"), ({1}, {2})]:
        assert not runner.same_value(encode(value), encode(other))
    with pytest.raises(TypeError, match="a object is not plain data"):
        encode([object()])
    assert eval_literal("[(1, 2), {3}, -inf, {'a': inf}]") == [
        (1, 2),
        {3},
        float("-inf"),
        {"a": float("inf")},
    ]
    with pytest.raises(ValueError):
        eval_literal("[__import__('os')]")


# --------------------------------------------------------------------------------------------------
# The sandbox


def test_honest_programs_pass_in_every_form():
    verdicts = runner.passes(
        [tests for _, tests in HONEST.values()], [program for program, _ in HONEST.values()]
    )
    assert dict(zip(HONEST, verdicts)) == dict.fromkeys(HONEST, True)


def test_no_hostile_program_passes_or_leaves_a_trace():
    runner.not_ready()
    keepers = [worker.process.pid for worker in runner.pool.workers]
    with Surroundings() as around:
        jobs = filled(around.places)
        few = ("endless loop", "deadlock", "memory bomb")
        jobs = {name: job for name, job in jobs.items() if name not in TAKES_TIME or name in few}
        assert len(jobs) >= 60
        honest = HONEST["input()"]
        mixed = [job for job in jobs.values() for job in (job, honest)]
        verdicts = runner.passes([tests for _, tests in mixed], [one for one, _ in mixed])
        assert [name for name, verdict in zip(jobs, verdicts[::2]) if verdict] == []
        assert all(verdicts[1::2]) and around.harm() == []
    assert [worker.process.pid for worker in runner.pool.workers] == keepers
    stats = runner.stats()
    assert stats["timeouts"] >= 1 and stats["stuck"] >= 1 and stats["worker_deaths"] == 0
    assert stats["crash"] >= 1 and stats["refused"] == 2


PROBES = """
import os, socket
def tried(call, *arguments):
    try:
        call(*arguments)
        return "done"
    except OSError as error:
        return error.errno
def add(a, b):
    return [tried(*call) for call in (
        (os.open, "/etc/hostname", 0), (socket.socket,), (os.fork,), (os.dup, 0),
        (os.kill, os.getpid(), 0), (os.unlink, "/x"), (os.setsid,), (os.listdir, "/"),
    )] + [dict(os.environ)]
"""


def test_a_program_has_no_files_network_processes_or_environment():
    (found,) = runner.results({**ADD, "inputs": [[1, 2]]}, PROBES)
    assert found == [1] * 8 + [{}]  # 1 is EPERM


def test_expected_outputs_never_leave_this_process(monkeypatch):
    sent, real = [], runner.Runner.put
    put = lambda self, body: sent.append(body) or real(self, body)
    monkeypatch.setattr(runner.Runner, "put", put)
    assert right("print(int(input()) + 70000)", {"inputs": ["1234"], "outputs": ["71234"]})
    tests = {"fn": "f", "inputs": [[1234]], "outputs": [71234]}
    assert right("def f(x): return x + 70000", tests)
    everything = b"".join(sent)
    assert b"1234" in everything and b"71234" not in everything


def test_a_program_cannot_find_another_solution():
    """The keeper that runs both holds neither: not even in memory that it has freed."""
    mark = "sibling" * 3
    assert right(f"x = '{mark}'\nprint(sum(map(int, input().split())))", SUM)
    search = """
import ctypes, gc
def add(a, b):
    mark, found = "sibling" * 3, []
    for one in gc.get_objects():
        for text in (one.values() if type(one) is dict else one if type(one) is list else ()):
            if type(text) in (str, bytes) and mark in str(text) and text != mark:
                found.append(str(text))
    base = id(mark) & ~0xFFF  # the pages around
    return len(found) + ctypes.string_at(base, 4096).count(b"x = 'sib" + b"lingsibling")
"""
    for worker in runner.pool.workers:
        assert runner.results({**ADD, "inputs": [[1, 2]]}, search) == [0]


def test_wrong_solutions_end_at_their_first_test(monkeypatch):
    runs, real = [], runner.Runner.next_input
    monkeypatch.setattr(
        runner.Runner, "next_input", lambda self: runs.append(self.at) or real(self)
    )
    assert not right("print(7 if input() == '3 4' else 0)", SUM)
    assert runs == [0, 1]


def test_a_program_gets_the_same_verdict_every_time():
    program = (
        "import random\nwords = {str(i) for i in range(50)}\n"
        "print(*words, random.random(), hash('a'))"
    )
    outputs = set()
    for _ in range(2):
        runner.pool.drop(*runner.pool.workers)
        tests = {"fn": "f", "inputs": [[]]}
        shown = (
            f"def f():\n    import io, contextlib\n    out = io.StringIO()\n    with "
            f"contextlib.redirect_stdout(out): exec({program!r})\n    return out.getvalue()"
        )
        outputs.add(runner.results(tests, shown)[0])
    assert len(outputs) == 1


def test_time_is_cpu_time_and_tests_may_ask_for_more():
    busy = "import time\nend = time.process_time() + 0.7\nwhile time.process_time() < end: pass\n"
    program, tests = HONEST["input()"]
    assert not right(busy + program, tests)
    assert runner.stats()["timeouts"] == 1
    one = {name: values[:1] for name, values in tests.items()}
    assert right(busy + program, {**one, "seconds": 5})


def test_a_keeper_that_is_killed_is_replaced_and_its_program_tried_again():
    assert right("print(sum(map(int, input().split())))", SUM)
    victims = list(runner.pool.workers)
    for worker in victims:
        os.kill(worker.process.pid, signal.SIGKILL)
    assert right("print(sum(map(int, input().split()))) # again", SUM)
    assert 1 <= runner.stats()["worker_deaths"] <= len(victims)
    assert not {w.process.pid for w in victims} & {w.process.pid for w in runner.pool.workers}


def test_a_handler_that_is_killed_takes_nothing_with_it():
    """Its keeper ends, too, as what the handler has not read would be taken for an order."""
    runner.not_ready()
    killed = []

    def kill_handlers():
        for worker in runner.pool.workers:
            at = f"/proc/{worker.process.pid}/task/{worker.process.pid}/children"
            for pid in open(at).read().split():
                os.kill(int(pid), signal.SIGKILL)
                killed.append(pid)

    import threading

    def soon():
        while not killed:
            time.sleep(0.05)  # until the program runs: the death of an idle one is not noticed
            kill_handlers()

    thread = threading.Thread(target=soon)
    thread.start()
    slow = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    assert right(slow + "print(sum(map(int, input().split())))", SUM)
    thread.join()
    assert 1 <= runner.stats()["worker_deaths"] <= len(killed)


BROKEN = """
import sys
sys.path.insert(0, {folder!r})
import sandbox
sandbox.CALLS += [{number}]
sandbox.keep()
"""


@pytest.mark.parametrize("number", [257, 41, 62, 56, 83, 87, 59])
def test_a_keeper_whose_filter_lets_a_call_through_refuses_to_work(number):
    """openat, socket, kill, clone, mkdir, unlink, execve."""

    class Broken(runner.Runner):
        command = [
            sys.executable,
            "-c",
            BROKEN.format(folder=str(ROOT / "plumbing"), number=number),
        ]

    worker = Broken({})
    with pytest.raises(RuntimeError, match="does not confine programs .*seccomp filters$"):
        worker.await_ready()


def test_other_machines_refuse_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.platform, "machine", lambda: "arm64")
    runner.not_ready.cache_clear()
    file = tmp_path / "p.jsonl"
    record = {"id": "r", "problem": "1", "answer": "-", "verifier": "code", "tests": SUM}
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="record r: its programs cannot be run: .*Linux x86-64"):
        load_gradable(str(file), lambda text: [1], 10, 0, 0)
    with pytest.raises(RuntimeError, match="Linux x86-64 only, not on Linux arm64"):
        right("print(7)", SUM)
    runner.not_ready.cache_clear()


AS_NOBODY = """
import os
from plumbing import runner
from bench.rewards import HONEST, HOSTILE
names = ["fork bomb", "kills its parent", "openat by hand", "connects by hand", "endless sleep"]
runner.FIRST_LOOK, runner.CPU_SECONDS = 0.2, 0.4
jobs = [*HONEST.values(), *(HOSTILE[name] for name in names)]
print(os.getuid(), runner.passes([t for _, t in jobs], [c for c, _ in jobs]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_it_works_as_an_unprivileged_user():
    nobody = dict(user=65534, group=65534, extra_groups=[], cwd=ROOT, timeout=120)
    options = dict(capture_output=True, text=True, **nobody)

    def can_be_used(python: str) -> bool:
        probe = "import contextlib, sys, plumbing; assert sys.version_info >= (3, 11)"
        try:
            return subprocess.run([python, "-c", probe], **options).returncode == 0
        except OSError:
            return False

    python = next(filter(can_be_used, [sys.executable, "/usr/bin/python3"]), None)
    if python is None:
        pytest.skip("the other user can read no Python here, or not this folder")
    result = subprocess.run([python, "-c", AS_NOBODY], **options)
    expected = [True] * len(HONEST) + [False] * 5
    assert result.stdout.strip() == f"65534 {expected}", result.stderr


# --------------------------------------------------------------------------------------------------
# The verifier

ANSWERS = [
    ("print(7)", "print(7)"),
    ("So:\n```python\nprint(7)\n```\nDone.", "print(7)\n"),
    ("```python\nprint(1)\n```\nNo:\n```py\nprint(2)\n```", "print(2)\n"),
    ("```\nprint(7)\n```", "print(7)\n"),
    ("```python\nprint(7)", "print(7)"),
    ("```print(7)```", "print(7)"),
    ("\\boxed{print('{')}", "print('{')"),
    ("\\boxed{\n```python\nprint('}')\n```\n}", "print('}')\n"),
    ("```python\n\\boxed{print(7)}\n```", "print(7)"),
]


@pytest.mark.parametrize("answer, program", ANSWERS)
def test_the_last_block_of_an_answer_is_the_program(answer, program):
    assert code.program_in(answer) == program


BRACES = [  # programs that print "}"
    "print('}')",
    "print('{}'[1:])",
    "print('\\\\boxed{7}'[-1])",  # the text of a box
    "print(f'{{{7}}}'[2]) # {",
]


@pytest.mark.parametrize("program", BRACES)
@pytest.mark.parametrize("form", ["{}", "```python\n{}\n```", "\\boxed{{```python\n{}\n```}}"])
def test_a_program_is_read_whatever_its_braces_are(program, form):
    """As the stages do it: the completion that sft.py trains on, and one with a box."""
    tests = {"inputs": [""], "outputs": ["}"]}
    record = {"problem": "p", "answer": code.ANSWER, "verifier": "code", "tests": tests}
    assert not boxed(record) and boxed({"answer": "7"})
    answer = form.format(program)
    text = build_completion("plan", "think", answer, boxed(record))
    assert parse_completion(text).answer == answer  # no box of ours
    assert verify([record], [extract_answer(text, boxed(record))], [""]) == [True]


def test_programs_vote_and_leak_by_their_text_and_never_reach_mathematics(monkeypatch):
    def mathematics(*given):
        raise AssertionError("a program was sent to math-verify")

    record = {"id": "1", "problem": "p", "answer": code.ANSWER, "verifier": "code", "tests": SUM}
    monkeypatch.setattr(verifiers, "grade", mathematics)
    monkeypatch.setattr(verifiers.mathematics, "restated", mathematics)
    assert verifiers.same_answers([record], ["print(1)"], ["print(1.0)"]) == [False]
    assert not verifiers.restated(record, "print(1 + 1)")
    samples = [{"answer": one, "correct": False} for one in ("print(1)", "print(2)", "print(1)")]
    label_votes([samples], lambda places, *pairs: verifiers.same_answers([record], *pairs))
    votes = [sample["vote"] for sample in samples]
    assert votes[0] == votes[2] != votes[1]
    assert not verifiers.plan_leaks(record, "read the two numbers, print(1 + 1)")


def test_the_stages_write_and_read_programs_without_a_box(monkeypatch):
    tests = {"inputs": [""], "outputs": ["}"]}
    record = {"id": "1", "problem": "p", "answer": "-", "verifier": "code", "tests": tests}
    text = build_completion("plan", "think", f"\\boxed{{```python\n{BRACES[0]}\n```}}", boxed=False)
    for stage in (grpo, evaluation):
        monkeypatch.setattr(stage, "completion_texts", lambda tokenizer, ids, stop_ids: [text])
    group = grpo.Group(record, [grpo.Rollout([1], [1])])
    grpo.grade_groups(None, [group], [0])
    assert group.rollouts[0].correct
    monkeypatch.setattr(evaluation, "find_stop_ids", lambda model, tokenizer: [0])
    monkeypatch.setattr(evaluation, "complete", lambda *args: ([[0]], [0]))
    problem = {**record, "benchmark": "b", "prompt": [1]}
    (judged,) = evaluation.evaluate(None, None, [problem], evaluation.Config(n=1), seed=0)
    assert [sample["correct"] for sample in judged["samples"]] == [True]
    tokenizer, (record,) = toy.make_tokenizer(formulas.WORDS), formulas.make_problems("train", 1)
    ids, prompt, _ = sft.encode_record(tokenizer, formulas.for_training(record), use_plan=True)
    ending = f"<answer> {record['program']} </answer> <|end|>"
    assert tokenizer.decode(ids[prompt:]).endswith(ending)


def test_records_name_the_verifier_and_others_are_judged_beside_them():
    records = [
        {"problem": "p", "answer": code.ANSWER, "verifier": "code", "tests": ADD},
        {"problem": "q", "answer": "2"},
        {"problem": "p", "answer": code.ANSWER, "verifier": "code", "tests": ADD},
        {"problem": "p", "answer": code.ANSWER, "verifier": "code", "tests": ADD},
    ]
    good = "```python\ndef add(a, b):\n    return a + b\n```"
    assert verify(records, [good, "2", good.replace("+", "-"), None], [""] * 4) == [
        True,
        True,
        False,
        False,
    ]
    stats = runner.stats()
    assert (stats["right"], stats["wrong"], stats["no_answer"], stats["graded"]) == (1, 1, 1, 3)


BAD_TESTS = [
    (None, "no tests"),
    ({"inputs": [], "outputs": []}, "without lists of inputs and outputs"),
    ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
    ({"inputs": [[1]], "outputs": ["1"]}, "an input that is no str"),
    ({"fn": "f", "inputs": ["1"], "outputs": [1]}, "an input that is no list"),
    ({"inputs": ["1"], "outputs": [1]}, "an output that is no text"),
    ({"fn": 3, "inputs": ["1"], "outputs": ["1"]}, "whose fn is not a name"),
    ({"inputs": ["1"], "outputs": ["1" * (5 << 20)]}, "too much output"),
]


@pytest.mark.parametrize("tests, reason", BAD_TESTS)
def test_a_record_with_unusable_tests_is_refused_with_its_id(tmp_path, tests, reason):
    file = tmp_path / "p.jsonl"
    record = {"id": "r", "problem": "1", "answer": "-", "verifier": "code", "tests": tests}
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=f"record r: it has .*{reason} .*; mend or remove"):
        load_gradable(str(file), lambda text: [1], 10, 0, 0)


# --------------------------------------------------------------------------------------------------
# Data sets, in small files of the hub's schema


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def judged(records, programs) -> list[bool]:
    return verify(records, [f"```python\n{one}\n```" for one in programs], [""] * len(programs))


def test_verifiable_coding_problems(tmp_path):
    case = dict(type="stdin_stdout", fn_name=None)
    cases = [{**case, "input": "3 4\n", "output": "7"}, {**case, "input": "1 1", "output": "2\n"}]
    info = {"language": "python", "test_cases": cases}
    about = {"difficulty": "EASY", "time_limit": 2.0, "memory_limit": None}
    row = {
        "problem_statement": "Add.",
        "gold_standard_solution": HONEST["input()"][0],
        "verification_info": info,
        "metadata": about,
        "source": "x",
        "problem_id": "1",
    }
    call = dict(type="function_call", fn_name="add")
    named = [{**call, "input": [3, 4], "output": [7]}, {**call, "input": [1, 1], "output": [2]}]
    rows = [
        row,
        {**row, "problem_statement": "Broken.", "gold_standard_solution": "print(1)"},
        {**row, "problem_statement": "C.", "verification_info": {**info, "language": "c"}},
        {
            **row,
            "problem_statement": "Mixed.",
            "verification_info": {**info, "test_cases": cases + named},
        },
    ]
    folder = write(tmp_path / "set", "train.jsonl", rows)
    dropped = Counter()
    records = [*read_hub(sources.parse_name(f"verifiable_code={folder}"), dropped=dropped)]
    assert dropped == {"not Python": 1, "tests of several functions, or none": 1}
    kept = [*sources.gradable(records, dropped)]
    assert [r["id"] for r in kept] == ["verifiable_code-0"] and dropped[code.FAILING] == 1
    assert "golds" not in kept[0] and kept[0]["tests"]["seconds"] == 2.0
    assert kept[0]["problem"].startswith("Add.\n\nWrite a Python program that reads standard input")
    assert judged(kept * 2, [HONEST["input()"][0], "print(7)"]) == [True, False]
    # Its parent has JSON text; a function's results are wrapped in lists.
    text = json.dumps({"language": "python", "test_cases": named})
    gold = "def add(a, b): return a + b"
    row |= {"verification_info": text, "metadata": "{}", "gold_standard_solution": gold}
    record = code.verifiable(row)
    assert record["tests"]["outputs"] == [7, 2] and code.failing_golds([record]) == [None]


def test_golds_that_fail_are_left_out_of_training_and_counted(tmp_path, capsys):
    bad = "def add(a, b): return a - b"
    rows = [
        {
            "question": f"Add {i}.",
            "starter_code": "",
            "difficulty": "EASY",
            "solutions": json.dumps([bad, bad, good]),
            "input_output": json.dumps({"fn_name": "add", "inputs": [[3, 4]], "outputs": [[7]]}),
        }
        for i, good in enumerate(["def add(a, b): return a + b", bad])
    ]
    rows.append({**rows[0], "question": "No golds.", "solutions": "[]"})
    rows.append({**rows[0], "question": "No JSON.", "input_output": "{"})
    long = '{"inputs": [1%s], "outputs": [1]}' % ("0" * 5000)
    rows.append({**rows[0], "question": "Long numbers.", "input_output": long})
    folder = write(tmp_path / "ALL", "train.jsonl", rows)
    name = f"taco={os.path.dirname(folder)}"
    kept = load_gradable(name, lambda text: [1], 10, 0, 0)
    assert [r["id"] for r in kept] == ["taco-0", "taco-2"]
    assert "golds" not in kept[0] and kept[0]["tests"]["outputs"] == [7]
    said = capsys.readouterr().out
    assert "2 left out (tests that are not JSON)" in said
    assert "1 records left out (solutions that fail their own tests)" in said


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/bench_rewards_evil",)


def test_livecodebench_by_release(tmp_path):
    def packed(value):
        return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

    public = json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}])
    private = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]
    row = {
        "question_title": "Sum",
        "question_content": "Add.",
        "starter_code": "",
        "public_test_cases": public,
        "private_test_cases": packed(json.dumps(private)),
        "metadata": "{}",
        "platform": "x",
        "difficulty": "easy",
    }
    calls = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
    method = {
        **row,
        "public_test_cases": json.dumps(calls),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": "shift"}),
        "starter_code": "class Solution:\n    def shift(self, x: List[int], k: int): ...",
    }
    evil = {**row, "private_test_cases": packed(Evil())}
    folder = write(tmp_path / "lcb", "test.jsonl", [row, evil])
    write(tmp_path / "lcb", "test2.jsonl", [method])
    records = load_records(f"livecodebench:v1={folder}")
    assert [r["id"] for r in records] == ["livecodebench-0"]
    assert not os.path.exists("/tmp/bench_rewards_evil")
    assert records[0]["tests"]["outputs"] == ["3", "11\n"]
    one, other = load_records(f"livecodebench:v2={folder}")
    assert one == records[0] and other["tests"]["inputs"] == [[[1, 2], 3]]
    solution = (
        "class Solution:\n    def shift(self, x: List[int], k: int) -> List[int]:\n"
        "        return tuple(y + k for y in x)"
    )
    assert judged([one, other], [HONEST["input()"][0], solution]) == [True, True]
    with pytest.raises(SystemExit, match="its splits are v1, v2"):
        load_records(f"livecodebench:v9={folder}")


PLUS = """
import numpy as np

def is_floats(x) -> bool:
    return isinstance(x, float)

def assertion(out, exp, atol):
    assert out == exp

"""


def test_human_eval_and_its_plus(tmp_path):
    prompt = 'from typing import List\n\n\ndef mean(xs: List[int]):\n    """Mean."""\n'
    row = {
        "task_id": "HumanEval/0",
        "prompt": prompt,
        "entry_point": "mean",
        "canonical_solution": "    return sum(xs) / len(xs)\n",
    }
    plain = (
        "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    import random\n"
        "    assert candidate([1, 2]) == 1.5\n    assert abs(candidate([1]) - 1) < 1e-6\n"
        "    for i in range(5):\n        x = random.randint(0, 9)\n"
        "        assert candidate([x, x]) == x\n"
    )
    plus = PLUS + (
        "def check(candidate):\n    inputs = [[[1, 2]], [[inf]], [[3, 4, 5]]]\n"
        "    results = [1.5, inf, 4.0]\n"
        "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
        "        assertion(candidate(*inp), exp, 0)\n"
    )
    computed = plus.replace("    results = [1.5, inf, 4.0]\n", "")
    roots = plus.replace("assertion(candidate(*inp), exp, 0)", "assert _poly(*inp) <= 0.0001")
    texts = [plain, plus, computed, roots, plain.replace("1.5", "1.6")]
    rows = [{**row, "task_id": f"HumanEval/{i}", "test": text} for i, text in enumerate(texts)]
    dropped, folder = Counter(), write(tmp_path / "he", "test.jsonl", rows)
    records = [*read_hub(sources.parse_name(f"humanevalplus={folder}"), dropped=dropped)]
    assert [r["id"][-1] for r in records] == ["0", "1", "2"]
    assert dropped == {"tests with a criterion of their own": 1, code.FAILING: 1}
    assert len(records[0]["tests"]["inputs"]) == 7
    assert records[0]["tests"]["outputs"][:2] == [1.5, 1]
    assert records[1]["tests"] == records[2]["tests"]
    assert records[1]["tests"]["outputs"] == [1.5, {"<float>": "inf"}, 4.0]
    json.dumps([r["tests"] for r in records], allow_nan=False)
    assert code.failing_golds(records) == [None] * 3
    body = "def mean(xs): return sum(xs) / max(1, len(xs)) + {}"
    assert judged(records, [body.format("1e-9")] * 3) == [True] * 3
    assert judged(records, [body.format("1e-3")] * 3) == [False] * 3


def test_mbpp_plus_keeps_tuples_and_sets(tmp_path):
    row = {
        "task_id": 2,
        "prompt": "Join and intersect.",
        "source_file": "x",
        "test_imports": [],
        "test_list": ["assert both((1, 2), {2}) == ((1, 2, 9), {2})"],
        "code": "def helper(a): return a + (9,)\ndef both(a, b): return helper(a), b & set(a)",
        "test": PLUS + "inputs = [[(1, 2), {2}], [(), set()]]\n"
        "results = [((1, 2, 9), {2}), ((9,), set())]\n"
        "for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
        "    assertion(both(*inp), exp, 0)\n",
    }
    folder = write(tmp_path / "mbpp", "test.jsonl", [row])
    records = load_records(f"mbppplus={folder}")
    assert "It must pass: assert both(" in records[0]["problem"]
    assert records[0]["tests"]["outputs"] == [[[1, 2, 9], {"<set>": [2]}], [[9], {"<set>": []}]]
    others = [
        "def both(a, b): return a + (9,), set(a) - (set(a) - b)",
        "def both(a, b): return a + (9,), list(set(a) & b)",
    ]
    assert judged(records * 3, [row["code"], *others]) == [True, True, False]


# --------------------------------------------------------------------------------------------------
# Formulas, the embedded task

FORMULA = re.compile(r"def [fghk] \( x \) : return \( (\d) \* x( \* x)? \+ (\d) \) % 10")


def passes_by_hand(answer: str, tests: dict) -> bool | None:
    """Whether a program of the task's form is right. None for any other."""
    match = FORMULA.fullmatch(answer)
    if not match:
        return None
    values = [(int(match[1]) * x ** (1 + bool(match[2])) + int(match[3])) % 10 for x in range(30)]
    return values == tests["outputs"]


def test_formulas_are_told_apart_by_the_values_shown():
    records = formulas.make_problems("train", 200, seed=1)
    assert records == formulas.make_problems("train", 200, seed=1)
    tokenizer = toy.make_tokenizer(formulas.WORDS)
    careless = 0
    for record in records:
        shown = dict(re.findall(r"[fghk] (\d) = (\d)", record["problem"]))
        outputs = record["tests"]["outputs"]
        assert len(shown) == 5 and all(outputs[int(x)] == int(y) for x, y in shown.items())
        fitting = [
            formulas.program(record["tests"]["fn"], kind, a, b)
            for kind in formulas.KINDS
            for a in range(10)
            for b in range(10)
            if all(formulas.value(kind, a, b, int(x)) == int(y) for x, y in shown.items())
        ]
        assert len(fitting) == 1 and passes_by_hand(fitting[0], record["tests"])
        careless += record["program"] != fitting[0]
        text = build_completion(record["plan"], record["think"], record["program"])
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids and parse_completion(tokenizer.decode(ids))
    assert careless / 200 == pytest.approx(0.25, abs=0.1)  # 3.3 standard errors
    judged_, programs = records[:20], [record["program"] for record in records[:20]]
    assert verify(judged_, programs, [""] * 20) == [
        passes_by_hand(one, record["tests"]) for one, record in zip(programs, judged_)
    ]


def test_formulas_are_trained_end_to_end(tmp_path, monkeypatch):
    """The stages run, each verdict logged is that of `passes_by_hand`, and the counters count."""

    def call(script, flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
        script.main()

    lines = lambda name: [*map(json.loads, (tmp_path / name).read_text().splitlines())]
    call(formulas, f"--out {tmp_path} --sft 300 --train 8 --test 4")
    flags = "--epochs 1 --lr 1e-2 --batch_size 10 --eval_every 0 --val_size 0 --warmup_steps 3"
    call(sft, f"--model {tmp_path}/model --data {tmp_path}/sft.jsonl --out {tmp_path}/sft {flags}")
    limits = "--max_prompt_tokens 60 --max_completion_tokens 60"
    flags = f"--steps 1 --questions 3 --max_plan_tokens 12 --eval_size 0 {limits}"
    data, out = tmp_path / "train.jsonl", tmp_path / "rl"
    call(grpo, f"--model {tmp_path}/sft/model --data {data} --out {out} {flags}")
    tests, seen = {record["id"]: record["tests"] for record in lines("train.jsonl")}, 0
    for question in lines("rl/rollouts.jsonl"):
        for completion in (one for plan in question["plans"] for one in plan["completions"]):
            parsed = parse_completion(completion["text"])
            answer = parsed and re.sub(r"^\\boxed\{ ?| ?\}$", "", parsed.answer)
            by_hand = answer and passes_by_hand(answer, tests[question["id"]])
            if answer and by_hand is not None:
                seen += 1
                assert completion["correct"] == by_hand
    (metrics,) = lines("rl/metrics.jsonl")
    assert seen > 5 and metrics["grader_code_graded"] == 3 * 12
    assert metrics["grader_code_right"] + metrics["grader_code_wrong"] > 0
    flags = f"--model {out}/model --data {tmp_path}/test.jsonl --out {tmp_path}/eval --n 2 {limits}"
    call(evaluation, flags)
    counts = json.loads((tmp_path / "eval/summary.json").read_text())["grader"]
    assert counts["code_graded"] == 4 * 2 and counts["code_judged"] > 0
