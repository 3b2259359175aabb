"""How fast do data sets load, clean and filter, and in how much memory? Files of the hub's schema, made on the spot.

    python -m bench.data [--records 100000]        about two minutes; about 2 GB of temporary files at most, one set at a time

Bar: 5,000 records/s with two cores, cleaning, deduplication, difficulty filter and decontamination included (against
1,200 made-up evaluation problems). On a machine that is busy otherwise, look at the CPU seconds of all threads. Peak memory is that of a process that prepares the file and nothing else. Problems
have 60 words; chains of thought have --solution_chars characters of random words.
"""
import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

WORDS = [f"word{i}" for i in range(5000)]
SETS = ("openthoughts", "openthoughts3", "deepmath", "dapo17k", "deepscaler", "gsm8k")


def row(name: str, i: int, rng: random.Random, cot: str) -> dict:
    problem, answer = f"{i}: " + " ".join(rng.choices(WORDS, k=60)), rng.choice([str(i), f"\\frac{{{i}}}{{7}}", f"{i},000"])
    start = rng.randrange(1000)
    cot = cot[start:] + str(i)
    return {
        "openthoughts": {"problem": problem, "deepseek_reasoning": cot, "deepseek_solution": f"\\boxed{{{answer}}}", "source": "s",
                         "ground_truth_solution": None, "domain": "math", "test_cases": None, "starter_code": None},
        "openthoughts3": {"difficulty": 7, "source": "s", "domain": "math", "conversations": [
            {"from": "human", "value": problem}, {"from": "gpt", "value": f"<think>{cot}</think>\\boxed{{{answer}}}"}]},
        "deepmath": {"question": problem, "final_answer": answer, "difficulty": float(i % 9 + 1), "topic": "t",
                     "r1_solution_1": f"{cot}</think>x", "r1_solution_2": cot, "r1_solution_3": cot},
        "dapo17k": {"data_source": "d", "ability": "MATH", "extra_info": {"index": str(i)},
                    "prompt": [{"role": "user", "content": "Solve the following math problem step by step. The last line is the answer.\n\n"
                                f"{problem}\n\nRemember to put your answer on its own line after \"Answer:\"."}],
                    "reward_model": {"ground_truth": answer, "style": "rule"}},
        "deepscaler": {"problem": problem, "answer": answer, "solution": cot},
        "gsm8k": {"question": problem, "answer": f"{cot[:300]}\n#### {answer}"},
    }[name]


def write(folder: Path, name: str, records: int, cot: str) -> float:
    """Parquet shards (JSONL for DeepScaleR, as on the hub); one row in 50 repeats an earlier one. Returns megabytes."""
    import pyarrow
    import pyarrow.parquet
    part = 10_000
    inside = {"openthoughts": "metadata", "gsm8k": "main"}.get(name, "data")
    (folder / inside).mkdir()
    shards = -(-records // part)
    for shard in range(shards):
        rows = [row(name, i - 1 if i % 50 == 49 else i, random.Random((i - 1 if i % 50 == 49 else i) + 10**6), cot)
                for i in range(shard * part, min(records, (shard + 1) * part))]
        if name == "deepscaler":
            with open(folder / "deepscaler.json", "a") as file:
                file.writelines(json.dumps(r) + "\n" for r in rows)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / inside / f"train-{shard:05}-of-{shards:05}.parquet",
                                        row_group_size=1000)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def peak_mb() -> float:
    """This program's own peak; ru_maxrss would begin with that of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def measure(name: str, folder: Path, solutions: bool):
    """In a process of its own: prepare the set and print seconds, records read and kept, peak megabytes."""
    from collections import Counter

    from data.sources import Overlap, parse_name, read_hub
    import datasets  # noqa: F401  its import is not part of the loading
    start = peak_mb()
    rng = random.Random(1)
    overlap = Overlap({"id": str(i), "problem": " ".join(rng.choices(WORDS, k=60))} for i in range(1200))
    dropped, kept, began, cpu = Counter(), 0, time.perf_counter(), time.process_time()
    limits = (5, 9) if name == "deepmath" else (float("-inf"), float("inf"))
    for record in read_hub(parse_name(f"{name}={folder}"), solutions=solutions, difficulty=limits, overlap=overlap, dropped=dropped):
        kept += 1
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "kept": kept, "read": kept + sum(dropped.values()), "start_mb": start,
                      "peak_mb": peak_mb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--solution_chars", type=int, default=4000)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], Path(args.measure[1]), args.measure[2] == "True")
    cot = " ".join(random.Random(2).choices(WORDS, k=args.solution_chars // 7 + 200))[:args.solution_chars + 1000]
    print(f"{platform.system()} {platform.machine()} {os.cpu_count()} cores, Python {platform.python_version()}, datasets "
          f"{version('datasets')}; {args.records:,} records a set, chains of thought of {args.solution_chars:,} characters")
    print(f"{'data set':24}{'files MB':>9}{'kept':>9}{'seconds':>9}{'records/s':>11}{'CPU s':>8}{'peak MB':>9}  (of which imports)")
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            size = write(Path(folder), name, args.records, cot)
            for solutions in ((False, True) if name.startswith(("openthoughts", "deepmath")) else (False,)):
                run = subprocess.run([sys.executable, "-m", "bench.data", "--measure", name, folder, str(solutions)],
                                     capture_output=True, text=True)
                if run.returncode:
                    sys.exit(run.stderr[-2000:])
                figures = json.loads(run.stdout.splitlines()[-1])
                assert figures["read"] == args.records
                speed = figures["read"] / figures["seconds"]
                print(f"{name + (' with CoT' if solutions else ''):24}{size:9.0f}{figures['kept']:9,}{figures['seconds']:9.1f}{speed:11,.0f}"
                      f"{'' if speed >= 5000 else ' *'}{figures['cpu']:8.1f}{figures['peak_mb']:9.0f}  ({figures['start_mb']:.0f})", flush=True)
    print("* below the bar of 5,000 records/s")


if __name__ == "__main__":
    main()
