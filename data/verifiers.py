"""Who decides whether a completion is right: the verifier that its problem record names.

A verifier is a function of lists: problem records, answers (None: none was found) and salts, one of
each per completion, to a list of verdicts. A salt is a string that no other completion of the run
has: a verifier that draws a world for each completion draws it from there. The same record, answer
and salt give the same verdict, always.
"""

from data import doors
from data.code import code
from data.code import refusal as code_refusal
from plumbing.answers import grade

DEFAULT = "math"


def math(records: list[dict], answers: list, salts: list[str], evaluated: bool) -> list[bool]:
    """The answer equals the record's gold (plumbing/answers.py)."""
    golds = [record["answer"] for record in records]
    return grade(golds, answers, evaluated=evaluated)


def chance(records: list[dict], answers: list, salts: list[str], evaluated: bool) -> list[bool]:
    """The route succeeds in the completion's own world (data/doors.py)."""
    return [doors.judge(*one) for one in zip(records, answers, salts)]


VERIFIERS = {"math": math, "doors": chance, "code": code}


def refusal(record: dict) -> str | None:
    """Why a record's verifier cannot judge it, or None. (Golds of "math" are checked elsewhere.)"""
    name = record.get("verifier", DEFAULT)
    if name not in VERIFIERS:
        return f"names the verifier {name!r}; choose one of {', '.join(VERIFIERS)}"
    if name == "doors":
        try:
            doors.doors_of(record["problem"])
        except ValueError as error:
            return f"is {error}; mend it, or leave its verifier out"
    return code_refusal(record) if name == "code" else None


def verify(
    records: list[dict], answers: list[str | None], salts: list[str], evaluated: bool = False
) -> list[bool]:
    """Whether each answer is right (Eq. 3), by its record's verifier ("math" if none).

    `evaluated`: answers must be evaluated as far as their golds (see plumbing.answers.grade).
    """
    verdicts = [False] * len(records)
    names = [record.get("verifier", DEFAULT) for record in records]
    for name in dict.fromkeys(names):
        mine = [i for i, other in enumerate(names) if other == name]
        part = [[values[i] for i in mine] for values in (records, answers, salts)]
        for i, verdict in zip(mine, VERIFIERS[name](*part, evaluated)):
            verdicts[i] = verdict
    return verdicts
