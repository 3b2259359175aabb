"""What keeps a long run alive: checkpoints that survive a kill, resuming, stop signals, one message for a failure.

A checkpoint `step_N/` is a Hugging Face folder of fp32 weights with three things added:

    optimizer*.safetensors   AdamW's state, each tensor named parameter/key
    trainer.json             step, data cursor, sizes of the logs, settings
    manifest.json            size and SHA-256 of every other file; written last, so a folder without it is no checkpoint

Tensors are stored whole, in files of at most 4 GB, each written by one rank: the number of ranks may change between
save and resume, and every rank then reads its own rows only. No random state is kept because there is none: the order
of the data and the seed of each rank's sampler are functions of (seed, cursor, rank), and nothing else draws. (Samples
depend on how many rows are decoded at once, too: where free memory decides that, --rollout_rows makes them repeatable.)
With several nodes, --out must be a folder that all of them see.
"""
import atexit
import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from model_utils import (all_max, barrier, everyone, fail, fill, local, model_tensors, open_tensors, print0, rank,
                         read_rows, world_size)
from run_folder import FOLDERS, LOGS, append_jsonl, changed_settings, is_checkpoint, refuse_links, remove

FILE_BYTES = 4 << 30
STOPPED = 75  # exit code of a run that was asked to stop and saved: EX_TEMPFAIL, "try again later"


# ---------------------------------------------------------------------------------------------------------------
# Writing

def optimizer_tensors(model, optimizer) -> list[tuple[str, torch.Tensor]]:
    """The optimiser's tensors, named parameter/key, in the order of the model's: the same on every rank."""
    return [(f"{name}/{key}", value) for name, tensor in model_tensors(model).items() if tensor in optimizer.state
            for key, value in optimizer.state[tensor].items()]


def plan_files(tensors: list[tuple[str, torch.Tensor]], stem: str, limit: int = FILE_BYTES) -> dict[str, list]:
    """File name -> its (name, tensor) pairs, in order, cut where a file would pass `limit` bytes."""
    parts, size = [[]], 0
    for name, tensor in tensors:
        size += tensor.numel() * tensor.element_size()  # of a sharded tensor: the whole one
        if size > limit and parts[-1]:
            parts, size = parts + [[]], tensor.numel() * tensor.element_size()
        parts[-1].append((name, tensor))
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    return {f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts)}


def copy_to_cpu(files: dict[str, list], dtype: torch.dtype | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """CPU copies of whole tensors, file by file, for the files that this rank writes (file i: rank i mod W).

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


def fingerprint(path: Path) -> list:
    """[size in bytes, SHA-256] of a file."""
    with open(path, "rb") as handle:
        return [path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()]


class Checkpoints:
    """Saves a run's checkpoints and its final model.

    `save` blocks for as long as copying the state to the CPU takes; a thread writes the copy. The checkpoint appears
    under its name, whole or not at all, at the first `poll` after every rank has written its part. All methods are
    collectives: call them on every rank, in the same order.
    """

    def __init__(self, folder: Path, model, tokenizer, optimizer, settings, keep: int = 2, on_error: str = "stop"):
        self.folder, self.model, self.tokenizer, self.optimizer = Path(folder), model, tokenizer, optimizer
        self.settings, self.keep, self.on_error = dataclasses.asdict(settings), keep, on_error
        self.thread: threading.Thread | None = None
        self.lost: list[str] = []  # what the logs did not take in this step
        if rank() == 0:
            for left in [p for p in self.folder.glob("*.tmp") if FOLDERS.fullmatch(p.name)]:
                shutil.rmtree(left)
                print0(f"removed {left.name}, left over from a save that did not finish")

    def save(self, name: str, state: dict | None = None):
        """Begin to write `name`: a checkpoint with the trainer's `state`, or without one the model for others to load.

        The latter is in the dtype that the model computes in. Waits for a save that is still being written.
        """
        self.poll(wait=True)
        trouble = None
        compute = torch.bfloat16 if torch.cuda.is_available() and state is None else torch.float32
        files = plan_files(list(model_tensors(self.model).items()), "model")
        total = sum(t.numel() * compute.itemsize for part in files.values() for _, t in part)
        index = {name: file for file, part in files.items() for name, _ in part}
        mine = copy_to_cpu(files, compute)
        if state is not None:
            files = plan_files(optimizer_tensors(self.model, self.optimizer), "optimizer")
            total += sum(t.numel() * t.element_size() for part in files.values() for _, t in part)
            mine.update(copy_to_cpu(files))
            logs = {}
            present = [self.folder / name for name in LOGS if (self.folder / name).exists()]
            try:
                for log in present if rank() == 0 else ():
                    # A resume cuts the log back to this size: the disk must hold that much.
                    flush(log)
                    logs[log.name] = log.stat().st_size
            except OSError as error:
                trouble = f"{log.name}: {error.strerror}"
            state = {**state, "logs": logs, "settings": self.settings}
        self.name, self.state, self.bytes = name, state, total
        self.error, self.written = trouble, {}
        config = copy.deepcopy(self.model.config)
        config.architectures, config.dtype = [type(self.model).__name__.removeprefix("FSDP")], compute
        small = {"trainer.json": state} if state else {}
        if len(set(index.values())) > 1:
            small["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": index}
        self.thread = threading.Thread(target=self._write, args=(mine, config, small), daemon=True)
        self.thread.start()

    def log(self, file: str, records: list[dict]):
        """Add records to a log of the run (rank 0). `after_step` deals with what the disk does not take."""
        try:
            append_jsonl(self.folder / file, records)
        except OSError as error:
            lines = f"{len(records)} line{'s' * (len(records) > 1)}"
            self.lost.append(f"{lines} of {file} ({error.strerror})")

    def after_step(self, state: dict, last: bool, stop: "StopSignal"):
        """What follows every step: end a run that only skips; save when it is time; save and end on a stop signal.

        `state` holds at least `step`, the number of steps done, and `skipped`, those of them at the end in a row.
        """
        if all_max(len(self.lost), self.model.device):
            self._complain_of_logs(state, last)
        check_skipped(state["skipped"], self.settings["max_skipped"], self)
        if last:
            return
        every = self.settings["save_every"]
        if every and state["step"] % every == 0:
            self.save(f"step_{state['step']}", state)
        if number := stop.agreed(self.model.device):
            stop_run(self, state, number)

    def _write(self, mine: dict, config, small: dict):
        """In the thread: this rank's files, flushed; no collective here."""
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
                for part in (config, self.model.generation_config, self.tokenizer):
                    part.save_pretrained(folder)
                files += [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
            for path in files:
                flush(path)
                self.written[str(path.relative_to(folder))] = fingerprint(path)
        except Exception as error:  # whatever it is, it must reach the main thread; safetensors has its own types
            self.error = str(error) or type(error).__name__

    def poll(self, wait: bool = False) -> bool:
        """Put a save into place if every rank has written its part (`wait`: once it has). True if none is left."""
        if self.thread is None:
            return True
        if wait:
            self.thread.join()
        if all_max(int(self.thread.is_alive()), self.model.device):
            return False
        self.thread = None
        temporary, target = self.folder / f"{self.name}.tmp", self.folder / self.name
        errors = [f"rank {r}: {error}" for r, error in enumerate(everyone(self.error)) if error]
        files = {name: entry for part in everyone(self.written) for name, entry in part.items()}
        trouble = errors[:1]
        if rank() == 0 and not errors:
            try:
                self._commit(temporary, target, files)
            except OSError as error:
                trouble = [str(error)]
                if self.state is None and temporary.is_dir():  # the work of the whole run
                    trouble = [f"{error}; it lies in {temporary}: move it to where you want it"]
        trouble = everyone(trouble)[0]
        if trouble:
            if rank() == 0 and (errors or self.state is not None):
                shutil.rmtree(temporary, ignore_errors=True)
            self._complain(trouble[0])
        barrier()  # nobody begins another save before this one is out of the way
        return True

    def _commit(self, temporary: Path, target: Path, files: dict):
        """Manifest, rename, rotate (rank 0)."""
        for name, (size, _) in files.items():
            if not (temporary / name).exists() or (temporary / name).stat().st_size != size:
                raise OSError(f"{name}, written by another rank, is not to be seen in {temporary}; --out must be a "
                              "folder that every node sees")
        if self.state is not None:
            (temporary / "manifest.json").write_text(json.dumps(files, indent=1) + "\n")
            flush(temporary / "manifest.json")
        flush(temporary)
        if self.state is None:
            wanted, target = target, unused(target)
            if target != wanted:
                print0(f"warning: {wanted} has been put there by somebody else: the model is saved as "
                       f"{target}")
        elif target.exists():  # a damaged one that a resume has passed over
            remove(target)
        temporary.rename(target)
        flush(self.folder)
        print0(f"saved {target}")
        if self.state is not None and self.keep:
            older = [path for path in step_folders(self.folder) if step_of(path) <= step_of(target)]
            for path in older[self.keep:]:
                remove(path)

    def _complain(self, trouble: str):
        previous = next((path.name for path in step_folders(self.folder) if path.name != self.name), None)
        try:
            free = f"{shutil.disk_usage(self.folder).free / 1e9:.3g} GB are free"
        except OSError:
            free = "it is not there any more"
        message = (f"{self.name} was not saved ({trouble}). It needs {self.bytes / 1e9:.3g} GB in {self.folder}, where "
                   f"{free}. " + (f"The checkpoint {previous} is whole. " if previous else "") + "Make room or mend the folder")
        if self.on_error == "stop" or self.state is None:
            fail(f"{message}, then go on with --resume auto.")
        print0(f"warning: {message}; the run goes on, as --on_save_error continue says.")

    def _complain_of_logs(self, state: dict, last: bool):
        """Say which lines the disk did not take; save and end, but for the last step and `continue`."""
        lost = " and ".join(everyone(self.lost)[0])
        message = f"{self.folder} did not take {lost} at step {state['step']}"
        self.lost = []
        if self.on_error == "continue":
            return print0(f"warning: {message}: lost; the run goes on, as --on_save_error continue "
                          "says.")
        print0(f"warning: {message}: lost")
        if not last:  # else the final model is saved next, and says itself if it cannot be
            save_step(self, state)
            fail(f"{message}. The state after it is saved: make room or mend the folder, then go on "
                 "with --resume auto.")


def unused(path: Path) -> Path:
    """The path, or the first of path.new, path.new.new, ... where nothing is."""
    while os.path.lexists(path):  # a link that leads nowhere, too
        path = path.with_name(path.name + ".new")
    return path


# ---------------------------------------------------------------------------------------------------------------
# Resuming

def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """A run's checkpoints, damaged ones included, newest first."""
    return sorted((path for path in folder.glob("step_*")
                   if path.name.removeprefix("step_").isdigit() and is_checkpoint(path)),
                  key=step_of, reverse=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Every rank checks its share of the files: a collective."""
    found = None
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        manifest, found = {}, "no readable manifest.json: it was not finished, or is of an older version"
    for name, (size, digest) in sorted(manifest.items())[rank()::world_size()]:
        path = folder / name
        if not path.exists():
            found = f"{name} is missing"
        elif path.stat().st_size != size:
            found = f"{name} has {path.stat().st_size} bytes, not {size}"
        elif fingerprint(path)[1] != digest:
            found = f"{name} has another content than was written"
    return next((reason for reason in everyone(found) if reason), None)


def resume(folder: Path, model, optimizer, settings) -> dict:
    """Load the newest whole checkpoint of a run, at any number of ranks, and cut the logs back to it.

    Returns the trainer's state, {} if there is no checkpoint yet. Damaged ones are passed over with a warning. Raises
    SystemExit if all are damaged, or if the one found belongs to other settings (which it names). A collective.
    """
    folder = Path(folder)
    found = [folder / name for name in everyone([path.name for path in step_folders(folder)])[0]]
    for path in found:
        if reason := damage(path):
            print0(f"warning: checkpoint {path} is damaged ({reason}): passed over")
            continue
        state = json.loads((path / "trainer.json").read_text())
        changed_settings(state.pop("settings"), settings, str(path))
        fill(model, open_tensors(path, "model"))
        stored = open_tensors(path, "optimizer")
        parameters = model_tensors(model)
        for name, handle in stored.items():
            parameter, key = name.rsplit("/", 1)
            like = parameters[parameter].detach()
            if handle.get_slice(name).get_shape():
                value = torch.zeros_like(like)  # cut over the ranks as its parameter is
                local(value).copy_(read_rows(handle, name, like))
            else:
                value = handle.get_tensor(name)  # AdamW's count of steps
            optimizer.state[parameters[parameter]][key] = value
        cut_logs(folder, state.pop("logs"))
        print0(f"resuming after step {state['step']}, from {path}")
        return state
    if found:
        fail(f"no checkpoint in {folder} is whole: restore one from a copy, or start again with --overwrite")
    cut_logs(folder, {})
    print0("no checkpoint yet: starting at the first step")
    return {}


def cut_logs(folder: Path, sizes: dict[str, int]):
    """Cut the run's logs back to their sizes at the save (rank 0): the steps after it run, and are logged, again.

    Other files of the folder are not the run's, whatever their names end in.
    """
    refuse_links(folder)
    present = [folder / name for name in LOGS if (folder / name).exists()]
    for log in present if rank() == 0 else ():
        size = sizes.get(log.name, 0)
        if log.stat().st_size < size:
            print0(f"warning: {log} is shorter than when the checkpoint was saved: it misses steps")
        os.truncate(log, min(size, log.stat().st_size))


# ---------------------------------------------------------------------------------------------------------------
# Stop signals

class Interrupted(BaseException):
    """Raised by a stop signal where `unless_stopped` allows it."""


# SIGHUP: the terminal that the run was started on is gone.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignal:
    """The first of STOP_SIGNALS asks for a stop at the next safe point; a second one ends the process.

    SIGHUP stays ignored where it was, as under nohup.
    """
    came = False  # to this process, at any time

    def __init__(self):
        self.number, self.interruptible = 0, False
        # The thread sees a signal even while the main thread waits in a collective, where no Python handler runs.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._sockets = reader, writer
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _watch(self, reader: socket.socket):
        first = None
        while number := reader.recv(1)[0]:
            first = first or time.monotonic()
            # Ctrl-C and batch systems signal torchrun and ranks alike, and torchrun passes its own on: an echo of the
            # first signal within two seconds is not a second one.
            if number in STOP_SIGNALS and time.monotonic() - first > 2:
                os._exit(128 + number)

    def _on_signal(self, number: int, frame):
        self.number, StopSignal.came = self.number or number, True
        if self.interruptible:
            self.interruptible = False
            raise Interrupted

    def unless_stopped(self, function, *args, **kwargs):
        """The function's result, or None if a signal came: for work without collectives whose result can be dropped."""
        try:
            self.interruptible = True
            if self.number:
                return None
            result = function(*args, **kwargs)
            self.interruptible = False
            return result
        except Interrupted:
            return None
        finally:
            self.interruptible = False

    def agreed(self, device) -> int:
        """The number of a signal that any rank has seen, or 0; the same on every rank. A collective."""
        return all_max(self.number, device)


def save_step(checkpoints: Checkpoints, state: dict):
    """Save the state after the last whole step, unless that is done already."""
    checkpoints.poll(wait=True)
    name = f"step_{state['step']}"
    if state["step"] and not (checkpoints.folder / name / "manifest.json").exists():
        checkpoints.save(name, state)
        checkpoints.poll(wait=True)


def stop_run(checkpoints: Checkpoints, state: dict, number: int):
    """Save the state after the last whole step and leave with exit code 75."""
    save_step(checkpoints, state)
    print0(f"stopped by {signal.Signals(number).name} after step {state['step']}; go on with --resume auto")
    raise SystemExit(STOPPED)


# ---------------------------------------------------------------------------------------------------------------
# Failures

def first_to_fail() -> bool:
    """Whether no other rank has failed before. What its peers then meet, lost connections, is only the echo."""
    if world_size() == 1 or not dist.is_initialized():
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"failures {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError):  # the store went down with the rank that failed
        return False


def out_of_memory(error: BaseException) -> str | None:
    """The one sentence to print for an error, if it is that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
        return None
    where = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "ask_local" in where:
        remedy = "in the teacher: lower --concurrency"
    elif "decode" in where:
        remedy = "in a rollout: set --rollout_rows below the rows that the line 'KV cache' named, or lower --max_completion_tokens"
    elif where & {"update", "score", "sft_loss"}:
        remedy = "in a micro-batch: lower --tokens_per_micro_batch, or turn on --activation_checkpointing or --cpu_offload"
    else:
        remedy = "for model and optimiser: use more ranks, or turn on --cpu_offload"
    return f"error: rank {rank()} ran out of memory {remedy}; then go on with --resume auto"


PATIENCE = 30  # seconds that a rank which refuses to go on leaves to rank 0 to say why


def guarded(main):
    """Run a script's `main`. A rank that raises ends the whole job, its sentence or traceback printed once (a node).

    torchrun stops the other ranks when one leaves; they may not leave by way of their process group, which can wait
    for the dead for ever, and say nothing about the connections that they lost.
    """
    code, message, orderly = 1, "", False
    try:
        main()
        code, orderly = 0, True
    except SystemExit as stop:
        code = stop.code if stop.code in (0, STOPPED) else 0 if stop.code is None else 1
        orderly = code != 1
        if not orderly:
            first_to_fail()  # peers that lose this rank are to keep quiet
            message = stop.code if isinstance(stop.code, str) else ""
        if rank() > 0 and message:
            # Bad input fails on all ranks alike. torchrun stops them all as soon as one has left, which must not be
            # before rank 0 has spoken. A rank that is still here after that failed alone and speaks for itself.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(0 if StopSignal.came else PATIENCE)
            message = "" if StopSignal.came else f"rank {rank()}: {message}"
    except KeyboardInterrupt:  # where no StopSignal takes it: evaluation, and before a training's first step
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends the ranks another
            signal.signal(number, signal.SIG_IGN)
        code, message = STOPPED, "stopped by Ctrl-C" if first_to_fail() else ""
    except BaseException as error:
        if first_to_fail():
            message = out_of_memory(error) or f"rank {rank()} failed:\n{traceback.format_exc()}"
    if orderly:
        close_distributed()
        if world_size() == 1:
            sys.exit(code)
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    # Not by way of the interpreter's end: there a thread of the process group can abort a run whose work is done.
    os._exit(code)


def check_skipped(in_a_row: int, limit: int, checkpoints: Checkpoints):
    """End a run whose gradient stays not finite. Raises SystemExit on all ranks alike."""
    if in_a_row >= limit > 0:
        checkpoints.poll(wait=True)
        fail(f"the gradient was not finite in {in_a_row} steps in a row, all skipped: look at loss, grad_norm and kl in "
             f"{checkpoints.folder / 'metrics.jsonl'} before them; then start again with a lower --lr, or go on from a "
             "checkpoint with --resume auto (--max_skipped sets this limit)")


def close_distributed():
    if dist.is_initialized():
        dist.destroy_process_group()
