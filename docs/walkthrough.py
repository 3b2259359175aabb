"""One step of a real run, worked out in digits: this writes docs/walkthrough.md.

    python -m docs.walkthrough                  from docs/walkthrough.json, which holds the log
    python -m docs.walkthrough BEFORE AFTER     first make that file, from two runs

The runs are one run of grpo.py that ends after step k - 1 and one that ends after step k. So there
are the weights before and after that step. The page's end has their commands.

Every figure is computed here, with the functions that training uses, and held against what the run
logged. Where the two differ, this ends with an error. A test writes the page anew, so it cannot
drift from the code. Shapes: m plans, z CoTs per plan; T tokens of a completion.
"""

import json
import sys
import textwrap
from pathlib import Path

import torch

from docs.grpo_in_100_lines import token_logprobs
from grpo import Config, advantages, kl_k3, policy_loss, token_weights
from model_utils import encode_prompt, load_model, load_tokenizer
from plumbing.plans import icc, variances
from plumbing.ranks import print0, require
from plumbing.records import load_jsonl
from rewards import length_reward, parse_completion, plan_reward, total_reward

FOLDER = Path(__file__).parent
DATA, PAGE = FOLDER / "walkthrough.json", FOLDER / "walkthrough.md"
TERMS = ("outcome", "plan", "structure", "length")


# --------------------------------------------------------------------------------------------------
# From two runs to docs/walkthrough.json


def choose(records: list[dict]) -> dict:
    """The question whose plans differ most; of several, the one with most plans in dispute."""

    def telling(record: dict) -> tuple[int, int]:
        scores = [plan["score"] for plan in record["plans"]]
        return len({*scores}), sum(0 < score < 1 for score in scores)

    return max(records, key=telling)


def all_logprobs(path: str, prompt: list[int], rows: list[list[int]]) -> list[list[float]]:
    """Logprobs of each completion's token ids, by a saved model."""
    model, found = load_model(path, torch.device("cpu")), []
    for completion in rows:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            row = token_logprobs(model, ids, torch.ones_like(ids).bool())[0, len(prompt) - 1:]
        found.append([round(x, 5) for x in row.tolist()])
    return found


def keep(before: Path, after: Path) -> dict:
    """What the page needs of the last step of the run `after`. See the module's docstring."""
    config = json.loads((after / "run.json").read_text())
    metrics = load_jsonl(after / "metrics.jsonl")[-1]
    records = [r for r in load_jsonl(after / "rollouts.jsonl") if r["step"] == metrics["step"]]
    everything = [c for r in records for plan in r["plans"] for c in plan["completions"]]
    of = lambda record: [c for plan in record["plans"] for c in plan["completions"]]
    whole = [record for record in records if not any(c["truncated"] for c in of(record))]
    record = choose(whole or records)
    completions = of(record)
    tokenizer = load_tokenizer(str(after / "model"))
    prompt, end = encode_prompt(tokenizer, record["problem"]), [tokenizer.eos_token_id]
    rows = [tokenizer.encode(c["text"]) + end * (not c["truncated"]) for c in completions]
    models = {"reference": config["model"], "before": before / "model", "after": after / "model"}
    logprobs = {name: all_logprobs(str(path), prompt, rows) for name, path in models.items()}
    for c, sampled in zip(completions, logprobs["before"]):
        logged = c.pop("per_token")["surprise"]  # in hundredths
        off = max(abs(-x - y / 100) for x, y in zip(sampled, logged, strict=True))
        require(off < 0.006, f"{before} did not sample in {after}: off by {off:.3f}")
    names = "plans cots beta tau alpha structure correct_only std_norm std_of credit loss_agg"
    names += " clip_low clip_high kl_coef kl_ratio epochs mini_batches lr questions"
    return {
        "config": {name: config[name] for name in names.split()},
        "metrics": metrics,
        "record": record,
        "tokens": sum(c["tokens"] for c in everything),
        "pull": round(sum(c["tokens"] * abs(c["advantage"]) for c in everything), 2),
        "words": [tokenizer.batch_decode([[i] for i in ids]) for ids in rows],
        "logprobs": logprobs,
    }


# --------------------------------------------------------------------------------------------------
# From docs/walkthrough.json to the page


def row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(*header: str) -> list[str]:
    return [row(*header), row(*["---"] * len(header))]


def agree(found: float, logged: float, what: str, within: float):
    """Hold a figure against the run's log, which is rounded."""
    require(abs(found - logged) <= within, f"{what}: {found:.5f} here, {logged:.5f} in the log")


class Step:
    """The figures of the question, recomputed: tensors (1, m, z), or (m z,) with `flat`."""

    def __init__(self, data: dict):
        self.data, self.record = data, data["record"]
        self.config = Config(**data["config"])
        self.plans = self.record["plans"]
        self.completions = [c for plan in self.plans for c in plan["completions"]]
        c, shape = self.config, (1, data["config"]["plans"], data["config"]["cots"])
        self.m, self.z = shape[1:]
        of = lambda name: torch.tensor([x[name] for x in self.completions]).reshape(shape)
        self.correct, self.lengths = of("correct"), of("tokens")
        options = dict(beta=c.beta, tau=c.tau, alpha=c.alpha, structure=c.structure)
        options |= dict(correct_only=c.correct_only)
        self.terms = total_reward(self.correct, of("well_formed"), self.lengths, **options)
        self.total = self.terms["total"].flatten()
        self.a = advantages(self.terms, c, 0.0, c.beta)[1].flatten()
        self.without = advantages(self.terms, c, 0.0, 0.0)[1].flatten()
        for i, logged in enumerate(self.completions):
            for name in ("total", *TERMS):
                found = float(self.terms[name].flatten()[i])
                agree(found, logged["reward"][name], f"{name} of completion {i + 1}", 1e-4)
            agree(float(self.a[i]), logged["advantage"], f"advantage of completion {i + 1}", 1e-4)
        tokens = data["metrics"]["completion_tokens"] * data["metrics"]["completions_sampled"]
        agree(data["tokens"], tokens, "tokens of the step", 0.5)

    def label(self, i: int, word: str = "plan") -> str:
        return f"{word} {i // self.z + 1}, CoT {i % self.z + 1}"


def question_part(s: Step) -> list[str]:
    c, metrics = s.config, s.data["metrics"]
    return [
        "# One step, worked out",
        "",
        f"This is step {metrics['step']} of a real run on *linked quantities* (data/README.md); "
        "the last section has its commands. `python -m docs.walkthrough` computed every figure "
        "here from the run's log, with the functions that training uses, and holds them against "
        "what the run logged.",
        "",
        f"The step had {c.questions} questions, m = {s.m} plans each and z = {s.z} chains of "
        f"thought (CoTs) per plan: {c.questions * s.m * s.z} completions, of "
        f"{s.data['tokens']:,} tokens together. We follow one question.",
        "",
        "## 1. The question",
        "",
        f"`{s.record['problem']}`",
        "",
        f"Arithmetic keeps the last digit. The right answer is **{s.record['answer']}**.",
    ]


def plan_part(s: Step) -> list[str]:
    tau, scores = s.config.tau, s.correct.float().mean(2)[0]
    rewards = plan_reward(s.correct, tau)[0]
    out = ["", "## 2. A plan is as good as its CoTs (Eq. 2)", ""]
    out += table("plan", "wording", "right CoTs", "score s", f"exp(s / {tau:g})", "plan reward")
    for i, plan in enumerate(s.plans):
        agree(float(scores[i]), plan["score"], f"score of plan {i + 1}", 1e-4)
        blocks = parse_completion(plan["completions"][0]["text"])
        wording = f"`{blocks.plan}`" if blocks else "(does not follow the template)"
        power = float((scores[i] / tau).exp())
        right = f"{int(s.correct[0, i].sum())} of {s.z}"
        out.append(row(i + 1, wording, right, f"{scores[i]:.3f}", f"{power:.3f}",
                       f"**{rewards[i]:.3f}**"))
    powers = (scores / tau).exp()
    out += [
        "",
        f"The powers add up to {powers.sum():.3f}. Plan 1 gets {powers[0]:.3f} / "
        f"{powers.sum():.3f} = {rewards[0]:.3f}. All {s.m} rewards add up to 1, whatever the "
        f"scores are: their mean is 1/{s.m}, always. So the plan reward moves credit between the "
        "plans of a question, and does nothing else.",
    ]
    return out


def reward_part(s: Step) -> list[str]:
    c = s.config
    length = length_reward(s.lengths, s.correct, c.alpha, c.correct_only).flatten()
    lengths, plan = s.lengths.flatten(), s.terms["plan"].flatten()
    shortest, longest = int(s.lengths[s.correct].min()), int(s.lengths.max())
    out = ["", "## 3. The reward of each completion (Eqs. 3-8)", ""]
    out += table("plan", "CoT", "right", "tokens", "outcome", f"{c.beta:g} · plan", "structure",
                 "length", "R", "A")
    for i, completion in enumerate(s.completions):
        value = lambda name: float(s.terms[name].flatten()[i])
        out.append(row(
            i // s.z + 1, i % s.z + 1, "yes" if completion["correct"] else "no", int(lengths[i]),
            f"{value('outcome'):.0f}", f"{c.beta * plan[i]:.3f}", f"{value('structure'):.1f}",
            f"{length[i]:.3f}", f"{s.total[i]:.3f}", f"**{s.a[i]:+z.2f}**",
        ))
    far = int((lengths - shortest).abs().argmax())
    out += [
        "",
        "R is the sum of the four columns before it. The length reward is highest, "
        f"{c.alpha:g}, at T = {shortest} tokens, the shortest right completion; the longest one "
        f"has T_max = {longest}. {s.label(far, 'Plan')} has {int(lengths[far])}: "
        f"{c.alpha:g} · exp(-|{int(lengths[far])} - {shortest}| / ({longest} - {shortest})) = "
        f"{length[far]:.3f}.",
        "",
        "Some of them in full: the one with the highest advantage, the longest, a wrong one.",
        "",
    ]
    wrong = [i for i, c in enumerate(s.completions) if not c["correct"]]
    for i in dict.fromkeys([int(s.a.argmax()), int(lengths.argmax()), *wrong[:1]]):
        out += [f"`{s.completions[i]['text']}`", ""]
    return out[:-1]


def advantage_part(s: Step) -> list[str]:
    mean, std, best = s.total.mean(), s.total.std(correction=0), int(s.a.argmax())
    agree(float((s.total[best] - mean) / std), float(s.a[best]), "Eq. 10 by hand", 1e-4)
    spread = {name: float(s.terms[name].std(correction=0)) for name in TERMS}
    spread["plan"] *= s.config.beta
    said = ", ".join(f"{name} {value:.3f}" for name, value in spread.items())
    pair = torch.stack([s.a, s.without])
    return [
        "",
        "## 4. The advantage (Eq. 10)",
        "",
        f"The {s.m * s.z} rewards have the mean {mean:.3f} and the standard deviation {std:.3f} "
        f"(of the population). For {s.label(best)}:",
        "",
        f"    A = ({s.total[best]:.3f} - {mean:.3f}) / {std:.3f} = {s.a[best]:+.2f}",
        "",
        f"Every one of its {int(s.lengths.flatten()[best])} tokens becomes more likely, in the "
        "same measure. The advantages add up to 0.",
        "",
        "![The rewards of the twelve completions as stacked bars, their mean, and the advantages "
        "under them](group.svg)",
        "",
        f"Which term drives them? The one that spreads most within the group: {said}. Without the "
        f"plan reward, the advantages would correlate {float(pair.corrcoef()[0, 1]):.3f} with "
        "these.",
    ]


def icc_part(s: Step) -> list[str]:
    (tau2, sigma2), = variances(s.correct.float()).tolist()
    share, of_step = icc(tau2, sigma2), s.data["metrics"].get("plan_icc")
    scores = s.correct.float().mean(2)[0]
    between, mean = float(scores.double().var()), float(scores.mean())
    agree(between - sigma2 / s.z, tau2, "tau2 by hand", 1e-6)
    if share > 0:
        said = f"{100 * share:.0f} % of the variance is explained by which plan the CoT follows"
    else:
        said = "the plans differ no more than CoTs of one plan do by chance (below 0 counts as 0)"
    return [
        "",
        "## 5. Does the plan decide?",
        "",
        f"The plans' scores have the mean {mean:.3f} and the variance {between:.4f} (with m - 1). "
        f"Verdicts within a plan have the variance {sigma2:.4f} (with z - 1, mean over the plans). "
        f"A score is the mean of {s.z} verdicts, so chance alone gives it the variance "
        f"{sigma2:.4f} / {s.z} = {sigma2 / s.z:.4f}. What is left is the plans' own: tau² = "
        f"{between:.4f} - {sigma2 / s.z:.4f} = {tau2:z.4f}. The intraclass correlation is",
        "",
        f"    ICC = tau² / (tau² + sigma²) = {max(tau2, 0):.4f} / ({max(tau2, 0):.4f} + "
        f"{sigma2:.4f}) = {share:.2f}",
        "",
        f"In this group, {said}. One group says little. Over all {s.config.questions} groups of "
        f"this step the run logged `plan_icc` {of_step:.2f}. Where it is near 0, plan rewards have "
        "nothing to find; near 1, one CoT per plan would do.",
    ]


def token_figures(s: Step, best: int) -> dict:
    """The least expected token of completion `best`: its place, and what the loss makes of it."""
    c, a, tokens = s.config, float(s.a[best]), s.data["tokens"]
    require(c.loss_agg == "token" and c.epochs * c.mini_batches == 1, "the text is for one update")
    names = ("before", "after", "reference")
    before, after, ref = (torch.tensor(s.data["logprobs"][name][best]) for name in names)
    t, mask = int(before.argmin()), torch.ones(1, len(before), dtype=torch.bool)
    weights = token_weights(mask, c.loss_agg, tokens, 1, 1)[0]

    def loss_at(logprobs: torch.Tensor) -> torch.Tensor:
        advantage, clip = torch.tensor([a]), (c.clip_low, c.clip_high)
        return policy_loss(logprobs[None], before[None], advantage, mask, *clip)[0][0]

    now = before.clone().requires_grad_()
    loss = loss_at(now) * weights
    gradient = float(torch.autograd.grad(loss.sum(), now)[0][t])
    agree(gradient, -a / tokens, "the token's gradient", 1e-7)
    ratios = (after - before).exp()
    ratio = float(ratios[t])
    clipped = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high)
    agree(float(loss_at(after)[t]), -min(ratio * a, clipped * a), "the clipped loss", 1e-4)
    return {
        "t": t, "a": a, "weight": float(weights[t]), "loss": float(loss.detach()[t]),
        "gradient": gradient, "k3": float(kl_k3(before, ref, before)[t]), "ratio": ratio,
        "before": float(before[t].exp()), "after": float(after[t].exp()),
        "moved": float((ratios - 1).abs().mean()),
    }


def token_part(s: Step) -> list[str]:
    """One token of the completion with the highest advantage."""
    c, tokens, best = s.config, s.data["tokens"], int(s.a.argmax())
    f, words, low, high = token_figures(s, best), s.data["words"][best], c.clip_low, c.clip_high
    fate = "beyond the clip: it would be cut off" if f["ratio"] > 1 + high else "within the clip"
    share = f"{f['a']:.2f} / {s.data['pull']:,.0f} = {100 * f['a'] / s.data['pull']:.3f} %"
    kl = f"{c.kl_coef * f['k3'] * f['weight']:.1e}, with k3 = {f['k3']:.5f}"
    return [
        "",
        "## 6. One token in the loss (Eq. 9)",
        "",
        f"Take the token of {s.label(best)} that the policy expected least. It had written",
        "",
        f"    … {' '.join(words[max(0, f['t'] - 12):f['t']])} [{words[f['t']]}]",
        "",
        f"and `{words[f['t']]}` had the probability {f['before']:.3f}.",
        "",
        *table("", "", ""),
        row("ratio", "ρ = π / π_old", "**1**: the policy has not moved since it sampled"),
        row("clip", f"ρ in {1 - low:g} to {1 + high:g}", "not reached"),
        row("weight", "1 / tokens of the step", f"1 / {tokens:,} = {f['weight']:.2e}"),
        row("loss", "-ρ A · weight", f"{f['loss']:.2e}"),
        row("its gradient by the logprob", "-ρ A · weight", f"{f['gradient']:.2e}"),
        row("KL term", f"{c.kl_coef:g} · ρ k3 · weight", kl),
        row("share of the step", "size of A / sum of these over all tokens", share),
        "",
        "![Loss against ratio for both signs of the advantage, with the clip](loss_ratio.svg)",
        "",
        "The loss is its own gradient here, since ρ = 1. As a number it says little: the "
        "advantages of a group add up to 0, and only their different lengths leave something. For "
        f"the whole step the run logged {s.data['metrics']['loss']:.3f}. The gradient does not "
        "cancel: each token pulls in a direction of its own.",
        "",
        f"After the step, the same token had the probability {f['after']:.3f}: {f['ratio']:.3f} "
        "times as much. With `--epochs 2`, this would be its ratio in the second pass, "
        f"{fate}. The ratios of this completion's tokens are now {f['moved']:.3f} away from 1 on "
        f"average. The other {c.questions * s.m * s.z - 1} completions pulled on the same weights.",
    ]


def last_part(s: Step) -> list[str]:
    step = s.data["metrics"]["step"]
    return [
        "",
        "## 7. To discuss",
        "",
        "1. How much can the plan reward do here? Compare the spreads of section 4.",
        "2. Which completions are wrong with a good plan, and right with a bad one? What are the "
        "plan tokens told in each case? What would `--credit segment` tell them?",
        "3. Two right completions of different length differ in A. By how much, and is that much "
        "beside right and wrong? What happens in a group that is all right?",
        "4. Section 6's token got its share of credit because the answer at the end was right. Was "
        "it worked out before, or guessed? Compare the advantages of the three completions that "
        "section 3 shows in full. What does this step teach?",
        "",
        "## How this page was made",
        "",
        "```",
        *(line.format(last=step, before=step - 1) for line in COMMANDS),
        "```",
        "",
    ]


COMMANDS = """\
bash docs/start.sh runs/lessons                   # the start of the labs, too: data, plans, SFT
for steps in {before} {last}; do
    python grpo.py --model runs/lessons/sft/model --data runs/lessons/data/train.jsonl \\
        --out runs/lessons/walk$steps --steps $steps --questions 16 --lr 2e-4 --eval_every 0 \\
        --max_plan_tokens 48 --max_completion_tokens 128 --tokens_per_micro_batch 4000 \\
        --activation_checkpointing false --save_every 0 --overwrite
done
python -m docs.walkthrough runs/lessons/walk{before} runs/lessons/walk{last}""".splitlines()


def page(data: dict) -> str:
    """The page. Raises SystemExit where a figure is not what the run logged."""
    step = Step(data)
    parts = (question_part, plan_part, reward_part, advantage_part, icc_part, token_part, last_part)
    lines = [line for part in parts for line in part(step)]
    words = lambda line: line[:1] not in ("|", "`", " ", "!", "") and not line.startswith("python")
    return "\n".join(textwrap.fill(line, 100) if words(line) else line for line in lines)


def main(arguments: list[str]):
    require(len(arguments) in (0, 2), "give no argument, or two run folders: before and after")
    if arguments:
        DATA.write_text(json.dumps(keep(*map(Path, arguments)), indent=1) + "\n")
    PAGE.write_text(page(json.loads(DATA.read_text())))
    print0(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
