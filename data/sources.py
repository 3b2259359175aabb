"""Where problems come from: a JSONL path, `toy`, or a data set of the Hugging Face hub, all as the same records.

    problem record   {"id", "problem", "answer", "solution" (optional)}

A name may carry a split, as in `toy:test` or `openai/gsm8k:test`. Adding a data set is one entry in HUB.
"""
import json
import random
from pathlib import Path

from data import toy


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{…} of a data set's solution, by matching braces; None when there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{"):i]
    return None


def gsm8k(row: dict) -> dict:
    solution, _, answer = row["answer"].rpartition("####")
    return {"problem": row["question"], "answer": answer.strip().replace(",", ""), "solution": solution.strip()}


def deepmath(row: dict) -> dict:
    # The solutions come without an opening <think>; what follows </think> repeats the result.
    thoughts = row["r1_solution_1"].removeprefix("<think>").split("</think>")[0]
    return {"problem": row["question"], "answer": str(row["final_answer"]).strip(), "solution": thoughts.strip()}


def openthoughts(row: dict) -> dict | None:
    answer = last_boxed(row["ground_truth_solution"] or "") or last_boxed(row["deepseek_solution"] or "")
    if row["domain"] != "math" or answer is None:
        return None
    return {"problem": row["problem"], "answer": answer, "solution": row["deepseek_reasoning"].strip()}


# hub id -> (config, default split, row -> record without id, or None to leave the row out)
HUB = {
    "openai/gsm8k": ("main", "train", gsm8k),
    "zwhe99/DeepMath-103K": (None, "train", deepmath),
    "open-thoughts/OpenThoughts-114k": ("metadata", "train", openthoughts),
}


def load_hub(name: str, split: str | None) -> list[dict]:
    """Records of a data set of HUB. Raises SystemExit when it cannot be loaded."""
    from datasets import load_dataset  # imported here: training on local JSONL needs torch and transformers alone
    config, default_split, convert = HUB[name]
    try:
        rows = load_dataset(name, config, split=split or default_split)
    except (OSError, ValueError) as error:  # no network, no such split
        raise SystemExit(f"error: cannot load {name} ({str(error).splitlines()[0]}); without network, fill the cache "
                         "at $HF_HOME on another machine, or pass a local JSONL file of problem records") from None
    records = []
    for index, row in enumerate(rows):
        if record := convert(row):
            records.append({"id": f"{name.split('/')[1]}-{index}", **record})
    return records


def load_jsonl(path: Path) -> list[dict]:
    """One JSON object a line; blank lines are passed over. Raises SystemExit with file, line and reason."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise SystemExit(f"error: {path}, line {number}: not JSON ({error}); mend or remove the line") from None
            if not isinstance(record, dict):
                raise SystemExit(f"error: {path}, line {number}: want one JSON object a line, "
                                 f"found a {type(record).__name__}")
            records.append({"_line": number, **record})
    return records


def load_records(name: str, fields: tuple[str, ...] = ("problem", "answer"), limit: int = 0, seed: int = 0) -> list[dict]:
    """Records of a JSONL path, `toy[:split]` or `hub/id[:split]`, each with `id` and the non-empty strings `fields`.

    With `limit`, a random subset of that size, in file order, that depends on `seed` alone. Raises SystemExit with
    one sentence for an unknown name, a malformed record (file, line, reason) or an empty data set.
    """
    base, _, split = name.partition(":")
    if Path(name).is_file():
        records = load_jsonl(Path(name))
    elif base == "toy":
        if (split or "train") not in toy.SPLITS:
            raise SystemExit(f"error: the toy task has the splits {', '.join(toy.SPLITS)}, not {split!r}")
        records = toy.make_problems(split or "train", limit or 2000, seed=seed, terse=0.5)
    elif base in HUB:
        records = load_hub(base, split or None)
    else:
        raise SystemExit(f"error: no data at {name!r}: give a JSONL file, toy[:split], or one of {', '.join(HUB)}")

    seen: set[str] = set()
    for index, record in enumerate(records):
        where = f"{name}, line {record.pop('_line')}" if "_line" in record else f"{name}, row {index}"
        record["id"] = str(record.get("id", f"{Path(name).stem}-{index}"))
        for field in fields:
            value = record.get(field)
            if isinstance(value, (int, float)) and field == "answer" and not isinstance(value, bool):
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
    if limit and limit < len(records):
        chosen = set(random.Random(seed).sample(range(len(records)), limit))
        records = [record for index, record in enumerate(records) if index in chosen]
    return records
