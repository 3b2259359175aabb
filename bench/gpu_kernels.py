"""Kernels of a training step, measured on a GPU: the parts of bench.gpu that need no model.

Each part takes a Bench and reports lines of its table.
"""

import dataclasses
import functools
import math
import time

import torch
import torch.nn.functional as F

from bench.step_model import GPUS, Constants, load_shape
from plumbing.attention import attend
from plumbing.ranks import init_distributed, print0, require
from plumbing.weights import in_short

TINY = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=997, layer_types=["full_attention"] * 2,
)


@dataclasses.dataclass
class Flags:
    model: str = "qwen2.5_7b"  # a name in recipes/shapes, or a model folder
    out: str = "runs/gpu.json"  # JSON file of the table and the constants
    part: tuple = ()  # names of parts, as the functions; none: all
    mean: float = 1460.0  # tokens of a completion in the whole step (>= 100)
    tiny: bool = False  # a tiny model on the CPU: nothing that it prints means anything


class Bench:
    """A GPU, the shape of a model, and the table so far."""

    def __init__(self, flags: Flags):
        self.flags, self.tiny, self.rows, self.measured, self.failed = flags, flags.tiny, [], {}, {}
        self.device = torch.device("cpu") if flags.tiny else init_distributed()
        self.cuda, self.dtype = self.device.type == "cuda", torch.bfloat16
        require(self.cuda or flags.tiny, "bench.gpu needs a GPU; --tiny is its dry run on a CPU")
        self.name = torch.cuda.get_device_name() if self.cuda else "a CPU"
        self.kind = next((kind for kind in GPUS if kind in self.name), "H100")
        self.gpu, self.assumed = GPUS[self.kind], Constants()
        self.config = load_shape(flags.model)
        for name, value in TINY.items() if flags.tiny else ():
            setattr(self.config, name, value)
        self.heads, self.groups = self.config.num_attention_heads, self.config.num_key_value_heads
        width = self.config.hidden_size // self.heads
        self.width = getattr(self.config, "head_dim", None) or width

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def random(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run, times: int = 20) -> float:
        """Mean seconds of a call, after two that do not count."""
        times = self.size(times, 1)
        for _ in range(2):
            run()
        self.sync()
        began = time.perf_counter()
        for _ in range(times):
            run()
        self.sync()
        return (time.perf_counter() - began) / times

    def replayed(self, run):
        """The call as a CUDA graph, so that no launch counts. On a CPU the call itself."""
        if not self.cuda:
            return run
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def report(self, what: str, value: float, unit: str, assumed=None, constant: str = ""):
        """A line of the table, printed at once. `constant`: step_model's name for the value."""
        if constant:
            assumed = getattr(self.assumed, constant)
            self.measured[constant] = float(f"{value:.4g}")
        row = dict(what=what, measured=float(value), unit=unit, assumed=assumed, constant=constant)
        self.rows.append(row)
        print0(f"{what}: {value:.4g} {unit}" + ("" if assumed is None else f" ({assumed:.4g})"))

    def fail(self, what: str, error: BaseException):
        """Say in a sentence why a part has no figures."""
        self.failed[what] = f"{type(error).__name__}: {in_short(error)}"
        print0(f"{what} failed: {self.failed[what]}")

    def check(self, what: str, mine: torch.Tensor, reference: torch.Tensor, most: float):
        """Report the distance from a reference, relative to its norm. `most`: what is right."""
        mine, reference = mine.detach().float(), reference.detach().float()
        distance = (mine - reference).norm() / reference.norm()
        verdict = "right" if distance <= most else "WRONG"
        self.report(f"{what}: {verdict}", float(distance), "of the reference's norm", most)


# --------------------------------------------------------------------------------------------------
# Products and small kernels


def products_in_decode(bench: Bench):
    """The products of four blocks, so that no weights stay in the cache of the GPU."""
    c, full = bench.config, bench.heads * bench.width
    narrow = bench.groups * bench.width
    shapes = [(full, c.hidden_size), (narrow, c.hidden_size), (narrow, c.hidden_size)]
    shapes += [(c.hidden_size, full), (c.hidden_size, c.intermediate_size)]
    shapes += [(c.intermediate_size, c.hidden_size)] * 2
    weights = [bench.random(*shape) for shape in shapes * 4]
    for rows in (8, 64, 192, 1536) if not bench.tiny else (2,):
        inputs = {weight.shape[1]: bench.random(rows, weight.shape[1]) for weight in weights}
        run = lambda: [F.linear(inputs[weight.shape[1]], weight) for weight in weights]
        seconds, numbers = bench.seconds(bench.replayed(run)), sum(w.numel() for w in weights)
        share = 2 * numbers / seconds / bench.gpu.bandwidth
        flops = 2 * numbers * rows / seconds / bench.gpu.flops
        name, few, many = f"products of {rows} rows", rows in (2, 64), rows in (2, 1536)
        bench.report(name, share, "of memory", constant="decode_memory" * few)
        bench.report(name, flops, "of products", constant="decode_products" * many)
    small = [weight for weight in weights if len(weight) == narrow]
    run = lambda: [F.linear(inputs[weight.shape[1]][:8], weight) for weight in small]
    each = bench.seconds(bench.replayed(run)) / len(small)
    bench.report("shortest product (k_proj, 8 rows)", 1e6 * each, "us", constant="product_us")


def products_in_training(bench: Bench):
    tokens, c = bench.size(15438, 64), bench.config
    hidden, up = bench.random(tokens, c.hidden_size), bench.random(tokens, c.intermediate_size)
    weight = bench.random(c.intermediate_size, c.hidden_size)
    run = lambda: (F.linear(hidden, weight), up @ weight, up.T @ hidden)
    share = 3 * 2 * tokens * weight.numel() / bench.seconds(run) / bench.gpu.flops
    bench.report("products of a micro-batch", share, "of products", constant="train_products")
    run = lambda: F.silu(up) * up
    share = 5 * 2 * up.numel() / bench.seconds(run) / bench.gpu.bandwidth
    bench.report("elementwise in training", share, "of memory", constant="train_memory")


def small_kernels(bench: Bench):
    number = bench.size(200, 5)
    few, many = (bench.random(n, bench.config.intermediate_size) for n in (8, bench.size(192, 8)))
    chain = lambda x: functools.reduce(lambda y, _: y + x, range(number), x)
    each, long = (bench.seconds(bench.replayed(lambda: chain(x))) / number for x in (few, many))
    bench.report("small kernel in a graph", 1e6 * each, "us", constant="small_us")
    share = 3 * 2 * many.numel() / max(long - each, 1e-9) / bench.gpu.bandwidth
    bench.report("elementwise in decode", share, "of memory", constant="small_memory")


def host_copies(bench: Bench):
    values, back = list(range(192)), torch.zeros(192, device=bench.device)
    up = bench.seconds(lambda: torch.tensor(values, device=bench.device))
    down = bench.seconds(back.tolist)
    bench.report("a copy between host and GPU", 1e6 * (up + down) / 2, "us", constant="wait_us")


# --------------------------------------------------------------------------------------------------
# Attention

def grid(bench: Bench) -> list[tuple[int, int]]:
    """Rows and places of a decode step."""
    real = [(8, 512), (8, 3840), (32, 2048), (64, 2048), (192, 512), (192, 2048)]
    return [(3, 64)] if bench.tiny else real


def decode_attention(bench: Bench):
    for rows, places in grid(bench):
        keys, values = (bench.random(rows, places, bench.groups, bench.width) for _ in range(2))
        query = bench.random(rows, bench.heads, 1, bench.width)
        used = torch.randint(places // 2, places + 1, (rows,), device=bench.device)
        used[0] = places
        unseen = torch.arange(places, device=bench.device) >= used[:, None]
        mask = torch.zeros_like(unseen, dtype=bench.dtype).masked_fill_(unseen, -math.inf)
        options = dict(scaling=None, window=None, grouped=bench.heads > bench.groups)
        inputs = [query, keys.transpose(1, 2), values.transpose(1, 2), mask[:, None, None]]
        masked = lambda: attend(*inputs, **options)
        right = attend(*(x.float() for x in inputs), **options)
        where, row_bytes = f"{rows} rows, {places} places", 2 * keys[0, 0].numel() * 2
        bench.check(f"masked SDPA, {where}", masked(), right, 0.02)
        seconds = bench.seconds(bench.replayed(masked))
        share = rows * places * row_bytes / seconds / bench.gpu.bandwidth
        full = (rows, places) in ((192, 2048), (3, 64))
        bench.report(f"masked SDPA, {where}", share, "of memory", constant="masked_memory" * full)
        if places in (3840, 64):
            speed = places * row_bytes / bench.groups / seconds
            bench.report("masked SDPA, one block", speed, "bytes/s", constant="masked_block")
        split_attention(bench, query, keys, values, used.int(), right, where)


def split_attention(bench: Bench, query, keys, values, used, right, where: str):
    """varlen_attn by number of splits. The fastest right one with many rows is the constant."""
    from torch.nn.attention.varlen import varlen_attn

    rows, places, number = len(query), keys.shape[1], 2 * int(used.sum()) * keys[0, 0].numel() * 2
    each = torch.arange(rows + 1, dtype=torch.int32, device=bench.device)
    inputs = [query[:, :, 0], keys.flatten(0, 1), values.flatten(0, 1), each, each * places]
    options, shares = dict(enable_gqa=True, seqused_k=used), []
    for splits in (1, 2, 4, 8):
        run = lambda: varlen_attn(*inputs, 1, places, num_splits=splits, **options)[:, None]
        name = f"varlen_attn, {splits} splits, {where}"
        try:
            bench.check(name, run(), right, 0.02)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            return bench.fail(f"varlen_attn, {where}", error)  # an older torch, or no such kernel
        shares.append(number / bench.seconds(bench.replayed(run)) / bench.gpu.bandwidth)
        bench.report(name, shares[-1], "of memory")
    if (rows, places) == (192, 2048):
        bench.report("varlen_attn, best", max(shares), "of memory", constant="varlen_memory")


def training_attention(bench: Bench):
    rows, tokens = bench.size(8, 2), bench.size(2048, 32)
    make = lambda heads: bench.random(rows, heads, tokens, bench.width).requires_grad_()
    inputs = [make(bench.heads), make(bench.groups), make(bench.groups)]
    options = dict(scaling=None, window=None, grouped=bench.heads > bench.groups)
    out = attend(*inputs, None, **options)
    one = [x[:1].detach().float() for x in inputs]
    bench.check("causal attention", out[:1], attend(*one, None, **options), 0.02)
    grad = torch.ones_like(out)
    run = lambda: torch.autograd.grad(attend(*inputs, None, **options), inputs, grad)
    flops = 3.5 * 2 * rows * bench.heads * tokens**2 * bench.width  # forward, and 2.5 times it
    share = flops / bench.seconds(run, 5) / bench.gpu.flops
    bench.report("causal attention, forward and backward", share, "of products",
                 constant="train_attention")
