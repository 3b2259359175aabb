r"""Where problems come from: a JSONL path, `toy`, or a data set of the Hugging Face hub.

All of them become the same records:

    problem record   {"id", "problem", "answer", "solution" (optional), "difficulty" (optional)}

    names            toy, aime24, gsm8k:test (a split), deepmath=FOLDER (a local copy, laid out as
                     on the hub), FILE.jsonl
    prepare once     python -m data.sources deepmath --out runs/data/deepmath.jsonl --limit 60000 \
                         --min_difficulty 5 --decontaminate math500 aime24 aime25 amc23

Rows are read in batches and cleaned on the way, so only what is returned stays in memory. To add a
data set, write a function from its row to a record (or to the reason why it is left out) and add an
entry to SOURCES.
"""

import argparse
import functools
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import code, toy, verifiers, vision
from data.choice import LETTERS
from data.overlap import Overlap
from data.pictures import (
    FOLDER,
    identity,
    keep_pictures,
    locate_pictures,
    relative,
    undecoded,
    with_prompts,
)
from plumbing import grader
from plumbing.answers import is_number_list, last_box
from plumbing.folder import lock, make_folder, refuse_unusable
from plumbing.ranks import all_gather, fail, init_distributed, print0, rank, require, world_size
from plumbing.records import load_jsonl
from plumbing.signals import guarded
from plumbing.weights import check_context, load_config

# --------------------------------------------------------------------------------------------------
# Cleaning

SURROGATE = re.compile(r"[\ud800-\udfff]")
THOUSANDS = re.compile(r"-?\d{1,3}(?:,(?:\\!)?\d{3})+(?:\.\d+)?")  # LaTeX authors write 1,\!007
DEGREES = re.compile(r"(-?\d+(?:\.\d+)?)\s*(?:\^\s*\\circ|\^\{\s*\\circ\s*\}|°)")


def clean_gold(answer) -> str:
    r"""A gold answer as the grader wants it; empty if there is none.

    #### and what is before it, boxes, dollar signs, leading zeros, thousands separators and degree
    signs are removed. A list becomes "a, b". Numbers in a list become \{1, 2\}: in the mathematics
    sets they are solutions, which any order gives, while for the grader a plain list has an order.
    """
    if isinstance(answer, (list, tuple)):
        text = ", ".join(filter(None, map(clean_gold, answer)))
        return f"\\{{{text}\\}}" if is_number_list(text) else text
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str("" if answer is None else answer).rpartition("####")[2]
    text = (last_box(text) or text).replace("$", "").strip()
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace("\\!", "")
    if match := DEGREES.fullmatch(text):
        text = match[1]
    if re.fullmatch(r"-?\d+", text):  # AIME writes 025
        text = str(int(text)) if len(text) < 1000 else text
    return f"\\{{{text}\\}}" if is_number_list(text) else text


def split_cot(text: str) -> tuple[str, str]:
    """(chain of thought, what follows it), however the data set wraps them.

    OpenThoughts: <|begin_of_thought|> … <|end_of_thought|> <|begin_of_solution|> …
    <|end_of_solution|>. OpenThoughts3: <think> … </think> … DeepMath: as OpenThoughts3, without the
    opening tag. A text without any of these is all thought.
    """
    thought, mark, rest = text.partition("<|end_of_thought|>")
    if mark:
        solution = rest.partition("<|begin_of_solution|>")[2].partition("<|end_of_solution|>")[0]
        return thought.rpartition("<|begin_of_thought|>")[2].strip(), (solution or rest).strip()
    thought, _, rest = text.partition("</think>")
    return thought.strip().removeprefix("<think>").strip(), rest.strip()


WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\s*Solve the following math problem step by step\.[^\n]*\n\n(?P<problem>.*?)\n\n"
        r"Remember to put your answer on its own line.*",
        r"\s*Return your final response within \\boxed\{\}\.\s*(?P<problem>.*)",
        r"(?P<problem>.*?)\s*(?:Please reason step by step, and|Let's think step by step and) "
        r"(?:put|output) (?:your|the) final answer (?:with)?in \\boxed\{\}\.\s*",
    )
]


def unwrap(problem: str) -> str:
    """A problem without its data set's instructions. Our template gives its own."""
    for wrapper in WRAPPERS:
        if match := wrapper.fullmatch(problem):
            problem = match["problem"]
    return problem.strip()


ASK_LETTER = "Answer with the letter of the right option."


def multiple_choice(question: str, options: list[str], right: int) -> dict:
    options = [option.strip() for option in options]
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))
    return {
        "problem": "\n\n".join((question.strip(), listed, ASK_LETTER)),
        "answer": LETTERS[right],
        "verifier": "choice",
        "options": options,
    }


# --------------------------------------------------------------------------------------------------
# Data sets: row -> record without id, or the reason (a string) why the row is left out


def gsm8k(row: dict) -> dict:
    solution = row["answer"].rpartition("####")[0].strip()
    return {"problem": row["question"], "answer": clean_gold(row["answer"]), "solution": solution}


def deepmath(row: dict) -> dict:
    return {
        "problem": row["question"],
        "answer": clean_gold(row["final_answer"]),
        "difficulty": row["difficulty"],
        "solution": split_cot(row.get("r1_solution_1") or "")[0],
    }


def openthoughts(row: dict) -> dict | str:
    """Rows of the config `metadata`, and conversations: the default config's, OpenThoughts3's."""
    if row.get("conversations"):
        asked, replied = (
            next((turn["value"] for turn in row["conversations"] if turn["from"] in names), "")
            for names in (("user", "human"), ("assistant", "gpt"))
        )
        thought, solution = split_cot(replied)
        row = {"domain": "math", **row, "problem": asked}
        row |= {"deepseek_reasoning": thought, "deepseek_solution": solution}
    if row.get("domain") != "math":
        return "not mathematics"
    answer = last_box(row.get("ground_truth_solution") or "")
    return {
        "problem": unwrap(row["problem"]),
        "answer": clean_gold(answer or last_box(row["deepseek_solution"] or "")),
        "solution": row["deepseek_reasoning"].strip(),
    }


def dapo(row: dict) -> dict:
    answer = row["reward_model"]["ground_truth"]
    return {"problem": unwrap(row["prompt"][-1]["content"]), "answer": clean_gold(answer)}


def plain(problem: str = "problem", answer: str = "answer") -> Callable[[dict], dict]:
    """The function for rows that have a problem and its answer in these columns."""
    return lambda row: {
        "problem": row[problem].strip(),
        "answer": clean_gold(row[answer]),
        "solution": row.get("solution") or "",
    }


def olympiad(row: dict) -> dict:
    return {"problem": row["question"].strip(), "answer": clean_gold(row["final_answer"])}


def gpqa(row: dict) -> dict:
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    # The right option comes first in every row. A digest of the question gives their order, the
    # same one for ever.
    order = sorted(range(4), key=lambda i: text_key(f"{row['Question']} {i}"))
    return multiple_choice(row["Question"], [options[i] for i in order], order.index(0))


def mmlu_pro(row: dict) -> dict:
    return multiple_choice(row["question"], row["options"], row["answer_index"])


def with_clean_gold(convert: Callable) -> Callable[[dict], dict | str]:
    """The function of data/vision.py for rows, with its golds of mathematics cleaned."""

    def clean(row: dict) -> dict | str:
        record = convert(row)
        if isinstance(record, dict) and "verifier" not in record:
            record["answer"] = clean_gold(record["answer"])
        return record

    return clean


class Source(NamedTuple):
    hub: str  # id on the hub
    revision: str  # the commit that is loaded
    convert: Callable[[dict], dict | str]
    columns: tuple[str, ...]  # the others are not read
    config: str | None = None
    split: str = "train"  # unless the name gives one
    benchmark: bool = False  # evaluation sets keep every problem, training sets lose duplicates
    files: dict[str, list[str]] | None = None  # of each split, as JSON lines: read without a script


# The columns are those of the data sets' cards. A revision is the commit that is loaded.
SOURCES = {
    "openthoughts": Source(
        hub="open-thoughts/OpenThoughts-114k",
        revision="bd093c3994fd54d2390985b66988ddf282a55eb6",
        convert=openthoughts,
        columns=(
            "problem", "deepseek_reasoning", "deepseek_solution", "ground_truth_solution",
            "domain", "conversations",
        ),
        config="metadata",
    ),
    "openthoughts3": Source(
        hub="open-thoughts/OpenThoughts3-1.2M",
        revision="61bcf9d4eb38b30295efc2021227a63cc5bb34c8",
        convert=openthoughts,
        columns=("domain", "conversations"),
    ),
    "deepmath": Source(
        hub="zwhe99/DeepMath-103K",
        revision="5cf055d1fe3d7a2eb19719ac020211469736ae44",
        convert=deepmath,
        columns=("question", "final_answer", "difficulty", "r1_solution_1"),
    ),
    "dapo17k": Source(
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        revision="65877096c24ffa7abc4e4fa5edb95cf3413a5674",
        convert=dapo,
        columns=("prompt", "reward_model"),
    ),
    "deepscaler": Source(
        hub="agentica-org/DeepScaleR-Preview-Dataset",
        revision="b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
        convert=plain(),
        columns=("problem", "answer", "solution"),
    ),
    "gsm8k": Source(
        hub="openai/gsm8k",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        convert=gsm8k,
        columns=("question", "answer"),
        config="main",
    ),
    "math500": Source(
        hub="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        convert=plain(),
        columns=("problem", "answer", "solution"),
        split="test",
        benchmark=True,
    ),
    "aime24": Source(
        hub="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        convert=plain(),
        columns=("problem", "answer", "solution"),
        benchmark=True,
    ),
    "aime25": Source(
        hub="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        convert=plain(),
        columns=("problem", "answer"),
        split="test",
        benchmark=True,
    ),
    "amc23": Source(
        hub="math-ai/amc23",
        revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
        convert=plain("question"),
        columns=("question", "answer"),
        split="test",
        benchmark=True,
    ),
    "minerva": Source(
        hub="math-ai/minervamath",
        revision="ee46ddc498933b1977577953250ca5c66be64f96",
        convert=plain("question"),
        columns=("question", "answer"),
        split="test",
        benchmark=True,
    ),
    "olympiadbench": Source(
        hub="Hothan/OlympiadBench",
        revision="91184b52131e7fc9455fef848035173aea8cc01a",
        convert=olympiad,
        columns=("question", "final_answer"),
        config="OE_TO_maths_en_COMP",
        benchmark=True,
    ),
    "gpqa_diamond": Source(
        hub="Idavidrein/gpqa",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        convert=gpqa,
        columns=(
            "Question", "Correct Answer",
            "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3",
        ),
        config="gpqa_diamond",
        benchmark=True,
    ),
    "mmlu_pro": Source(
        hub="TIGER-Lab/MMLU-Pro",
        revision="b189ec765aa7ed75c8acfea42df31fdae71f97be",
        convert=mmlu_pro,
        columns=("question", "options", "answer_index"),
        split="test",
        benchmark=True,
    ),
    "verifiable_code": Source(
        hub="open-r1/verifiable-coding-problems-python",
        revision="db558678436c3c1275212172746e1dd67a990059",
        convert=code.verifiable,
        columns=(
            "problem_statement", "gold_standard_solution", "verification_info", "metadata",
        ),
    ),
    "taco": Source(
        hub="BAAI/TACO",
        revision="d593ed0a2becbbc952230bb89be09189bf1056dc",
        convert=code.taco,
        columns=("question", "solutions", "starter_code", "input_output"),
        config="ALL",
    ),
    "livecodebench": Source(
        hub="livecodebench/code_generation_lite",
        revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
        convert=code.livecodebench,
        columns=(
            "question_title", "question_content", "starter_code", "public_test_cases",
            "private_test_cases", "metadata",
        ),
        split="v6",
        benchmark=True,
        files=code.RELEASES,
    ),
    "humaneval": Source(
        hub="openai/openai_humaneval",
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        convert=code.human_eval,
        columns=("prompt", "canonical_solution", "entry_point", "test"),
        split="test",
        benchmark=True,
    ),
    "humanevalplus": Source(
        hub="evalplus/humanevalplus",
        revision="d32357cf319e50e9c8d8dab5ea876c72b0fd321b",
        convert=code.human_eval,
        columns=("prompt", "canonical_solution", "entry_point", "test"),
        split="test",
        benchmark=True,
    ),
    "mbppplus": Source(
        hub="evalplus/mbppplus",
        revision="b2d74c91837c3f2a20c1299ae98133cbe7cfa077",
        convert=code.mbpp,
        columns=("code", "prompt", "test_imports", "test_list", "test"),
        split="test",
        benchmark=True,
    ),
} | {
    name: Source(**{"revision": "main", **entry, "convert": with_clean_gold(entry["convert"])})
    for name, entry in vision.ENTRIES.items()
}
# Hub ids are taken as names, too, if they name one source.
HUBS = Counter(source.hub for source in SOURCES.values())
SHORT = {source.hub: short for short, source in SOURCES.items() if HUBS[source.hub] == 1}


# --------------------------------------------------------------------------------------------------
# Reading a data set


class Name(NamedTuple):
    source: str  # a key of SOURCES
    split: str
    folder: str  # local copy, or empty


def parse_name(name: str) -> Name | None:
    """The parts of `short[:split][=folder]`, or None if it names no data set of SOURCES.

    The hub id may take the place of the short name.
    """
    base, _, folder = name.partition("=")
    base, _, split = base.partition(":")
    short = SHORT.get(base, base)
    return Name(short, split or SOURCES[short].split, folder) if short in SOURCES else None


def open_table(name: Name):
    """The data set as the library `datasets` opens it, the needed columns only.

    Raises OSError, ValueError or ImportError if that fails.
    """
    # imported here: training on local JSONL needs torch and transformers only
    from datasets import disable_progress_bars, load_dataset

    source = SOURCES[name.source]
    if name.folder:
        folder = Path(name.folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        inside = source.config if source.config and (folder / source.config).is_dir() else None
        disable_progress_bars()
        table = load_dataset(str(folder), data_dir=inside, split=name.split, streaming=True)
    else:  # through the cache, which is memory-mapped and works without network the next time
        options = dict(split=name.split, revision=source.revision)
        table = load_dataset(source.hub, source.config, **options)
    if present := table.column_names:  # unknown for JSONL before its first row is read
        wanted = [column for column in source.columns if column in present]
        if not wanted:
            raise ValueError(f"its columns are {', '.join(present)}")
        table = undecoded(table.select_columns(wanted))
    return table


def open_lines(name: Name) -> Iterator[dict]:
    """The rows of a data set whose files are JSON lines, one at a time: a row may be 100 MB."""
    source = SOURCES[name.source]
    if name.split not in source.files:
        raise ValueError(f"its splits are {', '.join(source.files)}")
    for file in source.files[name.split]:
        path = Path(name.folder) / file
        if not name.folder:
            from huggingface_hub import hf_hub_download

            options = dict(repo_type="dataset", revision=source.revision)
            path = hf_hub_download(source.hub, file, **options)
        with open(path) as lines:
            for line in lines:
                row = json.loads(line)
                yield {column: row[column] for column in source.columns if column in row}


def open_rows(name: Name) -> Iterator[dict]:
    """The rows of a data set. Raises SystemExit with the remedy if it cannot be loaded."""
    try:
        if SOURCES[name.source].files:
            yield from open_lines(name)
            return
        for batch in open_table(name).iter(batch_size=500):
            columns = list(batch)
            for values in zip(*batch.values()):
                yield dict(zip(columns, values))
    except (OSError, ValueError, ImportError) as error:  # no network, gated, a damaged file, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        gated = "gated" in str(error).lower()
        terms = "accept its terms on its page and set HF_TOKEN; " if gated else ""
        where = name.folder or SOURCES[name.source].hub
        fail(
            f"cannot load {name.source} ({where}, split {name.split}: {reason}); {terms}copy a "
            f"filled cache to $HF_HOME, or pass a folder with its files as {name.source}=FOLDER, "
            "or a JSONL file of problem records"
        )


def text_key(text: str) -> bytes:
    """16 bytes that are equal for problems that differ in white space and case only."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


ANY = (float("-inf"), float("inf"))  # the range of difficulties that keeps problems without one


def read_hub(
    name: Name, *, solutions: bool = False, difficulty: tuple[float, float] = ANY,
    overlap: "Overlap | None" = None, dropped: Counter, pictures: Path = FOLDER,
) -> Iterator[dict]:
    """Clean records of a data set, in its order. `dropped` counts the rows left out, by reason.

    `solutions` keeps chains of thought (many kilobytes each) and leaves out rows without one. An id
    is the data set's short name and the row's number, so it does not depend on what is left out.
    Pictures are written to the folder `pictures`.
    """
    source, seen = SOURCES[name.source], set()
    for index, row in enumerate(open_rows(name)):
        try:
            record = source.convert(row)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            fail(
                f"{name.source}, row {index}: not of the expected form ({type(error).__name__}: "
                f"{error}; columns {', '.join(row)}); copy the revision that data/sources.py "
                "pins, or pass the data as JSONL records"
            )
        reason = record if isinstance(record, str) else unusable(record, solutions)
        reason = reason or keep_pictures(record, pictures, name.folder)
        # The order of these tests decides what a row is counted as.
        if not reason and not source.benchmark:
            key = text_key(identity(record))
            reason = "duplicate" if key in seen else None
        if not reason and not within(record.get("difficulty"), difficulty):
            reason = "difficulty outside the range"
        id = f"{name.source}-{index}"
        if not reason and overlap is not None and overlap.find(id, record["problem"]):
            reason = "overlap with an evaluation set"
        if reason:
            dropped[reason] += 1
            continue
        if not source.benchmark:
            seen.add(key)
        if not solutions:
            record.pop("solution", None)
        yield {"id": id, **record}


def unusable(record: dict, solutions: bool) -> str | None:
    """Why a record lacks what it needs, or None."""
    if not record["problem"]:
        return "no problem text"
    if not record["answer"]:
        return "no answer"
    return "no solution" if solutions and not record.get("solution") else None


def within(level: float | None, difficulty: tuple[float, float]) -> bool:
    """Whether a level is in the range. A problem without a level is only in the range ANY."""
    low, high = difficulty
    return difficulty == ANY or level is not None and low <= level <= high


def subset(records: Iterable[dict], limit: int, seed: int) -> list[dict]:
    """A random subset, in the order of the records; all of them if `limit` is 0.

    It depends only on seed and records. At most `limit` records are held in memory.
    """
    if not limit:
        return list(records)
    rng, kept = random.Random(seed), []
    for index, record in enumerate(records):  # reservoir sampling
        if index < limit:
            kept.append((index, record))
        elif (slot := rng.randrange(index + 1)) < limit:
            kept[slot] = (index, record)
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]


def gradable(records: Iterable[dict], dropped: Counter) -> Iterator[dict]:
    """The records whose gold some answer can match. `dropped` counts the others.

    A gold that is not a number takes about 10 ms. Golds of `code` are run.
    """
    records = iter(records)
    while chunk := list(itertools.islice(records, 1024)):
        judged = zip(chunk, verifiers.refusals(chunk), code.failing_golds(chunk))
        for record, reason, failing in judged:
            if reason or failing:
                dropped[failing or "gold that cannot be graded"] += 1
            else:
                yield record


def counts_text(dropped: Counter) -> list[str]:
    """What was left out and why, the most frequent reason first."""
    return [f"{count} left out ({reason})" for reason, count in dropped.most_common()]


# --------------------------------------------------------------------------------------------------
# What the stages call


def load_records(
    name: str, fields: tuple[str, ...] = ("problem", "answer"), limit: int = 0, seed: int = 0
) -> list[dict]:
    """Records of a JSONL path, `toy[:split]` or a data set of SOURCES.

    Each has `id` and the non-empty strings `fields`. With `limit`, a random subset of that size, in
    file order, that depends on `seed` alone. Raises SystemExit with one sentence for an unknown
    name, a malformed record (file, line, reason) or an empty data set. Rows of a hub data set that
    cannot be used are left out and counted instead.
    """
    base, _, split = name.partition(":")
    is_file = Path(name).is_file()
    hub = None if is_file else parse_name(name)
    if is_file:
        records = load_jsonl(Path(name))
    elif base == "toy":
        split = split or "train"
        known = ", ".join(toy.SPLITS)
        require(split in toy.SPLITS, f"the toy task has the splits {known}, not {split!r}")
        records = toy.make_problems(split, limit or 2000, seed=seed, terse=0.5)
    elif hub:
        dropped: Counter = Counter()
        rows = read_hub(hub, solutions="solution" in fields, dropped=dropped)
        records = subset(rows, limit, seed)
        print0(", ".join([f"{name}: {len(records)} records", *counts_text(dropped)]))
    else:
        known = ", ".join(SOURCES)
        fail(f"no data at {name!r}: give a JSONL file, toy[:split], or one of {known}")
    check_records(name, records, fields)
    if not hub and limit and limit < len(records):
        chosen = set(random.Random(seed).sample(range(len(records)), limit))
        records = [record for index, record in enumerate(records) if index in chosen]
    if is_file:
        locate_pictures(name, records)
    return records


def check_records(name: str, records: list[dict], fields: tuple[str, ...]):
    """Give every record an id, and refuse what is malformed (SystemExit)."""
    seen: set[str] = set()
    for index, record in enumerate(records):
        line = record.pop("_line", None)
        where = f"{name}, row {index}" if line is None else f"{name}, line {line}"
        id = record["id"] = str(record.get("id", f"{Path(name).stem}-{index}"))
        for field in fields:
            value = record.get(field)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # "answer": 7 is clear enough; but 1e999 is read as inf.
            if field == "answer" and number and abs(value) != float("inf"):
                value = record[field] = str(value)
            if not isinstance(value, str) or not value.strip():
                problem = "is empty" if value == "" else f"is {value!r}"
                problem = problem if field in record else "is missing"
                fail(
                    f"{where}: {field!r} {problem[:80]}; every record needs the non-empty strings "
                    + ", ".join(fields)
                )
        texts = {name: value for name, value in record.items() if isinstance(value, str)}
        odd = [name for name, text in texts.items() if SURROGATE.search(text)]
        require(
            not odd,
            f"{where}: {', '.join(odd):.80} holds half a character (a lone surrogate), which is no "
            "text; mend or remove the record",
        )
        require(id not in seen, f"{where}: the id {id!r:.80} occurs twice; ids must be unique")
        seen.add(id)
    require(records, f"{name} holds no records; choose another file or data set")


def load_gradable(
    name: str, encode: Callable[[str], list[int]], max_prompt_tokens: int, limit: int, seed: int
) -> list[dict]:
    """Problem records with `prompt`, the token ids that `encode` makes of a problem.

    A problem whose gold cannot be graded would always score 0. In a file of the user's own it is an
    error; in a hub data set it is left out and counted. A collective: ranks share the checking.
    """
    grader.pool.start()  # the workers import math-verify while data and model are loaded
    problems = load_records(name, limit=limit, seed=seed)
    init_distributed()
    for problem in problems:
        verifiers.locate(problem, name)
    problems = without_failing_golds(name, with_usable_golds(name, problems))
    problems = with_prompts(name, problems, encode, left_out=bool(parse_name(name)))
    kept = [problem for problem in problems if len(problem["prompt"]) <= max_prompt_tokens]
    flag = f"--max_prompt_tokens {max_prompt_tokens}"
    require(kept, f"every prompt of {name} is longer than {flag}; raise it")
    if len(kept) < len(problems):
        longer = len(problems) - len(kept)
        print0(f"{name}: {longer} problems are left out, because their prompts exceed {flag}")
    return kept


def with_usable_golds(name: str, problems: list[dict]) -> list[dict]:
    """The problems whose answers their verifiers can judge.

    SystemExit for another one that is not from the hub.
    """
    ranks = world_size()
    shares = all_gather(verifiers.refusals(problems[rank()::ranks]))
    reasons = [shares[i % ranks][i // ranks] for i in range(len(problems))]
    left_out = [(p["id"], reason) for p, reason in zip(problems, reasons) if reason]
    if left_out:
        (id, reason), count = left_out[0], f"{len(left_out)} of {len(problems)}"
        require(
            parse_name(name),
            f"{name}: {count} answers cannot be graded, the first in record {id}: {reason}; mend "
            "or remove such records",
        )
        print0(
            f"{name}: {count} records left out, because their answers cannot be graded (first: "
            f"{id}, {reason})"
        )
    problems = [problem for problem, reason in zip(problems, reasons) if not reason]
    require(problems, f"no record of {name} has a gold that can be graded; choose other data")
    return problems


def without_failing_golds(name: str, problems: list[dict]) -> list[dict]:
    """The problems but those whose own programs fail their tests. A collective."""
    tried = [problem for problem in problems if "golds" in problem]
    if not tried:
        return problems
    mine = tried[rank()::world_size()]
    failing = {p["id"] for p, reason in zip(mine, code.failing_golds(mine)) if reason}
    failing = set().union(*all_gather(failing))
    for problem in tried:
        problem.pop("golds", None)
    if failing:
        print0(f"{name}: {len(failing)} records left out ({code.FAILING})")
    problems = [problem for problem in problems if problem["id"] not in failing]
    require(problems, f"no record of {name} is left: {code.FAILING}; choose other data")
    return problems


def hold_out(problems: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(training, held-out) problems, both in the order of the data.

    `size` random problems are held out, at most a tenth. Problems of equal text (see `text_key`)
    are one problem. Its first copy is held out, and the others are in neither part. The draw
    depends on seed and texts alone. So it is the same on every rank and after a resume.
    """
    first: dict[bytes, dict] = {}
    for problem in problems:
        first.setdefault(text_key(identity(problem)), problem)
    lot = lambda key: hashlib.blake2b(key, key=str(seed).encode()).digest()
    chosen = set(sorted(first, key=lot)[: min(size, len(first) // 10)])
    held_out = [problem for key, problem in first.items() if key in chosen]
    training = [problem for problem in problems if text_key(identity(problem)) not in chosen]
    if copies := len(problems) - len(training) - len(held_out):
        print0(f"{copies} further copies of held-out problems are left out of training")
    return training, held_out


def load_questions(config, encode: Callable[[str], list[int]]) -> tuple[list[dict], list[dict]]:
    """grpo.py's training and held-out problems, which all fit into the model's context."""
    longest, seed = config.max_prompt_tokens, config.seed
    problems, held_out = load_gradable(config.data, encode, longest, config.limit, seed), []
    if config.eval_data and config.eval_size:
        held_out = load_gradable(config.eval_data, encode, longest, config.eval_size, seed)
    elif not config.eval_data:
        problems, held_out = hold_out(problems, config.eval_size, seed)
    longest = max(len(problem["prompt"]) for problem in problems + held_out)
    check_context(load_config(config.model), longest, config.max_completion_tokens)
    return problems, held_out


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: str) -> list[int]:
    """A permutation of 0..n-1."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def draw(records: list, positions: Iterable[int], seed: int) -> list:
    """The records at `positions` of an endless sequence of epochs, each in an order of its own."""
    drawn = []
    for position in positions:
        epoch, place = divmod(position, len(records))
        drawn.append(records[epoch_order(len(records), f"{seed} {epoch}")[place]])
    return drawn


# --------------------------------------------------------------------------------------------------
# Preparing a file


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, (low, high) = parser.add_argument, ANY
    add("data", help=f"{', '.join(SOURCES)}; [:split] and [=FOLDER] may follow")
    add("--out", required=True, help="JSONL file of problems; a report goes to *.report.json")
    add("--limit", type=int, default=0, help="use a random subset of this size; 0: all")
    add("--seed", type=int, default=0, help="of the subset")
    add("--min_difficulty", type=float, default=low, help="DeepMath: problems from this level on")
    add("--max_difficulty", type=float, default=high, help="DeepMath: problems up to this level")
    sets = "evaluation sets that no problem may overlap with"
    add("--decontaminate", nargs="+", default=[], metavar="NAME", help=sets)
    add("--ngram", type=int, default=13, help="words in a row that count as overlap")
    add("--solutions", action="store_true", help="keep chains of thought (for distill.py)")
    add("--overwrite", action="store_true", help="replace --out")
    parser.error = fail
    args = parser.parse_args()
    names, out = ", ".join(SOURCES), args.out
    require(parse_name(args.data), f"no data set {args.data!r}: give one of {names}")
    refuse_unusable(Path(out))
    fit = Path(out).is_file() or not Path(out).exists()
    require(fit, f"{out} is no file; --out wants one such as runs/problems.jsonl")
    written = [path for path in (Path(out), report_beside(Path(out))) if path.exists()]
    usable, names = args.overwrite or not written, " and ".join(map(str, written))
    require(usable, f"--out is taken ({names}): choose another --out or pass --overwrite")
    sizes = args.ngram >= 2 and args.limit >= 0
    require(sizes, "--ngram must be at least 2, and --limit not negative")
    return args


def report_beside(out: Path) -> Path:
    return out.with_suffix(".report.json")


def write_records(out: Path, records: Iterable[dict]) -> int:
    """Write a JSONL file in one go. Returns its number of records; if 0, `out` stays as it was.

    Raises SystemExit if that cannot be, or if another process is at it.
    """
    temporary, kept = out.with_name(out.name + ".tmp"), 0
    make_folder(out.parent)
    if refusal := lock(out.with_name(f".{out.name}.lock")):
        fail(refusal)
    try:
        with open(temporary, "w") as file:
            for record in records:
                if "images" in record:
                    record["images"] = relative(record["images"], out)
                file.write(json.dumps(record) + "\n")
                kept += 1
        if kept:
            temporary.replace(out)
    except OSError as error:
        fail(f"cannot write {temporary} ({error.strerror}); make room, or choose another --out")
    finally:
        temporary.unlink(missing_ok=True)
    return kept


def main():
    args = parse_arguments()
    out, name = Path(args.out), parse_name(args.data)
    overlap, dropped = None, Counter()
    if args.decontaminate:
        problems = (problem for other in args.decontaminate for problem in load_records(other))
        overlap = Overlap(problems, args.ngram)
    levels, wanted = (args.min_difficulty, args.max_difficulty), args.solutions
    filters = dict(solutions=wanted, difficulty=levels, overlap=overlap)
    filters["pictures"] = out.with_name(f"{out.stem}_images")
    records = read_hub(name, **filters, dropped=dropped)
    if args.limit:  # without it, records go straight from reader to file
        records = subset(records, args.limit, args.seed)
    if not wanted:  # solutions are for the cold start, which grades nothing
        records = gradable(records, dropped)
    kept = write_records(out, records)
    require(kept, f"no record of {args.data} is left ({dict(dropped)}); widen the filters")
    source = SOURCES[name.source]
    report = {
        "data": args.data,
        "hub": source.hub,
        "kept": kept,
        "revision": None if name.folder else source.revision,  # a folder does not say
        "dropped": dict(dropped),
        "decontaminated_against": args.decontaminate,
        "ngram": args.ngram,
        "overlaps": overlap.report if overlap else [],
    }
    report_beside(out).write_text(json.dumps(report, indent=1) + "\n")
    print0("; ".join([f"{out}: {kept} records", *counts_text(dropped)]))


if __name__ == "__main__":
    guarded(main)
