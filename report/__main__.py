"""One HTML page about one or several runs.

It shows figures with intervals, curves, plan trees, and the same question before and after.

    python -m report runs/demo --out report.html       every run and evaluation in the folder
    python -m report runs/demo/pta runs/demo/grpo --watch 30     two runs, rebuilt while they train
    python -m report runs/demo --pictures docs         writes docs/curves.svg and docs/tree.png, too

A RUN is a folder with metrics.jsonl (sft.py, grpo.py), with records.jsonl (eval.py), or a folder of
such folders. Evaluations next to a training run are shown with it. Runs whose settings differ only
in the seed are one curve with a band. The page opens from disk and needs no network. Model output
is embedded as JSON without a `<` and shown as text nodes, so markup in it has no effect.
"""

import argparse
import html
import json
import math
import time
from pathlib import Path

import numpy as np

from eval import compare, summarise
from plumbing.folder import make_folder, refuse_unusable
from plumbing.ranks import fail, print0, require
from plumbing.signals import guarded
from report.figures import RL_GROUPS, SFT_GROUPS, curves_html, pictures
from report.runs import (
    Run,
    before_after,
    choose_trees,
    column,
    find_runs,
    group_seeds,
    is_rl,
    read_json,
)

# --------------------------------------------------------------------------------------------------
# Tables. In a number format, z turns -0.0 into 0.0.

def table(title: str, head: list[str], rows: list[list], note: str = "") -> str:
    """An HTML table; every cell is escaped, and the first of a row is its heading."""
    escaped = lambda cell: html.escape(str(cell))
    columns = "".join(f"<th scope=col>{escaped(cell)}" for cell in head)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in rest)
        body += f"<tr><th scope=row>{escaped(first)}</th>{cells}</tr>\n"
    box = f'<div class=scroll tabindex=0 role=region aria-label="{escaped(title)}">'
    grid = f"<table><thead><tr>{columns}</thead><tbody>{body}</tbody></table>"
    note = f"<p class=note>{escaped(note)}</p>\n" if note else ""
    return f"<h3>{escaped(title)}</h3>\n{box}{grid}</div>\n{note}"


def percent(x: float) -> str:
    return f"{100 * x:z.1f} %"


def with_interval(x: float, low: float, high: float) -> str:
    return f"{percent(x)} ({percent(low)} to {percent(high)})"


def mean_of_steps(values: list[float]) -> str:
    """The mean over steps with a percentile bootstrap 95 % interval."""
    if not values:
        return "–"
    means = np.random.default_rng(0).choice(values, (4000, len(values))).mean(1)
    return with_interval(np.mean(values), np.quantile(means, 0.025), np.quantile(means, 0.975))


def dict_table(title: str, rows: list[dict], note: str) -> str:
    """A table of rows that are dicts of column heading and cell."""
    return table(title, list(rows[0]), [list(row.values()) for row in rows], note)


def evaluations_table(evals: list[Run]) -> str:
    """Accuracy and other figures of each evaluation, per benchmark."""
    rows = []
    for run in evals:
        summary = summarise(run.records)
        parts = list(summary.get("benchmarks", {}).items())
        overall = "mean" if parts else run.records[0].get("benchmark", "")
        for name, figures in [*parts, (overall, summary)]:
            passed = figures["pass_at_k"].items()
            interval = figures["accuracy"], figures["ci_low"], figures["ci_high"]
            rows.append({
                "evaluation": run.name,
                "benchmark": Path(name).name,
                "accuracy (95 % interval)": with_interval(*interval),
                "problems × samples": f"{figures['n_problems']} × {figures['n_samples']}",
                "majority": percent(figures["maj_at_n"]),
                "tokens": f"{figures['mean_length']:.1f}",
                "well-formed": percent(figures["format_rate"]),
                "truncated": percent(figures["truncation_rate"]),
                "pass@k": ", ".join(f"{k}: {percent(share)}" for k, share in passed),
            })
    note = "An interval covers the choice of problems and of samples (plumbing/intervals.py)."
    return dict_table("Held-out problems", rows, note)


def plans_table(evals: list[Run]) -> str:
    """What `eval.py --analysis plans` found, of the evaluations that it made."""
    rows, notes = [], []
    for run in evals:
        for name, figures in read_json(run.folder / "summary.json").get("plans", {}).items():
            best, interval = figures["best_cots"], (figures["ci_low"], figures["ci_high"])
            sizes = figures["n_problems"], figures["plans"], figures["cots"]
            notes.append(f"{run.name}, {Path(name).name}: {figures['advice']}")
            rows.append({
                "evaluation": run.name,
                "benchmark": Path(name).name,
                "the plan decides (95 % interval)": with_interval(figures["icc"], *interval),
                "problems × plans × CoTs": " × ".join(map(str, sizes)),
                "plans differ by": f"±{figures['plan_std']:.2f}",
                "CoTs of one plan by": f"±{figures['cot_std']:.2f}",
                "plan tokens": f"{figures['plan_tokens']:.1f}",
                "CoT tokens": f"{figures['cot_tokens']:.1f}",
                "best CoTs per plan": "–" if best is None else f"{best:.1f}",
            })
    return dict_table("How much the plan decides", rows, " ".join(notes)) if rows else ""


def revisions_table(evals: list[Run]) -> str:
    """What became of plans that were wrong, of the evaluations where that is known."""
    rows = []
    for run in evals:
        summary = summarise(run.records)
        benchmarks = summary.get("benchmarks", {run.records[0].get("benchmark", ""): summary})
        for name, figures in benchmarks.items():
            share = lambda key: percent(figures[key]) if key in figures else "–"
            if "revisions" in figures:
                rows.append({
                    "evaluation": run.name,
                    "benchmark": Path(name).name,
                    "samples": figures["revisions"],
                    "the plan was wrong": share("plan_wrong"),
                    "the CoT left it": share("wrong_left"),
                    "right after leaving": share("left_right"),
                    "good plans left": share("good_left"),
                })
    note = "A plan was wrong if carrying it out would not have succeeded in its sample's world. "
    note += "Each share is of the one before it, the last one of samples with good plans."
    return dict_table("What becomes of wrong plans", rows, note) if rows else ""


def comparison_table(evals: list[Run]) -> str:
    """Paired differences of every two evaluations, the later one minus the earlier one."""
    rows, notes = [], []
    for before, after in [(evals[i], evals[j]) for j in range(len(evals)) for i in range(j)]:
        try:
            paired = compare(before.records, after.records)
        except SystemExit:  # no problem in common
            continue
        notes += paired["warnings"]
        for row in paired["rows"]:
            delta, low, high = (100 * row[name] for name in ("delta", "ci_low", "ci_high"))
            rows.append({
                "pair": f"{after.name} − {before.name}",
                "benchmark": Path(row["benchmark"]).name,
                "difference in accuracy": f"{delta:+z.1f} points",
                "95 % interval": f"{low:+z.1f} to {high:+z.1f}",
                "p": f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001",
                "shared problems": row["n_problems"],
            })
    if rows:
        note = "Both answered the same problems. p comes from random sign flips. "
        return dict_table("Paired comparison", rows, note + "; ".join(dict.fromkeys(notes)))
    if len(evals) > 1:
        remedy = "run eval.py on the same --data to compare them"
        return f"<p>The evaluations share no problem: {remedy}.</p>"
    return ""


def rl_table(rl: list[Run]) -> str:
    """How far each run of grpo.py is, and its figures at the beginning and at the end."""
    rows = []
    for run in rl:
        tenth = max(1, len(run.metrics) // 10)
        last = lambda key: column(run, key)[-tenth:]
        done = f"{run.metrics[-1]['step']} of {run.settings.get('steps', '?')}"
        saved = (run.folder / "model").exists()
        held_out = column(run, "eval_accuracy")
        rows.append({
            "run": run.name,
            "steps": done if saved else f"{done}, no final model yet",
            "accuracy, first tenth of steps": mean_of_steps(column(run, "accuracy")[:tenth]),
            "accuracy, last tenth": mean_of_steps(last("accuracy")),
            "plan score, last tenth": mean_of_steps(last("plan_score")),
            "held-out, last": percent(held_out[-1]) if held_out else "–",
            "tokens, last tenth": f"{np.mean(last('completion_tokens')):.1f}",
            "seconds per step": f"{np.mean(column(run, 'seconds')):.1f}",
            "tokens per second": f"{np.mean(column(run, 'tokens_per_s')):.0f}",
        })
    note = "Accuracy, score and tokens are of the rollouts. The intervals bootstrap over steps, "
    note += "and ignore that neighbouring steps resemble each other."
    return dict_table("Reinforcement learning", rows, note)


def settings_table(runs: list[Run]) -> str:
    """The settings in which runs of one kind differ. The seeds of a row share a column."""
    if len(runs) < 2:
        return ""
    keys = {key for run in runs for key in run.settings} - {"out", "overwrite", "resume"}
    values = lambda key: {json.dumps(run.settings.get(key)) for run in runs}
    differ = sorted(key for key in keys if len(values(key)) > 1)
    rows = group_seeds(runs)
    said = lambda row, key: [str(run.settings.get(key, "–")) for run in row.seeds or [row]]
    cells = [[key, *(", ".join(dict.fromkeys(said(row, key))) for row in rows)] for key in differ]
    return table("Settings that differ", ["setting", *(row.name for row in rows)], cells)


def machines_table(training: list[Run]) -> str:
    """Hardware and versions of the training runs."""
    machines = [read_json(run.folder / "machine.json") for run in training]
    keys = list(dict.fromkeys(key for machine in machines for key in machine))
    if keys:
        cells = [[machine.get(key, "–") for key in keys] for machine in machines]
        rows = [[run.name, *row] for run, row in zip(training, cells)]
        return table("Hardware and versions", ["run", *keys], rows)
    if training:
        reason = "these runs have no machine.json"
        return f"<p class=note>Hardware and versions are unknown: {reason}.</p>"
    return ""


def summary_html(training: list[Run], evals: list[Run]) -> str:
    """All tables of the page."""
    rl, sft = [r for r in training if is_rl(r)], [r for r in training if not is_rl(r)]
    tables = evaluations_table, plans_table, revisions_table, comparison_table
    parts = [make(evals) for make in tables] if evals else []
    parts += [rl_table(rl)] if rl else []
    # SFT and RL share few settings, so each kind has a table of its own.
    return "".join([*parts, settings_table(rl), settings_table(sft), machines_table(training)])


# --------------------------------------------------------------------------------------------------
# The page

def finite(data):
    """The data with None for NaN and Infinity: a browser refuses JSON text that holds one."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def embed(data) -> str:
    r"""JSON that is safe inside a script element.

    It holds no `<` and is pure ASCII: U+2028 and control characters are \u-escaped.
    """
    text = json.dumps(finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def build(paths: list[str], out: Path, page_mb: float = 12.0) -> dict:
    """Write the page of `paths` to `out`, in one piece.

    Returns its size in bytes, how many trees and questions it shows, and what was left out.
    """
    runs, budget = find_runs(paths), int(page_mb * 1e6)
    rows = group_seeds([run for run in runs if run.metrics])
    training = [run for row in rows for run in row.seeds or [row]]  # the seeds of a row together
    evals = [run for run in runs if run.records]
    rl, sft = [r for r in training if is_rl(r)], [r for r in training if not is_rl(r)]
    trees, left_out, unread = choose_trees(rl, budget * 3 // 4)
    questions, shared = before_after(evals, budget // 4)
    if len(questions) < shared:
        left_out.append(f"Before and after: {len(questions):,} of {shared:,} shared questions.")
    if unread := unread + sum(run.unread for run in runs):
        left_out.append(f"{unread} lines were cut off or damaged, and are left out.")
    curves = curves_html(group_seeds(rl), RL_GROUPS, "rl-") if rl else ""
    curves += curves_html(group_seeds(sft), SFT_GROUPS, "sft-") if sft else ""
    names = [{"name": run.name, "beta": run.settings.get("beta", 0)} for run in rl]
    data = {"runs": names, "trees": trees, "evals": [r.name for r in evals], "questions": questions}
    slots = {
        "title": html.escape(", ".join(paths)),
        "built": time.strftime("%Y-%m-%d %H:%M"),
        "left-out": "".join(f"<p class=note>{html.escape(line)}</p>" for line in left_out),
        "summary": summary_html(training, evals),
        "curves": curves,
        "data": embed(data),
    }
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    for slot, text in slots.items():  # no text can hold another slot: its `<` are escaped
        page = page.replace(f"<!--{slot}-->", text)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(out)
    size = out.stat().st_size
    return {"bytes": size, "trees": len(trees), "questions": len(questions), "left_out": left_out}


# --------------------------------------------------------------------------------------------------
# Main

def parse_arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m report", description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run, evaluation, or folder of them")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page [report.html]"
    )
    parser.add_argument(
        "--page_mb", type=float, default=12.0,
        help="megabytes for trees and questions; the rest is left out [12]",
    )
    parser.add_argument(
        "--watch", type=float, default=0.0, metavar="SECONDS",
        help="look for changed files this often, and rebuild [off]",
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER",
        help="also write FOLDER/curves.svg and FOLDER/tree.png",
    )
    parser.error = fail
    args = parser.parse_args()
    example = args.out / "report.html"
    refuse_unusable(args.out)
    require(not args.out.is_dir(), f"{args.out} is a folder; --out wants a file such as {example}")
    ours = not args.out.exists() or args.out.is_file() and is_page(args.out)
    require(ours, f"{args.out} is no page of ours: move it away, or choose another --out")
    require(0 <= args.watch < math.inf, "--watch must be a number of seconds")
    require(0 < args.page_mb < math.inf, "--page_mb must be a number above 0")
    return args


def is_page(file: Path) -> bool:
    """Whether a file is empty, or a page that `build` wrote."""
    with open(file, "rb") as opened:
        beginning = opened.read(1000)
    return not beginning or b"<title>PTA-GRPO: " in beginning


def sizes(paths: list[str]) -> list[tuple[Path, int]]:
    """The JSON files in the folders and their sizes: they change as a run goes on."""
    files = [file for path in paths for file in sorted(Path(path).glob("**/*.json*"))]
    return [(file, file.stat().st_size) for file in files if file.exists()]


def rebuild(args: argparse.Namespace):
    """Build the page and say what is on it. With --watch, a missing run is waited for."""
    began = time.time()
    try:
        result = build(args.runs, args.out, args.page_mb)
    except SystemExit as error:  # the run has not begun, or is being replaced
        if not args.watch:
            raise
        print0(f"waiting: {error}")
        return
    shown = f"{result['trees']} plan trees, {result['questions']} questions before and after"
    size, seconds = result["bytes"] / 1e6, time.time() - began
    line = f"{args.out}: {size:.1f} MB, {shown}, built in {seconds:.1f} s"
    print0("\n  ".join([line, *result["left_out"]]))


def main():
    args, seen = parse_arguments(), None
    make_folder(args.out.parent)
    while True:
        if (now := sizes(args.runs)) != seen:
            rebuild(args)
        seen = now
        if not args.watch:
            break
        try:
            time.sleep(args.watch)
        except KeyboardInterrupt:
            break
    if args.pictures:
        pictures(args.runs, args.pictures)


if __name__ == "__main__":
    guarded(main)
