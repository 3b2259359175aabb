"""A decode step as a CUDA graph, so that Python's speed does not matter: captured once a shape, then replayed."""
import contextlib
import gc
from collections.abc import Callable

import torch

from attention import KVCache
from model_utils import rank


@contextlib.contextmanager
def captured(graph, pool):
    """torch.cuda.graph, which leaves its own stream behind as the current one when a capture fails."""
    collecting = gc.isenabled()
    gc.disable()  # freeing a graph or an event, as a collection may, would spoil the capture
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            yield
    finally:
        if collecting:
            gc.enable()


def replay_step(step: Callable, model, cache: KVCache, ids: torch.Tensor, positions: torch.Tensor, filled: int,
                graph=torch.cuda.CUDAGraph, capture=captured) -> torch.Tensor:
    """`step(model, cache, ids, positions, filled)` by replay: ids and positions (B,) -> logits (B, V).

    One graph for each bucket of rows (powers of 2) and of length (256 places), captured when it is first needed and
    checked against the eager step. Where that fails the rank says so, and goes on eagerly for good.
    """
    rows = min(cache.slots, max(8, 1 << (len(ids) - 1).bit_length()))
    length = min(cache.length, -(-filled // 256) * 256)
    # Rows that fill the bucket up write to slots that nobody lives in.
    pad = torch.nn.functional.pad
    ids_in, positions_in = pad(ids, (0, rows - len(ids))), pad(positions, (0, rows - len(ids)))
    if (rows, length) not in cache.graphs:
        expected = step(model, cache, ids_in, positions_in, length)  # also the warm-up that a capture needs
        if cache.logits is None:
            cache.logits = expected.new_empty(cache.slots, expected.shape[1])
        inputs, recorded = (ids_in.clone(), positions_in.clone()), graph()
        try:
            # All graphs share a pool and write to the same logits: replayed one at a time, they need no more.
            with capture(recorded, pool=cache.pool):
                cache.logits[:rows] = step(model, cache, *inputs, length)
            cache.pool = cache.pool or recorded.pool()
            recorded.replay()
            # bf16 may differ in its last digits where another kernel is chosen; wrong inputs differ by far more.
            sound = (cache.logits[:rows] - expected).abs().max() <= 0.02 * expected.abs().max()
            failure = None if sound else "its result differs"
        except torch.OutOfMemoryError:  # a RuntimeError too
            raise
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
        if failure:  # on this rank, for which the others will wait
            print(f"rank {rank()} decodes without CUDA graphs, which is slower: {failure}", flush=True)
            model.cuda_graphs = False
            return expected[:len(ids)]
        cache.graphs[rows, length] = (recorded, inputs)
    recorded, inputs = cache.graphs[rows, length]
    inputs[0].copy_(ids_in)
    inputs[1].copy_(positions_in)
    recorded.replay()
    return cache.logits[:len(ids)]
