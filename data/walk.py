"""Walk: the doors task acted out, one door at a time. A world in which plans are revised.

A question lists three halls of three doors; the digit after a door is its chance, in tenths, to be
open. A plan takes one door per hall. The CoT tries doors, each answered by `open` or `shut`. It has
one move more than there are halls. So a shut door may be replaced once, by one that the plan does
not take. Whoever tries the same door again, or meets a second shut one, does not get through.

    problem   A3 B9 C5 ; D7 E2 F4 ; G1 H6 I8 ; ?
    plan      A3 B9 C5 take B ; D7 E2 F4 take E ; G1 H6 I8 take I
    CoT       <act> B </act> <result> open </result> <act> E </act> <result> shut </result>
              <act> D </act> <result> open </result> <act> I </act> <result> open </result>
    answer    through                                        or stuck, which is never right

Which doors are open is drawn per completion, from its salt. The authors of the training solutions
are careless (`CARE`): in each hall they plan the likeliest door, or any; and where a door is shut
they try the likeliest other one, or the same again. Reinforcement learning has to find out which
plans get through, and when to leave one.

    python -m data.walk --out runs/walk      writes sft, train, validation and test.jsonl, and
                                             model/ with random weights
"""

import random
import re

from data import doors, toy
from plumbing.ranks import fail

CARE = 0.5
SPARE = 1  # moves beyond one per hall
WORLD = "data/walk.py:play"
WORDS = [
    *doors.WORDS,
    "<act>",
    "</act>",
    "<result>",
    "</result>",
    "open",
    "shut",
    "through",
    "stuck",
]


# --------------------------------------------------------------------------------------------------
# The world


def play(record: dict, actions: list[str], answer: str | None, salt: str) -> tuple[str, bool]:
    """What the last door was, and whether the walk has got through. A pure function."""
    rng, halls = random.Random(f"{record['problem']} {salt}"), doors.doors_of(record["problem"])
    are_open = [{door: rng.random() < tenths / 10 for door, tenths in h.items()} for h in halls]
    passed, said = 0, "shut"
    for move, door in enumerate(actions):
        moves_left = move < len(halls) + SPARE
        opens = moves_left and passed < len(halls) and are_open[passed].get(door, False)
        passed, said = passed + opens, "open" if opens else "shut"
    return said, passed == len(halls) and (answer or "").strip() == "through"


def planned(record: dict, plan: str) -> list[str]:
    """The doors that a plan takes."""
    return re.findall(r"take ([A-I])", plan)


# --------------------------------------------------------------------------------------------------
# Problems


def likeliest(hall: dict[str, int], tried: str | None = None) -> str:
    return max((door for door in hall if door != tried), key=hall.get)


def make_problem(rng: random.Random) -> dict:
    """One problem record, with the `route` that a careless author planned, and the walk."""
    problem = doors.make_problem(rng)["problem"]
    halls, salt = doors.doors_of(problem), str(rng.random())
    route = [likeliest(h) if rng.random() < CARE else rng.choice(list(h)) for h in halls]
    actions, steps, passed = [], [], 0
    while passed < len(halls) and len(actions) < len(halls) + SPARE:
        door, again = route[passed], bool(steps) and steps[-1].endswith("shut </result>")
        if again and rng.random() < CARE:
            door = likeliest(halls[passed], tried=door)
        actions.append(door)
        said, _ = play({"problem": problem}, actions, None, salt)
        passed += said == "open"
        steps.append(f"<act> {door} </act> <result> {said} </result>")
    ending = "through" if passed == len(halls) else "stuck"
    record = {"problem": problem, "answer": "through", "route": " ".join(route)}
    return {**record, "solution": " ".join(steps), "ending": ending}


def make_problems(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different problem records of `split`. The same arguments give the same bytes."""
    rng, seen, records = random.Random(f"walk {split} {seed}"), set(), []
    while len(records) < count:
        record = make_problem(rng)
        if toy.split_of(record["problem"]) == split and record["problem"] not in seen:
            seen.add(record["problem"])
            records.append({"id": f"walk-{split}-{seed}-{len(records)}", "world": WORLD, **record})
    return records


def chance(problem: str, route: list[str]) -> float:
    """The chance to get through by a route that is left once, for the likeliest other door.

    0 for what is no route through the problem's halls.
    """
    halls = doors.doors_of(problem)
    if len(route) != len(halls) or any(d not in hall for d, hall in zip(route, halls)):
        return 0.0
    whole, once = 1.0, 0.0  # no door was shut so far; one was, and was replaced
    for door, hall in zip(route, halls):
        p, other = hall[door] / 10, hall[likeliest(hall, door)] / 10
        whole, once = whole * p, once * p + whole * (1 - p) * other
    return whole + once


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = toy.parse_arguments(__doc__)
    try:
        problems = make_problems("train", args.sft + args.train, args.seed)
        files = {"sft": problems[: args.sft], "train": problems[args.sft :]}
        for split in ("validation", "test"):
            files[split] = make_problems(split, args.test, args.seed)
    except ValueError as error:
        fail(str(error))
    for name, records in files.items():
        for record in records:
            ending = record.pop("ending")
            if name == "sft":  # a record of the cold start answers what its author met
                record["answer"] = ending
            else:
                record.pop("route")
    toy.write_task(args, files, toy.make_tokenizer(WORDS))


if __name__ == "__main__":
    main()
