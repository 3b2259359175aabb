"""Run under torchrun by test_distributed.py and bench/faults.py: three updates on fixed rollouts, split over the ranks.

Prints loss, gradient norm, KL and entropy of each update, and the first greedy tokens; `--weights FILE` saves the final
weights. Further flags: --uneven, --shard_within_node, --activation_checkpointing, --cpu_offload, --from FOLDER.
"""
import json
import sys

import torch

from checkpoint import guarded
from conftest import make_tiny
from grpo import Config, make_micros, sample, score, update
from model_utils import (all_sum, init_distributed, load_sharded, make_optimizer, model_tensors, print0, rank, shard_model,
                         unsharded, world_size)
from test_grpo import fake_rows, nearby_model


def main():
    uneven = "--uneven" in sys.argv  # rank 0 takes all rows, the others run empty micro-batches
    options = {"shard_within": "node" if "--shard_within_node" in sys.argv else "world",
               **{name: f"--{name}" in sys.argv for name in ("activation_checkpointing", "cpu_offload")}}
    device = init_distributed("cpu")
    if "--from" in sys.argv:  # shard by shard, from a folder
        model = load_sharded(sys.argv[sys.argv.index("--from") + 1], device, **options)
    else:
        model = shard_model(make_tiny("qwen2"), **options)
    reference = shard_model(nearby_model(), **options)
    optimizer = make_optimizer(model, 1e-2, 0.01)
    config = Config(kl_coef=0.1, temperature=0.8, tokens_per_micro_batch=40, max_grad_norm=1.0)
    rows, prompts, advantages = fake_rows(9)
    share = slice(rank(), None, world_size()) if not uneven else slice(None) if rank() == 0 else slice(0, 0)
    figures = []
    for _ in range(3):
        micros = make_micros(rows[share], prompts, advantages[share], config, device)
        for micro, logprobs in zip(micros, score(reference, micros, config.temperature)):
            micro.ref_logprobs = logprobs
        # Gathered only while they are needed.
        assert hasattr(reference.get_output_embeddings().weight, "placements") == (world_size() > 1)
        metrics = update(model, optimizer, micros, config, 1e-2)
        figures.append([metrics["loss"], metrics["grad_norm"], metrics["kl"], metrics["entropy"]])
        # Ranks decode different numbers of tokens between updates: no collective, no hang, and the new weights.
        with unsharded(model):
            ids, _ = sample(model, [[3, 4, 5]], max_new_tokens=4 + 9 * rank(), temperature=0.0, stop_ids=[])
    first_tokens = [int(t) for t in all_sum(torch.tensor(ids[0][:4]))]
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model_tensors(model).items()}
    if rank() == 0 and "--weights" in sys.argv:
        torch.save(whole, sys.argv[sys.argv.index("--weights") + 1])
    weights = float(sum(t.detach().double().abs().sum() for t in whole.values()))
    print0(json.dumps({"figures": figures, "weights": weights, "tokens": [t // world_size() for t in first_tokens]}))


if __name__ == "__main__":
    guarded(main)
