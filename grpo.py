"""Stage 2, PTA-GRPO: reinforcement learning of plan, think, answer (arXiv 2510.01833, 3.2).

One step of the main loop, for each of N questions:

    1. sample m plans and continue each with z chains of thought (CoTs): G = m z completions
    2. score each plan by the share of its CoTs that are right; reward it with a softmax    Eq. 2
    3. reward     R = outcome + beta * plan + structure + length                            Eqs. 3-8
    4. advantage  A = (R - mean) / std, over the question's G completions                   Eq. 10
                  (--credit segment: plans and CoTs have a baseline each)
    5. update     clipped policy-gradient loss on every completion token, plus a KL term    Eq. 9

GRPO, DAPO and Dr. GRPO are settings of this loop (recipes/). It departs from the paper once: the
loss is divided by the token count of the whole step (`--loss_agg constant` is Eq. 9 over a fixed
length). docs/choices.md lists our choices where the paper is silent. docs/grpo_in_100_lines.py has
the same loop without plans, and without what makes it fast: read it first.

    torchrun --nproc_per_node=8 grpo.py                                                  8 GPUs
    python grpo.py --model runs/demo/sft/model --data toy --max_completion_tokens 128    one CPU

Shapes: N questions on this rank, m plans, z CoTs per plan, G = m z; B sequences of up to T tokens;
V vocabulary. Logprobs and masks are (B, T-1): column t is about token t+1.
"""

import plumbing.threads  # noqa: F401 -- before torch, which reads what it sets

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from data.sources import draw, load_questions
from data.verifiers import plan_leaks, plan_revision, reading, tally, verify
from data.worlds import replies
from model_utils import (
    completion_texts,
    encode_question,
    find_stop_ids,
    load_sharded,
    load_tokenizer,
    lr_at,
    make_optimizer,
    optimizer_step,
    plan_marks,
    unsharded,
)
from plumbing.attention import Packed, micro_batches, pack
from plumbing.balance import balance
from plumbing.calls import check_tools, own_ids
from plumbing.decoder import Decoder, without_autograd
from plumbing.flags import TrainingFlags, parse_config
from plumbing.images import open_album, show
from plumbing.log import SHOWN, rollout_records, step_metrics
from plumbing.memory import dry_run_rl
from plumbing.plans import credit_metrics, plan_metrics, sibling_weight
from plumbing.ranks import all_sum, print0, rank, require, world_size
from plumbing.revision import call_metrics
from plumbing.run import Run
from plumbing.signals import guarded
from plumbing.thin import check_tp, in_lockstep, shared_draw
from rewards import overlong_penalty, total_reward


@dataclass
class Config(TrainingFlags):
    model: str = "runs/sft/model"  # policy to start from, and KL reference: a folder or a hub id
    data: str = "zwhe99/DeepMath-103K"  # JSONL path, toy[:split], or a name of data/README.md
    out: str = "runs/pta"  # run folder: metrics.jsonl, rollouts.jsonl, run.json, step_*/, model/
    # the algorithm
    steps: int = 350  # rollout steps (>= 1)
    questions: int = 128  # questions per step, over all ranks (>= 1)
    plans: int = 4  # m: plans per question (>= 2)
    cots: int = 3  # z: CoTs per plan (>= 1)
    beta: float = 0.5  # weight of the plan reward (Eq. 4)
    tau: float = 1.0  # temperature of the softmax over plan scores (Eq. 2) (> 0)
    alpha: float = 0.1  # size of the length reward (Eq. 8); 0: none
    structure: float = 0.2  # size of the structure reward (Eq. 6); 0: none
    correct_only: bool = False  # give the length reward to right completions only
    evaluated: bool = True  # an answer less evaluated than its gold is wrong: docs/judging.md
    overlong_buffer: int = 0  # DAPO: penalise this many tokens before the limit; 0: none
    std_norm: bool = True  # divide advantages by the group's std (Eq. 10); false: Dr. GRPO
    std_of: Literal["total", "outcome"] = "total"  # std of the total (segment: without plan reward)
    credit: Literal["group", "segment"] = "group"  # one baseline per question, or plans' and CoTs'
    within: str = "auto"  # segment: weight of a CoT's siblings in its baseline, 0 to 1, or auto
    loss_agg: Literal["token", "sequence", "constant"] = "token"  # denominator: see token_weights
    clip_low: float = 0.2  # clip the ratio below 1 - clip_low (<= 1)
    clip_high: float = 0.2  # clip the ratio above 1 + clip_high (DAPO: 0.28)
    kl_coef: float = 0.01  # weight of the KL term; 0 loads no reference model
    kl_ratio: bool = True  # KL estimate: ratio times k3; false: k3 alone, as in the first GRPO
    dynamic_sampling: bool = False  # DAPO: replace groups that are all right or all wrong
    dynamic_rounds: int = 4  # with dynamic sampling, at most this many rollouts per step (>= 1)
    mask_truncated: bool = False  # no loss on completions (not plans) that were cut at their limit
    epochs: int = 1  # passes over a step's completions; one update in all never clips (>= 1)
    mini_batches: int = 1  # optimiser steps per pass (>= 1)
    lr: float = 1e-6  # peak learning rate
    warmup_steps: int = 0  # linear warm-up; in a run of no more steps, a tenth of them
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate
    # sampling
    temperature: float = 1.0  # of the rollout; divides the logits in the loss, too (> 0)
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out, and counted (>= 1)
    max_plan_tokens: int = 512  # a longer plan gets no CoT; 0: no plan phase (needs --cots 1)
    max_completion_tokens: int = 3584  # plan and CoT together: 3.5K (>= 1)
    rollout_rows: int = 0  # sequences decoded at once per rank; 0: as many as fit in memory
    tp: int = 1  # so many ranks share the sampling model's heads, for large models (>= 1)
    tools: tuple = ()  # calls that are answered in the think block: calculator, python
    # data, evaluation, logs
    limit: int = 60000  # use a random subset of the data of this size; 0: all
    eval_data: str = ""  # held-out problems, as --data; empty: drawn from --data
    eval_size: int = 200  # held-out problems, drawn by seed; at most a tenth of --data; 0: none
    eval_every: int = 25  # steps between evaluations; 0: none
    show_every: int = 10  # steps between printed and logged rollouts; 0: none
    token_log_questions: int = 16  # in a logged step, questions per rank whose tokens carry figures
    save_every: int = 50  # steps between checkpoints; 0: only the model at the end

    def check(self):
        """Refuse what cannot work. The default plan limit is cut to half the completion limit."""
        if self.max_plan_tokens == Config.max_plan_tokens:
            self.max_plan_tokens = min(self.max_plan_tokens, self.max_completion_tokens // 2)
        ranks = world_size()
        rows = self.questions // ranks * self.plans * self.cots  # completions of this rank
        require(self.questions % ranks == 0, f"--questions must be a multiple of the {ranks} ranks")
        require(rows % self.mini_batches == 0, f"--mini_batches must divide {rows}, a rank's rows")
        share = self.within == "auto" or re.fullmatch(r"0?\.\d+|[01](\.0*)?", self.within)
        require(share, f"--within wants a number from 0 to 1, or auto, not {self.within!r}")
        plan, limit = self.max_plan_tokens, self.max_completion_tokens
        require(plan or self.cots == 1, "--max_plan_tokens 0 samples no plans: set --cots 1")
        require(plan < limit, "--max_plan_tokens must be below --max_completion_tokens")
        require(self.overlong_buffer <= limit, "--overlong_buffer is above the completion limit")
        check_tp(self)
        check_tools(self.tools, self.tp)


# --------------------------------------------------------------------------------------------------
# Sampling

@dataclass
class Rollout:
    """One sampled sequence: a completion, or a plan that its z completions will replace."""
    prompt: list[int]  # token ids
    limits: list[int]  # token limit of each completion that comes of it: z for a plan, else one
    ids: list[int] = field(default_factory=list)  # completion tokens so far, stop token included
    logprobs: list[float] = field(default_factory=list)  # the sampler's, one per token
    is_plan: bool = False  # still a plan; in a finished tree, one that opened and never closed
    plan_tokens: int = 0  # length of the plan at the head of ids, once it has closed
    cots: list["Rollout"] = field(default_factory=list)  # the completions that a closed plan became
    stopped: bool = False  # ended by a stop token, not by a limit
    slot: int = -1  # where the decoder keeps its keys and values
    number: int = 0  # its place among the completions of the call; of a plan, that of its last CoT
    # of tools (plumbing/calls.py)
    forced: list[int] = field(default_factory=list)  # a reply's tokens that are still to be fed
    given: list[int] = field(default_factory=list)  # places in ids of replies: nobody chose them
    calls: int = 0  # calls that were answered
    # known after grading
    text: str = ""
    correct: bool = False
    well_formed: bool = False
    leaks: bool = False  # the plan gives the answer away
    forged: bool = False  # it wrote a tool's reply itself
    revision: tuple | None = None  # whether its plan was wrong, and was left; None: unknown
    plan_advantage: float = 0.0  # of the tokens of a plan that closed
    advantage: float = 0.0  # of the others
    # for the log, one value per token
    entropy: list[float] = field(default_factory=list)  # of the policy
    log_ratio: list[float] = field(default_factory=list)  # of policy and reference
    said: list[list[int]] = field(default_factory=list)  # from, to in text: what tools said

    def fork(self) -> list["Rollout"]:
        """The z completions that continue a closed plan: each starts as a copy of it."""
        for number, limit in enumerate(self.limits, self.number - len(self.limits) + 1):
            cot = Rollout(self.prompt, [limit], list(self.ids), list(self.logprobs))
            cot.plan_tokens, cot.slot, cot.number = len(self.ids), self.slot, number
            self.cots.append(cot)
        return [cot for cot in self.cots if len(cot.ids) < cot.limits[0]]


def keep_top_p(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of likeliest tokens that holds `top_p` of the mass. (B, V)"""
    ordered, order = probs.topk(min(512, probs.shape[-1]))  # much faster than a sort
    if bool((ordered.sum(-1) < top_p).any()):  # a flat distribution
        ordered, order = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass before the token: the first one stays
    return torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))


def draw_tokens(probs: torch.Tensor, generator) -> torch.Tensor:
    """A token per row by inverse CDF, with one uniform number per row. (B, V) -> (B,)

    First a block of tokens is drawn by its mass, then a token inside it. In float64, and with short
    sums, so that tokens of tiny probability keep theirs.
    """
    size = min(512, probs.shape[1])  # of a block
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % size)).unflatten(1, (-1, size))
    mass = blocks.sum(-1, dtype=torch.float64)  # (B, V / size)
    ends = mass.cumsum(-1)
    place = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64, device=probs.device)
    place = place * ends[:, -1:]
    block = torch.searchsorted(ends, place, right=True).clamp_max(mass.shape[1] - 1)  # (B, 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size))[:, 0].double().cumsum(-1)
    place = place - (ends.gather(1, block) - mass.gather(1, block))
    token = torch.searchsorted(inside, place.clamp_max(inside[:, -1:] * (1 - 1e-12)), right=True)
    return (block * size + token)[:, 0].clamp_max(probs.shape[1] - 1)  # NaN would lead beyond


def sample_token(logits: torch.Tensor, temperature: float, top_p: float, generator):
    """Draw a token per row: logits (B, V) -> tokens (B,), their logprobs (B,) before top-p."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        probs = logprobs.exp() if top_p >= 1 else keep_top_p(logprobs.exp(), top_p)
        tokens = draw_tokens(probs, generator)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


@without_autograd
def decode(
    model, rollouts: list[Rollout], *, temperature: float, top_p: float, stop_ids: list[int],
    seed: int, max_rows: int = 0, plan_closed: Callable = None, max_plan_tokens: int = 0,
    plan_opened: Callable = lambda ids: True, respond: Callable = None,
):
    """Decode `rollouts` to their ends, one token of every active rollout at a time.

    When a plan closes (`plan_closed(ids)`), its z completions take its place. They keep its token
    ids and a copy of its keys and values, so no plan is decoded or encoded twice. A plan of
    `max_plan_tokens` ends: an endless plan gets no CoT. `respond(rollouts)` may queue a reply to
    the last token of any (plumbing/calls.py): it is fed next, in place of what would be sampled.
    """
    generator = torch.Generator(model.device).manual_seed(seed)  # sampling has an RNG of its own
    decoder, active = Decoder(model, rollouts, max_rows), []
    draw = shared_draw(model, sample_token)  # sample_token itself, but for --tp
    while active := decoder.admit(active):  # as many of the waiting ones as there is room for
        logits = decoder.step(active)  # (B, V)
        tokens, logprobs = draw(logits, temperature, top_p, generator)  # (B,), (B,)
        alive = []
        for rollout, token, logprob in zip(active, tokens.tolist(), logprobs.tolist()):
            if said := bool(rollout.forced):
                token, logprob = rollout.forced.pop(0), 0.0
                rollout.given.append(len(rollout.ids))
            rollout.ids.append(token)
            rollout.logprobs.append(logprob)
            rollout.stopped = token in stop_ids and not said
            if rollout.stopped or len(rollout.ids) >= max(rollout.limits):
                rollout.is_plan = rollout.is_plan and plan_opened(rollout.ids)
            elif not rollout.is_plan:
                alive.append(rollout)
            elif plan_closed(rollout.ids):
                alive += rollout.fork()
            elif len(rollout.ids) < max_plan_tokens:
                alive.append(rollout)
            elif not plan_opened(rollout.ids):  # a completion without a plan has no plan limit
                rollout.is_plan = False
                alive.append(rollout)
        if respond is not None:
            respond(alive)
        active = decoder.keep(alive)


def sample(
    model, prompts: list[list[int]], *, n: int = 1, max_new_tokens: int | list[int],
    temperature: float = 1.0, top_p: float = 1.0, stop_ids: list[int], seed: int = 0,
    max_rows: int = 0, respond: Callable = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample `n` completions of every prompt, without a plan phase.

    `prompts`: token ids; `max_new_tokens`: one limit, or one per completion (prompt-major);
    temperature 0 is greedy. Returns (ids, logprobs), two lists of len(prompts) * n lists: a sampled
    stop id is kept, logprobs are those before top-p. ValueError: empty prompt, limit below 1.
    """
    count = len(prompts) * n
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * count
    if len(limits) != count or not prompts or min(limits) < 1 or not all(prompts):
        raise ValueError("sample wants non-empty prompts and a positive limit per completion")
    rollouts = [Rollout(prompts[i // n], [limit], number=i) for i, limit in enumerate(limits)]
    options = dict(temperature=temperature, top_p=top_p, stop_ids=stop_ids, seed=seed)
    decode(model, rollouts, max_rows=max_rows, respond=respond, **options)
    return [r.ids for r in rollouts], [r.logprobs for r in rollouts]


@in_lockstep  # with --tp
def sample_tree(
    model, prompts: list[list[int]], config, *, plan_closed: Callable, stop_ids: list[int],
    seed: int, plan_opened: Callable = lambda ids: True, top_p: float = 1.0,
    respond: Callable = None,
) -> list[list[Rollout]]:
    """m plans per prompt and z CoTs per plan: N lists of G = m z finished rollouts, plan-major.

    `config`: this stage's Config or eval.py's. A plan that never closes gets no CoT. It fills its z
    places itself, as a malformed completion, and so does a completion without a plan.
    """
    m, z, planning = config.plans, config.cots, config.max_plan_tokens > 0
    limits = [config.max_completion_tokens] * z
    roots = [Rollout(prompt, limits, is_plan=planning) for prompt in prompts for _ in range(m)]
    for i, root in enumerate(roots):
        root.number = i * z + z - 1
    options = dict(temperature=config.temperature, top_p=top_p, stop_ids=stop_ids, seed=seed)
    options |= dict(plan_closed=plan_closed, plan_opened=plan_opened)
    options |= dict(max_plan_tokens=config.max_plan_tokens, max_rows=config.rollout_rows)
    decode(model, roots, respond=respond, **options)
    leaves = [root.cots or [root] * z for root in roots]  # (N m) lists of z
    return [sum(leaves[i:i + m], []) for i in range(0, len(leaves), m)]


# --------------------------------------------------------------------------------------------------
# Rewards and advantages

@dataclass
class Group:
    """A question and its G = m z completions, plan-major."""
    question: dict  # problem record with `prompt` ids
    rollouts: list[Rollout]
    place: tuple[int, int] = (0, 0)  # the rank that sampled it, and its number there


def grade_groups(
    tokenizer, groups: list[Group], stop_ids: list[int], *, salt: str = "", evaluated: bool = False,
    tools: tuple = (),
):
    """Fill in text, well_formed, leaks, correct, forged and revision of every completion.

    `salt` is this rollout's own: verifiers that draw a world per completion draw it from there.
    `evaluated` is --evaluated, `tools` is --tools. Only a completion's own tokens are judged.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    texts = completion_texts(tokenizer, [r.ids for r in rollouts], stop_ids)
    questions = [group.question for group in groups for _ in group.rollouts]
    own, answers = texts, []
    if any(r.given for r in rollouts):
        own = completion_texts(tokenizer, [own_ids(r.ids, r.given) for r in rollouts], stop_ids)
    salts = [f"{salt} {i}" for i in range(len(rollouts))]
    for i, (rollout, question) in enumerate(zip(rollouts, questions)):
        blocks, answer, rollout.forged = reading(question, own[i], tools)
        rollout.text, rollout.well_formed = texts[i], blocks is not None
        rollout.leaks = bool(blocks and plan_leaks(question, blocks.plan))
        rollout.revision = plan_revision(question, blocks, answer, salts[i])
        answers.append(answer)
    for rollout, right in zip(rollouts, verify(questions, answers, salts, evaluated)):
        rollout.correct = right


def group_rewards(groups: list[Group], config: Config) -> dict[str, torch.Tensor]:
    """The reward terms of Eqs. 2-8 (and DAPO's), their total, verdicts, lengths. Each (N, m, z)."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    shape = (len(groups), config.plans, config.cots)
    correct = torch.tensor([r.correct for r in rollouts], dtype=torch.bool).reshape(shape)
    well_formed = torch.tensor([r.well_formed for r in rollouts], dtype=torch.bool).reshape(shape)
    count = lambda lengths: torch.tensor(list(lengths), dtype=torch.long).reshape(shape)
    lengths = count(len(r.ids) - len(r.given) for r in rollouts)  # the length reward is about these
    names = ("beta", "tau", "alpha", "structure", "correct_only")
    options = {name: getattr(config, name) for name in names}
    rewards = total_reward(correct, well_formed, lengths, **options)
    if config.overlong_buffer:
        # What was cut has met its limit, and so has a plan that was cut at its own.
        limit, cut = config.max_completion_tokens, torch.tensor([not r.stopped for r in rollouts])
        met = count(len(r.ids) for r in rollouts).masked_fill(cut.reshape(shape), limit)
        rewards["overlong"] = overlong_penalty(met, limit, config.overlong_buffer)
        rewards["total"] = rewards["total"] + rewards["overlong"]
    return {**rewards, "correct": correct, "well_formed": well_formed, "lengths": lengths}


def group_std(rewards: torch.Tensor) -> torch.Tensor:
    """Population std of each group, or 1 where it is 0. (N, G) -> (N, 1)"""
    std = (rewards - rewards.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
    return std.masked_fill(std < 1e-6, 1.0)


def group_advantages(
    rewards: torch.Tensor, std_norm: bool = True, std_of: torch.Tensor = None
) -> torch.Tensor:
    """A = (R - mean) / std over each group, population std (Eq. 10). (N, G) -> (N, G)

    All m z completions of a question share one baseline. `std_norm=False` leaves out the division
    by std, which favours questions nearly always or never solved (Dr. GRPO, arXiv 2503.20783).
    `std_of` (N, G): divide by the std of these instead; a group of equal ones is not divided.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if std_norm:
        centred = centred / group_std(rewards if std_of is None else std_of)
    # Equal rewards must give exactly 0. Rounding leaves about 1e-8, which Adam would scale up.
    equal = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) < 1e-6
    return centred.masked_fill(equal, 0.0)


def segment_advantages(
    returns: torch.Tensor, plan_bonus: torch.Tensor, within: float | None, std_norm: bool,
    std_of: torch.Tensor = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of plan tokens (N, m) and of CoT tokens (N, m, z): each has its own baseline.

    `returns` (N, m, z) without the plan reward; `plan_bonus` (N, m) goes to plan tokens only.
    V_i is the mean return of plan i's CoTs. A plan is compared with the question's other plans:
        A_plan_i = V_i - mean of V_j over j != i  (+ bonus)
    A CoT is compared with its siblings, weight w = `within`, and with the other plans:
        A_cot_ik = r_ik - w mean of r_il over l != k  - (1 - w) mean of V_j over j != i
    Each baseline leaves out what it judges. So the gradient is unbiased for every m >= 2, z >= 1
    and w that does not depend on these returns. (Eq. 10's shared mean scales plan tokens by
    (m - 1) / m and CoT tokens by (m z - 1) / (m z).) Three settings void this: the division by the
    question's std, of returns or of `std_of` (N, m, z); a length reward, since T and T_max make a
    return depend on the other completions; and a --loss_agg other than constant, which divides by
    lengths that were drawn. `within` None counts all other completions the same. With z = 1 both
    are RLOO (arXiv 2402.14740). ValueError: m < 2.
    """
    _, m, z = returns.shape
    if m < 2:
        raise ValueError("segment_advantages wants at least 2 plans: one has no baseline")
    w = 0.0 if z == 1 else (z - 1) / (m * z - 1) if within is None else within
    values = returns.mean(2)  # (N, m)
    others = (values.sum(1, keepdim=True) - values) / (m - 1)  # (N, m)
    siblings = (returns.sum(2, keepdim=True) - returns) / max(z - 1, 1)  # (N, m, z)
    plan, cot = values - others, returns - w * siblings - (1 - w) * others[:, :, None]
    equal = returns.amax((1, 2)) - returns.amin((1, 2)) < 1e-6  # (N,): no rounding residue, either
    plan = plan.masked_fill(equal[:, None], 0.0) + plan_bonus
    cot = cot.masked_fill(equal[:, None, None], 0.0)
    if std_norm:
        std = group_std((returns if std_of is None else std_of).flatten(1))  # (N, 1)
        plan, cot = plan / std, cot / std[:, :, None]
    return plan, cot


def advantages(
    rewards: dict[str, torch.Tensor], config: Config, within: float, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of each completion's plan tokens and of its CoT tokens, (N, m, z) each.

    With --credit group both are equal, and hold the plan reward; with segment it is on plan tokens
    only, centred. `beta` is its weight: --beta, or 0 to see what it changes.
    """
    returns = rewards["total"] - config.beta * rewards["plan"]  # without the plan reward
    plan = beta * rewards["plan"]
    std_of = rewards["outcome"] if config.std_of == "outcome" else None
    if config.credit == "group":
        std_of = None if std_of is None else std_of.flatten(1)
        both = group_advantages((returns + plan).flatten(1), config.std_norm, std_of)  # (N, G)
        return both.reshape(returns.shape), both.reshape(returns.shape)
    bonus = plan[:, :, 0] - plan[:, :, 0].mean(1, keepdim=True)  # (N, m)
    bonus = bonus.masked_fill(bonus.abs() < 1e-6, 0.0)  # equal scores
    plan, cot = segment_advantages(returns, bonus, within, config.std_norm, std_of)
    return plan[:, :, None].expand_as(cot), cot


def note_advantages(rollouts: list[Rollout], plan: torch.Tensor, cot: torch.Tensor):
    """Give N m z completions the advantages of their plan and CoT tokens, (N, m, z) each.

    A plan that never closed has no CoT: all of its tokens are plan tokens.
    """
    for r, a_plan, a_cot in zip(rollouts, plan.flatten().tolist(), cot.flatten().tolist()):
        r.plan_advantage = a_plan
        r.advantage = a_cot if r.plan_tokens else a_plan


# --------------------------------------------------------------------------------------------------
# Loss: pure tensor functions

def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
    mask: torch.Tensor, clip_low: float, clip_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped loss -min(rho A, clip(rho, 1 - low, 1 + high) A) of each token (Eq. 9).

    logprobs, old_logprobs, mask: (B, T-1); advantages: (B,) or (B, T-1). Returns the loss
    (B, T-1), not averaged, 0 outside the mask; and metrics summed over tokens: clip_frac counts
    the tokens whose gradient the clip cuts off.
    """
    advantages = advantages.reshape(len(mask), -1)
    # Mask before exp: padding would give inf, and 0 * inf is NaN in the backward pass.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).float().exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return loss * mask, {"clip_frac": ((ratio * advantages > clipped * advantages) & mask).sum()}


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, old_logprobs=None) -> torch.Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref): r - 1 - log r with r = pi_ref / pi. (B, T-1)

    Alone, its value is unbiased on policy only, and its gradient is that of the forward KL. Times
    pi / pi_old, not detached, value and gradient are those of KL(pi || pi_ref), off policy, too
    (arXiv 2506.09477). That needs `old_logprobs`.
    """
    log_ratio = (ref_logprobs - logprobs).float()
    k3 = log_ratio.exp() - 1 - log_ratio  # 0 outside the mask, where all logprobs are 0
    return k3 if old_logprobs is None else (logprobs - old_logprobs).float().exp() * k3


def token_weights(
    mask: torch.Tensor, loss_agg: str, tokens: int, sequences: int, max_tokens: int
) -> torch.Tensor:
    """The weight of each token's loss. mask (B, T-1) -> (B, T-1)

    Count `tokens` and `sequences` over the whole optimiser step, all micro-batches and ranks,
    before the first backward pass: then the gradient depends on neither's number.
    """
    mask = mask.float()
    if loss_agg == "token":  # every token counts the same: long completions weigh more
        return mask / tokens
    if loss_agg == "sequence":  # every completion counts the same: a token of a long one less
        return mask / mask.sum(1, keepdim=True).clamp_min(1) / sequences
    return mask / (sequences * max_tokens)  # constant: Eq. 9's token sum over a fixed length


# --------------------------------------------------------------------------------------------------
# Update

@dataclass
class MicroBatch:
    """The rollouts of one forward and backward pass: B sequences of up to T tokens."""
    rollouts: list[Rollout]
    packed: Packed
    advantages: torch.Tensor  # (B, T-1)
    sampler_logprobs: torch.Tensor  # (B, T-1)
    weights: torch.Tensor = None  # (B, T-1)
    old_logprobs: torch.Tensor = None  # (B, T-1) of the policy that sampled; None: the current ones
    ref_logprobs: torch.Tensor = None  # (B, T-1) of the KL reference
    entropy: torch.Tensor = None  # (B, T-1) at the first pass, for the log


def make_micro_batches(rollouts: list[Rollout], config: Config, device) -> list[MicroBatch]:
    """The micro-batches of one optimiser step, weights included; equally many on every rank."""
    sequences, micros = [r.prompt + r.ids for r in rollouts], []
    for part in micro_batches(sequences, config.tokens_per_micro_batch, device):
        chosen, rows = [rollouts[i] for i in part], [sequences[i] for i in part]
        # The loss begins after the prompt, or nowhere for a completion that is left out of it. A
        # plan that never closed stays in: it is wrong for certain, and must be learned from.
        left_out = [config.mask_truncated and not r.stopped and not r.is_plan for r in chosen]
        starts = [len(r.prompt) + (len(r.ids) if out else 0) for r, out in zip(chosen, left_out)]
        said = [[len(r.prompt) + place for place in r.given] for r in chosen]
        packed = pack(rows, starts, device, given=said)
        sampler, credit = torch.zeros(packed.mask.shape), torch.zeros(packed.mask.shape)
        for i, r in enumerate(chosen):
            first = len(r.prompt) - 1  # the column of the first completion token
            sampler[i, first:len(rows[i]) - 1] = torch.tensor(r.logprobs)
            credit[i, first:] = r.advantage
            credit[i, first:first + r.plan_tokens] = r.plan_advantage
        micros.append(MicroBatch(chosen, packed, credit.to(device), sampler.to(device)))
    tokens = sum(int(micro.packed.mask.sum()) for micro in micros)
    counts = all_sum(torch.tensor([tokens, len(rollouts)], device=device)).clamp_min(1).tolist()
    limit = config.max_completion_tokens
    for micro in micros:
        micro.weights = token_weights(micro.packed.mask, config.loss_agg, *counts, limit)
    return micros


@torch.no_grad()
def all_logprobs(model, micros: list[MicroBatch], temperature: float) -> list[torch.Tensor]:
    """Logprobs (B, T-1) of every micro-batch, without gradients."""
    logprobs = [model.token_logprobs(micro.packed, temperature)[0] for micro in micros]
    if hasattr(model, "reshard"):  # FSDP2 keeps the root gathered for a backward pass: none comes
        model.reshard()
    return logprobs


def make_mini_batches(model, reference, rollouts: list[Rollout], config: Config) -> list[list]:
    """For each optimiser step of a pass its micro-batches, with old and reference logprobs."""
    parts = [rollouts[i::config.mini_batches] for i in range(config.mini_batches)]
    minis = [make_micro_batches(part, config, model.compute_device) for part in parts]
    for mini in minis:
        if config.epochs * config.mini_batches > 1:  # the policy will move before all are used
            for micro, logprobs in zip(mini, all_logprobs(model, mini, config.temperature)):
                micro.old_logprobs = logprobs
        if reference is not None:
            for micro, logprobs in zip(mini, all_logprobs(reference, mini, config.temperature)):
                micro.ref_logprobs = logprobs
    return minis


def update(model, optimizer, micros: list[MicroBatch], config: Config, lr: float) -> dict:
    """One optimiser step (Eq. 9). Returns its loss, token means over all ranks, gradient norm."""
    names = ("loss", "kl", "clip_frac", "entropy", "sampler_gap", "tokens")
    sums = torch.zeros(len(names), device=model.compute_device)
    for micro in micros:
        mask = micro.packed.mask
        logprobs, entropy = model.token_logprobs(micro.packed, config.temperature)  # (B, T-1)
        # A policy that has not moved yet has these as its old logprobs. Computing them a second
        # time at another batch shape would add bf16 noise to the ratio.
        old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
        clip = config.clip_low, config.clip_high
        loss, metrics = policy_loss(logprobs, old, micro.advantages, mask, *clip)
        ref, sampled = micro.ref_logprobs, old if config.kl_ratio else None
        kl = torch.zeros_like(loss) if ref is None else kl_k3(logprobs, ref, sampled)
        loss = ((loss + config.kl_coef * kl) * micro.weights).sum()
        (loss * world_size()).backward()  # FSDP averages gradients over ranks; this loss is a sum
        micro.entropy = entropy if micro.entropy is None else micro.entropy
        gap = (logprobs.detach() - micro.sampler_logprobs).abs()
        sums += torch.stack([
            loss.detach(), (kl.detach() * mask).sum(), metrics["clip_frac"].float(),
            (entropy * mask).sum(), (gap * mask).sum(), mask.sum().float(),
        ])
    sums = dict(zip(names, all_sum(sums).tolist()))
    tokens = max(sums.pop("tokens"), 1)
    means = {name: total if name == "loss" else total / tokens for name, total in sums.items()}
    return {**means, "grad_norm": optimizer_step(model, optimizer, lr, config.max_grad_norm)}


# --------------------------------------------------------------------------------------------------
# Main

def greedy_accuracy(model, tokenizer, problems: list[dict], config: Config) -> float:
    """The share of held-out problems answered right, greedily. A collective."""
    mine, right, stop_ids = problems[rank()::world_size()], 0, find_stop_ids(model, tokenizer)
    opened, closed = plan_marks(tokenizer)
    greedy = replace(config, plans=1, cots=1, temperature=0.0)
    show(tokenizer, [p["prompt"] for p in mine], model)
    with unsharded(model, config.tp) as sampler:
        if mine or config.tp > 1:
            options = dict(plan_opened=opened, plan_closed=closed, stop_ids=stop_ids, seed=0)
            options["respond"] = replies(tokenizer, mine, greedy, stop_ids)
            trees = sample_tree(sampler, [p["prompt"] for p in mine], greedy, **options)
            groups = [Group(problem, tree) for problem, tree in zip(mine, trees)]
            grade_groups(tokenizer, groups, stop_ids, tools=config.tools)
            right = sum(group.rollouts[0].correct for group in groups)
    tally()  # a step counts its own rollouts
    return float(all_sum(torch.tensor(right, device=model.device))) / len(problems)


def sample_groups(run: Run, model, tokenizer, problems: list[dict], config: Config) -> list[Group]:
    """This rank's share of the next --questions questions, each with its graded plan tree."""
    first, stop_ids = run.state["cursor"], find_stop_ids(model, tokenizer)
    run.state["cursor"] = end = first + config.questions
    questions = draw(problems, range(first + rank(), end, world_size()), config.seed)
    opened, closed = plan_marks(tokenizer)
    salt, tools = f"{config.seed} {end} {rank()}", config.tools
    seed = hash((config.seed, end, rank())) % 2**62  # of integers: the same in every process
    with run.timer("rollout"), unsharded(model, config.tp) as sampler:
        show(tokenizer, [q["prompt"] for q in questions], model)
        trees = run.unless_stopped(
            sample_tree, sampler, [q["prompt"] for q in questions], config, stop_ids=stop_ids,
            plan_opened=opened, plan_closed=closed, seed=seed,
            respond=replies(tokenizer, questions, config, stop_ids, lambda n: f"{salt} {n}"),
        )
    run.leave_if_asked()
    with run.timer("reward"):
        groups = [Group(question, rollouts) for question, rollouts in zip(questions, trees)]
        options = dict(salt=salt, evaluated=config.evaluated, tools=tools)
        grade_groups(tokenizer, groups, stop_ids, **options)
    return groups


def main():
    config = parse_config(Config)
    if config.dry_run:
        return dry_run_rl(config)
    tokenizer = load_tokenizer(config.model)
    open_album(tokenizer, config)
    encode = lambda problem: encode_question(tokenizer, problem, config.tools)
    problems, held_out = load_questions(config, encode)
    run, reference = Run(config), None
    model = load_sharded(config.model, run.device, config)
    if config.kl_coef:
        reference = load_sharded(config.model, run.device, config, frozen=True)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    # cursor: questions drawn so far; variances: running means of tau2 and sigma2, and their steps
    run.begin(model, tokenizer, optimizer, config.steps, cursor=0, variances=[0.0, 0.0, 0])
    if held_out and config.eval_every and run.state["step"] == 0:
        print0(f"step 0  eval_accuracy {greedy_accuracy(model, tokenizer, held_out, config):.3f}")

    while run.state["step"] < config.steps:
        step = run.start_step()

        # ---- Rollout -----------------------------------------------------------------------------
        sampled, groups, rounds, kept = [], [], 0, 0
        while kept < config.questions and rounds < config.dynamic_rounds:
            fresh = sample_groups(run, model, tokenizer, problems, config)
            sampled, rounds = sampled + fresh, rounds + 1
            if config.dynamic_sampling:  # groups that are all right or all wrong teach nothing
                fresh = [g for g in fresh if len({r.correct for r in g.rollouts}) == 2]
            groups = (groups + fresh)[:config.questions // world_size()]
            kept = int(all_sum(torch.tensor(len(groups), device=run.device)))
        groups, imbalance = balance(groups, config.cots)  # ranks train on about as many tokens

        # ---- Reward and advantage ----------------------------------------------------------------
        rewards = group_rewards(groups, config)  # each (N, m, z)
        within = sibling_weight(config, run.state["variances"])
        plan, cot = advantages(rewards, config, within, config.beta)  # (N, m, z) each
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        note_advantages(rollouts, plan, cot)

        # ---- Old and reference logprobs ----------------------------------------------------------
        random.Random(f"{config.seed} {step} {rank()}").shuffle(rollouts)  # so mini-batches mix
        with run.timer("update"):
            show(tokenizer, [rollout.prompt for rollout in rollouts], model, reference)
            minis = make_mini_batches(model, reference, rollouts, config)

        # ---- Update ------------------------------------------------------------------------------
        lr = lr_at(step - 1, config.steps, config.lr, run.warmup_steps, config.schedule)
        with run.timer("update"):
            updates = [update(model, optimizer, mini, config, lr) for mini in minis * config.epochs]

        # ---- Log ---------------------------------------------------------------------------------
        sampled_rewards = group_rewards(sampled, config)
        metrics = step_metrics(sampled, sampled_rewards, updates, run.device, first=step == 1)
        metrics |= {f"grader_{name}": count for name, count in tally().items()}
        metrics |= plan_metrics(sampled, sampled_rewards, run.state, run.device)
        metrics |= call_metrics(sampled, run.device)
        no_plan_reward = advantages(rewards, config, within, beta=0.0)
        metrics |= credit_metrics(rewards, (plan, cot), no_plan_reward, run.device)
        if held_out and run.is_due(config.eval_every):
            metrics["eval_accuracy"] = greedy_accuracy(model, tokenizer, held_out, config)
        run.log({**metrics, "lr": lr, "rounds": rounds, "imbalance": imbalance}, shown=SHOWN)
        if run.is_due(config.show_every):
            records = rollout_records(groups, rewards, minis, tokenizer, config.token_log_questions)
            run.write("rollouts.jsonl", records)
        run.end_step()
    run.finish()


if __name__ == "__main__":
    guarded(main)
