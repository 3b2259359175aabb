"""What happens to a run that meets kills, damaged files, full disks and failing ranks: measured, figures printed.

    python -m bench.faults                     everything, on CPU with the toy task; about 15 minutes on 2 cores
    python -m bench.faults --only kill disk    some of: ranks kill reshape damage disk nodes signals failures overhead

Each check prints one line with its figure and ok or FAILED; the exit code is 1 if any failed. Also a way to run
grpo.py with a fault built in, under torchrun: `-m bench.faults inject NAME` and then grpo.py's flags.
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

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
RUN = ("--questions 4 --steps 6 --lr 2e-4 --schedule linear --max_prompt_tokens 100 --max_plan_tokens 40 "
       "--max_completion_tokens 80 --eval_every 4 --eval_size 12 --show_every 3 --save_every 1 --keep 2").split()
failed = 0


# ---------------------------------------------------------------------------------------------------------------
# Tools

def launch(ranks: int, *command, nodes: tuple[int, int, int] | None = None) -> subprocess.Popen:
    """Start `python command` on some ranks of this host; `nodes`: (how many, which, port) for one of several."""
    launcher = [sys.executable]
    if nodes:
        launcher += ["-m", "torch.distributed.run", f"--nnodes={nodes[0]}", f"--node_rank={nodes[1]}",
                     f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1", f"--master_port={nodes[2]}"]
    elif ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, seconds: float = 600) -> tuple[int, str]:
    """(exit code, output); a run that hangs is killed and has code -9."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
    return process.returncode, output


def descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return children + [deeper for child in children for deeper in descendants(child)]


def kill(process: subprocess.Popen):
    """kill -9 of a launcher with all its ranks and their workers."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def metrics(folder: Path) -> list[dict]:
    """A run's metrics, times aside, and the grader's: how many answers it judged depends on what it had judged before."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if "second" not in k and k != "tokens_per_s" and not k.startswith("grader_")}
            for r in records]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs are equal to the bit: every metric of every step, every log record, final weights."""
    return (metrics(a) == metrics(b) and (a / "rollouts.jsonl").read_bytes() == (b / "rollouts.jsonl").read_bytes()
            and weights(a / "model") == weights(b / "model"))


def check(ok: bool, what: str):
    global failed
    failed += not ok
    print(f"{'ok    ' if ok else 'FAILED'}  {what}", flush=True)


def prepare(folder: Path) -> list[str]:
    """Toy data and the base model; the flags of a short run on them."""
    code, output = finish(launch(1, "-m", "data.toy", "--out", folder, "--sft", 20, "--train", 200, "--test", 20, "--facts", 2, 3))
    if code:
        raise SystemExit(output)
    return ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), *RUN]


# ---------------------------------------------------------------------------------------------------------------
# Faults built into a run

def inject(name: str):
    """Give grpo.py a fault; the last rank has it where it is one rank's. Then run it with the flags in sys.argv."""
    import safetensors.torch
    import torch

    import grpo
    from checkpoint import guarded
    from model_utils import rank, world_size
    mine, calls = rank() == world_size() - 1, {"n": 0}

    def patch(module, function: str, fault):
        """Call `fault(call number, original, *args)` in place of a function."""
        original = getattr(module, function)

        def patched(*args, **kwargs):
            calls["n"] += 1
            return fault(calls["n"], original, *args, **kwargs)
        setattr(module, function, patched)

    def raise_(call, original, *args):
        if mine and call == 2:
            raise RuntimeError("injected failure")
        return original(*args)

    def unlucky_and_slow(call, original, golds, answers):  # all answers wrong after a long wait: every group is dropped
        verdicts = original(golds, answers)
        if mine:
            time.sleep(3)
        return [False for _ in verdicts] if mine else [i % 2 == 0 for i in range(len(verdicts))]

    def nan(call, original, *args):
        loss, figures = original(*args)
        return (loss * float("nan") if mine and call >= 3 else loss), figures

    def out_of_memory(call, original, *args):
        if mine and call == 2:
            raise torch.OutOfMemoryError("injected")
        return original(*args)

    def disk_full(call, original, tensors, path, **kwargs):
        if "step_2" in str(path):
            raise OSError(28, "No space left on device")
        return original(tensors, path, **kwargs)

    def slow_save(call, original, tensors, path, **kwargs):
        if "step_2" in str(path):
            time.sleep(60)
        return original(tensors, path, **kwargs)

    faults = {"raise": (grpo, "make_groups", raise_), "drop": (grpo, "grade", unlucky_and_slow),
              "nan": (grpo, "policy_loss", nan), "oom": (grpo, "policy_loss", out_of_memory),
              "full": (safetensors.torch, "save_file", disk_full),
              "slow": (safetensors.torch, "save_file", slow_save)}
    patch(*faults[name])
    guarded(grpo.main)


# ---------------------------------------------------------------------------------------------------------------
# Checks; each takes the work folder, the flags of a short run and the undisturbed 2-rank run

def check_ranks(work: Path, flags: list[str], whole: Path):
    """fp32, three steps from the same rollouts on 1, 2 and 4 ranks, and on two nodes of two."""
    import torch
    results = {}
    worker = ROOT / "tests/distributed_worker.py"
    runs = {"1 rank": [(1, None)], "2 ranks": [(2, None)], "4 ranks": [(4, None)],
            "2 nodes x 2 ranks, HSDP": [(2, (2, node, 29611)) for node in (0, 1)]}
    for name, parts in runs.items():
        file = work / f"{name[:7]}.pt"
        extra = ["--shard_within_node"] if "HSDP" in name else []
        processes = [launch(n, worker, "--weights", file, *extra, nodes=nodes) for n, nodes in parts]
        outputs = [finish(process, 300) for process in processes]
        if any(code for code, _ in outputs):
            check(False, f"{name}: {outputs}")
            continue
        figures = json.loads([line for line in outputs[0][1].splitlines() if line.startswith("{")][-1])["figures"]
        results[name] = figures, torch.load(file)
        first_figures, first = results["1 rank"]
        # Relative above 1: fp32 itself resolves a gradient norm of 20 to about 2e-6.
        gap = max(abs(a - b) / max(1, abs(b)) for x, y in zip(figures, first_figures) for a, b in zip(x, y))
        weight_gap = max(float((first[k] - results[name][1][k]).detach().abs().max()) for k in first)
        check(gap < 1e-5 and weight_gap < 1e-5, f"{name}, 3 steps fp32: loss, gradient norm, KL, entropy within {gap:.1e} "
              f"(relative above 1) of 1 rank, weights within {weight_gap:.1e}")


def check_kill(work: Path, flags: list[str], whole: Path, kills: int = 10, seed: int = 0):
    """kill -9 of a 2-rank run at random moments, each followed by --resume auto; every third kill during a save."""
    sys.path.insert(0, str(ROOT))
    from checkpoint import damage, step_folders, step_of
    flags = [*flags, "--steps", str(kills + 4)]
    rng, out, whole = random.Random(seed), work / "killed", work / "whole_kills"
    code, output = finish(launch(2, "grpo.py", *flags, "--out", whole))
    if code:
        return check(False, output[-2000:])
    second = statistics.median(json.loads(line)["seconds"] for line in (whole / "metrics.jsonl").read_text().splitlines())
    for number in range(kills):
        newest = next((step_of(path) for path in step_folders(out)), 0) if out.exists() else 0
        saving = out / f"step_{newest + 1}.tmp"
        shutil.rmtree(saving, ignore_errors=True)
        process = launch(2, "grpo.py", *flags, "--out", out, "--resume", "auto")
        if number % 3 == 2:
            while process.poll() is None and not saving.exists():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.01))
        else:
            log, lines = out / "metrics.jsonl", newest + rng.randint(0, 1)
            while process.poll() is None and not ((out / "run.json").exists() and lines == 0
                                                  or log.exists() and log.read_bytes().count(b"\n") > lines):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 2 * second))
        kill(process)
        process.communicate()
        found = step_folders(out)
        half = [path.name for path in out.glob("*.tmp") if path.is_dir()]
        steps = [m["step"] for m in metrics(out)] if (out / "metrics.jsonl").exists() else []
        check(not any(map(damage, found)) and steps == list(range(1, len(steps) + 1)) and metrics(whole)[:len(steps)] == (
            metrics(out) if steps else []),
            f"kill -9 {number + 1:2}, {'during a save' if number % 3 == 2 else 'anywhere     '}: {len(steps)} steps logged, "
            f"{', '.join(path.name for path in found) or 'no checkpoint'} whole, {', '.join(half) or 'nothing'} half-written")
    code, output = finish(launch(2, "grpo.py", *flags, "--out", out, "--resume", "auto"))
    check(code == 0 and same(out, whole), f"after {kills} kills: metrics of {len(metrics(out))} steps, rollouts and final "
          "weights equal to the bit to an undisturbed run's" + ("" if code == 0 else output[-2000:]))


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
        command = ["grpo.py", *flags, "--out", out, "--resume", "auto", "--steps"]
        first, output = finish(launch(ranks, *command, 4))  # nothing to train: what was loaded is saved as the model
        loaded = first == 0 and weights(out / "model") == weights(out / "step_4")
        shutil.rmtree(out / "model", ignore_errors=True)
        second, more = finish(launch(ranks, *command, 6))
        check(loaded and second == 0 and "resuming after step 4" in more and problems(out, 6) == problems(whole, 6),
              f"saved on 2 ranks, resumed on {ranks}: weights equal to the bit, the next problems the same"
              + ("" if first == second == 0 else (output + more)[-2000:]))


def check_damage(work: Path, flags: list[str], whole: Path):
    """A truncated, a bit-flipped and a half-renamed checkpoint: named, and the one before it used."""
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
        shutil.move(temporary / "model.safetensors", step / "model.safetensors")

    for name, spoil in {"truncated": truncate, "bit-flipped": flip, "half-renamed": half}.items():
        out = work / name
        shutil.copytree(whole, out)
        shutil.rmtree(out / "model")
        spoil(out / "step_5")
        code, output = finish(launch(2, "grpo.py", *flags, "--out", out, "--resume", "auto"))
        warning = next((line for line in output.splitlines() if "is damaged" in line), "no warning")
        check(code == 0 and "step_5 is damaged" in warning and "resuming after step 4" in output and same(out, whole),
              f"{name}: {warning.replace(str(work), '...')[9:]}; resumed after step 4, equal to the bit")


def check_disk(work: Path, flags: list[str], whole: Path):
    """A file system that fills up during a save."""
    disk = work / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        print(f"skipped  a real full disk: no permission to mount a tmpfs ({mounted.stderr.strip().replace(str(disk), '...')})")
    try:
        for then in ("stop", "continue"):
            out = (disk if mounted.returncode == 0 else work) / f"full_{then}"
            # Of about 6 MB each, the third checkpoint is one too many (--keep rotates only after a save).
            command = ["grpo.py"] if mounted.returncode == 0 else ["-m", "bench.faults", "inject", "full"]
            code, output = finish(launch(2, *command, *flags, "--out", out, "--on_save_error", then))
            said = next((line for line in output.splitlines() if "was not saved" in line), "no message")
            intact = "is whole" in said and "GB" in said
            if then == "stop":
                ok = code != 0 and intact
                if mounted.returncode == 0:
                    subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
                again, output = finish(launch(2, "grpo.py", *flags, "--out", out, "--on_save_error", then, "--resume", "auto"))
                check(ok and again == 0 and same(out, whole), f"disk full, stop: {said.replace(str(work), '...')[:150]}; "
                      "resumed with more room, equal to the bit")
                shutil.rmtree(out)
                if mounted.returncode == 0:
                    subprocess.run(["mount", "-o", "remount,size=15m", disk], check=True)
            else:
                steps = [m["step"] for m in metrics(out)]
                # The final model may have no room either on a full disk, and that is never passed over.
                check(intact and steps == list(range(1, 7)), f"disk full, continue: all {len(steps)} steps ran")
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", disk], check=True)


def check_nodes(work: Path, flags: list[str], whole: Path):
    """grpo.py on two nodes of one rank, simulated on this host, against one node of two."""
    for within in ("world", "node"):
        out = work / f"nodes_{within}"
        processes = [launch(1, "grpo.py", *flags, "--out", out, "--shard_within", within, nodes=(2, node, 29621))
                     for node in (0, 1)]
        outputs = [finish(process) for process in processes]
        if any(code for code, _ in outputs):
            check(False, f"two nodes, --shard_within {within}: {outputs[0][1][-2000:]}")
            continue
        gap = max(abs(a[k] - b[k]) for a, b in zip(metrics(out), metrics(whole)) for k in a)
        check(gap < 1e-5, f"two nodes of one rank, --shard_within {within}: every metric of 6 steps within {gap:.1e} of one node")


def check_signals(work: Path, flags: list[str], whole: Path):
    """SIGTERM and SIGINT to the launcher, as a batch system or Ctrl-C sends them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        for ranks in (1, 2):
            out = work / f"{number.name}_{ranks}"
            process = launch(ranks, "grpo.py", *flags, "--out", out, "--save_every", 4)
            while process.poll() is None and not ((out / "metrics.jsonl").exists() and len(metrics(out)) >= 2):
                time.sleep(0.01)
            began = time.time()
            process.send_signal(number)
            code, output = finish(process)
            seconds = time.time() - began
            saved = sorted(path.name for path in out.glob("step_*"))
            again, rest = finish(launch(ranks, "grpo.py", *flags, "--out", out, "--save_every", 4, "--resume", "auto"))
            ok = "go on with --resume auto" in output and len(saved) == 1 and (code == 75 if ranks == 1 else code != 0)
            check(ok and again == 0 and [m["step"] for m in metrics(out)] == list(range(1, 7))
                  and (ranks == 1 or same(out, whole)),
                  f"{number.name} on {ranks}: {saved} saved, exit code {code} after {seconds:.1f} s"
                  + ("; resumed, equal to the bit" if ranks == 2 else "; resumed")
                  + ("" if ok and not again else output[-1500:] + rest[-500:]))


def check_failures(work: Path, flags: list[str], whole: Path):
    """One of two ranks fails, or lags behind: the job ends, or goes on; it does not hang."""
    def run(name: str, *more, then="inject"):
        began = time.time()
        code, output = finish(launch(2, "-m", "bench.faults", then, name, *flags, "--out", work / f"fault_{name}", *more), 300)
        return code, output, time.time() - began

    code, output, seconds = run("raise")
    # Besides, torchrun prints a traceback of its own, of ChildFailedError.
    check(code != 0 and output.count("RuntimeError: injected failure") == 1
          and output.count("Traceback (most recent call last)") == 2 and "Connection closed" not in output,
          f"one rank raises: job over {seconds:.0f} s after its start, its traceback printed once")
    code, output, seconds = run("oom")
    said = next((line for line in output.splitlines() if "ran out of memory" in line), "no message")
    check(code != 0 and "--tokens_per_micro_batch" in said, f"out of memory on one rank: {said}")
    code, output, seconds = run("nan", "--max_skipped", 2)
    said = next((line for line in output.splitlines() if "not finite" in line), "no message")
    logged = metrics(work / "fault_nan")
    check(code != 0 and "2 steps in a row" in said and logged[-1]["skipped"] == logged[-2]["skipped"] == 1,
          f"NaN loss on one rank: step skipped on both, stopped after {len(logged)} steps: {said[:110]} ...")
    code, output, seconds = run("drop", "--dynamic_sampling", "--dynamic_rounds", 2, "--steps", 2)
    check(code == 0, f"one rank's groups all dropped and its rewards 3 s late: 2 steps in {seconds:.0f} s, no hang"
          + ("" if code == 0 else output[-2000:]))
    out = work / "killed_rank"
    process = launch(2, "grpo.py", *flags, "--out", out)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    ranks = [pid for pid in descendants(process.pid) if b"grpo.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    began = time.time()
    os.kill(ranks[-1], signal.SIGKILL)
    code, output = finish(process)
    check(code != 0 and time.time() - began < 60, f"kill -9 of one rank: job over after {time.time() - began:.1f} s")


def check_overhead(work: Path, flags: list[str], whole: Path):
    """What a save and the per-step calls cost, in one process, on the toy base."""
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(ROOT))
    import torch

    from checkpoint import Checkpoints, StopSignal, copy_to_cpu, optimizer_tensors, plan_files
    from grpo import Config
    from attention import pack
    from model_utils import load_sharded, load_tokenizer, make_optimizer, model_tensors, optimizer_step
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = load_sharded(flags[1], device)
    optimizer = make_optimizer(model, 1e-3, 0.01)
    model.token_logprobs(pack([[3, 4, 5, 6]], [1], device))[0].sum().backward()
    optimizer_step(model, optimizer, 1e-3, 1.0)
    checkpoints, stop = Checkpoints(work / "overhead", model, load_tokenizer(flags[1]), optimizer, Config()), StopSignal()
    blocked, copied, written, polled = [], [], [], []
    for n in range(1, 21):
        began = time.perf_counter()
        copy_to_cpu(plan_files(list(model_tensors(model).items()), "model"))
        copy_to_cpu(plan_files(optimizer_tensors(model, optimizer), "optimizer"))
        copied.append(time.perf_counter() - began)
        began = time.perf_counter()
        checkpoints.save(f"step_{n}", {"step": n})
        blocked.append(time.perf_counter() - began)
        checkpoints.thread.join()
        written.append(time.perf_counter() - began - blocked[-1])
        checkpoints.poll(wait=True)
        began = time.perf_counter()
        checkpoints.poll(), stop.agreed(device), stop.agreed(device)
        polled.append(time.perf_counter() - began)
    seconds = [json.loads(line)["seconds"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    block, copy, write, poll = (1000 * statistics.median(values) for values in (blocked, copied, written, polled))
    step = 1000 * statistics.median(seconds)
    megabytes = sum(t.numel() * t.element_size() for t in model_tensors(model).values()) * 3 / 1e6
    check(True, f"state of {megabytes:.1f} MB: a save blocks for {block:.1f} ms, copying alone takes {copy:.1f} ms, the thread "
          f"writes for {write:.1f} ms; per step without a save {poll:.3f} ms")
    share = (poll + (block + write) / Config.save_every) / step
    check(share < 0.03, f"of a step of {step:.0f} ms (4 questions) with the default --save_every {Config.save_every}, even were "
          f"nothing of the writing hidden: {100 * share:.2f} %")


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="checks to run [all]")
    chosen = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        flags = prepare(work)
        whole = work / "whole"
        began = time.time()
        code, output = finish(launch(2, "grpo.py", *flags, "--out", whole))
        if code:
            raise SystemExit(output)
        print(f"an undisturbed run of 6 steps on 2 ranks: {time.time() - began:.0f} s", flush=True)
        for name in chosen:
            CHECKS[name](work, flags, whole)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["inject"]:
        sys.path.insert(0, str(ROOT))
        name = sys.argv[2]
        sys.argv[1:3] = []
        inject(name)
    else:
        main()
