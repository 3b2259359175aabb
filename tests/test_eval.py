"""pass@k and HSIC against brute force and closed forms, intervals against known cases, main."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import eval as evaluation
import sft
from conftest import ROOT
from data.toy import make_model, make_problems, make_tokenizer
from eval import compare, load_plans, pass_at_k, summarise
from plumbing import votes as voting
from plumbing.answers import grader_stats
from plumbing.flags import parse_config
from plumbing.folder import LOCK, check_run, open_run
from plumbing.intervals import (
    accuracy_interval,
    difference_interval,
    paired_difference,
    permutation_p,
)
from plumbing.plans import analyse
from plumbing.votes import label_votes, maj_at_n
from recipes import fig3_hsic
from recipes.fig3_hsic import hsic, hsic_by_plan_reward, same


def test_pass_at_k_equals_brute_force():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k wants"):
        pass_at_k(n, c, k)


def votes(*answers):
    return [{"answer": answer, "correct": answer in ("7", "7.0")} for answer in answers]


VOTES = [
    (votes("7", "3", "7"), 1.0),
    (votes("3", "3", "7"), 0.0),
    (votes("7", "7.0", "3", "3", "7"), 1.0),  # spellings of the right answer vote together
    (votes("7", "3"), 0.5),
    (votes("7", "3", "4"), 1 / 3),
    (votes(r"\dfrac{1}{2}", r"\frac{1}{2}", "$ \\frac12 $", "7"), 0.0),
    (votes(None, None, "7"), 1.0),  # no answer is no vote
    (votes(None, None), 0.0),
]


@pytest.mark.parametrize("samples, value", VOTES)
def test_maj_at_n(samples, value):
    assert maj_at_n(samples) == pytest.approx(value)
    label_votes([samples])
    assert maj_at_n(samples) == pytest.approx(value)  # none of them needs the grader


HALF, LONG = (r"\frac{1}{2}", "0.5", "1/2"), ("1" * 300, "1" * 301)  # LONG: refused unread
EQUAL_VOTES = [
    (votes("7", "7", *HALF), 0.0),  # two for 7, three for a half
    (votes("7", "7", *HALF[:2]), 0.5),
    (votes("7", "7", *HALF[:2], "3", None), 0.5),
    (votes("7", *HALF, r"2\sqrt{2}", r"\sqrt{8}", "7"), 0.0),
    (votes("7", "7", r"2\sqrt{2}", "3", r"\sqrt{8}"), 0.5),
    (votes("7", *LONG), 1 / 3),  # what the grader cannot read equals its own spelling only
    (votes("7", LONG[0], LONG[1], LONG[0]), 0.0),
    # The more frequent form decides: a set takes a list in any order, a list has an order.
    (votes("7", "7", "2,1", r"\{1,2\}", r"\{1,2\}"), 0.0),
    (votes("7", "7", "2,1", "2,1", r"\{1,2\}"), 0.5),
]


@pytest.mark.parametrize("samples, value", EQUAL_VOTES)
def test_equal_wrong_answers_vote_together(samples, value):
    before = grader_stats()
    others = votes("3", "0.5", None)
    label_votes([others, samples])
    assert maj_at_n(samples) == pytest.approx(value)
    assert [s["vote"] is None for s in samples] == [s["answer"] is None for s in samples]
    assert [s["vote"] == "right" for s in samples] == [s["correct"] for s in samples]
    assert len({s["vote"] for s in others}) == 3  # another problem's answers are not compared
    assert grader_stats() == before  # which counts what was graded against golds


def test_the_cost_of_votes_is_bounded(monkeypatch):
    batches = []

    def unequal(golds, answers):
        batches.append(len(golds))
        return [False] * len(golds)

    monkeypatch.setattr(voting, "grade", unequal)
    label_votes([votes(*map(str, range(100, 140)), "105"), votes("3", "4", "5", "7", None)])
    # 40 and 3 spellings of wrong answers: one batch per round, over both problems.
    assert batches[:3] == [39 + 2, 38 + 1, 37] and len(batches) == voting.VOTE_ROUNDS


# --------------------------------------------------------------------------------------------------
# Intervals and tests

def test_interval_of_many_problems_is_the_normal_one():
    rng = np.random.default_rng(1)
    right = rng.binomial(8, rng.beta(2, 3, 2000)) / 8
    low, high = accuracy_interval([right], 8)
    # The observed shares hold the sampling noise, so it counts once.
    half = 1.96 * right.std() / np.sqrt(2000)
    assert low == pytest.approx(right.mean() - half, abs=0.001)
    assert high == pytest.approx(right.mean() + half, abs=0.001)
    # Resampling both levels and taking percentiles would be wider by a third here.
    noise = (right * (1 - right) / 8).mean() / 2000
    assert np.sqrt(1 + noise / (half / 1.96) ** 2) > 1.1


def test_one_sample_per_problem_is_wilsons_interval():
    # 13 right of 20: Wilson's score interval without continuity correction is 0.433 to 0.819.
    low, high = accuracy_interval([np.array([1] * 13 + [0] * 7)], 1)
    assert (low, high) == (pytest.approx(0.4329, abs=5e-4), pytest.approx(0.8188, abs=5e-4))


def test_unanimous_runs_still_have_an_interval():
    for share, n in ((1.0, 4), (0.0, 4), (1.0, 1), (0.0, 64)):
        low, high = accuracy_interval([np.full(20, share)], n)
        assert high - low == pytest.approx(3.84 / 23.84, abs=1e-3)  # Wilson: z^2 / (N + z^2)
        assert 0 <= low <= share <= high <= 1 and share in (low, high)
    low, high = difference_interval([np.zeros(20)], 4)
    assert high == -low and 0.1 < high < 0.25  # one gain and no loss, or the reverse, is possible


def test_the_effective_size_by_hand():
    shares = np.array([0.5] * 5 + [0.0] * 5)
    # Variance of an answer: 1/4 x 3/4. Of the mean: (10 / 16) / 9 / 10 = 1/144. So 27 answers would
    # do, two right ones of them are 8. Wilson's bounds p solve (p - 1/4)^2 = z^2 p (1 - p) / 19.
    for p in accuracy_interval([shares], 64):
        assert (p - 0.25) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 19, rel=1e-4)
    for values, size in ((np.full(10, 0.25), 40 - 8), (np.eye(10)[0], 10)):  # between N and N n
        for p in accuracy_interval([values], 4):
            error = (p - values.mean()) ** 2
            assert error == pytest.approx(1.96**2 * p * (1 - p) / size, rel=1e-4)


def test_squared_distances_add_up_over_benchmarks():
    first, second = np.array([1.0] * 13 + [0.0] * 7), np.array([1.0] * 5 + [0.0] * 5)
    (a, b), (c, d) = (accuracy_interval([part], 1) for part in (first, second))
    below, above = np.hypot(0.65 - a, 0.5 - c) / 2, np.hypot(b - 0.65, d - 0.5) / 2
    bounds = accuracy_interval([first, second], 1)
    assert bounds == pytest.approx((0.575 - below, 0.575 + above))


COVERED = [(30, 64, 0.4, 0.75), (60, 4, 2, 2)]
COVERED += [(30, 64, 0.1, 9.9), (30, 64, 0.2, 4.8), (30, 64, 9.8, 0.2)]  # 1 %, 4 %, 98 %


@pytest.mark.parametrize("problems, n, a, b", COVERED)
def test_intervals_cover(problems, n, a, b):
    rng = np.random.default_rng(3)
    shares = rng.binomial(n, rng.beta(a, b, (1500, problems))) / n
    bounds = np.array([accuracy_interval([part], n) for part in shares])
    covered = ((bounds[:, 0] <= a / (a + b)) & (a / (a + b) <= bounds[:, 1])).mean()
    # Three standard errors of 0.6 points; bench/stats.py has the exact figures.
    assert 0.93 - 0.018 <= covered <= 0.97 + 0.018


def test_intervals_of_differences_cover_at_a_few_percent():
    rng = np.random.default_rng(6)
    chances = rng.beta(0.2, 4.8, (1500, 30))  # of the first run; the second gets two tries
    second = rng.binomial(64, 1 - (1 - chances) ** 2)
    differences = (second - rng.binomial(64, chances)) / 64
    low, high = np.array([difference_interval([part], 64) for part in differences]).T
    truth = 0.04 - 0.2 * 1.2 / (5 * 6)  # E p - E p^2 of a beta distribution
    assert 0.93 - 0.018 <= ((low <= truth) & (truth <= high)).mean() <= 0.97 + 0.018


def test_a_difference_is_paired_and_its_sign_is_second_minus_first():
    rng = np.random.default_rng(4)
    base = rng.beta(0.5, 0.5, 300)
    counts = rng.binomial(16, np.stack([base * 0.8, base * 0.8 + 0.1], 1))
    row = paired_difference([counts], [16, 16])
    low, high = row["ci_low"], row["ci_high"]
    assert low < 0.1 < high and high - low < 0.05
    apart = [accuracy_interval([counts[:, run] / 16], 16) for run in (0, 1)]
    assert apart[0][1] - apart[0][0] > 1.7 * (high - low)  # unpaired intervals are far wider
    swapped = paired_difference([counts[:, ::-1]], [16, 16])
    assert (swapped["ci_low"], swapped["ci_high"]) == pytest.approx((-high, -low))


def test_the_interval_of_a_difference_by_hand():
    # Of 50 problems with one sample each, the second run gained 10 and lost 5. Wilson's intervals
    # of 10/50 and 5/50 are 0.1124 to 0.3304 and 0.0435 to 0.2136; the correlation is -1/6.
    below = np.sqrt(0.0876**2 + 0.1136**2 + 0.0876 * 0.1136 / 3)
    above = np.sqrt(0.1304**2 + 0.0565**2 + 0.1304 * 0.0565 / 3)
    bounds = difference_interval([np.array([1] * 10 + [-1] * 5 + [0] * 35)], 1)
    assert bounds == pytest.approx((0.1 - below, 0.1 + above), abs=5e-4)
    assert difference_interval([np.full(5, -1.0)], 1)[0] == -1.0
    # Gains and losses of equal size, 0.15 each on average. An answer's variance is 0.3, the mean's
    # (6 / 4) / 9 / 10 = 1/60: 18 answers, of which none is taken off. Wilson: 0.0496 to 0.3735.
    half = np.sqrt(0.1004**2 + 0.2235**2 + 2 * 0.15 / 0.85 * 0.1004 * 0.2235)
    bounds = difference_interval([np.array([0.5] * 3 + [-0.5] * 3 + [0.0] * 4)], 4)
    assert bounds == pytest.approx((-half, half), abs=5e-4)


def test_permutation_p_equals_full_enumeration():
    difference = np.array([0.5, 0.25, -0.25, 0.75, 0.5, 0.0, 1.0, -0.25, 0.5])

    def mid_p(weights):
        flips = np.array(list(itertools.product((-1, 1), repeat=len(weights))))
        excess = abs(flips @ weights) - abs(weights.sum())
        return (excess > 1e-9).mean() + (abs(excess) <= 1e-9).mean() / 2

    p = permutation_p([difference], flips=40_000)
    assert p == pytest.approx(mid_p(difference), abs=0.005)
    assert permutation_p([np.zeros(5)]) == 1.0
    # Two benchmarks count equally, whatever their sizes: the statistic is the mean of the means.
    parts = [np.array([1.0, 1.0]), np.array([-0.5, 0.5, 0.0, 0.25])]
    exact = mid_p(np.concatenate([part / len(part) for part in parts]))
    assert permutation_p(parts, flips=40_000) == pytest.approx(exact, abs=0.005)


def test_false_positive_rate():
    rng = np.random.default_rng(5)
    rates = rng.beta(0.5, 0.5, (500, 40))
    right = rng.binomial(16, rates[..., None], (500, 40, 2)) / 16
    differences = right[..., 1] - right[..., 0]
    p = np.array([permutation_p([d], seed=i, flips=400) for i, d in enumerate(differences)])
    assert 0.02 <= (p < 0.05).mean() <= 0.08 and 0.4 <= (p < 0.5).mean() <= 0.6


# --------------------------------------------------------------------------------------------------
# Summaries and comparisons by hand

def sample(correct, tokens=10, well_formed=True, truncated=False):
    form = {"tokens": tokens, "well_formed": well_formed, "truncated": truncated}
    return {"correct": correct, **form, "answer": "1" if correct else "2", "completion": ""}


def record(id, *correct, benchmark="a"):
    problem = {"benchmark": benchmark, "id": id, "problem": f"problem {id}", "answer": "1"}
    return {**problem, "samples": [sample(c) for c in correct]}


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_summary_by_hand():
    records = [
        {"samples": [sample(True, 10), sample(False, 20)]},
        {"samples": [sample(True, 30), sample(True, 40, well_formed=False)]},
        {"samples": [sample(False, 50, truncated=True), sample(False, 60)]},
    ]
    summary = summarise(records)
    assert summary["accuracy"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert summary["ci_low"] < 0.15 and summary["ci_high"] > 0.85  # three problems say little
    assert summary["mean_length"] == 35 and summary["format_rate"] == pytest.approx(5 / 6)
    assert summary["truncation_rate"] == pytest.approx(1 / 6) and summary["n_problems"] == 3
    assert summary["pass_at_k"] == {1: pytest.approx(0.5), 2: pytest.approx(2 / 3)}
    assert summary["maj_at_n"] == pytest.approx((0.5 + 1 + 0) / 3)
    with pytest.raises(ValueError, match="same number of samples"):
        summarise(records + [{"samples": [sample(True)]}])


def test_several_benchmarks_are_averaged_as_benchmarks():
    others = [record(str(i), False, False, benchmark="b") for i in range(3)]
    summary = summarise([record("1", True, True), *others])
    assert summary["accuracy"] == 0.5 and summary["n_problems"] == 4  # not 1/4
    assert summary["benchmarks"]["a"]["accuracy"] == 1
    assert summary["benchmarks"]["b"]["accuracy"] == 0


def test_a_bound_just_below_zero_is_printed_as_zero(capsys):
    summary = summarise([record(str(i), False, False) for i in range(7)])
    evaluation.print_summary(evaluation.Config(n=2, data=("a",)), summary)
    out = capsys.readouterr().out
    assert "95 % interval 0.000 to 0.354" in out and "-0.000" not in out


def test_compare_by_hand():
    three = [record("1", True, False), record("2", False, False), record("3", True, True)]
    first = [*three, record("only", True, True)]
    second = [record("1", True, True), record("2", True, False), record("3", True, True)]
    second[2]["answer"] = "5"
    result = compare(first, second)
    row = result["rows"][0]
    assert len(result["rows"]) == 1 and row["benchmark"] == "a" and row["n_problems"] == 3
    assert row["first"] == pytest.approx(0.5) and row["second"] == pytest.approx(5 / 6)
    assert row["delta"] == pytest.approx(1 / 3) and row["ci_low"] < 1 / 3 < row["ci_high"]
    # Two differences point the same way, as in 2 of 4 sign patterns; ties count half.
    assert row["p"] == pytest.approx(0.25, abs=0.02)
    assert any("1 problems are in the first run only" in w for w in result["warnings"])
    assert any("problem 3 has another text or gold" in w for w in result["warnings"])
    first += [record("1", False, False, benchmark="b")]
    second += [record("1", True, True, benchmark="b")]
    rows = compare(first, second)["rows"]
    assert rows[-1]["benchmark"] == "overall"
    assert rows[-1]["delta"] == pytest.approx((1 / 3 + 1) / 2)
    with pytest.raises(SystemExit, match="no problem in common"):
        compare(first, [record("9", True)])
    with pytest.raises(SystemExit, match="unequal numbers of samples"):
        compare(first, [*second, record("only", True)])


def test_compare_command_line_warns_of_other_settings(tmp_path, monkeypatch, capsys):
    for name, temperature in (("a", 0.6), ("b", 1.0)):
        records = [record(str(i), i > 3, name == "b") for i in range(9)]
        write(tmp_path / name / "records.jsonl", records)
        write(tmp_path / name / "run.json", [{"temperature": temperature, "n": 2, "out": name}])
    files = [str(tmp_path / name / "records.jsonl") for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", *files])
    evaluation.main()
    out = capsys.readouterr().out
    assert "--temperature is 0.6 in the first run and 1.0 in the second" in out
    assert "+0.500" in out and "--out" not in out
    for wrong in ([files[0]], [files[0], str(tmp_path / "a/run.json")]):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", *wrong])
        with pytest.raises(SystemExit, match="two records.jsonl"):
            evaluation.main()


# --------------------------------------------------------------------------------------------------
# HSIC

def test_hsic_by_hand():
    # K = L = [[1, 0], [0, 1]]: H K H = [[.5, -.5], [-.5, .5]], tr(HKH L) = 1, over (N - 1)^2 = 1.
    assert hsic(np.eye(2), np.eye(2)) == pytest.approx(1.0)
    random = np.random.default_rng(0).random((4, 4))
    assert hsic(np.ones((4, 4)), random) == pytest.approx(0)
    # With linear kernels, HSIC is the squared covariance (Gretton et al. 2005). Here it is 3.5.
    x, y = np.array([1.0, 2, 4]), np.array([2.0, 1, 6])
    assert hsic(np.outer(x, x), np.outer(y, y)) == pytest.approx(3.5**2)


def test_hsic_of_labels_equals_the_closed_form():
    # With the kernel "equal or not", tr(KHLH) / N^2 is the squared distance of the joint table from
    # the product of its margins.
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    b[:20] = a[:20]
    joint = np.array([[((a == i) & (b == j)).mean() for j in range(4)] for i in range(3)])
    closed = ((joint - np.outer(joint.sum(1), joint.sum(0))) ** 2).sum()
    assert hsic(same(list(a)), same(list(b))) == pytest.approx(closed * 50**2 / 49**2)


def logged_rollouts():
    """150 questions with a plan of each quality, whose answers are right that often."""
    rng = np.random.default_rng(3)
    rollouts = []
    for _ in range(150):
        gold, plans = str(rng.integers(10)), []
        for quality in (0.0, 0.5, 1.0):
            reward, completions = {"plan": 0.2 + quality / 4}, []
            for _ in range(3):
                answer = gold if rng.random() < quality else str(rng.integers(10))
                text = f"<answer>\\boxed{{{answer}}}</answer>"
                completions.append({"text": text, "correct": answer == gold, "reward": reward})
            plans.append({"completions": completions})
        rollouts.append({"answer": gold, "plans": plans})
    return rollouts


def test_hsic_rises_with_plan_reward_when_better_plans_predict_better():
    rows = hsic_by_plan_reward(logged_rollouts(), bins=3)
    assert [row["n"] for row in rows] == [450, 450, 450]
    assert rows[0]["nhsic"] < 0.05 < 0.15 < rows[1]["nhsic"] < 0.6
    assert rows[2]["nhsic"] == pytest.approx(1)
    assert [row["plan_reward"] for row in rows] == pytest.approx([0.2, 0.325, 0.45])


def plan_trees(chances, questions=1500, plans=4, cots=3):
    """Rollouts of questions whose plans' CoTs are right with these chances: chances(rng, plans)."""
    rng, rollouts = np.random.default_rng(0), []
    for _ in range(questions):
        right = rng.random((plans, cots)) < np.reshape(chances(rng, plans), (-1, 1))
        reward = np.exp(right.mean(1)) / np.exp(right.mean(1)).sum()  # Eq. 2 with tau 1
        texts = {True: r"\boxed{1}", False: r"\boxed{2}"}
        trees = [
            [{"text": texts[r], "correct": r, "reward": {"plan": float(reward[i])}} for r in row]
            for i, row in enumerate(right.tolist())
        ]
        rollouts.append({"answer": "1", "plans": [{"completions": tree} for tree in trees]})
    return rollouts


def accuracies(rollouts, by):
    return [row["accuracy"] for row in hsic_by_plan_reward(rollouts, most=50, by=by)]


def test_the_papers_form_rises_with_worthless_plans_and_leaving_one_out_does_not():
    worthless = plan_trees(lambda rng, m: [0.5] * m)
    rises, flat = (accuracies(worthless, by) for by in ("plan_reward", "left_out"))
    assert rises == sorted(rises) and rises[0] < 0.2 and rises[-1] > 0.8
    assert len(flat) == 5 and 0.46 < min(flat) and max(flat) < 0.54
    matter = accuracies(plan_trees(lambda rng, m: rng.choice([0.3, 0.7], m)), "left_out")
    assert matter[0] < 0.42 and matter[-1] > 0.58


def test_left_out_scores_by_hand():
    # Plan 1: right, right, wrong; plan 2: right, wrong, wrong.
    completion = {"text": r"\boxed{2}", "reward": {"plan": 0.5}}
    right = [[True, True, False], [True, False, False]]
    plans = [{"completions": [{**completion, "correct": r} for r in row]} for row in right]
    points = fig3_hsic.completion_points([{"answer": "1", "plans": plans}])
    scores = [1 / 2 - 1 / 3, 1 / 2 - 1 / 3, 1 - 1 / 3, 0 - 2 / 3, 1 / 2 - 2 / 3, 1 / 2 - 2 / 3]
    assert [p["left_out"] for p in points] == pytest.approx(scores)
    assert [p["predicted"] for p in points] == ["1", "1", "2", "1", "2", "2"]
    # Slope: of 1/6, 1/6, 4/6, -4/6, -1/6, -1/6 the right ones add up to -2/6; squares to 36/36.
    assert fig3_hsic.slope_within_questions(points) == pytest.approx(-1 / 3)


def test_the_slope_is_free_of_how_hard_questions_are():
    hard_or_easy = plan_trees(lambda rng, m: [rng.beta(1, 1)] * m)
    flat, slope = accuracies(hard_or_easy, "left_out"), fig3_hsic.slope_within_questions
    assert max(flat) - min(flat) > 0.2  # as easy questions gather in one bin
    points = fig3_hsic.completion_points(hard_or_easy)
    assert abs(slope(points)) < 0.03  # three standard errors
    matter = plan_trees(lambda rng, m: rng.choice([0.35, 0.65], m))
    assert slope(fig3_hsic.completion_points(matter)) > 0.06


def test_fig3_command_line(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "rollouts.jsonl", logged_rollouts())
    monkeypatch.setattr(sys, "argv", ["fig3_hsic", str(path)])
    fig3_hsic.main()
    paper, left_out = capsys.readouterr().out.split("\n\n")
    assert "rises by construction" in paper and "Slope of correctness" in left_out
    rows = [line.split() for line in paper.splitlines()[2:]]
    # Three rewards make two of the five bins: plans that are never right, and the others.
    assert [row[:2] for row in rows] == [["plan", "reward"], ["0.200", "450"], ["0.388", "900"]]
    counts = [line.split()[1] for line in left_out.splitlines()[3:-1]]
    assert sum(map(int, counts)) == 1350
    for plans, cots in ((1, 3), (3, 1)):
        write(path, plan_trees(lambda rng, m: [0.5] * m, 20, plans, cots))
        fig3_hsic.main()
        out = capsys.readouterr().out
        assert "needs rollouts with --cots >= 2 and --plans >= 2" in out and "Slope" not in out


def test_fig3_refuses_what_is_no_log_of_rollouts(tmp_path, monkeypatch):
    other = write(tmp_path / "records.jsonl", [record("1", True)])
    cases = {"no rollouts given": [], "no rollouts at 'nowhere'": ["nowhere"]}
    for message, paths in {**cases, "does not hold rollouts": [str(other)]}.items():
        monkeypatch.setattr(sys, "argv", ["fig3_hsic", *paths])
        with pytest.raises(SystemExit, match=f"{message}.*a run's rollouts.jsonl"):
            fig3_hsic.main()


# --------------------------------------------------------------------------------------------------
# Through the command line on a tiny random model

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=32, layers=1, heads=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, seed in (("one", 1), ("two", 2)):
        write(folder / f"{name}.jsonl", make_problems("test", 7, facts=(2, 3), seed=seed))
    return folder


def arguments(start, out, *flags):
    data = "--data", start / "one.jsonl", start / "two.jsonl"
    sizes = "--n", 3, "--max_completion_tokens", 24, "--rollout_rows", 3
    words = "eval.py", "--model", start / "model", *data, "--out", out, *sizes, *flags
    return [str(word) for word in words]


@pytest.fixture
def run(start, tmp_path, monkeypatch):
    def call(*flags, out=tmp_path / "e"):
        monkeypatch.setattr(sys, "argv", arguments(start, out, *flags))
        evaluation.main()
        return read(out / "records.jsonl")

    return call


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(records):
    return [(r["benchmark"], r["id"]) for r in records]


def test_two_benchmarks_in_one_call(run, start, tmp_path, capsys):
    records = run()
    assert len(set(keys(records))) == len(records) == 14
    assert all(len(r["samples"]) == 3 for r in records)
    for s in (s for r in records for s in r["samples"]):
        assert (s["vote"] is None) == (s["answer"] is None)
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    parts = summary["benchmarks"]
    assert list(parts) == [str(start / "one.jsonl"), str(start / "two.jsonl")]
    assert summary["accuracy"] == pytest.approx(np.mean([p["accuracy"] for p in parts.values()]))
    assert "maj@3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already holds results: .* pass --resume or --overwrite"):
        run()
    with pytest.raises(SystemExit, match="belongs to another configuration: --n was 3, not 4;"):
        run("--resume", "--n", 4)


def test_a_stopped_evaluation_repeats_and_loses_nothing(run, tmp_path, monkeypatch):
    whole = run(out=tmp_path / "whole")
    original, calls = evaluation.evaluate, []

    def interrupted(*args, **options):
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    path = tmp_path / "e/records.jsonl"
    kept = path.read_text()
    path.write_text(kept + '{"benchmark": "cut off in mid-w')
    records = run("--resume")
    assert keys(records) == keys(whole) and path.read_text().startswith(kept)
    done = len(kept.splitlines())
    assert 0 < done < 14 and sum(calls[2:]) == 14 - done
    assert (tmp_path / "e/summary.json").exists()


def test_a_finished_evaluation_is_resumed_without_its_model(run, tmp_path, monkeypatch):
    records = run()
    monkeypatch.setattr(evaluation, "load_model", None)
    (tmp_path / "e/summary.json").unlink()
    assert run("--resume") == records and (tmp_path / "e/summary.json").exists()


def test_results_of_other_weights_are_not_resumed(run, start, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(start / "model", model)
    run("--model", model, out=tmp_path / "old")
    run("--model", model)
    run("--model", model, "--resume")
    other = make_model(make_tokenizer(), seed=1, width=32, layers=1, heads=2)
    other.save_pretrained(model)
    with pytest.raises(SystemExit, match="holds results of other weights than .*/model has now"):
        run("--model", model, "--resume")
    (tmp_path / "e/run.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds results of other weights"):  # nobody knows of which
        run("--model", model, "--resume")
    run("--model", model, out=tmp_path / "new")
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="no usable weights"):
        run("--model", model, "--overwrite", out=tmp_path / "new")
    assert (tmp_path / "new/records.jsonl").exists() and (tmp_path / "new/summary.json").exists()
    files = [str(tmp_path / name / "records.jsonl") for name in ("old", "new")]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", *files])
    evaluation.main()
    assert "warning" not in capsys.readouterr().out  # models are what is compared


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
def test_files_that_no_evaluation_wrote_stay(run, tmp_path, flags):
    name = "summary.json" if flags == ("--overwrite",) else "run.json"
    theirs = write(tmp_path / "e" / name, [{"the user's": "own"}])
    before = theirs.read_text()
    with pytest.raises(SystemExit, match=f"holds {name} that no evaluation wrote: move it, or"):
        run(*flags)
    assert theirs.read_text() == before and list(theirs.parent.iterdir()) == [theirs]


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_training_and_an_evaluation_do_not_share_a_folder(run, tmp_path, flags):
    words = [f"--{name}" for name in flags]
    folder = tmp_path / "train"
    training = sft.Config(out=str(folder))
    open_run(check_run(training), training)
    for name in ("run.json", "metrics.jsonl", "records.jsonl"):
        (folder / name).touch()
        before = (folder / "run.json").read_text()
        refusal = "train is a training run's folder.* such as .*/train/eval"
        with pytest.raises(SystemExit, match=refusal):
            run(*words, out=folder)
        assert (folder / "run.json").read_text() == before
    run(out=folder / "eval")
    before = (folder / "eval/run.json").read_text()
    with pytest.raises(SystemExit, match="eval holds an evaluation.*; choose another --out"):
        check_run(sft.Config(out=str(folder / "eval"), **flags))
    assert (folder / "eval/run.json").read_text() == before


def test_an_evaluation_locks_its_folder(run, tmp_path):
    run()
    assert (tmp_path / "e" / LOCK).read_text().startswith(f"process {os.getpid()} ")


def test_two_ranks_answer_each_problem_once(start, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command = [sys.executable, *launch, *arguments(start, tmp_path / "e")]
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    records = read(tmp_path / "e/records.jsonl")
    problems = read(start / "one.jsonl") + read(start / "two.jsonl")
    assert [id for _, id in keys(records)] == [p["id"] for p in problems]
    assert list(Counter(name for name, _ in keys(records)).values()) == [7, 7]


def test_given_plans_open_the_completion(run, start, tmp_path):
    problems = read(start / "one.jsonl")
    plans = {p["id"]: f"{p['problem'][0]} needs nothing" for p in problems[:5]}
    given = write(tmp_path / "given.jsonl", [{"id": i, "plan": p} for i, p in plans.items()])
    one = ("--data", start / "one.jsonl")
    records = run(*one, "--plan", given)
    assert [r["id"] for r in records] == list(plans)  # problems without a plan are left out
    for r in records:
        opening = f"<plan> {plans[r['id']]} </plan> <think>"
        for s in r["samples"]:
            assert s["completion"].startswith(opening) and 5 < s["tokens"] <= 24

    none = run(*one, "--plan", "none", out=tmp_path / "none")
    texts = [s["completion"] for r in none for s in r["samples"]]
    assert len(none) == 7 and all(text.startswith("<think>") for text in texts)

    shuffled = run(*one, "--plan", "shuffled", "--plan_from", given, out=tmp_path / "shuffled")
    texts = [r["samples"][0]["completion"] for r in shuffled]
    used = [text.partition("</plan>")[0].removeprefix("<plan> ").strip() for text in texts]
    assert sorted(used) == sorted(plans.values())
    again = run(*one, "--plan", "shuffled", "--plan_from", given, out=tmp_path / "again")
    samples = [[r["samples"] for r in records] for records in (again, shuffled)]
    assert samples[0] == samples[1]  # the seed fixes plans and samples
    assert list(plans) == [r["id"] for r in shuffled]


def test_shuffled_plans_are_another_problems(run, start, tmp_path):
    problems = read(start / "one.jsonl")
    own = {p["id"]: word for p, word in zip(problems, ["A", "B", "C", "D", "E", "F", "+"])}
    given = write(tmp_path / "given.jsonl", [{"id": i, "plan": word} for i, word in own.items()])
    for r in run("--data", start / "one.jsonl", "--plan", "shuffled", "--plan_from", given):
        assert not r["samples"][0]["completion"].startswith(f"<plan> {own[r['id']]} </plan>")


def test_plans_come_from_eval_records_too(tmp_path):
    path = tmp_path / "records.jsonl"
    junk = {"completion": "junk"}
    good = {"completion": "<plan>first A</plan><think>t</think><answer>1</answer>"}
    write(path, [{"id": "x", "samples": [junk, good]}, {"id": "y", "samples": [junk]}])
    assert load_plans(str(path)) == {"x": "first A"}
    write(path, [{"id": "x", "plan": "a </plan> b"}])
    with pytest.raises(SystemExit, match="holds template tags"):
        load_plans(str(path))


def test_too_few_plans_are_refused(run, start, tmp_path):
    one = ("--data", start / "one.jsonl", "--plan", "shuffled", "--plan_from")
    own = read(start / "one.jsonl")[0]["id"]
    for id, message in (("other", "has the id of a problem"), (own, "needs plans of two problems")):
        given = write(tmp_path / "given.jsonl", [{"id": id, "plan": "A"}])
        with pytest.raises(SystemExit, match=message):
            run(*one, given)


@pytest.fixture
def marks(monkeypatch):
    """marks(opened, closed): what counts as an open and as a closed plan, for a random model."""
    call = lambda *both: monkeypatch.setattr(evaluation, "plan_marks", lambda tokenizer: both)
    call(lambda ids: True, lambda ids: len(ids) == 3)
    return call


def test_the_models_own_plans_are_cut_as_in_training(run, marks, tmp_path):
    """The default limit is half of the 24 tokens of a completion."""
    marks(lambda ids: True, lambda ids: False)
    samples = [s for r in run() for s in r["samples"]]
    lengths = {s["tokens"] for s in samples if s["truncated"]}
    assert lengths == {12} and max(s["tokens"] for s in samples) == 12
    assert "plan_tokens" not in samples[0]
    longer = run("--max_plan_tokens", 20, out=tmp_path / "longer")
    assert max(s["tokens"] for r in longer for s in r["samples"]) == 20
    marks(lambda ids: False, lambda ids: False)  # a completion without a plan has no plan limit
    free = run(out=tmp_path / "free")
    assert max(s["tokens"] for r in free for s in r["samples"]) == 24
    # The seed fixes the samples, with or without a plan phase, and whether plans close or not.
    marks(lambda ids: True, lambda ids: len(ids) == 3)
    assert run(out=tmp_path / "closed") == free
    assert run("--max_plan_tokens", 0, out=tmp_path / "without") == free


def test_analysis_of_plans(run, start, marks, tmp_path, capsys):
    flags = ("--analysis", "plans", "--n", 12, "--cots", 3)
    records = run(*flags)
    texts = []
    for r in records:
        heads = [s["completion"].split()[:3] for s in r["samples"]]
        closed = [s["plan_tokens"] == 3 for s in r["samples"]]
        for i in range(0, 12, 3):  # plan-major: three CoTs of each plan
            assert heads[i] == heads[i + 1] == heads[i + 2] and len(set(closed[i:i + 3])) == 1
            texts += [tuple(s["completion"] for s in r["samples"][i:i + 3])] * closed[i]
        assert all(s["plan_tokens"] in (0, 3) for s in r["samples"]) and len(heads) == 12
        assert any(head != heads[0] for head in heads)
    assert any(len(set(cots)) == 3 for cots in texts)
    settings = json.loads((tmp_path / "e/run.json").read_text())
    assert (settings["analysis"], settings["n"], settings["cots"]) == ("plans", 12, 3)
    # The analysis can be repeated from the records and the settings.
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    assert summary["plans"] == analyse(records, settings["cots"], settings["seed"])
    assert list(summary["plans"]) == [str(start / "one.jsonl"), str(start / "two.jsonl")]
    out = capsys.readouterr().out
    assert out.count("7 problems x 4 plans x 3 CoTs") == 2 and "accuracy" in out
    (tmp_path / "e/summary.json").unlink()
    run(*flags, "--resume")
    assert json.loads((tmp_path / "e/summary.json").read_text())["plans"] == summary["plans"]


def test_analysis_samples_four_cots_per_plan_by_default():
    config = parse_config(evaluation.Config, ["--analysis", "plans"])
    assert (config.n, config.cots, config.plans, config.max_plan_tokens) == (64, 4, 16, 512)


REFUSED = [
    (("--plan", "shuffled"), "needs --plan_from"),
    (("--plan", "nowhere.jsonl"), "no plans at 'nowhere.jsonl'"),
    (("--plan_from", "x"), "goes with --plan shuffled"),
    (("--n", 0), "--n must be >= 1, not 0"),
    (("--analysis", "hsic"), "--analysis: invalid choice: 'hsic'"),
    (("--analysis", "plans"), "--n must be 2 or more times 4, the CoTs per plan (--cots)"),
    (("--analysis", "plans", "--cots", 3), "--n must be 2 or more times 3"),
    (("--analysis", "plans", "--plan", "none"), "leave --plan out"),
    (("--analysis", "plans", "--temperature", 0), "wants --temperature"),
    (("--analysis", "plans", "--max_plan_tokens", 0), "--max_plan_tokens above 0"),
    (("--cots", 3), "--cots goes with --analysis plans"),
    (("--max_plan_tokens", 24), "--max_plan_tokens must be below --max_completion_tokens"),
    (("--data", "x", "x"), "names a benchmark twice"),
    (("--data", "x", "./x"), "names a benchmark twice"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_bad_settings_are_refused_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_sampling_settings_of_a_generation_config_are_ignored():
    from grpo import sample as draw
    from model_utils import find_stop_ids

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, width=32, layers=1, heads=2).eval()
    stop_ids = find_stop_ids(model, tokenizer)
    options = dict(n=4, max_new_tokens=12, temperature=1.0, stop_ids=stop_ids, seed=0)
    plain = draw(model, [[5, 6, 7]], **options)
    settings = model.generation_config
    settings.temperature, settings.top_k, settings.top_p = 0.1, 1, 0.1
    settings.repetition_penalty, settings.do_sample = 9.0, True
    assert draw(model, [[5, 6, 7]], **options) == plain
    settings.eos_token_id = [settings.eos_token_id or 2, 11]
    assert 11 in find_stop_ids(model, tokenizer)  # while every EOS id that it names is honoured
    assert torch.is_tensor(model.get_input_embeddings().weight)
