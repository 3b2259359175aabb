"""What calls cost a rollout: tokens per second with and without replies, at the same lengths.

    python -m bench.calls

Both sides decode the same rows to the same limits, and a script draws in place of the policy: every
PERIOD tokens a row calls the calculator. On one side the calls are answered, so results are fed in
place of other tokens. The two sides take turns in one process; medians of ROUNDS.
"""

import random
import statistics
import time

import torch

import grpo
from data import toy
from data.worlds import replies
from plumbing.attention import use_attention

ROWS, LIMIT, PERIOD, ROUNDS = 128, 192, 40, 5
DIGITS = "0123456789"
WORDS = [*toy.WORDS, "*", "/", "(", ")", "<calculator>", "</calculator>", "<result>", "</result>"]


def scripted(ids_of: dict[str, int]):
    """A sampler that writes a call of 7 tokens every PERIOD steps, and random words between."""
    rng, at = random.Random(0), 0

    def draw(logits, temperature, top_p, generator):
        nonlocal at
        _, logprobs = sample_token(logits, temperature, top_p, generator)
        call = ["<calculator>", "7", "*", "8", "+", "5", "</calculator>"]
        place, at = at % PERIOD, at + 1
        if place < len(call):
            words = [call[place]] * len(logits)
        else:
            words = rng.choices(DIGITS, k=len(logits))
        return torch.tensor([ids_of[word] for word in words]), logprobs

    return draw


sample_token = grpo.sample_token


def rollout(model, tokenizer, answered: bool) -> tuple[float, int, int]:
    """Seconds, tokens and calls of one rollout."""
    prompt, config = tokenizer.encode("A = 4 ; A ?"), grpo.Config(plans=ROWS, cots=1)
    config.tools = ("calculator",) if answered else ()
    respond = replies(tokenizer, [{"problem": "A ?"}], config, [])
    rollouts = [grpo.Rollout(prompt, [LIMIT], number=i) for i in range(ROWS)]
    grpo.sample_token = scripted(tokenizer.get_vocab())
    began = time.perf_counter()
    try:
        options = dict(temperature=1.0, top_p=1.0, stop_ids=[], seed=0)
        grpo.decode(model, rollouts, respond=respond, **options)
    finally:
        grpo.sample_token = sample_token
    seconds = time.perf_counter() - began
    return seconds, sum(len(r.ids) for r in rollouts), sum(r.calls for r in rollouts)


def main():
    tokenizer = toy.make_tokenizer(WORDS)
    model = use_attention(toy.make_model(tokenizer).eval())
    speeds = {True: [], False: []}
    for turn in range(2 * ROUNDS + 2):
        answered = turn % 2 == 1
        seconds, tokens, calls = rollout(model, tokenizer, answered)
        if turn > 1:  # the first of each warms up
            speeds[answered].append(tokens / seconds)
        if turn == 1:
            print(f"{ROWS} rows x {LIMIT} tokens, {calls} answered calls", flush=True)
    plain, with_calls = (statistics.median(speeds[side]) for side in (False, True))
    print(f"without calls {plain:,.0f} tokens/s, with calls {with_calls:,.0f} tokens/s")
    print(f"ratio {with_calls / plain:.3f} (at least 0.8 is wanted)")


if __name__ == "__main__":
    main()
