"""Distillation: what is kept, resuming, a local teacher, and an HTTP server that fails first."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import distill
from conftest import ROOT
from data.code import ANSWER
from data.code import judge as code_judge
from data.toy import make_model, make_problems, make_tokenizer, plan_of
from data.verifiers import boxed
from distill import Config, rejection
from plumbing import signals, teacher
from plumbing.records import Records
from plumbing.signals import STOPPED
from rewards import build_completion, extract_answer

CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def read(path):
    """The records of a file, which does not exist before its first one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def out(tmp_path):
    return tmp_path / "plans.jsonl"


@pytest.fixture
def dropped(tmp_path):
    return tmp_path / "plans.dropped.jsonl"


@pytest.fixture
def problems(tmp_path):
    records = make_problems("train", 12, facts=(4, 5))
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, records


@pytest.fixture
def local(tmp_path):
    """A local teacher with random weights."""
    tokenizer, path = make_tokenizer(), tmp_path / "teacher"
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run(problems, out, monkeypatch):
    """run(flag=value, ...): the script, with the problems as --data and the rule teacher."""

    def call(**flags):
        flags = {"teacher": "rule", "data": problems[0], "out": out, **flags}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["distill.py", *words])
        distill.main()

    return call


class Exit(BaseException):
    """Stands for os._exit: nothing of a script's own runs after it."""


def exit_code(monkeypatch, main):
    """The code that a guarded script leaves with."""

    def leave(code):
        raise Exit(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    with pytest.raises((Exit, SystemExit)) as left:
        signals.guarded(main)
    return left.value.args[0]


REJECTED = {
    "": "empty",
    "word " * 31: "longer than 30 words",
    "first <think> then": "template tags in the plan",
    "Add them to get 42.": "gives the answer away",
    "Add both numbers, then check the parity.": None,
}


@pytest.mark.parametrize("plan, reason", REJECTED.items())
def test_rejection(plan, reason):
    assert rejection(plan, {"answer": "42"}, 30) == reason


def test_rule_teacher_writes_plan_records(problems, run, out, capsys):
    run()
    plans, records = read(out), problems[1]
    assert [p["id"] for p in plans] == [r["id"] for r in records]
    for plan, record in zip(plans, records):
        assert plan["plan"] == plan_of(record["solution"]) and plan["think"] == record["solution"]
    assert "12 plans kept, 0 dropped" in capsys.readouterr().out


def test_a_program_is_answered_with_itself_and_not_with_the_gold_that_stands_for_all(
    problems, run, out, dropped, monkeypatch
):
    """Records of `code` have "a program that passes its tests" for a gold, and tests."""
    program = "print(sum(map(int, input().split())))"
    block = lambda program: f"```python\n{program}\n```"
    tests = {"fn": None, "inputs": ["3 4\n", "1 1\n"], "outputs": ["7\n", "2\n"]}
    solutions = {
        "good": f"First we might print(7). No: add them.\n{block(program)}\n",
        "alone": program,
        "in the midst": f"Take\n{block(program)}\nwhich adds them.",
        "wrong": f"It is 7.\n{block('print(7)')}",
        "words": "Add the two numbers.",
        "no tests": block(program),
    }
    code = {"problem": "Add two numbers.", "answer": ANSWER, "verifier": "code", "tests": tests}
    rows = [{**code, "id": name, "solution": text} for name, text in solutions.items()]
    del rows[-1]["tests"]
    problems[0].write_text("".join(json.dumps(row) + "\n" for row in [*rows, problems[1][0]]))
    monkeypatch.setattr(distill, "plan_of", lambda record: "Read, then add.")
    run()
    plans = {plan.pop("id"): plan for plan in read(out)}
    assert list(plans) == ["good", "alone", "in the midst", problems[1][0]["id"]]
    thoughts = ["First we might print(7). No: add them.", program, solutions["in the midst"]]
    for (name, plan), thought in zip(plans.items(), thoughts):
        assert plan["verifier"] == "code" and plan["answer"] == block(program)
        assert plan["think"] == thought, name
        target = build_completion(plan["plan"], plan["think"], plan["answer"], boxed(plan))
        assert code_judge([code], [extract_answer(target, boxed(plan))]) == [True]
    assert {row["id"]: row["reason"] for row in read(dropped)} == dict.fromkeys(
        ("wrong", "words", "no tests"), "no program in the CoT that passes the tests"
    )


FLOODS = {"x" * 601: "longer than 30 words", "Add \ud800.": "control characters in the plan"}
FLOODS |= {"Add\x1b[2J.": "control characters in the plan", "Add\r\n\tthem. \u200f": None}


@pytest.mark.parametrize("plan, reason", FLOODS.items())
def test_plans_that_are_no_text_for_a_tokenizer_are_dropped(plan, reason):
    assert rejection(plan, {"answer": "42"}, 30) == reason


def test_a_stopped_run_goes_on_without_losing_or_repeating(problems, run, out, dropped, capsys):
    run()
    records, lines = problems[1], out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:30])  # killed in mid-write of the fifth record
    dropped.write_text(json.dumps({"id": records[7]["id"], "reason": "empty"}) + "\n")
    with pytest.raises(SystemExit, match="already holds records.*--resume"):
        run()
    run(resume=True)
    expected = sorted(r["id"] for r in records if r is not records[7])
    assert sorted(p["id"] for p in read(out)) == expected
    assert "7 plans kept, 0 dropped, 5 finished before" in capsys.readouterr().out


def test_records_dropped_by_an_earlier_run_are_not_mixed_in(problems, run, dropped):
    dropped.write_text(json.dumps({"id": problems[1][0]["id"], "reason": "empty"}) + "\n")
    with pytest.raises(SystemExit, match="plans.dropped.jsonl already holds records"):
        run()
    run(overwrite=True)
    assert not read(dropped)


def test_a_cot_with_template_tags_is_dropped_before_it_is_asked_for(
    problems, run, out, dropped, monkeypatch
):
    path, records = problems
    tagged = {**records[3], "solution": "A </think> B"}
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records[:3], tagged, *records[4:]]))
    asked = []
    monkeypatch.setattr(distill, "plan_of", lambda solution: asked.append(solution) or "add them")
    run()
    assert len(read(out)) == len(asked) == 11
    assert read(dropped) == [{"id": tagged["id"], "reason": "template tags in the CoT", "plan": ""}]


def test_ctrl_c_ends_with_the_code_of_a_stopped_run(run, monkeypatch, capsys):
    """A script that goes on to SFT must not take a part of the plans for all."""

    def interrupted(records, config):
        yield records[0], "add them", None
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "ask_rule", interrupted)
    assert exit_code(monkeypatch, run) == STOPPED
    assert "1 plans kept, 0 dropped, 11 left to ask" in capsys.readouterr().out


def test_ctrl_c_is_heard_by_a_teacher_in_this_process(run, monkeypatch):
    read = []

    def plan_of(solution):
        read.append(solution)
        if len(read) == 3:
            signal.raise_signal(signal.SIGINT)
        return "add them"

    monkeypatch.setattr(distill, "plan_of", plan_of)
    assert exit_code(monkeypatch, run) == STOPPED and len(read) == 3


def test_no_plan_at_all_is_a_failure_and_leaves_nothing_in_the_way(run, dropped, monkeypatch):
    said = pytest.raises(SystemExit, match="no plan was kept: .*plans.dropped.jsonl holds")
    with monkeypatch.context() as patch, said:
        patch.setattr(distill, "plan_of", lambda solution: "")
        run()
    dropped.write_text("")  # as after a run that failed at its first record
    run()


def test_finished_ids_keep_what_is_whole(tmp_path):
    (tmp_path / "a").write_text('{"id": "1"}\n{"id": "2')
    assert Records(tmp_path / "a", Config(resume=True)).begin() == {("1",)}
    assert Records(tmp_path / "b", Config(resume=True)).begin() == set()
    assert (tmp_path / "a").read_text() == '{"id": "1"}\n'


def test_rule_teacher_refuses_other_tasks(run, tmp_path):
    record = {"problem": "1+1", "answer": "2", "solution": "One and one."}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit, match="--teacher rule reads the embedded tasks only"):
        run(data=tmp_path / "p.jsonl")


def test_local_teacher_uses_the_sampling_loop(problems, run, local, out, dropped):
    """A random model writes nonsense; every record must be accounted for, kept or dropped."""
    run(teacher=local, max_new_tokens=12, concurrency=5)
    seen = read(out) + read(dropped)
    assert sorted(r["id"] for r in seen) == sorted(r["id"] for r in problems[1])


def test_two_ranks_share_the_records_and_go_on_where_another_number_stopped(
    problems, local, out, dropped, tmp_path
):
    path, records = problems
    line = lambda n: json.dumps({"id": records[n]["id"], "reason": "of an earlier run"}) + "\n"
    dropped.write_text(line(0) + line(5) + line(1)[:20])  # killed in mid-write of the third record
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["distill.py", "--teacher", local, "--data", path, "--out", out, "--resume"]
    command += ["--max_new_tokens", "12", "--concurrency", "2"]
    result = subprocess.run(command, cwd=ROOT, env=CPU, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(", 2 finished before") == 1
    seen = read(out) + read(dropped)
    assert sorted(r["id"] for r in seen) == sorted(r["id"] for r in records)
    assert sum(r.get("reason") == "of an earlier run" for r in seen) == 2
    assert not list(tmp_path.glob("*.rank*")) and not list(tmp_path.glob("*.tmp"))


# --------------------------------------------------------------------------------------------------
# A server


class Teacher(BaseHTTPRequestHandler):
    """Speaks the OpenAI protocol.

    `script` holds, in order, what to answer with: a status code, a pair of one and a body, or a
    function of the request handler that answers as it likes; then 200 for ever.
    """

    script, keys, asked, headers_sent = [], [], [], {}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Teacher.keys.append(self.headers.get("Authorization"))
        Teacher.asked.append(body)
        answer = Teacher.script.pop(0) if Teacher.script else 200
        if callable(answer):
            with contextlib.suppress(OSError):  # the other side hung up
                answer(self)
            return
        status, data = answer if isinstance(answer, tuple) else (answer, reply())
        if status != 200 and not isinstance(answer, tuple):
            data = b'{"error": "no"}'
        self.send_response(status)
        for name, value in Teacher.headers_sent.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def reply(content="<think>\nhm\n</think>\nList what is needed, then compute it."):
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return json.dumps({**body, "choices": choices, "usage": usage}).encode()


@pytest.fixture
def server(monkeypatch):
    Teacher.script, Teacher.keys, Teacher.asked, Teacher.headers_sent = [], [], [], {}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    httpd.daemon_threads = True
    # The client may hang up before it has the whole answer: no traceback for that.
    httpd.handle_error = lambda *args: None
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(teacher, "sleep", lambda seconds: Teacher.pauses.append(seconds))
    Teacher.pauses = []
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()


def test_server_teacher_retries_and_keeps_the_plan_after_the_thinking(
    problems, run, out, server, monkeypatch
):
    monkeypatch.setenv("DISTILL_API_KEY", "secret-of-mine")
    Teacher.script = [429, 503, 500, 429]
    run(teacher=server, teacher_model="big")
    plans, solution = read(out), problems[1][0]["solution"]
    assert len(plans) == 12
    assert {p["plan"] for p in plans} == {"List what is needed, then compute it."}
    assert len(Teacher.asked) == 16 and {body["model"] for body in Teacher.asked} == {"big"}
    assert set(Teacher.keys) == {"Bearer secret-of-mine"}
    assert solution in json.dumps(Teacher.asked[0]) or len(Teacher.asked) > 12


def test_the_users_hub_token_is_never_sent(run, server, monkeypatch):
    monkeypatch.delenv("DISTILL_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    run(teacher=server)
    assert "hf_private" not in json.dumps(Teacher.keys)


def test_a_server_that_stays_down_leaves_the_records_for_a_resume(run, out, server, capsys):
    Teacher.script = [503] * 6  # the first three records, two attempts each
    flags = dict(teacher=server, concurrency=1, retries=1)
    with pytest.raises(SystemExit):
        run(**flags)
    assert "3 unanswered (HTTP 503: no): run again with --resume" in capsys.readouterr().out
    assert len(read(out)) == 9
    run(**flags, resume=True)
    assert len(read(out)) == 12 and len({p["id"] for p in read(out)}) == 12


@pytest.mark.parametrize("status", [301, 401, 402, 403, 404, 405, 451])
def test_what_concerns_the_account_or_the_address_ends_the_run_with_the_servers_words(
    run, out, dropped, server, status
):
    words = {"error": {"message": "no credit\x1b[2J left " + "x" * 9000}}
    Teacher.script = [200, 200] + [(status, json.dumps(words).encode())] * 99
    Teacher.headers_sent = {"Location": server.replace("/v1", "/elsewhere")}
    with pytest.raises(SystemExit) as stop:
        run(teacher=server, concurrency=1)
    said = stop.value.code
    assert f"answers {status}" in said and "no credit [2J left xxx" in said and "--resume" in said
    assert "check the base URL, --teacher_model and DISTILL_API_KEY" in said
    assert len(said) < 900 and said.isprintable()
    assert len(read(out)) == 2 and not read(dropped)  # none is written off
    Teacher.script = []
    run(teacher=server, concurrency=1, resume=True)
    assert len(read(out)) == 12


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_server_will_not_take_is_dropped_with_its_words(
    run, out, dropped, server, status
):
    Teacher.script = [(status, b'{"object": "error", "message": "too many tokens"}')]
    run(teacher=server)
    [record] = read(dropped)
    assert record["reason"] == f"refused by the server (HTTP {status}): too many tokens"
    assert len(read(out)) == 11


def test_content_in_parts_is_joined_and_other_content_is_dropped(run, out, dropped, server):
    text = lambda words: {"type": "text", "text": words}
    contents = [[text("List them, "), {"type": "image_url"}, text("add them.")]]
    contents += [{"plan": "x"}, 7, None, ["x", text(3)]]
    Teacher.script = [(200, reply(content)) for content in contents]
    run(teacher=server, concurrency=1)
    assert read(out)[0]["plan"] == "List them, add them."
    reasons = ["content of type dict, not text", "content of type int, not text", "empty", "empty"]
    assert [record["reason"] for record in read(dropped)] == reasons


BODIES = [b"not JSON", b"[1]", b'{"choices": []}', b'{"choices": 3}', b"\xff" * 9, b"[" * 99999]


@pytest.mark.parametrize("body", BODIES)
def test_a_reply_without_choices_is_asked_for_again(run, out, server, body):
    Teacher.script = [(200, body)]
    run(teacher=server)
    assert len(read(out)) == 12 and len(Teacher.asked) == 13


def test_a_server_that_drips_meets_the_time_limit(run, server, capsys):
    gone = threading.Event()

    def drip(start):
        def answer(handler):
            handler.wfile.write(start)
            while not gone.wait(0.1):
                handler.wfile.write(b"x")
                handler.wfile.flush()

        return answer

    # One drips in its head, one in its body.
    Teacher.script = [drip(b"HTTP/1.1 200 OK\r\nX-Slow: "), drip(b"HTTP/1.1 200 OK\r\n\r\n")]
    run_in_time = threading.Timer(60, gone.set)  # the test fails instead of hanging
    run_in_time.start()
    try:
        with pytest.raises(SystemExit) as stop:
            run(teacher=server, timeout=5, retries=0, concurrency=2)
    finally:
        in_time = not gone.is_set()
        gone.set()
        run_in_time.cancel()
    assert in_time and "2 records are unanswered: run again with --resume" in stop.value.code
    assert "10 plans kept, 0 dropped, 2 left to ask" in (said := capsys.readouterr().out)
    assert "2 unanswered (no answer within 5 s): run again with --resume" in said


def test_a_reply_of_many_megabytes_is_cut_off(run, server, monkeypatch, capsys):
    monkeypatch.setattr(teacher, "MAX_REPLY", 5000)
    sent = []

    def flood(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1000):
            sent.append(handler.wfile.write(b"x" * 65536))

    Teacher.script = [flood]
    with pytest.raises(SystemExit):
        run(teacher=server, retries=0)
    assert "1 unanswered (a reply of more than 5000 bytes)" in capsys.readouterr().out
    assert len(sent) < 1000


def test_retry_after_is_honoured_up_to_a_minute(run, server):
    for header, least, most in (("7", 7, 7.01), ("3600", 60, 60), ("soon", 0.5, 1.5)):
        Teacher.script, Teacher.headers_sent, Teacher.pauses = [429], {"Retry-After": header}, []
        run(teacher=server, overwrite=True)
        assert len(Teacher.pauses) == 1 and least <= Teacher.pauses[0] <= most


def test_ctrl_c_leaves_at_once_with_what_is_finished(problems, out, server):
    """Requests that are still going on keep nobody waiting."""
    gone = threading.Event()
    Teacher.script = [200, 200] + [lambda handler: gone.wait(100)] * 99
    command = [sys.executable, ROOT / "distill.py", "--teacher", server, "--data", problems[0]]
    command += ["--out", out, "--concurrency", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=CPU)
    try:
        while process.poll() is None and (len(read(out)) < 2 or len(Teacher.asked) < 4):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        gone.set()
    assert process.returncode == STOPPED and len(read(out)) == 2
    assert "2 plans kept, 0 dropped, 10 left to ask" in said and "--resume goes on" in said


def test_an_address_without_a_host_is_refused(run):
    with pytest.raises(SystemExit, match="is no address"):
        run(teacher="http://")


def test_the_default_teacher_is_too_large_to_load_here():
    command = [sys.executable, ROOT / "distill.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=CPU)
    assert result.returncode == 1
    assert "too many for one GPU" in result.stderr and "make demo" in result.stderr
