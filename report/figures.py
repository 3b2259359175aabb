"""Matplotlib figures: curves for the page, and two pictures for a README."""

import html
import io
import re
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from plumbing.ranks import print0, require
from report.runs import Run, find_runs, group_seeds, is_rl, pick_trees, points, seed_values

RL_GROUPS = {  # heading -> metric -> its meaning
    "Accuracy and reward": {
        "accuracy": "share of right answers among rollouts",
        "eval_accuracy": "share of held-out problems answered right, greedy",
        "plan_score": "share of a plan's CoTs that are right, mean over closed plans",
        "reward": "mean total reward",
    },
    "Reward terms": {
        "outcome": "",
        "plan": "before the factor beta; its mean is always 1/m",
        "structure": "",
        "length_reward": "",
        "overlong": "DAPO's penalty",
    },
    "Spread of each term within a group: it drives the advantages": {
        "outcome_spread": "",
        "plan_spread": "",
        "structure_spread": "",
        "length_reward_spread": "",
        "overlong_spread": "",
    },
    "How much the plan decides": {
        "plan_icc": "share of a question's variance of outcomes that the choice of plan explains",
        "plan_icc_mean": "the same, from running means over up to 20 steps",
        "plan_std": "standard deviation of outcomes between plans",
        "cot_std": "and between the CoTs of a plan",
        "best_cots": "CoTs per plan for the most precise plan gradient at an equal token budget",
        "credit_corr": "correlation of the advantages with and without the plan reward",
    },
    "What becomes of wrong plans": {
        "plan_wrong": "share of CoTs whose plan would not have succeeded in their world",
        "wrong_left": "share of these that left the plan",
        "left_right": "share of those that were right",
        "good_left": "share of CoTs with a good plan that left it",
    },
    "Policy": {
        "entropy": "nats per token",
        "kl": "to the reference, k3 estimate per token",
        "clip_frac": "share of tokens cut off by the clip",
        "grad_norm": "before clipping",
        "zero_variance": "share of groups with equal rewards, which teach nothing",
        "outcome_zero_variance": "share of groups that are all right or all wrong",
        "all_right_share": "share of the squared advantages that all-right groups hold",
    },
    "Length": {
        "completion_tokens": "plan and CoT",
        "given_tokens": "said by tools and worlds, which the others do not count",
        "calls": "answered, per completion",
        "forged": "share of completions that wrote a result themselves",
        "plan_tokens": "of plans that closed",
        "format_rate": "share of well-formed completions",
        "truncated": "share of completions cut off at their limit",
    },
    "Speed": {
        "tokens_per_s": "decoded tokens per second of the whole step; a plan counts once",
        "decoded_tokens": "per step; a plan counts once",
        "completions_sampled": "per step, with those that dynamic sampling leaves out",
        "seconds": "per step",
        "seconds_rollout": "",
        "seconds_reward": "",
        "seconds_update": "",
    },
}
SFT_GROUPS = {
    "Supervised cold start": {
        "loss": "nats per token",
        "val_loss": "on held-out records",
        "grad_norm": "before clipping",
    }
}
REST = "Everything else"
# Colours of the pictures; the page has its own.
COLOURS = ["#1f5fbf", "#b3431e", "#1f7a3d", "#7a3fa8", "#8a6a00", "#00757a"]
RIGHT, WRONG = "#1f7a3d", "#b3261e"
# Stand-ins, which become variables of the page's style sheet.
INK = "#010203"
RUN_INKS = [f"#00000{i + 1}" for i in range(len(COLOURS))]
MAX_POINTS = 2000  # of a curve


# --------------------------------------------------------------------------------------------------
# Curves of the page

def draw(axes, runs: list[Run], key: str, colours: list[str]):
    """Draw one metric of runs and rows. The page's smoothing finds lines and bands by their gid."""
    for i, run in enumerate(runs):
        xs, ys = points(run, key)
        every = len(xs) // MAX_POINTS + 1
        style = {"color": colours[i % len(colours)], "linewidth": 1.2, "markersize": 3}
        style["linestyle"] = ("-", "--", ":")[i // len(colours) % 3]
        style["marker"] = "o" if len(xs) < 12 else ""
        axes.plot(xs[::every], ys[::every], gid=f"raw-{i}", label=run.name, **style)
        if run.seeds and xs:  # along the lowest values and back along the highest
            band = list(seed_values(run, key).values())[::every]
            edges = [*map(min, band), *map(max, band[::-1])]
            around = [*xs[::every], *xs[::every][::-1]]
            style = {"color": style["color"], "alpha": 0.2, "linewidth": 0.5}
            axes.fill(around, edges, gid=f"band-{i}", **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def curve(runs: list[Run], key: str, name: str) -> str:
    """An SVG of one metric, in the page's colours. `name` makes its ids unique on the page."""
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": False}
    for part in ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"):
        style[part] = INK
    out = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(4.2, 2.1))
        axes = figure.add_axes((0.14, 0.13, 0.83, 0.82))
        axes.patch.set_visible(False)
        draw(axes, runs, key, RUN_INKS)
        figure.savefig(out, format="svg", facecolor="none")
    said = []
    for run in runs:
        xs, ys = points(run, key)
        if xs:
            first, last = f"{ys[0]:.3g} at step {xs[0]}", f"{ys[-1]:.3g} at step {xs[-1]}"
            said.append(f"{run.name} from {first} to {last}")
        if xs and run.seeds:
            ends = seed_values(run, key)[xs[-1]]
            said[-1] += f", the seeds there from {min(ends):.3g} to {max(ends):.3g}"
    return for_page(out.getvalue(), name, f"{key}: {'; '.join(said)}")


def for_page(svg: str, name: str, label: str) -> str:
    """A part of an HTML page: unique ids, the page's colours, and a label for screen readers."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"#00000(\d)", lambda m: f"var(--run{int(m[1]) - 1})", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    spoken = f'role="img" aria-label="{html.escape(label)}"'
    start = lambda m: f"<svg {m[1]} {links} {spoken}>"
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', start, svg, count=1)


def legend(runs: list[Run]) -> str:
    """The runs' names in the colours of their curves, and what a band is, if there is one."""
    names = []
    for i, run in enumerate(runs):
        colour, name = f"color:var(--run{i % len(COLOURS)})", html.escape(run.name)
        names.append(f'<span class=run style="{colour}">━ <b>{name}</b></span> ')
    note = "A line of several seeds is their mean, at the steps that all of them have. Its band "
    note += "goes from the lowest seed to the highest one, and is smoothed with it."
    note = f"<p class=note>{note}</p>" if any(run.seeds for run in runs) else ""
    return f"<p>{''.join(names)}</p>{note}"


def figure_html(runs: list[Run], key: str, note: str, prefix: str) -> str:
    """One metric's curve with its name and meaning."""
    caption = f"<figcaption><b>{html.escape(key)}</b> {html.escape(note)}</figcaption>"
    return f"<figure>{caption}{curve(runs, key, re.sub('[^a-z_]', '_', prefix + key))}</figure>"


def curves_html(runs: list[Run], groups: dict[str, dict[str, str]], prefix: str) -> str:
    """Curves of the metrics that the runs have, by group.

    Metrics of no group are folded away. Those of them that never change are listed by value.
    """
    keys = {key for run in runs for metrics in run.metrics for key in metrics}
    values = {key: {y for run in runs for y in points(run, key)[1]} for key in sorted(keys)}
    known = {key for group in groups.values() for key in group} | {"step"}
    rest = [key for key, found in values.items() if key not in known and len(found) > 1]
    still = [key for key, found in values.items() if key not in known and len(found) == 1]
    parts = [legend(runs)]
    for heading, metrics in {**groups, REST: dict.fromkeys(rest, "")}.items():
        present = [key for key in metrics if values.get(key)]
        figures = [figure_html(runs, key, metrics[key], prefix) for key in present]
        shown = f"<div class=figures>{''.join(figures)}</div>"
        if heading == REST:
            constants = ", ".join(f"{key} {min(values[key]):g}" for key in still) or "nothing"
            note = f"<p class=note>Never changed: {html.escape(constants)}.</p>"
            title = f"<summary>{heading} ({len(rest)})</summary>"
            parts.append(f"<details>{title}{shown}{note}</details>")
        elif figures:
            parts.append(f"<h3>{html.escape(heading)}</h3>{shown}")
    return "".join(parts)


# --------------------------------------------------------------------------------------------------
# Pictures for a README

def pictures(paths: list[str], folder: Path):
    """Write curves.svg, six curves of the RL runs, and tree.png, a plan tree of the last of them.

    Raises SystemExit if there is no RL run, or no logged tree with several CoTs per plan.
    """
    rl = [run for run in find_runs(paths) if is_rl(run)]
    remedy = "give one with metrics.jsonl"
    require(rl, f"no run of grpo.py in {', '.join(paths)} to draw; {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(group_seeds(rl), folder / "curves.svg")
    record = telling_tree(rl)
    draw_tree(record, folder / "tree.png")
    files = f"{folder / 'curves.svg'} and {folder / 'tree.png'}"
    print0(f"{files}: step {record['step']}, question {record['id']}")


def draw_curves(rl: list[Run], path: Path):
    """Six curves of the runs, with a running mean over each curve of 12 points or more."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(10, 5), layout="constrained", facecolor="white")
        keys = ("accuracy", "eval_accuracy", "plan_spread", "completion_tokens", "entropy", "kl")
        for axes, key in zip(figure.subplots(2, 3).flat, keys):
            draw(axes, rl, key, COLOURS)
            for line in [line for line in axes.lines if len(line.get_xdata()) >= 12]:
                means = [line.get_ydata()[0]]
                for y in line.get_ydata()[1:]:
                    means.append(0.9 * means[-1] + 0.1 * y)
                axes.plot(line.get_xdata(), means, color=line.get_color(), linewidth=2)
                line.set_alpha(0.35)
            axes.set_title(key, fontsize=10, loc="left")
        # eval_accuracy has few points, so its legend lists no running means.
        title = "band: lowest to highest seed" if any(run.seeds for run in rl) else None
        figure.axes[1].legend(fontsize=9, frameon=False, title=title)
        figure.savefig(path, metadata={"Date": None})


def telling_tree(rl: list[Run]) -> dict:
    """The question of the latest step whose plans differ most in score.

    That is where the plan reward has an effect.
    """
    records = [r for run in rl[::-1] for r in pick_trees(run.folder / "rollouts.jsonl", 10**7)[0]]
    records = [r for r in records if len(r["plans"][0]["completions"]) > 1]
    remedy = "run grpo.py with --cots above 1"
    require(records, f"no plan tree with several CoTs per plan in rollouts.jsonl; {remedy}")

    def telling(record: dict) -> tuple:
        scores = [plan["score"] for plan in record["plans"]]
        return record["step"], len(set(scores)), np.std(scores)

    return max(records, key=telling)


def plan_lines(plan: dict) -> list[str]:
    """The wording of a plan in up to eight short lines."""
    text = plan["completions"][0]["text"].partition("</plan>")[0]
    return textwrap.wrap(text.replace("<plan>", "").strip(), 34)[:8]


def draw_tree(record: dict, path: Path):
    """A question, its plans in a row below it, and each plan's completions below the plan."""
    plans = record["plans"]
    m, z = len(plans), len(plans[0]["completions"])
    texts = [plan_lines(plan) for plan in plans]
    # Heights in inches, from the bottom: z completions, the plan, the question.
    low = 0.4 + 0.6 * z
    high = low + 0.6 + 0.17 * max(map(len, texts))
    figure = Figure(figsize=(2.9 * m, high + 0.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, m), ylim=(0, high + 0.9))
    axes.axis("off")
    style = {"ha": "center", "parse_math": False}
    question = f"{record['problem'][:300]}     gold: {record['answer']}"
    large = {"fontsize": 11, "weight": "bold", "va": "center"}
    axes.text(m / 2, high + 0.6, textwrap.fill(question, 34 * m), **large, **style)
    for i, (plan, lines) in enumerate(zip(plans, texts)):
        x, first = i + 0.5, plan["completions"][0]
        axes.plot([m / 2, x, x], [high + 0.4, high, 0.4], color="#999999", linewidth=1, zorder=0)
        worth = f"score {plan['score']:.2f}   reward {first['reward']['plan']:.2f}"
        text = "\n".join([f"plan {i + 1}   {worth}", "", *lines])
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#eef2fb", "edgecolor": COLOURS[0]}
        axes.text(x, high - 0.1, text, va="top", fontsize=9.5, bbox=box, **style)
        for k, c in enumerate(plan["completions"]):
            verdict, colour = ("✓ right", RIGHT) if c["correct"] else ("✗ wrong", WRONG)
            worth = f"reward {c['reward']['total']:.2f}   advantage {c['advantage']:+z.2f}"
            text, y = f"{verdict}   {c['tokens']} tokens\n{worth}", low - 0.6 - 0.6 * k
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour}
            axes.text(x, y, text, va="center", fontsize=9, color=colour, bbox=box, **style)
    figure.savefig(path, dpi=110)
