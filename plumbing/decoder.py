"""Decoding with a KV cache, one token per row and step. The loop that calls it is grpo.decode.

The cache has slots, one per active sequence. On a GPU a decode step is a replayed CUDA graph, so
the speed of Python does not matter.

Shapes: B active sequences, T tokens of a prompt, V vocabulary, D width of a head.
"""

import contextlib
import functools
import gc
import math
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing.ranks import fail, print0, rank

PREFILL_TOKENS = 2**14  # prompts are prefilled in batches of at most this many tokens, 32 rows
ADMIT = 0.25  # new sequences wait until this share of the slots is free: a prefill takes time
CACHE_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the free memory
SAMPLING_BYTES = 48  # per logit of a drawn token: softmax, noise, top-p's sorted copies, in fp32

# --------------------------------------------------------------------------------------------------
# The decoder: which sequences wait, which are active, and which slot each one has


class Decoder:
    """Holds the keys and values of the sequences that grpo.decode samples.

    Active sequence i has slot i. A sequence has `prompt` and `ids` (token ids), `limits` (one per
    completion that it may become) and `slot`. The order of the slots decides which random numbers
    a sequence gets.
    """

    def __init__(self, model, sequences: list, max_rows: int = 0):
        self.model, self.waiting = model, list(reversed(sequences))
        longest = max(len(s.prompt) + max(s.limits) for s in sequences)
        branches = max(len(s.limits) for s in sequences)
        rows = sum(len(s.limits) for s in sequences)
        rows = min(rows, max(max_rows or rows, branches))
        self.cache = reserve_cache(model, rows, longest, branches)
        self.slots = min(self.cache.slots, rows)

    def admit(self, active: list) -> list:
        """`active`, and as many waiting sequences as have a slot for each of their branches.

        The last ones do not wait for many free slots: they would begin late, and end alone.
        """
        reserved, new = sum(len(s.limits) for s in active), []
        wanted = sum(len(s.limits) for s in self.waiting)
        if self.waiting and self.slots - reserved >= min(ADMIT * self.slots, wanted):
            while self.waiting and reserved + len(self.waiting[-1].limits) <= self.slots:
                new.append(self.waiting.pop())
                new[-1].slot = len(active) + len(new) - 1
                reserved += len(new[-1].limits)
            prefill(self.model, self.cache, new)
        return active + new

    def step(self, active: list) -> torch.Tensor:
        """Feed each active sequence's last token. Returns the logits of the next ones (B, V)."""
        last = [s.ids[-1] if s.ids else s.prompt[-1] for s in active]
        self.positions = [len(s.prompt) + len(s.ids) - 1 for s in active]
        return decode_step(self.model, self.cache, last, self.positions)

    def keep(self, alive: list) -> list:
        """Move the sequences that go on into slots 0..B-1. Returns them in the order of slots.

        Where several share a slot they are branches of a plan: all but the first get a copy.
        """
        owners, branches, taken = [], [], set()
        for s in alive:
            (branches if s.slot in taken else owners).append(s)
            taken.add(s.slot)
        staying = {s.slot for s in owners if s.slot < len(alive)}
        free = [slot for slot in range(len(alive)) if slot not in staying]
        movers = [s for s in owners if s.slot >= len(alive)] + branches
        if movers:
            self.cache.copy([s.slot for s in movers], free, max(self.positions) + 1)
            for s, slot in zip(movers, free):
                s.slot = slot
        return sorted(alive, key=lambda s: s.slot)


def prefill(model, cache: "KVCache", sequences: list):
    """Compute each prompt once, for its first sequence, and copy the slot to its other sequences.

    The last prompt token is left to the first decode step, which then returns the first logits.
    """
    first = {id(s.prompt): s for s in reversed(sequences)}
    todo = sorted((s for s in first.values() if len(s.prompt) > 1), key=lambda s: len(s.prompt))
    longest = len(todo[-1].prompt) if todo else 0
    while todo:  # the longest first, as many at a time as their padded tokens allow
        count = max(1, min(32, PREFILL_TOKENS // len(todo[-1].prompt)))
        batch, todo = todo[-count:], todo[:-count]
        # Pad on the right: what is beyond a prompt's end is never seen, and later overwritten.
        width = len(batch[-1].prompt) - 1
        padded = [s.prompt[:-1] + [0] * (width - len(s.prompt) + 1) for s in batch]
        cache.write_prompts(torch.tensor([s.slot for s in batch], device=model.device))
        model(
            input_ids=torch.tensor(padded, device=model.device),
            position_ids=torch.arange(width, device=model.device)[None],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )
    others = [s for s in sequences if s is not first[id(s.prompt)]]
    if others and longest:
        sources = [first[id(s.prompt)].slot for s in others]
        cache.copy(sources, [s.slot for s in others], longest - 1)


# --------------------------------------------------------------------------------------------------
# One decode step, eager or as a replayed CUDA graph


def decode_step(model, cache: "KVCache", ids: list[int], positions: list[int]) -> torch.Tensor:
    """Feed one token per row, each at its own position. Returns the next tokens' logits (B, V).

    A CUDA graph is used on a GPU, unless `model.cuda_graphs` is False.
    """
    replayed = model.device.type == "cuda" and getattr(model, "cuda_graphs", True)
    step = replay_step if replayed else forward_step
    tensor = lambda values: torch.tensor(values, device=model.device)
    return step(model, cache, tensor(ids), tensor(positions), max(positions) + 1)


def forward_step(
    model, cache: "KVCache", ids: torch.Tensor, positions: torch.Tensor, filled: int
) -> torch.Tensor:
    """A decode step of slots 0..B-1: ids and positions (B,) -> logits (B, V).

    Attention reads the first `filled` positions of the cache.
    """
    cache.write_tokens(positions, filled)
    # Added to the scores: 0 where a row may look, -inf beyond its own position. (B, filled)
    beyond = torch.arange(filled, device=ids.device) > positions[:, None]
    mask = torch.zeros(len(ids), filled, dtype=model.dtype, device=ids.device)
    mask = mask.masked_fill_(beyond, -math.inf)[:, None, None]
    options = dict(attention_mask=mask, past_key_values=cache, use_cache=True)
    output = model(input_ids=ids[:, None], position_ids=positions[:, None], **options)
    return output.logits[:, -1]


@contextlib.contextmanager
def captured(graph, pool):
    """torch.cuda.graph, without its trap: when a capture fails, it leaves its stream current."""
    collecting = gc.isenabled()
    gc.disable()  # a collection may free a graph or an event, which would spoil the capture
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            yield
    finally:
        if collecting:
            gc.enable()


def replay_step(
    model, cache: "KVCache", ids: torch.Tensor, positions: torch.Tensor, filled: int,
    graph=torch.cuda.CUDAGraph, capture=captured,
) -> torch.Tensor:
    """`forward_step` by replay: ids and positions (B,) -> logits (B, V).

    There is one graph per bucket of rows (powers of 2) and of length (256 positions). It is
    captured when it is first needed. Where that fails the rank says so and stays eager for good.
    """
    rows = min(cache.slots, max(8, 1 << (len(ids) - 1).bit_length()))
    length = min(cache.length, -(-filled // 256) * 256)
    # The rows that fill up the bucket write to slots that no sequence has.
    pad = torch.nn.functional.pad
    inputs = pad(ids, (0, rows - len(ids))), pad(positions, (0, rows - len(ids)))
    if (rows, length) not in cache.graphs:
        expected = forward_step(model, cache, *inputs, length)  # also the warm-up of a capture
        if failure := record_step(model, cache, *inputs, length, expected, graph, capture):
            # Every rank speaks for itself: the others will wait for a slow one.
            message = f"rank {rank()} decodes without CUDA graphs, which is slower: {failure}"
            print(message, flush=True)
            model.cuda_graphs = False
            return expected[:len(ids)]
    recorded, graph_inputs = cache.graphs[rows, length]
    for graph_input, value in zip(graph_inputs, inputs):
        graph_input.copy_(value)
    recorded.replay()
    return cache.logits[:len(ids)]


def record_step(
    model, cache: "KVCache", ids: torch.Tensor, positions: torch.Tensor, length: int,
    expected: torch.Tensor, graph, capture,
) -> str | None:
    """Capture `forward_step`, replay it once, and keep it in `cache.graphs` if that was right.

    `expected`: logits of the eager step (B, V). Returns why it failed, or None.
    """
    rows, inputs, recorded = len(ids), (ids.clone(), positions.clone()), graph()
    if cache.logits is None:
        cache.logits = expected.new_empty(cache.slots, expected.shape[1])
    try:
        # Graphs are replayed one at a time, so all share a memory pool and write the same logits.
        with capture(recorded, pool=cache.pool):
            cache.logits[:rows] = forward_step(model, cache, *inputs, length)
        cache.pool = cache.pool or recorded.pool()
        recorded.replay()
        # Where another kernel is chosen, the last digits of bf16 may differ. Wrong inputs differ
        # by far more.
        difference = (cache.logits[:rows] - expected).abs().max()
        if not difference <= 0.02 * expected.abs().max():
            return "its result differs"
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        return str(error).splitlines()[0]
    cache.graphs[rows, length] = (recorded, inputs)


def without_autograd(function):
    """Run in inference_mode, which is a little faster, or in no_grad where FSDP2 needs that."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.no_grad() if dist.is_initialized() else torch.inference_mode():
            return function(*args, **kwargs)

    return run


# --------------------------------------------------------------------------------------------------
# KV cache


class KVCache:
    """Keys and values of up to `slots` sequences, per layer (slots, heads, length, D).

    It has the few methods that transformers' models call on a cache. Each sequence fills its slot
    from position 0, and needs no padding between prompt and completion: it writes at its own
    position, and a mask hides what is beyond. A sequence moves or branches by a copy of its slot.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        # Made at the first update, when shapes are known: keys and values of each layer.
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.at: tuple | None = None  # where the next forward writes, and what it sees
        self.full = False  # as large as memory allows
        # Captured decode steps, the memory pool that they share, and the logits that they write.
        self.graphs, self.pool, self.logits = {}, None, None

    def write_prompts(self, slots: torch.Tensor):
        """The next forward is a prefill into `slots` (B,), from position 0."""
        self.at = (slots, None, None)

    def write_tokens(self, positions: torch.Tensor, filled: int):
        """The next forward decodes one token for each of slots 0..B-1, at `positions` (B,).

        Attention sees the first `filled` positions.
        """
        self.at = (torch.arange(len(positions), device=positions.device), positions, filled)

    def copy(self, sources: list[int], targets: list[int], filled: int):
        """Copy the first `filled` positions of slots `sources` to slots `targets`.

        All are read before any is written.
        """
        for tensor in (t for layer in self.layers for t in layer):
            source = torch.tensor(sources, device=tensor.device)
            target = torch.tensor(targets, device=tensor.device)
            tensor[target, :, :filled] = tensor[source, :, :filled]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """Store new keys and values (B, heads, T, D) of a layer. Returns what to attend to.

        Each attention layer calls it.
        """
        if layer == len(self.layers):
            shape = lambda new: (self.slots, new.shape[1], self.length, new.shape[3])
            self.layers.append(tuple(new.new_zeros(shape(new)) for new in (keys, values)))
        slots, positions, filled = self.at
        for stored, new in zip(self.layers[layer], (keys, values)):
            if positions is None:
                stored[slots, :, :new.shape[2]] = new
            else:
                stored[slots, :, positions] = new[:, :, 0]
        if positions is None:
            return keys, values  # prompts attend to themselves only
        return tuple(stored[:len(slots), :, :filled] for stored in self.layers[layer])

    # What transformers asks to build the causal mask of a prefill.
    is_compileable = False

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def get_query_offset(self, layer: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer: int = 0) -> tuple[int, int]:
        return query_length, 0


# --------------------------------------------------------------------------------------------------
# Memory for the KV cache


def free_memory(device: torch.device) -> int:
    """Bytes that this rank can still allocate: of a GPU, or its share of the system's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds in reserve counts as free
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(available[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except OSError:  # not Linux
        return 2**62


def cache_bytes(model_config, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = model_config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = value = width
    if getattr(config, "qk_nope_head_dim", None):
        # DeepSeek's latent attention hands its keys and values out unpacked.
        key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return config.num_hidden_layers * heads * (key + value) * dtype.itemsize


def reserve_cache(model, rows: int, length: int, at_least: int = 1) -> KVCache:
    """The model's KV cache for `rows` sequences of `length` tokens.

    It is kept from call to call, for a sharded model until the rollout ends. It takes at most
    CACHE_SHARE of the free memory. More rows than fit wait for a slot. Raises SystemExit if not
    even `at_least` rows fit.
    """
    cache = getattr(model, "kv_cache", None)
    if cache is not None and cache.length >= length:
        if cache.slots >= rows or cache.full and cache.slots >= at_least:
            return cache
    model.kv_cache = cache = None  # free the old one first
    length = -(-length // 64) * 64  # prompts a little longer still fit
    on_gpu, free = model.device.type == "cuda", free_memory(model.device)
    dtype = torch.bfloat16 if on_gpu else model.dtype  # in which the model computes
    row_bytes = length * cache_bytes(model.config, dtype)
    sampling = SAMPLING_BYTES * model.config.get_text_config().vocab_size
    slots = min(rows, int(free * CACHE_SHARE.get(model.device.type, 0.5)) // (row_bytes + sampling))
    if slots < at_least:
        needed = at_least * row_bytes / 1e9
        fail(
            f"{at_least} sequences of {length} tokens need a KV cache of {needed:.1f} GB, too much "
            f"for {free / 1e9:.1f} GB of free memory; lower --max_completion_tokens"
        )
    if (slots, length) != getattr(model, "kv_cache_shape", None):
        size = f"{slots * row_bytes / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
        waves = f"; {rows} rows run in waves" if slots < rows else ""
        print0(f"KV cache: {slots} rows x {length} tokens = {size}{waves}")
    model.kv_cache_shape = slots, length
    model.kv_cache = KVCache(slots, length)
    model.kv_cache.full = slots < rows  # more rows would not fit either
    return model.kv_cache
