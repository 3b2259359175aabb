r"""Evaluation: avg@n, maj@n and pass@k with 95 % intervals, paired comparison of two runs, what a plan is worth.

The paper's protocol is temperature 0.6, top-p 0.95 and the mean over 64 samples a problem (section 4.1 of arXiv
2510.01833); these are the defaults. Several benchmarks in one call; sharded over ranks; --resume goes on.

    python eval.py --model runs/pta/model --data math500 aime24 aime25 amc23 --out runs/eval_pta
    torchrun --nproc_per_node=8 -- eval.py ...                         problems dealt to ranks (-- or torchrun claims --n)
    python eval.py --compare runs/eval_grpo/records.jsonl runs/eval_pta/records.jsonl    second minus first
    python eval.py ... --plan given.jsonl                              reason from these plans (id, plan)
    python eval.py ... --plan shuffled --plan_from FILE                from another problem's plan
    python eval.py ... --plan none                                     from no plan: the completion starts at <think>
    python eval.py --analysis hsic --data runs/pta/rollouts.jsonl      the paper's Fig. 3

An interval speaks of problems like these, not of these alone: with 30 problems it is wide, whatever n is.
"""
import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import fingerprint, guarded
from data.sources import load_jsonl
from grpo import accuracy, evaluate, load_questions
from model_utils import (barrier, check_context, fail, gather0, init_distributed, load_config, load_model,
                         load_tokenizer, parse_config, print0, rank, world_size)
from rewards import GRADER_COUNTS, TAG, extract_answer, grader_stats, parse_completion
from run_folder import (LOCK, RESULTS, append_jsonl, hold, make_folder, read_settings, stage_of,
                        write_whole)

SAVE_EVERY = 1024  # completions of a rank between two writes of its records, and so at most decoded at once


@dataclass
class Config:
    model: str = "runs/pta/model"  # Hugging Face folder or hub id
    data: tuple = ("math500", "aime24", "aime25", "amc23")  # benchmarks: JSONL paths, toy[:split], names of data/README.md
    out: str = "runs/eval"  # folder for records.jsonl and summary.json
    n: int = 64  # samples a problem (>= 1)
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95  # nucleus (> 0, <= 1)
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out, and counted (>= 1)
    max_completion_tokens: int = 3584  # plan and CoT together (>= 1)
    plan: str = ""  # empty: the model's own plans; none; shuffled; or a JSONL file of plans (id, plan) or eval records
    plan_from: str = ""  # with --plan shuffled: the JSONL file that the plans are taken from
    thinking: bool = True  # Qwen3: false renders its non-thinking prompt
    compare: tuple = ()  # two records.jsonl of earlier evaluations: print the second minus the first, and end
    analysis: str = ""  # hsic: dependence of predicted and true answers on the plan reward, over the rollouts in --data
    rollout_rows: int = 0  # most sequences a rank decodes at once; 0: as many as fit in memory, up to 1,024
    limit: int = 0  # use a random subset of each benchmark of this size; 0: all
    seed: int = 0  # of sampling, the subset, shuffled plans and the bootstrap (< 4e9)
    overwrite: bool = False  # replace the results in --out
    resume: bool = False  # go on after the records in --out


# ---------------------------------------------------------------------------------------------------------------
# Figures of samples

def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n: 1 - C(n-c, k) / C(n, k).

    arXiv 2107.03374. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k wants 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)  # comb is 0 where n - c < k


def answer_key(sample: dict) -> str | None:
    """What counts as one and the same answer: right ones all alike, wrong ones by spelling; None without an answer."""
    if sample["correct"]:
        return "right"
    if sample["answer"] is None:
        return None
    return "wrong " + re.sub(r"\\left|\\right|\\[,;!: ]|[\s$]", "", sample["answer"]).replace("dfrac", "frac").rstrip(".")


def maj_at_n(samples: list[dict]) -> float:
    """1 if the most frequent answer of a problem's samples is right, 0 if not; a tie of k answers gives each 1/k."""
    votes = Counter(key for key in map(answer_key, samples) if key is not None)
    top = [key for key, count in votes.items() if count == max(votes.values())]
    return ("right" in top) / len(top) if top else 0.0


# ---------------------------------------------------------------------------------------------------------------
# Intervals and tests

def resampled(rates: np.ndarray, n: np.ndarray, signs: np.ndarray, rng, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Hierarchical bootstrap of one benchmark: problems with replacement, then n samples anew for each drawn problem.

    rates (N, R): shares of right samples of N problems in R runs; n (R,) samples a problem; signs (R,). Returns the
    mean over problems of rates @ signs and its squared standard error in each resample, both (resamples,).
    """
    size = len(rates)
    means, squares = [], []
    for start in range(0, resamples, chunk := max(1, 2_000_000 // size)):
        drawn = rates[rng.integers(0, size, (min(chunk, resamples - start), size))]  # (b, N, R)
        values = rng.binomial(n, drawn) / n @ signs  # (b, N)
        means.append(values.mean(1))
        squares.append(values.var(1, ddof=1) / size)
    return np.concatenate(means), np.concatenate(squares)


def bootstrap_interval(benchmarks: list[np.ndarray], n, signs=(1,), seed: int = 0, resamples: int = 4000) -> tuple[float, float]:
    """95 % interval of the mean over benchmarks of the mean over problems, by a studentised hierarchical bootstrap.

    benchmarks: for each, the right samples (N, R) of its N problems in R runs, of n (R,) each; signs (1,) for an
    accuracy, (-1, 1) for the second run's minus the first's. Problems are paired across runs.

    Resampling problems *and* samples counts the sampling noise twice, because the observed shares hold it already:
    plain percentiles of such resamples cover too often for few samples a problem, and too seldom for few problems.
    Each resample is therefore divided by its own standard error (bootstrap-t), in which the surplus cancels; for
    accuracies this is done on the logit scale, or it would cover too often with few problems. Where resamples without
    any variance turn up, or with one sample a problem, that ratio is useless, and a score interval (one run) or
    pseudo-counts (two) take its place. bench/stats.py prints the coverage.
    """
    n, signs = np.broadcast_to(n, len(signs)), np.asarray(signs, dtype=float)
    rng = np.random.default_rng(seed)
    rates = [counts.reshape(len(counts), -1) / n for counts in benchmarks]  # (N, R) each
    values = [rate @ signs for rate in rates]  # (N,)
    size = sum(map(len, values))
    mean = float(np.mean([v.mean() for v in values]))
    error = math.sqrt(sum(v.var(ddof=1) / len(v) if len(v) > 1 else 0.0 for v in values)) / len(values)
    if min(map(len, values)) >= 2 and max(n) > 1:
        means, squares = zip(*(resampled(rate, n, signs, rng, resamples) for rate in rates))
        means, errors = np.mean(means, axis=0), np.sqrt(np.sum(squares, axis=0)) / len(values)
        if (errors < 1e-9).mean() <= 1e-3:
            shift = 0.5 / size  # keeps the logits of 0 and 1 finite
            if len(signs) == 1:
                scale = lambda x: np.log((x + shift) / (1 - x + shift))
                slope = lambda x: 1 / (x + shift) + 1 / (1 - x + shift)
                back = lambda y: min(max(float((1 + 2 * shift) / (1 + np.exp(-y)) - shift), 0.0), 1.0)
            else:
                scale, slope, back = (lambda x: x), (lambda x: 1.0), float
            t = (scale(means) - scale(mean)) / (slope(means) * np.maximum(errors, 1e-9))
            low, high = np.quantile(t, [0.025, 0.975])
            return back(scale(mean) - high * slope(mean) * error), back(scale(mean) - low * slope(mean) * error)
    if len(signs) == 1:  # Wilson's score interval at the effective sample size: independent samples with as much variance
        size = mean * (1 - mean) / error**2 if error and (max(n) > 1 or len(values) > 1) else size
        centre, half = mean + 1.92 / size, 1.96 * math.sqrt(mean * (1 - mean) / size + 0.96 / size**2)
        return (centre - half) / (1 + 3.84 / size), (centre + half) / (1 + 3.84 / size)
    mean = variance = 0.0  # Agresti and Min: a pair that speaks for each run in turn is added to every benchmark
    for v in values:
        centre, second = v.sum() / (len(v) + 2), ((v**2).sum() + 1) / (len(v) + 2)
        mean, variance = mean + centre / len(values), variance + (second - centre**2) / (len(v) + 2) / len(values) ** 2
    half = 1.96 * math.sqrt(variance)
    return max(float(mean - half), -1.0), min(float(mean + half), 1.0)


def permutation_p(benchmarks: list[np.ndarray], seed: int = 0, flips: int = 10_000) -> float:
    """Two-sided p-value of paired per-problem differences (N,), one array a benchmark, by random sign flips.

    If the two runs were alike, each difference could as well have had the other sign. The statistic is the mean over
    benchmarks of the mean difference; the observed signs count as one of the flips, so that p is never 0. Flips that
    tie with it count half (mid-p): few problems with few samples tie often, and counting ties in full would find
    too little (in bench/stats.py 1.9 % false positives at 0.05 for 30 problems x 1). 1 where the means are equal.
    """
    rng = np.random.default_rng(seed)
    weights = np.concatenate([d / len(d) for d in benchmarks])
    observed, beyond, ties = abs(weights.sum()), 0, 1
    if observed < 1e-9:
        return 1.0
    for start in range(0, flips, chunk := max(1, 4_000_000 // len(weights))):
        signs = rng.integers(0, 2, (min(chunk, flips - start), len(weights)), dtype=np.int8) * 2 - 1
        excess = abs(signs @ weights) - observed
        beyond, ties = beyond + int((excess > 1e-9).sum()), ties + int((abs(excess) <= 1e-9).sum())  # up to rounding
    return (beyond + ties / 2) / (1 + flips)


def right_counts(records: list[dict]) -> np.ndarray:
    return np.array([sum(s["correct"] for s in record["samples"]) for record in records])


def by_benchmark(records: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record.get("benchmark", ""), []).append(record)
    return groups


def summarise(records: list[dict], seed: int = 0) -> dict:
    """Figures of a list of eval records (each with `samples`), all shares in 0..1.

    With several benchmarks each has its figures under `benchmarks`, and the others are means over benchmarks (as in
    the paper's Table 1). Raises ValueError where problems have unequal numbers of samples.
    """
    n = len(records[0]["samples"])
    if any(len(record["samples"]) != n for record in records):
        raise ValueError("every problem needs the same number of samples")
    groups = by_benchmark(records)

    def figures(part: list[dict]) -> dict:
        samples, right = [s for record in part for s in record["samples"]], right_counts(part)
        mean = lambda name: sum(sample[name] for sample in samples) / len(samples)
        low, high = bootstrap_interval([right], n, seed=seed)
        return {"accuracy": accuracy(part), "ci_low": low, "ci_high": high, "n_problems": len(part), "n_samples": n,
                "maj_at_n": sum(maj_at_n(record["samples"]) for record in part) / len(part), "mean_length": mean("tokens"),
                "format_rate": mean("well_formed"), "truncation_rate": mean("truncated"),
                "pass_at_k": {k: float(np.mean([pass_at_k(n, int(c), k) for c in right]))
                              for k in (1, 2, 4, 8, 16, 32, 64) if k <= n}}

    parts = {name: figures(part) for name, part in groups.items()}
    if len(parts) == 1:
        return parts.popitem()[1]
    mean = lambda name: float(np.mean([part[name] for part in parts.values()]))
    low, high = bootstrap_interval([right_counts(part) for part in groups.values()], n, seed=seed)
    overall = {name: mean(name) for name in ("accuracy", "maj_at_n", "mean_length", "format_rate", "truncation_rate")}
    return {**overall, "ci_low": low, "ci_high": high, "n_problems": len(records), "n_samples": n,
            "pass_at_k": {k: float(np.mean([part["pass_at_k"][k] for part in parts.values()]))
                          for k in next(iter(parts.values()))["pass_at_k"]}, "benchmarks": parts}


def compare(first: list[dict], second: list[dict], seed: int = 0) -> dict:
    """Second minus first on the problems that both have: {"rows": [...], "warnings": [...]}.

    A row has benchmark, n_problems, first, second (accuracies), delta, ci_low, ci_high, p; with several benchmarks a
    last row `overall` is their mean. Raises SystemExit if no problem is common to both.
    """
    rows, warnings, pairs = [], [], {}
    old, new = ({(r.get("benchmark", ""), r["id"]): r for r in records} for records in (first, second))
    for key in (key for key in old if key in new):
        if (old[key]["problem"], old[key]["answer"]) != (new[key]["problem"], new[key]["answer"]):
            warnings.append(f"problem {key[1]} has another text or gold in the two runs")
        pairs.setdefault(key[0], []).append((old[key], new[key]))
    if not pairs:
        fail("the two files have no problem in common: same --data, --limit and --seed make runs comparable")
    if alone := (len(old) - sum(map(len, pairs.values())), len(new) - sum(map(len, pairs.values()))):
        if any(alone):
            warnings.append(f"{alone[0]} problems are in the first run only, {alone[1]} in the second only: left out")
    sizes = [sorted({len(r["samples"]) for r in runs.values()}) for runs in (old, new)]
    if any(len(size) > 1 for size in sizes):
        fail("a run has unequal numbers of samples a problem: let eval.py --resume finish it")
    n = [size[0] for size in sizes]
    if n[0] != n[1]:
        warnings.append(f"{n[0]} samples a problem in the first run, {n[1]} in the second")

    counts = {name: np.stack([right_counts([a for a, _ in part]), right_counts([b for _, b in part])], 1)  # (N, 2)
              for name, part in pairs.items()}

    def row(name: str, parts: list[np.ndarray]) -> dict:
        rates = [part / n for part in parts]
        low, high = bootstrap_interval(parts, n, (-1, 1), seed)
        before, after = (float(np.mean([rate[:, run].mean() for rate in rates])) for run in (0, 1))
        return {"benchmark": name, "n_problems": sum(map(len, parts)), "first": before, "second": after,
                "delta": after - before, "ci_low": low, "ci_high": high,
                "p": permutation_p([rate[:, 1] - rate[:, 0] for rate in rates], seed)}

    rows = [row(name, [part]) for name, part in counts.items()]
    if len(rows) > 1:
        rows.append(row("overall", list(counts.values())))
    return {"rows": rows, "warnings": warnings}


def compare_files(paths: tuple[str, ...], seed: int):
    if len(paths) != 2 or not all(Path(path).is_file() for path in paths):
        fail("--compare wants two records.jsonl files of earlier evaluations")
    runs = [load_jsonl(Path(path)) for path in paths]
    for path, records in zip(paths, runs):
        if not records or any("samples" not in record for record in records):
            fail(f"{path} does not hold eval records (id, problem, answer, samples)")
    result = compare(*runs, seed)
    old, new = (read_settings(Path(path).with_name("run.json")) for path in paths)
    if old and new:
        for name in sorted(old.keys() & new.keys() - {"model", "weights", "out", "overwrite", "resume", "rollout_rows"}):
            if old[name] != new[name]:
                result["warnings"].append(f"--{name} is {old[name]!r} in the first run and {new[name]!r} in the second")
    else:
        result["warnings"].append("no run.json beside the records: settings not compared")
    print0(f"{'':24}{'problems':>9}{'first':>9}{'second':>9}{'delta':>9}   95 % interval{'p':>9}")
    for row in result["rows"]:
        print0(f"{Path(row['benchmark'] or 'all').name[:24]:24}{row['n_problems']:9}{row['first']:9.3f}{row['second']:9.3f}"
               f"{row['delta']:+9.3f}   {row['ci_low']:+.3f} to {row['ci_high']:+.3f}"
               f"{'<0.0001' if row['p'] < 1e-4 else format(row['p'], '.4f'):>9}")
    for warning in result["warnings"]:
        print0(f"warning: {warning}")


# ---------------------------------------------------------------------------------------------------------------
# Dependence of predicted and true answers (the paper's Fig. 3)

def hsic(k: np.ndarray, l: np.ndarray) -> float:
    """Empirical Hilbert-Schmidt independence criterion of two Gram matrices (N, N): tr(K H L H) / (N - 1)^2.

    Gretton et al., "Measuring statistical dependence with Hilbert-Schmidt norms" (2005). 0 where one side is constant.
    """
    centred = k - k.mean(0) - k.mean(1, keepdims=True) + k.mean()  # H K H
    return float((centred * l).sum() / (len(k) - 1) ** 2)


def same(items: list) -> np.ndarray:
    """Gram matrix (N, N) of the kernel 1 if equal, else 0."""
    codes = np.unique(np.array([str(item) for item in items]), return_inverse=True)[1]
    return (codes[:, None] == codes).astype(float)


def hsic_by_plan_reward(rollouts: list[dict], bins: int = 5, most: int = 2000, seed: int = 0) -> list[dict]:
    """Dependence of predicted on true answers in bins of like plan reward, lowest first.

    rollouts: grpo.py's records. Each row: plan_reward (mean), n, accuracy, hsic and nhsic = HSIC(p, t) /
    sqrt(HSIC(p, p) HSIC(t, t)), 0 to 1. Answers are compared by equality, right ones count as their gold; a bin of
    over `most` completions is represented by a random subset, as Gram matrices grow with the square.
    """
    points = [(c["reward"]["plan"], str(r["answer"]) if c["correct"] else extract_answer(c["text"]), str(r["answer"]), c["correct"])
              for r in rollouts for plan in r["plans"] for c in plan["completions"]]
    rewards = np.array([point[0] for point in points])
    edges = np.unique(np.quantile(rewards, np.linspace(0, 1, bins + 1)))
    place = np.clip(np.searchsorted(edges, rewards, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for b in np.unique(place):
        chosen = [points[i] for i in np.flatnonzero(place == b)]
        if len(chosen) > most:
            chosen = random.Random(seed).sample(chosen, most)
        if len(chosen) < 2:
            continue
        predicted, true = same([point[1] for point in chosen]), same([point[2] for point in chosen])
        value, scale = hsic(predicted, true), hsic(predicted, predicted) * hsic(true, true)
        rows.append({"plan_reward": float(np.mean([point[0] for point in chosen])), "n": int((place == b).sum()),
                     "accuracy": float(np.mean([point[3] for point in chosen])), "hsic": value,
                     "nhsic": value / math.sqrt(scale) if scale > 0 else 0.0})
    return rows


def analyse(config: Config):
    if config.analysis != "hsic":
        fail(f"--analysis is hsic, not {config.analysis!r}")
    rollouts = [record for path in config.data for record in (load_jsonl(Path(path)) if Path(path).is_file() else
                fail(f"no rollouts at {path!r}: --data wants a run's rollouts.jsonl"))]
    if not rollouts or any("plans" not in record for record in rollouts):
        fail(f"{', '.join(config.data)}: these are no rollouts (each line a question with its plans); "
             "--data wants a run's rollouts.jsonl")
    print0(f"{'plan reward':>12}{'n':>8}{'accuracy':>10}{'HSIC':>10}{'normalised':>12}")
    for row in hsic_by_plan_reward(rollouts, seed=config.seed):
        print0(f"{row['plan_reward']:12.3f}{row['n']:8}{row['accuracy']:10.3f}{row['hsic']:10.4f}{row['nhsic']:12.3f}")


# ---------------------------------------------------------------------------------------------------------------
# Plans from outside

def load_plans(path: str) -> dict[str, str]:
    """id -> plan, from plan records, or from eval records: there the first well-formed sample's plan."""
    if not Path(path).is_file():
        fail(f"no plans at {path!r}: give a JSONL file of plans (id, plan) or of eval records")
    plans = {}
    for number, record in enumerate(load_jsonl(Path(path)), 1):
        parsed = [parse_completion(sample["completion"]) for sample in record.get("samples", ())]
        plan = record.get("plan") or next((completion.plan for completion in parsed if completion), None)
        if plan and TAG.search(plan):
            fail(f"{path}, record {number}: the plan holds template tags; give the text between <plan> and </plan>")
        if plan:
            plans[str(record.get("id"))] = plan.strip()
    if not plans:
        fail(f"{path} holds no plans: its records need id and plan, or samples that follow the template")
    return plans


def add_prefixes(problems: list[dict], config: Config, tokenizer) -> list[dict]:
    """The problems that have a plan to reason from, each with `prefix`: the ids that its completions start with.

    A prefix ends after "<think>\\n": that is a token boundary in the SFT targets of every family, "</plan>" is not.
    """
    plans = None
    if config.plan not in ("", "none"):
        plans = load_plans(config.plan_from if config.plan == "shuffled" else config.plan)
    kept = [problem for problem in problems if plans is None or problem["id"] in plans]
    if not kept:
        fail(f"none of the plans in {config.plan_from or config.plan} belongs to a problem of {problems[0]['benchmark']}: ids differ")
    source = {problem["id"]: problem["id"] for problem in kept}
    if config.plan == "shuffled":
        if len(kept) < 2:
            fail("--plan shuffled needs plans of at least two problems")
        order = [problem["id"] for problem in kept]
        random.Random(config.seed).shuffle(order)
        source = {order[i]: order[i - 1] for i in range(len(order))}  # a cycle: nobody keeps the own plan
    for problem in kept:
        plan = f"<plan>\n{plans[source[problem['id']]]}\n</plan>\n" if plans else ""
        problem["prefix"] = list(tokenizer.encode(f"{plan}<think>\n", add_special_tokens=False)) if config.plan else []
    if len(kept) < len(problems):
        print0(f"{problems[0]['benchmark']}: {len(problems) - len(kept)} problems without a plan left out")
    return kept


# ---------------------------------------------------------------------------------------------------------------
# Main

def weights_of(path: str, model_config) -> str:
    """What tells one model from another: the commit of a hub model, a digest of a folder's weights and settings."""
    if not Path(path).is_dir():
        return model_config._commit_hash or ""
    files = [file for file in sorted(Path(path).iterdir()) if not file.name.startswith("optimizer")
             and file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")]
    return hashlib.sha256(json.dumps([[file.name, *fingerprint(file)] for file in files]).encode()).hexdigest()


def check_folder(config: Config):
    """Make --out; refuse one that holds what is not this evaluation's to replace (SystemExit)."""
    out = Path(config.out)
    if stage_of(out) == "training" or (out / "metrics.jsonl").exists():
        fail(f"{out} is a training run's folder, whose run.json an evaluation would replace; choose "
             f"another --out, such as {out / 'eval'}")
    holds_results = any((out / name).exists() for name in RESULTS)
    if holds_results and not (config.overwrite or config.resume):
        fail(f"{out} already holds results: choose another --out, pass --resume to go on or --overwrite to replace them")
    names = [name for name in ("run.json", *RESULTS) if (out / name).exists()]
    # A resume compares the weights, which no record but an evaluation's names.
    if names and stage_of(out) != "evaluation" and not (config.resume and holds_results):
        fail(f"{out} holds {', '.join(names)}, and no run.json there says that an evaluation of "
             "ours wrote that: move it away, or choose another --out")
    if rank() == 0:
        make_folder(out)


def check_results(config: Config, model_config) -> dict:
    """What run.json of --out is to hold; refuses a folder with other results (SystemExit)."""
    check_folder(config)  # again: another evaluation may have ended before this one had the lock
    out = Path(config.out)
    settings = json.loads(json.dumps({"stage": "evaluation", **asdict(config)}))
    if rank() != 0:
        return settings
    settings["weights"] = weights_of(config.model, model_config)
    if config.resume and any((out / name).exists() for name in RESULTS):
        old = read_settings(out / "run.json")
        for name in settings.keys() & old.keys() - {"out", "overwrite", "resume", "rollout_rows", "weights"}:
            if settings[name] != old[name]:
                fail(f"{out} holds results with --{name} {old[name]}, not {settings[name]}: resume with the same "
                     "settings or choose another --out")
        if old.get("weights") != settings["weights"]:
            fail(f"{out} holds results of other weights than {config.model} has now: choose another --out or pass --overwrite")
    return settings


def open_results(config: Config, settings: dict) -> Path:
    """Begin to write in --out, which `check_results` has passed, when every rank has loaded its model. A collective."""
    out = Path(config.out)
    barrier()
    if rank() == 0:
        for old in ("summary.json", *(["records.jsonl"] if config.overwrite else [])):
            (out / old).unlink(missing_ok=True)
        write_whole(out / "run.json", settings)
    return out


def finished(path: Path) -> set[tuple[str, str]]:
    """(benchmark, id) of the records in `path`, the same on all ranks. A last line cut off in mid-write is removed."""
    done: list = [set()]
    if rank() == 0 and path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[:data.rfind(b"\n") + 1])
        records = load_jsonl(path)
        if any("benchmark" not in record for record in records):
            fail(f"{path} holds records of an older form, without `benchmark`: choose another --out or pass --overwrite")
        done = [{(record["benchmark"], record["id"]) for record in records}]
    if world_size() > 1:
        dist.broadcast_object_list(done, src=0)
    return done[0]


def check_config(config: Config):
    if len({Path(name).resolve() for name in config.data}) < len(config.data):
        fail("--data names a benchmark twice")
    if config.plan == "shuffled" and not config.plan_from:
        fail("--plan shuffled needs --plan_from: a JSONL file of plans, or an earlier evaluation's records.jsonl")
    if config.plan_from and config.plan != "shuffled":
        fail("--plan_from goes with --plan shuffled; a file of plans to use as they are is given as --plan FILE")


def main():
    config = parse_config(Config)
    if config.compare:
        return compare_files(config.compare, config.seed)
    if config.analysis:
        return analyse(config)
    check_config(config)
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model, config.thinking)
    problems = []
    for name in config.data:
        part = load_questions(name, tokenizer, config.max_prompt_tokens, config.limit, config.seed)
        problems += add_prefixes([{**problem, "benchmark": name} for problem in part], config, tokenizer)
    check_context(model_config, max(len(p["prompt"]) for p in problems), config.max_completion_tokens)
    if (longest := max(len(p["prefix"]) for p in problems)) >= config.max_completion_tokens:
        fail(f"a given plan of {longest} tokens leaves no room in --max_completion_tokens {config.max_completion_tokens}; raise it")
    check_folder(config)
    device = init_distributed()
    hold(Path(config.out) / LOCK)  # before anything is read that another evaluation may be writing
    settings = check_results(config, model_config)
    done = set() if config.overwrite else finished(Path(config.out) / "records.jsonl")
    todo = [problem for problem in problems if (problem["benchmark"], problem["id"]) not in done]
    if todo:
        # Every rank holds the whole model and answers its share of the problems.
        model = load_model(config.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    out = open_results(config, settings)
    # Records are written chunk by chunk: what an interruption loses is at most one chunk.
    chunk = max(1, (4 * config.rollout_rows or SAVE_EVERY) // config.n) * world_size()
    with tqdm(total=len(problems), initial=len(done), desc="eval", unit="problem", disable=None if rank() == 0 else True) as bar:
        for start in range(0, len(todo), chunk):
            part = todo[start:start + chunk]
            seed = random.Random(f"{config.seed} {len(done) + start}").getrandbits(60)  # another one each chunk
            try:
                records = evaluate(model, tokenizer, part, n=config.n, temperature=config.temperature, top_p=config.top_p,
                                   max_new_tokens=config.max_completion_tokens, seed=seed, max_rows=config.rollout_rows)
            except KeyboardInterrupt:
                print0(f"{len(done) + start} of {len(problems)} problems are in {out}; --resume goes on from there")
                raise
            try:
                append_jsonl(out / "records.jsonl", records)
            except OSError as error:
                fail(f"{out / 'records.jsonl'} cannot be written ({error.strerror}): make room or mend "
                     "the folder, then go on with --resume")
            bar.update(len(part))
    stats = gather0([grader_stats()])  # every rank graded its own share
    if rank() != 0:
        return
    records = load_jsonl(out / "records.jsonl")
    summary = {**summarise(records, config.seed), "grader": {name: sum(s[name] for s in stats) for name in GRADER_COUNTS}}
    (out / "summary.json").write_text(json.dumps({**summary, "settings": asdict(config)}, indent=1) + "\n")
    for name, figures in {**summary.get("benchmarks", {}), "mean" if "benchmarks" in summary else config.data[0]: summary}.items():
        print0(f"{config.model} on {name}: {figures['n_problems']} problems x {config.n}\n"
               f"  accuracy {figures['accuracy']:.3f}  95 % interval {figures['ci_low']:.3f} to {figures['ci_high']:.3f}  "
               f"maj@{config.n} {figures['maj_at_n']:.3f}\n"
               f"  mean length {figures['mean_length']:.1f} tokens  well-formed {figures['format_rate']:.3f}  "
               f"truncated {figures['truncation_rate']:.3f}\n"
               "  " + "  ".join(f"pass@{k} {value:.3f}" for k, value in figures["pass_at_k"].items()))


if __name__ == "__main__":
    guarded(main)
