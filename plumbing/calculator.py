"""An exact calculator: + - * / ^ and parentheses over fractions. Its parser is its own.

Nothing is evaluated by Python. Whatever the text is, the work is bounded: by its length, by how
deep parentheses nest, and by the size of numbers.
"""

import re
from fractions import Fraction

MAX_TEXT = 400  # characters of an expression
MAX_DEPTH = 40  # of parentheses, signs and powers within each other
MAX_BITS = 4096  # of a numerator or denominator
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
TOKEN = re.compile(r"\s*(?:([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)|(\*\*|[-+*/^()]))")


class Wrong(Exception):
    """Why an expression has no value, for whoever wrote it."""


def calculate(text: str) -> str:
    """The value of an expression: an integer, a finite decimal, else a fraction such as 7/3.

    A text without a value gives a sentence that begins with "error:". No text raises. Powers bind
    tighter than signs, and to the right: -2^2 is -4. Exponents are integers.
    """
    try:
        reader = Reader(tokens_of(text))
        value = reader.sum(0)
        if reader.token:
            raise Wrong(f"{reader.token!r} is one too many")
        return written(value)
    except Wrong as reason:
        return f"error: {reason}"


def tokens_of(text: str) -> list[str]:
    text = text.translate(SIGNS).strip()
    if not text or len(text) > MAX_TEXT:
        raise Wrong(f"want an expression of 1 to {MAX_TEXT} characters")
    tokens, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise Wrong("only numbers, + - * / ^ and parentheses can be read")
        tokens.append((match[1] or match[2]).replace(",", ""))
        at = match.end()
    return tokens


class Reader:
    """Recursive descent: a sum of products of signed powers of numbers and parentheses."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]

    @property
    def token(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these, which is then read; else an empty string."""
        return self.tokens.pop() if self.token in wanted and self.tokens else ""

    def sum(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise Wrong(f"more than {MAX_DEPTH} levels")
        value = self.product(depth)
        while sign := self.take("+", "-"):
            other = self.product(depth)
            value = bounded(value + other if sign == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while sign := self.take("*", "/"):
            other = self.signed(depth)
            if sign == "/" and not other:
                raise Wrong("division by zero")
            value = bounded(value * other if sign == "*" else value / other)
        return value

    def signed(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise Wrong(f"more than {MAX_DEPTH} levels")
        if sign := self.take("+", "-"):
            value = self.signed(depth + 1)
            return -value if sign == "-" else value
        base = self.number(depth)
        return power(base, self.signed(depth + 1)) if self.take("^", "**") else base

    def number(self, depth: int) -> Fraction:
        if self.take("("):
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise Wrong("a parenthesis is not closed")
            return value
        if not self.token or not (self.token[0].isdigit() or self.token[0] == "."):
            raise Wrong("a number is missing")
        return bounded(Fraction(self.tokens.pop()))


def bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Wrong("the number is too large")
    return value


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """base^exponent. Its size is bounded before it is computed."""
    if exponent.denominator != 1:
        raise Wrong("an exponent must be an integer")
    if not base and exponent < 0:
        raise Wrong("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and (bits - 1) * abs(exponent.numerator) > MAX_BITS:
        raise Wrong("the number is too large")
    if abs(base) in (0, 1):  # an exponent may be astronomic
        return base ** (exponent.numerator % 2) if base < 0 else base**bool(exponent)
    return bounded(base**exponent.numerator)


def written(value: Fraction) -> str:
    """A value as text. A denominator of twos and fives alone gives a decimal."""
    top, bottom = value.numerator, value.denominator
    rest, digits = bottom, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        digits = max(digits, count)
    if rest > 1 or digits > 12:
        return f"{top}/{bottom}"
    whole = str(abs(top) * 10**digits // bottom).rjust(digits + 1, "0")
    text = f"{whole[:-digits]}.{whole[-digits:]}" if digits else whole
    return "-" * (top < 0) + text
