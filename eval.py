"""Evaluation: avg@n, maj@n and pass@k with 95 % intervals, two runs compared, plans from outside.

The defaults are the paper's (arXiv 2510.01833, A.10): temperature 0.6, top-p 0.95, the mean over
64 samples per problem. The ranks share the problems, and --resume goes on after a stop.

    python eval.py --model runs/pta/model --data math500 aime24 aime25 amc23 --out runs/eval_pta
    torchrun --nproc_per_node=8 -- eval.py ...           without `--`, torchrun takes --n for itself
    python eval.py --compare A/records.jsonl B/records.jsonl     B minus A
    python eval.py ... --plan given.jsonl                        reason from these plans (id, plan)
    python eval.py ... --plan shuffled --plan_from FILE          from another problem's plan
    python eval.py ... --plan none                               from no plan: start at <think>
    python eval.py ... --analysis plans                          how much does the plan decide?

An interval includes the choice of problems: with 30 problems it stays wide, however large n is.
"""

import plumbing.threads  # noqa: F401 -- before torch, which reads what it sets

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.sources import load_gradable
from data.verifiers import plan_revision, reading, restated, same_answers, tally, verify
from data.worlds import replies
from grpo import sample, sample_tree
from model_utils import (
    completion_texts,
    encode_question,
    find_stop_ids,
    load_model,
    load_tokenizer,
    plan_marks,
)
from plumbing import folder
from plumbing.calls import check_tools, own_ids
from plumbing.checkpoint import digest
from plumbing.flags import parse_config
from plumbing.images import open_album, show
from plumbing.intervals import accuracy_interval, paired_difference
from plumbing.log import said_spans
from plumbing.plans import analyse, analysis_text
from plumbing.ranks import gather0, init_distributed, print0, progress, rank, require, world_size
from plumbing.records import Records, load_jsonl
from plumbing.revision import revision_figures, revision_text
from plumbing.signals import guarded
from plumbing.votes import label_votes, maj_at_n
from plumbing.weights import check_context, load_config
from rewards import TAG, parse_completion

# How results are printed. The z in a format makes -0.0002 read 0.000, not -0.000.
SUMMARY = """{model} on {name}: {n_problems} problems x {n_samples}
  accuracy {accuracy:.3f}  95 % interval {ci_low:z.3f} to {ci_high:z.3f}  restated {restated:.3f}
  mean length {mean_length:.1f}  well-formed {format_rate:.3f}  truncated {truncation_rate:.3f}
  maj@{n_samples} {maj_at_n:.3f}  {rates}"""
DIFFERENCE = """{name:24} {n_problems:5} problems  {first:.3f} to {second:.3f}  \
delta {delta:+z.3f}  95 % interval {ci_low:+z.3f} to {ci_high:+z.3f}  p {p:.5f}"""


@dataclass
class Config:
    model: str = "runs/pta/model"  # Hugging Face folder or hub id
    data: tuple = ("math500", "aime24", "aime25", "amc23")  # JSONL paths or names of data/README.md
    out: str = "runs/eval"  # folder for records.jsonl and summary.json
    n: int = 64  # samples per problem (>= 1)
    analysis: Literal["", "plans"] = ""  # plans: how much of the outcome does the plan decide?
    cots: int = 1  # with --analysis plans: samples that share a plan, there 4 if not given (>= 1)
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95  # nucleus (> 0, <= 1)
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out, and counted (>= 1)
    max_plan_tokens: int = 512  # a longer plan of the model's own gets no CoT; 0: no limit
    max_completion_tokens: int = 3584  # plan and CoT together (>= 1)
    tools: tuple = ()  # calls that are answered in the think block: calculator, python
    plan: str = ""  # empty: the model's own; none; shuffled; a JSONL file of plans or eval records
    plan_from: str = ""  # with --plan shuffled: the JSONL file that the plans are taken from
    thinking: bool = True  # Qwen3: false renders its non-thinking prompt
    max_pixels: int = 401408  # larger pictures are made smaller; 0: the model's own limit
    compare: tuple = ()  # two records.jsonl of earlier evaluations: print second - first, and end
    rollout_rows: int = 0  # sequences decoded at once per rank; 0: as many as fit in memory
    limit: int = 0  # use a random subset of each benchmark of this size; 0: all
    seed: int = 0  # of sampling, the subset, shuffled plans and the paired test (< 4e9)
    overwrite: bool = False  # replace the results in --out
    resume: bool = False  # go on after the records in --out

    def check(self):
        """Refuse what cannot work. The default plan limit is cut to half the completion limit."""
        if self.max_plan_tokens == Config.max_plan_tokens:
            self.max_plan_tokens = min(self.max_plan_tokens, self.max_completion_tokens // 2)
        check_tools(self.tools)
        files, shuffled = {Path(name).resolve() for name in self.data}, self.plan == "shuffled"
        require(len(files) == len(self.data), "--data names a benchmark twice: leave one out")
        require(not shuffled or self.plan_from, "--plan shuffled needs --plan_from FILE with plans")
        require(shuffled or not self.plan_from, "--plan_from goes with --plan shuffled: pass both")
        plan, limit = self.max_plan_tokens, self.max_completion_tokens
        require(plan < limit, "--max_plan_tokens must be below --max_completion_tokens")
        if not self.analysis:
            return require(self.cots == 1, "--cots goes with --analysis plans: pass both")
        self.cots = 4 if self.cots == Config.cots else self.cots
        require(not self.plan, "--analysis plans is about the model's own plans: leave --plan out")
        sampled = self.temperature and plan
        require(sampled, "--analysis plans wants --temperature and --max_plan_tokens above 0")
        several = self.n % self.cots == 0 and self.plans > 1
        require(several, f"--n must be 2 or more times {self.cots}, the CoTs per plan (--cots)")

    @property
    def plans(self) -> int:  # per problem; each has `cots` of the n samples
        return self.n // self.cots


# --------------------------------------------------------------------------------------------------
# Sampling and grading

def complete(
    model, tokenizer, problems: list[dict], config: Config, seed: int, respond=None
) -> tuple:
    """Token ids of n completions of each problem, problem-major, and the lengths of their plans.

    A given plan is part of its completion, and its length counts as 0, like that of a plan that
    never closed. The model's own plans are cut at --max_plan_tokens, as in training.
    """
    options = dict(stop_ids=find_stop_ids(model, tokenizer), top_p=config.top_p, seed=seed)
    options["respond"] = respond
    if not config.plan:
        opened, closed = plan_marks(tokenizer)
        options |= dict(plan_opened=opened, plan_closed=closed)
        trees = sample_tree(model, [p["prompt"] for p in problems], config, **options)
        rollouts = [rollout for tree in trees for rollout in tree]
        return [r.ids for r in rollouts], [r.plan_tokens for r in rollouts]
    given = [problem["given"] for problem in problems for _ in range(config.n)]
    limits = [config.max_completion_tokens - len(plan) for plan in given]
    options |= dict(temperature=config.temperature, n=config.n, max_rows=config.rollout_rows)
    prompts = [p["prompt"] + p["given"] for p in problems]
    sampled, _ = sample(model, prompts, max_new_tokens=limits, **options)
    return [plan + new for plan, new in zip(given, sampled)], [0] * len(given)


def grade(tokenizer, each: list, ids: list, given: list, stop_ids: list, config: Config) -> list:
    """The samples of eval records. `each`: their problems; `given`: places of replies in `ids`."""
    texts, own = completion_texts(tokenizer, ids, stop_ids), list(map(own_ids, ids, given))
    judged = completion_texts(tokenizer, own, stop_ids) if any(given) else texts
    read = [reading(p, text, config.tools) for p, text in zip(each, judged)]
    # Sample i of a problem meets the same world in every evaluation with this --seed.
    salts = [f"{config.seed} {i % config.n}" for i in range(len(each))]
    verdicts = verify(each, [answer for _, answer, _ in read], salts)
    samples = []
    for i, ((blocks, answer, forged), right) in enumerate(zip(read, verdicts)):
        sample = {
            "completion": texts[i], "answer": answer, "correct": right, "tokens": len(own[i]),
            "well_formed": blocks is not None,
            "truncated": ids[i][-1] not in stop_ids,
            "restated": right and restated(each[i], answer),
        }
        if given[i] or forged:
            said = said_spans(tokenizer, ids[i], given[i], texts[i])
            sample |= {"said": said, "forged": forged}
        revision = plan_revision(each[i], blocks, answer, salts[i])
        samples.append(sample if revision is None else {**sample, "revision": revision})
    return samples


def evaluate(model, tokenizer, problems: list[dict], config: Config, seed: int) -> list[dict]:
    """Eval records on rank 0: n graded samples of each problem, in order. A collective."""
    mine, n, stop_ids = problems[rank()::world_size()], config.n, find_stop_ids(model, tokenizer)
    samples = []
    if mine:  # the last problems may be fewer than the ranks
        each = [problem for problem in mine for _ in range(n)]  # the problem of each sample
        show(tokenizer, [p["prompt"] for p in mine], model)
        salt_of, starts = lambda i: f"{config.seed} {i % n}", [p.get("given", []) for p in mine]
        respond = replies(tokenizer, mine, config, stop_ids, salt_of, starts)
        ids, plan_tokens = complete(model, tokenizer, mine, config, seed + rank(), respond)
        given = [respond.places(i) if respond else [] for i in range(len(ids))]
        samples = grade(tokenizer, each, ids, given, stop_ids, config)
        same = lambda places, *pairs: same_answers([mine[i] for i in places], *pairs)
        label_votes([samples[i:i + n] for i in range(0, len(samples), n)], same)
        if config.analysis:  # plan-major: sample i has plan i // cots
            samples = [{**s, "plan_tokens": size} for s, size in zip(samples, plan_tokens)]
    names = ("benchmark", "id", "problem", "answer", "images")
    heads = [{name: problem[name] for name in names if name in problem} for problem in mine]
    records = [{**head, "samples": samples[i * n:i * n + n]} for i, head in enumerate(heads)]
    shares = gather0([records])  # on rank 0, one list per rank: problem i is on rank i % ranks
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(problems)) if shares]


# --------------------------------------------------------------------------------------------------
# Figures of a run, and of two compared

def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n (arXiv 2107.03374).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k wants 0 <= c <= n and 1 <= k <= n, got {n=}, {c=}, {k=}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)  # comb is 0 where n - c < k


def figures(groups: list[list[dict]]) -> dict:
    """The figures of `summarise`: means over benchmarks. `groups`: the records of each."""
    n = len(groups[0][0]["samples"])
    right = [[sum(s["correct"] for s in r["samples"]) for r in group] for group in groups]
    samples = [[s for r in group for s in r["samples"]] for group in groups]
    mean = lambda lists: float(np.mean([sum(values) / len(values) for values in lists]))
    share = lambda name: mean([[s[name] for s in part] for part in samples])
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= n]
    chances = {k: [np.mean([pass_at_k(n, c, k) for c in part]) for part in right] for k in powers}
    low, high = accuracy_interval([np.array(part) / n for part in right], n)
    return {
        **revision_figures([s for part in samples for s in part]),
        "n_problems": sum(map(len, groups)), "n_samples": n, "ci_low": low, "ci_high": high,
        "accuracy": mean([[c / n for c in part] for part in right]),
        "maj_at_n": mean([[maj_at_n(r["samples"]) for r in group] for group in groups]),
        "mean_length": share("tokens"), "format_rate": share("well_formed"),
        "truncation_rate": share("truncated"),
        "restated": mean([[s.get("restated", False) for s in part] for part in samples]),
        "pass_at_k": {k: float(np.mean(parts)) for k, parts in chances.items()},
    }


def summarise(records: list[dict]) -> dict:
    """Figures of eval records, shares in 0..1. Raises ValueError for unequal numbers of samples.

    With several benchmarks, each has its own under `benchmarks`; the others are means over them, as
    in the paper's Table 1.
    """
    if len({len(record["samples"]) for record in records}) != 1:
        raise ValueError("every problem needs the same number of samples")
    groups = {}
    for record in records:
        groups.setdefault(record.get("benchmark", ""), []).append(record)
    summary = figures(list(groups.values()))
    if len(groups) > 1:
        summary["benchmarks"] = {name: figures([group]) for name, group in groups.items()}
    return summary


def print_summary(config: Config, summary: dict):
    whole = "mean" if "benchmarks" in summary else config.data[0]
    for name, part in {**summary.get("benchmarks", {}), whole: summary}.items():
        rates = "  ".join(f"pass@{k} {rate:.3f}" for k, rate in part["pass_at_k"].items())
        print0(SUMMARY.format(model=config.model, name=name, rates=rates, **part))
        if "revisions" in part:
            print0(revision_text(part))
    for name, part in summary.get("plans", {}).items():
        print0(analysis_text(name, part))


def compare(first: list[dict], second: list[dict], seed: int = 0) -> dict:
    """Second minus first on the problems that both have: {"rows": [...], "warnings": [...]}.

    A row has benchmark, n_problems, first, second (accuracies), delta, ci_low, ci_high, p; the last
    row of several, `overall`, is the mean over benchmarks. Raises SystemExit if runs do not match.
    """
    old, new = ({(r.get("benchmark", ""), r["id"]): r for r in run} for run in (first, second))
    both, warnings, counts = [key for key in old if key in new], [], {}
    require(both, "the files have no problem in common: use the same --data, --limit and --seed")
    sizes = [{len(r["samples"]) for r in run.values()} for run in (old, new)]
    equal = all(len(size) == 1 for size in sizes)
    require(equal, "a run has unequal numbers of samples per problem: finish it with --resume")
    for key in both:
        if any(old[key][name] != new[key][name] for name in ("problem", "answer")):
            warnings.append(f"problem {key[1]} has another text or gold in the two runs")
        right = [sum(s["correct"] for s in run[key]["samples"]) for run in (old, new)]
        counts.setdefault(key[0], []).append(right)
    a, b = (len(run) - len(both) for run in (old, new))
    if a or b:
        warnings.append(f"{a} problems are in the first run only, {b} in the second only: left out")
    n = [max(size) for size in sizes]
    if n[0] != n[1]:
        warnings.append(f"{n[0]} samples per problem in the first run, {n[1]} in the second")
    parts = {name: [np.array(pairs)] for name, pairs in counts.items()}  # (N, 2) each
    if len(parts) > 1:
        parts["overall"] = sum(parts.values(), [])
    rows = [{"benchmark": k, **paired_difference(part, n, seed)} for k, part in parts.items()]
    return {"rows": rows, "warnings": warnings}


def compare_files(paths: tuple[str, ...], seed: int):
    """Print the comparison of two records.jsonl, and what speaks against it."""
    runs = [load_jsonl(Path(path)) if Path(path).is_file() else [] for path in paths]
    whole = [bool(run) and all("samples" in record for record in run) for run in runs]
    require(whole == [True, True], "--compare wants two records.jsonl files that eval.py wrote")
    rows, warnings = compare(*runs, seed).values()
    for row in rows:
        print0(DIFFERENCE.format(name=Path(row["benchmark"] or "all").name[:24], **row))
    old, new = (folder.read_settings(Path(path).with_name("run.json")) for path in paths)
    if not (old and new):
        warnings.append("no run.json beside the records: settings not compared")
    shared = old.keys() & new.keys() - folder.FREE_SETTINGS - {"model", "weights"}
    for k in sorted(k for k in shared if old[k] != new[k]):
        warnings.append(f"--{k} is {old[k]!r} in the first run and {new[k]!r} in the second")
    for warning in warnings:
        print0(f"warning: {warning}".replace("\n", "\\n"))  # ids and settings come from files


# --------------------------------------------------------------------------------------------------
# Plans from outside

def load_plans(path: str) -> dict[str, str]:
    """id -> plan, from plan records, or from the first well-formed sample of eval records."""
    plans, records = {}, load_jsonl(Path(path)) if Path(path).is_file() else []
    for i, record in enumerate(records, 1):
        parsed = [parse_completion(s["completion"]) for s in record.get("samples", ())]
        plan = record.get("plan") or next((c.plan for c in parsed if c), "")
        require(not TAG.search(plan), f"{path}, record {i}: the plan holds template tags; cut them")
        if plan:
            plans[str(record.get("id"))] = plan.strip()
    require(plans, f"no plans at {path!r}: give a JSONL file of plans (id, plan) or eval records")
    return plans


def load_problems(config: Config, tokenizer) -> list[dict]:
    """Problems with token ids `prompt` and `given`, the start of each completion. Collective."""
    problems = []
    encode = lambda problem: encode_question(tokenizer, problem, config.tools)
    file = config.plan_from or config.plan
    plans = load_plans(file) if file not in ("", "none") else {}
    for name in config.data:
        part = load_gradable(name, encode, config.max_prompt_tokens, config.limit, config.seed)
        kept, given = [p for p in part if p["id"] in plans or not plans], plans
        require(kept, f"no plan in {file} has the id of a problem of {name}: give its plans")
        if len(kept) < len(part):
            print0(f"{name}: {len(part) - len(kept)} problems without a plan left out")
        if config.plan == "shuffled":
            require(len(kept) > 1, "--plan shuffled needs plans of two problems: give more plans")
            ids = [p["id"] for p in kept]
            random.Random(config.seed).shuffle(ids)
            given = {i: plans[j] for i, j in zip(ids, ids[-1:] + ids[:-1])}  # none keeps its own
        for p in kept:
            plan = f"<plan>\n{given[p['id']]}\n</plan>\n" if plans else ""
            # SFT targets have a token boundary after "<think>\n" in every family, unlike "</plan>".
            opening = tokenizer.encode(f"{plan}<think>\n", add_special_tokens=False)
            problems.append({**p, "benchmark": name, "given": list(opening) if config.plan else []})
    longest, limit = max(len(p["given"]) for p in problems), config.max_completion_tokens
    require(longest < limit, f"a plan of {longest} tokens fills --max_completion_tokens: raise it")
    check_context(load_config(config.model), max(len(p["prompt"]) for p in problems), limit)
    return problems


# --------------------------------------------------------------------------------------------------
# Main

def weights_of(path: str) -> str:
    """The commit of a hub model, or a digest of the weights and settings in a folder."""
    if not Path(path).is_dir():
        return load_config(path)._commit_hash or ""
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix in kinds]
    digests = [[f.name, *digest(f)] for f in files if not f.name.startswith("optimizer")]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def check_results(config: Config) -> dict:
    """What run.json is to hold. With --resume, refuse results of other weights or settings."""
    out, weights = Path(config.out), weights_of(config.model)
    if config.resume and any((out / name).exists() for name in folder.RESULTS):
        old, remedy = folder.read_settings(out / "run.json"), "pass --overwrite or another --out"
        message = f"{out} holds results of other weights than {config.model} has now: {remedy}"
        require(old.get("weights") == weights, message)
        folder.changed_settings(old, config, config.out)
    return {"stage": "evaluation", **asdict(config), "weights": weights}


def main():
    config = parse_config(Config)
    if config.compare:
        return compare_files(config.compare, config.seed)
    tokenizer = load_tokenizer(config.model, config.thinking)
    open_album(tokenizer, config)
    problems = load_problems(config, tokenizer)
    folder.check_evaluation(config)
    device, out = init_distributed(), Path(config.out)
    key, lock = ("benchmark", "id"), out / folder.LOCK
    results = Records(out / "records.jsonl", config, key, lock)
    done = results.open()  # from here on, no other process writes in --out
    folder.check_evaluation(config)  # again: another run may have ended since
    settings = check_results(config) if rank() == 0 else {}
    todo = [p for p in problems if (p["benchmark"], p["id"]) not in done]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(config.model, device, dtype) if todo else None  # whole on every rank
    results.begin()
    if rank() == 0:
        (out / "summary.json").unlink(missing_ok=True)
        folder.write_whole(out / "run.json", settings)

    # A chunk is about 1,024 samples per rank. An interruption loses at most one.
    chunk = max(1, (4 * config.rollout_rows or 1024) // config.n) * world_size()
    with progress(len(problems), len(done), "eval", unit="problem") as bar:
        for start in range(0, len(todo), chunk):
            seed = random.Random(f"{config.seed} {len(done) + start}").getrandbits(60)
            part = todo[start:start + chunk]
            try:
                results.append(*evaluate(model, tokenizer, part, config, seed))
            except KeyboardInterrupt:
                print0(f"{len(done) + start} of {len(problems)} problems are in {out}: --resume")
                raise
            bar.update(len(part))

    counts = tally()  # every rank graded its own share
    if rank() == 0:
        records = results.read()
        summary = summarise(records)
        if config.analysis:
            summary["plans"] = analyse(records, config.cots, config.seed)
        summary["grader"] = counts
        folder.write_whole(out / "summary.json", {**summary, "settings": asdict(config)})
        print_summary(config, summary)


if __name__ == "__main__":
    guarded(main)
