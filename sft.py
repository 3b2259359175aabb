"""Stage 1b, the cold start: supervised fine-tuning on plan, think, answer (arXiv 2510.01833, 3.1).

Eq. 1: the prompt is masked, every completion token is supervised. That includes the end of turn,
without which the model would never learn to stop. `--use_plan false` leaves the plans out (the
paper's Table 4, "SFT without plans").

    python sft.py --model data/toy_base --data runs/demo/plans.jsonl --out runs/demo/sft
    torchrun --nproc_per_node=8 sft.py
"""

import plumbing.threads  # noqa: F401 -- before torch, which reads what it sets

import random
import time
from dataclasses import dataclass
from typing import Literal

import torch

from data.sources import draw, load_records
from data.verifiers import boxed
from model_utils import (
    encode_question,
    load_sharded,
    load_tokenizer,
    lr_at,
    make_optimizer,
    optimizer_step,
)
from plumbing.attention import micro_batches, pack
from plumbing.calls import check_tools, encode_with_results, tools_of
from plumbing.flags import TrainingFlags, parse_config
from plumbing.images import open_album, show
from plumbing.memory import dry_run_sft
from plumbing.ranks import all_sum, fail, print0, rank, require, world_size
from plumbing.run import Run
from plumbing.signals import guarded
from plumbing.weights import load_config
from rewards import build_completion


@dataclass
class Config(TrainingFlags):
    model: str = "Qwen/Qwen2.5-7B-Instruct"  # model to fine-tune: Hugging Face folder or hub id
    data: str = "runs/plans.jsonl"  # plan records: distill.py's output
    out: str = "runs/sft"  # run folder: metrics.jsonl, run.json, step_*/, model/
    epochs: float = 3.0  # passes over the data (> 0)
    batch_size: int = 64  # sequences per optimiser step, over all ranks (>= 1)
    use_plan: bool = True  # false: leave the plan block out of the targets
    tools: tuple = ()  # what grpo.py will get: CoTs may hold calls; results are not learned
    max_tokens: int = 8192  # longer records are left out, and counted (>= 1)
    thinking: bool = True  # Qwen3: false trains on its non-thinking prompt, and the model keeps it
    lr: float = 1e-5  # peak learning rate
    warmup_steps: int = 20  # linear warm-up; in a run of no more steps, a tenth of them
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # of the learning rate
    limit: int = 0  # use a random subset of this size; 0: all
    val_size: int = 200  # records held out for the validation loss (at most a tenth of the data)
    eval_every: int = 100  # steps between validation losses; 0: only at the end
    save_every: int = 200  # steps between checkpoints; 0: only the model at the end

    def check(self):
        ranks = world_size()
        whole = self.batch_size % ranks == 0
        require(whole, f"--batch_size must be a multiple of the {ranks} ranks")
        check_tools(self.tools)


Row = tuple[list[int], int, list[int]]  # of `encode_record`


def encode_record(tokenizer, record: dict, use_plan: bool, tools: tuple = ()) -> Row:
    """(ids of prompt + completion + end of turn, length of the prompt, places of what tools said).

    The last are not supervised. Raises SystemExit, naming the record, if its text could not be
    read back from the template.
    """
    plan = record["plan"] if use_plan else None
    try:
        prompt = encode_question(tokenizer, record, tools)
        completion = build_completion(plan, record["think"], record["answer"], boxed(record))
    except ValueError as error:
        fail(f"record {record['id']}: {error}; mend or remove it")
    if tools_of(record, tools):
        ids, said = encode_with_results(tokenizer, completion)
    else:
        ids, said = tokenizer.encode(completion, add_special_tokens=False), []
    ids = prompt + ids + [tokenizer.eos_token_id]
    return ids, len(prompt), [len(prompt) + place for place in said]


def count_tokens(rows: list[Row]) -> int:
    """Supervised tokens of encoded records."""
    return sum(len(ids) - prompt - len(said) for ids, prompt, said in rows)


def load_rows(config: Config, tokenizer) -> list[Row]:
    """The encoded records that fit into the model's context, shuffled."""
    fields = ("problem", "answer", "think") + ("plan",) * config.use_plan
    records = load_records(config.data, fields, config.limit, config.seed)
    rows = [encode_record(tokenizer, r, config.use_plan, config.tools) for r in records]
    model_config = load_config(config.model).get_text_config()
    context = getattr(model_config, "max_position_embeddings", None)
    longest = min(config.max_tokens, context or config.max_tokens)
    kept = [row for row in rows if len(row[0]) <= longest]
    require(kept, f"every record of {config.data} has more than {longest} tokens: raise "
            "--max_tokens, or choose another model")
    print0(f"{len(kept)} records, {count_tokens(kept):,} supervised tokens; "
           f"{len(rows) - len(kept)} of more than {longest} tokens left out")
    random.Random(config.seed).shuffle(kept)
    return kept


def sft_loss(model, rows: list[Row], config: Config, train: bool) -> float:
    """Eq. 1: mean loss of the supervised tokens of `rows`, over all ranks.

    Each rank computes its share of the rows. `train` accumulates gradients. A collective.
    """
    total, tokens = torch.zeros((), device=model.compute_device), count_tokens(rows)  # of all ranks
    mine = rows[rank()::world_size()]
    sequences, prompts, said = zip(*mine) if mine else ((), (), ())
    limit = config.tokens_per_micro_batch
    # All records begin with the instruction, so sharing beginnings pays for short ones.
    for part in micro_batches(sequences, limit, model.compute_device):
        chosen, starts, given = ([one[i] for i in part] for one in (sequences, prompts, said))
        packed = pack(chosen, starts, model.compute_device, given=given)
        with torch.set_grad_enabled(train):
            logprobs, _ = model.token_logprobs(packed)  # (B, T-1)
            loss = -logprobs.sum() / tokens
        if train:
            (loss * world_size()).backward()  # FSDP averages gradients over ranks; this is a sum
        total += loss.detach()
    return float(all_sum(total))


def main():
    config = parse_config(Config)
    if config.dry_run:
        return dry_run_sft(config)
    tokenizer = load_tokenizer(config.model, config.thinking)
    open_album(tokenizer, config)
    rows = load_rows(config, tokenizer)
    held_out = min(config.val_size, len(rows) // 10)
    validation, train = rows[:held_out], rows[held_out:]
    per_epoch = len(train) // config.batch_size
    require(per_epoch, f"{len(train)} training records are fewer than --batch_size: lower it")
    steps = max(1, round(per_epoch * config.epochs))
    run = Run(config)
    model = load_sharded(config.model, run.device, config)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    run.begin(model, tokenizer, optimizer, steps)
    look = lambda part: show(tokenizer, [ids for ids, *_ in part[rank()::world_size()]], model)

    while run.state["step"] < steps:
        step = run.start_step()
        epoch, position = divmod(step - 1, per_epoch)
        first = epoch * len(train) + position * config.batch_size
        batch = draw(train, range(first, first + config.batch_size), config.seed)
        lr = lr_at(step - 1, steps, config.lr, run.warmup_steps, config.schedule)
        look(batch)
        loss = sft_loss(model, batch, config, train=True)
        grad_norm = optimizer_step(model, optimizer, lr, config.max_grad_norm)
        metrics = {"epoch": step / per_epoch, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        metrics["tokens_per_s"] = count_tokens(batch) / (time.time() - run.started)
        shown = ("loss", "val_loss", "grad_norm", "tokens_per_s")
        due = step == steps or run.is_due(config.eval_every)
        if due and validation:
            look(validation)
            metrics["val_loss"] = sft_loss(model, validation, config, train=False)
        run.log(metrics, shown if due else ())
        run.end_step()
    run.finish()


if __name__ == "__main__":
    guarded(main)
