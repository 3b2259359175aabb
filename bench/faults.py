"""What happens to a run that meets kills, damaged files, full disks and failing ranks.

    python -m bench.faults                     all checks, on a CPU with the toy task: about 10
                                               minutes on 2 cores
    python -m bench.faults --only kill disk    some of: ranks kill reshape damage disk nodes signals
                                               failures overhead

Each check prints one line with its figure and ok or FAILED. The exit code is 1 if any failed.
`python -m bench.faults inject NAME FLAGS` runs grpo.py with these flags and a built-in fault. It
also works under torchrun.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plumbing.ranks import fail

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
}
RUN = """--questions 4 --steps 6 --lr 2e-4 --schedule linear --max_prompt_tokens 100
--max_plan_tokens 40 --max_completion_tokens 80 --eval_every 4 --eval_size 12 --show_every 3
--save_every 1 --keep 2""".split()
failed = 0

# --------------------------------------------------------------------------------------------------
# Tools


def launch(ranks: int, *command, nodes: tuple[int, int, int] | None = None) -> subprocess.Popen:
    """Start `python command` on some ranks of this host.

    `nodes` is (how many, which one, port) for one of several nodes.
    """
    launcher = [sys.executable]
    if nodes or ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    if nodes:
        many, which, port = nodes
        launcher += [f"--nnodes={many}", f"--node_rank={which}"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    elif ranks > 1:
        launcher += ["--standalone"]
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, **both)


def finish(process: subprocess.Popen, seconds: float = 600) -> tuple[int, str]:
    """(exit code, output). A run that hangs is killed and has code -9."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
    return process.returncode, output


def run(ranks: int, *command, seconds: float = 600) -> tuple[int, str]:
    """(exit code, output) of `python command` on some ranks."""
    return finish(launch(ranks, *command), seconds)


def descendants(pid: int) -> list[int]:
    lists = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for part in lists for child in part]
    return children + [deeper for child in children for deeper in descendants(child)]


def kill(process: subprocess.Popen):
    """kill -9 of a launcher with all its ranks and their workers."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def logged(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict]:
    """A run's metrics, without times and without the grader's counts.

    How many answers the grader judged depends on what it had judged before.
    """
    timed = lambda name: "second" in name or name == "tokens_per_s" or name.startswith("grader_")
    return [{k: v for k, v in line.items() if not timed(k)} for line in logged(folder)]


def seconds_per_step(folder: Path) -> float:
    return statistics.median(line["seconds"] for line in logged(folder))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs are equal to the bit: metrics, logged rollouts, final weights."""
    rollouts = [(folder / "rollouts.jsonl").read_bytes() for folder in (a, b)]
    equal = rollouts[0] == rollouts[1] and weights(a / "model") == weights(b / "model")
    return equal and metrics(a) == metrics(b)


def check(ok: bool, what: str):
    global failed
    failed += not ok
    print(f"{'ok    ' if ok else 'FAILED'}  {what}", flush=True)


def line_with(words: str, output: str) -> str:
    return next((line for line in output.splitlines() if words in line), "no message")


def prepare(folder: Path) -> list[str]:
    """Make toy data and the base model. Returns the flags of a short run on them."""
    sizes = "--sft 20 --train 200 --test 20 --facts 2 3".split()
    code, output = run(1, "-m", "data.toy", "--out", folder, *sizes)
    if code:
        raise SystemExit(output)
    return ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), *RUN]


# --------------------------------------------------------------------------------------------------
# Faults built into a run. Each is called as fault(number of the call, function, *its arguments).


def mine() -> bool:
    """Whether this rank is the one that a fault of one rank befalls."""
    from plumbing.ranks import rank, world_size

    return rank() == world_size() - 1


def inject(name: str):
    """Give grpo.py a fault, and run it with the flags in sys.argv."""
    import safetensors.torch

    import grpo
    from plumbing.signals import guarded

    where = {
        "raise": (grpo, "grade_groups"),
        "drop": (grpo, "verify"),
        "nan": (grpo, "policy_loss"),
        "oom": (grpo, "policy_loss"),
        "full": (safetensors.torch, "save_file"),
        "slow": (safetensors.torch, "save_file"),
    }
    module, function = where[name]
    original, fault, calls = getattr(module, function), globals()[f"fault_{name}"], []

    def patched(*args, **options):
        calls.append(1)
        return fault(len(calls), original, *args, **options)

    setattr(module, function, patched)
    guarded(grpo.main)


def fault_raise(call, original, *args, **options):
    if mine() and call == 2:
        raise RuntimeError("injected failure")
    return original(*args, **options)


def fault_drop(call, original, *args):
    """After a long wait all answers of one rank are wrong, so that every group is dropped."""
    verdicts = original(*args)
    if mine():
        time.sleep(3)
    return [not mine() and i % 2 == 0 for i in range(len(verdicts))]


def fault_nan(call, original, *args):
    loss, figures = original(*args)
    return (loss * float("nan") if mine() and call >= 3 else loss), figures


def fault_oom(call, original, *args):
    import torch

    if mine() and call == 2:
        raise torch.OutOfMemoryError("injected")
    return original(*args)


def fault_full(call, original, tensors, path, **options):
    if "step_2" in str(path):
        raise OSError(28, "No space left on device")
    return original(tensors, path, **options)


def fault_slow(call, original, tensors, path, **options):
    if "step_2" in str(path):
        time.sleep(60)
    return original(tensors, path, **options)


# --------------------------------------------------------------------------------------------------
# Checks. Each takes the work folder, the flags of a short run and the undisturbed run on 2 ranks.


def check_ranks(work: Path, flags: list[str], whole: Path):
    """fp32, three steps from the same rollouts on 1, 2 and 4 ranks, and on two nodes of two."""
    import torch

    results, worker = {}, ROOT / "tests/distributed_worker.py"
    hsdp = [(2, (2, node, 29611)) for node in (0, 1)]
    runs = {"1 rank": [(1, None)], "2 ranks": [(2, None)], "4 ranks": [(4, None)]}
    for name, parts in {**runs, "2 nodes x 2 ranks, HSDP": hsdp}.items():
        file = work / f"{name[:7]}.pt"
        command = [worker, "--weights", file, *["--shard_within_node"] * ("HSDP" in name)]
        processes = [launch(ranks, *command, nodes=nodes) for ranks, nodes in parts]
        outputs = [finish(process, 300) for process in processes]
        if any(code for code, _ in outputs):
            check(False, f"{name}: {outputs}")
            continue
        lines = [line for line in outputs[0][1].splitlines() if line.startswith("{")]
        results[name] = json.loads(lines[-1])["figures"], torch.load(file)
        first_figures, first = results["1 rank"]
        figures, last = results[name]
        # Relative above 1: fp32 itself resolves a gradient norm of 20 to about 2e-6.
        pairs = [pair for x, y in zip(figures, first_figures) for pair in zip(x, y)]
        gap = max(abs(a - b) / max(1, abs(b)) for a, b in pairs)
        weight_gap = max(float((first[k] - last[k]).detach().abs().max()) for k in first)
        check(
            gap < 1e-5 and weight_gap < 1e-5,
            f"{name}, 3 steps fp32: loss, gradient norm, KL, entropy within {gap:.1e} (relative "
            f"above 1) of 1 rank, weights within {weight_gap:.1e}",
        )


def check_kill(work: Path, flags: list[str], whole: Path, kills: int = 10, seed: int = 0):
    """kill -9 of a 2-rank run at random moments, each followed by --resume.

    Every third kill comes during a save.
    """
    flags = [*flags, "--steps", str(kills + 4)]
    rng, out, whole = random.Random(seed), work / "killed", work / "whole_kills"
    code, output = run(2, "grpo.py", *flags, "--out", whole)
    if code:
        return check(False, output[-2000:])
    command = ["grpo.py", *flags, "--out", out, "--resume"]
    second = seconds_per_step(whole)
    for number in range(kills):
        kill_once(command, out, whole, number, second, rng)
    code, output = run(2, *command)
    check(
        code == 0 and same(out, whole),
        f"after {kills} kills: metrics of {len(metrics(out))} steps, rollouts and final weights "
        "equal to the bit to an undisturbed run's" + output[-2000:] * (code != 0),
    )


def kill_once(command: list, out: Path, whole: Path, number: int, second: float, rng):
    """Start or resume a run, kill it, and check what it leaves."""
    from plumbing.checkpoint import damage
    from plumbing.folder import step_folders, step_of

    in_save = number % 3 == 2
    newest = next(map(step_of, step_folders(out)), 0)
    saving, log, lines = out / f"step_{newest + 1}.tmp", out / "metrics.jsonl", 0
    shutil.rmtree(saving, ignore_errors=True)
    process = launch(2, *command)
    if in_save:
        while process.poll() is None and not saving.exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01))
    else:
        lines = newest + rng.randint(0, 1)
        begun = lambda: (out / "run.json").exists() and lines == 0
        more = lambda: log.exists() and log.read_bytes().count(b"\n") > lines
        while process.poll() is None and not begun() and not more():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 2 * second))
    kill(process)
    process.communicate()
    found = step_folders(out)
    names = ", ".join(path.name for path in found) or "no checkpoint"
    half = ", ".join(path.name for path in out.glob("*.tmp") if path.is_dir()) or "nothing"
    kept = metrics(out) if log.exists() else []
    in_order = [m["step"] for m in kept] == list(range(1, len(kept) + 1))
    check(
        not any(map(damage, found)) and in_order and metrics(whole)[: len(kept)] == kept,
        f"kill -9 {number + 1:2}, {'during a save' if in_save else 'anywhere     '}: {len(kept)} "
        f"steps logged, {names} whole, {half} half-written",
    )


def check_reshape(work: Path, flags: list[str], whole: Path):
    """Save on 2 ranks, go on with 1 and with 4: same weights, same next problems."""

    def problems(folder: Path, step: int) -> list[str]:
        records = map(json.loads, (folder / "rollouts.jsonl").read_text().splitlines())
        return sorted(record["id"] for record in records if record["step"] == step)

    for ranks in (1, 4):
        out = work / f"on_{ranks}"
        shutil.copytree(whole, out)
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "step_5")
        command = ["grpo.py", *flags, "--out", out, "--resume", "--steps"]
        first, output = run(ranks, *command, 4)  # nothing to train: it saves what it has loaded
        loaded = first == 0 and weights(out / "model") == weights(out / "step_4")
        shutil.rmtree(out / "model", ignore_errors=True)
        second, more = run(ranks, *command, 6)
        on = second == 0 and "resuming after step 4" in more
        check(
            loaded and on and problems(out, 6) == problems(whole, 6),
            f"saved on 2 ranks, resumed on {ranks}: weights equal to the bit, the next problems "
            "the same" + (output + more)[-2000:] * (first != 0 or second != 0),
        )


def check_damage(work: Path, flags: list[str], whole: Path):
    """A truncated, a bit-flipped and a half-renamed checkpoint is named, and passed over."""

    def truncate(step: Path):
        file = step / "optimizer.safetensors"
        os.truncate(file, file.stat().st_size - 1000)

    def flip(step: Path):
        file = step / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    def half(step: Path):  # a rename that copies, as between file systems, and stops half-way
        temporary = step.with_name(step.name + ".tmp")
        step.rename(temporary)
        step.mkdir()
        for name in ("model.safetensors", "trainer.json"):  # without the latter, not known as ours
            shutil.move(temporary / name, step / name)

    for name, spoil in {"truncated": truncate, "bit-flipped": flip, "half-renamed": half}.items():
        out = work / name
        shutil.copytree(whole, out)
        shutil.rmtree(out / "model")
        spoil(out / "step_5")
        code, output = run(2, "grpo.py", *flags, "--out", out, "--resume")
        warning = line_with("is damaged", output)
        named = "step_5 is damaged" in warning and "resuming after step 4" in output
        said = warning.replace(str(work), "...").removeprefix("warning: ")
        check(
            code == 0 and named and same(out, whole),
            f"{name}: {said}; resumed after step 4, equal to the bit",
        )


def check_disk(work: Path, flags: list[str], whole: Path):
    """A file system that fills up during a save."""
    disk = work / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", disk]
    mount = subprocess.run(command, capture_output=True, text=True)
    mounted = mount.returncode == 0
    if not mounted:
        why = mount.stderr.strip().replace(str(disk), "...")
        print(f"skipped  a real full disk: no permission to mount a tmpfs ({why})")

    def resize(size: str):
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

    script = ["grpo.py"] if mounted else ["-m", "bench.faults", "inject", "full"]
    try:
        for then in ("stop", "continue"):
            out = (disk if mounted else work) / f"full_{then}"
            # Of about 6 MB each, the third checkpoint is one too many. (--keep rotates only after a
            # save.)
            more = [*flags, "--out", out, "--on_save_error", then]
            code, output = run(2, *script, *more)
            said = line_with("was not saved", output)
            intact = "is whole" in said and "GB" in said
            if then == "continue":
                steps = [m["step"] for m in metrics(out)]
                # The final model may have no room either on a full disk, and that always fails.
                ran = steps == list(range(1, 7))
                check(intact and ran, f"disk full, continue: all {len(steps)} steps ran")
                continue
            resize("60m")
            again, output = run(2, "grpo.py", *more, "--resume")
            check(
                code != 0 and intact and again == 0 and same(out, whole),
                f"disk full, stop: {said.replace(str(work), '...')[:150]}; resumed with more room, "
                "equal to the bit",
            )
            shutil.rmtree(out)
            resize("15m")
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def check_nodes(work: Path, flags: list[str], whole: Path):
    """grpo.py on two nodes of one rank, simulated on this host, against one node of two."""
    for within in ("world", "node"):
        out = work / f"nodes_{within}"
        command = ["grpo.py", *flags, "--out", out, "--shard_within", within]
        processes = [launch(1, *command, nodes=(2, node, 29621)) for node in (0, 1)]
        outputs = [finish(process) for process in processes]
        if any(code for code, _ in outputs):
            check(False, f"two nodes, --shard_within {within}: {outputs[0][1][-2000:]}")
            continue
        gap = max(abs(a[k] - b[k]) for a, b in zip(metrics(out), metrics(whole)) for k in a)
        check(
            gap < 1e-5,
            f"two nodes of one rank, --shard_within {within}: every metric of 6 steps within "
            f"{gap:.1e} of one node",
        )


def check_signals(work: Path, flags: list[str], whole: Path):
    """SIGTERM and SIGINT to the launcher, as a batch system or Ctrl-C sends them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        for ranks in (1, 2):
            out = work / f"{number.name}_{ranks}"
            command = ["grpo.py", *flags, "--out", out, "--save_every", 4]
            process = launch(ranks, *command)
            begun = lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 2
            while process.poll() is None and not begun():
                time.sleep(0.01)
            began = time.time()
            process.send_signal(number)
            code, output = finish(process)
            seconds = time.time() - began
            saved = sorted(path.name for path in out.glob("step_*"))
            again, rest = run(ranks, *command, "--resume")
            stopped = "go on with --resume" in output and len(saved) == 1
            stopped = stopped and (code == 75 if ranks == 1 else code != 0)
            resumed = again == 0 and [m["step"] for m in metrics(out)] == list(range(1, 7))
            resumed = resumed and (ranks == 1 or same(out, whole))
            check(
                stopped and resumed,
                f"{number.name} on {ranks}: {saved} saved, exit code {code} after {seconds:.1f} s; "
                f"resumed{', equal to the bit' * (ranks == 2)}"
                + (output[-1500:] + rest[-500:]) * (not stopped or again != 0),
            )


def check_failures(work: Path, flags: list[str], whole: Path):
    """One of two ranks fails, or lags behind: the job ends, or goes on. It does not hang."""

    def with_fault(name: str, *more):
        began, out = time.time(), work / f"fault_{name}"
        command = ["-m", "bench.faults", "inject", name, *flags, "--out", out, *more]
        code, output = run(2, *command, seconds=300)
        return code, output, time.time() - began

    code, output, seconds = with_fault("raise")
    # Besides, torchrun prints a traceback of its own, of ChildFailedError.
    once = output.count("RuntimeError: injected failure") == 1
    once = once and output.count("Traceback (most recent call last)") == 2
    check(
        code != 0 and once and "Connection closed" not in output,
        f"one rank raises: job over {seconds:.0f} s after its start, its traceback printed once",
    )
    code, output, _ = with_fault("oom")
    said = line_with("ran out of memory", output)
    named = "--tokens_per_micro_batch" in said
    check(code != 0 and named, f"out of memory on one rank: {said}")
    code, output, _ = with_fault("nan", "--max_skipped", 2)
    said = line_with("not finite", output)
    skipped = [m["skipped"] for m in metrics(work / "fault_nan")]
    check(
        code != 0 and "2 steps in a row" in said and skipped[-2:] == [1, 1],
        f"NaN loss on one rank: step skipped on both, stopped after {len(skipped)} steps: "
        f"{said[:110]} ...",
    )
    more = ["--dynamic_sampling", "--dynamic_rounds", 2, "--steps", 2]
    code, output, seconds = with_fault("drop", *more)
    check(
        code == 0,
        f"one rank's groups all dropped and its rewards 3 s late: 2 steps in {seconds:.0f} s, no "
        "hang" + output[-2000:] * (code != 0),
    )
    kill_a_rank(["grpo.py", *flags, "--out", work / "killed_rank"], work / "killed_rank")


def kill_a_rank(command: list, out: Path):
    process = launch(2, *command)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    is_rank = lambda pid: b"grpo.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ranks = [pid for pid in descendants(process.pid) if is_rank(pid)]
    began = time.time()
    os.kill(ranks[-1], signal.SIGKILL)
    code, _ = finish(process)
    seconds = time.time() - began
    check(code != 0 and seconds < 60, f"kill -9 of one rank: job over after {seconds:.1f} s")


def check_overhead(work: Path, flags: list[str], whole: Path):
    """What a save and the per-step calls cost, in one process, on the toy base."""
    from grpo import Config

    size, (copied, blocked, written, polled) = time_saves(work / "overhead", flags[1])
    step, every = 1000 * seconds_per_step(whole), Config.save_every
    check(
        True,
        f"state of {size:.1f} MB: a save blocks for {blocked:.1f} ms, copying alone takes "
        f"{copied:.1f} ms, the thread writes for {written:.1f} ms; per step without a save "
        f"{polled:.3f} ms",
    )
    share = (polled + (blocked + written) / every) / step
    check(
        share < 0.03,
        f"of a step of {step:.0f} ms (4 questions) with the default --save_every {every}, even "
        f"were nothing of the writing hidden: {100 * share:.2f} %",
    )


def time_saves(folder: Path, start: str) -> tuple[float, list[float]]:
    """Megabytes of a run's state, and medians of 20 saves in milliseconds.

    Those of copying it, of the blocking part of a save, of writing it, and of a step's calls.
    """
    import torch

    from grpo import Config
    from model_utils import load_sharded, load_tokenizer, make_optimizer, optimizer_step
    from plumbing.attention import pack
    from plumbing.checkpoint import Checkpoints, copy_to_cpu, optimizer_tensors, split_files
    from plumbing.signals import StopSignal
    from plumbing.weights import model_tensors

    torch.set_num_threads(1)
    device, config = torch.device("cpu"), Config(activation_checkpointing=False)
    model, tokenizer = load_sharded(start, device, config), load_tokenizer(start)
    optimizer, stop = make_optimizer(model, 1e-3, 0.01), StopSignal()
    model.token_logprobs(pack([[3, 4, 5, 6]], [1], device))[0].sum().backward()
    optimizer_step(model, optimizer, 1e-3, 1.0)
    checkpoints = Checkpoints(folder, model, tokenizer, optimizer, config)

    def milliseconds(action) -> float:
        began = time.perf_counter()
        action()
        return 1000 * (time.perf_counter() - began)

    def copy():
        copy_to_cpu(split_files(list(model_tensors(model).items()), "model"))
        copy_to_cpu(split_files(optimizer_tensors(model, optimizer), "optimizer"))

    calls = lambda: (checkpoints.poll(), stop.agreed(device), stop.agreed(device))
    times = []
    for n in range(1, 21):
        copied = milliseconds(copy)
        blocked = milliseconds(lambda: checkpoints.save(f"step_{n}", {"step": n}))
        written = milliseconds(checkpoints.thread.join)
        checkpoints.poll(wait=True)
        times.append((copied, blocked, written, milliseconds(calls)))
    size = sum(t.numel() * t.element_size() for t in model_tensors(model).values()) * 3 / 1e6
    return size, [statistics.median(values) for values in zip(*times)]


CHECKS = "ranks kill reshape damage disk nodes signals failures overhead".split()


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    help = "checks to run [all]"
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help=help)
    parser.error = fail
    chosen = parser.parse_args().only
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        flags, whole = prepare(work), work / "whole"
        began = time.time()
        code, output = run(2, "grpo.py", *flags, "--out", whole)
        if code:
            raise SystemExit(output)
        seconds = time.time() - began
        print(f"an undisturbed run of 6 steps on 2 ranks: {seconds:.0f} s", flush=True)
        for name in chosen:
            globals()[f"check_{name}"](work, flags, whole)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["inject"]:
        name = sys.argv[2]
        sys.argv[1:3] = []
        inject(name)
    else:
        main()
