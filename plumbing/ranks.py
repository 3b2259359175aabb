"""torch.distributed for one process or many. With one process the same calls do nothing."""

import contextlib
import logging
import os
import re
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

GPU_FILE = Path("/dev/nvidia0")  # exists where Linux has found an NVIDIA GPU


# Control characters but tab and newline, marks of writing direction, characters that are never
# shown, lone surrogates.
UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # what libraries paint their warnings with


def printable(text: str) -> str:
    """Text whose unsafe characters are written as escapes.

    What a model, a data set or a server wrote could else clear the screen or forge lines of a log.
    """
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


class PrintableRecord(logging.LogRecord):
    """What a library logs, which may quote a model's or a data set's files."""

    def getMessage(self) -> str:
        return printable(COLOUR.sub("", super().getMessage()))


def printable_warning(*args, plain=warnings.formatwarning, **more) -> str:
    return printable(plain(*args, **more))


def make_screen_safe():
    """Nothing raw on the terminal from this process's libraries; what it cannot show, as escapes.

    Without the latter, one Chinese character would end a run whose terminal has no UTF-8.
    """
    logging.setLogRecordFactory(PrintableRecord)
    warnings.formatwarning = printable_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook or a test has replaced it
            stream.reconfigure(errors="backslashreplace")


def fail(message: str):
    """End the program with one sentence and exit code 1. (`signals.guarded` prints it once.)"""
    raise SystemExit(printable(f"error: {message}").replace("\n", "\\n"))


def require(condition, message: str):
    """Fail with the message unless the condition holds."""
    if not condition:
        fail(message)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def has_gpu() -> bool:
    """Whether torch can use a GPU here. SystemExit where there is one that it cannot use.

    Else a 7B model would train on the CPU, and only the pace would tell. CUDA_VISIBLE_DEVICES=""
    hides a GPU on purpose.
    """
    if torch.cuda.is_available():
        return True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if GPU_FILE.exists() and not hidden:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        fail(
            f"there is a GPU here ({GPU_FILE}) that torch {torch.__version__}, built {built}, "
            "cannot use: update the driver, or install a torch for its CUDA (cu126 or cu129); "
            'to use the CPU on purpose, set CUDA_VISIBLE_DEVICES=""'
        )
    return False


def init_distributed(device: str = "auto", alone: bool = False) -> torch.device:
    """Join the process group that torchrun describes, and return this rank's device.

    The group uses nccl on GPUs and gloo on CPUs. A single GPU gets a group of one, so that it runs
    the same FSDP2 code as eight. A single CPU gets none, unless `alone` asks for a group of one.
    """
    cuda = has_gpu() if device == "auto" else device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # cuDNN's attention makes a plan per shape, and packed batches keep changing shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    torchrun = "RANK" in os.environ
    if not dist.is_initialized() and (cuda or alone or torchrun):
        group = {} if torchrun else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
        # A rank waits for the one with the longest rollout: ten minutes, the default, are too few.
        dist.init_process_group(backend, timeout=timedelta(hours=1), **group)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def device_mesh(device: torch.device, shard_within: str):
    """All ranks in a row ("world"), or nodes x ranks per node ("node")."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    if shard_within == "world":
        return init_device_mesh(device.type, (ranks,))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (ranks // local, local), mesh_dim_names=names)


def print0(*args):
    """Print `printable` text on rank 0, above a progress bar if one is on the screen."""
    if rank() == 0:
        with contextlib.suppress(OSError):  # a terminal that is gone must not stop a run
            tqdm.write(printable(" ".join(map(str, args))))
            sys.stdout.flush()


def progress(total: int, done: int, name: str, unit: str = "step") -> tqdm:
    """A progress bar on rank 0; none on other ranks, and none where the output is no terminal."""
    hidden = None if rank() == 0 else True
    return tqdm(total=total, initial=done, desc=printable(name), unit=unit, disable=hidden)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of a tensor of any shape. The input is not changed."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_max(value: int, device) -> int:
    """Largest value of any rank."""
    value = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def gather0(items: list) -> list:
    """The ranks' lists, joined in rank order, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return items
    parts = [None] * world_size() if rank() == 0 else None
    dist.gather_object(items, parts)
    return [item for part in parts or [] for item in part]


def all_gather(item) -> list:
    """Each rank's `item`, in rank order, on every rank."""
    parts = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, item)
    return parts


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
