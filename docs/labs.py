"""Runs the labs of docs/labs.md, and fills in what came out.

    python -m docs.labs          the tables of labs.md, from docs/labs.json
    python -m docs.labs --run    first run the commands that labs.md shows, and note their metrics

labs.md is the source: its commands are what runs. A table stands between `<!-- figures: NAME -->`
and `<!-- end -->`, and compares the run NAME with the run `base`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from plumbing.ranks import print0, require
from plumbing.records import load_jsonl

FOLDER = Path(__file__).parent
PAGE, FIGURES, RUNS = FOLDER / "labs.md", FOLDER / "labs.json", Path("runs/lessons")
METRICS = """accuracy reward outcome_spread plan_spread length_reward_spread credit_corr
zero_variance entropy kl clip_frac grad_norm completion_tokens format_rate""".split()
ENDS = 5  # steps that are averaged at either end


def blocks(text: str) -> tuple[str, str, dict[str, str]]:
    """The start's commands, the shell function `lab`, and of each lab its name and command."""
    start, function, *labs = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return start, function, {lab.split()[1]: lab for lab in labs}


def run(text: str) -> dict:
    """Run every lab, one after the other. Returns name -> metric -> its values by step."""
    start, function, labs = blocks(text)
    shell = lambda script: subprocess.run(["bash", "-ec", script], check=True)
    if not (RUNS / "sft/model/model.safetensors").exists():
        shell(start)
    found = {}
    for name, command in labs.items():
        shell(function + command)
        steps = load_jsonl(RUNS / name / "metrics.jsonl")
        values = {m: [float(f"{s.get(m, 'nan'):.4g}") for s in steps if m in s] for m in METRICS}
        found[name] = {metric: row for metric, row in values.items() if row}
    return found


def shown(value: float) -> str:
    return f"{value:z.0f}" if abs(value) >= 100 else f"{value:z.3g}" if value else "0"


def table(found: dict, name: str) -> str:
    """Means over the first and the last steps, of the lab and of the run without its change."""
    of = lambda run, metric: found[run].get(metric, [])
    steps = len(of("base", METRICS[0]))
    first, last = f"steps 1 to {ENDS}", f"steps {steps - ENDS + 1} to {steps}"
    labels = [f"base, {first}", f"base, {last}"]
    labels += [f"{name}, {first}", f"{name}, {last}"] if name != "base" else []
    lines = [f"| metric | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|"]
    for metric in METRICS:
        runs = ["base", name][:len(labels) // 2]
        ends = [part for r in runs for part in (of(r, metric)[:ENDS], of(r, metric)[-ENDS:])]
        if any(ends):
            cells = [shown(sum(part) / len(part)) if part else "–" for part in ends]
            lines.append(f"| `{metric}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(text: str, found: dict) -> str:
    """labs.md with its tables made anew."""
    mark = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return mark.sub(lambda m: f"{m[1]}\n{table(found, m[2])}\n\n{m[3]}", text)


def main(arguments: list[str]):
    require(arguments in ([], ["--run"]), "give nothing, or --run: python -m docs.labs --run")
    if arguments:
        FIGURES.write_text(json.dumps(run(PAGE.read_text()), separators=(",", ":")) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), json.loads(FIGURES.read_text())))
    print0(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
