"""An SFT step on this CPU: what sharing beginnings, checkpointing and bf16 do to its seconds.

    python -m bench.cpu --model runs/smollm2/base --data runs/smollm2/plans.jsonl

Each round runs one step of every setting in turn, in one process, so other load on the machine hits
all of them. Prints the median seconds of each and its ratio to the first, which is how SFT computed
before it shared beginnings; and the loss, which all settings agree on.
"""

import dataclasses
import functools
import statistics
import time
from unittest import mock

import torch

import sft
from data.sources import load_records
from model_utils import load_sharded, load_tokenizer, make_optimizer, optimizer_step
from plumbing.flags import parse_config
from plumbing.ranks import init_distributed

# name: (share beginnings, --activation_checkpointing, --dtype)
SETTINGS = {
    "beginnings apart": (False, True, "fp32"),
    "beginnings shared": (True, True, "fp32"),
    "shared, no checkpointing": (True, False, "fp32"),
    "shared, no checkpointing, bf16": (True, False, "bf16"),
}


@dataclasses.dataclass
class Flags:
    model: str = "runs/smollm2/base"  # folder of the model
    data: str = "runs/smollm2/plans.jsonl"  # plan records
    records: int = 16  # per step (>= 1)
    rounds: int = 2  # steps per setting (>= 1)
    bf16: bool = True  # also measure bf16


def step(model, optimizer, rows, share: bool, config) -> tuple[float, float, float]:
    """Seconds of loss and gradient, seconds of the optimiser (learning rate 0), and the loss."""
    names, began = ("pack", "micro_batches"), time.perf_counter()
    patches = {name: functools.partial(getattr(sft, name), share=share) for name in names}
    with mock.patch.multiple(sft, **patches):
        loss = sft.sft_loss(model, rows, config, train=True)
    middle = time.perf_counter()
    optimizer_step(model, optimizer, 0.0, 1.0)
    return middle - began, time.perf_counter() - middle, loss


def main():
    flags = parse_config(Flags)
    tokenizer = load_tokenizer(flags.model)
    records = load_records(flags.data, ("problem", "answer", "think", "plan"), flags.records)
    rows = [sft.encode_record(tokenizer, record, True) for record in records]
    device, models = torch.device("cpu"), {}
    for name, (share, checkpointing, dtype) in SETTINGS.items():
        if dtype == "bf16" and not flags.bf16:
            continue
        if dtype == "bf16":  # the others stay outside of FSDP2, as a single CPU runs them
            init_distributed("cpu", alone=True)
        config = sft.Config(dtype=dtype, activation_checkpointing=checkpointing)
        model = load_sharded(flags.model, device, config)
        models[name] = model, make_optimizer(model, 0.0, 0.0), share, config
    lengths = [len(ids) for ids, *_ in rows]
    print(f"{len(rows)} records of {statistics.mean(lengths):.0f} tokens, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds = {name: [] for name in models}
    for number in range(flags.rounds + 1):  # the first is a warm-up
        for name, (model, optimizer, share, config) in models.items():
            gradient, optimiser, loss = step(model, optimizer, rows, share, config)
            seconds[name] += [gradient + optimiser] * (number > 0)
            print(f"  round {number}  {name:32} gradient {gradient:6.1f} s  optimiser "
                  f"{optimiser:5.1f} s  loss {loss:.5f}", flush=True)
    first = statistics.median(seconds["beginnings apart"])
    for name, spent in seconds.items():
        median = statistics.median(spent)
        print(f"{name:32} {median:6.1f} s   {first / median:.2f} times as fast")


if __name__ == "__main__":
    main()
