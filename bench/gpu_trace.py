"""What a step asks of a GPU: grpo.decode on drawn lengths, with a model that computes nothing.

Admission, slots, buckets, graphs and moves are the real decoder's. bench/step_model.py turns the
trace into seconds, tests/test_step_model.py holds its counts.
"""

import contextlib
import dataclasses
import functools
import math
import random
import statistics
import types
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import grpo
from plumbing import decoder
from plumbing.balance import deal, decoded_tokens

# --------------------------------------------------------------------------------------------------
# The workload

@dataclasses.dataclass
class Question:
    prompt: list[int]
    plans: list[int]  # tokens of each plan
    totals: list[list[int]]  # of each plan's completions, plan included


def draw_questions(count: int, mean: float, limit: int, seed: int = 0) -> list[Question]:
    """Questions whose completions are log-normal by question and by completion, cut at `limit`.

    `mean` is that of the completions after the cut. Plans have about 180 tokens. These are not the
    paper's lengths, which are not known.
    """
    rng = random.Random(seed)
    normal = lambda mean, sigma: math.exp(rng.gauss(math.log(mean) - sigma**2 / 2, sigma))
    drawn = []
    for q in range(count):
        prompt = int(min(1024, max(150, rng.gauss(220, 90))))
        plans = [int(min(511, max(40, normal(180, 0.35)))) for _ in range(4)]
        hard = normal(1.0, 0.45)
        drawn.append((prompt, plans, [[hard * normal(1.0, 0.45) for _ in range(3)] for _ in plans]))
    cut = lambda part, plan, times: [int(min(limit, max(plan + 30, times * x))) for x in part]

    def build(times: float) -> list[Question]:
        return [
            Question([q] * prompt, plans, [cut(*pair, times) for pair in zip(totals, plans)])
            for q, (prompt, plans, totals) in enumerate(drawn)
        ]

    low, high = 0.0, 20.0 * limit
    for _ in range(40):  # bisection: the mean grows with the factor
        middle = (low + high) / 2
        below = mean_tokens(build(middle)) < mean
        low, high = (middle, high) if below else (low, middle)
    return build(high)


def mean_tokens(questions: list[Question]) -> float:
    return statistics.mean(t for q in questions for part in q.totals for t in part)


def sequences(questions: list[Question]) -> list[list[int]]:
    """Token ids with the shared beginnings of plan trees: question, then plan, then CoT."""
    rows = []
    for q in questions:
        for plan, totals in zip(q.plans, q.totals):
            start = q.prompt + [10**6 + len(rows)] * plan
            rows += [start + [2 * 10**6 + len(rows) + i] * (t - plan) for i, t in enumerate(totals)]
    return rows


def dealt(questions: list[Question], ranks: int) -> tuple[list[list[Question]], float]:
    """The questions that each rank trains on, and the fullest rank's tokens over the mean."""
    held = [questions[r::ranks] for r in range(ranks)]
    row = lambda plan, total: types.SimpleNamespace(ids=range(total), plan_tokens=plan)

    def size(q: Question) -> int:
        rows = [row(plan, t) for plan, totals in zip(q.plans, q.totals) for t in totals]
        return len(q.prompt) + decoded_tokens(rows, 3)

    sizes = [[size(q) for q in own] for own in held]
    hands = deal(sizes, ranks)
    loads = [sum(sizes[owner][n] for owner, n in hand) for hand in hands]
    hands = [[held[owner][n] for owner, n in hand] for hand in hands]
    return hands, max(loads) * ranks / sum(loads)


# --------------------------------------------------------------------------------------------------
# The trace

@dataclasses.dataclass
class Step:
    """One decode step, and what went before it."""

    rows: int
    own: int  # places that the rows have filled: what must be read
    graph: tuple[int, int] = (0, 0)  # rows and places that the graph reads; 0 places: its own
    captured: bool = False
    reserved: int = 0  # places that the cache holds
    moved: list[int] = dataclasses.field(default_factory=list)  # places, per move before the step
    prompts: int = 0  # padded prompt tokens prefilled before the step


class Trace:
    """Runs grpo.decode with a model that computes nothing. `steps` is what a GPU would do.

    Admission, slots, buckets and graphs are the real decoder's. Tokens are chosen such that plans
    and completions have the drawn lengths: the first names the plan, 1 ends a completion.
    """

    END = 1

    def __init__(self, config, questions: list[Question], limit: int, free: float):
        self.config, self.device, self.dtype = config, torch.device("cpu"), torch.bfloat16
        self.steps, self.now, self.free = [], Step(0, 0), int(free)
        parts = [(q, n) for q in questions for n in range(len(q.plans))]
        self.plans = [q.plans[n] for q, n in parts]
        self.totals = [list(q.totals[n]) for q, n in parts]
        self.ends: dict[int, int] = {}
        forks = [[limit] * len(totals) for totals in self.totals]
        self.roots = [
            grpo.Rollout(q.prompt, limits, is_plan=True) for (q, _), limits in zip(parts, forks)
        ]
        self.names = {id(root): n + 2 for n, root in enumerate(self.roots)}

    def __call__(self, input_ids, position_ids=None, attention_mask=None, **options):
        rows, tokens = input_ids.shape
        if "logits_to_keep" in options:
            self.now.prompts += rows * tokens
        else:
            self.shape = rows, 0 if attention_mask is None else attention_mask.shape[-1]
        return types.SimpleNamespace(logits=torch.zeros(rows, 1, 2))

    def end(self, row) -> int:
        """How many tokens a row will have. A completion takes the next of its plan's lengths."""
        if id(row) not in self.ends:
            self.ends[id(row)] = self.totals[row.ids[0] - 2].pop(0)
        return self.ends[id(row)]

    def token(self, row) -> int:
        if row.is_plan:
            return 0 if row.ids else self.names[id(row)]
        return self.END if len(row.ids) + 1 >= self.end(row) else 0

    def decode_step(self, model, cache, ids: list[int], positions: list[int]):
        self.now.rows, self.now.own = len(ids), sum(positions) + len(ids)
        self.now.reserved = cache.slots * cache.length
        options = dict(capture=lambda graph, pool: contextlib.nullcontext())
        options["graph"] = functools.partial(Graph, self)
        inputs = torch.tensor(ids), torch.tensor(positions), max(positions) + 1
        logits = decoder.replay_step(self, cache, *inputs, **options)
        self.steps.append(self.now)
        self.now = Step(0, 0)
        return logits

    def sample_token(self, logits, *options):
        tokens = torch.tensor([self.token(row) for row in self.active])
        return tokens, torch.zeros(len(tokens))

    def run(self) -> list[Step]:
        step, move = decoder.Decoder.step, decoder.KVCache.copy

        def note_active(own, active):
            self.active = active
            return step(own, active)

        def note_move(cache, sources, targets, filled):
            self.now.moved.append(len(sources) * filled)
            move(cache, sources, targets, filled)

        patches = [
            (decoder, "decode_step", self.decode_step),
            (decoder, "free_memory", lambda device: self.free),
            (decoder, "CACHE_SHARE", {"cpu": decoder.CACHE_SHARE["cuda"]}),
            (decoder, "print0", lambda *words: None),
            (decoder.Decoder, "step", note_active),
            (decoder.KVCache, "copy", note_move),
            (grpo, "sample_token", self.sample_token),
        ]
        closed = lambda ids: len(ids) >= self.plans[ids[0] - 2]
        options = dict(temperature=1.0, top_p=1.0, stop_ids=[self.END], seed=0)
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(mock.patch.object(*patch))
            grpo.decode(self, self.roots, plan_closed=closed, max_plan_tokens=512, **options)
        return self.steps


class Graph:
    """A CUDA graph that keeps only what it would read."""

    def __init__(self, trace: Trace):
        self.trace, self.shape = trace, trace.shape
        trace.now.captured = True

    def pool(self):
        return "pool"

    def replay(self):
        self.trace.now.graph = self.shape


# --------------------------------------------------------------------------------------------------
# Copies between host and GPU

class HostTraffic(TorchFunctionMode):
    """Counts copies from Python to a device, and waits for a device's results."""

    NAMES = set("tensor item tolist cpu numpy nonzero __bool__ __int__ __float__".split())

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.count[name] += name in self.NAMES
        return function(*args, **(kwargs or {}))


def copies_of_a_move(layers: int) -> int:
    """Copies from Python that a move of cache slots makes in a model of `layers` blocks."""
    cache = decoder.KVCache(4, 8)
    cache.write_tokens(torch.zeros(4, dtype=torch.long), 8)
    for layer in range(layers):
        cache.update(torch.zeros(4, 1, 1, 2), torch.zeros(4, 1, 1, 2), layer)
    with HostTraffic() as host:
        cache.copy([2, 3], [0, 1], 5)
    return host.count.total()


@functools.cache
def decode_traffic() -> int:
    """Copies to the host and back in a decode step of the real loop, without moves and prompts."""
    steps = []
    for tokens in (3, 7):
        rollout, model = grpo.Rollout([5, 6], [tokens]), TinyModel()
        with HostTraffic() as host, mock.patch.object(decoder, "print0"):
            grpo.decode(model, [rollout], temperature=1.0, top_p=1.0, stop_ids=[], seed=0)
        steps.append(host.count.total())
    return (steps[1] - steps[0]) // 4


class TinyModel:
    """What grpo.decode needs of a model."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        text = types.SimpleNamespace(vocab_size=8, num_hidden_layers=1, num_attention_heads=1)
        text.hidden_size = 4
        self.config = types.SimpleNamespace(get_text_config=lambda: text)

    def __call__(self, input_ids, **options):
        return types.SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 8))
