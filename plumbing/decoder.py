"""Decoding with a KV cache, one token per row and step. The loop that calls it is grpo.decode.

An active sequence is a row of each decode step, and has an extent of the cache. On a GPU a step is
a replayed CUDA graph, so the speed of Python does not matter. There, most models attend by
split-KV: a row reads its own keys, wherever they are. Elsewhere the extents are equal slots, and
each row reads as many keys as the longest has, under a mask.

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

from plumbing.attention import Extents, may_split
from plumbing.images import prompt_inputs, shifts
from plumbing.ranks import fail, print0, rank

PREFILL_TOKENS = 2**14  # prompts are prefilled in batches of at most this many tokens, 32 rows
ADMIT = 0.25  # new sequences wait until this share of the cache is free: a prefill takes time
PARTS = 8  # an extent grows by this part of a slot, where slots for all do not fit into memory
CACHE_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the free memory
SAMPLING_BYTES = 48  # per logit of a drawn token: softmax, noise, top-p's sorted copies, in fp32

# --------------------------------------------------------------------------------------------------
# The decoder: which sequences wait, which are active, and which slot each one has


class Decoder:
    """Holds the keys and values of the sequences that grpo.decode samples.

    A sequence has `prompt` and `ids` (token ids), `limits` (one per completion that it may become)
    and `slot`, the first place of its extent in the cache. It waits, or is active, and then it is
    one of the rows of a decode step: their order decides which random numbers it gets.
    """

    def __init__(self, model, sequences: list, max_rows: int = 0):
        self.model, self.waiting = model, list(reversed(sequences))
        self.shifts = shifts(model, sequences)  # of positions after pictures
        longest = max(len(s.prompt) + max(s.limits) for s in sequences)
        branches = max(len(s.limits) for s in sequences)
        rows = sum(len(s.limits) for s in sequences)
        rows = min(rows, max(max_rows or rows, branches))
        if may_split(model) and not hasattr(model, "split_kv"):
            try_split(model, sequences)
        self.cache = reserve_cache(model, rows, longest, branches)
        self.rows = min(self.cache.rows, rows)
        # An extent is some units long: one, which holds the longest, or as many as it needs so far.
        parts = PARTS if self.rows > self.cache.slots else 1
        self.unit, self.units = self.cache.length // parts, min(self.cache.slots, self.rows) * parts
        self.extents = {}  # units of each active sequence, by its slot

    def size(self, s) -> int:
        """How many units hold a sequence and its next token."""
        return -(-(len(s.prompt) + len(s.ids)) // self.unit)

    def load(self, sequences: list) -> float:
        """Which share of all rows or units they take, with an extent for each of their branches."""
        rows = sum(len(s.limits) for s in sequences)
        if self.unit == self.cache.length:  # each takes one
            return max(rows / self.rows, rows / self.units)
        units = sum(len(s.limits) * self.size(s) for s in sequences)
        return max(rows / self.rows, units / self.units)

    def admit(self, active: list) -> list:
        """`active`, and as many waiting sequences as there is room for.

        The last ones do not wait for much room: they would begin late, and end alone.
        """
        new = []
        if not self.waiting:
            return active
        all_fit = len(self.waiting) <= self.rows and self.load(active + self.waiting) <= 1
        if not all_fit and self.load(active) > 1 - ADMIT:
            return active
        while self.waiting and self.load(active + new + self.waiting[-1:]) <= 1:
            new.append(self.waiting.pop())
        active = self.place(active + new)
        prefill(self.model, self.cache, new)
        return active

    def step(self, active: list) -> torch.Tensor:
        """Feed each active sequence's last token. Returns the logits of the next ones (B, V)."""
        last = [s.ids[-1] if s.ids else s.prompt[-1] for s in active]
        positions = [len(s.prompt) + len(s.ids) - 1 for s in active]
        inputs = [last, positions, [s.slot for s in active]]
        if self.shifts is not None:
            inputs.append([p + self.shifts[id(s.prompt)] for p, s in zip(positions, active)])
        return decode_step(self.model, self.cache, *inputs)

    def keep(self, alive: list) -> list:
        """Let the sequences that go on grow. Returns those that stay active, in the order of rows.

        Where they outgrow the cache the youngest wait again, and are prefilled with their ids when
        there is room. The first one always goes on, so the last one's turn will come: reserving
        what each may need at most would halve the rows, and most of it would stay empty.
        """
        while self.load(alive) > 1:
            self.waiting.append(alive.pop())
            self.waiting[-1].slot = -1
        return self.place(alive)

    def place(self, sequences: list) -> list:
        """Give each sequence an extent of its size, by one copy. Returns them in the order of rows.

        Several that share one are branches of a plan: all but the first get a copy. Masked
        attention reads slots 0..B-1, so there the extents close up.
        """
        apart = len({s.slot for s in sequences}) == len(sequences) == len(self.extents)
        if apart and all(self.extents.get(s.slot) == self.size(s) for s in sequences):
            return sequences  # as most steps leave them
        room = self.units if self.cache.split else len(sequences)
        first, taken, extents = self.cache.place(0), bytearray(room), {}
        movers, branches, seen = [], [], set()
        for s in sequences:
            size, begin = self.size(s), (s.slot - first) // self.unit
            if s.slot in seen:
                branches.append(s)
            elif self.extents.get(s.slot) == size and begin + size <= room:  # it stays
                extents[s.slot], taken[begin:begin + size] = size, bytes([1]) * size
            else:
                movers.append(s)
            if s.slot >= 0:
                seen.add(s.slot)
        slots, moves = {}, []
        for s in movers + branches:
            size = self.size(s)
            begin = taken.find(bytes(size))  # the first gap that is large enough
            if begin < 0:  # there is none: begin again and move all, which closes every gap
                self.extents = {}
                return self.place(sequences)
            slots[id(s)] = slot = first + begin * self.unit
            extents[slot], taken[begin:begin + size] = size, bytes([1]) * size
            if s.slot >= 0:
                moves.append((s.slot, slot, len(s.prompt) + len(s.ids) - 1))
        self.cache.copy(moves)
        for s in movers + branches:
            s.slot = slots[id(s)]
        self.extents = extents
        return sequences if self.cache.split else sorted(sequences, key=lambda s: s.slot)


def prefill(model, cache: "KVCache", sequences: list):
    """Compute each prompt once, for its first sequence, and copy the keys to its other sequences.

    A sequence that waits again has ids, too. The last token is left to the next decode step, which
    then returns the logits of the next one.
    """
    key = lambda s: (id(s.prompt), *s.ids)
    first = {key(s): s for s in reversed(sequences)}
    length = lambda s: len(s.prompt) + len(s.ids) - 1
    todo = sorted((s for s in first.values() if length(s)), key=length)
    while todo:  # the longest first, as many at a time as their padded tokens allow
        count = max(1, min(32, PREFILL_TOKENS // (length(todo[-1]) + 1)))
        batch, todo = todo[-count:], todo[:-count]
        # Pad on the right: what is beyond a sequence's end is never seen.
        width = length(batch[-1])
        padded = [((s.prompt + s.ids)[:-1] + [0] * width)[:width] for s in batch]
        cache.write_prompts([(s.slot, length(s)) for s in batch], model.device)
        run, inputs = prompt_inputs(model, torch.tensor(padded, device=model.device))
        run(**inputs, past_key_values=cache, use_cache=True)
    others = [(s, first[key(s)]) for s in sequences]
    cache.copy([(f.slot, s.slot, length(s)) for s, f in others if s is not f and length(s)])


# --------------------------------------------------------------------------------------------------
# One decode step, eager or as a replayed CUDA graph


def decode_step(
    model, cache: "KVCache", ids: list[int], positions: list[int], starts: list[int],
    rotary: list[int] | None = None,
) -> torch.Tensor:
    """Feed one token per row, each at its own position. Returns the next tokens' logits (B, V).

    starts: the first place of each row's keys in the cache; rotary: positions for the embedding,
    where pictures make them others. A CUDA graph is used on a GPU, unless `model.cuda_graphs` is
    False.
    """
    replayed = model.device.type == "cuda" and getattr(model, "cuda_graphs", True)
    step = replay_step if replayed else forward_step
    rows = [ids, positions, starts] if rotary is None else [ids, positions, starts, rotary]
    inputs = torch.tensor(rows, device=model.device)
    return step(model, cache, inputs, max(positions) + 1)


def forward_step(model, cache: "KVCache", inputs: torch.Tensor, filled: int) -> torch.Tensor:
    """A decode step. inputs (3 or 4, B): ids, positions, starts, rotary -> logits (B, V).

    No row has more than `filled` keys. Without split-KV the rows are slots 0..B-1, and attention
    reads that many of each.
    """
    ids, positions, starts, *rotary = inputs
    cache.write_tokens(starts, positions, filled)
    if cache.split:
        options = dict(extents=Extents.of(starts, positions + 1, filled))
    else:
        # Added to the scores: 0 where a row may look, -inf beyond its own position. (B, filled)
        beyond = torch.arange(filled, device=ids.device) > positions[:, None]
        mask = torch.zeros(len(ids), filled, dtype=model.dtype, device=ids.device)
        options = dict(attention_mask=mask.masked_fill_(beyond, -math.inf)[:, None, None])
    options |= dict(past_key_values=cache, use_cache=True)
    (rotary,) = rotary or [positions]
    output = model(input_ids=ids[:, None], position_ids=rotary[:, None], **options)
    return output.logits[:, -1]


def try_split(model, sequences: list):
    """Set `model.split_kv`: whether split-KV and masked attention give the same logits.

    Both do a decode step of the first prompts, in small caches. A kernel that is missing, or
    refuses, or is wrong on this GPU, costs speed and a message, but no run.
    """
    some, steps = sequences[:32], []
    longest = max(len(s.prompt) for s in some)
    for split in (False, True):
        cache = KVCache(len(some), longest, split)
        for slot, s in enumerate(some):
            s.slot = cache.place(slot)
        prefill(model, cache, some)
        step = [(s.prompt[-1], len(s.prompt) - 1, s.slot) for s in some]
        steps.append((cache, torch.tensor(step, device=model.device).T))
    for s in some:
        s.slot = -1
    (masked, inputs), (split, split_inputs) = steps
    # Few rows get 8 splits, and many get 2: some stand for 72. They may share a sequence.
    rows = torch.arange(72, device=model.device) % len(some)
    expected = forward_step(model, masked, inputs, longest)[rows]
    finite = is_finite(expected)

    def try_it():
        # A short reach cuts within the rows, and a long one mostly beyond them.
        for count, reach in ((8, longest), (72, longest), (8, 4096), (72, 4096)):
            logits = forward_step(model, split, split_inputs[:, rows[:count]], reach)
            if finite and differs(logits, expected[:count]):
                return "its result differs"

    if failure := agreed(model, why_not(try_it)):
        message = f"rank {rank()} decodes without split-KV attention, which is slower: {failure}"
        print(message, flush=True)
    if failure or finite:  # or else nothing was compared, and the next rollout tries again
        model.split_kv = failure is None


def differs(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether any row's logits (B, V) are others than expected, by more than bf16's rounding.

    Where another kernel is chosen the last digits differ. Wrong inputs differ by far more.
    """
    spread = (expected.float() - expected.float().mean(-1, keepdim=True)).norm(dim=-1)
    distance = (logits.float() - expected.float()).norm(dim=-1)
    return not bool((distance <= 0.1 * spread).all())  # also where the logits are NaN


def is_finite(logits: torch.Tensor) -> bool:
    """Whether the logits are finite. If not, no kernel is to blame: the model is broken."""
    finite = bool(logits.isfinite().all())
    if not finite:
        print(
            f"rank {rank()} decodes with a model whose logits are not finite: its weights have "
            "diverged, so lower --lr or start from an earlier checkpoint", flush=True
        )
    return finite


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
    model, cache: "KVCache", inputs: torch.Tensor, filled: int,
    graph=torch.cuda.CUDAGraph, capture=captured,
) -> torch.Tensor:
    """`forward_step` by replay: inputs (3, B) -> logits (B, V).

    There is one graph per bucket of rows (powers of 2) and, without split-KV, of length (256
    positions). It is captured when it is first needed. Where that fails the rank says so and stays
    eager for good.
    """
    count = inputs.shape[1]
    rows = min(cache.rows, max(8, 1 << (count - 1).bit_length()))
    length = cache.length if cache.split else min(cache.length, -(-filled // 256) * 256)
    # The rows that fill up the bucket have place 0, which no sequence has.
    inputs = torch.nn.functional.pad(inputs, (0, rows - count))
    if (rows, length) not in cache.graphs:
        expected = forward_step(model, cache, inputs, length)  # also the warm-up of a capture
        if failure := record_step(model, cache, inputs, length, expected, graph, capture):
            # Every rank speaks for itself: the others will wait for a slow one.
            message = f"rank {rank()} decodes without CUDA graphs, which is slower: {failure}"
            print(message, flush=True)
            model.cuda_graphs = False
            return expected[:count]
    recorded, graph_inputs = cache.graphs[rows, length]
    graph_inputs.copy_(inputs)
    recorded.replay()
    return cache.logits[:count]


def record_step(
    model, cache: "KVCache", inputs: torch.Tensor, length: int, expected: torch.Tensor,
    graph, capture,
) -> str | None:
    """Capture `forward_step`, replay it once, and keep it in `cache.graphs` if that was right.

    `expected`: logits of the eager step (B, V). Returns why it failed, or None.
    """
    rows, inputs, recorded = len(expected), inputs.clone(), graph()
    if cache.logits is None:
        cache.logits = expected.new_empty(cache.rows, expected.shape[1])

    def record():
        # Graphs are replayed one at a time, so all share a memory pool and write the same logits.
        with capture(recorded, pool=cache.pool):
            cache.logits[:rows] = forward_step(model, cache, inputs, length)
        cache.pool = cache.pool or recorded.pool()

    def replay():
        recorded.replay()
        if is_finite(expected) and differs(cache.logits[:rows], expected):
            return "its result differs"

    for attempt in (record, replay):
        if failure := agreed(model, why_not(attempt)):
            return failure
    cache.graphs[rows, length] = (recorded, inputs)


def why_not(attempt) -> str | None:
    """What `attempt()` returns, or the first line of its error. Out of memory passes through."""
    try:
        return attempt()
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except (ImportError, TypeError, ValueError, RuntimeError) as error:  # an older torch, or GPU
        return str(error).splitlines()[0]


def agreed(model, failure: str | None) -> str | None:
    """`failure`; with --tp, a failure of any rank of the group: a replay alone would hang."""
    lockstep = getattr(model, "lockstep", None)
    if lockstep is None or lockstep.least(failure is None, model.device):
        return failure
    return failure or "another rank of its group could not"


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
    """Keys and values of sequences: of each layer, `slots` times `length` places for a token each.

    It has the few methods that transformers' models call on a cache. A sequence begins at some
    place, and needs no padding between prompt and completion: it writes at its own position, and
    sees nothing beyond. It moves or branches by a copy of its places.

    Split-KV wants a layer's places in a row, (1 + slots * length, heads, D), and a sequence may
    begin at any of them but 0, which takes what nobody needs. Masked attention reads slots 0..B-1,
    and on a CPU up to 13 % faster if each head's places are neighbours. So then the memory is
    (slots, heads, length, D); what we index is its view (slots, length, heads, D).
    """

    def __init__(self, slots: int, length: int, split: bool = False, rows: int = 0):
        self.slots, self.length = slots, length
        self.split = split  # laid out for split-KV
        self.rows = max(slots, rows)  # of a decode step at most: more than slots if extents grow
        # Made at the first update, when shapes are known: keys and values of each layer.
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.at, self.look = (), None  # where the next forward writes, and what it sees of a layer
        self.full = False  # as large as memory allows
        # Captured decode steps, the memory pool that they share, and the logits that they write.
        self.graphs, self.pool, self.logits = {}, None, None

    def place(self, slot: int) -> int:
        """The first place of a slot."""
        return slot * self.length + self.split

    def write_prompts(self, extents: list[tuple[int, int]], device):
        """The next forward is a prefill of sequences: the first place of each, and its length."""
        starts, lengths = torch.tensor(extents).T[:, :, None]
        position = torch.arange(int(lengths.max()))
        if self.split:  # the padding must not reach the neighbour
            at = torch.where(position < lengths, starts + position, 0).to(device),
        else:
            at = (starts // self.length).to(device), position.to(device)
        self.at, self.look = at, None

    def write_tokens(self, starts: torch.Tensor, positions: torch.Tensor, filled: int):
        """The next forward decodes one token per row, at `positions` (B,) from `starts` (B,) on.

        Attention gets whole layers for split-KV, else the first `filled` places of slots 0..B-1.
        """
        if self.split:
            self.at, self.look = (starts + positions,), lambda stored: stored
        else:
            rows = len(positions)
            self.at = torch.arange(rows, device=positions.device), positions
            self.look = lambda stored: stored[:rows, :filled].transpose(1, 2)

    def copy(self, moves: list[tuple[int, int, int]]):
        """Copy places: of each (source, target, count), `count` of them from the first on.

        All are read before any is written. The device gets the numbers once, not in each layer.
        """
        if not (moves and self.layers):
            return
        sides, most = torch.tensor(moves).T[:2], max(count for _, _, count in moves)
        if self.split:
            rows = [torch.arange(count) for _, _, count in moves]
            sides = torch.stack([torch.cat([*map(torch.add, side, rows)]) for side in sides])
        else:  # whole slots are copied faster than places
            sides = sides // self.length
        sides = sides.to(self.layers[0][0].device)
        source, target = ((side,) if self.split else (side, slice(most)) for side in sides)
        for tensor in (t for layer in self.layers for t in layer):
            tensor[target] = tensor[source]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """Store new keys and values (B, heads, T, D) of a layer. Returns what to attend to.

        Each attention layer calls it.
        """
        if layer == len(self.layers):
            self.layers.append(tuple(map(self.allocate, (keys, values))))
        for stored, new in zip(self.layers[layer], (keys, values)):
            stored[self.at] = new.transpose(1, 2) if self.look is None else new[:, :, 0]
        if self.look is None:
            return keys, values  # prompts attend to themselves only
        return tuple(map(self.look, self.layers[layer]))

    def allocate(self, new: torch.Tensor) -> torch.Tensor:
        """A layer's keys or values, empty, for ones like `new` (B, heads, T, D)."""
        heads, width = new.shape[1], new.shape[3]
        if self.split:
            return new.new_zeros(1 + self.slots * self.length, heads, width)
        return new.new_zeros(self.slots, heads, self.length, width).transpose(1, 2)

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
    CACHE_SHARE of the free memory. More rows than fit wait for a slot, or share slots where
    split-KV lets them. Raises SystemExit if not even `at_least` rows fit.
    """
    cache = getattr(model, "kv_cache", None)
    if cache is not None and cache.length >= length:
        if cache.slots >= rows or cache.full and cache.slots >= at_least:
            return cache
    model.kv_cache = cache = None  # free the old one first
    length = -(-length // 64) * 64  # prompts a little longer still fit
    free = free_memory(model.device)
    if lockstep := getattr(model, "lockstep", None):  # --tp: all have room for as many
        free = lockstep.least(free, model.device)
    # While a model is gathered for a rollout, its weights have the dtype in which it computes.
    row_bytes = length * cache_bytes(model.config, model.dtype)
    sampling = SAMPLING_BYTES * model.config.get_text_config().vocab_size
    budget = int(free * CACHE_SHARE.get(model.device.type, 0.5))
    slots = at_once = min(rows, budget // (row_bytes + sampling))
    split = may_split(model)
    if split and slots < rows:  # most are short most of the time: more of them, on fewer slots
        more = max(slots, min(rows, PARTS * slots, budget // 5 // sampling))
        fewer = (budget - more * sampling) // row_bytes
        slots, at_once = (fewer, more) if fewer >= at_least else (slots, at_once)
    if slots < at_least:
        needed = at_least * row_bytes / 1e9
        fail(
            f"{at_least} sequences of {length} tokens need a KV cache of {needed:.1f} GB, too much "
            f"for {free / 1e9:.1f} GB of free memory; lower --max_completion_tokens"
        )
    if (slots, length) != getattr(model, "kv_cache_shape", None):
        size = f"{slots * row_bytes / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
        shared = f", shared by {at_once} rows" if at_once > slots else ""
        waves = f"; {rows} rows run in waves" if at_once < rows else ""
        print0(f"KV cache: {slots} rows x {length} tokens = {size}{shared}{waves}")
    model.kv_cache_shape = slots, length
    model.kv_cache = KVCache(slots, length, split, at_once)
    model.kv_cache.full = slots < rows  # more rows would not fit either
    return model.kv_cache
