"""Tokens per second of sft.py and grpo.py, this checkout against an older one, on a real model.

    git worktree add --detach /tmp/old 251aaa7
    python -m bench.stages runs/smollm2_small /tmp/old                   rows sft, grpo and tree
    python -m bench.stages runs/smollm2_small /tmp/old tree --before "--share_prefix false"

Takes model, plans and problems of a finished recipe, and its settings. The checkouts train in
turns, so other load on the machine hits both. They draw other records and other tokens, so rates
are compared: supervised tokens, or those of all completions, divided by a step's seconds. The first
step of each process does not count. --before adds flags to the older checkout's commands.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from plumbing.ranks import fail, require

SAME = "--limit 0 --save_every 0 --eval_every 0 --tokens_per_micro_batch 2500".split()
SFT = "sft.py --batch_size 8 --lr 2e-4 --val_size 1".split()
GRPO = "grpo.py --questions 6 --lr 3e-5 --show_every 0 --max_plan_tokens 64".split()
GRPO += ["--max_completion_tokens", "160"]
NOW = ["--activation_checkpointing", "false"]  # it fits, as the recipe knows
ROWS = {
    "sft": (SFT, "base", "plans.jsonl", []),
    "grpo": (GRPO, "sft/model", "data/train.jsonl", "--plans 12 --cots 1 --beta 0".split()),
    "tree": (GRPO, "sft/model", "data/train.jsonl", "--plans 4 --cots 3".split()),
}


def rates(checkout: Path, command: list[str]) -> list[float]:
    """Tokens per second of each step but the first."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *command, "--out", out, "--overwrite"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        failed = f"{shlex.join(command)} failed in {checkout}: {done.stderr[-2000:]}"
        require(done.returncode == 0, failed)
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["tokens_per_s"] for line in lines][1:]


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("run", type=Path, help="folder of a finished recipe")
    parser.add_argument("folder", type=Path, help="the older checkout")
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(ROWS)}; none: all")
    parser.add_argument("--rounds", type=int, default=2, help="processes per checkout and row")
    parser.add_argument("--steps", type=int, default=3, help="per process; the first doesn't count")
    parser.add_argument("--before", type=shlex.split, default=[], metavar="FLAGS")
    parser.error = fail
    args = parser.parse_args()
    run = args.run.resolve()
    require((run / "sft/model").exists(), f"{run} has no sft/model: run its recipe first")
    require(set(args.rows) <= set(ROWS), f"rows are {', '.join(ROWS)}")
    for name in args.rows or ROWS:
        script, model, data, tree = ROWS[name]
        command = [*script, *SAME, *tree, "--model", str(run / model), "--data", str(run / data)]
        if script is SFT:  # its length is in epochs; one record is held out
            records = len((run / data).read_text().splitlines()) - 1
            command += ["--epochs", str(args.steps * 8 / records)]
        else:
            command += ["--steps", str(args.steps)]
        sides = {"before": (args.folder, args.before), "now": (Path.cwd(), NOW)}
        found = {side: [] for side in sides}
        for round_ in range(args.rounds):
            for side in sorted(sides, reverse=round_ % 2):  # neither is always the second
                checkout, own = sides[side]
                found[side] += rates(checkout, [*command, *own])
                print(f"  round {round_}  {name:5} {side:6} {found[side][-1]:.1f}", flush=True)
        before, now = (statistics.median(found[side]) for side in sides)
        print(f"{name:5} {before:6.1f} tokens/s before, {now:6.1f} now: {now / before:.2f} times")


if __name__ == "__main__":
    main()
