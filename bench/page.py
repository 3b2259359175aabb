"""The report's page of a large run: 350 steps x 128 questions x 12 completions, all steps logged.

    python -m bench.page

Prints the size of the log, the build's time and peak memory, and the size of the page. Where
Chromium and playwright are installed, it also times how long the page takes to open, to show
another tree and to search.
"""

import json
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path

from report.__main__ import build
from report.figures import RL_GROUPS

STEPS, QUESTIONS, PLANS, COTS, TOKENS = 350, 128, 4, 3, 200
WORDS = ("so", "the", "sum", "of", "both", "is", "seven", "and", "therefore")


def completion(rng: random.Random, shaded: bool) -> dict:
    """A completion of rollouts.jsonl; with per-token figures if `shaded`."""
    words = rng.choices(WORDS, k=TOKENS)
    plan, think = " ".join(words[:30]), " ".join(words[30:])
    text = f"<plan> {plan} </plan> <think> {think} </think> <answer> \\boxed{{7}} </answer>"
    right = rng.random() < 0.5
    reward = {"total": 1.4, "outcome": float(right), "plan": 0.25, "structure": 0.2, "length": 0.07}
    record = {"text": text, "tokens": TOKENS, "truncated": False, "correct": right}
    record |= {"well_formed": True, "reward": reward, "advantage": round(rng.gauss(0, 1), 4)}
    if shaded:
        pieces = text.split()
        record["per_token"] = {"width": [len(piece) + 1 for piece in pieces]}
        for name in ("surprise", "entropy", "log_ratio"):
            record["per_token"][name] = [int(rng.expovariate(0.05)) for _ in pieces]
    return record


def question(rng: random.Random, step: int, number: int) -> str:
    """One line of rollouts.jsonl; every eighth question has per-token figures.

    Of 128 questions these are 16, as with grpo.py's --token_log_questions 16.
    """
    plans = []
    for _ in range(PLANS):
        completions = [completion(rng, shaded=number % 8 == 0) for _ in range(COTS)]
        score = sum(c["correct"] for c in completions) / COTS
        plans.append({"score": score, "completions": completions})
    record = {"step": step, "id": f"q{number}", "problem": "What is three and four?"}
    return json.dumps({**record, "answer": "7", "plans": plans}) + "\n"


def write_run(run: Path):
    """A run folder with settings, metrics and rollouts."""
    rng = random.Random(0)
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"steps": STEPS, "beta": 0.5}))
    names = [name for group in RL_GROUPS.values() for name in group]
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, STEPS + 1):
            file.write(json.dumps({"step": step, **{name: rng.random() for name in names}}) + "\n")
    # All steps hold the same questions: making each anew would take minutes.
    one_step = [question(rng, 0, number) for number in range(QUESTIONS)]
    with open(run / "rollouts.jsonl", "w") as file:
        for step in range(1, STEPS + 1):
            now = f'{{"step": {step}'
            file.writelines(line.replace('{"step": 0', now, 1) for line in one_step)


def time_browser(page: Path):
    """Print how long the page takes in Chromium. The first visit warms the browser up."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if not chromium:
        print("no Chromium or no playwright here: the page was not opened")
        return
    with sync_playwright() as playwright:
        options = {"executable_path": chromium, "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**options)
        for width in (1280, 1280, 360):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            times = [time.time()]
            tab.goto(page.as_uri())
            tab.locator("#tree .card").first.wait_for()
            times.append(time.time())
            tab.keyboard.press("n")
            tab.locator("#tree .card").first.wait_for()
            times.append(time.time())
            tab.fill("#search", "therefore seven")
            tab.inner_text("#status")
            times.append(time.time())
            opened, moved, searched = (b - a for a, b in zip(times, times[1:]))
            took = f"opened in {opened:.2f} s, next tree {moved:.2f} s, search {searched:.2f} s"
            print(f"{width} px wide: {took}")
        browser.close()


def main():
    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "pta", Path(folder) / "report.html"
        write_run(run)
        log = (run / "rollouts.jsonl").stat().st_size / 1e6
        each = f"{QUESTIONS * PLANS * COTS:,} completions of {TOKENS} tokens"
        print(f"{STEPS} steps x {each}: rollouts.jsonl {log:,.0f} MB")
        began = time.time()
        result = build([str(run)], page)
        seconds = time.time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"built in {seconds:.1f} s, peak memory {peak:.0f} MiB")
        print(f"page {result['bytes'] / 1e6:.1f} MB", *result["left_out"], sep="\n  ")
        time_browser(page)


if __name__ == "__main__":
    main()
