"""Does a program pass its tests? The judge's side: workers run the programs (sandbox.py).

Tests are of two kinds, and all of them must pass:

    {"fn": null, "inputs": ["3 4\\n", ...], "outputs": ["7\\n", ...]}     stdin and stdout
    {"fn": "add", "inputs": [[3, 4], ...], "outputs": [7, ...]}         arguments and results

Optional: `before` (code that runs first, such as imports), `literal` (each input is the text of a
Python list, for tuples and sets), `seconds` (CPU time of a run, if not CPU_SECONDS).

Outputs are compared here, on plain data, and never enter the process that runs the program. Text is
equal if it has as many lines and each is equal up to outer white space, or number for number
(LiveCodeBench's rule). Results are equal as Python's ==, with tuples as lists, floats up to 1e-6.
The first test that fails decides.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from decimal import Decimal, DecimalException

from plumbing import grader
from plumbing.sandbox import OUTPUT, READY

FIRST_LOOK = 0.5  # CPU seconds of a run in the first round, as in grader.py
CPU_SECONDS = 6.0  # of a run: one text, or all inputs of a function
MOST_SECONDS = 30.0  # that tests may ask for
MAX_CODE = 60_000  # characters of a program
MAX_LINE = 10_000  # of numbers that are compared as numbers
TOLERANCE = 1e-6  # of floats
BUDGET_SECONDS = 120.0  # for each started BUDGET_RUNS runs
BUDGET_RUNS = 10_000

# What runs log of `stats`.
COUNTS = (
    "graded", "no_answer", "refused", "judged", "right", "wrong", "error", "crash", "memory",
    "output", "stuck", "timeouts", "over_budget", "worker_deaths", "peak_mb",
)


# --------------------------------------------------------------------------------------------------
# Comparing


def same_text(gold: str, out: str) -> bool:
    """Whether each line is equal up to outer white space, or number for number."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (gold, out))
    return len(ours) == len(theirs) and all(map(same_line, ours, theirs))


def same_line(gold: str, out: str) -> bool:
    if gold == out:
        return True
    if max(len(gold), len(out)) > MAX_LINE:
        return False
    try:  # some NaNs raise only when they are compared
        return list(map(Decimal, gold.split())) == list(map(Decimal, out.split()))
    except DecimalException:
        return False


def same_value(gold, out) -> bool:
    """Whether two JSON values are equal. Floats are up to TOLERANCE if the gold is one."""
    if isinstance(gold, list):
        return isinstance(out, list) and len(gold) == len(out) and all(map(same_value, gold, out))
    if isinstance(gold, dict):
        same_keys = isinstance(out, dict) and gold.keys() == out.keys()
        return same_keys and all(same_value(gold[key], out[key]) for key in gold)
    if isinstance(gold, float) and isinstance(out, (int, float)):
        try:
            return math.isclose(gold, out, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        except OverflowError:  # an integer too large for a float
            return False
    return gold == out


def same_results(golds: list, lines: str) -> bool:
    """Whether a line of JSON for each gold came out, and nothing else."""
    rows = lines.split("\n")
    if len(rows) != len(golds) + 1 or rows[-1]:
        return False
    try:
        return all(same_value(gold, json.loads(row)) for gold, row in zip(golds, rows))
    except (ValueError, RecursionError):  # not JSON, or nested too deep
        return False


# --------------------------------------------------------------------------------------------------
# Workers


class Runner(grader.Worker):
    """The caller's end of a keeper. `orders` is the pool's: key -> (tests, program)."""

    # With an environment of our own -P, -s and -S do what -I does, but let the hash seed through:
    # a program that prints a set gets the same verdict every time.
    command = [
        sys.executable, "-P", "-s", "-S",
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox.py"),
    ]
    environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    remedy = "check that Python's modules ctypes and resource can be imported"

    def __init__(self, orders: dict[str, tuple[dict, str]]):
        self.orders = orders
        super().__init__()

    def greeting(self) -> bytes:
        said = os.read(self.fileno(), 4096)
        if said not in (b"", READY):
            self.stop(0.0)
            raise RuntimeError(said.decode().strip())
        return said

    def send(self, request: list) -> bool:
        """Begin with a solution: its order, and the first input. False if the keeper is gone."""
        self.job, cpu_seconds, key = request
        self.tests, code = self.orders[key]
        if cpu_seconds == CPU_SECONDS:  # the last look
            cpu_seconds = min(self.tests.get("seconds") or CPU_SECONDS, MOST_SECONDS)
        self.patience = grader.WALL_SECONDS + 20 * cpu_seconds
        self.at = 0  # the test that runs
        order = {name: self.tests.get(name) for name in ("fn", "before", "literal")}
        self.put(json.dumps({**order, "code": code, "cpu": cpu_seconds}).encode())
        return self.process.poll() is None and self.put(self.next_input())

    def next_input(self) -> bytes:
        inputs = self.tests["inputs"]
        return json.dumps(inputs if self.tests.get("fn") else inputs[self.at]).encode()

    def put(self, body: bytes) -> bool:
        self.deadline = time.monotonic() + self.patience
        left = memoryview(len(body).to_bytes(8, "big") + body)
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[self.process.stdin.write(left):]
        return not left

    def receive(self) -> list | None:
        """As in grader.Worker; while tests are right, the next one is sent and nothing comes."""
        replies, decided = super().receive(), []
        for why, output, peak_mb in replies or []:
            outcome = self.outcome_of(why, output)
            if outcome:
                decided.append([self.job, outcome, peak_mb])
            self.put(b"" if outcome else self.next_input())
        return decided if replies is not None else None

    def outcome_of(self, why: str, output: str) -> str | None:
        """The solution's outcome, or None if further tests must decide."""
        if "said" in self.tests:  # not a test: `outputs` wants what it prints
            self.tests["said"] = why, output
            return "right" if why == "ok" else why
        if why != "ok":
            return why
        golds = self.tests["outputs"]
        if self.tests.get("fn"):
            return "right" if same_results(golds, output) else "wrong"
        if not same_text(golds[self.at], output):
            return "wrong"
        self.at += 1
        return "right" if self.at == len(golds) else None

    def stop(self, patience: float = 0.0):
        super().stop(min(patience, 0.5))  # a keeper that runs something does not read its input


class Pool(grader.Pool):
    """Keepers, counters and known verdicts. A pair of grader.Pool is a 1-tuple here: a key."""

    most = 16

    def __init__(self):
        super().__init__()
        self.orders: dict[str, tuple[dict, str]] = {}

    def make_worker(self) -> Runner:
        return Runner(self.orders)

    def looks(self) -> tuple[float, float]:
        return FIRST_LOOK, CPU_SECONDS

    def plain_pairs(self, count: int) -> list[tuple[str]]:
        tests = {"inputs": ["7"], "outputs": ["7"]}
        orders = {f"plain {i}": (tests, f"print(input())  # {i}") for i in range(min(count, 8))}
        self.orders.update(orders)
        return [(key,) for key in orders]


pool = Pool()
pool.end_with_process()


# --------------------------------------------------------------------------------------------------
# What others call


def passes(
    tests: list[dict], programs: list[str | None], budget: float = BUDGET_SECONDS
) -> list[bool]:
    """Whether each program passes all of its tests. None means that no program was found.

    Time is bounded: see grader.Pool. `budget` is in seconds, for each started BUDGET_RUNS runs.
    Works from any thread. Raises ValueError if the lists differ in length. Raises RuntimeError if
    programs cannot be confined here, if no worker can be kept alive, or if a busy machine leaves
    programs out in three budgets.
    """
    if len(tests) != len(programs):
        counts = f"{len(tests)} tests and {len(programs)} programs"
        raise ValueError(f"expected the tests of each program, got {counts}")
    if reason := refusal():
        raise RuntimeError(reason)
    verdicts, waiting, runs = [False] * len(programs), {}, 0
    digests: dict[int, bytes] = {}  # tests are large, and a question's completions share them
    with pool.lock:
        pool.orders.clear()
        for i, (test, program) in enumerate(zip(tests, programs)):
            pool.stats["graded"] += 1
            if not program or not can_be_run(program):
                pool.stats["refused" if program else "no_answer"] += 1
                continue
            if id(test) not in digests:
                digests[id(test)] = digest(json.dumps(test, sort_keys=True).encode())
            key = digest(digests[id(test)] + program.encode()).hex()
            pool.orders[key] = test, program
            waiting.setdefault((key,), []).append(i)
            runs += 1 if test.get("fn") else len(test["inputs"])
        judged = pool.judge(list(waiting), budget * max(1, -(-runs // BUDGET_RUNS)))
        pool.orders.clear()
    for pair, indices in waiting.items():
        for i in indices:
            verdicts[i] = judged[pair]
    return verdicts


def results(tests: dict, program: str) -> list | None:
    """What a function gives for each input, encoded as outputs of tests are. None if it fails.

    This makes tests of a data set's own solutions; `tests` needs no outputs.
    """
    with pool.lock:
        pool.await_workers()
        worker, replies = pool.workers[0], []
        pool.orders["results"] = tests, program
        if worker.send([0, CPU_SECONDS, "results"]):
            while replies == []:
                replies = grader.Worker.receive(worker)
        if not replies:
            pool.replace(worker)
            return None
        worker.put(b"")
    why, output, _ = replies[0]
    return [json.loads(line) for line in output.splitlines()] if why == "ok" else None


def outputs(programs: list[str], cpu_seconds: float) -> list[tuple[str, str]]:
    """What each program prints, run side by side over the pool: (why, text).

    Why is "ok", or what stopped it, as in sandbox.run; "refused" for what cannot be run; "lost"
    where its keeper died. An error of Python is "ok": its last line ends the text. No verdict, and
    no count of `stats`, comes of it. Raises RuntimeError as `passes` does.
    """
    if reason := refusal():
        raise RuntimeError(reason)
    calls = {
        program: {"inputs": [""], "seconds": cpu_seconds, "said": ("lost", "")}
        for program in dict.fromkeys(programs)
        if can_be_run(program)
    }
    with pool.lock:
        before = Counter(pool.stats)
        keys = {program: digest(b"call " + program.encode()).hex() for program in calls}
        pool.orders.clear()
        pool.orders.update((keys[p], (calls[p], SHOW_ERROR.format(p))) for p in calls)
        pairs = [(key,) for key in keys.values()]
        for pair in pairs:  # a verdict alone says nothing
            pool.verdicts.pop(pair, None)
        pool.judge(pairs, BUDGET_SECONDS)
        pool.orders.clear()
        pool.stats = before
    return [calls[p]["said"] if p in calls else ("refused", "") for p in programs]


# Prints the last line of an error, which goes to stderr otherwise.
SHOW_ERROR = """
try:
    exec(compile({!r}, "call.py", "exec"), {{"__name__": "__main__"}})
except SystemExit:
    pass
except BaseException as error:
    import traceback
    print(traceback.format_exception_only(error)[-1].strip())
"""


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=20).digest()


def can_be_run(program: str) -> bool:
    """Its size, and what compile() and UTF-8 do not take."""
    surrogates = any("\ud800" <= char <= "\udfff" for char in program)
    return len(program) <= MAX_CODE and "\0" not in program and not surrogates


def refusal() -> str | None:
    """Why programs cannot be run here at all, or None."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return None
    here = f"{platform.system()} {platform.machine()}"
    return f"programs are run on Linux x86-64 only, not on {here}: use such a machine"


@functools.cache
def not_ready() -> str | None:
    """The same, once the keepers have tried their filter. Takes a second the first time."""
    if reason := refusal():
        return reason
    try:
        with pool.lock:
            pool.await_workers()
    except RuntimeError as error:
        return str(error)
    return None


def bad_tests(tests) -> str | None:
    """Why these are no tests, or None."""
    if not isinstance(tests, dict):
        return "it has no tests"
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list)) or not inputs:
        return "it has tests without lists of inputs and outputs"
    if len(inputs) != len(outputs):
        return f"it has tests with {len(inputs)} inputs and {len(outputs)} outputs"
    if not isinstance(tests.get("fn"), (str, type(None))):
        return "it has tests whose fn is not a name"
    wanted = list if tests.get("fn") and not tests.get("literal") else str
    if not all(isinstance(one, wanted) for one in inputs):
        return f"it has tests with an input that is no {wanted.__name__}"
    if not tests.get("fn") and not all(isinstance(one, str) for one in outputs):
        return "it has tests with an output that is no text"
    size = max(map(len, outputs)) if not tests.get("fn") else len(json.dumps(outputs))
    return "it has tests with too much output" if size > OUTPUT else None


def stats(reset: bool = False) -> dict[str, int]:
    """Counts since the last reset, for a step's metrics. `reset` sets them to zero afterwards.

    graded               programs seen
    no_answer, refused   those that were not run: none was found, or it is too long
    judged               different programs that were new
    right, wrong         all tests passed; a test gave another output
    error, crash         it raised or exited with an error; it broke the interpreter
    memory, output       it met that limit
    stuck, timeouts      it waited for ever; it used up its CPU time
    over_budget          wrong, because slow programs left no time for it
    worker_deaths        deaths of keepers; the program is tried again, twice at most
    peak_mb              the largest memory of a run, in MiB
    """
    with pool.lock:
        counts = Counter({name: pool.stats[name] for name in (*COUNTS, "slow")})
        if reset:
            pool.stats.clear()
    return dict(counts)
