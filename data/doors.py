"""Doors: the embedded task in which the plan is the decision, and its execution is chance.

A question lists three halls of three doors. The digit after a door is its chance, in tenths, to be
open. A route takes one door per hall. Then one hall is drawn, and the route succeeds if the door it
takes there is open. So a route's chance of success is the mean of its three digits, over 10.

    problem   A3 B9 C5 ; D7 E2 F4 ; G1 H6 I8 ; ?
    plan      A3 B9 C5 take B ; D7 E2 F4 take E ; G1 H6 I8 take I
    CoT       B E I                                     the plan, carried out
    answer    B E I                                     right with chance (9 + 2 + 8) / 30

No answer is right for certain: `judge` draws the halls and doors of each completion from a salt of
its own. Two CoTs of one plan meet different worlds, and only many CoTs tell a good plan from a
lucky one. The authors of the training solutions are careless: in each hall they take the likeliest
door with probability `CARE`, else any. Imitation gives a mixture of routes; reinforcement learning
has to find out which of them succeed.

    python -m data.doors --out runs/doors      writes sft, train, validation and test.jsonl, and
                                               model/ with random weights
"""

import random
import re

from data import toy
from plumbing.ranks import fail
from plumbing.signals import guarded

HALLS = ("ABC", "DEF", "GHI")
CHANCES = ("123", "456", "789")  # in every hall, a bad door, a fair one and a good one
CARE = 0.5
DOORS = "".join(HALLS)
WORDS = [*toy.TAGS, "take", ";", "?", *DOORS, *(f"{d}{c}" for d in DOORS for c in "123456789")]


# --------------------------------------------------------------------------------------------------
# Problems


def make_problem(rng: random.Random) -> dict:
    """One problem record with its solution, by a careless author. `answer`: the likeliest route."""
    halls, best, taken = [], [], []
    for names in HALLS:
        doors = dict(zip(rng.sample(names, 3), map(rng.choice, CHANCES)))
        doors = dict(rng.sample(list(doors.items()), 3))
        halls.append(" ".join(f"{door}{digit}" for door, digit in doors.items()))
        best.append(max(doors, key=doors.get))
        taken.append(best[-1] if rng.random() < CARE else rng.choice(list(doors)))
    problem = " ; ".join([*halls, "?"])
    return {"problem": problem, "answer": " ".join(best), "solution": " ".join(taken)}


def make_problems(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different problem records of `split`. The same arguments give the same bytes."""
    rng, seen, records = random.Random(f"doors {split} {seed}"), set(), []
    while len(records) < count:
        record = make_problem(rng)
        if toy.split_of(record["problem"]) == split and record["problem"] not in seen:
            seen.add(record["problem"])
            id = f"doors-{split}-{seed}-{len(records)}"
            records.append({"id": id, "verifier": "doors", **record})
    return records


def doors_of(problem: str) -> list[dict[str, int]]:
    """For each hall, door -> tenths. Raises ValueError for any other kind of text."""
    halls = [dict(re.findall(r"([A-I])([1-9])", hall)) for hall in problem.split(" ; ")[:-1]]
    if not halls or not all(halls):
        raise ValueError(f"not a problem of the doors task: {problem[:60]!r}")
    return [{door: int(digit) for door, digit in hall.items()} for hall in halls]


def check(record: dict) -> str | None:
    """Why a record cannot be judged, or None."""
    try:
        doors_of(record["problem"])
    except ValueError as error:
        return str(error)


def plan_of(problem: str, solution: str) -> str:
    """The plan behind a route: what each hall offers, and what is taken there."""
    halls, route = problem.split(" ; ")[:-1], solution.split()
    if len(halls) != len(route):
        raise ValueError(f"not a route through {len(halls)} halls: {solution[:60]!r}")
    return " ; ".join(f"{hall} take {door}" for hall, door in zip(halls, route))


def planned_route(plan: str) -> str:
    """The doors that a plan takes."""
    return " ".join(re.findall(r"take ([A-I])", plan))


def planned(record: dict, plan: str) -> str:
    """The answer that carrying out a plan amounts to."""
    return planned_route(plan)


def left(planned: str, answer: str) -> bool:
    """Whether an answer takes another door than the plan."""
    return planned.split() != answer.split()


# --------------------------------------------------------------------------------------------------
# Verdicts


def chance(problem: str, route: str | None) -> float:
    """The chance that a route succeeds; 0 for what is no route through the problem's halls."""
    halls, doors = doors_of(problem), (route or "").split()
    if len(doors) != len(halls) or any(d not in hall for d, hall in zip(doors, halls)):
        return 0.0
    return sum(hall[door] for door, hall in zip(doors, halls)) / 10 / len(halls)


def judge(record: dict, answer: str | None, salt: str) -> bool:
    """Whether a route succeeds in the world that `salt` and the problem draw. A pure function."""
    rng = random.Random(f"{record['problem']} {salt}")
    return rng.random() < chance(record["problem"], answer)


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = toy.parse_arguments(__doc__)
    try:
        problems = make_problems("train", args.sft + args.train, args.seed)
        files = {"sft": problems[:args.sft], "train": problems[args.sft:]}
        # A record of the cold start answers what its author took.
        files["sft"] = [{**record, "answer": record["solution"]} for record in files["sft"]]
        for split in ("validation", "test"):
            files[split] = make_problems(split, args.test, args.seed)
    except ValueError as error:
        fail(str(error))
    toy.write_task(args, files, toy.make_tokenizer(WORDS))


if __name__ == "__main__":
    guarded(main)
