"""plumbing/attention.py: packed sequences and sliding windows against unpadded forwards.

The unpadded forwards use transformers' own attention.
"""

import re

import pytest
import torch

from conftest import FAMILIES, make_tiny
from grpo import sample
from model_utils import shard_model
from plumbing.attention import Packed, pack

CPU = torch.device("cpu")
SEQUENCES = [[5, 9, 13, 2, 44], [5, 9, 13, 7, 8, 11], [5, 9, 3], [5, 9, 3], [8, 1, 3], [7] * 9]
STARTS = [2, 2, 2, 2, 1, 8]  # lengths of the prompts


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_equal_each_sequence_alone(family, share):
    """Sequences of all lengths, some with a beginning in common and two equal.

    They are compared with unpadded forwards and full logits.
    """
    model, dense = make_tiny(family), []
    for sequence in SEQUENCES:
        logits = model(torch.tensor([sequence])).logits[0, :-1].detach()
        dense.append((logits / 0.7).log_softmax(-1))
    shard_model(model)
    packed = pack(SEQUENCES, STARTS, CPU, share)
    assert len(packed.ids) == (5 + 3 + 1 + 3 + 9 if share else 29)
    assert packed.mask.sum(1).tolist() == [3, 4, 1, 1, 2, 1]
    for chunk in (1, 4, None):
        logprobs, entropy = model.token_logprobs(packed, temperature=0.7, chunk=chunk)
        assert logprobs.shape == entropy.shape == (6, 8)
        assert bool((logprobs[~packed.mask] == 0).all())
        for row, sequence in enumerate(SEQUENCES):
            for t in range(STARTS[row], len(sequence)):
                alone = dense[row][t - 1]
                found = float(logprobs[row, t - 1].detach()), float(entropy[row, t - 1])
                wanted = float(alone[sequence[t]]), float(-(alone.exp() * alone).sum())
                assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradient_equals_each_sequence_alone(family, share):
    model = make_tiny(family)
    weights = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for row, sequence in enumerate(SEQUENCES):
        dense = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
        for t in range(STARTS[row], len(sequence)):
            (weights[row, t - 1] * dense[t - 1, sequence[t]]).backward(retain_graph=True)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    packed = pack(SEQUENCES, STARTS, CPU, share)
    logprobs, _ = shard_model(model).token_logprobs(packed, chunk=2)
    (logprobs * weights).sum().backward()
    for name, parameter in model.named_parameters():
        tolerance = 1e-5 * float(expected[name].abs().max().clamp_min(1))
        assert torch.allclose(parameter.grad, expected[name], atol=tolerance), name


def test_sequences_of_similar_length_attend_together_with_little_padding():
    lengths = [100, 99, 80, 79, 64, 63, 10, 8, 7]  # below 0.8 of a group's longest a new one begins
    packed = pack([[5 + i] * n for i, n in enumerate(lengths)], [1] * 9, CPU)
    shapes = [tuple(places.shape) for places in packed.places]
    assert shapes == [(3, 100), (2, 79), (1, 63), (2, 10), (1, 7)]
    flat = torch.cat([places.flatten() for places in packed.places])
    # Each token is taken from a place that is its own.
    assert flat[packed.owner].tolist() == list(range(sum(lengths)))


def test_the_example_in_packeds_docstring_is_right():
    packed = pack([[50, 90, 70, 60, 10], [50, 90, 80, 10]], [2, 2], CPU)
    lines = re.findall(r"^ {8}(\w+) +(\d[\d /]*?)(?:  |$)", Packed.__doc__, re.MULTILINE)
    assert len(lines) == 8
    for name, digits in lines:
        shown = [list(map(int, row.split())) for row in digits.split("/")]
        value = getattr(packed, name)
        value, = value if isinstance(value, list) else [value]  # one group
        assert value.long().tolist() == (shown if value.ndim == 2 else shown[0]), name


def test_sliding_windows_are_kept_when_packed_and_when_decoded():
    """Mistral's layers see their last 4 positions only, as in transformers' own attention."""
    model = make_tiny("mistral", sliding_window=4)
    with torch.no_grad():
        greedy = [3, 50, 4, 60, 5]
        for _ in range(9):
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
        dense = model(torch.tensor([greedy])).logits[0, :-1].log_softmax(-1)
        logprobs, _ = shard_model(model).token_logprobs(pack([greedy], [1], CPU))
    assert torch.allclose(logprobs[0], dense[range(13), greedy[1:]], atol=1e-5)
    ids, _ = sample(model, [greedy[:5]], max_new_tokens=9, temperature=0.0, stop_ids=[])
    assert ids == [greedy[5:]]


def test_padded_batches_still_work_under_our_attention():
    """model.generate with left padding goes through the same attention function."""
    model = make_tiny("qwen2")
    ids = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=96)
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)
    found = shard_model(model).generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(found, expected)


def test_an_architecture_that_drops_arguments_is_refused():
    model = shard_model(make_tiny("qwen2"))
    drop = lambda module, args, options: (args, {**options, "packed": None})
    model.get_decoder().register_forward_pre_hook(drop, with_kwargs=True)
    message = "hands no arguments on to its attention layers, .* choose another model for training"
    with pytest.raises(SystemExit, match=message):
        model.token_logprobs(pack(SEQUENCES, STARTS, CPU))


def test_an_empty_micro_batch_still_reaches_every_parameter():
    model = shard_model(make_tiny("qwen2"))
    packed = pack([], [], CPU)
    assert not packed.mask.any()
    model.token_logprobs(packed)[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
