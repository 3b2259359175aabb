"""bench/STUDY.md and its curves: what the finished runs of bench/study.py say, in tables and words.

Everything comes from the lines of bench/study.jsonl, so the page can be written from any part of
the study, and says what is missing.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.study_figures import (
    CONTRASTS,
    GRPO,
    PTA,
    SEGMENT,
    TREES,
    UNITS,
    interval,
    number,
    p_text,
    percent,
    route_values,
    settled,
    spent,
    t_quantile,
    task_figures,
    token_cost,
)
from bench.study_findings import findings
from plumbing.plans import reliability

PAGE, PICTURES = Path("bench/STUDY.md"), Path("docs")
CURVES = {GRPO: "#3b82f6", PTA: "#d9661f", SEGMENT: "#22a05a"}
INK = "#808080"  # readable on white and on black
RESULT = set(
    "task row seed flags seconds step_seconds token_seconds icc credit_corr accuracy decoded "
    "completions right analysis did with_plan score_corr start".split()
)  # the other fields of a line name its machine


# --------------------------------------------------------------------------------------------------
# Tables


def over_seeds(values: list[float]) -> str:
    """Mean of accuracies with its 95 % t interval over seeds."""
    mean = percent(np.mean(values))
    if len(values) < 2:
        return mean
    half = t_quantile(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean} ± {100 * half:.1f}"


def table(head: str, rows: list[list]) -> str:
    """A Markdown table; `head` has its names, parted by bars."""
    lines = [head, "|".join(["---"] * len(head.split("|")))]
    lines += [" | ".join(map(str, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def header(lines: list[dict], jobs: list[tuple]) -> str:
    """What the study is, where it ran, and what is missing."""
    done = {(line["task"], line["row"], line["seed"]) for line in lines}
    left, machines = {}, {}
    for task, row, seed in jobs:
        if (task, row, seed) not in done:
            left.setdefault(f"{task}, {row}", []).append(str(seed))
    for line in lines:
        where = ", ".join(f"{name} {line[name]}" for name in sorted(set(line) - RESULT))
        machines[where] = machines.get(where, 0) + 1
    finished = len(jobs) - sum(map(len, left.values()))
    missing = "; ".join(f"{name}: {', '.join(seeds)}" for name, seeds in left.items())
    where = "; ".join(f"{count} lines: {name}" for name, count in machines.items())
    return HEADER.format(
        finished=finished, jobs=len(jobs), where=where or "none yet",
        missing=f"\n**Missing seeds:** {missing}.\n" if missing else "",
    )


HEADER = """# Does planning pay?

`python -m bench.study` (or `make study`) wrote this page from `bench/study.jsonl`, a line per run.
**{finished} of {jobs} runs are done.** Machines: {where}.
{missing}
A row is one setting of `grpo.py`. "4x3" are 4 plans per question with 3 CoTs each; "12x1" are 12
independent completions. All runs of a task start from the same SFT checkpoint (but for the row
without SFT) and differ in flags and seed only. Rollouts and evaluation sample at temperature 1: the
policy is measured as it was trained. Held-out accuracy is over 600 problems x 4 samples. Other
plans were given to the main rows' models of seed 0. Before SFT no plan can be measured: the base
model of doors has random weights, and that of quantities writes none.

There are three budgets. **Equal tokens**: decoded tokens, where a plan counts once for all of its
CoTs. Every run ends when its task's budget is decoded, so held-out accuracy is at equal tokens.
**Equal completions** and **equal seconds** cut the training curves where the run that spent least
ended. Runs went side by side, on a machine that was not always calm. So seconds are the decoded
tokens times the row's seconds per token, which `python -m bench.study --costs` measured alone on
one thread (`bench/study_costs.json`).

Differences are in points, with 95 % intervals and p-values over seeds *and* problems (crossed
random effects; rows paired by seed). Corrected p-values are Holm's, over all rows of the table.
A difference marked ° comes from one seed, and says nothing about other seeds.
"""


def task_section(f: dict) -> str:
    """The task's own figures, its rows, contrasts, plans and predictions."""
    name = f["task"]
    parts = [f"## {name.capitalize()}\n", own_figures(f)]
    if not f["rows"]:
        return "\n".join([*parts, "No run of this task is finished.\n"])
    picture = PICTURES / f"study_{name}.svg"
    if draw_curves(f, picture):
        parts.append(f"![Right rollouts against decoded tokens, {name}](../{picture})\n")
    parts += ["### Rows\n", rows_table(f), "### Planned contrasts\n", contrasts_table(f)]
    parts += ["### Is it the plan?\n", plans_table(f)]
    parts += ["### Predicted and measured\n", predictions(f)]
    return "\n".join(parts)


def own_figures(f: dict) -> str:
    """The task before reinforcement learning."""
    facts, use, rows = f["facts"], f["start_use"], []
    if not use:
        return "The SFT model has not been measured yet.\n"
    if facts:
        low, high, share = facts["ci_low"], facts["ci_high"], facts["icc"]
        lengths = f"{facts['plan_tokens']:.1f}, {facts['cot_tokens']:.1f}"
        rows += [
            ["ICC, the plan's share of the variance", f"{share:.3f} ({low:.3f} to {high:.3f})"],
            ["mean tokens of plan and CoT", lengths],
            ["z\\*, the best CoTs per plan", number(facts["best"], 2)],
            ["reliability of a plan's score at z = 3", number(reliability(share, 3), 2)],
        ]
    if (corr := f["start"].get("score_corr")) is not None:
        rows.append(["correlation of a plan's score (3 CoTs) with its true worth", number(corr, 2)])
    accuracies = [percent(use[name]) for name in ("own", "true", "shuffled", "none")]
    rows.append(["accuracy with own, true, shuffled, no plan, %", ", ".join(accuracies)])
    rows.append(["plans that are best, %", percent(use["did"].get("best"))])
    best, other = accuracies[1:3]
    if f["task"] == "doors":
        best, other = map(percent, route_values(len(f["start"]["right"])))
    rows.append(["chance with the best plan, and with a random one, %", f"{best}, {other}"])
    return table("after SFT | ", rows)


def rows_table(f: dict) -> str:
    rows = []
    for name, row in f["rows"].items():
        test = f["against"].get(name)
        tests = [interval(test), p_text(test["p"]), p_text(test["holm"])] if test else ["–"] * 3
        curve = [percent(row["curve"][unit]) for unit in UNITS]
        rows.append([
            name, len(row["held_out"]), f"{row['decoded'] / 1e3:,.0f}", over_seeds(row["held_out"]),
            *tests, *curve, number(row["icc"]), number(row["credit_corr"], 4),
        ])
    head = "row | seeds | tokens, thousands | held out, % | minus GRPO 12x1 | p | corrected p | "
    head += "curve at equal completions | tokens | seconds | ICC | credit_corr"
    calls, tokens, seconds = (f["budgets"][unit] for unit in UNITS)
    return table(head, rows) + f"""
Held out: mean ± half of the 95 % interval over seeds. Curves: right rollouts in %, over the last
tenth before {calls:,.0f} completions, {tokens / 1e3:,.0f} thousand tokens, {seconds:,.0f} seconds.
ICC: running mean at the end. credit_corr: correlation of the advantages with and without the plan
reward.
"""


def contrasts_table(f: dict) -> str:
    rows = [
        [asked, " minus ".join(CONTRASTS[asked]), interval(test), p_text(test["p"]),
         p_text(test["holm"])]
        for asked, test in f["contrasts"].items()
    ]
    return table("question | difference of | points | p | corrected p", rows)


def plans_table(f: dict) -> str:
    """What the plans of the start and of each row did."""
    rows = ({"SFT": f["start_use"]} if f["start_use"] else {}) | f["rows"]
    accuracies = ("own", "true", "shuffled", "none")
    did = ("best", "value", "right_if_best", "right_if_not", "revised", "right_if_revised")
    cells = [
        [name, *(percent(row[a]) for a in accuracies), *(percent(row["did"].get(d)) for d in did),
         number(row["score_corr"], 2)]
        for name, row in rows.items()
    ]
    head = "row | own plan | true | shuffled | none | plans that are best | value of plans | "
    head += "right if best | right if not | not best, but revised | and then right | score_corr"
    return table(head, cells) + (
        "\nAll in %. The first four columns are accuracies of one model per row, which was given "
        "other plans than its own (where no seed was, the first is over all); score_corr is its "
        "correlation of a plan's score (3 CoTs) with the plan's true worth. The columns between "
        "are over all seeds.\n"
    )


def predictions(f: dict) -> str:
    """What the theory said before training, beside what came out."""
    facts, rows = f["facts"], []
    if not facts:
        return "Nothing to predict from: the SFT model's plans have not been analysed.\n"
    for z, name in TREES.items():
        cost = token_cost(facts, z)
        said = "ahead" if cost < 0.95 else "behind" if cost > 1.05 else "level"
        if test := f["against"].get(name):
            rows.append([f"{12 // z}x{z} against 12x1", f"{cost:.2f} x the tokens", said, test])
    corr = f["rows"].get(PTA, {}).get("credit_corr")
    if test := f["contrasts"].get("what the plan reward does"):
        rows.append(["plan reward against none", f"credit_corr {number(corr, 4)}", "level", test])
    rows = [[*row[:3], interval(row[3]), p_text(row[3]["holm"]), settled(row[3])] for row in rows]
    tried = {1: GRPO, **TREES}
    measured = {z: np.mean(f["rows"][r]["held_out"]) for z, r in tried.items() if r in f["rows"]}
    best = f"z\\* is {number(facts['best'], 2)}; of 1, 2, 3, 4 and 6, z = "
    best += f"{min(tried, key=lambda z: token_cost(facts, z))} should be best"
    if measured:
        best += f", and z = {max(measured, key=measured.get)} ended highest of those measured"
    return table("setting | basis | predicted | points | corrected p | measured", rows) + (
        f"\n{best}. The prediction is of the tokens that a given precision of the plan's gradient "
        "takes, and says nothing of the CoT's; within 5 % it counts as level.\n"
    )


# --------------------------------------------------------------------------------------------------
# Curves and page


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over about a fifteenth of the curve, centred."""
    width = max(1, len(values) // 15)
    return np.convolve(values, np.ones(width) / width, "valid")


def draw_curves(f: dict, path: Path) -> bool:
    """Rollout accuracy, mean over seeds and one standard error, against decoded tokens."""
    shown = [row for row in CURVES if row in f["runs"]]
    if not shown:
        return False
    style = {"svg.fonttype": "none", "svg.hashsalt": f["task"], "text.color": INK}
    for part in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"):
        style[part] = INK
    with rc_context(style):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_visible(False)
        for row in shown:
            runs = f["runs"][row]
            steps = min(len(run["accuracy"]) for run in runs)
            each = 100 * np.array([smooth(np.array(run["accuracy"][:steps])) for run in runs])
            xs = smooth(np.mean([spent(run, "decoded")[:steps] for run in runs], axis=0)) / 1e3
            mean, colour = each.mean(0), CURVES[row]
            name = f"{row}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
            axes.plot(xs, mean, color=colour, label=name, linewidth=1.8)
            if len(runs) > 1:
                error = each.std(0, ddof=1) / math.sqrt(len(runs))
                band = {"color": colour, "alpha": 0.25, "linewidth": 0}
                axes.fill_between(xs, mean - error, mean + error, **band)
        axes.set(xlabel="decoded tokens, thousands", ylabel="right rollouts, %")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="none", metadata={"Date": None})
    return True


def write_page(lines: list[dict]):
    """Write bench/STUDY.md and docs/study_TASK.svg from lines of bench/study.jsonl, however few."""
    from bench import study  # not at the top: bench.study imports this file

    figures = [task_figures(task, lines, list(study.ROWS)) for task in study.TASKS]
    sections = [header(lines, study.jobs()), "## Findings\n", findings(figures)]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join([*sections, *map(task_section, figures)]))
