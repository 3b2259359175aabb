"""What a step of grpo.py leaves behind: metrics, the log of its rollouts (rollouts.jsonl) and what it shows on the screen.

`group`: a grpo.Group, one question and its completions; `row`: a grpo.Row, a completion's tokens; `micros`: grpo.Micro.
"""
import math

import torch

from model_utils import all_sum, print0
from rewards import parse_completion, plan_leaks


def rollout_metrics(groups: list, rewards: dict[str, torch.Tensor], device) -> dict[str, float]:
    """Means over the completions of all ranks, and for each reward term its spread (std within a group)."""
    rows = [row for group in groups for row in group.rows]
    parsed = [(parse_completion(text), group.problem["answer"]) for group in groups for text in group.texts]
    leaks = [plan_leaks(completion.plan, answer) for completion, answer in parsed if completion]
    closed = [(row.plan_tokens, right) for g in groups for row, right in zip(g.rows, g.correct) if row.plan_tokens]
    total = rewards["total"].flatten(1)  # (N, G)
    means = {  # name -> (sum, count) of this rank
        "reward": (total.sum(), total.numel()), "accuracy": (rewards["correct"].sum(), total.numel()),
        "plan_score": (sum(right for _, right in closed), len(closed)),
        "plan_leaks": (sum(leaks), len(leaks)), "format_rate": (rewards["well_formed"].sum(), total.numel()),
        "completion_tokens": (rewards["lengths"].sum(), total.numel()),
        "plan_tokens": (sum(tokens for tokens, _ in closed), len(closed)),
        "truncated": (sum(not row.stopped for row in rows), total.numel()),
        "zero_variance": ((total.amax(1) - total.amin(1) < 1e-6).sum() if len(total) else 0, len(total))}
    for name in ("outcome", "plan", "structure", "length", *(["overlong"] if "overlong" in rewards else [])):
        term = rewards[name].flatten(1)
        label = "length_reward" if name == "length" else name
        means[label] = (term.sum(), term.numel())
        means[f"{label}_spread"] = (term.std(1, correction=0).sum() if len(term) else 0, len(term))
    sums = all_sum(torch.tensor([[float(a), float(b)] for a, b in means.values()], device=device))
    return {name: total / max(count, 1) for name, (total, count) in zip(means, sums.tolist())}


def note_tokens(micros: list):
    """Copy what the update saw of each token to the rows, for the log; a row outside the loss gets nothing."""
    for micro in micros:
        for at, row in enumerate(micro.rows):
            mask = micro.packed.mask[at]
            row.entropy = micro.entropy[at][mask].tolist()
            if micro.ref_logprobs is not None:
                row.log_ratio = (micro.sampler_logprobs[at] - micro.ref_logprobs[at])[mask].tolist()


def token_record(tokenizer, row, text: str) -> dict:
    """What each token of a completion looked like to the policy, in hundredths: integers keep the log small.

    `width`: characters of `text` that a token stands for, blanks before it included; 0 for a stop token and for all
    but the last of the tokens that share a character. `surprise`: -logprob of the sampler; `entropy`; `log_ratio`:
    logprob minus the reference's. The last two are missing where the update did not compute them.
    None stands for a figure of a diverged policy that is not finite.
    """
    widths, at = [], 0
    for piece in tokenizer.batch_decode([[token] for token in row.ids]):
        found = text.find(piece.strip(), at, at + len(piece) + 8) if piece.strip() else at
        end = at if found < 0 else found + len(piece.strip())
        widths.append(end - at)
        at = end
    values = {"surprise": [-x for x in row.logprobs], "entropy": row.entropy, "log_ratio": row.log_ratio}
    return {"width": widths, **{name: [round(100 * x) if math.isfinite(x) else None for x in value]
                                for name, value in values.items() if value}}


def rollout_record(step: int, group, rewards: dict, advantages: torch.Tensor, index: int, tokenizer=None) -> dict:
    """The log's view of one question: its m plans, each with z completions and their reward terms.

    With a tokenizer each completion carries `token_record`'s per-token values.
    """
    plans = []
    for i in range(rewards["total"].shape[1]):
        completions = []
        for k in range(rewards["total"].shape[2]):
            at = i * rewards["total"].shape[2] + k
            terms = {name: round(float(rewards[name][index, i, k]), 4)
                     for name in ("total", "outcome", "plan", "structure", "length", "overlong") if name in rewards}
            row, text = group.rows[at], group.texts[at]
            completion = {"text": text, "tokens": len(row.ids), "truncated": not row.stopped,
                          "correct": group.correct[at], "well_formed": group.well_formed[at], "reward": terms,
                          "advantage": round(float(advantages[index, at]), 4)}
            if tokenizer is not None:
                completion["per_token"] = token_record(tokenizer, row, text)
            completions.append(completion)
        plans.append({"score": float(rewards["correct"][index, i].float().mean()), "completions": completions})
    problem = group.problem
    return {"step": step, "id": problem["id"], "problem": problem["problem"], "answer": problem["answer"], "plans": plans}


def show_record(record: dict):
    """Print one question with a plan, its CoTs' fates and the reward terms."""
    best = max(record["plans"], key=lambda plan: plan["score"])
    completion = best["completions"][0]
    terms = "  ".join(f"{name} {value:.2f}" for name, value in completion["reward"].items())
    print0(f"  | question   {record['problem'][:300]}\n  | gold       {record['answer']}\n"
           + "\n".join(f"  | completion {line}" for line in completion["text"][:1200].splitlines())
           + f"\n  | plan score {best['score']:.2f}   {terms}   advantage {completion['advantage']:+.2f}")
