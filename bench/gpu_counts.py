"""Kernels, bytes and FLOPs of the project's own GPU code, counted on the meta device.

Nothing is computed and no GPU is needed: shapes are enough. Kernels that are whole on CUDA only
have stand-ins. bench/step_model.py turns the counts into seconds, tests/test_step_model.py holds
them.
"""

import contextlib
import copy
import dataclasses
import math
import types
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
from model_utils import shard_model
from plumbing import decoder
from plumbing.kernels import fuse_norms
from plumbing.memory import CHUNK_LOGITS, make_empty

VIEWS = set(
    "view _unsafe_view reshape transpose t permute expand slice select unsqueeze squeeze detach "
    "alias as_strided split split_with_sizes unbind chunk empty empty_like empty_strided new_empty "
    "lift_fresh unflatten _reshape_alias narrow diagonal".split()
)
PRODUCTS = {"mm", "addmm", "bmm"}


class Counts(TorchDispatchMode):
    """Kernels while it is active, on the meta device, under no_grad or autograd.

    products: (bytes, FLOPs) -> number of such products; small: number of other kernels, small_bytes
    what they read and write; attention: FLOPs of causal attention, half of its pairs; kinds:
    attention kernels by name.
    """

    active = None

    def __init__(self):
        super().__init__()
        self.products, self.kinds = Counter(), Counter()
        self.small = self.small_bytes = self.attention = 0

    def __enter__(self):
        Counts.active = self
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in VIEWS:
            return out
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name in PRODUCTS:
            moved = sum(map(touched, tensors + results))
            self.products[moved, 2 * args[-2].numel() * args[-1].shape[-1]] += 1
        else:
            self.add(kernel_bytes(name, args, tensors, results))
        return out

    def add(self, moved: int):
        self.small += 1
        self.small_bytes += moved

    def flops(self) -> int:
        return sum(flops * n for (_, flops), n in self.products.items())


def touched(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor. A broadcast dimension is there once."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride()) if stride]
    return math.prod(sizes) * tensor.element_size()


def kernel_bytes(name: str, args: tuple, tensors: list, results: list) -> int:
    """Bytes that a kernel reads and writes. Where it picks places, only these count."""
    if name in ("embedding", "index", "gather", "index_select"):
        return 2 * sum(map(touched, results))
    if name.startswith("index_put"):
        return 3 * touched(args[2])
    return sum(map(touched, tensors + results))


class FusedNorm(torch.autograd.Function):
    """nn.functional.rms_norm as on CUDA: one kernel forward, one and the weight's sum backward."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        Counts.active.add(2 * touched(hidden))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        Counts.active.add(3 * touched(hidden))
        Counts.active.add(2 * touched(weight))
        return torch.empty_like(hidden), torch.empty_like(weight)


class FusedAttention(torch.autograd.Function):
    """An attention kernel that keeps no scores. Backward makes 5 products, forward 2."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        Counts.active.kinds["sdpa"] += 1
        rows, heads, queries, width = query.shape
        ctx.flops = 2 * rows * heads * queries * key.shape[2] * width  # 4, and half of the pairs
        Counts.active.attention += ctx.flops
        out = query.new_empty(rows, queries, heads, value.shape[3])
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        Counts.active.attention += 2.5 * ctx.flops
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def split_attention(query: torch.Tensor, *inputs, **options) -> torch.Tensor:
    """varlen_attn, which reads of each row only its own places."""
    Counts.active.kinds["varlen"] += 1
    return torch.empty_like(query)


@contextlib.contextmanager
def stand_ins():
    """Kernels that are whole on CUDA only are counted as one each."""
    functional = torch.nn.functional
    norm = lambda hidden, shape, weight, eps: FusedNorm.apply(hidden, weight)
    attend = lambda query, key, value, **options: FusedAttention.apply(query, key, value)
    no_sync = "transformers.masking_utils.find_packed_sequence_indices"  # it waits for a result
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "rms_norm", norm))
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch("torch.nn.attention.varlen.varlen_attn", split_attention))
        stack.enter_context(mock.patch(no_sync, lambda position_ids: None))
        yield


def make_model(config, layers: int, checkpointing: bool = True):
    """The model as on a GPU, bf16 with fused norms, with `layers` blocks on the meta device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = make_empty(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    with mock.patch.object(torch.distributed, "is_initialized", lambda: False):  # never sharded
        return shard_model(fuse_norms(model), activation_checkpointing=checkpointing)


def whole(one: Counts, two: Counts, layers: int) -> Counts:
    """The counts of `layers` blocks and the rest, from those with one and with two blocks."""
    total, extend = Counts(), lambda a, b: a + (layers - 1) * (b - a)
    for name in ("small", "small_bytes", "attention"):
        setattr(total, name, extend(getattr(one, name), getattr(two, name)))
    for name in ("products", "kinds"):
        a, b = getattr(one, name), getattr(two, name)
        setattr(total, name, Counter({key: extend(a[key], b[key]) for key in b}))
    return total


@contextlib.contextmanager
def as_on_gpu(free: float = 1e15, split: bool = True):
    """The decoder lays out its cache as on a GPU with `free` bytes, and says nothing.

    `split` False: for masked attention, though split-KV might do.
    """
    kept = {name: getattr(decoder, name) for name in ("CACHE_SHARE", "free_memory", "print0")}
    share, may_split = decoder.CACHE_SHARE["cuda"], getattr(decoder, "may_split", None)
    decoder.CACHE_SHARE = {"cpu": share, "meta": share}
    decoder.free_memory, decoder.print0 = lambda device: int(free), lambda *words: None
    if may_split:
        kept["may_split"], cuda = may_split, torch.device("cuda")
        decoder.may_split = lambda model: split and may_split(
            types.SimpleNamespace(config=model.config, device=cuda)
        )
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(decoder, name, value)


def count_decode(config, layers: int, rows: int, split: bool = True) -> Counts:
    """One decode step of `rows` rows, without the drawing of tokens."""
    prompt = [0] * 1024
    active = [grpo.Rollout(prompt, [1], slot=slot) for slot in range(rows)]
    model = make_model(config, layers)  # outside: whether norms can be fused is tried for real
    model.split_kv = True  # the kernel needs no trial
    with stand_ins(), as_on_gpu(split=split), torch.no_grad(), torch.device("meta"):
        made = decoder.Decoder(model, active)
        with Counts():
            made.step(active)  # the first step makes the cache
        with Counts() as counts:
            made.step(active)
    return counts


def count_draw(config, rows: int) -> Counts:
    """The drawing of a token per row from logits in bf16."""
    logits = torch.empty(rows, config.vocab_size, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), Counts() as counts:
        grpo.sample_token(logits, 1.0, 1.0, None)
    return counts


def count_update(config, layers: int, packed, checkpointing: bool, grad: bool = True) -> Counts:
    """Forward and backward of a micro-batch; without `grad`, the reference's forward."""
    model, packed = make_model(config, layers, checkpointing), copy.copy(packed)
    for field in dataclasses.fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, torch.Tensor):
            setattr(packed, field.name, value.to("meta"))
    packed.places, chunk = [p.to("meta") for p in packed.places], CHUNK_LOGITS["cuda"]
    with stand_ins(), torch.device("meta"), torch.set_grad_enabled(grad), Counts() as counts:
        logprobs, _ = model.token_logprobs(packed, 1.0, chunk // config.vocab_size)
        if grad:
            logprobs.sum().backward()
    return counts
