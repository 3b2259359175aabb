"""What strangers bring: text that would take over a terminal, folders that no run should fill."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from conftest import ROOT
from data.sources import load_records
from plumbing.folder import check_evaluation, check_run
from plumbing.log import show_record
from plumbing.ranks import fail, print0, printable
from recipes.demo_tools import show_question

# Clears the screen, sets the window's title, goes back to the line's start, rings, turns the
# writing direction around, breaks a line, and is no character at all.
HOSTILE = "a\x1b[2J\x1b]0;owned\x07b\rc\x08d\x9b31me\u202ef\u2066g\u2028h\u061ci\x00j\x7f"
ESCAPED = (
    r"a\x1b[2J\x1b]0;owned\x07b\rc\x08d\x9b31me\u202ef\u2066g\u2028h\u061ci\x00j\x7f"
)


def is_plain(text: str) -> bool:
    """Whether a terminal would show every character of a text, or move to the next line."""
    return all(c in "\n\t" or c.isprintable() for c in text)


def test_unsafe_characters_become_escapes_and_all_others_stay():
    assert printable(HOSTILE) == ESCAPED
    assert printable("x\ud800y") == r"x\ud800y"
    plain = "tabs\tand\nlines, π ≈ 3.14, 中文, العربية, 👍"
    assert printable(plain) == plain
    assert not is_plain(HOSTILE) and is_plain(ESCAPED)


def show_rollouts():
    """What grpo.py shows of a step."""
    completion = {"text": HOSTILE, "reward": {"total": 1.0}, "advantage": 0.5}
    plans = [{"score": 1.0, "completions": [completion]}]
    show_record({"id": "x", "problem": HOSTILE, "answer": HOSTILE, "plans": plans})


def show_demo():
    sample = lambda correct: {"samples": [{"completion": HOSTILE, "correct": correct}]}
    record = {"problem": HOSTILE, "answer": HOSTILE}
    show_question({"sft": [record | sample(False)], "pta": [record | sample(True)]})


@pytest.mark.parametrize("show", [show_rollouts, show_demo, lambda: print0("x", HOSTILE)])
def test_no_foreign_text_reaches_the_terminal_raw(show, capsys):
    show()
    printed = capsys.readouterr().out
    assert is_plain(printed) and r"\x1b[2J" in printed


def test_an_error_that_quotes_data_is_plain(tmp_path):
    record = {"id": HOSTILE, "problem": "p", "answer": [HOSTILE], "more": "\ud800"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    for load in (lambda: load_records(str(tmp_path / "data.jsonl")), lambda: fail(HOSTILE)):
        with pytest.raises(SystemExit) as stop:
            load()
        assert is_plain(stop.value.code)


def test_a_traceback_that_quotes_data_is_plain():
    code = (
        "from plumbing.signals import guarded\n"
        f"def main(): raise ValueError({HOSTILE!r})\n"
        "guarded(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and is_plain(done.stderr) and r"\x1b[2J" in done.stderr


# --------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("out, reason", [
    (".", "holds a repository"), (str(ROOT), "holds a repository"), ("/", "more than a run"),
    ("~", "more than a run"), ("", "is empty"), (" ", "is empty"),
])
@pytest.mark.parametrize("check", [check_run, check_evaluation])
def test_a_folder_with_another_purpose_is_refused_for_what_it_is(check, out, reason, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = str(Path.home()) if out == "~" else out
    flags = dict(out=out, data="toy:train", model="m", overwrite=True, resume=False)
    with pytest.raises(SystemExit, match=reason):
        check(types.SimpleNamespace(**flags))
