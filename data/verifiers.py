"""Who decides whether an answer is right: the verifier that its problem record names.

    math                the answer equals the gold                    plumbing/answers.py
    choice              it names the gold's option                    data/choice.py
    moves               its moves reach the goal                      data/moves.py
    doors               its route succeeds in a world of its own      data/doors.py
    code                its program passes the record's tests         data/code.py
    world               its actions succeed: a record with a `world`  data/worlds.py
    file.py:function    a function of your own:

        def judge(records, answers):    # two lists of equal length: dicts, strings
            return [len(answer) <= record["limit"] for record, answer in zip(records, answers)]

    It returns a list of True and False. A completion without an answer is wrong without asking. The
    file is looked for beside the data, in the working directory, and in this repository. With a
    third parameter `salts`, the function gets a string per completion that no other one of the run
    has, to draw chance from. The same record, answer and salt must give the same verdict, always.
    It runs in the training process, without limits: it must not evaluate what a model wrote.

A verifier is a function of lists: records, answers (None: none was found), salts, and whether
answers must be evaluated as far as their golds (of mathematics alone). It returns a list of bool.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable

from data import choice, code, doors, moves, worlds
from data import own as own_files
from data.own import said
from plumbing import answers as mathematics
from plumbing import runner
from plumbing.answers import GRADER_COUNTS, grade, grader_stats
from plumbing.calls import forged, tools_of
from plumbing.ranks import all_gather, fail, require
from rewards import extract_answer, parse_completion

DEFAULT = "math"
COUNTS: Counter = Counter()  # what verifiers other than math saw: see `tally`


# --------------------------------------------------------------------------------------------------
# Verdicts


def by_mathematics(records: list[dict], answers: list, salts: list, evaluated: bool) -> list[bool]:
    golds = [record["answer"] for record in records]
    return grade(golds, answers, evaluated=evaluated)


def by_option(records: list[dict], answers: list, salts: list, evaluated: bool) -> list[bool]:
    golds = [choice.choice_of(record, record["answer"]) for record in records]
    named = [choice.choice_of(record, answer) for record, answer in zip(records, answers)]
    unread = [answer is not None and name is None for answer, name in zip(answers, named)]
    COUNTS["choice_unparsed"] += sum(unread)
    return [name is not None and name == gold for name, gold in zip(named, golds)]


def by_simulation(records: list[dict], answers: list, salts: list, evaluated: bool) -> list[bool]:
    unread = [answer is not None and moves.moves_of(answer) is None for answer in answers]
    COUNTS["moves_unparsed"] += sum(unread)
    return [moves.judge(*pair) for pair in zip(records, answers)]


def by_chance(records: list[dict], answers: list, salts: list, evaluated: bool) -> list[bool]:
    return [doors.judge(*one) for one in zip(records, answers, salts)]


def by_tests(records: list[dict], answers: list, salts: list, evaluated: bool) -> list[bool]:
    return code.judge(records, answers)


def by_replay(records: list[dict], answers: list, salts: list, evaluated: bool) -> list[bool]:
    return [worlds.judge(*one) for one in zip(records, answers, salts)]


# The verifiers by name. Four more dicts hold what only some of them need.
VERIFIERS = {
    "math": by_mathematics,
    "choice": by_option,
    "moves": by_simulation,
    "doors": by_chance,
    "code": by_tests,
    "world": by_replay,
}
# Why a record cannot be judged, or None. (`refusals` asks about golds of "math" side by side.)
CHECKS = {
    "choice": choice.check, "moves": moves.check, "doors": doors.check, "code": code.refusal,
    "world": worlds.check,
}
# What equal answers share; None for what cannot be read. (`same_answers` lets "math" compare.)
READ = {"choice": choice.choice_of, "moves": lambda record, answer: moves.moves_of(answer)}
# Whether a plan gives the answer away. Without an entry: whether it holds the gold's text.
LEAKS = {"choice": choice.leaks, "moves": moves.leaks}
# The answer that carrying out a plan amounts to, None if unknown; whether an answer leaves it; and
# the verdict, which is not counted.
PLANNED = {
    "moves": (moves.planned, moves.left, lambda record, answer, salt: moves.judge(record, answer)),
    "doors": (doors.planned, doors.left, doors.judge),
    "world": (worlds.planned, worlds.left, worlds.judge),
}


def verifier_of(record: dict) -> str:
    return record.get("verifier", "world" if "world" in record else DEFAULT)


def verify(
    records: list[dict], answers: list[str | None], salts: list[str], evaluated: bool = False
) -> list[bool]:
    """Whether each answer is right (Eq. 3), by its record's verifier ("math" if none).

    `evaluated`: answers must be evaluated as far as their golds (see plumbing.answers.grade).
    Raises SystemExit if a verifier of the user's own raises, or returns anything but verdicts.
    """
    verdicts = [False] * len(records)
    names = [verifier_of(record) for record in records]
    for name in dict.fromkeys(names):
        mine = [i for i, other in enumerate(names) if other == name]
        part = [[values[i] for i in mine] for values in (records, answers, salts)]
        if name != DEFAULT:
            kind = name if name in VERIFIERS else "own"
            COUNTS[f"{kind}_graded"] += len(mine)
            COUNTS[f"{kind}_no_answer"] += part[1].count(None)
        judge = VERIFIERS.get(name) or functools.partial(by_function, name)
        for i, verdict in zip(mine, judge(*part, evaluated)):
            verdicts[i] = verdict
    return verdicts


def tally() -> dict[str, int]:
    """What was judged since the last call, over all ranks. A collective.

    "math" has the names of GRADER_COUNTS. The others have theirs before them: choice_graded,
    choice_no_answer, choice_unparsed, ...; verifiers of the user's own are own_graded, ...
    """
    stats, total = grader_stats(reset=True), Counter()
    mine = {name: int(stats[name]) for name in GRADER_COUNTS} | COUNTS
    if "code_graded" in COUNTS:  # what became of the programs: judged, timeouts, memory, ...
        programs = runner.stats(reset=True)
        mine |= {f"code_{name}": programs[name] for name in programs if name != "peak_mb"}
    for counts in all_gather(mine):
        total.update(counts)
    for name in COUNTS:  # later steps say 0: what they have seen none of
        COUNTS[name] = 0
    return dict(total)


# --------------------------------------------------------------------------------------------------
# Verifiers of the user's own


def locate(record: dict, data: str):
    """Make `file.py:function` an absolute path. `data` names the file that the record is from."""
    for field in {"verifier", "world"} & record.keys():
        record[field] = own_files.locate(record[field], data)


@functools.cache
def own(name: str) -> Callable | str:
    """The function that `file.py:function` names, or why it cannot be used."""
    if not name.rpartition(":")[0].endswith(".py"):
        return f"choose one of {', '.join(VERIFIERS)}, or file.py:function"
    found = own_files.load(name)
    if not callable(found):
        return found
    try:
        inspect.signature(found).bind([], [], **salts_of(found, []))
    except TypeError:
        function = name.rpartition(":")[2]
        return f"{function} must take records and answers (and salts, if it wants them)"
    return found


def salts_of(function: Callable, salts: list[str]) -> dict:
    """The keyword argument `salts`, if the function has one."""
    return {"salts": salts} if "salts" in inspect.signature(function).parameters else {}


def by_function(
    name: str, records: list[dict], answers: list, salts: list, evaluated: bool
) -> list[bool]:
    """The verdicts of a function of the user's own. Raises SystemExit if it returns none."""
    function = own(name)
    require(callable(function), f"the verifier {name!r} cannot be used: {function}")
    asked = [i for i, answer in enumerate(answers) if answer is not None]
    part = [[values[i] for i in asked] for values in (records, answers, salts)]
    try:
        given = function(*part[:2], **salts_of(function, part[2])) if asked else []
    except Exception as error:  # of any kind: it is the user's code
        fail(f"the verifier {name} raised {said(error)}; mend it")
    listed = isinstance(given, list) and len(given) == len(asked)
    got = f"a list of {len(given)}" if isinstance(given, list) else type(given).__name__
    require(
        listed, f"the verifier {name} returned {got} for {len(asked)} answers; return a list with "
        "True or False for each"
    )  # fmt: skip
    for verdict in given:
        kind = type(verdict)
        fit, where = kind is bool, "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        got = f"{verdict!r:.60} ({where}{kind.__name__})"
        require(fit, f"the verifier {name} returned {got} as a verdict; return True or False")
    verdicts = [False] * len(answers)
    for i, verdict in zip(asked, given):
        verdicts[i] = verdict
    return verdicts


# --------------------------------------------------------------------------------------------------
# Whatever else depends on the verifier


def refusals(records: list[dict]) -> list[str | None]:
    """For each record, why its answers cannot be judged, or None. For data loading.

    A gold of mathematics that is not a number takes about 10 ms. A function of the user's own
    judges one record for a trial.
    """
    reasons: list[str | None] = [None] * len(records)
    golds = {record["answer"]: None for record in records if verifier_of(record) == DEFAULT}
    checked = dict(zip(golds, mathematics.check_golds(list(golds))))
    tried = set()
    for i, record in enumerate(records):
        name = verifier_of(record)
        if not isinstance(name, str):
            reasons[i] = f"its verifier is {name!r}, not a name"
        elif "world" in record and "verifier" in record:
            reasons[i] = "it names a world and a verifier: leave one of them out"
        elif name == DEFAULT:
            reason = checked[record["answer"]]
            reasons[i] = reason and f"{record['answer'][:60]!r} {reason}"
        elif name in CHECKS:
            reasons[i] = CHECKS[name](record)
        elif name not in VERIFIERS and not callable(own(name)):
            reasons[i] = f"its verifier {name!r} cannot be used: {own(name)}"
        elif name not in VERIFIERS and name not in tried:
            tried.add(name)
            by_function(name, [record], [record["answer"]], ["trial"], False)
    return reasons


def same_answers(records: list[dict], firsts: list[str], others: list[str]) -> list[bool]:
    """Whether two wrong answers to a problem are the same, and so vote together (maj@n)."""
    same, golds = [False] * len(records), []
    for i, (record, *pair) in enumerate(zip(records, firsts, others)):
        if verifier_of(record) == DEFAULT:
            golds.append(i)
        elif read := READ.get(verifier_of(record)):  # elsewhere equal spellings alone are the same
            one, other = (read(record, answer) for answer in pair)
            same[i] = one is not None and one == other
    verdicts = grade([firsts[i] for i in golds], [others[i] for i in golds]) if golds else []
    for i, verdict in zip(golds, verdicts):
        same[i] = verdict
    return same


def boxed(record: dict) -> bool:
    r"""Whether answers belong into a \boxed{}. Not programs, whose braces need not balance."""
    return verifier_of(record) != "code"


def plan_leaks(record: dict, plan: str) -> bool:
    """Whether a plan already holds the final answer. Linear time.

    mathematics, doors, own    the gold's text (plumbing.answers.plan_leaks)
    choice                     it states the gold's letter or its option's text
    moves                      it spells out moves that are right
    """
    leaks = LEAKS.get(verifier_of(record))
    return leaks(record, plan) if leaks else mathematics.plan_leaks(plan, record["answer"])


def reading(record: dict, text: str, tools: tuple = ()) -> tuple:
    """(blocks or None, answer or None, whether it is forged) of a completion's own `text`.

    One that writes a tool's result itself, where it has `tools` or a world, is malformed. With a
    world the answer knows what was done. There is none where a plan never closed.
    """
    lies = bool(tools_of(record, tools)) and forged(text)
    answer = worlds.episode(record, text, extract_answer(text, boxed(record)))
    return None if lies else parse_completion(text), answer, lies


def plan_revision(
    record: dict, blocks, answer: str | None, salt: str
) -> tuple[bool, bool] | None:
    """(the plan was wrong, the CoT left it) of a completion's `blocks`; None where it is unknown.

    A plan is wrong if carrying it out does not succeed in the world of this completion.
    """
    name = verifier_of(record)
    if name not in PLANNED or blocks is None or answer is None:
        return None
    planned, left, judge = PLANNED[name]
    plan = planned(record, blocks.plan)
    return None if plan is None else (not judge(record, plan, salt), left(plan, answer))


def restated(record: dict, answer: str) -> bool:
    """Whether a right answer of mathematics is less evaluated than its gold."""
    return verifier_of(record) == DEFAULT and mathematics.restated(record["answer"], answer)
