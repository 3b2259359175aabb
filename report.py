"""One HTML page of a run or several: figures with intervals, curves, plan trees, the same question before and after.

    python report.py runs/demo --out report.html             every run and evaluation in the folder
    python report.py runs/demo/pta runs/demo/grpo --watch 30  two runs, rebuilt while they go on
    python report.py runs/demo --pictures docs               also docs/curves.svg and docs/tree.png

A RUN is a folder with metrics.jsonl (sft.py, grpo.py), with records.jsonl (eval.py), or a folder of such folders;
evaluations beside a training run are shown with it. The page opens from disk and needs no network. All that a model
wrote is embedded as JSON without a `<` and put on the page as text nodes: markup in it does nothing.
"""
import argparse
import html
import io
import json
import math
import re
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from eval import compare, summarise
from rewards import parse_completion, plan_leaks
from run_folder import make_folder

GROUPS = {  # heading -> metric -> what it means
    "Accuracy and reward": {
        "accuracy": "right answers among rollouts", "eval_accuracy": "right answers among held-out problems, greedy",
        "plan_score": "right CoTs of a plan, mean over closed plans", "reward": "mean total reward"},
    "Reward terms": {"outcome": "", "plan": "before the factor beta: always 1/m in the mean", "structure": "",
                     "length_reward": "", "overlong": "DAPO's penalty"},
    "Spread of each term within a group: what drives the advantages": {
        "outcome_spread": "", "plan_spread": "", "structure_spread": "", "length_reward_spread": "",
        "overlong_spread": ""},
    "Policy": {"entropy": "nats a token", "kl": "to the reference, k3, a token", "clip_frac": "tokens cut off by the clip",
               "grad_norm": "before clipping", "zero_variance": "groups that teach nothing"},
    "Length": {"completion_tokens": "plan and CoT", "plan_tokens": "plans that closed", "format_rate": "well-formed",
               "truncated": "completions cut at their limit"},
    "Speed": {"tokens_per_s": "completion tokens a second, whole step", "seconds": "a step", "seconds_rollout": "",
              "seconds_reward": "", "seconds_update": ""},
}
COLOURS = ["#1f5fbf", "#b3431e", "#1f7a3d", "#7a3fa8", "#8a6a00", "#00757a"]  # of the pictures; the page has its own
MAX_POINTS, MAX_TEXT = 2000, 20_000  # of a curve; characters of one completion


@dataclass
class Run:
    """A training run or an evaluation, read from its folder."""
    name: str
    folder: Path
    settings: dict
    metrics: list[dict] = field(default_factory=list)  # of a training run, one a step
    records: list[dict] = field(default_factory=list)  # of an evaluation
    unread: int = 0  # lines that were cut off or damaged


def points(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of a metric."""
    rows = [(m["step"], m[key]) for m in run.metrics if isinstance(m.get(key), (int, float)) and math.isfinite(m[key])]
    return [x for x, _ in rows], [y for _, y in rows]


def column(run: Run, key: str) -> list[float]:
    return points(run, key)[1]


# ---------------------------------------------------------------------------------------------------------------
# Reading: a file may be missing, still growing, or cut off in mid-write

def read_jsonl(path: Path) -> tuple[list[dict], int]:
    """The objects of a JSONL file and the number of lines that hold none."""
    records, unread = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # UnicodeDecodeError included
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            unread += 1
    return records, unread


def read_json(path: Path) -> dict:
    """An object, or {} where the file is missing or half written."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def settings_of(folder: Path) -> dict:
    """A run's settings; evaluations may hold them in their summary only."""
    return read_json(folder / "run.json") or read_json(folder / "summary.json").get("settings", {})


def find_runs(paths: list[str]) -> list[Run]:
    """The runs in the given folders, each once, named by as much of their path as tells them apart."""
    def is_run(folder: Path) -> bool:
        return (folder / "metrics.jsonl").exists() or (folder / "records.jsonl").exists()

    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise SystemExit(f"error: no folder {path}; give a run folder such as runs/demo or runs/demo/pta")
        if is_run(path):  # its evaluations often lie beside it
            beside = [f for f in sorted(path.resolve().parent.iterdir()) if (f / "records.jsonl").exists()]
            found += [path, *(f for f in beside if Path(settings_of(f).get("model", "")).parent.name == path.resolve().name)]
        else:
            inner = [folder for folder in path.iterdir() if folder.is_dir() and is_run(folder)]
            found += sorted(inner, key=lambda f: min(x.stat().st_mtime for x in f.glob("*.jsonl")))  # as they were made
    folders = list({folder.resolve(): folder for folder in found}.values())
    if not folders:
        raise SystemExit(f"error: no metrics.jsonl or records.jsonl in {', '.join(paths)}; give the --out folder of "
                         "grpo.py, sft.py or eval.py")
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names):
        full = folder.resolve()
        run = Run(name if names.count(name) == 1 else f"{full.parent.name}/{name}", folder, settings_of(folder))
        run.metrics, bad_metrics = read_jsonl(folder / "metrics.jsonl")
        run.metrics = list({m["step"]: m for m in run.metrics if "step" in m}.values())  # a step run again counts once
        run.records, bad_records = read_jsonl(folder / "records.jsonl")
        run.records = [r for r in run.records if r.get("samples")]
        run.records = [r for r in run.records if len(r["samples"]) == len(run.records[0]["samples"])]
        run.unread = bad_metrics + bad_records
        runs.append(run)
    return runs


def spread(count: int, n: int) -> list[int]:
    """At most n of 0..count-1, evenly spread, first and last among them."""
    n = min(n, count)
    return [round(i * (count - 1) / max(1, n - 1)) for i in range(n)]


def pick_trees(path: Path, budget: int) -> tuple[list[dict], dict]:
    """Question records of rollouts.jsonl of about `budget` bytes, and what there was: steps, trees, unread lines.

    All of them if they fit; else some questions of steps that are spread evenly over the run. The file is read line
    by line: it may be larger than memory.
    """
    where: dict[int, list[tuple[int, int]]] = {}  # step -> (offset, length) of its lines
    at, unread = 0, 0
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n") and (match := re.match(rb'\s*\{"step": ?(\d+)', line)):
                    where.setdefault(int(match.group(1)), []).append((at, len(line)))
                else:
                    unread += 1
                at += len(line)
    total = sum(map(len, where.values()))
    fits = int(total * min(1.0, budget / max(1, at)))
    # Several questions of fewer steps show more than one question of each.
    a_step = max(map(len, where.values()), default=0) if fits == total else max(4, math.ceil(fits / len(where)))
    steps = spread(len(where), len(where) if fits == total else max(1, fits // a_step))
    steps = [lines for i, (_, lines) in enumerate(sorted(where.items())) if i in set(steps)]
    chosen = [lines[k] for lines in steps for k in spread(len(lines), a_step)]
    records, used = [], 0
    if chosen:
        with open(path, "rb") as file:
            for offset, length in chosen:
                used += length
                if used > 1.2 * budget and records:  # lengths differ: what was chosen may hold more than its share
                    break
                file.seek(offset)
                try:
                    records.append(json.loads(file.read(length)))
                except ValueError:
                    unread += 1
    return records, {"steps": len(where), "trees": total, "unread": unread}


# ---------------------------------------------------------------------------------------------------------------
# Plan trees and the before/after view

# A think block that says so; wordings, not a judgement. "The plan is not wrong" is no revision.
REVISED = re.compile(
    r"\b(?:revis|adjust|chang|correct|fix|amend|abandon|discard|replac|rethink|updat)\w*\s+(?:\w+\s+){0,2}?plan\b|"
    r"\bplan\s+(?:(?!not\b)\w+\s+){0,3}?(?:wrong|incorrect|mistaken|flawed|incomplete|fails?|cannot work)\b|"
    r"\b(?:different|new|better|another)\s+plan\b", re.IGNORECASE)


def plan_revised(think: str) -> bool:
    """Whether the think block says that the plan is wrong or changes."""
    return REVISED.search(think) is not None


def page_tree(record: dict, run: int) -> dict:
    """A question record as the page shows it: flags added, very long texts cut."""
    plans = []
    for plan in record["plans"]:
        completions = []
        for completion in plan["completions"]:
            parsed = parse_completion(completion["text"])
            completions.append({**completion, "text": completion["text"][:MAX_TEXT],
                                "cut": max(0, len(completion["text"]) - MAX_TEXT),
                                "leaks": bool(parsed and plan_leaks(parsed.plan, record["answer"])),
                                "revised": bool(parsed and plan_revised(parsed.think))})
        plans.append({"score": plan["score"], "completions": completions})
    return {"run": run, **{key: record[key] for key in ("step", "id", "answer")},
            "problem": record["problem"][:MAX_TEXT], "plans": plans}


def benchmark(record: dict) -> str:
    """The data set of an eval record."""
    return record.get("benchmark", "")


def before_after(evals: list[Run], budget: int, samples: int = 2) -> tuple[list[dict], int]:
    """Questions with the first samples of all evaluations of their benchmark, in about `budget` bytes; and their number."""
    questions = []
    for name in dict.fromkeys(benchmark(record) for run in evals for record in run.records):
        by_id = [{(r["id"], r["problem"]): r for r in run.records if benchmark(r) == name} for run in evals]
        taken = [i for i, records in enumerate(by_id) if records]
        for key in [key for key in by_id[taken[0]] if all(key in by_id[i] for i in taken)]:
            questions.append({"id": key[0], "problem": key[1][:MAX_TEXT], "answer": by_id[taken[0]][key]["answer"], "runs": [
                {"eval": i, "right": sum(s["correct"] for s in by_id[i][key]["samples"]), "n": len(by_id[i][key]["samples"]),
                 "samples": [{"text": s["completion"][:MAX_TEXT], "correct": s["correct"], "tokens": s["tokens"],
                              "cut": max(0, len(s["completion"]) - MAX_TEXT)} for s in by_id[i][key]["samples"][:samples]]}
                for i in taken]})
    size = len(json.dumps([questions[i] for i in spread(len(questions), 50)])) / max(1, min(50, len(questions)))
    return [questions[i] for i in spread(len(questions), int(budget / max(1, size)))], len(questions)


# ---------------------------------------------------------------------------------------------------------------
# Tables

def table(title: str, head: list[str], rows: list[list], note: str = "") -> str:
    """An HTML table; every cell is escaped."""
    cells = "".join(f"<tr><th scope=row>{html.escape(str(first))}</th>"
                    + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in rest) + "</tr>\n" for first, *rest in rows)
    columns = "".join(f"<th scope=col>{html.escape(cell)}" for cell in head)
    return (f'<h3>{html.escape(title)}</h3>\n<div class=scroll tabindex=0 role=region aria-label="{html.escape(title)}">'
            f"<table><thead><tr>{columns}</thead><tbody>{cells}</tbody></table></div>\n"
            + (f"<p class=note>{html.escape(note)}</p>\n" if note else ""))


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def with_interval(values: list[float]) -> str:
    """Mean of the values of some steps with a percentile bootstrap 95 % interval."""
    if not values:
        return "–"
    means = np.random.default_rng(0).choice(values, (4000, len(values))).mean(1)
    return f"{percent(np.mean(values))} ({percent(np.quantile(means, 0.025))} to {percent(np.quantile(means, 0.975))})"


def summary_tables(training: list[Run], evals: list[Run]) -> str:
    """Evaluations with intervals and paired differences, training runs, settings that differ, machines."""
    parts = []
    if evals:
        rows = []
        for run in evals:
            summary = summarise(run.records)
            for name, s in {**summary.get("benchmarks", {}), "": summary}.items():
                rows.append([run.name, Path(name or ("mean" if "benchmarks" in summary else benchmark(run.records[0]))).name,
                             f"{percent(s['accuracy'])} ({percent(s['ci_low'])} to {percent(s['ci_high'])})",
                             f"{s['n_problems']} × {s['n_samples']}", percent(s["maj_at_n"]), f"{s['mean_length']:.1f}",
                             percent(s["format_rate"]), percent(s["truncation_rate"]),
                             ", ".join(f"{k}: {percent(v)}" for k, v in s["pass_at_k"].items())])
        parts.append(table("Held-out problems", [
            "evaluation", "benchmark", "accuracy (95 % interval)", "problems × samples", "majority", "tokens", "well-formed",
            "truncated", "pass@k"], rows, "Intervals speak of problems like these: eval.py bootstraps over problems and samples."))
        rows, notes = [], []
        for j, after in enumerate(evals):
            for before in evals[:j]:
                try:
                    paired = compare(before.records, after.records)
                except SystemExit:  # no problem in common
                    continue
                notes += paired["warnings"]
                rows += [[f"{after.name} − {before.name}", Path(row["benchmark"]).name, f"{100 * row['delta']:+.1f} points",
                          f"{100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f}",
                          f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001", row["n_problems"]] for row in paired["rows"]]
        if rows:
            parts.append(table("Paired comparison", ["pair", "benchmark", "difference in accuracy", "95 % interval", "p",
                                                     "shared problems"], rows,
                               "The same problems under both; p by random sign flips. " + "; ".join(dict.fromkeys(notes))))
        elif len(evals) > 1:
            parts.append("<p>The evaluations share no problem: run eval.py on the same --data to compare them.</p>")
    rl = [run for run in training if column(run, "reward")]
    if rl:
        rows = []
        for run in rl:
            tail = slice(-max(1, len(run.metrics) // 10), None)
            held_out = column(run, "eval_accuracy")
            rows.append([run.name, f"{run.metrics[-1]['step']} of {run.settings.get('steps', '?')}"
                         + ("" if (run.folder / "model").exists() else ", no final model yet"),
                         with_interval(column(run, "accuracy")[:max(1, len(run.metrics) // 10)]),
                         with_interval(column(run, "accuracy")[tail]), with_interval(column(run, "plan_score")[tail]),
                         percent(held_out[-1]) if held_out else "–", f"{np.mean(column(run, 'completion_tokens')[tail]):.1f}",
                         f"{np.mean(column(run, 'seconds')):.1f}", f"{np.mean(column(run, 'tokens_per_s')):.0f}"])
        parts.append(table("Reinforcement learning", [
            "run", "steps", "accuracy, first tenth of steps", "accuracy, last tenth", "plan score, last tenth",
            "held-out, last", "tokens, last tenth", "s a step", "tokens/s"], rows,
            "Rollout figures; intervals: bootstrap over steps, which leaves out that neighbouring steps are alike."))
    for kind in (rl, [run for run in training if run not in rl]):  # SFT and RL share few settings
        differ = sorted({key for run in kind for key in run.settings
                         if len({json.dumps(r.settings.get(key)) for r in kind}) > 1}
                        - {"stage", "out", "overwrite", "resume"})
        if len(kind) > 1:
            parts.append(table("Settings that differ", ["setting", *(r.name for r in kind)],
                               [[key, *(r.settings.get(key, "–") for r in kind)] for key in differ]))
    machines = [(run.name, read_json(run.folder / "machine.json")) for run in training]
    keys = list(dict.fromkeys(key for _, m in machines for key in m))
    if keys:
        parts.append(table("Hardware and versions", ["run", *keys], [[n, *(m.get(k, "–") for k in keys)] for n, m in machines]))
    elif training:
        parts.append("<p class=note>Hardware and versions: these runs hold no machine.json.</p>")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------
# Curves

def draw(axes, runs: list[Run], key: str, colours: list[str]):
    """One metric of several runs; a line's gid names it for the page's smoothing."""
    for i, run in enumerate(runs):
        xs, ys = (values[::len(values) // MAX_POINTS + 1] for values in points(run, key))
        axes.plot(xs, ys, color=colours[i % len(colours)], linewidth=1.2, gid=f"raw-{i}", label=run.name,
                  linestyle=("-", "--", ":")[i // len(colours) % 3], marker="o" if len(xs) < 12 else "", markersize=3)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def curve(runs: list[Run], key: str, name: str) -> str:
    """An SVG of one metric that takes its colours from the page. `name` makes its ids unique there."""
    ink = "#010203"  # stands for the page's text colour
    with rc_context({"svg.fonttype": "none", "path.simplify": False, "axes.edgecolor": ink, "xtick.color": ink,
                     "ytick.color": ink, "grid.color": ink, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.2, 2.1))
        axes = figure.add_axes((0.14, 0.13, 0.83, 0.82))
        axes.patch.set_visible(False)
        draw(axes, runs, key, [f"#00000{i + 1}" for i in range(len(COLOURS))])
        out = io.StringIO()
        figure.savefig(out, format="svg", facecolor="none")
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL).replace(ink, "currentColor")
    svg = re.sub(r"#00000(\d)", lambda m: f"var(--run{int(m.group(1)) - 1})", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    said = "; ".join(f"{run.name} from {ys[0]:.3g} at step {xs[0]} to {ys[-1]:.3g} at step {xs[-1]}"
                     for run in runs for xs, ys in [points(run, key)] if xs)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda m: f'<svg {m.group(1)} xmlns:xlink="http://www.w3.org/1999/xlink" '
                  f'role="img" aria-label="{html.escape(f"{key}: {said}")}">', svg, count=1)


def curves_html(runs: list[Run], groups: dict[str, dict[str, str]], prefix: str) -> str:
    """Figures of the metrics that the runs have, by group; the rest folded away, or named where it never changes."""
    legend = "".join(f'<span class=run style="color:var(--run{i % len(COLOURS)})">━ <b>{html.escape(run.name)}</b></span> '
                     for i, run in enumerate(runs))
    known = {key for group in groups.values() for key in group}
    values = {key: {y for run in runs for y in points(run, key)[1]} for run in runs for m in run.metrics for key in m}
    rest = sorted(key for key, found in values.items() if key not in known and key != "step" and len(found) > 1)
    still = [f"{key} {min(found):g}" for key, found in sorted(values.items()) if key not in known and len(found) == 1]
    parts = [f"<p>{legend}</p>"]
    for heading, metrics in {**groups, "Everything else": {key: "" for key in rest}}.items():
        figures = "".join(f"<figure><figcaption><b>{html.escape(key)}</b> {html.escape(note)}</figcaption>"
                          f"{curve(runs, key, re.sub(r'[^a-z_]', '_', prefix + key))}</figure>"
                          for key, note in metrics.items() if values.get(key))
        if heading == "Everything else":
            parts.append(f"<details><summary>{heading} ({len(rest)})</summary><div class=figures>{figures}</div>"
                         f"<p class=note>Never changed: {html.escape(', '.join(still) or 'nothing')}.</p></details>")
        elif figures:
            parts.append(f"<h3>{html.escape(heading)}</h3><div class=figures>{figures}</div>")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------
# The page

def finite(data):
    """The data with null for NaN and Infinity: browsers refuse a whole text for one of them."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def embed(data) -> str:
    r"""JSON that is safe inside a script element: no `<`, and pure ASCII (U+2028 and control characters are \u-escaped)."""
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def build(paths: list[str], out: Path, page_mb: float = 12.0) -> dict:
    """Write the page of `paths` to `out`, in one piece; returns its size and how many trees and questions it shows."""
    runs = find_runs(paths)
    training, evals = [r for r in runs if r.metrics], [r for r in runs if r.records]
    rl = [run for run in training if column(run, "reward")]
    sft = [run for run in training if run not in rl]
    budget = int(page_mb * 1e6)
    trees, left_out, unread = [], [], sum(run.unread for run in runs)
    for i, run in enumerate(rl):
        records, found = pick_trees(run.folder / "rollouts.jsonl", budget * 3 // 4 // len(rl))
        trees += [page_tree(record, i) for record in records if record.get("plans")]
        unread += found["unread"]
        shown = len({record["step"] for record in records})
        if len(records) < found["trees"]:
            left_out.append(f"{run.name}: {len(records):,} of {found['trees']:,} logged trees, from {shown} of "
                            f"{found['steps']} logged steps, spread evenly; the rest is in rollouts.jsonl.")
    questions, shared = before_after(evals, budget // 4)
    if len(questions) < shared:
        left_out.append(f"Before and after: {len(questions):,} of {shared:,} shared questions.")
    if unread:
        left_out.append(f"{unread} lines were cut off or damaged, and are left out.")
    curves = curves_html(rl, GROUPS, "rl-") if rl else ""
    if sft:
        losses = {"Supervised cold start": {"loss": "nats a token", "val_loss": "held-out records", "grad_norm": "before clipping"}}
        curves += curves_html(sft, losses, "sft-")
    data = {"runs": [{"name": run.name, "beta": run.settings.get("beta", 0)} for run in rl], "trees": trees,
            "evals": [run.name for run in evals], "questions": questions}
    page = Path(__file__).with_name("report_page.html").read_text()
    for slot, text in {"title": html.escape(", ".join(paths)), "built": time.strftime("%Y-%m-%d %H:%M"),
                       "left-out": "".join(f"<p class=note>{html.escape(line)}</p>" for line in left_out),
                       "summary": summary_tables(training, evals), "curves": curves, "data": embed(data)}.items():
        page = page.replace(f"<!--{slot}-->", text)  # nothing that is filled in can hold a slot: its `<` are escaped
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(out)
    return {"bytes": out.stat().st_size, "trees": len(trees), "questions": len(questions), "left_out": left_out}


def pictures(paths: list[str], folder: Path):
    """folder/curves.svg and folder/tree.png, for a README: six curves of the RL runs, one plan tree of the last of them."""
    rl = [run for run in find_runs(paths) if column(run, "reward")]
    if not rl:
        raise SystemExit(f"error: no run of grpo.py in {', '.join(paths)} to draw; give one with metrics.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(10, 5), layout="constrained", facecolor="white")
        keys = ("accuracy", "eval_accuracy", "plan_spread", "completion_tokens", "entropy", "kl")
        for axes, key in zip(figure.subplots(2, 3).flat, keys):
            draw(axes, rl, key, COLOURS)
            for line in [line for line in axes.lines if len(line.get_xdata()) >= 12]:  # a running mean over the raw line
                means = [line.get_ydata()[0]]
                for y in line.get_ydata()[1:]:
                    means.append(0.9 * means[-1] + 0.1 * y)
                axes.plot(line.get_xdata(), means, color=line.get_color(), linewidth=2)
                line.set_alpha(0.35)
            axes.set_title(key, fontsize=10, loc="left")
        figure.axes[1].legend(fontsize=9, frameon=False)  # of few points, and so without means
        figure.savefig(folder / "curves.svg", metadata={"Date": None})

    records = [r for run in rl[::-1] for r in pick_trees(run.folder / "rollouts.jsonl", 10**7)[0] if len(r["plans"][0]["completions"]) > 1]
    if not records:
        raise SystemExit("error: no plan tree with several CoTs a plan in rollouts.jsonl; run grpo.py with --cots above 1")
    # The latest step's question whose plans differ most: that is what the plan reward is about.
    scores = [[plan["score"] for plan in r["plans"]] for r in records]
    record = max(zip(records, scores), key=lambda pair: (pair[0]["step"], len(set(pair[1])), np.std(pair[1])))[0]
    m, z = len(record["plans"]), len(record["plans"][0]["completions"])
    texts = [plan["completions"][0]["text"].partition("</plan>")[0].replace("<plan>", "").strip() for plan in record["plans"]]
    texts = [textwrap.wrap(text, 34)[:8] for text in texts]
    low = 0.4 + 0.6 * z  # inches: the completions' room, then the plans', then the question's
    high = low + 0.6 + 0.17 * max(map(len, texts))
    figure = Figure(figsize=(2.9 * m, high + 0.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, m), ylim=(0, high + 0.9))
    axes.axis("off")
    style = {"ha": "center", "parse_math": False}
    axes.text(m / 2, high + 0.6, textwrap.fill(f"{record['problem'][:300]}     gold: {record['answer']}", 34 * m), va="center",
              fontsize=11, weight="bold", **style)
    for i, (plan, text) in enumerate(zip(record["plans"], texts)):
        axes.plot([m / 2, i + 0.5, i + 0.5], [high + 0.4, high, 0.4], color="#999999", linewidth=1, zorder=0)
        axes.text(i + 0.5, high - 0.1, f"plan {i + 1}   score {plan['score']:.2f}   reward "
                  f"{plan['completions'][0]['reward']['plan']:.2f}\n\n" + "\n".join(text), va="top", fontsize=9.5,
                  bbox={"boxstyle": "round,pad=0.5", "facecolor": "#eef2fb", "edgecolor": COLOURS[0]}, **style)
        for k, c in enumerate(plan["completions"]):
            colour = "#1f7a3d" if c["correct"] else "#b3261e"
            axes.text(i + 0.5, low - 0.6 - 0.6 * k, f"{'✓ right' if c['correct'] else '✗ wrong'}   {c['tokens']} tokens\n"
                      f"reward {c['reward']['total']:.2f}   advantage {c['advantage']:+.2f}", va="center", fontsize=9, color=colour,
                      bbox={"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour}, **style)
    figure.savefig(folder / "tree.png", dpi=110)
    print(f"{folder / 'curves.svg'} and {folder / 'tree.png'}: step {record['step']}, question {record['id']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, evaluation folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page [report.html]")
    parser.add_argument("--page_mb", type=float, default=12.0, help="room for trees and questions; the rest is left out [12]")
    parser.add_argument("--watch", type=float, default=0.0, metavar="SECONDS", help="rebuild so often while files change [off]")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also write FOLDER/curves.svg and FOLDER/tree.png")
    args = parser.parse_args()
    if args.out.is_dir():
        raise SystemExit(f"error: {args.out} is a folder; --out wants a file such as {args.out / 'report.html'}")
    make_folder(args.out.parent)
    if not 0 <= args.watch < math.inf or not args.page_mb > 0:
        raise SystemExit("error: --watch must be a number of seconds, and --page_mb more than 0")
    seen = None
    while True:
        state = [(f, f.stat().st_size) for path in args.runs for f in sorted(Path(path).glob("**/*.json*")) if f.exists()]
        if state != seen:
            began = time.time()
            try:
                result = build(args.runs, args.out, args.page_mb)
                print(f"{args.out}: {result['bytes'] / 1e6:.1f} MB, {result['trees']} plan trees, {result['questions']} "
                      f"questions before and after, built in {time.time() - began:.1f} s", *result["left_out"],
                      sep="\n  ", flush=True)
            except SystemExit as error:  # watched before the run has begun, or while it is being replaced
                if not args.watch:
                    raise
                print(f"waiting: {error}", flush=True)
        seen = state
        if not args.watch:
            break
        try:
            time.sleep(args.watch)
        except KeyboardInterrupt:
            break
    if args.pictures:
        pictures(args.runs, args.pictures)


if __name__ == "__main__":
    main()
