"""Formulas: the embedded coding task. The answer is a program, and tests decide.

A question lists values of a function of x, modulo 10, and asks for the function as a program. It is
a line (a x + b) or a square (a x x + b):

    problem   g 0 = 3 ; g 1 = 7 ; g 9 = 7 ; g 6 = 7 ; g 2 = 9 ; ?
    plan      b then a then square                    the kind of function is the decision
    CoT       b = 3 ; a = 7 - 3 = 4                   g 0 is b, g 1 is a + b, whatever the kind
    answer    def g ( x ) : return ( 4 * x * x + 3 ) % 10

It is a square if g 9 is g 1, as 9 is -1 here. The program runs on x = 0 to 29 and must be right
everywhere (data/code.py), so any other way to write it is as good. The authors of the training
solutions are careless: with probability `CARE` they compare the two, else they guess the kind.
Imitation gives a mixture; reinforcement learning has to find out which kind passes the tests.

    python -m data.formulas --out runs/formulas      writes sft, train, validation and test.jsonl,
                                                     and model/ with random weights

Its sft.jsonl holds plans already, so sft.py can train on it at once.
"""

import random

from data import toy
from data.code import ANSWER
from plumbing.ranks import fail
from plumbing.signals import guarded

KINDS = {"line": "x", "square": "x * x"}
FACTORS = "12346789"  # of 5 x and 5 x x no value could tell which it is
NAMES = "fghk"
CARE = 0.5
WORDS = [
    *toy.TAGS, *toy.DIGITS, *KINDS, *NAMES, "10", "def", "(", "x", ")", ":", "return", "*", "+",
    "-", "%", "=", ";", "?", "a", "b", "then",
]


def program(name: str, kind: str, a: int, b: int) -> str:
    return f"def {name} ( x ) : return ( {a} * {KINDS[kind]} + {b} ) % 10"


def value(kind: str, a: int, b: int, x: int) -> int:
    return (a * x ** (1 + (kind == "square")) + b) % 10


def make_problem(rng: random.Random) -> dict:
    """One problem record with its solution, plan and program, by a careless author."""
    kind, a, b = rng.choice(list(KINDS)), int(rng.choice(FACTORS)), rng.randrange(10)
    name, shown = rng.choice(NAMES), [0, 1, 9, *rng.sample(range(2, 9), 2)]
    listed = [f"{name} {x} = {value(kind, a, b, x)}" for x in shown]
    taken = kind if rng.random() < CARE else rng.choice(list(KINDS))
    inputs = list(range(30))
    return {
        "problem": " ; ".join([*listed, "?"]),
        "tests": {
            "fn": name,
            "inputs": [[x] for x in inputs],
            "outputs": [value(kind, a, b, x) for x in inputs],
        },
        "plan": f"b then a then {taken}",
        "think": f"b = {b} ; a = {(a + b) % 10} - {b} = {a}",
        "program": program(name, taken, a, b),
    }


def make_problems(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different problem records of `split`. The same arguments give the same bytes.

    Raises ValueError if there are not as many.
    """
    rng, seen, records = random.Random(f"formulas {split} {seed}"), set(), []
    for _ in range(100 * count + 1000):
        record = make_problem(rng)
        if len(records) == count:
            return records
        if toy.split_of(record["problem"]) == split and record["problem"] not in seen:
            seen.add(record["problem"])
            id = f"formulas-{split}-{seed}-{len(records)}"
            records.append({"id": id, "verifier": "code", **record})
    raise ValueError(f"found {len(records)} different problems, not {count}: ask for fewer")


def for_training(record: dict) -> dict:
    """A plan record, for sft.py: its answer is the author's program."""
    names = ("id", "verifier", "problem", "plan", "think")
    return {**{name: record[name] for name in names}, "answer": record["program"]}


def for_grading(record: dict) -> dict:
    """A problem record. Its answer stands for the tests."""
    names = ("id", "verifier", "problem", "tests")
    return {**{name: record[name] for name in names}, "answer": ANSWER}


def main():
    args = toy.parse_arguments(__doc__)
    try:
        problems = make_problems("train", args.sft + args.train, args.seed)
        files = {"sft": [*map(for_training, problems[:args.sft])]}
        files["train"] = [*map(for_grading, problems[args.sft:])]
        for split in ("validation", "test"):
            files[split] = [*map(for_grading, make_problems(split, args.test, args.seed))]
    except ValueError as error:
        fail(str(error))
    toy.write_task(args, files, toy.make_tokenizer(WORDS))


if __name__ == "__main__":
    guarded(main)
