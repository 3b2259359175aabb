r"""Does a training problem hold an evaluation problem, or a long piece of one?

    overlap = Overlap(evaluation_problems, n=13)
    overlap.find(id, text)   ->  True, and an entry in overlap.report

Two copies of a problem are seldom equal as strings, so problems are compared by their letters and
digits alone. Signs, layout and spaces do not count: $\dfrac{1}{2}\cdot x$, \frac12 x and 1/2*x are
all "1 2 x". The price is that x + 1 and x - 1 read alike. A training problem that differs from an
evaluation problem by a sign is left out, too.
"""

import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# A problem's words

# LaTeX commands that read as words. Every other command is layout or a sign (\left, \text, \leq).
GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho
    sigma tau upsilon phi chi psi omega""".split()
FUNCTIONS = """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min
    sup inf gcd lcm det dim ker deg arg mod sqrt binom sum prod int infty angle triangle""".split()
SPELLED = {name: name for name in GREEK + FUNCTIONS}
SPELLED |= {"dbinom": "binom", "tbinom": "binom", "bmod": "mod", "pmod": "mod"}
SPELLED |= {"varepsilon": "epsilon", "vartheta": "theta", "varphi": "phi"}
SYMBOLS = dict(zip("αβγδεζηθικλμνξοπρστυφχψω", GREEK)) | {"√": "sqrt", "∑": "sum", "∏": "prod"}
SYMBOLS |= {"∫": "int", "∞": "infty", "∠": "angle", "△": "triangle"}
SYMBOLS = str.maketrans(SYMBOLS | {"_": " "})  # the underscore becomes a mark: see words_of
THOUSANDS = re.compile(r"(?<=\d)(?:\{?,\}?(?:\\!)?|\\,) ?(?=\d{3}(?!\d))")  # 1,\!000 is 1000
NUMBER = re.compile(r"\d+")
COMMAND = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}"
    r"|\\[dtc]?frac\s*_(\d)(\d)"  # \frac12, once its number is marked
    r"|\\([a-z]+|.)",
    re.DOTALL,
)
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese characters: each is a word of its own
WORD = re.compile(rf"\n|[{UNSPACED}]|[^\W{UNSPACED}]+")  # the line feeds end sentences
SENTENCE_END = re.compile(r"""[.!?:;][$)\]}\\*"'”’]*(?:\s+|$)|[。！？：；]""")
LONG = 20  # letters; a longer word is writing without spaces

# What tasks are worded with. These words do not tell one problem from another.
GENERIC = set("""
    all an and answer any are area as assume at be by calculate can compute denote determine
    does each equal equals equation evaluate every exact exactly express expression find
    following for form from function given has have how if in integer integers is it its let
    many maximum minimum must number numbers of on or possible problem product prove real
    result satisfies satisfy satisfying show simplest simplify solution solutions solve such
    suppose terms that the then there these this to triangle value values we what when where
    which whose why with you your
""".split())


def words_of(text: str) -> list[str]:
    r"""The words of a text in lower case, LaTeX or not, and "\n" where a sentence ends.

    An underscore marks the start of a number. It keeps "1 12" and "11 2" apart where words are
    written without spaces.
    """
    text = unicodedata.normalize("NFKC", SENTENCE_END.sub("\n", text)).lower().translate(SYMBOLS)
    text = NUMBER.sub(lambda number: "_" + number[0], THOUSANDS.sub("", text))
    return WORD.findall(COMMAND.sub(spell, text))


def spell(command: re.Match) -> str:
    upper, lower, name = command.groups()
    return f" _{upper} _{lower} " if upper else f" {SPELLED.get(name, '')} "


def size(word: str) -> float:
    """How many words a word counts as. A Chinese word has two characters, an English one five."""
    if len(word) > LONG:
        return len(word) / 5
    return 0.5 if "\u3040" <= word <= "\u9fff" else 1.0


def content(word: str) -> float:
    """How much a word tells of its problem: 1 for a number or term, 0 for a letter or "find"."""
    if size(word) != 1:
        return size(word) / 2  # about every other word of a text is generic
    return float(len(word) > 1 and word not in GENERIC)


class Reading(NamedTuple):
    """A problem as its words, and as their letters without spaces."""

    words: list[str]
    letters: str
    starts: list[int]  # where in `letters` each word starts, and the end
    cuts: list[int]  # the first word of each sentence, and the end

    def runs(self, n: int) -> Iterator[str]:
        """The letters of each run of n words."""
        reach = list(accumulate(map(size, self.words), initial=0.0))
        for first, before in enumerate(reach):
            end = bisect_left(reach, before + n)
            if end == len(reach):
                break
            yield self.letters[self.starts[first] : self.starts[end]]


def read(text: str, apart: bool = False) -> Reading:
    """The reading of a problem. `apart`: a LONG word becomes its letters and numbers."""
    words, cuts = [], [0]
    for word in words_of(text):
        if word == "\n":
            cuts.append(len(words))
        elif apart and len(word) > LONG:
            words += re.findall(r"_\d+|\D", word)
        else:
            words.append(word)
    cuts.append(len(words))
    return Reading(words, "".join(words), list(accumulate(map(len, words), initial=0)), cuts)


# --------------------------------------------------------------------------------------------------
# Finding one problem in another


class Overlap:
    """Finds training problems that share a run of n words with an evaluation problem.

    A run in more than `boilerplate` different evaluation problems ("where m and n are relatively
    prime positive integers, find m + n …") does not count. A copy of a problem in another set, with
    other signs or layout, is not a different problem.

    An evaluation problem is also found, whatever its length, where it stands as a whole:

      * as the whole training problem;
      * as one to three whole sentences of it, if two of its words have content ("What is 1 + 1?"
        has 1 and 1, "Find the value of x." has none);
      * anywhere in it, if it has five words, and three of them have content: "How many divisors of
        196 are even" is too specific to occur by chance. "What is 1 + 1" is not: it begins "What is
        1 + 1 + 5?", another problem.

    The time is linear in the text. The memory is that of the evaluation problems' runs.
    """

    HEAD = 16  # letters of a run that are looked up first

    def __init__(self, problems: Iterable[dict], n: int = 13, boilerplate: int = 2):
        self.report: list[dict] = []
        self.ids: dict[str, str] = {}  # letters of an evaluation problem -> its id
        self.sentences: set[str] = set()  # letters of those that are found as whole sentences
        self.runs: dict[str, str] = {}  # letters of a run -> letters of its problem
        specific, holders = [], Counter()
        for problem in problems:
            reading = read(problem["problem"])
            known, id = self.ids.get(reading.letters), problem["id"]
            if not reading.letters:
                continue
            self.ids[reading.letters] = min(id, known or id)
            if known:  # a copy
                continue
            told = sum(map(content, reading.words))
            if told >= 2:
                self.sentences.add(reading.letters)
            if told >= 3 and sum(map(size, reading.words)) >= 5:
                specific.append(reading.letters)
            for run in dict.fromkeys(reading.runs(n)):  # each once
                holders[run] += 1
                self.runs.setdefault(run, reading.letters)
        self.runs = {run: whole for run, whole in self.runs.items() if holders[run] <= boilerplate}
        covered = set(self.runs.values())
        self.runs |= {whole: whole for whole in specific if whole not in covered}
        # A run is looked up by its head, which says how long the runs are that begin so.
        self.head = min([self.HEAD, *map(len, self.runs)])
        self.lengths: dict[str, tuple[int, ...]] = {}
        for run in self.runs:
            known = self.lengths.get(run[: self.head], ())
            if len(run) not in known:
                self.lengths[run[: self.head]] = (*known, len(run))

    def find(self, id: str, text: str) -> bool:
        """Whether `text` overlaps. If so, the pair and the shared words are added to `report`."""
        reading = read(text, apart=True)
        match = self.match_sentences(reading) or self.match_run(reading)
        if match is None:
            return False
        first, end, whole = match
        shared = " ".join(reading.words[first:end]).replace("_", "")
        entry = {"id": id, "evaluation": self.ids[whole], "shared": shared, "problem": text}
        self.report.append(entry)
        return True

    def match_sentences(self, reading: Reading) -> tuple[int, int, str] | None:
        """(first word, end, letters of the evaluation problem) of sentences that are a problem."""
        _, letters, starts, cuts = reading
        if letters in self.ids:
            return 0, len(reading.words), letters
        for place, first in enumerate(cuts):
            for end in cuts[place + 1 : place + 4]:
                if (block := letters[starts[first] : starts[end]]) in self.sentences:
                    return first, end, block
        return None

    def match_run(self, reading: Reading) -> tuple[int, int, str] | None:
        """(first word, end, letters of the evaluation problem) of the first shared run."""
        _, letters, starts, _ = reading
        for first, start in enumerate(starts):
            for length in self.lengths.get(letters[start : start + self.head], ()):
                whole = self.runs.get(letters[start : start + length])
                if whole is not None:
                    end = bisect_left(starts, start + length)
                    if end < len(starts) and starts[end] == start + length:  # ends with a word
                        return first, end, whole
        return None
