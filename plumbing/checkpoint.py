"""Checkpoints that survive a kill, and resuming from them.

A checkpoint `step_N/` is a Hugging Face folder of fp32 weights with three things added:

    optimizer*.safetensors   AdamW's state, each tensor named parameter/key
    trainer.json             step, data cursor, sizes of the logs, settings
    manifest.json            size and SHA-256 of every other file; written last, so that a folder
                             without it is no checkpoint

Tensors are stored whole, in files of at most 4 GB, each written by one rank. So the number of ranks
may change between save and resume, and every rank then reads its own rows only. No random state is
saved, because there is none: the order of the data and the seed of each rank's sampler are
functions of (seed, cursor, rank), and nothing else draws. (Samples depend on how many rows are
decoded at once, too. Where free memory decides that, --rollout_rows makes them repeatable.) With
several nodes, --out must be a folder that all of them see.
"""

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import torch

from plumbing.folder import (
    FOLDERS,
    LOGS,
    changed_settings,
    present,
    refuse_blocked,
    remove,
    step_folders,
    step_of,
)
from plumbing.images import processors
from plumbing.ranks import all_gather, all_max, barrier, fail, print0, rank, require, world_size
from plumbing.weights import load_tensors, local_part, model_tensors, open_tensors, read_rows

FILE_BYTES = 4 << 30

# --------------------------------------------------------------------------------------------------
# Tensors and files


def optimizer_tensors(model, optimizer) -> list[tuple[str, torch.Tensor]]:
    """The optimiser's tensors, named parameter/key. Their order is the same on every rank."""
    state = optimizer.state
    named = [(name, tensor) for name, tensor in model_tensors(model).items() if tensor in state]
    return [(f"{name}/{key}", v) for name, tensor in named for key, v in state[tensor].items()]


def split_files(
    tensors: list[tuple[str, torch.Tensor]], stem: str, limit: int = FILE_BYTES
) -> dict[str, list]:
    """File name -> its (name, tensor) pairs, in order. No file of several passes `limit` bytes."""
    parts, size = [[]], 0
    for name, tensor in tensors:
        own = tensor.numel() * tensor.element_size()  # of a sharded tensor: the whole one
        size += own
        if size > limit and parts[-1]:
            parts, size = parts + [[]], own
        parts[-1].append((name, tensor))
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    name = f"{stem}-{{:05}}-of-{len(parts):05}.safetensors"
    return {name.format(i): part for i, part in enumerate(parts, 1)}


def copy_to_cpu(
    files: dict[str, list], dtype: torch.dtype | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """CPU copies of whole tensors, by file, for the files that this rank writes (file i: i mod W).

    Gathers one tensor at a time, so no rank ever holds more than its own files. A collective.
    """
    mine: dict[str, dict[str, torch.Tensor]] = {}
    for i, (file, tensors) in enumerate(files.items()):
        for name, tensor in tensors:
            tensor = tensor.detach()
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if i % world_size() == rank():
                mine.setdefault(file, {})[name] = whole.to("cpu", dtype, copy=True)
    return mine


def flush(path: Path):
    """Make the disk hold a file's content, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> list:
    """[size in bytes, SHA-256] of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def unused(path: Path) -> Path:
    """The path, or the first of path.new, path.new.new, ... where there is nothing."""
    while os.path.lexists(path):  # True for a link that leads nowhere, too
        path = path.with_name(path.name + ".new")
    return path


# --------------------------------------------------------------------------------------------------
# Save


class Checkpoints:
    """Saves a run's checkpoints and its final model.

    `save` blocks for as long as copying the state to the CPU takes. A thread writes the copy. The
    checkpoint appears under its name, whole or not at all, at the first `poll` after every rank has
    written its part. All methods are collectives: call them on every rank, in the same order.
    """

    def __init__(self, folder: Path, model, tokenizer, optimizer, settings):
        self.folder, self.model, self.tokenizer = Path(folder), model, tokenizer
        self.optimizer, self.settings = optimizer, settings
        self.thread: threading.Thread | None = None
        if rank() == 0:
            for left in sorted(self.folder.glob("*.tmp")):
                if FOLDERS.fullmatch(left.name):
                    shutil.rmtree(left)
                    print0(f"removed {left.name}, left over from a save that did not finish")

    def save(self, name: str, state: dict | None = None):
        """Begin to write a checkpoint with the trainer's `state`, or without one the final model.

        The final model is for others to load: it is in bf16 on a GPU, where checkpoints are fp32.
        Waits for a save that is still being written.
        """
        self.poll(wait=True)
        self.name, self.state, self.error, self.written = name, state, None, {}
        final = state is None
        dtype = torch.bfloat16 if final and torch.cuda.is_available() else torch.float32
        files = split_files(list(model_tensors(self.model).items()), "model")
        self.bytes = sum(t.numel() * dtype.itemsize for part in files.values() for _, t in part)
        mine, small = copy_to_cpu(files, dtype), {}
        if len(files) > 1:
            index = {name: file for file, part in files.items() for name, _ in part}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": index}
            small["model.safetensors.index.json"] = index
        if not final:
            tensors = optimizer_tensors(self.model, self.optimizer)
            self.bytes += sum(t.numel() * t.element_size() for _, t in tensors)
            mine |= copy_to_cpu(split_files(tensors, "optimizer"))
            settings = dataclasses.asdict(self.settings)
            small["trainer.json"] = {**state, "logs": self._flush_logs(), "settings": settings}
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
        config.dtype = dtype
        self.thread = threading.Thread(target=self._write, args=(mine, config, small), daemon=True)
        self.thread.start()

    def _flush_logs(self) -> dict[str, int]:
        """Log -> size, on rank 0. A resume cuts the log to this, so the disk must hold as much."""
        sizes = {}
        for log in [path for path in present(self.folder) if path.name in LOGS and rank() == 0]:
            try:
                flush(log)
                sizes[log.name] = log.stat().st_size
            except OSError as error:
                self.error = f"{log.name}: {error.strerror}"
        return sizes

    def _write(self, mine: dict, config, small: dict):
        """Write and flush this rank's files, in the thread: no collective here."""
        from safetensors.torch import save_file

        folder = self.folder / f"{self.name}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, tensors in mine.items():
                save_file(tensors, folder / file, metadata={"format": "pt"})
                (folder / file).chmod(0o644)  # safetensors leaves it readable to its owner only
            files = [folder / file for file in mine]
            if rank() == 0:
                for file, content in small.items():
                    (folder / file).write_text(json.dumps(content, indent=1) + "\n")
                parts = (config, self.model.generation_config, self.tokenizer)
                for part in (*parts, *processors(self.tokenizer)):
                    part.save_pretrained(folder)
                others = [path for path in folder.rglob("*") if path.suffix != ".safetensors"]
                files += filter(Path.is_file, others)
            for path in files:
                flush(path)
                self.written[str(path.relative_to(folder))] = digest(path)
        # Whatever it is, it must reach the main thread. safetensors has error types of its own.
        except Exception as error:
            self.error = str(error) or type(error).__name__

    def poll(self, wait: bool = False) -> bool:
        """Put a save into place if every rank has written its part. True if none is left.

        `wait` waits until they have.
        """
        if self.thread is None:
            return True
        if wait:
            self.thread.join()
        if all_max(int(self.thread.is_alive()), self.model.device):
            return False
        self.thread = None
        temporary = self.folder / f"{self.name}.tmp"
        errors = [f"rank {r}: {error}" for r, error in enumerate(all_gather(self.error)) if error]
        files = {name: entry for part in all_gather(self.written) for name, entry in part.items()}
        trouble, unwritten = errors[:1], bool(errors)
        if rank() == 0 and not unwritten:
            try:
                self._commit(temporary, files)
            except OSError as error:
                trouble = [str(error)]
                if self.state is None and temporary.is_dir():  # the work of the whole run
                    trouble = [f"{error}; it is in {temporary}: move it to where you want it"]
        trouble = all_gather(trouble)[0]
        if trouble:
            if rank() == 0 and (unwritten or self.state is not None):
                shutil.rmtree(temporary, ignore_errors=True)
            self._complain(trouble[0])
        barrier()  # nobody begins another save before this one is out of the way
        return True

    def _commit(self, temporary: Path, files: dict):
        """Write the manifest, put the folder into place and delete old checkpoints (rank 0)."""
        for name, (size, _) in files.items():
            path = temporary / name
            if not path.exists() or path.stat().st_size != size:
                raise OSError(
                    f"{name}, written by another rank, cannot be seen in {temporary}; --out must "
                    "be a folder that every node sees"
                )
        if self.state is not None:
            (temporary / "manifest.json").write_text(json.dumps(files, indent=1) + "\n")
            flush(temporary / "manifest.json")
        flush(temporary)
        target = wanted = self.folder / self.name
        if self.state is None:
            target = unused(wanted)
        elif wanted.exists():  # a damaged one that a resume has passed over
            remove(wanted)
        if target != wanted:
            print0(
                f"warning: {wanted} already exists and is not of this run: the model is saved as "
                f"{target}"
            )
        temporary.rename(target)
        flush(self.folder)
        print0(f"saved {target}")
        if self.state is not None and self.settings.keep:
            saved = [path for path in step_folders(self.folder) if step_of(path) <= step_of(target)]
            for path in saved[self.settings.keep:]:
                remove(path)

    def _complain(self, trouble: str):
        """Say that a save failed. End the run, unless it can go on and --on_save_error says so."""
        others = [path.name for path in step_folders(self.folder) if path.name != self.name]
        whole = f"The checkpoint {others[0]} is whole. " if others else ""
        try:
            free = f"{shutil.disk_usage(self.folder).free / 1e9:.3g} GB are free"
        except OSError:
            free = "the free space cannot be read"
        message = (
            f"{self.name} was not saved ({trouble}). It needs {self.bytes / 1e9:.3g} GB in "
            f"{self.folder}, where {free}. {whole}Make room or mend the folder"
        )
        if self.settings.on_save_error == "stop" or self.state is None:
            fail(f"{message}, then go on with --resume.")
        print0(f"warning: {message}; the run goes on, as --on_save_error continue says.")


# --------------------------------------------------------------------------------------------------
# Resume


def damage(folder: Path) -> str | None:
    """Why a checkpoint is damaged, or None. Each rank checks a share of its files. A collective."""
    found = None
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        manifest = {}
        found = "no readable manifest.json: it was not finished, or is of an older version"
    for name, (size, sha) in sorted(manifest.items())[rank()::world_size()]:
        path = folder / name
        if not path.exists():
            found = f"{name} is missing"
        elif path.stat().st_size != size:
            found = f"{name} has {path.stat().st_size} bytes, not {size}"
        elif digest(path)[1] != sha:
            found = f"the content of {name} is not what was written"
    return next((reason for reason in all_gather(found) if reason), None)


def resume(folder: Path, model, optimizer, settings) -> dict:
    """Load the newest whole checkpoint of a run, at any number of ranks, and cut the logs back.

    Returns the trainer's state, or {} if there is no checkpoint yet. Damaged ones are passed over
    with a warning. Raises SystemExit if all are damaged, or if the one found belongs to other
    settings, which it names. A collective.
    """
    folder = Path(folder)
    found = [folder / name for name in all_gather([path.name for path in step_folders(folder)])[0]]
    for path in found:
        if reason := damage(path):
            print0(f"warning: checkpoint {path} is damaged ({reason}): passed over")
            continue
        state = json.loads((path / "trainer.json").read_text())
        changed_settings(state.pop("settings"), settings, str(path))
        load_tensors(model, open_tensors(path, "model"))
        load_optimizer(path, model, optimizer)
        cut_logs(folder, state.pop("logs"))
        print0(f"resuming after step {state['step']}, from {path}")
        return state
    require(
        not found,
        f"no checkpoint in {folder} is whole: restore one from a copy, or start again with "
        "--overwrite",
    )
    cut_logs(folder, {})
    print0("no checkpoint yet: starting at the first step")
    return {}


def load_optimizer(folder: Path, model, optimizer):
    """Read the optimiser's state from a checkpoint, each rank its own rows."""
    parameters = model_tensors(model)
    for name, file in open_tensors(folder, "optimizer").items():
        parameter, key = name.rsplit("/", 1)
        like = parameters[parameter].detach()
        if file.get_slice(name).get_shape():
            value = torch.zeros_like(like)  # cut over the ranks as its parameter is
            local_part(value).copy_(read_rows(file, name, like))
        else:
            value = file.get_tensor(name)  # AdamW's count of steps
        optimizer.state[parameters[parameter]][key] = value


def cut_logs(folder: Path, sizes: dict[str, int]):
    """Cut the run's logs back to their sizes at the save (rank 0).

    The steps after it run, and are logged, again. Other files in the folder are not the run's, even
    if they are JSONL.
    """
    logs = [path for path in present(folder) if path.name in LOGS]
    refuse_blocked(logs)
    for log in logs if rank() == 0 else ():
        size = sizes.get(log.name, 0)
        if log.stat().st_size < size:
            print0(f"warning: {log} is shorter than when the checkpoint was saved: it lacks steps")
        os.truncate(log, min(size, log.stat().st_size))
