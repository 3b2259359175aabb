r"""Restating the question earns nothing, and several boxes are one list.

Cases in both directions. An answer of RESTATED has the gold's value, so that only the form makes it
wrong.
"""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from plumbing import answers as module
from plumbing.answers import (
    answers_equal,
    clean,
    grade,
    grader_stats,
    last_box,
    refusal,
    restated,
)
from plumbing.undone import tree, undone
from rewards import extract_answer

TABLE = Path(__file__).with_name("reward_cases.jsonl")


def cases(text: str) -> list[tuple[str, str]]:
    """Gold and answer of each line but the headings."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("#")]
    return [tuple(line.split(" == ")) for line in lines]


# gold == answer: of one value, but something is left to do
RESTATED = cases(r"""
# integrals
\frac{8}{3} == \int_0^2 x^2\,dx
\frac{8}{3} == \displaystyle\int_{0}^{2} x^2 \mathrm{d}x
\frac{8}{3} == \int_0^1 \int_0^2 x^2 \,dx\,dy
x^2 == \int 2x\,dx
\ln 2 == \int_1^2 \frac{1}{x} dx
I=2 == I=\int_0^{2} 1 dx
# sums and products
15 == \sum_{k=1}^5 k
2 == \sum_{n=0}^{\infty} \frac{1}{2^n}
\frac{n(n+1)}{2} == \sum_{k=1}^{n} k
120 == \prod_{k=1}^5 k
# limits
1 == \lim_{x\to 0}\frac{\sin x}{x}
e == \lim_{n\to\infty}\left(1+\frac{1}{n}\right)^n
# choices and factorials
70 == \binom{8}{4}
70 == \dbinom{8}{4}
70 == x = \binom{8}{4}
70 == {8 \choose 4}
70 == \frac{8!}{4!4!}
x=70 == x-\binom{8}{4}=0
x=70 == x-\binom{8}{4}+1=1
24 == 4!
24 == 4 !
24 == 4\!!
24 == \Gamma(5)
25 == 4!+1
# divisors and extremes
6 == \gcd(12,18)
6 == \gcd\left(12, 18\right)
36 == \operatorname{lcm}(12,18)
36 == \operatorname{lcm}\left(12,18\right)\text{ cm}
5 == \max(3,5)
3 == \min(3, 5)
# rounding and absolute values
7 == \lfloor\sqrt{50}\rfloor
7 == \left\lfloor \sqrt{50} \right\rfloor
8 == \lceil 7.5 \rceil
7 == \operatorname{floor}(7.5)
5 == |-5|
5 == \left\lvert 2 - 7 \right\rvert
# matrices
-2 == \det\begin{pmatrix}1&2\\3&4\end{pmatrix}
-2 == \det\left(\begin{pmatrix}1&2\\3&4\end{pmatrix}\right)
-2 == \begin{vmatrix}1&2\\3&4\end{vmatrix}
5 == \operatorname{tr}\begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1&3\\2&4\end{pmatrix} == \begin{pmatrix}1&2\\3&4\end{pmatrix}^T
# derivatives
2x == \frac{d}{dx}x^2
2x == \dfrac{d}{dx}\left(x^2\right)
2x == \frac{\mathrm{d}}{\mathrm{d}x} x^2
2x == \frac{d(x^2)}{dx}
2x == \frac{\partial}{\partial x}(x^2)
# remainders
1 == 10 \mod 3
# trigonometric functions of known arguments
\frac{1}{2} == \sin(\pi/6)
\frac{1}{2} == \sin\frac{\pi}{6}
\frac{\pi}{4} == \arctan 1
\frac{\pi}{4} == \tan^{-1}(1)
\frac{3}{4} == \sinh(\ln 2)
0.5 == \cos(\pi/3)
# plain arithmetic
15 == 1+2+3+4+5
15 == x=1+2+12
15 == 3\cdot 5
15 == 3 \times 5
15 == 7⋅2+1
15 == (1) + 14
15 == 10 + 5\text{ cm}
5 == 8-3
5 == 8 − 3
5 == --5
5 == -(-5)
6 == 30 \div 5
6 == 30÷5
5 == 30/3/2
\frac{2}{3} == \frac{1/2}{3/4}
\frac{5}{6} == 1/2 + 1/3
\frac{671}{1296} == 1-\left(\frac{5}{6}\right)^4
25 == (2+3)^2
1023 == 2^{10}-1
200 == 2^3 \cdot 5^2
7 == \sqrt{9}+\sqrt{16}
5 == \sqrt{9+16}
\{1,5\} == \{1, 2+3\}
(1,5) == (1, 2+3)
3+\sqrt{2} == 1+2+\sqrt{2}
x^2+3 == x^2+1+2
7\sqrt{3} == 2\sqrt{3}+5\sqrt{3}
5x == 2x+3x
4+6i == (1+2i)+(3+4i)
1 == (2+\sqrt{3})(2-\sqrt{3})
x>5 == x>2+3
""")
MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
RESTATED += [
    (r"\begin{pmatrix}7&10\\15&22\end{pmatrix}", MATRIX + MATRIX),
    (r"\begin{pmatrix}2&4\\6&8\end{pmatrix}", f"{MATRIX}+{MATRIX}"),
]
# math-verify cannot read these today; the form is seen all the same
UNREADABLE = cases(r"""
6 == gcd(12,18)
36 == \mathop{\mathrm{lcm}}(12,18)
36 == \text{lcm}(12,18)
36 == {\rm lcm}(12,18)
15 == ∑_{k=1}^5 k
15 == \sum\limits_{k=1}^5 k
15 == \sum\nolimits_{k=1}^5 k
120 == ∏_{k=1}^5 k
\frac{8}{3} == ∫_0^2 x^2 dx
\frac{8}{3} == \int\limits_0^2 x^2 dx
1 == \iint_{[0,1]^2} dx dy
7 == ⌊√50⌋
7 == \left\lfloor\sqrt{50}\right\rfloor
7 == \big\lfloor 7.5\big\rfloor
1 == \lim\limits_{x\to 0}\frac{\sin x}{x}
1 == 10 \bmod 3
6 == -1 \pmod 7
1 == \operatorname*{lim}_{x\to 0}\frac{\sin x}{x}
5 == \max\{3,5\}
15 == 5!!
-2 == \left|\begin{array}{cc}1&2\\3&4\end{array}\right|
15 == 1{+}2{+}12
\begin{pmatrix}-2&1\\1.5&-0.5\end{pmatrix} == \begin{pmatrix}1&2\\3&4\end{pmatrix}^{-1}
2x == (x^2)'
2x == \tfrac{d}{dx}(x^2)
2x == \partial_x x^2
5 == \vert -5\vert
5 == |3+4i|
15 == (3)(5)
15 == 3(5)
15 == 1\mathbin{+}14
2x == ∂_x x^2
\frac{1}{2} == \sin 30^\circ
70 == \genfrac{(}{)}{0pt}{}{8}{4}
""")
# right, and as far evaluated as the gold
EVALUATED = cases(r"""
# one number in another spelling
7 == 7
7 == +7
-5 == -5
-5 == (-5)
1234 == 1,234
1234 == 1\,234
7 == 7.0
7 == 7\text{ cm}
3/2 == 1 1/2
3/2 == 1\frac{1}{2}
-2.75 == -2\frac{3}{4}
50\% == 50%
0.5 == 50\%
90 == 90^\circ
300000 == 3\times 10^5
0.00012 == 1.2 \cdot 10^{-4}
3:2 == 3 : 2
3:30 == 3:30
12/25/2024 == 12/25/2024
2024-01-15 == 2024-01-15
1200 == €1200
10-15 == 10 - 15
1011_2 == 1011_{2}
0.5 == .5
0.333333 == \frac13
# fractions, powers, roots, logarithms, constants
7 == \frac{14}{2}
7 == 14/2
\frac{3}{4} == 3/4
\frac{1}{3} == \frac{-1}{-3}
1024 == 2^{10}
1000 == 10^3
25 == 5^2
\frac{8}{27} == (\frac{2}{3})^3
3 == \sqrt{9}
3\sqrt{2} == \sqrt{18}
3\sqrt{2} == \sqrt{2}\cdot 3
2\sqrt{3} == 2\cdot 3^{1/2}
\frac{\sqrt2}{2} == \frac{1}{\sqrt{2}}
1+\sqrt{2} == \sqrt{2}+1
\frac{1+\sqrt5}{2} == \frac{1}{2}+\frac{\sqrt{5}}{2}
e^2-1 == -1+e^2
2+2\sqrt{5} == 2(1+\sqrt{5})
3+2\sqrt{2} == (1+\sqrt{2})^2
-1-\sqrt{5} == -(1+\sqrt{5})
\ln 2 + 1 == 1+\ln(2)
2\ln 3 == \ln 9
\frac{\pi^2}{6} == \frac{1}{6}\pi^2
3 == \log_{2}{8}
3+2i == 2i + 3
-i == 0-i
\sin 1 == \sin(1)
0.841471 == \sin 1
\cos 20^\circ == \cos(20^\circ)
\frac{1}{2}\ln 3 == \frac{\ln 3}{2}
\frac{2\pi}{3} == \frac{2}{3}\cdot\pi
# letters, equations, lists
x^2+2x+1 == x^2 + 2x + 1
x^2-1 == (x-1)(x+1)
2x+3 == 2(x+1.5)
y=2x+1 == y - 2x = 1
y=2x+1 == y=1+2x
5 == x=5
f(x)=x^2 == x^2
2x == f'(x) = 2x
2x == \frac{dy}{dx} = 2x
\frac{2^n}{3} == \frac{1}{3}\cdot 2^n
x^2+y^2=4 == x^2+y^2-4=0
|x| == |x|
1<x<2 == (1,2)
x>3 == (3,\infty)
(-\infty,1)\cup(2,\infty) == (2,\infty)\cup(-\infty,1)
\{1,2\} == 2, 1
(1,-2) == (1, -2)
\pm 2 == 2,-2
1\pm\sqrt{2} == 1+\sqrt2, 1-\sqrt2
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix}1&2 \\ 3&4\end{bmatrix}
\begin{pmatrix}2&4\\6&8\end{pmatrix} == 2\begin{pmatrix}1&2\\3&4\end{pmatrix}
\sin^2 x == 1-\cos^2 x
B == (B)
\text{even} == even
June 5 == June 5
# the end of a chain of equations is what counts
70 == \binom{8}{4} = 70
70 == N = \binom{8}{4} = 70
2\sqrt3 == \int_0^{1} 2\sqrt3 dx = 2\sqrt3
15 == 1+2+3+4+5=15
# the gold is of that form
\binom{8}{4} == \binom{8}{4}
\binom{8}{4} == 70
\binom{8}{4} == \frac{8!}{4!4!}
5! == 5 \cdot 4!
5! == 120
2^{10}-1 == 2^{10} - 1
2^{10}-1 == 1023
2^{10}-1 == -1+2^{10}
2^3\cdot 5^2 == 5^2 \cdot 2^3
n! == n!
\lfloor \frac{n}{2} \rfloor == \left\lfloor n/2 \right\rfloor
\sin 1 == \sin(\frac22)
\int_0^1 e^{-x^2} dx == \int_{0}^{1} e^{-x^2}\,dx
\max(a,b) == \max(b,a)
\frac{(2n)!}{(n!)^2} == \frac{(2n)!}{n! n!}
1-\frac{1}{2^{100}} == 1-2^{-100}
""")


def wrong(cases, right: bool, evaluated: bool) -> list:
    verdicts = grade(*zip(*cases), budget=60.0, evaluated=evaluated)
    return [case for case, verdict in zip(cases, verdicts) if verdict != right]


def test_a_restated_question_is_right_only_if_it_need_not_be_evaluated():
    assert wrong(RESTATED, True, evaluated=False) == []
    assert wrong(RESTATED, False, evaluated=True) == []


def test_an_evaluated_answer_is_right_either_way():
    assert wrong(EVALUATED, True, evaluated=False) == []
    assert wrong(EVALUATED, True, evaluated=True) == []


def test_no_spelling_hides_an_operation():
    assert [case for case in RESTATED + UNREADABLE if not restated(*case)] == []
    assert wrong(UNREADABLE, False, evaluated=True) == []
    assert [case for case in EVALUATED if restated(*case)] == []


def test_the_direction_matters():
    """A gold that is less evaluated than the answer is no reason to call the answer restated."""
    golds = [(answer, gold) for gold, answer in RESTATED]
    assert [case for case in golds if restated(*case)] == []


@pytest.mark.parametrize("text, families", [
    (r"\int_0^1 \lfloor x \rfloor dx + 4!", {"integral", "rounding", "choice"}),
    (r"\frac{d}{dx} \sum_{k} x^k", {"derivative", "sum"}), (r"\frac{d}{2}", set()),
    (r"\frac{d_1}{d_2}", set()), ("x' = 3", set()), (r"30^\circ 15'", set()),
    ("f'(2)", {"derivative"}),
    (r"n \equiv 3 \pmod 7", set()), (r"n \equiv 3 \ (\bmod 7)", set()), (r"17 \bmod 5", {"modulo"}),
    (r"\begin{cases} x+1 & x>0 \\ 1 & x \le 0 \end{cases}", set()), (r"0.\overline{3}", set()),
    (r"\ln 2 \cdot 3 + \log_{10} 7", set()), (r"P(A|B) = \frac{1}{2}", set()),
    (r"\{x \mid 1<x<2\}", set()), (r"\|x\| + 2", set()), (r"2^{3+4}", {"arithmetic"}),
    (r"\frac{-4 \pm \sqrt{16-4}}{2}", {"arithmetic"}), (r"(1,2)^T", set()), ("7\\%", set()),
    (r"\begin{pmatrix}1&2\end{pmatrix}^T", set()), ("3 4/5", set()), (r"\sin 2x", set()),
    ("(2+i)(2-i)", {"arithmetic"}), (r"\pmod", {"modulo"}), (r"(x-(1+i))(x-(1-i))", set()),
    (r"\frac{1}{1+i}", set()), (r"1+\cdots+5", {"arithmetic"}),
    ("2^-{3}", set()), (r"\frac{\mathrm{d}}{\mathrm{d} x} x", {"derivative"}),
    ("1, 2, \\ldots", set()),
])
def test_undone_by_hand(text, families):
    assert undone(text) == families


def test_restated_answers_are_counted_either_way():
    for evaluated in (False, True):
        grader_stats(reset=True)
        verdicts = grade(["15", "15", "16"], ["1+14", "15", "1+14"], evaluated=evaluated)
        assert verdicts == [not evaluated, True, False]
        assert grader_stats()["restated"] == 1  # the wrong one does not count


def test_right_pairs_of_the_table_stay_right_unless_they_restate():
    cases = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    pairs = [(case["gold"], case["answer"]) for case in cases if case["equal"]]
    assert len(pairs) > 300
    assert [pair for pair in pairs if restated(*pair)] == [("0", "1-1"), ("11", "5+6")]


def test_evaluation_marks_restated_answers_and_reports_their_share(monkeypatch):
    texts = [r"\boxed{1+14}", r"\boxed{15}", r"\boxed{1+15}", r"\boxed{5}"]
    monkeypatch.setattr(evaluation, "find_stop_ids", lambda model, tokenizer: [0])
    monkeypatch.setattr(evaluation, "complete", lambda *args: ([[0]] * 4, [0] * 4))
    monkeypatch.setattr(evaluation, "completion_texts", lambda tokenizer, ids, stop_ids: texts)
    problem = {"benchmark": "b", "id": "1", "problem": "?", "answer": "15"}
    problem |= {"prompt": [1], "given": []}
    record, = evaluation.evaluate(None, None, [problem], evaluation.Config(n=4), seed=0)
    assert [s["restated"] for s in record["samples"]] == [True, False, False, False]
    assert [s["correct"] for s in record["samples"]] == [True, True, False, False]
    old = {**record, "samples": [{**s} for s in record["samples"]]}
    for s in old["samples"]:
        del s["restated"]  # written before the share was reported
    assert evaluation.summarise([record])["restated"] == 0.25
    assert evaluation.summarise([record, old])["restated"] == 0.125
    summary = {"rates": "", "model": "m", "name": "n", **evaluation.summarise([record])}
    assert "restated 0.250\n" in evaluation.SUMMARY.format(**summary)


PIECES = [
    *r"^_{}()[]|!'%+-*/=<,.;&0123 xdi", r"\frac", r"\sqrt", r"\pi", r"\int", r"\sum", r"\sin",
    r"\ln",
    r"\left", r"\cdot", r"\div", r"\pm", r"\lfloor", r"\rfloor", r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\\", r"\{", r"\}", r"\pmod", r"\operatorname{lcm}", r"\text{ and }",
    r"\binom", "²", "½", "mod",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(max_examples=1000, deadline=None)
def test_fuzzed_expressions_raise_nothing(text):
    assert restated("7", text) in (True, False) and restated(text, "7") in (True, False)
    assert not restated(text, text)


def test_hostile_expressions_raise_nothing():
    pieces = [piece * (2_000 // len(piece)) for piece in PIECES if piece.strip()]
    pieces += [r"\lfloor" * 200 + "7" + r"\rfloor" * 200, r"\ln\sqrt" * 200, "{" * 25 + "}" * 25]
    for text in pieces:
        assert restated("7", text) in (True, False)
    assert tree(r"\lfloor " * 41) is None and restated("7", r"\lfloor " * 41)


def test_a_tree_is_walked_once(monkeypatch):
    """Twice the text is twice the work, counted in steps."""
    from plumbing.undone import Walk

    steps = []
    for name in ("factor", "term", "total", "whole"):
        real = getattr(Walk, name)
        step = lambda self, items, *rest, real=real: steps.append(1) or real(self, items, *rest)
        monkeypatch.setattr(Walk, name, step)
    for piece in ("1+", r"\ln ", "(2)", r"\frac{1}{2}", "x^2!", r"\sin 2\cdot", "|1|", "(1+(",
    "a_1"):
        counts = []
        for size in (20, 40):
            steps.clear()
            undone.__wrapped__((piece * size)[:2_000] + ")" * 2 * size)
            counts.append(len(steps))
        assert counts[1] <= 2 * counts[0] + 2, piece


# --------------------------------------------------------------------------------------------------
# Answers of several boxes

LISTS = [  # one list: what it is read as
    (r"\boxed{1} and \boxed{-2}", r"\{1, -2\}"),
    (r"$\boxed{1}$ and $\boxed{-2}$.", r"\{1, -2\}"),
    (r"\(\boxed{1}\), \(\boxed{-2}\)", r"\{1, -2\}"),
    (r"\[\boxed{1}\quad\text{or}\quad\boxed{-2}\]", r"\{1, -2\}"),
    (r"\boxed{1}, \text{ and } \boxed{-2}", r"\{1, -2\}"),
    ("\\boxed{1}\n\n\\boxed{-2}", r"\{1, -2\}"),
    (r"\boxed{1}; \boxed{2}; or \boxed{3}", r"\{1, 2, 3\}"),
    (r"\boxed{1}\boxed{2}", r"\{1, 2\}"),
    (r"\fbox{\sqrt{2}} \\ \boxed{\pi}", r"\{\sqrt{2}, \pi\}"),
    (r"\boxed{1,000} and \boxed{2}", r"\{1000, 2\}"),
    (r"\boxed{(1,2)}, \boxed{(2,1)}", "(1,2), (2,1)"),
    (r"\boxed{x=1} or \boxed{x=-2}", "x=1, x=-2"),
    (r"\boxed{A} and \boxed{C}", "A, C"),
    (r"so \boxed{5}, hence \boxed{1}, \boxed{2}", r"\{1, 2\}"),
    (r"\boxed{5} \boxed{5}", "5"),  # one answer twice
    (r"\boxed{5}, \boxed{}", "5"),
]
LAST = [  # other words between the boxes: the last one
    (r"\boxed{1} or maybe \boxed{2}", "2"),
    (r"first \boxed{1}, then \boxed{2}", "2"),
    (r"x=\boxed{1}, y=\boxed{2}", "2"),
    (r"\boxed{1} (or \boxed{2})", "2"),
    (r"\boxed{1}. \boxed{2}", "2"),
    (r"\boxed{1} android \boxed{2}", "2"),
    (r"\boxed{1} \text{ wait } \boxed{2}", "2"),
    (r"\boxed{1} = \boxed{2}", "2"),
    (r"\boxed{\boxed{1}} and \boxed{2}", r"\boxed{1}, 2"),
    (r"\boxed{1}, \boxed{\boxed{2}}", "2"),
    (r"\boxed{1}, \boxed{2", "1"),
]


@pytest.mark.parametrize("text, read", LISTS + LAST)
def test_several_boxes(text, read):
    assert last_box(text) == read
    assert extract_answer(f"<answer>{text}</answer>") == extract_answer(text) == read


ROOTS = r"\boxed{1} and \boxed{-2}"
POINTS = r"\boxed{(1,2)}, \boxed{(2,1)}"
LIST_CASES = [
    (ROOTS, r"\boxed{-2}, \boxed{1}", True),
    (ROOTS, r"$\boxed{1}$ or $\boxed{-2}$", True),
    (ROOTS, "-2, 1", True),
    (ROOTS, "x=1 or x=-2", True),
    (r"\{1,-2\}", ROOTS, True),
    (r"\{-2,1\}", ROOTS, True),
    ("x=-2, x=1", ROOTS, True),
    ("1, -2", ROOTS, True),
    (r"\pm 2", r"\boxed{-2}, \boxed{2}", True),
    (r"1\pm\sqrt{2}", r"\boxed{1-\sqrt{2}} \boxed{1+\sqrt2}", True),
    (POINTS, r"\boxed{(2,1)} and \boxed{(1,2)}", True),
    (r"\{(1,2),(2,1)\}", POINTS, True),
    ("(2,1),(1,2)", POINTS, True),
    ("A,C", r"\boxed{C}, \boxed{A}", True),
    ("5", r"\boxed{5}, \boxed{5}", True),
    ("2", r"first \boxed{1}, then \boxed{2}", True),
    ("1, -2", r"\boxed{-2} and \boxed{1}", False),  # a plain list has an order
    ("1", ROOTS, False),
    ("-2", ROOTS, False),
    ("-2", r"\boxed{1} or \boxed{-2}", False),  # hedging
    ("1", r"\boxed{1} or maybe \boxed{2}", False),
    ("A", r"\boxed{A} or \boxed{C}", False),
    ("C", r"\boxed{A} or \boxed{C}", False),
    ("no", r"\boxed{yes} or \boxed{no}", False),
    ("x^2", r"\boxed{x^2}, \boxed{x^3}", False),
    ("(2,1)", POINTS, False),
    (ROOTS, "1", False),
    (ROOTS, r"\boxed{1} and \boxed{2}", False),
    (ROOTS, r"\boxed{1}, \boxed{-2}, \boxed{3}", False),
    (POINTS, r"\boxed{(1,2)}", False),
    ("12", r"\boxed{1}\boxed{2}", False),
    ("1234", r"\boxed{1}, \boxed{234}", False),
    (r"\{1,-2\}", r"\boxed{1} but also \boxed{-2}", False),
]


def test_lists_of_boxes_are_graded_as_lists():
    golds, answers, expected = zip(*LIST_CASES)
    found = [extract_answer(f"<answer>{answer}</answer>") for answer in answers]
    for given_answers in (answers, found):
        verdicts = grade(golds, given_answers, budget=60.0)
        assert [case for case, right in zip(LIST_CASES, verdicts) if right != case[2]] == []


class Counted:
    """A pattern that counts the characters that it is shown."""

    def __init__(self, pattern):
        self.pattern, self.seen = pattern, 0

    def fullmatch(self, text, start, end):
        self.seen += max(0, end - start)
        return self.pattern.fullmatch(text, start, end)


@pytest.mark.parametrize("text", [
    r"\boxed{1} and " * 100_000, r"\boxed{" * 100_000 + "}" * 100_000, r"\boxed{1}but" * 100_000,
    r"\boxed{\boxed{1}}, " * 50_000, r"\boxed{" + r"\boxed{1}, " * 100_000 + "}",
    r"\boxed{1}" + " " * 10**6 + r"x\boxed{2}",
], ids=["list", "nested", "words", "pairs", "list in a box", "gap"])
def test_what_is_between_boxes_is_read_once(text, monkeypatch):
    counted = Counted(module.BETWEEN_BOXES)
    monkeypatch.setattr(module, "BETWEEN_BOXES", counted)
    assert last_box(text) is not None
    assert counted.seen <= len(text)


def test_mutated_boxes_raise_nothing():
    rng = random.Random(1)
    pieces = [r"\boxed{", "}", "1", "-2", " and ", ", ", "$", " or ", r"\{", "x=", "(1,2)",
    r"\text{or}"]
    for _ in range(2_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(20)))
        box = last_box(text)
        assert box is None or isinstance(box, str)
        if refusal(text) is None:
            assert clean(clean(text)) is not None
    assert answers_equal("1", r"\boxed{1}")
