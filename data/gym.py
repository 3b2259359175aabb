"""Tasks of the package reasoning-gym: word problems with plans, and any other with its own scorer.

`gsm_symbolic`, the default, has plans and chains of thought by rule. The package fills some eighty
templates of GSM8K with other names and numbers (Mirzadeh et al., arXiv 2410.05229), and works each
problem out in sentences. This module reads the equations in a worked answer, and names the given
quantities as the package does:

    problem     Emily has 5 times as many friends as Ava. [...] If Emily has 65 friends, how many
                has Ben, who has 4 times as many as Ava?
    quantities  emily friends 65, first multiplier 5, second multiplier 4
    plan        A = emily friends / first multiplier; B = second multiplier * A
    CoT         A = 65 / 5 = 13; B = 4 * 13 = 52          the plan, carried out
    answer      52

So a plan decides what to compute. A CoT looks the numbers up, and computes. Problems that cannot be
read without doubt are left out. Train, validation and test share the templates. No problem of one
has the same template with the same numbers as a problem of another.

`leg_counting` has them, too. Its plan says what the question does not: how many legs an animal has.

    problem     How many legs are there in total if you have 3 cats, 2 sea slugs?
    plan        A = cat * 4; B = sea slug * 0; C = A + B
    CoT         A = 3 * 4 = 12; B = 2 * 0 = 0; C = 12 + 0 = 12

Problems of another task name `score` below as their verifier: an answer is right if the package's
scorer gives it full marks. They have no solutions, so there is no sft.jsonl.

    python -m data.gym --out runs/gym      writes sft, train, validation and test.jsonl
    python -m data.gym --out runs/legs --task leg_counting --config '{"max_animals": 3}'
    python -m data.gym --out runs/paths --task shortest_path --config '{"max_rows": 5}'
"""

import argparse
import functools
import itertools
import json
import operator
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from data import toy
from plumbing.ranks import fail, print0, require
from plumbing.signals import guarded

# --------------------------------------------------------------------------------------------------
# Reading a worked answer

NUMBER = r"\d+(?:\.\d+)?"
# A worked answer falls into numbers and signs, words and units (`/hour`), and other characters.
PIECE = re.compile(rf"({NUMBER})|/[A-Za-z]+|([-+*/=])|[A-Za-z ]+|(.)")
TERMS = rf"{NUMBER}(?: [-+*/] {NUMBER})+"
EQUATION = re.compile(rf"(?<![-+*/=] )\b({TERMS}) = ({NUMBER})(?! [-+*/=]|\S)")
# Numbers that a question may mean without writing them, and the words by which it does.
CONSTANTS = {
    "2": "twice|twins|double|half|average", "7": "week", "12": "year|dozen", "60": "hour|minute",
    "100": "%|percent",
}  # fmt: skip
ORDINALS = ("zeroth", "first", "second", "third", "fourth", "fifth")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LETTERS = "ABCDEFGH"  # results, in order
GSM, LEGS = "gsm_symbolic", "leg_counting"
SUFFIX = " Give the result as your final answer. Do not include units."  # our template says it, too


def equations_of(worked: str) -> list[tuple[list[str], str]]:
    """The equations between numbers in a worked answer: (terms and signs in turn, result) each."""
    text = re.sub(r"(?<=\d),(?=\d{3})|[$€£¥](?=\d)", "", worked.partition("####")[0])
    text = re.sub(r"(?<=[\w ]) ?[x×] ?(?=\d)", " * ", text).replace("÷", "/")
    found = []
    for line in text.splitlines():
        # Words vanish, other characters become bars, which no equation spans.
        pieces = [m[1] or m[2] or "|" * bool(m[3]) for m in PIECE.finditer(line)]
        equations = EQUATION.finditer(" ".join(filter(None, pieces)))
        found += [(match[1].split(), match[2]) for match in equations]
    return found


def value_of(terms: list[str]) -> Fraction | None:
    """23 + 6 -> 29, exactly. None where the order of operations would matter, and for x / 0."""
    signs, value = set(terms[1::2]), Fraction(terms[0])
    if not (signs <= {"+", "-"} or signs <= {"*", "/"}):
        return None
    for sign, term in zip(terms[1::2], map(Fraction, terms[2::2])):
        if sign == "/" and not term:
            return None
        value = SIGNS[sign](value, term)
    return value


def name_of(variable: str) -> str:
    """`time_per_batch` -> time per batch, `price2` -> second price; empty if it says nothing."""
    words = [word for word in variable.split("_") if word not in ("n", "num")]
    for i, word in enumerate(words):
        if match := re.fullmatch(r"([a-z]*)([0-5])", word):
            words[i] = f"{ORDINALS[int(match[2])]} {match[1]}".strip()
    name = re.sub(r"\bmult\b", "multiplier", " ".join(words))
    return name if re.search("[a-z]{3}", re.sub("|".join(ORDINALS), "", name)) else ""


def term_names(term: str, problem: str, variables: dict) -> list[str]:
    """What a number in an equation may be: given quantities, and a constant (as itself)."""
    given = re.findall(NUMBER, re.sub(r"(?<=\d),(?=\d{3})", "", problem))
    names = [name_of(name) for name, value in variables.items() if str(value) == term in given]
    meant = term in CONSTANTS and re.search(CONSTANTS[term], problem)
    return names + [term] * bool(meant)


def read_entry(entry: dict) -> dict | None:
    """The problem record of an entry of gsm_symbolic, or None if it cannot be read without doubt.

    Each term must be exactly one of: a named quantity of the question, an earlier result, a
    constant. Numbers must be whole, equations right, and the last result the answer.
    """
    problem, facts = entry["question"].removesuffix(SUFFIX), entry["metadata"]
    quantities, results, steps = {}, [], []
    for terms, result in equations_of(facts["answer_cot"]):
        for term in terms[::2]:
            names = term_names(term, problem, facts["variables"])
            if len(names) + (term in results) != 1 or "" in names or not term.isdigit():
                return None
            quantities |= {name: int(term) for name in names if name != term}
        new = result.isdigit() and result not in results and len(results) < len(LETTERS)
        if not new or term_names(result, problem, facts["variables"]):
            return None
        if value_of(terms) != int(result):
            return None
        steps.append(f"{LETTERS[len(results)]} = {' '.join(terms)} = {result}")
        results.append(result)
    if not results or Fraction(results[-1]) != Fraction(entry["answer"]):
        return None
    known = {"quantities": quantities, "solution": "; ".join(steps)}
    return {"problem": problem, "answer": results[-1], **known}


def plan_of(record: dict) -> str:
    """The plan behind a solution: names and letters in the place of numbers, and no results.

    `A = 65 / 5 = 13; B = 4 * 13 = 52` -> `A = emily friends / first multiplier; B = ...`. Raises
    ValueError for another kind of record.
    """
    if "animals" in record:
        return legs_plan(record["problem"])
    names, steps = {str(value): name for name, value in record["quantities"].items()}, []
    for step in record["solution"].split("; "):
        match = re.fullmatch(r"([A-H]) = ([^=]+) = (\d+)", step)
        if match is None:
            raise ValueError(f"not a solution of data/gym.py: {step[:60]!r}")
        steps.append(f"{match[1]} = {' '.join(names.get(x, x) for x in match[2].split())}")
        names[match[3]] = match[1]
    return "; ".join(steps)


# --------------------------------------------------------------------------------------------------
# Legs

LISTED = r"\d+ ([a-z ]+)(?=[,?])"  # the animals of a question


def read_legs(entry: dict) -> dict | None:
    """The problem record of an entry of leg_counting: the legs of each kind, then their sum.

    None if there are more kinds than letters.
    """
    question, animals = entry["question"].strip(), entry["metadata"]["animals"]
    if len(animals) >= len(LETTERS):
        return None
    legs = package().arithmetic.leg_counting.ANIMALS
    products = [count * legs[name] for name, count in animals.items()]
    steps = [f"{count} * {legs[name]} = {count * legs[name]}" for name, count in animals.items()]
    steps.append(f"{' + '.join(map(str, products))} = {sum(products)}")
    solution = "; ".join(f"{letter} = {step}" for letter, step in zip(LETTERS, steps))
    question = question.rpartition("Now, ")[2].capitalize()  # without the task's description
    known = {"animals": animals, "solution": solution}
    return {"problem": question, "answer": entry["answer"], **known}


def legs_plan(problem: str) -> str:
    """The right plan: `... you have 3 cats, 2 eels?` -> `A = cat * 4; B = eel * 0; C = A + B`."""
    legs = package().arithmetic.leg_counting.ANIMALS
    names = [name if name in legs else name[:-1] for name in re.findall(LISTED, problem)]
    steps = [f"{letter} = {name} * {legs[name]}" for letter, name in zip(LETTERS, names)]
    total = " + ".join(LETTERS[:len(names)])
    return "; ".join([*steps, f"{LETTERS[len(names)]} = {total}"])


# --------------------------------------------------------------------------------------------------
# The package's own scorers

# These evaluate an answer as Python, or leave it to sympy's parse_expr, which does.
EVALUATING = """binary_matrix countdown intermediate_integration n_queens polynomial_multiplication
puzzle24 simple_integration spiral_matrix string_insertion""".split()


def package():
    try:
        import reasoning_gym
    except ImportError:
        fail("this needs the package reasoning-gym: run `pip install reasoning-gym`")
    return reasoning_gym


@functools.cache
def scorer(task: str):
    """The package's function of an answer and an entry, to 0..1."""
    safe = task not in EVALUATING
    require(safe, f"the scorer of {task} evaluates what a model wrote: choose another --task")
    return package().get_score_answer_fn(task)


def marks(task: str, answer: str, entry: dict) -> float:
    """The scorer's marks; 0 where it raises, as some do at odd answers."""
    judge = scorer(task)
    try:
        return float(judge(answer, entry))
    except Exception:  # of any kind: it met text that its author had not thought of
        return 0.0


def score(records: list[dict], answers: list[str]) -> list[bool]:
    """A verifier, as data/verifiers.py describes it: whether an answer gets full marks."""
    return [marks(r["task"], answer, r["entry"]) >= 1 for r, answer in zip(records, answers)]


# --------------------------------------------------------------------------------------------------
# Problems


def blocks(task: str, config: dict, seed: int) -> Iterator:
    """Data sets of 1,000 entries of a task, without end. A seed gives the same ones."""
    for block in itertools.count():
        # The package seeds an entry with the sum of seed and index: blocks must not overlap.
        options = dict(size=1000, seed=seed * 10**8 + block * 1000)
        try:
            yield package().create_dataset(task, **config, **options)
        except (ValueError, TypeError, AssertionError) as error:
            fail(f"reasoning-gym makes no {task} with {config}: {error}; change --task or --config")


def word_problems(args) -> Iterator[tuple[str, dict | None]]:
    """(what decides on the split, problem record or None) of each entry of gsm_symbolic."""
    for data in blocks(GSM, args.config, args.seed):
        for template, entry in zip(data.task_indices, data):
            record = read_entry(entry)
            if record is None or not fits(record, args):
                yield "", None
            else:
                yield f"{template} {record['solution']}", {"template": template, **record}


def leg_problems(args) -> Iterator[tuple[str, dict | None]]:
    """The same of leg_counting. The order of the animals does not decide on the split."""
    for entry in itertools.chain.from_iterable(blocks(LEGS, args.config, args.seed)):
        yield str(sorted(entry["metadata"]["animals"].items())), read_legs(entry)


def scored_problems(args) -> Iterator[tuple[str, dict | None]]:
    """The same of another task. None where an entry's own answer gets no full marks."""
    for entry in itertools.chain.from_iterable(blocks(args.task, args.config, args.seed)):
        question, gold = entry["question"], entry["answer"]
        entry = json.loads(json.dumps(entry, default=str))
        if not (isinstance(gold, str) and gold.strip() and marks(args.task, gold, entry) >= 1):
            yield question, None
        else:
            known = {"verifier": "data/gym.py:score", "task": args.task, "entry": entry}
            yield question, {"problem": question.strip(), "answer": gold, **known}


def fits(record: dict, args) -> bool:
    """Whether a problem has as many steps, as small numbers and as few words as the flags say."""
    low, high = args.steps
    numbers = map(int, re.findall(r"\d+", record["solution"]))
    steps, words = record["solution"].count(";") + 1, len(record["problem"].split())
    return low <= steps <= high and max(numbers) <= args.largest and words <= args.words


def make_problems(sizes: dict[str, int], args) -> dict[str, list[dict]]:
    """`sizes`: split -> number. Returns as many problem records, all of different texts.

    Template and numbers decide on the split (of another task: the text). So whatever the seed,
    splits have no problem in common. `args` are this script's flags. Raises SystemExit if the
    package has too few.
    """
    files, seen, misses = {split: [] for split in sizes}, set(), 0
    stream = {GSM: word_problems, LEGS: leg_problems}.get(args.task, scored_problems)(args)
    while any(len(files[split]) < size for split, size in sizes.items()):
        (key, record), misses = next(stream), misses + 1
        require(misses < 5_000, "there are no more such problems: ask for fewer, or larger ones")
        if record is None or record["problem"] in seen:
            continue
        split = toy.split_of(key)
        if len(files.get(split, ())) < sizes.get(split, 0):
            misses = 0
            seen.add(record["problem"])
            id = f"gym-{split}-{args.seed}-{len(files[split])}"
            files[split].append({"id": id, **record})
    return files


# --------------------------------------------------------------------------------------------------
# Main


def parse_arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add, ends = parser.add_argument, ("LOW", "HIGH")
    add("--out", type=Path, required=True, help="folder for the JSONL files")
    add("--sft", type=int, default=600, help="problems with solutions, to distil and fine-tune on")
    add("--train", type=int, default=3000, help="problems for reinforcement learning")
    add("--validation", type=int, default=100, help="problems to watch the training with")
    add("--test", type=int, default=300, help="problems for evaluation")
    add("--steps", type=int, nargs=2, default=(2, 3), metavar=ends, help="equations per solution")
    add("--largest", type=int, default=200, help="the largest number in a solution")
    add("--words", type=int, default=60, help="the most words of a question")
    add("--task", default=GSM, help="the package's name; the three flags above are gsm_symbolic's")
    add("--config", type=json.loads, default={}, help="settings of the task, as a JSON object")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="replace what --out already holds")
    parser.error = fail
    args = parser.parse_args()
    toy.refuse_occupied(args.out, args.overwrite)
    return args


def main():
    args = parse_arguments()
    args.sft = args.sft if args.task in (GSM, LEGS) else 0  # the others come without solutions
    sizes = {"train": args.sft + args.train, "validation": args.validation, "test": args.test}
    files = make_problems(sizes, args)
    files = {"sft": files["train"][:args.sft], **files, "train": files["train"][args.sft:]}
    files = {name: records for name, records in files.items() if records}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, records in files.items():
            if name != "sft":  # reinforcement learning and evaluation see answers only
                hidden = ("solution", "quantities", "animals")
                records = [{k: v for k, v in r.items() if k not in hidden} for r in records]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (args.out / f"{name}.jsonl").write_text(lines)
    except OSError as error:
        fail(f"{args.out} cannot be written ({error.strerror}): make room, or choose another --out")
    templates = {record.get("template") for records in files.values() for record in records}
    counts = ", ".join(f"{len(records)} {name}" for name, records in files.items())
    of = f"{len(templates)} templates" if args.task == GSM else args.task
    print0(f"{args.out}: {counts}; {of}")


if __name__ == "__main__":
    guarded(main)
