"""Supervised fine-tuning: what is supervised, the loss by an independent loop, learning, resuming."""
import json
import sys

import pytest
import torch

import sft
from conftest import make_tiny
from data.toy import make_model, make_problems, make_tokenizer, plan_of
from model_utils import encode_prompt, shard_model, warmup_within
from sft import count_tokens, encode_record, sft_loss

RECORD = {"problem": "A = 4 ; A ?", "answer": "4", "plan": "A needs nothing", "think": "A = 4"}


def test_everything_after_the_prompt_is_supervised_and_the_end_of_turn_is_last():
    tokenizer = make_tokenizer()
    ids, prompt = encode_record(tokenizer, RECORD, use_plan=True)
    assert ids[:prompt] == encode_prompt(tokenizer, RECORD["problem"])
    assert tokenizer.decode(ids[prompt:]) == ("<plan> A needs nothing </plan> <think> A = 4 </think> "
                                              "<answer> \\boxed{ 4 } </answer> <|end|>")
    ids, prompt = encode_record(tokenizer, RECORD, use_plan=False)
    assert tokenizer.decode(ids[prompt:]).startswith("<think> A = 4 </think>")


def test_loss_and_gradient_equal_a_plain_loop_at_any_micro_batch_size():
    batch = [([5, 9, 13, 2, 44], 2), ([8, 1, 3], 1), ([7] * 9, 8)]
    total = count_tokens(batch)
    assert total == 3 + 2 + 1
    plain = make_tiny("qwen2")
    loss = sum(torch.nn.functional.cross_entropy(plain(torch.tensor([ids])).logits[0, prompt - 1:-1],
                                                 torch.tensor(ids[prompt:]), reduction="sum") for ids, prompt in batch)
    (loss / total).backward()
    expected = dict(plain.named_parameters())
    for tokens in (1, 12, 1000):
        model = shard_model(make_tiny("qwen2"))
        assert sft_loss(model, batch, total, tokens, "cpu", train=True) == pytest.approx(float(loss.detach()) / total, rel=1e-5)
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-5), name


@pytest.fixture
def start(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=32, layers=1, heads=2).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    records = [{**r, "plan": plan_of(r["solution"]), "think": r["solution"]} for r in make_problems("train", 80, facts=(2, 3))]
    (tmp_path / "plans.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def run(monkeypatch, folder, out, *flags):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--model", str(folder / "start"), "--data", str(folder / "plans.jsonl"),
                                      "--out", str(folder / out), "--batch_size", "12", "--epochs", "3", "--lr", "1e-2",
                                      "--warmup_steps", "2", "--eval_every", "5", *map(str, flags)])
    sft.main()
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_a_resumed_run_equals_an_undisturbed_one(start, monkeypatch):
    whole = run(monkeypatch, start, "whole")
    assert [m["step"] for m in whole] == list(range(1, 19))  # 72 training records, 6 steps an epoch, 3 epochs
    assert whole[-1]["loss"] < 0.6 * whole[0]["loss"] and whole[-1]["val_loss"] < whole[4]["val_loss"]

    def die_after_step_9(step, *rest):
        if step == 9:
            raise KeyError("killed")
        return lr_at(step, *rest)
    lr_at = sft.lr_at
    monkeypatch.setattr(sft, "lr_at", die_after_step_9)
    with pytest.raises(KeyError, match="killed"):
        run(monkeypatch, start, "parts", "--save_every", 4)
    monkeypatch.setattr(sft, "lr_at", lr_at)
    parts = run(monkeypatch, start, "parts", "--save_every", 4, "--resume")
    assert [m["step"] for m in parts] == [m["step"] for m in whole]
    assert [m["loss"] for m in parts] == [m["loss"] for m in whole]


def test_too_little_data_is_refused(start, monkeypatch):
    with pytest.raises(SystemExit, match="72 training records are fewer than --batch_size 500"):
        run(monkeypatch, start, "out", "--batch_size", 500)


def test_a_short_run_reaches_its_learning_rate(start, monkeypatch, capsys):
    rates = [m["lr"] for m in run(monkeypatch, start, "out", "--epochs", 0.5, "--warmup_steps", 20)]
    assert len(rates) == 3 and max(rates) == 1e-2
    assert "--warmup_steps 20 is too long for 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize("steps, asked, taken", [
    (3, 20, 0), (20, 20, 2), (21, 20, 20), (375, 20, 20), (1, 0, 0)])
def test_only_a_warm_up_that_fills_the_run_is_shortened(steps, asked, taken, capsys):
    assert warmup_within(steps, asked) == taken
    assert ("too long" in capsys.readouterr().out) == (taken != asked)
