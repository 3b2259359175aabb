"""Stage 1a: distil chains of thought into compact plans (section 3.1 of arXiv 2510.01833).

A teacher reads problem and CoT and summarises the CoT into the plan that its author followed. It only summarises, so
it need not be strong. Three kinds of --teacher:

    rule                        the toy task only: strips a linked-quantities CoT to its plan, without a model
    a folder or hub id          a local model, through this project's own sampling loop; the policy itself gives the
                                paper's "self-plan" (its Table 7)
    http(s)://host:port/v1      any OpenAI-compatible server; --teacher_model names the model, the environment
                                variable DISTILL_API_KEY holds the key

A plan is kept if it is not empty, not too long, free of template tags and does not give the answer away. Finished
records are written at once; with --resume a stopped run goes on where it was and asks for none twice.

Under torchrun every rank holds a local teacher of its own and takes every W-th record; what the ranks past the first
write stands in *.rank1.jsonl and so on until the end, or the next --resume (at any number of ranks), joins it to --out.

    python distill.py --teacher rule --data runs/demo/data/sft.jsonl --out runs/demo/plans.jsonl
    torchrun --nproc_per_node=8 distill.py --teacher Qwen/Qwen2.5-7B-Instruct
"""
import asyncio
import json
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import STOPPED, guarded
from data.sources import load_jsonl, load_records
from data.toy import plan_of
from grpo import completion_texts, sample
from model_utils import (barrier, everyone, fail, find_stop_ids, init_distributed, load_config, load_model,
                         load_tokenizer, parse_config, print0, rank, world_size)
from rewards import TAG, plan_leaks
from run_folder import hold, make_folder


@dataclass
class Config:
    data: str = "open-thoughts/OpenThoughts-114k"  # problems with solutions: JSONL path, toy[:split], or a name of data/README.md
    teacher: str = "Qwen/Qwen3-235B-A22B"  # rule (toy task only), a model folder or hub id, or a server's base URL
    teacher_model: str = ""  # with a URL: the model's name on that server
    out: str = "runs/plans.jsonl"  # plan records; dropped ones, with their reasons, go to *.dropped.jsonl
    limit: int = 10000  # use a random subset of this size; 0: all
    max_plan_words: int = 300  # longer plans are dropped (>= 1)
    max_new_tokens: int = 2048  # the teacher's limit, its own thinking included (>= 1)
    temperature: float = 0.6  # of the teacher
    concurrency: int = 32  # requests in flight, or rows of a local teacher's batch (>= 1)
    retries: int = 6  # of a request that met 429, 5xx or a time-out, with growing pauses
    timeout: float = 300.0  # seconds a request (> 0)
    seed: int = 0  # choice of the subset, sampling (< 4e9)
    overwrite: bool = False  # replace the records in --out
    resume: bool = False  # go on after the records in --out


REQUEST = """Below are a problem and a worked solution. Write down the plan behind the solution: what somebody who \
has not started yet would decide on first.

Rules: name only the major phases, their order, the strategic choices, and where one would branch. No calculations, \
no intermediate results, and never the final answer. At most 150 words. Reply with the plan alone, without any tags.

Problem:
{problem}

Solution:
{solution}"""


class Unavailable(Exception):
    """The teacher did not answer for now; the record stays unfinished and a later --resume asks again."""


class Refused(Exception):
    """The server takes no request at all. Not SystemExit, which would tear through the event loop and its other tasks."""


def rejection(plan: str, answer: str, max_words: int) -> str | None:
    """Why a plan is not kept, or None."""
    if not plan:
        return "empty"
    if len(plan.split()) > max_words:
        return f"longer than {max_words} words"
    if TAG.search(plan):
        return "template tags in the plan"
    if plan_leaks(plan, answer):
        return "gives the answer away"
    return None


async def ask_rule(records: list[dict], config: Config, report):
    for record in records:
        try:
            report(record, plan_of(record["solution"]))
        except ValueError as error:
            fail(f"record {record['id']}: {error}; --teacher rule reads the toy task only")
        await asyncio.sleep(0)  # where Ctrl-C is heard


async def ask_local(records: list[dict], config: Config, report):
    """Batches through grpo.py's sampling loop."""
    tokenizer = load_tokenizer(config.teacher)
    device = init_distributed()
    model = load_model(config.teacher, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    context = getattr(model.config, "max_position_embeddings", 1 << 30)
    stop_ids = find_stop_ids(model, tokenizer)
    for start in range(0, len(records), config.concurrency):
        batch, prompts = [], []
        for record in records[start:start + config.concurrency]:
            message = [{"role": "user", "content": REQUEST.format(**record)}]
            prompt = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
            if len(prompt) + config.max_new_tokens > context:
                report(record, None, "too long for the teacher's context")
            else:
                batch.append(record)
                prompts.append(prompt)
        if prompts:
            ids, _ = sample(model, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                            stop_ids=stop_ids, seed=config.seed + start * world_size() + rank())
            for record, text in zip(batch, completion_texts(tokenizer, ids, stop_ids)):
                report(record, text)
        await asyncio.sleep(0)  # where Ctrl-C is heard


async def ask_server(records: list[dict], config: Config, report):
    """Up to --concurrency requests at a time."""
    from huggingface_hub import AsyncInferenceClient
    # Without a key of our own the client would send the user's hub token to that server.
    key = os.environ.get("DISTILL_API_KEY") or "none"
    gate, bar_lock = asyncio.Semaphore(config.concurrency), asyncio.Lock()

    async def one(client, record):
        async with gate:
            try:
                text = await ask_with_retries(client, record, config)
            except Unavailable as error:
                report(record, None, error)
                return
        async with bar_lock:
            report(record, text, None if text is not None else "refused by the server")

    async with AsyncInferenceClient(base_url=config.teacher, api_key=key, timeout=config.timeout) as client:
        tasks = [asyncio.create_task(one(client, record)) for record in records]
        try:
            await asyncio.gather(*tasks)
        except Refused as error:
            fail(str(error))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # until each has ended


async def ask_with_retries(client, record: dict, config: Config) -> str | None:
    """The teacher's text, or None for a request that the server will never take (400, 413, 422).

    Raises Unavailable after the last retry, Refused where no request can succeed (401, 403, 404).
    """
    try:
        import httpx2 as httpx  # huggingface_hub's transport since its 2.0
    except ImportError:
        import httpx
    from huggingface_hub.errors import HfHubHTTPError
    pause, why = 1.0, ""
    for attempt in range(config.retries + 1):
        if attempt:
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 60.0)
        try:
            reply = await client.chat_completion(
                model=config.teacher_model or None, max_tokens=config.max_new_tokens, temperature=config.temperature,
                messages=[{"role": "user", "content": REQUEST.format(**record)}])
            return reply.choices[0].message.content or ""
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise Refused(f"{config.teacher} answers {status}: check the base URL, --teacher_model and DISTILL_API_KEY")
            if status not in (408, 429) and status < 500:
                return None
            why = f"HTTP {status}"
        except (httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError) as error:
            # no connection, time-out, a reply cut off in the middle or without choices
            why = type(error).__name__
    raise Unavailable(why)


def parts_of(path: Path) -> list[Path]:
    """What ranks 1, 2, ... of a run wrote for `path`."""
    return sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))


def drop_cut_line(path: Path):
    """Remove a last line that was cut off in mid-write."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        path.write_bytes(data[:data.rfind(b"\n") + 1])


def join_parts(path: Path, order: dict[str, int]):
    """Put the ranks' parts and `path` together in the data's order; killed anywhere in between, nothing is lost or doubled."""
    if parts := parts_of(path):
        files = [file for file in (path, *parts) if file.exists()]
        for file in files:
            drop_cut_line(file)
        records = {str(record["id"]): record for file in files for record in load_jsonl(file)}
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(records[i]) + "\n" for i in sorted(records, key=lambda i: order.get(i, -1))))
        temporary.replace(path)
        for part in parts:
            part.unlink()


def finished_ids(out: Path, dropped: Path) -> set[str]:
    """Ids of records that an earlier run finished. A last line that was cut off in mid-write is removed."""
    paths = [path for path in (out, dropped) if path.exists()]
    for path in paths:
        drop_cut_line(path)
    return {str(record["id"]) for path in paths for record in load_jsonl(path)}


def refuse_records(config: Config):
    """Refuse an --out with records, unless a flag says what is to become of them (SystemExit)."""
    out = Path(config.out)
    paths = out, out.with_suffix(".dropped.jsonl"), *parts_of(out)
    holds_records = any(path.stat().st_size for path in paths if path.exists())
    if holds_records and not (config.resume or config.overwrite):
        fail(f"{out} already holds records: choose another --out, pass --resume to go on, or "
             "--overwrite to replace it")


def main():
    config = parse_config(Config)
    out = Path(config.out)
    dropped = out.with_suffix(".dropped.jsonl")
    if config.teacher.startswith(("http://", "https://")):
        ask = ask_server
    elif config.teacher == "rule":
        ask = ask_rule
    else:
        ask = ask_local
        if config.teacher == Config.teacher and not torch.cuda.is_available():
            fail("no GPU here, and the default teacher has 235 B parameters: pass a server's URL or a smaller model "
                 "as --teacher (`make demo` uses --teacher rule)")
        load_config(config.teacher)
    if world_size() > 1 and ask is not ask_local:
        fail("this --teacher is one process's work: start distill.py without torchrun (--concurrency sets how many "
             "requests a server gets at a time)")
    if Path(config.data).resolve() == out.resolve():
        fail(f"--out is the --data file {out}; choose another --out")
    if out.is_dir():
        fail(f"--out {out} is a folder; give a file such as {out / 'plans.jsonl'}")
    refuse_records(config)
    records = load_records(config.data, ("problem", "answer", "solution"), limit=config.limit, seed=config.seed)
    make_folder(out.parent)
    if world_size() > 1:
        init_distributed()
    hold(out.with_name(f".{out.name}.lock"))
    refuse_records(config)  # again: another run may have ended before this one had the lock
    order = {record["id"]: position for position, record in enumerate(records)}
    if rank() == 0:
        for path in (out, dropped):
            if config.overwrite and not config.resume:
                for old in (path, *parts_of(path)):
                    old.unlink(missing_ok=True)
            join_parts(path, order)
        finished_ids(out, dropped)  # for its removal of a cut line, which must come before anybody reads
    barrier()
    done = finished_ids(out, dropped)
    barrier()  # from here on rank 0 appends
    # A rank's share is of all records, not of those left: it does not depend on who has read what when.
    records = records[rank()::world_size()]
    todo = [record for record in records if record["id"] not in done]
    out_part, dropped_part = (path.with_name(f"{path.stem}.rank{rank()}{path.suffix}") if rank() else path
                              for path in (out, dropped))
    kept, reasons, unavailable, stopped = 0, Counter(), Counter(), False

    with open(out_part, "a") as kept_file, open(dropped_part, "a") as dropped_file, \
            tqdm(total=len(records), initial=len(records) - len(todo), desc="distill", unit="plan",
                 disable=None if rank() == 0 else True) as bar:

        def report(record: dict, text: str | None, reason=None):
            """One record is finished: keep its plan or note why not. An Unavailable one stays unfinished."""
            nonlocal kept
            if isinstance(reason, Unavailable):
                unavailable[str(reason)] += 1
                return
            # A reasoning teacher thinks aloud first; the plan is what follows.
            plan = (text or "").rpartition("</think>")[2].strip()
            reason = reason or rejection(plan, record["answer"], config.max_plan_words)
            if reason is None:
                kept += 1
                fields = {name: record[name] for name in ("id", "problem", "answer")}
                kept_file.write(json.dumps({**fields, "plan": plan, "think": record["solution"]}) + "\n")
                kept_file.flush()
            else:
                reasons[reason] += 1
                dropped_file.write(json.dumps({"id": record["id"], "reason": reason, "plan": plan}) + "\n")
                dropped_file.flush()
            bar.update()

        usable = []
        for record in todo:
            if TAG.search(record["solution"]):
                report(record, None, "template tags in the CoT")  # the target could not be parsed again
            else:
                usable.append(record)
        try:
            asyncio.run(ask(usable, config, report))
        except KeyboardInterrupt:
            stopped = True

    barrier()
    if rank() == 0:
        join_parts(out, order)
        join_parts(dropped, order)
    kept, left, before, reasons, stopped = (sum(parts[1:], parts[0]) for parts in zip(*everyone(
        (kept, len(todo) - kept - sum(reasons.values()), len(records) - len(todo), reasons, int(stopped)))))
    print0(f"{out}: {kept} plans kept, {sum(reasons.values())} dropped" + f", {left} left to ask" * (left > 0)
           + f", {before} finished before" * (before > 0))
    for reason, count in reasons.most_common():
        print0(f"  {count} {reason}")
    if stopped and left:
        print0("stopped; --resume goes on from here")
        raise SystemExit(STOPPED)
    if unavailable:
        print("  " + ", ".join(f"{count} unanswered ({why})" for why, count in unavailable.items()) + ": run again with --resume")
        raise SystemExit(1)
    if rank() == 0 and not out.stat().st_size:
        fail(f"no plan was kept: {dropped} holds what the teacher wrote; choose another --teacher or raise the limits")


if __name__ == "__main__":
    guarded(main)
