"""Checkpoints, resuming, stop signals and failures, in one process; test_faults.py has those that take several."""
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

import checkpoint
import eval as evaluation
import grpo
import run_folder
from attention import pack
from bench.faults import metrics, same
from checkpoint import STOPPED, Checkpoints, StopSignal, damage, guarded, plan_files, resume, step_folders
from conftest import ROOT, make_tiny
from data.toy import make_model, make_problems, make_tokenizer
from model_utils import make_optimizer, optimizer_step, shard_model
from run_folder import append_jsonl, changed_settings, check_run, open_run


@dataclasses.dataclass
class Settings:
    lr: float = 1e-2
    beta: float = 0.5
    steps: int = 3
    keep: int = 2
    out: str = ""
    overwrite: bool = False
    resume: bool = False


class Trainee:
    """A tiny model with what a checkpoint needs, and a step that moves it."""

    def __init__(self, folder: Path, seed: int = 0, **options):
        self.model = shard_model(make_tiny("qwen2", seed=seed))
        self.optimizer = make_optimizer(self.model, 1e-2, 0.01)
        self.folder = folder
        self.checkpoints = Checkpoints(folder, self.model, make_tokenizer(), self.optimizer, Settings(), **options)
        self.ids = torch.tensor([[3, 4, 5, 6]])

    def step(self, number: int, save: bool = True):
        self.model.token_logprobs(pack(self.ids.tolist(), [1], self.ids.device))[0].sum().backward()
        optimizer_step(self.model, self.optimizer, 1e-2, 1.0)
        append_jsonl(self.folder / "metrics.jsonl", [{"step": number}])
        if save:
            self.checkpoints.save(f"step_{number}", {"step": number, "cursor": 8 * number})
            assert self.checkpoints.poll(wait=True)

    def equals(self, other) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.model.parameters(), other.model.parameters()))


@pytest.fixture
def trainee(tmp_path):
    trainee = Trainee(tmp_path, keep=0)
    for number in (1, 2, 3):
        trainee.step(number)
    return trainee


def test_a_checkpoint_loads_as_a_hugging_face_folder_and_resumes_exactly(trainee, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step_3")
    assert torch.equal(loaded(trainee.ids).logits, trainee.model(trainee.ids).logits)
    other = Trainee(tmp_path, seed=3, keep=0)
    assert resume(tmp_path, other.model, other.optimizer, Settings()) == {"step": 3, "cursor": 24}
    trainee.step(4, save=False)
    other.step(4, save=False)  # the same next step needs the same moments and step count
    assert trainee.equals(other)


def test_the_final_model_holds_no_trainer_state(trainee, tmp_path):
    trainee.checkpoints.save("model")
    trainee.checkpoints.poll(wait=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(trainee.ids).logits, trainee.model(trainee.ids).logits)
    assert not {"optimizer.safetensors", "trainer.json", "manifest.json"} & {p.name for p in (tmp_path / "model").iterdir()}


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
    for flag in ("--overwrite", "--resume"):
        if put is put_link and flag == "--resume":
            continue  # a finished run whose model, or a checkpoint that, has been moved away
        out.mkdir()
        put(out / name)
        before = sorted(out.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(grpo, "load_sharded", lambda *a, **k: pytest.fail("a model was loaded first"))
            with pytest.raises(SystemExit, match=f"run/{name} is a link or a file, .*: move it away, or choose another --out"):
                train(monkeypatch, start, out, flag)
        assert sorted(out.iterdir()) == before
        shutil.rmtree(out)


@pytest.mark.parametrize("put", [put_link, put_broken_link, put_file, put_folder])
def test_the_final_model_is_not_lost_to_what_has_come_in_its_place(trainee, tmp_path, capsys, put):
    for name in ("model.new", "model.new.new"):
        (tmp_path / "model").exists() or (tmp_path / "model").is_symlink() or put(tmp_path / "model")
        before = os.lstat(tmp_path / "model")
        trainee.checkpoints.save("model")
        trainee.checkpoints.poll(wait=True)
        assert f"the model is saved as {tmp_path / name}\n" in capsys.readouterr().out
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(trainee.ids).logits, trainee.model(trainee.ids).logits)
        assert os.lstat(tmp_path / "model") == before
    assert not (tmp_path / "model/notes.txt").exists() or put is put_folder


def test_a_final_model_that_cannot_be_put_into_place_stays_where_it_was_written(trainee, tmp_path, monkeypatch):
    def no(*args):
        raise OSError("no renaming today")
    monkeypatch.setattr(Path, "rename", no)
    trainee.checkpoints.save("model")
    with pytest.raises(SystemExit, match="model was not saved .no renaming today; it lies in .*/model.tmp: move it"):
        trainee.checkpoints.poll(wait=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model.tmp")
    assert torch.equal(loaded(trainee.ids).logits, trainee.model(trainee.ids).logits)


def test_large_models_are_cut_into_files_with_an_index(tmp_path, monkeypatch):
    tensors = [("a", torch.zeros(10)), ("b", torch.zeros(3)), ("c", torch.zeros(30))]  # 40, 12 and 120 bytes
    files = plan_files(tensors, "model", limit=60)
    assert {file: [name for name, _ in part] for file, part in files.items()} == {
        "model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    monkeypatch.setattr(checkpoint.plan_files, "__defaults__", (20_000,))
    trainee = Trainee(tmp_path)
    trainee.step(1)
    assert len(list((tmp_path / "step_1").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step_1")
    assert torch.equal(loaded(trainee.ids).logits, trainee.model(trainee.ids).logits)
    other = Trainee(tmp_path, seed=3)
    resume(tmp_path, other.model, other.optimizer, Settings())
    assert trainee.equals(other)


def test_the_logs_are_cut_back_to_the_save(trainee, tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 4}])
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "rew')  # killed in mid-write
    resume(tmp_path, trainee.model, trainee.optimizer, Settings())
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


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
    resume(tmp_path, trainee.model, trainee.optimizer, Settings())
    assert [path.read_text() for path in (*theirs, tmp_path / "elsewhere")] == before
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == saved
    if saved:
        assert list(json.loads((tmp_path / "step_1/trainer.json").read_text())["logs"]) == ["metrics.jsonl"]


def test_a_log_that_is_a_link_is_refused(trainee, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("not the run's\n")
    (tmp_path / "rollouts.jsonl").symlink_to(outside)
    for begin in (lambda: resume(tmp_path, trainee.model, trainee.optimizer, Settings()),
                  lambda: check_run(Settings(out=str(tmp_path), resume=True))):
        with pytest.raises(SystemExit, match="rollouts.jsonl is a link.*choose another --out"):
            begin()
    assert outside.read_text() == "not the run's\n"


def test_old_checkpoints_go_when_a_new_one_is_in_place(tmp_path):
    trainee = Trainee(tmp_path, keep=2)
    for number in (1, 2, 3, 10):
        trainee.step(number)
    assert [path.name for path in step_folders(tmp_path)] == ["step_10", "step_3"]  # by number, not by name
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_behind_a_link_is_resumed_and_rotation_removes_the_link_only(trainee, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "step_3").rename(tmp_path / "disk/step_3")
    (tmp_path / "step_3").symlink_to("disk/step_3")
    check_run(Settings(out=str(tmp_path), resume=True))
    other = Trainee(tmp_path, seed=3, keep=1)
    assert resume(tmp_path, other.model, other.optimizer, Settings())["step"] == 3
    other.step(4)
    assert [path.name for path in step_folders(tmp_path)] == ["step_4"] and damage(tmp_path / "disk/step_3") is None


def truncate(step: Path):
    os.truncate(step / "optimizer.safetensors", (step / "optimizer.safetensors").stat().st_size - 1)
    return "optimizer.safetensors has .* bytes, not"


def flip_a_bit(step: Path):
    data = bytearray((step / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (step / "model.safetensors").write_bytes(data)
    return "model.safetensors has another content"


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
    assert resume(tmp_path, trainee.model, trainee.optimizer, Settings())["step"] == 2
    said = capsys.readouterr().out
    assert "step_3 is damaged" in said and re.search(message, said)
    for path in step_folders(tmp_path):
        (path / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="no checkpoint .* is whole: .* --overwrite"):
        resume(tmp_path, trainee.model, trainee.optimizer, Settings())
    # A run that passed it over saves that step again, in its place.
    trainee.checkpoints.save("step_3", {"step": 3})
    trainee.checkpoints.poll(wait=True)
    assert damage(tmp_path / "step_3") is None


def test_an_unfinished_save_is_cleared_away(trainee, tmp_path, capsys):
    (tmp_path / "step_4.tmp").mkdir()
    assert [path.name for path in step_folders(tmp_path)] == ["step_3", "step_2", "step_1"]
    Trainee(tmp_path)
    assert not (tmp_path / "step_4.tmp").exists() and "removed step_4.tmp" in capsys.readouterr().out


def test_another_configuration_is_refused_by_name(trainee, tmp_path):
    with pytest.raises(SystemExit, match=r"step_3 belongs to another configuration: --lr was 0.01, not 0.02, "
                                         r"--beta was 0.5, not 0.7; resume with"):
        resume(tmp_path, trainee.model, trainee.optimizer, Settings(lr=0.02, beta=0.7, steps=9))
    assert changed_settings({"lr": 1e-2, "steps": 3}, Settings(steps=9, out="x"), "a") == {"steps": [3, 9]}


def test_run_json_keeps_its_settings_and_notes_what_changed(tmp_path, capsys):
    def begin(**settings):
        settings = Settings(out=str(tmp_path / "run"), **settings)
        open_run(check_run(settings), settings)

    begin()
    (tmp_path / "run/metrics.jsonl").touch()
    with pytest.raises(SystemExit, match="another configuration: --beta was 0.5, not 0.6"):
        begin(resume=True, beta=0.6)
    assert json.loads((tmp_path / "run/run.json").read_text())["beta"] == 0.5
    begin(resume=True, steps=8)
    begin(resume=True, steps=8)  # as before: nothing to note
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["steps"] == 8 and record["changes"] == [{"steps": [3, 8]}]
    assert capsys.readouterr().out.count("--steps was 3 and is 8 from here on") == 1


# ---------------------------------------------------------------------------------------------------------------
# Saves that fail, and saves in the background

def fail_to_write(monkeypatch):
    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", no_room)


@pytest.mark.parametrize("then", ["stop", "continue"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, capsys, then):
    trainee = Trainee(tmp_path, keep=1, on_error=then)
    trainee.step(1)
    with monkeypatch.context() as patch:
        fail_to_write(patch)
        if then == "stop":
            with pytest.raises(SystemExit, match="step_2 was not saved .*No space left.*It needs .* GB in .* GB are free. "
                                                 "The checkpoint step_1 is whole"):
                trainee.step(2)
        else:
            trainee.step(2)
            assert "the run goes on, as --on_save_error continue says" in capsys.readouterr().out
    assert [path.name for path in step_folders(tmp_path)] == ["step_1"] and damage(tmp_path / "step_1") is None
    assert not list(tmp_path.glob("*.tmp"))
    trainee.step(3)
    assert [path.name for path in step_folders(tmp_path)] == ["step_3"]


@pytest.mark.parametrize("then, steps", [("stop", 6), ("stop", 4), ("continue", 6)])
def test_a_log_that_cannot_be_written(start, monkeypatch, tmp_path, capsys, then, steps):
    """From step 4 on. The last step's state is what the final model holds anyway."""
    out = tmp_path / "run"

    def full(path, *args, **kwargs):
        if Path(path).suffix == ".jsonl" and (out / "metrics.jsonl").exists() and len(metrics(out)) == 3:
            raise OSError(28, "No space left on device")
        return open(path, *args, **kwargs)
    flags = ["--save_every", 0, "--on_save_error", then, "--steps", steps]
    lost = r"did not take 1 line of metrics.jsonl \(No space left on device\) and 2 lines of rollouts.jsonl .* at step 4"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", full, raising=False)
        if (then, steps) == ("stop", 6):
            with pytest.raises(SystemExit, match=f"{lost}. The state after it is saved: make room .*--resume auto"):
                train(monkeypatch, start, out, *flags)
        else:
            train(monkeypatch, start, out, *flags)
            assert re.search(f"{lost}: lost", capsys.readouterr().out)
    if (then, steps) == ("stop", 6):
        assert [path.name for path in step_folders(out)] == ["step_4"] and not (out / "model").exists()
        train(monkeypatch, start, out, *flags, "--resume")
        assert [m["step"] for m in metrics(out)] == [1, 2, 3, 5, 6]
    assert (out / "model/model.safetensors").exists()


def test_an_evaluation_that_cannot_be_written_ends_with_one_sentence(start, monkeypatch, tmp_path):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(run_folder, "open", full, raising=False)
    monkeypatch.setattr(sys, "argv", [
        "eval.py", "--model", str(start / "model"), "--data", str(start / "train.jsonl"), "--out", str(tmp_path / "e"),
        "--limit", "2", "--n", "1", "--max_completion_tokens", "16"])
    with pytest.raises(SystemExit, match="records.jsonl cannot be written .No space left.*make room .*--resume"):
        evaluation.main()


def test_a_log_that_cannot_be_flushed_is_a_save_that_fails(tmp_path, monkeypatch):
    trainee = Trainee(tmp_path)
    trainee.step(1)
    flush = checkpoint.flush

    def no_room(path):
        if path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        flush(path)
    monkeypatch.setattr(checkpoint, "flush", no_room)
    with pytest.raises(SystemExit, match="step_2 was not saved .*metrics.jsonl: No space left on device.* step_1 is whole"):
        trainee.step(2)


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """The copy that is written is the state at the save, whatever training does meanwhile."""
    trainee, go = Trainee(tmp_path, keep=0), threading.Event()
    save_file = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *a, **k: (go.wait(30), save_file(*a, **k)))
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


# ---------------------------------------------------------------------------------------------------------------
# Stop signals and failures

def test_a_signal_ends_what_may_be_interrupted_and_is_remembered():
    stop = StopSignal()
    assert stop.unless_stopped(lambda x: x + 1, 2) == 3 and stop.agreed(torch.device("cpu")) == 0

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    began = time.monotonic()
    assert stop.unless_stopped(work) is None and time.monotonic() - began < 15
    assert stop.agreed(torch.device("cpu")) == signal.SIGTERM
    assert stop.unless_stopped(lambda: 1) is None  # from now on nothing begins
    os.kill(os.getpid(), signal.SIGTERM)  # an echo, as torchrun passes it on: not the end


def test_a_terminal_that_closes_stops_a_run_with_a_save(start, tmp_path):
    """It takes the screen along: what is printed then goes nowhere. Under nohup, SIGHUP says nothing."""
    terminal, screen = os.openpty()
    command = [sys.executable, ROOT / "grpo.py", "--model", start / "model", "--data", start / "train.jsonl", "--out", tmp_path,
               "--steps", 999, "--questions", 2, "--plans", 2, "--cots", 2, "--max_plan_tokens", 10, "--max_completion_tokens",
               16, "--eval_every", 0, "--save_every", 0]
    run = subprocess.Popen([*map(str, command)], stdin=screen, stdout=screen, stderr=screen, start_new_session=True,
                           env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                           preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
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
    monkeypatch.setattr(checkpoint.os, "_exit", codes.append)

    def update():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def decode():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def ask_local():
        decode()

    def broken():
        raise ValueError("a bug")

    def interrupted():
        raise KeyboardInterrupt
    for function, message in ((interrupted, "stopped by Ctrl-C\n"), (update, "in a micro-batch: lower --tokens_per_micro_batch"),
                              (decode, "in a rollout: set --rollout_rows below"),
                              (ask_local, "in the teacher: lower --concurrency"), (broken, "ValueError: a bug")):
        guarded(function)
        said = capsys.readouterr().err
        assert message in said and ("Traceback" in said) == (function is broken)
    assert codes == [STOPPED, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = make_problems("train", 40, facts=(2, 3))
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def train(monkeypatch, start, out, *flags):
    monkeypatch.setattr(sys, "argv", [
        "grpo.py", "--model", str(start / "model"), "--data", str(start / "train.jsonl"), "--out", str(out), "--steps", "6",
        "--questions", "2", "--plans", "2", "--cots", "2", "--max_plan_tokens", "10", "--max_completion_tokens", "16",
        "--eval_every", "0", "--lr", "1e-3", "--show_every", "2", "--save_every", "2", *map(str, flags)])
    grpo.main()


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(start, monkeypatch, tmp_path, capsys):
    """Stopped in the rollout of step 4, which is dropped and drawn again; saved after step 3, where no save was due."""
    train(monkeypatch, start, tmp_path / "whole")
    calls, sample_tree = [], grpo.sample_tree

    def stopped_in_the_fourth(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return sample_tree(*args, **kwargs)
    monkeypatch.setattr(grpo, "sample_tree", stopped_in_the_fourth)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, start, tmp_path / "parts")
    assert stop.value.code == STOPPED == 75
    assert "stopped by SIGINT after step 3; go on with --resume auto" in capsys.readouterr().out
    assert [path.name for path in step_folders(tmp_path / "parts")] == ["step_3", "step_2"]
    train(monkeypatch, start, tmp_path / "parts", "--resume", "auto")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_gradient_that_stays_bad_ends_the_run(start, monkeypatch, tmp_path):
    policy_loss, calls = grpo.policy_loss, []

    def bad_from_the_third(*args):
        loss, figures = policy_loss(*args)
        calls.append(1)
        return (loss * float("nan") if len(calls) in (1, 3, 4) else loss), figures
    monkeypatch.setattr(grpo, "policy_loss", bad_from_the_third)
    with pytest.raises(SystemExit, match="not finite in 2 steps in a row, all skipped: look at loss.*--max_skipped"):
        train(monkeypatch, start, tmp_path / "run", "--max_skipped", 2)
    assert [m["skipped"] for m in metrics(tmp_path / "run")] == [1, 0, 1, 1]  # one alone is passed over
    assert damage(tmp_path / "run/step_2") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_policy_that_has_diverged_is_logged_and_ends_the_run(start, monkeypatch, tmp_path, value):
    """Its logs stay JSON, which knows no NaN: null stands for what is not finite."""
    load_sharded = grpo.load_sharded

    def diverged(*args, **options):
        model = load_sharded(*args, **options)
        with torch.no_grad():
            model.get_decoder().norm.weight.fill_(value)
        return model
    monkeypatch.setattr(grpo, "load_sharded", diverged)
    with pytest.raises(SystemExit, match="not finite in 2 steps in a row, all skipped"):
        train(monkeypatch, start, tmp_path / "run", "--max_skipped", 2, "--show_every", 1, "--eval_every", 1, "--eval_size", 2)

    def strict(name):
        return [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / name).read_text().splitlines()]
    assert [(m["step"], m["skipped"], m["loss"]) for m in strict("metrics.jsonl")] == [(1, 1, None), (2, 1, None)]
    completion = strict("rollouts.jsonl")[0]["plans"][0]["completions"][0]
    assert None in completion["per_token"]["surprise"] and len(completion["per_token"]["width"]) == completion["tokens"]


def test_a_short_run_reaches_its_learning_rate(start, monkeypatch, tmp_path, capsys):
    train(monkeypatch, start, tmp_path / "run", "--steps", 2, "--warmup_steps", 50)
    assert max(m["lr"] for m in metrics(tmp_path / "run")) == 1e-3
    assert "--warmup_steps 50 is too long for 2 steps" in capsys.readouterr().out
