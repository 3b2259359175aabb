"""Calls: a model asks for something while it decodes, and the answer is fed to it as tokens.

    <think> I need <calculator>(3 + 4) * 5</calculator>            written by the model
    <result>                                                      said by the tool: forced tokens,
    35                                                            which the policy did not choose
    </result>
    so it is 35 ...                                               written by the model

A call is answered before </think>, and not in a plan, which computes nothing. What is said goes
through the same keys and values as any token, and counts in limits. It is masked out of loss, KL,
entropy and their denominators, and does not count in the length reward.

The reply is a pure function of the record, the text so far and the completion's salt. So forks,
resumed runs and the verifier need no state. It cannot imitate anything: template tags, tags of
calls and special tokens are taken out of it. A model that writes a result tag itself is malformed.
"""

import functools
import re
from collections.abc import Callable

from plumbing import runner
from plumbing.calculator import calculate
from plumbing.ranks import fail, printable, require

CALL_SECONDS = 2.0  # of CPU time for a Python call: the whole batch waits for it
MAX_RESULT = 256  # tokens of a result
PROTOCOLS = {
    "calculator": "<calculator>(3 + 4) * 5 / 2</calculator> gives the exact value of an "
    "expression of numbers, + - * / ^ and parentheses.",
    "python": "<python>print(sum(range(10)))</python> runs a program and gives what it prints; "
    "each program starts from nothing.",
    "act": "<act>ACTION</act> carries out an action, and says what came of it.",
}
TOOLS = ("calculator", "python")  # those that --tools may name; "act" comes with a record's world
PROTOCOL = (
    "Between <think> and </think> you may write calls. The reply to a call follows it between "
    "<result> and </result>; never write these two tags yourself. Calls in the plan are not "
    "answered."
)

OPENING, CLOSING = "\n<result>\n", "\n</result>\n"
CUT = " [cut]"
UNSHOWN = "error: this result cannot be shown"
TAG = re.compile(rf"<(/?(?:plan|think|answer|result|{'|'.join(PROTOCOLS)}))>", re.IGNORECASE)
FORGED = re.compile(r"<\s*/?\s*result\s*/?\s*>", re.IGNORECASE)
RESULT = re.compile(r"\s*<result>(.*?)</result>\s*", re.DOTALL)


def check_tools(tools: tuple, tp: int = 1):
    """Refuse a --tools that names anything else, cannot be used here, or not with this --tp."""
    named = " ".join(map(str, tools))
    require(set(tools) <= set(TOOLS), f"--tools knows {' and '.join(TOOLS)}, not {named}")
    require(tp == 1 or not tools, "--tp samples without tools: leave out --tp or --tools")
    reason = "python" in tools and runner.refusal()
    require(not reason, f"--tools python cannot be used: {reason}")


def tools_of(record: dict, tools: tuple) -> tuple:
    """The tools that a record's completions may call: --tools, and "act" if it has a world."""
    return (*tools, "act") if "world" in record else tuple(tools)


def protocol(tools: tuple) -> str:
    """What the prompt says about calls, or nothing."""
    return " ".join([PROTOCOL, *(PROTOCOLS[name] for name in tools)]) if tools else ""


# --------------------------------------------------------------------------------------------------
# Calls in a text


def find_calls(text: str, tools: tuple) -> list[tuple[str, str]]:
    """The complete calls of a completion: (tool, what is asked), in order. Linear time.

    It reads from the left: what a plan holds is skipped, within a call nothing else is one, and
    </think> ends it. So more text never takes a call back: else a policy could look around in its
    world, write a plan, and begin again.
    """
    calls, at = [], 0
    opening = re.compile(rf"<(plan|/think|{'|'.join(tools)})>") if tools else None
    while opening and (match := opening.search(text, at)):
        end = text.find(f"</{match[1]}>", match.end())
        if end < 0:  # it never closes, or it is </think>
            break
        if match[1] != "plan":
            calls.append((match[1], text[match.end():end].strip()))
        at = end
    return calls


def forged(own_text: str) -> bool:
    """Whether a completion's own text holds a tag that only tools write."""
    return FORGED.search(own_text) is not None


def own_ids(ids: list[int], given: list[int]) -> list[int]:
    """The tokens that the policy chose: all but those at the `given` places."""
    said = set(given)
    return [token for place, token in enumerate(ids) if place not in said] if said else ids


@functools.lru_cache(maxsize=4)
def call_marks(tokenizer) -> Callable:
    """A function of completion ids: whether the last one may have closed a call. See plan_marks."""

    @functools.cache
    def has_bracket(token: int) -> bool:
        return ">" in tokenizer.decode([token])

    closes = re.compile(rf"</(?:{'|'.join(PROTOCOLS)})>")
    closed = lambda ids: closes.search(tokenizer.decode(ids[-16:])) is not None
    return lambda ids: has_bracket(ids[-1]) and closed(ids)


# --------------------------------------------------------------------------------------------------
# What is said


@functools.lru_cache(maxsize=4096)
def encode_result(tokenizer, said: str, stop_ids: tuple = (), most: int = MAX_RESULT) -> list[int]:
    """Token ids of a result between its tags, of `said` cut to `most` tokens.

    They hold no special token and no stop token, and no tag but the two around them.
    """
    special = {*tokenizer.all_special_ids, *stop_ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {token for token, about in added.items() if about.special}
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    without = lambda text: [token for token in encode(text) if token not in special]
    inside = without(TAG.sub(r"[\1]", printable(said.strip()[:16 * most])))
    if len(inside) > most or len(said.strip()) > 16 * most:
        inside = inside[:most] + without(CUT)
    whole = encode(OPENING) + inside + encode(CLOSING)
    if [tag.lower() for tag in TAG.findall(tokenizer.decode(whole))] != ["result", "/result"]:
        # Without the special tokens in between, pieces may have become a tag.
        return encode_result(tokenizer, UNSHOWN, stop_ids, most) if said != UNSHOWN else []
    return whole


def encode_with_results(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text that holds results, as sampling would have made them, and their places.

    The results are encoded by themselves, as a tool's reply is.
    """
    ids, given = [], []
    for i, part in enumerate(RESULT.split(text)):
        if i % 2:  # own text, result, own text, ...
            new = encode_result(tokenizer, part)
            given += range(len(ids), len(ids) + len(new))
        else:
            new = tokenizer.encode(part, add_special_tokens=False)
        ids += new
    return ids, given


def said_by_python(programs: list[str]) -> list[str]:
    """What each program prints, or why it ended; run side by side."""
    fence = re.compile(r"```(?:python|py)?\n(.*?)\n?```", re.DOTALL)
    bare = [match[1] if (match := fence.fullmatch(p)) else p for p in programs]
    reasons = {
        "slow": f"more than {CALL_SECONDS:g} seconds", "stuck": "it waits for ever",
        "memory": "out of memory", "output": "too much output", "refused": "it cannot be run",
    }
    said = []
    try:
        outputs = runner.outputs(bare, CALL_SECONDS) if bare else []
    except RuntimeError as error:  # nothing can be run: the machine is to blame, not a program
        fail(f"Python calls cannot be answered: {error}")
    for why, text in outputs:
        error = "" if why == "ok" else f"error: {reasons.get(why, 'it broke off')}"
        parts = [part for part in (text.strip()[:32 * MAX_RESULT], error) if part]
        said.append("\n".join(parts) or "(nothing printed)")
    return said


class Replies:
    """What grpo.decode asks after each token: it queues replies as `forced` tokens of rollouts.

    `questions`: records, each with `each` completions, which begin with the token ids `starts`.
    `salt_of`: the salt of the completion of that number; `act(record, actions, salt)`: what a
    record's world says.
    """

    def __init__(
        self, tokenizer, questions: list[dict], starts: list[list[int]], each: int, tools: tuple,
        stop_ids: list[int], salt_of: Callable[[int], str], act: Callable,
    ):
        self.tokenizer, self.tools, self.stop_ids = tokenizer, tools, tuple(stop_ids)
        self.questions, self.starts, self.each = questions, starts, each
        self.salt_of, self.act, self.may_close = salt_of, act, call_marks(tokenizer)
        self.given: dict[int, list[int]] = {}  # places of replies by a completion's number

    def begun(self, number: int) -> tuple[dict, list[int]]:
        """The record of a completion, and the token ids that it was given to begin with."""
        place = number // self.each
        return self.questions[place], self.starts[place]

    def places(self, number: int) -> list[int]:
        """Where a completion holds replies, counted from its beginning."""
        return [len(self.begun(number)[1]) + place for place in self.given.get(number, ())]

    def __call__(self, rollouts: list):
        """Answer those of the rollouts whose last token has closed a call."""
        asked = []
        for r in rollouts:
            said_last = r.given and r.given[-1] == len(r.ids) - 1
            if r.is_plan or r.forced or said_last or not self.may_close(r.ids):
                continue
            record, start = self.begun(r.number)
            text = self.tokenizer.decode(start + r.ids)
            calls = find_calls(text, tools_of(record, self.tools))
            if len(calls) > r.calls:
                r.calls = len(calls)
                asked.append((r, record, calls))
        programs = [calls[-1][1] for _, _, calls in asked if calls[-1][0] == "python"]
        printed = iter(said_by_python(programs))
        for r, record, calls in asked:
            tool, argument = calls[-1]
            if tool == "act":
                actions = [argument for name, argument in calls if name == "act"]
                said = self.act(record, actions, self.salt_of(r.number))
            else:
                said = next(printed) if tool == "python" else calculate(argument)
            r.forced = list(encode_result(self.tokenizer, said, self.stop_ids))
            for number in range(r.number - len(r.limits) + 1, r.number + 1):
                self.given[number] = r.given
