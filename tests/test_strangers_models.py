"""Hostile model folders (bench/strangers_models.py): no pickle is loaded, no code is run."""

import resource
import shutil
import signal
import sys

import pytest
import torch

from bench import strangers_inputs as strange
from bench.strangers import watch
from bench.strangers_models import EVERYTHING, MARK, MODELS, pickles, put_pickle
from grpo import Config
from model_utils import find_stop_ids, load_model, load_sharded, load_tokenizer
from plumbing import weights
from plumbing.ranks import init_distributed, printable
from plumbing.weights import load_config, read_model

WATCHED = []  # an audit hook cannot be taken away again


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(lambda event, given: [watch(event, given, folder) for folder in WATCHED])
    yield
    WATCHED.clear()


@pytest.fixture
def folder(work):
    WATCHED[:] = [shutil.copytree(work / "base/model", work / "strange")]
    yield WATCHED[0]
    WATCHED.clear()


def load(folder):
    """What a stage loads of a model."""
    path, device = str(folder), torch.device("cpu")
    tokenizer = load_tokenizer(path)
    load_config(path)
    find_stop_ids(load_model(path, device), tokenizer)


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_folder_runs_nothing_and_is_refused_with_a_sentence(
    name, folder, tried, monkeypatch
):
    spoil, fate = MODELS[name]
    spoil(folder)
    monkeypatch.setattr(weights, "TEMPLATE_LIMITS", (1.0, 1 << 30))
    code, printed = tried(lambda: load(folder))
    assert not (folder.parent / MARK).exists()
    assert strange.is_plain(printed) and "Traceback" not in printed, printed
    assert code in {"refused": [1], "runs": [0], "either": [0, 1]}[fate], printed
    assert code == 0 or "error: " in printed and len(printed.strip().splitlines()[-1]) < 600


@pytest.mark.parametrize("stage", strange.STAGES)
def test_no_stage_loads_a_pickle_or_runs_code_whatever_the_folder_holds(
    stage, folder, tried
):
    for spoil in EVERYTHING:
        spoil(folder)
    code, printed = tried(lambda: strange.STAGES[stage](folder.parent, "strange"))
    assert code == 0, printed
    assert not (folder.parent / MARK).exists()
    assert "Python code, which is not run" in printed


def test_a_checkpoint_with_pickles_is_resumed_without_them(folder, tried):
    work, flags = folder.parent, [*strange.GRPO, "--save_every", 1, "--steps", 2]
    assert tried(lambda: strange.run_grpo(work, more=flags))[0] == 0
    shutil.rmtree(work / "out/model")
    WATCHED.append(work / "out/step_1")
    pickles(work / "out/step_1")
    code, printed = tried(lambda: strange.run_grpo(work, more=[*flags, "--resume"]))
    assert code == 0 and "resuming after step 1" in printed, printed
    assert not (work / "out" / MARK).exists()


def test_a_sharded_model_of_pickles_alone_is_refused(folder):
    put_pickle(folder, "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    device = init_distributed("cpu", alone=True)
    try:
        with pytest.raises(SystemExit, match="pickles, such as pytorch_model.bin, are never"):
            load_sharded(str(folder), device, Config(activation_checkpointing=False))
    finally:
        torch.distributed.destroy_process_group()
    assert not (folder.parent / MARK).exists()


def test_a_pickle_that_a_hub_models_list_names_is_refused(folder, monkeypatch):
    """There the list of files comes from the hub, and nothing has looked at it before."""
    monkeypatch.setattr(weights, "check_folder", lambda path: None)
    MODELS["an index of a pickle"][0](folder)
    with pytest.raises(SystemExit, match="pytorch_model.bin is no safetensors file"):
        read_model(str(folder), torch.float32)
    assert torch.load.__module__ == "torch.serialization"


def test_limits_on_templates_are_lifted_again():
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError), weights.bounded(0.05, 1 << 28):
        while True:
            pass
    with pytest.raises(MemoryError), weights.bounded(5, 1 << 28):
        "x" * (1 << 29)
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM))
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and printable("x") == "x"
