r"""Multiple choice: which option does an answer name?

An answer is what rewards.extract_answer finds, the box or the answer span, never the whole text.

    B   (B)   b)   **B**   \text{B}   Option B   The answer is (B).     the letter
    B. 12 N   (B) 12 N   B 12 N   12 N (B)                              the letter and its text
    12 N                                                                the text of one option
    A or B   AB   B. 9 N (which is C)   not B   12                      none of these: wrong

So an answer that cannot be read is wrong. Other graders give it a random option or take the last
letter anywhere in the text: their figures for weak models are higher.
"""

import re
import unicodedata
from functools import lru_cache

from plumbing.answers import clean, plain, plan_leaks, refusal

LETTERS = "ABCDEFGHIJKLMNOP"

MARK = re.compile(r"(?:^|(?<=\s))[(\[]?([A-P])[.):、\]]")  # "A. text" in a problem
LEAD = (
    r"(?:(?:\b(?:so|thus|therefore|hence|the|my|correct|right|final|best|answer|option|choice|"
    r"letter|is)\b|[:,=]) ?)*"
)
NAMED = re.compile(
    rf"{LEAD}[(\[{{]*([A-P])(?![A-Za-z0-9'’])([)\]}}]*[.:,、]?) ?(.*)", re.IGNORECASE | re.DOTALL
)
LAST = re.compile(r"(.+)\(([A-P])\)", re.DOTALL)
PRAISE = re.compile(r"is (?:the )?(?:correct|right|best)(?: answer| option| choice)?")
# Another letter after "B. ...": in brackets, as the head of an option, or after these words.
OTHER = re.compile(
    r"\(([A-P])\)|(?<![A-Za-z])([A-P])(?=[.):])|"
    r"(?:\b(?:or|and|not|is|option|answer)\b|[,/&;]) ?\(?([A-P])(?![A-Za-z0-9])|"
    r"^\(?([A-P])\)?$"
)


def options_of(record: dict) -> list[str]:
    """The texts of a problem's options, A first: its `options`, else what follows "A.", "B.", ...

    Empty if there are none: then an answer can only be a letter.
    """
    if "options" in record:
        return record["options"]
    text, run, found = unicodedata.normalize("NFKC", record["problem"]), [], []
    for mark in MARK.finditer(text):
        if mark[1] == "A":
            run = [mark]
        elif run and mark[1] == LETTERS[len(run) : len(run) + 1]:
            run.append(mark)
        found = run if len(run) > 1 else found  # the last list of options counts
    ends = [mark.start() for mark in found[1:]] + [len(text)]
    texts = [text[mark.end() : end] for mark, end in zip(found, ends)]
    return [text.strip().partition("\n\n")[0] for text in texts]


@lru_cache(1 << 14)
def tidy(text: str) -> str:
    """One spelling: without LaTeX's layout, markup, quotes, and stops at the end."""
    text = unicodedata.normalize("NFKC", text).replace("**", "").replace("`", "")
    return plain(plain(clean(text))).strip('*_"“” ').rstrip(".,; ")


# Spellings in which texts are compared. An earlier one decides: Aa, AA and aa are three genotypes.
FOLDS = (str, str.lower, lambda text: re.sub(r"(?<!\d) | (?!\d)", "", text.lower()))


def option_named(text: str, options: list[str]) -> int | None:
    """The place of the only option with this text, or None. Both in `tidy` spelling."""
    for fold in FOLDS:
        places = [i for i, option in enumerate(options) if fold(option) == fold(text)]
        if places:
            return places[0] if len(places) == 1 else None
    return None


def choice_of(record: dict, answer: str | None) -> str | None:
    """The letter of the option that an answer names, or None. Linear time."""
    if answer is None or refusal(answer):
        return None
    options = [tidy(option) for option in options_of(record)]
    letters, said = LETTERS[: len(options)] or LETTERS[:10], tidy(answer)
    # First whole texts: "A. lyrata" may be the text of another option than A.
    place = option_named(said, options) if said not in letters else None
    if place is not None:
        return letters[place]
    if (match := LAST.fullmatch(said)) and match[2] in letters:
        place = letters.index(match[2])
        if options and option_named(match[1].strip(), options) == place:
            return match[2]
    match = NAMED.fullmatch(said)
    if not match or match[1].upper() not in letters:
        return None
    letter, mark, rest = match[1].upper(), match[2], match[3]
    return letter if supports(letter, match[1], mark, rest, options) else None


def supports(letter: str, written: str, mark: str, rest: str, options: list[str]) -> bool:
    """Whether the `rest` after a letter, and the `mark` between them, leave no doubt about it."""
    if not rest or PRAISE.fullmatch(rest):
        return True
    inner = rest[1:-1] if rest[0] + rest[-1] == "()" else rest
    places = [option_named(text.strip(), options) for text in (rest, inner)]
    if LETTERS.index(letter) in places:
        return True
    if not mark or set(places) != {None} or written.islower() and mark != ")":
        return False
    named = {found for groups in OTHER.findall(rest) for found in groups if found}
    return not (named & set(LETTERS[: len(options)] or LETTERS[:10]) - {letter})


def check(record: dict) -> str | None:
    """Why a record's answer is no option of it, or None."""
    options = options_of(record)
    texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not texts or not len(options) <= len(LETTERS):
        return f"its options are not a list of at most {len(LETTERS)} texts"
    if choice_of(record, record["answer"]) is None:
        span = f"A to {(LETTERS[: len(options)] or LETTERS[:10])[-1]}"
        return f"{record['answer'][:60]!r} names no option ({span})"
    return None


def leaks(record: dict, plan: str) -> bool:
    """Whether a plan states the gold's letter, or its option's text.

    To mention it is no leak: the question lists all options.
    """
    letter, options = choice_of(record, record["answer"]), options_of(record)
    texts = [letter or record["answer"]]
    texts += [options[LETTERS.index(letter)]] if letter and options else []
    return any(plan_leaks(plan, text, stated=True) for text in texts)
