"""Programs as answers: the verifier `code`, and the data sets whose golds are tests.

A record names the verifier and holds its tests (see plumbing/runner.py for their form):

    {"id", "problem", "answer": ANSWER, "verifier": "code",
     "tests": {"fn": null, "inputs": ["3 4\\n"], "outputs": ["7\\n"]}}

A program is right if all tests pass. It is taken from the last fenced block of the answer, or is
the whole answer. A data set's own solutions are `golds` here, until `failing_golds` has tried them:
a problem whose golds all fail its tests is left out. `before` imports what solutions of LeetCode's
kind use without importing it.
"""

import ast
import base64
import binascii
import io
import json
import pickle
import zlib

from plumbing import runner
from plumbing.sandbox import encode, eval_literal

ANSWER = "a program that passes its tests"  # non-empty, and what no plan says by chance
FAILING = "solutions that fail their own tests"
MOST_GOLDS = 3  # of a problem that are tried
MOST_PRIVATE = 1 << 30  # bytes of LiveCodeBench's private tests of a problem, unpacked

ASK_TEXT = (
    "Write a Python program that reads standard input and writes standard output. Between <answer> "
    "and </answer>, give the program alone, in one ```python block and without a box."
)
ASK_FUNCTION = (
    "Write the Python function `{fn}`. Between <answer> and </answer>, give the program alone, in "
    "one ```python block and without a box."
)
RELEASES = {
    f"v{n}": ["test.jsonl", *(f"test{i}.jsonl" for i in range(2, n + 1))] for n in range(1, 7)
}
STARS = "typing collections itertools functools heapq bisect math"
NAMES = "string re datetime collections heapq bisect copy math random itertools functools sys"
BEFORE = "\n".join(
    [f"from {name} import *" for name in STARS.split()] + [f"import {', '.join(NAMES.split())}"]
)


# --------------------------------------------------------------------------------------------------
# The verifier


def judge(records: list[dict], answers: list[str | None]) -> list[bool]:
    """The program passes all tests of its record (plumbing/runner.py)."""
    programs = [answer and program_in(answer) for answer in answers]
    return runner.passes([record["tests"] for record in records], programs)


def program_in(answer: str) -> str:
    """The last fenced block of an answer, else all of it. A box around either is taken off.

    The box is not looked for as in mathematics: a program's braces need not balance.
    """
    parts = answer.strip().split("```")  # text, block, text, block, text
    program = parts[0]
    if len(parts) > 1:
        program = parts[-2] if len(parts) % 2 else parts[-1]  # the last may never close
        head, line, rest = program.partition("\n")
        if line and head.strip().lower() in ("", "python", "python3", "py"):
            program = rest
    text = program.strip()
    in_box = text.startswith("\\boxed{") and text.endswith("}")
    return text[len("\\boxed{"):-1] if in_box else program


def solved(records: list[dict]) -> list[tuple[str, str] | None]:
    """What each record's `solution` thinks and answers, or None if its program fails the tests.

    For distilling: ANSWER stands for any program, and no model should learn to write it. The answer
    is the program in one fenced block. What is thought ends where a block at the end begins.
    """
    if not records:
        return []
    programs = [program_in(record["solution"]).strip() for record in records]
    fit = [refusal(record) is None for record in records]
    tests = [record["tests"] for record, ok in zip(records, fit) if ok]
    verdicts = iter(runner.passes(tests, [p for p, ok in zip(programs, fit) if ok]))
    found = []
    for record, program, ok in zip(records, programs, fit):
        solution = record["solution"].strip()
        head = solution[:-3].rpartition("```")[0].strip() if solution.endswith("```") else ""
        pair = head or solution, f"```python\n{program}\n```"
        found.append(pair if ok and next(verdicts) else None)
    return found


def refusal(record: dict) -> str | None:
    """Why `code` cannot judge a record, or None. Starts the workers, which takes a second once."""
    if reason := runner.bad_tests(record.get("tests")):
        return f"{reason} (plumbing/runner.py says what they look like)"
    if reason := runner.not_ready():
        return f"its programs cannot be run: {reason}"
    return None


def failing_golds(records: list[dict]) -> list[str | None]:
    """For each record: why its golds show that its tests are unusable, or None.

    Removes `golds` from the records. Records without them have nothing to show.
    """
    jobs = []
    for i, record in enumerate(records):
        jobs += [(i, gold) for gold in record.pop("golds", [])[:MOST_GOLDS]]
    tests = [records[i]["tests"] for i, _ in jobs]
    tried, fine = {i for i, _ in jobs}, set()
    for (i, _), right in zip(jobs, runner.passes(tests, [gold for _, gold in jobs])):
        fine |= {i} if right else set()
    return [FAILING if i in tried - fine else None for i in range(len(records))]


# --------------------------------------------------------------------------------------------------
# Rows of data sets: row -> record without id, or the reason (a string) why it is left out


def make_record(problem: str, tests: dict, golds: list[str], **more) -> dict | str:
    if reason := runner.bad_tests(tests):
        return reason.removeprefix("it has ")
    ask = ASK_FUNCTION.format(fn=tests["fn"]) if tests.get("fn") else ASK_TEXT
    record = {"problem": f"{problem.strip()}\n\n{ask}", "answer": ANSWER, "verifier": "code"}
    golds = [gold for gold in golds if gold and gold.strip()]
    return {**record, "tests": tests, **({"golds": golds} if golds else {}), **more}


def from_json(value):
    """What a column holds, whether as it is or as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


def text_of(value) -> str:
    """The text of stdin or stdout, which some sets give as lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def arguments_of(value) -> list:
    """A function's arguments: a list, or LiveCodeBench's text with one JSON value per line."""
    if not isinstance(value, str):
        return value
    return [json.loads(line) for line in value.split("\n") if line.strip()]


def make_tests(fn: str | None, inputs: list, outputs: list, seconds=None) -> dict:
    """Tests from a data set's columns. Raises ValueError for text that is no JSON."""
    limit = {"seconds": float(seconds)} if seconds else {}
    if not fn:
        ours = dict(inputs=[*map(text_of, inputs)], outputs=[*map(text_of, outputs)])
        return {"fn": None, **ours, "before": BEFORE, **limit}
    ours = [from_json(output) for output in outputs]
    return dict(fn=fn, inputs=[*map(arguments_of, inputs)], outputs=ours, before=BEFORE, **limit)


def unwrapped(outputs: list) -> list:
    """TACO's results, of which most sources wrap each in a list."""
    wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
    return [output[0] for output in outputs] if wrapped else outputs


def verifiable(row: dict) -> dict | str:
    """open-r1/verifiable-coding-problems-python, and its parent, which has JSON text."""
    info, about = from_json(row["verification_info"]), from_json(row.get("metadata") or {})
    if info.get("language", "python") != "python":
        return "not Python"
    cases = info["test_cases"]
    names = {case.get("fn_name") or None for case in cases}
    if len(names) != 1:
        return "tests of several functions, or none"
    fn, problem = names.pop(), row.get("problem_statement") or row.get("prompt") or ""
    outputs = [case["output"] for case in cases]
    try:
        outputs = unwrapped([from_json(one) for one in outputs]) if fn else outputs
        seconds = about.get("time_limit")
        seconds = seconds if isinstance(seconds, (int, float)) else None
        tests = make_tests(fn, [case["input"] for case in cases], outputs, seconds)
    except ValueError:
        return "tests that are not JSON"
    return make_record(problem, tests, [row.get("gold_standard_solution") or ""])


def taco(row: dict) -> dict | str:
    try:
        tests, golds = from_json(row["input_output"]), from_json(row["solutions"] or "[]")
    except ValueError:  # among others: a number of more digits than Python reads
        return "tests that are not JSON"
    fn = tests.get("fn_name")
    outputs = unwrapped(tests["outputs"]) if fn else tests["outputs"]
    problem = row["question"]
    if row.get("starter_code"):
        problem = f"{problem.strip()}\n\n{row['starter_code'].strip()}"
    named = dict(inputs=tests["inputs"], outputs=outputs, fn=fn, before=BEFORE)
    if not fn:
        named = make_tests(None, tests["inputs"], outputs)
    return make_record(problem, named, golds)


class Plain(pickle.Unpickler):
    """Reads strings, numbers and their containers; a pickle that names anything else is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def private_tests(text: str) -> list[dict]:
    """LiveCodeBench's: JSON, or base64 of zlib of a pickle of JSON. Raises ValueError."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(text, validate=True), MOST_PRIVATE)
        return json.loads(Plain(io.BytesIO(packed)).load())
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"private tests of another form: {error}") from None


def livecodebench(row: dict) -> dict | str:
    try:
        cases = from_json(row["public_test_cases"]) + private_tests(row["private_test_cases"])
        fn = from_json(row["metadata"] or "{}").get("func_name")
        kinds = {case["testtype"] for case in cases}
        if kinds != ({"functional"} if fn else {"stdin"}):
            return "tests of several kinds"
        tests = make_tests(fn, [c["input"] for c in cases], [c["output"] for c in cases])
    except ValueError:
        return "tests that cannot be read"
    problem = f"{row['question_title']}\n\n{row['question_content'].strip()}"
    if row["starter_code"]:
        problem += f"\n\n{row['starter_code'].strip()}"
    return make_record(problem, tests, [])


# --------------------------------------------------------------------------------------------------
# HumanEval and MBPP: tests that are Python


def human_eval(row: dict) -> dict | str:
    """HumanEval and HumanEval+."""
    fn, gold = row["entry_point"], row["prompt"] + row["canonical_solution"]
    tests = tests_of(row["test"], fn, gold, "check(record)")
    problem = f"Complete this Python function.\n\n```python\n{row['prompt'].strip()}\n```"
    return tests if isinstance(tests, str) else make_record(problem, tests, [gold])


def mbpp(row: dict) -> dict | str:
    """MBPP+. The first assert shows the name and the arguments, as EvalPlus's prompt does."""
    example, gold = row["test_list"][0].strip(), row["code"]
    defined = {node.name for node in ast.parse(gold).body if isinstance(node, ast.FunctionDef)}
    called = {node.id for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Name)}
    if len(defined & called) != 1:
        return "tests of several functions, or none"
    (fn,) = defined & called
    tests = tests_of(row["test"], fn, gold, "")
    if isinstance(tests, str):
        return tests
    tests["before"] = "\n".join(row.get("test_imports") or []) or None
    return make_record(f"{row['prompt'].strip()}\nIt must pass: {example}", tests, [gold])


def tests_of(source: str, fn: str, gold: str, check: str) -> dict | str:
    """Tests as data, from code that tests the function `fn`, or why there are none.

    EvalPlus's code holds lists of inputs and results. Where it computes results instead, the gold
    gives them. HumanEval's asserts are run with the gold, and what it is asked and answers is
    written down. A check with a criterion of its own is no test of equality: it is left out.
    """
    try:
        tree = ast.parse(source)
        given, golds = listed(tree, "inputs"), listed(tree, "results")
        if given is not None:
            if not any(call_of(node) == "assertion" for node in ast.walk(tree)):
                return "tests with a criterion of their own"
            tests = dict(fn=fn, inputs=[ast.unparse(one) for one in given.elts], literal=True)
            if golds is not None:
                outputs = encode(eval_literal(ast.unparse(golds)))
            else:
                outputs = runner.results(tests, gold)
        elif "math.fabs(" in source or not check:
            return "tests with a criterion of their own"
        else:
            program = "\n".join([gold, source, RECORD.format(fn=fn, check=check)])
            calls = runner.results({"fn": "recorded", "inputs": [[]]}, program)
            inputs, outputs = map(list, zip(*calls[0])) if calls and calls[0] else ([], None)
            tests = dict(fn=fn, inputs=inputs, literal=True)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return "tests that cannot be read"
    return FAILING if outputs is None else tests | {"outputs": outputs}


RECORD = """
def recorded():
    calls = []
    def record(*given):
        kept = repr(list(given))
        calls.append([kept, {fn}(*given)])
        return calls[-1][1]
    {check}
    return calls
"""


def listed(tree: ast.AST, name: str) -> ast.List | None:
    """The list that code assigns to a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            if [getattr(target, "id", None) for target in node.targets] == [name]:
                return node.value
    return None


def call_of(node: ast.AST) -> str | None:
    return getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
