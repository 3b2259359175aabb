"""The pages to learn from: the small GRPO is the fast one, and pages say what the code does."""

import ast
import importlib.util
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import grpo
import model_utils
from conftest import ROOT, make_tiny
from data.toy import make_problems
from docs import grpo_in_100_lines as small
from model_utils import encode_prompt, load_model, load_tokenizer, shard_model
from plumbing.family import check_family
from plumbing.log import reward_terms

CPU, BASE = torch.device("cpu"), str(ROOT / "data/toy_base")

# --------------------------------------------------------------------------------------------------
# GRPO in 100 lines


def moved(model, seed: int, size: float):
    """The model with every weight moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def step():
    """A step of the small script: 4 questions, 4 answers each, advantages and logprobs."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(BASE)
    load = lambda: AutoModelForCausalLM.from_pretrained(BASE).eval()
    problems = [p for p in make_problems("train", 4) for _ in range(4)]
    prompts = [encode_prompt(tokenizer, p["problem"]) for p in problems]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "MAX_TOKENS", 48)
        ids, real, answer = small.sample(moved(load(), 1, 0.02), prompts, tokenizer.eos_token_id)
    rewards = small.grade(tokenizer, problems, ids, answer).view(4, 4)
    advantages = small.group_advantages(rewards)
    assert len({*rewards.mean(1).tolist()} - {0.0, 1.0}) >= 1  # some group has right and wrong ones
    models = [moved(load(), 1, 0.02), moved(load(), 2, 0.04), load()]  # policy, old, reference
    with torch.no_grad():
        old, ref = (small.token_logprobs(model, ids, real) for model in models[1:])
    return models[0], prompts, ids, real, answer, rewards, advantages, old, ref


def test_advantages_of_both_are_equal(step):
    *_, rewards, advantages, _, _ = step
    assert torch.allclose(advantages, grpo.group_advantages(rewards), atol=1e-6)
    equal = rewards.amax(1) == rewards.amin(1)
    assert (advantages[equal] == 0).all() and (advantages[~equal] != 0).all()


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_gradient_in_100_lines_is_that_of_an_update(step, on_policy, monkeypatch):
    """grpo.py packs, shares prompts and cuts into micro-batches; the small script pads."""
    model, prompts, ids, real, answer, _, advantages, old, ref = step
    logprobs = small.token_logprobs(model, ids, real)
    old = logprobs.detach() if on_policy else old
    small.grpo_loss(logprobs, old, ref, advantages.flatten(), answer[:, 1:]).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    rollouts = [
        grpo.Rollout(prompt, [80], ids=row[mask].tolist(), logprobs=[0.0] * int(mask.sum()))
        for prompt, row, mask in zip(prompts, ids, answer)
    ]
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
        rollout.advantage = advantage
    fast = shard_model(load_model(BASE, CPU))
    fast.load_state_dict(model.state_dict())
    config = grpo.Config(clip_low=small.CLIP, clip_high=small.CLIP, kl_coef=small.KL,
                         tokens_per_micro_batch=150, activation_checkpointing=False)
    micros = grpo.make_micro_batches(rollouts, config, CPU)
    assert len(micros) > 1 and sum(len(m.packed.ids) for m in micros) < int(real.sum())  # shared
    place = {id(rollout): i for i, rollout in enumerate(rollouts)}
    for micro in micros:  # the small script's figures, in the packed layout
        micro.ref_logprobs = torch.zeros(micro.packed.mask.shape)
        micro.old_logprobs = None if on_policy else torch.zeros(micro.packed.mask.shape)
        for row, rollout in enumerate(micro.rollouts):
            i, mask = place[id(rollout)], micro.packed.mask[row]
            micro.ref_logprobs[row][mask] = ref[i][answer[i, 1:]]
            if not on_policy:
                micro.old_logprobs[row][mask] = old[i][answer[i, 1:]]
    held = {}
    keep = lambda model, *_: held.update({n: p.grad for n, p in model.named_parameters()}) or 0.0
    monkeypatch.setattr(grpo, "optimizer_step", keep)
    metrics = grpo.update(fast, None, micros, config, 0.0)
    assert (metrics["clip_frac"] > 0) != on_policy  # off policy, some tokens are cut off
    largest = max(float(grad.abs().max()) for grad in expected.values())
    apart = max(float((held[name] - expected[name]).abs().max()) for name in expected)
    assert largest > 1e-3 and apart < 1e-6


# --------------------------------------------------------------------------------------------------
# Change one thing


def blocks() -> list[tuple[str, str, str, str]]:
    """File, name, kind (python or diff) and text of every quotation on the page."""
    page = (ROOT / "docs/change_one_thing.md").read_text()
    pattern = r"^In `([\w/.]+)`, `(\w+)`:\n\n```(\w+)\n(.*?)```"
    found = re.findall(pattern, page, re.MULTILINE | re.DOTALL)
    assert page.count("```") == 2 * len(found)  # every block says where it is from
    return found


def source_of(file: str, name: str) -> str:
    """The lines of a top-level function or assignment."""
    text = (ROOT / file).read_text()
    for node in ast.parse(text).body:
        named = getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0], "id", 0)
        if named == name:
            return "".join(text.splitlines(keepends=True)[node.lineno - 1:node.end_lineno])
    raise AssertionError(f"docs/change_one_thing.md names {name} of {file}, which is not there")


def sides(diff: str) -> tuple[str, str]:
    """A diff's lines before and after it."""
    lines = diff.splitlines(keepends=True)
    keep = lambda signs: "".join(line[1:] for line in lines if line[0] in signs)
    return keep(" -"), keep(" +")


def changed(tmp_path, monkeypatch, file: str, name: str):
    """A copy of a module with the page's diff to one of its functions, imported."""
    (diff,) = [text for f, n, kind, text in blocks() if (f, n, kind) == (file, name, "diff")]
    before, after = sides(diff)
    text = (ROOT / file).read_text()
    assert text.count(before) == 1
    (tmp_path / file).write_text(text.replace(before, after))
    spec = importlib.util.spec_from_file_location(f"changed_{file[:-3]}", tmp_path / file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_what_the_page_quotes_is_in_the_code():
    assert len(blocks()) >= 6
    for file, name, kind, text in blocks():
        quoted = sides(text)[0] if kind == "diff" else text
        remedy = f"docs/change_one_thing.md quotes other lines of {file}, {name}: quote today's"
        assert quoted in source_of(file, name), remedy
    page = (ROOT / "docs/change_one_thing.md").read_text()
    for file, name in re.findall(r"`([\w/]+\.py)`, `(\w+)`", page):
        source_of(file, name)
    words = set(re.findall(r"`(\w+)`", page)) - {"brief_spread", "output_multiplier", "id", "brief"}
    files = "grpo.py model_utils.py docs/metrics.md data/sources.py plumbing/log.py"
    files = f"{files} report/figures.py tests/test_families.py".split()
    code = "".join((ROOT / file).read_text() for file in files)
    assert not {word for word in words if not re.search(rf"\b{word}\b", code)}
    for link in re.findall(r"\]\(([\w./]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link


def test_the_pages_reward_term_reaches_the_total(tmp_path, monkeypatch):
    """Plans of 20 and 21 tokens, and one that never closed: the first alone gets 0.1 more."""
    module = changed(tmp_path, monkeypatch, "grpo.py", "group_rewards")
    rollouts = [grpo.Rollout([1], [99], ids=[2] * 40, plan_tokens=n) for n in (20, 21, 0)]
    config = grpo.Config(plans=3, cots=1)
    mine, theirs = (m.group_rewards([m.Group({}, rollouts)], config) for m in (module, grpo))
    assert "brief" in reward_terms(mine) and "brief" not in reward_terms(theirs)  # it is logged
    more = (mine["total"] - theirs["total"]).flatten()
    assert torch.allclose(more, torch.tensor([0.1, 0.0, 0.0]), atol=1e-6)
    a = grpo.advantages(mine, config, 0.0, 0.5)[1].flatten()
    assert torch.allclose(a, torch.tensor([2**0.5, -(0.5**0.5), -(0.5**0.5)]), atol=1e-4)


def test_the_pages_family_trains_as_it_samples(tmp_path, monkeypatch):
    """Its forward multiplies the logits. Without the page's line, loading refuses it."""
    module = changed(tmp_path, monkeypatch, "model_utils.py", "_logits")

    def make(sharded):
        model = make_tiny("qwen2")
        model.config.output_multiplier, forward = 3.0, model.forward

        def multiplied(*args, **options):
            output = forward(*args, **options)
            output.logits = output.logits * 3.0
            return output

        model.forward = multiplied
        return sharded(model)

    check_family(make(module.shard_model), module._logits)
    with pytest.raises(SystemExit, match="changes its logits after the output layer"):
        check_family(make(shard_model), model_utils._logits)
