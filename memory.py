"""What a run would be, before it is one: settings, counts and the bytes that a step needs on each GPU (--dry_run).

The model is made on the meta device from its config alone, so nothing is downloaded or allocated. Activations are what
autograd saves for one and for two blocks, counted there; an attention kernel is taken to save its inputs, its output
and one float a row. bench/memory_plan.py compares the plan with measured updates. Not counted: the CUDA context
(about 0.5 GiB), communication buffers and fragmentation; keep a tenth free.
"""
import copy
import dataclasses
import os

import torch

from model_utils import CHUNK_LOGITS, SAMPLING_BYTES, cache_bytes, print0, world_size

GIB = 1 << 30


class Attention(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx, query, key, value):
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)  # kernels lay it out so
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def count_attention(module, query, key, value, mask, **kwargs):
    return Attention.apply(query, key, value).transpose(1, 2), None


def saved_bytes(config, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one forward pass of the decoder over a row of `tokens` tokens."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    AttentionInterface.register("counted", count_attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="counted").eval()
        ids = torch.zeros(1, tokens, dtype=torch.long)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


ROLLOUT = ("gathered for rollout", "KV cache", "sampling")
PARTS = ("weights", "gradients", "optimiser", "reference", *ROLLOUT, "activations", "logprobs", "gathered for update")


def plan(config, *, ranks: int, rows: int, prompt_tokens: int, completion_tokens: int, micro_tokens: int,
         dtype: torch.dtype = torch.bfloat16, reference: bool = True, checkpointing: bool = False,
         cpu_offload: bool = False) -> dict[str, float]:
    """Bytes a GPU: the parts, and the totals `rollout`, `update` and `peak`. Shapes as grpo.py's flags.

    `ranks` is the number of GPUs that the weights are cut over. `row` is what one more row of a rollout takes.
    """
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    blocks = model.get_decoder().layers
    block = sum(p.numel() for p in blocks[0].parameters())
    root = count - sum(p.numel() for b in blocks for p in b.parameters())
    text, small, saved = config.get_text_config(), copy.deepcopy(config), []
    for layers in (1, 2):
        small.get_text_config().num_hidden_layers = layers
        saved.append(saved_bytes(small, micro_tokens, dtype))
    per_block, rest = saved[1] - saved[0], 2 * saved[0] - saved[1]
    vocabulary, hidden, itemsize = text.vocab_size, text.hidden_size, dtype.itemsize
    row_cache, row_sampling = (prompt_tokens + completion_tokens) * cache_bytes(config, dtype), SAMPLING_BYTES * vocabulary
    sharded = 0 if cpu_offload else 1
    gathered = dtype != torch.float32 or ranks > 1  # else, on one CPU rank, the weights themselves are used
    parts = {
        "weights": sharded * 4 * count / ranks,
        "gradients": sharded * 4 * count / ranks,
        "optimiser": sharded * 8 * count / ranks,
        "reference": sharded * itemsize * count / ranks if reference else 0,
        "gathered for rollout": itemsize * count if gathered else 0,
        "KV cache": rows * row_cache,
        "sampling": rows * row_sampling,
        "activations": rest + (len(blocks) * micro_tokens * hidden * itemsize + per_block if checkpointing
                               else len(blocks) * per_block),
        # Of a chunk, made again in the backward pass: logits, log-softmax and two temporaries in fp32, and, where that is
        # another dtype, the logits as they came.
        "logprobs": min(max(1, CHUNK_LOGITS["cpu" if dtype == torch.float32 else "cuda"] // vocabulary), micro_tokens) * vocabulary
                    * (4 * 4 + (itemsize if dtype != torch.float32 else 0)),
        # What is gathered at once: the root's group and two blocks; and gradients before they are reduced, the head's twice,
        # as a chunk's is added to the others'.
        "gathered for update": itemsize * (root + 2 * block) + (2 * itemsize + 4) * max(root, block) if gathered else 0,
    }
    standing = parts["weights"] + parts["optimiser"] + parts["reference"]
    parts["rollout"] = standing + parts["gathered for rollout"] + parts["KV cache"] + parts["sampling"]
    parts["update"] = standing + parts["gradients"] + parts["activations"] + parts["logprobs"] + parts["gathered for update"]
    parts["peak"] = max(parts["rollout"], parts["update"])
    return {**parts, "row": row_cache + row_sampling, "parameters": count}


def dry_run(settings, model_config, facts: dict[str, object], *, micro_tokens: int, reference: bool = False, rows: int = 0,
            prompt_tokens: int = 0, completion_tokens: int = 0):
    """Print settings, `facts` (name -> value) and the memory of a step on each GPU, at WORLD_SIZE ranks in bf16.

    `rows` sequences of at most prompt + completion tokens are decoded at once (0: no rollout).
    """
    for field in dataclasses.fields(settings):
        print0(f"--{field.name} {getattr(settings, field.name)!r}")
    print0()
    for name, value in facts.items():
        print0(f"{name:36}{value:,}" if isinstance(value, int) else f"{name:36}{value}")
    ranks = world_size() if settings.shard_within == "world" else int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    parts = plan(model_config, ranks=ranks, rows=rows, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
                 micro_tokens=micro_tokens, reference=reference, checkpointing=settings.activation_checkpointing,
                 cpu_offload=settings.cpu_offload)
    print0(f"\nmemory a GPU (GiB), planned for weights cut over {ranks}")
    for name in PARTS:
        if parts[name] and (rows or name not in ROLLOUT):
            print0(f"  {name:34}{parts[name] / GIB:.1f}")
    print0(f"{'an update':36}{parts['update'] / GIB:.1f}")
    if rows:  # rollout and update take turns: what one holds is gone when the other is there
        print0(f"{f'a rollout of {rows} rows':36}{parts['rollout'] / GIB:.1f}, {parts['row'] / GIB:.2f} a row; rows that do "
               "not fit wait their turn")
    print0("dry run: nothing was loaded or written")
