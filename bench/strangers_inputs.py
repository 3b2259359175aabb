"""Hostile text at every place that prints, and hostile folders for --out: two tables.

Each entry is a function of `work`, a folder that holds base/ (toy data, plans, a model), and what
must become of it: "refused", "runs", "either", or "traceback". It calls scripts in this process.
"""

import importlib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from bench.strangers_teacher import records, two_servers

ROOT = Path(__file__).resolve().parents[1]

# Clears the screen, sets the window's title, goes back to the line's start, asks the terminal to
# type its answer, turns the writing direction around, hides letters, breaks a line, forges another,
# and is no character at all.
SEQUENCES = [
    "\x1b[2J", "\x1b]0;owned\x07", "b\rc", "\x08d", "\x1b[6n", "\x9b31m", "\u202ee", "\u2066f",
    "\u2028g", "\u061ch", "\x00", "\x7f", "\U000e0041", "\nerror: forged", "\ud800",
]  # fmt: skip
TEXT = "".join(SEQUENCES)
SOUND = TEXT.replace("\ud800", "")  # half a character is refused when data is read
# What a command line and a file's name can hold. A line break is its user's own.
WORD = SOUND.replace("\x00", "").replace("\n", "")


def is_plain(text: str) -> bool:
    """Whether a terminal would show every character of a text, or move to the next line."""
    return all(c in "\n\t" or c.isprintable() for c in text)


# --------------------------------------------------------------------------------------------------
# Calling the scripts


def call(module: str, *words):
    """Run a script's main with these flags."""
    sys.argv = [module, *map(str, words)]
    importlib.import_module(module).main()


def prepare(work: Path):
    """Toy data, plans and a model with random weights."""
    base = work / "base"
    call("data.toy", "--out", base, *"--sft 12 --train 24 --test 12 --facts 2 3".split())
    flags = "--data", base / "sft.jsonl", "--out", base / "plans.jsonl"
    call("distill", "--teacher", "rule", *flags)


TINY = "--max_prompt_tokens 400 --max_plan_tokens 8 --max_completion_tokens 16".split()
GRPO = "--steps 1 --questions 2 --plans 2 --cots 1 --eval_size 0 --save_every 0".split()
SFT = "--epochs 1 --batch_size 4 --save_every 0".split()


def run_grpo(work: Path, model="base/model", data="base/train.jsonl", out=None, more=GRPO):
    where = "--model", work / model, "--data", work / data
    call("grpo", *where, *TINY, *more, "--show_every", 1, *out_flags(work, out))


def run_sft(work: Path, model="base/model", data="base/plans.jsonl", out=None):
    call("sft", "--model", work / model, "--data", work / data, *SFT, *out_flags(work, out))


def run_eval(work: Path, model="base/model", data="base/test.jsonl", out=None):
    where = "--model", work / model, "--data", work / data
    call("eval", *where, *TINY, "--n", 2, "--limit", 4, *out_flags(work, out))


def run_distill(work: Path, model="base/model", data="base/sft.jsonl", out=None):
    where = "--teacher", model if model == "rule" else work / model, "--data", work / data
    out = "out.jsonl" if out is None else out
    call("distill", *where, "--max_new_tokens", 8, *out_flags(work, out))


def run_plan(work: Path, out):
    run_distill(work, "rule", out=out)


def run_toy(work: Path, out):
    call("data.toy", "--sft", 4, "--train", 4, "--test", 4, "--out", out)


def run_report(work: Path, out):
    call("report.__main__", hostile_run(work), "--out", out)


def out_flags(work: Path, out) -> list:
    """--out, which is in `work` if its name begins so, and --overwrite for any other."""
    if out is None or str(out).startswith("out"):
        return ["--out", work / (out or "out")]
    return ["--out", out, "--overwrite"]


STAGES = {"grpo.py": run_grpo, "sft.py": run_sft, "eval.py": run_eval, "distill.py": run_distill}

# --------------------------------------------------------------------------------------------------
# Text


def spoilt(stage: Callable, file: str, **fields) -> Callable:
    """A stage on base/`file` with more text: each value is appended to the field's own."""

    def enter(work: Path):
        rows = [json.loads(line) for line in (work / "base" / file).read_text().splitlines()]
        for number, row in enumerate(rows):
            row.update({name: f"{row.get(name, '')}{text}" for name, text in fields.items()})
        (work / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage(work, data=file)

    return enter


def hostile_run(work: Path) -> Path:
    """A training run and an evaluation whose every text is hostile."""
    run, question = work / "outs", {"id": TEXT, "problem": TEXT, "answer": TEXT}
    judged = {"correct": True, "well_formed": True, "truncated": False, "tokens": 3}
    completion = {"text": TEXT, **judged, "leaks": False, "reward": {"total": 1}, "advantage": 1}
    plans = [{"score": 1.0, "completions": [completion] * 2}] * 2
    samples = [{"completion": TEXT, "answer": TEXT, "restated": False, "vote": 0, **judged}] * 2
    names = "reward accuracy plan_score completion_tokens seconds tokens_per_s".split()
    for folder, file, row in (
        (run, "metrics.jsonl", {"step": 1, **dict.fromkeys(names, 1.0)}),
        (run, "rollouts.jsonl", {"step": 1, **question, "plans": plans}),
        (run / WORD, "records.jsonl", {"benchmark": TEXT, **question, "samples": samples}),
    ):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / file).write_text(json.dumps(row) + "\n")
        (folder / "run.json").write_text(json.dumps({"model": TEXT, "beta": TEXT, TEXT: TEXT}))
        (folder / "machine.json").write_text(json.dumps({TEXT: TEXT}))
    return run


def compared(work: Path):
    one, other = hostile_run(work) / WORD, work / "outs/other"
    shutil.copytree(one, other)
    record = json.loads((one / "records.jsonl").read_text())
    (other / "records.jsonl").write_text(json.dumps({**record, "problem": "another"}))
    (other / "run.json").write_text(json.dumps({"beta": "another", TEXT: "another"}))
    call("eval", "--compare", one / "records.jsonl", other / "records.jsonl")


def demo_question(work: Path):
    from recipes.demo_tools import show_question

    sample = lambda correct: {"samples": [{"completion": TEXT, "correct": correct}]}
    record = {"problem": TEXT, "answer": TEXT}
    show_question({"sft": [record | sample(False)], "pta": [record | sample(True)]})


def own_verifier(work: Path):
    (work / "own.py").write_text(f"def judge(records, answers): raise ValueError({TEXT!r})\n")
    spoilt(run_grpo, "train.jsonl", verifier="own.py:judge")(work)


def no_json(work: Path):
    (work / "bad.jsonl").write_text(f'{{"id": 1, {SOUND}}}\n')
    run_grpo(work, data="bad.jsonl")


def named_file(work: Path):
    shutil.copy(work / "base/test.jsonl", work / f"{WORD}.jsonl")
    run_eval(work, data=f"{WORD}.jsonl")


def hub_folder(work: Path):
    (work / "hub").mkdir()
    (work / "hub/train.jsonl").write_text(json.dumps({SOUND: SOUND}) + "\n")
    call("data.sources", f"deepmath={work / 'hub'}", "--out", work / "out.jsonl")


def servers_words(work: Path):
    names = ["a cookie", "400 with escapes", "escapes in its head", "unknown packing"]
    lines = [json.dumps(record) + "\n" for record in records(names)]
    (work / "asked.jsonl").write_text("".join(lines))
    with two_servers() as (server, _):
        flags = "--data", work / "asked.jsonl", "--out", work / "out.jsonl", "--retries", 0
        call("distill", "--teacher", f"{server.url}/v1", *flags)


def libraries(work: Path):
    import transformers

    warnings.warn(TEXT, stacklevel=1)
    logging.getLogger("datasets").warning("%s", TEXT)
    transformers.utils.logging.get_logger("transformers.models").warning(TEXT)


def raises(work: Path):
    raise ValueError(TEXT)


def without_utf8(work: Path):
    from plumbing.ranks import print0

    sys.stdout.reconfigure(encoding="ascii", errors=sys.stdout.errors)
    print0("计划 π 👍")


SCRIPTS = """grpo sft eval distill data.sources data.gym data.toy data.moves data.doors
data.formulas data.gguf report.__main__ bench.speed bench.stats bench.faults bench.study bench.plans
bench.credit bench.loading bench.rewards bench.strangers""".split()


def odd_flag(script: str) -> Callable:
    def enter(work: Path):
        first = {"data.sources": ["deepmath"], "report.__main__": ["x"], "data.gguf": ["x"]}
        out = ["--out", work / "out"] if script.startswith("data") else []
        call(script, *first.get(script, []), *out, f"--{WORD}", WORD)

    return enter


# Several lines are usual there.
LINES = "what libraries log", "a traceback"
# Name -> (a function of `work`, what must become of it)
TEXTS: dict[str, tuple[Callable, str]] = {
    "grpo.py, a question shown": (spoilt(run_grpo, "train.jsonl", problem=SOUND), "runs"),
    "grpo.py, golds": (spoilt(run_grpo, "train.jsonl", answer=SOUND), "either"),
    "grpo.py, a verifier named": (spoilt(run_grpo, "train.jsonl", verifier=SOUND), "refused"),
    "grpo.py, a verifier that raises": (own_verifier, "refused"),
    "grpo.py, half a character": (spoilt(run_grpo, "train.jsonl", problem=TEXT), "refused"),
    "grpo.py, no JSON": (no_json, "refused"),
    "grpo.py, its folder's name": (lambda work: run_grpo(work, out=f"out{WORD}"), "runs"),
    "sft.py, a record's id": (
        spoilt(run_sft, "plans.jsonl", id=SOUND, plan="</plan>"), "refused"
    ),
    "eval.py, a problem": (spoilt(run_eval, "test.jsonl", problem=SOUND), "runs"),
    "eval.py, a file's name": (named_file, "runs"),
    "eval.py, no such model": (lambda work: run_eval(work, WORD), "refused"),
    "eval.py --compare": (compared, "runs"),
    "distill.py, no such solution": (
        spoilt(
            lambda work, data: run_distill(work, "rule", data),
            "sft.jsonl", id=SOUND, solution=SOUND,
        ), "refused"
    ),
    "distill.py, a server's words": (servers_words, "refused"),
    "data.sources, a column": (hub_folder, "refused"),
    "data.sources, a name": (lambda work: call("data.sources", WORD, "--out", "x"), "refused"),
    "data.gym, a task": (
        lambda work: call("data.gym", "--out", work / "out", "--task", WORD), "refused"
    ),
    "data.gym, settings": (
        lambda work: call("data.gym", "--out", work / "out", "--config", WORD), "refused"
    ),
    "report, a run": (lambda work: run_report(work, work / "out.html"), "runs"),
    "report, no run": (lambda work: call("report.__main__", WORD), "refused"),
    "the demo's question": (demo_question, "runs"),
    "what libraries log": (libraries, "runs"),
    "a traceback": (raises, "traceback"),
    "a terminal of ASCII": (without_utf8, "runs"),
} | {f"flags of {script}": (odd_flag(script), "refused") for script in SCRIPTS}


# --------------------------------------------------------------------------------------------------
# Folders for --out


OWN = "the user's own\n"


def mine(work: Path, *names: str) -> Path:
    """A folder of the user's with files of these names."""
    for name in names:
        file = work / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(OWN)
    return work / "mine"


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def home(work: Path) -> Path:
    """A home folder behind a link, as on some clusters."""
    (work / "disk/me").mkdir(parents=True)
    os.environ["HOME"] = str(link(work / "homes", work / "disk") / "me")
    return work / "disk/me"


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


RUNS, ALL = (run_grpo, run_eval), (run_grpo, run_eval, run_toy)
FILES = run_plan, run_report
# Name -> (a function of `work` that makes --out, the scripts that must refuse it)
OUTS: dict[str, tuple[Callable, tuple]] = {
    "this repository": (lambda work: ROOT, ALL),
    "here": (lambda work: ".", ALL),
    "the root": (lambda work: "/", ALL),
    "the home folder": (home, ALL),
    "above the home folder": (lambda work: home(work).parent, ALL),
    "a link to the home folder": (lambda work: link(work / "to", home(work)), ALL),
    "nothing": (lambda work: "", (*ALL, run_plan)),
    "blanks": (lambda work: "  ", ALL),
    "another repository": (lambda work: mine(work, ".git/config"), ALL),
    "a file": (lambda work: mine(work, "x") / "x", (*ALL, *FILES)),
    "under a file": (lambda work: mine(work, "x") / "x/out", (*ALL, *FILES)),
    "a pipe": (lambda work: pipe(work / "to"), (*ALL, *FILES)),
    "a name too long": (lambda work: work / ("x" * 300), (*ALL, *FILES)),
    "links in a circle": (lambda work: link(work / "to", work / "to"), (*ALL, *FILES)),
    "a user's model": (lambda work: mine(work, "model/config.json"), (run_grpo, run_toy)),
    "a user's step_5": (lambda work: mine(work, "step_5/x"), (run_grpo,)),
    "a user's logs": (lambda work: mine(work, "metrics.jsonl"), RUNS),
    "a user's run.json": (lambda work: mine(work, "run.json"), RUNS),
    "a user's records": (lambda work: mine(work, "records.jsonl"), (run_eval,)),
    "a user's data": (lambda work: mine(work, "train.jsonl"), (run_toy,)),
    "a user's .lock": (lambda work: mine(work, ".lock"), RUNS),
    "a pipe named .lock": (lambda work: pipe(mine(work, "notes.txt") / ".lock").parent, RUNS),
    "the data": (lambda work: work / "base/sft.jsonl", (run_plan,)),
    "a folder for a file": (lambda work: mine(work, "x"), FILES),
}
FOLDERS = {
    f"{script.__name__[4:]} --out {name}": (
        lambda work, make=make, script=script: script(work, out=make(work)), "refused"
    )
    for name, (make, scripts) in OUTS.items()
    for script in scripts
}  # fmt: skip
