"""How fast do data sets load, clean and filter, and in how much memory?

    python -m bench.loading [--records 100000]

This takes about two minutes, and at most about 2 GB of temporary files, for one set at a time. The
files have the hub's schema and are made on the spot. Problems have 60 words. Chains of thought have
--solution_chars characters of random words.

Bar: 5,000 records/s with two cores, including cleaning, deduplication, difficulty filter and
decontamination against 1,200 made-up evaluation problems. If the machine is busy otherwise, look at
the CPU seconds of all threads. Peak memory is that of a process that only prepares the file.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from bench.common import peak_mb

BAR = 5_000  # records/s
WORDS = [f"word{i}" for i in range(5000)]
SETS = ("openthoughts", "openthoughts3", "deepmath", "dapo17k", "deepscaler", "gsm8k")


# --------------------------------------------------------------------------------------------------
# Files of the hub's schema


def make_row(name: str, i: int, rng: random.Random, cot: str) -> dict:
    """Row `i` of a data set, with unused columns as on the hub."""
    problem = f"{i}: " + " ".join(rng.choices(WORDS, k=60))
    answer = rng.choice([str(i), f"\\frac{{{i}}}{{7}}", f"{i},000"])
    cot = cot[rng.randrange(1000):] + str(i)
    if name == "openthoughts":
        row = {"problem": problem, "deepseek_reasoning": cot, "ground_truth_solution": None}
        row |= {"deepseek_solution": f"\\boxed{{{answer}}}", "source": "s", "domain": "math"}
        return {**row, "test_cases": None, "starter_code": None}
    if name == "openthoughts3":
        reply = f"<think>{cot}</think>\\boxed{{{answer}}}"
        turns = [{"from": "human", "value": problem}, {"from": "gpt", "value": reply}]
        return {"difficulty": 7, "source": "s", "domain": "math", "conversations": turns}
    if name == "deepmath":
        level = float(i % 9 + 1)
        row = {"question": problem, "final_answer": answer, "difficulty": level, "topic": "t"}
        thoughts = {"r1_solution_1": f"{cot}</think>x", "r1_solution_2": cot, "r1_solution_3": cot}
        return {**row, **thoughts}
    if name == "dapo17k":
        before = "Solve the following math problem step by step. The last line is the answer."
        after = 'Remember to put your answer on its own line after "Answer:".'
        prompt = [{"role": "user", "content": f"{before}\n\n{problem}\n\n{after}"}]
        row = {"data_source": "d", "ability": "MATH", "extra_info": {"index": str(i)}}
        verdict = {"ground_truth": answer, "style": "rule"}
        return {**row, "prompt": prompt, "reward_model": verdict}
    if name == "deepscaler":
        return {"problem": problem, "answer": answer, "solution": cot}
    return {"question": problem, "answer": f"{cot[:300]}\n#### {answer}"}  # gsm8k


def write_files(folder: Path, name: str, records: int, cot: str) -> float:
    """Write Parquet shards (JSONL for DeepScaleR, as on the hub) and return megabytes.

    One row in 50 repeats the row before it.
    """
    import pyarrow
    import pyarrow.parquet

    inside = folder / {"openthoughts": "metadata", "gsm8k": "main"}.get(name, "data")
    inside.mkdir()
    part = 10_000
    shards = -(-records // part)
    for shard in range(shards):
        numbers = range(shard * part, min(records, (shard + 1) * part))
        numbers = [i - 1 if i % 50 == 49 else i for i in numbers]
        rows = [make_row(name, i, random.Random(i + 10**6), cot) for i in numbers]
        if name == "deepscaler":
            with open(folder / "deepscaler.json", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            path = inside / f"train-{shard:05}-of-{shards:05}.parquet"
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, path, row_group_size=1000)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


# --------------------------------------------------------------------------------------------------
# Measuring


def measure(name: str, folder: Path, solutions: bool):
    """Prepare the set in this process and print the figures of it as JSON."""
    from collections import Counter

    import datasets  # noqa: F401  its import is not part of the loading

    from data.sources import ANY, Overlap, parse_name, read_hub

    start = peak_mb()
    rng = random.Random(1)
    problems = (" ".join(rng.choices(WORDS, k=60)) for _ in range(1200))
    overlap = Overlap({"id": str(i), "problem": problem} for i, problem in enumerate(problems))
    filters = dict(overlap=overlap, difficulty=(5, 9) if name == "deepmath" else ANY)
    dropped, kept = Counter(), 0
    began, cpu = time.perf_counter(), time.process_time()
    source = parse_name(f"{name}={folder}")
    for record in read_hub(source, solutions=solutions, **filters, dropped=dropped):
        kept += 1
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    figures = {"seconds": seconds, "cpu": cpu, "kept": kept, "read": kept + sum(dropped.values())}
    print(json.dumps({**figures, "start_mb": start, "peak_mb": peak_mb()}))


def measure_apart(name: str, folder: str, solutions: bool) -> dict[str, float]:
    """`measure` in a process of its own. Returns its figures."""
    command = [sys.executable, "-m", "bench.loading", "--measure", name, folder, str(solutions)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def print_row(name: str, size: float, solutions: bool, figures: dict[str, float]):
    speed = figures["read"] / figures["seconds"]
    title = name + " with CoT" * solutions
    row = f"{title:24}{size:9.0f}{figures['kept']:9,}{figures['seconds']:9.1f}{speed:11,.0f}"
    row += " *" * (speed < BAR)
    row += f"{figures['cpu']:8.1f}{figures['peak_mb']:9.0f}  ({figures['start_mb']:.0f})"
    print(row, flush=True)


def main():
    from plumbing.ranks import fail  # imports torch, which `measure` counts itself

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--solution_chars", type=int, default=4000)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.error = fail
    args = parser.parse_args()
    if args.measure:
        name, folder, solutions = args.measure
        return measure(name, Path(folder), solutions == "True")
    chars = args.solution_chars
    cot = " ".join(random.Random(2).choices(WORDS, k=chars // 7 + 200))[:chars + 1000]
    machine = f"{platform.system()} {platform.machine()} {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, datasets {version('datasets')}"
    print(f"{machine}, {versions}; {args.records:,} records per set, chains of thought of "
          f"{chars:,} characters")
    print(f"{'data set':24}{'files MB':>9}{'kept':>9}{'seconds':>9}{'records/s':>11}{'CPU s':>8}"
          f"{'peak MB':>9}  (of which imports)")
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            size = write_files(Path(folder), name, args.records, cot)
            has_cots = name.startswith(("openthoughts", "deepmath"))
            for solutions in (False, True) if has_cots else (False,):
                figures = measure_apart(name, folder, solutions)
                assert figures["read"] == args.records
                print_row(name, size, solutions, figures)
    print(f"* below the bar of {BAR:,} records/s")


if __name__ == "__main__":
    main()
