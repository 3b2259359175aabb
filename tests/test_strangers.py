"""What strangers bring: text that would take over a terminal, folders that no run should fill."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from bench import strangers_inputs as strange
from bench.strangers_inputs import FOLDERS, LINES, OUTS, OWN, TEXTS, is_plain
from conftest import ROOT
from data.sources import load_records
from plumbing import folder
from plumbing.folder import LOCK, check_evaluation, check_run, hold
from plumbing.log import show_record
from plumbing.ranks import fail, printable
from plumbing.records import Records

# Clears the screen, sets the window's title, goes back to the line's start, rings, turns the
# writing direction around, breaks a line, and is no character at all.
HOSTILE = "a\x1b[2J\x1b]0;owned\x07b\rc\x08d\x9b31me\u202ef\u2066g\u2028h\u061ci\x00j\x7f"
ESCAPED = (
    r"a\x1b[2J\x1b]0;owned\x07b\rc\x08d\x9b31me\u202ef\u2066g\u2028h\u061ci\x00j\x7f"
)


# --------------------------------------------------------------------------------------------------
# Text


def test_unsafe_characters_become_escapes_and_all_others_stay():
    assert printable(HOSTILE) == ESCAPED
    assert printable("x\ud800y\U000e0041\ufff9") == r"x\ud800y\U000e0041\ufff9"
    plain = "tabs\tand\nlines, π ≈ 3.14, 中文, العربية, 👍, 👩\u200d🔬"
    assert printable(plain) == plain
    assert not is_plain(HOSTILE) and is_plain(ESCAPED)
    assert is_plain(printable(strange.TEXT))


# These import much, or change the terminal. `python -m bench.strangers` tries all.
LEFT_OUT = "a terminal of ASCII", "data.gym, a task", "data.sources, a column"


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in LEFT_OUT])
def test_no_place_prints_foreign_text_raw(name, work, tried):
    enter, fate = TEXTS[name]
    code, printed = tried(lambda: enter(work))
    assert is_plain(printed) and (name in LINES or "\nerror: forged" not in printed)
    assert ("Traceback" in printed) == (fate == "traceback"), printed
    assert code in {"refused": [1], "runs": [0], "either": [0, 1], "traceback": [1]}[fate], printed


def test_each_place_does_print_what_it_was_given(work, tried):
    """Or else the test before would say nothing."""
    for name in ("grpo.py, a question shown", "the demo's question", "eval.py --compare"):
        assert r"\x1b[2J" in tried(lambda: TEXTS[name][0](work))[1], name


def test_a_problem_cannot_forge_lines_of_the_log(capsys):
    completion = {"text": "x\nstep 9", "reward": {"total": 1.0}, "advantage": 0.5}
    plans = [{"score": 1.0, "completions": [completion]}]
    show_record({"problem": "a\nstep 9", "answer": "b\rstep 9", "plans": plans})
    assert all(line.startswith("  | ") for line in capsys.readouterr().out.splitlines())
    with pytest.raises(SystemExit) as stop:
        fail("a\nstep 9")
    assert stop.value.code == r"error: a\nstep 9"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_warnings_logs_and_tracebacks_are_plain_on_any_terminal(encoding):
    """A script's process: a library's own handler, a warning, Chinese text, and an exception."""
    code = (
        "import logging, sys, warnings\n"
        "from plumbing.signals import guarded\n"
        "from plumbing.ranks import print0\n"
        "logging.basicConfig()\n"
        "def main():\n"
        f"    warnings.warn({HOSTILE!r})\n"
        f"    logging.getLogger('library').warning('%s', '\\x1b[1m' + {HOSTILE!r})\n"
        "    print0('计划 π')\n"
        f"    raise ValueError({HOSTILE!r})\n"
        "guarded(main)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, **both)
    printed = done.stdout.decode(encoding)
    assert done.returncode == 1 and is_plain(printed) and printed.count(ESCAPED) >= 3, printed
    assert "WARNING:library:" + ESCAPED in printed  # without the library's own colour
    assert ("计划 π" if encoding == "utf-8" else r"\u8ba1\u5212") in printed


def test_an_error_that_quotes_data_is_plain(tmp_path):
    record = {"id": HOSTILE, "problem": "p", "answer": [HOSTILE], "more": "\ud800"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    for load in (lambda: load_records(str(tmp_path / "data.jsonl")), lambda: fail(HOSTILE)):
        with pytest.raises(SystemExit) as stop:
            load()
        assert is_plain(stop.value.code)


def test_half_a_character_in_data_is_refused_with_its_place(tmp_path):
    """A tokenizer would raise at it, in the middle of a run."""
    file = tmp_path / "data.jsonl"
    rows = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "1", "hint": "\udc80"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="line 2: hint holds half a character"):
        load_records(str(file))


# --------------------------------------------------------------------------------------------------
# Folders


def begin(check, out):
    """What a training or an evaluation does before it writes."""
    flags = dict(out=str(out), data="toy:train", model="m", overwrite=True, resume=False)
    check(types.SimpleNamespace(**flags))
    hold(Path(out) / LOCK)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_another_purpose_is_refused_and_stays_as_it_was(name, work, monkeypatch):
    script, _, out = name.partition(" --out ")
    make, monkey = OUTS[out][0], monkeypatch
    monkey.chdir(ROOT)
    monkey.setenv("HOME", os.environ["HOME"])
    monkey.setattr(sys, "argv", [])
    place = make(work)
    users = {file: file.read_text() for file in work.glob("mine/**/*") if file.is_file()}
    with pytest.raises(SystemExit) as stop:
        if script in ("grpo", "eval"):
            begin(check_run if script == "grpo" else check_evaluation, place)
        else:
            getattr(strange, f"run_{script}")(work, out=place)
    said = stop.value.code
    assert said.startswith("error: ") and is_plain(said) and said.count("\n") == 0
    assert {file: file.read_text() for file in users} == users
    assert all(text == OWN for text in users.values())


@pytest.mark.parametrize("out, reason", [
    (".", "holds a repository"), (str(ROOT), "holds a repository"), ("/", "more than a run"),
    ("~", "more than a run"), ("", "is empty"), (" ", "is empty"),
])
@pytest.mark.parametrize("check", [check_run, check_evaluation])
def test_the_true_reason_is_named(check, out, reason, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = str(Path.home()) if out == "~" else out
    flags = dict(out=out, data="toy:train", model="m", overwrite=True, resume=False)
    with pytest.raises(SystemExit, match=reason):
        check(types.SimpleNamespace(**flags))


def test_a_container_without_a_home_folder_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.os.path, "expanduser", lambda path: path)
    assert folder.refuse_place(str(tmp_path)) == tmp_path


def test_overwrite_replaces_records_of_ours_alone(tmp_path):
    flags = types.SimpleNamespace(overwrite=True, resume=False)
    for text in ("print('hello')\n", '{"name": "x"}\n', "[1]\n", "\n"):
        (tmp_path / "x").write_text(text)
        with pytest.raises(SystemExit, match="does not hold records of ours"):
            Records(tmp_path / "x", flags)
    for text in ("", '{"id": 1}\n', '{"id": 1}\n{"id', '{"id": "cut off in mid-wri'):
        (tmp_path / "x").write_text(text)
        Records(tmp_path / "x", flags).begin()
        assert not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------------------------
# Locks


def is_locked(path) -> bool:
    with open(path) as file:  # another description of the file, as another process would have
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """--overwrite removes an evaluation's lock with its results; another may have opened it."""
    path, flock, locked = tmp_path / LOCK, folder.fcntl.flock, []

    def late(handle, how):
        if not locked:
            path.unlink()
        locked.append(os.fstat(handle).st_ino)
        flock(handle, how)

    monkeypatch.setattr(folder.fcntl, "flock", late)
    assert folder.lock(path) is None
    assert len(locked) == 2 and path.stat().st_ino in {inode for _, inode in folder.held}
    monkeypatch.undo()
    assert is_locked(path)


def test_an_output_file_is_locked_while_data_is_prepared(tmp_path):
    from data.sources import write_records

    out, seen = tmp_path / "data.jsonl", []

    def rows():
        for number in range(2):
            seen.append(is_locked(tmp_path / ".data.jsonl.lock"))
            yield {"id": number}

    assert write_records(out, rows()) == 2 and seen == [True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.jsonl.lock", "data.jsonl"]


def test_a_disk_that_fills_up_while_data_is_prepared_leaves_the_old_file(tmp_path, monkeypatch):
    from data import sources

    (tmp_path / "data.jsonl").write_text("old\n")

    def rows():
        yield {"id": 1}
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit, match="No space left on device.*make room"):
        sources.write_records(tmp_path / "data.jsonl", rows())
    assert (tmp_path / "data.jsonl").read_text() == "old\n"
    assert not (tmp_path / "data.jsonl.tmp").exists()
