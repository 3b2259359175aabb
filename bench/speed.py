"""Rollout and update, ours against the usual ones, side by side in one run: medians and ratios.

    python -m bench.speed                          all rows, on the toy model
    python -m bench.speed rollout share            some rows
    python -m bench.speed --model 1.5b             on a GPU: Qwen2.5-1.5B's shape, random bf16 weights, limits to 2,048

Every row alternates its two sides, `--rounds` times after one round of warm-up, on the same model, prompts and lengths.
Lengths are set by limits, drawn once from a log-normal distribution, so that random weights do as well as trained ones.
"""
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
from importlib.metadata import version

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteria

import grpo
from attention import pack
from bench.data import peak_mb
from data.toy import make_problems
from model_utils import encode_prompt, load_tokenizer, make_optimizer, shard_model
from rewards import extract_answer, grade

QUESTIONS, GROUP = 16, 12
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str):
    """(model under transformers' own attention, a twin under ours): same weights."""
    pair = []
    for _ in range(2):
        if name == "toy":
            model = AutoModelForCausalLM.from_pretrained(
                "data/toy_base", dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False)
        else:  # Qwen2.5-1.5B
            torch.manual_seed(0)
            config = AutoConfig.for_model("qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                          num_attention_heads=12, num_key_value_heads=2, vocab_size=151936,
                                          max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None)
            with DEVICE:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        pair.append(model.to(DEVICE).eval())
    theirs, ours = pair
    theirs.generation_config.eos_token_id = None  # generate would take it from here, and rows would end before their limits
    return theirs, shard_model(ours)


def draw_limits(rows: int, median: float, most: int, least: int = 8) -> list[int]:
    rng = random.Random(0)
    return [min(most, max(least, round(rng.lognormvariate(math.log(median), 0.7)))) for _ in range(rows)]


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
    """Ends each row at its own limit, as far as model.generate lets a row end: it stays in the batch as padding."""

    def __init__(self, prompt: int, limits: list[int]):
        self.ends = torch.tensor([prompt + limit for limit in limits], device=DEVICE)

    def __call__(self, ids, scores, **options):
        return ids.shape[1] >= self.ends


class Bench:
    def __init__(self, args):
        self.rounds, self.name = args.rounds, args.model
        self.theirs, self.model = load(args.model)
        self.tokenizer = load_tokenizer("data/toy_base")
        self.problems = make_problems("train", QUESTIONS, seed=5)
        self.prompts = [encode_prompt(self.tokenizer, p["problem"]) for p in self.problems]
        median, most = (60, 256) if args.model == "toy" else (400, 2048)
        self.limits = draw_limits(QUESTIONS * GROUP, median, most)
        # model.generate pads prompts on the left; prompts of one length keep that out of the comparison.
        longest = max(map(len, self.prompts))
        self.even = [(prompt * 2)[:longest] for prompt in self.prompts]

    def ours(self, limits=None, prompts=None, **options):
        return grpo.sample(self.model, prompts or self.even, n=GROUP, max_new_tokens=limits or self.limits, stop_ids=[], **options)

    def generate(self):
        rows = torch.tensor([p for p in self.even for _ in range(GROUP)], device=DEVICE)
        out = self.theirs.generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), stopping_criteria=[Limits(rows.shape[1], self.limits)],
            generation_config=GenerationConfig(do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, eos_token_id=None,
                                               max_new_tokens=max(self.limits)))
        assert out.shape[1] == rows.shape[1] + max(self.limits), "both sides must sample the same lengths"

    def generate_batch(self):
        from transformers import ContinuousBatchingConfig
        settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, eos_token_id=-1,
                                    max_new_tokens=max(self.limits))
        rows = [p for p in self.even for _ in range(GROUP)]
        with self.theirs.continuous_batching_context_manager(
                generation_config=settings, continuous_batching_config=ContinuousBatchingConfig(), block=True, timeout=5) as manager:
            for row, limit in zip(rows, self.limits):
                manager.add_request(list(row), max_new_tokens=limit)
            done = tokens = 0
            while done < len(rows):
                result = manager.get_result(timeout=1)
                if result and result.is_finished():
                    done, tokens = done + 1, tokens + len(result.generated_tokens)
        assert tokens == sum(self.limits), "both sides must sample the same lengths"

    # ---- rows -------------------------------------------------------------------------------------------------

    def rollout(self):
        tokens = sum(self.limits)
        times = alternate({"ours": self.ours, "generate": self.generate}, self.rounds)
        show("rollout vs model.generate", times["generate"] / times["ours"], ">= 5",
             f"{tokens / times['ours']:,.0f} vs {tokens / times['generate']:,.0f} tokens/s")

    def batch(self):
        logging.disable(logging.WARNING)
        tokens = sum(self.limits)
        times = alternate({"ours": self.ours, "generate_batch": self.generate_batch}, self.rounds)
        self.theirs.set_attn_implementation("sdpa")
        show("rollout vs generate_batch", times["generate_batch"] / times["ours"], ">= 15 (GPU 1.0)",
             f"{tokens / times['ours']:,.0f} vs {tokens / times['generate_batch']:,.0f} tokens/s")

    def tree(self):
        plan = 20 if self.name == "toy" else 150
        limits = [max(plan + 4, limit) for limit in self.limits]
        tree = lambda: grpo.sample_tree(self.model, self.even, plans=4, cots=3, max_new_tokens=limits, max_plan_tokens=plan + 1,
                                        plan_closed=lambda ids: len(ids) == plan, temperature=1.0, stop_ids=[], seed=0)
        lengths = [len(row.ids) for rows in tree() for row in rows]
        assert lengths == limits, "both sides must sample the same lengths"
        times = alternate({"PTA-GRPO": tree, "GRPO": lambda: self.ours(limits)}, self.rounds)
        show("PTA-GRPO rollout / GRPO rollout (time)", times["PTA-GRPO"] / times["GRPO"], "<= 1.0",
             f"{times['PTA-GRPO']:.2f} vs {times['GRPO']:.2f} s; plans of {plan} tokens")

    def growth(self):
        """All rows at once, as long as they fit in memory; beside it 8 x the rows in waves, as if only 1 x fitted."""
        rows = QUESTIONS * GROUP
        sides = {f"{factor} x": functools.partial(self.ours, self.limits * factor, self.even * factor) for factor in (1, 2, 4, 8)}
        sides[f"8 x in waves of {rows}"] = functools.partial(sides["8 x"], max_rows=rows)
        times = alternate(sides, self.rounds)
        rate = {name: int(name[0]) * sum(self.limits) / seconds for name, seconds in times.items()}
        show("tokens/s at 8 x the rows / at 1 x", rate["8 x"] / rate["1 x"], ">= 1.0",
             ", ".join(f"{name} {rate:,.0f}" for name, rate in rate.items()) + " tokens/s")

    def share(self):
        """Rollouts shaped as the demo's: prompts of the toy task, plans of 13 tokens, completions of about 43."""
        plan, limits = (13, draw_limits(QUESTIONS * GROUP, 42, 80, 30)) if self.name == "toy" else (150, self.limits)
        limits = [max(plan + 4, limit) for limit in limits]
        trees = grpo.sample_tree(self.model, self.prompts, plans=4, cots=3, max_new_tokens=limits, max_plan_tokens=plan + 1,
                                 plan_closed=lambda ids: len(ids) == plan, temperature=1.0, stop_ids=[], seed=0)
        rows, tokens, sides = [row for tree in trees for row in tree], {}, {}
        model = shard_model(load(self.name)[0])
        optimizer = make_optimizer(model, 1e-6, 0.0)
        for name, share in (("shared", True), ("plain", False)):
            config = grpo.Config(kl_coef=0.0, share_prefix=share, tokens_per_micro_batch=4000 if self.name == "toy" else 16384)
            micros = grpo.make_micros(rows, self.prompts, [1.0] * len(rows), config, DEVICE)
            tokens[name] = sum(len(micro.packed.ids) for micro in micros)
            sides[name] = lambda micros=micros, config=config: grpo.update(model, optimizer, micros, config, 1e-6)
        times = alternate(sides, self.rounds)
        show("update, shared beginnings vs plain packed", times["plain"] / times["shared"], ">= 1.3",
             f"{times['shared']:.3f} vs {times['plain']:.3f} s; {tokens['shared']} vs {tokens['plain']} tokens")

    def step(self):
        """A whole step, GRPO on both sides: 16 questions x 12 completions to their own ends, grading, one update."""
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
        limit, lr = 128, 1e-6
        model = shard_model(load(self.name)[0])
        optimizer = make_optimizer(model, lr, 0.0)
        stop_ids = [self.tokenizer.eos_token_id]
        config = grpo.Config(plans=GROUP, cots=1, beta=0.0, kl_coef=0.0, max_completion_tokens=limit, max_plan_tokens=0,
                             tokens_per_micro_batch=8192)
        questions = [{**p, "prompt": prompt} for p, prompt in zip(self.problems, self.prompts)]
        lengths = {"ours": [], "trl": []}

        def ours(seed: int):
            trees = grpo.sample_tree(model, self.prompts, plans=GROUP, cots=1, max_new_tokens=limit, max_plan_tokens=0,
                                     plan_closed=None, temperature=1.0, stop_ids=stop_ids, seed=seed)
            groups = grpo.make_groups(self.tokenizer, questions, trees, stop_ids)
            rewards = grpo.group_rewards(groups, config)
            advantages = grpo.group_advantages(rewards["total"].flatten(1))
            rows = [row for group in groups for row in group.rows]
            micros = grpo.make_micros(rows, self.prompts, advantages.flatten().tolist(), config, DEVICE)
            grpo.update(model, optimizer, micros, config, lr)
            lengths["ours"].append(rewards["lengths"].float().mean().item())

        def reward(completions, completion_ids, answer, **columns):
            lengths["trl"].append(statistics.mean(map(len, completion_ids)))
            return [float(right) for right in grade(answer, [extract_answer(text) for text in completions])]

        seconds = {"ours": [], "trl": []}

        class Alternate(TrainerCallback):
            def on_step_begin(self, *args, **options):
                self.began = time.perf_counter()

            def on_step_end(self, args, state, control, **options):
                seconds["trl"].append(time.perf_counter() - self.began)
                began = time.perf_counter()
                ours(state.global_step)
                seconds["ours"].append(time.perf_counter() - began)

        template = self.tokenizer.apply_chat_template
        data = Dataset.from_list([{"prompt": template([{"role": "user", "content": p["problem"]}], tokenize=False,
                                                      add_generation_prompt=True), "answer": p["answer"]} for p in self.problems])
        with tempfile.TemporaryDirectory() as folder:
            GRPOTrainer(
                model=load(self.name)[0], reward_funcs=reward, train_dataset=data, processing_class=self.tokenizer,
                callbacks=[Alternate()],
                args=GRPOConfig(folder, per_device_train_batch_size=QUESTIONS * GROUP, num_generations=GROUP, beta=0.0,
                                max_completion_length=limit, max_steps=self.rounds + 1, learning_rate=lr, temperature=1.0,
                                use_vllm=False, bf16=DEVICE.type == "cuda", use_cpu=DEVICE.type == "cpu", report_to="none",
                                logging_steps=1000, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False)).train()
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        show("a whole step vs TRL's GRPOTrainer", medians["trl"] / medians["ours"], ">= 2.5 (GPU 3)",
             f"{medians['ours']:.2f} vs {medians['trl']:.2f} s; mean length "
             f"{statistics.mean(lengths['ours']):.1f} vs {statistics.mean(lengths['trl']):.1f}")

    def memory(self):
        """Peak of logprobs and backward over 8,192 tokens at Qwen's vocabulary, once, each form in its own process."""
        run = lambda form: float(subprocess.run([sys.executable, "-m", "bench.speed", "--memory", form], capture_output=True,
                                                text=True, check=True).stdout.split()[-1])
        peaks = {form: run(form) for form in ("ours", "plain")}
        show("peak extra memory, ours / full logits", peaks["ours"] / peaks["plain"], "<= 0.15",
             f"{peaks['ours']:,.0f} vs {peaks['plain']:,.0f} MiB")


def measure_memory(form: str):
    """Print the peak memory (MiB) that one forward and backward adds: one layer of width 896, 8 x 1,024 tokens."""
    config = AutoConfig.for_model("qwen2", hidden_size=896, intermediate_size=896, num_hidden_layers=1, num_attention_heads=14,
                                  num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
    model = shard_model(AutoModelForCausalLM.from_config(config).to(DEVICE))
    sequences = torch.randint(0, 151936, (8, 1025), generator=torch.Generator().manual_seed(0)).tolist()
    peak = lambda: torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else peak_mb()
    before = peak()
    if form == "ours":
        logprobs, _ = model.token_logprobs(pack(sequences, [1] * 8, DEVICE, share=False))
    else:
        ids = torch.tensor(sequences, device=DEVICE)
        logprobs = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])
    logprobs.mean().backward()
    print(peak() - before)


ROWS = ("step", "rollout", "batch", "tree", "memory", "share", "growth")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(ROWS)}; none: all")
    parser.add_argument("--model", default="toy", choices=("toy", "1.5b"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=("ours", "plain"), help="measure one form and print MiB (used by the memory row)")
    args = parser.parse_args()
    if args.memory:
        return measure_memory(args.memory)
    if unknown := set(args.rows) - set(ROWS):
        raise SystemExit(f"error: unknown row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    warnings.filterwarnings("ignore")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} cores"
    print(f"{platform.system()} {platform.machine()}, {name}, Python {platform.python_version()}, "
          + ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl"))
          + f"; model {args.model}, {QUESTIONS} questions x {GROUP}, {args.rounds} rounds")
    bench = Bench(args)
    for row in args.rows or ROWS:
        getattr(bench, row)()


if __name__ == "__main__":
    main()
