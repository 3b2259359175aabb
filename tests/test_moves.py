"""The moves task: mazes, simulation, careless authors."""

import json
import sys
from collections import deque

import pytest

import distill
import eval as evaluation
import grpo
import sft
from data import moves, toy
from data.verifiers import plan_leaks, refusals, same_answers, verify
from rewards import build_completion, parse_completion

PROBLEM = "from A4 to C2 ; walls A3 B2 D5 E1 E3 ; ?"
RECORD = {"id": "r", "verifier": "moves", "problem": PROBLEM, "answer": "right up right up"}


@pytest.mark.parametrize(
    "answer, right",
    [
        ("right up right up", True),
        ("right, up, right, up", True),
        ("Right up right up", True),
        ("right right up up", True),  # another way
        ("down up right right up up", True),  # a longer one
        ("right left " * 10 + "right up right up", True),  # 24 moves
        ("right left " * 11 + "right up right up", False),  # 26
        ("up right", False),  # a wall
        ("right up up right", False),  # a wall at B2
        ("right up right", False),  # not there
        ("right up right up up", False),  # past it
        ("left right right up right up", False),  # outside
        ("right up right up stop", False),
        ("rightuprightup", False),
        ("B4 B3 C3 C2", False),
        ("", False),
        (None, False),
    ],
)
def test_moves_are_simulated(answer, right):
    assert verify([RECORD], [answer], ["s"]) == [right]


def distance(start: str, goal: str, walls: set[str]) -> int | None:
    """Breadth-first search on coordinates, written apart from moves.shortest_way."""
    point = lambda cell: ("ABCDE".index(cell[0]), int(cell[1]))
    blocked, queue, seen = {point(w) for w in walls}, deque([(point(start), 0)]), {point(start)}
    while queue:
        (x, y), steps = queue.popleft()
        if (x, y) == point(goal):
            return steps
        for to in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if 0 <= to[0] < 5 and 1 <= to[1] <= 5 and to not in blocked | seen:
                seen.add(to)
                queue.append((to, steps + 1))
    return None


def test_problems_have_right_answers_and_careless_authors():
    records = moves.make_problems("train", 400, seed=1)
    assert records == moves.make_problems("train", 400, seed=1)
    assert len({r["problem"] for r in records}) == 400
    assert {toy.split_of(r["problem"]) for r in records} == {"train"}
    assert refusals(records) == [None] * 400
    taken = [" ".join(r["solution"].split()[0::2]) for r in records]
    best = [distance(*moves.world_of(r["problem"])) for r in records]
    assert [len(r["answer"].split()) for r in records] == best
    assert all(verify(records, [r["answer"] for r in records], taken))
    right = verify(records, taken, taken)
    # Half are careful. The others' ways meet walls more often than not.
    assert 0.6 < sum(right) / 400 < 0.8
    for record, way in zip(records, taken):
        plan = distill.plan_of(record)
        assert set(plan.split()) <= {"via", *moves.CELLS} and not plan_leaks(record, plan)
        # The plan decides the way: moves straight from cell to cell.
        cell, walk = moves.world_of(record["problem"])[0], []
        for corner in plan.split()[1::2]:
            straight = moves.single_turn(cell, corner, moves.random.Random(0))
            assert len(set(straight)) == 1
            cell, walk = corner, walk + straight
        assert " ".join(walk) == way


def test_a_plan_that_spells_out_right_moves_leaks():
    assert plan_leaks(RECORD, "First right up right up, then stop.")
    assert plan_leaks(RECORD, "Go\nright, right, up, up")
    assert not plan_leaks(RECORD, "Go right, then up: avoid the wall.")
    assert not plan_leaks(RECORD, "up up right right")


def test_wrong_ways_vote_together_whatever_their_commas():
    pairs = [("up right", "up, right", True), ("up up", "up", False), ("a", "b", False)]
    assert same_answers([RECORD] * 3, *list(zip(*pairs))[:2]) == [same for *_, same in pairs]


@pytest.mark.parametrize(
    "problem, reason",
    [
        ("1 + 1", "not a problem of the moves task: '1 + 1'"),
        ("from A1 to A1 ; walls B1 ; ?", "no way leads to its goal"),
        ("from A1 to E5 ; walls A2 B1 ; ?", "no way leads to its goal"),
    ],
)
def test_what_cannot_be_judged_is_refused(problem, reason):
    assert refusals([{**RECORD, "problem": problem}]) == [reason]


def test_the_tokenizer_holds_the_task():
    tokenizer, record = toy.make_tokenizer(moves.WORDS), moves.make_problems("test", 1)[0]
    text = build_completion(distill.plan_of(record), record["solution"], record["answer"])
    ids = tokenizer.encode(f"{record['problem']} {text}", add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    assert parse_completion(tokenizer.decode(ids[ids.index(tokenizer.vocab["<plan>"]):]))
    with pytest.raises(ValueError, match="not a way of the moves task"):
        moves.plan_of("7 + 5 = 12")


def test_all_stages_run_on_it(tmp_path, monkeypatch):
    def main(script, flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
        script.main()

    lines = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    main(moves, f"--out {tmp_path} --sft 64 --train 40 --test 10")
    assert all("solution" not in r for r in lines("train.jsonl"))
    main(distill, f"--teacher rule --data {tmp_path}/sft.jsonl --out {tmp_path}/plans.jsonl")
    assert len(lines("plans.jsonl")) == 64
    main(sft, f"--model {tmp_path}/model --data {tmp_path}/plans.jsonl --out {tmp_path}/sft "
         "--epochs 4 --lr 5e-3 --batch_size 8 --val_size 0 --save_every 0")  # fmt: skip
    limits = "--max_plan_tokens 16 --max_completion_tokens 56"
    main(grpo, f"--model {tmp_path}/sft/model --data {tmp_path}/train.jsonl --out {tmp_path}/pta "
         f"--steps 1 --questions 2 --eval_size 2 --save_every 0 {limits}")  # fmt: skip
    (step,) = lines("pta/metrics.jsonl")
    assert step["grader_moves_graded"] == 24 and step["grader_graded"] == 0
    assert step["grader_moves_unparsed"] + step["grader_moves_no_answer"] < 24
    main(evaluation, f"--model {tmp_path}/pta/model --data {tmp_path}/test.jsonl --n 2 "
         f"--out {tmp_path}/eval {limits}")  # fmt: skip
    problems = {r["id"]: r for r in lines("test.jsonl")}
    for record in lines("eval/records.jsonl"):
        for s in record["samples"]:
            assert s["correct"] == moves.judge(problems[record["id"]], s["answer"])
            assert not s["restated"] and (s["vote"] == "right") == s["correct"]


def test_a_plan_is_carried_out_from_turn_to_turn():
    record = {"problem": "from A4 to C2 ; walls A3 B2 D5 E1 E3 ; ?", "answer": "-"}
    assert moves.planned(record, "via B4 via B3 via C3 via C2") == "right up right up"
    assert moves.planned(record, "via B3") == "" == moves.planned(record, "anywhere")
    assert not moves.judge(record, moves.planned(record, "via A2 via C2"))  # through a wall
    assert moves.left("right up", "right right") and not moves.left("right up", " Right, up ")
    for one in moves.make_problems("train", 40):  # the authors' own plans
        walked = " ".join(one["solution"].split()[0::2])
        assert moves.planned(one, moves.plan_of(one["solution"])) == walked
