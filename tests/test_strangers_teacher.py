"""A teacher's server that misbehaves (bench/strangers_teacher.py): bounded, said, nothing lost."""

import contextlib
import io
import json
import sys

import pytest

import distill
from bench.strangers_inputs import is_plain
from bench.strangers_teacher import BEHAVIOURS, ENDS, KEY, records, two_servers
from plumbing import teacher


def run(folder, names, server, **flags) -> tuple[str, str]:
    """distill.py on records that ask for these behaviours: (what it printed, its refusal)."""
    lines = [json.dumps(record) + "\n" for record in records(names)]
    (folder / "data.jsonl").write_text("".join(lines))
    flags = {"data": folder / "data.jsonl", "out": folder / "plans.jsonl", "retries": 0, **flags}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    printed, refusal = io.StringIO(), ""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("DISTILL_API_KEY", KEY)
        patch.setattr(sys, "argv", ["distill.py", "--teacher", server.url + "/v1", *words])
        try:
            distill.main()
        except SystemExit as stop:
            refusal = str(stop.code)
    return printed.getvalue(), refusal


def fates(folder) -> dict[str, list[str]]:
    """What became of records by now: "kept" and "dropped", one word each time one was written."""
    found = {}
    for fate, name in (("kept", "plans.jsonl"), ("dropped", "plans.dropped.jsonl")):
        file = folder / name
        for line in file.read_text().splitlines() if file.exists() else ():
            found.setdefault(json.loads(line)["id"], []).append(fate)
    return found


def written(folder) -> str:
    return "".join(file.read_text() for file in folder.glob("plans*"))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """All behaviours that do not end the run, in one run; then --resume, the server being good."""
    folder, seen = tmp_path_factory.mktemp("teacher"), {}
    names = sorted(set(BEHAVIOURS) - set(ENDS), key=lambda name: BEHAVIOURS[name][1] != "kept")
    with two_servers() as (server, other):
        flags = dict(timeout=8, concurrency=16)
        seen["printed"], seen["refusal"] = run(folder, names, server, **flags)
        seen["fates"], server.good = fates(folder), True
        printed, seen["second refusal"] = run(folder, names, server, resume=True)
        seen |= {"printed": seen["printed"] + printed, "heads": server.heads, "other": other.heads}
    return seen | {"then": fates(folder), "names": names, "written": written(folder)}


@pytest.mark.parametrize("name", sorted(set(BEHAVIOURS) - set(ENDS)))
def test_a_misbehaving_server_costs_one_record_at_most(outcome, name):
    assert outcome["fates"].get(name, ["again"]) == [BEHAVIOURS[name][1]]


def test_nothing_is_lost_and_one_sentence_says_what_to_do(outcome):
    again = sum(fate == "again" for _, fate in BEHAVIOURS.values())
    assert outcome["refusal"] == f"error: {again} records are unanswered: run again with --resume"
    assert not outcome["second refusal"] and sorted(outcome["then"]) == sorted(outcome["names"])
    assert all(len(fates) == 1 for fates in outcome["then"].values())
    assert "1 unanswered (no answer within" not in outcome["printed"]  # they share a line
    lines = [line for line in outcome["printed"].splitlines() if " unanswered (" in line]
    assert lines and all(line.endswith(": run again with --resume") for line in lines)
    assert all(len(line) < 400 for line in lines)


def test_no_escapes_are_printed_and_the_key_goes_nowhere(outcome):
    assert is_plain(outcome["printed"])
    assert KEY not in outcome["printed"] + outcome["written"] and "[the key]" in outcome["written"]
    assert all(f"Authorization: Bearer {KEY}" in head for head in outcome["heads"])
    assert outcome["other"] == [] and not any("Cookie" in head for head in outcome["heads"])


@pytest.mark.parametrize("name", ENDS)
def test_what_concerns_all_requests_ends_the_run_with_a_sentence(tmp_path, name):
    with two_servers() as (server, other):
        names = ["a cookie", name, "named a picture"]
        printed, refusal = run(tmp_path, names, server, concurrency=1)
        assert is_plain(printed + refusal) and refusal.count("\n") == 0 and len(refusal) < 900
        assert "check the base URL" in refusal and KEY not in printed + refusal
        # The record behind it may be under way by the time the run ends: then it is kept as well.
        assert fates(tmp_path) | {"named a picture": ["kept"]} == {
            "a cookie": ["kept"], "named a picture": ["kept"]
        }  # fmt: skip
        server.good = True
        assert run(tmp_path, names, server, resume=True)[1] == ""
        assert fates(tmp_path) == {name: ["kept"] for name in names} and other.heads == []


def test_a_server_that_answers_nobody_is_not_asked_ten_thousand_times(tmp_path):
    flood = ["hangs up"] * 40
    with two_servers() as (server, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "load_records", lambda *_: [
            {**record, "id": str(i)} for i, record in enumerate(records(flood))
        ])  # fmt: skip
        _, refusal = run(tmp_path, flood, server, concurrency=2)
    assert "has answered none of the first 8 requests" in refusal and "hung up" not in refusal
    assert 8 <= len(server.heads) <= 12


def test_a_password_in_the_address_is_refused_and_not_printed():
    with pytest.raises(SystemExit, match="name or password") as stop:
        teacher.chat_url("http://me:secret-of-mine@localhost/v1")
    assert "secret-of-mine" not in stop.value.code
