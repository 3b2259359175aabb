"""Rewards against numbers worked out by hand, grading against a table and hostile answers."""

import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing import grader
from plumbing.answers import (
    answers_equal,
    check_gold,
    check_golds,
    clean,
    grade,
    grader_stats,
    plain,
    plan_leaks,
    quick_verdict,
    refusal,
)
from rewards import (
    TAG,
    TEMPLATE,
    build_completion,
    extract_answer,
    length_reward,
    overlong_penalty,
    parse_completion,
    plan_reward,
    total_reward,
)

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "reward_cases.jsonl"  # kind, gold, answer, equal
CASES = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def stats():
    """Counters of this test alone, with no verdict known from another one."""
    grader.pool.verdicts.clear()
    grader_stats(reset=True)
    return grader_stats


# --------------------------------------------------------------------------------------------------
# Reward terms

# Two questions, two plans, two CoTs.
CORRECT = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]]]).bool()
LENGTHS = torch.tensor([[[10, 20], [5, 30]], [[1, 2], [3, 4]]])


def test_plan_reward_by_hand():
    # Question 1: s = (1/2, 0). e^0.5 = 1.648721; 1.648721 / (1.648721 + 1) = 0.622459.
    # Question 2: s = (0, 0).
    expected = torch.tensor([[0.622459, 0.377541], [0.5, 0.5]])
    assert torch.allclose(plan_reward(CORRECT, tau=1.0), expected, atol=1e-6)
    # tau = 0.5 doubles the logits: e / (e + 1) = 0.731059.
    assert plan_reward(CORRECT, tau=0.5)[0, 0].item() == pytest.approx(0.731059, abs=1e-6)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_plan_reward_is_a_distribution_over_plans(questions, plans, cots, seed):
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(questions, plans, cots, generator=generator) < 0.5
    reward = plan_reward(correct, 1.0)
    assert reward.shape == (questions, plans) and reward.dtype == torch.float32
    assert torch.allclose(reward.sum(dim=1), torch.ones(questions))
    better = correct.float().mean(2)[:, :, None] > correct.float().mean(2)[:, None, :]
    assert (reward[:, :, None] > reward[:, None, :])[better].all()


def test_length_reward_by_hand():
    # Question 1: T = 10 (the only right one) and T_max = 30, so that |o| = 10, 20, 5, 30 gives
    # 0.1 * exp(-(0, 10, 5, 20) / 20).
    expected = 0.1 * torch.tensor([[1.0, math.exp(-0.5)], [math.exp(-0.25), math.exp(-1.0)]])
    reward = length_reward(LENGTHS, CORRECT, alpha=0.1)
    assert torch.allclose(reward[0], expected)
    assert (reward[1] == 0).all()  # no right completion
    only = length_reward(LENGTHS, CORRECT, alpha=0.1, correct_only=True)
    assert only[0, 0, 0].item() == pytest.approx(0.1) and only.count_nonzero() == 1


def test_length_reward_takes_the_shortest_right_completion_not_the_shortest():
    # Right: 40 and 60. T = 40 although 8 is shorter; T_max = 80.
    # |8 - 40| / 40 = 0.8, |60 - 40| / 40 = 0.5.
    lengths, correct = torch.tensor([[[8, 40], [60, 80]]]), torch.tensor([[[0, 1], [1, 0]]])
    expected = torch.tensor([[[math.exp(-0.8), 1.0], [math.exp(-0.5), math.exp(-1.0)]]])
    assert torch.allclose(length_reward(lengths, correct, alpha=1.0), expected)


def test_length_reward_when_the_longest_is_the_shortest_right_one():
    lengths = torch.tensor([[[7, 7, 7]], [[3, 5, 9]]])
    correct = torch.tensor([[[1, 0, 1]], [[0, 0, 1]]])
    assert torch.equal(length_reward(lengths, correct, alpha=0.25), torch.full((2, 1, 3), 0.25))


def test_overlong_penalty_by_hand():
    # Limit 100, buffer 20: free up to 80, then -(l - 80) / 20.
    lengths = torch.tensor([0, 80, 85, 100, 140])
    expected = torch.tensor([0.0, 0.0, -0.25, -1.0, -1.0])
    assert torch.allclose(overlong_penalty(lengths, 100, 20), expected)
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(lengths, 100, buffer)


def test_total_reward_by_hand():
    well_formed = torch.tensor([[[1, 1], [0, 1]], [[1, 0], [0, 0]]])
    reward = total_reward(CORRECT, well_formed, LENGTHS, beta=0.5, tau=1.0, alpha=0.1)
    assert set(reward) == {"total", "outcome", "plan", "structure", "length"}
    assert all(term.shape == (2, 2, 2) and term.dtype == torch.float32 for term in reward.values())
    # First completion: 1 + 0.5 * 0.622459 + 0.2 + 0.1.
    # Third: 0 + 0.5 * 0.377541 + 0 + 0.1 * exp(-0.25).
    assert reward["total"][0, 0, 0].item() == pytest.approx(1.611230, abs=1e-6)
    assert reward["total"][0, 1, 0].item() == pytest.approx(0.188770 + 0.077880, abs=1e-6)
    assert reward["plan"][0, 0, 1].item() == pytest.approx(0.622459, abs=1e-6)  # not scaled by beta
    assert reward["total"][1, 0, 0].item() == pytest.approx(0.45)  # 0.5 * 0.5 + 0.2
    options = dict(beta=0.5, tau=1.0, alpha=0.1, correct_only=True, structure=1.0)
    other = total_reward(CORRECT, well_formed, LENGTHS, **options)
    assert other["total"][0, 0, 1].item() == pytest.approx(0.311230 + 1.0, abs=1e-6)


WRONG_SHAPES = [
    lambda: plan_reward(CORRECT[0], 1.0),
    lambda: length_reward(LENGTHS[:1], CORRECT, 0.1),
    lambda: total_reward(CORRECT, CORRECT[:, :1], LENGTHS, 0.5, 1.0, 0.1),
    lambda: total_reward(CORRECT[:, :0], CORRECT[:, :0], LENGTHS[:, :0], 0.5, 1.0, 0.1),
]


@pytest.mark.parametrize("call", WRONG_SHAPES)
def test_wrong_shapes_are_refused_in_one_sentence(call):
    with pytest.raises(ValueError, match=r"one shape \(questions, plans, CoTs\), .*got"):
        call()


def test_tau_must_be_positive():
    with pytest.raises(ValueError, match="tau"):
        plan_reward(CORRECT, 0.0)


# --------------------------------------------------------------------------------------------------
# The template

GOOD = "<plan>p</plan><think>t</think><answer>a</answer>"
WELL_FORMED = {
    "no space": GOOD,
    "lines between": "<plan>p</plan>\n<think>t</think>\n\n<answer>a</answer>",
    "lines within": "<plan>\np\n</plan>\n<think>\nt\nt\n</think>\n<answer>\na\n</answer>",
    "space around": f" \n\t{GOOD}\n ",
    "windows line ends": "<plan>p</plan>\r\n<think>t</think>\r\n<answer>a</answer>\r\n",
    "words split by a tokenizer": "<plan> p </plan> <think> t </think> <answer> a </answer>",
    "other tags within": "<plan>p</plan><think>if a<b then <b>t</b></think><answer>a</answer>",
    "tag names as words": "<plan>plan</plan><think>think / answer</think><answer>a</answer>",
    "code fence within": "<plan>p</plan><think>```\nt\n```</think><answer>a</answer>",
    "box in the answer": "<plan>p</plan><think>t</think><answer>\\boxed{7}</answer>",
    "letters of any script": "<plan>план</plan><think>思考</think><answer>א</answer>",
}
MALFORMED = {
    "nothing": "",
    "plain text": "The answer is 7.",
    "text before": f"Sure! {GOOD}",
    "text after": f"{GOOD} Done.",
    "text between plan and think": "<plan>p</plan>so<think>t</think><answer>a</answer>",
    "text between think and answer": "<plan>p</plan><think>t</think>so<answer>a</answer>",
    "code fence around": f"```\n{GOOD}\n```",
    "end-of-turn token after": f"{GOOD}<|im_end|>",
    "zero-width space between": "<plan>p</plan>\u200b<think>t</think><answer>a</answer>",
    "no plan": "<think>t</think><answer>a</answer>",
    "no think": "<plan>p</plan><answer>a</answer>",
    "no answer": "<plan>p</plan><think>t</think>",
    "plan only": "<plan>p</plan>",
    "plan never closes": "<plan>p<think>t</think><answer>a</answer>",
    "think never closes": "<plan>p</plan><think>t<answer>a</answer>",
    "answer never closes": "<plan>p</plan><think>t</think><answer>a",
    "plan never opens": "p</plan><think>t</think><answer>a</answer>",
    "answer never opens": "<plan>p</plan><think>t</think>a</answer>",
    "think before plan": "<think>t</think><plan>p</plan><answer>a</answer>",
    "answer before think": "<plan>p</plan><answer>a</answer><think>t</think>",
    "answer first": "<answer>a</answer><plan>p</plan><think>t</think>",
    "two plans": f"<plan>p</plan>{GOOD}",
    "two thinks": "<plan>p</plan><think>t</think><think>t</think><answer>a</answer>",
    "two answers": f"{GOOD}<answer>b</answer>",
    "everything twice": GOOD + GOOD,
    "plan in plan": "<plan><plan>p</plan></plan><think>t</think><answer>a</answer>",
    "plan in think": "<plan>p</plan><think><plan>q</plan></think><answer>a</answer>",
    "think in plan": "<plan>p<think>t</think></plan><answer>a</answer>",
    "answer in think": "<plan>p</plan><think>t<answer>a</answer></think>",
    "answer in answer": "<plan>p</plan><think>t</think><answer><answer>a</answer></answer>",
    "stray closing tag": "<plan>p</plan><think>t</plan></think><answer>a</answer>",
    "stray closing tag at the end": f"{GOOD}</answer>",
    "crossed": "<plan>p<think></plan>t</think><answer>a</answer>",
    "closed by another": "<plan>p</think><think>t</plan><answer>a</answer>",
    "upper case": GOOD.upper(),
    "one tag in upper case": "<PLAN>p</PLAN><think>t</think><answer>a</answer>",
    "mixed case closes": "<plan>p</Plan><think>t</think><answer>a</answer>",
    "upper case tag within": "<plan>p</plan><think>t <ANSWER>a</ANSWER></think><answer>a</answer>",
    "spaces in a tag": "< plan >p</ plan ><think>t</think><answer>a</answer>",
    "attribute in a tag": "<plan id=1>p</plan><think>t</think><answer>a</answer>",
    "square brackets": "[plan]p[/plan][think]t[/think][answer]a[/answer]",
    "escaped": "&lt;plan&gt;p&lt;/plan&gt;<think>t</think><answer>a</answer>",
    "empty plan": "<plan></plan><think>t</think><answer>a</answer>",
    "blank plan": "<plan> \n</plan><think>t</think><answer>a</answer>",
    "empty think": "<plan>p</plan><think></think><answer>a</answer>",
    "empty answer": "<plan>p</plan><think>t</think><answer> </answer>",
    "prefilled tag missing": "p</plan><think>t</think><answer>a</answer>",
    "self-closing": "<plan/><think>t</think><answer>a</answer>",
}


@pytest.mark.parametrize("text", WELL_FORMED.values(), ids=WELL_FORMED)
def test_well_formed(text):
    completion = parse_completion(text)
    assert completion is not None and all(part and part == part.strip() for part in completion)


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_malformed(text):
    assert parse_completion(text) is None


def test_blocks_are_returned_stripped_and_whole():
    text = "<plan>\n a\nb \n</plan> <think> t </think> <answer> \\boxed{7} </answer>"
    assert parse_completion(text) == ("a\nb", "t", "\\boxed{7}")


@given(*[st.text(min_size=1).filter(lambda part: part.strip() and not TAG.search(part))] * 3)
@settings(max_examples=100, deadline=None)
def test_build_then_parse_gives_the_parts_back(plan, think, answer):
    parts = plan.strip(), think.strip(), f"\\boxed{{{answer.strip()}}}"
    assert parse_completion(build_completion(plan, think, answer)) == parts


def test_build_completion():
    rest = "<think>\nt\n</think>\n<answer>\n\\boxed{7}\n</answer>"
    assert build_completion("p", "t", "7") == f"<plan>\np\n</plan>\n{rest}"
    assert build_completion(None, "t", "7") == rest
    assert extract_answer(build_completion("p", "so \\boxed{3}", r"\frac{1}{2}")) == r"\frac{1}{2}"
    empty = [("", "t", "7"), ("p", " ", "7"), ("p", "t", "")]
    tagged = [("<think>", "t", "7"), (None, "</Plan>", "7"), ("p", "t", "<answer>7")]
    for parts in empty + tagged:
        with pytest.raises(ValueError, match="non-empty and free of template tags"):
            build_completion(*parts)


EXTRACTED = [
    ("<answer> \\boxed{ 7 } </answer>", "7"),
    ("<answer> \\boxed { 7 } </answer>", "7"),
    ("<answer>7</answer>", "7"),
    ("<answer>\\fbox{7}</answer>", "7"),
    ("<answer>first \\boxed{1} then \\boxed{2}</answer>", "2"),
    ("\\boxed{1}<answer>2</answer>", "2"),
    ("<answer>2</answer>\\boxed{1}", "2"),
    ("<answer>1</answer> no, <answer>2</answer>", "2"),
    ("<answer>\\boxed{\\frac{1}{2}}</answer>", r"\frac{1}{2}"),
    ("<answer>\\boxed{\\boxed{3}}</answer>", "3"),
    ("<answer>\\boxed{\\{1,2\\}}</answer>", r"\{1,2\}"),
    ("<answer>\\boxed{\\left\\{1,2\\right.}</answer>", r"\left\{1,2\right."),
    ("<answer>\\boxed{4} or \\boxed{5</answer>", "4"),
    ("<answer>\\boxed{4</answer>", "\\boxed{4"),
    ("<answer>}}\\boxed{6}</answer>", "6"),
    ("<answer>{{\\boxed{6}</answer>", "6"),
    ("<answer>\\boxed{5}", "5"),  # cut off before the tag closes
    ("<answer></answer>", None),
    ("<answer> \n </answer>", None),
    ("so \\boxed{1} and \\boxed{8}.", "\\{1, 8\\}"),
    ("so \\boxed{1} and not \\boxed{8}.", "8"),
    ("<plan>\\boxed{7}", None),  # a plan that never closes has no answer
    ("<plan>7 <think>t</think> <answer>\\boxed{7}</answer>", None),
    ("<plan>7</plan> <plan>8 \\boxed{8}", "8"),
    ("7</plan> <answer>\\boxed{7}</answer>", "7"),  # the prompt has opened it
    ("the answer is 8", None),
    ("\\boxed{}", None),
    ("\\boxed{8", None),
    ("", None),
]


@pytest.mark.parametrize("text, answer", EXTRACTED)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


MEGABYTES = [
    "<plan>" * 170_000, "\\boxed{" * 150_000, "{" * 10**6, "<answer>" * 130_000,
    "\\boxed" + " " * 10**6, GOOD * 20_000, "\\boxed{" + "{}" * 500_000, " " * 10**6,
    "-" + "\t" * 10**6, "step" + " " * 10**6, "a" * 10**6, "," * 10**6, "-" * 10**6, "1" * 10**6,
    "1," * 50_000,
]


@pytest.mark.parametrize("text", MEGABYTES)
def test_a_megabyte_is_read_in_linear_time(text):
    start = time.process_time()
    for function in (parse_completion, extract_answer, plain, check_gold):
        function(text)
    plan_leaks(text, "7"), plan_leaks(text, "x+y"), grade(["7"], [text])
    assert time.process_time() - start < 10  # a quadratic pass takes hours


# --------------------------------------------------------------------------------------------------
# Answers

def test_every_case_of_the_table():
    assert len(CASES) >= 300
    kinds = {(case["kind"], case["equal"]) for case in CASES}
    names = {kind for kind, _ in kinds}
    assert len(names) >= 15 and len(kinds) == 2 * len(names)
    golds, answers = [case["gold"] for case in CASES], [case["answer"] for case in CASES]
    verdicts = grade(golds, answers, budget=60.0)
    assert [case for case, verdict in zip(CASES, verdicts) if verdict != case["equal"]] == []


# Every pair of the table on which math-verify 0.9 differs, and why this project does not follow.
DIFFERENCES = {
    "a full stop ends a sentence and is no part of the answer": [("7", "7."), ("B", "B.")],
    "two numbers side by side are not their sum": [("11", "5 6")],
    "thin spaces separate thousands": [("1234567", r"1\,234\,567")],
    "a mixed number needs no \\frac": [
        ("3/2", "1 1/2"), ("3/2", "x = 1 1/2"), ("(1.5,2)", "(1 1/2, 2)"),
    ],
    "two decimals are compared exactly": [
        ("1.0", "1.00000001"), ("1.0", "0.99999999"), ("0.000001", "0.0000011"),
    ],
    "a percent sign is a unit for decimals as it is for integers": [
        ("12.5", r"12.5\%"), ("12.5", "12.5%"),
    ],
    "degree signs and currency signs of any spelling are units": [
        ("90", "90°"), (r"30^\circ", r"30\degree"), ("1200", "€1200"), ("1200", "£1,200"),
    ],
    "one symbol in two encodings": [
        (r"\infty", "∞"), (r"(-\infty,1)\cup(2,\infty)", "(-∞,1)∪(2,∞)"),
        (r"\emptyset", r"\varnothing"),
    ],
    "a choice may keep its closing bracket": [("B", "B)")],
    "the case of words does not matter, a \\text{} around them neither": [
        ("yes", "YES"), ("even", "Even"), ("True", "true"), (r"\text{June 5}", "June 5"),
    ],
    "words are not products of letters, which commute": [
        ("left", "felt"), ("no", "on"), ("left", "x=felt"), ("a cat", "a act"),
        ("June 5", "enuJ 5"), ("5 lions", "5 loins"), ("red, blue", "blue, red"), ("ab", "ba"),
    ],
    "a plain list of numbers has an order, however the answer is dressed": [
        ("1,2", "2,1"), ("2,3,5,7", "7,5,3,2"), ("1,2,3", "3,2,1"), ("1,2,3", r"\{3,2,1\}"),
        ("1,2,3", "x=3,x=2,x=1"), ("1,2,3", r"3,2,\sqrt{1}"), ("1,2,2", "1,2"),
        (r"1,-\sqrt{2}", r"-\sqrt{2},1"), ("100, 200", "200, 100"),
    ],
    "a comma with a space separates, one without a space before three digits may group": [
        ("100, 200", "100,200"), ("1,000, 2,000", "1000, 2000"),
    ],
}


def test_every_difference_from_math_verify_is_listed():
    from math_verify import parse, verify

    found = set()
    for case in CASES:
        gold = parse(f"\\boxed{{{case['gold']}}}", parsing_timeout=None)
        answer = parse(f"\\boxed{{{case['answer']}}}", parsing_timeout=None)
        if verify(gold, answer, timeout_seconds=None) != case["equal"]:
            found.add((case["gold"], case["answer"]))
    assert found == {pair for pairs in DIFFERENCES.values() for pair in pairs}


def test_plain_numbers_never_reach_a_worker(stats):
    right = [
        ("025", "25"), ("1,000", "1000"), ("0.5", r"\frac12"), (r"\frac{1}{3}", "0.333333"),
        ("50\\%", "0.5"), ("x=4", "4"),
    ]
    wrong = [("-7", "7"), ("(1,2)", "(2,1)"), ("B", "(C)"), ("yes", "no"), (r"\infty", "3")]
    assert grade(*zip(*right, *wrong)) == [True] * 6 + [False] * 5
    assert stats()["judged"] == 0 and stats()["graded"] == 11


def test_equal_pairs_are_judged_once_and_verdicts_remembered(stats):
    pairs = [("x+1", "1+x"), ("x+1", "x+2")] * 20
    assert grade(*zip(*pairs)) == [True, False] * 20
    assert stats()["judged"] == 2
    assert grade(*zip(*pairs)) == [True, False] * 20
    assert stats(reset=True)["judged"] == 2
    assert stats()["graded"] == 0


def test_grade_keeps_the_order_of_a_mixed_batch():
    rng = random.Random(0)
    cases = rng.sample(CASES, 150)
    golds, answers = [case["gold"] for case in cases], [case["answer"] for case in cases]
    assert grade(golds, answers) == [case["equal"] for case in cases]
    assert grade([], []) == []


def test_no_answer_is_wrong_and_counted(stats):
    assert grade(["7", "7"], [None, "7"]) == [False, True]
    assert stats()["no_answer"] == 1
    with pytest.raises(ValueError, match="one answer for each gold"):
        grade(["7"], [])


def test_an_unreadable_gold_makes_nothing_right(stats):
    for gold in ["", " ", "\x00", "7" * 300]:
        assert not answers_equal(gold, gold)
    assert stats()["bad_golds"] == 4


GOLDS = [
    ("7", None), ("025", None), (r"\frac{1}{2}", None), ("x^2+1", None), ("(1,2]", None),
    (r"\text{Tuesday}", None), ("None of the above", None), ("$5$", None), (r"\boxed{5}", None),
    (r"\infty", None), ("admirable, library, mere, pure", None),
    ("", "empty"), ("  ", "empty"), (None, "string"), (7, "string"), ("7\u202e", "invisible"),
    ("x" * 3000, "longer"), ("9" * 201, "digits"), ("(" * 26 + ")" * 26, "deep"),
    (r"\frac{1}{", "neither"), ("x=", "neither"), ("5)", "neither"),
]


@pytest.mark.parametrize("gold, reason", GOLDS)
def test_check_gold(gold, reason):
    assert (check_gold(gold) is None) if reason is None else (reason in check_gold(gold))


def test_check_golds_keeps_the_order():
    reasons = check_golds(["7", "x=", "x+1", "", r"\frac{1}{"])
    assert [reason is None for reason in reasons] == [True, False, True, False, False]


# --------------------------------------------------------------------------------------------------
# Plans that hold the answer

PLANS = [
    ("The answer is 42.", "42", True),
    ("Show that the sum is 1,024", "1024", True),
    ("Get 0.5 by halving", r"\frac{1}{2}", True),
    (r"Reach \frac{3}{4}, then stop", "0.75", True),
    ("Reduce to -15 and check", "-15", True),
    ("Find x = 2", "2", True),
    ("Conclude that it equals 7", "7", True),
    (r"\boxed{2}", "2", True),
    ("7", "7", True),
    ("add the terms\n9\n", "9", True),
    ("The answer is B", "B", True),
    ("Choose option (C)", "C", True),
    (r"Factor as (x-1)(x+1), done", "(x - 1)(x + 1)", True),
    (r"Simplify to 2\sqrt{3}", r"$2 \sqrt{3}$", True),
    ("It falls on a tuesday", r"\text{Tuesday}", True),
    (r"so it tends to \infty in the limit", r"\infty", True),
    ("1. Set up the equation\n2. Solve it\n42. Check", "42", False),
    ("Step 12: compute the sum", "12", False),
    ("(1) split (2) add", "2", False),
    ("Consider 2 cases", "2", False),
    ("Divide by 2 and take x^2 mod 3", "2", False),
    ("Case 2: use case 3", "3", False),
    ("Handle case (11) last", "11", False),
    ("K needs A F ; F needs A", "A", False),
    ("Solve for x", "x", False),
    ("Use 142 and 421 and 4.2 and 42.5", "42", False),
    ("Use x42 and 42x and 42/5", "42", False),
    ("Use 3(x-1)(x+1)", "(x+1)(x-1)", False),
    ("Consider the eventual limit", "even", False),
    ("Yesterday's value", "yes", False),
    ("", "7", False),
    ("anything", "", False),
    ("anything", None, False),
    ("tends to a limit", r"\infty", False),
]


@pytest.mark.parametrize("plan, answer, leaks", PLANS)
def test_plan_leaks(plan, answer, leaks):
    assert plan_leaks(plan, answer) is leaks


# --------------------------------------------------------------------------------------------------
# Hostile answers

REFUSED = {
    "20,000 nested braces": "{" * 20_000 + "7" + "}" * 20_000,
    "800 nested fractions": r"\frac{1}{" * 800 + "7" + "}" * 800,
    "30 nested brackets": "(" * 30 + "7" + ")" * 30,
    "a set of 20,000 numbers": r"\{" + ",".join(map(str, range(20_000))) + r"\}",
    "200,000 digits": "7" * 200_000,
    "300 digits": "7" * 300,
    "1 MB of text": "the answer " * 95_000,
    "null bytes": "7\x00",
    "right-to-left mark": "\u202e7",
    "zero-width space": "7\u200b",
    "lone surrogate": "7\ud800",
    "blank": " \n\t ",
}
STOPPED = {  # none of these is decided in a second, or within the memory cap
    "power tower": "9^{9^{9^{9}}}",
    "factorial": "(10^9)!",
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^2+1}",
}
WRONG = {
    "Python power tower": "9**9**9**9",
    "Python call": "__import__('os').system('touch HERE')",
    "Python in text": r"\text{__import__('os').system('touch HERE')}",
    "lambda": "(lambda: open('HERE', 'w'))()",
    "format string": "{0.__class__}",
    "TeX input": r"\input{/etc/passwd}",
    "TeX write": r"\write18{touch HERE}",
    "regular expression": "(a+)+$" * 20,
    "many dollars": "$" * 1000 + "8" + "$" * 900,
    "many equals": "=".join(["1"] * 500),
    "many boxes": r"\boxed{" * 20 + "8" + "}" * 20,
    "division by zero": r"\frac{7}{0}",
    "undefined": r"\frac{0}{0}",
}


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_hostile_text_is_refused_without_a_worker(answer, stats):
    assert not answers_equal("7", answer)
    assert stats()["refused"] == 1 and stats()["judged"] == 0


@pytest.mark.parametrize("answer", STOPPED.values(), ids=STOPPED)
def test_hostile_mathematics_is_stopped_and_counted(answer, stats):
    assert answers_equal("x+1", "1+x")  # starts the workers
    start = time.monotonic()
    assert grade([r"\sqrt{2}", r"\sqrt{2}"], [answer, r"2^{1/2}"], budget=300) == [False, True]
    assert time.monotonic() - start < 100  # it would take for ever; a loaded machine gets here late
    seen = stats()
    assert seen["timeouts"] + seen["worker_deaths"] + seen["errors"] == 1 and seen["peak_mb"] < 1024


def test_hostile_text_is_wrong_and_harmless(tmp_path, monkeypatch):
    grader.pool.drop(*grader.pool.workers)  # new workers start in the empty folder
    monkeypatch.chdir(tmp_path)
    for gold in ("7", r"\sqrt{2}", "x"):
        verdicts = grade([gold] * len(WRONG), list(WRONG.values()))
        assert [name for name, verdict in zip(WRONG, verdicts) if verdict] == []
    assert os.listdir(tmp_path) == []


def test_nothing_is_evaluated():
    files = ("rewards.py", "plumbing/answers.py", "plumbing/grader.py", "plumbing/undone.py")
    source = "".join((ROOT / file).read_text() for file in files)
    for name in ("eval(", "exec(", "sympify(", "parse_expr(", "pickle.", "shell=True", "os.system"):
        assert name not in source
    # math-verify's own extractor for plain text ends in parse_expr; the workers must not use it.
    assert grader.outcome_of("7", "(1+2*3)") == "right" and "ExprExtractionConfig" not in source


def test_batch_budget(stats):
    answers = [f"({10**9 + i})!" for i in range(40)]
    assert answers_equal("x+1", "1+x")  # starts the workers
    start = time.monotonic()
    assert not any(grade([r"\sqrt{2}"] * 40, answers, budget=1.0))
    assert time.monotonic() - start < 40  # a busy machine gets three budgets, and new workers
    seen = stats()
    assert seen["over_budget"] > 0 and seen["over_budget"] + seen["timeouts"] == 40
    assert grade(["x+1"], ["1+x"]) == [True]  # what was cut off does not answer the next request


def test_slow_answers_wait_for_quick_ones(stats, monkeypatch):
    """Time runs out after the first round, on machines of any speed."""
    real = grader.Pool.round

    def hurried(self, pairs, cpu_seconds, stop, known):
        first = cpu_seconds == grader.FIRST_LOOK
        return real(self, pairs, cpu_seconds, stop if first else 0.0, known)

    monkeypatch.setattr(grader.Pool, "round", hurried)
    hostile = [f"({10**9 + i})!" for i in range(6)]
    honest = [f"{i}+x" for i in range(30)]
    golds = [r"\sqrt{2}"] * 6 + [f"x+{i}" for i in range(30)]
    verdicts = grade(golds, hostile + honest, budget=120.0)
    assert verdicts == [False] * 6 + [True] * 30 and stats()["over_budget"] == 6


class _Silent(Exception):
    pass


def test_errors_inside_math_verify_are_counted(stats, monkeypatch):
    import math_verify

    def broken(*args, **kwargs):
        raise _Silent

    monkeypatch.setattr(math_verify, "verify", broken)
    assert grader.outcome_of("x", "y") == "error__Silent"
    grader.pool.stats["error__Silent"] += 2
    grader.pool.stats["error_RecursionError"] += 1
    assert stats()["errors"] == 3


# --------------------------------------------------------------------------------------------------
# Workers

def _processes():
    """(process id, group id) of all that run. State Z: it has ended and is not reaped yet."""
    command = ["ps", "-A", "-o", "pid=,pgid=,stat="]
    listing = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    rows = map(str.split, listing.stdout.splitlines())
    return [(int(pid), int(group)) for pid, group, state in rows if not state.startswith("Z")]


def soon(condition) -> bool:
    """Whether the condition comes true within half a minute."""
    stop = time.monotonic() + 30
    while not condition() and time.monotonic() < stop:
        time.sleep(0.05)
    return bool(condition())


def _group(worker):
    """Process ids of a worker's keeper and fork."""
    return [pid for pid, group in _processes() if group == worker.process.pid]


@pytest.mark.parametrize("victim", ["fork", "keeper", "both"])
def test_an_idle_worker_that_is_killed_is_replaced(victim, stats):
    assert answers_equal("x+1", "1+x")
    for worker in grader.pool.workers:
        keeper, fork = sorted(_group(worker), key=lambda pid: pid != worker.process.pid)
        killed = {"fork": [fork], "keeper": [keeper], "both": [keeper, fork]}[victim]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert soon(lambda: not {pid for pid, _ in _processes()} & set(killed))
    grader.pool.verdicts.clear()
    # New workers import math-verify within the budget, which takes long on a loaded machine.
    golds, answers = [f"x+{i}" for i in range(20)], [f"{i}+x" for i in range(20)]
    assert grade(golds, answers, budget=300) == [True] * 20


def test_a_worker_killed_at_work_costs_only_its_answer(stats):
    assert answers_equal("x+1", "1+x")  # starts the workers

    workers, jobs = len(grader.pool.workers), grader.pool.jobs

    def kill_busy_forks():
        soon(lambda: grader.pool.jobs >= jobs + workers)
        for worker in list(grader.pool.workers):
            for pid in _group(worker):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_busy_forks)
    killer.start()
    slow = [f"({10**9 + i})!" for i in range(workers)]
    verdicts = grade([r"\sqrt{2}"] * workers + ["x+1"], slow + ["x+2-1"], budget=300)
    killer.join()
    assert verdicts == [False] * workers + [True]
    assert stats()["worker_deaths"] >= 1
    assert answers_equal("x+2", "2+x") and len(grader.pool.workers) == workers


def _on_send(monkeypatch, act):
    """Calls act(worker, answer) when an answer is on its way to a worker."""
    real = grader.Worker.send

    def send(worker, request):
        act(worker, request[3])
        return real(worker, request)

    monkeypatch.setattr(grader.Worker, "send", send)


def _kill(worker):
    os.killpg(worker.process.pid, signal.SIGKILL)


def test_an_answer_whose_workers_are_killed_is_tried_again(stats, monkeypatch):
    met = Counter()

    def kill_twice(worker, answer):
        met[answer] += 1
        if met[answer] <= 2:
            _kill(worker)

    _on_send(monkeypatch, kill_twice)
    assert grade(["x+3", "x+4"], ["3+x", "x+5"]) == [True, False]
    assert set(met.values()) == {3} and stats()["worker_deaths"] == 4


def test_an_answer_that_kills_each_worker_is_wrong_and_costs_no_other_one(stats, monkeypatch):
    _on_send(monkeypatch, lambda worker, answer: answer == "3+x" and _kill(worker))
    golds, answers = [f"x+{i}" for i in range(20)], [f"{i}+x" for i in range(20)]
    assert grade(golds, answers) == [i != 3 for i in range(20)]
    assert stats()["worker_deaths"] == 3


class DyingWorker:
    """Starts, takes an answer and dies."""

    ready = True
    deadline = float("inf")

    def __init__(self):
        self.end, other = os.pipe()
        os.close(other)

    def fileno(self):
        return self.end

    def send(self, request):
        return True

    def receive(self):
        return None

    def close(self):
        os.close(self.end)

    def await_ready(self):
        pass

    def stop(self, patience):
        pass


def test_workers_that_die_whatever_they_do_end_the_grading_with_an_error(stats, monkeypatch):
    grader.pool.drop(*grader.pool.workers)
    monkeypatch.setattr(grader, "Worker", DyingWorker)
    with pytest.raises(RuntimeError, match="failed: 20 of 20 answers lost 3 workers each"):
        grade([f"x+{i}" for i in range(20)], [f"{i}+x" for i in range(20)])
    grader.pool.drop(*grader.pool.workers)
    monkeypatch.undo()
    assert grade(["x+3"], ["3+x"]) == [True]  # nothing is remembered of it


def test_workers_that_are_killed_all_the_time_make_no_right_answer_wrong(stats):
    assert answers_equal("x+1", "1+x")
    done = threading.Event()

    def kill_all():
        while not done.wait(0.02):
            for worker in list(grader.pool.workers):
                if worker.ready:  # to be killed three times while it starts is another error
                    with contextlib.suppress(ProcessLookupError):
                        _kill(worker)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        golds, answers = [f"x+{i}" for i in range(20)], [f"{i}+x" for i in range(20)]
        assert grade(golds, answers, budget=2.0) == [True] * 20
    except RuntimeError as error:
        assert re.search("grading failed|could not start", str(error))
    finally:
        done.set()
        killer.join()


def test_answers_that_a_busy_machine_does_not_reach_are_tried_again(stats, monkeypatch):
    """A stopped worker is as good as one that gets no time."""
    stopped = set()

    def stop_once(worker, answer):
        if answer not in stopped:
            os.killpg(worker.process.pid, signal.SIGSTOP)
            stopped.add(answer)

    _on_send(monkeypatch, stop_once)
    assert grade(["x+3"], ["3+x"], budget=1.0) == [True]
    assert stats()["over_budget"] == 0
    _on_send(monkeypatch, lambda worker, answer: os.killpg(worker.process.pid, signal.SIGSTOP))
    with pytest.raises(RuntimeError, match="1 of 1 answers were not reached in 3 times 1 s; free"):
        grade(["x+4"], ["4+x"], budget=1.0)


def test_grading_from_many_threads():
    results = [None] * 6

    def work(k):
        numbers = range(k, k + 10)
        results[k] = grade([f"x+{i}" for i in numbers], [f"{i + i % 2}+x" for i in numbers])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[i % 2 == 0 for i in range(k, k + 10)] for k in range(6)]


ONE_WORKER = {**os.environ, "LOCAL_WORLD_SIZE": str(os.cpu_count())}  # torchrun: one rank per core


def _script(body, **env):
    """Runs a plain script, without main guard, that can import plumbing."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(body)
    return _python("-c", code, env={**ONE_WORKER, **env})


def _python(*args, env=ONE_WORKER):
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def _left_behind(pids):
    """Whether a worker of these is still there after half a minute."""
    return not soon(lambda: not {group for _, group in _processes()} & set(map(int, pids)))


def test_works_with_stdin_closed_and_signals_blocked_and_leaves_no_process():
    run = _script("""
        import os, signal
        os.close(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])  # the workers' deadline
        from plumbing import answers, grader
        verdicts = answers.grade(["x+1", "x+1", "x-1"], ["1+x", "x", "9^{9^{9^{9}}}+x"])
        assert verdicts == [True, False, False]
        assert answers.grader_stats()["timeouts"] == 1
        assert "torch" not in sys.modules
        print(*(worker.process.pid for worker in grader.pool.workers))
    """)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() and not _left_behind(run.stdout.split())


def test_workers_end_with_a_caller_that_is_killed_while_they_are_busy():
    run = _script("""
        import os, signal, threading
        from plumbing import answers, grader
        answers.answers_equal("x+1", "1+x")
        print(*(worker.process.pid for worker in grader.pool.workers), flush=True)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        answers.grade([r"\\sqrt{2}"] * 50, [f"({10**9 + i})!" for i in range(50)])
    """)
    assert run.returncode == -signal.SIGKILL
    pids = run.stdout.split()
    assert pids and not _left_behind(pids)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_after_fork_and_spawn(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import multiprocessing
        from plumbing import answers, grader

        def work(queue):
            verdicts = answers.grade(["x+1", "x+1"], ["1+x", "x"])
            queue.put((verdicts, [worker.process.pid for worker in grader.pool.workers]))

        if __name__ == "__main__":
            assert answers.answers_equal("x+1", "1+x")
            context = multiprocessing.get_context({method!r})
            queue = context.Queue()
            process = context.Process(target=work, args=(queue,))
            with grader.pool.lock:  # as another thread may hold it
                process.start()
            verdicts, pids = queue.get(timeout=40)
            process.join(20)
            own = [worker.process.pid for worker in grader.pool.workers]
            assert verdicts == [True, False] and process.exitcode == 0 and not set(own) & set(pids)
            assert answers.grade(["x+2", "x+2"], ["2+x", "x"]) == [True, False]
            print(*own, *pids)
    """))
    run = _python(script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() and not _left_behind(run.stdout.split())


def test_a_judge_that_cannot_start_says_so(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not the real one')")
    body = """
        from plumbing import answers, grader
        grader.pool.start()  # says nothing
        for judge in (lambda: answers.answers_equal("x+1", "1+x"), lambda: answers.check_gold("x")):
            try:
                judge()
            except RuntimeError as error:
                print(error)
    """
    run = _script(body, PYTHONPATH=str(tmp_path))
    assert run.stdout.count("could not start (status 1)") == 2, run.stderr
    assert "math-verify" in run.stdout and "not the real one" in run.stderr


def test_workers_start_without_being_waited_for_and_end_with_a_process_that_never_grades(tmp_path):
    (tmp_path / "math_verify.py").write_text("import time; time.sleep(600)")
    body = """
        import atexit, os, time
        from plumbing import grader
        began = time.monotonic()
        grader.CPU_SECONDS = 100.0  # a ready worker gets twice that to end by itself
        grader.pool.start()
        grader.pool.start()  # starts no second one
        print(*(worker.process.pid for worker in grader.pool.workers), flush=True)
        if os.fork() == 0:
            assert not grader.pool.workers
            sys.exit(0)  # the child's exit handlers leave the parent's workers alone
        assert os.wait()[1] == 0
        assert all(worker.process.poll() is None for worker in grader.pool.workers)
        atexit._run_exitfuncs()
        assert time.monotonic() - began < 30 and not grader.pool.workers
    """
    run = _script(body, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert len(run.stdout.split()) == 1 and not _left_behind(run.stdout.split())


def test_workers_that_start_end_quietly_with_a_caller_that_is_killed():
    run = _script("""
        import os, signal
        from plumbing import grader
        grader.pool.start()
        print(*(worker.process.pid for worker in grader.pool.workers), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert run.returncode == -signal.SIGKILL and not run.stderr
    assert run.stdout.split() and not _left_behind(run.stdout.split())


@pytest.mark.parametrize("victim", ["fork", "keeper"])
def test_a_worker_that_is_killed_before_the_first_answer_is_replaced(victim, stats):
    grader.pool.drop(*grader.pool.workers)
    grader.pool.start()
    workers = list(grader.pool.workers)
    assert workers and not any(worker.ready for worker in workers)
    for worker in workers:
        assert grader.wait([worker], grader.START_SECONDS)  # it has imported math-verify
        assert soon(lambda: len(_group(worker)) == 2)
        keeper, fork = sorted(_group(worker), key=lambda pid: pid != worker.process.pid)
        killed = fork if victim == "fork" else keeper
        os.kill(killed, signal.SIGKILL)
        assert soon(lambda: killed not in dict(_processes()))
    golds, answers = [f"x+{i}" for i in range(9)], [f"{i}+x" for i in range(9)]
    assert grade(golds, answers, budget=300) == [True] * 9
    assert (grader.pool.workers == workers) == (victim == "fork")


def test_a_worker_that_is_killed_while_it_starts_is_started_again(stats):
    grader.pool.drop(*grader.pool.workers)
    grader.pool.start()
    for worker in grader.pool.workers:
        _kill(worker)
    assert grade(["x+3"], ["3+x"]) == [True] and stats()["worker_deaths"] == 0


# --------------------------------------------------------------------------------------------------
# Fuzzing

PIECES = [
    *TEMPLATE, "<PLAN>", r"\boxed{", r"\fbox{", r"\frac{", r"\sqrt", r"\pi", r"\text{", r"\infty",
    *r"^_{}()[]$\&=<,%./7x é１", "12", "\n", "\x00", "\u202e", "\ud800",
]


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map("".join)))
@settings(max_examples=1000, deadline=None)
def test_fuzzed_text_raises_nothing(text):
    completion = parse_completion(text)
    assert completion is None or parse_completion(text.strip()) == completion
    answer = extract_answer(text)
    assert answer is None or answer.strip() == answer != ""
    assert plan_leaks(text, answer) in (True, False) and plan_leaks(text, text) in (True, False)
    if refusal(text) is None:
        assert quick_verdict(clean(text), clean(text)) is True


def test_mutated_completions_raise_nothing_and_stay_bounded(stats):
    rng = random.Random(1)
    start = build_completion("split, then add", "2 + 5 = 7", r"\frac{7}{2} + x")
    texts = []
    for _ in range(1000):
        at, cut = rng.randrange(len(start)), rng.choice([0, 0, 1, 4])
        texts.append(start[:at] + rng.choice([*PIECES, ""]) + start[at + cut:])
    well_formed = sum(parse_completion(text) is not None for text in texts)
    assert 100 < well_formed < 1000
    answers = [extract_answer(text) for text in texts]
    verdicts = grade([r"\frac{7}{2} + x"] * 1000, answers, budget=20.0)
    assert 300 < sum(verdicts) < 1000
    assert stats()["over_budget"] == 0 and stats()["graded"] == 1000
