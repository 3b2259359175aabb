"""Rollout and update against the usual implementations: medians and ratios of alternating rounds.

    python -m bench.speed                          all rows, on the toy model
    python -m bench.speed rollout share            some rows
    python -m bench.speed rollout --model 57m      48 rows of a model to train without a GPU: 57 M
                                                   random weights, a vocabulary of 32,000
    python -m bench.speed --model 1.5b             on a GPU: Qwen2.5-1.5B's shape, random bf16
                                                   weights, limits to 2,048 tokens

Every row alternates its two sides, `--rounds` times after one round of warm-up, on the same model,
prompts and lengths. Limits set the lengths. They are drawn once from a log-normal distribution, so
random weights do as well as trained ones.
"""

import plumbing.threads  # noqa: F401 -- before torch, which reads what it sets

import argparse
import functools
import logging
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteria

import grpo
from bench.common import peak_mb
from data.toy import make_problems
from model_utils import encode_prompt, load_tokenizer, make_optimizer, shard_model
from plumbing.answers import grade
from plumbing.attention import micro_batches, pack
from plumbing.ranks import fail, require
from rewards import extract_answer

QUESTIONS, PLANS, COTS = 16, 4, 3
GROUP = PLANS * COTS
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# --------------------------------------------------------------------------------------------------
# Tools


def load(name: str):
    """(model under transformers' own attention, a twin under ours): same weights."""
    theirs, ours = (make_model(name).to(DEVICE).eval() for _ in range(2))
    # generate would take it from here, and rows would end before their limits.
    theirs.generation_config.eos_token_id = None
    return theirs, shard_model(ours)


def make_model(name: str):
    options = dict(attn_implementation="sdpa", trust_remote_code=False)
    if name == "toy":
        path = "data/toy_base"
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    torch.manual_seed(0)
    small = name == "57m"
    shape = dict(
        hidden_size=512, intermediate_size=1696, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=32000,
    ) if small else dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936,
    )
    fixed = dict(max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None)
    config = AutoConfig.for_model("llama" if small else "qwen2", **shape, **fixed)
    with DEVICE:
        dtype = torch.float32 if small else torch.bfloat16
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def draw_limits(rows: int, median: float, most: int, least: int = 8) -> list[int]:
    rng = random.Random(0)
    drawn = [round(rng.lognormvariate(math.log(median), 0.7)) for _ in range(rows)]
    return [min(most, max(least, limit)) for limit in drawn]


def alternate(sides: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turns after one round that does not count."""
    seconds = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(row: str, ratio: float, bar: str, detail: str):
    print(f"{row:44} {ratio:7.2f} x   bar {bar:16} {detail}", flush=True)


class Limits(StoppingCriteria):
    """Ends each row at its own limit, as far as model.generate lets a row end.

    The row stays in the batch, as padding.
    """

    def __init__(self, prompt: int, limits: list[int]):
        self.ends = torch.tensor([prompt + limit for limit in limits], device=DEVICE)

    def __call__(self, ids, scores, **options):
        return ids.shape[1] >= self.ends


# --------------------------------------------------------------------------------------------------
# Our side


def sample_trees(model, prompts: list[list[int]], limits: list[int], plan: int) -> list:
    """PLANS plans of `plan` tokens per prompt, and COTS completions of each, up to their `limits`.

    Returns the rollouts in the order of the limits, prompt-major and plan-major.
    """
    parts = [limits[i:i + COTS] for i in range(0, len(limits), COTS)]
    starts = [prompt for prompt in prompts for _ in range(PLANS)]
    roots = [grpo.Rollout(start, part, is_plan=True) for start, part in zip(starts, parts)]
    grpo.decode(
        model, roots, temperature=1.0, top_p=1.0, stop_ids=[], seed=0,
        plan_closed=lambda ids: len(ids) == plan, max_plan_tokens=plan + 1,
    )
    rollouts = [cot for root in roots for cot in root.cots]
    assert [len(r.ids) for r in rollouts] == limits, "both sides must sample the same lengths"
    return rollouts


def unshared_micro_batches(rollouts: list, config: grpo.Config) -> list:
    """grpo.make_micro_batches, but every row has its own copy of what rows have in common."""
    plain = dict(
        pack=functools.partial(pack, share=False),
        micro_batches=functools.partial(micro_batches, share=False),
    )
    with mock.patch.multiple(grpo, **plain):
        return grpo.make_micro_batches(rollouts, config, DEVICE)


class OurStep:
    """A step of GRPO: completions to their own ends, grading, one update. Call it with a seed."""

    def __init__(self, bench: "Bench", limit: int, lr: float):
        self.model, self.tokenizer = shard_model(load(bench.name)[0]), bench.tokenizer
        self.optimizer, self.lr = make_optimizer(self.model, lr, 0.0), lr
        self.config = grpo.Config(
            plans=GROUP, cots=1, beta=0.0, kl_coef=0.0, max_completion_tokens=limit,
            max_plan_tokens=0, tokens_per_micro_batch=8192,
        )
        self.problems, self.prompts = bench.problems, bench.prompts
        self.lengths: list[float] = []  # mean tokens of a completion, per step

    def __call__(self, seed: int):
        config, stop_ids = self.config, [self.tokenizer.eos_token_id]
        options = dict(plan_closed=None, stop_ids=stop_ids, seed=seed)
        trees = grpo.sample_tree(self.model, self.prompts, config, **options)
        groups = [grpo.Group(problem, tree) for problem, tree in zip(self.problems, trees)]
        grpo.grade_groups(self.tokenizer, groups, stop_ids)
        rewards = grpo.group_rewards(groups, config)
        advantages = grpo.group_advantages(rewards["total"].flatten(1))
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
            rollout.plan_advantage = rollout.advantage = advantage
        micros = grpo.make_micro_batches(rollouts, config, DEVICE)
        grpo.update(self.model, self.optimizer, micros, config, self.lr)
        self.lengths.append(rewards["lengths"].float().mean().item())


# --------------------------------------------------------------------------------------------------
# TRL's side


def train_with_trl(
    bench: "Bench", limit: int, lr: float, ours: Callable[[int], None]
) -> tuple[dict[str, list[float]], list[float]]:
    """Train with TRL's GRPOTrainer, and run `ours` after each of its steps.

    Returns the seconds of each step of "trl" and "ours", and TRL's mean lengths.
    """
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds, lengths = {"ours": [], "trl": []}, []

    def reward(completions, completion_ids, answer, **columns):
        lengths.append(statistics.mean(map(len, completion_ids)))
        answers = [extract_answer(text) for text in completions]
        return [float(right) for right in grade(answer, answers)]

    class Alternate(TrainerCallback):
        def on_step_begin(self, *args, **options):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **options):
            seconds["trl"].append(time.perf_counter() - self.began)
            began = time.perf_counter()
            ours(state.global_step)
            seconds["ours"].append(time.perf_counter() - began)

    on_cpu = DEVICE.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, per_device_train_batch_size=QUESTIONS * GROUP, num_generations=GROUP, beta=0.0,
            max_completion_length=limit, max_steps=bench.rounds + 1, learning_rate=lr,
            temperature=1.0, use_vllm=False, bf16=not on_cpu, use_cpu=on_cpu, report_to="none",
            logging_steps=1000, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        )
        trainer = GRPOTrainer(
            model=load(bench.name)[0], reward_funcs=reward, train_dataset=trl_data(bench),
            processing_class=bench.tokenizer, callbacks=[Alternate()], args=settings,
        )
        trainer.train()
    return seconds, lengths


def trl_data(bench: "Bench"):
    """The problems as TRL wants them: prompts under the chat template, and answers."""
    from datasets import Dataset

    rows = []
    for problem in bench.problems:
        turns = [{"role": "user", "content": problem["problem"]}]
        options = dict(tokenize=False, add_generation_prompt=True)
        prompt = bench.tokenizer.apply_chat_template(turns, **options)
        rows.append({"prompt": prompt, "answer": problem["answer"]})
    return Dataset.from_list(rows)


# --------------------------------------------------------------------------------------------------
# The rows

ROWS = ("step", "rollout", "batch", "tree", "memory", "share", "growth")


class Bench:
    """One model, and a method for each row that prints it."""

    def __init__(self, args):
        self.rounds, self.name = args.rounds, args.model
        self.theirs, self.model = load(args.model)
        self.tokenizer = load_tokenizer("data/toy_base")
        questions = 4 if args.model == "57m" else QUESTIONS
        self.problems = make_problems("train", questions, seed=5)
        self.prompts = [encode_prompt(self.tokenizer, p["problem"]) for p in self.problems]
        median, most = (400, 2048) if args.model == "1.5b" else (60, 256)
        self.limits = draw_limits(questions * GROUP, median, most)
        # model.generate pads prompts on the left. Prompts of one length keep that out of it.
        longest = max(map(len, self.prompts))
        self.even = [(prompt * 2)[:longest] for prompt in self.prompts]

    def ours(self, limits=None, prompts=None, **options):
        options |= dict(n=GROUP, max_new_tokens=limits or self.limits, stop_ids=[])
        return grpo.sample(self.model, prompts or self.even, **options)

    def generate(self):
        rows = torch.tensor([p for p in self.even for _ in range(GROUP)], device=DEVICE)
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, eos_token_id=None,
            max_new_tokens=max(self.limits),
        )
        out = self.theirs.generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), generation_config=settings,
            stopping_criteria=[Limits(rows.shape[1], self.limits)],
        )
        longest = rows.shape[1] + max(self.limits)
        assert out.shape[1] == longest, "both sides must sample the same lengths"

    def generate_batch(self):
        from transformers import ContinuousBatchingConfig

        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, eos_token_id=-1,
            max_new_tokens=max(self.limits),
        )
        rows = [p for p in self.even for _ in range(GROUP)]
        with self.theirs.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=ContinuousBatchingConfig(),
            block=True, timeout=5,
        ) as manager:
            for row, limit in zip(rows, self.limits):
                manager.add_request(list(row), max_new_tokens=limit)
            done = tokens = 0
            while done < len(rows):
                result = manager.get_result(timeout=1)
                if result and result.is_finished():
                    done, tokens = done + 1, tokens + len(result.generated_tokens)
        assert tokens == sum(self.limits), "both sides must sample the same lengths"

    # ---- Rows ------------------------------------------------------------------------------------

    def rollout(self):
        times = alternate({"ours": self.ours, "generate": self.generate}, self.rounds)
        rate = {name: sum(self.limits) / seconds for name, seconds in times.items()}
        ratio = times["generate"] / times["ours"]
        detail = f"{rate['ours']:,.0f} vs {rate['generate']:,.0f} tokens/s"
        bar = ">= 2.8" if self.name == "57m" else ">= 5"
        show("rollout vs model.generate", ratio, bar, detail)

    def batch(self):
        logging.disable(logging.WARNING)
        times = alternate({"ours": self.ours, "generate_batch": self.generate_batch}, self.rounds)
        self.theirs.set_attn_implementation("sdpa")
        rate = {name: sum(self.limits) / seconds for name, seconds in times.items()}
        ratio = times["generate_batch"] / times["ours"]
        detail = f"{rate['ours']:,.0f} vs {rate['generate_batch']:,.0f} tokens/s"
        show("rollout vs generate_batch", ratio, ">= 15 (GPU 1.0)", detail)

    def tree(self):
        plan = 20 if self.name == "toy" else 150
        limits = [max(plan + 4, limit) for limit in self.limits]
        tree = functools.partial(sample_trees, self.model, self.even, limits, plan)
        sides = {"PTA-GRPO": tree, "GRPO": functools.partial(self.ours, limits)}
        times = alternate(sides, self.rounds)
        ratio = times["PTA-GRPO"] / times["GRPO"]
        seconds = f"{times['PTA-GRPO']:.2f} vs {times['GRPO']:.2f} s"
        detail = f"{seconds}; plans of {plan} tokens"
        show("PTA-GRPO rollout / GRPO rollout (time)", ratio, "<= 1.0", detail)

    def growth(self):
        """All rows at once, if they fit in memory, and 8 x the rows in waves, as if 1 x fitted."""
        rows, sides = QUESTIONS * GROUP, {}
        for factor in (1, 2, 4, 8):
            # Copies, because equal prompts that are one list are prefilled once.
            prompts = [list(prompt) for prompt in self.even * factor]
            sides[f"{factor} x"] = functools.partial(self.ours, self.limits * factor, prompts)
        sides[f"8 x in waves of {rows}"] = functools.partial(sides["8 x"], max_rows=rows)
        times = alternate(sides, self.rounds)
        rate = {name: int(name[0]) * sum(self.limits) / s for name, s in times.items()}
        detail = ", ".join(f"{name} {value:,.0f}" for name, value in rate.items()) + " tokens/s"
        show("tokens/s at 8 x the rows / at 1 x", rate["8 x"] / rate["1 x"], ">= 1.0", detail)

    def share(self):
        """Rollouts shaped as the demo's: toy prompts, plans of 13 tokens, completions of 43."""
        toy = self.name == "toy"
        plan, limits = 150, self.limits
        if toy:
            plan, limits = 13, draw_limits(QUESTIONS * GROUP, 42, 80, 30)
        limits = [max(plan + 4, limit) for limit in limits]
        rollouts = sample_trees(self.model, self.prompts, limits, plan)
        for rollout in rollouts:
            rollout.plan_advantage = rollout.advantage = 1.0
        model = shard_model(load(self.name)[0])
        optimizer = make_optimizer(model, 1e-6, 0.0)
        config = grpo.Config(kl_coef=0.0, tokens_per_micro_batch=4000 if toy else 16384)
        micros = {
            "shared": grpo.make_micro_batches(rollouts, config, DEVICE),
            "plain": unshared_micro_batches(rollouts, config),
        }
        tokens = {name: sum(len(m.packed.ids) for m in part) for name, part in micros.items()}
        run = lambda part: functools.partial(grpo.update, model, optimizer, part, config, 1e-6)
        times = alternate({name: run(part) for name, part in micros.items()}, self.rounds)
        ratio = times["plain"] / times["shared"]
        seconds = f"{times['shared']:.3f} vs {times['plain']:.3f} s"
        detail = f"{seconds}; {tokens['shared']} vs {tokens['plain']} tokens"
        show("update, shared beginnings vs plain packed", ratio, ">= 1.3", detail)

    def step(self):
        """A whole step of GRPO on both sides: completions to their own ends, grading, update."""
        limit, lr = 128, 1e-6
        ours = OurStep(self, limit, lr)
        seconds, lengths = train_with_trl(self, limit, lr, ours)
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        lengths = f"{statistics.mean(ours.lengths):.1f} vs {statistics.mean(lengths):.1f}"
        detail = f"{median['ours']:.2f} vs {median['trl']:.2f} s; mean length {lengths}"
        ratio = median["trl"] / median["ours"]
        show("a whole step vs TRL's GRPOTrainer", ratio, ">= 2.5 (GPU 3)", detail)

    def memory(self):
        """Peak of logprobs and backward over 8,192 tokens at Qwen's vocabulary, once per form."""
        peaks = {}
        for form in ("ours", "plain"):  # each in a process of its own
            command = [sys.executable, "-m", "bench.speed", "--memory", form]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[form] = float(result.stdout.split()[-1])
        detail = f"{peaks['ours']:,.0f} vs {peaks['plain']:,.0f} MiB"
        ratio = peaks["ours"] / peaks["plain"]
        show("peak extra memory, ours / full logits", ratio, "<= 0.15", detail)


def measure_memory(form: str):
    """Print the peak memory (MiB) that one forward and backward adds.

    The model has one layer of width 896. The sequences are 8 x 1,024 tokens.
    """
    config = AutoConfig.for_model(
        "qwen2", hidden_size=896, intermediate_size=896, num_hidden_layers=1,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    )
    model = shard_model(AutoModelForCausalLM.from_config(config).to(DEVICE))
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 151936, (8, 1025), generator=generator).tolist()
    on_gpu = DEVICE.type == "cuda"
    peak = lambda: torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mb()
    before = peak()
    if form == "ours":
        logprobs, _ = model.token_logprobs(pack(sequences, [1] * 8, DEVICE, share=False))
    else:
        ids = torch.tensor(sequences, device=DEVICE)
        logprobs = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])
    logprobs.mean().backward()
    print(peak() - before)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(ROWS)}; none: all")
    parser.add_argument("--model", default="toy", choices=("toy", "57m", "1.5b"))
    parser.add_argument("--rounds", type=int, default=5)
    note = "measure one form and print MiB (the memory row does that)"
    parser.add_argument("--memory", choices=("ours", "plain"), help=note)
    parser.error = fail
    args = parser.parse_args()
    if args.memory:
        return measure_memory(args.memory)
    unknown = ", ".join(sorted(set(args.rows) - set(ROWS)))
    require(not unknown, f"unknown row {unknown}; there are {', '.join(ROWS)}")
    warnings.filterwarnings("ignore")
    on_gpu = DEVICE.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    system = f"{platform.system()} {platform.machine()}, {name}, Python {platform.python_version()}"
    bench = Bench(args)
    work = f"model {args.model}, {len(bench.prompts)} questions x {GROUP}, {args.rounds} rounds"
    print(f"{system}, {packages}; {work}")
    for row in args.rows or ROWS:
        getattr(bench, row)()


if __name__ == "__main__":
    main()
