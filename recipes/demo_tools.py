"""What recipes/demo.sh needs besides the stages: their times, and one table at the end.

    python -m recipes.demo_tools stage RUN NAME command ...   run a command; note time and memory
    python -m recipes.demo_tools summary RUN                  print figures, write RUN/summary.json
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from plumbing.ranks import print0

TITLES = {"base": "base model", "sft": "after SFT", "grpo": "after GRPO", "pta": "after PTA-GRPO"}
FIGURES = ("accuracy", "ci_low", "ci_high", "n_problems", "mean_length", "format_rate")


def load_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def banner(title: str):
    print(f"\n=== {title} {'=' * max(1, 88 - len(title))}", flush=True)


def stage(run: Path, name: str, command: list[str]):
    """Run a stage's command, and add its seconds and peak memory to RUN/stages.jsonl."""
    banner(name)
    print("$ " + " ".join(command), flush=True)
    began = time.time()
    status = subprocess.run(command).returncode
    seconds = time.time() - began
    if status:
        raise SystemExit(status)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # Linux counts in KiB
    run.mkdir(parents=True, exist_ok=True)
    record = {"name": name, "seconds": round(seconds, 1), "peak_mb": round(peak)}
    with open(run / "stages.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------
# The end of the demo


def show_question(records: dict[str, list[dict]]):
    """Print the first question that is answered wrong after SFT and right after PTA-GRPO.

    The first sample of each decides.
    """
    first = lambda name, i: records[name][i]["samples"][0]
    learned = lambda i: first("pta", i)["correct"] and not first("sft", i)["correct"]
    shown = next(filter(learned, range(len(records["sft"]))), 0)
    banner("one question, before and after RL")
    for title, name in (("question", "problem"), ("gold", "answer")):
        for line in records["sft"][shown][name].splitlines():
            print0(f"{title:8}  {line}")
    for name in ("sft", "pta"):
        sample = first(name, shown)
        print0(f"{TITLES[name]} ({'right' if sample['correct'] else 'wrong'}):")
        text = sample["completion"]
        for end in ("</plan>", "</think>"):
            text = text.replace(end, end + "\n")
        for block in text.split("\n"):
            print0(f"    {block.strip()}")


def show_table(rows: list[dict]):
    """Print a line per model, with the figures of its evaluation."""
    banner(f"result: {rows[0]['n_problems']} held-out problems")
    print(f"{'':16}{'accuracy':>10}{'95 % interval':>20}{'mean length':>14}{'well-formed':>14}")
    for row in rows:
        percent = {name: 100 * row[name] for name in ("accuracy", "ci_low", "ci_high")}
        print(
            f"{TITLES[row['name']]:16}{percent['accuracy']:9.1f}%"
            f"{percent['ci_low']:z11.1f} to{percent['ci_high']:5.1f}%"
            f"{row['mean_length']:14.1f}{100 * row['format_rate']:13.1f}%"
        )


def comparison_sentence(row: dict, name: str = "PTA-GRPO", other: str = "GRPO") -> str:
    """Say how one method did beside another. `row` is a row of eval.compare: `name` - `other`."""
    points, low, high = (100 * row[name] for name in ("delta", "ci_low", "ci_high"))
    size, chance = f"{abs(points):.1f}", ", which may be chance" if row["p"] >= 0.05 else ""
    result = f"{size} points {'above' if points > 0 else 'below'} {other}"
    if size == "0.0":
        result, chance = f"level with {other}", ""
    p = "p < 0.0001" if row["p"] < 1e-4 else f"p {row['p']:.2g}"
    interval = f"paired 95 % interval {low:+z.1f} to {high:+z.1f}, {p}"
    return f"{name} is {result} ({interval}){chance}: one run, one seed."


def tokens_sentence(run: Path) -> str:
    """Say how many tokens the two methods decoded, and in how many steps."""
    said = []
    for name, title in (("grpo", "GRPO"), ("pta", "PTA-GRPO")):
        steps = load_jsonl(run / name / "metrics.jsonl")
        tokens = sum(step["decoded_tokens"] for step in steps)
        said.append(f"{title} decoded {tokens:,} tokens in {len(steps)} steps")
    return ", ".join(said) + "."


def summary(run: Path):
    """Print a question, the table, the comparison and the times; write RUN/summary.json."""
    from eval import compare  # not at the top: a stage's banner need not wait for its imports

    rows, records = [], {}
    for name in TITLES:
        figures = json.loads((run / f"eval_{name}" / "summary.json").read_text())
        rows.append({"name": name, **{figure: figures[figure] for figure in FIGURES}})
        records[name] = load_jsonl(run / f"eval_{name}" / "records.jsonl")
    comparison = compare(records["grpo"], records["pta"])["rows"][-1]
    stages = load_jsonl(run / "stages.jsonl")
    total, peak = sum(s["seconds"] for s in stages), max(s["peak_mb"] for s in stages)
    result = {
        "rows": rows,
        "pta_minus_grpo": comparison,
        "stage_seconds": {s["name"]: s["seconds"] for s in stages},
        "total_seconds": round(total, 1),
        "peak_mb": peak,
    }
    file = run / "summary.json"
    file.write_text(json.dumps(result, indent=1) + "\n")

    show_question(records)
    show_table(rows)
    print("\n" + tokens_sentence(run))
    print(comparison_sentence(comparison))
    print("\nseconds  " + "  ".join(f"{s['name']} {s['seconds']:.0f}" for s in stages))
    print(f"total {total:.0f} s, peak memory {peak} MB; figures in {file}")


if __name__ == "__main__":
    command, run = sys.argv[1], Path(sys.argv[2])
    if command == "stage":
        stage(run, sys.argv[3], sys.argv[4:])
    else:
        summary(run)
