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
from bench.gpu_counts import as_on_gpu
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

    @property
    def read(self) -> int:
        return math.prod(self.graph) or self.own


class Trace:
    """Runs grpo.decode with a model that computes nothing. `steps` is what a GPU would do.

    Admission, slots, buckets and graphs are the real decoder's. Tokens are chosen such that plans
    and completions have the drawn lengths: the first names the plan, 1 ends a completion.
    """

    END = 1
    split_kv = True  # the kernel needs no trial

    def __init__(
        self, config, questions: list[Question], limit: int, free: float, split: bool = True
    ):
        self.split = split
        self.config, self.device, self.dtype = config, torch.device("cpu"), torch.bfloat16
        self.steps, self.now, self.free, self.capturing = [], Step(0, 0), free, False
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

    def forward_step(self, model, cache, *inputs, **options):
        """In place of an eager step: a replayed one. What that captures is the eager one."""
        if self.capturing:
            return self.eager(model, cache, *inputs, **options)
        self.capturing, self.now.reserved = True, cache.slots * cache.length
        options = dict(capture=lambda graph, pool: contextlib.nullcontext())
        options["graph"] = functools.partial(Graph, self)
        logits = decoder.replay_step(model, cache, *inputs, **options)
        self.capturing = False
        self.steps.append(self.now)
        self.now = Step(0, 0)
        return logits

    def sample_token(self, logits, *options):
        tokens = torch.tensor([self.token(row) for row in self.active])
        return tokens, torch.zeros(len(tokens))

    def run(self) -> list[Step]:
        step, move, self.eager = decoder.Decoder.step, decoder.KVCache.copy, decoder.forward_step

        def note_active(own, active):
            self.active, self.now.rows = active, len(active)
            self.now.own = sum(len(row.prompt) + len(row.ids) for row in active)
            return step(own, active)

        def note_move(cache, *moves):
            self.now.moved.append(moved_places(*moves))
            move(cache, *moves)

        patches = [
            (decoder, "forward_step", self.forward_step),
            (decoder.Decoder, "step", note_active),
            (decoder.KVCache, "copy", note_move),
            (grpo, "sample_token", self.sample_token),
        ]
        closed = lambda ids: len(ids) >= self.plans[ids[0] - 2]
        options = dict(temperature=1.0, top_p=1.0, stop_ids=[self.END], seed=0)
        with contextlib.ExitStack() as stack:
            stack.enter_context(as_on_gpu(self.free, self.split))
            for patch in patches:
                stack.enter_context(mock.patch.object(*patch))
            grpo.decode(self, self.roots, plan_closed=closed, max_plan_tokens=512, **options)
        return self.steps


def moved_places(*moves) -> int:
    """Places that a call of KVCache.copy moves: of (source, target, count), or of whole slots."""
    if len(moves) == 1:
        return sum(count for _, _, count in moves[0])
    sources, _, filled = moves
    return len(sources) * filled


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


class TinyModel:
    """What grpo.decode needs of a model: it stores keys and values, and attends to nothing."""

    device, dtype, split_kv = torch.device("cpu"), torch.float32, True

    def __init__(self, layers: int = 1):
        text = types.SimpleNamespace(
            vocab_size=8, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
            hidden_size=16,
        )
        self.layers, self.config = layers, types.SimpleNamespace(get_text_config=lambda: text)

    def __call__(self, input_ids, past_key_values, **options):
        new = torch.zeros(len(input_ids), 1, input_ids.shape[1], 8)
        for layer in range(self.layers):
            past_key_values.update(new, new, layer)
        return types.SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 8))


def traffic(limits: list[int], layers: int = 1) -> int:
    """Copies between host and GPU in a rollout of one sequence per limit, by the real loop."""
    rollouts = [grpo.Rollout([5, 6], [limit]) for limit in limits]
    with as_on_gpu(), HostTraffic() as host:
        options = dict(temperature=1.0, top_p=1.0, stop_ids=[], seed=0)
        grpo.decode(TinyModel(layers), rollouts, **options)
    return host.count.total()


@functools.cache
def decode_traffic() -> int:
    """Copies between host and GPU in a decode step, without moves and prompts."""
    return (traffic([7]) - traffic([3])) // 4


@functools.cache
def copies_of_a_move(layers: int) -> int:
    """Copies from the host that a move makes in a model of so many blocks.

    When the first of two sequences ends, the other one takes its slot.
    """
    return traffic([2, 5], layers) - traffic([5, 2], layers)
