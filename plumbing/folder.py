"""A run's folder: who may write there, its settings and its logs.

    run.json         the stage that wrote it and its settings: the record that the folder is ours
    machine.json     hardware and versions
    metrics.jsonl    one line per step
    rollouts.jsonl   logged rollouts

The folder's checkpoints and final model are written by checkpoint.py.
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
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from plumbing.ranks import all_gather, barrier, fail, print0, rank, require, world_size

LOGS = "metrics.jsonl", "rollouts.jsonl"  # a training appends to these, and a resume cuts them
# All names that a training writes, replaces or removes: of files, and of folders.
FILES = "run.json", "machine.json", *LOGS
FOLDERS = re.compile(r"(model|step_[0-9]+)(\.tmp|\.old\.tmp)?")
RESULTS = "records.jsonl", "summary.json"  # what an evaluation writes beside its run.json

# --------------------------------------------------------------------------------------------------
# Settings

# These may change when a run goes on: --steps, what it writes down, and how its work is laid out on
# machines. With a linear or cosine schedule, another --steps changes the rest of the schedule. How
# many rows are decoded at once (--rollout_rows, free memory), --tp and the number of ranks change
# which samples are drawn, but not their distribution.
FREE_SETTINGS = {
    "out", "overwrite", "resume", "steps", "save_every", "keep", "on_save_error", "eval_every",
    "show_every", "token_log_questions", "log", "max_skipped", "tokens_per_micro_batch",
    "rollout_rows", "tp", "shard_within", "activation_checkpointing", "cpu_offload",
}


def changed_settings(saved: dict, settings, where: str) -> dict[str, list]:
    """Free settings that differ from the `saved` ones, as name -> [then, now].

    Raises SystemExit, which names `where` they were saved, if other settings differ.
    """
    changed = {}
    for field in dataclasses.fields(settings):
        then, now = saved.get(field.name, field.default), getattr(settings, field.name)
        then = tuple(then) if isinstance(then, list) else then  # JSON has no tuples
        if then != now:
            changed[field.name] = [then, now]
    fixed = {name: pair for name, pair in changed.items() if name not in FREE_SETTINGS}
    listed = ", ".join(f"--{name} was {then!r}, not {now!r}" for name, (then, now) in fixed.items())
    require(
        not fixed,
        f"{where} belongs to another configuration: {listed}; resume with the settings of its "
        "run.json, or choose another --out",
    )
    return {n: pair for n, pair in changed.items() if n not in ("out", "overwrite", "resume")}


def read_settings(path: Path) -> dict:
    """The settings that a run.json holds; {} if there is none. Raises SystemExit if damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        fail(f"{path} is damaged: restore it, or remove it to go on without its check of settings")


# --------------------------------------------------------------------------------------------------
# Whose folder it is


def stage_of(folder: Path) -> str | None:
    """The stage that wrote a folder's run.json: "training", "evaluation", or None if not ours.

    "" if it is missing or damaged.
    """
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
    """Whether a folder is a checkpoint of ours. A damaged one may have lost one of its files."""
    return any((path / name).exists() for name in ("manifest.json", "trainer.json"))


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first. Damaged ones are among them."""
    found = [path for path in folder.glob("step_*") if re.fullmatch("step_[0-9]+", path.name)]
    return sorted(filter(is_checkpoint, found), key=step_of, reverse=True)


def present(folder: Path) -> list[Path]:
    """What a folder holds under the names that a training writes, replaces or removes."""
    named = lambda path: path.name in FILES or FOLDERS.fullmatch(path.name)
    return sorted(filter(named, folder.glob("*")))


def refuse_blocked(paths: Iterable[Path], resume: bool = False):
    """Refuse links, and files in the place of folders or the reverse: a run writes through none.

    With `resume`, a link to a folder passes: a checkpoint may have been moved away.
    """
    for path in paths:
        is_log = path.name in FILES
        kind, wrong = ("file", "folder") if is_log else ("folder", "file")
        right = path.is_file() if is_log else path.is_dir()
        linked = path.is_symlink() and (is_log or not resume)
        require(
            right and not linked,
            f"{path} is a link or a {wrong}, and a run puts a {kind} there: move it away, or "
            "choose another --out",
        )


def not_ours(folder: Path) -> list[str]:
    """The names of what is `present` in a folder though no training wrote it, as far as we know.

    If run.json is a training's, all is ours, except for a step_N with files that is no checkpoint.
    Without a readable run.json, a checkpoint shows the same. But the user's base model may be
    beside it, so model/ is ours only if there is a run.json.
    """
    found, stage = present(folder), stage_of(folder)
    if stage != "training" and not (stage == "" and any(map(is_checkpoint, found))):
        return [path.name for path in found]

    def foreign(path: Path) -> bool:
        if path.name == "model":
            return not (folder / "run.json").exists()
        is_step = path.name.startswith("step_") and not path.suffix
        return is_step and any(path.iterdir()) and not is_checkpoint(path)

    return [path.name for path in found if foreign(path)]


def refuse_unusable(path: Path):
    """Refuse a path that the system does not take: too long a name, links in a circle."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        fail(f"--out {str(path)[:80]} cannot be used ({error.strerror}): choose another --out")


def refuse_place(out: str) -> Path:
    """The folder --out. Raises SystemExit if it is empty, or a folder with another purpose."""
    require(out.strip(), "--out is empty: name a folder, such as runs/mine")
    refuse_unusable(Path(out))
    # Some containers have no home for their user: then it stays "~".
    folder, home = Path(out).resolve(), Path(os.path.expanduser("~")).resolve()
    what = ""
    if folder == home or folder in home.parents:  # "/" is among them
        what = f"the folder {folder}, which holds more than a run"
    elif (folder / ".git").exists() or folder == Path(__file__).resolve().parents[1]:
        what = f"{folder}, which holds a repository"
    require(not what, f"--out {out} is {what}: name a folder for this run alone, as runs/mine")
    return Path(out)


def refuse_folder(folder: Path, settings):
    """Refuse a folder in which this training must not begin. Raises SystemExit with the remedy."""
    refuse_blocked(present(folder), settings.resume)
    require(
        stage_of(folder) != "evaluation",
        f"{folder} holds an evaluation, whose run.json a training would replace; choose another "
        "--out",
    )
    names = not_ours(folder)  # refused with every flag
    require(
        not names,
        f"{folder} holds {', '.join(names)}, and no run.json or checkpoint there says that a run "
        "of ours wrote that: move it away, or choose another --out",
    )
    holds_run = any((folder / name).exists() for name in ("metrics.jsonl", "model"))
    require(
        settings.resume or settings.overwrite or not holds_run,
        f"{folder} already holds a run: choose another --out, pass --resume to go on, or "
        "--overwrite to replace it",
    )


# --------------------------------------------------------------------------------------------------
# A lock on --out

LOCK = ".lock"  # in the folder of --out
NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL
held: dict[tuple[int, int], int] = {}  # this process's locks: (device, inode) -> descriptor


def close_locks():
    """For a forked child, which would keep its parent's locks when the parent is gone."""
    for handle in held.values():
        os.close(handle)
    held.clear()


os.register_at_fork(after_in_child=close_locks)  # exec closes them itself


def hold(path: Path):
    """Keep every other process out of an output, by a lock on `path` that ends with this process.

    Rank 0 locks. Raises SystemExit on all ranks if another process holds the lock. A collective, to
    be called after init_distributed.
    """
    if refusal := all_gather(lock(path) if rank() == 0 else None)[0]:
        fail(refusal)


def lock(path: Path) -> str | None:
    """Lock a file for as long as this process lives. Returns None, or why that cannot be.

    The file is made if need be, and stays.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        return f"cannot lock {path} ({error.strerror}); choose another --out"
    file = os.fstat(handle).st_dev, os.fstat(handle).st_ino
    if file in held:
        os.close(handle)
        return None
    text = ""
    try:
        text = os.pread(handle, 200, 0).decode(errors="replace").strip()
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return why_no_lock(path, error, holder=text or "another process")
    if not (path.exists() and os.path.samestat(path.stat(), os.fstat(handle))):
        os.close(handle)  # another run has removed it meanwhile, with its results
        return lock(path)
    if text and not text.startswith("process "):
        os.close(handle)
        return f"{path} is no lock of ours: move it away, or choose another --out"
    held[file] = handle
    with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return None


def why_no_lock(path: Path, error: OSError, holder: str) -> str | None:
    """Why a file could not be locked; None, with a warning, if its file system has no locks."""
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        remedy = "wait for it, stop it, or choose another --out"
        return f"{holder} is writing there ({path} is locked): {remedy}"
    if error.errno not in NO_LOCKS:
        return f"cannot lock {path} ({error.strerror}); choose another --out"
    print0(
        f"warning: the file system of {path} has no locks ({error.strerror}): make sure that no "
        "other run writes there"
    )
    return None


# --------------------------------------------------------------------------------------------------
# Begin a run


def make_folder(path: Path):
    """Make a folder with its parents, and see that it can be written. Raises SystemExit if not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        fail(f"cannot write in {path} ({error.strerror}); choose another --out")


def check_run(settings) -> Path:
    """Make the folder --out of a training, and return it. Removes nothing yet.

    Raises SystemExit with the remedy if the run must not begin there. With --resume its code is 0
    if the run is finished: a command that is queued again and again then ends as the last one did.
    """
    folder = refuse_place(settings.out)
    for name in ("model", "data", "eval_data") if settings.overwrite else ():
        value = getattr(settings, name, "")
        inside = value and folder.resolve() in Path(value).resolve().parents
        require(
            not inside,
            f"--{name} {value} is inside --out {folder}, which --overwrite would clear; choose "
            "another --out",
        )
    refuse_folder(folder, settings)
    if settings.resume:
        check_resume(folder, settings)
    if rank() == 0:
        make_folder(folder)
    return folder


def check_resume(folder: Path, settings):
    """Refuse to resume with other settings or past the last step. End if the run is finished."""
    finished = (folder / "model").is_dir()  # or a link to one: finished, and moved away
    if saved := read_settings(folder / "run.json"):
        changed = changed_settings(saved, settings, str(folder))
        whole = [path for path in step_folders(folder) if (path / "manifest.json").exists()]
        done = step_of(whole[0]) if whole else 0
        then, now = changed.get("steps", (done, done))
        require(
            not finished or now == then,
            f"{folder} is finished, after --steps {then}: to train on, begin another --out with "
            f"--model {folder / 'model'}",
        )
        require(now >= done, f"{folder} is past step {done}: resume with --steps of at least that")
    if finished:
        print0(f"{folder} is finished: nothing to resume (--overwrite would begin again)")
        raise SystemExit(0)


def check_evaluation(config):
    """Make the folder --out of an evaluation. Refuse one that holds what is not its to replace."""
    out, other = refuse_place(config.out), "choose another --out"
    found = [name for name in ("run.json", *RESULTS) if (out / name).exists()]
    stage, results = stage_of(out), found not in ([], ["run.json"])
    training = stage == "training" or (out / "metrics.jsonl").exists()
    require(not training, f"{out} is a training run's folder: {other}, such as {out / 'eval'}")
    allowed = config.resume or config.overwrite or not results
    require(allowed, f"{out} already holds results: {other}, or pass --resume or --overwrite")
    # Results without a run.json of ours are left to --resume, which compares the weights.
    ours = not found or stage == "evaluation" or config.resume and results
    require(ours, f"{out} holds {', '.join(found)} that no evaluation wrote: move it, or {other}")
    if rank() == 0:
        make_folder(out)


def open_run(folder: Path, settings):
    """Begin to write in a folder that `check_run` has passed: the settings go to run.json.

    Call it when all that can be wrong has been read, models included, because --overwrite removes
    the old run here, with its evaluation in eval/. With --resume, settings that have changed are
    printed, and noted in run.json under "changes". A collective: nothing is removed before every
    rank has come this far.
    """
    barrier()
    if rank() != 0:
        return
    refuse_folder(folder, settings)  # another run may have begun here since check_run
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


def remove(folder: Path):
    """Delete a checkpoint. If killed half-way, what is left does not bear a checkpoint's name."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    folder.rename(doomed)
    if doomed.is_symlink():  # the folder that it leads to is not ours
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def remove_run(folder: Path):
    """Delete what a training wrote, and the evaluation in eval/. `not_ours` has found nothing else.

    run.json stays until the new run replaces it, so that after a kill in between the folder is
    still known as ours.
    """
    evaluation = folder / "eval"
    evaluated = stage_of(evaluation) == "evaluation" and not evaluation.is_symlink()
    if evaluated and (refusal := lock(evaluation / LOCK)):
        fail(refusal)
    folders = [path for path in folder.iterdir() if FOLDERS.fullmatch(path.name)]
    for old in sorted(folders, reverse=True):  # x.old.tmp before x, which takes that name
        shutil.rmtree(old) if old.suffix else remove(old)
    for name in LOGS:
        (folder / name).unlink(missing_ok=True)
    if evaluated:
        for name in (*RESULTS, LOCK, "run.json"):
            (evaluation / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the user's own files in it keep it
            evaluation.rmdir()


# --------------------------------------------------------------------------------------------------
# Write


def write_whole(path: Path, value):
    """Write JSON in one go: a kill in mid-write leaves the old file, not half a new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def append_jsonl(path: Path, records: list[dict]):
    """Add records to a JSONL file (rank 0), one line each, flushed to the operating system.

    All or none of them: raises OSError, for example if the disk is full.
    """
    if rank() != 0:
        return
    data = "".join(json.dumps(finite(record)) + "\n" for record in records).encode()
    with open(path, "ab", buffering=0) as file:  # a buffer would be written again on closing
        end = os.fstat(file.fileno()).st_size
        try:
            while data:  # a disk that is nearly full takes a part first
                data = data[file.write(data):]
        except OSError:
            file.truncate(end)  # no half line
            raise


def finite(value):
    """A record with None for each number that is not finite: JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, str]:
    """The hardware and versions that a run's figures depend on."""
    from importlib.metadata import version

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "device": f"{len(gpus)} x {gpus[0]}" if gpus else cpu,
        "ranks": str(world_size()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.system(),
    }


def open_logger(name: str, folder: Path, settings) -> Callable[[dict], None]:
    """A function that sends one step's metrics to `name`, called as in metrics.jsonl.

    `name` is a choice of --log; "" sends them nowhere. Only rank 0 logs, and only the package asked
    for is imported.
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
    package = importlib.import_module(name)  # wandb, or trackio, which has the same functions
    package.init(project="pta-grpo", name=folder.name, config=dataclasses.asdict(settings))
    atexit.register(package.finish)
    return lambda metrics: package.log(metrics, step=metrics["step"])
