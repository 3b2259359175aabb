"""Multiple choice: what names an option, what names none, and what a plan may mention."""

import pytest

from data import choice
from data.verifiers import plan_leaks, refusals, same_answers, verify
from rewards import extract_answer

# The gold is B, 12 N.
FORCES = {"problem": "q", "answer": "B", "verifier": "choice"}
FORCES["options"] = ["$10.5$", "12 N", "9 N", "zero"]
RIGHT = [
    "B", "(B)", "b", "b)", "B.", "B)", "[B]", "{B}", "B:", "(b)", "\nB\n", "Ｂ", "（B）",
    "**B**", "**B.** 12 N", "`B`", '"B"', "*B*", "$B$", r"\(B\)", r"\text{B}", r"\text{(B)}",
    r"\mathrm{B}", r"\textbf{B}", r"\boxed{B}", r"\textbf{\text{B}}", r"$\text{B}$",
    "Option B", "option (B)", "Choice B.", "The answer is B", "The answer is (B).", "Answer: B",
    "answer=B", "So the correct answer is option B", "The best choice is B", "B is correct",
    "(B) is the right answer",
    "B. 12 N", "(B) 12 N", "B) 12 N", "B 12 N", "B: 12 N", "B、12 N", "B.12 N", "b) 12 N",
    "B (12 N)", "12 N (B)", r"\text{B. 12 N}", r"\text{B. } 12 \text{ N}", "B. $12$ N",
    "12 N", "12N", "12 n", "$12$ N", r"12\,\mathrm{N}", r"12\ \text{N}", "The answer is B. 12 N",
    "B, because the masses are equal", "B) since A is too small", "B. twelve newtons",
]  # fmt: skip
WRONG = [
    "A", "C", "(D)", "9 N", "C. 9 N", "zero", "A. $10.5$", "10.5",  # another option
    "", "E", "F", "12", "12 M", "1 2 N", "?", "the", "x = B^2", "B^2", "B'", "B's", "BC", "AB",
    "A or B", "B or C", "A, B", "B, C", "B and C", "B/C", "B C", "(A)(B)", "(A) or (B)", "B) or C)",
    "A. B. C. D.", "B. C", "B. (C)", "B. option C", "B. 9 N", "B. 12 N or C. 9 N", "B (9 N)",
    "B, not C", "not B", "B is wrong", "B because", "I think B", "9 N (B)", "b. e. c.", "B?",
    "Between (A) and (B)", "all", None, "B" * 3000, "B\u202e",
]  # fmt: skip


@pytest.mark.parametrize("answer", RIGHT)
def test_what_names_an_option_is_right(answer):
    assert verify([FORCES], [answer], ["s"]) == [True]


@pytest.mark.parametrize("answer", WRONG)
def test_what_names_another_or_none_is_wrong(answer):
    assert verify([FORCES], [answer], ["s"]) == [False]


def test_all_other_golds_call_these_answers_wrong():
    for letter in "ACD":
        assert not any(verify([{**FORCES, "answer": letter}] * len(RIGHT), RIGHT, RIGHT))


@pytest.mark.parametrize(
    "options, answer, letter",
    [
        (["Aa", "AA", "aa"], "AA", "B"),  # case decides where texts differ in case only
        (["Aa", "AA", "aa"], "aA", None),
        (["x", "5", "x"], "5", "B"),
        (["x", "5", "x"], "x", None),  # two options
        (["x", "5", "x"], "C. x", "C"),
        (["B. rapa", "A. lyrata"], "A. lyrata", "B"),  # a text before a letter
        (["C", "D", "A", "B"], "A", "A"),  # but the question asks for a letter
        (["vitamin C", "vitamin D"], "A. vitamin C", "A"),
        (["up", "down"], "C", None),  # there are two
        (list("abcdefghij"), "J", "J"),
        (["f(x)", "(a, b)"], "B ((a, b))", "B"),
        ([r"\frac{1}{2}", r"\dfrac{1}{3}"], r"\dfrac{1}{2}", "A"),
    ],
)
def test_texts_of_options(options, answer, letter):
    assert choice.choice_of({"options": options}, answer) == letter


@pytest.mark.parametrize(
    "problem, options",
    [
        ("As shown, what is F?\nA. $$10.5$$\nB.2.3 N.\nC、4 D. 5\n\nGive a letter.",
         ["$$10.5$$", "2.3 N.", "4", "5"]),
        ("Which? (A) x (B) y (C) z", ["x", "y", "z"]),
        ("（A）one\n（B）two", ["one", "two"]),
        ("Vitamin A. helps.\nA. yes\nB. no", ["yes", "no"]),
        ("Which of A, B and C is it?", []),
    ],
)  # fmt: skip
def test_options_are_read_from_the_problem(problem, options):
    assert choice.options_of({"problem": problem}) == options


def test_only_the_box_or_the_answer_span_is_read():
    for text, right in [
        ("A? C? <answer>B</answer>", True),
        ("B, I think. <answer>I do not know.</answer>", False),
        ("<answer>between A and C: \\boxed{B}</answer>", True),
        ("The answer is B", False),  # neither box nor span
        ("<answer>\\boxed{A}, \\boxed{B}</answer>", False),
    ]:
        assert verify([FORCES], [extract_answer(text)], ["s"]) == [right]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"answer": "E"}, "'E' names no option (A to D)"),
        ({"answer": "12 N or so"}, "names no option"),
        ({"options": "12 N"}, "its options are not a list of at most 16 texts"),
        ({"options": ["1", 2]}, "its options are not a list"),
        ({"options": [str(i) for i in range(17)]}, "its options are not a list"),
    ],
)
def test_what_cannot_be_judged_is_refused(changes, reason):
    assert reason in refusals([{**FORCES, **changes}])[0]


def test_golds_may_be_texts_and_options_may_be_missing():
    records = [{**FORCES, "answer": "12 N"}, {"problem": "See B.", "answer": "J", **CHOICE}]
    assert refusals(records) == [None, None]
    assert verify(records, ["b", "(J)"], ["", ""]) == [True, True]


CHOICE = {"verifier": "choice"}


def test_wrong_answers_that_name_one_option_vote_together():
    pairs = [("C", "(C) 9 N", True), ("C", "D", False), ("C or D", "D or C", False)]
    records = [FORCES] * len(pairs)
    assert same_answers(records, *list(zip(*pairs))[:2]) == [same for *_, same in pairs]


@pytest.mark.parametrize(
    "plan, leaks",
    [
        ("Compare A 10.5, B 12 N and C 9 N, then decide.", False),  # the question lists them, too
        ("Rule out A first.", False),
        ("Apply Newton's law to both bodies.", False),
        ("The answer is B.", True),
        ("Show that the force is 12 N.", True),
        ("Add up.\n12 N", True),
        ("The answer is C.", False),
    ],
)
def test_a_plan_may_mention_options_but_not_state_the_right_one(plan, leaks):
    assert plan_leaks(FORCES, plan) is leaks
