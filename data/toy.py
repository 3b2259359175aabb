"""Linked quantities: the embedded task, its word-level tokenizer and its tiny Qwen2-style model.

A question lists shuffled facts and asks for one quantity. Arithmetic keeps the last digit (mod 10):

    problem   E = A + 2 ; D = B - A ; A = 4 ; F = A + E ; B = 9 ; F ?
    plan      F needs A E ; E needs A ; A needs nothing              target first, no numbers
    CoT       A = 4 ; E = A + 2 = 4 + 2 = 6 ; F = A + E = 4 + 6 = 0  the plan backwards, computed
    answer    0

D and B are distractors. Difficulty is the number of facts. The solutions of training problems are
of two kinds, as human solutions are. A full one derives every needed quantity. A terse one leaves
out derived quantities that its author worked out in the head (`A = 4 ; F = A + E = 4 + 6 = 0`). It
is correct, so checking its answer cannot filter it out, but a small model that imitates it must
guess the 6. Fine-tuning on solutions therefore cannot teach which plans can be carried out, but
reinforcement learning can.

    python -m data.toy --out runs/toy      writes sft, train, validation and test.jsonl, and model/
                                           with random weights
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

from plumbing.folder import refuse_place
from plumbing.ranks import fail, print0, require
from plumbing.signals import guarded

NAMES = "ABCDEF"  # few: a tiny model learns to look one up much sooner than with 16 or 26
DIGITS = "0123456789"
# Per cent of all problems, by hash.
SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}

Facts = dict[str, tuple[str, ...]]  # {"A": ("4",), "F": ("A", "+", "2"), ...}


# --------------------------------------------------------------------------------------------------
# Problems


def make_facts(rng: random.Random, n_facts: int) -> Facts:
    """Facts in an order in which each may use earlier ones."""
    names = list(NAMES)
    rng.shuffle(names)
    facts: Facts = {}
    for name in names[:n_facts]:
        earlier = list(facts)
        if len(earlier) < 2 or rng.random() < 0.25:
            facts[name] = (rng.choice(DIGITS),)
        elif rng.random() < 0.3:
            facts[name] = (rng.choice(earlier), rng.choice("+-"), rng.choice(DIGITS))
        else:
            first, second = rng.sample(earlier, 2)
            facts[name] = (first, rng.choice("+-"), second)
    return facts


def evaluate_facts(facts: Facts) -> dict[str, int]:
    """Value of every quantity. Raises KeyError when a fact uses a quantity that comes after it."""
    values: dict[str, int] = {}
    for name, fact in facts.items():
        terms = [int(t) if t in DIGITS else values[t] for t in fact[::2]]
        if len(fact) == 1:
            value = terms[0]
        else:
            value = terms[0] + terms[1] if fact[1] == "+" else terms[0] - terms[1]
        values[name] = value % 10
    return values


def needed(facts: Facts, target: str) -> list[str]:
    """`target` and the quantities it depends on, depth first: each comes after all that it uses."""
    order: list[str] = []

    def visit(name):
        for term in facts[name]:
            if term in NAMES and term not in order:
                visit(term)
        order.append(name)

    visit(target)
    return order


def write_solution(facts: Facts, names: list[str]) -> str:
    """The CoT that computes `names` in the order given."""
    values, steps = evaluate_facts(facts), []
    for name in names:
        fact = facts[name]
        step = [name, "=", *fact]
        if len(fact) == 3:
            numbers = [str(values[t]) if t in NAMES else t for t in fact]
            step += ["=", *numbers, "=", str(values[name])]
        steps.append(" ".join(step))
    return " ; ".join(steps)


STEP = re.compile(r"([A-Z]) = ([A-Z0-9](?: [+-] [A-Z0-9])?)(?: = [0-9] [+-] [0-9] = [0-9])?")


def plan_of(solution: str) -> str:
    """Cut a CoT down to its plan: each computed quantity and those it uses, target first.

    `A = 4 ; F = A + 2 = 4 + 2 = 6` -> `F needs A ; A needs nothing`. Raises ValueError on any other
    kind of text.
    """
    items = []
    for step in reversed(solution.split(" ; ")):
        match = STEP.fullmatch(step.strip())
        if match is None:
            raise ValueError(f"not a linked-quantities solution: {step[:60]!r}")
        uses = list(dict.fromkeys(re.findall("[A-Z]", match[2])))  # A + A needs A once
        items.append(f"{match[1]} needs {' '.join(uses) or 'nothing'}")
    return " ; ".join(items)


def make_problem(rng: random.Random, n_facts: int, terse: float) -> dict | None:
    """One problem record with its solution, or None when the draw is too easy.

    With probability `terse` the solution leaves out every derived quantity on the way to the
    target.
    """
    facts = make_facts(rng, n_facts)
    # The target is the quantity that needs most. A draw is too easy if that is less than half of
    # the facts, or if it follows from given numbers in one step (of up to three facts, all do).
    target = max(facts, key=lambda name: len(needed(facts, name)))
    steps = needed(facts, target)
    derived = [name for name in steps if len(facts[name]) == 3 and name != target]
    if len(steps) < (n_facts + 1) // 2 or n_facts > 3 and not derived:
        return None
    if rng.random() < terse:
        steps = [name for name in steps if name not in derived]
    shuffled = list(facts)
    rng.shuffle(shuffled)
    listed = [f"{name} = {' '.join(facts[name])}" for name in shuffled]
    return {
        "problem": " ; ".join([*listed, f"{target} ?"]),
        "answer": str(evaluate_facts(facts)[target]),
        "solution": write_solution(facts, steps),
    }


def split_of(problem: str) -> str:
    """train, validation or test. Facts and target decide: a reshuffled copy stays in its split."""
    key = " ; ".join(sorted(problem.split(" ; ")))
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def make_problems(
    split: str, count: int, facts: tuple[int, int] = (5, 6), seed: int = 0, terse: float = 0.0
) -> list[dict]:
    """`count` different problem records of `split`.

    The number of facts is uniform in `facts`, both ends included. The same arguments give the same
    bytes on every machine. Splits share no problem, whatever the seed. Raises ValueError for what
    the task cannot give.
    """
    if split not in SPLITS:
        raise ValueError(f"the toy task has the splits {', '.join(SPLITS)}, not {split!r}")
    low, high = facts
    if not 1 <= low <= high <= len(NAMES):
        raise ValueError(f"a problem has 1 to {len(NAMES)} facts, not {low} to {high}")
    rng, seen, records, misses = random.Random(f"{split} {seed}"), set(), [], 0
    while len(records) < count:
        record = make_problem(rng, rng.randint(low, high), terse)
        if record is None or split_of(record["problem"]) != split or record["problem"] in seen:
            misses += 1
            if misses > 10_000:
                raise ValueError(
                    f"found {len(records)} different problems of {low} to {high} facts, not "
                    f"{count}: ask for fewer, or for more facts"
                )
            continue
        misses = 0
        seen.add(record["problem"])
        records.append({"id": f"toy-{split}-{seed}-{len(records)}", **record})
    return records


# --------------------------------------------------------------------------------------------------
# Tokenizer and model

# It leaves the system turn out (the template instruction, in English), because none of its words is
# in the vocabulary.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>"]
TAGS = ["<plan>", "</plan>", "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}"]
WORDS = [*TAGS, "nothing", "=", "+", "-", ";", "?", *DIGITS, *NAMES]
# "A =" and "A needs" are one word each: what follows is then a look-up of the word itself, and
# texts are shorter.
WORDS += [f"{name} {word}" for word in ("=", "needs") for name in NAMES]


def make_tokenizer(words: list[str] = WORDS):
    """A word-level `PreTrainedTokenizerFast`. It decodes to words and signs with spaces between."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(SPECIAL + words)}
    word_level = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    # Words are what this matches, from the left. White space between them is dropped.
    pattern = Regex(r"</?[a-z]+>|\\boxed\{|[A-Z] (?:=|needs)|[^\s{}<>]+|\S")
    word_level.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    # For a Qwen2 model AutoTokenizer distrusts the class that tokenizer_config.json names. It
    # builds Qwen2's byte-level one instead, unless the file claims code of its own. Without
    # trust_remote_code that claim is then ignored.
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": [None, None]}
    return tokenizer


def make_model(tokenizer, seed: int = 0, width: int = 128, layers: int = 3, heads: int = 8):
    """A Qwen2 model with random weights (0.5 M). Its ids and limits match `tokenizer`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # A base of 100, not 10,000: sequences are short, and look-ups need positions that differ.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        # The loss falls faster than with the usual 0.02, which is for widths of thousands.
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


# --------------------------------------------------------------------------------------------------
# Main


def parse_arguments(doc: str = __doc__) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=layout)
    add, ends = parser.add_argument, ("LOW", "HIGH")
    add("--out", required=True, help="folder for the JSONL files and model/")
    add("--sft", type=int, default=6000, help="problems with solutions, to distil and fine-tune on")
    add("--train", type=int, default=6000, help="problems for reinforcement learning")
    add("--test", type=int, default=400, help="problems for each of validation and test")
    if doc is __doc__:
        add("--facts", type=int, nargs=2, default=(5, 6), metavar=ends, help="facts per problem")
        add("--terse", type=float, default=0.5, help="share of the solutions that leave steps out")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="replace what --out already holds")
    parser.error = fail
    args = parser.parse_args()
    refuse_occupied(args.out, args.overwrite)
    return args


def refuse_occupied(out, overwrite: bool):
    """Refuse a folder for a data set that has another purpose, or holds such files already."""
    names = "sft.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl", "model"
    held = [name for name in names if (refuse_place(str(out)) / name).exists()]
    require(
        overwrite or not held,
        f"{out} already holds {', '.join(held)}: choose another --out or pass --overwrite",
    )


def write_task(args: argparse.Namespace, files: dict[str, list[dict]], tokenizer):
    """Write the files of a task, and model/ with random weights, to --out."""
    out = Path(args.out)
    model = make_model(tokenizer, args.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, records in files.items():
            if name != "sft":  # reinforcement learning and evaluation see answers only
                records = [{k: v for k, v in r.items() if k != "solution"} for r in records]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (out / f"{name}.jsonl").write_text(lines)
        tokenizer.save_pretrained(out / "model")
        model.save_pretrained(out / "model")
    except OSError as error:
        fail(f"{out} cannot be written ({error.strerror}): make room, or choose another --out")
    counts = ", ".join(f"{len(records)} {name}" for name, records in files.items())
    size = f"{model.num_parameters():,}"
    print0(f"{out}: {counts}; a model of {size} parameters with random weights")


def main():
    args = parse_arguments()
    facts, seed = tuple(args.facts), args.seed
    try:
        problems = make_problems("train", args.sft + args.train, facts, seed, args.terse)
        files = {"sft": problems[:args.sft], "train": problems[args.sft:]}
        for split in ("validation", "test"):
            files[split] = make_problems(split, args.test, facts, seed)
    except ValueError as error:
        fail(str(error))
    write_task(args, files, make_tokenizer())


if __name__ == "__main__":
    guarded(main)
