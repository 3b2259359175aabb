"""memory.py's plan for a GPU of a given size: will a step fit, and how many rows may a rollout have?

    python -m bench.memory_plan                the paper's main model on 8 GPUs of 80 GiB
    python -m bench.memory_plan --model Qwen/Qwen3-8B --gpus 4 --gib 141
    python -m bench.memory_plan --table        the table of recipes/memory.md
    python -m bench.memory_plan --measure      the plan against measured updates of tiny models
"""
import argparse
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from memory import GIB, plan  # noqa: E402
from model_utils import load_config  # noqa: E402

PAPER = {"llama3.2_3b": 3584, "qwen2.5_7b": 3584, "qwen3_8b": 4608, "qwen3_14b": 4608}  # most completion tokens; 3.5K and 4.5K


# ---------------------------------------------------------------------------------------------------------------
# Measured

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that exist, and their peak, while it is active."""

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
    """Peak bytes of the second update of a small model on the CPU in fp32, with reference and optimiser state."""
    from transformers import AutoModelForCausalLM

    from grpo import Config, Row, make_micros, score, update
    from model_utils import make_optimizer, shard_model
    torch.manual_seed(0)
    model, reference = (shard_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval(),
                                    activation_checkpointing=checkpointing) for _ in range(2))
    reference.requires_grad_(False)
    optimizer = make_optimizer(model, 1e-4, 0.01)
    length = micro_tokens // 16
    draw = lambda n: torch.randint(3, config.vocab_size, (n,)).tolist()
    rows = [Row(0, [length], ids=draw(length - 8), logprobs=[0.0] * (length - 8)) for _ in range(16)]
    flags = Config(tokens_per_micro_batch=micro_tokens, share_prefix=False)  # what is shared takes less
    live = LiveBytes()
    for parameter in (*model.parameters(), *reference.parameters()):
        live.add(parameter)
    with live:
        for _ in range(2):
            live.peak = live.now
            micros = make_micros(rows, [[3] * 8], [1.0] * 16, flags, torch.device("cpu"))
            for micro, logprobs in zip(micros, score(reference, micros, 1.0)):
                micro.ref_logprobs = logprobs
            update(model, optimizer, micros, flags, 1e-4)
    return live.peak


def tiny_configs() -> dict:
    """The toy task's base, and models whose logits, weights or feed-forward dominate."""
    from transformers import AutoConfig
    shape = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, bos_token_id=None, pad_token_id=0)
    return {
        "toy base": AutoConfig.from_pretrained(ROOT / "data/toy_base", trust_remote_code=False),
        "large vocabulary (qwen3)": AutoConfig.for_model("qwen3", vocab_size=8000, hidden_size=64, intermediate_size=128, head_dim=16, **shape),
        "wide (llama, tied)": AutoConfig.for_model("llama", vocab_size=500, hidden_size=256, intermediate_size=1024,
                                                   tie_word_embeddings=True, **shape)}


def compare(config, micro_tokens: int = 2048, checkpointing: bool = False) -> tuple[float, float]:
    """(planned, measured) bytes of an update of a small model."""
    planned = plan(config, ranks=1, rows=1, prompt_tokens=8, completion_tokens=8, micro_tokens=micro_tokens,
                   dtype=torch.float32, checkpointing=checkpointing)["update"]
    return planned, measure(config, micro_tokens, checkpointing)


# ---------------------------------------------------------------------------------------------------------------
# Output

def table(gpus: int, gib: float) -> str:
    """recipes/memory.md's table."""
    lines = ["| model | parameters | weights, gradients, AdamW | reference | whole in bf16 | KV cache, 192 rows | activations and "
             "logprobs, 16,384 tokens | the same with `--activation_checkpointing` | rollout | update | `--rollout_rows` that fit |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, completion in PAPER.items():
        config = load_config(str(ROOT / f"recipes/shapes/{name}"))
        p, c = (plan(config, ranks=gpus, rows=192, prompt_tokens=1024, completion_tokens=completion, micro_tokens=16384,
                     checkpointing=checkpointing) for checkpointing in (False, True))
        g = lambda *names, of=p: f"{sum(of[name] for name in names) / GIB:.1f}"
        fit = int((0.9 * gib * GIB - (p["rollout"] - p["KV cache"] - p["sampling"])) // p["row"])
        lines.append(f"| {name} | {p['parameters'] / 1e9:.2f} B | {g('weights', 'gradients', 'optimiser')} | {g('reference')} | "
                     f"{g('gathered for rollout')} | {g('KV cache')} | {g('activations', 'logprobs')} | "
                     f"{g('activations', 'logprobs', of=c)} | {g('rollout')} | {g('update')}, {g('update', of=c)} | {max(fit, 0)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "recipes/shapes/qwen2.5_7b"),
                        help="folder or hub id; its config.json is enough [the paper's main model]")
    parser.add_argument("--gpus", type=int, default=8, help="ranks that the weights are cut over [8]")
    parser.add_argument("--gib", type=float, default=80, help="memory of a GPU in GiB [80]")
    parser.add_argument("--rollout_rows", type=int, default=192)
    parser.add_argument("--max_prompt_tokens", type=int, default=1024)
    parser.add_argument("--max_completion_tokens", type=int, default=3584)
    parser.add_argument("--tokens_per_micro_batch", type=int, default=16384)
    parser.add_argument("--kl_coef", type=float, default=0.01, help="0: no reference model")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--cpu_offload", action="store_true")
    parser.add_argument("--table", action="store_true", help="the four models of the paper")
    parser.add_argument("--measure", action="store_true", help="tiny models: planned and measured")
    args = parser.parse_args()
    if args.table:
        print(table(args.gpus, args.gib))
    elif args.measure:
        for name, config in tiny_configs().items():
            for checkpointing in (False, True):
                planned, measured = compare(config, checkpointing=checkpointing)
                print(f"{name:28} {'checkpointing' if checkpointing else '':13} planned {planned / 1e6:7.1f} MB, measured "
                      f"{measured / 1e6:7.1f} MB, {100 * (planned / measured - 1):+.0f} %", flush=True)
    else:
        parts = plan(load_config(args.model), ranks=args.gpus, rows=args.rollout_rows, prompt_tokens=args.max_prompt_tokens,
                     completion_tokens=args.max_completion_tokens, micro_tokens=args.tokens_per_micro_batch,
                     reference=args.kl_coef > 0, checkpointing=args.activation_checkpointing, cpu_offload=args.cpu_offload)
        row, count = parts.pop("row"), parts.pop("parameters")
        print(f"{Path(args.model).name}: {count / 1e9:.2f} B parameters; "
              f"GiB on each of {args.gpus} GPUs:")
        for name, size in parts.items():
            print(f"  {name:22} {size / GIB:8.2f}")
        room = 0.9 * args.gib * GIB - (parts["rollout"] - args.rollout_rows * row)
        print(f"fits in 90 % of {args.gib:g} GiB: {'yes' if parts['peak'] < 0.9 * args.gib * GIB else 'no'}; "
              f"rollout rows that fit: {max(0, int(room // row))}")


if __name__ == "__main__":
    main()
