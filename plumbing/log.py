"""What grpo.py records of a step: metrics, rollouts in rollouts.jsonl, and one printed question.

`groups` are grpo.Group: a question and its rollouts. `micros` are grpo.MicroBatch.
"""

import itertools
import math

import torch

from plumbing.balance import decoded_tokens
from plumbing.ranks import all_sum, gather0, print0, require

# bf16 rounding explains a smaller difference of sampler and trainer (mean |difference of logprobs|
# per token). At a larger one the sampler holds old weights, or computes something else.
MAX_SAMPLER_GAP = 0.1
SHOWN = (  # the metrics of grpo.py's console line
    "reward", "accuracy", "eval_accuracy", "kl", "clip_frac", "entropy", "completion_tokens",
    "truncated", "zero_variance", "grad_norm", "tokens_per_s", "seconds",
)


# --------------------------------------------------------------------------------------------------
# Metrics


def step_metrics(
    groups: list, rewards: dict, updates: list[dict], device, first: bool = False
) -> dict[str, float]:
    """The figures of one step, over all ranks. `rewards`: (N, m, z) each. A collective.

    `first`: it is the run's first step. Raises SystemExit, on all ranks, if sampler and trainer
    differ there by more than MAX_SAMPLER_GAP; a later step prints a warning.
    """
    metrics = rollout_metrics(groups, rewards, device)
    for name in updates[0]:
        metrics[name] = sum(update[name] for update in updates) / len(updates)
    metrics["sampler_gap"] = updates[0]["sampler_gap"]  # later updates have left the sampler behind
    metrics["skipped"] = sum(not math.isfinite(update["grad_norm"]) for update in updates)
    check_sampler(metrics["sampler_gap"], first)
    z = rewards["total"].shape[2]
    if first and z > 1 and not metrics["plan_tokens"]:
        print0(
            f"warning: no completion of the first step closed a plan, so each counts {z} times in "
            "its group: start from a model that sft.py has trained, or set --max_plan_tokens 0 "
            "--cots 1"
        )
    return metrics


def check_sampler(gap: float, first: bool):
    """Judge step_metrics' sampler_gap, in nats per token. It is the same on all ranks."""
    differ = f"sampler and trainer differ by {gap:.2g} nats per token"
    require(
        not (first and gap > MAX_SAMPLER_GAP),
        f"{differ} in the run's first step, where at most {MAX_SAMPLER_GAP} is due to rounding: "
        "either the sampler holds other weights, or model_utils.token_logprobs, which trains, "
        "leaves out what the model's own forward does; compare the two on one sequence, or choose "
        "another model",
    )
    if gap > MAX_SAMPLER_GAP:
        print0(f"warning: {differ}: does the sampler hold old weights, or compute something else?")


def reward_terms(rewards: dict) -> list[str]:
    """The names of the terms that make up the total reward."""
    others = ("total", "correct", "well_formed", "lengths")
    return [name for name in rewards if name not in others]


def rollout_metrics(groups: list, rewards: dict[str, torch.Tensor], device) -> dict[str, float]:
    """Means over the completions of all ranks; of each reward term also its mean group std.

    With dynamic sampling, `groups` are all that were sampled, not only those that are trained on.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    closed = [r for r in rollouts if r.plan_tokens]
    leaks = [r.leaks for r in rollouts if r.well_formed]
    total, outcome = rewards["total"].flatten(1), rewards["outcome"].flatten(1)  # (N, G)
    equal = lambda values: (values.amax(1) - values.amin(1) < 1e-6).sum()
    decoded = decoded_tokens(rollouts, rewards["total"].shape[2])
    sums = {  # name -> (sum, count) of this rank
        "reward": (total.sum(), total.numel()),
        "accuracy": (rewards["correct"].sum(), total.numel()),
        "plan_score": (sum(r.correct for r in closed), len(closed)),
        "plan_leaks": (sum(leaks), len(leaks)),
        "format_rate": (rewards["well_formed"].sum(), total.numel()),
        "completion_tokens": (rewards["lengths"].sum(), total.numel()),
        "plan_tokens": (sum(r.plan_tokens for r in closed), len(closed)),
        "truncated": (sum(not r.stopped for r in rollouts), total.numel()),
        "zero_variance": (equal(total), len(total)),
        "outcome_zero_variance": (equal(outcome), len(total)),
    }
    for name in reward_terms(rewards):
        term = rewards[name].flatten(1)  # (N, G)
        label = "length_reward" if name == "length" else name
        spread = term.std(1, correction=0).sum() if len(term) else 0
        sums[label] = (term.sum(), term.numel())
        sums[f"{label}_spread"] = (spread, len(term))
    pairs = [[float(a), float(b)] for a, b in [*sums.values(), (decoded, total.numel())]]
    pairs = all_sum(torch.tensor(pairs, dtype=torch.float64, device=device)).tolist()
    metrics = {name: a / max(b, 1) for name, (a, b) in zip(sums, pairs)}
    decoded, completions = map(int, pairs[-1])
    return {**metrics, "decoded_tokens": decoded, "completions_sampled": completions}


# --------------------------------------------------------------------------------------------------
# Logged rollouts


def rollout_records(groups: list, rewards: dict, minis: list, tokenizer, detailed: int) -> list:
    """The step's plan trees, of all ranks on rank 0, as records for rollouts.jsonl. A collective.

    The first `detailed` questions of each rank carry token_record's figures. Prints one question.
    """
    note_tokens([micro for mini in minis for micro in mini])
    records = []
    for n, group in enumerate(groups):
        for r in group.rollouts:
            r.said = said_spans(tokenizer, r.ids, r.given, r.text)
        details = tokenizer if group.place[1] < detailed else None
        records.append((group.place, rollout_record(group, rewards, n, details)))
    # In the order of sampling, whichever rank has trained on a group.
    records = [record for _, record in sorted(gather0(records), key=lambda pair: pair[0])]
    if records:
        show_record(records[0])
    return records


def note_tokens(micros: list):
    """Copy what the update saw of each token to the rollouts. Those without a loss get nothing."""
    for micro in micros:
        for row, rollout in enumerate(micro.rollouts):
            mask = micro.packed.mask[row]
            rollout.entropy = with_gaps(micro.entropy[row][mask].tolist(), rollout.given)
            if micro.ref_logprobs is not None:
                log_ratio = micro.sampler_logprobs[row] - micro.ref_logprobs[row]
                rollout.log_ratio = with_gaps(log_ratio[mask].tolist(), rollout.given)


def with_gaps(figures: list, given: list[int]) -> list:
    """Figures of a completion's own tokens, with None at the places of replies; none stay none."""
    figures = list(figures)
    for place in given if figures else ():
        figures.insert(place, None)
    return figures


def token_widths(tokenizer, ids: list[int], text: str) -> list[int]:
    """How many characters of `text` each token covers, leading blanks included.

    A stop token covers 0; of tokens that share a character, the last one covers it.
    """
    widths, at = [], 0
    for piece in tokenizer.batch_decode([[token] for token in ids]):
        found = text.find(piece.strip(), at, at + len(piece) + 8) if piece.strip() else at
        end = at if found < 0 else found + len(piece.strip())
        widths.append(end - at)
        at = end
    return widths


def said_spans(tokenizer, ids: list[int], given: list[int], text: str) -> list[list[int]]:
    """Where the text holds replies of tools, [from, to] each; `given`: their places in ids."""
    if not given:
        return []
    ends = list(itertools.accumulate(token_widths(tokenizer, ids, text)))
    spans = []
    for before, place in zip([-2, *given], given):
        if place > before + 1:
            spans.append([ends[place - 1] if place else 0, 0])
        spans[-1][1] = ends[place]
    return spans


def token_record(tokenizer, rollout, text: str) -> dict:
    """What each token of a completion looked like to the policy.

    `width`: see `token_widths`. In hundredths, since integers keep the log small: `surprise`
    (-logprob of the sampler), `entropy`, and `log_ratio` (logprob minus the reference's). The last
    two are missing where the update did not compute them. A figure that is not finite, of a
    diverged policy, is None; and so are those of tokens that a tool said.
    """
    said, known = set(rollout.given), lambda x: x is not None and math.isfinite(x)
    surprise = [None if k in said else -x for k, x in enumerate(rollout.logprobs)]
    values = {"surprise": surprise, "entropy": rollout.entropy, "log_ratio": rollout.log_ratio}
    record = {"width": token_widths(tokenizer, rollout.ids, text)}
    for name, figures in values.items():
        if figures:
            record[name] = [round(100 * x) if known(x) else None for x in figures]
    return record


def about_calls(rollout) -> dict:
    """What the log says of a completion with calls, or whose plan is known to be right or wrong."""
    record = {"said": rollout.said, "forged": rollout.forged}
    record = record if rollout.given or rollout.forged else {}
    return record if rollout.revision is None else {**record, "revision": rollout.revision}


def rollout_record(group, rewards: dict, index: int, tokenizer=None) -> dict:
    """The log's view of one question: its m plans, each with z completions and their reward terms.

    `index` is the question's row in `rewards`. With a tokenizer, each completion carries
    `token_record`'s figures.
    """
    names = ["total", *reward_terms(rewards)]
    _, plans, cots = rewards["total"].shape
    records = []
    for i in range(plans):
        completions = []
        for k, rollout in enumerate(group.rollouts[i * cots : (i + 1) * cots]):
            terms = {n: round(float(rewards[n][index, i, k]), 4) for n in names}
            completion = {
                "text": rollout.text,
                "tokens": len(rollout.ids),
                "truncated": not rollout.stopped,
                "correct": rollout.correct,
                "well_formed": rollout.well_formed,
                "leaks": rollout.leaks,
                **about_calls(rollout),
                "reward": terms,
                "advantage": round(rollout.advantage, 4),
                "plan_advantage": round(rollout.plan_advantage, 4),
            }
            if tokenizer is not None:
                completion["per_token"] = token_record(tokenizer, rollout, rollout.text)
            completions.append(completion)
        score = float(rewards["correct"][index, i].float().mean())
        records.append({"score": score, "completions": completions})
    names = ("id", "problem", "answer", "images")
    question = {name: group.question[name] for name in names if name in group.question}
    return {**question, "plans": records}


def show_record(record: dict):
    """Print one question with its best plan, one completion of it, and the reward terms."""
    best = max(record["plans"], key=lambda plan: plan["score"])
    completion = best["completions"][0]
    label = lambda name: "plan (before beta)" if name == "plan" else name
    terms = "  ".join(f"{label(n)} {value:.2f}" for n, value in completion["reward"].items())
    lines = [f"question   {line}" for line in record["problem"][:300].splitlines()]
    lines += [f"gold       {line}" for line in record["answer"][:300].splitlines()]
    lines += [f"completion {line}" for line in completion["text"][:1200].splitlines()]
    advantage = completion["advantage"]
    lines.append(f"plan score {best['score']:.2f}   {terms}   advantage {advantage:+.2f}")
    print0("\n".join(f"  | {line}" for line in lines))
