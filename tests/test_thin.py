"""--tp: rollouts on a thinner model, on gloo ranks, against the same model whole.

Run as a script, with a folder, this file leaves there what the tests compare: it forks into four
ranks that measure, and then into two that train until one of them gets a stop signal.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_grpo import fake_rollouts

import grpo
import plumbing.decoder
import plumbing.thin
from conftest import ROOT, make_tiny
from data.toy import make_model, make_problems, make_tokenizer
from grpo import Config, make_micro_batches, sample, sample_tree, update
from model_utils import make_optimizer, shard_model, unsharded
from plumbing.checkpoint import damage
from plumbing.memory import estimate
from plumbing.ranks import all_gather, init_distributed, rank, world_size
from plumbing.signals import StopSignal, guarded
from plumbing.thin import check_tp
from plumbing.weights import load_config

# --------------------------------------------------------------------------------------------------
# On four ranks: what the script measures

# All biases that a llama may have: those of o_proj and down_proj must not be added N times.
FAMILIES = {"qwen2": {}, "qwen3": {}, "llama": dict(attention_bias=True, mlp_bias=True)}
TREE = dict(plans=2, cots=2, max_plan_tokens=5, max_completion_tokens=10)


TPS = (1, 2, 4)


def make_family(family: str):
    """Eight heads on four key heads, so that four ranks can share them. No weight is 0 or 1."""
    config = make_tiny(family, **FAMILIES[family]).config
    config.num_attention_heads, config.num_key_value_heads = 8, 4
    torch.manual_seed(0)
    model = type(make_tiny(family))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.3)
    return model


def greedy_trees(model) -> list:
    """Ids and logprobs of this rank's plan trees. The ranks have 0 to 3 prompts."""
    prompts = [[5, 6 + n, 7 + rank()] + [9] * n for n in range(rank())]
    config, closed = Config(temperature=0.5, **TREE), lambda ids: ids[-1] % 3 == 0
    options = dict(plan_closed=closed, stop_ids=[1], seed=rank())
    if not prompts and not hasattr(model, "lockstep"):
        return []
    trees = sample_tree(model, prompts, replace(config, temperature=0.0), **options)
    return [[(r.ids, r.logprobs, r.plan_tokens) for r in tree] for tree in trees]


def trees_on(family: str, tp: int) -> dict:
    """All ranks' greedy trees by 1/tp of a model, and what is the same on all ranks of a group.

    With qwen2, rank 3 has memory for four rows only.
    """
    model = shard_model(make_family(family))
    with pytest.MonkeyPatch.context() as patch, unsharded(model, tp) as sampler:
        if rank() == 3 and family == "qwen2":
            room = 64 * plumbing.decoder.cache_bytes(sampler.config, torch.float32) + 48 * 97
            patch.setattr(plumbing.decoder, "free_memory", lambda device: 9 * room)  # half is used
        trees = all_gather(greedy_trees(sampler))
        slots = all_gather(getattr(sampler, "kv_cache", None) and sampler.kv_cache.slots)
        numbers = sum(parameter.numel() for parameter in sampler.parameters())
    # Random draws: each rank has a seed of its own, and draws for some of the rows.
    with unsharded(model, tp) as sampler:
        options = dict(n=5, max_new_tokens=7, stop_ids=[1], seed=rank())
        drawn = all_gather(sample(sampler, [[3, 4], [5]], **options))
    return {"trees": trees, "slots": slots, "drawn": drawn, "numbers": numbers}


def train_on(tp: int) -> dict:
    """Two updates on fixed rollouts, each after a rollout by 1/tp of the model."""
    config = Config(kl_coef=0.0, tokens_per_micro_batch=40, tp=tp, **TREE)
    model = shard_model(make_family("qwen2"))
    optimizer = make_optimizer(model, 1e-3, 0.01)
    figures, trees = [], []
    for _ in range(2):
        with unsharded(model, tp) as sampler:
            trees.append(all_gather(greedy_trees(sampler)))
        micros = make_micro_batches(fake_rollouts(9)[rank()::world_size()], config, model.device)
        metrics = update(model, optimizer, micros, config, 1e-3)
        figures.append([metrics[name] for name in ("loss", "grad_norm", "entropy")])
    weights = [p.full_tensor().flatten().tolist() for p in model.parameters()]
    return {"figures": figures, "weights": sum(weights, []), "trees": trees}


def refusal_with(**broken) -> str:
    """What is said of a thinner model where parts of plumbing/thin.py are broken."""
    model = shard_model(make_family("llama"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in broken.items():
            patch.setattr(plumbing.thin, name, value)
        try:
            with unsharded(model, 2):
                return "nothing"
        except SystemExit as error:
            return str(error)


class NoSum(plumbing.thin.Lockstep):
    def add_up(self, module, inputs, output):
        return output


def every_bias(name, whole, number, tp, cut=plumbing.thin.cut):
    """`cut`, but o_proj and down_proj keep their bias on every rank."""
    return cut(name, whole, 0 if whole.ndim == 1 and "self_attn.o" in name else number, tp)


def measure(folder: Path):
    init_distributed("cpu")
    cases = [(family, tp) for family in FAMILIES for tp in TPS]
    found = {f"{family} {tp}": trees_on(family, tp) for family, tp in cases}
    found |= {f"train {tp}": train_on(tp) for tp in (1, 2)}
    refusals = {"no sum": refusal_with(Lockstep=NoSum), "biases": refusal_with(cut=every_bias)}
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps({**found, **refusals}))


def train_and_stop(folder: Path):
    """A training run with --tp 2. Rank 1 gets SIGTERM at the fifth token of the third rollout."""
    draw, sample_token, counts = grpo.draw, grpo.sample_token, []

    def note_rollout(*args):
        counts.append(0)
        return draw(*args)

    def note_token(*args):
        if counts:  # else an evaluation
            counts[-1] += 1
        if rank() == 1 and len(counts) == 3 and counts[-1] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample_token(*args)

    grpo.draw, grpo.sample_token = note_rollout, note_token
    sys.argv = ["grpo.py", "--model", f"{folder}/model", "--data", f"{folder}/train.jsonl", *RUN]
    sys.argv += ["--out", f"{folder}/run"]
    try:
        grpo.main()
    finally:
        (folder / f"counts{rank()}.json").write_text(json.dumps(counts))


RUN = """--tp 2 --steps 5 --questions 2 --plans 2 --cots 2 --max_plan_tokens 10 --lr 1e-3
--max_completion_tokens 16 --kl_coef 0 --eval_every 1 --eval_size 1 --keep 0""".split()


def on_ranks(count: int, work, folder: Path) -> list[int]:
    """The exit codes of that many forks of this process, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(count))
    children = []
    for number in range(count):
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(120)  # the end of ranks that wait for each other
            os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE="2")
            guarded(lambda: work(folder))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


# --------------------------------------------------------------------------------------------------
# Tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the script left: found.json, codes.json, counts0.json, counts1.json, run/."""
    folder, tokenizer = tmp_path_factory.mktemp("thin"), make_tokenizer()
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = make_problems("train", 40, facts=(2, 3))
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = dict(env=environment, capture_output=True, text=True, timeout=240)
    done = subprocess.run([sys.executable, __file__, str(folder)], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    assert read(folder / "codes.json")[0] == [0, 0, 0, 0], (folder / "said.txt").read_text()[-3000:]
    return read(folder / "found.json")


def read(path: Path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_thinner_models_sample_the_same_greedy_trees(found, family, tp):
    """Each rank gets those of its own prompts, of which it has 0 to 3."""
    ours, theirs = found[f"{family} {tp}"], found[f"{family} 1"]
    assert [len(trees) for trees in ours["trees"]] == [0, 1, 2, 3]
    flat = lambda side: [r for trees in side["trees"] for tree in trees for r in tree]
    assert any(plan_tokens for _, _, plan_tokens in flat(theirs))  # some plans branch
    for ours_one, theirs_one in zip(flat(ours), flat(theirs), strict=True):
        assert ours_one[::2] == theirs_one[::2]
        assert ours_one[1] == pytest.approx(theirs_one[1], abs=1e-4)
    assert ours["numbers"] < theirs["numbers"] * (0.61 if tp == 2 else 0.41)  # embeddings are whole


@pytest.mark.parametrize("tp", [2, 4])
def test_a_group_agrees_on_slots_and_on_what_is_drawn(found, tp):
    """Rank 3 has room for four rows only, and every rank has another seed."""
    ours, whole = found[f"qwen2 {tp}"], found["qwen2 1"]
    assert ours["slots"] == [4] * 4 and whole["slots"] == [None, 4, 8, 4]
    for number in range(4):
        assert ours["drawn"][number] == ours["drawn"][number - number % tp]
    (ids, logprobs), model = ours["drawn"][0], make_family("qwen2")
    assert len({tuple(row) for row in ids}) > 5
    for i, row in enumerate(ids):  # the logprobs are those of the tokens
        prompt = [[3, 4], [5]][i // 5]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1:-1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(row)[:, None])[:, 0]
        assert logprobs[i] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_training_step_does_not_notice(found):
    ours, theirs = found["train 2"], found["train 1"]
    for step in range(2):  # loss, gradient norm, entropy
        assert ours["figures"][step] == pytest.approx(theirs["figures"][step], abs=1e-5)
    assert ours["weights"] == pytest.approx(theirs["weights"], abs=1e-5)
    ids = lambda trees: [[[r[0] for r in tree] for tree in own] for own in trees]
    first, second = (ids(trees) for trees in ours["trees"])
    assert [first, second] == [ids(trees) for trees in theirs["trees"]]
    assert first != second  # the second rollout has seen the first update


@pytest.mark.parametrize("what", ["no sum", "biases"])
def test_parts_that_do_not_add_up_to_the_model_are_refused(found, what):
    assert "--tp 2 computes other logits than the whole model does" in found[what]


def test_a_signal_to_one_rank_stops_its_group_at_the_same_token(folder):
    """And an evaluation of one problem, which leaves rank 1 without any, does not hang."""
    said = (folder / "said.txt").read_text()
    assert read(folder / "codes.json")[1] == [75, 75], said[-3000:]
    counts = [read(folder / f"counts{number}.json") for number in (0, 1)]
    assert counts[0] == counts[1] and len(counts[0]) == 3 and counts[0][2] == 5
    assert "stopped by SIGTERM after step 2" in said
    assert damage(folder / "run/step_2") is None
    logged = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in logged] == [1, 2]
    assert all(m["sampler_gap"] < 1e-4 for m in logged)


def test_in_lockstep_a_signal_is_only_noted():
    stop = StopSignal()

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        return StopSignal.heeded and StopSignal.came

    assert stop.unless_stopped(work, lockstep=True) is True and not StopSignal.heeded
    assert stop.unless_stopped(lambda: 1, lockstep=True) == 1  # its ranks have to agree first


def refusal_of(path, tp: int) -> str:
    try:
        check_tp(Config(model=str(path), tp=tp))
    except SystemExit as error:
        return str(error)


def test_what_cannot_be_cut_is_refused_before_weights_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    shapes = ROOT / "recipes/shapes"
    assert refusal_of(shapes / "qwen2.5_7b", 4) is refusal_of(shapes / "qwen3_14b", 8) is None
    sizes = r"heads 28, key heads 4, MLP width 18944\): take one of 1, 2, 4$"
    assert re.search(sizes, refusal_of(shapes / "qwen2.5_7b", 8))
    assert "must divide the number of ranks, 8" in refusal_of(shapes / "qwen2.5_7b", 3)
    for family in ("mistral", "olmo2", "gpt_neox", "mixtral"):
        make_tiny(family).config.save_pretrained(tmp_path / family)
        said = refusal_of(tmp_path / family, 2)
        assert said is None if family == "mistral" else f"cut the family '{family}'" in said


def test_memory_of_a_thinner_model_by_hand():
    config = load_config(str(ROOT / "recipes/shapes/qwen3_14b"))
    options = dict(ranks=8, prompt_tokens=1024, completion_tokens=3584, micro_tokens=1024)
    whole, thin = (estimate(config, rows=192 * tp, tp=tp, **options) for tp in (1, 8))
    # Embedding and output layer, 151,936 x 5,120 each, and 81 norms of 5,120 stay whole, like 40
    # pairs of head norms of 128.
    kept = 2 * 151936 * 5120 + 81 * 5120 + 40 * 2 * 128
    cut = (whole["parameters"] - kept) / 8
    assert thin["gathered for rollout"] == 2 * (kept + cut)
    assert thin["KV cache"] == whole["KV cache"]  # eight times the rows, an eighth of the heads
    assert thin["update"] == whole["update"] and thin["parameters"] == whole["parameters"]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    codes = [on_ranks(4, measure, out), on_ranks(2, train_and_stop, out)]
    (out / "codes.json").write_text(json.dumps(codes))
