"""A training step on GPUs in seconds, ESTIMATED: counts of the real code x a table of constants.

    python -m bench.step_model                              Qwen2.5-7B, 8 x H100 and 8 x H200
    python -m bench.step_model --model qwen3_14b --tp 8     rollouts on a thinner model
    python -m bench.step_model --constants FILE             constants that bench.gpu has measured

Kernels, bytes and FLOPs are counted where the project's own code runs on the meta device
(bench/gpu_counts.py). Decode steps, places read, CUDA graphs and moves of slots come from a trace
of grpo.decode (bench/gpu_trace.py). Micro-batches are those of plumbing/attention.py, dealt out by
plumbing/balance.py. The constants are chosen, not measured. So a second printed here is a guess
that may be off by a third. Not counted are held-out evaluations and saves.
"""

import dataclasses
import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Literal

import torch

from bench.gpu_counts import Counts, count_decode, count_draw, count_update, whole
from bench.gpu_trace import (
    Question,
    Step,
    Trace,
    copies_of_a_move,
    dealt,
    decode_traffic,
    draw_questions,
    sequences,
)
from plumbing import decoder
from plumbing.attention import micro_batches, pack
from plumbing.flags import parse_config
from plumbing.memory import estimate, make_empty
from plumbing.ranks import require
from plumbing.thin import SIZES, thin_config
from plumbing.weights import load_config

ROOT = Path(__file__).resolve().parents[1]

# --------------------------------------------------------------------------------------------------
# Constants: the one place for them

@dataclasses.dataclass
class GPU:
    bandwidth: float  # bytes/s of its memory (data sheet)
    flops: float  # dense bf16 products per second (data sheet)
    memory: float  # bytes that CUDA reports
    blocks: int = 132  # multiprocessors


GPUS = {"H100": GPU(3.35e12, 989e12, 85.0e9), "H200": GPU(4.80e12, 989e12, 150.1e9)}


@dataclasses.dataclass
class Constants:
    """Every one is chosen, none is measured. bench.gpu measures those with a dagger (+).

    "of memory" and "of products" are shares of a data sheet's bytes and FLOPs per second.
    """

    decode_memory: float = 0.80  # + of memory: products of a few rows, which read weights
    decode_products: float = 0.60  # + of products: the same with many rows
    product_us: float = 3.5  # + shortest product: k_proj and v_proj are too small for bandwidth
    small_memory: float = 0.75  # + of memory: elementwise kernels in decode
    small_us: float = 1.7  # + one small kernel inside a replayed graph
    masked_memory: float = 0.50  # + of memory: masked SDPA when all multiprocessors have work
    masked_block: float = 17e9  # + bytes/s that one of its blocks (a row and key head) reads
    varlen_memory: float = 0.70  # + of memory: varlen_attn with split keys, each row its length
    attention_us: float = 3.0  # start of one attention kernel; split keys need two
    capture_s: float = 0.12  # + capture of one graph, with the eager step before it
    prefill_products: float = 0.45  # + of products: prompts of one to a few hundred tokens
    host_us: float = 90.0  # Python of a step that no GPU work hides (40 to 90 seen on CPUs)
    host_row_us: float = 0.35  # the same, per row
    wait_us: float = 12.0  # + a copy between host and GPU that one of them waits for
    train_products: float = 0.627  # + of products: 620 TFLOP/s
    train_memory: float = 0.78  # + of memory: elementwise kernels in training
    train_attention: float = 0.35  # + of products: causal flash attention, its pairs counted half
    link: float = 370e9  # bytes/s of a ring collective per GPU over NVLink (data sheet: 450e9)
    all_reduce_us: float = 12.0  # start of an all-reduce over NVLink inside a graph
    reserved: float = 1.6e9  # bytes: CUDA context, communication buffers
    other_s: float = 3.0  # grading, dealing out, unshard, optimiser, log


def read_constants(path: str) -> Constants:
    """Constants, with those that a file of bench.gpu holds. SystemExit if it holds others."""
    constants = Constants()
    if path:
        require(Path(path).is_file(), f"no file {path}: `python -m bench.gpu --out FILE` writes it")
        record = json.loads(Path(path).read_text())
        require(not record.get("tiny"), f"{path} is of a dry run: run bench.gpu on a GPU")
        measured = record["constants"]
        unknown = set(measured) - set(vars(constants))
        require(not unknown, f"{path} has unknown constants {sorted(unknown)}: run bench.gpu again")
        constants = dataclasses.replace(constants, **measured)
    return constants


# --------------------------------------------------------------------------------------------------
# A model, its rollout, its update

LIMITS = {"qwen3": 4608}  # completion limits of the recipes, by family; others have 3,584
LARGER = {  # shapes that no recipe trains
    "qwen3_32b": dict(
        model_type="qwen3", hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=False,
    ),
}


@dataclasses.dataclass
class Flags:
    model: tuple = ("qwen2.5_7b",)  # names in recipes/shapes, qwen3_32b, or model folders
    gpu: tuple = ("H100", "H200")  # kinds of GPU
    gpus: int = 8  # number of GPUs (>= 1)
    mean: float = 1460.0  # tokens of a completion, after the cut at its limit (>= 100)
    questions: int = 128  # per step, of 4 plans x 3 CoTs each (>= 1)
    max_completion_tokens: int = 0  # 0: 4608 for Qwen3 and 3584 for others, as in the recipes
    tokens_per_micro_batch: int = 16384  # (>= 4608)
    tp: int = 1  # GPUs that share a thinner model in a rollout (>= 1)
    attention: Literal["code", "sdpa", "varlen"] = "code"  # of a decode step; code: what it calls
    constants: str = ""  # JSON file of bench.gpu; empty: the chosen ones


def load_shape(name: str):
    """The config of a name in recipes/shapes, of LARGER, or of a model folder."""
    if name in LARGER:
        from transformers import AutoConfig

        return AutoConfig.for_model(**LARGER[name])
    shape = ROOT / "recipes/shapes" / name
    return load_config(str(shape if shape.is_dir() else name))


def thin(config, tp: int):
    """The config of one of `tp` ranks in a rollout: 1 / tp of the heads and of the MLP's width."""
    whole_parts = all(getattr(config, name) % tp == 0 for name in SIZES)
    require(whole_parts, f"--tp {tp} does not divide {', '.join(SIZES)}: lower it")
    return thin_config(config, tp) if tp > 1 else config


def parameters(config) -> int:
    return sum(p.numel() for p in make_empty(config).parameters())


class Rollout:
    """Seconds of the decode steps of one model on one kind of GPU."""

    def __init__(self, config, gpu: GPU, constants: Constants, flags: Flags):
        self.config, self.gpu, self.c, self.tp = thin(config, flags.tp), gpu, constants, flags.tp
        self.split = flags.attention != "sdpa"
        self.layers, self.parameters = config.num_hidden_layers, parameters(self.config)
        self.kv = decoder.cache_bytes(self.config, torch.bfloat16)  # bytes of a token, on a rank
        called = "sdpa" if "sdpa" in self.counts(8)[0].kinds else "varlen"
        self.varlen = "varlen" == (called if flags.attention == "code" else flags.attention)
        one, two = copies_of_a_move(1), copies_of_a_move(2)
        self.copies = one + (self.layers - 1) * (two - one)

    @functools.cache
    def counts(self, rows: int) -> tuple[Counts, Counts]:
        one, two = (count_decode(self.config, blocks, rows, self.split) for blocks in (1, 2))
        return whole(one, two, self.layers), count_draw(self.config, rows)

    def products(self, counts: Counts) -> float:
        """Each product takes as long as its bytes or its FLOPs, and not less than a short one."""
        memory = self.c.decode_memory * self.gpu.bandwidth
        flops, least = self.c.decode_products * self.gpu.flops, self.c.product_us * 1e-6
        each = lambda size: max(size[0] / memory, size[1] / flops, least)
        return sum(each(size) * number for size, number in counts.products.items())

    def small(self, counts: Counts) -> float:
        moved = counts.small_bytes / (self.c.small_memory * self.gpu.bandwidth)
        return counts.small * self.c.small_us * 1e-6 + moved

    def attention(self, step: Step) -> float:
        start, bandwidth = self.layers * self.c.attention_us * 1e-6, self.gpu.bandwidth
        if self.varlen:  # two kernels: the parts of each row, and their sum
            return step.own * self.kv / (self.c.varlen_memory * bandwidth) + 2 * start
        (rows, places), heads = step.graph, self.config.num_key_value_heads
        blocks, at_once = rows * heads, 2 * self.gpu.blocks  # one block walks all places of a head
        rounds = max(1.0, math.ceil(blocks / at_once) * at_once / blocks * (blocks > at_once))
        all_blocks = rounds * rows * places * self.kv / (self.c.masked_memory * bandwidth)
        return max(all_blocks, places * self.kv / heads / self.c.masked_block) + start

    def all_reduces(self, rows: int) -> float:
        """Two in each layer, of (rows, hidden size) in bf16."""
        moved = 2 * (self.tp - 1) / self.tp * rows * self.config.hidden_size * 2 / self.c.link
        return (self.tp > 1) * 2 * self.layers * (self.c.all_reduce_us * 1e-6 + moved)

    def moves(self, step: Step) -> float:
        """Copies of slots: read and written once to gather them, and once to store them."""
        moved = 4 * sum(step.moved) * self.kv / (self.c.small_memory * self.gpu.bandwidth)
        return moved + len(step.moved) * self.copies * self.c.wait_us * 1e-6

    def step_parts(self, step: Step) -> dict[str, float]:
        (model, draw), c = self.counts(step.graph[0]), self.c
        host = c.host_us + c.host_row_us * step.rows + decode_traffic() * c.wait_us
        prefill = 2 * self.parameters * step.prompts / (c.prefill_products * self.gpu.flops)
        return {
            "products (weights)": self.products(model),
            "attention": self.attention(step),
            "small kernels": self.small(model),
            "all-reduces": self.all_reduces(step.graph[0]),
            "captures of graphs": step.captured * c.capture_s,
            "drawing tokens": self.small(draw),
            "prompts, host, moves": prefill + host * 1e-6 + self.moves(step),
        }

    def parts(self, steps: list[Step]) -> tuple[dict[str, float], int]:
        """Seconds of a rollout by part, and its number of graphs."""
        total, seen = Counter(), set()
        for step in steps:
            graph = (step.graph[0], 0) if self.varlen else step.graph  # no mask, no length
            step = dataclasses.replace(step, graph=graph, captured=graph not in seen)
            seen.add(graph)
            for name, seconds in self.step_parts(step).items():
                total[name] += seconds
        return dict(total), len(seen)


class Update:
    """Seconds of the micro-batches of a step: each waits for the slowest rank's."""

    def __init__(self, config, questions: list[Question], gpu: GPU, c: Constants, flags: Flags):
        self.config, self.gpu, self.c, self.ranks, self.first = config, gpu, c, [], None
        hands, self.imbalance = dealt(questions, flags.gpus)
        for hand in hands:
            rows, cpu = sequences(hand), torch.device("cpu")
            cut = micro_batches(rows, flags.tokens_per_micro_batch, cpu)
            packs = [pack([rows[i] for i in part], [150] * len(part), cpu) for part in cut]
            self.first = self.first or packs[0]
            self.ranks.append([(len(packed.ids), self.pairs(packed)) for packed in packs])
        self.micros = max(map(len, self.ranks))
        self.tokens = sum(n for rank in self.ranks for n, _ in rank) / flags.gpus
        # Gathers in bf16, twice for an update, whose gradients are reduced in fp32.
        weights = 2 * parameters(config) * (flags.gpus - 1) / flags.gpus / c.link
        self.gathers = {False: weights, True: 4 * weights}

    @staticmethod
    def pairs(packed) -> int:
        return sum(places.shape[0] * places.shape[1] ** 2 for places in packed.places)

    def seconds(self, checkpointing: bool, grad: bool) -> float:
        """Of a pass over all micro-batches: an update, or without `grad` a reference's logprobs."""
        config, c, gpu = self.config, self.c, self.gpu
        one, two = (count_update(config, n, self.first, checkpointing, grad) for n in (1, 2))
        counts = whole(one, two, config.num_hidden_layers)
        products = counts.flops() / (c.train_products * gpu.flops)
        moved = counts.small_bytes / (c.train_memory * gpu.bandwidth)
        token = (products + moved) / len(self.first.ids)
        pair = counts.attention / (c.train_attention * gpu.flops) / self.pairs(self.first)
        each = lambda tokens, pairs: max(token * tokens + pair * pairs, self.gathers[grad])
        in_turn = [[rank[i] for rank in self.ranks if i < len(rank)] for i in range(self.micros)]
        return sum(max(each(*micro) for micro in micros) for micros in in_turn)

    def utilisation(self, seconds: float) -> float:
        """MFU: 6 FLOPs per parameter and token, without recomputation."""
        return 6 * parameters(self.config) * self.tokens / seconds / self.gpu.flops


# --------------------------------------------------------------------------------------------------
# The table


def limit_of(config, flags: Flags) -> int:
    return flags.max_completion_tokens or LIMITS.get(config.model_type, 3584)


def memory_parts(config, flags: Flags, tokens: int, checkpointing: bool) -> dict[str, float]:
    sizes = dict(prompt_tokens=1024, completion_tokens=limit_of(config, flags), rows=1)
    options = dict(ranks=flags.gpus, micro_tokens=tokens, checkpointing=checkpointing)
    return estimate(config, **sizes, **options)


def rollouts(config, gpu: GPU, questions: list[Question], c: Constants, flags: Flags) -> list[list]:
    """The decode steps of each rank, or of each group of --tp ranks, which decodes as one."""
    held = memory_parts(config, flags, 4608, True)
    always = sum(held[name] for name in ("weights", "optimiser", "reference"))
    free = gpu.memory - c.reserved - always - 2 * parameters(thin(config, flags.tp))
    groups, limit = flags.gpus // flags.tp, limit_of(config, flags)
    split, config = flags.attention != "sdpa", thin(config, flags.tp)
    made = [Trace(config, questions[g::groups], limit, free, split) for g in range(groups)]
    return [trace.run() for trace in made]


def without_recomputing(config, questions, gpu: GPU, c: Constants, flags: Flags) -> str:
    """Seconds of an update whose activations are kept, at the largest micro-batch that fits."""
    for tokens in (16384, 12288, 8192, 6144):
        if memory_parts(config, flags, tokens, False)["update"] <= 0.9 * gpu.memory:
            smaller = dataclasses.replace(flags, tokens_per_micro_batch=tokens)
            seconds = Update(config, questions, gpu, c, smaller).seconds(False, True)
            return f"{seconds:.0f} s at {tokens:,} tokens"
    return "does not fit"


def column(name: str, kind: str, c: Constants, flags: Flags) -> dict[str, str]:
    """What the table says of one model on one kind of GPU: line -> entry."""
    config, gpu = load_shape(name), GPUS[kind]
    questions = draw_questions(flags.questions, flags.mean, limit_of(config, flags))
    lines = {"estimated seconds": f"{name}, {flags.gpus} x {kind}"}
    try:
        traces = rollouts(config, gpu, questions, c, flags)
    except SystemExit:  # not one plan's completions fit
        return lines | {"rollout": "does not fit"}
    model = Rollout(config, gpu, c, flags)
    parts, graphs, steps = max(
        ((*model.parts(steps), steps) for steps in traces), key=lambda one: sum(one[0].values())
    )
    update = Update(config, questions, gpu, c, flags)
    totals = {"rollout, slowest rank": sum(parts.values())}
    totals["reference logprobs"] = update.seconds(True, False)
    totals["update"] = update.seconds(True, True)
    totals["grading, optimiser, log"] = c.other_s
    lines |= {part: f"{seconds:.1f}" for part, seconds in parts.items() if seconds}
    lines |= {part: f"**{seconds:.0f}**" for part, seconds in totals.items()}
    lines |= {"step": f"**{sum(totals.values()):.0f}**"}
    own = sum(step.own for step in steps)
    read = own if model.varlen else sum(step.read for step in steps)
    return lines | {
        "decode steps": f"{len(steps):,}",
        "rows at once, at most": str(max(step.rows for step in steps)),
        "graphs": str(graphs),
        "places read / needed": f"{read / own:.2f}",
        "places reserved / used": f"{sum(step.reserved for step in steps) / own:.2f}",
        "micro-batches": str(update.micros),
        "imbalance": f"{update.imbalance:.3f}",
        "MFU of the update": f"{100 * update.utilisation(totals['update']):.0f} %",
        "update without recomputing": without_recomputing(config, questions, gpu, c, flags),
    }


def table(columns: list[dict[str, str]]) -> str:
    """Markdown. A line that a column lacks is empty there."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [[name, *(column.get(name, "") for column in columns)] for name in names]
    lines.insert(1, ["---", *("--:" for _ in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    flags = parse_config(Flags)
    unknown = set(flags.gpu) - set(GPUS)
    require(not unknown, f"no GPU {unknown}: choose from {', '.join(GPUS)}")
    require(flags.gpus % flags.tp == 0, "--tp must divide --gpus")
    constants = read_constants(flags.constants)
    columns = [column(m, kind, constants, flags) for m in flags.model for kind in flags.gpu]
    source = f"those of {flags.constants}" if flags.constants else "chosen, not measured"
    print(f"An ESTIMATE; its constants are {source}. Mean completion {flags.mean:,.0f} tokens, "
          f"--tp {flags.tp}.\n\n{table(columns)}")


if __name__ == "__main__":
    main()
