r"""Is an answer right? Can a gold be graded? Does a plan give the answer away?

Grading has three stages, and each leaves to the next what it cannot decide:

  1. Limits refuse text by its size and shape.
  2. Strings and plain numbers are compared exactly.
  3. math-verify judges, in a worker process with a CPU deadline and a memory cap (grader.py).

Nothing a model wrote is evaluated. math-verify may use its LaTeX grammar only, because its other
extractor ends in sympy's parse_expr, which evaluates Python.

Where the verdict differs from math-verify's:
  12.5 = 12.5\%           a percent sign is a unit or a factor 1/100; math-verify: of integers only
  1 1/2 = 3/2             mixed numbers need no \frac; but 5 6 /= 11, where math-verify adds up
  1\,234 = 1234           a thin space separates thousands
  1.00000001 /= 1.0       decimals are compared exactly; math-verify rounds both to 6 places
  felt /= left            words are words (ab, too); math-verify reads products of letters
  2,1 /= 1,2              a plain list of numbers has an order; golds \{1,2\} and x=1,x=2 have none
  June 5 = \text{June 5}  what has one `plain` spelling is equal, even if it cannot be parsed
  The answer is 5 /= 5    a sentence without a box is not searched for a number
  \boxed{1}, \boxed{2}    boxes side by side are one list (see `last_box`)
Published figures count \binom{8}{4} for 70 as right, as math-verify does. Training need not: see
`restated`. A text over 2,000 characters, with invisible characters, ... is wrong unread (see
`refusal`).
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from plumbing import grader
from plumbing.undone import ARITHMETIC, is_equation, undone

MAX_CHARS = 2_000  # of an answer; real ones stay under 200
MAX_DIGITS = 200  # in one run; 2^500 has 151
MAX_DEPTH = 25  # of brackets in brackets
BATCH_SECONDS = 10.0  # time budget for each started BATCH_SIZE pairs
BATCH_SIZE = 2_048

# What runs log of grader_stats: what was judged, what was called wrong without a verdict, and what
# restates the question.
GRADER_COUNTS = (
    "graded", "judged", "refused", "bad_golds", "unparsed", "errors", "timeouts", "worker_deaths",
    "over_budget", "restated",
)


# --------------------------------------------------------------------------------------------------
# Grading in batches


def answers_equal(gold: str, answer: str | None, evaluated: bool = False) -> bool:
    """Whether the answer is right: `grade` of one pair. Not symmetric: the gold's form decides."""
    return grade([gold], [answer], evaluated=evaluated)[0]


def grade(
    golds: list[str], answers: list[str | None], budget: float = BATCH_SECONDS,
    evaluated: bool = False,
) -> list[bool]:
    """Whether each answer equals its gold (Eq. 3). None means that no answer was found: wrong.

    With `evaluated` an answer that is `restated` is wrong, too: training rewards no copy of the
    question. Such answers are counted either way.

    Time is bounded. An answer is wrong, and counted in `grader_stats`, if it takes over
    grader.CPU_SECONDS, if it kills each worker that it meets, or if slow answers leave no time for
    it within the budget (seconds for each started BATCH_SIZE pairs). Works from any thread.

    Raises ValueError if the lists differ in length. Raises RuntimeError if no worker can be started
    or kept alive, or if a busy machine leaves answers out in three budgets.
    """
    if len(golds) != len(answers):
        counts = f"{len(golds)} golds and {len(answers)} answers"
        raise ValueError(f"expected one answer for each gold, got {counts}")
    verdicts = [False] * len(golds)
    undecided: dict[tuple[str, str], list[int]] = {}  # equal pairs are judged once
    pool = grader.pool
    with pool.lock:
        for i, (gold, answer) in enumerate(zip(golds, answers)):
            pool.stats["graded"] += 1
            if refusal(gold):
                pool.stats["bad_golds"] += 1
            elif answer is None:
                pool.stats["no_answer"] += 1
            elif refusal(answer):
                pool.stats["refused"] += 1
            else:
                pair = as_tuples(clean(gold), clean(answer))
                verdict = quick_verdict(*pair)
                if verdict is None:
                    undecided.setdefault(pair, []).append(i)
                else:
                    verdicts[i] = verdict
        batches = -(-len(golds) // BATCH_SIZE)
        judged = pool.judge(list(undecided), budget * batches)
        for pair, indices in undecided.items():
            for i in indices:
                verdicts[i] = judged[pair]
        for i in [i for i, right in enumerate(verdicts) if right]:
            if restated(golds[i], answers[i]):
                pool.stats["restated"] += 1
                verdicts[i] = not evaluated
    return verdicts


@lru_cache(grader.CACHE_SIZE)
def restated(gold: str, answer: str) -> bool:
    r"""Whether the answer leaves an operation undone that its gold does not: \binom{8}{4} for 70.

    Linear time, without a worker. It says nothing of whether the answer is right.
    """
    if refusal(gold) or refusal(answer):
        return False
    ours, theirs = (clean(text.replace("÷", r"\div ")) for text in (gold, answer))
    if plain(ours) == plain(theirs):
        return False
    allowed = undone(ours)
    extra = undone(theirs, equation=is_equation(ours)) - allowed
    if allowed:  # 5! accepts 5 \cdot 4!, as it is no normal form itself
        extra -= {ARITHMETIC}
    number = parse_number(plain(ours))
    if number and (number.places or 0) >= 6:  # \sin 1 is more exact than 0.841471
        extra -= {"trigonometry"}
    return bool(extra)


def check_gold(gold: str) -> str | None:
    """Why a gold answer cannot be used ("is empty", ...), or None if it can."""
    return check_golds([gold])[0]


def check_golds(golds: list[str]) -> list[str | None]:
    """`check_gold` of many, side by side. For data loading.

    A number, plain words, and what math-verify can read are usable. There is no time budget, but
    grader.CPU_SECONDS bounds each gold. One that is not a number takes about 10 ms.
    """
    reasons = [refusal(gold) for gold in golds]
    undecided = {}
    for i, gold in enumerate(golds):
        if not reasons[i]:
            spelling = plain(clean(gold))
            if not parse_number(spelling) and not WORDS.fullmatch(spelling):
                undecided[i] = clean(gold)
    with grader.pool.lock:
        readable = grader.pool.can_read(list(undecided.values()))
    for i, gold in undecided.items():
        if not readable[gold]:
            reasons[i] = "can be read neither as mathematics nor as plain words"
    return reasons


def grader_stats(reset: bool = False) -> dict[str, float]:
    """Counts since the last reset, for a step's metrics. `reset` sets them to zero afterwards.

    graded                          pairs seen
    no_answer, refused, bad_golds   pairs that are wrong unread (see `refusal`)
    judged                          distinct pairs that were new to math-verify
    right, wrong, unparsed, errors  its verdicts: unparsed answers are those that it could not read,
                                    errors those that raised (error_<kind> counts each kind)
    timeouts, over_budget           answers that are wrong because they ran out of time
    worker_deaths                   deaths of workers; the answer is tried again, twice at most
    restated                        right answers that `restated` finds less evaluated than the gold
    slow                            deadlines hit, that of the first look included
    peak_mb                         the largest memory of a worker, in MiB
    """
    names = (
        "graded", "no_answer", "refused", "bad_golds", "judged", "right", "wrong", "unparsed",
        "errors", "timeouts", "worker_deaths", "over_budget", "restated", "slow", "peak_mb",
    )
    with grader.pool.lock:
        stats = {**dict.fromkeys(names, 0), **grader.pool.stats}
        if reset:
            grader.pool.stats.clear()
    stats["errors"] = sum(count for name, count in stats.items() if name.startswith("error_"))
    return stats


# --------------------------------------------------------------------------------------------------
# Stage 1: limits

DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


def refusal(text: str) -> str | None:
    """Why a text is not read, or None. Its length is tested first: the rest takes linear time."""
    if not isinstance(text, str):
        return "is not a string"
    if len(text) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if not text.strip():
        return "is empty"
    if not " ".join(text.split()).isprintable():  # control and direction characters, surrogates
        return "holds invisible characters"
    if DIGITS.search(text):
        return f"holds a run of over {MAX_DIGITS} digits"
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return f"nests brackets over {MAX_DEPTH} deep" if deepest > MAX_DEPTH else None


# --------------------------------------------------------------------------------------------------
# One spelling

# \s*: word-level tokenizers decode to "\boxed { 7 }". An escaped brace is text, not a group.
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")


# What may stand between the boxes of one list. Each repetition takes a whole token: linear time.
BETWEEN_BOXES = re.compile(
    r"(?:[\s,;$~]|\\[,;:! \\()\[\]]|\\q?quad(?![a-zA-Z])|and(?![a-zA-Z])|or(?![a-zA-Z])|"
    r"\\(?:text|textrm|mathrm|mbox) ?\{ ?(?:,? ?and|,? ?or|,) ?\})*"
)


def last_box(text: str) -> str | None:
    r"""Content of the balanced \boxed{} or \fbox{} that begins last, or None.

    Boxes with nothing but commas, semicolons, "and", "or", dollar signs or spaces between them are
    one list, without repetitions: \boxed{1} and \boxed{-2} are \{1, -2\}, as any order is right.
    Other words between them end the list, so that hedging earns nothing.

    One pass: it takes linear time on hostile text, too.
    """
    groups: list[tuple[int, int, bool]] = []  # open braces: begin, that of the content, is it a box
    boxes: list[tuple[int, int, int]] = []  # begin, begin and end of the content; by their ends
    last = -1  # which of them begins last
    for match in BOX.finditer(text):
        token = match.group()
        if token == "}" and groups:
            begin, start, is_box = groups.pop()
            if is_box:
                boxes.append((begin, start, match.start()))
                if last < 0 or begin > boxes[last][0]:
                    last = len(boxes) - 1
        elif token.endswith("{") and token != "\\{":
            groups.append((match.start(), match.end(), token != "{"))
    if last < 0:
        return None
    first = last
    while first and BETWEEN_BOXES.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    found = dict.fromkeys(text[start:end].strip() for _, start, end in boxes[first:last + 1])
    joined = ", ".join(filter(None, found))
    if len(found) == 1 or not is_number_list(joined):
        return joined
    return f"\\{{{THOUSANDS.sub('', joined)}\\}}"


SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "≠": r"\ne ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∅": r"\emptyset ",
})


@lru_cache(grader.CACHE_SIZE)
def clean(text: str) -> str:
    r"""What math-verify gets: one line, without box, dollar signs, \( \) and final full stop."""
    text = (last_box(text) or text).translate(SYMBOLS)
    text = " ".join(text.replace("\\$", "").replace("$", " ").split())
    for left, right in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right):
            text = text[2:-2]
    return text.strip().rstrip(".").strip()


# No pattern holds a repetition within another, so each takes linear time.
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"(?<=\d)(?:\\,|\\!|\{,\}|,\\!)(?=\d{3})", ","),  # 1\,234 and 1{,}234
        (r"\\[,;:! ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r" \1 "),
        (r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", "°"),
        (r"\\%|(?<=\d) ?percent\b", "%"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r" +", " "),
        (r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", ""),  # but "1 2" is not 12, "\pi r" not \pir
    ]
]


def plain(text: str) -> str:
    """The same in the one spelling in which strings are compared."""
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return text.strip()


# --------------------------------------------------------------------------------------------------
# Plain numbers


class Number(NamedTuple):
    value: Fraction | float  # a float for the two infinities only
    places: int | None  # decimal places that are written; None for integers and fractions
    percent: bool


NUMBER = re.compile(
    r"(?P<sign>[+-]?)[€£¥₹]?(?:"
    r"(?P<digits>\d{1,3}(?:,\d{3})+|\d+)?(?:\.(?P<places>\d*))?|"
    r"(?:(?P<whole>\d+)(?: |(?=\\)))?"
    r"(?:\\frac\{(?P<p>-?\d+)\}\{(?P<q>-?\d+)\}|(?P<a>\d+)/(?P<b>\d+))"
    r")(?P<unit>%|°| ?degrees?)?"
)


@lru_cache(grader.CACHE_SIZE)
def parse_number(text: str) -> Number | None:
    """The exact value of a plain integer, decimal, fraction or mixed number, else None.

    `text` is in `plain` spelling.
    """
    if text.lstrip("+-") == r"\infty":
        return Number(float("-inf" if text[0] == "-" else "inf"), None, False)
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
        digits = (part["digits"] or "").replace(",", "") + decimals
        value = Fraction(int(digits), 10 ** len(decimals))
        places = len(decimals) or None
    else:
        return None
    return Number(-value if part["sign"] == "-" else value, places, part["unit"] == "%")


def same_number(gold: Number, answer: Number) -> bool:
    if gold.percent != answer.percent:  # 50% is 50 or 1/2, whichever the question asks for
        percentage, other = (gold, answer) if gold.percent else (answer, gold)
        return other.value in (percentage.value, percentage.value / 100)
    if gold.value != answer.value and (gold.places is None) != (answer.places is None):
        # A fraction may be written as a decimal that is rounded correctly to 6 places or more.
        decimal, exact = (gold, answer) if gold.places else (answer, gold)
        return decimal.places >= 6 and round(exact.value, decimal.places) == decimal.value
    return gold.value == answer.value


# --------------------------------------------------------------------------------------------------
# Stage 2: exact comparison

LETTER = re.compile(r"\(?([A-Za-z])\)?")
WORDS = re.compile(r"(?:[AaI] (?!(?:and|or)\b))?[A-Za-z]{2,}(?:(?:[ '-]|[,;] ?)[A-Za-z0-9]+)*")
QUANTITY = re.compile(r"-?\d[\d.,/]*(?: [A-Za-z]+)+")  # 5 lions
ASSIGNMENT = re.compile(r"[A-Za-z]=")
SEQUENCE = re.compile(r"([(\[]|\\\{)([^()\[\]{}]*,[^()\[\]{}]*)([)\]]|\\\})")
GAP = re.compile(r"\d \d(?!\d*/\d)")  # two numbers side by side, and not a mixed one


@lru_cache(grader.CACHE_SIZE)
def quick_verdict(gold: str, answer: str) -> bool | None:
    """True or False where that is cheap and certain, None where math-verify must decide."""
    gold, answer = plain(gold), plain(answer)
    if gold == answer:
        return True
    if GAP.search(answer):
        return False
    # "x = 7" and "7" are equal, either way round. The same letter on both sides is left out, too.
    letters = [text[0] for text in (gold, answer) if ASSIGNMENT.match(text)]
    if len(set(letters)) == 1:
        gold, answer = ASSIGNMENT.sub("", gold, count=1), ASSIGNMENT.sub("", answer, count=1)
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] and numbers[1]:
        return same_number(*numbers)
    if WORDS.fullmatch(gold):
        answer = ASSIGNMENT.sub("", answer, count=1)
        if WORDS.fullmatch(answer):
            return words_of(gold) == words_of(answer)
    if WORDS.fullmatch(gold) or QUANTITY.fullmatch(gold):
        # math-verify may drop a unit, and join what has spaces, but must not shuffle the letters.
        ours, theirs = letters_of(gold), letters_of(answer)
        if ours != theirs and (WORDS.fullmatch(gold) or sorted(ours) == sorted(theirs)):
            return False
    if letters:
        return None
    choices = LETTER.fullmatch(gold), LETTER.fullmatch(answer)
    if choices[0] and choices[1]:  # (B), B, \text{b}
        return choices[0][1].lower() == choices[1][1].lower()
    sequences = SEQUENCE.fullmatch(gold), SEQUENCE.fullmatch(answer)
    if sequences[0] and sequences[1]:
        return same_sequence(*sequences)
    return None


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word != "and"]


def letters_of(text: str) -> str:
    return re.sub(r"\\(?:cdot|times)|[^A-Za-z]", "", text).lower()


def same_sequence(gold: re.Match, answer: re.Match) -> bool | None:
    """Compare tuples, intervals and sets of plain numbers. None if anything else is in them.

    Also None if one is a tuple and the other a set.
    """
    golds, answers = (
        [parse_number(item.strip()) for item in match[2].split(",")] for match in (gold, answer)
    )
    if not all(golds + answers):
        return None
    brackets = gold[1] + gold[3], answer[1] + answer[3]
    if brackets[0] == brackets[1] == r"\{\}":
        golds, answers = as_set(golds), as_set(answers)
    elif brackets[0] != brackets[1]:
        intervals = len(golds) == len(answers) == 2 and r"\{" not in (gold[1], answer[1])
        return False if intervals else None
    return len(golds) == len(answers) and all(map(same_number, golds, answers))


def as_set(numbers: list[Number]) -> list[Number]:
    """Neither order nor repetition counts."""
    return [number for _, number in sorted({n.value: n for n in numbers}.items())]


CONSTANT = r"(?:[\d.+*/^{}!%° -]|\\(?:frac|sqrt|pi|infty)(?![a-zA-Z]))+"
NUMBERS = re.compile(rf"{CONSTANT}(?:[,;]{CONSTANT})+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BRACES = re.compile(r"(?:[A-Za-z](?:=|\\in ?))?\\\{(.*)\\\}")
JOINT = re.compile(r"[,;]? ?\b(?:and|or)\b ?|;")
NAME = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?:_\{?\d+\}?)?=")


def is_number_list(gold: str) -> bool:
    """Whether a gold is two or more plain numbers or constants, without braces, names or words."""
    listed = plain_list(gold)
    one_number = ", " not in gold and parse_number(listed)  # 1,234
    return not one_number and bool(NUMBERS.fullmatch(listed))


@lru_cache(grader.CACHE_SIZE)
def as_tuples(gold: str, answer: str) -> tuple[str, str]:
    r"""If the gold is a plain list of numbers: gold and answer as tuples, in which order counts.

    Other pairs are returned as they are. Braces, names and "or" in an answer do not lift the order:
    the gold's form decides.
    """
    if not is_number_list(gold):
        return gold, answer
    listed = plain_list(gold)
    answer = BRACES.sub(r"\1", plain_list(answer), count=1)
    answer = NAME.sub("", JOINT.sub(",", answer))
    return f"({listed.replace(';', ',')})", answer if answer[:1] in ("(", "[") else f"({answer})"


def plain_list(text: str) -> str:
    """In `plain` spelling, which drops the space that tells "1, 234" from "1,234"."""
    return plain(THOUSANDS.sub("", text) if ", " in text else text)


# --------------------------------------------------------------------------------------------------
# Does the plan hold the answer?

# "1." "(2)" "- 3)" at the head of a line. A second run of blanks comes only after a bullet: two
# runs side by side would take quadratic time.
MARKERS = re.compile(
    r"^[ \t]*(?:[-*•][ \t]*)?\(?\d{1,3}[.):](?!\d)|"
    r"\b(?:step|phase|stage|part|case|method|equation)s?[ \t]*\(?\d{1,3}\b(?!\.\d)",
    re.IGNORECASE | re.MULTILINE,
)
STATES = re.compile(
    r"(?:=|→|≈|\\to|\\boxed ?\{|\b(?:is|are|be|equals?|gives?|yields?|obtains?|answer|result|"
    r"choice|option))[ \t:($\\{]*$",
    re.IGNORECASE,
)
PLAN_NUMBER = re.compile(
    r"(?<![\w.^/\\])(?<!(?<!boxed)\{)(?:(?<![)\]])-)?"
    r"(?:\\frac\{-?\d{1,40}\}\{\d{1,40}\}|"
    r"\d{1,40}(?:,\d{3}){0,9}(?:\.\d{1,40})?(?:/\d{1,40})?)(?![\w/]|\.\d)"
)


def plan_leaks(plan: str, answer: str, stated: bool = False) -> bool:
    r"""Whether the plan already holds the final answer. Linear time.

    A numeric answer leaks if the plan holds a number of equal value. Any other leaks if the plan
    holds it as whole words, in the same spelling up to `plain`. Numbers of lists and steps ("1.",
    "Step 2", "case (3)") do not count. Integers up to 10 and answers of up to three characters
    occur in honest plans ("2 cases", "solve for x"). They leak only where the plan states them
    ("= 2", "the answer is B", "\boxed{2}", or alone on a line). With `stated` that holds for any
    answer: the question has named it already.
    """
    answer = plain(clean(answer)) if refusal(answer) is None else ""
    if not answer:
        return False
    plan, number = MARKERS.sub(" ", plan), parse_number(answer)
    if number and isinstance(number.value, Fraction):
        ordinary = stated or number.value in range(-10, 11)
        found = number_occurrences(plan, number)
    else:
        ordinary = stated or len(answer) <= 3
        plan = "\n".join(plain(line) for line in plan.splitlines())
        if WORDS.fullmatch(answer):
            plan, answer = plan.lower(), answer.lower()
        found = word_occurrences(plan, answer)
    return any(not ordinary or is_stated(plan, start, end) for start, end in found)


def number_occurrences(text: str, number: Number) -> Iterator[tuple[int, int]]:
    """Where the text holds a number of equal value."""
    for match in PLAN_NUMBER.finditer(text):
        other = parse_number(plain(match.group()))
        if other and other.value == number.value:
            yield match.span()


def word_occurrences(text: str, words: str) -> Iterator[tuple[int, int]]:
    """Where the text holds the words and no letter or digit continues them."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        continued = (
            words[0].isalnum() and text[max(0, start - 1):start].isalnum()
            or words[-1].isalnum() and text[end:end + 1].isalnum()
        )
        if not continued:
            yield start, end
        start = text.find(words, end)


def is_stated(plan: str, start: int, end: int) -> bool:
    """Whether plan[start:end] is alone on its line, or follows "=", "is", "answer", ..."""
    before = plan[max(0, start - 20):start].rpartition("\n")[2]
    after = plan[end:end + 20].partition("\n")[0]
    alone = not before.strip(" .$") and not after.strip(" .$")
    return bool(alone or STATES.search(before))
