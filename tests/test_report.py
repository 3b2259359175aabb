"""The page: what it holds and leaves out, that model text stays text, that it works in a browser.

The browser tests need Chromium and the playwright package. `.ci/run` installs Chromium, and
requirements.txt has playwright.
"""

import html
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
import torch

import eval as evaluation
import grpo
from data.toy import make_model, make_tokenizer
from model_utils import completion_texts, make_optimizer, shard_model
from plumbing.flags import TrainingFlags, parse_config
from plumbing.folder import open_logger
from plumbing.log import note_tokens, rollout_record, token_record
from plumbing.plans import analyse
from plumbing.ranks import print0, progress
from report import __main__ as report
from report import figures, runs

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--data--><!--summary-->",
    "\u2028\u2029\u202eright to left\u0000\u001b[31m\u200b",
    "\ud800 alone",
    "&lt;b&gt; \\u003cb> `${1}` {{7*7}}",
    "<plan><plan></think><answer>",
    "javascript:window.hacked=1",
]
LOGGERS = [name for name in get_args(TrainingFlags.__annotations__["log"]) if name]


def completion(plan="add a to b", think="so c = 4", answer="4", correct=True, **more):
    """A completion as rollouts.jsonl holds it."""
    blocks = f"<plan> {plan} </plan> <think> {think} </think>"
    reward = {"total": 1.4, "outcome": float(correct), "plan": 0.25, "structure": 0.2}
    reward["length"] = 0.05
    record = {"text": f"{blocks} <answer> \\boxed{{ {answer} }} </answer>", "tokens": 12}
    record |= {"correct": correct, "well_formed": True, "truncated": False, "reward": reward}
    return {**record, "advantage": 0.5, **more}


def wrong(**more):
    return completion(correct=False, **more)


def tree(step, name, completions, problem="a = 1 ; b = 3 ; c = a + b ; c ?"):
    """A question record: m plans of two CoTs each."""
    plans = []
    for pair in zip(completions[::2], completions[1::2]):
        score = sum(c["correct"] for c in pair) / 2
        plans.append({"score": score, "completions": list(pair)})
    return {"step": step, "id": name, "problem": problem, "answer": "4", "plans": plans}


def metric(step, slope=0.01):
    """A step's line of metrics.jsonl."""
    record = {"step": step, "reward": 0.5 + slope * step, "accuracy": 0.4 + slope * step}
    record |= {"plan_score": 0.4, "entropy": 1 / step, "outcome_spread": 0.3, "kl": math.nan}
    record |= {"completion_tokens": 40 + step % 3, "seconds": 2.0, "tokens_per_s": 900.0}
    return record | ({"eval_accuracy": 0.5} if step % 10 == 0 else {})


def write(path, records, tail=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def per_token(text):
    """Figures of a completion's tokens: its words with the blanks before them, and a stop token."""
    words = re.findall(r"\s*\S+", text)
    counts = range(len(words) + 1)
    widths = [len(word) for word in words] + [0]
    surprise, log_ratio = [10 * i for i in counts], [-50 + 10 * i for i in counts]
    return {"width": widths, "surprise": surprise, "log_ratio": log_ratio}


def eval_sample(text="4", correct=True, tokens=1):
    sample = {"completion": text, "answer": "4", "correct": correct, "tokens": tokens}
    return {**sample, "well_formed": False, "truncated": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two RL runs and two evaluations; the last question of `pta` is hostile."""
    root = tmp_path_factory.mktemp("runs") / "demo"
    for name, slope in (("grpo", 0.005), ("pta", 0.01)):
        write(root / name / "metrics.jsonl", [metric(step, slope) for step in range(1, 31)])
        settings = {"steps": 30, "beta": 0.5 * (name == "pta"), "lr": 1e-4, "out": name}
        (root / name / "run.json").write_text(json.dumps(settings))
        machine = {"device": "2 x Test GPU", "torch": "2.0"}
        (root / name / "machine.json").write_text(json.dumps(machine))
    shaded = completion(think="the plan is wrong, so I revise the plan : c = 4")
    shaded["per_token"] = per_token(shaded["text"])
    leaking = completion(plan="c = 4 so the answer is 4")
    first = [shaded, wrong(answer="5"), leaking, wrong(answer="9")]
    second = [wrong(plan="only b"), wrong(plan="only b"), wrong(), completion(plan="zebra")]
    hostile = [completion(plan=h, think=h, well_formed=False) for h in HOSTILE]
    trees = [
        tree(10, "q1", first),
        tree(10, "q2", second),
        tree(20, "q1", [completion()] * 4),
        tree(20, "</option>" + HOSTILE[0], hostile, HOSTILE[1]),
    ]
    write(root / "pta" / "rollouts.jsonl", trees)
    write(root / "grpo" / "rollouts.jsonl", [tree(10, "q1", [completion()] * 2)])
    for name, right in (("eval_base", [0, 1, 0, 1]), ("eval_pta", [1, 1, 0, 1])):
        records = []
        for i, r in enumerate(right):
            samples = [eval_sample(HOSTILE[i], bool(r), 5)] * 2
            record = {"benchmark": "data/toy", "id": f"t{i}", "problem": f"p{i} <b>"}
            records.append({**record, "answer": "4", "samples": samples})
        write(root / name / "records.jsonl", records)
        summary = {"settings": {"model": f"runs/demo/{name[5:]}/model"}}
        (root / name / "summary.json").write_text(json.dumps(summary))
    return root


@pytest.fixture(scope="module")
def page(folder):
    report.build([str(folder)], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def not_finite(tmp_path_factory):
    """The page of a run whose log holds NaN, Infinity and null wherever it holds a number."""
    root = tmp_path_factory.mktemp("not_finite")
    bad = completion(advantage=math.nan)
    bad["reward"] = {name: math.inf for name in bad["reward"]}
    bad["per_token"] = per_token(bad["text"])
    bad["per_token"]["surprise"][:4] = [math.nan, 50, -math.inf, None]
    record = tree(1, "bad", [bad] * 2)
    record["plans"][0]["score"] = math.nan
    write(root / "pta/metrics.jsonl", [metric(1), {**metric(2), "entropy": None}])
    good = tree(1, "good", [completion(advantage=-0.001)] * 2)
    write(root / "pta/rollouts.jsonl", [record, good])
    report.build([str(root)], root / "page.html")
    return root / "page.html"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """The page of a run with plan metrics in its first step, and of an analysis of plans."""
    root = tmp_path_factory.mktemp("analysed")
    steps = [{**metric(1), "plan_icc": 0.4, "plan_icc_mean": 0.234}, metric(2)]
    write(root / "pta/metrics.jsonl", steps)
    apart = [completion(plan_advantage=-0.25)] * 2 + [wrong(plan_advantage=0.5)] * 2
    half = [completion(), wrong()] * 2
    logged = [tree(1, "apart", apart), tree(1, "half", half), tree(1, "one", half[:2])]
    write(root / "pta/rollouts.jsonl", [*logged, tree(2, "unknown", apart)])
    records, head = [], {"benchmark": "data/toy", "problem": "p", "answer": "4"}
    for outcomes in ([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]):
        samples = [{**eval_sample("4", bool(r), 14), "plan_tokens": 4} for r in outcomes]
        records.append({**head, "id": f"t{len(records)}", "samples": samples})
    write(root / "eval/records.jsonl", records)
    (root / "eval/summary.json").write_text(json.dumps({"plans": analyse(records, 3)}))
    report.build([str(root)], root / "page.html")
    return root / "page.html"


ACTED = "<act> B </act> <result> shut </result> <act> C </act> <result> <b>open</b> </result> well"


@pytest.fixture(scope="module")
def acted(tmp_path_factory):
    """The page of a run whose CoTs act, and of an evaluation of them."""
    root, first = tmp_path_factory.mktemp("acted"), completion(think=ACTED)
    at = first["text"].index(ACTED)
    spans = [(at + ACTED.index(" <result>", k), at + ACTED.index("</result>", k) + 9)
             for k in (0, ACTED.index("<act> C"))]
    first |= {"said": spans, "forged": False, "revision": [True, True]}
    write(root / "pta/metrics.jsonl", [{**metric(1), "plan_wrong": 0.5, "wrong_left": 0.25}])
    write(root / "pta/rollouts.jsonl", [tree(1, "q", [first, wrong(forged=True)])])
    samples = [{**eval_sample(first["text"]), "said": spans, "revision": [True, True]}]
    samples.append({**eval_sample(correct=False), "revision": [True, False]})
    head = {"benchmark": "data/walk", "problem": "p", "answer": "4", "id": "w"}
    write(root / "eval/records.jsonl", [{**head, "samples": samples}])
    report.build([str(root)], root / "page.html")
    return root / "page.html"


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """The page of two rows of three seeds of different lengths, and of a run of another lr."""
    root, folders = tmp_path_factory.mktemp("seeded"), []
    for seed, steps in enumerate((30, 25, 20)):
        for name, beta in (("grpo", 0.0), ("pta", 0.5)):
            write_run(root / f"{name}_{seed}", 0.01 * (seed + 1), steps, beta=beta, seed=seed)
            folders.append(root / f"{name}_{seed}")
    write_run(root / "fast", 0.01, 30, beta=0.5, seed=3, lr=1e-3)
    write(root / "pta_1/rollouts.jsonl", [tree(10, "q1", [completion()] * 2)])
    report.build([*map(str, folders), str(root / "fast")], root / "page.html")
    return root / "page.html"


def write_run(folder, slope, steps, **settings):
    """A run whose accuracy is 0.4 + slope * step."""
    write(folder / "metrics.jsonl", [metric(step, slope) for step in range(1, steps + 1)])
    settings = {"lr": 1e-4, "steps": steps, "out": str(folder), **settings}
    (folder / "run.json").write_text(json.dumps(settings))


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def cells(page, row):
    """Texts of a table row, found by its head."""
    head = re.escape(html.escape(row))
    found = re.search(rf"<th scope=row>{head}</th>(.*?)</tr>", page.read_text())
    return [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", found[1])]


# --------------------------------------------------------------------------------------------------
# What the page holds

def test_the_page_holds_everything_and_asks_for_nothing(page):
    text, data = page.read_text(), data_of(page)
    assert [run["name"] for run in data["runs"]] == ["grpo", "pta"] and len(data["trees"]) == 5
    fetches = r"""(?:\b(?:src|action)=|\bhref=(?!["']?(?:#|data:,))|url\((?!#)|@import|\bfetch\()"""
    assert not re.search(fetches, text.split('id="data"')[0])
    drawn = ("accuracy", "eval_accuracy", "plan_score", "outcome_spread", "entropy")
    for name in (*drawn, "completion_tokens", "seconds"):
        assert f'role="img" aria-label="{name}: ' in text
    assert 'aria-label="kl: ' not in text  # never finite: nothing to draw
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert cells(page, "pta")[0] == "30 of 30, no final model yet"


def test_intervals_and_the_paired_comparison(page, folder):
    """0, 1, 0, 1 and 1, 1, 0, 1 right: means a half and three quarters, differences 1, 0, 0, 0."""
    names = ("eval_base", "eval_pta")
    base, pta = (runs.read_jsonl(folder / name / "records.jsonl")[0] for name in names)
    s, (row,) = evaluation.summarise(base), evaluation.compare(base, pta)["rows"]
    interval = f"{100 * s['ci_low']:.1f} % to {100 * s['ci_high']:.1f} %"
    assert cells(page, "eval_base")[:3] == ["toy", f"50.0 % ({interval})", "4 × 2"]
    interval = f"{100 * row['ci_low']:+z.1f} to {100 * row['ci_high']:+z.1f}"
    compared = ["toy", "+25.0 points", interval, f"{row['p']:.3f}", "4"]
    assert cells(page, "eval_pta − eval_base") == compared


def test_no_figure_is_a_negative_zero(folder, tmp_path, monkeypatch):
    """A bound of an interval may be -0.0 or -1e-17."""
    assert report.percent(-1e-17) == report.percent(-0.0) == "0.0 %"
    assert report.percent(-0.001) == "-0.1 %"
    row = {"benchmark": "x", "delta": -0.0, "ci_low": -1e-17, "ci_high": 0.107, "p": 1.0}
    paired = {"rows": [{**row, "n_problems": 4}], "warnings": []}
    monkeypatch.setattr(report, "compare", lambda before, after: paired)
    report.build([str(folder)], tmp_path / "page.html")
    found = cells(tmp_path / "page.html", "eval_pta − eval_base")
    assert found[1:3] == ["+0.0 points", "+0.0 to +10.7"]


def test_several_benchmarks(tmp_path):
    """Each benchmark by itself and their mean. Questions are paired within a benchmark by id."""

    def record(benchmark, name, right):
        head = {"benchmark": benchmark, "id": name, "problem": f"{benchmark} {name}"}
        return {**head, "answer": "4", "samples": [eval_sample(correct=right)] * 2}

    first = [record("x", "1", True), record("x", "2", True)]
    first += [record("y", "1", False), record("y", "2", True)]  # the same ids as in x
    write(tmp_path / "a" / "records.jsonl", first)
    second = [record("x", "1", True), record("x", "2", False)]
    write(tmp_path / "b" / "records.jsonl", second)
    page = tmp_path / "page.html"
    report.build([str(tmp_path)], page)
    rows = re.findall(r"<th scope=row>a</th><td>(.*?)</td><td>(.*?) %", page.read_text())
    assert rows == [("x", "100.0"), ("y", "50.0"), ("mean", "75.0")]
    assert cells(page, "b − a")[:2] == ["x", "-50.0 points"]
    questions = [(q["problem"], len(q["runs"])) for q in data_of(page)["questions"]]
    assert questions == [("x 1", 2), ("x 2", 2), ("y 1", 1), ("y 2", 1)]


def test_how_much_the_plan_decides(analysed):
    text, trees = analysed.read_text(), data_of(analysed)["trees"]
    assert 'aria-label="plan_icc: ' in text
    assert text.count("<h3>How much the plan decides</h3>") == 2  # the table and the curves
    share = "at this step plans decide 23 % of the outcome."
    assert [tree.get("line") for tree in trees] == [
        f"Plans differ by ±0.71, CoTs of one plan by ±0.00; {share}",
        # Equal scores; a variance of 1/2 within each plan.
        f"Plans differ no more than by chance, CoTs of one plan by ±0.71; {share}",
        None,  # of one plan
        None,  # of a step without the metric
    ]
    row = re.findall(r"<th scope=row>eval</th>(.*?)</tr>", text)[1]
    row = re.findall(r"<td>(.*?)</td>", row)
    # tau2: 0.5 - 0, and 1/18 - 1/9; sigma2: 0 and 1/3.
    assert row[0] == "toy" and row[1].startswith(f"{100 * (4 / 9) / (4 / 9 + 1 / 3):.1f} % (")
    assert row[2:7] == ["2 × 2 × 3", "±0.47", "±0.41", "4.0", "10.0"]
    advice = json.loads((analysed.parent / "eval/summary.json").read_text())["plans"]["data/toy"]
    assert html.escape(advice["advice"]) in text


def test_what_becomes_of_wrong_plans(acted, page):
    part = acted.read_text().partition("What becomes of wrong plans")[2].partition("</table>")[0]
    row = ["walk", "2", "100.0 %", "50.0 %", "100.0 %", "–"]
    assert re.findall(r"<td>(.*?)</td>", part) == row
    assert "What becomes of wrong plans" not in page.read_text()


def test_runs_without_plan_metrics_render_as_before(page):
    assert "How much the plan decides" not in page.read_text()
    assert all("line" not in tree for tree in data_of(page)["trees"])


def test_only_settings_that_differ_are_listed(page):
    text = page.read_text()
    assert cells(page, "beta") == ["0.0", "0.5"]
    assert "<th scope=row>lr</th>" not in text and "<th scope=row>out</th>" not in text
    assert "2 x Test GPU" in text


def test_seeds_of_a_row_are_one_curve_with_a_band(seeded):
    """Of pta, accuracy is 0.4 + s * step, with s = 0.01, 0.02, 0.03; the shortest has 20 steps."""
    text, data = seeded.read_text(), data_of(seeded)
    legend = re.findall(r"<span class=run[^>]*>━ <b>(.*?)</b>", text)
    assert legend == ["grpo (3 seeds)", "pta (3 seeds)", "fast"]
    ends = "0.42 at step 1 to 0.8 at step 20, the seeds there from 0.6 to 1"
    both = "; ".join(f"{name} (3 seeds) from {ends}" for name in ("grpo", "pta"))
    assert f'"accuracy: {both}; fast from 0.41 at step 1 to 0.7 at step 30"' in text
    assert re.findall(r'id="rl_accuracy-(\D+-\d)"', text) == [
        "band-0", "band-1", "raw-0", "raw-1", "raw-2",
    ]
    assert text.count("from the lowest seed to the highest one") == 1
    assert cells(seeded, "seed") == ["0, 1, 2", "0, 1, 2", "3"]
    assert cells(seeded, "beta") == ["0.0", "0.5", "0.5"]
    # Tables of runs and the plan trees have each run, a row's side by side.
    names = [f"{name}_{seed}" for name in ("grpo", "pta") for seed in range(3)] + ["fast"]
    assert [run["name"] for run in data["runs"]] == names
    assert [cells(seeded, name)[0].split()[0] for name in names] == ["30", "25", "20"] * 2 + ["30"]
    assert [data["runs"][tree["run"]]["name"] for tree in data["trees"]] == ["pta_1"]


def test_a_mean_needs_every_seed():
    logs = [{1: 0.2, 2: 0.4, 3: 0.5, 4: 0.8}, {1: 0.6, 2: math.nan, 3: 0.7, 4: 1.0, 5: 1.0}]
    logs.append({3: 0.9, 1: 0.1, 2: 0.3})
    seeds = [
        runs.Run(f"a/{i}", Path(f"a/{i}"), {"seed": i}, [{"step": s, "x": log[s]} for s in log])
        for i, log in enumerate(logs)
    ]
    (row,) = runs.group_seeds(seeds)
    assert row.name == "a (3 seeds)" and row.seeds == seeds
    assert runs.seed_values(row, "x") == {1: [0.2, 0.6, 0.1], 3: [0.5, 0.7, 0.9]}
    steps, means = runs.points(row, "x")
    assert steps == [1, 3] and means == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize(
    "first, second, grouped",
    [
        ({"seed": 0}, {"seed": 1}, True),
        ({"seed": 0, "out": "a"}, {"seed": 1, "out": "b", "changes": [{}], "keep": 2}, True),
        ({"seed": 0, "steps": 9}, {"seed": 1, "steps": 8}, True),
        ({"seed": 0, "steps": 9, "schedule": "cosine"},
         {"seed": 1, "steps": 8, "schedule": "cosine"}, False),
        ({"seed": 0, "beta": 0.5}, {"seed": 1, "beta": 0.3}, False),
        ({"seed": 0}, {"seed": 0}, False),  # something else must differ
        ({}, {}, False),  # without a run.json
    ],
)
def test_which_runs_are_a_row(first, second, grouped):
    pair = [runs.Run(name, Path(name), s) for name, s in (("x", first), ("y", second))]
    rows = runs.group_seeds(pair)
    assert [row.name for row in rows] == (["x (2 seeds)"] if grouped else ["x", "y"])


@pytest.mark.parametrize(
    "name, row",
    [
        ("pta_7", "pta"), ("pta_seed7", "pta"), ("pta-s7", "pta"), ("seed7/pta", "pta"),
        ("seed7", "above"), ("pta_17", "pta_17"), ("beta_7_7", "beta_7"), ("pta7b", "pta7b"),
    ],
)
def test_a_row_is_named_without_its_seed(name, row):
    assert runs.row_name(runs.Run(name, Path("above") / name, {"seed": 7})) == row


def test_flags_of_a_completion(page):
    first = next(t for t in data_of(page)["trees"] if t["id"] == "q1" and t["run"] == 1)
    completions = [c for plan in first["plans"] for c in plan["completions"]]
    assert [c["revised"] for c in completions] == [True, False, False, False]
    assert [c["leaks"] for c in completions] == [False, False, True, False]


@pytest.mark.parametrize(
    "think, revised",
    [
        ("The plan was wrong here.", True),
        ("I will change the first plan", True),
        ("Let me try another plan.", True),
        ("the plan is not wrong", False),
        ("following the plan, 3 + 4 = 7", False),
        ("this airplane is wrong", False),
        ("wrong sign; correct it. Plan done", False),
    ],
)
def test_plan_revised(think, revised):
    assert runs.plan_revised(think) is revised


def test_a_run_alone_finds_its_evaluation(folder):
    assert [run.name for run in runs.find_runs([str(folder / "pta")])] == ["pta", "eval_pta"]
    assert [run.name for run in runs.find_runs([str(folder / "grpo")])] == ["grpo"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [tmp_path / seed / "pta" for seed in ("seed0", "seed1")]
    for folder in folders:
        write(folder / "metrics.jsonl", [metric(1)])
    found = runs.find_runs([str(folder) for folder in folders])
    assert [run.name for run in found] == ["seed0/pta", "seed1/pta"]


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no folder .*nowhere; give a run folder"):
        runs.find_runs([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="no metrics.jsonl or records.jsonl in .*; give the --out"):
        runs.find_runs([str(tmp_path)])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "."], "--out wants a file such as report.html"),
        (["--watch", "-1"], "--watch must be a number of seconds"),
        (["--watch", "nan"], "--watch must be a number of seconds"),
        (["--page_mb", "0"], "--page_mb must be a number above 0"),
        (["--page_mb", "inf"], "--page_mb must be a number above 0"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", "run", *flags])
    with pytest.raises(SystemExit, match=message):
        report.main()


# --------------------------------------------------------------------------------------------------
# Runs that go on, were cut off, or are large

def test_a_run_cut_off_in_mid_write(tmp_path):
    run, page = tmp_path / "pta", tmp_path / "page.html"
    metrics = [metric(1), metric(2), {**metric(2), "accuracy": 0.9}]
    write(run / "metrics.jsonl", metrics, '{"step": 3, "rew')
    whole = tree(1, "q", [completion()] * 2)
    write(run / "rollouts.jsonl", [whole], '{"step": 1, "id": "caf\xc3')
    (run / "run.json").write_text('{"steps": 3')
    report.build([str(run)], page)
    assert "2 lines were cut off or damaged" in page.read_text()
    assert len(data_of(page)["trees"]) == 1
    assert cells(page, "pta")[0] == "2 of ?, no final model yet"
    # Of a step that ran twice, the second time counts.
    assert cells(page, "pta")[2].startswith("90.0 %")


def test_an_empty_run_gives_a_page(tmp_path):
    write(tmp_path / "pta" / "metrics.jsonl", [])
    assert report.build([str(tmp_path)], tmp_path / "page.html")["trees"] == 0


def test_watch_waits_for_the_run_and_rebuilds(tmp_path, monkeypatch, capsys):
    run, page, seen = tmp_path / "pta", tmp_path / "page.html", []

    def sleep(seconds):
        seen.append(page.read_text().count("step 2") if page.exists() else None)
        if len(seen) == 4:
            raise KeyboardInterrupt
        if len(seen) < 3:
            write(run / "metrics.jsonl", [metric(step) for step in range(1, len(seen) + 1)])

    monkeypatch.setattr(report.time, "sleep", sleep)
    run.mkdir()
    flags = ["--out", str(page), "--watch", "5"]
    monkeypatch.setattr(sys, "argv", ["report", str(run), *flags])
    report.main()
    out = capsys.readouterr().out
    assert out.count("waiting") == 1
    assert out.count("built in") == 2  # the fourth look found nothing new
    assert seen[:2] == [None, 0] and seen[2] > 0


def test_large_runs_are_sampled_evenly_and_say_so(tmp_path):
    run, page = tmp_path / "pta", tmp_path / "page.html"
    write(run / "metrics.jsonl", [metric(step) for step in range(1, 51)])
    long = [completion(think="x " * 500)] * 4
    trees = [tree(step, f"q{k}", long) for step in range(1, 51) for k in range(20)]
    write(run / "rollouts.jsonl", trees)
    whole = (run / "rollouts.jsonl").stat().st_size
    result = report.build([str(tmp_path)], page, page_mb=whole / 10 / 1e6)
    steps = sorted({t["step"] for t in data_of(page)["trees"]})
    assert result["bytes"] < whole / 10 + 400_000  # curves and script take the rest
    assert steps[0] == 1 and steps[-1] == 50
    assert max(b - a for a, b in zip(steps, steps[1:])) <= 4
    assert 50 < result["trees"] < 100
    shown = f"{result['trees']} of 1,000 logged trees, from {len(steps)} of 50 logged steps"
    assert shown in page.read_text()


@pytest.mark.parametrize(
    "count, n, chosen",
    [(5, 10, [0, 1, 2, 3, 4]), (10, 2, [0, 9]), (7, 3, [0, 3, 6]), (3, 1, [0]), (0, 4, [])],
)
def test_spread(count, n, chosen):
    assert runs.spread(count, n) == chosen


def test_pictures(folder, seeded, tmp_path):
    figures.pictures([str(folder)], tmp_path / "docs")
    assert (tmp_path / "docs/tree.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "docs/curves.svg").read_text()
    assert "accuracy" in svg and "band" not in svg
    figures.pictures([str(seeded.parent)], tmp_path / "rows")
    svg = (tmp_path / "rows/curves.svg").read_text()
    assert "pta (3 seeds)" in svg and "band: lowest to highest seed" in svg


# --------------------------------------------------------------------------------------------------
# Model text stays text

def test_embedded_json_reads_back_and_holds_no_markup(page):
    assert json.loads(report.embed(HOSTILE)) == HOSTILE
    assert report.embed(HOSTILE).isascii() and "<" not in report.embed(HOSTILE)
    text = page.read_text()
    assert text.count("</script>") == 2 and "<img" not in text
    assert "onerror='window" not in text.split('id="data"')[0]


def test_embedded_json_is_strict(not_finite):
    def refuse(name):
        raise ValueError(name)

    text = re.search(r'id="data">(.*?)</script>', not_finite.read_text())[1]
    bad = json.loads(text, parse_constant=refuse)["trees"][0]["plans"][0]
    assert bad["score"] is None and bad["completions"][0]["reward"]["total"] is None
    assert bad["completions"][0]["per_token"]["surprise"][:4] == [None, 50, None, None]


def test_names_and_settings_are_escaped(tmp_path):
    run = tmp_path / "<b>run&"
    write(run / "metrics.jsonl", [metric(1), metric(2)])
    (run / "run.json").write_text(json.dumps({"steps": HOSTILE[1]}))
    report.build([str(run)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<b>run&" not in text and "<img" not in text and "&lt;b&gt;run&amp;" in text


# --------------------------------------------------------------------------------------------------
# What grpo.py logs for it

def sampled_group(tokenizer):
    """A question with two completions of different lengths, as if sampled and graded."""
    prompt, stop, rollouts = tokenizer.encode("A = 4 ; A ?"), tokenizer.eos_token_id, []
    for i, text in enumerate(("<plan> A needs nothing </plan>", "<plan> A </plan>")):
        ids = tokenizer.encode(text) + [stop]
        logprobs = [-1.0 - i] * len(ids)
        rollout = grpo.Rollout(prompt, [9], ids=ids, logprobs=logprobs, stopped=True)
        rollout.correct, rollout.advantage = i == 0, [1.0, -1.0][i]
        rollouts.append(rollout)
    texts = completion_texts(tokenizer, [rollout.ids for rollout in rollouts], [stop])
    for rollout, text in zip(rollouts, texts):
        rollout.text = text
    return grpo.Group({"id": "q", "problem": "A ?", "answer": "4"}, rollouts)


# Mask and order of rows in a micro-batch are what could go wrong: the completions' lengths differ.
def test_rollout_records_carry_what_the_update_saw_of_each_token():
    tokenizer, size = make_tokenizer(), dict(width=16, layers=1, heads=2)
    model, reference = (make_model(tokenizer, seed=seed, **size).eval() for seed in (0, 1))
    shard_model(model)
    shard_model(reference)
    config, group = grpo.Config(plans=1, cots=2, questions=1), sampled_group(tokenizer)
    micros = grpo.make_micro_batches(group.rollouts, config, torch.device("cpu"))
    for micro, logprobs in zip(micros, grpo.all_logprobs(reference, micros, 1.0)):
        micro.ref_logprobs = logprobs
    with torch.no_grad():
        before = [model.token_logprobs(micro.packed)[1] for micro in micros]
    grpo.update(model, make_optimizer(model, 1e-3, 0.0), micros, config, 1e-3)
    note_tokens(micros)
    for micro, entropy in zip(micros, before):
        for at, rollout in enumerate(micro.rollouts):
            mask = micro.packed.mask[at]
            references = micro.ref_logprobs[at][mask].tolist()
            ratios = [a - b for a, b in zip(rollout.logprobs, references, strict=True)]
            assert rollout.entropy == pytest.approx(entropy[at][mask].tolist(), abs=1e-5)
            assert rollout.log_ratio == pytest.approx(ratios, abs=1e-5)

    rewards = grpo.group_rewards([group], config)
    plain = rollout_record(group, rewards, 0)["plans"][0]["completions"]
    assert "per_token" not in plain[0] and [c["advantage"] for c in plain] == [1.0, -1.0]
    shaded = rollout_record(group, rewards, 0, tokenizer)["plans"][0]["completions"]
    for rollout, c in zip(group.rollouts, shaded, strict=True):
        tokens, at, pieces = c["per_token"], 0, []
        for width in tokens["width"]:
            pieces.append(rollout.text[at:at + width].strip())
            at += width
        words = [tokenizer.decode([token]) for token in rollout.ids[:-1]]
        assert pieces == words + [""]  # the stop token covers no text
        assert tokens["surprise"] == [round(-100 * x) for x in rollout.logprobs]
        assert tokens["entropy"] == [round(100 * x) for x in rollout.entropy]
        assert len(tokens["log_ratio"]) == len(rollout.ids)


class Letters:
    """A tokenizer whose tokens are bytes: é is two of them, which do not decode alone."""

    def batch_decode(self, batch):
        return [bytes(ids).decode(errors="replace") for ids in batch]


def test_token_widths_cover_text_where_characters_are_several_tokens():
    text = "café au\n\nlait"
    ids = list(text.encode())
    rollout = grpo.Rollout([], [99], ids=ids, logprobs=[0.0] * len(ids))
    widths = token_record(Letters(), rollout, text)["width"]
    assert sum(widths) == len(text) and len(widths) == len(ids)
    # The two halves of é; then the blank, and é, blank and a.
    assert widths[3:5] == [0, 0] and widths[5:7] == [0, 3]


@pytest.mark.parametrize("name", LOGGERS)
def test_loggers_get_the_names_of_metrics_jsonl(name, tmp_path, monkeypatch):
    got, package = [], types.ModuleType(name)
    package.init = lambda **settings: got.append(settings["config"]["steps"])
    package.log = lambda metrics, step: got.append((step, metrics))
    package.finish = lambda: None

    class SummaryWriter:
        def __init__(self, folder):
            got.append(350)

        def add_scalar(self, key, value, step):
            if step != (got[-1][0] if got[1:] else None):
                got.append((step, {}))
            got[-1][1][key] = value

        close = staticmethod(package.finish)

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    log = open_logger(name, tmp_path, grpo.Config())
    metrics = {"step": 7, "accuracy": 0.5, "kl": 0.01}
    log(metrics)
    assert got == [350, (7, metrics)]
    monkeypatch.setenv("RANK", "1")
    open_logger(name, tmp_path, grpo.Config())(metrics)
    assert len(got) == 2  # other ranks log nothing


def test_a_missing_logger_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = "--log wandb .*package wandb.*`pip install wandb`"
    with pytest.raises(SystemExit, match=missing):
        parse_config(grpo.Config, ["--model", "x", "--log", "wandb"])
    with pytest.raises(SystemExit, match="--log: .*'mlflow'.*tensorboard.*wandb.*trackio"):
        parse_config(grpo.Config, ["--model", "x", "--log", "mlflow"])


def test_bars_show_on_a_terminal_of_rank_0_alone(monkeypatch):
    screen = {"isatty": lambda: True, "write": len, "flush": lambda: None}
    assert progress(3, 0, "x").disable  # pytest's output is no terminal
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(**screen))
    assert not progress(3, 0, "x").disable
    monkeypatch.setenv("RANK", "1")
    assert progress(3, 0, "x").disable


def test_print0_prints_a_line(capsys):
    print0("a", 1)
    assert capsys.readouterr().out == "a 1\n"


# --------------------------------------------------------------------------------------------------
# In a browser

@pytest.fixture(scope="module")
def browser():
    reason = "no playwright: pip install -r requirements.txt"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if not chromium:
        pytest.skip("no Chromium on the path; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page):
    """visit(hash, width, scheme) -> the open page.

    At the end nothing may have gone wrong or been fetched.
    """
    problems, tabs = [], []

    def note_request(request):
        if not request.url.startswith((page.as_uri(), "data:")):
            problems.append(request.url)

    def open_page(link="", width=1280, scheme="light"):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tabs.append(tab)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append("a dialog"))
        tab.on("request", note_request)
        tab.goto(page.as_uri() + link)
        return tab

    yield open_page
    hacked = [tab.evaluate("window.hacked") for tab in tabs]
    for tab in tabs:
        tab.close()
    assert not problems and not any(hacked)


def choose(tab, **values):
    for name, value in values.items():
        tab.select_option(f"#{name}", value)


def question(tab):
    """The chosen question's label."""
    place = int(tab.input_value("#question")) + 1
    return tab.inner_text(f"#question option:nth-child({place})")


def each(locator, expression):
    """A JavaScript expression of every element `e` that a locator finds."""
    return locator.evaluate_all(f"all => all.map(e => {expression})")


def test_a_tree_opens_by_click(visit):
    tab = visit()
    choose(tab, step="10")
    assert tab.locator("#tree .card").count() == 2
    assert "score 0.50, plan reward 0.25" in tab.inner_text("#tree .card >> nth=0")
    first = tab.locator("#tree details >> nth=0")
    assert "12 tokens · advantage +0.50" in first.inner_text()
    terms = "outcome 1.00 + plan 0.25 × 0.5 + structure 0.20 + length 0.05"
    assert terms in first.inner_text()
    assert first.locator(".block").count() == 0  # made when it is opened
    first.locator("summary").click()
    first.locator(".block >> nth=2").wait_for()
    assert first.locator(".block b").all_inner_texts() == ["plan", "think", "answer"]
    assert first.locator(".block .text").all_inner_texts()[2] == "\\boxed{ 4 }"


def test_a_tree_says_how_much_its_plans_decide(browser, analysed):
    tab = browser.new_page()
    tab.goto(analysed.as_uri() + "#tree/pta/1/apart")
    assert "Plans differ by ±0.71" in tab.inner_text("#tree > .note")
    summaries = tab.locator("#tree summary").all_inner_texts()
    assert "advantage +0.50, of its plan −0.25" in summaries[0]
    assert "of its plan" not in summaries[2]  # equal: said once
    choose(tab, step="2")
    assert tab.locator("#tree > .note").count() == 0 and tab.locator("#tree .card").count() == 2
    tab.close()


def test_an_episode_is_shown_as_steps_with_replies_apart(browser, acted):
    tab = browser.new_page()
    tab.goto(acted.as_uri())
    first = tab.locator("#tree details >> nth=0")
    assert first.locator(".flag").all_inner_texts() == ["plan was wrong", "plan left"]
    first.locator("summary").click()
    steps = first.locator(".steps li")
    steps.first.wait_for()
    assert steps.count() == 3
    assert first.locator(".said").all_inner_texts() == ["shut", "<b>open</b>"]
    own = first.locator(".steps .text:not(.said)").all_inner_texts()
    assert [text.strip() for text in own] == ["<act> B </act>", "<act> C </act>", "well"]
    choose(tab, filter="forged")
    assert tab.locator("#tree .flag").all_inner_texts() == ["result forged"]
    choose(tab, filter="left")
    assert tab.locator("#tree details").count() == 1
    assert tab.locator("#answers .steps li").count() == 3
    tab.close()


def test_a_tree_opens_by_keyboard(visit):
    tab = visit()
    choose(tab, step="10")
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("n")
    assert question(tab).startswith("q2")
    tab.keyboard.press("p")
    assert question(tab).startswith("q1")
    tab.keyboard.press("j")
    tab.keyboard.press("j")
    tab.keyboard.press("Enter")
    assert each(tab.locator("#tree details"), "e.open") == [False, True, False, False]
    tab.keyboard.press("]")
    assert tab.input_value("#step") == "20" and question(tab).startswith("q1")
    tab.keyboard.press("[")
    assert tab.input_value("#step") == "10"
    tab.keyboard.press("o")
    assert tab.locator("#tree details[open]").count() == 4
    tab.keyboard.press("/")
    tab.keyboard.type("npj")  # letters in the search box are text
    assert tab.input_value("#search") == "npj" and tab.locator("#tree details").count() == 0


def test_filters_and_search_change_what_is_shown(visit):
    tab = visit()

    def shown(**values):
        choose(tab, **values)
        return tab.inner_text("#status"), tab.locator("#tree details").count()

    assert shown(filter="all") == ("20 completions in 4 trees match.", 4)
    assert shown(filter="right-wrong") == ("3 completions in 2 trees match.", 2)
    assert shown(filter="leaks") == ("1 completions in 1 trees match.", 1)
    assert shown(filter="revised") == ("1 completions in 1 trees match.", 1)
    assert shown(filter="malformed") == ("8 completions in 1 trees match.", 8)
    assert shown(filter="wrong-right") == ("0 completions in 0 trees match.", 0)
    tab.fill("#search", "zebra")
    assert shown(filter="all") == ("1 completions in 1 trees match.", 1)
    tab.fill("#search", "")
    assert shown(filter="all", run="0") == ("2 completions in 1 trees match.", 2)


def test_a_link_opens_its_tree(visit):
    tab = visit("#tree/pta/10/q2")
    assert tab.input_value("#step") == "10" and question(tab).startswith("q2")
    tab.evaluate("location.hash = 'tree/grpo/10/q1'")
    tab.wait_for_function("document.getElementById('run').value === '0'")
    assert tab.get_attribute("#tree a", "href") == "#tree/grpo/10/q1"
    assert "not on this page" in visit("#tree/pta/10/nobody%E0").inner_text("#status")


def test_tokens_are_shaded_on_demand(visit):
    tab = visit("#tree/pta/10/q1")
    tab.click("#tree summary >> nth=0")
    first = tab.locator("#tree details >> nth=0")
    plain = first.locator(".text").all_inner_texts()
    spans = first.locator(".text span")
    assert spans.count() == 0
    choose(tab, shade="log_ratio")
    spans.first.wait_for()
    shaded = first.locator(".text").all_inner_texts()
    assert [t.strip() for t in shaded] == [t.strip() for t in plain]
    assert "blue: less likely" in tab.inner_text("#legend")
    colours = each(spans, "[e.title, getComputedStyle(e).backgroundColor]")
    assert colours[0][0] == "-0.40" and colours[0][1] != colours[-1][1]
    choose(tab, shade="entropy")
    assert "without that figure" in tab.inner_text("#legend")


def test_hostile_completions_stay_text(visit):
    tab = visit()
    choose(tab, filter="malformed")
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("o")
    tab.locator("#tree details[open] .block >> nth=8").wait_for()
    said = tab.inner_text("#tree")
    for text in ("</script><script>window.hacked = 1</script>", "<img src=x", "{{7*7}}"):
        assert text in said
    # Nothing is hidden, and nothing changes direction.
    assert "[U+202E]right to left[U+0000][U+001B][31m[U+200B]" in said
    markup = "#tree script, #tree img, #tree style, #tree a:not([href^='#tree/'])"
    assert tab.locator(markup).count() == 0
    choose(tab, **{"held-out": "1"})
    assert "<img src=x" in tab.inner_text("#answers") and tab.locator("#answers img").count() == 0


def test_a_page_opens_with_figures_that_are_not_finite(browser, not_finite):
    tab, problems = browser.new_page(), []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(not_finite.as_uri())
    assert "score not finite, plan reward not finite" in tab.inner_text("#tree .card")
    assert "advantage not finite" in tab.inner_text("#tree details >> nth=0")
    choose(tab, shade="surprise")
    tab.click("#tree summary >> nth=0")
    # The first token, <plan>, is not shown: these are 50, -Infinity, null and 40 hundredths.
    spans = tab.locator("#tree .text span")
    titles = each(spans, "e.title")
    clear = each(spans, "getComputedStyle(e).backgroundColor.endsWith(', 0)')")
    choose(tab, question="1")
    assert "advantage +0.00" in tab.inner_text("#tree details >> nth=0")  # of -0.001
    tab.close()
    assert titles[:4] == ["0.50", "not finite", "not finite", "0.40"] and not problems
    assert clear[:4] == [False, True, True, False]  # nothing is shown for these tokens


def test_before_and_after_show_the_same_question(visit):
    tab = visit()
    assert tab.inner_text("#held-out option >> nth=0") == "t0: 0/2 → 2/2"
    heads = tab.locator("#answers h3").all_inner_texts()
    assert heads == ["eval_base: 0 of 2 right", "eval_pta: 2 of 2 right"]
    choose(tab, change="gained")
    assert tab.inner_text("#before-status") == "1 of 4 questions."
    choose(tab, change="lost")
    assert tab.inner_text("#before-status") == "0 of 4 questions."
    assert tab.inner_text("#answers") == ""


def test_smoothing_never_hides_the_measured_line(visit):
    tab = visit()
    line, path = "g[id^='rl_accuracy-raw-'] > path", "e.getAttribute('d')"
    before = each(tab.locator(line), path)
    assert len(before) == 2 and before[0].count("L") == 29  # every one of the 30 steps
    tab.locator("#smoothing").fill("0.8")
    raw = tab.locator(line + ":not(.smooth)")
    assert each(raw, path) == before
    assert min(each(raw, "Number(getComputedStyle(e).opacity)")) >= 0.4
    smooth = each(tab.locator(line + ".smooth"), path)
    numbers = lambda d: [float(x) for x in re.findall(r"-?[\d.]+", d)]
    measured, drawn = numbers(before[0]), numbers(smooth[0])
    assert drawn[::2] == measured[::2]
    mean = mass = 0.0
    for y, drawn_y in zip(measured[1::2], drawn[1::2], strict=True):
        mean, mass = 0.8 * mean + 0.2 * y, 0.8 * mass + 0.2
        assert drawn_y == pytest.approx(mean / mass, abs=0.01)
    tab.locator("#smoothing").fill("0")
    assert tab.locator(line + ".smooth").count() == 0


def test_a_band_is_smoothed_with_its_line(browser, seeded):
    tab, ys = browser.new_page(), "(e.getAttribute('d').match(/[-\\d.]+/g) || []).map(Number)"
    tab.goto(seeded.as_uri())
    shown = lambda part: each(tab.locator(f"#rl_accuracy-{part}-1 > path"), ys)[-1]
    measured = shown("band")
    assert len(measured) == 80  # x and y of 20 steps, there and back
    tab.locator("#smoothing").fill("0.8")
    band, line = shown("band"), shown("raw")
    assert band[::2] == measured[::2] == line[::2] + line[::2][::-1]
    for edge in (slice(1, 40, 2), slice(79, 40, -2)):
        mean = mass = 0.0
        for y, drawn in zip(measured[edge], band[edge], strict=True):
            mean, mass = 0.8 * mean + 0.2 * y, 0.8 * mass + 0.2
            assert drawn == pytest.approx(mean / mass, abs=0.01)
    # The middle seed's slope is the mean one, so the smoothed line is the middle of its band.
    middle = [(a + b) / 2 for a, b in zip(band[1:40:2], band[79:40:-2], strict=True)]
    assert line[1::2] == pytest.approx(middle, abs=0.02)
    tab.locator("#smoothing").fill("0")
    assert shown("band") == measured
    tab.close()


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_wide_light_dark_and_accessible(visit, width, scheme):
    reason = "no axe-core: pip install -r requirements.txt"
    axe = pytest.importorskip("axe_playwright_python", reason=reason)
    tab = visit("#tree/pta/10/q1", width, scheme)
    tab.keyboard.press("o")
    choose(tab, shade="log_ratio")
    # Nothing makes the page scroll sideways.
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 300
    assert dark == (scheme == "dark")
    tab.add_script_tag(path=Path(axe.__file__).with_name("axe.min.js"))
    found = tab.evaluate("axe.run()")
    assert len(found["passes"]) > 15
    violations = [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found["violations"]]
    assert violations == []
