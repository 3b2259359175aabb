"""What strangers bring: hostile texts, folders, models and teachers, and a busy machine.

    python -m bench.strangers                      all of it, on a CPU with the toy task
    python -m bench.strangers --only text busy     some of: text folders models two teacher busy

Each input is tried in a process of its own. It is refused, with a sentence and exit code 1, or the
run survives it. It has failed if the process hangs, prints a traceback or a raw control character,
runs or unpickles what a model's folder holds, or changes what is not in --out, and if a run that
should survive does not. Counts are printed, and each failure.
"""

import plumbing.threads  # noqa: F401 -- before torch, which reads what it sets

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

from bench.strangers_inputs import (
    FOLDERS,
    GRPO,
    LINES,
    OWN,
    ROOT,
    SCRIPTS,
    STAGES,
    TEXTS,
    is_plain,
)
from bench.strangers_models import EVERYTHING, MARK, MODELS
from bench.strangers_teacher import BEHAVIOURS, KEY, two_servers, zipped
from plumbing.ranks import fail, printable

SECONDS = 240  # after which a process hangs
HERE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT = {**os.environ, **HERE}
CALM = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
UNSAFE = ".bin", ".pt", ".pth", ".pkl", ".py"  # what no stage may open in a model's folder
failed = 0


def row(ok: bool, kind: str, text: str):
    global failed
    failed += not ok
    print(f"{'ok    ' if ok else 'FAILED'}  {kind:8} {printable(text)}", flush=True)


# --------------------------------------------------------------------------------------------------
# The process that tries one input


def on_model(spoil, stage):
    """The stage on a copy of the base model to which something was done."""

    def enter(work: Path):
        folder = shutil.copytree(work / "base/model", work / "strange")
        for change in spoil if isinstance(spoil, tuple) else (spoil,):
            change(folder)
        sys.addaudithook(lambda event, given: watch(event, given, folder))
        stage(work, "strange")

    return enter


def watch(event: str, given: tuple, folder: Path):
    """Note the opening of what no stage may open."""
    if event == "open" and str(given[0]).endswith(UNSAFE) and "w" not in (given[1] or "r"):
        if str(given[0]).startswith(str(folder)):
            (folder.parent / MARK).touch()


KINDS = {
    "text": TEXTS,
    "folders": FOLDERS,
    "models": {
        f"grpo.py, {name}": (on_model(spoil, STAGES["grpo.py"]), fate)
        for name, (spoil, fate) in MODELS.items()
    } | {
        f"{name}, all at once": (on_model(EVERYTHING, stage), "runs")
        for name, stage in STAGES.items()
    },
}  # fmt: skip


def enter(kind: str, name: str, work: Path):
    """Try one input in this process, and leave."""
    from plumbing import grader
    from plumbing.signals import guarded

    os.environ["HOME"] = str(work)
    begin, wait = grader.pool.start, grader.pool.await_workers
    grader.pool.start = lambda: None  # not before an answer needs them
    grader.pool.await_workers = lambda: (setattr(grader.pool, "start", begin), wait())
    try:
        guarded(lambda: KINDS[kind][name][0](work))
    except SystemExit as stop:
        os._exit(stop.code or 0)


def forked(function, seconds: float = SECONDS) -> tuple[int | None, str]:
    """(exit code, output) of a fork of this process, which has imported everything already."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            try:
                function()
            finally:
                os._exit(99)
        code, began = None, time.time()
        while code is None and time.time() - began < seconds:
            done, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0 if done else 0.02)
        with contextlib.suppress(ProcessLookupError):  # what it has left, or all of it
            os.killpg(pid, signal.SIGKILL)
        if code is None:
            os.waitpid(pid, 0)
        output.seek(0)
        return code, output.read().decode("utf-8", "replace")


# --------------------------------------------------------------------------------------------------
# The process that looks on


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files in a folder, by path."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def repository() -> list:
    """Names, sizes and times of the repository's own files."""
    skip = {".venv", ".git", "__pycache__", ".pytest_cache", ".ruff_cache", "runs"}
    files = [f for f in ROOT.rglob("*") if not skip & set(f.relative_to(ROOT).parts)]
    return sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


def run(command: list, environment: dict, seconds: float = SECONDS) -> tuple[int | None, str]:
    """(exit code, output) of a process. The code is None if it hung."""
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **both)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output.decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0].decode("utf-8", "replace")


def judge(kind: str, name: str, code: int | None, output: str, work: Path, before: dict) -> list:
    """What is wrong with how a process ended, and with what it left."""
    wrong, fate = [], KINDS[kind][name][1]
    if code is None:
        return [f"hung: {output[-200:]!r}"]
    if not is_plain(output):
        wrong.append(f"raw characters: {[c for c in output if not is_plain(c)][:9]!r}")
    if "\nerror: forged" in output and name not in LINES:
        wrong.append("a forged line")
    if ("Traceback" in output) != (fate == "traceback"):
        wrong.append(f"traceback: {output[-600:]!r}")
    refused = code == 1 and "error: " in output
    if not (refused if fate == "refused" else code == 0 or refused and fate == "either"):
        wrong += [f"exit code {code}: {output[-600:]!r}"] * (fate != "traceback")
    if (work / MARK).exists():
        wrong.append("code was run, or unpickled")
    if contents(work / "base") != before:
        wrong.append("base/ has changed")
    users = [f for f in (work / "mine").rglob("*") if f.is_file() and f.name != ".lock"]
    if any(file.read_text(errors="replace") != OWN for file in users):
        wrong.append("a user's file has changed")
    return wrong


def try_one(kind: str, name: str, base: Path) -> tuple[str, list[str]]:
    """(what became of an input, what is wrong)."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(base, work / "base")
        before = contents(work / "base")
        code, output = forked(lambda: enter(kind, name, work))
        wrong = judge(kind, name, code, output, work, before)
        return "failed" if wrong else "refused" if code else "survived", wrong


def check_inputs(kind: str, base: Path, only: str):
    """Try all inputs of a kind."""
    names = [name for name in KINDS[kind] if only in name]
    began, before, results = time.time(), repository(), []
    for name in names:
        results.append(try_one(kind, name, base))
        for reason in results[-1][1]:
            row(False, kind, f"{name}: {reason}")
    row(repository() == before, kind, "the repository's files are as they were")
    counts = Counter(became for became, _ in results)
    shown = ", ".join(f"{counts[name]} {name}" for name in ("refused", "survived", "failed"))
    row(not counts["failed"], kind, f"{len(names)} tried: {shown}; {time.time() - began:.0f} s")


# --------------------------------------------------------------------------------------------------
# Two runs at once


def check_two(base: Path):
    """A second run on the same --out, while the first lives and after it was killed."""
    with tempfile.TemporaryDirectory() as folder, two_servers() as (server, _):
        work = Path(folder)
        asked = work / "asked.jsonl"
        record = {"id": 1, "problem": "<<says nothing>>", "answer": "7", "solution": "3 + 4 = 7"}
        asked.write_text(json.dumps(record) + "\n")
        grpo = ["grpo.py", "--model", base / "model", "--data", base / "train.jsonl", *GRPO]
        grpo += ["--max_prompt_tokens", 400, "--max_completion_tokens", 16, "--out", work / "run"]
        distill = ["distill.py", "--data", asked, "--out", work / "plans.jsonl"]
        url = [*distill, "--teacher", f"{server.url}/v1"]
        after = [*distill, "--teacher", "rule", "--data", base / "sft.jsonl", "--overwrite"]
        second_run("grpo.py", [*grpo, "--steps", 9999], [*grpo, "--overwrite"], work / "run/.lock")
        second_run("distill.py", url, after, work / ".plans.jsonl.lock")
    without = "import fcntl, sys\ndef flock(*_): raise OSError(37, 'No locks available')\n"
    without += "fcntl.flock = flock\nfrom pathlib import Path\nfrom bench.strangers import enter\n"
    without += "enter('text', 'grpo.py, a question shown', Path(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, Path(folder) / "base")
        command = [sys.executable, "-c", without, folder]
        code, output = run(command, {**ENVIRONMENT, **CALM})
    said = [line for line in output.splitlines() if "has no locks" in line]
    row(code == 0 and len(said) == 1, "two", f"without locks: {(said or [output[-500:]])[0]}")


def second_run(name: str, first: list, after: list, lock: Path):
    environment, quiet = {**ENVIRONMENT, **CALM}, dict(stdout=subprocess.DEVNULL)
    first, began = [sys.executable, *map(str, first)], time.time()
    living = subprocess.Popen(first, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, **quiet)
    try:
        while not (lock.exists() and lock.read_text()) and time.time() - began < SECONDS:
            time.sleep(0.1)
        for more in ([], ["--overwrite"], ["--resume"]):
            code, output = run([*first, *more], environment)
            said = f"process {living.pid} on " in output or "already holds a run" in output
            kept_out = code == 1 and said and living.poll() is None
            why = "" if kept_out else output[-500:]
            row(kept_out, "two", f"{name} {' '.join(more)}: a second run is refused {why}")
    finally:
        living.kill()
        living.wait()
    code, output = run([sys.executable, *after], environment)
    why = output[-500:] if code else ""
    row(code == 0, "two", f"{name}: after kill -9 of the first, another begins {why}")


# --------------------------------------------------------------------------------------------------
# A teacher


def check_teacher(seconds: float = 3.0):
    """Time and memory of one request, per behaviour, with --timeout 3."""
    from plumbing.teacher import MAX_REPLY, UNANSWERED, Server

    os.environ["DISTILL_API_KEY"], results = KEY, {}
    for times in (1, 2):
        zipped(times)  # takes memory of the server's, which is in this process
    with two_servers() as (teacher, other):
        flags = dict(teacher=f"{teacher.url}/v1", teacher_model="", max_new_tokens=2048)
        flags |= dict(temperature=0.6, retries=0, timeout=seconds)
        server = Server(types.SimpleNamespace(**flags))
        server.ask("a first one, for what is imported then")
        for name, (_, fate) in BEHAVIOURS.items():
            before, began = reset_peak(), time.time()
            try:
                _, reason = server.ask(f"<<{name}>>")
            except SystemExit as stop:
                reason = f"ends: {stop.code}"
            results[name] = time.time() - began, peak() - before
            kind = next((k for k in (UNANSWERED, "ends") if (reason or "").startswith(k)), "other")
            wanted = {"again": UNANSWERED, "ends": "ends"}.get(fate, "other")
            row(kind == wanted, "teacher", f"{name}: {reason}") if kind != wanted else None
        told = {KEY in head for head in other.heads}
    slowest, largest = (max(results, key=lambda name: results[name][i]) for i in (0, 1))
    row(
        results[slowest][0] < seconds + 1 and results[largest][1] < 100,
        "teacher",
        f"{len(results)} behaviours, replies cut at {MAX_REPLY / 1e6:.0f} MB, --timeout "
        f"{seconds:g}: at most {results[slowest][0]:.1f} s ({slowest}) and "
        f"{results[largest][1]:.0f} MiB ({largest}) per request",
    )
    row(not told, "teacher", f"{len(other.heads)} requests came to another host than --teacher")


def reset_peak() -> float:
    """Forget this process's peak memory, where that can be done. Returns what it has now (MiB)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    from bench.common import peak_mb

    return peak_mb()


# --------------------------------------------------------------------------------------------------
# A busy machine

STEPS = 4
# As if plumbing/threads.py were not there.
BEFORE = "import sys, types\nsys.modules['plumbing.threads'] = types.ModuleType('threads')\n"
TRAIN = "import sys\nsys.path.insert(0, '.')\nimport grpo\ngrpo.main()"


def check_busy(base: Path, rounds: int = 2):
    """Seconds per step without and with plumbing/threads.py, alone and beside a busy loop."""
    ours = ("OMP_", "GOMP_", "KMP_", "MKL_")
    clean = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(ours)}
    flags = ["--model", base / "model", "--data", base / "train.jsonl", "--steps", STEPS]
    flags += "--questions 8 --eval_size 0 --save_every 0 --show_every 0 --overwrite".split()
    flags += "--max_prompt_tokens 100 --max_plan_tokens 40 --max_completion_tokens 128".split()
    seconds: dict[tuple, list[float]] = {}
    for _ in range(rounds):
        for loops in (0, 1):
            for name, head in (("without", BEFORE), ("with", "")):
                spin = [sys.executable, "-c", "while True: pass"]
                busy = [subprocess.Popen(spin) for _ in range(loops)]
                with tempfile.TemporaryDirectory() as out:
                    command = [sys.executable, "-c", head + TRAIN, *flags, "--out", f"{out}/run"]
                    code, output = run(command, clean, 900)
                    log = Path(out) / "run/metrics.jsonl"
                    lines = log.read_text().splitlines() if log.exists() else []
                for loop in busy:
                    loop.kill()
                    loop.wait()
                if len(lines) < 2:
                    row(False, "busy", f"{name}, {loops} loops: {code} {output[-300:]}")
                    return
                steps = [json.loads(line)["seconds"] for line in lines[1:]]  # not the first one
                shown = ", ".join(f"{step:.2f}" for step in steps)
                print(f"        {name}, {loops} busy loops: {shown} s", flush=True)
                seconds.setdefault((name, loops), []).extend(steps)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    for loops in (0, 1):
        before, after = (median[name, loops] for name in ("without", "with"))
        beside = "beside a busy loop" if loops else "alone"
        row(True, "busy", f"{os.cpu_count()} cores, a step {beside}: {before:.2f} s without "
            f"plumbing/threads.py, {after:.2f} s with it")


# --------------------------------------------------------------------------------------------------
# Main


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    kinds = [*KINDS, "two", "teacher", "busy"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds [all]")
    parser.add_argument("--named", default="", help="of these, the inputs whose names hold this")
    parser.error = fail
    args = parser.parse_args()
    os.environ.update(HERE)
    os.chdir(ROOT)
    for script in SCRIPTS:
        importlib.import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        make = "from pathlib import Path\nfrom bench.strangers_inputs import prepare\n"
        make += f"prepare(Path({folder!r}))"
        code, output = run([sys.executable, "-c", make], {**ENVIRONMENT, **CALM})
        if code:
            fail(f"the toy data could not be made: {output[-2000:]}")
        base = Path(folder) / "base"
        for kind in args.only:
            if kind in KINDS:
                check_inputs(kind, base, args.named)
            elif kind == "teacher":
                check_teacher()
            else:
                globals()[f"check_{kind}"](base)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
