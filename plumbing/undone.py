r"""Which operations does an expression leave undone? `answers.restated` compares gold and answer.

\binom{8}{4} leaves a choice undone, \int_0^2 x^2\,dx an integral, 1/2 + 1/3 plain arithmetic. A
fraction, a power, a root, a logarithm or a constant is a normal form: 3/4, 2^{10}, 3\sqrt{2},
1 + \ln 2 and 3 \times 10^5 leave nothing undone.

Nothing is evaluated. The text becomes a tree of brackets, and the tree is walked once.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from string import ascii_letters

ARITHMETIC = "arithmetic"  # a sum, product or chain of quotients of rational numbers
FAMILIES = {
    "integral": "int iint iiint iiiint idotsint oint oiint smallint intop",
    "sum": "sum",
    "product": "prod coprod",
    "limit": "lim limsup liminf varlimsup varliminf",
    "choice": "binom dbinom tbinom choose genfrac",  # and factorials
    "divisor": "gcd lcm hcf",
    "extreme": "max min sup inf",
    "rounding": "lfloor lceil floor ceil",
    "matrix": "det tr trace rank",  # and sums, products and powers of matrices
    "derivative": "partial nabla prime",
}
OPERATIONS = {name: family for family, names in FAMILIES.items() for name in names.split()}
TRIGONOMETRY = {
    f"\\{arc}{name}{h}" for arc in ("", "arc", "ar") for name in "sin cos tan cot sec csc".split()
    for h in ("", "h")
}
FUNCTIONS = TRIGONOMETRY | {rf"\{name}" for name in "ln log lg exp".split()}
NUMERIC = FUNCTIONS | {rf"\{name}" for name in "frac sqrt pi circ cdot times div".split()}
LETTERS = set(ascii_letters)
MAX_DEPTH = 40  # of brackets of any kind; answers.refusal counts only ( [ {

# --------------------------------------------------------------------------------------------------
# A tree of brackets

SYMBOLS = str.maketrans({
    "∫": r"\int ", "∬": r"\iint ", "∮": r"\oint ", "∑": r"\sum ", "∏": r"\prod ", "√": r"\sqrt ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∂": r"\partial ",
    "∇": r"\nabla ", "π": r"\pi ", "≡": r"\equiv ", "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ",
    "∩": r"\cap ", "∈": r"\in ", "→": r"\to ", "′": "'", "∣": "|", "∗": "*", "∕": "/", "！": "!",
})
# No pattern holds a repetition within another, so each takes linear time.
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\operatorname\*? ?\{ ?([a-zA-Z]+) ?\}", r"\\\1 "),
        (r"\{ ?\\(?:rm|it|bf|sf) ?([a-zA-Z]+) ?\}", r"\\\1 "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac "),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"(?<=\d)(?:\\,|\\!|\{,\}|,\\!)(?=\d{3})", ""),  # 1\,234 and 1{,}234
        (r"\( ?\\?[bp]?mod(?![a-z])([^()]*)\)", r"\\pmod{\1}"),
        (r"\\(?:[lr]?vert|[lr]?Vert|\|)(?![a-zA-Z])", "|"),
        (r"\\(?:left|right|(?:display|text|script)style|(?:no)?limits|[bB]igg?[lrm]?)(?![a-zA-Z])"
         r"|\\math(?:op|bin|ord|rel|rm|strut)(?![a-zA-Z])|(?<!\\)\\[,;:! ]|~", " "),
    ]
]
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
TOKEN = re.compile(
    r"\\begin ?\{[a-zA-Z]+\*?\}|\\end ?\{[a-zA-Z]+\*?\}|\\[a-zA-Z]+|\\.|[<>!]=|[a-zA-Z]+|"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+|\S"
)
OPENERS = {"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"}
CLOSERS = {")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"}
SIGNS = {"+", "-", r"\pm", r"\mp"}
DIVISION = {"/", r"\div"}
TIMES = {"*", r"\cdot", r"\times", r"\ast"}
JOINTS = {"=", r"\equiv"}
BETWEEN_ITEMS = {",", ";", "and", "or"}
MODULO = {r"\bmod", r"\pmod", r"\mod", r"\pod", "mod"}
SEPARATORS = BETWEEN_ITEMS | JOINTS | MODULO | {*"<>:|&", "<=", ">=", "!=", r"\\"} | {
    f"\\{name}" for name in (
        "le leq leqslant ge geq geqslant ne neq lt gt approx sim simeq cong cup cap setminus in "
        "notin ni subset subseteq to rightarrow Rightarrow implies iff mapsto mid land lor wedge "
        "vee quad qquad colon propto"
    ).split()
}


@dataclass(eq=False)  # hashable: a token may be looked up in a set whatever it is
class Group:
    """A bracket, or an environment of LaTeX, and what is in it."""

    opener: str
    items: list


def known_text(match: re.Match) -> str:
    r"""\text{lcm} is an operation and \mathrm{d} a letter, but \text{ cm} is no factor."""
    content = match[1].strip()
    if content in OPERATIONS:
        return rf"\{content} "
    kept = content in BETWEEN_ITEMS | MODULO or len(content) < 2 or re.search(r"[\d+!]", content)
    return f" {content} " if kept else " "


def tree(text: str) -> list | None:
    """Its tokens, with brackets as groups. None if they nest over MAX_DEPTH deep."""
    text = TEXT.sub(known_text, text.translate(SYMBOLS))
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    root = Group("", [])
    stack = [root]
    for token in TOKEN.findall(text):
        if token in OPENERS or token.startswith(r"\begin"):
            group = Group(token, [])
            stack[-1].items.append(group)
            stack.append(group)
            if len(stack) > MAX_DEPTH:
                return None
        elif token in CLOSERS or token.startswith(r"\end"):
            if len(stack) > 1:
                closed = stack.pop()
                if closed.opener == "{" and is_bare(closed.items):  # 1{+}2 and 4{}!
                    stack[-1].items[-1:] = closed.items
        else:
            stack[-1].items.append(token)
    return root.items


def is_bare(items: list) -> bool:
    return not items or len(items) == 1 and items[0] in SIGNS | TIMES | {"!", "/", "="}


def split(items: list, separators: set[str]) -> list[list]:
    parts = [[]]
    for item in items:
        if item in separators:
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


def is_number(item: str | Group = "") -> bool:
    return isinstance(item, str) and item.lstrip(".")[:1].isdecimal()


def is_numeric(items: list) -> bool:
    """Whether no letter but e and i, and no command but those of constants, is in it."""
    for item in items:
        if isinstance(item, Group):
            if not (item.opener in OPENERS and is_numeric(item.items)):
                return False
        elif item[0] == "\\" and item not in NUMERIC or item.isalpha() and item not in ("e", "i"):
            return False
    return True


def is_sum(*items: str | Group) -> bool:
    """Whether this is one bracket with a sum of numbers: (1+2i)."""
    return len(items) == 1 and isinstance(items[0], Group) and items[0].opener in ("(", "[") and (
        not SIGNS.isdisjoint(items[0].items[1:]) and is_numeric(items[0].items)
    )


def spell(items: list) -> str:
    texts = [f"{i.opener}{spell(i.items)})" if isinstance(i, Group) else i for i in items]
    return " ".join(texts)


# --------------------------------------------------------------------------------------------------
# The walk

# What a part of an expression is. Only whether numbers could be put together matters.
NUMBER, TEN, FRACTION, RATIONAL, MATRIX, OTHER, EMPTY = (
    "number", "power of ten", "fraction", "rational", "matrix", "other", "empty"
)
RATIONALS = {NUMBER, TEN, FRACTION, RATIONAL}


class Walk:
    """One pass over a tree that collects in `found` the families of undone operations."""

    def __init__(self):
        self.found: set[str] = set()

    def whole(self, items: list) -> str:
        """The kind of a group's content; OTHER for a list, an equation, ..."""
        for i, item in enumerate(items):
            if item in MODULO and not is_residue(items, i):
                self.found.add("modulo")
        for part in split(items, {"|"})[1:-1:2]:
            if any(isinstance(item, Group) and item.opener.startswith(r"\begin") for item in part):
                self.found.add("matrix")
            elif part and is_numeric(part):
                self.found.add("absolute value")
        kinds = [self.total(part) for part in split(items, SEPARATORS)]
        return kinds[0] if len(kinds) == 1 else OTHER

    def total(self, items: list) -> str:
        """A sum. The signs at its head and behind other operators are no sums."""
        terms, signs = [[]], [0]
        for i, item in enumerate(items):
            if item not in SIGNS:
                terms[-1].append(item)
            elif not terms[-1]:
                signs[-1] += 1
            elif items[i - 1] in TIMES | DIVISION | {"^"}:
                terms[-1].append(item)
            else:
                terms.append([])
                signs.append(1)
        for term, sign in zip(terms, signs):  # --5 and -(-5)
            inner = term[0].items if len(term) == 1 and isinstance(term[0], Group) else []
            sign += bool(inner) and inner[0] in ("+", "-") and is_numeric(inner)
            bracketed = len(terms) > 1 and len(term) == 1 and is_sum(term[0])
            if sign > 1 or bracketed and is_numeric(items):  # (1+2i)+(3+4i)
                self.found.add(ARITHMETIC)
        kinds, letters = zip(*[self.term(term) for term in terms])
        alike = [text for text, kind in zip(letters, kinds) if kind not in (MATRIX, EMPTY)]
        if len(set(alike)) < len(alike):  # 1+2, 2\sqrt{3}+5\sqrt{3}
            self.found.add(ARITHMETIC)
        if kinds.count(MATRIX) > 1:
            self.found.add("matrix")
        if len(kinds) == 1:
            return kinds[0]
        return RATIONAL if set(kinds) <= RATIONALS else OTHER

    def term(self, items: list) -> tuple[str, str]:
        """A product of factors, some of which divide. Its kind, and what is not rational in it."""
        factors, divisors, letters, i, divides, sums = [], [], "", 0, False, 0
        while i < len(items):
            start = i
            if items[i] in TIMES | SIGNS | DIVISION:
                divides |= items[i] in DIVISION
                i += 1
                continue
            kind, i = self.factor(items, i)
            (divisors if divides else factors).append(kind)
            if kind not in RATIONALS:
                letters += "/" * divides + spell(items[start:i])
            sums += not divides and is_sum(*items[start:i])
            divides = False
        first = next((i for i, item in enumerate(items) if item in TRIGONOMETRY), len(items))
        if items[first + 1:] and is_numeric(items[first:]):
            self.found.add("trigonometry")
        if factors.count(MATRIX) > 1:
            self.found.add("matrix")
        rational = [kind for kind in factors if kind in RATIONALS]
        if len(rational) > 1 and rational != [NUMBER, TEN] or sums > 1:  # but 3 \times 10^5
            self.found.add(ARITHMETIC)
        if not set(factors + divisors) <= RATIONALS:
            return MATRIX if MATRIX in factors and OTHER not in factors else OTHER, letters
        if divisors:
            if len(divisors) > 1 or FRACTION in factors + divisors or r"\div" in items:
                self.found.add(ARITHMETIC)
            return FRACTION, ""
        return (factors or [EMPTY])[0] if len(factors) < 2 else RATIONAL, ""

    def factor(self, items: list, i: int) -> tuple[str, int]:
        """The kind of the factor that begins at i, and where the next one begins."""
        item, i = items[i], i + 1
        if isinstance(item, Group):
            kind = self.group(item)
        elif is_number(item):
            kind, i = NUMBER, end_of_mixed(items, i)
        elif item == r"\frac":
            top, i = self.argument(items, i)
            bottom, i = self.argument(items, i)
            kind = FRACTION if {top, bottom} <= RATIONALS else OTHER
            if kind == FRACTION and FRACTION in (top, bottom):
                self.found.add(ARITHMETIC)
            if is_derivative(items[i - 2:i]):
                self.found.add("derivative")
        elif item == r"\sqrt":
            kind, i = self.root(items, i)
        else:
            kind, i = OTHER, self.name(items, i)
        return self.postfix(items, i, kind, item)

    def group(self, group: Group) -> str:
        name = group.opener.removeprefix(r"\begin").strip(" {}*\\")
        if name in OPERATIONS or name in ("vmatrix", "Vmatrix"):
            self.found.add(OPERATIONS.get(name, "matrix"))
        kind = self.whole(group.items)
        if name.endswith("matrix") or name == "array":
            return OTHER if name[0] in "vV" else MATRIX
        return kind if group.opener in ("(", "[", "{") else OTHER

    def argument(self, items: list, i: int) -> tuple[str, int]:
        """Of \\frac, \\sqrt and ^: one token or group."""
        while i < len(items) and items[i] in ("+", "-"):
            i += 1
        if i >= len(items):
            return OTHER, i
        if isinstance(items[i], Group):
            return self.group(items[i]), i + 1
        return NUMBER if is_number(items[i]) else OTHER, i + 1

    def root(self, items: list, i: int) -> tuple[str, int]:
        index = i < len(items) and isinstance(items[i], Group) and items[i].opener == "["
        i += index
        content = items[i] if i < len(items) else ""
        if isinstance(content, Group) and len(content.items) == 1:
            content = content.items[0]
        kind, end = self.argument(items, i)
        square = isinstance(content, str) and content.isdecimal() and not index
        return RATIONAL if square and isqrt(int(content)) ** 2 == int(content) else OTHER, end

    def name(self, items: list, i: int) -> int:
        """Where a letter or command that ends at i ends with its indices and its argument."""
        item = items[i - 1]
        called = i < len(items) and isinstance(items[i], Group)
        name = item.lstrip("\\")
        if name in OPERATIONS and (item != name or called):
            self.found.add(OPERATIONS[name])
        if item == r"\Gamma" and called and is_numeric(items[i].items):
            self.found.add("choice")
        while i < len(items) and items[i] in ("^", "_"):
            _, i = self.argument(items, i + 1)
        if item in FUNCTIONS and i < len(items):  # the 2 of \ln 2 is no factor
            if items[i] in (r"\frac", r"\sqrt"):
                _, i = self.factor(items, i)
            elif is_number(items[i]):
                i += 1
        while i < len(items) and isinstance(items[i], Group) and (
            items[i].opener in ("(", "{", "[")
        ):
            self.group(items[i])
            i += 1
        return i

    def postfix(self, items: list, i: int, kind: str, base: str | Group) -> tuple[str, int]:
        """The kind of a factor with the exponents, factorials, ... that follow it."""
        while i < len(items) and items[i] in ("^", "_", "!", "'", "%", r"\%", "°"):
            mark, i = items[i], i + 1
            if mark == "!":
                self.found.add("choice")
                kind = RATIONAL if kind in RATIONALS else OTHER
            elif mark == "'" and kind not in RATIONALS:  # 5' is five minutes or feet
                self.found.add("derivative")
            elif mark == "_":
                i += i < len(items)
            elif mark == "^":
                exponent, end = self.argument(items, i)
                raised = items[end - 1].items if isinstance(items[end - 1], Group) else items[i:end]
                if kind == MATRIX and not (is_vector(base) and raised in (["T"], [r"\top"])):
                    self.found.add("matrix")
                if raised != [r"\circ"]:
                    whole = kind in RATIONALS and exponent in RATIONALS - {FRACTION}
                    kind = (TEN if base == "10" else RATIONAL) if whole else OTHER
                i = end
                mark = "°" if raised == [r"\circ"] else mark
            if mark in ("'", "°") and is_number(*items[i:i + 1]):
                i += 1  # minutes after degrees
        return kind, i


def is_residue(items: list, i: int) -> bool:
    """Whether items[i], a modulo sign, follows a number that is reduced: 3 \\pmod 7."""
    after = items[i + 1:i + 2]
    if after and isinstance(after[0], Group):
        after = after[0].items
    pair = [*items[max(0, i - 1):i], *after]
    numbers = [int(item) for item in pair if isinstance(item, str) and item.isdecimal()]
    alone = i < 2 or items[i - 2] in JOINTS
    return alone and len(pair) == len(numbers) == 2 and numbers[0] < numbers[1]


def end_of_mixed(items: list, i: int) -> int:
    r"""Where the number that ends at i ends if it goes on as 1 1/2 or 1\frac{1}{2}."""
    rest = [part.items if isinstance(part, Group) else [part] for part in items[i:i + 3]]
    if len(rest) < 3 or any(len(part) != 1 for part in rest):
        return i
    first, second, third = (part[0] for part in rest)
    slash = is_number(first) and second == "/"
    return i + 3 if (slash or first == r"\frac" and is_number(second)) and is_number(third) else i


def is_derivative(parts: list) -> bool:
    """Whether these are the two halves of d/dx or dy/dx."""
    if not all(isinstance(part, Group) and part.items for part in parts):
        return False
    top, bottom = (part.items for part in parts)
    if not (isinstance(top[0], str) and isinstance(bottom[0], str)):
        return False
    name = bottom[0] + "".join(item for item in bottom[1:2] if item in LETTERS)  # d x or dx
    return top[0][0] == "d" and len(top[0]) <= 2 and name[0] == "d" and len(name) == 2


def is_vector(item: str | Group) -> bool:
    return isinstance(item, Group) and not ("&" in item.items and r"\\" in item.items)


# --------------------------------------------------------------------------------------------------
# The whole expression

@lru_cache(4_096)
def undone(text: str, equation: bool = False) -> frozenset[str]:
    r"""The families of operations that a cleaned text leaves undone.

    Of N = \binom{8}{4} = 70 only the last side counts, as math-verify compares only that. If the
    gold is an equation, the first one counts, too: x - \binom{8}{4} = 0 is an answer to it.
    """
    items, walk = tree(text), Walk()
    if items is None:
        return frozenset({"depth"})
    for part in split(items, BETWEEN_ITEMS):
        sides = split(part, JOINTS)
        for side in sides[:1] * equation + sides[-1:]:
            walk.whole(side)
    return frozenset(walk.found)


def is_equation(text: str) -> bool:
    return "=" in (tree(text) or [])
