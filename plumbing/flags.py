"""A dataclass becomes --flags. Each field's trailing comment is its help text."""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import math
import operator
import re
import sys
from typing import Literal, get_args

from plumbing.ranks import fail, has_gpu, require


@dataclasses.dataclass
class TrainingFlags:
    """What sft.py and grpo.py share: memory, logs, checkpoints, some of the optimiser."""

    weight_decay: float = 0.01  # AdamW, matrices only
    max_grad_norm: float = 1.0  # gradient-norm clip; inf: none (> 0)
    tokens_per_micro_batch: int = 16384  # per forward; shared beginnings count once (>= 1)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # to compute in; auto: bf16 on GPUs, else fp32
    activation_checkpointing: bool = True  # less memory for activations, a third more computing
    cpu_offload: bool = False  # weights, gradients and optimiser state in CPU memory
    shard_within: Literal["world", "node"] = "world"  # cut weights over all ranks, or a node's
    max_pixels: int = 401408  # larger pictures are made smaller (512 tokens of Qwen2.5-VL); 0: none
    freeze_vision: bool = True  # a vision tower keeps its weights: false is not there yet
    log: Literal["", "tensorboard", "wandb", "trackio"] = ""  # also log there, if it is installed
    keep: int = 2  # newest checkpoints kept; 0: all
    on_save_error: Literal["stop", "continue"] = "stop"  # when a disk is full or the like
    max_skipped: int = 5  # stop after this many steps in a row without a finite gradient; 0: never
    seed: int = 0  # order of the data, sampling (< 4e9)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = False  # continue from the newest whole checkpoint in --out, if there is one
    dry_run: bool = False  # print settings and the memory that a GPU needs, and end


def parse_config(cls, argv: list[str] | None = None):
    """An instance of the dataclass `cls` from `--field value` flags.

    Booleans are taken both ways (`--flag`, `--flag true`, `--flag false`), tuples as several words,
    Literals as one of their choices. Numbers must be finite, not negative, and within the range
    that a comment may end with, such as (>= 1) or (> 0, <= 1). A script's `check` runs last.
    Raises SystemExit with one sentence for a bad value, and with the nearest name for an unknown
    flag.
    """
    source = "".join(inspect.getsource(base) for base in cls.__mro__[-2::-1])
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.MULTILINE))
    known, unknown = make_parser(cls, comments).parse_known_args(argv)
    values = vars(known)
    if unknown:
        flags = [f"--{name}" for name in values]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists them all"
        fail(f"unknown flag {unknown[0]}; {hint}")
    both = values.get("resume") and values.get("overwrite")
    require(not both, "--resume goes on with what --overwrite would remove; pass one of them")
    for name, value in values.items():
        check_range(name, value, comments.get(name, ""))
        if isinstance(value, list):
            values[name] = tuple(value)
    config = cls(**values)
    if isinstance(config, TrainingFlags):
        check_training(config)
    if hasattr(config, "check"):
        config.check()
    return config


def make_parser(cls, comments: dict[str, str]) -> argparse.ArgumentParser:
    """The argument parser of a dataclass: its own flags first, then those it inherits."""
    own = cls.__dict__.get("__annotations__", {})
    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own):
        kind, choices = type(field.default), get_args(field.type)
        if kind is bool:
            how = {"nargs": "?", "const": True, "type": parse_bool, "metavar": "true|false"}
        elif kind is tuple:
            how = {"nargs": "+", "metavar": "NAME"}
        elif choices:
            how = {"choices": choices}
        else:
            how = {"type": kind, "metavar": kind.__name__.upper()}
        text = f"{comments.get(field.name, '')} [{field.default!r}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **how)
    parser.error = fail
    return parser


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on", "auto"):  # --resume auto
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"wants true or false, not {text!r}")


def check_range(name: str, value, comment: str):
    """Refuse a number that is not finite, or outside of the range that its comment ends with.

    Without a lower bound in the comment, the number must not be negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
    text = re.search(r"\(([<>][^()]*)\)$", comment)
    bounds = [bound.split() for bound in text[1].split(", ")] if text else []
    if not any(sign.startswith(">") for sign, _ in bounds):
        bounds.insert(0, (">=", "0"))
    finite = math.isfinite(value) or value == math.inf and "inf:" in comment
    require(finite, f"--{name} must be a finite number, not {value}")
    inside = all(compare[sign](value, float(bound)) for sign, bound in bounds)
    wanted = " and ".join(" ".join(bound) for bound in bounds)
    require(inside, f"--{name} must be {wanted}, not {value}")


def check_training(config: TrainingFlags):
    """Refuse what no training stage can work with, before anything is loaded."""
    require(
        config.model != type(config).model or config.dry_run or has_gpu(),
        "no GPU here, and the default settings are the paper's 8-GPU run: `make demo` runs the "
        "method on a CPU",
    )
    require(
        config.freeze_vision,
        "--freeze_vision false is not supported: features of pictures are computed once per step, "
        "without gradients; leave it out",
    )
    require(
        not config.log or importlib.util.find_spec(config.log),
        f"--log {config.log} wants the package {config.log}: run `pip install {config.log}`, or "
        "leave --log out (metrics.jsonl holds the same figures)",
    )
