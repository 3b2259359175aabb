"""Distillation: what is kept, resuming, a local teacher, and a real HTTP server that fails before it answers."""
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import distill
from checkpoint import STOPPED
from conftest import ROOT
from data.toy import make_model, make_problems, make_tokenizer, plan_of
from distill import finished_ids, rejection


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, flags)])
    distill.main()


@pytest.fixture
def problems(tmp_path):
    records = make_problems("train", 12, facts=(4, 5))
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, records


@pytest.mark.parametrize("plan, reason", [
    ("", "empty"), ("word " * 31, "longer than 30 words"), ("first <think> then", "template tags in the plan"),
    ("Add them to get 42.", "gives the answer away"), ("Add both numbers, then check the parity.", None)])
def test_rejection(plan, reason):
    assert rejection(plan, "42", 30) == reason


def test_rule_teacher_writes_plan_records(problems, tmp_path, monkeypatch, capsys):
    path, records = problems
    run(monkeypatch, "--teacher", "rule", "--data", path, "--out", tmp_path / "plans.jsonl")
    plans = read(tmp_path / "plans.jsonl")
    assert [p["id"] for p in plans] == [r["id"] for r in records]
    assert all(p["plan"] == plan_of(r["solution"]) and p["think"] == r["solution"] for p, r in zip(plans, records))
    assert "12 plans kept, 0 dropped" in capsys.readouterr().out


def test_a_stopped_run_goes_on_without_losing_or_repeating(problems, tmp_path, monkeypatch, capsys):
    path, records = problems
    out, dropped = tmp_path / "plans.jsonl", tmp_path / "plans.dropped.jsonl"
    run(monkeypatch, "--teacher", "rule", "--data", path, "--out", out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:30])  # killed in mid-write of the fifth record
    dropped.write_text(json.dumps({"id": records[7]["id"], "reason": "empty"}) + "\n")
    with pytest.raises(SystemExit, match="already holds records.*--resume"):
        run(monkeypatch, "--teacher", "rule", "--data", path, "--out", out)
    run(monkeypatch, "--teacher", "rule", "--data", path, "--out", out, "--resume")
    assert sorted(p["id"] for p in read(out)) == sorted(r["id"] for r in records if r is not records[7])
    assert "7 plans kept, 0 dropped, 5 finished before" in capsys.readouterr().out


def test_ctrl_c_ends_with_the_code_of_a_stopped_run(problems, tmp_path, monkeypatch, capsys):
    """A script that goes on to SFT must not take a part of the plans for all."""
    async def interrupted(records, config, report):
        report(records[0], "add them")
        raise KeyboardInterrupt
    monkeypatch.setattr(distill, "ask_rule", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--teacher", "rule", "--data", problems[0], "--out", tmp_path / "plans.jsonl")
    assert stop.value.code == STOPPED
    assert "1 plans kept, 0 dropped, 11 left to ask" in capsys.readouterr().out


def test_ctrl_c_is_heard_by_a_teacher_in_this_process(problems, tmp_path, monkeypatch):
    read = []

    def plan_of(solution):
        read.append(solution)
        if len(read) == 3:
            signal.raise_signal(signal.SIGINT)
        return "add them"
    monkeypatch.setattr(distill, "plan_of", plan_of)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--teacher", "rule", "--data", problems[0], "--out", tmp_path / "plans.jsonl")
    assert stop.value.code == STOPPED and 3 <= len(read) <= 4


def test_no_plan_at_all_is_a_failure_and_leaves_nothing_in_the_way(problems, tmp_path, monkeypatch):
    command = ("--teacher", "rule", "--data", problems[0], "--out", tmp_path / "plans.jsonl")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="no plan was kept: .*plans.dropped.jsonl holds"):
        patch.setattr(distill, "plan_of", lambda solution: "")
        run(patch, *command)
    (tmp_path / "plans.dropped.jsonl").write_text("")  # as a run that failed at its first record leaves them
    run(monkeypatch, *command)


def test_finished_ids_keep_what_is_whole(tmp_path):
    (tmp_path / "a").write_text('{"id": "1"}\n{"id": "2')
    assert finished_ids(tmp_path / "a", tmp_path / "b") == {"1"}
    assert (tmp_path / "a").read_text() == '{"id": "1"}\n'


def test_rule_teacher_refuses_other_tasks(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text(json.dumps({"problem": "1+1", "answer": "2", "solution": "One and one."}) + "\n")
    with pytest.raises(SystemExit, match="--teacher rule reads the toy task only"):
        run(monkeypatch, "--teacher", "rule", "--data", tmp_path / "p.jsonl", "--out", tmp_path / "plans.jsonl")


def test_local_teacher_uses_the_sampling_loop(problems, tmp_path, monkeypatch, capsys):
    """A random model writes nonsense; every record must be accounted for, kept or dropped."""
    path, records = problems
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    run(monkeypatch, "--teacher", tmp_path / "teacher", "--data", path, "--out", tmp_path / "plans.jsonl",
        "--max_new_tokens", 12, "--concurrency", 5)
    seen = read(tmp_path / "plans.jsonl") + read(tmp_path / "plans.dropped.jsonl")
    assert sorted(r["id"] for r in seen) == sorted(r["id"] for r in records)


def test_two_ranks_share_the_records_and_a_killed_run_loses_and_repeats_none(problems, tmp_path):
    path, records = problems
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    out, dropped = tmp_path / "plans.jsonl", tmp_path / "plans.dropped.jsonl"
    record = lambda n: json.dumps({"id": records[n]["id"], "reason": "of an earlier run"}) + "\n"
    # What a killed run on three ranks left: rank 0 joined once, rank 1 was cut off in mid-write, rank 2 had two.
    dropped.write_text(record(0) + record(1))
    dropped.with_name("plans.dropped.rank1.jsonl").write_text(record(1) + record(4)[:20])
    dropped.with_name("plans.dropped.rank2.jsonl").write_text(record(5) + record(2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "distill.py",
               "--teacher", tmp_path / "teacher", "--data", path, "--out", out, "--max_new_tokens", 12, "--concurrency", 2,
               "--resume"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(", 4 finished before") == 1
    seen = read(out) + read(dropped)
    assert sorted(r["id"] for r in seen) == sorted(r["id"] for r in records)
    assert [r["id"] for r in read(dropped)] == [r["id"] for r in records if r["id"] in {d["id"] for d in read(dropped)}]
    assert sum(r.get("reason") == "of an earlier run" for r in seen) == 4
    assert not list(tmp_path.glob("*.rank*")) and not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------
# A server

class Teacher(BaseHTTPRequestHandler):
    """Speaks the OpenAI protocol. `script` holds status codes to answer with, in order; then 200 for ever."""
    script, keys, asked = [], [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Teacher.keys.append(self.headers.get("Authorization"))
        Teacher.asked.append(body)
        status = Teacher.script.pop(0) if Teacher.script else 200
        content = "<think>\nhm\n</think>\nList what is needed, then compute it."
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                 "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
                 "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        data = json.dumps(reply if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    Teacher.script, Teacher.keys, Teacher.asked = [], [], []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    httpd.handle_error = lambda *args: None  # distill.py may hang up before it has the whole answer: no traceback for that
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    async def no_pause(seconds):
        return None
    monkeypatch.setattr(distill.asyncio, "sleep", no_pause)
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()


def test_server_teacher_retries_and_keeps_the_plan_after_the_thinking(problems, tmp_path, monkeypatch, server):
    path, records = problems
    monkeypatch.setenv("DISTILL_API_KEY", "secret-of-mine")
    Teacher.script = [429, 503, 500, 429]
    run(monkeypatch, "--teacher", server, "--teacher_model", "big", "--data", path, "--out", tmp_path / "plans.jsonl")
    plans = read(tmp_path / "plans.jsonl")
    assert len(plans) == 12 and {p["plan"] for p in plans} == {"List what is needed, then compute it."}
    assert len(Teacher.asked) == 16 and {body["model"] for body in Teacher.asked} == {"big"}
    assert set(Teacher.keys) == {"Bearer secret-of-mine"}
    assert records[0]["solution"] in json.dumps(Teacher.asked[0]) or len(Teacher.asked) > 12


def test_the_users_hub_token_is_never_sent(problems, tmp_path, monkeypatch, server):
    monkeypatch.delenv("DISTILL_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    run(monkeypatch, "--teacher", server, "--data", problems[0], "--out", tmp_path / "plans.jsonl")
    assert "hf_private" not in json.dumps(Teacher.keys)


def test_a_server_that_stays_down_leaves_the_records_for_a_resume(problems, tmp_path, monkeypatch, server, capsys):
    flags = ("--teacher", server, "--data", problems[0], "--out", tmp_path / "plans.jsonl", "--concurrency", 1, "--retries", 1)
    Teacher.script = [503] * 6  # the first three records, two attempts each
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags)
    assert "3 unanswered (HTTP 503): run again with --resume" in capsys.readouterr().out
    assert len(read(tmp_path / "plans.jsonl")) == 9
    run(monkeypatch, *flags, "--resume")
    assert len(read(tmp_path / "plans.jsonl")) == 12 and len({p["id"] for p in read(tmp_path / "plans.jsonl")}) == 12


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_model_ends_the_run_with_one_sentence(problems, tmp_path, monkeypatch, server, status):
    Teacher.script = [status] * 99
    with pytest.raises(SystemExit, match=f"answers {status}: check the base URL, --teacher_model and DISTILL_API_KEY"):
        run(monkeypatch, "--teacher", server, "--data", problems[0], "--out", tmp_path / "plans.jsonl")


def test_the_default_teacher_needs_a_gpu():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, str(ROOT / "distill.py")], capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "no GPU here" in result.stderr and "make demo" in result.stderr
