"""What bench.step_model counts: so a change that makes a step slower on a GPU is seen on a CPU."""

import json
import types

import pytest
import torch

from bench import gpu_counts, step_model
from bench.gpu_counts import count_decode, count_draw, count_update, whole
from bench.gpu_trace import (
    HostTraffic,
    Question,
    Step,
    Trace,
    copies_of_a_move,
    dealt,
    decode_traffic,
    draw_questions,
    mean_tokens,
    sequences,
)
from bench.step_model import GPU, Constants, Rollout, load_shape, read_constants, thin
from conftest import ROOT
from plumbing.attention import pack

CPU = torch.device("cpu")
QWEN = load_shape("qwen2.5_7b")
# Qwen2.5-7B by hand: numbers in a block's matrices (q and o, k and v, three of the MLP), and a head
BLOCK = 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944
HEAD = 152064 * 3584

# --------------------------------------------------------------------------------------------------
# Kernels and bytes of a decode step


SMALL = [("qwen2.5_7b", 19), ("llama3.2_3b", 19), ("qwen3_14b", 21)]


@pytest.mark.parametrize("name, bound", SMALL)
def test_small_kernels_of_a_decoding_block(name, bound):
    """Without fused norms there would be 14 more in each, and 28 more in Qwen3's.

    19 are 2 norms, 10 of the rotation, 2 writes to the cache, 2 residual sums, 2 of the MLP and
    1 copy of attention's output. Qwen3 adds two norms.
    """
    one, two = (count_decode(load_shape(name), blocks, 192) for blocks in (1, 2))
    assert two.small - one.small <= bound
    assert two.kinds.total() - one.kinds.total() == 1  # attention is one kernel


def test_a_decode_step_reads_each_weight_once():
    """28 blocks of 7 products each, and the head: 14.14 GB; activations of 8 rows are small."""
    counts = whole(*(count_decode(QWEN, blocks, 8) for blocks in (1, 2)), 28)
    weights = 2 * (28 * BLOCK + HEAD)
    assert counts.products.total() == 197
    assert weights < sum(size * n for (size, _), n in counts.products.items()) < 1.01 * weights
    assert counts.flops() == 8 * weights  # 2 FLOPs per weight and row, 2 bytes per weight


def test_what_one_of_four_gpus_reads_of_a_thinner_model():
    counts = whole(*(count_decode(thin(QWEN, 4), blocks, 8) for blocks in (1, 2)), 28)
    assert counts.flops() == 8 * 2 * (28 * BLOCK // 4 + HEAD)
    with pytest.raises(SystemExit, match="does not divide num_attention_heads"):
        thin(QWEN, 8)


def test_bytes_of_drawing_a_token():
    """Logits in bf16 to fp32 and a division, softmax, its exponent, a padded copy, a sum: 42.

    A byte count per logit: 2 + 4, 4 + 4, 4 + 4, 4 + 4, 4 + 4 and 4.
    """
    counts = count_draw(QWEN, 192)
    assert 42 <= counts.small_bytes / (192 * 152064) < 42.5


# --------------------------------------------------------------------------------------------------
# An update


@pytest.fixture(scope="module")
def packed():
    """Two completions of one prompt: 100 + 300 + 300 tokens, padded places 2 x 400."""
    rows = [[1] * 100 + [token] * 300 for token in (2, 3)]
    return pack(rows, [100, 100], CPU)


@pytest.mark.parametrize(
    "checkpointing, grad, passes", [(True, True, 4), (False, True, 3), (True, False, 1)]
)
def test_products_of_a_training_block_by_hand(packed, checkpointing, grad, passes):
    """A backward pass is two forward passes; recomputing is one more, but for the last product.

    The head is always recomputed.
    """
    one, two = (count_update(QWEN, n, packed, checkpointing, grad) for n in (1, 2))
    spared = 3584 * 18944 if passes == 4 else 0  # torch stops where the last saved tensor is made
    assert two.flops() - one.flops() == 2 * 700 * (passes * BLOCK - spared)
    assert 2 * one.flops() - two.flops() == (4 if grad else 1) * 2 * HEAD * 600
    # 28 heads of width 128; four FLOPs per pair, of which half are seen; backward is 2.5 times it.
    pairs = {4: 4.5, 3: 3.5, 1: 1}[passes] * 2 * 2 * 28 * 400**2 * 128
    assert two.attention - one.attention == pairs


KEPT, RECOMPUTED = (False, 84, 1.24), (True, 110, 1.63)


@pytest.mark.parametrize("checkpointing, kernels, megabytes", [KEPT, RECOMPUTED])
def test_bytes_outside_of_products_of_a_training_block(packed, checkpointing, kernels, megabytes):
    """Per token. An unfused norm would read and write some 0.3 MB of these per pass."""
    one, two = (count_update(QWEN, n, packed, checkpointing) for n in (1, 2))
    assert two.small - one.small <= kernels
    assert (two.small_bytes - one.small_bytes) / 700 <= megabytes * 1e6


# --------------------------------------------------------------------------------------------------
# A rollout


def test_a_trace_by_hand():
    """Plans of 3 and 5 tokens; completions of 6 and 9, and of 7 and 12. The prompt has 10."""
    question = Question([7] * 10, [3, 5], [[6, 9], [7, 12]])
    steps = Trace(QWEN, [question], 64, 1e9).run()
    rows = [2, 2, 2, 3, 3, 4, 3, 2, 2, 1, 1, 1]
    assert [step.rows for step in steps] == rows
    assert [step.own for step in steps] == [n * (10 + i) for i, n in enumerate(rows)]
    assert steps[0].prompts == 9  # the last prompt token is the first step's
    assert sum(step.captured for step in steps) == 1


@pytest.fixture(scope="module")
def steps():
    """A rank's rollout of 6 questions, with enough memory for all, of up to 600 tokens."""
    return Trace(QWEN, draw_questions(6, 400, 600), 600, 55e9).run()


def test_a_rollout_takes_as_many_steps_as_its_longest_completion(steps):
    assert len(steps) == 600
    assert max(step.rows for step in steps) > 48


def test_graphs_and_places_of_a_rollout(steps):
    """Graphs for 8, 16, 32 and 64 rows; under a mask also for lengths, in steps of 256."""
    masked = any(places for _, places in {step.graph for step in steps})
    most, waste = (12, 1.9) if masked else (8, 1.0)
    assert len({step.graph for step in steps}) == sum(step.captured for step in steps) <= most
    assert 1 <= sum(step.read for step in steps) / sum(step.own for step in steps) <= waste


def test_copies_between_host_and_gpu_in_a_decode_step():
    """Ids and positions go up, tokens and logprobs come down."""
    assert decode_traffic() <= 4


def test_copies_between_host_and_gpu_when_slots_move():
    assert copies_of_a_move(3) <= 12


def test_host_traffic_sees_copies_and_waits():
    with HostTraffic() as host:
        total = torch.tensor([1.0, 2.0]).sum()
        bool(total > 1), float(total), total.tolist()
    assert host.count.total() == 4


# --------------------------------------------------------------------------------------------------
# The workload


def test_the_mean_is_that_of_the_completions_after_the_cut():
    questions = draw_questions(32, 1460, 3584)
    assert mean_tokens(questions) == pytest.approx(1460, rel=0.002)
    assert max(t for q in questions for part in q.totals for t in part) == 3584


def test_sequences_share_prompts_and_plans():
    rows = sequences([Question([7] * 10, [3, 5], [[6, 9], [7, 12]])])
    assert [len(row) for row in rows] == [16, 19, 17, 22]
    assert rows[0][:13] == rows[1][:13] != rows[2][:13]
    assert len(pack(rows, [10] * 4, CPU).ids) == 10 + 3 + 3 + 6 + 5 + 2 + 7


def test_questions_are_dealt_out_by_tokens():
    large, small = (Question([1] * 10, [5], [[n] * 3]) for n in (105, 15))
    hands, imbalance = dealt([large, small, large, small], 2)  # rank 0 has sampled both large ones
    assert [sorted(len(q.totals[0]) and q.totals[0][0] for q in hand) for hand in hands] == [
        [15, 105], [15, 105]
    ]
    assert imbalance == 1


# --------------------------------------------------------------------------------------------------
# Seconds, with round constants


def round_model(**flags) -> Rollout:
    """10 bytes/s and 100 FLOP/s at full use, on a GPU of four multiprocessors."""
    model = object.__new__(Rollout)
    model.c = Constants(
        decode_memory=1.0, decode_products=1.0, product_us=2e6, masked_memory=0.5, masked_block=1.0,
        varlen_memory=1.0, attention_us=1e6, link=8.0, all_reduce_us=1e6,
    )
    model.gpu, model.layers, model.kv, model.tp = GPU(10.0, 100.0, 1e9, blocks=4), 3, 20, 2
    model.config = types.SimpleNamespace(num_key_value_heads=2, hidden_size=4)
    return model


def test_seconds_by_hand():
    model = round_model()
    counts = gpu_counts.Counts()
    counts.products.update({(50, 100): 2, (10, 1000): 1, (1, 1): 3})
    assert model.products(counts) == 2 * 5 + 10 + 3 * 2  # by bytes, by FLOPs, too short for either
    step = Step(rows=3, own=9, graph=(4, 5))
    model.varlen = True
    assert model.attention(step) == 9 * 20 / 10 + 2 * 3
    model.varlen = False
    # 8 blocks run at once: 4 x 5 places of 20 bytes at 5 bytes/s. One block would read 5 x 10.
    assert model.attention(step) == 80 + 3
    assert model.attention(Step(1, 5, graph=(1, 5))) == 50 + 3
    # 6 all-reduces of 4 rows x 4 numbers: 2 x 1/2 x 32 bytes at 8 bytes/s, and a start of 1 s
    assert model.all_reduces(4) == 6 * (1 + 4)


def test_measured_constants_replace_the_chosen_ones(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"constants": {"small_us": 2.5}}))
    assert read_constants(str(file)).small_us == 2.5
    file.write_text(json.dumps({"constants": {"speed": 1}}))
    with pytest.raises(SystemExit, match="unknown constants"):
        read_constants(str(file))
    with pytest.raises(SystemExit, match="bench.gpu"):
        read_constants(str(tmp_path / "none"))


def test_the_table_says_that_it_is_an_estimate(monkeypatch, capsys):
    """Its parts add up to a step."""
    line = "model --model data/toy_base --gpu H100 --gpus 2 --questions 4 --mean 100"
    monkeypatch.setattr("sys.argv", [*line.split(), "--max_completion_tokens", "200"])
    monkeypatch.chdir(ROOT)
    step_model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("An ESTIMATE; its constants are chosen, not measured")
    lines = dict(row.strip("| ").split(" | ") for row in printed.splitlines() if " | " in row)
    assert lines["decode steps"] == "200"
    parts = ["rollout, slowest rank", "reference logprobs", "update", "grading, optimiser, log"]
    total = sum(float(lines[part].strip("*")) for part in parts)
    assert float(lines["step"].strip("*")) == pytest.approx(total, abs=2)
