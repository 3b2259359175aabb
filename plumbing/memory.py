"""What fits on a GPU: an estimate of the memory that a step needs, from a model's config alone.

    python -m plumbing.memory                                   the table of recipes/memory.md
    python -m plumbing.memory --model MODEL --gpus 4 --gib 40   for another model, other GPUs

`--dry_run` of sft.py and grpo.py prints the same estimate for a run's own settings. The model is
made on the meta device, so nothing is downloaded but its config, and nothing is allocated.
Activations are what autograd saves, counted there for one block and for two. An attention kernel is
taken to save its inputs, its output and one float per row. Not counted are the CUDA context (about
0.5 GiB), communication buffers and fragmentation: keep a tenth free. bench/memory_plan.py compares
the estimate with measured updates.
"""

import copy
import dataclasses
import math
import os

import torch

from plumbing.decoder import SAMPLING_BYTES, cache_bytes
from plumbing.flags import parse_config
from plumbing.images import freeze_tower, tokens_at_most
from plumbing.ranks import print0, world_size
from plumbing.thin import thin_config
from plumbing.weights import load_config, model_class

# How many logits are computed at a time: 128 MiB in fp32, 512 MiB on a GPU. (Fewer chunks mean
# fewer additions in bf16 to the head's gradient.)
CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**27}

GIB = 1 << 30

# --------------------------------------------------------------------------------------------------
# Activations: what autograd saves


class Attention(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx, query, key, value):
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)  # as kernels do
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def count_attention(module, query, key, value, mask, **kwargs):
    return Attention.apply(query, key, value).transpose(1, 2), None


def make_empty(config, **options):
    """A model of this config on the meta device."""
    with torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=False, **options)


def saved_bytes(config, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that autograd saves in one forward pass of the decoder over one row of tokens."""
    from transformers import AttentionInterface

    AttentionInterface.register("counted", count_attention)
    model = make_empty(config, dtype=dtype, attn_implementation="counted").eval()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


def activation_bytes(config, tokens: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes of a micro-batch's activations in all blocks."""
    small, text, saved = copy.deepcopy(config), config.get_text_config(), []
    for layers in (1, 2):
        small.get_text_config().num_hidden_layers = layers
        saved.append(saved_bytes(small, tokens, dtype))
    block, rest, blocks = saved[1] - saved[0], 2 * saved[0] - saved[1], text.num_hidden_layers
    if not checkpointing:
        return rest + blocks * block
    inputs = blocks * tokens * text.hidden_size * dtype.itemsize
    return rest + inputs + block  # blocks are recomputed one at a time


def logprob_bytes(vocabulary: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a chunk of logits, when the backward pass recomputes it.

    These are log-softmax and two temporaries in fp32. Where the model computes in another dtype,
    the logits are there in that one, too.
    """
    fp32 = dtype == torch.float32
    chunk = min(max(1, CHUNK_LOGITS["cpu" if fp32 else "cuda"] // vocabulary), tokens)
    return chunk * vocabulary * (3 * 4 + (0 if fp32 else dtype.itemsize))


# --------------------------------------------------------------------------------------------------
# The estimate

GPU_SIZES = (80, 141)  # GiB of the GPUs that --dry_run speaks of: H100 and H200
ALWAYS = ("weights", "optimiser", "reference", "vision tower")
ROLLOUT = ("gathered for rollout", "KV cache", "sampling")
UPDATE = ("gradients", "activations", "logprobs", "gathered for update")


def estimate(
    config, *, ranks: int, rows: int, prompt_tokens: int, completion_tokens: int, micro_tokens: int,
    dtype: torch.dtype = torch.bfloat16, reference: bool = True, checkpointing: bool = False,
    cpu_offload: bool = False, tp: int = 1,
) -> dict[str, float]:
    """Bytes on each GPU: the parts named above, and the totals `rollout`, `update` and `peak`.

    `config` is the model's. `ranks` is the number of GPUs that the weights are cut over, `rows` the
    number of sequences decoded at once, of at most prompt + completion tokens each, `micro_tokens`
    the size of a micro-batch. With `tp` > 1 a group of so many GPUs decodes the `rows` together.
    Also returned are `row`, the bytes of one more row in a rollout, and `parameters`, their number.
    """
    model, sampler = make_empty(config), config if tp == 1 else thin_config(config, tp)
    tower = sum(p.numel() for p in freeze_tower(model) or ())  # whole on every GPU, in fp32
    count = sum(p.numel() for p in model.parameters()) - tower
    sampled = count if tp == 1 else sum(p.numel() for p in make_empty(sampler).parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.get_decoder().layers]
    block, root = blocks[0], count - sum(blocks)
    vocabulary, itemsize = config.get_text_config().vocab_size, dtype.itemsize
    row_cache = (prompt_tokens + completion_tokens) * cache_bytes(sampler, dtype)
    row_sampling = SAMPLING_BYTES * vocabulary
    on_gpu = 0 if cpu_offload else 1
    # On one CPU rank nothing is gathered: the weights themselves are used.
    gathered = 1 if dtype != torch.float32 or ranks > 1 else 0
    # Gathered at once in an update: the weights of the root's group and of two blocks; and the
    # gradients before they are reduced. The head's are there twice, as chunks are added up.
    at_once = itemsize * (root + 2 * block) + (2 * itemsize + 4) * max(root, block)
    parts = {
        "weights": on_gpu * 4 * count / ranks,
        "gradients": on_gpu * 4 * count / ranks,
        "optimiser": on_gpu * 8 * count / ranks,
        "reference": on_gpu * itemsize * count / ranks if reference else 0,
        "vision tower": 4 * tower,
        "gathered for rollout": gathered * itemsize * sampled,
        "KV cache": rows * row_cache,
        "sampling": rows * row_sampling,
        "activations": activation_bytes(config, micro_tokens, dtype, checkpointing),
        "logprobs": logprob_bytes(vocabulary, micro_tokens, dtype),
        "gathered for update": gathered * at_once,
    }
    # Rollout and update take turns: what one holds is freed before the other begins.
    rollout = sum(parts[name] for name in ALWAYS + ROLLOUT)
    update = sum(parts[name] for name in ALWAYS + UPDATE)
    totals = {"rollout": rollout, "update": update, "peak": max(rollout, update)}
    return {**parts, **totals, "row": row_cache + row_sampling, "parameters": count}


def rows_that_fit(parts: dict[str, float], gib: float) -> int:
    """How many rows a rollout may decode at once in 90 % of `gib` GiB."""
    without_rows = parts["rollout"] - parts["KV cache"] - parts["sampling"]
    return max(0, int((0.9 * gib * GIB - without_rows) // parts["row"]))


def largest_model(parts: dict[str, float], gib: float) -> float:
    """Parameters up to which a model fits into `gib` GiB, with one row at a time.

    A rollout holds, per parameter, the shares of weights, AdamW and reference, and the model that
    samples. An update holds gradients instead, and besides what grows with the root of a model's
    size, about as its width does.
    """
    room, always = 0.9 * gib * GIB, sum(parts.get(name, 0) for name in ALWAYS)
    rollout, update = always + parts["gathered for rollout"], always + parts["gradients"]
    beside = parts["update"] - update
    # The root x of the ratio to this model's size solves update x^2 + beside x = room.
    root = 2 * room / (beside + math.sqrt(beside**2 + 4 * update * room))
    return max(0.0, min((room - parts["row"]) / rollout, root**2)) * parts["parameters"]


def advice(parts: dict[str, float], without: dict[str, float], rows: int, gib: float) -> str:
    """What a GPU of `gib` GiB makes of a run. `without`: `parts` without checkpointing."""
    fit = rows_that_fit(parts, gib)
    waves = -(-rows // fit) if fit else 0
    rollout = f"{waves} wave{'s' * (waves > 1)} of up to {min(fit, rows)} rows"
    # plumbing/decoder.py: where it splits keys, an extent of the cache grows with its row.
    rollout += ", or fewer, as rows share room while they are short" * (waves > 1)
    rollout, limit = rollout if fit else "not one row fits", 0.9 * gib * GIB
    if without["update"] <= limit:
        update = "--activation_checkpointing false fits, and is faster"
    elif parts["update"] <= limit:
        update = "--activation_checkpointing is needed"
    else:
        update = "an update does not fit: lower --tokens_per_micro_batch or add GPUs"
    billions = largest_model(parts, gib) / 1e9
    return f"on {gib:g} GiB: {rollout}; {update}; models up to about {billions:.0f} B fit"


# --------------------------------------------------------------------------------------------------
# --dry_run


def dry_run(
    settings, facts: dict[str, object], *, micro_tokens: int, reference: bool = False,
    rows: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0, tp: int = 1,
):
    """Print settings, `facts` (name -> value) and a step's memory on each GPU.

    It is computed in bf16 unless --dtype is fp32.

    WORLD_SIZE is the number of GPUs. `rows` sequences of at most prompt + completion tokens are
    decoded at once, by `tp` GPUs together; 0 means that there is no rollout.
    """
    for field in dataclasses.fields(settings):
        print0(f"--{field.name} {getattr(settings, field.name)!r}")
    print0()
    for name, value in facts.items():
        print0(f"{name:36}{value:,}" if isinstance(value, int) else f"{name:36}{value}")
    ranks = world_size()
    if settings.shard_within == "node":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    options = dict(ranks=ranks, rows=rows, micro_tokens=micro_tokens, reference=reference)
    options |= dict(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    dtype = torch.float32 if settings.dtype == "fp32" else torch.bfloat16
    options |= dict(cpu_offload=settings.cpu_offload, tp=tp, dtype=dtype)
    config = load_config(settings.model)
    if most := tokens_at_most(config, settings.max_pixels):
        print0(f"{'image tokens per picture, at most':36}{most:,}")
    parts = estimate(config, **options, checkpointing=settings.activation_checkpointing)
    print0(f"\nmemory per GPU (GiB), with the weights cut over {ranks}")
    for name in ALWAYS + ROLLOUT * (rows > 0) + UPDATE:
        if parts[name]:
            print0(f"  {name:34}{parts[name] / GIB:.1f}")
    print0(f"{'an update':36}{parts['update'] / GIB:.1f}")
    if rows:
        together = f" on {tp} GPUs" * (tp > 1)
        print0(f"{f'a rollout of {rows} rows{together}':36}{parts['rollout'] / GIB:.1f}, "
               f"{parts['row'] / GIB:.2f} per row; rows that do not fit wait their turn")
        saving = estimate(config, **options, checkpointing=True)
        without = estimate(config, **options)
        for gib in GPU_SIZES:
            print0(advice(saving, without, rows, gib))
    print0("dry run: nothing was loaded or written")


def dry_run_sft(config):
    ranks, batch = world_size(), config.batch_size
    facts = {
        "ranks": ranks,
        "sequences per step": batch,
        "sequences per rank": batch // ranks,
        "tokens per step, at most": batch * config.max_tokens,
    }
    dry_run(config, facts, micro_tokens=max(config.tokens_per_micro_batch, config.max_tokens))


def dry_run_rl(config):
    completions = config.questions * config.plans * config.cots
    per_rank, limit = completions // world_size(), config.limit
    drawn = config.steps * config.questions
    facts = {
        "ranks": world_size(),
        "questions per step": config.questions,
        "completions per step": completions,
        "completions per rank": per_rank,
        "optimiser steps per step": config.epochs * config.mini_batches,
        "completion tokens per step, at most": completions * config.max_completion_tokens,
        "completions in the whole run": completions * config.steps,
        "passes over --limit problems": f"{drawn / limit:.2f}" if limit else "unknown",
    }
    prompt, completion = config.max_prompt_tokens, config.max_completion_tokens
    dry_run(
        config, facts, micro_tokens=max(config.tokens_per_micro_batch, prompt + completion),
        reference=config.kl_coef > 0, prompt_tokens=prompt, completion_tokens=completion,
        rows=min(config.rollout_rows or per_rank, per_rank) * config.tp, tp=config.tp,
    )


# --------------------------------------------------------------------------------------------------
# The table of recipes/memory.md

SHAPES = ("llama3.2_3b", "qwen2.5_7b", "qwen3_8b", "qwen3_14b")


@dataclasses.dataclass
class Flags:
    model: tuple = tuple(f"recipes/shapes/{name}" for name in SHAPES)  # folders or hub ids
    gpus: int = 8  # number of GPUs that the weights are cut over (>= 1)
    gib: float = 80.0  # memory of a GPU in GiB (> 0)
    rollout_rows: int = 192  # sequences decoded at once per rank (>= 1)
    max_prompt_tokens: int = 1024  # (>= 1)
    max_completion_tokens: int = 0  # 0: the paper's, 4608 for Qwen3 and 3584 for others
    tokens_per_micro_batch: int = 16384  # (>= 1)
    kl_coef: float = 0.01  # 0: no reference model
    cpu_offload: bool = False  # weights, gradients and optimiser state in CPU memory


def table_column(path: str, flags: Flags) -> dict[str, str]:
    """What the table says about one model: name of the line -> entry."""
    config, rows, tokens = load_config(path), flags.rollout_rows, flags.tokens_per_micro_batch
    limit = flags.max_completion_tokens or (4608 if config.model_type == "qwen3" else 3584)
    options = dict(ranks=flags.gpus, rows=rows, micro_tokens=tokens, reference=flags.kl_coef > 0)
    options |= dict(prompt_tokens=flags.max_prompt_tokens, completion_tokens=limit)
    options["cpu_offload"] = flags.cpu_offload
    parts = estimate(config, **options)
    saving = estimate(config, **options, checkpointing=True)
    size = lambda of, *names: f"{sum(of[name] for name in names) / GIB:.1f}"
    return {
        "GiB per GPU": os.path.basename(path.rstrip("/")),
        "parameters": f"{parts['parameters'] / 1e9:.2f} B",
        "completion tokens, at most": f"{limit:,}",
        "weights, gradients, AdamW": size(parts, "weights", "gradients", "optimiser"),
        "reference": size(parts, "reference"),
        "whole model in bf16, for the rollout": size(parts, "gathered for rollout"),
        f"KV cache of {rows:,} rows": size(parts, "KV cache"),
        f"activations and logprobs of {tokens:,} tokens": size(parts, "activations", "logprobs"),
        "the same with `--activation_checkpointing`": size(saving, "activations", "logprobs"),
        "rollout": size(parts, "rollout"),
        "update": size(parts, "update"),
        "update with `--activation_checkpointing`": size(saving, "update"),
        f"`--rollout_rows` that fit in {flags.gib:g} GiB": f"{rows_that_fit(parts, flags.gib):,}",
    }


def table(flags: Flags) -> str:
    """The table in Markdown, one column per model."""
    columns = [table_column(path, flags) for path in flags.model]
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    pad = lambda cells: [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
    return "\n".join(f"| {' | '.join(pad(cells))} |" for cells in lines)


if __name__ == "__main__":
    print(table(parse_config(Flags)))
