"""Worlds: records whose completions act, step by step, and are judged by what they have reached.

A record names its world, `"world": "file.py:play"`. A world is one pure function, which replays an
episode from its start:

    def play(record, actions, answer, salt):
        ...
        return said, right

`actions` are the texts of all <act> calls so far, in order. `said` is what the world says to the
last one. `answer` is None while the episode goes on, and the final answer when it is judged: then
`right` is the verdict. Whatever is chance must be drawn from the record and `salt`, which each CoT
has for itself. As nothing is kept, forks of a plan, resumed runs and the judge need no state.

Beside it in the file may be `planned(record, plan)`, the actions that a plan consists of. Then it
is measured how often plans are wrong, and what becomes of them (plumbing/revision.py). The embedded
world is data/walk.py. These functions run in the training process, without limits: they must not
evaluate what a model wrote.
"""

from collections.abc import Callable

from data.own import load, said
from plumbing.calls import Replies, find_calls, tools_of
from plumbing.ranks import fail, require


class Episode(str):
    """The final answer of a completion that acted, with its `actions`."""

    actions: list[str] = []


def episode(record: dict, text: str, answer: str | None) -> str | None:
    """`answer` itself; with a world, as an Episode. `text`: the completion's own tokens."""
    if answer is None or "world" not in record:
        return answer
    whole = Episode(answer)
    whole.actions = [asked for _, asked in find_calls(text, ("act",))]
    return whole


def run(name: str, function: Callable, *arguments):
    """What a function of the user's own returns. Raises SystemExit where it raises anything."""
    try:
        return function(*arguments)
    except Exception as error:  # of any kind: it is the user's code
        fail(f"{name} raised {said(error)}; mend it")


def play(record: dict, actions: list[str], answer: str | None, salt: str) -> tuple[str, bool]:
    """What the record's world returns. Raises SystemExit where that is not of the right form."""
    name = f"the world {record['world']}"
    function = load(record["world"])
    require(callable(function), f"{name} cannot be used: {function}")
    result = run(name, function, record, list(actions), answer, salt)
    fit = isinstance(result, tuple) and [*map(type, result)] == [str, bool]
    require(fit, f"{name} returned {result!r:.80}; return what it says (str) and a verdict (bool)")
    return result


def say(record: dict, actions: list[str], salt: str) -> str:
    """What the world says to the last action."""
    return play(record, actions, None, salt)[0]


def judge(record: dict, answer: str | None, salt: str) -> bool:
    """Whether an Episode has succeeded in the world of its salt."""
    return answer is not None and play(record, getattr(answer, "actions", []), answer, salt)[1]


def check(record: dict) -> str | None:
    """Why a record's world cannot be used, or None."""
    if not isinstance(record["world"], str):
        return f"its world is {record['world']!r}, not a name"
    function = load(record["world"])
    if not callable(function):
        return f"its world {record['world']!r} cannot be used: {function}"
    play(record, [], "trial", "trial")


def planned(record: dict, plan: str) -> Episode | None:
    """The episode that carries out a plan, and ends with the gold. None where nobody can tell."""
    name = f"{record['world'].rpartition(':')[0]}:planned"
    function = load(name)
    if not callable(function):
        return None
    whole = Episode(record["answer"])
    whole.actions = list(run(name, function, record, plan))
    return whole


def left(planned: Episode, taken: Episode | None) -> bool:
    """Whether an episode holds an action that the plan does not."""
    return taken is not None and not set(taken.actions) <= set(planned.actions)


def replies(
    tokenizer,
    questions: list[dict],
    config,
    stop_ids: list[int],
    salt_of: Callable[[int], str] = lambda number: f" {number}",
    starts: list[list[int]] | None = None,
) -> Replies | None:
    """What grpo.decode asks for replies; None where no record has tools.

    `salt_of`: the salt of each completion's number; `starts`: token ids that each question's
    completions are given to begin with. Raises SystemExit with --tp, whose ranks would have to
    agree on replies.
    """
    if not any(tools_of(question, config.tools) for question in questions):
        return None
    single = getattr(config, "tp", 1) == 1
    require(single, "--tp samples without tools and worlds: leave --tp out, or the tools")
    starts, each = starts or [[]] * len(questions), config.plans * config.cots
    return Replies(tokenizer, questions, starts, each, config.tools, stop_ids, salt_of, say)
