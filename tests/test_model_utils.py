"""Flags, prompts, micro-batches, schedules, run folders, results files, model folders."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib
import io
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from conftest import ROOT, make_tiny
from data.toy import make_model, make_tokenizer
from model_utils import (
    INSTRUCTION,
    PLAIN_TEMPLATE,
    encode_prompt,
    find_stop_ids,
    load_model,
    load_sharded,
    load_tokenizer,
    lr_at,
    make_optimizer,
    optimizer_step,
)
from plumbing import ranks
from plumbing.attention import micro_batches, pack
from plumbing.checkpoint import Checkpoints
from plumbing.flags import TrainingFlags, parse_config
from plumbing.folder import append_jsonl, check_run, hold, open_run
from plumbing.ranks import init_distributed
from plumbing.records import Records, load_jsonl
from plumbing.weights import check_context, load_config, load_tensors

CPU = torch.device("cpu")


@dataclasses.dataclass
class Settings:
    steps: int = 3  # how many
    lr: float = 1e-3  # how fast, in 1 / step
    share: float = 0.5  # how much (> 0, <= 1)
    part: float = 0.5  # how much (< 1)
    most: float = 1.0  # at most; inf: all (> 0)
    name: str = ""  # who
    fast: bool = True  # whether


# --------------------------------------------------------------------------------------------------
# Settings


def test_flags_set_fields_of_their_type():
    config = parse_config(Settings, "--steps 7 --lr 2e-5 --name x --fast false".split())
    assert config == Settings(7, 2e-5, name="x", fast=False)
    assert parse_config(Settings, ["--fast"]).fast is True
    assert parse_config(Settings, ["--fast=0"]).fast is False
    assert parse_config(Settings, []) == Settings()
    assert parse_config(Settings, ["--most", "inf"]).most == math.inf


BAD_FLAGS = {
    "--stepz 3": "unknown flag --stepz; did you mean --steps",
    "--ste 3": "unknown flag --ste; did you mean --steps",
    "--zzz": "unknown flag --zzz; --help lists them all",
    "--steps many": "invalid int value: 'many'",
    "--steps -1": "--steps must be >= 0, not -1",
    "--lr nan": "--lr must be a finite number, not nan",
    "--lr inf": "--lr must be a finite number, not inf",
    "--part -1": "--part must be >= 0 and < 1, not -1",
    "--share 0": "--share must be > 0 and <= 1, not 0.0",
    "--share 1.1": "--share must be > 0 and <= 1, not 1.1",
    "--fast maybe": "wants true or false",
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_bad_flags_are_refused_in_one_sentence(flags, message):
    with pytest.raises(SystemExit, match=message) as stop:
        parse_config(Settings, flags.split())
    assert "\n" not in str(stop.value)


def test_help_shows_each_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        parse_config(Settings, ["--help"])
    text = capsys.readouterr().out
    for shown in ("how many [3]", "how fast, in 1 / step [0.001]", "whether [True]"):
        assert shown in text


# --------------------------------------------------------------------------------------------------
# Prompts


class FakeTokenizer:
    def __init__(self, no_system: bool):
        self.no_system, self.calls = no_system, []

    def encode(self, text, **options):
        assert options == {"add_special_tokens": False}
        return [int(word) for word in text.split()]

    def apply_chat_template(self, messages, **options):
        if self.no_system and messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        self.calls.append((messages, options))
        return "1 2 3"


def test_prompt_uses_a_system_turn_or_merges_it_where_the_template_refuses_one():
    tokenizer = FakeTokenizer(no_system=False)
    assert encode_prompt(tokenizer, "1 + 1?") == [1, 2, 3]
    messages, options = tokenizer.calls[0]
    system, user = messages
    assert system == {"role": "system", "content": INSTRUCTION}
    assert user == {"role": "user", "content": "1 + 1?"}
    assert options["add_generation_prompt"] and options["date_string"] == "26 Jul 2024"
    tokenizer = FakeTokenizer(no_system=True)
    encode_prompt(tokenizer, "1 + 1?")
    assert tokenizer.calls[0][0] == [{"role": "user", "content": f"{INSTRUCTION}\n\n1 + 1?"}]


def test_plain_template_for_base_models():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "S\n\nQ\n\nSolution:\n"


def test_stop_ids_come_from_all_three_places(tiny):
    model = make_tiny("llama")
    model.generation_config.eos_token_id = [7, 8]
    tokenizer = make_tokenizer()
    assert find_stop_ids(model, tokenizer) == sorted({1, 7, 8, tokenizer.eos_token_id})


# --------------------------------------------------------------------------------------------------
# Micro-batches


@pytest.mark.parametrize("share", [True, False])
def test_micro_batches_hold_every_row_once_within_the_budget(share):
    rows = [[9] * n for n in (3, 50, 7, 7, 120, 1, 30, 30)] + [[1, 2, i] * 20 for i in range(9)]
    parts = micro_batches(rows, 100, CPU, share)
    assert sorted(sum(parts, [])) == list(range(17))
    size = lambda part: len(pack([rows[i] for i in part], [1] * len(part), CPU, share).ids)
    sizes = [size(part) for part in parts]
    assert all(tokens <= 100 or len(part) == 1 for tokens, part in zip(sizes, parts))
    # On every rank the largest come first, so that they meet other ranks' largest.
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 120
    assert micro_batches([], 100, CPU, share) == []


def test_neighbours_that_begin_alike_fill_a_micro_batch_together():
    """The four rows of a question take 30 + 2 * (20 + 2 * 10) = 110 tokens."""
    order = [(cot, plan, q) for cot in range(2) for plan in range(2) for q in (1, 2)]
    trees = [[q] * 30 + [q + 10 + plan] * 20 + [q + 50 + cot] * 10 for cot, plan, q in order]
    parts = micro_batches(trees, 110, CPU)
    assert [sorted({trees[i][0] for i in part}) for part in parts] == [[1], [2]]


# --------------------------------------------------------------------------------------------------
# Optimiser, schedule


def test_schedule_by_hand():
    assert [lr_at(s, 10, 8.0, 4, "constant") for s in (0, 1, 3, 4, 9)] == [2.0, 4.0, 8.0, 8.0, 8.0]
    assert [lr_at(s, 10, 6.0, 4, "linear") for s in (4, 7)] == [6.0, 3.0]
    assert lr_at(7, 10, 6.0, 4, "cosine") == pytest.approx(3.0)
    assert lr_at(4, 10, 6.0, 4, "cosine") == 6.0


def test_a_step_with_a_bad_gradient_is_skipped_and_a_large_one_clipped():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    model.weight.grad = torch.tensor([[float("nan"), 1.0]])
    assert not torch.isfinite(torch.tensor(optimizer_step(model, optimizer, 0.1, 1.0)))
    assert torch.equal(model.weight, before) and model.weight.grad is None
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    assert optimizer_step(model, optimizer, 0.1, 1.0) == pytest.approx(50.0)
    assert torch.allclose(model.weight, before - 0.1 * torch.tensor([[0.6, 0.8]]), atol=1e-4)


def test_weight_decay_spares_norms_and_biases():
    groups = make_optimizer(make_tiny("qwen2"), 1e-3, 0.1).param_groups
    assert groups[0]["weight_decay"] == 0.1 and all(p.ndim >= 2 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0.0 and all(p.ndim == 1 for p in groups[1]["params"])


# --------------------------------------------------------------------------------------------------
# Run folders


@dataclasses.dataclass
class Run(Settings):
    out: str = ""
    model: str = ""
    keep: int = 2
    overwrite: bool = False
    resume: bool = False


def refused(message: str):
    return pytest.raises(SystemExit, match=message)


def test_a_run_folder_is_not_overwritten_unasked(tmp_path, capsys):
    settings = functools.partial(Run, out=str(tmp_path / "run"))
    folder = check_run(settings())
    open_run(folder, settings())
    append_jsonl(folder / "metrics.jsonl", [{"step": 1}])
    with refused("already holds a run.*--resume.*--overwrite"):
        check_run(settings())
    check_run(settings(overwrite=True))
    # It stays until everything that the new run needs has been loaded.
    assert (folder / "metrics.jsonl").exists()
    check_run(settings(resume=True))
    (folder / "step_8").mkdir()
    check_run(settings(resume=True, steps=5))  # not whole: it will be passed over
    (folder / "step_8/manifest.json").write_text("{}")
    with refused("past step 8: resume with --steps of at least that"):
        check_run(settings(resume=True, steps=5))
    (folder / "model").mkdir()
    with pytest.raises(SystemExit) as finished:
        check_run(settings(resume=True))
    assert finished.value.code == 0  # a command with --resume may be queued again and again
    assert "is finished" in capsys.readouterr().out
    with refused("finished, after --steps 3: to train on, .* --model .*/model"):
        check_run(settings(resume=True, steps=400))
    (folder / "run.json").write_text("{")
    with refused("run.json is damaged"):
        check_run(settings(resume=True))
    (folder / "notes.txt").write_text("the user's own")
    (folder / "step_notes").mkdir()
    with refused("already holds a run"):  # it has begun since check_run looked
        open_run(folder, settings())
    open_run(check_run(settings(overwrite=True, steps=9)), settings(overwrite=True, steps=9))
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["machine.json", "notes.txt", "run.json", "step_notes"]
    assert json.loads((folder / "run.json").read_text())["steps"] == 9


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def write(folder, *names, text="the user's own"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


RUNS_NAMES = """model/a metrics.jsonl rollouts.jsonl run.json machine.json step_3/a model.tmp/a
step_3.tmp/a""".split()


@pytest.mark.parametrize("name", RUNS_NAMES)
def test_a_folder_that_never_held_a_run_loses_nothing(tmp_path, name):
    """Whatever the flags are: a run would write over that name, or clear it away."""
    write(tmp_path, name, "notes.txt")
    before = contents(tmp_path)
    refusal = f"holds {name.split('/')[0]}, and no run.json .* move it away, or choose another"
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        settings = Run(out=str(tmp_path), **flags)
        with refused(refusal):
            open_run(check_run(settings), settings)
    assert contents(tmp_path) == before


def test_a_run_may_begin_among_files_that_it_does_not_write(tmp_path):
    write(tmp_path, "notes.txt", "train.jsonl", "step_1_notes.txt", "step_2024_notes/a")
    write(tmp_path, "step_notes.tmp/a", "eval/run.json", "eval/a", "models/a")
    before, settings = contents(tmp_path), Run(out=str(tmp_path), overwrite=True)
    for _ in range(2):  # the second time it replaces the first run
        open_run(check_run(settings), settings)
        Checkpoints(tmp_path, None, None, None, settings)  # clears what an unfinished save has left
        assert before.items() <= contents(tmp_path).items()


def test_overwrite_removes_what_the_record_says_a_run_wrote(tmp_path):
    old = Run(out=str(tmp_path))
    open_run(check_run(old), old)
    write(tmp_path, "step_8/trainer.json", "step_9/manifest.json", "step_9.tmp/a", "model/a")
    write(tmp_path, "step_9.old.tmp/a", "metrics.jsonl", "rollouts.jsonl")
    write(tmp_path, "eval/records.jsonl", "eval/summary.json")
    users = ("notes.jsonl", "step_2024_notes/a", "eval/notes.txt")
    write(tmp_path, *users)
    write(tmp_path, "eval/run.json", text='{"stage": "evaluation"}')
    settings = Run(out=str(tmp_path), overwrite=True)
    write(tmp_path, "step_2024/a")
    before = contents(tmp_path)
    with refused("holds step_2024, and no run.json or checkpoint"):
        check_run(settings)
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "step_2024")
    older = {"data": "", **dataclasses.asdict(old)}  # as run.json was before it had a "stage"
    (tmp_path / "run.json").write_text(json.dumps(older))
    before = contents(tmp_path)
    with open(tmp_path / "eval/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with refused("is writing there .*eval/.lock is locked"):
            open_run(check_run(settings), settings)
    assert contents(tmp_path) == {**before, "eval/.lock": ""}
    open_run(check_run(settings), settings)
    assert contents(tmp_path).keys() == {*users, "run.json", "machine.json"}


HOLDER = """import os, subprocess, sys, time
from pathlib import Path
from plumbing.folder import hold
hold(Path(sys.argv[1]))
if child := {child}:  # the fork without exec sleeps below
    print(os.getpid(), child, flush=True)
time.sleep(60)"""


@pytest.mark.parametrize("child", ["subprocess.Popen(['sleep', '60']).pid", "os.fork()"])
def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path, child):
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER.format(child=child), path]
    other = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    pid, child = map(int, other.stdout.readline().split())
    try:
        name = re.escape(f"process {pid} on {socket.gethostname()} is writing there")
        with refused(f"{name} .*stop it, or choose another --out"):
            hold(path)
        other.kill()
        other.wait()
        os.kill(child, 0)  # it lives on, and does not keep the lock
        hold(path)
        hold(path)  # a process may begin twice
    finally:
        other.kill()
        os.kill(child, 9)
        other.stdout.close()


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    hold(tmp_path / ".lock")
    assert capsys.readouterr().out.count("has no locks (No locks available)") == 1


def test_a_lock_file_of_the_users_own_stays(tmp_path):
    write(tmp_path, ".lock")
    (tmp_path / "linked").symlink_to(tmp_path / ".lock")
    for name in (".lock", "linked"):
        with refused(f"{name} .*choose another --out"):
            hold(tmp_path / name)
    assert (tmp_path / ".lock").read_text() == "the user's own"


def test_resume_and_overwrite_exclude_each_other():
    with refused("--resume goes on with what --overwrite would remove; pass one of them"):
        parse_config(Run, ["--resume", "--overwrite"])


def test_overwrite_does_not_clear_a_runs_own_input(tmp_path):
    model = tmp_path / "run/model"
    model.mkdir(parents=True)
    with refused("--model .* is inside --out"):
        check_run(Run(out=str(tmp_path / "run"), model=str(model), overwrite=True))
    assert model.exists()


@contextlib.contextmanager
def disk_that_takes(size: int):
    """Files can grow to `size` bytes only."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_log_holds_whole_lines_where_the_disk_takes_half_of_one(tmp_path):
    append_jsonl(tmp_path / "log.jsonl", [{"step": 1}])
    with disk_that_takes(30), pytest.raises(OSError):
        append_jsonl(tmp_path / "log.jsonl", [{"step": 2}, {"step": 3}])
    append_jsonl(tmp_path / "log.jsonl", [{"step": 4}])
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 4}\n'


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("cannot write in .*/file/run .*; choose another --out"):
        check_run(Run(out=str(tmp_path / "file/run")))


# --------------------------------------------------------------------------------------------------
# Results files


def ids(records: Records) -> list[str]:
    return [record["id"] for record in records.read()]


def test_results_are_appended_and_a_resume_goes_on_after_the_last_whole_line(tmp_path):
    path = tmp_path / "new/plans.jsonl"
    first = Records(path, Run())
    assert first.begin() == set() and first.read() == [] and not path.exists()
    first.append({"id": "1", "score": float("nan")}, {"id": "2"})
    first.append({"id": "3"})
    whole = path.read_text()
    assert whole.splitlines()[0] == '{"id": "1", "score": null}'
    path.write_text(whole + '{"id": "4", "pl')  # killed in mid-write
    with refused("plans.jsonl already holds records: .*--resume to go on.*--overwrite"):
        Records(path, Run())
    again = Records(path, Run(resume=True))
    assert path.read_text() != whole  # nothing is touched before it is opened
    assert again.begin() == {("1",), ("2",), ("3",)} and path.read_text() == whole
    again.append({"id": "4"})
    assert ids(again) == ["1", "2", "3", "4"]


def test_results_are_removed_when_all_is_loaded_and_not_before(tmp_path):
    path = tmp_path / "plans.jsonl"
    Records(path, Run()).append({"id": "1"})
    records = Records(path, Run(overwrite=True))
    assert records.open() == set() and ids(records) == ["1"]
    assert records.begin() == set() and not path.exists()


def test_results_that_came_while_a_run_was_loading_are_refused(tmp_path):
    path = tmp_path / "plans.jsonl"
    records = Records(path, Run())
    write(tmp_path, "plans.jsonl", text='{"id": "1"}\n')
    with refused("already holds records"):
        records.begin()


def test_results_are_told_apart_by_their_key(tmp_path):
    path, key = tmp_path / "records.jsonl", ("benchmark", "id")
    write(tmp_path, "records.jsonl", text='{"benchmark": "a", "id": 1}\n{"id": "2"}\n')
    with refused("records of an older form, without `benchmark`: choose another --out or pass"):
        Records(path, Run(resume=True), key).open()
    write(tmp_path, "records.jsonl", text='{"benchmark": "a", "id": 1}\n')
    assert Records(path, Run(resume=True), key).open() == {("a", "1")}


def test_results_files_may_share_a_lock_and_keep_others_out(tmp_path):
    plans = Records(tmp_path / "plans.jsonl", Run())
    dropped = Records(tmp_path / "plans.dropped.jsonl", Run(), lock=plans.lock)
    other = Records(tmp_path / "other.jsonl", Run(), lock=tmp_path / ".lock")
    plans.begin(), dropped.begin()
    assert [path.name for path in tmp_path.iterdir()] == [".plans.jsonl.lock"]
    write(tmp_path, ".lock", text="process 7 on elsewhere\n")
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with refused("process 7 on elsewhere is writing there"):
            other.begin()
    other.begin()


def test_results_that_the_disk_does_not_take_end_the_run_in_one_sentence(tmp_path):
    records = Records(tmp_path / "plans.jsonl", Run())
    records.begin()
    records.append({"id": "1"})
    with disk_that_takes(20), refused("plans.jsonl cannot be written .* make room .*--resume"):
        records.append({"id": "2"})
    assert ids(records) == ["1"]
    with refused(f"{tmp_path} is a folder; give a file such as {tmp_path}/plans.jsonl"):
        Records(tmp_path, Run())


BAD_LINES = {
    b"{oops": "not JSON .*; mend or remove the line",
    b'{"answer": NaN}': "not JSON .NaN is no JSON number.; mend or remove the line",
    b'{"answer": -Infinity}': "not JSON .-Infinity is no JSON number",
    b'{"answer": ' + b"9" * 5000 + b"}": "not JSON",
    b"[" * 99999: "not JSON",
    b"[1, 2]": "want one JSON object per line, not a list",
    b'{"city": "Gen\xe8ve"}': "not UTF-8; convert the file first, such as with `iconv",
}


@pytest.mark.parametrize("line, reason", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_record_is_refused_by_number(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"city": "Zürich"}\n\n'.encode() + line + b"\n")
    with refused(f"{path}, line 3: {reason}"):
        load_jsonl(path)
    path.write_bytes('{"city": "Zürich"}\n'.encode())
    assert load_jsonl(path) == [{"_line": 1, "city": "Zürich"}]


# --------------------------------------------------------------------------------------------------
# Model folders


def test_lengths_beyond_the_context_are_refused():
    check_context(make_tiny("qwen2").config, 100, 156)
    with refused("context of 256; lower --max_completion_tokens"):
        check_context(make_tiny("qwen2").config, 100, 157)


@pytest.fixture
def toy(tmp_path):
    """A folder with a tiny toy model and its tokenizer."""
    make_model(make_tokenizer(), width=16, layers=1, heads=2).save_pretrained(tmp_path / "toy")
    make_tokenizer().save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


CODE = """open({mark!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM


class Odd(PretrainedConfig):
    model_type = "odd"


class OddModel(Qwen2ForCausalLM):
    config_class = Odd


class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""
NEEDS_CODE = {
    "odd": "needs Python code that comes with it, .* never run here: choose a model that transf",
    "vit": "model_type 'vit', for which transformers has no causal language model; choose another",
    "qwen2": "",
}


@pytest.mark.parametrize("kind, message", NEEDS_CODE.items())
def test_code_that_comes_with_a_model_is_never_run(
    toy, tmp_path, monkeypatch, capsys, kind, message
):
    """Not even if the terminal says y, where transformers asks.

    Transformers' own class is taken where it has one.
    """
    (toy / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    code = {"AutoConfig": "code.Odd", "AutoModelForCausalLM": "code.OddModel"}
    edit(toy / "config.json", model_type=kind, auto_map=code)
    edit(toy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.OddTokenizer"]})
    for stage in (load_config, load_tokenizer, functools.partial(load_model, device=CPU)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        if kind == "qwen2":
            stage(str(toy))
        elif stage is load_config:
            assert re.search(message, refusal(stage, toy))
        else:  # scripts have ended by then
            with contextlib.suppress(SystemExit):
                stage(str(toy))
        assert not (tmp_path / "ran").exists()
    said = capsys.readouterr().out
    assert "Do you wish" not in said
    assert ("not run: transformers' own qwen2 is used" in said) == (kind == "qwen2")


def refusal(function, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        function(*map(str, args))
    assert "\n" not in str(stop.value)
    return str(stop.value)


# Without files, transformers makes a different kind of empty tokenizer for each of these.
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_a_model_folder_without_tokenizer_files_is_refused(tmp_path, family):
    make_tiny(family).save_pretrained(tmp_path)
    said = refusal(load_tokenizer, tmp_path)
    assert re.search(f"no .*tokenizer at '{tmp_path}' .*; copy the tokenizer files there", said)


def test_a_damaged_tokenizer_is_refused(toy):
    (toy / "tokenizer.json").write_text('{"model": 3}')
    assert "no usable tokenizer at" in refusal(load_tokenizer, toy)


def test_why_a_folder_holds_no_model_is_said(toy):
    """'no model at' is said of what is not there only."""
    file = toy / "config.json"
    whole = json.loads(file.read_text())
    assert "is a file: give the folder" in refusal(load_config, file)
    untyped = {name: value for name, value in whole.items() if name != "model_type"}
    unknown = (
        "names the model_type 'odd', which this transformers does not know: install a version that "
        "does, or choose another"
    )
    messages = {
        "{": "config.json cannot be used (It looks like",
        "[]": "config.json cannot be used (",
        json.dumps({**whole, "hidden_size": "many"}): "cannot be used (Validation error",
        json.dumps(untyped): "cannot be used (Unrecognized model",
        json.dumps({**whole, "model_type": "odd"}): unknown,
    }
    for text, message in messages.items():
        file.write_text(text)
        said = refusal(load_config, toy)
        assert message in said and "no model at" not in said
    file.unlink()
    assert f"the folder {toy} holds no config.json, so no model: copy" in refusal(load_config, toy)
    assert "no model at" in refusal(load_config, "nowhere/at/all/model")


@pytest.fixture(params=[False, True], ids=["whole", "sharded"])
def load(request):
    """load_sharded, alone and in a process group, where every rank reads its own rows."""
    if request.param:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield lambda path: load_sharded(str(path), CPU, TrainingFlags(activation_checkpointing=False))
    if request.param:
        dist.destroy_process_group()


def test_weights_that_miss_a_tensor_are_refused(toy, load):
    """Filled at random, it would differ on each load, and so between policy and reference."""
    file, save = toy / "model.safetensors", functools.partial(save_file, metadata={"format": "pt"})
    stored = load_file(file)
    # The head is tied, so nothing is missing.
    assert "lm_head.weight" not in stored and load(toy).config.tie_word_embeddings
    missing = {name: t for name, t in stored.items() if "layernorm" not in name}
    save(missing, file)
    lack = "lack model.layers.0.input_layernorm.weight and 1 more"
    remedy = "copy the model's files there again, or choose another model"
    assert f"the weights in {toy} {lack}: {remedy}" in refusal(load, toy)
    with refused("the weights in the checkpoint lack model.layers.0.input_layernorm.weight"):
        load_tensors(make_model(make_tokenizer(), width=16, layers=1, heads=2), missing)
    save({**stored, "model.norm.weight": torch.ones(15)}, file)
    message = r"model.norm.weight is stored with shape \[15\], the model has \[16\]: .*; copy"
    assert re.search(message, refusal(load, toy))
    edit(toy / "config.json", tie_word_embeddings=False)
    save(stored, file)
    assert "lack lm_head.weight:" in refusal(load, toy)


# --------------------------------------------------------------------------------------------------
# A GPU that is missing, or that torch cannot use


@pytest.fixture
def gpu_file(tmp_path, monkeypatch):
    """A machine with an NVIDIA GPU, as Linux shows it."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(ranks, "GPU_FILE", tmp_path / "nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("cuda, built", [("13.0", "built for CUDA 13.0"), (None, "without CUDA")])
def test_a_gpu_that_torch_cannot_use_is_refused_with_the_remedy(
    gpu_file, monkeypatch, cuda, built
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(SystemExit, match=f"{built}, cannot use: update the driver, or install a"):
        init_distributed()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert init_distributed() == torch.device("cpu")


@pytest.mark.parametrize("stage", ["sft", "grpo", "eval", "distill"])
def test_every_stage_refuses_it_also_with_a_model_named(gpu_file, tmp_path, monkeypatch, stage):
    module, toy = importlib.import_module(stage), str(ROOT / "data/toy_base")
    data = tmp_path / "data.jsonl"
    record = {"problem": "A = 4 ; A ?", "answer": "4", "solution": "A = 4"}
    record |= {"plan": "A needs nothing", "think": "A = 4"}
    data.write_text("".join(json.dumps({**record, "id": str(i)}) + "\n" for i in range(4)))
    model = "--teacher" if stage == "distill" else "--model"
    flags = [model, toy, "--data", str(data), "--out", str(tmp_path / "out")]
    flags += ["--batch_size", "2"] * (stage == "sft")
    flags += ["--max_completion_tokens", "64"] * (stage in ("grpo", "eval"))
    monkeypatch.setattr(sys, "argv", [stage, *flags])
    with pytest.raises(SystemExit, match="there is a GPU here"):
        module.main()


def test_a_large_model_on_a_cpu_is_not_silent(monkeypatch, capsys):
    from plumbing import weights

    load_model(str(ROOT / "data/toy_base"), torch.device("cpu"))
    assert "no GPU" not in capsys.readouterr().out
    monkeypatch.setattr(weights, "SLOW_BILLIONS", 0.0004)  # the toy model has 0.0005
    load_model(str(ROOT / "data/toy_base"), torch.device("cpu"))
    assert "there is no GPU here, and this model has 0.0 B parameters" in capsys.readouterr().out
