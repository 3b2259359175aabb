r"""The reward: what a completion must look like, whether its answer is right, and what both are worth.

    R = r_outcome + beta * r_analytic + r_structure + r_length      Eq. 4        total_reward
    r_outcome   = 1 if the answer is right, else 0                  Eq. 3        grade
    r_analytic  = softmax over a question's m plans of s_i / tau,   Eq. 2        plan_reward
                  s_i = the fraction of plan i's z CoTs that are right
    r_structure = 0.2 if the template is strictly followed, else 0  Eq. 6        parse_completion
    r_length    = alpha * exp(-| |o| - T | / (T_max - T))           Eqs. 7, 8    length_reward

Template: <plan> ... </plan> <think> ... </think> <answer> ... \boxed{7} ... </answer>

Where the paper is silent: tau = 1 and alpha = 0.1 are the callers' defaults; T_max is the longest completion
of the question's group; with no right completion r_length is 0, with T_max = T it is alpha. Where a verdict
differs from math-verify's is listed above answers_equal.

Shapes: N questions, m plans a question, z CoTs a plan. Tensors bring their own methods: this file never imports
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import grader

if TYPE_CHECKING:
    from torch import Tensor


# ----------------------------------------------------------------------------------------------- the template

class Completion(NamedTuple):
    """The three blocks of a well-formed completion, without surrounding white space."""
    plan: str
    think: str
    answer: str


TEMPLATE = ["<plan>", "</plan>", "<think>", "</think>", "<answer>", "</answer>"]
TAG = re.compile(r"(</?(?:plan|think|answer)>)", re.IGNORECASE)  # any case: <PLAN> is a wrong tag


def parse_completion(text: str) -> Completion | None:
    """The completion's blocks, or None unless the template is strictly followed (Eq. 6). Linear time.

    Each tag occurs once, in lower case and in order; no block is empty; only white space stands before,
    between and after the blocks. Where a chat template prefills the first tag, pass prefill + completion.
    """
    parts = TAG.split(text, maxsplit=len(TEMPLATE))  # text, tag, ..., text; a 7th tag stays in the last text
    if parts[1::2] != TEMPLATE:
        return None
    before, plan, gap, think, gap2, answer, after = (part.strip() for part in parts[0::2])
    if before or gap or gap2 or after or not (plan and think and answer):
        return None
    return Completion(plan, think, answer)


def build_completion(plan: str | None, think: str, answer: str) -> str:
    r"""The text that parse_completion reads back, the answer in a \boxed{}: SFT's target.

    plan None leaves the plan block out (the ablation "SFT without plans"). Raises ValueError if a part is
    empty or holds a template tag: the text could not be read back.
    """
    blocks = {"think": think, "answer": answer}
    if plan is not None:
        blocks = {"plan": plan, **blocks}
    for name, part in blocks.items():
        if not part.strip() or TAG.search(part):
            raise ValueError(f"the {name} must be non-empty and free of template tags, got {part[:80]!r}")
    blocks["answer"] = f"\\boxed{{{answer.strip()}}}"
    return "\n".join(f"<{name}>\n{part.strip()}\n</{name}>" for name, part in blocks.items())


# \s*: word-level tokenizers decode to "\boxed { 7 }". An escaped brace is text, not a group.
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")


def _last_box(text: str) -> str | None:
    r"""Content of the balanced \boxed{} or \fbox{} that begins last. One pass: linear on hostile text too."""
    groups: list[tuple[int, bool]] = []  # open braces: where the content begins, is it a box
    last: tuple[int, int] | None = None
    for match in BOX.finditer(text):
        token = match.group()
        if token == "}" and groups:
            start, is_box = groups.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.start())
        elif token.endswith("{") and token != "\\{":
            groups.append((match.end(), token != "{"))
    return text[last[0]:last[1]].strip() if last else None


def extract_answer(text: str) -> str | None:
    r"""The final answer as a string, or None if there is none. Linear time.

    The last <answer> span (to the text's end if it never closes): in it the last balanced box, else all of
    it. Without an <answer> tag only the last balanced box of the text counts. The span is isolated first,
    because math-verify reads "first \boxed{1}, then \boxed{2}" as the set {1, 2}.
    """
    start = text.rfind("<answer>")
    if start < 0:
        return _last_box(text) or None
    span = text[start + len("<answer>"):].partition("</answer>")[0]
    return _last_box(span) or span.strip() or None


# ------------------------------------------------------------------------------------------- the reward terms

def plan_reward(correct: Tensor, tau: float) -> Tensor:
    """Eq. 2: r_analytic, a softmax over a question's plans of (fraction of its CoTs that are right) / tau.

    correct (N, m, z), bool or 0/1 -> (N, m) float32; each row sums to 1. ValueError: other rank, tau <= 0.
    """
    _check_shapes(correct=correct)
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    scores = correct.float().mean(dim=2)  # s_i, (N, m)
    return (scores / tau).softmax(dim=1)


def length_reward(lengths: Tensor, correct: Tensor, alpha: float, correct_only: bool = False) -> Tensor:
    """Eqs. 7, 8: alpha * exp(-| |o| - T | / (T_max - T)): highest at T, the shortest right length.

    lengths (N, m, z) in tokens, plan and CoT together; correct (N, m, z) -> (N, m, z) float32 in [0, alpha].
    T and T_max (the longest completion, right or wrong) are those of the question's group of m*z. No right
    completion: 0. T_max = T: alpha. Eq. 8 rewards wrong completions too; correct_only gives those 0.
    Raises ValueError if the shapes differ.
    """
    _check_shapes(lengths=lengths, correct=correct)
    lengths = lengths.float()
    shortest = lengths.masked_fill(~correct.bool(), float("inf")).amin(dim=(1, 2), keepdim=True)  # T, Eq. 7
    longest = lengths.amax(dim=(1, 2), keepdim=True)  # T_max
    distance = (lengths - shortest).abs().masked_fill(longest == shortest, 0.0)
    # No right completion: T and so the distance are infinite, exp(-inf) = 0. The clamp avoids 0/0.
    reward = alpha * (-distance / (longest - shortest).clamp(min=1e-6)).exp()  # Eq. 8
    return reward * correct.bool() if correct_only else reward


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): 0 up to max_length - buffer tokens, then
    linear down to -1 at max_length and beyond. Any shape in, the same shape out, float32. buffer 0 switches
    it off.

    Raises ValueError unless 0 <= buffer <= max_length.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"the overlong buffer must be between 0 and max_length = {max_length}, got {buffer}")
    if buffer == 0:
        return lengths.float() * 0
    return ((max_length - buffer - lengths.float()) / buffer).clamp(min=-1, max=0)


def total_reward(correct: Tensor, well_formed: Tensor, lengths: Tensor, beta: float, tau: float, alpha: float,
                 correct_only: bool = False, structure: float = 0.2) -> dict[str, Tensor]:
    """Eqs. 3, 4, 6: every term and their total, each (N, m, z) float32.

    correct, well_formed (N, m, z), bool or 0/1; lengths (N, m, z) in tokens. Keys: total, outcome, plan,
    structure, length, where total = outcome + beta * plan + structure + length: "plan" is r_analytic, not
    scaled by beta yet. Raises ValueError if the shapes differ.
    """
    _check_shapes(correct=correct, well_formed=well_formed, lengths=lengths)
    outcome = correct.bool().float()                                     # Eq. 3
    plan = plan_reward(correct, tau)[:, :, None].expand(correct.shape)   # Eq. 2, the same for a plan's CoTs
    structured = structure * well_formed.bool().float()                  # Eq. 6
    length = length_reward(lengths, correct, alpha, correct_only)        # Eqs. 7, 8
    total = outcome + beta * plan + structured + length                  # Eq. 4
    return {"total": total, "outcome": outcome, "plan": plan, "structure": structured, "length": length}


def _check_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 3 or 0 in shape[1:] for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape (questions, plans, CoTs), the last two not 0, got {shapes}")


# --------------------------------------------------------------------------------------- is the answer right?
#
# Three stages, each for what the one before it leaves open: limits that refuse text by size and shape; exact
# comparison of strings and plain numbers; math-verify, in a worker process with a CPU deadline and a memory
# cap. Nothing a model wrote is evaluated: math-verify gets to use its LaTeX grammar only, because its other
# extractor ends in sympy's parse_expr, which evaluates Python.
#
# Where the verdict differs from math-verify's:
#   12.5 = 12.5\%          a percent sign is a unit or a factor 1/100; for math-verify a unit of integers only
#   1 1/2 = 3/2            mixed numbers without \frac; but 5 6 /= 11, where math-verify adds up
#   1\,234 = 1234          a thin space separates thousands
#   1.00000001 /= 1.0      two decimals are compared exactly, math-verify rounds both to 6 places
#   felt /= left           words are words (ab too); math-verify reads products of letters
#   2,1 /= 1,2             a plain list of numbers has an order; golds \{1,2\}, x=1,x=2 have none
#   what is the same in _plain spelling is equal, even if it cannot be parsed (June 5 = \text{June 5})
#   a sentence is not searched for a number in it: "The answer is 5" without a box is wrong
#   a text over 2,000 characters, with invisible characters, ... is wrong without a look (_refusal)

MAX_CHARS = 2_000      # of an answer; real ones stay under 200
MAX_DIGITS = 200       # in one run; 2^500 has 151
MAX_DEPTH = 25         # of brackets in brackets
BATCH_SECONDS = 10.0   # budget of a batch, for each started BATCH_SIZE pairs
BATCH_SIZE = 2_048


def answers_equal(gold: str, answer: str | None) -> bool:
    """Whether the answer is right: grade() of one pair. Not symmetric: the gold's form decides."""
    return grade([gold], [answer])[0]


def grade(golds: list[str], answers: list[str | None], budget: float = BATCH_SECONDS) -> list[bool]:
    """Whether each answer equals its gold (Eq. 3); None, for no answer found, is wrong.

    Bounded: what takes over grader.CPU_SECONDS, kills each worker that it meets, or is not reached
    within the budget (seconds, for each started BATCH_SIZE pairs) because of slow ones is wrong,
    and counted in grader_stats(). Works from any thread. Raises ValueError if the lists differ in
    length, RuntimeError if no worker can be started or kept alive, or a busy machine leaves answers
    out in three budgets.
    """
    if len(golds) != len(answers):
        raise ValueError(f"expected one answer for each gold, got {len(golds)} golds, {len(answers)} answers")
    verdicts = [False] * len(golds)
    undecided: dict[tuple[str, str | None], list[int]] = {}  # equal pairs are judged once
    with grader.pool.lock:
        for i, (gold, answer) in enumerate(zip(golds, answers)):
            grader.pool.stats["graded"] += 1
            if _refusal(gold):
                grader.pool.stats["bad_golds"] += 1
            elif answer is None or _refusal(answer):
                grader.pool.stats["no_answer" if answer is None else "refused"] += 1
            else:
                pair = _as_tuples(_clean(gold), _clean(answer))
                quick = _quick_verdict(*pair)
                if quick is None:
                    undecided.setdefault(pair, []).append(i)
                else:
                    verdicts[i] = quick
        judged = grader.pool.judge(list(undecided), budget * -(-len(golds) // BATCH_SIZE))
    for pair, indices in undecided.items():
        for i in indices:
            verdicts[i] = judged[pair]
    return verdicts


def check_gold(gold: str) -> str | None:
    """Why a gold answer cannot be used ("is empty", ...), None if it can. For data loading."""
    return check_golds([gold])[0]


def check_golds(golds: list[str]) -> list[str | None]:
    """check_gold of many, side by side. Usable is a number, plain words, and what math-verify can read.

    No budget: grader.CPU_SECONDS a gold bound it. Allow about 10 ms for each gold that is not a number.
    """
    reasons = [_refusal(gold) for gold in golds]
    undecided = {}
    for i, gold in enumerate(golds):
        if not reasons[i] and not _number(_plain(_clean(gold))) and not WORDS.fullmatch(_plain(_clean(gold))):
            undecided[i] = (_clean(gold), None)
    with grader.pool.lock:
        judged = grader.pool.judge(list(undecided.values()), float("inf"))
    for i, pair in undecided.items():
        reasons[i] = None if judged[pair] else "can be read neither as mathematics nor as plain words"
    return reasons


# Of grader_stats: what was judged, and what was called wrong without a verdict.
GRADER_COUNTS = ("graded", "judged", "refused", "bad_golds", "unparsed", "errors", "timeouts", "worker_deaths", "over_budget")


def grader_stats(reset: bool = False) -> dict[str, float]:
    """Counters since the last reset, for a step's metrics; reset=True reads them and starts again at zero.

    graded: pairs seen. Wrong without a look: no_answer, refused, bad_golds (see _refusal). judged: distinct
    pairs new to math-verify, which found them right, wrong, unparsed (could not read the answer) or raised
    (errors; their kinds as error_<kind>). Wrong by force: timeouts, over_budget. worker_deaths:
    each time a worker died; its answer was tried again, twice at most, and then wrong. slow: times a
    deadline was hit, first look included. peak_mb: the largest memory of a worker.
    """
    names = ("graded no_answer refused bad_golds judged right wrong unparsed errors timeouts worker_deaths "
             "over_budget slow peak_mb").split()
    with grader.pool.lock:
        stats = {**dict.fromkeys(names, 0), **grader.pool.stats}
        if reset:
            grader.pool.stats.clear()
    stats["errors"] = sum(count for name, count in stats.items() if name.startswith("error_"))
    return stats


DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


def _refusal(text: str) -> str | None:
    """Why a text is not looked at, or None. The length comes first, because the rest takes linear time."""
    if not isinstance(text, str):
        return "is not a string"
    if len(text) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if not text.strip():
        return "is empty"
    if not " ".join(text.split()).isprintable():  # control and direction characters, lone surrogates
        return "holds invisible characters"
    if DIGITS.search(text):
        return f"holds a run of over {MAX_DIGITS} digits"
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return f"nests brackets over {MAX_DEPTH} deep" if deepest > MAX_DEPTH else None


SYMBOLS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/",
                         "≠": r"\ne ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ",
                         "∅": r"\emptyset "})


@lru_cache(grader.CACHE_SIZE)
def _clean(text: str) -> str:
    r"""What math-verify gets: one line, without box, dollar signs, \( \) and final full stop."""
    text = (_last_box(text) or text).translate(SYMBOLS)
    text = " ".join(text.replace("\\$", "").replace("$", " ").split())
    for left, right in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right):
            text = text[2:-2]
    return text.strip().rstrip(".").strip()


# Spellings of one thing, for comparing strings. No repetition stands in another: every pattern is linear.
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
    (r"(?<=\d)(?:\\,|\\!|\{,\}|,\\!)(?=\d{3})", ","),       # 1\,234 and 1{,}234
    (r"\\[,;:! ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", "°"),
    (r"\\%|(?<=\d) ?percent\b", "%"),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (r" +", " "),
    (r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", ""),             # but "1 2" is not 12, "\pi r" not \pir
]]


def _plain(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return text.strip()


class _Number(NamedTuple):
    value: Fraction | float  # a float only for the two infinities
    places: int | None  # decimal places written, None for integers and fractions
    percent: bool


NUMBER = re.compile(r"(?P<sign>[+-]?)[€£¥₹]?(?:"
                    r"(?P<digits>\d{1,3}(?:,\d{3})+|\d+)?(?:\.(?P<places>\d*))?|"
                    r"(?:(?P<whole>\d+)(?: |(?=\\)))?"
                    r"(?:\\frac\{(?P<p>-?\d+)\}\{(?P<q>-?\d+)\}|(?P<a>\d+)/(?P<b>\d+))"
                    r")(?P<unit>%|°| ?degrees?)?")


@lru_cache(grader.CACHE_SIZE)
def _number(text: str) -> _Number | None:
    """The exact value of a plain integer, decimal, fraction or mixed number (in _plain spelling)."""
    if text.lstrip("+-") == r"\infty":
        return _Number(float("-inf" if text[0] == "-" else "inf"), None, False)
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    part, places = match.groupdict(), None
    p, q = part["p"] or part["a"], part["q"] or part["b"]
    if p:
        if int(q) == 0 or (part["whole"] and "-" in p + q):
            return None
        value = int(part["whole"] or 0) + Fraction(int(p), int(q))
    elif part["digits"] or part["places"]:
        decimals = part["places"] or ""
        value = Fraction(int((part["digits"] or "").replace(",", "") + decimals), 10 ** len(decimals))
        places = len(decimals) or None
    else:
        return None
    return _Number(-value if part["sign"] == "-" else value, places, part["unit"] == "%")


def _same_number(gold: _Number, answer: _Number) -> bool:
    if gold.percent != answer.percent:  # 50% is 50 or 1/2, whichever the question asks for
        percentage, value = (gold.value, answer.value) if gold.percent else (answer.value, gold.value)
        return value in (percentage, percentage / 100)
    if gold.value != answer.value and (gold.places is None) != (answer.places is None):
        # A fraction may be written as a decimal, if that is rounded correctly to 6 places or more.
        decimal, exact = (gold, answer) if gold.places else (answer, gold)
        return decimal.places >= 6 and round(exact.value, decimal.places) == decimal.value
    return gold.value == answer.value


LETTER = re.compile(r"\(?([A-Za-z])\)?")
WORDS = re.compile(r"(?:[AaI] (?!(?:and|or)\b))?[A-Za-z]{2,}(?:(?:[ '-]|[,;] ?)[A-Za-z0-9]+)*")
QUANTITY = re.compile(r"-?\d[\d.,/]*(?: [A-Za-z]+)+")  # 5 lions
ASSIGNMENT = re.compile(r"[A-Za-z]=")
SEQUENCE = re.compile(r"([(\[]|\\\{)([^()\[\]{}]*,[^()\[\]{}]*)([)\]]|\\\})")
GAP = re.compile(r"\d \d(?!\d*/\d)")  # two numbers side by side, and not a mixed one


@lru_cache(grader.CACHE_SIZE)
def _quick_verdict(gold: str, answer: str) -> bool | None:
    """True or False where that is cheap and certain, None where math-verify must decide."""
    gold, answer = _plain(gold), _plain(answer)
    if gold == answer:
        return True
    if GAP.search(answer):
        return False
    # A number for "x = number", either way round; the same letter on both sides can be left out too.
    letters = [text[0] for text in (gold, answer) if ASSIGNMENT.match(text)]
    if len(set(letters)) == 1:
        gold, answer = ASSIGNMENT.sub("", gold, count=1), ASSIGNMENT.sub("", answer, count=1)
    numbers = _number(gold), _number(answer)
    if numbers[0] and numbers[1]:
        return _same_number(*numbers)
    if WORDS.fullmatch(gold):
        answer = ASSIGNMENT.sub("", answer, count=1)
        if WORDS.fullmatch(answer):
            return _words(gold) == _words(answer)
    if WORDS.fullmatch(gold) or QUANTITY.fullmatch(gold):
        # math-verify may drop a unit and join what is spaced, but it must not shuffle the letters.
        ours, theirs = _letters(gold), _letters(answer)
        if ours != theirs and (WORDS.fullmatch(gold) or sorted(ours) == sorted(theirs)):
            return False
    if letters:
        return None
    choices = LETTER.fullmatch(gold), LETTER.fullmatch(answer)
    if choices[0] and choices[1]:  # (B), B, \text{b}
        return choices[0][1].lower() == choices[1][1].lower()
    sequences = SEQUENCE.fullmatch(gold), SEQUENCE.fullmatch(answer)
    if sequences[0] and sequences[1]:
        return _same_sequence(*sequences)
    return None


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word != "and"]


def _letters(text: str) -> str:
    return re.sub(r"\\(?:cdot|times)|[^A-Za-z]", "", text).lower()


CONSTANT = r"(?:[\d.+*/^{}!%° -]|\\(?:frac|sqrt|pi|infty)(?![a-zA-Z]))+"
NUMBERS = re.compile(rf"{CONSTANT}(?:[,;]{CONSTANT})+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BRACES = re.compile(r"(?:[A-Za-z](?:=|\\in ?))?\\\{(.*)\\\}")
JOINT = re.compile(r"[,;]? ?\b(?:and|or)\b ?|;")
NAME = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?:_\{?\d+\}?)?=")


@lru_cache(grader.CACHE_SIZE)
def _as_tuples(gold: str, answer: str) -> tuple[str, str]:
    r"""A gold that is a plain list of numbers, and its answer, as tuples: in those order counts. Other
    pairs as they are. Braces, names and "or" in an answer do not lift the order: the gold's form decides.
    """
    listed = _listed(gold)
    one_number = ", " not in gold and _number(listed)  # 1,234
    if one_number or not NUMBERS.fullmatch(listed):
        return gold, answer
    answer = NAME.sub("", JOINT.sub(",", BRACES.sub(r"\1", _listed(answer), count=1)))
    return f"({listed.replace(';', ',')})", answer if answer[:1] in ("(", "[") else f"({answer})"


def _listed(text: str) -> str:
    """In _plain spelling, which drops the space that tells "1, 234" from "1,234"."""
    return _plain(THOUSANDS.sub("", text) if ", " in text else text)


def _same_sequence(gold: re.Match, answer: re.Match) -> bool | None:
    """Tuples, intervals and sets of plain numbers; None for what mixes them or holds anything else."""
    golds, answers = ([_number(item.strip()) for item in match[2].split(",")] for match in (gold, answer))
    if not all(golds + answers):
        return None
    brackets = gold[1] + gold[3], answer[1] + answer[3]
    if brackets[0] == brackets[1] == r"\{\}":  # neither order nor repetition counts
        golds, answers = ([number for _, number in sorted({n.value: n for n in numbers}.items())]
                          for numbers in (golds, answers))
    elif brackets[0] != brackets[1]:
        intervals = len(golds) == len(answers) == 2 and r"\{" not in (gold[1], answer[1])
        return False if intervals else None
    return len(golds) == len(answers) and all(map(_same_number, golds, answers))


# ----------------------------------------------------------------------------- does the plan hold the answer?

# "1." "(2)" "- 3)" at the head of a line. A second run of blanks stands only after a bullet: two side
# by side would take quadratic time.
MARKERS = re.compile(r"^[ \t]*(?:[-*•][ \t]*)?\(?\d{1,3}[.):](?!\d)|"
                     r"\b(?:step|phase|stage|part|case|method|equation)s?[ \t]*\(?\d{1,3}\b(?!\.\d)",
                     re.IGNORECASE | re.MULTILINE)
STATES = re.compile(r"(?:=|→|≈|\\to|\\boxed ?\{|\b(?:is|are|be|equals?|gives?|yields?|obtains?|answer|result|"
                    r"choice|option))[ \t:($\\{]*$", re.IGNORECASE)
PLAN_NUMBER = re.compile(r"(?<![\w.^/\\])(?<!(?<!boxed)\{)(?:(?<![)\]])-)?"
                         r"(?:\\frac\{-?\d{1,40}\}\{\d{1,40}\}|"
                         r"\d{1,40}(?:,\d{3}){0,9}(?:\.\d{1,40})?(?:/\d{1,40})?)(?![\w/]|\.\d)")


def plan_leaks(plan: str, answer: str) -> bool:
    r"""Whether the plan already holds the final answer: a plan that does is not a plan.

    A numeric answer leaks if the plan holds a number of equal value, any other if the plan holds it in the
    same spelling (up to _plain) as whole words. Numbers of lists and steps ("1.", "Step 2", "case (3)") do
    not count. Integers up to 10 and answers of up to three characters turn up in honest plans ("2 cases",
    "solve for x"): they leak only where the plan states them ("= 2", "the answer is B", "\boxed{2}", alone on
    a line). Linear time.
    """
    answer = _plain(_clean(answer)) if _refusal(answer) is None else ""
    if not answer:
        return False
    plan, number = MARKERS.sub(" ", plan), _number(answer)
    if number and isinstance(number.value, Fraction):
        ordinary = number.value in range(-10, 11)
        found = (match.span() for match in PLAN_NUMBER.finditer(plan)
                 if (other := _number(_plain(match.group()))) and other.value == number.value)
    else:
        ordinary = len(answer) <= 3
        plan = "\n".join(_plain(line) for line in plan.splitlines())
        if WORDS.fullmatch(answer):
            plan, answer = plan.lower(), answer.lower()
        found = _occurrences(plan, answer)
    for start, end in found:
        before, after = plan[max(0, start - 20):start], plan[end:end + 20]
        alone = not before.rpartition("\n")[2].strip(" .$") and not after.partition("\n")[0].strip(" .$")
        if not ordinary or alone or STATES.search(before.rpartition("\n")[2]):
            return True
    return False


def _occurrences(text: str, words: str) -> Iterator[tuple[int, int]]:
    """Where words stand in the text and no letter or digit continues them."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        if not (words[0].isalnum() and text[max(0, start - 1):start].isalnum()
                or words[-1].isalnum() and text[end:end + 1].isalnum()):
            yield start, end
        start = text.find(words, end)
