"""Reading run folders, and choosing what fits on the page.

A file may be missing, still growing, or cut off in mid-write. What can be read is read, and lines
that cannot be read are counted.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch

from plumbing.answers import plan_leaks
from plumbing.folder import FREE_SETTINGS
from plumbing.images import thumbnail
from plumbing.plans import variances
from plumbing.ranks import require
from rewards import parse_completion

MAX_TEXT = 20_000  # characters shown of a problem or a completion


@dataclass
class Run:
    """A training run or an evaluation, read from its folder."""

    name: str
    folder: Path
    settings: dict
    metrics: list[dict] = field(default_factory=list)  # of a training run, one per step
    records: list[dict] = field(default_factory=list)  # of an evaluation
    unread: int = 0  # lines that were cut off or damaged
    seeds: list["Run"] = field(default_factory=list)  # of a row: its runs, see `group_seeds`


def points(run: Run, key: str) -> tuple[list[int], list[float]]:
    """The steps and values of a metric, without values that are missing or not finite.

    Of a row: the means over its seeds.
    """
    if run.seeds:
        shared = seed_values(run, key)
        return list(shared), [fmean(values) for values in shared.values()]
    steps, values = [], []
    for metrics in run.metrics:
        value = metrics.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            steps.append(metrics["step"])
            values.append(value)
    return steps, values


def seed_values(row: Run, key: str) -> dict[int, list[float]]:
    """A metric's values of all seeds of a row, by step, for the steps at which each has one."""
    found = [dict(zip(*points(run, key))) for run in row.seeds]
    steps = [step for step in found[0] if all(step in values for values in found)]
    return {step: [values[step] for values in found] for step in steps}


def column(run: Run, key: str) -> list[float]:
    """The finite values of a metric."""
    return points(run, key)[1]


def is_rl(run: Run) -> bool:
    """Whether this is a run of grpo.py; sft.py logs no rewards."""
    return bool(column(run, "reward"))


# --------------------------------------------------------------------------------------------------
# Finding and reading runs

def read_jsonl(path: Path) -> tuple[list[dict], int]:
    """The objects of a JSONL file, and the number of lines that hold none."""
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
    """The object in a JSON file, or {} where the file is missing or half written."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def settings_of(folder: Path) -> dict:
    """A run's settings. Some evaluations have them in their summary only."""
    return read_json(folder / "run.json") or read_json(folder / "summary.json").get("settings", {})


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run or an evaluation."""
    return (folder / "metrics.jsonl").exists() or (folder / "records.jsonl").exists()


def evaluations_beside(folder: Path) -> list[Path]:
    """The evaluations of a run's model that are in the same folder as the run."""
    folder = folder.resolve()
    beside = [f for f in sorted(folder.parent.iterdir()) if (f / "records.jsonl").exists()]
    return [f for f in beside if Path(settings_of(f).get("model", "")).parent.name == folder.name]


def find_folders(paths: list[str]) -> list[Path]:
    """The run folders that `paths` name or hold, each once. Raises SystemExit if there is none."""
    found: list[Path] = []
    for path in map(Path, paths):
        remedy = "give a run folder such as runs/demo or runs/demo/pta"
        require(path.is_dir(), f"no folder {path}; {remedy}")
        if is_run(path):
            found += [path, *evaluations_beside(path)]
        else:
            inner = [folder for folder in path.iterdir() if folder.is_dir() and is_run(folder)]
            written = lambda folder: min(f.stat().st_mtime for f in folder.glob("*.jsonl"))
            found += sorted(inner, key=written)  # oldest first: SFT before RL
    folders = list({folder.resolve(): folder for folder in found}.values())
    remedy = "give the --out folder of grpo.py, sft.py or eval.py"
    require(folders, f"no metrics.jsonl or records.jsonl in {', '.join(paths)}; {remedy}")
    return folders


def read_run(folder: Path, name: str) -> Run:
    """What a run folder holds, but for its rollouts."""
    metrics, bad_metrics = read_jsonl(folder / "metrics.jsonl")
    records, bad_records = read_jsonl(folder / "records.jsonl")
    # A resumed run may have done a step twice: the second time counts.
    metrics = list({m["step"]: m for m in metrics if "step" in m}.values())
    # The intervals need the same number of samples for every problem.
    records = [r for r in records if r.get("samples")]
    records = [r for r in records if len(r["samples"]) == len(records[0]["samples"])]
    return Run(name, folder, settings_of(folder), metrics, records, bad_metrics + bad_records)


def find_runs(paths: list[str]) -> list[Run]:
    """The runs in the given folders, each once. Runs of the same name get their parent's, too."""
    folders = find_folders(paths)
    full = [folder.resolve() for folder in folders]
    names = [path.name for path in full]
    unique = [p.name if names.count(p.name) == 1 else f"{p.parent.name}/{p.name}" for p in full]
    return [read_run(folder, name) for folder, name in zip(folders, unique)]


# --------------------------------------------------------------------------------------------------
# Rows: runs that differ in their seed

def row_key(run: Run) -> str:
    """What the runs of a row have in common: all settings that change results but the seed."""
    settings = run.settings
    if "seed" not in settings:  # no run.json: a row of its own
        return str(run.folder)
    ignored = FREE_SETTINGS | {"seed", "changes"}
    if settings.get("schedule", "constant") != "constant":  # then --steps changes every step
        ignored -= {"steps"}
    return json.dumps({key: settings[key] for key in settings.keys() - ignored}, sort_keys=True)


def row_name(run: Run) -> str:
    """A run's name without its seed: pta for pta_0, pta_seed0 and seed0/pta."""
    name = re.sub(rf"(^|[-_./])(s|seed)?[-_=]?{run.settings['seed']}(?=/|$)", "", run.name)
    return name.strip("/") or run.folder.resolve().parent.name


def group_seeds(runs: list[Run]) -> list[Run]:
    """The runs, with those that differ only in their seed as one Run, which has them as `seeds`.

    Its other fields are those of its first run. If a seed occurs twice, something that is no
    setting may differ, such as the code: then each of these runs stays alone.
    """
    keys, rows = [row_key(run) for run in runs], []
    for run, key in zip(runs, keys):
        row = [other for other, its_key in zip(runs, keys) if its_key == key]
        if len(row) == 1 or len({other.settings["seed"] for other in row}) < len(row):
            rows.append(run)
        elif run is row[0]:
            rows.append(replace(run, name=f"{row_name(run)} ({len(row)} seeds)", seeds=row))
    return rows


# --------------------------------------------------------------------------------------------------
# Plan trees: some of rollouts.jsonl, which may be larger than memory

def spread(count: int, n: int) -> list[int]:
    """At most n of the indices 0..count-1, evenly spread, the first and the last among them."""
    n = min(n, count)
    return [round(i * (count - 1) / max(1, n - 1)) for i in range(n)]


def index_lines(path: Path) -> tuple[dict[int, list[tuple[int, int]]], int, int]:
    """Where the questions of each step are: {step: [(offset, length), ...]}.

    Also returns the number of lines that are no question records, and the size of the file.
    """
    where: dict[int, list[tuple[int, int]]] = {}
    unread, offset = 0, 0
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                start = re.match(rb'\s*\{"step": ?(\d+)', line)
                if start and line.endswith(b"\n"):
                    where.setdefault(int(start[1]), []).append((offset, len(line)))
                else:
                    unread += 1
                offset += len(line)
    return where, unread, offset


def read_lines(path: Path, lines: list[tuple[int, int]], limit: float) -> tuple[list[dict], int]:
    """The records at (offset, length), and the number of damaged ones.

    Stops before `limit` bytes, but not before the first record.
    """
    records, used, damaged = [], 0, 0
    if not lines:
        return records, damaged
    with open(path, "rb") as file:
        for offset, length in lines:
            used += length
            if used > limit and records:
                break
            file.seek(offset)
            try:
                records.append(json.loads(file.read(length)))
            except ValueError:
                damaged += 1
    return records, damaged


def pick_trees(path: Path, budget: int) -> tuple[list[dict], dict]:
    """About `budget` bytes of question records, and what there was: steps, trees, unread lines.

    If all records fit, all are returned; else some questions of steps spread evenly over the run.
    """
    where, unread, size = index_lines(path)
    steps = [lines for _, lines in sorted(where.items())]
    total = sum(map(len, steps))
    fits = int(total * min(1.0, budget / max(1, size)))
    if fits < total:
        # Four questions of few steps say more than one question of each of many steps.
        per_step = max(4, math.ceil(fits / len(steps)))
        steps = [steps[i] for i in spread(len(steps), max(1, fits // per_step))]
        steps = [[lines[i] for i in spread(len(lines), per_step)] for lines in steps]
    # Lengths differ: the chosen lines may be long ones.
    records, damaged = read_lines(path, [line for lines in steps for line in lines], 1.2 * budget)
    return records, {"steps": len(where), "trees": total, "unread": unread + damaged}


# A think block that says the plan changes. It matches wordings and does not judge the content.
# "The plan is not wrong" does not match.
REVISED = re.compile(
    r"\b(?:revis|adjust|chang|correct|fix|amend|abandon|discard|replac|rethink|updat)\w*\s+"
    r"(?:\w+\s+){0,2}?plan\b|"
    r"\bplan\s+(?:(?!not\b)\w+\s+){0,3}?"
    r"(?:wrong|incorrect|mistaken|flawed|incomplete|fails?|cannot work)\b|"
    r"\b(?:different|new|better|another)\s+plan\b",
    re.IGNORECASE,
)


def plan_revised(think: str) -> bool:
    """Whether the think block says that the plan is wrong or changes."""
    return REVISED.search(think) is not None


def cut_text(text: str) -> dict:
    """The text as the page shows it, and how many characters were cut off."""
    return {"text": text[:MAX_TEXT], "cut": max(0, len(text) - MAX_TEXT)}


def page_completion(completion: dict, answer: str) -> dict:
    """A logged completion as the page shows it: with flags, and cut if it is very long."""
    parsed = parse_completion(completion["text"])
    # Logs of earlier versions do not say it, and name no verifier.
    leaks = completion.get("leaks", bool(parsed and plan_leaks(parsed.plan, answer)))
    revised = bool(parsed and plan_revised(parsed.think))
    return {**completion, **cut_text(completion["text"]), "leaks": leaks, "revised": revised}


def plans_line(record: dict, share: float | None) -> str:
    """How much a logged question's plans differ, and the ICC `share` of its step, in words.

    Empty without a finite `share`, as in older runs, and where plans have no siblings to compare.
    """
    right = [[float(c["correct"]) for c in plan["completions"]] for plan in record["plans"]]
    several = len(right) > 1 and {len(row) for row in right} == {len(right[0])} != {1}
    if not several or share is None or not math.isfinite(share):
        return ""
    plan, cot = variances(torch.tensor([right]))[0].tolist()
    between = f"by ±{math.sqrt(plan):.2f}" if plan > 0 else "no more than by chance"
    line = f"Plans differ {between}, CoTs of one plan by ±{math.sqrt(cot):.2f}"
    return f"{line}; at this step plans decide {100 * share:.0f} % of the outcome."


def page_tree(record: dict, run: int, share: float | None = None) -> dict:
    """A question record of the page's run number `run` as the page shows it.

    `share`: the ICC at its step, if it is known.
    """
    plans = []
    for plan in record["plans"]:
        completions = [page_completion(c, record["answer"]) for c in plan["completions"]]
        plans.append({"score": plan["score"], "completions": completions})
    head = {key: record[key] for key in ("step", "id", "answer")}
    tree = {"run": run, **head, "problem": record["problem"][:MAX_TEXT], "plans": plans}
    if "images" in record:
        tree["images"] = [thumbnail(path) for path in record["images"]]
    line = plans_line(record, share)
    return {**tree, "line": line} if line else tree


def choose_trees(rl: list[Run], budget: int) -> tuple[list[dict], list[str], int]:
    """Plan trees in about `budget` bytes, what was left out in words, and unreadable lines."""
    trees, left_out, unread = [], [], 0
    for i, run in enumerate(rl):
        records, found = pick_trees(run.folder / "rollouts.jsonl", budget // len(rl))
        shares = dict(zip(*points(run, "plan_icc_mean")))
        planned = [record for record in records if record.get("plans")]
        trees += [page_tree(record, i, shares.get(record["step"])) for record in planned]
        unread += found["unread"]
        if len(records) < found["trees"]:
            steps = len({record["step"] for record in records})
            left_out.append(
                f"{run.name}: {len(records):,} of {found['trees']:,} logged trees, from {steps} of "
                f"{found['steps']} logged steps, spread evenly; the rest is in rollouts.jsonl."
            )
    return trees, left_out, unread


# --------------------------------------------------------------------------------------------------
# The same question before and after

def page_question(records: dict[int, dict], samples: int) -> dict:
    """A question with its first samples; `records`: number of the evaluation -> its record."""
    runs = []
    for i, record in records.items():
        shown = [
            {**cut_text(s["completion"]), "correct": s["correct"], "tokens": s["tokens"],
             "said": s.get("said", [])}
            for s in record["samples"][:samples]
        ]
        right = sum(s["correct"] for s in record["samples"])
        runs.append({"eval": i, "right": right, "n": len(record["samples"]), "samples": shown})
    first = next(iter(records.values()))
    head = {"id": first["id"], "answer": first["answer"], "problem": first["problem"][:MAX_TEXT]}
    head |= {"images": first["images"]} if "images" in first else {}
    return {**head, "runs": runs}


def before_after(evals: list[Run], budget: int, samples: int = 2) -> tuple[list[dict], int]:
    """Questions that all evaluations of their benchmark share, in about `budget` bytes.

    Returns them with the first samples of each evaluation, and how many shared questions exist.
    """
    questions = []
    benchmark = lambda record: record.get("benchmark", "")
    for name in dict.fromkeys(benchmark(record) for run in evals for record in run.records):
        found = {}  # number of the evaluation -> its records of this benchmark
        for i, run in enumerate(evals):
            own = {(r["id"], r["problem"]): r for r in run.records if benchmark(r) == name}
            if own:
                found[i] = own
        for key in next(iter(found.values())):
            if all(key in own for own in found.values()):
                shared = {i: own[key] for i, own in found.items()}
                questions.append(page_question(shared, samples))
    few = [questions[i] for i in spread(len(questions), 50)]
    size = len(json.dumps(few)) / max(1, len(few))  # mean bytes per question
    kept = [questions[i] for i in spread(len(questions), int(budget / max(1, size)))]
    for question in kept:
        if "images" in question:
            question["images"] = [thumbnail(path) for path in question["images"]]
    return kept, len(questions)
