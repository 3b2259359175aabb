"""Draws the figures of the pages to learn from: python -m docs.figures

    docs/step.svg          one step of grpo.py as boxes: what goes in, what comes out, with shapes
    docs/group.svg         the walkthrough's rewards, stacked, with their mean; the advantages below
    docs/loss_ratio.svg    loss against ratio for both signs of the advantage, by policy_loss
    docs/lab_curves.svg    some labs beside the run that they are compared with

They have no background, and their colours follow the reader's light or dark scheme. matplotlib
draws in stand-in colours, which become variables of a style sheet inside the SVG.
"""

import io
import json
import re
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from grpo import policy_loss
from plumbing.ranks import print0

FOLDER = Path(__file__).parent
# stand-in -> name, in a light scheme, in a dark one
COLOURS = {
    "#010201": ("ink", "#1f2328", "#e6edf3"),
    "#010202": ("faint", "#6e7781", "#8b949e"),
    "#010203": ("blue", "#1f5fbf", "#79b0ff"),
    "#010204": ("orange", "#b3431e", "#ff9d6e"),
    "#010205": ("green", "#1f7a3d", "#5fd487"),
    "#010206": ("violet", "#7a3fa8", "#cfa3f5"),
    "#010207": ("box", "#eef2fb", "#1b2433"),
}
INK, FAINT, BLUE, ORANGE, GREEN, VIOLET, BOX = COLOURS


def save(figure: Figure, name: str, label: str):
    """Write docs/NAME.svg, with variables in place of the stand-ins, and a text for readers."""
    out = io.StringIO()
    figure.savefig(out, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    for stand_in, (colour, _, _) in COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    scheme = lambda i: "".join(f"--{c[0]}:{c[i]};" for c in COLOURS.values())
    style = f"svg{{{scheme(1)}}}@media(prefers-color-scheme:dark){{svg{{{scheme(2)}}}}}"
    head = f'\\g<0> role="img"><title>{label}</title><style>{style}</style>'
    svg = re.sub(r"<svg [^>]*(?=>)", head, svg, count=1).replace("</style>>", "</style>", 1)
    (FOLDER / f"{name}.svg").write_text(re.sub(r"[ \t]+\n", "\n", svg))


def axes_style(axes):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_visible(False)


# --------------------------------------------------------------------------------------------------
# One step as boxes

BOXES = [  # function of grpo.py, what it does, what comes out
    ("sample_tree", "m plans per question, z CoTs per plan", "N · m z rollouts"),
    ("grade_groups", "texts, verdicts, template", "correct (N, m, z)"),
    ("group_rewards", "outcome + β plan + structure + length", "total (N, m, z)"),
    ("group_advantages", "(R - mean) / std over each question", "A (N, m z)"),
    ("make_micro_batches", "packed without padding; shared beginnings once", "mask (B, T-1)"),
    ("all_logprobs", "of the KL reference, and of a policy that will move", "logprobs (B, T-1)"),
    ("policy_loss", "-min(ρ A, clip(ρ) A) of each token", "loss (B, T-1)"),
    ("kl_k3", "times ρ: the KL term of each token", "KL (B, T-1)"),
    ("token_weights", "1 / tokens of the whole step", "weights (B, T-1)"),
    ("update", "sum, backward, clip the norm, AdamW", "new weights"),
]


def draw_step():
    figure = Figure(figsize=(8, 0.62 * len(BOXES) + 0.35))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(-0.62 * len(BOXES), 0.35))
    axes.axis("off")
    axes.text(0.3, 0.22, "N questions: prompts of token ids", color=INK, fontsize=11, va="center")
    for i, (name, does, gives) in enumerate(BOXES):
        y = -0.62 * i - 0.3
        box = FancyBboxPatch((0.3, y - 0.21), 5.5, 0.42, boxstyle="round,pad=0,rounding_size=0.08",
                             facecolor=BOX, edgecolor=BLUE)
        axes.add_patch(box)
        axes.text(0.42, y, name, color=BLUE, fontsize=10, va="center", family="monospace")
        axes.text(2.3, y, does, color=INK, fontsize=9, va="center")
        axes.text(5.95, y, gives, color=INK, fontsize=10, va="center", family="monospace")
        arrow = {"arrowstyle": "->", "color": FAINT}
        axes.annotate("", (0.15 + 0.4, y + 0.21), (0.15 + 0.4, y + 0.41), arrowprops=arrow)
    label = "One step: " + "; ".join(f"{name} gives {gives}" for name, _, gives in BOXES)
    save(figure, "step", label)


# --------------------------------------------------------------------------------------------------
# A group


def draw_group(data: dict):
    """Stacked reward terms of the walkthrough's completions, and their advantages."""
    plans, beta = data["record"]["plans"], data["config"]["beta"]
    completions = [c for plan in plans for c in plan["completions"]]
    z = len(plans[0]["completions"])
    xs = [i + 0.6 * (i // z) for i in range(len(completions))]  # a gap between plans
    terms = [("outcome", 1, GREEN), ("plan", beta, BLUE), ("structure", 1, VIOLET),
             ("length", 1, ORANGE)]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    top, low = figure.subplots(2, 1, height_ratios=(3, 2), sharex=True)
    base = [0.0] * len(xs)
    for name, factor, colour in terms:
        heights = [factor * c["reward"][name] for c in completions]
        label = f"{beta:g} · plan" if name == "plan" else name
        top.bar(xs, heights, bottom=base, color=colour, label=label, width=0.8)
        base = [a + b for a, b in zip(base, heights)]
    mean = sum(c["reward"]["total"] for c in completions) / len(completions)
    top.axhline(mean, color=INK, linestyle="--", linewidth=1)
    top.text(xs[-1] + 0.5, mean, f"mean {mean:.2f}", color=INK, fontsize=9, va="bottom")
    top.set_xlim(-0.7, xs[-1] + 1.9)
    top.set_ylabel("reward R")
    top.legend(ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    advantages = [c["advantage"] for c in completions]
    low.bar(xs, advantages, color=[GREEN if a > 0 else ORANGE for a in advantages], width=0.8)
    low.axhline(0, color=INK, linewidth=1)
    low.set_ylabel("advantage A")
    middles = [sum(xs[i:i + z]) / z for i in range(0, len(xs), z)]
    names = [f"plan {i + 1}: {p['score'] * z:.0f} of {z} right" for i, p in enumerate(plans)]
    low.set_xticks(middles, names)
    for axes in (top, low):
        axes_style(axes)
        axes.tick_params(axis="x", length=0)
    said = ", ".join(f"{c['reward']['total']:.2f} ({c['advantage']:+.2f})" for c in completions)
    save(figure, "group", f"Rewards, mean {mean:.2f}, and in brackets advantages: {said}")


# --------------------------------------------------------------------------------------------------
# Loss against ratio


def loss_curve(advantage: float, low: float = 0.2, high: float = 0.2):
    """Ratios from 0 to 2, the loss there, and whether it has a gradient. By policy_loss."""
    ratios = torch.linspace(0.005, 2, 400)
    logprobs = ratios.log()[None].requires_grad_()
    mask, zeros = torch.ones(1, 400, dtype=torch.bool), torch.zeros(1, 400)
    loss, _ = policy_loss(logprobs, zeros, torch.tensor([advantage]), mask, low, high)
    gradient, = torch.autograd.grad(loss.sum(), logprobs)
    return ratios.tolist(), loss[0].tolist(), (gradient[0] != 0).tolist()


def draw_loss():
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    for axes, advantage in zip(figure.subplots(1, 2), (1.0, -1.0)):
        ratios, loss, alive = loss_curve(advantage)
        for state, colour, style, label in ((True, BLUE, "-", "has a gradient"),
                                            (False, ORANGE, "--", "cut off by the clip")):
            ys = [y if a == state else float("nan") for y, a in zip(loss, alive)]
            axes.plot(ratios, ys, color=colour, linestyle=style, linewidth=2, label=label)
        for edge in (0.8, 1.2):
            axes.axvline(edge, color=FAINT, linewidth=1, linestyle=":")
        axes.plot([1], [-advantage], "o", color=INK)
        axes.set_title(f"A = {advantage:+g}: {'more' if advantage > 0 else 'less'} likely",
                       fontsize=10, loc="left")
        axes.set_xlabel("ratio ρ = π / π_old")
        axes.set_ylabel("loss -min(ρ A, clip(ρ) A)")
        axes_style(axes)
    figure.axes[0].legend(frameon=False, fontsize=9)
    save(figure, "loss_ratio", "Loss against ratio. For A = 1 it falls to ratio 1.2 and is flat "
         "beyond; for A = -1 it is flat up to 0.8 and rises beyond.")


# --------------------------------------------------------------------------------------------------
# Curves of the labs

SHOWN = {"base": INK, "lr": ORANGE, "temperature": BLUE, "alpha": GREEN, "mini_batches": VIOLET}
KEYS = ("accuracy", "entropy", "kl", "completion_tokens", "length_reward_spread", "zero_variance")


def draw_labs(labs: dict):
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, key in zip(figure.subplots(2, 3).flat, KEYS):
        for name, colour in SHOWN.items():
            values = labs[name][key]
            width = 2 if name == "base" else 1.3
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=width, label=name)
        axes.set_title(key, fontsize=10, loc="left")
        if key == "kl":
            axes.set_yscale("symlog", linthresh=0.01)
        axes_style(axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=len(SHOWN), frameon=False,
                  loc="outside upper left", fontsize=9)
    ends = "; ".join(f"{name} ends at {labs[name]['accuracy'][-1]:.2f}" for name in SHOWN)
    save(figure, "lab_curves", f"Six metrics of five labs by step. Accuracy of {ends}")


# --------------------------------------------------------------------------------------------------
# Main


def main():
    style = {"svg.fonttype": "none", "svg.hashsalt": "lessons", "text.color": INK}
    style |= {f"{part}.color": INK for part in ("xtick", "ytick")}
    style |= {"axes.labelcolor": INK, "axes.edgecolor": FAINT, "grid.color": FAINT}
    style |= {"axes.titlecolor": INK, "legend.labelcolor": INK}
    with rc_context(style):
        draw_step()
        draw_group(json.loads((FOLDER / "walkthrough.json").read_text()))
        draw_loss()
        draw_labs(json.loads((FOLDER / "labs.json").read_text()))
    print0(f"wrote step.svg, group.svg, loss_ratio.svg and lab_curves.svg to {FOLDER}")


if __name__ == "__main__":
    main()
