"""The constants of bench/step_model.py, measured on a GPU beside what it assumes. Ten minutes.

    python -m bench.gpu                                  one GPU, Qwen2.5-7B's shape
    torchrun --nproc_per_node=8 -m bench.gpu             eight GPUs: one whole training step
    python -m bench.gpu --tiny                           a dry run on a CPU, in seconds
    python -m bench.step_model --constants runs/gpu.json the step model with what was measured

Weights are random and no network is needed. Each part fails alone, with a sentence, and the table
goes on. It is printed as Markdown. --out gets it as JSON, with the constants. Shares are of the
data sheet's bandwidth and bf16 products. Kernels are compared with references in fp32.
"""

import copy
import gc
import json
import time
import types
from pathlib import Path

import torch
import transformers

import grpo
from bench import gpu_kernels
from bench.gpu_counts import count_update, whole
from bench.gpu_kernels import Bench, Flags, grid
from bench.gpu_trace import Question, Step, Trace, draw_questions, sequences
from bench.step_model import Flags as StepFlags
from bench.step_model import Rollout, Update, parameters
from model_utils import make_optimizer, shard_model, unsharded
from plumbing import decoder
from plumbing.attention import pack, use_attention
from plumbing.balance import balance
from plumbing.flags import parse_config
from plumbing.kernels import fuse_norms
from plumbing.ranks import barrier, print0, rank, require, world_size
from plumbing.weights import local_part, parameters_on_meta

# --------------------------------------------------------------------------------------------------
# Random models

def with_layers(config, layers: int):
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def random_model(bench: Bench, layers: int, *, sharded: bool = False, frozen: bool = True, **shard):
    """A model with random weights, as load_sharded or load_model make it, without files."""
    from transformers import AutoModelForCausalLM

    dtype = bench.dtype if frozen else torch.float32
    options = dict(dtype=dtype, attn_implementation="sdpa")
    with parameters_on_meta():
        config = with_layers(bench.config, layers)
        model = AutoModelForCausalLM.from_config(config, **options).eval()
    model = fuse_norms(use_attention(model))
    model = shard_model(model, bench.device, **shard) if sharded else model
    home = lambda t: torch.empty_like(t, device=bench.device) if t.is_meta else t.to(bench.device)
    model._apply(home).tie_weights()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            part = local_part(tensor)
            part.normal_(0, 0.02) if part.ndim > 1 else part.fill_(float("norm" in name))
    return model.requires_grad_(not frozen)


# --------------------------------------------------------------------------------------------------
# The project's own code

def norms(bench: Bench):
    norm = random_model(bench, 1).get_decoder().norm
    own = types.MethodType(type(norm).forward, norm)
    hidden = bench.random(bench.size(15438, 32), bench.config.hidden_size).requires_grad_()
    bench.check("fused RMSNorm", norm(hidden), own(hidden), 0.01)
    grad = torch.ones_like(hidden)
    backward = lambda forward: torch.autograd.grad(forward(hidden), hidden, grad)[0]
    bench.check("fused RMSNorm's gradient", backward(norm), backward(own), 0.02)
    for name, forward in (("the module's own", own), ("fused", norm)):
        seconds = bench.seconds(lambda: backward(forward))
        bench.report(f"RMSNorm forward and backward, {name}", 1e3 * seconds, "ms")


def drawing_tokens(bench: Bench):
    rows, generator = bench.size(192, 4), torch.Generator(bench.device).manual_seed(0)
    logits = bench.random(rows, bench.config.vocab_size)
    model = Rollout(bench.config, bench.gpu, bench.assumed, StepFlags())
    for top_p, assumed in ((1.0, 1e3 * model.small(model.counts(rows)[1])), (0.95, None)):
        draw = lambda: grpo.sample_token(logits, 1.0, top_p, generator)
        bench.report(f"drawing, top-p {top_p}", 1e3 * bench.seconds(draw), "ms", assumed)
    wanted = torch.linspace(1, 2, 50, device=bench.device)
    draws = grpo.draw_tokens((wanted / wanted.sum()).expand(100_000, -1), generator)
    found = torch.bincount(draws, minlength=50) / len(draws)
    bench.check("frequencies of 100,000 draws", found, wanted / wanted.sum(), 0.05)


def admitted(model, prompts: list[list[int]], limit: int):
    """A decoder, and its active sequences once their prompts are prefilled."""
    model.kv_cache = None  # free the last one
    made = decoder.Decoder(model, [grpo.Rollout(prompt, [limit]) for prompt in prompts])
    return made, made.admit([])


def decode_steps(bench: Bench):
    """Steps of the whole model, as replayed graphs, against the step model."""
    model = random_model(bench, bench.config.num_hidden_layers)
    expected = Rollout(bench.config, bench.gpu, bench.assumed, StepFlags())
    firsts = []
    for rows, places in grid(bench):
        with torch.no_grad():
            made, active = admitted(model, [[1] * places] * rows, 64)
            bench.sync()
            began = time.perf_counter()
            made.step(active)
            bench.sync()
            firsts.append(time.perf_counter() - began)
            seconds = bench.seconds(lambda: made.step(active))
        assumed = expected.step_parts(Step(rows, rows * places, graph=(rows, places)))
        without_draw = sum(assumed.values()) - assumed["drawing tokens"]
        name = f"a decode step, {rows} rows, {places} places"
        bench.report(name, 1e3 * seconds, "ms", 1e3 * without_draw)
    bench.report("capture of a graph", sorted(firsts)[len(firsts) // 2], "s", constant="capture_s")
    for what, name in (("CUDA graphs", "cuda_graphs"), ("split-KV attention", "split_kv")):
        if bench.cuda and hasattr(model, name):
            bench.report(f"{what} passed the decoder's check", float(getattr(model, name)), "", 1.0)


def prefill(bench: Bench):
    model, length = random_model(bench, bench.config.num_hidden_layers), bench.size(400, 20)
    prompts = [[1 + n] * length for n in range(bench.size(32, 2))]
    with torch.no_grad():
        seconds = bench.seconds(lambda: admitted(model, prompts, 8), 5)
    flops = 2 * parameters(model.config) * len(prompts) * (length - 1)
    share = flops / seconds / bench.gpu.flops
    bench.report("prompts", share, "of products", constant="prefill_products")


def drawn(bench: Bench, count: int, mean: float, limit: int) -> list[Question]:
    """Questions of log-normal completions whose plans all have one length."""
    plan, questions = bench.size(180, 8), draw_questions(count, mean, limit)
    for q in questions:
        q.prompt, q.plans = q.prompt[:bench.size(1024, 20)], [plan] * 4
        q.totals = [[max(plan + 1, total) for total in totals] for totals in q.totals]
    return questions


def sample_drawn(model, questions: list[Question]) -> list[list]:
    """Completions of the drawn lengths, per question, by the project's own rollout."""
    trees = [[grpo.Rollout(q.prompt, t, is_plan=True) for t in q.totals] for q in questions]
    plan = questions[0].plans[0]
    grpo.decode(
        model, sum(trees, []), temperature=1.0, top_p=1.0, stop_ids=[], seed=rank(),
        plan_closed=lambda ids: len(ids) == plan, max_plan_tokens=plan + 1,
    )
    return [[cot for root in roots for cot in root.cots] for roots in trees]


def rollout(bench: Bench):
    """192 rows of the whole model, which decode up to 1,024 tokens."""
    questions = drawn(bench, bench.size(16, 2), bench.size(500, 16), bench.size(1024, 24))
    model, limit = random_model(bench, bench.config.num_hidden_layers), bench.size(1024, 24)
    free = decoder.free_memory(bench.device) if bench.cuda else 1e9
    steps = Trace(bench.config, questions, limit, free).run()
    expected = Rollout(bench.config, bench.gpu, bench.assumed, StepFlags()).parts(steps)[0]
    bench.sync()
    began = time.perf_counter()
    rows = sum(sample_drawn(model, questions), [])
    seconds = time.perf_counter() - began
    bench.report("a rollout of up to 1,024 tokens", seconds, "s", sum(expected.values()))
    tokens = sum(len(row.ids) for row in rows)
    bench.report("the same", tokens / seconds, "tokens/s", tokens / sum(expected.values()))


def update(bench: Bench):
    """Forward and backward of one and of two blocks and the head. The model's are extrapolated."""
    config, c, times = bench.config, bench.assumed, {}
    rows = sequences(drawn(bench, 1, bench.size(1300, 16), bench.size(3584, 24)))
    rows = [[token % config.vocab_size for token in row] for row in rows]
    packed = pack(rows, [bench.size(150, 4)] * len(rows), bench.device)
    cost = lambda counts: (
        counts.flops() / (c.train_products * bench.gpu.flops)
        + counts.small_bytes / (c.train_memory * bench.gpu.bandwidth)
        + counts.attention / (c.train_attention * bench.gpu.flops)
    )
    for checkpointing in (True, False):
        for blocks in (1, 2):
            options = dict(frozen=False, activation_checkpointing=checkpointing)
            model = random_model(bench, blocks, sharded=True, **options)
            run = lambda: one_update(model, packed)
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            times[blocks] = bench.seconds(run, 5)
            assumed = cost(count_update(config, blocks, packed, checkpointing))
            kept = "recomputed" if checkpointing else "kept"
            name = f"an update, {len(packed.ids):,} tokens, {blocks} block(s), {kept}"
            bench.report(name, 1e3 * times[blocks], "ms", 1e3 * assumed)
            if bench.cuda:
                peak = torch.cuda.max_memory_allocated() / 2**30
                bench.report("its peak memory", peak, "GiB")
        layers = config.num_hidden_layers
        total = times[1] + (layers - 1) * (times[2] - times[1])
        both = [count_update(config, n, packed, checkpointing) for n in (1, 2)]
        name = f"the same, {layers} blocks, extrapolated"
        bench.report(name, 1e3 * total, "ms", 1e3 * cost(whole(*both, layers)))


def one_update(model, packed):
    model.zero_grad(set_to_none=True)
    model.token_logprobs(packed, 1.0)[0].sum().backward()


# --------------------------------------------------------------------------------------------------
# A whole step

def layers_that_fit(bench: Bench) -> int:
    """Blocks of which weights, AdamW, gradients, reference and a rollout fit on these GPUs."""
    layers = bench.config.num_hidden_layers
    per_parameter = 18 / world_size() + 2
    room = 0.9 * bench.gpu.memory - 25e9  # keys, values, activations
    while layers > 1 and per_parameter * parameters(with_layers(bench.config, layers)) > room:
        layers -= 1
    return layers


def whole_step(bench: Bench):
    """Rollout, balance, reference and update by grpo.py's functions, on all ranks."""
    layers, device = layers_that_fit(bench), bench.device
    config = with_layers(bench.config, layers)
    limit = bench.size(3584, 24)
    mean, count = min(bench.flags.mean, bench.size(10**6, 16)), bench.size(16, 2) * world_size()
    questions = drawn(bench, count, mean, limit)
    model = random_model(bench, layers, sharded=True, frozen=False, activation_checkpointing=True)
    reference, optimizer = random_model(bench, layers, sharded=True), make_optimizer(model, 1e-6, 0)
    mine, flags, clock = questions[rank()::world_size()], grpo.Config(), Clock(bench)
    with unsharded(model):
        free = decoder.free_memory(device) if bench.cuda else 1e9
        trees = sample_drawn(model, mine)
    clock.note("rollout")
    groups, _ = balance([grpo.Group({}, tree) for tree in trees], 3)
    rows = [row for group in groups for row in group.rollouts]
    for n, row in enumerate(rows):
        row.advantage = row.plan_advantage = (-1.0) ** n
    minis = grpo.make_mini_batches(model, reference, rows, flags)
    clock.note("reference logprobs")
    figures = grpo.update(model, optimizer, minis[0], flags, 1e-6)
    clock.note("update")
    expected = expected_step(bench, config, questions, limit, free)
    note = "" if layers == bench.config.num_hidden_layers else f" of {layers} blocks, which fit"
    for name, seconds in clock.seconds.items():
        bench.report(f"{world_size()} GPU(s): {name}{note}", seconds, "s", expected[name])
    bench.report("sampler_gap of the step", figures["sampler_gap"], "nats", 0.02)


def expected_step(bench: Bench, config, questions: list[Question], limit: int, free: float) -> dict:
    """What the step model says of this very step."""
    flags = StepFlags(gpus=world_size())
    model = Rollout(config, bench.gpu, bench.assumed, flags)
    ranks = [Trace(config, questions[r::flags.gpus], limit, free) for r in range(flags.gpus)]
    expected = {"rollout": max(sum(model.parts(t.run())[0].values()) for t in ranks)}
    passes = Update(config, questions, bench.gpu, bench.assumed, flags)
    expected["reference logprobs"] = passes.seconds(True, False)
    return expected | {"update": passes.seconds(True, True)}


class Clock:
    """Seconds of the phases of a step, each until the slowest rank is done."""

    def __init__(self, bench: Bench):
        self.bench, self.seconds = bench, {}
        self.wait()

    def wait(self):
        self.bench.sync()
        barrier()
        self.last = time.perf_counter()

    def note(self, name: str):
        before = self.last
        self.wait()
        self.seconds[name] = self.last - before


# --------------------------------------------------------------------------------------------------
# The table

PARTS = (
    gpu_kernels.products_in_decode, gpu_kernels.products_in_training, gpu_kernels.small_kernels,
    gpu_kernels.host_copies, gpu_kernels.decode_attention, gpu_kernels.training_attention, norms,
    drawing_tokens, decode_steps, prefill, update, rollout, whole_step,
)


def table(bench: Bench) -> str:
    """Markdown; what failed is at the end."""
    lines = ["| what | measured | assumed | constant |", "| --- | --: | --: | --- |"]
    for row in bench.rows:
        assumed = "" if row["assumed"] is None else f"{row['assumed']:.4g}"
        measured = f"{row['measured']:.4g} {row['unit']}"
        lines.append(f"| {row['what']} | {measured} | {assumed} | {row['constant']} |")
    failed = [f"| {what} | failed | | {why} |" for what, why in bench.failed.items()]
    return "\n".join(lines + failed)


def write(bench: Bench):
    """Print the table; write it and the constants as JSON, on rank 0."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = dict(gpu=bench.name, gpus=world_size(), model=bench.flags.model, tiny=bench.tiny)
    record |= dict(versions=versions, constants=bench.measured, rows=bench.rows)
    out = Path(bench.flags.out)
    if rank() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record | {"failed": bench.failed}, indent=1))
    print0(f"\n{bench.name}, torch {torch.__version__}, transformers {transformers.__version__}; "
           f"shares are of the data sheet of {bench.kind}\n\n{table(bench)}\n\nwritten: {out}")


def main():
    flags = parse_config(Flags)
    names = {part.__name__: part for part in PARTS}
    unknown = set(flags.part) - set(names)
    require(not unknown, f"no part {sorted(unknown)}: choose from {', '.join(names)}")
    bench = Bench(flags)
    for name in flags.part or (names if world_size() == 1 else ["whole_step"]):
        try:
            names[name](bench)
        except (Exception, SystemExit) as error:
            bench.fail(name, error)
            if world_size() > 1:  # the others would wait for this rank
                raise
        gc.collect()  # what a part has held is free for the next
        if bench.cuda:
            torch.cuda.empty_cache()
    write(bench)


if __name__ == "__main__":
    main()
