"""The doors task, and the verifiers that records name."""

import random

import pytest

from data import doors, toy
from data.verifiers import verify
from rewards import build_completion, parse_completion

PROBLEM = "A3 B9 C5 ; D7 E2 F4 ; G1 H6 I8 ; ?"


def test_chances_by_hand():
    assert doors.chance(PROBLEM, "B E I") == pytest.approx((9 + 2 + 8) / 30)
    assert doors.chance(PROBLEM, "B D I") == pytest.approx(24 / 30)
    for route in (None, "", "B D", "B D I I", "D B I", "A3 D7 G1", "B, D, I"):
        assert doors.chance(PROBLEM, route) == 0


def test_worlds_are_drawn_from_problem_and_salt_at_the_stated_chance():
    record = {"problem": PROBLEM}
    wins = [doors.judge(record, "B E I", f"salt {i}") for i in range(4000)]
    assert sum(wins) / 4000 == pytest.approx(19 / 30, abs=0.025)  # 3.3 standard errors
    assert wins == [doors.judge(record, "B E I", f"salt {i}") for i in range(4000)]
    other = {"problem": PROBLEM.replace("A3", "A2")}
    assert wins != [doors.judge(other, "B E I", f"salt {i}") for i in range(4000)]
    # Within a world a likelier route is open wherever a less likely one is.
    better = [doors.judge(record, "B D I", f"salt {i}") for i in range(4000)]
    assert all(b or not w for w, b in zip(wins, better))
    assert not any(doors.judge(record, "B E", f"salt {i}") for i in range(50))


def test_problems_state_a_bad_a_fair_and_a_good_door_per_hall():
    records = doors.make_problems("train", 300, seed=1)
    assert records == doors.make_problems("train", 300, seed=1)
    assert len({r["problem"] for r in records}) == 300
    careless = 0
    for record in records:
        halls = doors.doors_of(record["problem"])
        assert [sorted(hall) for hall in halls] == [list(names) for names in doors.HALLS]
        for hall in halls:
            bad, fair, good = sorted(hall.values())
            assert bad <= 3 < fair <= 6 < good <= 9
        assert record["answer"].split() == [max(hall, key=hall.get) for hall in halls]
        careless += record["answer"] != record["solution"]
    # A route is the likeliest with chance (1/2 + 1/2 * 1/3)^3 = 8/27.
    assert careless / 300 == pytest.approx(19 / 27, abs=0.09)
    assert {toy.split_of(r["problem"]) for r in records} == {"train"}


def test_a_plan_is_what_the_halls_offer_and_what_is_taken():
    plan = doors.plan_of(PROBLEM, "B E I")
    assert plan == "A3 B9 C5 take B ; D7 E2 F4 take E ; G1 H6 I8 take I"
    assert doors.planned_route(plan) == "B E I"
    for wrong in ("B E", "B E I I", ""):
        with pytest.raises(ValueError, match="not a route through 3 halls"):
            doors.plan_of(PROBLEM, wrong)
    with pytest.raises(ValueError, match="not a problem of the doors task"):
        doors.chance("1 + 1 ?", "2")


def test_the_tokenizer_holds_the_task(tmp_path):
    tokenizer = toy.make_tokenizer(doors.WORDS)
    text = build_completion(doors.plan_of(PROBLEM, "B E I"), "B E I", "B E I")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids and len(ids) == 31
    assert parse_completion(tokenizer.decode(ids)).answer == "\\boxed{ B E I }"


def test_each_record_is_judged_by_the_verifier_that_it_names():
    rng = random.Random(0)
    records, answers, expected = [], [], []
    for i in range(60):
        route = "B D I" if rng.random() < 0.7 else "A"
        if rng.random() < 0.5:
            records.append({"problem": "1 + 1 ?", "answer": "2"})
            answers.append(rng.choice(["2", "3", None]))
            expected.append(answers[-1] == "2")
        else:
            records.append({"problem": PROBLEM, "answer": "-", "verifier": "doors"})
            answers.append(route)
            expected.append(doors.judge(records[-1], route, f"s {i}"))
    assert verify(records, answers, [f"s {i}" for i in range(60)]) == expected
