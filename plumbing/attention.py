"""Attention for packed sequences, for prompts, and for one decoded token per row.

Every layer of every architecture calls `attention`, through transformers' attention interface.

Shapes: B sequences of up to T tokens, N tokens of a packed batch, A sequences that attend together,
D width of a head.
"""

import dataclasses
import math

import numpy as np
import torch

from plumbing.ranks import all_max

# --------------------------------------------------------------------------------------------------
# Attention


def attention(
    layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    packed: "Packed | None" = None, extents: "Extents | None" = None, **ignored,
) -> tuple[torch.Tensor, None]:
    """What every attention layer of a model calls.

    query (B, heads, T, D), key and value (B, key heads, S, D) -> (B, T, heads, D). A decode step
    brings its mask, which is added to the scores, or `extents`, and then the keys and values of all
    sequences (places, key heads, D). A prefill is causal. A packed batch is laid out as separate
    sequences inside this function only, so nothing else needs a mask or padding.
    """
    if softcap is not None:
        raise NotImplementedError("attention scores with a cap (Gemma 2)")
    if extents is not None:
        return attend_split(query, key, value, extents, scaling), None
    grouped = getattr(layer, "num_key_value_groups", 1) > 1
    options = dict(scaling=scaling, window=sliding_window, grouped=grouped)
    if packed is None:
        return attend(query, key, value, mask, **options).contiguous(), None
    packed.attended = True
    parts = []
    for places in packed.places:
        q, k, v = (packed.spread(x, places) for x in (query, key, value))
        parts.append(attend(q, k, v, None, **options))
    return packed.gather(parts), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
    scaling: float | None, window: int | None, grouped: bool,
) -> torch.Tensor:
    """Attention over dense sequences, shapes as above; causal if there is no mask.

    `grouped`: several heads share a key head. `window`: how many positions back a query sees.
    """
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    if window is not None and keys > window and (mask is None or mask.dtype != torch.bool):
        position = torch.arange(keys, device=key.device)
        # A query's own position: all of them in turn, or where a decoding row's mask ends.
        own = position[:, None] if mask is None else (mask == 0).sum(-1, keepdim=True) - 1
        unseen = (position > own) | (position <= own - window)
        mask = torch.zeros(unseen.shape, dtype=query.dtype, device=key.device)
        mask.masked_fill_(unseen, -math.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if grouped and queries == 1:
        # Turn the heads that share a key head into its queries: then no key needs to be copied.
        query, grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3]), False
    if grouped and mask is not None:
        # No fused kernel takes a mask and grouped heads. The other one would keep all scores.
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    causal = mask is None and queries > 1
    options = dict(attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    return out.reshape(len(out), heads, queries, -1).transpose(1, 2)  # (B, T, heads, D)


@dataclasses.dataclass
class Extents:
    """Where the keys of B decoding rows lie among a layer's places: as the split-KV kernel asks."""

    queries: torch.Tensor  # (B + 1,) int32: where each row's queries begin, of which it has one
    starts: torch.Tensor  # (B + 1,) int32: where its keys begin, in any order; the last is unused
    lengths: torch.Tensor  # (B,) int32: how many it has
    longest: int  # none has more

    @classmethod
    def of(cls, starts: torch.Tensor, lengths: torch.Tensor, longest: int) -> "Extents":
        """Of starts and lengths (B,): made once per decode step, for all layers."""
        queries = torch.arange(len(starts) + 1, dtype=torch.int32, device=starts.device)
        starts = torch.nn.functional.pad(starts.int(), (0, 1))
        return cls(queries, starts, lengths.int(), longest)


def attend_split(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extents: Extents,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one query per row to its own keys, by several blocks per row (split-KV).

    query (B, heads, 1, D), key and value (places, key heads, D) -> (B, 1, heads, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    # About two blocks for each of 132 multiprocessors. The kernel's own choice has given NaN, and
    # one split would take its tile for prompts (pytorch/torchtitan issue 3235).
    splits = min(8, max(2, math.ceil(2 * 132 / (len(query) * key.shape[1]))))
    out = varlen_attn(
        query[:, :, 0], key, value, extents.queries, extents.starts, 1, extents.longest,
        scale=scaling, enable_gqa=True, seqused_k=extents.lengths, num_splits=splits,
    )
    return out[:, None]


def may_split(model) -> bool:
    """Whether decode steps may use `attend_split`: not if the kernel must refuse, or be wrong.

    It is for bf16 on CUDA, with heads that are as wide in values as in keys: a multiple of 8, and
    at most 256. Without grouped heads, or with a window, it would not split. `model.split_kv` is
    False where it was tried and failed.
    """
    if model.device.type != "cuda":
        return False
    config = model.config.get_text_config()
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // heads
    grouped = (getattr(config, "num_key_value_heads", None) or heads) < heads
    window = getattr(config, "sliding_window", None) or getattr(config, "qk_nope_head_dim", None)
    fits = grouped and not window and width % 8 == 0 and width <= 256
    return fits and getattr(model, "split_kv", True)


def use_attention(model):
    """Let the model's layers call `attention`. Works for all that use transformers' interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def padding_mask(*args, attention_mask=None, **options):
        if attention_mask is None:
            return None
        # With a padding mask, as in model.generate, transformers' own function is right.
        return sdpa_mask(*args, attention_mask=attention_mask, **options)

    AttentionInterface.register("packed", attention)
    AttentionMaskInterface.register("packed", padding_mask)
    model.get_decoder().set_attn_implementation("packed")  # a vision tower keeps its own
    return model


# --------------------------------------------------------------------------------------------------
# Packed sequences


@dataclasses.dataclass
class Packed:
    """B sequences of up to T tokens without padding. A beginning that two share is stored once.

    Where two sequences begin with the same tokens (a question, a plan), their hidden states are
    equal. So a shared beginning is computed once and its gradients add up: same loss, same
    gradient, fewer tokens. An example: 50 90 70 60 10 and 50 90 80 10, both with the prompt 50 90.

        ids        50 90 70 60 10 80 10   N = 7 tokens; tokens 0 and 1 belong to both sequences
        positions  0 1 2 3 4 2 3
        places     0 1 2 3 4 / 0 1 5 6 0  one group, A = 2; the last 0 is beyond the sequence's end
        owner      0 1 2 3 4 7 8          token 5 (id 80) is computed at place 7 of these ten
        mask       0 1 1 1 / 0 1 1 0      column 1 is about position 2, the first completion token
        targets    2 3 4 5 6              M = 5 logprobs: of the ids 70 60 10 80 10,
        parents    1 2 3 1 5              given all up to the ids 90 70 60 90 80
        columns    0 0 1 2 / 0 3 4 0      which of the M logprobs goes there; 0 outside the mask
    """

    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,) of each token in its sequence
    places: list[torch.Tensor]  # groups of similar length, (A, T): which token is at each position
    owner: torch.Tensor  # (N,) at which place, counted through all groups, a token is computed
    mask: torch.Tensor  # (B, T-1) completion tokens; column t is about token t+1
    targets: torch.Tensor  # (M,) the tokens whose logprobs are wanted, each once
    parents: torch.Tensor  # (M,) the token before each of them, whose hidden state predicts it
    columns: torch.Tensor  # (B, T-1) which of the M logprobs belongs there
    attended: bool = False  # an attention layer has used it

    def spread(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Lay tokens out as one group's sequences: (1, heads, N, D) -> (A, heads, T, D).

        What is beyond a sequence's end does no harm: no causal query before it can see it.
        """
        # An embedding look-up is a gather with a fast backward pass on every device. (It sums over
        # a token's places.)
        tokens = x[0].transpose(0, 1)  # (N, heads, D)
        spread = torch.nn.functional.embedding(places, tokens.flatten(1))  # (A, T, heads * D)
        return spread.unflatten(-1, tokens.shape[1:]).transpose(1, 2)

    def gather(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The groups' outputs (A, T, heads, D), token by token: (1, N, heads, D)."""
        flat = torch.cat([part.flatten(0, 1).flatten(1) for part in parts])  # (places, heads * D)
        tokens = torch.nn.functional.embedding(self.owner, flat)  # (N, heads * D)
        return tokens.unflatten(-1, parts[0].shape[2:])[None]


def shared_beginning(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    shortest = min(len(a), len(b))
    different = a[:shortest] != b[:shortest]
    return int(different.argmax()) if different.any() else shortest


def pack(
    sequences: list[list[int]], prompt_lengths: list[int], device, share: bool = True,
    given: list[list[int]] = (),
) -> Packed:
    """Lay out sequences without padding. The mask marks each one's tokens after its prompt.

    `given`: of each sequence, positions after its prompt that are not marked (what a tool said).

    Sequences that begin with the same tokens should be neighbours, as micro_batches orders them.
    Without sequences the result is one row with no marked token: a rank without work still takes
    part in the forward. The mask is made from lengths. One made from ids would drop the end-of-turn
    token from the loss where pad == eos.
    """
    if not sequences:
        sequences, prompt_lengths = [[0, 0]], [2]
    lengths = np.array([len(s) for s in sequences])
    places, ids, rows, positions = number_tokens([np.asarray(s) for s in sequences], share)
    groups, start = group_by_length(rows, lengths)

    column = np.arange(1, lengths.max())  # position of the token that each column is about
    mask = (column >= np.array(prompt_lengths)[:, None]) & (column < lengths[:, None])
    for row, said in zip(mask, given):
        row[np.array(said, dtype=np.int64) - 1] = False
    wanted = np.zeros(len(ids), dtype=bool)
    wanted[places[:, 1:][mask]] = True
    # At least one is computed, and masked away, or no gradient would reach the model.
    wanted[places[0, 1]] |= not mask.any()
    targets = wanted.nonzero()[0]
    parents = places[rows[targets], positions[targets] - 1]
    columns = np.where(mask, (wanted.cumsum() - 1)[places[:, 1:]], 0)

    tensor = lambda array: torch.from_numpy(array).to(device)
    return Packed(
        ids=tensor(ids),
        positions=tensor(positions),
        places=[tensor(places[group, :lengths[group[0]]]) for group in groups],
        owner=tensor(start[rows] + positions),
        mask=tensor(mask),
        targets=tensor(targets),
        parents=tensor(parents),
        columns=tensor(columns),
    )


def number_tokens(sequences: list[np.ndarray], share: bool) -> tuple[np.ndarray, ...]:
    """Number the tokens of B sequences from 0 to N-1. A shared beginning gets its numbers once.

    Returns `places` (B, T), the number of the token at each position (0 beyond a sequence's end),
    and of each token its id, the row that computes it and its position there, each (N,).
    """
    longest, total = max(len(s) for s in sequences), 0
    places = np.zeros((len(sequences), longest), dtype=np.int64)
    ids, rows, positions = [], [], []
    for b, sequence in enumerate(sequences):
        common = shared_beginning(sequences[b - 1], sequence) if share and b else 0
        new = len(sequence) - common  # 0 if the neighbour begins with all of this one
        places[b, :common] = places[b - 1, :common]
        places[b, common:len(sequence)] = np.arange(total, total + new)
        ids.append(sequence[common:])
        rows.append(np.full(new, b))
        positions.append(np.arange(common, len(sequence)))
        total += new
    return places, *(np.concatenate(parts) for parts in (ids, rows, positions))


def group_by_length(rows: np.ndarray, lengths: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """The rows that attend together, longest first, and where each row starts among all places.

    Padding all rows to the longest would cost more than the attention itself. So a row is padded
    by at most a quarter of its own length: below 0.8 of a group's longest a new group begins. Rows
    that compute no token of their own are left out.
    """
    groups, start, total = [], np.zeros(len(lengths), dtype=np.int64), 0
    for b in sorted(set(rows.tolist()), key=lambda b: -lengths[b]):
        if not groups or lengths[b] < 0.8 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(b)
        start[b] = total
        total += lengths[groups[-1][0]]
    return groups, start


# --------------------------------------------------------------------------------------------------
# Micro-batches


def micro_batches(
    sequences: list[list[int]], tokens: int, device, share: bool = True
) -> list[list[int]]:
    """Row indices cut into micro-batches of at most `tokens` tokens, in `pack`'s best order.

    A row longer than `tokens` gets a micro-batch of its own. A forward of a sharded model is a
    collective. So every rank gets equally many micro-batches, empty ones at the end, or the
    backward pass would hang. Each waits for the slowest rank's, so the largest come first on all.
    """
    # Sorted by ids, rows that share a beginning become neighbours. Without sharing, sort by length.
    key = lambda i: sequences[i] if share else -len(sequences[i])
    batches, sizes, room = [], [], -1
    for i in sorted(range(len(sequences)), key=key):
        new = len(sequences[i])
        if share and batches:
            before = np.asarray(sequences[batches[-1][-1]])
            new -= shared_beginning(before, np.asarray(sequences[i]))
        if new > room:
            batches.append([])
            sizes.append(0)
            new, room = len(sequences[i]), tokens
        batches[-1].append(i)
        sizes[-1] += new
        room -= new
    order = sorted(range(len(batches)), key=lambda b: -sizes[b])
    missing = all_max(len(batches), device) - len(batches)
    return [batches[b] for b in order] + [[]] * missing
