"""Stage 1a: distil chains of thought (CoTs) into compact plans (arXiv 2510.01833, 3.1).

A teacher reads a problem with its CoT and summarises the CoT into the plan that its author
followed. It only summarises, so it need not be strong. There are three kinds of --teacher:

    rule                     embedded tasks and data/gym.py: cuts a CoT down to its plan, no model
    a folder or hub id       a local model, through grpo.py's sampling loop; the policy itself
                             gives the paper's "self-plan" (its Table 7)
    http(s)://host:port/v1   an OpenAI-compatible server; --teacher_model names the model there,
                             the environment variable DISTILL_API_KEY holds the key

A plan is kept if it is not empty, not too long, free of template tags, and does not give the answer
away. Records are written as they finish. With --resume, a stopped run asks for the others only.

Under torchrun every rank holds a local teacher and answers its share of each batch. Rank 0 writes.

    python distill.py --teacher rule --data runs/demo/data/sft.jsonl --out runs/demo/plans.jsonl
    torchrun --nproc_per_node=8 distill.py --teacher Qwen/Qwen2.5-7B-Instruct
"""

import plumbing.threads  # noqa: F401 -- before torch, which reads what it sets

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data import code, doors, gym, moves, toy
from data.pictures import relative
from data.sources import load_records
from data.verifiers import plan_leaks, verifier_of
from grpo import sample
from model_utils import completion_texts, find_stop_ids, load_model, load_tokenizer
from plumbing.flags import parse_config
from plumbing.folder import refuse_unusable
from plumbing.ranks import (
    fail,
    gather0,
    init_distributed,
    print0,
    progress,
    rank,
    require,
    world_size,
)
from plumbing.records import Records
from plumbing.signals import guarded
from plumbing.teacher import UNANSWERED, Server, as_finished
from plumbing.weights import load_config
from rewards import TAG


@dataclass
class Config:
    data: str = "open-thoughts/OpenThoughts-114k"  # a name of data/README.md, toy, JSONL with CoTs
    teacher: str = "Qwen/Qwen3-235B-A22B"  # rule, a model folder or hub id, or a server's base URL
    teacher_model: str = ""  # with a URL: the model's name on that server
    out: str = "runs/plans.jsonl"  # plans; dropped ones and their reasons go to *.dropped.jsonl
    limit: int = 10000  # use a random subset of this size; 0: all
    max_plan_words: int = 300  # longer plans are dropped (>= 1)
    max_new_tokens: int = 2048  # the teacher's limit, its own thinking included (>= 1)
    temperature: float = 0.6  # of the teacher
    concurrency: int = 32  # requests in flight, or rows per batch and rank of a local one (>= 1)
    retries: int = 6  # of a request that met 429, 5xx or a time-out, with growing pauses
    timeout: float = 300.0  # seconds per request, from its first byte to its answer's last (> 0)
    seed: int = 0  # choice of the subset, sampling (< 4e9)
    overwrite: bool = False  # replace the records in --out
    resume: bool = False  # go on after the records in --out


REQUEST = """Below are a problem and a worked solution. Write down the plan behind the solution: \
what somebody who has not started yet would decide on first.

Rules: name only the major phases, their order, the strategic choices, and where one would branch. \
No calculations, no intermediate results, and never the final answer. At most 150 words. Reply \
with the plan alone, without any tags.

Problem:
{problem}

Solution:
{solution}"""


# --------------------------------------------------------------------------------------------------
# Teachers: each yields (record, its text, the reason why there is none) as records finish

Answers = Iterator[tuple[dict, str | None, str | None]]


def plan_of(record: dict) -> str:
    """The plan behind the solution of an embedded task or of data/gym.py. ValueError for others."""
    if "quantities" in record or "animals" in record:
        return gym.plan_of(record)
    if "route" in record:  # data/walk.py
        return doors.plan_of(record["problem"], record["route"])
    if record.get("verifier") == "doors":
        return doors.plan_of(record["problem"], record["solution"])
    if record.get("verifier") == "moves":
        return moves.plan_of(record["solution"])
    return toy.plan_of(record["solution"])


def ask_rule(records: list[dict], config: Config) -> Answers:
    for record in records:
        try:
            plan = plan_of(record)
        except ValueError as error:
            fail(f"record {record['id']}: {error}; --teacher rule reads the embedded tasks only")
        yield record, plan, None


def ask_local(records: list[dict], config: Config) -> Answers:
    """Batches through grpo.py's sampling loop. Each rank answers its share; rank 0 yields all."""
    tokenizer, device = load_tokenizer(config.teacher), init_distributed()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(config.teacher, device, dtype)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30)
    stop_ids, size = find_stop_ids(model, tokenizer), config.concurrency
    template = dict(add_generation_prompt=True, return_dict=False)
    for start in range(0, len(records), size * world_size()):
        first = start + rank() * size
        answers, asked = [], []
        for record in records[first:first + size]:
            turn = [{"role": "user", "content": REQUEST.format(**record)}]
            prompt = list(tokenizer.apply_chat_template(turn, **template))
            if len(prompt) + config.max_new_tokens > context:
                answers.append((record, None, "too long for the teacher's context"))
            else:
                asked.append((record, prompt))
        if asked:
            prompts, seed = [prompt for _, prompt in asked], config.seed + start + rank()
            options = dict(temperature=config.temperature, stop_ids=stop_ids, seed=seed)
            ids, _ = sample(model, prompts, max_new_tokens=config.max_new_tokens, **options)
            texts = completion_texts(tokenizer, ids, stop_ids)
            answers += [(record, text, None) for (record, _), text in zip(asked, texts)]
        yield from gather0(answers)


def ask_server(records: list[dict], config: Config) -> Answers:
    """Up to --concurrency requests at a time. Raises SystemExit where no request can succeed.

    So it does where none of the first ones is answered: there may be no server.
    """
    server, asked, answered = Server(config), 0, 0
    ask = lambda record: server.ask(REQUEST.format(**record))
    for record, (text, reason) in as_finished(ask, records, config.concurrency):
        yield record, text, reason
        asked, answered = asked + 1, answered + (not (reason or "").startswith(UNANSWERED))
        require(
            answered or asked < max(8, config.concurrency),
            f"{config.teacher} has answered none of the first {asked} requests, the last one is "
            f"{reason}: check the base URL and the server, then go on with --resume",
        )


def choose_teacher(config: Config) -> Callable[[list[dict], Config], Answers]:
    """The function that asks --teacher. Raises SystemExit if it cannot work here."""
    server = config.teacher.startswith(("http://", "https://"))
    ask = ask_server if server else ask_rule if config.teacher == "rule" else ask_local
    if ask is ask_local:
        require(
            config.teacher != Config.teacher,
            "the default teacher has 235 B parameters, too many for one GPU: pass a server's URL "
            "or a smaller model as --teacher (`make demo` uses --teacher rule)",
        )
        load_config(config.teacher)
    require(
        world_size() == 1 or ask is ask_local,
        "this --teacher needs one process only: start distill.py without torchrun (--concurrency "
        "sets how many requests a server gets at a time)",
    )
    return ask


# --------------------------------------------------------------------------------------------------
# Rejection

# No tokenizer takes lone surrogates, and nobody means the control characters.
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
LONGEST_DROPPED = 10_000  # characters that are kept of a plan that is not


def rejection(plan: str, record: dict, max_words: int) -> str | None:
    """Why the plan of a problem record is not kept, or None."""
    if not plan:
        return "empty"
    if len(plan.split()) > max_words or len(plan) > 20 * max_words:  # a flood without blanks
        return f"longer than {max_words} words"
    if UNREADABLE.search(plan):
        return "control characters in the plan"
    if TAG.search(plan):
        return "template tags in the plan"
    return "gives the answer away" if plan_leaks(record, plan) else None


def all_answers(ask: Callable, records: list[dict], config: Config) -> Answers:
    """The teacher's answers. A CoT that SFT could not use is dropped unasked.

    A record of `code` gets the program of its CoT as its answer.
    """
    coded = [record for record in records if verifier_of(record) == "code"]
    for record, parts in zip(coded, code.solved(coded)):
        record["_think"], record["answer"] = parts or ("", "")
    fine = []
    for record in records:
        if TAG.search(record["solution"]):
            yield record, None, "template tags in the CoT"
        elif not record["answer"]:
            yield record, None, "no program in the CoT that passes the tests"
        else:
            fine.append(record)
    yield from ask(fine, config)


# --------------------------------------------------------------------------------------------------
# Main

def report(out: Path, counts: Counter, asked: int, before: int) -> int:
    """Print what became of the `asked` records. Returns how many of them are unfinished.

    `counts`: records by the reason why there is no plan; None for a plan that was kept.
    """
    unanswered = sum(n for reason, n in counts.items() if (reason or "").startswith(UNANSWERED))
    dropped = counts.total() - counts[None] - unanswered
    left = asked - counts[None] - dropped
    line = f"{out}: {counts[None]} plans kept, {dropped} dropped"
    line += f", {left} left to ask (--resume goes on with them)" * (left > 0)
    print0(line + f", {before} finished before" * (before > 0))
    for reason, n in counts.most_common(11):
        if reason:
            again = ": run again with --resume" * reason.startswith(UNANSWERED)
            print0(f"  {n} {reason}{again}")
    return left


def main():
    config = parse_config(Config)
    ask, out = choose_teacher(config), Path(config.out)
    refuse_unusable(out)
    same = Path(config.data).resolve() == out.resolve()
    require(not same, f"--out is the --data file {out}; choose another --out")
    kept = Records(out, config)
    dropped = Records(out.with_suffix(".dropped.jsonl"), config, lock=kept.lock)
    fields = ("problem", "answer", "solution")
    records = load_records(config.data, fields, config.limit, config.seed)
    if world_size() > 1:
        init_distributed()
    plans_before = kept.begin()
    done = plans_before | dropped.begin()
    todo = [record for record in records if (record["id"],) not in done]
    before, counts = len(records) - len(todo), Counter()
    try:
        with progress(len(records), before, "distill", "plan") as bar:
            for record, text, reason in all_answers(ask, todo, config):
                # A reasoning teacher thinks aloud first. The plan is what follows.
                plan = (text or "").rpartition("</think>")[2].strip()
                reason = reason or rejection(plan, record, config.max_plan_words)
                counts[reason] += 1
                if (reason or "").startswith(UNANSWERED):
                    continue  # --resume asks again
                if reason is None:
                    names = ("id", "problem", "answer", "verifier", "world")
                    named = {name: record[name] for name in names if name in record}
                    if "images" in record:
                        named["images"] = relative(record["images"], out)
                    think = record.get("_think", record["solution"])
                    kept.append({**named, "plan": plan, "think": think})
                else:
                    shown = plan[:LONGEST_DROPPED]
                    dropped.append({"id": record["id"], "reason": reason, "plan": shown})
                bar.update()
    finally:  # also after Ctrl-C, and when the server refuses everything
        left = report(out, counts, len(todo), before)
    if rank() == 0:
        require(not left, f"{left} records are unanswered: run again with --resume")
        require(plans_before or counts[None],
                f"no plan was kept: {dropped.path} holds what the teacher wrote; choose another "
                "--teacher or raise the limits, and pass --overwrite")


if __name__ == "__main__":
    guarded(main)
