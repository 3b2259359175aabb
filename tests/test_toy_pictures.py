"""The picture form of linked quantities through every stage, in a short form of its recipe."""

import json
import random
import shutil
import sys

import pytest
import torch

import distill
import eval as evaluation
import grpo
import sft
from conftest import ROOT
from data import toy, toy_pictures

LIMITS = "--max_plan_tokens 30 --max_completion_tokens 60"


def call(monkeypatch, script, flags: str):
    monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
    script.main()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_picture_shows_its_words():
    words = toy_pictures.words_of("E = A + 2 ; A = 4 ; F = E - A ; F ?")
    assert words == ["E =", "A", "+", "2", ";", "A =", "4", ";", "F =", "E", "-", "A", ";"]
    page = toy_pictures.draw(words, random.Random(0), noise=0.0)
    assert page.shape == (8, 8 * 13)
    # "F" as the font has it, light on dark where it is defined: dark on light elsewhere.
    ink = toy_pictures.glyph("F")
    assert ink.tolist()[0] == [1] * 5 and ink.sum() == 5 + 1 + 1 + 4 + 1 + 1 + 1
    defined, plain = page[:, 64:72].astype(int), page[:, 72:80].astype(int)  # "F =" and "E"
    assert (defined > 128).sum() == 64 - ink.sum()
    assert (plain > 128).sum() == toy_pictures.glyph("E").sum()


def test_positions_in_the_model_are_those_of_the_text():
    """Given the embeddings of its words as features, it computes what toy_base does."""
    from transformers import AutoModelForCausalLM

    tokenizer = toy_pictures.make_tokenizer()
    model, base = toy_pictures.make_model(tokenizer), ROOT / "data/toy_base"
    ids = torch.tensor([tokenizer.encode("A = 4 ; F = A + 2 ; F ?")])
    plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    embeds = model.get_input_embeddings()(ids)
    places = torch.arange(ids.shape[1])[None]
    # A line of cells that begins at 5: temporal and row 5, columns from there on.
    rotary = torch.stack([torch.full_like(places, 5), torch.full_like(places, 5), 5 + places])
    own = model(inputs_embeds=embeds, position_ids=rotary).logits
    assert torch.allclose(own[..., : plain.shape[-1]], plain, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Data, a model whose tower has hardly been aligned, and a cold start of two steps."""
    folder, patch = tmp_path_factory.mktemp("pictures"), pytest.MonkeyPatch()
    patch.chdir(ROOT)
    align = toy_pictures.align
    patch.setattr(toy_pictures, "align", lambda *a, steps, seed: align(*a, steps=60, seed=seed))
    call(patch, toy_pictures, f"--out {folder}/data --sft 60 --train 30 --test 12")
    plans = f"{folder}/plans.jsonl"
    call(patch, distill, f"--teacher rule --data {folder}/data/sft.jsonl --out {plans}")
    flags = "--epochs 1 --batch_size 20 --lr 1e-3 --activation_checkpointing false"
    call(patch, sft, f"--model {folder}/data/model --data {plans} --out {folder}/sft {flags}")
    patch.undo()
    return folder


def test_the_cold_start_trains_all_but_the_tower(run):
    assert lines(run / "plans.jsonl")[0]["images"][0].startswith("data/pictures/")
    from transformers import AutoModelForImageTextToText as Kind

    old, new = (Kind.from_pretrained(run / n).state_dict() for n in ("data/model", "sft/model"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "visual" not in name}
    assert (run / "sft/model/preprocessor_config.json").exists()


def test_rl_resumes_to_the_same_figures(run, monkeypatch):
    out = run / "pta"
    flags = f"--model {run}/sft/model --data {run}/data/train.jsonl --out {out} {LIMITS} --lr 1e-3"
    flags += f" --eval_data {run}/data/validation.jsonl --eval_size 4 --eval_every 1 --steps 3"
    flags += " --questions 2 --plans 2 --cots 2 --save_every 2 --show_every 1"
    call(monkeypatch, grpo, flags)
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(m["sampler_gap"] < 1e-4 for m in metrics) and metrics[0]["kl"] < 1e-5
    record = lines(out / "rollouts.jsonl")[0]
    assert record["images"][0].endswith(".png") and record["problem"].startswith("<image> ")
    (out / "model").rename(out / "away")
    call(monkeypatch, grpo, flags + " --resume")
    varying = ("second", "tokens_per_s", "grader")
    same = lambda m: {k: v for k, v in m.items() if not any(part in k for part in varying)}
    assert same(lines(out / "metrics.jsonl")[2]) == same(metrics[2])


def test_evaluation_and_its_page(run, monkeypatch, tmp_path):
    from report.__main__ import main as report

    for n in (1, 2):
        flags = f"--model {run}/sft/model --data {run}/data/test.jsonl --out {run}/eval{n} {LIMITS}"
        call(monkeypatch, evaluation, f"{flags} --n {n} --temperature 0 --limit 6")
    one, two = (lines(run / f"eval{n}/records.jsonl") for n in (1, 2))
    # Greedy completions do not depend on what is decoded beside them.
    texts = [[r["samples"][0]["completion"] for r in records] for records in (one, two)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--out", str(tmp_path / "page.html")])
    report()
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") >= 6


def test_dry_run_and_refusals(run, monkeypatch, capsys, tmp_path):
    start = f"--model {run}/data/model --data {run}/data/train.jsonl --out {tmp_path}/x"
    call(monkeypatch, grpo, f"{start} --dry_run --max_pixels 640")
    said = capsys.readouterr().out
    assert "image tokens per picture, at most   10\n" in said
    with pytest.raises(SystemExit, match="--freeze_vision false is not supported"):
        call(monkeypatch, grpo, f"{start} --freeze_vision false")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="--tp 2 does not know how to cut the family"):
        call(monkeypatch, grpo, f"{start} --tp 2")
    monkeypatch.delenv("WORLD_SIZE")
    start = start.replace(f"{run}/data/model", str(ROOT / "data/toy_base"))
    with pytest.raises(SystemExit, match="the data have pictures, and this model sees none"):
        call(monkeypatch, grpo, start)


def test_the_text_form_has_the_same_problems(run):
    records = lines(run / "data/test.jsonl")
    texts = toy.make_problems("test", 12, seed=0)
    assert [r["answer"] for r in records] == [t["answer"] for t in texts]
    assert records[0]["problem"] == "<image> " + texts[0]["problem"].rpartition(" ; ")[2]
    assert not any("solution" in record for record in records)


def test_on_a_pretended_gpu(run, tmp_path):
    """bf16, FSDP2 with weights in CPU memory, CUDA graphs and split-KV (pretend_gpu.py)."""
    from test_gpu import on_gpu
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(run / "data/model", tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.text_config.num_key_value_heads = 4  # of 8: grouped
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --data {run}/data/train.jsonl --out {tmp_path}/x {LIMITS}"
    flags += " --eval_size 0 --questions 2 --plans 2 --cots 2 --steps 1 --lr 1e-3 --cpu_offload"
    used = on_gpu("grpo.py", *flags.split())
    assert used["split_kv"] >= 3 * used["replays"] > 60
    steps = lines(tmp_path / "x/metrics.jsonl")
    assert all(0 < step["sampler_gap"] < 0.02 for step in steps)  # nats per token, from bf16
    kept = [AutoModelForImageTextToText.from_pretrained(p).model.visual.state_dict()
            for p in (tmp_path / "model", tmp_path / "x/model")]
    assert all(torch.equal(old.bfloat16(), kept[1][n].bfloat16()) for n, old in kept[0].items())
