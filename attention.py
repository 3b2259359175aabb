"""Attention by hand: of sequences packed without padding, of prompts, and of one token a row against a KV cache.

Every layer of every architecture calls `attention`, through transformers' attention interface. It knows three callers:
`Packed` (training: what sequences share is computed once), a prefill (causal) and a decode step (`KVCache`).

Shapes: B sequences, T tokens a sequence, N tokens of a packed batch, D width of a head.
"""
import dataclasses
import math

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------
# Attention

def attention(layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
              scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
              packed: "Packed | None" = None, **ignored) -> tuple[torch.Tensor, None]:
    """What every attention layer of a model computes: query (B, heads, T, D), key and value (B, key heads, S, D) ->
    (B, T, heads, D).

    Decoding brings its mask, which is added to the scores; a prefill is causal; a packed batch is laid out as sequences
    for the length of this function, so that they need neither a mask nor padding anywhere else.
    """
    if softcap is not None:
        raise NotImplementedError("attention scores with a cap (Gemma 2)")
    options = dict(scaling=scaling, window=sliding_window, shared=getattr(layer, "num_key_value_groups", 1) > 1)
    if packed is None:
        return attend(query, key, value, mask, **options).contiguous(), None
    packed.seen = True
    return packed.gather([attend(*(packed.spread(x, slots) for x in (query, key, value)), None, **options)
                          for slots in packed.slots]), None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
           scaling: float | None, window: int | None, shared: bool) -> torch.Tensor:
    """Attention over dense sequences, shapes as above; causal without a mask. `shared`: several heads use a key head."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    if window is not None and keys > window and (mask is None or mask.dtype != torch.bool):
        at = torch.arange(keys, device=key.device)
        # Positions of the queries: all of them, or where a decoding row's mask ends.
        last = at[:, None] if mask is None else (mask == 0).sum(-1, keepdim=True) - 1
        far = (at > last) | (at <= last - window)
        mask = torch.zeros(far.shape, dtype=query.dtype, device=key.device).masked_fill_(far, -math.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if shared and queries == 1:  # heads that share keys become queries that share them: no key is copied
        query, shared = query.reshape(len(query), key.shape[1], -1, query.shape[3]), False
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and queries > 1, scale=scaling, enable_gqa=shared)
    return out.reshape(len(out), heads, queries, -1).transpose(1, 2)  # (B, T, heads, D)


def use_attention(model):
    """Let the model's layers call `attention` above. Works for every architecture on transformers' attention interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("packed", attention)
    # Without a padding mask there is none to build; with one, as in model.generate, transformers' own is right.
    AttentionMaskInterface.register("packed", lambda *args, attention_mask=None, **options:
                                    None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **options))
    model.set_attn_implementation("packed")
    return model


# ---------------------------------------------------------------------------------------------------------------
# KV cache

class KVCache:
    """Keys and values of up to `slots` sequences, each filled from position 0: per layer (slots, heads, length, D).

    It has the few methods that transformers' models call on a cache. Rows need no padding between prompt and
    completion: a row writes at its own position and a mask hides what lies beyond. A sequence moves or forks by a
    copy of its slot.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # made at the first update, when shapes are known
        self.at: tuple | None = None
        self.full = False  # as large as memory allows
        self.graphs: dict = {}  # captured decode steps (cuda_graph.py), their memory pool and where they write
        self.pool, self.logits = None, None

    def write_prompts(self, slots: torch.Tensor):
        """The next forward is a prefill into `slots` (B,), from position 0."""
        self.at = (slots, None, None)

    def write_tokens(self, positions: torch.Tensor, filled: int):
        """The next forward decodes one token for slots 0..B-1 at `positions` (B,); attention sees `filled` positions."""
        self.at = (torch.arange(len(positions), device=positions.device), positions, filled)

    def copy(self, sources: list[int], targets: list[int], filled: int):
        """Copy the first `filled` positions of slots `sources` to slots `targets` (read before any is written)."""
        for tensor in (t for layer in self.layers for t in layer):
            source, target = (torch.tensor(slots, device=tensor.device) for slots in (sources, targets))
            tensor[target, :, :filled] = tensor[source, :, :filled]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """Called by each attention layer with new keys and values (B, heads, T, D); returns what to attend to."""
        if layer == len(self.layers):
            self.layers.append(tuple(new.new_zeros(self.slots, new.shape[1], self.length, new.shape[3])
                                     for new in (keys, values)))
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


# ---------------------------------------------------------------------------------------------------------------
# Packed sequences

@dataclasses.dataclass
class Packed:
    """B sequences of up to T tokens without padding, and what they have in common only once: N tokens.

    Two sequences that begin alike (a question, a plan) have equal hidden states as far as they are alike, so a shared
    beginning is computed once and its gradients add up: same loss, same gradient, fewer tokens.
    """
    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,) place of each token in its sequence
    slots: list[torch.Tensor]  # each (A, T): which of the N tokens stands there, for A sequences of like length
    owner: torch.Tensor  # (N,) the one place, counted through all of `slots`, where each token is computed
    mask: torch.Tensor  # (B, T-1) completion tokens; column t is about token t+1
    targets: torch.Tensor  # (M,) the tokens whose logprobs are wanted, each once
    parents: torch.Tensor  # (M,) the token before each of them, whose hidden state predicts it
    columns: torch.Tensor  # (B, T-1) which of the M logprobs belongs there
    seen: bool = False  # an attention layer has laid it out

    def spread(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """(1, heads, N, D) -> (A, heads, T, D); what lies beyond an end is never seen by a causal query before it."""
        # An embedding look-up is a gather whose backward pass, a sum over a token's places, is fast on every device.
        tokens = x[0].transpose(0, 1)  # (N, heads, D)
        spread = torch.nn.functional.embedding(slots, tokens.flatten(1))  # (A, T, heads * D)
        return spread.unflatten(-1, tokens.shape[1:]).transpose(1, 2)

    def gather(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """A (A, T, heads, D) for each of `slots` -> (1, N, heads, D)"""
        places = torch.cat([part.flatten(0, 1).flatten(1) for part in parts])  # (places, heads * D)
        return torch.nn.functional.embedding(self.owner, places).unflatten(-1, parts[0].shape[2:])[None]


def shared_beginning(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    shortest = min(len(a), len(b))
    different = a[:shortest] != b[:shortest]
    return int(different.argmax()) if different.any() else shortest


def pack(sequences: list[list[int]], prompt_lengths: list[int], device, share: bool = True) -> Packed:
    """Lay out sequences; those that begin alike should be neighbours (micro_batches sees to it).

    The tokens from a sequence's prompt length on are marked. No sequences give one row with nothing marked: a rank
    without work still takes part in the forward. Masks come from lengths: with pad == eos, one made from ids would
    drop the end-of-turn token from the loss.
    """
    if not sequences:
        sequences, prompt_lengths = [[0, 0]], [2]
    rows, lengths = [np.asarray(s) for s in sequences], np.array([len(s) for s in sequences])
    longest = int(lengths.max())
    slots, ids, line, positions, total = np.zeros((len(rows), longest), dtype=np.int64), [], [], [], 0
    for b, row in enumerate(rows):
        common = shared_beginning(rows[b - 1], row) if share and b else 0
        slots[b, :common] = slots[b - 1, :common]
        slots[b, common:len(row)] = np.arange(total, total + len(row) - common)
        ids.append(row[common:])  # none where another sequence begins with all of this one, and attends for it
        line.append(np.full(len(row) - common, b))
        positions.append(np.arange(common, len(row)))
        total += len(row) - common
    ids, line, positions = (np.concatenate(part) for part in (ids, line, positions))

    # Sequences of like length attend together: padding all to the longest would cost more than the attention itself.
    groups, start, places = [], np.zeros(len(rows), dtype=np.int64), 0
    for b in sorted(set(line.tolist()), key=lambda b: -lengths[b]):
        if not groups or lengths[b] < 0.8 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(b)
        start[b] = places
        places += lengths[groups[-1][0]]

    column = np.arange(1, longest)  # the place of the token that a column is about
    mask = (column >= np.array(prompt_lengths)[:, None]) & (column < lengths[:, None])
    wanted = np.zeros(total, dtype=bool)
    wanted[slots[:, 1:][mask]] = True
    wanted[slots[0, 1]] |= not mask.any()  # one to compute and mask away, or no gradient would reach the model
    targets = wanted.nonzero()[0]
    parents = slots[line[targets], positions[targets] - 1]
    columns = np.where(mask, (wanted.cumsum() - 1)[slots[:, 1:]], 0)
    tensor = lambda array: torch.from_numpy(array).to(device)
    return Packed(tensor(ids), tensor(positions), [tensor(slots[group, :lengths[group[0]]]) for group in groups],
                  tensor(start[line] + positions), tensor(mask), tensor(targets), tensor(parents), tensor(columns))


def pad_batch(sequences: list[list[int]], device) -> torch.Tensor:
    """Right-padded ids (B, T)."""
    longest = max(len(s) for s in sequences)
    return torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=device)
