"""Does training compute the same logprobs as the model's own forward, which samples?"""

from collections.abc import Callable

import torch

from plumbing.attention import pack
from plumbing.ranks import require


@torch.no_grad()
def check_family(model, logits_of: Callable):
    """Refuse a family whose own forward, which samples, computes otherwise than training does.

    Two short sequences go through that forward, and packed through `token_logprobs`, whose logits
    are `logits_of(model, hidden)`. A collective. Raises SystemExit, and names the family, where
    logits or logprobs differ by more than rounding.
    """
    size, device, seen = model.config.get_text_config().vocab_size, model.compute_device, []
    rows = [[token % size for token in row] for row in ([0, 1, 2, 3, 4], [0, 1, 5, 6, 7])]
    ids = torch.tensor(rows, device=device)

    def note(decoder, inputs, output):  # inside the forward, FSDP has gathered the output layer
        hidden = output.last_hidden_state
        seen.extend([hidden.dtype, logits_of(model, hidden)])

    hook = model.get_decoder().register_forward_hook(note)
    own = model(input_ids=ids, use_cache=False).logits.float()  # (2, 5, V)
    hook.remove()
    ours, _ = model.token_logprobs(pack(rows, [1, 1], device))  # (2, 4)
    if hasattr(model, "reshard"):  # FSDP2 keeps the root gathered for a backward pass: none comes
        model.reshard()

    # In bf16, a cap takes three roundings of 0.2 % each, and the packed forward runs other kernels.
    exact, logits = seen[0] == torch.float32, seen[1]
    # Weights that are not finite say nothing about the family, and pass.
    alike = lambda a, b, bound: not float((a - b).abs().max()) > bound * float(b.abs().max())
    family = f"the family {model.config.model_type!r}"
    require(
        logits.shape == own.shape and alike(logits, own, 1e-4 if exact else 1e-2),
        f"{family} changes its logits after the output layer, which `_logits` in model_utils.py "
        "does not: add it there, or choose another model for training (distill.py and eval.py "
        "only sample, and are not affected)",
    )
    expected = own.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # (2, 4)
    require(
        alike(ours, expected, 1e-3 if exact else 0.05),
        f"{family} mixes tokens outside its attention layers (a state-space model, a convolution, "
        "linear attention), so packed sequences would see each other in training: choose another "
        "model",
    )
