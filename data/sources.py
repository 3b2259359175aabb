r"""Where problems come from: a JSONL path, `toy`, or a data set of the Hugging Face hub, all as the same records.

    problem record   {"id", "problem", "answer", "solution" (optional), "difficulty" (optional)}

    name             toy, aime24, gsm8k:test (a split), deepmath=FOLDER (a local copy with the hub's layout), FILE.jsonl
    prepare once     python -m data.sources deepmath --out runs/data/deepmath.jsonl --limit 60000 --min_difficulty 5 \
                         --decontaminate math500 aime24 aime25 amc23

Rows are read one batch at a time and cleaned on the way; what stays in memory is what is returned. Adding a data set
is a function from its row to a record (or to the reason why it is left out) and one entry in SOURCES.
"""
import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import toy

# ---------------------------------------------------------------------------------------------------------------
# Cleaning

def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{…} of a data set's solution, by matching braces; None when there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{"):i]
    return None


THOUSANDS = re.compile(r"-?\d{1,3}(?:,(?:\\!)?\d{3})+(?:\.\d+)?")  # LaTeX authors write 1,\!007
DEGREES = re.compile(r"(-?\d+(?:\.\d+)?)\s*(?:\^\s*\\circ|\^\{\s*\\circ\s*\}|°)")


def clean_gold(answer) -> str:
    """A gold as the grader wants it: no ####, box, dollars, leading zeros, thousands separators or degree sign.

    A list becomes "a, b". Empty where there is nothing.
    """
    if isinstance(answer, (list, tuple)):
        return ", ".join(filter(None, map(clean_gold, answer)))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str("" if answer is None else answer).rpartition("####")[2]
    text = (last_boxed(text) or text).replace("$", "").strip()
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace("\\!", "")
    if match := DEGREES.fullmatch(text):
        text = match[1]
    if re.fullmatch(r"-?\d+", text):  # AIME writes 025
        text = str(int(text)) if len(text) < 1000 else text
    return text


def split_cot(text: str) -> tuple[str, str]:
    """(chain of thought, what follows it), however the data set wraps them.

    OpenThoughts: <|begin_of_thought|> … <|end_of_thought|> <|begin_of_solution|> … <|end_of_solution|>; OpenThoughts3:
    <think> … </think> …; DeepMath: no opening tag. Without any of these the whole text is the thought.
    """
    thought, mark, rest = text.partition("<|end_of_thought|>")
    if mark:
        solution = rest.partition("<|begin_of_solution|>")[2].partition("<|end_of_solution|>")[0]
        return thought.rpartition("<|begin_of_thought|>")[2].strip(), (solution or rest).strip()
    thought, _, rest = text.partition("</think>")
    return thought.strip().removeprefix("<think>").strip(), rest.strip()


WRAPPERS = [re.compile(pattern, re.DOTALL) for pattern in (
    r"\s*Solve the following math problem step by step\.[^\n]*\n\n(?P<problem>.*?)\n\nRemember to put your answer on its own line.*",
    r"\s*Return your final response within \\boxed\{\}\.\s*(?P<problem>.*)",
    r"(?P<problem>.*?)\s*(?:Please reason step by step, and|Let's think step by step and) (?:put|output) (?:your|the) final answer "
    r"(?:with)?in \\boxed\{\}\.\s*")]


def unwrap(problem: str) -> str:
    """A problem without the instruction that its data set wrapped around it: the template gives its own."""
    for wrapper in WRAPPERS:
        if match := wrapper.fullmatch(problem):
            problem = match["problem"]
    return problem.strip()


LETTERS = "ABCDEFGHIJKLMNOP"


def multiple_choice(question: str, options: list[str], right: int) -> dict:
    listed = "\n".join(f"({letter}) {option.strip()}" for letter, option in zip(LETTERS, options))
    return {"problem": f"{question.strip()}\n\n{listed}\n\nAnswer with the letter of the right option.", "answer": LETTERS[right]}


# ---------------------------------------------------------------------------------------------------------------
# Data sets: row -> record without id, or the reason (a string) why the row is left out

def gsm8k(row: dict) -> dict:
    return {"problem": row["question"], "answer": clean_gold(row["answer"]), "solution": row["answer"].rpartition("####")[0].strip()}


def deepmath(row: dict) -> dict:
    return {"problem": row["question"], "answer": clean_gold(row["final_answer"]), "difficulty": row["difficulty"],
            "solution": split_cot(row.get("r1_solution_1") or "")[0]}


def openthoughts(row: dict) -> dict | str:
    """Rows of the config `metadata`, and the conversations of the default config and of OpenThoughts3."""
    if row.get("conversations"):
        asked, replied = (next((turn["value"] for turn in row["conversations"] if turn["from"] in names), "")
                          for names in (("user", "human"), ("assistant", "gpt")))
        thought, solution = split_cot(replied)
        row = {"domain": "math", **row, "problem": asked, "deepseek_reasoning": thought, "deepseek_solution": solution}
    if row.get("domain") != "math":
        return "not mathematics"
    answer = last_boxed(row.get("ground_truth_solution") or "") or last_boxed(row["deepseek_solution"] or "")
    return {"problem": unwrap(row["problem"]), "answer": clean_gold(answer), "solution": row["deepseek_reasoning"].strip()}


def dapo(row: dict) -> dict:
    return {"problem": unwrap(row["prompt"][-1]["content"]), "answer": clean_gold(row["reward_model"]["ground_truth"])}


def plain(problem: str = "problem", answer: str = "answer") -> Callable[[dict], dict]:
    return lambda row: {"problem": row[problem].strip(), "answer": clean_gold(row[answer]), "solution": row.get("solution") or ""}


def olympiad(row: dict) -> dict:
    return {"problem": row["question"].strip(), "answer": clean_gold(row["final_answer"])}


def gpqa(row: dict) -> dict:
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = random.Random(row["Question"]).sample(range(4), 4)  # the right one comes first in every row; same order each run
    return multiple_choice(row["Question"], [options[i] for i in order], order.index(0))


def mmlu_pro(row: dict) -> dict:
    return multiple_choice(row["question"], row["options"], row["answer_index"])


class Source(NamedTuple):
    hub: str  # id on the hub
    config: str | None
    split: str  # default split
    revision: str  # commit that is loaded
    convert: Callable[[dict], dict | str]
    columns: tuple[str, ...]  # the others are not read
    benchmark: bool = False  # evaluation sets keep every problem, training sets lose duplicates


# Columns as the cards describe them; each revision is one that several independent public projects pin.
SOURCES = {
    "openthoughts": Source(
        "open-thoughts/OpenThoughts-114k", "metadata", "train", "bd093c3994fd54d2390985b66988ddf282a55eb6",
        openthoughts, ("problem", "deepseek_reasoning", "deepseek_solution", "ground_truth_solution", "domain", "conversations")),
    "openthoughts3": Source(
        "open-thoughts/OpenThoughts3-1.2M", None, "train", "61bcf9d4eb38b30295efc2021227a63cc5bb34c8",
        openthoughts, ("domain", "conversations")),
    "deepmath": Source(
        "zwhe99/DeepMath-103K", None, "train", "5cf055d1fe3d7a2eb19719ac020211469736ae44",
        deepmath, ("question", "final_answer", "difficulty", "r1_solution_1")),
    "dapo17k": Source(
        "BytedTsinghua-SIA/DAPO-Math-17k", None, "train", "65877096c24ffa7abc4e4fa5edb95cf3413a5674",
        dapo, ("prompt", "reward_model")),
    "deepscaler": Source(
        "agentica-org/DeepScaleR-Preview-Dataset", None, "train", "b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
        plain(), ("problem", "answer", "solution")),
    "gsm8k": Source(
        "openai/gsm8k", "main", "train", "e53f048856ff4f594e959d75785d2c2d37b678ee",
        gsm8k, ("question", "answer")),
    "math500": Source(
        "HuggingFaceH4/MATH-500", None, "test", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        plain(), ("problem", "answer", "solution"), True),
    "aime24": Source(
        "HuggingFaceH4/aime_2024", None, "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        plain(), ("problem", "answer", "solution"), True),
    "aime25": Source(
        "math-ai/aime25", None, "test", "563bb8404243c5f09de6ec262f2db674fe5bce9b",
        plain(), ("problem", "answer"), True),
    "amc23": Source(
        "math-ai/amc23", None, "test", "80815d37005feb82cd7f8fbc6901d5d3eff43057",
        plain("question"), ("question", "answer"), True),
    "minerva": Source(
        "math-ai/minervamath", None, "test", "ee46ddc498933b1977577953250ca5c66be64f96",
        plain("question"), ("question", "answer"), True),
    "olympiadbench": Source(
        "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "91184b52131e7fc9455fef848035173aea8cc01a",
        olympiad, ("question", "final_answer"), True),
    "gpqa_diamond": Source(
        "Idavidrein/gpqa", "gpqa_diamond", "train", "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        gpqa, ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"), True),
    "mmlu_pro": Source(
        "TIGER-Lab/MMLU-Pro", None, "test", "b189ec765aa7ed75c8acfea42df31fdae71f97be",
        mmlu_pro, ("question", "options", "answer_index"), True),
}
SHORT = {source.hub: short for short, source in SOURCES.items()}  # hub ids are taken as names too


class Name(NamedTuple):
    source: str  # a key of SOURCES
    split: str
    folder: str  # local copy, or empty


def parse_name(name: str) -> Name | None:
    """`short[:split][=folder]` (or the hub id in place of the short name); None if it names no data set of SOURCES."""
    base, _, folder = name.partition("=")
    base, _, split = base.partition(":")
    short = SHORT.get(base, base)
    return Name(short, split or SOURCES[short].split, folder) if short in SOURCES else None


def tell(*words):
    if os.environ.get("RANK", "0") == "0":  # one rank of a torchrun speaks
        print(*words, file=sys.stderr, flush=True)


def open_rows(name: Name) -> Iterator[dict]:
    """Rows of a data set, only the needed columns. Raises SystemExit with the remedy when it cannot be loaded."""
    # imported here: training on local JSONL needs torch and transformers alone
    from datasets import disable_progress_bars, load_dataset
    source = SOURCES[name.source]
    try:
        if name.folder:
            folder = Path(name.folder)
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}")
            inside = source.config if source.config and (folder / source.config).is_dir() else None
            disable_progress_bars()
            table = load_dataset(str(folder), data_dir=inside, split=name.split, streaming=True)
        else:  # through the cache: memory-mapped, and there the next time even without network
            table = load_dataset(source.hub, source.config, split=name.split, revision=source.revision)
        if present := table.column_names:  # JSONL may show its columns with its rows only
            if not (wanted := [column for column in source.columns if column in present]):
                raise ValueError(f"its columns are {', '.join(present)}")
            table = table.select_columns(wanted)
        for batch in table.iter(batch_size=500):
            columns = list(batch)
            for values in zip(*batch.values()):
                yield dict(zip(columns, values))
    except (OSError, ValueError, ImportError) as error:  # no network, gated, no such split, a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        gated = "accept its terms on its page and set HF_TOKEN; " if "gated" in str(error).lower() else ""
        raise SystemExit(f"error: cannot load {name.source} ({name.folder or source.hub}, split {name.split}: {reason}); {gated}"
                         f"without network, fill the cache at $HF_HOME on another machine and copy it here, or pass a folder with "
                         f"the data set's files as {name.source}=FOLDER, or a JSONL file of problem records") from None


def fingerprint(text: str) -> bytes:
    """16 bytes that are equal for problems that differ in white space and case only."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def read_hub(name: Name, *, solutions: bool = False, difficulty: tuple[float, float] = (float("-inf"), float("inf")),
             overlap: "Overlap | None" = None, dropped: Counter) -> Iterator[dict]:
    """Clean records of a data set, in its order; `dropped` counts, by reason, the rows that were left out.

    `solutions` keeps chains of thought (many kilobytes each) and leaves out rows without one. An id is the data set's
    short name and the row's number, so that it stays the same whatever is left out.
    """
    source, seen = SOURCES[name.source], set()
    for index, row in enumerate(open_rows(name)):
        try:
            record = source.convert(row)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise SystemExit(f"error: {name.source}, row {index}: not of the expected form ({type(error).__name__}: {error}; columns "
                             f"{', '.join(row)}); another revision than data/sources.py knows? Pass the data as JSONL records") from None
        if isinstance(record, str):
            dropped[record] += 1
            continue
        level = record.get("difficulty")
        if not record["problem"] or not record["answer"]:
            dropped["no problem text" if not record["problem"] else "no answer"] += 1
        elif solutions and not record.get("solution"):
            dropped["no solution"] += 1
        elif not source.benchmark and (mark := fingerprint(record["problem"])) in seen:
            dropped["duplicate"] += 1
        elif difficulty != (float("-inf"), float("inf")) and not (level is not None and difficulty[0] <= level <= difficulty[1]):
            dropped["difficulty outside the range"] += 1
        elif overlap is not None and overlap.find(f"{name.source}-{index}", record["problem"]):
            dropped["overlap with an evaluation set"] += 1
        else:
            if not source.benchmark:
                seen.add(mark)
            if not solutions:
                record.pop("solution", None)
            yield {"id": f"{name.source}-{index}", **record}


def subset(records: Iterable[dict], limit: int, seed: int) -> list[dict]:
    """A random subset in file order that depends on seed and records alone, holding `limit` records at a time; 0: all."""
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
    """The records whose gold some answer can match; `dropped` counts the others. 10 ms for each that is not a number."""
    from rewards import check_golds
    records = iter(records)
    while chunk := list(itertools.islice(records, 1024)):
        for record, reason in zip(chunk, check_golds([record["answer"] for record in chunk])):
            if reason:
                dropped["gold that cannot be graded"] += 1
            else:
                yield record


# ---------------------------------------------------------------------------------------------------------------
# Decontamination

class Overlap:
    """Finds training problems that share a run of n words with an evaluation problem.

    Words are runs of letters and digits in lower case, so that LaTeX and punctuation weigh little. Runs that stand in
    more than `boilerplate` evaluation problems ("where m and n are relatively prime positive integers, find m + n …")
    say nothing and do not count; a problem that is shorter than n words must be equal as a whole.
    """

    def __init__(self, problems: Iterable[dict], n: int = 13, boilerplate: int = 2):
        self.n, self.report = n, []
        owners: dict[str, set[str]] = {}
        self.whole: dict[str, str] = {}
        for problem in problems:
            words = self.words(problem["problem"])
            self.whole[" ".join(words)] = problem["id"]
            for run in self.runs(words):
                owners.setdefault(run, set()).add(problem["id"])
        self.owner = {run: min(ids) for run, ids in owners.items() if len(ids) <= boilerplate}

    @staticmethod
    def words(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())

    def runs(self, words: list[str]) -> Iterator[str]:
        return (" ".join(words[i:i + self.n]) for i in range(len(words) - self.n + 1))

    def find(self, id: str, text: str) -> bool:
        """Whether `text` overlaps; if so the pair and the shared words are added to `report`."""
        words = self.words(text)
        found = next(((self.owner[run], run) for run in self.runs(words) if run in self.owner), None)
        if found is None and (joined := " ".join(words)) in self.whole:
            found = self.whole[joined], joined
        if found:
            self.report.append({"id": id, "evaluation": found[0], "shared": found[1], "problem": text})
        return found is not None


# ---------------------------------------------------------------------------------------------------------------
# What the stages call

def load_jsonl(path: Path) -> list[dict]:
    """One JSON object a line; blank lines are passed over. Raises SystemExit with file, line and reason."""
    def not_a_number(name: str):
        raise ValueError(f"{name} is no JSON number")

    records = []
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                line.encode()  # fails on the stand-ins for bytes that are not UTF-8
                record = json.loads(line, parse_constant=not_a_number)
            except UnicodeEncodeError:
                raise SystemExit(f"error: {path}, line {number}: not UTF-8; convert the file "
                                 "first, such as with `iconv -f LATIN1 -t UTF-8`") from None
            except (ValueError, RecursionError) as error:  # also an integer of over 4,300 digits
                raise SystemExit(f"error: {path}, line {number}: not JSON ({error}); mend or remove the line") from None
            if not isinstance(record, dict):
                raise SystemExit(f"error: {path}, line {number}: want one JSON object a line, "
                                 f"found a {type(record).__name__}")
            records.append({"_line": number, **record})
    return records


def load_records(name: str, fields: tuple[str, ...] = ("problem", "answer"), limit: int = 0, seed: int = 0) -> list[dict]:
    """Records of a JSONL path, `toy[:split]` or a data set of SOURCES, each with `id` and the non-empty strings `fields`.

    With `limit`, a random subset of that size, in file order, that depends on `seed` alone. Raises SystemExit with
    one sentence for an unknown name, a malformed record (file, line, reason) or an empty data set; rows of a hub data
    set that cannot be used are left out and counted instead.
    """
    base, _, split = name.partition(":")
    hub = None if Path(name).is_file() else parse_name(name)
    if Path(name).is_file():
        records = load_jsonl(Path(name))
    elif base == "toy":
        if (split or "train") not in toy.SPLITS:
            raise SystemExit(f"error: the toy task has the splits {', '.join(toy.SPLITS)}, not {split!r}")
        records = toy.make_problems(split or "train", limit or 2000, seed=seed, terse=0.5)
    elif hub:
        dropped: Counter = Counter()
        records = subset(read_hub(hub, solutions="solution" in fields, dropped=dropped), limit, seed)
        tell(f"{name}: {len(records)} records" + "".join(f", {count} left out ({why})" for why, count in dropped.most_common()))
    else:
        raise SystemExit(f"error: no data at {name!r}: give a JSONL file, toy[:split], or one of {', '.join(SOURCES)}")

    seen: set[str] = set()
    for index, record in enumerate(records):
        where = f"{name}, line {record.pop('_line')}" if "_line" in record else f"{name}, row {index}"
        record["id"] = str(record.get("id", f"{Path(name).stem}-{index}"))
        for field in fields:
            value = record.get(field)
            if (field == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool)
                    and abs(value) != float("inf")):  # 1e999 is read as inf
                value = record[field] = str(value)  # "answer": 7 is clear enough
            if not isinstance(value, str) or not value.strip():
                problem = "is missing" if field not in record else "is empty" if value == "" else f"is {value!r}"
                raise SystemExit(f"error: {where}: {field!r} {problem[:80]}; every record needs the non-empty strings "
                                 f"{', '.join(fields)}")
        if record["id"] in seen:
            raise SystemExit(f"error: {where}: the id {record['id']!r} stands twice; ids must be unique")
        seen.add(record["id"])
    if not records:
        raise SystemExit(f"error: {name} holds no records")
    if not hub and limit and limit < len(records):
        chosen = set(random.Random(seed).sample(range(len(records)), limit))
        records = [record for index, record in enumerate(records) if index in chosen]
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help=f"{', '.join(SOURCES)}; [:split] and [=FOLDER] may follow")
    parser.add_argument("--out", required=True, help="JSONL file of problem records; a report goes to *.report.json")
    parser.add_argument("--limit", type=int, default=0, help="use a random subset of this size; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the subset")
    parser.add_argument("--min_difficulty", type=float, default=float("-inf"), help="DeepMath: keep problems from this level on")
    parser.add_argument("--max_difficulty", type=float, default=float("inf"), help="DeepMath: keep problems up to this level")
    parser.add_argument("--decontaminate", nargs="+", default=[], metavar="NAME", help="evaluation sets that nothing may overlap with")
    parser.add_argument("--ngram", type=int, default=13, help="words in a row that count as overlap")
    parser.add_argument("--solutions", action="store_true", help="keep chains of thought (for distill.py)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args()
    out, name = Path(args.out), parse_name(args.data)
    if name is None:
        raise SystemExit(f"error: no data set {args.data!r}: give one of {', '.join(SOURCES)}")
    if out.exists() and not args.overwrite:
        raise SystemExit(f"error: {out} exists: choose another --out or pass --overwrite")
    if args.ngram < 2 or args.limit < 0:
        raise SystemExit("error: --ngram must be at least 2, and --limit not negative")
    overlap, dropped = None, Counter()
    if args.decontaminate:
        overlap = Overlap((problem for other in args.decontaminate for problem in load_records(other)), args.ngram)
    records = read_hub(name, solutions=args.solutions, difficulty=(args.min_difficulty, args.max_difficulty), overlap=overlap,
                       dropped=dropped)
    if args.limit:  # without it, records go straight from reader to file
        records = subset(records, args.limit, args.seed)
    if not args.solutions:  # those are for the cold start, which grades nothing
        records = gradable(records, dropped)
    temporary, kept = out.with_name(out.name + ".tmp"), 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "w")
    except OSError as error:
        raise SystemExit(f"error: cannot write {temporary} ({error.strerror}); choose another --out") from None
    with file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            kept += 1
    if not kept:
        temporary.unlink()
        raise SystemExit(f"error: no record of {args.data} is left ({dict(dropped)}); widen the filters")
    temporary.replace(out)
    report = {"data": args.data, "hub": SOURCES[name.source].hub, "kept": kept,
              "revision": None if name.folder else SOURCES[name.source].revision,  # a folder does not say
              "dropped": dict(dropped), "decontaminated_against": args.decontaminate, "ngram": args.ngram,
              "overlaps": overlap.report if overlap else []}
    out.with_suffix(".report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{out}: {kept} records" + "".join(f"; {count} left out ({why})" for why, count in dropped.most_common()))


if __name__ == "__main__":
    main()
