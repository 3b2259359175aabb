"""pass@k and HSIC against brute force and closed forms, intervals and tests against known cases, the command line."""
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import sft
from conftest import ROOT
from data.toy import make_model, make_problems, make_tokenizer
from eval import (bootstrap_interval, compare, hsic, hsic_by_plan_reward, load_plans, maj_at_n, pass_at_k, permutation_p,
                  same, summarise)
from run_folder import check_run, open_run


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


@pytest.mark.parametrize("samples, value", [
    (votes("7", "3", "7"), 1.0), (votes("3", "3", "7"), 0.0),
    (votes("7", "7.0", "3", "3", "7"), 1.0),  # spellings of the right answer vote together
    (votes("7", "3"), 0.5), (votes("7", "3", "4"), 1 / 3),
    (votes(r"\dfrac{1}{2}", r"\frac{1}{2}", "$ \\frac12 $", "7"), 0.0),
    (votes(None, None, "7"), 1.0), (votes(None, None), 0.0),  # no answer is no vote
])
def test_maj_at_n(samples, value):
    assert maj_at_n(samples) == pytest.approx(value)


# ---------------------------------------------------------------------------------------------------------------
# Intervals and tests

def test_interval_of_many_problems_is_the_normal_one():
    rng = np.random.default_rng(1)
    right = rng.binomial(8, rng.beta(2, 3, 2000))
    low, high = bootstrap_interval([right], 8)
    half = 1.96 * right.std() / 8 / np.sqrt(2000)  # observed shares hold the sampling noise: it counts once
    assert low == pytest.approx(right.mean() / 8 - half, abs=0.001) and high == pytest.approx(right.mean() / 8 + half, abs=0.001)
    # Resampling both levels and taking percentiles would be wider by a third here.
    noise = (right / 8 * (1 - right / 8) / 8).mean() / 2000
    assert np.sqrt(1 + noise / (half / 1.96) ** 2) > 1.1


def test_one_sample_a_problem_is_wilsons_interval():
    # 13 right of 20: Wilson's score interval without continuity correction is 0.433 to 0.819.
    low, high = bootstrap_interval([np.array([1] * 13 + [0] * 7)], 1)
    assert (low, high) == (pytest.approx(0.4329, abs=5e-4), pytest.approx(0.8188, abs=5e-4))


def test_unanimous_runs_still_have_an_interval():
    for right, n in ((np.full(20, 4), 4), (np.zeros(20, int), 4), (np.ones(20, int), 1)):
        low, high = bootstrap_interval([right], n)
        assert high - low == pytest.approx(3.84 / 23.84, abs=1e-3)  # Wilson: z^2 / (N + z^2)
        assert low <= right.mean() / n + 1e-9 and high >= right.mean() / n - 1e-9


@pytest.mark.parametrize("problems, n, a, b", [(30, 64, 0.4, 0.75), (60, 4, 2, 2)])
def test_intervals_cover(problems, n, a, b):
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval([rng.binomial(n, rng.beta(a, b, problems))], n, seed=seed, resamples=400)
        hits += low <= a / (a + b) <= high
    assert 0.91 <= hits / 300 <= 0.98  # three standard errors; bench/stats.py has the exact figures


def test_a_difference_is_paired_and_its_sign_is_second_minus_first():
    rng = np.random.default_rng(4)
    base = rng.beta(0.5, 0.5, 300)
    counts = rng.binomial(16, np.stack([base * 0.8, base * 0.8 + 0.1], 1))
    low, high = bootstrap_interval([counts], (16, 16), (-1, 1))
    assert low < 0.1 < high and high - low < 0.05
    apart = [bootstrap_interval([counts[:, run]], 16) for run in (0, 1)]
    assert apart[0][1] - apart[0][0] > 1.7 * (high - low)  # unpaired intervals are far wider
    assert bootstrap_interval([counts[:, ::-1]], (16, 16), (-1, 1), seed=1) == pytest.approx((-high, -low), abs=0.003)


def test_permutation_p_equals_full_enumeration():
    difference = np.array([0.5, 0.25, -0.25, 0.75, 0.5, 0.0, 1.0, -0.25, 0.5])
    flips = np.array(list(itertools.product((-1, 1), repeat=9)))
    def mid_p(flipped, observed):
        return (abs(flipped) > observed + 1e-9).mean() + (abs(abs(flipped) - observed) <= 1e-9).mean() / 2

    assert permutation_p([difference], flips=40_000) == pytest.approx(mid_p(flips @ difference, difference.sum()), abs=0.005)
    assert permutation_p([np.zeros(5)]) == 1.0
    # Two benchmarks count alike, whatever their sizes: the mean of the means, not of all problems.
    parts = [np.array([1.0, 1.0]), np.array([-0.5, 0.5, 0.0, 0.25])]
    flips = np.array(list(itertools.product((-1, 1), repeat=6)))
    exact = mid_p(flips @ np.concatenate([p / len(p) for p in parts]), 1 + 0.0625)
    assert permutation_p(parts, flips=40_000) == pytest.approx(exact, abs=0.005)


def test_false_positive_rate():
    rng = np.random.default_rng(5)
    rates = rng.beta(0.5, 0.5, (500, 40))
    right = rng.binomial(16, rates[..., None], (500, 40, 2)) / 16
    p = np.array([permutation_p([pair[:, 1] - pair[:, 0]], seed=i, flips=400) for i, pair in enumerate(right)])
    assert 0.02 <= (p < 0.05).mean() <= 0.08 and 0.4 <= (p < 0.5).mean() <= 0.6


# ---------------------------------------------------------------------------------------------------------------
# Summaries and comparisons by hand

def sample(correct, tokens=10, well_formed=True, truncated=False):
    return {"correct": correct, "tokens": tokens, "well_formed": well_formed, "truncated": truncated,
            "answer": "1" if correct else "2", "completion": ""}


def record(id, *correct, benchmark="a"):
    return {"benchmark": benchmark, "id": id, "problem": f"problem {id}", "answer": "1", "samples": [sample(c) for c in correct]}


def test_summary_by_hand():
    records = [{"samples": [sample(True, 10), sample(False, 20)]},
               {"samples": [sample(True, 30), sample(True, 40, well_formed=False)]},
               {"samples": [sample(False, 50, truncated=True), sample(False, 60)]}]
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
    records = [record("1", True, True), *(record(str(i), False, False, benchmark="b") for i in range(3))]
    summary = summarise(records)
    assert summary["accuracy"] == 0.5 and summary["n_problems"] == 4  # not 1/4
    assert summary["benchmarks"]["a"]["accuracy"] == 1 and summary["benchmarks"]["b"]["accuracy"] == 0


def test_compare_by_hand():
    first = [record("1", True, False), record("2", False, False), record("3", True, True), record("only", True, True)]
    second = [record("1", True, True), record("2", True, False), record("3", True, True)]
    second[2]["answer"] = "5"
    result = compare(first, second)
    row = result["rows"][0]
    assert len(result["rows"]) == 1 and row["n_problems"] == 3
    assert row["first"] == pytest.approx(0.5) and row["second"] == pytest.approx(5 / 6)
    assert row["delta"] == pytest.approx(1 / 3) and row["ci_low"] < 1 / 3 < row["ci_high"]
    assert row["p"] == pytest.approx(0.25, abs=0.02)  # two differences, the same way: half of 2 of 4 sign patterns
    assert any("1 problems are in the first run only" in w for w in result["warnings"])
    assert any("problem 3 has another text or gold" in w for w in result["warnings"])
    two = compare(first + [record("1", False, benchmark="b")] * 0, second)["rows"]
    assert [r["benchmark"] for r in two] == ["a"]
    both = compare([*first, record("1", False, False, benchmark="b")], [*second, record("1", True, True, benchmark="b")])["rows"]
    assert both[-1]["benchmark"] == "overall" and both[-1]["delta"] == pytest.approx((1 / 3 + 1) / 2)
    with pytest.raises(SystemExit, match="no problem in common"):
        compare(first, [record("9", True)])


def test_compare_command_line_warns_of_other_settings(tmp_path, monkeypatch, capsys):
    for name, temperature in (("a", 0.6), ("b", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"temperature": temperature, "n": 2, "out": name}))
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(record(str(i), i > 3, name == "b")) + "\n" for i in range(9)))
    files = [str(tmp_path / name / "records.jsonl") for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", *files])
    evaluation.main()
    out = capsys.readouterr().out
    assert "--temperature is 0.6 in the first run and 1.0 in the second" in out and "+0.500" in out and "--out" not in out
    monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", files[0]])
    with pytest.raises(SystemExit, match="two records.jsonl"):
        evaluation.main()


# ---------------------------------------------------------------------------------------------------------------
# HSIC

def test_hsic_by_hand():
    # K = L = [[1, 0], [0, 1]]: H K H = [[.5, -.5], [-.5, .5]], tr(HKH L) = 1, over (N - 1)^2 = 1.
    assert hsic(np.eye(2), np.eye(2)) == pytest.approx(1.0)
    assert hsic(np.ones((4, 4)), np.random.default_rng(0).random((4, 4))) == pytest.approx(0)
    # Linear kernel: HSIC is the squared covariance (Gretton et al. 2005): x = 1, 2, 4; y = 2, 1, 6; cov = 3.5.
    x, y = np.array([1.0, 2, 4]), np.array([2.0, 1, 6])
    assert hsic(np.outer(x, x), np.outer(y, y)) == pytest.approx(3.5**2)


def test_hsic_of_labels_equals_the_closed_form():
    # With the kernel "equal or not", tr(KHLH)/N^2 is the squared distance of the joint table from the product of margins.
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    b[:20] = a[:20]
    joint = np.array([[((a == i) & (b == j)).mean() for j in range(4)] for i in range(3)])
    closed = ((joint - np.outer(joint.sum(1), joint.sum(0))) ** 2).sum()
    assert hsic(same(list(a)), same(list(b))) == pytest.approx(closed * 50**2 / 49**2)


def test_hsic_rises_with_plan_reward_when_better_plans_predict_better():
    rng = np.random.default_rng(3)
    rollouts = []
    for _ in range(150):
        gold, plans = str(rng.integers(10)), []
        for quality in (0.0, 0.5, 1.0):
            answers = [gold if rng.random() < quality else str(rng.integers(10)) for _ in range(3)]
            plans.append({"completions": [{"text": f"<answer>\\boxed{{{x}}}</answer>", "correct": x == gold,
                                           "reward": {"plan": 0.2 + quality / 4}} for x in answers]})
        rollouts.append({"answer": gold, "plans": plans})
    rows = hsic_by_plan_reward(rollouts, bins=3)
    assert [row["n"] for row in rows] == [450, 450, 450]
    assert rows[0]["nhsic"] < 0.05 < 0.15 < rows[1]["nhsic"] < 0.6 and rows[2]["nhsic"] == pytest.approx(1)
    assert [row["plan_reward"] for row in rows] == pytest.approx([0.2, 0.325, 0.45])


# ---------------------------------------------------------------------------------------------------------------
# Through the command line on a tiny random model

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=32, layers=1, heads=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, seed in (("one", 1), ("two", 2)):
        problems = make_problems("test", 7, facts=(2, 3), seed=seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return folder


def arguments(start, out, *flags):
    return ["eval.py", "--model", str(start / "model"), "--data", str(start / "one.jsonl"), str(start / "two.jsonl"),
            "--out", str(out), "--n", "3", "--max_completion_tokens", "24", "--rollout_rows", "3", *map(str, flags)]


@pytest.fixture
def run(start, tmp_path, monkeypatch):
    def call(*flags, out=tmp_path / "e"):
        monkeypatch.setattr(sys, "argv", arguments(start, out, *flags))
        evaluation.main()
        return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return call


def keys(records):
    return [(r["benchmark"], r["id"]) for r in records]


def test_two_benchmarks_in_one_call(run, start, tmp_path, capsys):
    records = run()
    assert len(set(keys(records))) == len(records) == 14 and all(len(r["samples"]) == 3 for r in records)
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    assert list(summary["benchmarks"]) == [str(start / "one.jsonl"), str(start / "two.jsonl")]
    assert summary["accuracy"] == pytest.approx(np.mean([b["accuracy"] for b in summary["benchmarks"].values()]))
    assert "maj@3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pass --resume to go on"):
        run()
    with pytest.raises(SystemExit, match="with --n 3, not 4"):
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
    assert 0 < len(kept.splitlines()) < 14 and sum(calls[2:]) == 14 - len(kept.splitlines())
    assert (tmp_path / "e/summary.json").exists()


def test_results_of_other_weights_are_not_resumed(run, start, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(start / "model", model)
    run("--model", model, out=tmp_path / "old")
    run("--model", model)
    run("--model", model, "--resume")
    make_model(make_tokenizer(), seed=1, width=32, layers=1, heads=2).save_pretrained(model)
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
    monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", *(str(tmp_path / name / "records.jsonl") for name in ("old", "new"))])
    evaluation.main()
    assert "warning" not in capsys.readouterr().out  # models are what is compared


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
def test_files_that_no_evaluation_wrote_stay(run, tmp_path, flags):
    theirs = tmp_path / "e" / ("summary.json" if flags == ("--overwrite",) else "run.json")
    theirs.parent.mkdir()
    theirs.write_text('{"the user\'s": "own"}')
    with pytest.raises(SystemExit, match=f"holds {theirs.name}, and no run.json .* move it away"):
        run(*flags)
    assert theirs.read_text() == '{"the user\'s": "own"}'


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_training_and_an_evaluation_do_not_share_a_folder(run, tmp_path, flags):
    words = [f"--{name}" for name in flags]
    training = sft.Config(out=str(tmp_path / "train"))
    open_run(check_run(training), training)
    for name in ("", "metrics.jsonl", "records.jsonl"):
        (tmp_path / "train" / name).exists() or (tmp_path / "train" / name).touch()
        before = (tmp_path / "train/run.json").read_text()
        with pytest.raises(SystemExit, match="train is a training run's folder.* such as .*/train/eval"):
            run(*words, out=tmp_path / "train")
        assert (tmp_path / "train/run.json").read_text() == before
    run(out=tmp_path / "train/eval")
    before = (tmp_path / "train/eval/run.json").read_text()
    with pytest.raises(SystemExit, match="eval holds an evaluation.*; choose another --out"):
        check_run(sft.Config(out=str(tmp_path / "train/eval"), **flags))
    assert (tmp_path / "train/eval/run.json").read_text() == before


def test_two_ranks_answer_each_problem_once(start, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                             *arguments(start, tmp_path / "e")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "e/records.jsonl").read_text().splitlines()]
    assert len(records) == 14 and len(set(keys(records))) == 14 and [k[0] for k in keys(records)] == sorted(k[0] for k in keys(records))


def test_given_plans_open_the_completion(run, start, tmp_path):
    problems = [json.loads(line) for line in (start / "one.jsonl").read_text().splitlines()]
    plans = {p["id"]: f"{p['problem'][0]} needs nothing" for p in problems[:5]}
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps({"id": i, "plan": plan}) + "\n" for i, plan in plans.items()))
    one = ("--data", start / "one.jsonl")
    records = run(*one, "--plan", given)
    assert [r["id"] for r in records] == list(plans)  # problems without a plan are left out
    for r in records:
        for s in r["samples"]:
            assert s["completion"].startswith(f"<plan> {plans[r['id']]} </plan> <think>") and 6 < s["tokens"] <= 24

    none = run(*one, "--plan", "none", out=tmp_path / "none")
    assert len(none) == 7 and all(s["completion"].startswith("<think>") for r in none for s in r["samples"])

    shuffled = run(*one, "--plan", "shuffled", "--plan_from", given, out=tmp_path / "shuffled")
    used = {r["id"]: r["samples"][0]["completion"].partition("</plan>")[0].removeprefix("<plan> ").strip() for r in shuffled}
    assert sorted(used.values()) == sorted(plans.values()) and len(used) == 5
    names = list(plans)
    again = run(*one, "--plan", "shuffled", "--plan_from", given, out=tmp_path / "again")
    assert [r["samples"] for r in again] == [r["samples"] for r in shuffled]  # the seed fixes plans and samples
    assert names == [r["id"] for r in shuffled]


def test_shuffled_plans_are_another_problems(run, start, tmp_path):
    problems = [json.loads(line) for line in (start / "one.jsonl").read_text().splitlines()]
    words = ["A", "B", "C", "D", "E", "F", "+"]
    own = {p["id"]: word for p, word in zip(problems, words)}
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps({"id": i, "plan": word}) + "\n" for i, word in own.items()))
    for r in run("--data", start / "one.jsonl", "--plan", "shuffled", "--plan_from", given):
        assert not r["samples"][0]["completion"].startswith(f"<plan> {own[r['id']]} </plan>")


def test_plans_come_from_eval_records_too(tmp_path):
    path = tmp_path / "records.jsonl"
    good = "<plan>first A</plan><think>t</think><answer>1</answer>"
    path.write_text(json.dumps({"id": "x", "samples": [{"completion": "junk"}, {"completion": good}]}) + "\n"
                    + json.dumps({"id": "y", "samples": [{"completion": "junk"}]}) + "\n")
    assert load_plans(str(path)) == {"x": "first A"}
    path.write_text(json.dumps({"id": "x", "plan": "a </plan> b"}) + "\n")
    with pytest.raises(SystemExit, match="holds template tags"):
        load_plans(str(path))


@pytest.mark.parametrize("flags, message", [
    (("--plan", "shuffled"), "needs --plan_from"), (("--plan", "nowhere.jsonl"), "no plans at 'nowhere.jsonl'"),
    (("--plan_from", "x"), "goes with --plan shuffled"), (("--n", 0), "--n must be >= 1, not 0"),
    (("--analysis", "mean"), "--analysis is hsic"), (("--data", "x", "x"), "names a benchmark twice"),
    (("--analysis", "hsic", "--data", "nowhere"), "--data wants a run's rollouts.jsonl"),
])
def test_bad_settings_are_refused_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_sampling_settings_of_a_generation_config_are_ignored(start):
    from grpo import sample as draw
    from model_utils import find_stop_ids
    tokenizer, model = make_tokenizer(), make_model(make_tokenizer(), width=32, layers=1, heads=2).eval()
    options = dict(n=4, max_new_tokens=12, temperature=1.0, stop_ids=find_stop_ids(model, tokenizer), seed=0)
    plain = draw(model, [[5, 6, 7]], **options)
    settings = model.generation_config
    settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty, settings.do_sample = 0.1, 1, 0.1, 9.0, True
    assert draw(model, [[5, 6, 7]], **options) == plain
    settings.eos_token_id = [settings.eos_token_id or 2, 11]
    assert 11 in find_stop_ids(model, tokenizer)  # while every EOS id that it names is honoured
    assert torch.is_tensor(model.get_input_embeddings().weight)
