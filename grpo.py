"""Stage 2, PTA-GRPO: reinforcement learning of plan -> think -> answer (arXiv 2510.01833, section 3.2).

    1. Each question gets m plans; each plan is decoded once and continued by z CoTs: a group of G = m z completions.
    2. A plan's score is the share of its CoTs that are right; its reward is a softmax of the scores   (Eq. 2)
    3. R = outcome + beta * plan + structure + length                                                  (Eqs. 3-8)
    4. A = (R - mean) / std over the group                                                             (Eq. 10)
    5. Clipped policy-gradient loss on every completion token, plus a KL term                          (Eq. 9)

GRPO, DAPO and Dr. GRPO are settings of this loop (recipes/). One departure from the paper: the loss is divided by the
global token count (`--loss_agg constant` is Eq. 9 over a fixed length). Where the paper is silent, README.md names the
choice: the KL estimator is k3; tau, alpha, the clip range and the KL coefficient are flags.

    python grpo.py --model runs/demo/sft/model --data runs/demo/data/train.jsonl ...   one GPU or CPU
    torchrun --nproc_per_node=8 grpo.py                                                 the paper's main run

Shapes: N questions of a rank, m plans, z CoTs a plan, G = m z; B sequences of T tokens; V vocabulary.
"""
import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from attention import KVCache, Packed, pack, pad_batch
from checkpoint import Checkpoints, StopSignal, guarded, resume, stop_run
from cuda_graph import replay_step
from data.sources import load_records, parse_name
from memory import dry_run
from model_utils import (all_sum, check_common, check_context, encode_prompt, fail, find_stop_ids, gather0, gather_all,
                         init_distributed, load_config, load_sharded, load_tokenizer, lr_at, make_optimizer,
                         micro_batches, optimizer_step, parse_config, print0, progress, rank, reserve_cache, unsharded,
                         warmup_within, without_autograd, world_size)
from rewards import (GRADER_COUNTS, check_golds, extract_answer, grade, grader_stats, overlong_penalty, parse_completion,
                     total_reward)
from rollout_log import note_tokens, rollout_metrics, rollout_record, show_record
from run_folder import LOCK, check_run, hold, open_logger, open_run


PREFILL_TOKENS = 2**15  # most tokens of prompts computed at a time
ADMIT = 0.25  # waiting rows are admitted when this share of the slots is free
# Mean |logprob of the sampler - of the trainer| a token that bf16 does not explain: the sampler missed an update.
MAX_SAMPLER_GAP = 0.1


@dataclass
class Config:
    model: str = "runs/sft/model"  # policy to start from and KL reference: sft.py's output, a folder or a hub id
    data: str = "zwhe99/DeepMath-103K"  # training problems: JSONL path, toy[:split], or a name of data/README.md
    out: str = "runs/pta"  # run folder: metrics.jsonl, rollouts.jsonl, run.json, step_*/, model/
    # the algorithm
    steps: int = 350  # rollout steps (>= 1)
    questions: int = 128  # N over all ranks: questions a step (>= 1)
    plans: int = 4  # m: plans a question (>= 1)
    cots: int = 3  # z: CoTs a plan (>= 1)
    beta: float = 0.5  # weight of the plan reward (Eq. 4)
    tau: float = 1.0  # temperature of the softmax over plan scores (Eq. 2) (> 0)
    alpha: float = 0.1  # size of the length reward (Eq. 8)
    structure: float = 0.2  # size of the structure reward (Eq. 6)
    correct_only: bool = False  # length reward for right completions only
    format_reward: bool = True  # false: neither structure nor length reward (the paper's ablation without r_format)
    overlong_buffer: int = 0  # DAPO's overlong shaping over the last so many tokens of the limit; 0: off
    std_norm: bool = True  # divide advantages by the group's std (Eq. 10); false: Dr. GRPO
    loss_agg: str = "token"  # denominator: token (global count), sequence (GRPO) or constant (Eq. 9, Dr. GRPO)
    clip_low: float = 0.2  # epsilon below 1 (<= 1)
    clip_high: float = 0.2  # epsilon above 1 (DAPO: 0.28)
    kl_coef: float = 0.01  # weight of the k3 KL term; 0 loads no reference model
    dynamic_sampling: bool = False  # DAPO: replace groups that are all right or all wrong
    dynamic_rounds: int = 4  # most rollout rounds a step with dynamic sampling (>= 1)
    mask_truncated: bool = False  # leave completions cut at their limit out of the loss (they stay in the baseline)
    epochs: int = 1  # passes over a step's completions (>= 1)
    mini_batches: int = 1  # optimiser steps a pass (>= 1)
    # sampling
    temperature: float = 1.0  # of the rollout, where 0 would make all alike; divides the logits in the loss too (> 0)
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out, and counted (>= 1)
    max_plan_tokens: int = 512  # a plan not closed by then gets no CoT; 0: no plan phase (needs --cots 1)
    max_completion_tokens: int = 3584  # plan and CoT together: 3.5K (>= 1)
    rollout_rows: int = 0  # most sequences a rank decodes at once, the others wait their turn; 0: as many as fit in memory
    cuda_graphs: bool = True  # on a GPU, decode by replaying captured steps
    # the optimiser
    lr: float = 1e-6  # peak learning rate
    warmup_steps: int = 0  # linear warm-up; a tenth of the steps in a run that it would fill
    schedule: str = "constant"  # constant, linear or cosine
    weight_decay: float = 0.01  # AdamW, matrices only
    max_grad_norm: float = 1.0  # gradient-norm clip; inf: none (> 0)
    tokens_per_micro_batch: int = 16384  # tokens in one forward and backward, what completions share counted once (>= 1)
    share_prefix: bool = True  # compute the prompt and plan that completions share once in the update, too
    # the run
    limit: int = 60000  # use a random subset of the data of this size; 0: all
    eval_data: str = ""  # held-out problems, as --data; empty: the last --eval_size of --data
    eval_size: int = 200  # held-out problems, answered greedily; 0: none
    eval_every: int = 25  # steps between evaluations; 0: none
    show_every: int = 10  # steps between printed and logged rollouts; 0: none
    show_tokens: int = 16  # questions a rank of a logged step whose tokens carry surprise, entropy and log-ratio
    log: str = ""  # log to tensorboard, wandb or trackio too, where that is installed
    save_every: int = 50  # steps between checkpoints to resume from; 0: only the model at the end
    keep: int = 2  # newest checkpoints kept; 0: all
    on_save_error: str = "stop"  # disk full or the like at a checkpoint: stop, or continue without it
    max_skipped: int = 5  # steps in a row whose gradient is not finite (each is skipped) before the run stops; 0: never
    shard_within: str = "world"  # weights are cut over all ranks (world) or over the ranks of a node (HSDP)
    activation_checkpointing: bool = True  # less memory for activations, a third more computing
    cpu_offload: bool = False  # weights, gradients and optimiser state in CPU memory
    seed: int = 0  # data order and sampling (< 4e9)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = False  # go on from the newest whole checkpoint in --out, if there is one; `--resume auto` is the same
    dry_run: bool = False  # print settings, tokens and rollouts a step and the memory a GPU needs, and end


# ---------------------------------------------------------------------------------------------------------------
# Sampling

@dataclass
class Row:
    """One sequence being decoded: a plan while `plan_open`, else a completion."""
    prompt: int  # index of its prompt
    limits: list[int]  # most tokens of each completion that it becomes: z while it is a plan, else one
    ids: list[int] = field(default_factory=list)  # completion tokens so far, the stop token included
    logprobs: list[float] = field(default_factory=list)  # the sampler's logprob of each
    plan_open: bool = False  # still writing the plan
    branches: list["Row"] = field(default_factory=list)  # its completions, once its plan has closed
    plan_tokens: int = 0  # length of the plan at the head of ids
    stopped: bool = False  # ended by a stop token, not by a limit
    entropy: list[float] = field(default_factory=list)  # the policy's, at each token; for the log, see note_tokens
    log_ratio: list[float] = field(default_factory=list)  # of policy and reference, at each token; for the log
    slot: int = -1  # where in the KV cache it lives


def keep_top_p(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of most likely tokens with at least `top_p` of the mass. (B, V) -> (B, V)"""
    ordered, order = probs.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # mass *before* the token: the first one always stays
    return torch.zeros_like(probs).scatter(-1, order, ordered)


def sample_token(logits: torch.Tensor, temperature: float, top_p: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row: logits (B, V) -> tokens (B,), logprobs (B,) under the softmax before top-p."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        probs = logprobs.exp() if top_p >= 1 else keep_top_p(logprobs.exp(), top_p)
        # Exponential race: argmax p / e with e ~ Exp(1) falls on token v with probability p_v.
        tokens = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def prefill(model, cache: KVCache, prompts: list[list[int]], rows: list[Row]):
    """Compute each prompt once, for the first of its rows, and copy its keys and values to the others.

    All but the prompt's last token: that one is fed by the first decode step, which so yields the first logits.
    """
    first = {row.prompt: row for row in reversed(rows)}
    todo = sorted((row for row in first.values() if len(prompts[row.prompt]) > 1), key=lambda row: len(prompts[row.prompt]))
    longest = len(prompts[todo[-1].prompt]) if todo else 0
    while todo:  # the longest first, as many at a time as their padded tokens allow
        count = max(1, min(32, PREFILL_TOKENS // len(prompts[todo[-1].prompt])))
        some, todo = todo[-count:], todo[:-count]
        ids = pad_batch([prompts[row.prompt][:-1] for row in some], model.device)
        cache.write_prompts(torch.tensor([row.slot for row in some], device=model.device))
        # Padded on the right: what lies beyond a prompt's end is never seen, and is overwritten by its completion.
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
              position_ids=torch.arange(ids.shape[1], device=model.device)[None])
    others = [row for row in rows if row is not first[row.prompt]]
    if others and longest:
        cache.copy([first[row.prompt].slot for row in others], [row.slot for row in others], longest - 1)


def decode_step(model, cache: KVCache, ids: list[int], positions: list[int]) -> torch.Tensor:
    """Feed one token a row, each at its own position: (B,), (B,) -> logits of the next tokens (B, V)."""
    tokens, places = (torch.tensor(x, device=model.device) for x in (ids, positions))
    if model.device.type == "cuda" and getattr(model, "cuda_graphs", True):
        return replay_step(forward_step, model, cache, tokens, places, max(positions) + 1)
    return forward_step(model, cache, tokens, places, max(positions) + 1)


def forward_step(model, cache: KVCache, ids: torch.Tensor, positions: torch.Tensor, filled: int) -> torch.Tensor:
    """A decode step over slots 0..B-1; attention reads the first `filled` places of the cache. -> (B, V)"""
    cache.write_tokens(positions, filled)
    # Added to the scores: 0 where a row may look, -inf beyond its own position. (B, filled)
    hidden = torch.zeros(len(ids), filled, dtype=model.dtype, device=ids.device).masked_fill_(
        torch.arange(filled, device=ids.device) > positions[:, None], -math.inf)
    return model(input_ids=ids[:, None], position_ids=positions[:, None], attention_mask=hidden[:, None, None],
                 past_key_values=cache, use_cache=True).logits[:, -1]


@without_autograd
def decode(model, prompts: list[list[int]], rows: list[Row], *, temperature: float, top_p: float, stop_ids: list[int],
           seed: int, max_rows: int = 0, plan_closed: Callable = None, max_plan_tokens: int = 0):
    """Decode `rows` to their ends, at most `max_rows` at a time (0: as many as fit in memory), filling in their fields.

    A row whose plan closes (`plan_closed(ids)`) becomes its z branches: they keep the plan's token ids and a copy of
    its keys and values, so that no plan is decoded, encoded or prefilled twice.
    """
    generator = torch.Generator(model.device).manual_seed(seed)  # sampling has an RNG of its own
    longest = max(len(prompts[row.prompt]) + max(row.limits) for row in rows)
    branches = max(len(row.limits) for row in rows)
    most = sum(len(row.limits) for row in rows)
    most = min(most, max(max_rows or most, branches))
    cache = reserve_cache(model, most, longest, branches)
    slots = min(cache.slots, most)
    stop, waiting = set(stop_ids), list(reversed(rows))
    active: list[Row] = []  # active[i] lives in slot i of the cache
    while waiting or active:
        # Admit waiting rows, while every branch they may grow has a slot; many at a time, since prefills are costly.
        reserved, new = sum(len(row.limits) for row in active), []
        if waiting and slots - reserved >= ADMIT * slots:
            while waiting and reserved + len(waiting[-1].limits) <= slots:
                new.append(waiting.pop())
                new[-1].slot = len(active) + len(new) - 1
                reserved += len(new[-1].limits)
            prefill(model, cache, prompts, new)
            active += new

        # Decode one token of every active row.
        last = [row.ids[-1] if row.ids else prompts[row.prompt][-1] for row in active]
        positions = [len(prompts[row.prompt]) + len(row.ids) - 1 for row in active]
        logits = decode_step(model, cache, last, positions)  # (B, V)
        tokens, logprobs = sample_token(logits, temperature, top_p, generator)  # (B,), (B,)
        survivors, born = [], []
        for row, token, logprob in zip(active, tokens.tolist(), logprobs.tolist()):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.stopped = token in stop
            if row.stopped or len(row.ids) >= max(row.limits):
                continue
            if row.plan_open and plan_closed(row.ids):
                row.branches = [Row(row.prompt, [limit], list(row.ids), list(row.logprobs),
                                    plan_tokens=len(row.ids), slot=row.slot) for limit in row.limits]
                survivors.append(row.branches[0])  # takes over the plan's slot
                born += row.branches[1:]
            elif row.plan_open and len(row.ids) >= max_plan_tokens:
                continue  # a plan that does not close gets no CoT
            else:
                survivors.append(row)

        # Keep active rows in slots 0..B-1: who lives beyond, or was just born, is copied into a free slot.
        total = len(survivors) + len(born)
        taken = {row.slot for row in survivors if row.slot < total}
        free = [slot for slot in range(total) if slot not in taken]
        movers = [row for row in survivors if row.slot >= total] + born
        if movers:
            cache.copy([row.slot for row in movers], free, max(positions) + 1)
            for row, slot in zip(movers, free):
                row.slot = slot
        active = sorted(survivors + born, key=lambda row: row.slot)


def sample(model, prompts: list[list[int]], *, n: int = 1, max_new_tokens: int | list[int], temperature: float = 1.0,
           top_p: float = 1.0, stop_ids: list[int], seed: int = 0, max_rows: int = 0) -> tuple[list, list]:
    """Sample `n` completions of every prompt.

    `prompts`: token ids; `max_new_tokens`: one limit, or one a completion (prompt-major); temperature 0 is greedy.
    Returns (ids, logprobs), two lists of len(prompts) * n lists, prompt-major. A sampled stop id is kept. Logprobs are
    those of the softmax at `temperature`, before top-p.
    """
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * (len(prompts) * n)
    if len(limits) != len(prompts) * n or not prompts or min(limits) < 1 or not all(prompts):
        raise ValueError("sample wants non-empty prompts and a positive limit for each of the len(prompts) * n rows")
    rows = [Row(i // n, [limit]) for i, limit in enumerate(limits)]
    decode(model, prompts, rows, temperature=temperature, top_p=top_p, stop_ids=stop_ids, seed=seed, max_rows=max_rows)
    return [row.ids for row in rows], [row.logprobs for row in rows]


# ---------------------------------------------------------------------------------------------------------------
# Plan tree

def plan_end(tokenizer) -> Callable[[list[int]], bool]:
    """A function that tells from completion ids whether their last token closed the plan.

    `</plan>` is several tokens in most vocabularies and may share its last one with what follows (`>\n`), so it is
    looked for in decoded text; the plan then ends at that token's boundary, and the token is kept.
    """
    @functools.cache
    def has_bracket(token: int) -> bool:  # spares decoding a tail for every token
        return ">" in tokenizer.decode([token])

    return lambda ids: has_bracket(ids[-1]) and "</plan>" in tokenizer.decode(ids[-16:])


def sample_tree(model, prompts: list[list[int]], *, plans: int, cots: int, max_new_tokens: int | list[int], max_plan_tokens: int,
                plan_closed: Callable, temperature: float, stop_ids: list[int], seed: int,
                max_rows: int = 0) -> list[list[Row]]:
    """m plans a prompt and z CoTs a plan: N lists of G = m z finished rows, plan-major.

    A plan that never closes stands z times in its group as it is: a malformed completion without a CoT.
    `max_plan_tokens` 0 samples m completions a prompt without a plan phase (z must be 1).
    """
    count = len(prompts) * plans * cots
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * count
    rows = [Row(i // cots // plans, limits[i:i + cots], plan_open=max_plan_tokens > 0) for i in range(0, count, cots)]
    decode(model, prompts, rows, temperature=temperature, top_p=1.0, stop_ids=stop_ids, seed=seed, max_rows=max_rows,
           plan_closed=plan_closed, max_plan_tokens=max_plan_tokens)
    leaves = [row.branches or [row] * cots for row in rows]  # (N m) lists of z
    return [sum(leaves[i:i + plans], []) for i in range(0, len(leaves), plans)]


# ---------------------------------------------------------------------------------------------------------------
# Advantages and loss: pure tensor functions

def group_advantages(rewards: torch.Tensor, std_norm: bool = True) -> torch.Tensor:
    """A = (R - mean) / std over each group, population std (Eq. 10). (N, G) -> (N, G)

    All m z completions of a question share one baseline, plan siblings included. `std_norm=False` leaves the division
    out (Dr. GRPO, arXiv 2503.20783): it weights questions that are nearly always or never solved more.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if std_norm:
        centred = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
    # Equal rewards must give exactly 0. Rounding leaves them a std of about 1e-8, not 0: test the range instead.
    equal = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) < 1e-6
    return centred.masked_fill(equal, 0.0)


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
                clip_low: float, clip_high: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Per-token clipped loss -min(rho A, clip(rho, 1 - low, 1 + high) A) of Eq. 9, 0 outside the mask.

    logprobs, old_logprobs, mask: (B, T-1); advantages: (B,) or (B, T-1). Returns the loss (B, T-1), not averaged, and
    metrics summed over tokens: clip_frac (tokens whose gradient the clip cuts off).
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    # Masked before exp: padding would give inf, and 0 * inf is NaN in the backward pass.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).float().exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    cut = (ratio * advantages > clipped * advantages) & mask
    return loss * mask, {"clip_frac": cut.sum()}


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) per token: r - 1 - log r with r = pi_ref / pi. (B, T-1) -> (B, T-1)

    Its value is unbiased and never negative. Differentiated as part of the loss, as here and in the original GRPO,
    its gradient is that of the forward KL(pi_ref || pi) in expectation, which agrees near pi = pi_ref only.
    """
    log_ratio = (ref_logprobs - logprobs).float()
    return log_ratio.exp() - 1 - log_ratio


def token_weights(mask: torch.Tensor, loss_agg: str, tokens: int, sequences: int, max_tokens: int) -> torch.Tensor:
    """What each token's loss counts for, (B, T-1); `tokens` and `sequences` are those of the whole optimiser step.

    They are counted over all micro-batches and ranks before the first backward pass, so that the gradient depends
    neither on the micro-batch size nor on the number of ranks.
    """
    mask = mask.float()
    if loss_agg == "token":  # every token alike: long completions weigh more
        return mask / tokens
    if loss_agg == "sequence":  # every completion alike: a token of a long one weighs less
        return mask / mask.sum(1, keepdim=True).clamp_min(1) / sequences
    return mask / (sequences * max_tokens)  # constant: Eq. 9's token sum over a fixed length


# ---------------------------------------------------------------------------------------------------------------
# Update

@dataclass
class Micro:
    """One forward and backward pass over at most --tokens_per_micro_batch tokens."""
    packed: Packed  # B sequences of up to T tokens
    advantages: torch.Tensor  # (B,)
    sampler_logprobs: torch.Tensor  # (B, T-1) as the sampler saw them
    rows: list[Row] = field(default_factory=list)  # whose tokens these are, in order
    weights: torch.Tensor = None  # (B, T-1)
    old_logprobs: torch.Tensor = None  # (B, T-1) of the policy that sampled; None: equal to the current ones
    ref_logprobs: torch.Tensor = None  # (B, T-1) of the KL reference
    entropy: torch.Tensor = None  # (B, T-1) at the first pass, kept for the log


def make_micros(rows: list[Row], prompts: list[list[int]], advantages: list[float], config, device) -> list[Micro]:
    """Micro-batches of one optimiser step, weights included; every rank gets equally many."""
    micros = []
    sequences = [prompts[row.prompt] + row.ids for row in rows]
    starts = [len(prompts[row.prompt]) for row in rows]
    # A truncated completion without a loss has no marked token; its advantage has been counted in the baseline.
    marked = [len(s) if config.mask_truncated and not row.stopped else start
              for row, s, start in zip(rows, sequences, starts)]
    for part in micro_batches(sequences, config.tokens_per_micro_batch, device, config.share_prefix):
        packed = pack([sequences[i] for i in part], [marked[i] for i in part], device, config.share_prefix)
        sampler = torch.zeros(packed.mask.shape)
        for line, i in enumerate(part):
            sampler[line, starts[i] - 1:len(sequences[i]) - 1] = torch.tensor(rows[i].logprobs)
        micros.append(Micro(packed, torch.tensor([advantages[i] for i in part] or [0.0], device=device), sampler.to(device),
                            [rows[i] for i in part]))
    tokens, n = all_sum(torch.tensor([sum(int(m.packed.mask.sum()) for m in micros), len(rows)], device=device)).tolist()
    for micro in micros:
        micro.weights = token_weights(micro.packed.mask, config.loss_agg, max(tokens, 1), n, config.max_completion_tokens)
    return micros


@torch.no_grad()
def score(model, micros: list[Micro], temperature: float) -> list[torch.Tensor]:
    """Logprobs (B, T-1) of every micro-batch, without gradients."""
    logprobs = [model.token_logprobs(micro.packed, temperature)[0] for micro in micros]
    if hasattr(model, "reshard"):  # FSDP2 leaves head and embedding gathered for a backward pass, which a reference never has
        model.reshard()
    return logprobs


def update(model, optimizer, micros: list[Micro], config, lr: float) -> dict[str, float]:
    """One optimiser step on the micro-batches; returns token means over all ranks and the gradient norm."""
    names = ("loss", "kl", "clip_frac", "entropy", "sampler_gap", "tokens")
    sums = torch.zeros(len(names), device=micros[0].advantages.device if micros else model.device)
    for micro in micros:
        mask = micro.packed.mask
        logprobs, entropy = model.token_logprobs(micro.packed, config.temperature)  # (B, T-1)
        micro.entropy = entropy if micro.entropy is None else micro.entropy
        # Where the policy has not moved yet, the old logprobs are these: recomputing them in bf16 would add noise.
        old_logprobs = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
        loss, metrics = policy_loss(logprobs, old_logprobs, micro.advantages, mask,
                                    config.clip_low, config.clip_high)  # Eq. 9
        kl = torch.zeros_like(loss)
        if micro.ref_logprobs is not None:
            kl = kl_k3(logprobs, micro.ref_logprobs)
            loss = loss + config.kl_coef * kl
        loss = (loss * micro.weights).sum()
        (loss * world_size()).backward()  # FSDP averages gradients over ranks; this loss is a sum over them
        gap = (logprobs.detach() - micro.sampler_logprobs).abs() * mask
        sums += torch.stack([loss.detach(), (kl.detach() * mask).sum(), metrics["clip_frac"].float(),
                             (entropy * mask).sum(), gap.sum(), mask.sum().float()])
    sums = dict(zip(names, all_sum(sums).tolist()))
    tokens = max(sums.pop("tokens"), 1)
    means = {name: value if name == "loss" else value / tokens for name, value in sums.items()}
    return {**means, "grad_norm": optimizer_step(model, optimizer, lr, config.max_grad_norm)}


# ---------------------------------------------------------------------------------------------------------------
# Questions and grading

def load_questions(name: str, tokenizer, max_prompt_tokens: int, limit: int, seed: int) -> list[dict]:
    """Problem records with `prompt` ids. A gold that no answer could match is not scored 0 for ever: in a user's own
    file it is refused, in a hub data set left out and counted. A collective: the ranks share the checking."""
    problems = load_records(name, limit=limit, seed=seed)
    init_distributed()
    golds = sorted({problem["answer"] for problem in problems})  # about 10 ms for each that is not a number
    mine = golds[rank()::world_size()]
    reasons = dict(gather_all([(gold, reason) for gold, reason in zip(mine, check_golds(mine)) if reason]))
    bad = [problem for problem in problems if problem["answer"] in reasons]
    if bad and not parse_name(name):
        fail(f"{name}: {len(bad)} of {len(problems)} answers cannot be graded, the first in record {bad[0]['id']}: "
             f"{bad[0]['answer'][:60]!r} {reasons[bad[0]['answer']]}; mend or remove them")
    if bad:
        print0(f"{name}: {len(bad)} of {len(problems)} records left out, because their golds cannot be graded "
               f"(first: {bad[0]['id']}, {bad[0]['answer'][:60]!r})")
        problems = [problem for problem in problems if problem["answer"] not in reasons]
    if not problems:
        fail(f"no record of {name} has a gold that can be graded; choose other data")
    for problem in problems:
        problem["prompt"] = encode_prompt(tokenizer, problem["problem"])
    kept = [problem for problem in problems if len(problem["prompt"]) <= max_prompt_tokens]
    if not kept:
        fail(f"every prompt of {name} is longer than --max_prompt_tokens {max_prompt_tokens}; raise it")
    if len(kept) < len(problems):
        print0(f"{name}: {len(problems) - len(kept)} prompts longer than --max_prompt_tokens left out")
    return kept


def completion_texts(tokenizer, completions: list[list[int]], stop_ids: list[int]) -> list[str]:
    """Decoded completions without their stop token; other special tokens stay in sight, and make a text malformed."""
    return tokenizer.batch_decode([ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in completions])


def evaluate(model, tokenizer, problems: list[dict], *, n: int, temperature: float, top_p: float, max_new_tokens: int,
             seed: int, max_rows: int = 0) -> list[dict]:
    """Sample n completions a problem and grade them: eval records (problem fields and `samples`), in order, on rank 0.

    A problem's `prefix`, token ids of a given plan, is part of its completions. Each rank answers every W-th problem. A
    collective: call it on every rank.
    """
    mine, records = problems[rank()::world_size()], []
    if mine:
        stop_ids, prefixes = find_stop_ids(model, tokenizer), [p.get("prefix", []) for p in mine]
        ids, _ = sample(model, [p["prompt"] + prefix for p, prefix in zip(mine, prefixes)], n=n, temperature=temperature,
                        max_new_tokens=[max_new_tokens - len(prefix) for prefix in prefixes for _ in range(n)],
                        top_p=top_p, stop_ids=stop_ids, seed=seed + rank(), max_rows=max_rows)
        ids = [prefixes[i // n] + completion for i, completion in enumerate(ids)]
        texts = completion_texts(tokenizer, ids, stop_ids)
        answers = [extract_answer(text) for text in texts]
        correct = grade([p["answer"] for p in mine for _ in range(n)], answers)
        samples = [{"completion": text, "answer": answer, "correct": bool(right), "tokens": len(i),
                    "well_formed": parse_completion(text) is not None, "truncated": i[-1] not in stop_ids}
                   for text, answer, right, i in zip(texts, answers, correct, ids)]
        fields = [name for name in ("benchmark", "id", "problem", "answer") if name in mine[0]]
        records = [{"order": rank() + k * world_size(), **{name: p[name] for name in fields}, "samples": samples[k * n:(k + 1) * n]}
                   for k, p in enumerate(mine)]
    return sorted(gather0(records), key=lambda record: record.pop("order"))


def accuracy(records: list[dict]) -> float:
    """Mean over samples, then over problems."""
    return sum(sum(s["correct"] for s in r["samples"]) / len(r["samples"]) for r in records) / max(1, len(records))


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: str) -> list[int]:
    """A permutation of 0..n-1."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


@dataclass
class Group:
    """One question and its m z completions, plan-major."""
    problem: dict
    rows: list[Row]
    texts: list[str]
    correct: list[bool]
    well_formed: list[bool]


def make_groups(tokenizer, problems: list[dict], trees: list[list[Row]], stop_ids: list[int]) -> list[Group]:
    """Decode, parse and grade the completions of every question."""
    texts = completion_texts(tokenizer, [row.ids for rows in trees for row in rows], stop_ids)
    golds = [problem["answer"] for problem, rows in zip(problems, trees) for _ in rows]
    rows = [row for tree in trees for row in tree]
    # A plan that never closed has no CoT: a box in it is no CoT's answer, and would earn the plan full marks.
    answers = [None if row.plan_open else extract_answer(text) for row, text in zip(rows, texts)]
    correct = grade(golds, answers)
    groups, at = [], 0
    for problem, rows in zip(problems, trees):
        part = slice(at, at := at + len(rows))
        groups.append(Group(problem, rows, texts[part], correct[part],
                            [parse_completion(text) is not None for text in texts[part]]))
    return groups


def group_rewards(groups: list[Group], config: Config) -> dict[str, torch.Tensor]:
    """The reward terms of Eqs. 2-8 and their total, each (N, m, z), and lengths and verdicts of the same shape."""
    shape = (len(groups), config.plans, config.cots)
    correct = torch.tensor([g.correct for g in groups], dtype=torch.bool).reshape(shape)
    well_formed = torch.tensor([g.well_formed for g in groups], dtype=torch.bool).reshape(shape)
    lengths = torch.tensor([[len(row.ids) for row in g.rows] for g in groups]).reshape(shape)
    alpha, structure = (config.alpha, config.structure) if config.format_reward else (0.0, 0.0)
    rewards = total_reward(correct, well_formed, lengths, beta=config.beta, tau=config.tau, alpha=alpha,
                           correct_only=config.correct_only, structure=structure)
    if config.overlong_buffer:
        rewards["overlong"] = overlong_penalty(lengths, config.max_completion_tokens, config.overlong_buffer)
        rewards["total"] = rewards["total"] + rewards["overlong"]
    return {**rewards, "correct": correct, "well_formed": well_formed, "lengths": lengths}


# ---------------------------------------------------------------------------------------------------------------
# Main

def check_config(config: Config):
    """Refuse settings that cannot work, before anything is loaded. Raises SystemExit with the remedy."""
    check_common(config, Config.model)
    ranks = world_size()
    if config.questions % ranks:
        legal = ", ".join(str(n) for n in range(ranks, config.questions + ranks + 1, ranks)[-3:])
        fail(f"--questions {config.questions} does not divide over {ranks} ranks; legal values near it: {legal}")
    rows = config.questions // ranks * config.plans * config.cots
    if rows % config.mini_batches:
        fail(f"a rank's {rows} completions (questions / ranks x plans x cots) do not divide into --mini_batches "
             f"{config.mini_batches}; choose a divisor of {rows}")
    if config.max_plan_tokens == 0 and config.cots > 1:
        fail("--max_plan_tokens 0 samples without a plan phase, where a plan cannot have several CoTs; set --cots 1")
    if config.max_plan_tokens >= config.max_completion_tokens:
        fail(f"--max_plan_tokens {config.max_plan_tokens} leaves no room in --max_completion_tokens "
             f"{config.max_completion_tokens}; lower it")
    if config.loss_agg not in ("token", "sequence", "constant"):
        fail(f"--loss_agg is token, sequence or constant, not {config.loss_agg!r}")
    if config.overlong_buffer > config.max_completion_tokens:
        fail(f"--overlong_buffer must be <= --max_completion_tokens, not {config.overlong_buffer}")
    if config.plans * config.cots < 2:
        fail("a group of one completion has no baseline: raise --plans or --cots")


def main():
    config = parse_config(Config)
    check_config(config)
    model_config = load_config(config.model)
    if config.dry_run:
        completions = config.questions * config.plans * config.cots
        share, longest = completions // world_size(), config.max_prompt_tokens + config.max_completion_tokens
        return dry_run(config, model_config, {
            "ranks": world_size(), "questions a step": config.questions, "completions a step": completions,
            "completions a rank": share, "optimiser steps a step": config.epochs * config.mini_batches,
            "completion tokens a step, at most": completions * config.max_completion_tokens,
            "completions in the whole run": completions * config.steps,
            "passes over --limit problems": f"{config.steps * config.questions / config.limit:.2f}" if config.limit else "unknown"},
            micro_tokens=max(config.tokens_per_micro_batch, longest), reference=config.kl_coef > 0,
            rows=min(config.rollout_rows or share, share), prompt_tokens=config.max_prompt_tokens,
            completion_tokens=config.max_completion_tokens)
    tokenizer = load_tokenizer(config.model)
    problems = load_questions(config.data, tokenizer, config.max_prompt_tokens, config.limit, config.seed)
    if config.eval_data:
        held_out = (load_questions(config.eval_data, tokenizer, config.max_prompt_tokens, config.eval_size, config.seed)
                    if config.eval_size else [])
    else:
        size = min(config.eval_size, len(problems) // 10)
        problems, held_out = problems[:len(problems) - size], problems[len(problems) - size:]
    check_context(model_config, max(len(p["prompt"]) for p in problems + held_out), config.max_completion_tokens)
    folder = check_run(config)
    device = init_distributed()
    hold(folder / LOCK)
    torch.manual_seed(config.seed)
    stop = StopSignal()

    sharding = dict(shard_within=config.shard_within, activation_checkpointing=config.activation_checkpointing,
                    cpu_offload=config.cpu_offload)
    model = load_sharded(config.model, device, **sharding)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    reference = None
    if config.kl_coef:
        # In bf16 on GPUs: what the policy, with weights in fp32, computes with there.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        reference = load_sharded(config.model, device, dtype, **sharding).requires_grad_(False)
    open_run(folder, config)
    model.cuda_graphs = config.cuda_graphs
    warmup_steps = warmup_within(config.steps, config.warmup_steps)
    stop_ids = find_stop_ids(model, tokenizer)
    plan_closed = plan_end(tokenizer)
    # Steps done; questions drawn so far, over all ranks; steps skipped in a row. All that a resume needs beside weights.
    state = {"step": 0, "cursor": 0, "skipped": 0}
    checkpoints = Checkpoints(folder, model, tokenizer, optimizer, config, config.keep, config.on_save_error)
    if config.resume:
        state.update(resume(folder, model, optimizer, config))
    print0(f"{len(problems)} training and {len(held_out)} held-out problems; {model.num_parameters():,} parameters; "
           f"{world_size()} x {device.type}; a step: {config.questions} questions x {config.plans} plans x "
           f"{config.cots} CoTs = {config.questions * config.plans * config.cots} completions")

    def next_questions() -> list[dict]:
        """This rank's share of the next questions: a new order each epoch, the same at any number of ranks."""
        chosen = []
        for at in range(state["cursor"] + rank(), state["cursor"] + config.questions, world_size()):
            epoch, position = divmod(at, len(problems))
            chosen.append(problems[epoch_order(len(problems), f"{config.seed} {epoch}")[position]])
        state["cursor"] += config.questions
        return chosen

    def held_out_accuracy() -> float:
        with unsharded(model):
            return accuracy(evaluate(model, tokenizer, held_out, n=1, temperature=0.0, top_p=1.0, seed=config.seed,
                                     max_new_tokens=config.max_completion_tokens, max_rows=config.rollout_rows))

    if held_out and config.eval_every and state["step"] == 0:
        print0(f"step 0  eval_accuracy {held_out_accuracy():.3f}")
    grader_stats(reset=True)  # a step counts its own rollouts
    log, bar = open_logger(config.log, folder, config), progress(config.steps, state["step"], "grpo")

    while state["step"] < config.steps:
        step, started = state["step"] + 1, time.time()
        checkpoints.poll()  # puts a save that has been written since into place
        before = dict(state)  # what to save if a stop signal cuts this step short
        lr = lr_at(step - 1, config.steps, config.lr, warmup_steps, config.schedule)

        # ---- Rollout and its verdicts ----------------------------------------------------------------------
        groups, rounds, seconds = [], 0, {"rollout": 0.0, "reward": 0.0}
        while True:
            questions, began = next_questions(), time.time()
            with unsharded(model):
                trees = stop.unless_stopped(
                    sample_tree, model, [q["prompt"] for q in questions], plans=config.plans, cots=config.cots,
                    max_new_tokens=config.max_completion_tokens, max_plan_tokens=config.max_plan_tokens,
                    plan_closed=plan_closed, temperature=config.temperature, stop_ids=stop_ids,
                    seed=hash((config.seed, state["cursor"], rank())) % 2**62, max_rows=config.rollout_rows)
            if number := stop.agreed(device):
                stop_run(checkpoints, before, number)
            seconds["rollout"] += time.time() - began
            began, rounds = time.time(), rounds + 1
            fresh = make_groups(tokenizer, questions, trees, stop_ids)
            seconds["reward"] += time.time() - began
            if not config.dynamic_sampling:
                groups = fresh
                break
            groups += [g for g in fresh if any(g.correct) and not all(g.correct)]  # DAPO: others teach nothing
            groups = groups[:config.questions // world_size()]
            kept = int(all_sum(torch.tensor(len(groups), device=device)))
            if kept == config.questions or rounds == config.dynamic_rounds:
                break

        # ---- Reward and advantage --------------------------------------------------------------------------
        rewards = group_rewards(groups, config)  # each (N, m, z)
        advantages = group_advantages(rewards["total"].flatten(1), config.std_norm)  # (N, G)
        rows = [row for group in groups for row in group.rows]
        prompts = [group.problem["prompt"] for group in groups]
        for n, group in enumerate(groups):
            for row in group.rows:
                row.prompt = n

        # ---- Old and reference logprobs --------------------------------------------------------------------
        began = time.time()
        order = list(range(len(rows)))
        random.Random(f"{config.seed} {step} {rank()}").shuffle(order)
        flat = advantages.flatten().tolist()
        minis = [[order[i] for i in range(part, len(order), config.mini_batches)] for part in range(config.mini_batches)]
        minis = [make_micros([rows[i] for i in mini], prompts, [flat[i] for i in mini], config, device) for mini in minis]
        inner_steps = config.epochs * config.mini_batches
        for mini in minis:
            if inner_steps > 1:
                for micro, logprobs in zip(mini, score(model, mini, config.temperature)):
                    micro.old_logprobs = logprobs
            if reference is not None:
                for micro, logprobs in zip(mini, score(reference, mini, config.temperature)):
                    micro.ref_logprobs = logprobs

        # ---- Update ----------------------------------------------------------------------------------------
        updates = [update(model, optimizer, mini, config, lr) for _ in range(config.epochs) for mini in minis]
        seconds["update"] = time.time() - began

        # ---- Log -------------------------------------------------------------------------------------------
        state["step"], last = step, step == config.steps
        metrics = {"step": step, **rollout_metrics(groups, rewards, device)}
        metrics.update({name: sum(u[name] for u in updates) / len(updates) for name in updates[0]})
        metrics["sampler_gap"] = updates[0]["sampler_gap"]  # later inner steps have moved away from the sampler
        if metrics["sampler_gap"] > MAX_SAMPLER_GAP:
            print0(f"warning: sampler and trainer differ by {metrics['sampler_gap']:.2g} nats a token: does the sampler "
                   "hold old weights, or compute something else?")
        stats = grader_stats(reset=True)
        counts = all_sum(torch.tensor([float(stats[name]) for name in GRADER_COUNTS], device=device))
        metrics.update({f"grader_{name}": int(count) for name, count in zip(GRADER_COUNTS, counts.tolist())})
        metrics.update(lr=lr, rounds=rounds, skipped=sum(not math.isfinite(u["grad_norm"]) for u in updates))
        state["skipped"] = state["skipped"] + 1 if metrics["skipped"] else 0
        if held_out and config.eval_every and (step % config.eval_every == 0 or last):
            metrics["eval_accuracy"] = held_out_accuracy()
            grader_stats(reset=True)
        metrics.update({f"seconds_{name}": value for name, value in seconds.items()}, seconds=time.time() - started)
        tokens = all_sum(torch.tensor(float(rewards["lengths"].sum()), device=device))
        metrics["tokens_per_s"] = float(tokens) / metrics["seconds"]
        checkpoints.log("metrics.jsonl", [metrics])
        log(metrics)
        bar.update()
        names = ("reward", "accuracy", "eval_accuracy", "kl", "clip_frac", "entropy", "completion_tokens", "truncated",
                 "zero_variance", "grad_norm", "tokens_per_s", "seconds")
        print0(f"step {step}/{config.steps}  " + "  ".join(f"{n} {metrics[n]:.3g}" for n in names if n in metrics))
        if config.show_every and (step % config.show_every == 0 or last):
            for mini in minis:
                note_tokens(mini)
            records = gather0([rollout_record(step, group, rewards, advantages, n,
                                              tokenizer if n < config.show_tokens else None)
                               for n, group in enumerate(groups)])
            checkpoints.log("rollouts.jsonl", records)
            if records:
                show_record(records[0])
        checkpoints.after_step(state, last, stop)

    bar.close()
    checkpoints.save("model")
    checkpoints.poll(wait=True)


if __name__ == "__main__":
    guarded(main)
