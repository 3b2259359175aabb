"""The embedded world: doors that are tried one at a time. And worlds of the user's own."""

import json
import random
import re
import sys

import pytest

import distill
import eval as evaluation
import grpo
import sft
from bench import worlds as study_of_worlds
from conftest import ROOT
from data import doors, toy, walk, worlds
from data.sources import load_gradable
from data.verifiers import plan_revision, refusals, verify
from distill import plan_of, rejection
from model_utils import encode_prompt, encode_question
from rewards import build_completion, parse_completion

PROBLEM = "A3 B9 C5 ; D7 E2 F4 ; G1 H6 I8 ; ?"
RECORD = {"problem": PROBLEM, "answer": "through", "world": walk.WORLD}


def open_doors(salt: str) -> list[set[str]]:
    """Which doors are open in a world: by trying each, first of all doors or after open ones."""
    found, way = [], []
    for hall in doors.doors_of(PROBLEM):
        found.append({d for d in hall if walk.play(RECORD, [*way, d], None, salt)[0] == "open"})
        if not found[-1]:
            break
        way.append(min(found[-1]))
    return found


def test_moves_by_hand():
    """In a world with B, E and I open and C, D shut: one spare move, then no more."""
    salt = next(str(i) for i in range(9999) if open_doors(str(i)) == [{"B"}, {"E"}, {"I"}])
    tell = lambda moves, answer="through": walk.play(RECORD, moves.split(), answer, salt)
    assert tell("") == ("shut", False) and tell("B") == ("open", False)
    assert tell("B E I") == ("open", True) and tell("B E I", "stuck") == ("open", False)
    assert tell("C") == ("shut", False) and tell("C B E I") == ("open", True)
    assert tell("C C B E") == ("open", False) and tell("C C B E I") == ("shut", False)
    assert tell("E") == ("shut", False)  # a door of a hall that is not reached
    assert tell("B E I G") == ("shut", True) and tell("X Y Z")[0] == "shut"
    assert walk.play(RECORD, ["B"], None, salt) == walk.play(RECORD, ["B"], None, salt)


def test_worlds_differ_by_salt_and_a_routes_chance_is_what_happens():
    rng, through = random.Random(0), 0
    for _ in range(4000):
        salt, moves, passed, said = str(rng.random()), [], 0, ""
        while passed < 3 and len(moves) < 4:  # a route that is left for the likeliest other door
            moves.append("CFH"[passed] if said == "shut" else "BDI"[passed])
            said, _ = walk.play(RECORD, moves, None, salt)
            passed += said == "open"
        through += walk.play(RECORD, moves, "through", salt)[1]
    # .9 .7 .8 at once; or one of them is shut, and .5 .4 .6 takes its place
    by_hand = 0.504 + 0.1 * 0.5 * 0.56 + 0.3 * 0.4 * 0.72 + 0.2 * 0.6 * 0.63
    assert walk.chance(PROBLEM, ["B", "D", "I"]) == pytest.approx(by_hand)
    assert through / 4000 == pytest.approx(by_hand, abs=0.025)
    assert walk.chance(PROBLEM, ["B", "D"]) == walk.chance(PROBLEM, ["D", "B", "I"]) == 0


def test_solutions_are_walks_of_careless_authors_and_teach_plans():
    records = walk.make_problems("train", 300, seed=1)
    assert records == walk.make_problems("train", 300, seed=1)
    tokenizer = toy.make_tokenizer(walk.WORDS)
    kinds = set()
    for record in records:
        said = re.findall("open|shut", record["solution"])
        through = said.count("open") == 3
        assert through == (record["ending"] == "through") and len(said) <= 4
        kinds.add((through, said.count("shut")))
        plan = plan_of(record)
        assert rejection(plan, record, 300) is None
        assert walk.planned(record, plan) == record["route"].split()
        text = build_completion(plan, record["solution"], record["ending"])
        assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)
        assert parse_completion(text)
    assert kinds == {(True, 0), (True, 1), (False, 2), (False, 3), (False, 4)}


def test_an_episode_is_judged_by_replay_and_its_plan_by_carrying_it_out():
    salt = next(str(i) for i in range(9999) if open_doors(str(i)) == [{"B"}, {"E"}, {"I"}])
    plan = doors.plan_of(PROBLEM, "C E I")

    def seen(moves, answer="through", record=RECORD):
        acts = "".join(f"<act>{move}</act>" for move in moves.split())
        text = build_completion(plan, acts or "none", answer)
        whole = worlds.episode(record, text, answer)
        (right,) = verify([record], [whole], [salt])
        return right, plan_revision(record, parse_completion(text), whole, salt)

    assert seen("C B E I") == (True, (True, True))  # left, and rightly so
    assert seen("C C E I") == (False, (True, False)) == seen("", "stuck")
    assert verify([RECORD], [None], [salt]) == [False]
    assert plan_revision(RECORD, None, None, salt) is None
    record = {"problem": PROBLEM, "answer": "-", "verifier": "doors"}
    blocks = parse_completion(build_completion(plan, "C E I", "C E I"))
    fates = {plan_revision(record, blocks, "C E I", str(i)) for i in range(50)}
    assert fates == {(True, False), (False, False)}
    assert plan_revision(record, blocks, "C E H", "0")[1]
    assert plan_revision({"problem": "1 + 1", "answer": "2"}, blocks, "2", "0") is None


def test_the_stages_run_in_the_world(tmp_path, monkeypatch):
    """From problems to an evaluation, each stage as a user calls it."""

    def call(script, flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
        script.main()

    data, limits = tmp_path / "data", "--max_plan_tokens 30 --max_completion_tokens 72"
    call(walk, f"--out {data} --sft 40 --train 12 --test 4")
    flags = f"--data {data}/sft.jsonl --limit 0 --out {tmp_path}/plans.jsonl"
    call(distill, f"--teacher rule {flags}")
    flags = f"--data {tmp_path}/plans.jsonl --out {tmp_path}/sft --epochs 1 --batch_size 8"
    call(sft, f"--model {data}/model --lr 1e-3 --val_size 4 --eval_every 2 {flags}")
    flags = f"--data {data}/train.jsonl --out {tmp_path}/rl --steps 1 --questions 2 --eval_size 0"
    call(grpo, f"--model {tmp_path}/sft/model {limits} {flags}")
    flags = f"--data {data}/test.jsonl --n 2 --out {tmp_path}/eval"
    call(evaluation, f"--model {tmp_path}/rl/model {limits} {flags}")
    first, *_ = map(json.loads, (tmp_path / "sft/metrics.jsonl").read_text().splitlines())
    last = json.loads((tmp_path / "sft/metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_loss"] < first["loss"]
    records = [*map(json.loads, (tmp_path / "eval/records.jsonl").read_text().splitlines())]
    assert [len(record["samples"]) for record in records] == [2] * 4


def test_the_readmes_world_of_ones_own_works(tmp_path):
    section = (ROOT / "README.md").read_text().partition("## Tools and worlds")[2]
    blocks = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)
    code = next(block for block in blocks if "def play" in block)
    line = next(block for block in blocks if '"world"' in block)
    assert len(code.strip().splitlines()) <= 20
    (tmp_path / "guess.py").write_text(code)
    (tmp_path / "guess.jsonl").write_text(line)
    (record,) = load_gradable(str(tmp_path / "guess.jsonl"), lambda problem: [1], 9, 0, 0)
    tokenizer = toy.make_tokenizer(walk.WORDS)
    prompt = encode_question(tokenizer, record)
    assert prompt == encode_prompt(tokenizer, record["problem"], tools=("act",))
    low, high, guesses = 1, 100, []
    while low < high:  # by bisection
        guesses.append(str((low + high) // 2))
        said = worlds.say(record, guesses, "salt")
        low, high = (int(guesses[-1]) + 1, high) if said == "higher" else (low, int(guesses[-1]))
    whole = worlds.episode(record, "".join(f"<act>{g}</act>" for g in guesses), str(low))
    wrong = worlds.episode(record, "", "0")
    assert verify([record] * 2, [whole, wrong], ["salt"] * 2) == [True, False]


def test_a_world_that_cannot_be_used_is_named(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "def plain(record, actions, answer, salt):\n    return 'said'\n"
        "def broken(record, actions, answer, salt):\n    return 1 / 0\n"
    )
    name = lambda function: [{"problem": "p", "answer": "a", "world": f"{file}:{function}"}]
    assert "has no function nothing" in refusals(name("nothing"))[0]
    assert "not file.py:function" in refusals([{"problem": "p", "answer": "a", "world": "walk"}])[0]
    assert "leave one of them out" in refusals([{**RECORD, "verifier": "math"}])[0]
    with pytest.raises(SystemExit, match=r"returned 'said'; return what it says"):
        refusals(name("plain"))
    with pytest.raises(SystemExit, match=r"ZeroDivisionError in bad.py, line 4"):
        refusals(name("broken"))


def test_the_study_of_the_world_judges_plans_and_writes_its_page(tmp_path, monkeypatch):
    plan = lambda route: doors.plan_of(PROBLEM, route)
    best = study_of_worlds.judge_walk(PROBLEM, plan("B D I"), "<act> B </act> <act> F </act>")
    assert best["best"] and best["revised"] and best["whole"] == plan("B D I")
    assert best["value"] == pytest.approx(walk.chance(PROBLEM, ["B", "D", "I"]))
    other = study_of_worlds.judge_walk(PROBLEM, plan("B E I"), "<act> B </act> <act> B </act>")
    assert not other["best"] and not other["revised"]
    lines = [
        {
            "row": row, "seed": seed, "right": "".join(str(right) for _ in range(50)) + "0123" * 5,
            "decoded": [7000, 7000], "analysis": {"icc": 0.1, "ci_low": 0.05, "ci_high": 0.2},
            "did": {"value": 0.6, "plan_wrong": 0.7, "wrong_left": 0.5, "left_right": 0.25},
        }
        for row, right in (("GRPO 12x1", 1), ("PTA-GRPO 4x3", 2)) for seed in range(3)
    ]  # fmt: skip
    monkeypatch.setattr(study_of_worlds, "PAGE", tmp_path / "WORLDS.md")
    study_of_worlds.write_page(lines)
    first, second = (tmp_path / "WORLDS.md").read_text().splitlines()[-2:]
    icc = "0.100 (0.050 to 0.200)"
    assert first.startswith(f"GRPO 12x1 | 3 | 14,000 | 28.6 |  |  | {icc} | 60.0 | 70.0 | 50.0")
    assert second.startswith("PTA-GRPO 4x3 | 3 | 14,000 | 46.4 | +17.9 (")
