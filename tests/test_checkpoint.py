"""Checkpoints, resuming, stop signals and failures in one process. test_faults.py takes several."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import eval as evaluation
import grpo
from bench.faults import metrics, same
from conftest import ROOT, make_tiny
from data.toy import make_model, make_problems, make_tokenizer
from model_utils import make_optimizer, optimizer_step, shard_model
from plumbing import checkpoint, folder, signals
from plumbing.attention import pack
from plumbing.checkpoint import Checkpoints, damage, resume, split_files
from plumbing.folder import append_jsonl, changed_settings, check_run, open_run, step_folders
from plumbing.signals import STOPPED, StopSignal, guarded


@dataclasses.dataclass
class Settings:
    lr: float = 1e-2
    beta: float = 0.5
    steps: int = 3
    keep: int = 2
    on_save_error: str = "stop"
    out: str = ""
    overwrite: bool = False
    resume: bool = False


class Trainee:
    """A tiny model with what a checkpoint needs, and a step that moves it."""

    def __init__(self, folder: Path, seed: int = 0, **settings):
        self.model = shard_model(make_tiny("qwen2", seed=seed))
        self.optimizer = make_optimizer(self.model, 1e-2, 0.01)
        self.folder = folder
        parts = self.model, make_tokenizer(), self.optimizer
        self.checkpoints = Checkpoints(folder, *parts, Settings(**settings))
        self.ids = torch.tensor([[3, 4, 5, 6]])

    def step(self, number: int, save: bool = True):
        packed = pack(self.ids.tolist(), [1], self.ids.device)
        self.model.token_logprobs(packed)[0].sum().backward()
        optimizer_step(self.model, self.optimizer, 1e-2, 1.0)
        append_jsonl(self.folder / "metrics.jsonl", [{"step": number}])
        if save:
            self.save(f"step_{number}", {"step": number, "cursor": 8 * number})

    def save(self, name: str, state: dict | None = None):
        self.checkpoints.save(name, state)
        assert self.checkpoints.poll(wait=True)

    def resume(self, **settings) -> dict:
        return resume(self.folder, self.model, self.optimizer, Settings(**settings))

    def equals(self, other) -> bool:
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def is_stored_in(self, path: Path) -> bool:
        """Whether transformers loads this model from a folder."""
        loaded = AutoModelForCausalLM.from_pretrained(path)
        return torch.equal(loaded(self.ids).logits, self.model(self.ids).logits)


@pytest.fixture
def trainee(tmp_path):
    trainee = Trainee(tmp_path, keep=0)
    for number in (1, 2, 3):
        trainee.step(number)
    return trainee


def refused(message: str):
    return pytest.raises(SystemExit, match=message)


def names(paths) -> list[str]:
    return [path.name for path in paths]


def test_a_checkpoint_loads_as_a_hugging_face_folder_and_resumes_exactly(trainee, tmp_path):
    assert trainee.is_stored_in(tmp_path / "step_3")
    other = Trainee(tmp_path, seed=3, keep=0)
    assert other.resume() == {"step": 3, "cursor": 24}
    trainee.step(4, save=False)
    other.step(4, save=False)  # the same next step needs the same moments and step count
    assert trainee.equals(other)


def test_the_final_model_holds_no_trainer_state(trainee, tmp_path):
    trainee.save("model")
    assert trainee.is_stored_in(tmp_path / "model")
    ours = {"optimizer.safetensors", "trainer.json", "manifest.json"}
    assert not ours & set(names((tmp_path / "model").iterdir()))


def put_link(path: Path):
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


def put_broken_link(path: Path):
    path.symlink_to("nowhere")


def put_file(path: Path):
    path.write_text("the user's own")


def put_folder(path: Path):
    path.mkdir()
    put_file(path / "notes.txt")


@pytest.mark.parametrize("put", [put_link, put_broken_link, put_file])
@pytest.mark.parametrize("name", ["model", "step_2"])
def test_a_link_or_a_file_in_the_way_is_refused_early(start, monkeypatch, tmp_path, put, name):
    out = tmp_path / "run"
    message = f"run/{name} is a link or a file, .*: move it away, or choose another --out"
    for flag in ("--overwrite", "--resume"):
        if put is put_link and flag == "--resume":
            continue  # a finished run whose model, or a checkpoint that, has been moved away
        out.mkdir()
        put(out / name)
        before = sorted(out.iterdir())
        with monkeypatch.context() as patch:
            loaded = lambda *args, **options: pytest.fail("a model was loaded first")
            patch.setattr(grpo, "load_sharded", loaded)
            with refused(message):
                train(monkeypatch, start, out, flag)
        assert sorted(out.iterdir()) == before
        shutil.rmtree(out)


@pytest.mark.parametrize("put", [put_link, put_broken_link, put_file, put_folder])
def test_the_final_model_is_not_lost_to_what_has_come_in_its_place(trainee, tmp_path, capsys, put):
    model = tmp_path / "model"
    for name in ("model.new", "model.new.new"):
        if not os.path.lexists(model):
            put(model)
        before = os.lstat(model)
        trainee.save("model")
        assert f"the model is saved as {tmp_path / name}\n" in capsys.readouterr().out
        assert trainee.is_stored_in(tmp_path / name)
        assert os.lstat(model) == before
    assert not (model / "notes.txt").exists() or put is put_folder


def test_a_final_model_that_cannot_be_put_into_place_stays_where_it_was_written(
    trainee, tmp_path, monkeypatch
):
    def no(*args):
        raise OSError("no renaming today")

    monkeypatch.setattr(Path, "rename", no)
    message = "model was not saved .no renaming today; it is in .*/model.tmp: move it"
    with refused(message):
        trainee.save("model")
    assert trainee.is_stored_in(tmp_path / "model.tmp")


def test_large_models_are_cut_into_files_with_an_index(tmp_path, monkeypatch):
    sizes = {"a": 10, "b": 3, "c": 30}  # of 40, 12 and 120 bytes
    tensors = [(name, torch.zeros(size)) for name, size in sizes.items()]
    files = split_files(tensors, "model", limit=60)
    assert {file: [name for name, _ in part] for file, part in files.items()} == {
        "model-00001-of-00002.safetensors": ["a", "b"],
        "model-00002-of-00002.safetensors": ["c"],
    }
    monkeypatch.setattr(checkpoint.split_files, "__defaults__", (20_000,))
    trainee = Trainee(tmp_path)
    trainee.step(1)
    assert len(list((tmp_path / "step_1").glob("model-*.safetensors"))) > 1
    assert trainee.is_stored_in(tmp_path / "step_1")
    other = Trainee(tmp_path, seed=3)
    other.resume()
    assert trainee.equals(other)


def test_the_logs_are_cut_back_to_the_save(trainee, tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 4}])
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "rew')  # killed in mid-write
    trainee.resume()
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("saved", [True, False], ids=["a checkpoint", "no checkpoint yet"])
def test_a_resume_cuts_no_file_but_the_runs_own_logs(tmp_path, saved):
    theirs = [tmp_path / "train.jsonl", tmp_path / "plans.jsonl"]
    (tmp_path / "elsewhere").write_text("a file outside\n")
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "elsewhere")
    trainee = Trainee(tmp_path)
    theirs[0].write_text("there before the run\n")
    trainee.step(1, save=saved)
    theirs[0].write_text("there before the run\nand longer since\n")
    theirs[1].write_text("put there since\n")
    before = [path.read_text() for path in (*theirs, tmp_path / "elsewhere")]
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 2}])
    trainee.resume()
    assert [path.read_text() for path in (*theirs, tmp_path / "elsewhere")] == before
    assert len(metrics(tmp_path)) == saved
    if saved:
        state = json.loads((tmp_path / "step_1/trainer.json").read_text())
        assert list(state["logs"]) == ["metrics.jsonl"]


def test_a_log_that_is_a_link_is_refused(trainee, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("not the run's\n")
    (tmp_path / "rollouts.jsonl").symlink_to(outside)
    settings = Settings(out=str(tmp_path), resume=True)
    for begin in (trainee.resume, lambda: check_run(settings)):
        with refused("rollouts.jsonl is a link.*choose another --out"):
            begin()
    assert outside.read_text() == "not the run's\n"


def test_old_checkpoints_go_when_a_new_one_is_in_place(tmp_path):
    trainee = Trainee(tmp_path, keep=2)
    for number in (1, 2, 3, 10):
        trainee.step(number)
    assert names(step_folders(tmp_path)) == ["step_10", "step_3"]  # by number, not by name
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("record", [True, False], ids=["run.json", "no run.json"])
def test_a_checkpoint_behind_a_link_is_resumed_and_rotation_removes_the_link_only(
    trainee, tmp_path, record
):
    (tmp_path / "disk").mkdir()
    (tmp_path / "step_3").rename(tmp_path / "disk/step_3")
    (tmp_path / "step_3").symlink_to("disk/step_3")
    settings = Settings(out=str(tmp_path), resume=True)
    if record:
        open_run(tmp_path, settings)
    check_run(settings)
    other = Trainee(tmp_path, seed=3, keep=1)
    assert other.resume()["step"] == 3
    other.step(4)
    assert names(step_folders(tmp_path)) == ["step_4"]
    assert damage(tmp_path / "disk/step_3") is None


def truncate(step: Path):
    file = step / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    return "optimizer.safetensors has .* bytes, not"


def flip_a_bit(step: Path):
    data = bytearray((step / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (step / "model.safetensors").write_bytes(data)
    return "the content of model.safetensors"


def rename_half(step: Path):
    (step / "manifest.json").unlink()
    return "no readable manifest.json"


def lose_a_file(step: Path):
    (step / "trainer.json").unlink()
    return "trainer.json is missing"


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, rename_half, lose_a_file])
def test_a_damaged_checkpoint_is_named_and_passed_over(trainee, tmp_path, capsys, spoil):
    assert damage(tmp_path / "step_3") is None
    message = spoil(tmp_path / "step_3")
    assert trainee.resume()["step"] == 2
    said = capsys.readouterr().out
    assert "step_3 is damaged" in said and re.search(message, said)
    for path in step_folders(tmp_path):
        (path / "manifest.json").unlink(missing_ok=True)
    with refused("no checkpoint .* is whole: .* --overwrite"):
        trainee.resume()
    # A run that passed it over saves that step again, in its place.
    trainee.save("step_3", {"step": 3})
    assert damage(tmp_path / "step_3") is None


def test_an_unfinished_save_is_cleared_away(trainee, tmp_path, capsys):
    (tmp_path / "step_4.tmp").mkdir()
    assert names(step_folders(tmp_path)) == ["step_3", "step_2", "step_1"]
    Trainee(tmp_path)
    assert not (tmp_path / "step_4.tmp").exists()
    assert "removed step_4.tmp" in capsys.readouterr().out


def test_another_configuration_is_refused_by_name(trainee, tmp_path):
    then_and_now = "--lr was 0.01, not 0.02, --beta was 0.5, not 0.7; resume with"
    with refused(f"step_3 belongs to another configuration: {then_and_now}"):
        trainee.resume(lr=0.02, beta=0.7, steps=9)
    changed = changed_settings({"lr": 1e-2, "steps": 3}, Settings(steps=9, out="x"), "a")
    assert changed == {"steps": [3, 9]}


def test_run_json_keeps_its_settings_and_notes_what_changed(tmp_path, capsys):
    def begin(**settings):
        settings = Settings(out=str(tmp_path / "run"), **settings)
        open_run(check_run(settings), settings)

    begin()
    (tmp_path / "run/metrics.jsonl").touch()
    with refused("another configuration: --beta was 0.5, not 0.6"):
        begin(resume=True, beta=0.6)
    assert json.loads((tmp_path / "run/run.json").read_text())["beta"] == 0.5
    begin(resume=True, steps=8)
    begin(resume=True, steps=8)  # as before: nothing to note
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["steps"] == 8 and record["changes"] == [{"steps": [3, 8]}]
    assert capsys.readouterr().out.count("--steps was 3 and is 8 from here on") == 1


# --------------------------------------------------------------------------------------------------
# Saves that fail, and saves in the background


def no_room(*args, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("then", ["stop", "continue"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, capsys, then):
    trainee = Trainee(tmp_path, keep=1, on_save_error=then)
    trainee.step(1)
    message = (
        "step_2 was not saved .*No space left.*It needs .* GB in .* GB are free. "
        "The checkpoint step_1 is whole"
    )
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", no_room)
        if then == "stop":
            with refused(message):
                trainee.step(2)
        else:
            trainee.step(2)
            assert "the run goes on" in capsys.readouterr().out
    assert names(step_folders(tmp_path)) == ["step_1"] and damage(tmp_path / "step_1") is None
    assert not list(tmp_path.glob("*.tmp"))
    trainee.step(3)
    assert names(step_folders(tmp_path)) == ["step_3"]


@pytest.mark.parametrize("then, steps", [("stop", 6), ("stop", 4), ("continue", 6)])
def test_a_log_that_cannot_be_written(start, monkeypatch, tmp_path, capsys, then, steps):
    """From step 4 on. The last step's state is what the final model holds anyway."""
    out, stopped = tmp_path / "run", (then, steps) == ("stop", 6)

    def full(path, *args, **options):
        if Path(path).suffix == ".jsonl" and (out / "metrics.jsonl").exists():
            if len(metrics(out)) == 3:
                no_room()
        return open(path, *args, **options)

    flags = ["--save_every", 0, "--on_save_error", then, "--steps", steps]
    lost = (
        r"did not take 1 line of metrics.jsonl \(No space left on device\) and 2 lines of "
        "rollouts.jsonl .* at step 4"
    )
    with monkeypatch.context() as patch:
        patch.setattr(folder, "open", full, raising=False)
        if stopped:
            with refused(f"{lost}. The state after that step is saved: make room .*--resume"):
                train(monkeypatch, start, out, *flags)
        else:
            train(monkeypatch, start, out, *flags)
            assert re.search(lost, capsys.readouterr().out)
    if stopped:
        assert names(step_folders(out)) == ["step_4"] and not (out / "model").exists()
        train(monkeypatch, start, out, *flags, "--resume")
        assert [m["step"] for m in metrics(out)] == [1, 2, 3, 5, 6]
    assert (out / "model/model.safetensors").exists()


def test_an_evaluation_that_cannot_be_written_ends_with_one_sentence(start, monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "open", no_room, raising=False)
    flags = ["--limit", "2", "--n", "1", "--max_completion_tokens", "16"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *inputs(start), "--out", f"{tmp_path}/e", *flags])
    with refused("records.jsonl cannot be written .No space left.*make room .*--resume"):
        evaluation.main()


def test_a_log_that_cannot_be_flushed_is_a_save_that_fails(tmp_path, monkeypatch):
    trainee = Trainee(tmp_path)
    trainee.step(1)
    flush = checkpoint.flush
    fail_for_a_log = lambda path: no_room() if path.name == "metrics.jsonl" else flush(path)
    monkeypatch.setattr(checkpoint, "flush", fail_for_a_log)
    message = "step_2 was not saved .*metrics.jsonl: No space left on device.* step_1 is whole"
    with refused(message):
        trainee.step(2)


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """The copy that is written is the state at the save, whatever training does meanwhile."""
    trainee, go = Trainee(tmp_path, keep=0), threading.Event()
    save_file = safetensors.torch.save_file
    wait_and_save = lambda *args, **options: (go.wait(30), save_file(*args, **options))
    monkeypatch.setattr(safetensors.torch, "save_file", wait_and_save)
    trainee.step(1, save=False)
    expected = {name: t.detach().clone() for name, t in trainee.model.state_dict().items()}
    trainee.checkpoints.save("step_1", {"step": 1})
    trainee.step(2, save=False)
    assert trainee.checkpoints.poll() is False and not (tmp_path / "step_1").exists()
    go.set()
    assert trainee.checkpoints.poll(wait=True) and damage(tmp_path / "step_1") is None
    stored = safetensors.torch.load_file(tmp_path / "step_1/model.safetensors")
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert not torch.equal(stored["model.norm.weight"], trainee.model.model.norm.weight)


# --------------------------------------------------------------------------------------------------
# Stop signals and failures


def test_a_signal_ends_what_may_be_interrupted_and_is_remembered():
    stop, cpu = StopSignal(), torch.device("cpu")
    assert stop.unless_stopped(lambda x: x + 1, 2) == 3 and stop.agreed(cpu) == 0

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    began = time.monotonic()
    assert stop.unless_stopped(work) is None and time.monotonic() - began < 15
    assert stop.agreed(cpu) == signal.SIGTERM
    assert stop.unless_stopped(lambda: 1) is None  # from now on nothing begins
    os.kill(os.getpid(), signal.SIGTERM)  # an echo, as torchrun passes it on: not the end


def test_a_screen_that_is_gone_does_not_change_the_exit_code():
    """The last print may fail in the interpreter's end, which then exits with 120."""
    script = (
        "from plumbing.ranks import print0; from plumbing.signals import guarded; "
        "guarded(lambda: print0(input()))"
    )
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    options = dict(cwd=ROOT, env=buffered, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    run = subprocess.Popen([sys.executable, "-c", script], **options)
    run.stdout.close()
    run.stdin.write(b"text for nobody\n")
    run.stdin.close()
    assert run.wait(60) == 0


def test_a_terminal_that_closes_stops_a_run_with_a_save(start, tmp_path):
    """Its screen is gone, too: what is printed then goes nowhere.

    Under nohup, SIGHUP says nothing.
    """
    terminal, screen = os.openpty()
    flags = ["--out", str(tmp_path), "--steps", "999", "--save_every", "0"]
    run = subprocess.Popen(
        [sys.executable, ROOT / "grpo.py", *inputs(start), *SMALL, *flags],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(screen)
    seen = b""
    while b"step 2/" not in seen:
        seen += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert run.wait(60) == STOPPED
    (saved,) = step_folders(tmp_path)
    assert damage(saved) is None


def test_sighup_stays_ignored_where_it_was():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    assert stop.unless_stopped(lambda: os.kill(os.getpid(), signal.SIGHUP) or 1) == 1
    assert stop.agreed(torch.device("cpu")) == 0


def test_a_failure_becomes_one_message(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)

    def update():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def all_logprobs():
        update()

    def decode():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def ask_local():
        decode()

    def broken():
        raise ValueError("a bug")

    def interrupted():
        raise KeyboardInterrupt

    messages = {
        interrupted: "stopped by Ctrl-C\n",
        update: "in a micro-batch: lower --tokens_per_micro_batch",
        all_logprobs: "in a micro-batch: lower --tokens_per_micro_batch",
        decode: "in a rollout: set --rollout_rows below",
        ask_local: "in the teacher: lower --concurrency",
        broken: "ValueError: a bug",
    }
    for function, message in messages.items():
        guarded(function)
        said = capsys.readouterr().err
        assert message in said and ("Traceback" in said) == (function is broken)
    assert codes == [STOPPED, 1, 1, 1, 1, 1]


def test_the_functions_that_out_of_memory_looks_for_bear_these_names():
    import distill
    import sft

    assert grpo.update and grpo.all_logprobs and grpo.decode and sft.sft_loss and distill.ask_local


# --------------------------------------------------------------------------------------------------
# Whole runs

SMALL = """--questions 2 --plans 2 --cots 2 --max_plan_tokens 10 --max_completion_tokens 16
--eval_every 0""".split()


def inputs(start: Path) -> list[str]:
    return ["--model", str(start / "model"), "--data", str(start / "train.jsonl")]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny model and 40 problems."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = make_problems("train", 40, facts=(2, 3))
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def train(monkeypatch, start, out, *flags):
    more = "--steps 6 --lr 1e-3 --show_every 2 --save_every 2".split()
    command = ["grpo.py", *inputs(start), "--out", str(out), *SMALL, *more, *map(str, flags)]
    monkeypatch.setattr(sys, "argv", command)
    grpo.main()


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(start, monkeypatch, tmp_path, capsys):
    """It is stopped in the rollout of step 4, which is dropped and drawn again.

    It is saved after step 3, where no save was due.
    """
    train(monkeypatch, start, tmp_path / "whole")
    calls, sample_tree = [], grpo.sample_tree

    def stopped_in_the_fourth(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return sample_tree(*args, **options)

    monkeypatch.setattr(grpo, "sample_tree", stopped_in_the_fourth)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, start, tmp_path / "parts")
    assert stop.value.code == STOPPED == 75
    assert "stopped by SIGINT after step 3; go on with --resume\n" in capsys.readouterr().out
    assert names(step_folders(tmp_path / "parts")) == ["step_3", "step_2"]
    train(monkeypatch, start, tmp_path / "parts", "--resume", "auto")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_gradient_that_stays_bad_ends_the_run(start, monkeypatch, tmp_path):
    policy_loss, calls = grpo.policy_loss, []

    def bad_from_the_third(*args):
        loss, figures = policy_loss(*args)
        calls.append(1)
        return (loss * float("nan") if len(calls) in (1, 3, 4) else loss), figures

    monkeypatch.setattr(grpo, "policy_loss", bad_from_the_third)
    message = "not finite in 2 steps in a row, and its update skipped: look at loss.*--max_skipped"
    with refused(message):
        train(monkeypatch, start, tmp_path / "run", "--max_skipped", 2)
    skipped = [m["skipped"] for m in metrics(tmp_path / "run")]
    assert skipped == [1, 0, 1, 1]  # one alone is passed over
    assert damage(tmp_path / "run/step_2") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_policy_that_has_diverged_is_logged_and_ends_the_run(start, monkeypatch, tmp_path, value):
    """Its logs stay JSON, which knows no NaN. They hold null for what is not finite."""
    load_sharded = grpo.load_sharded

    def diverged(*args, **options):
        model = load_sharded(*args, **options)
        with torch.no_grad():
            model.get_decoder().norm.weight.fill_(value)
        return model

    monkeypatch.setattr(grpo, "load_sharded", diverged)
    flags = "--max_skipped 2 --show_every 1 --eval_every 1 --eval_size 2".split()
    with refused("not finite in 2 steps in a row, and its update skipped"):
        train(monkeypatch, start, tmp_path / "run", *flags)

    def strict(name):
        lines = (tmp_path / "run" / name).read_text().splitlines()
        return [json.loads(line, parse_constant=pytest.fail) for line in lines]

    logged = [(m["step"], m["skipped"], m["loss"]) for m in strict("metrics.jsonl")]
    assert logged == [(1, 1, None), (2, 1, None)]
    completion = strict("rollouts.jsonl")[0]["plans"][0]["completions"][0]
    assert None in completion["per_token"]["surprise"]
    assert len(completion["per_token"]["width"]) == completion["tokens"]


def test_a_short_run_reaches_its_learning_rate(start, monkeypatch, tmp_path, capsys):
    train(monkeypatch, start, tmp_path / "run", "--steps", 2, "--warmup_steps", 50)
    assert max(m["lr"] for m in metrics(tmp_path / "run")) == 1e-3
    assert "--warmup_steps 50 is too long for 2 steps" in capsys.readouterr().out
