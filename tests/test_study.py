"""The study's page: its test over seeds and problems, curves cut at budgets, and words that fit."""

import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from bench import study, study_figures, study_page
from bench.study_figures import (
    GRPO,
    PTA,
    crossed_error,
    crossed_test,
    curve_at,
    holm,
    t_quantile,
    t_tail,
)

# --------------------------------------------------------------------------------------------------
# Statistics


def test_students_t_against_its_table():
    for df, quantile in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)):
        assert t_quantile(df) == pytest.approx(quantile, abs=1e-4)
        assert t_tail(-quantile, df) == pytest.approx(0.05, abs=1e-5)
    assert t_tail(0.0, 3) == 1.0


def test_crossed_test_by_hand():
    # Seeds' means 2 and 4, problems' means 1, 2 and 6, grand mean 3; the rest is -1 0 1 / 1 0 -1.
    found = crossed_test(np.array([[-1.0, 1, 6], [3, 3, 6]]))
    # MS_seed = 3 * 2 = 6 (df 1), MS_problem = 2 * 7 = 14 (df 2), MS_rest = 4 / 2 = 2 (df 2).
    error, df = math.sqrt((6 + 14 - 2) / 6), 18**2 / (6**2 / 1 + 14**2 / 2 + 2**2 / 2)
    assert found["delta"] == 3 and found["seeds"] == 2
    assert found["p"] == pytest.approx(t_tail(3 / error, df))
    assert found["high"] - 3 == pytest.approx(t_quantile(df) * error) == 3 - found["low"]


def test_variance_is_never_below_that_of_seeds_alone():
    # Seeds' means 1 and 5, problems' means 3 and 3: MS_seed 16, MS_problem 0, MS_rest 4; 12 < 16.
    found = crossed_test(np.array([[2.0, 0], [4, 6]]))
    assert found["p"] == pytest.approx(t_tail(3 / math.sqrt(16 / 4), 1))


def test_one_seed_is_the_paired_t_test_over_problems():
    found = crossed_test(np.array([[1.0, 2, 3]]))
    assert found["p"] == pytest.approx(t_tail(2 / math.sqrt(1 / 3), 2)) and found["seeds"] == 1


def test_equal_rows_differ_by_exactly_nothing():
    assert crossed_test(np.zeros((3, 5)))["p"] == 1.0


def test_level_under_seed_and_problem_effects():
    rng, rejected = np.random.default_rng(0), np.zeros(2)
    for _ in range(1500):
        seed, problem = 0.03 * rng.normal(size=(5, 1)), 0.3 * rng.normal(size=100)
        d = seed + problem + 0.2 * rng.normal(size=(5, 100))
        for i, layout in enumerate((d, d.mean(0, keepdims=True))):  # as if seeds were one run
            error, df = crossed_error(layout)
            rejected[i] += t_tail(d.mean() / error, df) < 0.05
    level, without_seeds = rejected / 1500
    assert 0.04 <= level <= 0.06 and without_seeds > 0.07


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.04 x 2 = 0.08, then 0.05 x 1 is raised to 0.08.
    assert holm([0.02, 0.05, 0.01, 0.04]) == pytest.approx([0.06, 0.08, 0.04, 0.08])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_costs_are_medians_of_steps_and_alike_rows_share_theirs(tmp_path, monkeypatch, capsys):
    """Seconds per decoded token: 8 steps of 100 tokens each; the first is slow, as imports are."""
    for name in ("RESULTS", "COSTS", "RUNS"):
        monkeypatch.setattr(study, name, tmp_path / getattr(study, name).name)
    monkeypatch.setattr(study, "MAIN_ROWS", {"a": "--plans 4 --cots 3", "b": "--plans 4 --cots 3 "
                        "--beta 0", "c": "--plans 12 --cots 1"})
    monkeypatch.setattr(study, "MORE_ROWS", {})
    monkeypatch.setattr(study, "SEEDS", dict.fromkeys("abc", 1))
    steps = {"a": [9, 1, 1, 1, 3, 2, 2, 2], "b": [9, 6, 6, 6, 6, 6, 6, 6], "c": [1] * 8}

    def train(task, row, seed, out, steps_asked):
        assert (seed, steps_asked) == (0, 8)
        out.mkdir(parents=True)
        lines = [json.dumps({"seconds": s, "decoded_tokens": 100}) + "\n" for s in steps[row]]
        (out / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(study, "train", train)
    study.measure_costs([study.TASKS["doors"]])
    costs = json.loads(study.COSTS.read_text())
    assert costs["doors"] == {"a": 0.02, "b": 0.06, "c": 0.01}
    assert "20000.0 us per token" in capsys.readouterr().out
    assert not (study.TASKS["doors"].folder / "cost").exists()

    line = lambda row, flags: {"task": "doors", "row": row, "seed": 0, "flags": flags,
                               "step_seconds": 5.0, "decoded": [10, 30]}
    lines = [line("a", "--plans 4 --cots 3"), line("b", "--plans 4 --cots 3 --beta 0"),
             line("c", "--plans 12 --cots 1"), line("d", "--plans 4 --cots 3 --kl_coef 0"),
             {"task": "doors", "row": "SFT", "seed": 0}]
    study.RESULTS.write_text("".join(json.dumps(one) + "\n" for one in lines))
    seconds = [one.get("token_seconds") for one in study.read_results()]
    # a and b differ in rewards alone: the median of 0.02 and 0.06. d was not measured: 2 x 5 / 40.
    assert seconds == [pytest.approx(0.04), pytest.approx(0.04), 0.01, 0.25, None]


def test_rows_are_paired_by_seed():
    run = lambda seed, right: {"seed": seed, "right": right}
    runs = {"a": [run(1, "44"), run(2, "40")], "b": [run(0, "00"), run(2, "20")]}
    found = study_figures.compare(runs, {"x": ("a", "b"), "y": ("a", "c")})
    assert list(found) == ["x"] and found["x"]["delta"] == 0.25 and found["x"]["seeds"] == 1


# --------------------------------------------------------------------------------------------------
# Figures


def test_curves_are_cut_where_the_budget_is_spent():
    run = {"accuracy": [k / 100 for k in range(40)], "decoded": [10] * 40, "token_seconds": 0.05}
    run["completions"] = [5, 15] * 20
    # 30 steps are 300 tokens, 300 completions or 15 seconds; the last tenth are steps 28 to 30.
    for unit, budget in (("decoded", 305), ("completions", 304), ("seconds", 15.2)):
        assert curve_at(run, unit, budget) == pytest.approx(0.28)
    assert curve_at(run, "decoded", 10) == 0.0


def test_token_cost_by_hand():
    facts = {"tau2": 0.1, "sigma2": 0.4, "plan_tokens": 8, "cot_tokens": 2}
    # z* = sqrt(4 * 4) = 4. z = 1: 0.5 * 10 = 5; z = 4: 0.2 * 16 = 3.2.
    assert study_figures.token_cost(facts, 4) == pytest.approx(0.64)
    costs = {z: study_figures.token_cost(facts, z) for z in range(1, 9)}
    assert min(costs, key=costs.get) == 4


def test_route_values_of_the_doors():
    # Good doors have 7 to 9 tenths and all doors 1 to 9, uniformly.
    best, random = study_figures.route_values(600)
    assert best == pytest.approx(0.8, abs=0.01) and random == pytest.approx(0.5, abs=0.01)


# --------------------------------------------------------------------------------------------------
# The page


def fake_lines(gain: dict, seeds: int = 5, rows=study.ROWS, problems: int = 60) -> list[dict]:
    """Lines as bench/study.py writes them. `gain`: what a row adds to the chance to be right."""
    rng, lines = np.random.default_rng(1), []
    did = dict(plans=240, best=0.6, value=0.7, right_if_best=0.8, right_if_not=0.4, revised=0.1)
    did["right_if_revised"] = None
    given = {"with_plan": {"true": 0.8, "none": 0.5, "shuffled": 0.4}}
    plans = {"icc": 0.1, "ci_low": 0.05, "ci_high": 0.2, "plan_std": 0.15, "cot_std": 0.45}
    plans |= {"plan_tokens": 19.0, "cot_tokens": 13.0, "best_cots": 3.6}
    draw = lambda chance: "".join(map(str, rng.binomial(4, chance, problems)))
    for task in study.TASKS:
        ease = rng.uniform(0.2, 0.7, problems)
        head = {"task": task, "seed": 0, "python": "3.11", "did": did}
        start = {"row": "SFT", "right": draw(0.4), "analysis": {"test": dict(plans)}}
        lines.append({**head, **start, **given})
        for row in rows:
            z = int(study.ROWS[row].split("--cots ")[1].split()[0])
            steps = 30 + 3 * z
            for seed in range(min(seeds, study.SEEDS[row])):
                rise = np.linspace(0.4, 0.6 + gain.get(row, 0), steps).round(4).tolist()
                lines.append({
                    **head, "row": row, "seed": seed, "flags": study.ROWS[row], "seconds": 99.5,
                    "step_seconds": 2.5, "token_seconds": 0.005,
                    "icc": 0.2 if z > 1 else None, "credit_corr": 0.9987,
                    "accuracy": rise, "decoded": [6000 - 500 * z] * steps,
                    "completions": [192] * steps, "right": draw(ease + gain.get(row, 0)),
                    **(given if seed < 2 and row in study.MAIN_ROWS else {}),
                })
    return lines


@pytest.fixture
def page(tmp_path, monkeypatch):
    """page(lines) -> the text of STUDY.md."""
    monkeypatch.chdir(tmp_path)

    def write(lines):
        study_page.write_page(lines)
        return study_page.PAGE.read_text()

    return write


def tables_of(text: str) -> list[list[str]]:
    blocks, block = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
        elif block:
            blocks, block = [*blocks, block], []
    return blocks


def assert_sound(text: str):
    """Every table has as many cells per line as heads; nothing is left unfilled."""
    for block in tables_of(text):
        assert len({line.replace("\\|", "").count("|") for line in block}) == 1, block[0]
    for word in ("nan", "None", "{", "}", "inf "):
        assert word not in text, word


def test_a_whole_study(page):
    text = page(fake_lines({PTA: 0.25}))
    assert_sound(text)
    total = len(study.jobs())
    assert f"**{total} of {total} runs are done.**" in text and "Missing" not in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {PTA} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "5" and float(cells[4].split()[0]) == pytest.approx(25, abs=5)
    # The control, smaller groups of GRPO, has no gain here, but nor has the tree without reward.
    said = " ".join(text.split())
    assert "pays on doors and quantities; beside smaller groups of plain GRPO no gain is" in said
    assert "ahead of GRPO" in said
    for task in study.TASKS:
        root = ET.parse(f"docs/study_{task}.svg").getroot()
        drawn = "".join(root.itertext())
        assert all(f"{name}, 5 seeds" in drawn for name in study_page.CURVES)
        assert b"#ffffff" not in ET.tostring(root)  # no white ground on a dark page


def test_findings_fit_a_method_that_is_behind_and_one_that_is_level(page):
    behind = page(fake_lines({row: -0.15 for row in study.ROWS if row != GRPO}))
    assert "behind GRPO" in behind and "No plan tree has been seen to pay" in behind
    assert_sound(behind)
    level = page(fake_lines({}))
    assert "which is within chance" in level and "No plan tree has been seen to pay" in level


def test_a_study_of_one_seed_says_so(page):
    text = page(fake_lines({PTA: 0.3}, seeds=1))
    assert "in one seed, which says nothing about others" in text and "°" in text
    assert "No plan tree has been seen to pay" in text
    assert_sound(text)


def test_any_part_of_a_study_gives_a_page(page):
    lines = fake_lines({}, seeds=3)
    assert "0 of" in page([]) and "**Missing seeds:**" in page([])
    for part in (lines[:1], lines[1:4], lines[1:2], lines[::2], [*lines[2:9], lines[-1]]):
        assert_sound(page(part))
    rng = np.random.default_rng(0)
    for size in (3, 8, 20, 40):
        assert_sound(page([lines[i] for i in rng.permutation(len(lines))[:size]]))


def test_plans_that_do_not_differ(page):
    lines = fake_lines({})
    for line in lines:
        if "analysis" in line:
            line["analysis"]["test"] |= {"plan_std": 0.0, "icc": 0.0, "best_cots": None}
    text = page(lines)
    assert_sound(text)
    assert "z\\* has no limit" in text


def test_the_page_knows_the_rows_of_the_study():
    named = {GRPO, PTA, *study_page.CURVES, *study_figures.TREES.values()}
    named |= {row for pair in study_figures.CONTRASTS.values() for row in pair}
    assert named <= set(study.ROWS) and study_figures.SAMPLES == study.SAMPLES


# --------------------------------------------------------------------------------------------------
# The file of results


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results(lines) -> what `read_results` makes of a file of these."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.jsonl")
    monkeypatch.setattr(study, "COSTS", tmp_path / "none.json")

    def read(lines):
        study.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return study.read_results()

    return read


def test_a_second_line_of_a_run_adds_its_fields(results):
    head = {"task": "doors", "row": "SFT", "seed": 0}
    found = results([
        {**head, "right": "44"}, {**head, "seed": 1, "right": "00"},
        {**head, "with_plan": {"own": 0.9}, "score_corr": 0.5},
    ])
    assert [line["right"] for line in found] == ["44", "00"]
    assert found[0]["score_corr"] == 0.5 and "score_corr" not in found[1]
    # Only a first seed is evaluated with other plans.
    assert [study.lacks_plans(line) for line in found] == [False, False]
    assert study.lacks_plans({**head, "right": "44", "with_plan": {}})


def test_accuracy_with_the_own_plan_is_of_the_model_that_tried_the_others():
    run = {"right": "44", "did": {"best": 0.5}}
    retrained = {**run, "with_plan": {"own": 0.6, "true": 0.8}}
    assert study_figures.plan_use([run, retrained], [retrained])["own"] == pytest.approx(0.6)
    older = {"right": "42", "did": {}, "with_plan": {"true": 0.8}}
    assert study_figures.plan_use([older], [older])["own"] == pytest.approx(0.75)
