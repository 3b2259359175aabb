"""Two updates on fixed rollouts, split over the ranks: test_images.py runs this under torchrun.

Of two ranks the second has the question without a picture. Its argument is a folder with model/ and
the pictures. Prints figures of each update, weights, and the first greedy tokens of each question.
"""

import json
import random
import sys
from pathlib import Path

import torch
from distributed_worker import whole_tensors
from test_images import TEXTS, make_tokenizer

from grpo import Config, Rollout, all_logprobs, make_micro_batches, sample, update
from model_utils import load_sharded, make_optimizer, unsharded
from plumbing.images import show, tower_of
from plumbing.ranks import gather0, init_distributed, print0, rank, world_size
from plumbing.signals import guarded


def figures(folder: Path, **flags) -> dict:
    config = Config(kl_coef=0.1, tokens_per_micro_batch=60, **flags)
    device = init_distributed("cpu")
    model = load_sharded(str(folder / "model"), device, config)
    reference = load_sharded(str(folder / "model"), device, config, frozen=True)
    assert tower_of(reference) is None
    tower = {n: p.clone() for n, p in tower_of(model).named_parameters()}
    tokenizer, optimizer = make_tokenizer(model), make_optimizer(model, 1e-2, 0.01)
    rng, questions, rollouts = random.Random(0), [], []
    for text, names in TEXTS:
        questions.append(tokenizer.album.expand(text, [str(folder / name) for name in names]))
        for _ in range(3):
            ids = [rng.randrange(20, 97) for _ in range(rng.randint(4, 9))]
            rollout = Rollout(questions[-1], [9], ids, [-1.0] * len(ids), stopped=True)
            rollout.advantage = rng.uniform(-1, 1)
            rollouts.append(rollout)
    split = [slice(0, 9), slice(9, 12)][rank()] if world_size() > 1 else slice(None)
    found = []
    for _ in range(2):
        mine = rollouts[split]
        show(tokenizer, [r.prompt for r in mine], model, reference)
        micros = make_micro_batches(mine, config, device)
        for micro, logprobs in zip(micros, all_logprobs(reference, micros, config.temperature)):
            micro.ref_logprobs = logprobs
        metrics = update(model, optimizer, micros, config, 1e-2)
        found.append([metrics[name] for name in ("loss", "grad_norm", "kl", "entropy")])
    asked = questions[rank()::world_size()]
    show(tokenizer, asked, model)
    with unsharded(model):
        ids, _ = sample(model, asked, max_new_tokens=6, temperature=0.0, stop_ids=[])
    tokens = sorted(gather0([[rank() + world_size() * i, row] for i, row in enumerate(ids)]))
    for name, before in tower.items():  # whole on every rank, and as it was
        assert torch.equal(before, dict(tower_of(model).named_parameters())[name])
    weights = sum(float(t.detach().double().abs().sum()) for t in whole_tensors(model).values())
    return {"figures": found, "weights": weights, "tokens": tokens}


if __name__ == "__main__":
    guarded(lambda: print0(json.dumps(figures(Path(sys.argv[1])))))
