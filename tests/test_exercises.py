"""Every exercise's check passes on the project's own function, and fails on typical wrong ones."""

import re
import subprocess
import sys

import pytest
import torch

import grpo
import rewards
from conftest import ROOT
from docs import exercises
from docs import grpo_in_100_lines as small
from docs.exercises import EXERCISES, Wrong
from eval import pass_at_k
from model_utils import shard_model
from plumbing.attention import pack

# --------------------------------------------------------------------------------------------------
# The project's own functions, in the exercises' signatures


def policy_loss(logprobs, old, advantages, low, high):
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    return grpo.policy_loss(logprobs, old, advantages, mask, low, high)[0]


def kl_estimates(logprobs, ref):
    k1 = logprobs - ref
    return k1, k1**2 / 2, grpo.kl_k3(logprobs, ref)


def plan_reward_is_idle(correct, betas=(0.0, 0.5)):
    config = grpo.Config(plans=3, cots=2, structure=0.0, alpha=0.0)
    outcome = correct.float()
    plan = rewards.plan_reward(correct, 1.0)[:, :, None].expand(correct.shape)
    parts = {"total": outcome + config.beta * plan, "outcome": outcome, "plan": plan}
    none, some = (grpo.advantages(parts, config, 0.5, beta)[1] for beta in betas)
    return (none - some).abs().amax((1, 2)) < 1e-4


def sample_token(logits, temperature, generator):
    return grpo.sample_token(logits, temperature, 1.0, generator)[0]


def token_logprobs(model, ids):
    packed = pack(ids.tolist(), [1] * len(ids), torch.device("cpu"))
    return shard_model(model).token_logprobs(packed)[0]


def segment_advantages(returns):
    return grpo.segment_advantages(returns, returns.new_zeros(returns.shape[:2]), 0.5, False)


OWN = {
    "group_advantages": [grpo.group_advantages, small.group_advantages],
    "policy_loss": [policy_loss],
    "kl_estimates": [kl_estimates],
    "kl_loss": [grpo.kl_k3],
    "token_weights": [grpo.token_weights],
    "plan_reward": [rewards.plan_reward],
    "plan_reward_is_idle": [plan_reward_is_idle],
    "sample_token": [sample_token],
    "token_logprobs": [
        token_logprobs,
        lambda model, ids: small.token_logprobs(model, ids, torch.ones_like(ids).bool()),
    ],
    "pass_at_k": [pass_at_k],
    "segment_advantages": [segment_advantages],
}

# --------------------------------------------------------------------------------------------------
# Typical wrong ones, and what their authors are told


def clip_only(logprobs, old, advantages, low, high):
    return -(logprobs - old).exp().clamp(1 - low, 1 + high) * advantages[:, None]


def detached_ratio(logprobs, old, advantages, low, high):
    return policy_loss(logprobs.detach(), old, advantages, low, high) + 0 * logprobs


def other_direction(logprobs, ref):
    k1, k2, _ = kl_estimates(logprobs, ref)
    return k1, k2, k1.exp() - 1 - k1


def one_mean(returns):
    both = grpo.group_advantages(returns.flatten(1), std_norm=False).reshape(returns.shape)
    return both.mean(2), both


def own_mean_for_cots(returns):
    plan, _ = segment_advantages(returns)
    return plan, returns - returns.mean(2, keepdim=True)


def multinomial(times: bool, generator: bool):
    def draw(logits, temperature, given):
        probs = (logits * temperature if times else logits / temperature).softmax(-1)
        return torch.multinomial(probs, 1, generator=given if generator else None)[:, 0]

    return draw


def shifted_by_none(model, ids):
    logprobs = model(ids).logits.log_softmax(-1)
    return logprobs.gather(-1, ids[:, :, None])[:, 1:, 0]


sums = lambda correct: correct.float().sum(2)
equal_scores = lambda correct: sums(correct).amax(1) == sums(correct).amin(1)

WRONG = {
    "group_advantages": {
        "sample std": (lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True), "3, 1"),
        "NaN": (lambda r: (r - r.mean(1, True)) / r.std(1, correction=0, keepdim=True), "0.1"),
        "whole batch": (lambda r: (r - r.mean()) / r.std(correction=0), "1 0 0 0"),
    },
    "policy_loss": {
        "no minimum": (clip_only, "the loss: I expected"),
        "detached": (detached_ratio, "the gradient"),
    },
    "kl_estimates": {"ratio upside down": (other_direction, "k3 of a token")},
    "kl_loss": {
        "k3 alone": (lambda p, q, old: grpo.kl_k3(p, q), "on policy, its gradient"),
        "k1": (lambda p, q, old: p - q, "on policy, its gradient"),
        "k2": (lambda p, q, old: (p - q) ** 2 / 2, "on policy, the mean"),
        "detached": (
            lambda p, q, old: (p - old).exp().detach() * grpo.kl_k3(p, q), "on policy, its gradient"
        ),
    },
    "token_weights": {
        "all tokens are counted": (
            lambda mask, kind, tokens, sequences, longest: torch.full(mask.shape, 1 / 10), "token"
        ),
        "padded length": (
            lambda mask, kind, tokens, sequences, longest: {
                "token": mask / tokens,
                "sequence": mask / mask.shape[1] / sequences,
                "constant": mask / (sequences * longest),
            }[kind],
            "sequence",
        ),
    },
    "plan_reward": {
        "sums": (lambda c, tau: (sums(c) / tau).softmax(1), "tau 1.0"),
        "tau upside down": (lambda c, tau: (c.float().mean(2) * tau).softmax(1), "tau 0.5"),
        "over questions": (lambda c, tau: (c.float().mean(2) / tau).softmax(0), "tau 1.0"),
    },
    "plan_reward_is_idle": {
        "equal scores": (equal_scores, "changes nothing"),
        "never": (lambda c: torch.zeros(len(c), dtype=torch.bool), "changes nothing"),
    },
    "sample_token": {
        "times": (multinomial(True, True), "temperature 0.5"),
        "no generator": (multinomial(False, False), "the generator must decide"),
        "first row": (
            lambda x, t, g: torch.multinomial((x[0] / t).softmax(-1), len(x), True, generator=g),
            "each row",
        ),
        "greedy": (lambda x, t, g: x.argmax(-1), "temperature 1.0"),
    },
    "token_logprobs": {"no shift": (shifted_by_none, "two sequences")},
    "pass_at_k": {
        "with replacement": (lambda n, c, k: 1 - (1 - c / n) ** k, "k = 2"),
        "k times": (lambda n, c, k: min(1, k * c / n), "k = 2"),
    },
    "segment_advantages": {
        "one mean": (one_mean, "the plans: I expected"),
        "own mean": (own_mean_for_cots, "the CoT tokens' mean gradient .* 0.500"),
    },
}


@pytest.mark.parametrize("number", EXERCISES)
def test_the_projects_own_function_passes(number):
    name, check = EXERCISES[number]
    for own in OWN[name]:
        check(own)


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name, functions in WRONG.items() for kind in functions]
)
def test_a_typical_wrong_one_is_told_what_is_wrong(name, kind):
    checks = dict(EXERCISES.values())
    function, said = WRONG[name][kind]
    torch.manual_seed(0)  # of the one that ignores its generator
    with pytest.raises(Wrong, match=said):
        checks[name](function)


def test_every_exercise_has_a_text_and_a_wrong_answer():
    page = (ROOT / "docs/exercises.md").read_text()
    sections = re.findall(r"^## (\d+)\. .*?`(\w+)\(", page, re.MULTILINE | re.DOTALL)
    wanted = [(str(number), name) for number, (name, _) in EXERCISES.items()]
    assert sections == wanted
    assert len(EXERCISES) >= 8 and OWN.keys() == WRONG.keys() == {n for n, _ in EXERCISES.values()}
    for name, _ in EXERCISES.values():  # the solution is named, and is there
        solution = re.search(rf"`{name}\(.*?Solution: `([\w/.]+)`, `(\w+)`", page, re.DOTALL)
        file, function = solution.groups()
        assert f"def {function}(" in (ROOT / file).read_text(), (name, file)


def test_the_command_grades_a_file(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("def pass_at_k(n, c, k):\n    return c / n\n")
    with pytest.raises(SystemExit, match="not yet. 2 right ones of 5 samples, k = 2: I expected"):
        exercises.main(["10", str(mine)])
    solution = "import math\n\ndef pass_at_k(n, c, k):\n"
    mine.write_text(solution + "    return 1 - math.comb(n - c, k) / math.comb(n, k)\n")
    exercises.main(["10", str(mine)])
    assert "pass_at_k is right" in capsys.readouterr().out
    for words, said in (
        (["12", str(mine)], "give an exercise from 1 to 11"), (["3"], "from 1 to 11"),
        (["1", str(mine)], "has no function group_advantages"),
        (["1", str(tmp_path / "no.py")], "there is no file"),
    ):
        with pytest.raises(SystemExit, match=said):
            exercises.main(words)
    exercises.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(EXERCISES)
    command = [sys.executable, "-m", "docs.exercises", "0", str(mine)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "give an exercise from 1 to 11" in done.stderr
