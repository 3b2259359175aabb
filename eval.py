"""Evaluation: avg@n with a 95 % interval, pass@k, length, format and truncation rates.

The paper's protocol is temperature 0.6, top-p 0.95 and the mean over 64 samples a problem (section 4.1 of arXiv
2510.01833); these are the defaults.

    python eval.py --model runs/demo/pta/model --data runs/demo/data/test.jsonl --out runs/demo/eval_pta --n 1
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from grpo import GRADER_COUNTS, accuracy, evaluate, load_questions
from model_utils import (append_jsonl, check_context, fail, gather0, init_distributed, load_config, load_model, load_tokenizer, parse_config,
                         print0, rank)
from rewards import grader_stats


@dataclass
class Config:
    model: str = "runs/pta/model"  # Hugging Face folder or hub id
    data: str = "openai/gsm8k:test"  # problems: JSONL path, toy[:split], hub id
    out: str = "runs/eval"  # folder for records.jsonl and summary.json
    n: int = 64  # samples a problem
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95  # nucleus
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out, and counted
    max_completion_tokens: int = 3584  # plan and CoT together
    rollout_rows: int = 192  # sequences decoded at once
    limit: int = 0  # use a random subset of this size; 0: all
    seed: int = 0  # of sampling, the subset and the bootstrap
    overwrite: bool = False  # replace the results in --out


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n: 1 - C(n-c, k) / C(n, k).

    arXiv 2107.03374. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k wants 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)  # comb is 0 where n - c < k


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean of `values` (N,), one value a problem."""
    rng = np.random.default_rng(seed)
    means = np.concatenate([values[rng.integers(0, len(values), (100, len(values)))].mean(1)
                            for _ in range(resamples // 100)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(records: list[dict], seed: int = 0) -> dict:
    """Figures of a list of eval records (each with `samples`), all shares in 0..1."""
    samples = [sample for record in records for sample in record["samples"]]
    n = len(records[0]["samples"])
    right = np.array([sum(s["correct"] for s in record["samples"]) for record in records])
    low, high = bootstrap_interval(right / n, seed)

    def mean(name: str) -> float:
        return sum(sample[name] for sample in samples) / len(samples)

    return {"accuracy": accuracy(records), "ci_low": low, "ci_high": high, "n_problems": len(records),
            "n_samples": n, "mean_length": mean("tokens"), "format_rate": mean("well_formed"),
            "truncation_rate": mean("truncated"),
            "pass_at_k": {k: float(np.mean([pass_at_k(n, int(c), k) for c in right]))
                          for k in (1, 2, 4, 8, 16, 32, 64) if k <= n}}


def main():
    config = parse_config(Config)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; --out wants a folder")
    if config.n < 1 or not 0 < config.top_p <= 1 or config.temperature < 0:
        fail("--n must be at least 1, --top_p in (0, 1] and --temperature not below 0")
    if any((out / name).exists() for name in ("records.jsonl", "summary.json")) and not config.overwrite:
        fail(f"{out} already holds results: choose another --out or pass --overwrite")
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model)
    problems = load_questions(config.data, tokenizer, config.max_prompt_tokens, config.limit, config.seed)
    check_context(model_config, max(len(p["prompt"]) for p in problems), config.max_completion_tokens)
    device = init_distributed()
    # Every rank holds the whole model and answers its share of the problems.
    model = load_model(config.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    records = evaluate(model, tokenizer, problems, n=config.n, temperature=config.temperature, top_p=config.top_p,
                       max_new_tokens=config.max_completion_tokens, seed=config.seed, max_rows=config.rollout_rows)
    stats = gather0([grader_stats()])  # every rank graded its own share
    if rank() != 0:
        return
    (out / "records.jsonl").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    summary = {**summarise(records, config.seed), "grader": {name: sum(s[name] for s in stats) for name in GRADER_COUNTS}}
    append_jsonl(out / "records.jsonl", records)
    (out / "summary.json").write_text(json.dumps({**summary, "settings": asdict(config)}, indent=1) + "\n")
    print0(f"{config.model} on {config.data}: {summary['n_problems']} problems x {config.n}\n"
           f"  accuracy {summary['accuracy']:.3f}  95 % interval {summary['ci_low']:.3f} to {summary['ci_high']:.3f}\n"
           f"  mean length {summary['mean_length']:.1f} tokens  well-formed {summary['format_rate']:.3f}  "
           f"truncated {summary['truncation_rate']:.3f}\n"
           "  " + "  ".join(f"pass@{k} {value:.3f}" for k, value in summary["pass_at_k"].items()))


if __name__ == "__main__":
    main()
