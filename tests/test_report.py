"""The page: what it holds, what it leaves out, that model text stays text, and that it works in a real browser.

The browser tests need Chromium and the playwright package; `.ci/run` installs the former, requirements.txt the latter.
"""
import html
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import eval as evaluation
import grpo
import report
import rollout_log
from data.toy import make_model, make_tokenizer
from model_utils import LOGGERS, check_common, print0, progress, shard_model
from run_folder import open_logger

HOSTILE = ["</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", "<!--data--><!--summary-->",
           "\u2028\u2029\u202eright to left\u0000\u001b[31m\u200b", "\ud800 alone", "&lt;b&gt; \\u003cb> `${1}` {{7*7}}",
           "<plan><plan></think><answer>", "javascript:window.hacked=1"]


def completion(plan="add a to b", think="so c = 4", answer="4", correct=True, advantage=0.5, **more):
    text = f"<plan> {plan} </plan> <think> {think} </think> <answer> \\boxed{{ {answer} }} </answer>"
    reward = {"total": 1.4, "outcome": float(correct), "plan": 0.25, "structure": 0.2, "length": 0.05}
    return {"text": text, "tokens": 12, "correct": correct, "well_formed": True, "truncated": False, "reward": reward,
            "advantage": advantage, **more}


def tree(step, name, completions, problem="a = 1 ; b = 3 ; c = a + b ; c ?"):
    """m plans of two CoTs each."""
    plans = [{"score": sum(c["correct"] for c in pair) / 2, "completions": pair}
             for pair in zip(completions[::2], completions[1::2])]
    return {"step": step, "id": name, "problem": problem, "answer": "4", "plans": [{**p, "completions": list(p["completions"])} for p in plans]}


def metric(step, slope=0.01):
    return {"step": step, "reward": 0.5 + slope * step, "accuracy": 0.4 + slope * step, "plan_score": 0.4, "entropy": 1 / step,
            "outcome_spread": 0.3, "completion_tokens": 40 + step % 3, "seconds": 2.0, "tokens_per_s": 900.0, "kl": math.nan,
            **({"eval_accuracy": 0.5} if step % 10 == 0 else {})}


def write(path, records, tail=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def per_token(text):
    words = re.findall(r"\s*\S+", text)
    return {"width": [len(w) for w in words] + [0], "surprise": [10 * i for i in range(len(words) + 1)],
            "log_ratio": [-50 + 10 * i for i in range(len(words) + 1)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two RL runs and two evaluations; the last question of `pta` is hostile."""
    root = tmp_path_factory.mktemp("runs") / "demo"
    for name, slope in (("grpo", 0.005), ("pta", 0.01)):
        write(root / name / "metrics.jsonl", [metric(step, slope) for step in range(1, 31)])
        (root / name / "run.json").write_text(json.dumps({"steps": 30, "beta": 0.5 * (name == "pta"), "lr": 1e-4, "out": name}))
        (root / name / "machine.json").write_text(json.dumps({"device": "2 x Test GPU", "torch": "2.0"}))
    shaded = completion(think="the plan is wrong, so I revise the plan : c = 4")
    shaded["per_token"] = per_token(shaded["text"])
    trees = [tree(10, "q1", [shaded, completion(answer="5", correct=False), completion(plan="c = 4 so the answer is 4"),
                             completion(answer="9", correct=False)]),
             tree(10, "q2", [completion(plan="only b", correct=False), completion(plan="only b", correct=False),
                             completion(correct=False), completion(plan="zebra")]),
             tree(20, "q1", [completion()] * 4),
             tree(20, "</option>" + HOSTILE[0], [completion(plan=h, think=h, well_formed=False) for h in HOSTILE], HOSTILE[1])]
    write(root / "pta" / "rollouts.jsonl", trees)
    write(root / "grpo" / "rollouts.jsonl", [tree(10, "q1", [completion()] * 2)])
    for name, right in (("eval_base", [0, 1, 0, 1]), ("eval_pta", [1, 1, 0, 1])):
        write(root / name / "records.jsonl", [
            {"benchmark": "data/toy", "id": f"t{i}", "problem": f"p{i} <b>", "answer": "4", "samples": [
                {"completion": HOSTILE[i], "answer": "4", "correct": bool(r), "tokens": 5, "well_formed": False, "truncated": False}] * 2}
            for i, r in enumerate(right)])
        (root / name / "summary.json").write_text(json.dumps({"settings": {"model": f"runs/demo/{name[5:]}/model"}}))
    return root


@pytest.fixture(scope="module")
def page(folder):
    report.build([str(folder)], folder / "report.html")
    return folder / "report.html"


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL).group(1))


def cells(page, row):
    """Texts of a table row, found by its head."""
    found = re.search(rf"<th scope=row>{re.escape(html.escape(row))}</th>(.*?)</tr>", page.read_text())
    return [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", found.group(1))]


# ---------------------------------------------------------------------------------------------------------------
# What the page holds

def test_the_page_holds_everything_and_asks_for_nothing(page):
    text, data = page.read_text(), data_of(page)
    assert [run["name"] for run in data["runs"]] == ["grpo", "pta"] and len(data["trees"]) == 5
    assert not re.search(r"""(?:\b(?:src|action)=|\bhref=(?!["']?(?:#|data:,))|url\((?!#)|@import|\bfetch\()""", text.split('id="data"')[0])
    for name in ("accuracy", "eval_accuracy", "plan_score", "outcome_spread", "entropy", "completion_tokens", "seconds"):
        assert f'role="img" aria-label="{name}: ' in text
    assert 'aria-label="kl: ' not in text  # never finite: nothing to draw
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert cells(page, "pta")[0] == "30 of 30, no final model yet"


def test_intervals_and_the_paired_comparison(page, folder):
    """0, 1, 0, 1 and 1, 1, 0, 1 right: means a half and three quarters, differences 1, 0, 0, 0."""
    base, pta = (report.read_jsonl(folder / name / "records.jsonl")[0] for name in ("eval_base", "eval_pta"))
    s, (row,) = evaluation.summarise(base), evaluation.compare(base, pta)["rows"]
    assert cells(page, "eval_base")[:3] == ["toy", f"50.0 % ({100 * s['ci_low']:.1f} % to {100 * s['ci_high']:.1f} %)", "4 × 2"]
    assert cells(page, "eval_pta − eval_base") == [
        "toy", "+25.0 points", f"{100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f}", f"{row['p']:.3f}", "4"]


def test_several_benchmarks(tmp_path):
    """Each benchmark by itself and their mean; questions are paired within a benchmark, though ids repeat."""
    def record(benchmark, name, right):
        return {"benchmark": benchmark, "id": name, "problem": f"{benchmark} {name}", "answer": "4", "samples": [
            {"completion": "4", "answer": "4", "correct": right, "tokens": 1, "well_formed": False, "truncated": False}] * 2}
    write(tmp_path / "a" / "records.jsonl", [record("x", "1", True), record("x", "2", True), record("y", "1", False), record("y", "2", True)])
    write(tmp_path / "b" / "records.jsonl", [record("x", "1", True), record("x", "2", False)])
    report.build([str(tmp_path)], tmp_path / "page.html")
    rows = re.findall(r"<th scope=row>a</th><td>(.*?)</td><td>(.*?) %", (tmp_path / "page.html").read_text())
    assert rows == [("x", "100.0"), ("y", "50.0"), ("mean", "75.0")]
    assert cells(tmp_path / "page.html", "b − a")[:2] == ["x", "-50.0 points"]
    assert [(q["problem"], len(q["runs"])) for q in data_of(tmp_path / "page.html")["questions"]] == [
        ("x 1", 2), ("x 2", 2), ("y 1", 1), ("y 2", 1)]


def test_only_settings_that_differ_are_listed(page):
    assert cells(page, "beta") == ["0.0", "0.5"]
    assert "<th scope=row>lr</th>" not in page.read_text() and "<th scope=row>out</th>" not in page.read_text()
    assert "2 x Test GPU" in page.read_text()


def test_flags_of_a_completion(page):
    first = next(t for t in data_of(page)["trees"] if t["id"] == "q1" and t["run"] == 1)["plans"]
    assert [c["revised"] for plan in first for c in plan["completions"]] == [True, False, False, False]
    assert [c["leaks"] for plan in first for c in plan["completions"]] == [False, False, True, False]


@pytest.mark.parametrize("think, revised", [
    ("The plan was wrong here.", True), ("I will change the first plan", True), ("Let me try another plan.", True),
    ("the plan is not wrong", False), ("following the plan, 3 + 4 = 7", False), ("this airplane is wrong", False),
    ("wrong sign; correct it. Plan done", False)])
def test_plan_revised(think, revised):
    assert report.plan_revised(think) is revised


def test_a_run_alone_finds_its_evaluation(folder):
    assert [run.name for run in report.find_runs([str(folder / "pta")])] == ["pta", "eval_pta"]
    assert [run.name for run in report.find_runs([str(folder / "grpo")])] == ["grpo"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for seed in ("seed0", "seed1"):
        write(tmp_path / seed / "pta" / "metrics.jsonl", [metric(1)])
    runs = report.find_runs([str(tmp_path / seed / "pta") for seed in ("seed0", "seed1")])
    assert [run.name for run in runs] == ["seed0/pta", "seed1/pta"]


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no folder .*nowhere; give a run folder"):
        report.find_runs([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="no metrics.jsonl or records.jsonl in .*; give the --out folder"):
        report.find_runs([str(tmp_path)])


# ---------------------------------------------------------------------------------------------------------------
# Runs that go on, were cut off, or are large

def test_a_run_cut_off_in_mid_write(tmp_path):
    write(tmp_path / "pta" / "metrics.jsonl", [metric(1), metric(2), {**metric(2), "accuracy": 0.9}], '{"step": 3, "rew')
    write(tmp_path / "pta" / "rollouts.jsonl", [tree(1, "q", [completion()] * 2)], '{"step": 1, "id": "caf\xc3')
    (tmp_path / "pta" / "run.json").write_text('{"steps": 3')
    report.build([str(tmp_path / "pta")], tmp_path / "page.html")
    assert "2 lines were cut off or damaged" in (tmp_path / "page.html").read_text()
    assert len(data_of(tmp_path / "page.html")["trees"]) == 1
    assert cells(tmp_path / "page.html", "pta")[0] == "2 of ?, no final model yet"
    assert cells(tmp_path / "page.html", "pta")[2].startswith("90.0 %")  # of a step that ran twice, the second counts


def test_an_empty_run_gives_a_page(tmp_path):
    write(tmp_path / "pta" / "metrics.jsonl", [])
    assert report.build([str(tmp_path)], tmp_path / "page.html")["trees"] == 0


def test_watch_waits_for_the_run_and_rebuilds(tmp_path, monkeypatch, capsys):
    sizes = []

    def sleep(seconds):
        page = tmp_path / "page.html"
        sizes.append(page.read_text().count("step 2") if page.exists() else None)
        if len(sizes) == 4:
            raise KeyboardInterrupt
        if len(sizes) < 3:
            write(tmp_path / "pta" / "metrics.jsonl", [metric(step) for step in range(1, len(sizes) + 1)])
    monkeypatch.setattr(report.time, "sleep", sleep)
    (tmp_path / "pta").mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "pta"), "--out", str(tmp_path / "page.html"), "--watch", "5"])
    report.main()
    out = capsys.readouterr().out
    assert out.count("waiting") == 1 and out.count("built in") == 2  # the fourth look found nothing new
    assert sizes[:2] == [None, 0] and sizes[2] > 0


def test_large_runs_are_sampled_evenly_and_say_so(tmp_path):
    write(tmp_path / "pta" / "metrics.jsonl", [metric(step) for step in range(1, 51)])
    write(tmp_path / "pta" / "rollouts.jsonl", [tree(step, f"q{k}", [completion(think="x " * 500)] * 4)
                                                for step in range(1, 51) for k in range(20)])
    whole = (tmp_path / "pta" / "rollouts.jsonl").stat().st_size
    result = report.build([str(tmp_path)], tmp_path / "page.html", page_mb=whole / 10 / 1e6)
    steps = sorted({t["step"] for t in data_of(tmp_path / "page.html")["trees"]})
    assert result["bytes"] < whole / 10 + 400_000  # curves and script take the rest
    assert steps[0] == 1 and steps[-1] == 50 and max(b - a for a, b in zip(steps, steps[1:])) <= 4
    assert 50 < result["trees"] < 100
    assert f"{result['trees']} of 1,000 logged trees, from {len(steps)} of 50 logged steps" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("count, n, chosen", [(5, 10, [0, 1, 2, 3, 4]), (10, 2, [0, 9]), (7, 3, [0, 3, 6]), (3, 1, [0]), (0, 4, [])])
def test_spread(count, n, chosen):
    assert report.spread(count, n) == chosen


def test_pictures(folder, tmp_path):
    report.pictures([str(folder)], tmp_path / "docs")
    assert (tmp_path / "docs/tree.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in (tmp_path / "docs/curves.svg").read_text()


# ---------------------------------------------------------------------------------------------------------------
# Model text stays text

def test_embedded_json_reads_back_and_holds_no_markup(page):
    assert json.loads(report.embed(HOSTILE)) == HOSTILE
    assert report.embed(HOSTILE).isascii() and "<" not in report.embed(HOSTILE)
    text = page.read_text()
    assert text.count("</script>") == 2 and "<img" not in text and "onerror='window" not in text.split('id="data"')[0]


@pytest.fixture(scope="module")
def not_finite(tmp_path_factory):
    """The page of a run whose log holds NaN and Infinity wherever it holds a number."""
    root = tmp_path_factory.mktemp("not_finite")
    bad = completion(advantage=math.nan, per_token=None)
    bad["reward"] = {name: math.inf for name in bad["reward"]}
    bad["per_token"] = per_token(bad["text"])
    bad["per_token"]["surprise"] = [math.nan, 50, -math.inf] + bad["per_token"]["surprise"][3:]
    record = tree(1, "bad", [bad] * 2)
    record["plans"][0]["score"] = math.nan
    write(root / "pta/metrics.jsonl", [metric(1)])
    write(root / "pta/rollouts.jsonl", [record, tree(1, "good", [completion()] * 2)])
    report.build([str(root)], root / "page.html")
    return root / "page.html"


def test_embedded_json_is_strict(not_finite):
    def refuse(name):
        raise ValueError(name)
    embedded = re.search(r'id="data">(.*?)</script>', not_finite.read_text())[1]
    data = json.loads(embedded, parse_constant=refuse)
    bad = data["trees"][0]["plans"][0]
    assert bad["score"] is None and bad["completions"][0]["reward"]["total"] is None
    assert bad["completions"][0]["per_token"]["surprise"][:3] == [None, 50, None]


def test_names_and_settings_are_escaped(tmp_path):
    run = tmp_path / "<b>run&"
    write(run / "metrics.jsonl", [metric(1), metric(2)])
    (run / "run.json").write_text(json.dumps({"steps": HOSTILE[1]}))
    report.build([str(run)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<b>run&" not in text and "<img" not in text and "&lt;b&gt;run&amp;" in text


# ---------------------------------------------------------------------------------------------------------------
# What grpo.py logs for it

# Mask and order of rows in a micro-batch are what could go wrong: the two completions differ in length.
def test_rollout_records_carry_what_the_update_saw_of_each_token():
    tokenizer = make_tokenizer()
    model, reference = make_model(tokenizer, width=16, layers=1, heads=2), make_model(tokenizer, seed=1, width=16, layers=1, heads=2)
    for m in (model, reference):
        shard_model(m.eval())
    config = grpo.Config(plans=1, cots=2, questions=1)
    prompts, stop = [tokenizer.encode("A = 4 ; A ?")], tokenizer.eos_token_id
    rows = [grpo.Row(0, [9], ids=tokenizer.encode(text) + [stop], logprobs=[-1.0 - i] * (len(tokenizer.encode(text)) + 1), stopped=True)
            for i, text in enumerate(("<plan> A needs nothing </plan>", "<plan> A </plan>"))]
    micros = grpo.make_micros(rows, prompts, [1.0, -1.0], config, torch.device("cpu"))
    for micro, logprobs in zip(micros, grpo.score(reference, micros, 1.0)):
        micro.ref_logprobs = logprobs
    with torch.no_grad():
        before = [model.token_logprobs(micro.packed)[1] for micro in micros]
    grpo.update(model, grpo.make_optimizer(model, 1e-3, 0.0), micros, config, 1e-3)
    rollout_log.note_tokens(micros)
    for micro, entropy in zip(micros, before):
        for at, row in enumerate(micro.rows):
            mask = micro.packed.mask[at]
            reference_logprobs = micro.ref_logprobs[at][mask].tolist()
            assert row.entropy == pytest.approx(entropy[at][mask].tolist(), abs=1e-5)
            assert row.log_ratio == pytest.approx([a - b for a, b in zip(row.logprobs, reference_logprobs)], abs=1e-5)

    texts = grpo.completion_texts(tokenizer, [row.ids for row in rows], [stop])
    group = grpo.Group({"id": "q", "problem": "A ?", "answer": "4"}, rows, texts, [True, False], [False, False])
    rewards = grpo.group_rewards([group], config)
    plain = rollout_log.rollout_record(3, group, rewards, torch.tensor([[1.0, -1.0]]), 0)
    assert "per_token" not in plain["plans"][0]["completions"][0]
    shaded = rollout_log.rollout_record(3, group, rewards, torch.tensor([[1.0, -1.0]]), 0, tokenizer)
    for row, text, c in zip(rows, texts, shaded["plans"][0]["completions"]):
        at, pieces = 0, []
        for width in c["per_token"]["width"]:
            pieces.append(text[at:at + width].strip())
            at += width
        assert pieces == [tokenizer.decode([token]) for token in row.ids[:-1]] + [""]  # the stop token stands for no text
        assert c["per_token"]["surprise"] == [round(-100 * x) for x in row.logprobs]
        assert c["per_token"]["entropy"] == [round(100 * x) for x in row.entropy]
        assert len(c["per_token"]["log_ratio"]) == len(row.ids)


class Letters:
    """A tokenizer whose tokens are bytes: é is two of them, which do not decode alone."""
    def batch_decode(self, batch):
        return [bytes(ids).decode(errors="replace") for ids in batch]


def test_token_widths_cover_text_where_characters_are_several_tokens():
    text = "café au\n\nlait"
    row = grpo.Row(0, 99, ids=list(text.encode()), logprobs=[0.0] * len(text.encode()))
    widths = rollout_log.token_record(Letters(), row, text)["width"]
    assert sum(widths) == len(text) and len(widths) == len(row.ids)
    assert widths[3:5] == [0, 0] and widths[5:7] == [0, 3]  # the two halves of é; the blank, then é, blank and a


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
    with pytest.raises(SystemExit, match="--log wandb wants the package wandb: run `pip install wandb`, or leave --log out"):
        check_common(grpo.Config(model="x", log="wandb"), "y")
    with pytest.raises(SystemExit, match="--log is tensorboard, wandb or trackio, not 'mlflow'"):
        check_common(grpo.Config(model="x", log="mlflow"), "y")


def test_bars_show_on_a_terminal_of_rank_0_alone(monkeypatch):
    terminal = types.SimpleNamespace(isatty=lambda: True, write=lambda text: len(text), flush=lambda: None)
    assert progress(3, 0, "x").disable  # pytest's output is no terminal
    monkeypatch.setattr(sys, "stderr", terminal)
    assert not progress(3, 0, "x").disable
    monkeypatch.setenv("RANK", "1")
    assert progress(3, 0, "x").disable


def test_print0_prints_a_line(capsys):
    print0("a", 1)
    assert capsys.readouterr().out == "a 1\n"


# ---------------------------------------------------------------------------------------------------------------
# In a browser

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on the path; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page):
    """visit(hash, width, scheme) -> the open page; at the end nothing may have gone wrong or been fetched."""
    problems, tabs = [], []

    def open_page(link="", width=1280, scheme="light"):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tabs.append(tab)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append("a dialog"))
        tab.on("request", lambda request: None if request.url.startswith(page.as_uri()) or request.url.startswith("data:")
               else problems.append(request.url))
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
    return tab.inner_text(f"#question option:nth-child({int(tab.input_value('#question')) + 1})")


def test_a_tree_opens_by_click(visit):
    tab = visit()
    choose(tab, step="10")
    assert tab.locator("#tree .card").count() == 2
    assert "score 0.50, plan reward 0.25" in tab.inner_text("#tree .card >> nth=0")
    first = tab.locator("#tree details >> nth=0")
    assert "12 tokens · advantage +0.50" in first.inner_text()
    assert "outcome 1.00 + plan 0.25 × 0.5 + structure 0.20 + length 0.05" in first.inner_text()
    assert first.locator(".block").count() == 0  # made when it is opened
    first.locator("summary").click()
    first.locator(".block >> nth=2").wait_for()
    assert first.locator(".block b").all_inner_texts() == ["plan", "think", "answer"]
    assert first.locator(".block .text").all_inner_texts()[2] == "\\boxed{ 4 }"


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
    assert tab.locator("#tree details").evaluate_all("all => all.map(d => d.open)") == [False, True, False, False]
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
    assert first.locator(".text span").count() == 0
    choose(tab, shade="log_ratio")
    first.locator(".text span").first.wait_for()
    assert [t.strip() for t in first.locator(".text").all_inner_texts()] == [t.strip() for t in plain]
    assert "blue: less likely" in tab.inner_text("#legend")
    colours = first.locator(".text span").evaluate_all("all => all.map(s => [s.title, getComputedStyle(s).backgroundColor])")
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
    assert "</script><script>window.hacked = 1</script>" in said and "<img src=x" in said and "{{7*7}}" in said
    assert "[U+202E]right to left[U+0000][U+001B][31m[U+200B]" in said  # nothing hidden, nothing turned round
    assert tab.locator("#tree script, #tree img, #tree style, #tree a:not([href^='#tree/'])").count() == 0
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
    titles = tab.locator("#tree .text span").evaluate_all("all => all.map(span => span.title)")
    tab.close()
    assert titles[:2] == ["0.50", "not finite"] and not problems  # <plan>, the first, is not shown


def test_before_and_after_show_the_same_question(visit):
    tab = visit()
    assert tab.inner_text("#held-out option >> nth=0") == "t0: 0/2 → 2/2"
    assert tab.locator("#answers h3").all_inner_texts() == ["eval_base: 0 of 2 right", "eval_pta: 2 of 2 right"]
    choose(tab, change="gained")
    assert tab.inner_text("#before-status") == "1 of 4 questions."
    choose(tab, change="lost")
    assert tab.inner_text("#before-status") == "0 of 4 questions." and tab.inner_text("#answers") == ""


def test_smoothing_never_hides_the_measured_line(visit):
    tab = visit()
    line = "g[id^='rl_accuracy-raw-'] > path"
    before = tab.locator(line).evaluate_all("all => all.map(p => p.getAttribute('d'))")
    assert len(before) == 2 and before[0].count("L") == 29  # every one of the 30 steps
    tab.locator("#smoothing").fill("0.8")
    raw = tab.locator(line + ":not(.smooth)")
    assert raw.evaluate_all("all => all.map(p => p.getAttribute('d'))") == before
    assert all(opacity >= 0.4 for opacity in raw.evaluate_all("all => all.map(p => Number(getComputedStyle(p).opacity))"))
    smooth = tab.locator(line + ".smooth").evaluate_all("all => all.map(p => p.getAttribute('d'))")
    numbers = lambda d: [float(x) for x in re.findall(r"-?[\d.]+", d)]
    xs, ys = numbers(before[0])[::2], numbers(before[0])[1::2]
    mean = mass = 0.0
    for x, y, (sx, sy) in zip(xs, ys, zip(numbers(smooth[0])[::2], numbers(smooth[0])[1::2])):
        mean, mass = 0.8 * mean + 0.2 * y, 0.8 * mass + 0.2
        assert sx == x and sy == pytest.approx(mean / mass, abs=0.01)
    tab.locator("#smoothing").fill("0")
    assert tab.locator(line + ".smooth").count() == 0


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_wide_light_dark_and_accessible(visit, width, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="no axe-core: pip install -r requirements.txt")
    tab = visit("#tree/pta/10/q1", width, scheme)
    tab.keyboard.press("o")
    choose(tab, shade="log_ratio")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing makes the page scroll sideways
    dark = sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])) < 300
    assert dark == (scheme == "dark")
    tab.add_script_tag(path=Path(axe.__file__).with_name("axe.min.js"))
    found = tab.evaluate("axe.run()")
    assert len(found["passes"]) > 15
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in found["violations"]] == []
