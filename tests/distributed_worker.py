"""Three updates on fixed rollouts, split over the ranks: test_distributed.py and bench/faults.py
run this under torchrun.

Prints loss, gradient norm, KL and entropy of each update, and the first greedy tokens. `--weights
FILE` saves the final weights. Further flags: --uneven, --shard_within_node,
--activation_checkpointing, --cpu_offload, --from FOLDER, --dealt (rank 0 has sampled all groups).
"""

import json
import sys

import torch
from test_grpo import fake_rollouts, nearby_model

from conftest import make_tiny
from grpo import Config, Group, all_logprobs, make_micro_batches, sample, update
from model_utils import load_sharded, make_optimizer, shard_model, unsharded
from plumbing.balance import balance
from plumbing.ranks import all_sum, init_distributed, print0, rank, world_size
from plumbing.signals import guarded
from plumbing.weights import model_tensors


def whole_tensors(model) -> dict[str, torch.Tensor]:
    tensors = model_tensors(model)
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def main():
    flags = {name: f"--{name}" in sys.argv for name in ("activation_checkpointing", "cpu_offload")}
    flags["shard_within"] = "node" if "--shard_within_node" in sys.argv else "world"
    config = Config(kl_coef=0.1, temperature=0.8, tokens_per_micro_batch=40, **flags)
    device = init_distributed("cpu")
    if "--from" in sys.argv:  # shard by shard, from a folder
        model = load_sharded(sys.argv[sys.argv.index("--from") + 1], device, config)
    else:
        model = shard_model(make_tiny("qwen2"), **flags)
    reference = shard_model(nearby_model(), **flags)
    optimizer = make_optimizer(model, 1e-2, 0.01)
    rollouts, mine = fake_rollouts(9), slice(rank(), None, world_size())
    if "--uneven" in sys.argv:  # rank 0 takes all rollouts, the others run empty micro-batches
        mine = slice(None) if rank() == 0 else slice(0, 0)
    if "--dealt" in sys.argv:
        groups = [Group({"id": n}, rollouts[n::3]) for n in range(3)]
        groups, imbalance = balance(groups if rank() == 0 else [], cots=1)
        rollouts, mine = [r for group in groups for r in group.rollouts], slice(None)
        assert groups and (imbalance < 2 or world_size() == 1)
        assert all(group.place == (0, group.question["id"]) for group in groups)
    figures = []
    for _ in range(3):
        micros = make_micro_batches(rollouts[mine], config, device)
        for micro, logprobs in zip(micros, all_logprobs(reference, micros, config.temperature)):
            micro.ref_logprobs = logprobs
        # Gathered only while they are needed.
        assert hasattr(reference.get_output_embeddings().weight, "placements") == (world_size() > 1)
        metrics = update(model, optimizer, micros, config, 1e-2)
        figures.append([metrics[name] for name in ("loss", "grad_norm", "kl", "entropy")])
        # Ranks decode different numbers of tokens between updates: no collective, so no hang. They
        # see the new weights.
        with unsharded(model):
            options = dict(max_new_tokens=4 + 9 * rank(), temperature=0.0, stop_ids=[])
            ids, _ = sample(model, [[3, 4, 5]], **options)
    tokens = [int(token) // world_size() for token in all_sum(torch.tensor(ids[0][:4]))]
    whole = whole_tensors(model)
    if rank() == 0 and "--weights" in sys.argv:
        torch.save(whole, sys.argv[sys.argv.index("--weights") + 1])
    weights = float(sum(t.detach().double().abs().sum() for t in whole.values()))
    print0(json.dumps({"figures": figures, "weights": weights, "tokens": tokens}))


if __name__ == "__main__":
    guarded(main)
