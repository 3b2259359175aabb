"""A run's folder: opened, refused or cleared; the settings, metrics and records that are written in it.

`run.json` holds the settings and marks the folder as ours, `machine.json` hardware and versions,
`metrics.jsonl` a line a step, `rollouts.jsonl` logged rollouts; checkpoints and the final model are checkpoint.py's.
"""
import atexit
import contextlib
import dataclasses
import errno
import fcntl
import importlib
import json
import math
import os
import platform
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from model_utils import barrier, everyone, fail, print0, rank, world_size

LOGS = "metrics.jsonl", "rollouts.jsonl"  # what a training appends to, and all that a resume cuts
# All names that a training writes, replaces or removes: of files, and of folders.
FILES = "run.json", "machine.json", *LOGS
FOLDERS = re.compile(r"(model|step_[0-9]+)(\.tmp|\.old\.tmp)?")
RESULTS = "records.jsonl", "summary.json"  # what an evaluation writes beside its run.json

LOCK = ".lock"  # in the folder of --out
NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL

# What may differ when a run goes on: --steps, what it writes down, and how its work is laid out on machines.
# With a linear or cosine schedule, another --steps bends the rest of the schedule. How many rows are decoded at once
# (--rollout_rows, free memory) and the number of ranks change which samples are drawn, not their distribution.
FREE_SETTINGS = {"out", "overwrite", "resume", "steps", "save_every", "keep", "on_save_error", "eval_every", "show_every",
                 "show_tokens", "log", "max_skipped", "tokens_per_micro_batch", "rollout_rows", "cuda_graphs",
                 "shard_within", "activation_checkpointing", "cpu_offload"}


def changed_settings(saved: dict, settings, where: str) -> dict[str, list]:
    """Free settings that differ from the `saved` ones, as name -> [then, now]. Raises SystemExit if others differ."""
    changed = {field.name: [saved.get(field.name, field.default), getattr(settings, field.name)]
               for field in dataclasses.fields(settings)}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    if fixed := [name for name in changed if name not in FREE_SETTINGS]:
        fail(f"{where} belongs to another configuration: " + ", ".join(
            f"--{name} was {changed[name][0]!r}, not {changed[name][1]!r}" for name in fixed)
            + "; resume with the settings of its run.json, or choose another --out")
    return {name: pair for name, pair in changed.items() if name not in ("out", "overwrite", "resume")}


def read_settings(path: Path) -> dict:
    """The settings that a run.json holds; {} where there is none. Raises SystemExit with the remedy."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        fail(f"{path} is damaged: restore it, or remove it to go on without its check of settings")


def stage_of(folder: Path) -> str | None:
    """Whose run.json it is: training, evaluation or None (not ours); "" if missing or damaged."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return ""
    if not isinstance(record, dict):
        return None
    if {"model", "data", "out", "overwrite", "resume"} <= record.keys():  # older than "stage"
        record.setdefault("stage", "training" if "lr" in record else "evaluation")
    return record["stage"] if record.get("stage") in ("training", "evaluation") else None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours; a damaged one may have lost one of its files."""
    return any((path / name).exists() for name in ("manifest.json", "trainer.json"))


def not_ours(folder: Path) -> list[str]:
    """Names of FILES and FOLDERS in a folder that no training wrote, as far as its record tells."""
    present = sorted(path for path in folder.glob("*")
                     if path.name in FILES or FOLDERS.fullmatch(path.name))
    checkpoints, stage = [path for path in present if is_checkpoint(path)], stage_of(folder)
    if stage != "training" and not (stage == "" and checkpoints):
        return [path.name for path in present]

    def foreign(path: Path) -> bool:
        if path.is_dir() != (path.name not in FILES):
            return True
        if path.is_symlink():  # to a folder: refuse_blocked allows it to a --resume only
            return path.name in FILES
        if path.name == "model":  # the user's base model may lie beside a checkpoint
            return not (folder / "run.json").exists()
        is_step = path.name not in FILES and not path.suffix
        return is_step and any(path.iterdir()) and path not in checkpoints
    return [path.name for path in present if foreign(path)]


def remove(folder: Path):
    """Delete a checkpoint; killed half-way, what is left does not bear a checkpoint's name."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    folder.rename(doomed)
    if doomed.is_symlink():  # what it leads to is not ours
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def remove_run(folder: Path):
    """Delete what a training wrote, and the evaluation in eval/; `not_ours` has found nothing else.

    run.json stays, for the new run to replace: a kill in between leaves a folder still known as ours.
    """
    evaluation = folder / "eval"
    evaluated = stage_of(evaluation) == "evaluation" and not evaluation.is_symlink()
    if evaluated and (refusal := lock(evaluation / LOCK)):
        fail(refusal)
    # In reverse, x.old.tmp goes before x, which takes that name.
    for old in sorted((p for p in folder.iterdir() if FOLDERS.fullmatch(p.name)), reverse=True):
        shutil.rmtree(old) if old.suffix else remove(old)
    for name in LOGS:
        (folder / name).unlink(missing_ok=True)
    if evaluated:
        for name in (*RESULTS, LOCK, "run.json"):
            (evaluation / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the user's own files in it keep it
            evaluation.rmdir()


def refuse_links(folder: Path):
    """Refuse logs that are links: what they point at is not the run's to write or to cut."""
    if links := [name for name in LOGS if (folder / name).is_symlink()]:
        fail(f"{folder / links[0]} is a link, and a run writes through none: put the file itself there, "
             "or choose another --out")


def make_folder(path: Path):
    """Make the folder of --out with its parents and see that it can be written. Raises SystemExit with the remedy."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        fail(f"cannot write in {path} ({error.strerror}); choose another --out")


held: dict[tuple[int, int], int] = {}  # this process's locks: (device, inode) -> descriptor


def close_locks():
    """In a fork: it would keep its parent's locks when that is gone; exec closes them itself."""
    for handle in held.values():
        os.close(handle)
    held.clear()


os.register_at_fork(after_in_child=close_locks)


def hold(path: Path):
    """Keep every other process out of an output, by a lock on `path` that ends with this process.

    Rank 0 locks. Raises SystemExit on all ranks if another process holds the lock. A collective.
    """
    if refusal := everyone(lock(path) if rank() == 0 else None)[0]:
        fail(refusal)


def lock(path: Path) -> str | None:
    """Lock a file, made if need be and kept, for this process's life; or why that cannot be."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        return f"cannot lock {path} ({error.strerror}); choose another --out"
    file = os.fstat(handle).st_dev, os.fstat(handle).st_ino
    if file in held:
        os.close(handle)
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return (f"{holder} is writing there ({path} is locked): wait for it, stop it, "
                    "or choose another --out")
        if error.errno not in NO_LOCKS:
            return f"cannot lock {path} ({error.strerror}); choose another --out"
        print0(f"warning: the file system of {path} has no locks ({error.strerror}): "
               "see to it that no other run writes there")
        return None
    text = os.pread(handle, 200, 0)
    if text and not text.startswith(b"process "):
        os.close(handle)
        return f"{path} is no lock of ours: move it away, or choose another --out"
    held[file] = handle
    with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return None


def check_run(settings) -> Path:
    """The run folder --out, made if need be; refuses one that holds a run, unless told otherwise. Removes nothing yet.

    With --resume the run's settings are compared with these. Raises SystemExit with the remedy, or with code 0 where
    the run is finished already: a command that is queued again and again then ends as the last one did.
    """
    out, folder, resume = settings.out, Path(settings.out), settings.resume
    finished = (folder / "model").is_dir()  # or a link to one: finished, and moved away
    refuse_blocked(folder, settings)
    for name in ("model", "data", "eval_data"):  # a run's own inputs must not lie among what --overwrite removes
        value = getattr(settings, name, "")
        if settings.overwrite and value and folder.resolve() in Path(value).resolve().parents:
            fail(f"--{name} {value} lies in --out {out}, which --overwrite would clear; choose another --out")
    refuse_occupied(folder, settings)
    if resume and (saved := read_settings(folder / "run.json")):
        changed = changed_settings(saved, settings, out)
        done = max((int(path.parent.name[5:]) for path in folder.glob("step_*/manifest.json")
                    if path.parent.name[5:].isdigit()), default=0)
        then, now = changed.get("steps", (done, done))
        if finished and now != then:
            fail(f"{out} is finished, after --steps {then}: to train on, begin another --out with --model {folder / 'model'}")
        if now < done:
            fail(f"{out} is past step {done}: resume with --steps of at least that")
    if resume and finished:
        print0(f"{out} is finished: nothing to resume (--overwrite would begin again)")
        raise SystemExit(0)
    if rank() == 0:
        make_folder(folder)
    return folder


def refuse_blocked(folder: Path, settings):
    """Refuse a link or a file where the run is to put a folder: later, nothing could be saved there.

    A link to a checkpoint is fine to --resume from.
    """
    for path in (folder / "model", folder / "model.tmp", *folder.glob("step_[0-9]*")):
        if path.is_symlink() and not (settings.resume and path.is_dir()) or path.is_file():
            fail(f"{path} is a link or a file, and the run is to put a folder there: move it away, or "
                 "choose another --out")


def refuse_occupied(folder: Path, settings):
    """Refuse a folder that holds a run, unless --resume or --overwrite says what is to become of it.

    Names that a run would write, and no run of ours wrote, are refused with every flag.
    """
    refuse_links(folder)
    if stage_of(folder) == "evaluation":
        fail(f"{folder} holds an evaluation, whose run.json a training would replace; "
             "choose another --out")
    if names := not_ours(folder):
        fail(f"{folder} holds {', '.join(names)}, and no run.json or checkpoint there says that a "
             "run of ours wrote that: move it away, or choose another --out")
    if not settings.resume and not settings.overwrite and any((folder / name).exists() for name in ("metrics.jsonl", "model")):
        fail(f"{folder} already holds a run: choose another --out, pass --resume to go on, or --overwrite to replace it")


def open_run(folder: Path, settings):
    """Begin to write in a run folder that `check_run` has passed: its settings go to run.json.

    Called when all that can be wrong has been read, models included: --overwrite removes the old run here, and its
    evaluation in eval/. With --resume, settings that have changed are printed, and noted in run.json under "changes".
    A collective: nothing is removed before every rank has got this far.
    """
    barrier()
    if rank() != 0:
        return
    refuse_blocked(folder, settings)
    refuse_occupied(folder, settings)  # another run may have begun here while the model was loading
    record = {"stage": "training", **dataclasses.asdict(settings)}
    if settings.resume and (saved := read_settings(folder / "run.json")):
        changed = changed_settings(saved, settings, settings.out)
        record["changes"] = saved.get("changes", []) + [changed] * bool(changed)
        for name, (then, now) in changed.items():
            print0(f"--{name} was {then!r} and is {now!r} from here on")
    elif settings.overwrite:
        remove_run(folder)
    write_whole(folder / "run.json", record)
    write_whole(folder / "machine.json", machine())


def write_whole(path: Path, value):
    """Write JSON in one go: a kill in mid-write leaves the old file, not half a new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def append_jsonl(path: Path, records: list[dict]):
    """Add records to a JSONL file (rank 0), one line each, flushed to the operating system.

    All or none: raises OSError, on a full disk for one.
    """
    if rank() != 0:
        return
    data = "".join(json.dumps(finite(record)) + "\n" for record in records).encode()
    with open(path, "ab", buffering=0) as handle:  # a buffer would be written again on closing
        end = os.fstat(handle.fileno()).st_size
        try:
            while data:  # a full disk takes a part first
                data = data[handle.write(data):]
        except OSError:
            handle.truncate(end)  # no half line
            raise


def finite(value):
    """A record with None for each number that is not finite: JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, str]:
    """Hardware and versions that a run's figures depend on."""
    from importlib.metadata import version
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"device": f"{len(gpus)} x {gpus[0]}" if gpus else f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "ranks": str(world_size()), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": version("transformers"), "system": platform.system()}


def open_logger(name: str, folder: Path, settings) -> Callable[[dict], None]:
    """A function that sends one step's metrics to `name` (one of model_utils.LOGGERS; empty: nowhere), called as in
    metrics.jsonl. Only rank 0 logs, and only the package asked for is imported.
    """
    if not name or rank() != 0:
        return lambda metrics: None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / "tensorboard")
        atexit.register(writer.close)

        def log(metrics: dict):
            for key, value in metrics.items():
                writer.add_scalar(key, value, metrics["step"])
        return log
    package = importlib.import_module(name)  # wandb, and trackio, which speaks its language
    package.init(project="pta-grpo", name=folder.name, config=dataclasses.asdict(settings))
    atexit.register(package.finish)
    return lambda metrics: package.log(metrics, step=metrics["step"])
