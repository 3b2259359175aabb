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

Under torchrun every rank holds a local teacher of its own and takes its share of each batch;
rank 0 writes them all.

    python distill.py --teacher rule --data runs/demo/data/sft.jsonl --out runs/demo/plans.jsonl
    torchrun --nproc_per_node=8 distill.py --teacher Qwen/Qwen2.5-7B-Instruct
"""
import asyncio
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import torch
from tqdm import tqdm

try:
    import httpx2 as httpx  # huggingface_hub's transport since its 2.0
except ImportError:
    import httpx

from checkpoint import guarded
from data.sources import load_jsonl, load_records
from data.toy import plan_of
from grpo import completion_texts, sample
from model_utils import (everyone, fail, find_stop_ids, gather0, init_distributed, load_config,
                         load_model, load_tokenizer, parse_config, print0, rank, world_size)
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
    concurrency: int = 32  # requests in flight, or rows of a local teacher's batch, per rank (>= 1)
    retries: int = 6  # of a request that met 429, 5xx or a time-out, with growing pauses
    timeout: float = 300.0  # seconds per request, its whole answer included (> 0)
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


# --------------------------------------------------------------------------------------------------
# Teachers: each yields (record, its text, the reason why there is none) as records finish

UNANSWERED = "unanswered"  # how the reason of a record begins that is left for --resume
MAX_REPLY = 10_000_000  # bytes
Answers = Iterator[tuple[dict, str | None, str | None]]


def ask_rule(records: list[dict], config: Config) -> Answers:
    for record in records:
        try:
            yield record, plan_of(record["solution"]), None
        except ValueError as error:
            fail(f"record {record['id']}: {error}; --teacher rule reads the toy task only")


def ask_local(records: list[dict], config: Config) -> Answers:
    """Batches through grpo.py's sampling loop; ranks answer a share each, rank 0 yields all."""
    tokenizer = load_tokenizer(config.teacher)
    device = init_distributed()
    model = load_model(config.teacher, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    context = getattr(model.config, "max_position_embeddings", 1 << 30)
    stop_ids = find_stop_ids(model, tokenizer)
    for start in range(0, len(records), config.concurrency * world_size()):
        answers, asked, prompts = [], [], []
        for record in records[start + rank() * config.concurrency:][:config.concurrency]:
            message = [{"role": "user", "content": REQUEST.format(**record)}]
            prompt = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
            if len(prompt) + config.max_new_tokens > context:
                answers.append((record, None, "too long for the teacher's context"))
            else:
                asked.append(record)
                prompts.append(prompt)
        if prompts:
            ids, _ = sample(model, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                            stop_ids=stop_ids, seed=config.seed + start + rank())
            texts = completion_texts(tokenizer, ids, stop_ids)
            answers += [(record, text, None) for record, text in zip(asked, texts)]
        yield from gather0(answers)


def ask_server(records: list[dict], config: Config) -> Answers:
    """Up to --concurrency requests at a time. Raises SystemExit where no request can succeed."""
    post = make_post(config)
    pool = ThreadPoolExecutor(config.concurrency)
    try:
        asked = {pool.submit(ask_with_retries, post, record, config): record for record in records}
        for future in as_completed(asked):
            if error := future.exception():
                for other in [other for other in asked if other.done() and not other.exception()]:
                    yield asked[other], *other.result()
                raise error
            yield asked.pop(future), *future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ask_with_retries(post, record: dict, config: Config) -> tuple[str | None, str | None]:
    """(text, None), or (None, reason)."""
    pause = 1.0
    for attempt in range(config.retries + 1):
        text, reason, wait = ask_once(post, record, config)
        if reason is None or not reason.startswith(UNANSWERED):
            break
        if attempt < config.retries:
            sleep(max(wait, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, 60.0)
    return text, reason


def ask_once(post, record: dict, config: Config) -> tuple[str | None, str | None, float]:
    """(text, None, 0), or (None, reason, seconds to wait).

    Raises SystemExit where no request can succeed.
    """
    try:
        # A time limit of httpx's own is per read: a server that drips would never meet it.
        status, headers, body = asyncio.run(asyncio.wait_for(post(record), config.timeout))
    except TimeoutError:
        return None, f"{UNANSWERED} (no answer within {config.timeout:g} s)", 0
    except (httpx.HTTPError, OSError) as error:
        return None, f"{UNANSWERED} ({type(error).__name__})", 0
    if len(body) > MAX_REPLY:
        return None, f"{UNANSWERED} (a reply of more than {MAX_REPLY} bytes)", 0
    if status == 200:
        try:
            content = json.loads(body)["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None, f"{UNANSWERED} (a reply without choices)", 0
        if isinstance(content, list):
            texts = [part.get("text") for part in content
                     if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(text for text in texts if isinstance(text, str))
        if isinstance(content, str | None):  # None: its thinking met --max_new_tokens
            return content or "", None, 0
        return None, f"content of type {type(content).__name__}, not text", 0
    words = servers_words(body)
    if status in (400, 413, 422):
        return None, f"refused by the server (HTTP {status}): {words}", 0
    if status in (408, 429) or status >= 500:
        after = headers.get("Retry-After", "")
        wait = min(float(after), 60.0) if re.fullmatch(r"\d{1,9}(\.\d+)?", after, re.ASCII) else 0
        return None, f"{UNANSWERED} (HTTP {status}: {words})", wait
    fail(f"{config.teacher} answers {status}: check the base URL, --teacher_model and "
         f"DISTILL_API_KEY (its credit too), then go on with --resume; the server says: {words}")


def make_post(config: Config):
    """An async function: record -> (status, headers, body) of the server's answer.

    Redirects are not followed: the key must not go elsewhere.
    """
    try:
        url = httpx.URL(config.teacher)
        url = url.copy_with(path=url.path.rstrip("/") + "/chat/completions")
    except httpx.InvalidURL:
        url = httpx.URL("")
    if not url.host:
        fail(f"--teacher {config.teacher} is no address; give one such as http://localhost:8000/v1")
    key = os.environ.get("DISTILL_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        fail("DISTILL_API_KEY holds characters that a key cannot have; set it again")
    head = {"Authorization": f"Bearer {key}"} if key else {}
    tls = httpx.create_ssl_context()  # once: it reads all certificates

    async def post(record: dict):
        request = {"messages": [{"role": "user", "content": REQUEST.format(**record)}],
                   "max_tokens": config.max_new_tokens, "temperature": config.temperature}
        if config.teacher_model:
            request["model"] = config.teacher_model
        async with (httpx.AsyncClient(verify=tls, timeout=None, follow_redirects=False) as client,
                    client.stream("POST", url, json=request, headers=head) as response):
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_REPLY:
                    break
            return response.status_code, response.headers, body
    return post


def servers_words(body: bytes) -> str:
    """What a server says of a failure, its message or all of its answer, as one short line."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else text
    except (ValueError, RecursionError):
        pass
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 300 else text[:300] + " …"


# --------------------------------------------------------------------------------------------------
# Records

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


def drop_cut_line(path: Path):
    """Remove a last line that was cut off in mid-write."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        path.write_bytes(data[:data.rfind(b"\n") + 1])


def finished_ids(out: Path, dropped: Path) -> set[str]:
    """Ids of records that an earlier run finished. A last line that was cut off in mid-write is removed."""
    paths = [path for path in (out, dropped) if path.exists()]
    for path in paths:
        drop_cut_line(path)
    return {str(record["id"]) for path in paths for record in load_jsonl(path)}


def refuse_records(config: Config):
    """Refuse an --out with records, unless a flag says what is to become of them (SystemExit)."""
    out = Path(config.out)
    paths = out, out.with_suffix(".dropped.jsonl")
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
    if rank() == 0 and config.overwrite and not config.resume:
        out.unlink(missing_ok=True)
        dropped.unlink(missing_ok=True)
    done = everyone(finished_ids(out, dropped) if rank() == 0 else None)[0]
    todo = [record for record in records if record["id"] not in done]
    before, kept, reasons, unanswered = len(records) - len(todo), 0, Counter(), Counter()

    def answers():
        usable = []
        for record in todo:
            if TAG.search(record["solution"]):
                # Its target could not be parsed again.
                yield record, None, "template tags in the CoT"
            else:
                usable.append(record)
        yield from ask(usable, config)

    # Ranks past the first have nothing to write: rank 0 gathers what they answer.
    with open(out if rank() == 0 else os.devnull, "a") as kept_file, \
            open(dropped if rank() == 0 else os.devnull, "a") as dropped_file, \
            tqdm(total=len(records), initial=before, desc="distill", unit="plan",
                 disable=None if rank() == 0 else True) as bar:
        try:
            for record, text, reason in answers():
                if reason and reason.startswith(UNANSWERED):
                    unanswered[reason] += 1
                    continue
                # A reasoning teacher thinks aloud first; the plan is what follows.
                plan = (text or "").rpartition("</think>")[2].strip()
                reason = reason or rejection(plan, record["answer"], config.max_plan_words)
                if reason is None:
                    kept += 1
                    line = {name: record[name] for name in ("id", "problem", "answer")}
                    line.update(plan=plan, think=record["solution"])
                    kept_file.write(json.dumps(line) + "\n")
                    kept_file.flush()
                else:
                    reasons[reason] += 1
                    line = {"id": record["id"], "reason": reason, "plan": plan}
                    dropped_file.write(json.dumps(line) + "\n")
                    dropped_file.flush()
                bar.update()
        finally:  # Ctrl-C and a server that refuses everything included
            left = len(todo) - kept - sum(reasons.values())
            bar.clear()
            print0(f"{out}: {kept} plans kept, {sum(reasons.values())} dropped"
                   + f", {left} left to ask (--resume goes on with them)" * (left > 0)
                   + f", {before} finished before" * (before > 0))
            for reason, count in reasons.most_common(10):
                print0(f"  {count} {reason}")
    if rank() > 0:
        return
    for reason, count in unanswered.most_common(10):
        print0(f"  {count} {reason}: run again with --resume")
    if left:
        fail(f"{left} records are unanswered: run again with --resume")
    if not out.stat().st_size:
        fail(f"no plan was kept: {dropped} holds what the teacher wrote; choose another --teacher "
             "or raise the limits, and pass --overwrite")


if __name__ == "__main__":
    guarded(main)
