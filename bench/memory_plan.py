"""The estimate of plumbing/memory.py against measured updates of tiny models, on the CPU in fp32.

    python -m bench.memory_plan
"""

import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from plumbing.memory import estimate  # noqa: E402

CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, and their peak, while it is active."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = {}, 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            size = storage.nbytes()
            self.seen[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, address: int, size: int):
        self.seen.pop(address, None)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def measure(config, micro_tokens: int, checkpointing: bool = False) -> int:
    """Peak bytes of a small model's second update, with reference and optimiser state."""
    from transformers import AutoModelForCausalLM

    from grpo import Config, all_logprobs, make_micro_batches, update
    from model_utils import make_optimizer, shard_model

    def make():
        options = dict(dtype=torch.float32, attn_implementation="sdpa")
        model = AutoModelForCausalLM.from_config(config, **options).eval()
        return shard_model(model, activation_checkpointing=checkpointing)

    torch.manual_seed(0)
    model, reference = make(), make().requires_grad_(False)
    optimizer = make_optimizer(model, 1e-4, 0.01)
    rollouts = draw_rollouts(config.vocab_size, micro_tokens)
    flags = Config(tokens_per_micro_batch=micro_tokens)
    live = LiveBytes()
    for parameter in (*model.parameters(), *reference.parameters()):
        live.add(parameter)
    with live:
        for _ in range(2):
            live.peak = live.now
            micros = make_micro_batches(rollouts, flags, CPU)
            for micro, logprobs in zip(micros, all_logprobs(reference, micros, 1.0)):
                micro.ref_logprobs = logprobs
            update(model, optimizer, micros, flags, 1e-4)
    return live.peak


def draw_rollouts(vocabulary: int, tokens: int, count: int = 16) -> list:
    """Random rollouts that fill a micro-batch. They share no beginning: that would take less."""
    from grpo import Rollout

    length = tokens // count
    rollouts = []
    for i in range(count):
        ids = torch.randint(3, vocabulary, (length - 8,)).tolist()
        prompt = [3 + i] + [3] * 7
        rollout = Rollout(prompt, [length], ids, logprobs=[0.0] * len(ids), advantage=1.0)
        rollouts.append(rollout)
    return rollouts


def tiny_configs() -> dict:
    """The toy task's base, and models whose logits, weights or feed-forward layers dominate."""
    from transformers import AutoConfig

    shape = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    shape |= dict(eos_token_id=1, bos_token_id=None, pad_token_id=0)
    vocabulary = dict(vocab_size=8000, hidden_size=64, intermediate_size=128, head_dim=16, **shape)
    wide = dict(vocab_size=500, hidden_size=256, intermediate_size=1024, **shape)
    return {
        "toy base": AutoConfig.from_pretrained(ROOT / "data/toy_base"),
        "large vocabulary (qwen3)": AutoConfig.for_model("qwen3", **vocabulary),
        "wide (llama, tied)": AutoConfig.for_model("llama", tie_word_embeddings=True, **wide),
    }


def compare(config, micro_tokens: int = 2048, checkpointing: bool = False) -> tuple[float, float]:
    """(estimated, measured) bytes of an update of a small model."""
    sizes = dict(prompt_tokens=8, completion_tokens=8, micro_tokens=micro_tokens)
    options = dict(ranks=1, rows=1, dtype=torch.float32, checkpointing=checkpointing, **sizes)
    return estimate(config, **options)["update"], measure(config, micro_tokens, checkpointing)


def main():
    for name, config in tiny_configs().items():
        for checkpointing in (False, True):
            estimated, measured = compare(config, checkpointing=checkpointing)
            how = "checkpointing" if checkpointing else ""
            sizes = f"estimated {estimated / 1e6:6.1f} MB, measured {measured / 1e6:6.1f} MB"
            error = f"{100 * (estimated / measured - 1):+.0f} %"
            print(f"{name:25} {how:13} {sizes}, {error}", flush=True)


if __name__ == "__main__":
    main()
