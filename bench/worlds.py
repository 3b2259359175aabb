"""Does planning pay where CoTs act? bench.study's rows in the embedded world, three seeds each.

    python -m bench.worlds                 run what is missing, two at a time; then bench/WORLDS.md
    python -m bench.worlds --minutes 60    start no run after so many minutes; the next call goes on
    python -m bench.worlds --status        print which runs are done

All runs start from one SFT checkpoint and train until they have decoded about as many tokens, those
of replies included (a plan counts once). 600 held-out problems are then walked 4 times each. Every
finished run is a line of bench/worlds.jsonl; bench/study.py is the machinery.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench import study
from bench.study_figures import GRPO, compare, interval, mean_of, p_text, percent, shares
from data import doors, walk
from plumbing.calls import find_calls

PAGE = Path("bench/WORLDS.md")
ROWS = (
    GRPO,
    "GRPO, small groups",
    "PTA-GRPO 4x3",
    "tree 4x3, beta 0",
    "segment 4x3, beta 0",
    "segment 4x3, beta 0.5",
)
SEEDS = (0, 1, 2)
HEAD = """# Does planning pay where CoTs act?

`python -m bench.worlds` wrote this page from the runs in bench/worlds.jsonl, on the world of
data/walk.py. Accuracy is over 600 held-out problems x 4 samples. Differences are tested over seeds
and problems; p is Holm's. ICC: what share of the outcome's variance the choice of plan explains, of
the first seed's model (`eval.py --analysis plans`, 95 % interval). A plan was wrong if it would not
have got through in its completion's world; shares are in per cent.

row | seeds | tokens decoded | accuracy | minus the first row | p | ICC | route's chance | \
plan wrong | left it | of those right
---|---|---|---|---|---|---|---|---|---|---
"""


def judge_walk(problem: str, plan: str, think: str) -> dict:
    """Best: no route has a higher chance, if it is left once. Its value is its chance."""
    first, *rest = (list(hall) for hall in doors.doors_of(problem))
    routes = [[a, b, c] for a in first for b in rest[0] for c in rest[1]]
    route = max(routes, key=lambda route: walk.chance(problem, route))
    planned = walk.planned({}, plan)
    value, highest = walk.chance(problem, planned), walk.chance(problem, route)
    taken = {action for _, action in find_calls(think, ("act",))}
    whole = doors.plan_of(problem, " ".join(route))
    revised = not taken <= set(planned)
    return {"best": value == highest, "value": value, "revised": revised, "whole": whole}


WALK = study.Task(
    "walk",
    walk,
    judge_walk,
    data="--sft 12000 --train 8000 --test 600",
    base="",
    sft="--epochs 1 --lr 3e-3 --batch_size 32",
    limits="--max_plan_tokens 30 --max_completion_tokens 72",
    plan_tokens=19,
    cot_tokens=30.3,
    plain_steps=60,
    small=9,
    lr="3e-4",
)


def explained(runs: list[dict]) -> str:
    """The ICC of the first of the runs that was analysed, with its interval."""
    known = [run["analysis"] for run in runs if "analysis" in run]
    return "{icc:.3f} ({ci_low:.3f} to {ci_high:.3f})".format(**known[0]) if known else "–"


def write_page(lines: list[dict]):
    """The table of all finished runs."""
    runs = {row: [line for line in lines if line["row"] == row] for row in ("SFT", *ROWS)}
    runs = {row: found for row, found in runs.items() if found}
    tests = compare(runs, {row: (row, GRPO) for row in ROWS if row != GRPO})
    table = ""
    for row, found in runs.items():
        test = tests.get(row)
        decoded = mean_of(sum(run["decoded"]) if "decoded" in run else None for run in found)
        fate = lambda name: percent(mean_of(run["did"].get(name) for run in found))
        cells = [
            row,
            len(found),
            "–" if decoded is None else f"{decoded:,.0f}",
            percent(float(np.mean([shares(run).mean() for run in found]))),
            interval(test) if test else "",
            p_text(test["holm"]) if test else "",
            explained(found),
            percent(mean_of(run["did"]["value"] for run in found)),
            fate("plan_wrong"),
            fate("wrong_left"),
            fate("left_right"),
        ]
        table += " | ".join(map(str, cells)) + "\n"
    PAGE.write_text(HEAD + table)
    print(table)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--minutes", type=float, default=240, help="start no run after so many")
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side")
    parser.add_argument("--status", action="store_true", help="print which runs are done, and end")
    args = parser.parse_args()
    study.RESULTS, study.COSTS = Path("bench/worlds.jsonl"), Path("bench/worlds_costs.json")
    done = {(line["row"], line["seed"]) for line in study.read_results()}
    todo = [("SFT", 0), *((row, seed) for seed in SEEDS for row in ROWS)]
    if args.status:
        for row, seed in todo:
            print(f"{row:30} seed {seed}  {'done' if (row, seed) in done else 'missing'}")
        return
    end = time.time() + 60 * args.minutes

    def work(job):
        if time.time() > end:
            return
        try:
            result = study.sft_job(WALK) if job[0] == "SFT" else study.run_job(WALK, *job)
        except (SystemExit, Exception) as error:  # the other runs go on
            return print(f"{job[0]}, seed {job[1]}: {error}", flush=True)
        with open(study.RESULTS, "a") as file:  # one short write: two threads do not mix lines
            file.write(json.dumps({**result, **study.machine()}) + "\n")
        print(f"{job[0]:30} seed {job[1]}  {shares(result).mean():.3f}", flush=True)

    study.prepare(WALK)
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(work, [job for job in todo if job not in done]))
    write_page(study.read_results())


if __name__ == "__main__":
    main()
