"""Tiny models of real architectures with random weights, and Python's own signal handlers."""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)  # workers share the cores

# Files that take longest begin first, so that workers end together (--no-loadscope-reorder).
SLOW = """test_gpu test_smoke test_faults test_distributed test_thin test_families test_eval
test_report""".split()
FAMILIES = ["qwen2", "qwen3", "llama", "mistral", "gemma"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def signals():
    """Every test begins with Python's own signal handlers.

    An earlier one may have trained in this process, which takes the signals over for good. And a
    shell starts its background jobs deaf to Ctrl-C.
    """
    yield give_signals_back()
    give_signals_back()


def give_signals_back():
    from plumbing.signals import StopSignal

    StopSignal.came = False
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def make_tiny(family: str, vocab_size: int = 97, seed: int = 0, **settings):
    """Two layers, width 32, four heads on two key-value heads.

    Its weights are large, so that logits differ clearly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    special = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    settings = dict(max_position_embeddings=256, **sizes, **heads, **special, **settings)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="session")
def tiny():
    """tiny(family) -> the family's model, made once."""
    models = {}
    return lambda family="qwen2": models.setdefault(family, make_tiny(family))


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory):
    """A folder with toy data, plans and a model with random weights."""
    from bench.strangers_inputs import prepare

    folder = tmp_path_factory.mktemp("toy")
    prepare(folder)
    return folder / "base"


@pytest.fixture
def work(toy_files, tmp_path):
    """A folder with base/, as bench/strangers_inputs.py wants it."""
    (tmp_path / "base").symlink_to(toy_files)
    return tmp_path


class Exit(BaseException):
    """Stands for os._exit: nothing of a script's own runs after it."""


@pytest.fixture
def tried(monkeypatch, capfd):
    """tried(main): its exit code and all that is printed, when it is called as scripts call it."""
    from plumbing import signals

    def leave(code):
        raise Exit(code)

    def call(main):
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(signals.os, "_exit", leave)
        root = logging.getLogger()
        theirs = [h for h in root.handlers if type(h).__module__.startswith("_pytest")]
        with warnings.catch_warnings(), pytest.raises((Exit, SystemExit)) as left:
            # Not into pytest's own lists: pytest-xdist cannot send lone surrogates.
            warnings.showwarning = lambda *args: print(warnings.formatwarning(*args[:4]))
            root.handlers = [h for h in root.handlers if h not in theirs]
            try:
                signals.guarded(main)
            finally:
                root.handlers += theirs
        return left.value.args[0], "".join(capfd.readouterr())

    return call
