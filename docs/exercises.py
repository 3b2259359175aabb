"""Exercises that grade themselves: docs/exercises.md has their text.

    python -m docs.exercises             the list
    python -m docs.exercises 3 mine.py   run exercise 3's check on the function in your file

The file is run as a program of yours. A check holds your function against numbers worked by hand,
or against everything that can happen, enumerated; the solution is a function of this repository.
"""

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from plumbing.ranks import fail, print0, require

EXERCISES: dict[int, tuple[str, Callable]] = {}  # number -> name of the function, its check
BASE = Path(__file__).resolve().parents[1] / "data/toy_base"


class Wrong(Exception):
    """What an answer gets wrong, in one sentence."""


def exercise(name: str):
    """Make the decorated check the next exercise, about the function `name`."""

    def add(check: Callable) -> Callable:
        EXERCISES[len(EXERCISES) + 1] = name, check
        return check

    return add


def expect(condition, message: str):
    if not condition:
        raise Wrong(message)


def equal(found, wanted, case: str, atol: float = 1e-5):
    """Compare a tensor with nested lists."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    expect(torch.is_tensor(found), f"{case}: I expected a tensor, and got {type(found).__name__}")
    shapes = tuple(found.shape), tuple(wanted.shape)
    expect(shapes[0] == shapes[1], f"{case}: your shape is {shapes[0]}, it should be {shapes[1]}")
    off = (found.detach().double() - wanted).abs()
    show = lambda values: [round(x, 4) for x in values.detach().flatten().tolist()]
    message = f"{case}: I expected {show(wanted)}, and got {show(found)}"
    expect(not bool((~(off <= atol)).any()), message)  # also where it is NaN


# --------------------------------------------------------------------------------------------------
# The checks


@exercise("group_advantages")
def check_advantages(group_advantages: Callable):
    """rewards (N, G) -> (N, G)"""
    equal(group_advantages(torch.tensor([[3.0, 1.0]])), [[1, -1]], "rewards 3, 1")
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]])
    wanted = [[math.sqrt(3), *[-1 / math.sqrt(3)] * 3], [1, 1, -1, -1]]
    equal(group_advantages(rewards), wanted, "rewards 1 0 0 0 and 2 2 0 0")
    equal(group_advantages(torch.full((1, 3), 0.1)), [[0, 0, 0]], "rewards 0.1, 0.1, 0.1", 0.0)


@exercise("policy_loss")
def check_clip(policy_loss: Callable):
    """logprobs, old_logprobs (B, T), advantages (B,), clip_low, clip_high -> loss (B, T)"""
    ratios = torch.tensor([[0.5, 1.1, 1.5], [0.5, 1.1, 1.5]])
    old = torch.full((2, 3), -1.0)
    logprobs = (old + ratios.log()).requires_grad_()
    loss = policy_loss(logprobs, old, torch.tensor([2.0, -1.0]), 0.2, 0.3)
    case = "ratios 0.5 1.1 1.5, advantages 2 and -1, clip 0.2 below and 0.3 above"
    equal(loss, [[-1.0, -2.2, -2.6], [0.8, 1.1, 1.5]], f"{case}, the loss")
    gradient, = torch.autograd.grad(loss.sum(), logprobs)
    # d ratio / d logprob = ratio. The clip cuts off two tokens of six.
    wanted = [[-1.0, -2.2, 0.0], [0.0, 1.1, 1.5]]
    equal(gradient, wanted, f"{case}, the gradient by the logprobs")


def two_policies(seed: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a categorical policy, its logprobs and a reference's: float64, (size,) each."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, size, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    return logits, logits.log_softmax(-1), other.log_softmax(-1)


@exercise("kl_estimates")
def check_kl_estimates(kl_estimates: Callable):
    """logprobs, ref_logprobs, any shape -> k1, k2, k3, each of that shape"""
    one = kl_estimates(torch.tensor([-1.0]), torch.tensor([-1.0 + math.log(2)]))
    expect(len(one) == 3, "I expected three estimates")
    by_hand = -math.log(2), math.log(2) ** 2 / 2, 1 - math.log(2)
    for name, found, wanted in zip(("k1", "k2", "k3"), one, by_hand):
        equal(found, [wanted], f"{name} of a token that the reference finds twice as likely")
    for seed in range(3):
        _, logprobs, ref = two_policies(seed)
        p = logprobs.detach().exp()
        divergence = float((p * (logprobs - ref)).sum().detach())
        k1, _, k3 = (k.detach().double() for k in kl_estimates(logprobs, ref))
        for name, k in (("k1", k1), ("k3", k3)):
            mean = float((p * k).sum())
            message = f"the mean of {name} over the policy should be KL(policy, reference)"
            expect(abs(mean - divergence) < 1e-6, f"{message}, {divergence:.4f}, and is {mean:.4f}")
        expect((k3 >= 0).all(), "k3 is never negative")


@exercise("kl_loss")
def check_kl_gradient(kl_loss: Callable):
    """logprobs, ref_logprobs, old_logprobs, any shape -> the KL term of each token"""
    for seed in range(3):
        logits, logprobs, ref = two_policies(seed)
        old = two_policies(seed + 10)[1].detach()  # of the policy that sampled
        exact = (logprobs.exp() * (logprobs - ref)).sum()
        wanted, = torch.autograd.grad(exact, logits, retain_graph=True)
        for place, sampled in (("on policy", logprobs.detach()), ("off policy", old)):
            # The mean over all tokens that may be sampled: no chance is left in it.
            mean = (sampled.exp() * kl_loss(logprobs, ref, sampled)).sum()
            equal(mean, float(exact.detach()), f"{place}, the mean should be the KL divergence")
            found, = torch.autograd.grad(mean, logits, retain_graph=True)
            equal(found, wanted, f"{place}, its gradient should be that of the KL divergence")


@exercise("token_weights")
def check_weights(token_weights: Callable):
    """mask (B, T), loss_agg, tokens, sequences, max_tokens -> (B, T)"""
    mask = torch.tensor([[True, True, True, True], [False, True, True, False]])
    count = "two completions of 4 and 2 tokens, of 10 tokens and 3 completions in the whole step"
    kinds = {
        "token": [[1 / 10] * 4, [0, 1 / 10, 1 / 10, 0]],
        "sequence": [[1 / 12] * 4, [0, 1 / 6, 1 / 6, 0]],
        "constant": [[1 / 60] * 4, [0, 1 / 60, 1 / 60, 0]],
    }
    for kind, wanted in kinds.items():
        equal(token_weights(mask, kind, 10, 3, 20), wanted, f"{kind}, {count}")


@exercise("plan_reward")
def check_plan_reward(plan_reward: Callable):
    """correct (N, m, z), tau -> (N, m)"""
    correct = torch.tensor([[[1, 1], [1, 0], [0, 0]]]).bool()
    for tau in (1.0, 0.5):
        powers = [math.exp(s / tau) for s in (1.0, 0.5, 0.0)]
        wanted = [[power / sum(powers) for power in powers]]
        case = f"plans with 2, 1 and 0 right CoTs of 2, tau {tau}"
        equal(plan_reward(correct, tau), wanted, case)
    two = torch.cat([correct, ~correct])
    equal(plan_reward(two, 1.0).sum(1), [1.0, 1.0], "the sums over two questions' plans")


@exercise("plan_reward_is_idle")
def check_idle(plan_reward_is_idle: Callable):
    """correct (N, m, z) -> (N,) bool: with any beta > 0 the advantages are those without"""
    patterns = torch.tensor(list(itertools.product((False, True), repeat=6))).reshape(-1, 3, 2)
    found = plan_reward_is_idle(patterns)
    expect(tuple(found.shape) == (64,), "I gave you 64 questions and expected 64 verdicts")
    for correct, said in zip(patterns, found.tolist()):
        scores = correct.float().mean(1)
        outcome = correct.double()
        normed = []
        for beta in (0.0, 0.5, 2.0):
            total = (outcome + beta * scores.double().softmax(0)[:, None]).flatten()
            std = total.std(correction=0)
            normed.append((total - total.mean()) / std if std > 1e-9 else total * 0)
        idle = all(torch.allclose(normed[0], other, atol=1e-6) for other in normed[1:])
        case = f"outcomes {correct.int().tolist()} (a list per plan)"
        expect(bool(said) == idle, f"{case}: the plan reward {'changes nothing' * idle or 'acts'}")


@exercise("sample_token")
def check_sampling(sample_token: Callable):
    """logits (B, V), temperature, generator -> tokens (B,)"""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    count, quantile = 40_000, 20.5  # chi-square's 0.999 quantile at 5 degrees of freedom
    for temperature in (1.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        tokens = sample_token(logits.expand(count, -1), temperature, generator)
        expect(tuple(tokens.shape) == (count,), f"I expected {count} tokens, one per row")
        expected = (logits / temperature).softmax(-1) * count
        seen = torch.bincount(tokens, minlength=6)
        surprise = float(((seen - expected) ** 2 / expected).sum())
        frequencies = [round(x, 3) for x in (seen / count).tolist()]
        wanted = [round(x, 3) for x in (expected / count).tolist()]
        message = f"temperature {temperature}: your frequencies are {frequencies}, not {wanted}"
        expect(surprise < quantile, message)
    rows = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]]).repeat(50, 1)
    draw = lambda seed, rows: sample_token(rows, 1.0, torch.Generator().manual_seed(seed)).tolist()
    found = draw(0, rows)
    own = found[::2].count(1) + found[1::2].count(0)  # 99.98 % of the 100 are expected
    expect(own > 90, "each row must be drawn from its own logits")
    flat = torch.zeros(100, 5)
    message = "the generator must decide: the same seed twice gave different tokens"
    expect(draw(7, flat) == draw(7, flat) != draw(8, flat), message)


@exercise("token_logprobs")
def check_shift(token_logprobs: Callable):
    """model, ids (B, T) -> (B, T-1): column t is about token t+1"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    ids = torch.randint(5, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = token_logprobs(model, ids)
        wanted = torch.zeros(2, 5)
        for t in range(5):  # what the model says after tokens 0..t about token t+1
            chances = model(ids[:, :t + 1]).logits[:, -1].log_softmax(-1)
            wanted[:, t] = chances[range(2), ids[:, t + 1]]
    equal(found, wanted, "two sequences of 6 tokens", atol=1e-4)


@exercise("pass_at_k")
def check_pass_at_k(pass_at_k: Callable):
    """n, c, k -> the chance that k of n samples, drawn without replacement, hold one of c right"""
    for n, c, k in ((5, 2, 1), (5, 2, 2), (5, 2, 4), (4, 0, 3), (4, 4, 1), (6, 1, 3)):
        draws = list(itertools.combinations(range(n), k))
        wanted = sum(min(draw) < c for draw in draws) / len(draws)
        found = float(pass_at_k(n, c, k))
        case = f"{c} right ones of {n} samples, k = {k}"
        expect(abs(found - wanted) < 1e-9, f"{case}: I expected {wanted:.4f}, and got {found:.4f}")


@exercise("segment_advantages")
def check_segment(segment_advantages: Callable):
    """returns (N, m, z) -> advantages of plan tokens (N, m), and of CoT tokens (N, m, z)"""
    a_plan, a_cot = segment_advantages(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    equal(a_plan, [[-0.5, 0.5]], "returns [1, 0] and [1, 1], the plans")
    expect(tuple(a_cot.shape) == (1, 2, 2), "the CoTs: I expected the shape (1, 2, 2)")
    for seed in range(3):
        gradients = expected_gradients(segment_advantages, seed)
        for part, found, wanted in zip(("plan", "CoT"), *gradients):
            scale = float((found * wanted).sum() / (wanted * wanted).sum())
            message = (
                f"over all 64 groups that can be drawn, the {part} tokens' mean gradient is not "
                f"that of the expected return: along it, it has {scale:.3f} of the length. Does a "
                "baseline hold what it judges?"
            )
            expect(float((found - wanted).abs().max()) < 1e-5, message)


def expected_gradients(credit: Callable, seed: int) -> tuple[list, list]:
    """The mean of the estimated gradient over all groups, and the true one: by plans and CoTs.

    A policy of two plans and two CoTs per plan is a table of logits. A group is m = 2 plans with
    z = 2 CoTs each: (2 * 2^2)^2 = 64 ordered groups, each with its probability.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    logits = [draw(2).requires_grad_(), draw(2, 2).requires_grad_()]
    table, (plan, cot) = draw(2, 2), (x.log_softmax(-1) for x in logits)
    value = ((plan[:, None] + cot).exp() * table).sum()
    true = torch.autograd.grad(value, logits, retain_graph=True)
    slots = [(t, *cots) for t in range(2) for cots in itertools.product(range(2), repeat=2)]
    groups = torch.tensor(list(itertools.product(slots, repeat=2)))  # (64, m, 1 + z)
    t, c = groups[:, :, :1], groups[:, :, 1:]
    a_plan, a_cot = credit(table[t, c])
    logprob = plan[t].sum((1, 2)) + cot[t, c].sum((1, 2))  # of each group
    # A plan's tokens are in z completions, so its advantage counts z times of the m z = 4.
    scores = (a_plan[:, :, None] * plan[t] + a_cot * cot[t, c]).sum((1, 2)) / 4
    return torch.autograd.grad((logprob.detach().exp() * scores).sum(), logits), true


# --------------------------------------------------------------------------------------------------
# Main


def load(path: str, name: str) -> Callable:
    """The function `name` of a Python file."""
    require(Path(path).is_file(), f"there is no file {path}: write your function {name} there")
    spec = importlib.util.spec_from_file_location("mine", path)
    require(spec, f"{path} is no Python file: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    require(callable(function), f"{path} has no function {name}: docs/exercises.md says what it is")
    return function


def main(arguments: list[str]):
    if not arguments:
        for number, (name, check) in EXERCISES.items():
            print0(f"{number:2}  {name}: {check.__doc__}")
        return
    known = len(arguments) == 2 and arguments[0].isdigit() and int(arguments[0]) in EXERCISES
    usage = f"give an exercise from 1 to {len(EXERCISES)} and a file: "
    require(known, usage + "python -m docs.exercises 3 mine.py")
    name, check = EXERCISES[int(arguments[0])]
    try:
        check(load(arguments[1], name))
    except Wrong as error:
        fail(f"not yet. {error}")
    print0(f"Exercise {arguments[0]}: {name} is right.")


if __name__ == "__main__":
    main(sys.argv[1:])
