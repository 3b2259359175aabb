r"""Data sets whose questions have pictures: MMMU, MMMU-Pro, EMMA, MMK12, Geometry3K, SRPO's.

    evaluation   mmmu            900 questions, 53 of them open
                 mmmu_pro        10 options; with mmmu_pro_vision, where the question is in the
                                 picture, too: the score called MMMU-Pro is the mean of both
                 emma_math, emma_physics, emma_chemistry, emma_coding
                 mmk12_math, mmk12_physics, mmk12_chemistry, mmk12_biology
    training     mmk12, geometry3k, srpo_rl, srpo_sft (with chains of thought)

A function of a row returns a record, or why the row is left out. Its `images` are as the data set
has them: {"bytes", "path"}.

Answers are read out of the box or the answer span alone (data/choice.py; `open_answer` below).
MMMU's own script searches the whole text, takes the last letter, draws an option at random where it
finds none, and lets an open answer pass that contains the gold. So our figures of weak models are
lower. EMMA and MMK12 are judged by GPT-4 elsewhere, where the option's letter is not enough.
"""

import ast
import json
import re

from data.choice import LETTERS, tidy
from plumbing.answers import grade, last_box

ASK_LETTER = "Answer with the letter of the right option."
IN_PICTURE = f"The picture shows a question and its options. {ASK_LETTER}"
OPEN = "data/vision.py:open_answer"  # its verifier
MARK = re.compile(r"<image[ _](\d+)>")

# --------------------------------------------------------------------------------------------------
# Rows


def numbered(row: dict, names: str) -> dict[int, dict]:
    """The pictures of the columns image_1, image_2, ...: number -> picture."""
    found = {i: row.get(names.format(i)) for i in range(1, 8)}
    return {i: picture for i, picture in found.items() if picture}


def place(texts: list[str], pictures: dict[int, dict]) -> tuple[list[str], list[dict]]:
    """Texts with `<image>` where a picture is first named, and the pictures in that order.

    Named again it is "(picture 2)". Those that are never named come first, without a mark.
    """
    order = list(dict.fromkeys(int(n) for text in texts for n in MARK.findall(text)))
    order = [n for n in order if n in pictures]
    shown: set[int] = set()

    def mark(match) -> str:
        number = int(match[1])
        if number in pictures and number not in shown:
            shown.add(number)
            return "<image>"
        return f"(picture {number})"

    texts = [MARK.sub(mark, text.replace("<image>", "")) for text in texts]
    return texts, [p for n, p in pictures.items() if n not in order] + [pictures[n] for n in order]


def question(text: str, options: list[str], answer: str, pictures: dict[int, dict]) -> dict:
    """The record of a question with these options, or of an open one without any."""
    (text, *options), images = place([text.strip(), *(str(o).strip() for o in options)], pictures)
    if not options:
        return {"problem": text, "answer": answer, "images": images, "verifier": OPEN}
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))
    problem = f"{text}\n\n{listed}\n\n{ASK_LETTER}"
    return {"problem": problem, "answer": answer, "images": images, "verifier": "choice",
            "options": options}  # fmt: skip


def listed(text) -> list:
    """The list that a column holds as text, or as a list."""
    return ast.literal_eval(text) if isinstance(text, str) else list(text or ())


def mmmu(row: dict) -> dict:
    """A row of MMMU, or of MMMU-Pro's standard config. An open one may have several golds."""
    options, answer = listed(row["options"]), row["answer"].strip()
    record = question(row["question"], options, answer, numbered(row, "image_{}"))
    if not options and answer.startswith("["):
        golds = [str(gold).strip() for gold in listed(answer)]
        record |= {"answer": golds[0], "golds_too": golds[1:]}
    return record


def mmmu_pro_vision(row: dict) -> dict:
    options = listed(row["options"])
    return {"problem": f"<image>\n\n{IN_PICTURE}", "answer": row["answer"].strip(),
            "images": [row["image"]], "verifier": "choice", "options": list(map(str, options))}


def emma(row: dict) -> dict:
    text = "\n\n".join(filter(None, [(row.get("context") or "").strip(), row["question"]]))
    options = row["options"] if row["type"] == "Multiple Choice" else []
    return question(text, options, row["answer"].strip(), numbered(row, "image_{}"))


def mmk12(subject: str):
    """The function for test rows of one subject. The question lists the options."""

    def convert(row: dict) -> dict | str:
        if row["subject"].strip().lower() != subject:
            return "another subject"
        problem = f"{row['question'].strip()}\n\n{ASK_LETTER}"
        images = [row["image"]] if row.get("image") else []
        return {"problem": problem, "answer": row["answer"].strip(), "images": images,
                "verifier": "choice"}  # fmt: skip

    return convert


def mmk12_train(row: dict) -> dict:
    images = [row["image"]] if row.get("image") else []
    return {"problem": row["question"].strip(), "answer": row["answer"], "images": images}


def geometry3k(row: dict) -> dict:
    return {"problem": row["problem"].strip(), "answer": row["answer"], "images": row["images"]}


def srpo_rl(row: dict) -> dict | str:
    """A row of SRPO's or MM-Eureka's RL data: `message` is a JSON string of chat turns."""
    turns = json.loads(row["message"]) if isinstance(row["message"], str) else row["message"]
    parts, images = [], []
    for turn in turns:
        content = turn["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in content if turn["role"] == "user" else ():
            image = part["type"] == "image"
            images += [{"path": part["image"].removeprefix("file://")}] if image else []
            parts.append("<image>" if image else part["text"].replace("<image>", ""))
    return {"problem": "\n".join(parts).strip(), "answer": row["answer"], "images": images}


def srpo_sft(row: dict) -> dict | str:
    """A row of SRPO's cold start: a question and a reply with <think> and an answer."""
    asked, replied = (
        next((turn["content"] for turn in row["messages"] if turn["role"] == role), "")
        for role in ("user", "assistant")
    )
    thought, _, rest = replied.partition("</think>")
    span = re.search(r"<answer>(.*?)</answer>", rest, re.DOTALL)
    answer = last_box(rest) or (span[1].strip() if span else "")
    images = [{"path": path} for path in row.get("images") or ()]
    return {"problem": asked.strip(), "answer": answer, "images": images,
            "solution": thought.removeprefix("<think>").strip()}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Open answers


def open_answer(records: list[dict], answers: list[str]) -> list[bool]:
    """Whether each answer is one of its record's golds, as mathematics or as text.

    The golds are `answer` and those in `golds_too`.
    """
    golds = [[record["answer"], *record.get("golds_too", ())] for record in records]
    pairs = [(gold, answer) for each, answer in zip(golds, answers) for gold in each]
    equal = grade(*map(list, zip(*pairs))) if pairs else []
    same = lambda one, other: tidy(one).lower() == tidy(other).lower()
    verdicts = iter([bool(ok) or same(*pair) for ok, pair in zip(equal, pairs)])
    return [any([next(verdicts) for _ in each]) for each in golds]


# --------------------------------------------------------------------------------------------------
# What data/sources.py makes its entries of. A revision that is not known here is "main".

IMAGES = tuple(f"image_{i}" for i in range(1, 8))
CHOICE = ("question", "options", "answer", *IMAGES)

ENTRIES = {
    "mmmu": dict(
        hub="lmms-lab/MMMU", convert=mmmu, columns=CHOICE, split="validation", benchmark=True
    ),
    "mmmu_pro": dict(
        hub="MMMU/MMMU_Pro", convert=mmmu, columns=CHOICE, config="standard (10 options)",
        split="test", benchmark=True,
    ),
    "mmmu_pro_vision": dict(
        hub="MMMU/MMMU_Pro", convert=mmmu_pro_vision, columns=("image", "options", "answer"),
        config="vision", split="test", benchmark=True,
    ),
    **{
        f"emma_{subject.lower()}": dict(
            hub="luckychao/EMMA", convert=emma, config=subject, split="test", benchmark=True,
            columns=("context", "type", *CHOICE),
        )
        for subject in ("Math", "Physics", "Chemistry", "Coding")
    },
    **{
        f"mmk12_{subject}": dict(
            hub="FanqingM/MMK12", revision="372a609268ea79b5e78d90ab173e02c37b486163",
            convert=mmk12(subject), columns=("question", "answer", "subject", "image"),
            split="test", benchmark=True,
        )
        for subject in ("math", "physics", "chemistry", "biology")
    },
    "mmk12": dict(
        hub="FanqingM/MMK12", revision="372a609268ea79b5e78d90ab173e02c37b486163",
        convert=mmk12_train, columns=("question", "answer", "image"),
    ),
    "geometry3k": dict(
        hub="hiyouga/geometry3k", convert=geometry3k, columns=("problem", "answer", "images")
    ),
    "srpo_rl": dict(
        hub="bruce360568/SRPO_RL_datasets", convert=srpo_rl, columns=("message", "answer")
    ),
    "srpo_sft": dict(
        hub="SRPOMLLMs/srpo-sft-data", convert=srpo_sft, columns=("messages", "images")
    ),
}
