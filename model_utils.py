"""What the stages share about models: prompts, load and shard, logprobs of given tokens, a step.

Shapes: B sequences, T tokens per sequence, V vocabulary.
"""

import contextlib
import functools
import math
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from plumbing.attention import Packed, use_attention
from plumbing.calls import protocol, tools_of
from plumbing.family import check_family
from plumbing.images import freeze_tower, mark_pictures, packed_inputs, without_tower
from plumbing.kernels import fuse_norms
from plumbing.memory import CHUNK_LOGITS
from plumbing.ranks import device_mesh, fail, print0, rank, require
from plumbing.thin import thinner
from plumbing.weights import (
    check_folder,
    check_template,
    empty_model,
    fill_model,
    in_short,
    load_config,
    of_usable_weights,
    read_model,
    refuse_code,
    say_if_slow,
)

# --------------------------------------------------------------------------------------------------
# Prompts

INSTRUCTION = (
    "Solve the problem in three blocks. "
    "First, between <plan> and </plan>, sketch the route: the main phases, the strategy you choose "
    "and where you would switch to another one. Leave out small steps and do no arithmetic there. "
    "Second, between <think> and </think>, reason step by step along the plan. Judge it as you go; "
    "where it turns out to be wrong, say so and correct it. "
    "Third, between <answer> and </answer>, give only the final answer in \\boxed{}."
)

# For base models, which have no chat template. It adds no special token that they have never seen.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Solution:\n' }}{% endif %}"
)


def load_tokenizer(path: str, thinking: bool = True):
    """The tokenizer of a Hugging Face folder or hub id, with PLAIN_TEMPLATE where it has none.

    `thinking=False` writes Qwen3's non-thinking prompt into the chat template, so that models saved
    with it keep it. Raises SystemExit if there is no usable tokenizer.
    """
    from transformers import AutoTokenizer

    check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception at a damaged file
        refuse_code(path, error)
        load_config(path)  # where there is no model at all, this says so
        fail(f"no usable tokenizer at {path!r} ({in_short(error)}); copy the tokenizer files there")
    # Without files, transformers makes one without words for some models, which encodes nothing.
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    words = set(tokenizer.get_vocab()) - special
    require(words, f"no tokenizer at {path!r} (it has no words); copy the tokenizer files there")
    require(
        tokenizer.eos_token_id is not None,
        f"the tokenizer of {path} has no end token; set eos_token in its tokenizer_config.json",
    )
    if tokenizer.chat_template is None:
        print0(f"{path} has no chat template: using the plain one of model_utils.py")
        tokenizer.chat_template = PLAIN_TEMPLATE
    if not thinking and not tokenizer.chat_template.startswith("{% set enable_thinking"):
        tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.chat_template
    if tokenizer.pad_token is None:
        # Never used here: masks come from lengths. But other tools read it from a saved model, and
        # with pad = eos many trainers would mask the end of turn. The spare token is Llama 3's.
        spare = "<|finetune_right_pad_id|>"
        has_spare = spare in tokenizer.get_vocab()
        tokenizer.pad_token = spare if has_spare else tokenizer.eos_token
    check_template(path, tokenizer)
    return tokenizer


def encode_prompt(
    tokenizer, problem: str, images: tuple[str, ...] = (), tools: tuple[str, ...] = ()
) -> list[int]:
    """Token ids of instruction (with the protocol of `tools`) and problem, up to the completion.

    Only the prompt goes through the chat template: Qwen3's would cut the plan out of a completion.
    `images` are paths of pictures, which stand where the problem has `<image>`, or before it. An
    image token is a negative id (plumbing/images.py). Raises images.Unusable.
    """
    problem = mark_pictures(tokenizer, problem, len(images)) if images else problem
    instruction = " ".join(filter(None, (INSTRUCTION, protocol(tools))))
    turns = [{"role": "system", "content": instruction}, {"role": "user", "content": problem}]
    # Llama's template prints today's date unless it is given one: prompts would change daily.
    options = dict(add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024")
    try:
        text = tokenizer.apply_chat_template(turns, **options)
    except Exception as error:  # jinja2's TemplateError: Gemma's template refuses a system turn
        if "role" not in str(error).lower():
            raise
        turns = [{"role": "user", "content": f"{instruction}\n\n{problem}"}]
        text = tokenizer.apply_chat_template(turns, **options)
    # Some chat templates end with an open <think>. Our completions start with <plan>.
    text = re.sub(r"<think>\s*$", "", text)
    ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written special ones
    return tokenizer.album.expand(ids, images) if images else ids


def encode_question(tokenizer, record: dict, tools: tuple[str, ...] = ()) -> list[int]:
    """`encode_prompt` of a record: with its pictures, and with what its world answers."""
    images = record.get("images", ())
    return encode_prompt(tokenizer, record["problem"], images, tools_of(record, tools))


def find_stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion. Instruct models name several, in three different files."""
    found = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    odd = [repr(one)[:40] for one in found if not isinstance(one, int)]
    require(not odd, f"eos_token_id {', '.join(odd)} is no number: mend the model's config files")
    return sorted(found)


def completion_texts(tokenizer, completions: list[list[int]], stop_ids: list[int]) -> list[str]:
    """Decoded completions without their stop token.

    Other special tokens stay in the text, and make it malformed.
    """
    without = [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in completions]
    return tokenizer.batch_decode(without)


@functools.lru_cache(maxsize=1)
def plan_marks(tokenizer) -> tuple[Callable, Callable]:
    """Two functions of completion ids: whether they open a plan, and whether the last closes it.

    `</plan>` is several tokens in most vocabularies, and the last one may hold more text (`>\n`).
    So it is looked for in decoded text, and the plan ends with the token that completes it.
    """

    @functools.cache
    def has_bracket(token: int) -> bool:  # spares decoding a tail for every token
        return ">" in tokenizer.decode([token])

    opened = lambda ids: "<plan>" in tokenizer.decode(ids)
    closed = lambda ids: has_bracket(ids[-1]) and "</plan>" in tokenizer.decode(ids[-16:])
    return opened, closed


# --------------------------------------------------------------------------------------------------
# Models: load, shard, gather for sampling


@of_usable_weights
def load_model(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """A causal language model in eval mode for good.

    Rollout and update must see the same network, without dropout.
    """
    from transformers.utils import logging

    if rank() != 0 or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading and saving
    model = use_attention(say_if_slow(read_model(path, dtype), device).to(device).eval())
    return fuse_norms(model) if device.type == "cuda" else model


@of_usable_weights
def load_sharded(path: str, device: torch.device, config, *, frozen: bool = False):
    """Load a model and shard it as the TrainingFlags in `config` say. A collective.

    No rank ever holds the whole model: it is made without storage, cut, and then each rank reads
    its own rows. `frozen` makes a reference: no gradients, and weights in the dtype in which the
    policy (with weights in fp32) computes, too. Raises SystemExit for a family that `check_family`
    refuses.
    """
    on_gpu = device.type == "cuda"
    dtype = compute_dtype(config.dtype, device) if frozen else torch.float32
    names = ("dtype", "shard_within", "activation_checkpointing", "cpu_offload")
    options, part = {n: getattr(config, n) for n in names}, without_tower if frozen else lambda m: m
    if not dist.is_initialized():
        model = shard_model(part(load_model(path, device, dtype)), device, **options)
    else:
        model = part(say_if_slow(empty_model(path, dtype), device))
        model = fuse_norms(model) if on_gpu else model
        model = shard_model(model, device, **options)
        fill_model(model, path, device, torch.device("cpu") if config.cpu_offload else device)
    check_family(model.requires_grad_(not frozen), _logits)
    freeze_tower(model, device)  # on it, whatever --cpu_offload says
    return model


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What --dtype means on this device. Most CPUs have no bf16 units, and emulate it slowly."""
    bf16 = name == "bf16" or name == "auto" and device.type == "cuda"
    return torch.bfloat16 if bf16 else torch.float32


def shard_model(
    model, device: torch.device | None = None, *, dtype: str = "auto", shard_within: str = "world",
    activation_checkpointing: bool = False, cpu_offload: bool = False,
):
    """FSDP2: every block and the root; weights and gradient reduction in fp32.

    `dtype` is --dtype. `shard_within` "world" cuts the weights over all ranks, "node" over those of
    a node (HSDP). `activation_checkpointing` keeps only each block's input and recomputes the block
    in the backward pass. `cpu_offload` keeps weights, gradients and optimiser state in CPU memory.
    Without a process group the model stays whole, and computes in its own dtype.
    """
    device = device or model.device
    use_attention(model).token_logprobs = types.MethodType(token_logprobs, model)
    model.compute_device = device  # model.device is the CPU with cpu_offload
    model.compute_dtype = compute_dtype(dtype, device)  # model.dtype is fp32 while it is sharded
    family, blocks = model.config.model_type, getattr(model.get_decoder(), "layers", None)
    require(
        blocks is not None,
        f"the layers of the family {family!r} are not in `.layers`, where training looks for them: "
        "choose another model (eval.py and distill.py only sample, and are not affected)",
    )
    if activation_checkpointing:
        for block in blocks:  # inside FSDP's hooks: the weights are there for the recomputation
            block.forward = functools.partial(_checkpointed, block.forward)
    if not dist.is_initialized():
        return model
    from torch.distributed import fsdp

    options = {"mesh": device_mesh(device, shard_within)}
    if compute_dtype(dtype, device) == torch.bfloat16:
        # Do not cast inputs: they are bf16, and casting hands each block its own copy of `packed`.
        options["mp_policy"] = fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if cpu_offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in blocks:
        fsdp.fully_shard(block, **options)
    # The root: tied embeddings must be in one group. A vision tower stays whole.
    fsdp.fully_shard(model, ignored_params=freeze_tower(model), **options)
    fsdp.register_fsdp_forward_method(model, "token_logprobs")  # else it would miss FSDP's hooks
    return model


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():  # sampling and scoring
        return forward(*args, **kwargs)
    # Without dropout there is no random state to keep.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextlib.contextmanager
def unsharded(model, tp: int = 1):
    """Hold the whole model on every rank during a rollout, or 1/tp of it (plumbing/thin.py).

    A sharded forward is a collective. It would gather weights for every token, and deadlock as soon
    as two ranks decode different numbers of tokens. Inside this block no forward is a collective;
    with tp > 1, tp neighbouring ranks go in step.
    """
    from torch.distributed.fsdp import FSDPModule

    if tp > 1:
        with thinner(model, tp) as sampler:
            yield sampler
        return
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()  # not recursive
        # FSDP's hooks cost time, and make streams wait, which no CUDA graph can capture.
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield model
    finally:
        if parts:
            # Free the cache for the update. Its CUDA graphs hold addresses of the gathered weights,
            # which are about to be freed.
            model.kv_cache = None
        for part, (before, after) in zip(parts, hooks):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


# --------------------------------------------------------------------------------------------------
# Logprobs of given sequences


def _logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of hidden states (..., D), in fp32.

    It repeats what the model's own forward does after the decoder. `check_family` compares the two.
    """
    logits, config = model.get_output_embeddings()(hidden).float(), model.config.get_text_config()
    times, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    if times or divisor:  # Cohere multiplies, Granite divides
        logits = logits * ((times or 1.0) / (divisor or 1.0))
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:  # some Gemma models
        logits = torch.tanh(logits / cap) * cap
    return logits


def _head(model, hidden: torch.Tensor, targets: torch.Tensor, temperature: float):
    """Logprobs and entropies (N,) of `targets` (N,) given hidden states (N, D), in fp32."""
    logprobs = torch.log_softmax(_logits(model, hidden) / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def token_logprobs(
    model, packed: Packed, temperature: float = 1.0, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies (B, T-1) of the tokens that `packed.mask` marks; 0 elsewhere.

    Column t is about token t+1 of a sequence, given tokens 0..t. `pack` makes this shift, and no
    other place does. The temperature divides the logits of policy, old policy and reference,
    as it did in sampling. Logits dominate memory (152,000 floats per token for Qwen), so they are
    made `chunk` tokens at a time, for marked tokens only, and made again in the backward pass.
    Call it as `model.token_logprobs(packed, ...)`: only so do FSDP's hooks run.
    """
    decoder, size = model.get_decoder(), model.config.get_text_config().vocab_size
    output = decoder(**packed_inputs(model, packed), use_cache=False, packed=packed)
    hidden = output.last_hidden_state[0]  # (N, D)
    require(
        packed.attended,  # else sequences have seen each other
        f"the family {model.config.model_type!r} hands no arguments on to its attention layers, so "
        "sequences of one row would see each other: choose another model for training",
    )
    chunk = chunk or max(1, CHUNK_LOGITS[hidden.device.type] // size)
    logprobs, entropies = [], []
    for h, t in zip(hidden[packed.parents].split(chunk), packed.ids[packed.targets].split(chunk)):
        part = checkpoint(_head, model, h, t, temperature, use_reentrant=False)
        logprobs.append(part[0])
        entropies.append(part[1])
    place = lambda parts: torch.where(packed.mask, torch.cat(parts)[packed.columns], 0.0)
    return place(logprobs), place(entropies)


# --------------------------------------------------------------------------------------------------
# One optimiser step


def make_optimizer(model, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]  # a vision tower is not
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    # Fused, it needs no temporary copy of a shard. With --cpu_offload the weights are not on a GPU.
    return torch.optim.AdamW(groups, lr=lr, fused=matrices[0].is_cuda)


def lr_at(step: int, steps: int, lr: float, warmup_steps: int, schedule: str) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then constant or down to 0 at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return lr * {"constant": 1.0, "linear": 1.0 - done, "cosine": cosine}[schedule]


def optimizer_step(model, optimizer, lr: float, max_grad_norm: float) -> float:
    """Clip, step, zero. Returns the norm of the gradient before clipping.

    A step whose norm is not finite is skipped on all ranks.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a DTensor
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
