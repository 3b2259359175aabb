"""Supervised fine-tuning: the targets, the loss by an independent loop, learning and resuming."""

import json
import sys

import pytest
import torch

import sft
from conftest import make_tiny
from data.toy import make_model, make_problems, make_tokenizer, plan_of
from model_utils import encode_prompt, shard_model
from plumbing.run import warmup_within
from sft import Config, count_tokens, encode_record, sft_loss

RECORD = {"problem": "A = 4 ; A ?", "answer": "4", "plan": "A needs nothing", "think": "A = 4"}


def test_everything_after_the_prompt_is_supervised_and_the_end_of_turn_is_last():
    tokenizer = make_tokenizer()
    ids, prompt, said = encode_record(tokenizer, RECORD, use_plan=True)
    assert said == []
    assert ids[:prompt] == encode_prompt(tokenizer, RECORD["problem"])
    assert tokenizer.decode(ids[prompt:]) == (
        "<plan> A needs nothing </plan> <think> A = 4 </think> "
        "<answer> \\boxed{ 4 } </answer> <|end|>"
    )
    ids, prompt, _ = encode_record(tokenizer, RECORD, use_plan=False)
    assert tokenizer.decode(ids[prompt:]).startswith("<think> A = 4 </think>")


def test_loss_and_gradient_equal_a_plain_loop_at_any_micro_batch_size(monkeypatch):
    """The fourth row shares two prompt tokens with the first, and two supervised ones."""
    rows = [([5, 9, 13, 2, 44], 2), ([8, 1, 3], 1), ([7] * 9, 8), ([5, 9, 13, 2, 6, 3], 2)]
    rows = [(*row, []) for row in rows]
    total = count_tokens(rows)
    assert total == 3 + 2 + 1 + 4
    computed, pack = [], sft.pack
    count = lambda packed: computed.append(len(packed.ids)) or packed
    monkeypatch.setattr(sft, "pack", lambda *args, **more: count(pack(*args, **more)))
    plain, loss = make_tiny("qwen2"), 0.0
    for ids, prompt, _ in rows:
        logits, targets = plain(torch.tensor([ids])).logits[0], torch.tensor(ids[prompt:])
        loss += torch.nn.functional.cross_entropy(logits[prompt - 1:-1], targets, reduction="sum")
    (loss / total).backward()
    expected = dict(plain.named_parameters())
    for tokens in (1, 12, 1000):
        model, config = shard_model(make_tiny("qwen2")), Config(tokens_per_micro_batch=tokens)
        mean = sft_loss(model, rows, config, train=True)
        assert mean == pytest.approx(float(loss.detach()) / total, rel=1e-5)
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-5), name
    assert computed[-1] == 5 + 3 + 9 + 2  # shared tokens once


@pytest.fixture
def start(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=32, layers=1, heads=2).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    with open(tmp_path / "plans.jsonl", "w") as file:
        for record in make_problems("train", 80, facts=(2, 3)):
            solution = record["solution"]
            record = {**record, "plan": plan_of(solution), "think": solution}
            file.write(json.dumps(record) + "\n")
    return tmp_path


def run(monkeypatch, folder, out, *flags):
    words = ["--model", folder / "start", "--data", folder / "plans.jsonl", "--out", folder / out]
    words += "--batch_size 12 --epochs 3 --lr 1e-2 --warmup_steps 2 --eval_every 5".split()
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, [*words, *flags])])
    sft.main()
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_a_resumed_run_equals_an_undisturbed_one(start, monkeypatch):
    whole = run(monkeypatch, start, "whole")
    # 72 training records, 6 steps per epoch, 3 epochs
    assert [m["step"] for m in whole] == list(range(1, 19))
    assert whole[-1]["loss"] < 0.6 * whole[0]["loss"]
    assert whole[-1]["val_loss"] < whole[4]["val_loss"]

    lr_at = sft.lr_at

    def die_after_step_9(step, *rest):
        if step == 9:
            raise KeyError("killed")
        return lr_at(step, *rest)

    monkeypatch.setattr(sft, "lr_at", die_after_step_9)
    with pytest.raises(KeyError, match="killed"):
        run(monkeypatch, start, "parts", "--save_every", 4)
    monkeypatch.setattr(sft, "lr_at", lr_at)
    parts = run(monkeypatch, start, "parts", "--save_every", 4, "--resume")
    assert [m["step"] for m in parts] == [m["step"] for m in whole]
    assert [m["loss"] for m in parts] == [m["loss"] for m in whole]


def test_too_little_data_is_refused(start, monkeypatch):
    with pytest.raises(SystemExit, match="72 training records are fewer than --batch_size:"):
        run(monkeypatch, start, "out", "--batch_size", 500)


def test_a_short_run_reaches_its_learning_rate(start, monkeypatch, capsys):
    metrics = run(monkeypatch, start, "out", "--epochs", 0.5, "--warmup_steps", 20)
    rates = [m["lr"] for m in metrics]
    assert len(rates) == 3 and max(rates) == 1e-2
    assert "--warmup_steps 20 is too long for 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "steps, asked, taken", [(3, 20, 0), (20, 20, 2), (21, 20, 20), (375, 20, 20), (1, 0, 0)]
)
def test_only_a_warm_up_that_fills_the_run_is_shortened(steps, asked, taken, capsys):
    assert warmup_within(steps, asked) == taken
    assert ("too long" in capsys.readouterr().out) == (taken != asked)
