"""Stage 1b, the cold start: supervised fine-tuning on plan, think and answer (Eq. 1 of arXiv 2510.01833).

The prompt is masked; every completion token is supervised, the end of turn included, or the model would never learn
to stop. With `--use_plan false` the plans are left out (the paper's Table 4, "SFT without plans").

    python sft.py --model data/toy_base --data runs/demo/plans.jsonl --out runs/demo/sft
    torchrun --nproc_per_node=8 sft.py
"""
import math
import random
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from attention import pack
from checkpoint import Checkpoints, StopSignal, guarded, resume
from data.sources import load_records
from memory import dry_run
from model_utils import (all_sum, check_common, encode_prompt, fail, init_distributed, load_config, load_sharded,
                         load_tokenizer, lr_at, make_optimizer, micro_batches, optimizer_step, parse_config, print0,
                         progress, rank, warmup_within, world_size)
from rewards import build_completion
from run_folder import LOCK, check_run, hold, open_logger, open_run


@dataclass
class Config:
    model: str = "Qwen/Qwen2.5-7B-Instruct"  # Hugging Face folder or hub id of the model to fine-tune
    data: str = "runs/plans.jsonl"  # plan records: distill.py's output
    out: str = "runs/sft"  # run folder: metrics.jsonl, run.json, model/
    epochs: float = 3.0  # passes over the data (> 0)
    lr: float = 1e-5  # peak learning rate
    batch_size: int = 64  # sequences an optimiser step, over all ranks (>= 1)
    use_plan: bool = True  # false: leave the plan block out of the targets
    weight_decay: float = 0.01  # AdamW, matrices only
    warmup_steps: int = 20  # linear warm-up; a tenth of the steps in a run that it would fill
    schedule: str = "cosine"  # after the warm-up: constant, linear or cosine
    max_grad_norm: float = 1.0  # gradient-norm clip; inf: none (> 0)
    val_size: int = 200  # records held out for the validation loss (at most a tenth of the data)
    eval_every: int = 100  # steps between validation losses; 0: only at the end
    save_every: int = 200  # steps between checkpoints to resume from; 0: only the model at the end
    keep: int = 2  # newest checkpoints kept; 0: all
    on_save_error: str = "stop"  # disk full or the like at a checkpoint: stop, or continue without it
    max_skipped: int = 5  # steps in a row whose gradient is not finite (each is skipped) before the run stops; 0: never
    shard_within: str = "world"  # weights are cut over all ranks (world) or over the ranks of a node (HSDP)
    activation_checkpointing: bool = True  # less memory for activations, a third more computing
    cpu_offload: bool = False  # weights, gradients and optimiser state in CPU memory
    tokens_per_micro_batch: int = 16384  # tokens in one forward and backward (>= 1)
    max_tokens: int = 8192  # longer records (prompt and completion) are left out, and counted (>= 1)
    log: str = ""  # log to tensorboard, wandb or trackio too, where that is installed
    limit: int = 0  # use a random subset of this size; 0: all
    seed: int = 0  # choice of the subset, order of the records (< 4e9)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = False  # go on from the newest whole checkpoint in --out, if there is one; `--resume auto` is the same
    thinking: bool = True  # Qwen3: false trains on its non-thinking prompt, which the saved model then keeps
    dry_run: bool = False  # print settings and the memory a GPU needs, and end


def encode_record(tokenizer, record: dict, use_plan: bool) -> tuple[list[int], int]:
    """(ids of prompt + completion + end of turn, length of the prompt)."""
    prompt = encode_prompt(tokenizer, record["problem"])
    try:
        completion = build_completion(record["plan"] if use_plan else None, record["think"], record["answer"])
    except ValueError as error:
        fail(f"record {record['id']}: {error}; mend or remove it")
    ids = tokenizer.encode(completion, add_special_tokens=False) + [tokenizer.eos_token_id]
    return prompt + ids, len(prompt)


def sft_loss(model, batch: list[tuple[list[int], int]], denominator: int, tokens: int, device, train: bool) -> float:
    """Token loss (Eq. 1), summed over the rows of all ranks, over `denominator`; `train` accumulates gradients.

    `batch` holds this rank's rows; `tokens` bounds a micro-batch.
    """
    total = torch.zeros((), device=device)
    for rows in micro_batches([ids for ids, _ in batch], tokens, device, share=False):
        packed = pack([batch[i][0] for i in rows], [batch[i][1] for i in rows], device, share=False)
        with torch.set_grad_enabled(train):
            logprobs, _ = model.token_logprobs(packed)  # (B, T-1)
            loss = -logprobs.sum() / denominator
        if train:
            (loss * world_size()).backward()  # FSDP averages gradients over ranks; this loss is a sum over them
        total += loss.detach()
    return float(all_sum(total))


def count_tokens(batch) -> int:
    return sum(len(ids) - prompt for ids, prompt in batch)


def main():
    config = parse_config(Config)
    check_common(config, Config.model)
    if config.batch_size % world_size():
        fail(f"--batch_size {config.batch_size} does not divide over {world_size()} ranks; "
             f"try {config.batch_size // world_size() * world_size() or world_size()}")
    model_config = load_config(config.model)
    if config.dry_run:
        return dry_run(config, model_config, {"ranks": world_size(), "sequences a step": config.batch_size,
                                              "sequences a rank": config.batch_size // world_size(),
                                              "tokens a step, at most": config.batch_size * config.max_tokens},
                       micro_tokens=max(config.tokens_per_micro_batch, config.max_tokens))
    records = load_records(config.data, fields=("problem", "answer", "think") + ("plan",) * config.use_plan,
                           limit=config.limit, seed=config.seed)
    tokenizer = load_tokenizer(config.model, config.thinking)
    bar = tqdm(records, desc="encode", disable=None if rank() == 0 else True)
    rows = [encode_record(tokenizer, record, config.use_plan) for record in bar]
    longest = min(config.max_tokens, getattr(model_config, "max_position_embeddings", None) or config.max_tokens)
    kept = [row for row in rows if len(row[0]) <= longest]
    if not kept:
        fail(f"every record of {config.data} has more than {longest} tokens; raise --max_tokens, or choose another model")
    print0(f"{len(kept)} records, {count_tokens(kept):,} supervised tokens"
           + (f"; {len(rows) - len(kept)} of more than {longest} tokens left out" if len(kept) < len(rows) else ""))
    random.Random(config.seed).shuffle(kept)
    n_val = min(config.val_size, len(kept) // 10)
    validation, train = kept[:n_val], kept[n_val:]
    if len(train) < config.batch_size:
        fail(f"{len(train)} training records are fewer than --batch_size {config.batch_size}; lower it")
    per_epoch = len(train) // config.batch_size
    steps = max(1, round(per_epoch * config.epochs))
    warmup_steps = warmup_within(steps, config.warmup_steps)

    folder = check_run(config)
    device = init_distributed()
    hold(folder / LOCK)
    stop = StopSignal()
    model = load_sharded(config.model, device, shard_within=config.shard_within, cpu_offload=config.cpu_offload,
                         activation_checkpointing=config.activation_checkpointing)
    open_run(folder, config)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    state = {"step": 0, "skipped": 0}  # steps done, which are the data position too; steps skipped in a row
    checkpoints = Checkpoints(folder, model, tokenizer, optimizer, config, config.keep, config.on_save_error)
    if config.resume:
        state.update(resume(folder, model, optimizer, config))

    log, bar = open_logger(config.log, folder, config), progress(steps, state["step"], "sft")
    for step in range(state["step"], steps):
        began = time.time()
        checkpoints.poll()
        epoch, position = divmod(step, per_epoch)
        order = list(range(len(train)))
        random.Random(f"{config.seed} {epoch}").shuffle(order)  # a new order each epoch
        batch = [train[i] for i in order[position * config.batch_size:(position + 1) * config.batch_size]]
        tokens = count_tokens(batch)  # one denominator for all micro-batches and ranks
        lr = lr_at(step, steps, config.lr, warmup_steps, config.schedule)
        loss = sft_loss(model, batch[rank()::world_size()], tokens, config.tokens_per_micro_batch, device, train=True)
        grad_norm = optimizer_step(model, optimizer, lr, config.max_grad_norm)
        metrics = {"step": step + 1, "epoch": (step + 1) / per_epoch, "loss": loss, "grad_norm": grad_norm,
                   "lr": lr, "tokens_per_s": tokens / (time.time() - began)}
        last = step + 1 == steps
        if validation and (last or config.eval_every and (step + 1) % config.eval_every == 0):
            metrics["val_loss"] = sft_loss(model, validation[rank()::world_size()], count_tokens(validation),
                                           config.tokens_per_micro_batch, device, train=False)
            print0(f"step {step + 1}/{steps}  loss {metrics['loss']:.4f}  val_loss {metrics['val_loss']:.4f}  "
                   f"grad_norm {grad_norm:.2f}  {metrics['tokens_per_s']:.0f} tokens/s")
        checkpoints.log("metrics.jsonl", [metrics])
        log(metrics)
        bar.update()
        state.update(step=step + 1, skipped=0 if math.isfinite(grad_norm) else state["skipped"] + 1)
        checkpoints.after_step(state, last, stop)
    bar.close()
    checkpoints.save("model")
    checkpoints.poll(wait=True)


if __name__ == "__main__":
    guarded(main)
