"""The walkthrough, the labs and the figures: pages and pictures are what their data give."""

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET

import pytest

import grpo
import sft
from conftest import ROOT
from docs import figures, labs, walkthrough
from plumbing.flags import parse_config

BASE = str(ROOT / "data/toy_base")

# --------------------------------------------------------------------------------------------------
# The walkthrough


def test_the_walkthrough_is_what_its_log_gives():
    data = json.loads(walkthrough.DATA.read_text())
    said = "run python -m docs.walkthrough: the page is no longer what the code makes of its log"
    assert walkthrough.page(data) == walkthrough.PAGE.read_text(), said


@pytest.mark.parametrize("where", ["advantage", "reward", "score", "correct", "tokens"])
def test_a_log_that_disagrees_with_the_code_ends_the_walkthrough(where):
    data = json.loads(walkthrough.DATA.read_text())
    plan = data["record"]["plans"][0]
    completion = plan["completions"][0]
    if where == "score":
        plan["score"] += 0.1
    elif where == "reward":
        completion["reward"]["length"] += 0.001
    elif where == "correct":
        completion["correct"] = not completion["correct"]
    elif where == "tokens":
        data["tokens"] += 1
    else:
        completion["advantage"] += 0.001
    with pytest.raises(SystemExit, match="here, .* in the log"):
        walkthrough.page(data)


def test_a_walkthrough_of_a_fresh_run(tmp_path, monkeypatch):
    """grpo.py still logs what the walkthrough keeps: here without plans, which the base lacks."""
    flags = f"--model {BASE} --data toy --limit 40 --questions 2 --plans 3 --lr 1e-3 --eval_every 0"
    flags += " --max_plan_tokens 0 --cots 1 --max_completion_tokens 30 --save_every 0"
    for steps in (1, 2):
        words = f"grpo.py {flags} --steps {steps} --out {tmp_path}/{steps}"
        monkeypatch.setattr(sys, "argv", words.split())
        grpo.main()
    data = walkthrough.keep(tmp_path / "1", tmp_path / "2")
    before, after = data["logprobs"]["before"], data["logprobs"]["after"]
    assert [len(row) for row in before] == [len(row) for row in data["words"]] and before != after
    assert data["metrics"]["step"] == 2
    with pytest.raises(SystemExit, match="did not sample"):
        walkthrough.keep(tmp_path / "2", tmp_path / "2")


def flags_of(text: str, script: str) -> list[str]:
    """The flags after the name of a script in shell text."""
    whole = text.replace("\\\n", " ")
    (line,) = [line for line in whole.splitlines() if f"python {script} " in line]
    return re.sub(r'"?\$(steps|1)"?', "1", line).partition(script)[2].split()


def test_the_commands_that_the_pages_show_have_flags_that_exist():
    """And the step that was worked out ran with the flags that its page shows."""
    start = (ROOT / "docs/start.sh").read_text()
    config = parse_config(sft.Config, flags_of(start, "sft.py"))
    assert (config.epochs, config.batch_size, config.limit) == (2.0, 64, 0)
    demo = (ROOT / "recipes/demo.sh").read_text()  # the same cold start
    assert "sft=(--epochs 2 --lr 2e-3 --batch_size 64)" in demo and config.lr == 2e-3
    page = walkthrough.PAGE.read_text()
    ran = json.loads(walkthrough.DATA.read_text())["config"]
    config = parse_config(grpo.Config, flags_of(page, "grpo.py"))
    assert {name: getattr(config, name) for name in ran} == ran
    assert f"for steps in {walkthrough_step() - 1} {walkthrough_step()}; do" in page


def walkthrough_step() -> int:
    return json.loads(walkthrough.DATA.read_text())["metrics"]["step"]


# --------------------------------------------------------------------------------------------------
# The labs


def test_the_labs_tables_are_those_of_their_runs():
    text, found = labs.PAGE.read_text(), json.loads(labs.FIGURES.read_text())
    said = "run python -m docs.labs: the tables are no longer what docs/labs.json gives"
    assert labs.fill(text, found) == text, said
    _, function, commands = labs.blocks(text)
    assert found.keys() == commands.keys() == set(re.findall(r"figures: (\w+) -->", text))
    base = re.sub(r"\\\n|\"\S+\"", " ", function).partition("grpo.py")[2].partition("}")[0].split()
    for name, command in commands.items():  # the flags exist, and each lab changes one setting
        flags = command.split()[2:]
        config = parse_config(grpo.Config, [w for w in base if w != "--out"] + flags)
        assert len(flags) == 2 * (name != "base") and config.steps == len(found[name]["accuracy"])


def test_a_labs_table_by_hand(monkeypatch):
    """Means of the first and last three of five steps, of which some have no figure."""
    monkeypatch.setattr(labs, "ENDS", 3)
    monkeypatch.setattr(labs, "METRICS", ["accuracy", "kl"])
    none = [None] * 5
    found = {"base": {"accuracy": [0.0, 0.3, 0.6, 0.6, 0.9], "kl": none}}
    found["x"] = {"accuracy": [1.0] * 5, "kl": [0.0, 0.0, None, 200.0, 600.0]}
    head, _, *rows = labs.table(found, "x").splitlines()
    places = "base, steps 1 to 3 | base, steps 3 to 5 | x, steps 1 to 3 | x, steps 3 to 5"
    assert head == f"| metric | {places} |"
    assert rows == ["| `accuracy` | 0.3 | 0.7 | 1 | 1 |", "| `kl` | – | – | 0 | 400 |"]


# --------------------------------------------------------------------------------------------------
# The figures


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["step", "group", "loss_ratio", "lab_curves"])
def test_a_figure_is_readable_in_both_schemes(name):
    svg = (ROOT / f"docs/{name}.svg").read_text()
    root = ET.fromstring(svg)
    style = root.find("{*}style").text
    assert root.get("role") == "img" and len(root.find("{*}title").text) > 40
    outside = svg.replace(style, "")
    assert set(re.findall(r"#[0-9a-f]{6}\b", outside)) == set()  # no colour but the scheme's
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    for scheme, ground in ((light, "#ffffff"), (dark, "#0d1117")):
        colours = dict(re.findall(r"--(\w+):(#\w{6})", scheme))
        assert set(re.findall(r"var\(--(\w+)\)", outside)) <= colours.keys()
        for colour in colours.keys() - {"box"}:
            assert contrast(colours[colour], ground) >= 4.5
            assert contrast(colours[colour], colours["box"]) >= 4


def test_figures_show_the_functions_and_the_figures_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    for name in ("walkthrough.json", "labs.json"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    figures.main()
    for name in ("step", "group", "loss_ratio", "lab_curves"):
        folders = tmp_path, ROOT / "docs"
        new, old = (ET.parse(folder / f"{name}.svg").getroot() for folder in folders)
        said = f"run python -m docs.figures: {name}.svg is no longer what the code draws"
        assert "".join(new.itertext()) == "".join(old.itertext()), said
    for function, _, _ in figures.BOXES:
        assert callable(getattr(grpo, function))
    ratios, loss, alive = figures.loss_curve(1.0)
    ends = [(round(r, 2), a) for r, a, b in zip(ratios, alive, alive[1:]) if a != b]
    assert ends == [(1.2, True)] and loss[-1] == pytest.approx(-1.2)
    _, loss, alive = figures.loss_curve(-1.0)
    assert not any(alive[:158]) and all(alive[161:]) and loss[0] == pytest.approx(0.8)


def test_every_link_of_the_pages_leads_somewhere():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "docs/variants/README.md", ROOT / "README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
