"""Does planning pay? Rows of settings, several seeds each, on two embedded tasks.

    python -m bench.study                 run what is missing, two at a time; then bench/STUDY.md
    python -m bench.study --minutes 80    start no run after so many minutes; the next call goes on
    python -m bench.study --status        print which runs are done
    python -m bench.study --costs         measure each row's seconds per token, on a calm machine

All runs of a task start from the same SFT checkpoint. A run trains until it has decoded the task's
budget of tokens (a plan counts once), at a constant learning rate, so that its curve can be cut at
any smaller budget. Then 600 held-out problems are answered 4 times each at temperature 1, without
top-p: that is the policy as it was trained. Every finished run is a line of bench/study.jsonl. The
first seed of each row is also evaluated with other plans; a line that lacks this is completed by
another training of its row, whose line holds nothing else.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from bench.study_page import write_page
from data import doors, toy
from plumbing.ranks import fail, printable
from plumbing.revision import revision_figures
from rewards import parse_completion

RESULTS, COSTS = Path("bench/study.jsonl"), Path("bench/study_costs.json")
RUNS = Path("runs/study")
QUESTIONS, SAMPLES = 16, 4
COST_STEPS = 8


@dataclass
class Task:
    """An embedded task. A run decodes about as many tokens as `plain_steps` steps of GRPO 12x1."""

    name: str
    module: object
    judge: Callable  # (problem, plan, think) -> what the plan was worth
    data: str  # flags of its module
    base: str  # model to start SFT from; empty: random weights
    sft: str  # flags of sft.py
    limits: str  # flags of grpo.py and eval.py
    plan_tokens: float  # mean length of a plan after SFT
    cot_tokens: float  # and of a CoT
    plain_steps: int
    small: int  # completions per question that take as many tokens as a tree of 4x3
    lr: str = "1e-4"

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    def steps(self, plans: int, cots: int) -> int:
        """Steps until the budget is decoded, at the SFT model's mean lengths."""
        cost = lambda m, z: m * (self.plan_tokens + z * self.cot_tokens)
        return round(self.plain_steps * cost(12, 1) / cost(plans, cots))


def judge_quantities(problem: str, plan: str, think: str) -> dict:
    """Best: the plan names every needed quantity, what each uses, and nothing else."""
    *listed, asked = problem.split(" ; ")
    facts = {fact[0]: tuple(fact[4:].split()) for fact in listed}
    order = toy.needed(facts, asked[0])
    whole = toy.plan_of(" ; ".join(f"{name} = {' '.join(facts[name])}" for name in order))
    steps = lambda text: set(text.split(" ; "))
    named = lambda text: {step[:1] for step in steps(text)}
    revised = named(think) != named(plan)
    best = steps(plan) == steps(whole)
    return {"best": best, "value": float(best), "revised": revised, "whole": whole}


def judge_doors(problem: str, plan: str, think: str) -> dict:
    """Best: the plan takes the likeliest door of every hall. Its value is its chance."""
    route = " ".join(max(hall, key=hall.get) for hall in doors.doors_of(problem))
    planned = doors.planned_route(plan)
    value = doors.chance(problem, planned)
    best = value == doors.chance(problem, route)
    whole = doors.plan_of(problem, route)
    return {"best": best, "value": value, "revised": think != planned, "whole": whole}


TASKS = {
    "doors": Task(
        "doors", doors, judge_doors,
        data="--sft 12000 --train 8000 --test 600", base="",
        sft="--epochs 1 --lr 3e-3 --batch_size 32",
        limits="--max_plan_tokens 30 --max_completion_tokens 48",
        plan_tokens=19, cot_tokens=13, plain_steps=30, small=7,
    ),
    "quantities": Task(
        "quantities", toy, judge_quantities,
        data="--sft 12000 --terse 0.5 --test 600", base="data/toy_base",
        sft="--epochs 2 --lr 2e-3 --batch_size 64",
        limits="--max_plan_tokens 48 --max_completion_tokens 128",
        plan_tokens=13.5, cot_tokens=31, plain_steps=50, small=10,
    ),
}
TREE, PLAIN = "--plans 4 --cots 3", "--plans 12 --cots 1 --beta 0"
DAPO = "--clip_high 0.28 --mini_batches 4 --dynamic_sampling --overlong_buffer 8 --kl_coef 0"
# Row -> flags of grpo.py. The main rows have five seeds, the others three.
MAIN_ROWS = {
    "GRPO 12x1": PLAIN,
    # As many tokens per step as the tree, so as many steps: is it the tree, or only more steps?
    "GRPO, small groups": "--plans {small} --cots 1 --beta 0",
    "PTA-GRPO 4x3": f"{TREE} --beta 0.5",
    "tree 4x3, beta 0": f"{TREE} --beta 0",
    "segment 4x3, beta 0": f"{TREE} --beta 0 --credit segment",
    "segment 4x3, beta 0.5": f"{TREE} --beta 0.5 --credit segment",
    "DAPO": f"{PLAIN} {DAPO}",
    "Dr. GRPO": f"{PLAIN} --std_norm false --loss_agg constant --kl_coef 0",
}
MORE_ROWS = {
    "PTA-GRPO 6x2": "--plans 6 --cots 2 --beta 0.5",
    "PTA-GRPO 3x4": "--plans 3 --cots 4 --beta 0.5",
    "PTA-GRPO 2x6": "--plans 2 --cots 6 --beta 0.5",
    "PTA-GRPO 4x3, beta 0.3": f"{TREE} --beta 0.3",
    "PTA-GRPO 4x3, beta 0.9": f"{TREE} --beta 0.9",
    "PTA-GRPO 4x3, tau 0.1": f"{TREE} --beta 0.5 --tau 0.1",
    "PTA-GRPO 4x3, no format reward": f"{TREE} --beta 0.5 --structure 0 --alpha 0",
    "PTA-GRPO 4x3, no length reward": f"{TREE} --beta 0.5 --alpha 0",
    "PTA-GRPO 4x3, length reward if right": f"{TREE} --beta 0.5 --correct_only",
    "PTA-GRPO 4x3, no SFT": f"{TREE} --beta 0.5",
}
ROWS = MAIN_ROWS | MORE_ROWS
SEEDS = {name: 5 if name in MAIN_ROWS else 3 for name in ROWS}
# Steps of rows that do not decode a fixed number of tokens per step, found by trial.
OWN_STEPS = {("doors", "DAPO"): 24, ("quantities", "DAPO"): 24}


def jobs() -> list[tuple[str, str, int]]:
    """(task, row, seed) of all runs: the main rows first, and of these one seed after the other."""
    order = [(rows, task, seed) for rows in (MAIN_ROWS, MORE_ROWS) for task in TASKS
             for seed in range(5)]
    return [
        (task, row, seed)
        for rows, task, seed in order
        for row in rows
        if seed < SEEDS[row] and not (row.endswith("no SFT") and not TASKS[task].base)
    ]


# --------------------------------------------------------------------------------------------------
# One run


def call(command: str, log: Path):
    """Run one of the project's scripts on one thread. SystemExit with its log if it fails."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        words = [sys.executable, *command.split()]
        done = subprocess.run(words, stdout=out, stderr=out, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(f"error: {command!r} failed: see {log}")


def prepare(task: Task):
    """Data, plans and SFT of a task, once."""
    folder, data = task.folder, task.folder / "data"
    if (folder / "sft/model/config.json").exists():
        return check_start(task)
    module = task.module.__name__
    call(f"-m {module} --out {data} {task.data} --overwrite", folder / "data.log")
    plans = f"--data {data}/sft.jsonl --limit 0 --out {folder}/plans.jsonl --overwrite"
    call(f"distill.py --teacher rule {plans}", folder / "distill.log")
    call(
        f"sft.py --model {task.base or data / 'model'} --data {folder}/plans.jsonl --limit 0 "
        f"--out {folder}/sft {task.sft} --tokens_per_micro_batch 4000 --save_every 0 "
        "--activation_checkpointing false --overwrite",
        folder / "sft.log",
    )
    check_start(task)


def start_digest(task: Task) -> str:
    weights = (task.folder / "sft/model/model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()[:16]


def check_start(task: Task):
    """Refuse an SFT model other than the one that the task's earlier runs started from."""
    known = {line.get("start") for line in read_results() if line["task"] == task.name} - {None}
    if known and start_digest(task) not in known:
        raise SystemExit(
            f"error: the SFT model in {task.folder} is not the one of the runs in {RESULTS}: bring "
            f"that one, or move {RESULTS} away and begin again"
        )


def flags_of(task: Task, row: str) -> str:
    return ROWS[row].format(small=task.small)


def steps_of(task: Task, row: str) -> int:
    words = flags_of(task, row).split()
    plans, cots = (int(words[words.index(flag) + 1]) for flag in ("--plans", "--cots"))
    return OWN_STEPS.get((task.name, row)) or task.steps(plans, cots)


def train(task: Task, row: str, seed: int, out: Path, steps: int = 0) -> float:
    """Train the row for its own number of steps, or another. Returns its seconds."""
    start = task.base if row.endswith("no SFT") else task.folder / "sft/model"
    began = time.time()
    call(
        f"grpo.py --model {start} --data {task.folder}/data/train.jsonl --out {out} --overwrite "
        f"--steps {steps or steps_of(task, row)} --questions {QUESTIONS} --seed {seed} "
        f"--lr {task.lr} --warmup_steps 5 --save_every 0 --eval_every 0 --show_every 0 "
        f"{task.limits} --tokens_per_micro_batch 4000 --activation_checkpointing false "
        f"{flags_of(task, row)}",
        out.with_suffix(".log"),
    )
    return time.time() - began


def evaluate(task: Task, model: Path, out: Path, flags: str = "") -> list[dict]:
    """The records of the held-out problems."""
    call(
        f"eval.py --model {model} --data {task.folder}/data/test.jsonl --out {out} --n {SAMPLES} "
        f"--temperature 1 --top_p 1 {task.limits} --overwrite {flags}",
        out.with_suffix(".log"),
    )
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def counts(records: list[dict]) -> str:
    """Right samples per problem, one digit each, in the order of the file."""
    return "".join(str(sum(s["correct"] for s in record["samples"])) for record in records)


def accuracy(right: str) -> float:
    """Of `counts`."""
    return sum(map(int, right)) / len(right) / SAMPLES


def what_the_plans_did(task: Task, records: list[dict]) -> dict:
    """The plans of well-formed samples held against the truth, which is known exactly here."""
    seen = []
    for record in records:
        for sample in record["samples"]:
            if parsed := parse_completion(sample["completion"]):
                row = task.judge(record["problem"], parsed.plan, parsed.think)
                seen.append({**row, "right": sample["correct"]})
    wrong = [row for row in seen if not row["best"]]
    share = lambda name, rows: round(sum(r[name] for r in rows) / len(rows), 4) if rows else None
    return {
        "plans": len(seen),
        "best": share("best", seen),
        "value": share("value", seen),
        "right_if_best": share("right", [row for row in seen if row["best"]]),
        "right_if_not": share("right", wrong),
        "revised": share("revised", wrong),
        "right_if_revised": share("right", [row for row in wrong if row["revised"]]),
        # against the completion's own world
        **revision_figures([sample for record in records for sample in record["samples"]]),
    }


def other_plans(task: Task, model: Path, own: list[dict], out: Path) -> dict[str, float]:
    """Accuracy with the model's own plan, the true plan, another problem's plan, and none."""
    true = out / "true_plans.jsonl"
    plans = [{"id": r["id"], "plan": task.judge(r["problem"], "", "")["whole"]} for r in own]
    true.write_text("".join(json.dumps(plan) + "\n" for plan in plans))
    flags = {
        "true": f"--plan {true}", "none": "--plan none",
        "shuffled": f"--plan shuffled --plan_from {true}",
    }
    sampled = {"own": own}
    for name, plan in flags.items():
        sampled[name] = evaluate(task, model, out / f"eval_{name}", plan)
    return {name: accuracy(counts(records)) for name, records in sampled.items()}


def plan_trees(task: Task, model: Path, out: Path) -> dict:
    """`eval.py --analysis plans`, and the correlation of plans' scores with what they are worth."""
    flags = f"--data {task.folder}/data/test.jsonl --limit 300 --temperature 1 --top_p 1"
    call(
        f"eval.py --model {model} --out {out}/plans --overwrite {flags} {task.limits} "
        "--analysis plans --n 12 --cots 3",
        out / "plans.log",
    )
    scores, values = [], []
    for line in (out / "plans/records.jsonl").read_text().splitlines():
        record = json.loads(line)
        for i in range(0, 12, 3):
            cots = record["samples"][i:i + 3]
            if parsed := parse_completion(cots[0]["completion"]):
                scores.append(sum(s["correct"] for s in cots) / 3)
                values.append(task.judge(record["problem"], parsed.plan, parsed.think)["value"])
    analysis, = json.loads((out / "plans/summary.json").read_text())["plans"].values()
    varied = len(set(scores)) > 1 and len(set(values)) > 1  # no plan is well formed without SFT
    corr = round(float(np.corrcoef(scores, values)[0, 1]), 4) if varied else None
    return {"analysis": analysis, "score_corr": corr}


def about_plans(task: Task, model: Path, own: list[dict], out: Path) -> dict:
    return {"with_plan": other_plans(task, model, own, out), **plan_trees(task, model, out)}


def run_job(task: Task, row: str, seed: int, plans_only: bool = False) -> dict:
    """Train and evaluate. Returns the line of bench/study.jsonl, or its fields on other plans."""
    out = task.folder / f"{row} {seed}".replace(" ", "_").replace(",", "")
    seconds = train(task, row, seed, out)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    records = evaluate(task, out / "model", out / "eval")
    key = {"task": task.name, "row": row, "seed": seed}
    if plans_only:
        result = key | about_plans(task, out / "model", records, out)
        shutil.rmtree(out)
        return result
    column = lambda name: [round(m[name], 4) for m in metrics if name in m]
    icc = column("plan_icc_mean")
    result = {
        **key, "flags": flags_of(task, row),
        "seconds": round(seconds, 1), "step_seconds": sorted(column("seconds"))[len(metrics) // 2],
        "icc": icc[-1] if icc else None, "credit_corr": (column("credit_corr") or [None])[-1],
        "accuracy": column("accuracy"), "decoded": column("decoded_tokens"),
        "completions": column("completions_sampled"), "right": counts(records),
        "did": what_the_plans_did(task, records),
    }
    if seed == 0:
        result |= about_plans(task, out / "model", records, out)
    shutil.rmtree(out)  # the line holds all that the page needs
    return result


def sft_job(task: Task) -> dict:
    """The start of all runs: how it does, and how much its plans decide."""
    out, model = task.folder / "start", task.folder / "sft/model"
    records = evaluate(task, model, out / "eval")
    result = {
        "task": task.name, "row": "SFT", "seed": 0, "start": start_digest(task),
        "right": counts(records),
        "did": what_the_plans_did(task, records),
        **about_plans(task, model, records, out),
    }
    shutil.rmtree(out)
    return result


def measure_costs(tasks: list[Task]):
    """Seconds per decoded token of each row, one at a time on one thread: medians of a few steps.

    Runs of the study go side by side, and on a machine that may be busy. So its seconds are decoded
    tokens times these.
    """
    costs = json.loads(COSTS.read_text()) if COSTS.exists() else {"machine": machine()}
    for task in tasks:
        for row in dict.fromkeys(row for name, row, _ in jobs() if name == task.name):
            out = task.folder / "cost"
            train(task, row, 0, out, COST_STEPS)
            lines = (out / "metrics.jsonl").read_text().splitlines()
            each = [m["seconds"] / m["decoded_tokens"] for m in map(json.loads, lines)]
            costs.setdefault(task.name, {})[row] = round(sorted(each)[len(each) // 2], 8)
            shutil.rmtree(out)
            shown = f"{1e6 * costs[task.name][row]:8.1f} us per token"
            print(f"{task.name:12}{row:40}{shown}", flush=True)
            COSTS.write_text(json.dumps(costs, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# Main


def key_of(line: dict) -> tuple[str, str, int]:
    return line["task"], line["row"], line["seed"]


def lacks_plans(line: dict) -> bool:
    """Whether the line is of a first seed that has not been evaluated with other plans."""
    return line["seed"] == 0 and not {"with_plan", "score_corr"} <= set(line)


def read_results() -> list[dict]:
    """The lines of bench/study.jsonl, one per run; with `token_seconds`, see `measure_costs`.

    Rows that differ in rewards alone cost the same: each gets the median of their costs, as the
    machine's speed varies.
    """
    text = RESULTS.read_text() if RESULTS.exists() else ""
    merged = {}
    for line in map(json.loads, text.splitlines()):
        key = key_of(line)
        merged[key] = merged.get(key, {}) | line
    lines = list(merged.values())
    costs, alike = json.loads(COSTS.read_text()) if COSTS.exists() else {}, {}
    runs = [line for line in lines if "decoded" in line]
    costly = re.compile(r"--(?:plans|cots|kl_coef|mini_batches) \S+")
    work = lambda line: (line["task"], *costly.findall(line["flags"]))
    for line in runs:
        own = line["step_seconds"] * len(line["decoded"]) / sum(line["decoded"])
        cost = costs.get(line["task"], {}).get(line["row"], own)
        alike.setdefault(work(line), {})[line["row"]] = cost
    for line in runs:
        line["token_seconds"] = statistics.median(alike[work(line)].values())
    return lines


def machine() -> dict:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def print_status(done: set):
    for task in TASKS:
        for row in ROWS:
            seeds = [s for name, other, s in jobs() if (name, other) == (task, row)]
            states = "".join("x" if (task, row, s) in done else "." for s in seeds)
            print(f"{task:12}{row:40}{states}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--minutes", type=float, default=240, help="start no run after so many")
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--costs", action="store_true", help="measure seconds per token, and end")
    parser.add_argument("--status", action="store_true", help="print which runs are done, and end")
    parser.error = fail
    args = parser.parse_args()
    earlier = {key_of(line): line for line in read_results()}
    done = {key for key, line in earlier.items() if not lacks_plans(line)}
    if args.status:
        return print_status(done)
    tasks = [TASKS[name] for name in args.tasks]
    if args.costs:
        measure_costs(tasks)
        return write_page(read_results())
    end = time.time() + 60 * args.minutes

    def work(job):
        task, row, seed = job
        if time.time() > end:
            return
        try:
            key = task.name, row, seed
            result = sft_job(task) if row == "SFT" else run_job(*job, plans_only=key in earlier)
        except (SystemExit, Exception) as error:  # the other runs go on
            said = printable(f"{task.name}, {row}, seed {seed}: {error}")
            return print(said, flush=True)
        with open(RESULTS, "a") as file:  # one short write: two threads do not mix lines
            file.write(json.dumps({**result, **machine()}) + "\n")
        own = result["with_plan"]["own"] if seed == 0 else accuracy(result["right"])
        print(f"{task.name:12}{row:40} seed {seed}  {own:.3f}", flush=True)

    todo = [(task, "SFT", 0) for task in tasks]
    todo += [(TASKS[task], row, seed) for task, row, seed in jobs() if task in args.tasks]
    todo = [job for job in todo if (job[0].name, *job[1:]) not in done]
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(prepare, tasks))
        list(pool.map(work, todo))
    write_page(read_results())


if __name__ == "__main__":
    main()
