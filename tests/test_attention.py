"""attention.py: packed sequences and sliding windows against unpadded forwards, with transformers' own attention."""
import pytest
import torch

from attention import pack
from conftest import FAMILIES, make_tiny
from grpo import sample
from model_utils import shard_model

SEQUENCES = [[5, 9, 13, 2, 44], [5, 9, 13, 7, 8, 11], [5, 9, 3], [5, 9, 3], [8, 1, 3], [7] * 9]
STARTS = [2, 2, 2, 2, 1, 8]  # lengths of the prompts


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_equal_each_sequence_alone(family, share):
    """Ragged sequences, some with a beginning in common and two equal, against unpadded forwards with full logits."""
    model = make_tiny(family)
    dense = [(model(torch.tensor([s])).logits[0, :-1].detach() / 0.7).log_softmax(-1) for s in SEQUENCES]
    shard_model(model)
    packed = pack(SEQUENCES, STARTS, torch.device("cpu"), share)
    assert len(packed.ids) == (5 + 3 + 1 + 3 + 9 if share else 29)
    assert packed.mask.sum(1).tolist() == [3, 4, 1, 1, 2, 1]
    for chunk in (1, 4, None):
        logprobs, entropy = model.token_logprobs(packed, temperature=0.7, chunk=chunk)
        assert logprobs.shape == entropy.shape == (6, 8) and bool((logprobs[~packed.mask] == 0).all())
        for row, sequence in enumerate(SEQUENCES):
            for t in range(STARTS[row], len(sequence)):
                alone = dense[row][t - 1]
                assert float(logprobs[row, t - 1].detach()) == pytest.approx(float(alone[sequence[t]]), abs=1e-5)
                assert float(entropy[row, t - 1]) == pytest.approx(float(-(alone.exp() * alone).sum()), abs=1e-5)


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
    logprobs, _ = shard_model(model).token_logprobs(pack(SEQUENCES, STARTS, torch.device("cpu"), share), chunk=2)
    (logprobs * weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5 * float(expected[name].abs().max().clamp_min(1))), name


def test_sequences_attend_with_others_of_like_length_and_no_more_padding_than_a_quarter():
    lengths = [100, 99, 80, 79, 64, 63, 10, 8, 7]  # a new group begins below 0.8 of a group's longest
    packed = pack([[5 + i] * n for i, n in enumerate(lengths)], [1] * 9, torch.device("cpu"))
    assert [tuple(slots.shape) for slots in packed.slots] == [(3, 100), (2, 79), (1, 63), (2, 10), (1, 7)]
    flat = torch.cat([slots.flatten() for slots in packed.slots])
    assert flat[packed.owner].tolist() == list(range(sum(lengths)))  # each token is taken from a place where it stands


def test_sliding_windows_are_kept_when_packed_and_when_decoded():
    """Mistral's layers see their last 4 positions only; transformers' own attention is the reference."""
    model = make_tiny("mistral", sliding_window=4)
    with torch.no_grad():
        greedy = [3, 50, 4, 60, 5]
        for _ in range(9):
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
        dense = model(torch.tensor([greedy])).logits[0, :-1].log_softmax(-1)
        logprobs, _ = shard_model(model).token_logprobs(pack([greedy], [1], torch.device("cpu")))
    assert torch.allclose(logprobs[0], dense[range(13), greedy[1:]], atol=1e-5)
    assert sample(model, [greedy[:5]], max_new_tokens=9, temperature=0.0, stop_ids=[])[0] == [greedy[5:]]


def test_padded_batches_still_work_under_our_attention():
    """model.generate with left padding goes through the same attention function."""
    model = make_tiny("qwen2")
    ids, mask = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    draw = lambda: model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=96)
    expected = draw()
    assert torch.equal(shard_model(model).generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False,
                                                   eos_token_id=96), expected)


def test_an_architecture_that_drops_arguments_is_refused(tiny):
    model = shard_model(make_tiny("qwen2"))
    model.get_decoder().register_forward_pre_hook(lambda m, args, options: (args, {**options, "packed": None}), with_kwargs=True)
    with pytest.raises(SystemExit, match="cannot train packed"):
        model.token_logprobs(pack(SEQUENCES, STARTS, torch.device("cpu")))


def test_an_empty_micro_batch_still_reaches_every_parameter():
    model = shard_model(make_tiny("qwen2"))
    packed = pack([], [], torch.device("cpu"))
    assert not packed.mask.any()
    model.token_logprobs(packed)[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
