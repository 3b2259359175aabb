"""Distilling, SFT, GRPO and evaluation on tiny random models of real families.

The scripts are the same for all, and run a few steps each. Families that training would compute
otherwise than their own forward are refused when they are loaded. Under torchrun this file loads
the folders that it is given, and prints what becomes of each.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import distill
import eval as evaluation
import grpo
import sft
from conftest import ROOT, make_tiny
from data.toy import make_problems, make_tokenizer
from model_utils import _logits, load_sharded, shard_model
from plumbing.attention import pack
from plumbing.family import check_family
from plumbing.flags import TrainingFlags
from plumbing.log import step_metrics
from plumbing.ranks import init_distributed, rank

MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES = {
    "qwen2": {}, "qwen3": {}, "llama": {}, "mistral": {"sliding_window": None}, "gemma": {},
    "qwen3_moe": MOE, "granite": {"logits_scaling": 0.25},
    "cohere2": {"logit_scale": 4.0, "sliding_window": 64},
}  # fmt: skip


def make_folder(family: str, folder, **settings):
    """A two-layer model of the family on the toy task's tokenizer, in Hugging Face format."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if family != "qwen2":
        # See data/toy.py: transformers wants it for a Qwen2 model, and for no other.
        del tokenizer.init_kwargs["auto_map"]
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **FAMILIES.get(family, {}), **settings,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, split, count in (("sft", "train", 40), ("rl", "validation", 12)):
        problems = make_problems(split, count, facts=(2, 2))
        text = "".join(json.dumps(problem) + "\n" for problem in problems)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def stage(monkeypatch):
    """stage(script, flags): run a stage in this process."""

    def stage(script, flags: str):
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
        script.main()

    return stage


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_runs(family, data, tmp_path, stage):
    start, plans, trained = tmp_path / "start", tmp_path / "plans.jsonl", tmp_path / "sft/model"
    make_folder(family, start)
    # The family itself is the teacher ("self-plan"). It writes random words, and those that pass
    # the filter are kept.
    flags = "--limit 40 --max_new_tokens 4 --temperature 1.0"
    stage(distill, f"--teacher {start} --data {data}/sft.jsonl --out {plans} {flags}")
    records = lines(plans)
    assert 12 <= len(records) and all(record["plan"] and record["think"] for record in records)

    flags = "--batch_size 4 --epochs 1 --lr 3e-3 --warmup_steps 0 --eval_every 100"
    stage(sft, f"--model {start} --data {plans} --out {tmp_path}/sft {flags}")
    losses = [step["loss"] for step in lines(tmp_path / "sft/metrics.jsonl")]
    assert losses[-1] < losses[0]

    flags = (
        "--steps 2 --questions 2 --plans 2 --cots 2 --max_plan_tokens 12 --lr 1e-3 --kl_coef 0.01 "
        "--max_completion_tokens 24 --eval_every 0 --save_every 0 --show_every 1"
    )
    stage(grpo, f"--model {trained} --data {data}/rl.jsonl --out {tmp_path}/rl {flags}")
    steps = lines(tmp_path / "rl/metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["grad_norm"]) for step in steps)
    # The sampler (KV cache, one token at a time) and the trainer (whole sequences) agree on every
    # token's probability.
    gaps = [step["sampler_gap"] for step in steps]
    assert max(gaps) < 1e-4, gaps

    model, flags = tmp_path / "rl/model", "--n 2 --max_completion_tokens 24 --limit 4"
    stage(evaluation, f"--model {model} --data {data}/rl.jsonl --out {tmp_path}/eval {flags}")
    assert json.loads((tmp_path / "eval/summary.json").read_text())["n_problems"] == 4

    from transformers import AutoModelForCausalLM

    # What was saved is an ordinary model of its family.
    assert AutoModelForCausalLM.from_pretrained(model).config.model_type == family


# --------------------------------------------------------------------------------------------------
# Families that change their logits after the output layer, and those whose tokens mix elsewhere

SCALED = {
    "cohere": {"logit_scale": 0.25}, "cohere2": {"logit_scale": 4.0, "sliding_window": 64},
    "granite": {"logits_scaling": 3.0}, "nanochat": {"final_logit_softcapping": 3.0},
}  # fmt: skip
ROWS = [[5, 9, 13, 2, 44], [5, 9, 13, 7, 8, 11]]


@pytest.mark.parametrize("family", SCALED)
def test_scaled_logits_train_as_the_models_own_forward(family):
    model = make_tiny(family, **SCALED[family])
    expected, loss = [], 0.0
    for row in ROWS:
        own = (model(torch.tensor([row])).logits[0, 1:-1] / 0.7).log_softmax(-1)  # after the prompt
        picked = own[range(len(row) - 2), row[2:]]
        loss = loss + (picked * torch.arange(1.0, len(picked) + 1)).sum()
        expected.append((picked.tolist(), (-(own.exp() * own).sum(-1)).tolist()))
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    packed = pack(ROWS, [2, 2], torch.device("cpu"))
    logprobs, entropy = shard_model(model).token_logprobs(packed, temperature=0.7, chunk=2)
    for i, (wanted, spread) in enumerate(expected):
        assert logprobs[i][packed.mask[i]].tolist() == pytest.approx(wanted, abs=1e-5)
        assert entropy[i][packed.mask[i]].tolist() == pytest.approx(spread, abs=1e-5)
    (logprobs * torch.arange(5.0)).sum().backward()  # column 1 is about the first completion token
    for name, parameter in model.named_parameters():
        tolerance = 1e-5 * float(gradient[name].abs().max().clamp_min(1))
        assert torch.allclose(parameter.grad, gradient[name], atol=tolerance), name


REFUSED = {  # HyperCLOVAX multiplies by the setting by which Granite divides
    "hyperclovax": ({"logits_scaling": 2.0}, "changes its logits .* `_logits` .* eval.py"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "mixes tokens outside its attention"),
}


def load(folder, device=torch.device("cpu"), **flags):
    return load_sharded(str(folder), device, TrainingFlags(**flags))


def test_loading_leaves_no_trace_of_the_comparison(tmp_path):
    make_tiny("cohere2", **SCALED["cohere2"]).save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    model = load(tmp_path, activation_checkpointing=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.get_decoder()._forward_hooks and getattr(model, "kv_cache", None) is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_are_compared_in_both_types(dtype, monkeypatch):
    """Rounding is let through. A changed forward of a known family is not."""
    for family in sorted(FAMILIES.keys() | SCALED.keys()):
        settings = FAMILIES.get(family) or SCALED.get(family, {})
        check_family(shard_model(make_tiny(family, **settings).to(dtype)), _logits)
    for name, (settings, reason) in REFUSED.items():
        with pytest.raises(SystemExit, match=f"'{name}' {reason}"):
            check_family(shard_model(make_tiny(name, **settings).to(dtype)), _logits)

    from transformers import Qwen2ForCausalLM

    forward = Qwen2ForCausalLM.forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = torch.tanh(output.logits / 30) * 30
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", capped)
    with pytest.raises(SystemExit, match="'qwen2' changes its logits"):
        check_family(shard_model(make_tiny("qwen2").to(dtype)), _logits)


def test_sft_and_grpo_refuse_a_family_before_training(data, tmp_path, stage):
    make_folder("hyperclovax", tmp_path / "start", logits_scaling=2.0)
    plans = [{**record, "plan": "a", "think": "b"} for record in lines(data / "sft.jsonl")]
    (tmp_path / "plans.jsonl").write_text("".join(json.dumps(plan) + "\n" for plan in plans))
    lengths = "--max_plan_tokens 12 --max_completion_tokens 24"
    for script, file, flags in (
        (sft, tmp_path / "plans.jsonl", "--batch_size 4"), (grpo, data / "rl.jsonl", lengths),
    ):
        out = tmp_path / script.__name__
        with pytest.raises(SystemExit, match=f"'hyperclovax' {REFUSED['hyperclovax'][1]}"):
            stage(script, f"--model {tmp_path}/start --data {file} --out {out} {flags}")
        assert not (out / "metrics.jsonl").exists()


def test_two_ranks_compare_sharded_models(tmp_path):
    settings = {"cohere2": SCALED["cohere2"], "hyperclovax": REFUSED["hyperclovax"][0]}
    folders = [str(tmp_path / family) for family in settings]
    for family, folder in zip(settings, folders):
        make_tiny(family, **settings[family]).save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = dict(env=environment, capture_output=True, text=True, timeout=240)
    done = subprocess.run([*command, __file__, *folders], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two ranks may write into one line.
    said = sorted(re.findall(r"rank \d: (?:(?!rank \d: ).)+", done.stdout))
    for accepted, refused in (said[:2], said[2:]):  # of each rank; one that goes on alone hangs
        assert accepted.endswith("cohere2 has a gradient everywhere"), said
        assert re.search(f"'hyperclovax' {REFUSED['hyperclovax'][1]}", refused), said


def load_under_torchrun():
    """Load each folder of the command line as sft.py and grpo.py do. Print what becomes of it."""
    device = init_distributed("cpu")
    for folder in sys.argv[1:]:
        try:
            model = load(folder, device, activation_checkpointing=True, cpu_offload=True)
        except SystemExit as error:
            print(f"rank {rank()}: {error}", flush=True)
            continue
        # After the comparison, no rank holds the whole output layer any more.
        assert hasattr(model.get_output_embeddings().weight, "placements")
        model.token_logprobs(pack(ROWS, [2, 2], device))[0].sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        print(f"rank {rank()}: {Path(folder).name} has a gradient everywhere", flush=True)


# --------------------------------------------------------------------------------------------------
# Sampler and trainer


def test_a_gap_of_sampler_and_trainer_ends_the_first_step_only(capsys):
    shape = torch.zeros(0, 2, 2)
    rewards = dict.fromkeys(("total", "outcome", "correct", "well_formed", "lengths"), shape)

    def metrics(gap, **options):
        updates = [{"sampler_gap": gap, "grad_norm": 1.0}, {"sampler_gap": 9.0, "grad_norm": 1.0}]
        return step_metrics([], rewards, updates, torch.device("cpu"), **options)

    assert metrics(0.09, first=True)["sampler_gap"] == 0.09  # later updates do not count
    assert "sampler and trainer" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="differ by 1.2 nats per token in .* first step.*0.1"):
        metrics(1.2, first=True)
    assert metrics(1.2)["sampler_gap"] == 1.2
    assert "warning: sampler and trainer differ by 1.2 nats" in capsys.readouterr().out


@pytest.mark.parametrize("name, reason", [
    ("gpt2", "are not in `.layers`"), ("mamba", "cannot use PyTorch's own attention .*attention"),
])
def test_families_of_another_build_are_refused_for_training(name, reason, tmp_path):
    settings = dict(n_layer=1, n_head=2, n_embd=16) if name == "gpt2" else dict(
        num_hidden_layers=1, hidden_size=16, state_size=4
    )
    config = AutoConfig.for_model(name, vocab_size=64, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=reason) as stop:
        load_sharded(str(tmp_path), torch.device("cpu"), sft.Config())
    assert "choose another model" in stop.value.code


if __name__ == "__main__":
    load_under_torchrun()
