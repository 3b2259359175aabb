"""Formulas: the embedded coding task. The answer is a program, and tests decide.

A question lists values of a function of x, modulo 10, and asks for the function as a program. It is
a line (a x + b) or a square (a x x + b):

    problem   f 6 = 7 ; f 0 = 3 ; f 2 = 9 ; f 1 = 7 ; ?
    plan      b then a then square                    the kind of function is the decision
    CoT       b = 3 ; a = 7 - 3 = 4                   f 0 is b, f 1 is a + b, whatever the kind
    answer    def f ( x ) : return ( 4 * x * x + 3 ) % 10

Only the other two values tell the kinds apart. The program runs on x = 0 to 29 and must be right
everywhere (data/code.py), so any other way to write it is as good. The authors of the training
solutions are careless: with probability `CARE` they look at these values, else they guess the kind.
Imitation gives a mixture; reinforcement learning has to find out which kind passes the tests.

    python -m data.formulas --out runs/formulas      writes sft, train, validation and test.jsonl,
                                                     and model/ with random weights

Its sft.jsonl holds plans already, so sft.py can train on it at once.
"""

import random

from data import toy
from data.code import ANSWER
from plumbing.ranks import fail

KINDS = {"line": "x", "square": "x * x"}
FACTORS = "12346789"  # of 5 x and 5 x x no value could tell which it is
CARE = 0.5
WORDS = [
    *toy.TAGS, *toy.DIGITS, *KINDS, "10", "def", "f", "(", "x", ")", ":", "return", "*", "+", "-",
    "%", "=", ";", "?", "a", "b", "then",
]


def program(kind: str, a: int, b: int) -> str:
    return f"def f ( x ) : return ( {a} * {KINDS[kind]} + {b} ) % 10"


def value(kind: str, a: int, b: int, x: int) -> int:
    return (a * x ** (1 + (kind == "square")) + b) % 10


def make_problem(rng: random.Random) -> dict:
    """One problem record with its solution, plan and program, by a careless author."""
    kind, a, b = rng.choice(list(KINDS)), int(rng.choice(FACTORS)), rng.randrange(10)
    telling = [x for x in range(2, 10) if value("line", a, b, x) != value("square", a, b, x)]
    shown = [0, 1, *rng.sample(telling, 2)]
    rng.shuffle(shown)
    listed = [f"f {x} = {value(kind, a, b, x)}" for x in shown]
    taken = kind if rng.random() < CARE else rng.choice(list(KINDS))
    inputs = list(range(30))
    return {
        "problem": " ; ".join([*listed, "?"]),
        "tests": {
            "fn": "f",
            "inputs": [[x] for x in inputs],
            "outputs": [value(kind, a, b, x) for x in inputs],
        },
        "plan": f"b then a then {taken}",
        "think": f"b = {b} ; a = {(a + b) % 10} - {b} = {a}",
        "program": program(taken, a, b),
    }


def make_problems(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different problem records of `split`. The same arguments give the same bytes."""
    rng, seen, records = random.Random(f"formulas {split} {seed}"), set(), []
    while len(records) < count:
        record = make_problem(rng)
        if toy.split_of(record["problem"]) == split and record["problem"] not in seen:
            seen.add(record["problem"])
            id = f"formulas-{split}-{seed}-{len(records)}"
            records.append({"id": id, "verifier": "code", **record})
    return records


def for_training(record: dict) -> dict:
    """A plan record, for sft.py: its answer is the author's program."""
    names = ("id", "problem", "plan", "think")
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
    main()
