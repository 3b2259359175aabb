"""In bf16, how far does sharing beginnings move the gradient, and how far is it off fp32 anyway?

    python -m bench.bf16

One question's tree, 4 plans with 3 CoTs each, and a Qwen2 with random weights. Prints relative
differences of the whole gradient.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from model_utils import shard_model
from plumbing.attention import pack


def gradient(dtype: torch.dtype, share: bool, seed: int) -> torch.Tensor:
    """A policy gradient with respect to all parameters, flat and in fp32."""
    torch.manual_seed(seed)
    tokens = lambda n: torch.randint(1000, (n,)).tolist()
    prompt, rows = tokens(64), []
    for plan in (prompt + tokens(48) for _ in range(4)):
        rows += [plan + tokens(96) for _ in range(3)]
    advantages = torch.randn(len(rows), 1)
    sizes = dict(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    # About 1 / sqrt(width): no layer makes its input smaller, and the logits are not all alike.
    options = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    model = shard_model(Qwen2ForCausalLM(Qwen2Config(**sizes, **options)).to(dtype).eval())
    packed = pack(rows, [len(prompt)] * len(rows), torch.device("cpu"), share)
    (model.token_logprobs(packed)[0] * advantages).sum().backward()
    return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])


if __name__ == "__main__":
    for seed in range(5):
        plain, shared = (gradient(torch.float32, share, seed) for share in (False, True))
        plain16, shared16 = (gradient(torch.bfloat16, share, seed) for share in (False, True))
        off = lambda a, b: f"{float((a - b).norm() / b.norm()):.1e}"
        print(f"sharing: fp32 {off(shared, plain)}, bf16 {off(shared16, plain16)}   "
              f"bf16 off fp32: plain {off(plain16, plain)}, shared {off(shared16, plain)}")
