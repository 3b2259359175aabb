"""GRPO in 100 lines, on one CPU. Read this first: grpo.py is the same loop, with plans, and fast.

    python -m docs.grpo_in_100_lines     minutes: a tiny model learns to show all of its work

For each question, sample G answers. A right one is worth 1, a wrong one 0. Then make every token of
the answers that beat their group's mean more likely, and every token of those below it less likely.

Shapes: B = QUESTIONS * G answers of a step, T tokens of prompt and answer, V vocabulary.
"""
import plumbing.threads  # noqa: F401 -- before torch, which reads what it sets

import torch
from transformers import AutoModelForCausalLM

from data.toy import make_problems
from model_utils import encode_prompt, load_tokenizer
from rewards import extract_answer

STEPS, QUESTIONS, G, MAX_TOKENS, LR, CLIP, KL = 60, 16, 8, 80, 1e-4, 0.2, 0.01


@torch.no_grad()
def sample(model, prompts: list[list[int]], end: int, greedy: bool = False):
    """One answer per prompt. Returns ids (B, T), which of them are real, which are the answer's."""
    longest = max(map(len, prompts))  # shorter prompts are padded on the left
    ids = torch.tensor([[end] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    new, cache, alive = ids, None, torch.ones(len(ids), dtype=torch.bool)
    while alive.any() and ids.shape[1] < longest + MAX_TOKENS:
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1]:]
        out = model(new, attention_mask=real.long(), position_ids=positions, past_key_values=cache)
        cache, probs = out.past_key_values, out.logits[:, -1].softmax(-1)  # (B, V)
        new = probs.argmax(-1, keepdim=True) if greedy else torch.multinomial(probs, 1)  # (B, 1)
        ids, real = torch.cat([ids, new], dim=1), torch.cat([real, alive[:, None]], dim=1)
        alive = alive & (new[:, 0] != end)  # the end token still belongs to the answer
    return ids, real, real & (torch.arange(ids.shape[1]) >= longest)


def grade(tokenizer, problems: list[dict], ids, answer) -> torch.Tensor:
    """1 for a right answer, 0 for a wrong one. (B,)"""
    found = [extract_answer(tokenizer.decode(row[mask])) for row, mask in zip(ids, answer)]
    return torch.tensor([float(a == p["answer"]) for a, p in zip(found, problems)])


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """How much better than its group is each answer, in standard deviations? (N, G) -> (N, G)"""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / rewards.std(dim=1, correction=0, keepdim=True).clamp(min=1e-6)


def token_logprobs(model, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Column t is the log-probability of token t+1, given tokens 0..t. (B, T-1)"""
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=real.long(), position_ids=positions).logits  # (B, T, V)
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask) -> torch.Tensor:
    """Mean over the answers' tokens of -min(rho A, clip(rho) A) + KL * rho * k3.

    All (B, T-1), where column t is about token t+1, but for the advantages (B,).
    """
    rho, a = (logprobs - old_logprobs).exp(), advantages[:, None]
    loss = -torch.minimum(rho * a, rho.clamp(1 - CLIP, 1 + CLIP) * a)
    log_ratio = ref_logprobs - logprobs
    k3 = log_ratio.exp() - 1 - log_ratio  # its mean over sampled tokens is KL(model, reference)
    return ((loss + KL * rho * k3) * mask).sum() / mask.sum()


def main():
    torch.manual_seed(0)
    tokenizer = load_tokenizer("data/toy_base")
    load = lambda: AutoModelForCausalLM.from_pretrained("data/toy_base").eval()  # no dropout
    model, reference, end = load(), load().requires_grad_(False), tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    train, test = make_problems("train", STEPS * QUESTIONS), make_problems("test", 200)
    prompts_of = lambda problems: [encode_prompt(tokenizer, p["problem"]) for p in problems]

    def accuracy() -> float:
        ids, _, answer = sample(model, prompts_of(test), end, greedy=True)
        return float(grade(tokenizer, test, ids, answer).mean())

    print(f"step  0  greedy accuracy on 200 test problems {accuracy():.2f}")
    for step in range(STEPS):
        # 1. Rollout: G answers to each question.
        questions = train[step * QUESTIONS:(step + 1) * QUESTIONS]
        problems = [question for question in questions for _ in range(G)]
        ids, real, answer = sample(model, prompts_of(problems), end)

        # 2. Reward and advantage.
        rewards = grade(tokenizer, problems, ids, answer)
        advantages = group_advantages(rewards.view(QUESTIONS, G)).flatten()

        # 3. Loss. The model has not moved since it sampled: rho is 1, but its gradient is not 0.
        logprobs, ref_logprobs = (token_logprobs(m, ids, real) for m in (model, reference))
        loss = grpo_loss(logprobs, logprobs.detach(), ref_logprobs, advantages, answer[:, 1:])

        # 4. Update.
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            tokens = answer.sum() / len(ids)
            print(f"step {step + 1}  reward {rewards.mean():.2f}  tokens per answer {tokens:.0f}")
    print(f"step {STEPS}  greedy accuracy on 200 test problems {accuracy():.2f}")


if __name__ == "__main__":
    main()
