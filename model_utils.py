"""What every stage shares: settings from the command line, distributed set-up, prompts, models, logprobs, steps.

Shapes: B sequences, T tokens a sequence, V vocabulary, W ranks.
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import math
import operator
import os
import re
import sys
import types
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from attention import KVCache, Packed, shared_beginning, use_attention

# ---------------------------------------------------------------------------------------------------------------
# Settings: a flat dataclass becomes --flags

def fail(message: str):
    """End the program with one sentence and exit code 1 (`checkpoint.guarded` lets one rank say it)."""
    raise SystemExit(f"error: {message}")


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on", "auto"):  # --resume auto
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"wants true or false, not {text!r}")


class WordTuple(argparse.Action):
    """Collects the words after a flag as a tuple."""

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, tuple(values))


def parse_config(cls, argv: list[str] | None = None):
    """An instance of the dataclass `cls` from `--field value` flags; a field's trailing comment is its help text.

    Booleans are taken both ways (`--flag`, `--flag true`, `--flag false`), tuples as several words. Numbers must be
    finite and not negative, and in the range that a comment may end with, such as (>= 1) or (> 0, <= 1). Raises
    SystemExit with one sentence for a bad value or an unknown flag, near names included.
    """
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.MULTILINE))
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        kind = type(field.default)
        help_text = f"{comments.get(field.name, '')} [{field.default!r}]".replace("%", "%%")
        special = {bool: {"nargs": "?", "const": True, "type": parse_bool, "metavar": "true|false"},
                   tuple: {"nargs": "+", "action": WordTuple, "metavar": "NAME"}}
        parser.add_argument(f"--{field.name}", default=field.default, help=help_text,
                            **special.get(kind, {"type": kind, "metavar": kind.__name__.upper()}))
    parser.error = fail
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{field.name}" for field in dataclasses.fields(cls)])
        fail(f"unknown flag {unknown[0]}; " + (f"did you mean {' or '.join(near)}?" if near else "--help lists them all"))
    if getattr(known, "resume", False) and getattr(known, "overwrite", False):
        fail("--resume goes on with what --overwrite would remove; pass one of them")
    for name, value in vars(known).items():
        check_range(name, value, comments.get(name, ""))
    return cls(**vars(known))


def check_range(name: str, value, comment: str):
    """Refuse a number that is not finite, negative, or outside of the range that its comment ends with, if it does."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
    text = re.search(r"\(([<>][^()]*)\)$", comment)
    bounds = [bound.split() for bound in text[1].split(", ")] if text else []
    if not any(sign.startswith(">") for sign, _ in bounds):
        bounds.insert(0, (">=", "0"))
    if math.isnan(value) or math.isinf(value) and "inf:" not in comment:
        fail(f"--{name} must be a finite number, not {value}")
    if not all(compare[sign](value, float(bound)) for sign, bound in bounds):
        fail(f"--{name} must be {' and '.join(' '.join(bound) for bound in bounds)}, not {value}")


LOGGERS = ("tensorboard", "wandb", "trackio")


def check_common(config, default_model: str):
    """Refuse what neither training stage can work with, before anything is loaded. Raises SystemExit."""
    if config.model == default_model and not torch.cuda.is_available() and not config.dry_run:
        fail("no GPU here, and the default settings are the paper's 8-GPU run: `make demo` runs the method on a CPU")
    if config.shard_within not in ("world", "node"):
        fail(f"--shard_within is world or node, not {config.shard_within!r}")
    if config.on_save_error not in ("stop", "continue"):
        fail(f"--on_save_error is stop or continue, not {config.on_save_error!r}")
    if config.schedule not in SCHEDULES:
        fail(f"--schedule is constant, linear or cosine, not {config.schedule!r}")
    if config.log and config.log not in LOGGERS:
        fail(f"--log is tensorboard, wandb or trackio, not {config.log!r}")
    if config.log and importlib.util.find_spec(config.log) is None:
        fail(f"--log {config.log} wants the package {config.log}: run `pip install {config.log}`, or leave --log out "
             "(metrics.jsonl holds the same figures)")


# ---------------------------------------------------------------------------------------------------------------
# Distributed: the same calls with one process, where they do nothing

def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(device: str = "auto") -> torch.device:
    """Join the process group that torchrun describes (nccl on GPUs, gloo on CPUs) and return this rank's device.

    A single GPU gets a group of one, so that it runs the very same FSDP2 code as eight; a single CPU gets none.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # cuDNN's attention makes and keeps a plan for every new shape, and packed batches are of ever new shapes.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not dist.is_initialized() and (cuda or "RANK" in os.environ):
        # A rank waits for the one whose rollout is longest: the default of ten minutes would end a healthy run.
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timedelta(hours=1), **alone)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def print0(*args):
    """Print on rank 0, above a progress bar if one is on the screen."""
    if rank() == 0:
        with contextlib.suppress(OSError):  # a run must save where its terminal is gone, too
            tqdm.write(" ".join(map(str, args)))
            sys.stdout.flush()


def progress(total: int, done: int, name: str) -> tqdm:
    """A bar with rate and remaining time on rank 0; none on other ranks and where the output is no terminal."""
    return tqdm(total=total, initial=done, desc=name, unit="step", disable=None if rank() == 0 else True)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of a tensor of any shape; the input is not changed."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_max(value: int, device) -> int:
    value = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def gather0(items: list) -> list:
    """The ranks' lists, joined in rank order, on rank 0; an empty list elsewhere."""
    if world_size() == 1:
        return items
    parts = [None] * world_size() if rank() == 0 else None
    dist.gather_object(items, parts)
    return [item for part in parts or [] for item in part]


def everyone(item) -> list:
    """Each rank's `item`, in rank order, on every rank."""
    parts = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, item)
    return parts


def gather_all(items: list) -> list:
    """The ranks' lists, joined in rank order, on every rank."""
    return [item for part in everyone(items) for item in part]


def barrier():
    if world_size() > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------
# Prompts

INSTRUCTION = (
    "Solve the problem in three blocks. "
    "First, between <plan> and </plan>, sketch the route: the main phases, the strategy you choose and where you would "
    "switch to another one. Leave out small steps and do no arithmetic there. "
    "Second, between <think> and </think>, reason step by step along the plan. Judge it as you go; where it turns out "
    "to be wrong, say so and correct it. "
    "Third, between <answer> and </answer>, give only the final answer in \\boxed{}.")

# Base models come without a chat template. This one adds no special tokens that such a model has never seen.
PLAIN_TEMPLATE = ("{% for message in messages %}{{ message['content'] + '\n\n' }}{% endfor %}"
                  "{% if add_generation_prompt %}{{ 'Solution:\n' }}{% endif %}")


def load_tokenizer(path: str, thinking: bool = True):
    """The tokenizer of a Hugging Face folder or hub id, with a chat template in any case (announced when added).

    `thinking=False` pins Qwen3's non-thinking prompt in the chat template, so that models saved with it keep it.
    """
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception at a damaged file
        refuse_code(path, error)
        fail(f"no usable tokenizer at {path!r} ({in_short(error)}); copy the model's tokenizer files "
             "there")
    # Without files, transformers makes one without words for some models: all becomes nothing.
    if set(tokenizer.get_vocab()) <= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}:
        fail(f"no tokenizer at {path!r} (it has no words); copy the model's tokenizer files there")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no end-of-text token; set eos_token in its tokenizer_config.json")
    if tokenizer.chat_template is None:
        print0(f"{path} has no chat template: using the plain one of model_utils.py")
        tokenizer.chat_template = PLAIN_TEMPLATE
    if not thinking and not tokenizer.chat_template.startswith("{% set enable_thinking"):
        tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.chat_template
    if tokenizer.pad_token is None:  # never used here (masks come from lengths), but what other tools read from a saved model
        spare = "<|finetune_right_pad_id|>"  # Llama 3's; with pad = eos, many trainers would mask the end of turn
        tokenizer.pad_token = spare if spare in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer, problem: str) -> list[int]:
    """Token ids of instruction and problem, up to where the completion begins.

    Only the prompt goes through the chat template: Qwen3's would cut the plan out of a templated completion.
    """
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": problem}]
    # Llama's template prints today's date unless told one, and prompts would drift from day to day.
    options = dict(add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024")
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # jinja2's TemplateError; Gemma's template, for one, refuses a system turn
        if "role" not in str(error).lower():
            raise
        text = tokenizer.apply_chat_template([{"role": "user", "content": f"{INSTRUCTION}\n\n{problem}"}], **options)
    # Reasoning models' templates open a think block, in which no plan could come first: the model opens its own.
    text = re.sub(r"<think>\s*$", "", text)
    return tokenizer.encode(text, add_special_tokens=False)  # the template has written them


def find_stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: instruct models have several, in three different files."""
    found = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------------
# Models: load, shard, gather for sampling, save

def in_short(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def refuse_code(path: str, error: Exception):
    """Refuse a model that needs code of its own, if that is what transformers' error says."""
    if "custom code" in str(error):
        fail(f"{path} needs Python code that comes with it, and such code is never run here: choose "
             "a model that transformers knows by itself")


def why_no_config(path: str, error: Exception) -> str:
    """Why transformers found no config that it can use at `path`, and the remedy."""
    from transformers import CONFIG_MAPPING
    file = Path(path) / "config.json"
    if not Path(path).is_dir() and isinstance(error, OSError):
        return (f"no model at {path!r}: give a Hugging Face folder or the id of a model that can "
                "be downloaded (for the embedded default see `make demo`)")
    if Path(path).is_dir() and not file.exists():
        return (f"the folder {path} holds no config.json, so no model: copy the model's files "
                "there, or give the folder that holds them")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a hub id, no JSON, no object
        kind = json.loads(file.read_text()).get("model_type")
        if kind and kind not in CONFIG_MAPPING:
            return (f"{file} names the model_type {kind!r}, which this transformers does not know: "
                    "install a version that does, or choose another model")
    return f"{file} cannot be used ({in_short(error)}); copy the model's own there again"


def load_config(path: str):
    """The model's config, read before any weights so that bad settings are refused early.

    Code that comes with a model is never run: without trust_remote_code=False in every
    from_pretrained and from_config, transformers would ask on the terminal, and run it at a `y`.
    Raises SystemExit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    if Path(path).is_file():
        fail(f"{path} is a file: give the folder with all of the model's files")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds, where config.json is damaged
        refuse_code(path, error)
        fail(why_no_config(path, error))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        fail(f"{path} is of model_type {config.model_type!r}, for which transformers has no causal "
             "language model; choose another model")
    if getattr(config, "auto_map", None):
        print0(f"{path} brings Python code, which is not run: transformers' own {config.model_type} "
               "is used")
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        fail(f"{path} caps its attention scores (Gemma 2), which attention.py does not do; choose another model")
    return config


def check_context(model_config, prompt_tokens: int, completion_tokens: int):
    """Refuse lengths that the model has no positions for, before any weights are loaded. Raises SystemExit."""
    context = getattr(model_config, "max_position_embeddings", None) or prompt_tokens + completion_tokens
    if prompt_tokens + completion_tokens > context:
        fail(f"a prompt of {prompt_tokens} tokens and --max_completion_tokens {completion_tokens} do not fit the "
             f"model's context of {context}; lower --max_completion_tokens or --max_prompt_tokens")


def of_usable_weights(load):
    """Let a function that loads a model from a path say in one sentence what is wrong with the files there."""
    @functools.wraps(load)
    def run(path: str, *args, **options):
        from safetensors import SafetensorError
        try:
            return load(path, *args, **options)
        except (OSError, ValueError, SafetensorError) as error:
            refuse_code(path, error)
            remedy = "copy the model's files there again" if Path(path).is_dir() else "look at the network, its id and the free disk"
            fail(f"no usable weights at {path!r} ({in_short(error)}); {remedy}")
    return run


@of_usable_weights
def load_model(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """A causal language model in eval mode for good: rollout and update must see the same network, without dropout."""
    from transformers.utils import logging
    if rank() != 0 or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading and saving; our own bars are quiet there too
    return use_attention(read_model(path, dtype).to(device).eval())


def read_model(path: str, dtype):
    """The model as transformers loads it. Refuses a tensor that is missing or of another shape.

    Otherwise transformers would fill it at random: another network on each load, the reference's
    included. Tied weights and what no file holds (rotary frequencies) are not missing.
    """
    from transformers import AutoModelForCausalLM
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False,
        output_loading_info=True, ignore_mismatched_sizes=True)  # to say it in a sentence of our own
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        refuse_shape(name, stored, wanted)
    refuse_missing(path, report["missing_keys"])
    return model


def refuse_missing(where, names):
    """Refuse weights that lack tensors, if there are `names` of such. Raises SystemExit."""
    if names:
        more = f" and {len(names) - 1} more" * (len(names) > 1)
        fail(f"the weights in {where} lack {min(names)}{more}: copy the model's files there "
             "again, or choose another model")


def refuse_shape(name: str, stored, wanted):
    fail(f"{name} is stored with shape {list(stored)}, the model has {list(wanted)}: config.json and "
         "weights do not belong together; copy the model's files there again")


def shard_model(model, device: torch.device | None = None, *, shard_within: str = "world",
                activation_checkpointing: bool = False, cpu_offload: bool = False):
    """FSDP2: every block and the root, bf16 compute on GPUs, fp32 weights and gradient reduction.

    `shard_within` "world" cuts the weights over all ranks, "node" over those of a node (HSDP: each node holds them all,
    and gradients are averaged over nodes). `activation_checkpointing` keeps a block's input only and computes the block
    again in the backward pass. `cpu_offload` keeps weights, gradients and optimiser state in CPU memory. Tied
    embeddings both lie in the root's group, as FSDP needs. Without a process group the model stays whole.
    """
    device = device or model.device
    use_attention(model).token_logprobs = types.MethodType(token_logprobs, model)
    blocks = model.get_decoder().layers
    if activation_checkpointing:
        for block in blocks:  # inside FSDP's hooks, so that weights are there when the block is computed again
            block.forward = functools.partial(_checkpointed, block.forward)
    if not dist.is_initialized():
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                        register_fsdp_forward_method)
    ranks = dist.get_world_size()
    if shard_within == "node":
        inside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        mesh = init_device_mesh(device.type, (ranks // inside, inside), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (ranks,))
    on_gpu = device.type == "cuda"
    # Casting a block's inputs would do nothing, since embeddings come in bf16, but hand every block a copy of `packed`.
    policy = (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
              if on_gpu else MixedPrecisionPolicy())
    options = dict(mesh=mesh, mp_policy=policy,
                   offload_policy=CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy())
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "token_logprobs")  # a call other than model(...) would miss FSDP's hooks
    return model


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():  # sampling and scoring
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # no dropout: no RNG


@of_usable_weights
def load_sharded(path: str, device: torch.device, dtype: torch.dtype = torch.float32, **options):
    """load_model and shard_model (whose `options` these are) in one, without the whole model on any rank.

    The model is made without storage and cut; then each rank reads its own rows from the safetensors files. Where
    their names are not the model's own (transformers renames some on loading), rank 0 loads and broadcasts them.
    """
    if not dist.is_initialized():
        return shard_model(load_model(path, device, dtype), device, **options)
    from transformers import AutoModelForCausalLM, GenerationConfig
    config = load_config(path)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa",
                                                 trust_remote_code=False).eval()
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(path)
    shard_model(model, device, **options)
    home = torch.device("cpu") if options.get("cpu_offload") else device
    model._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t.to(device))  # to_empty empties buffers too
    model.tie_weights()
    if not Path(path).is_dir():
        from huggingface_hub import snapshot_download
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one download a node
            snapshot_download(path, allow_patterns=["*.safetensors"])
        barrier()
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors"]))
    else:
        folder = Path(path)
    stored = open_tensors(folder, "model")
    if set(model_tensors(model)) <= set(stored):
        fill(model, stored)
    else:
        whole = read_model(path, "auto").state_dict() if rank() == 0 else {}
        for name, tensor in model_tensors(model).items():
            value = whole[name].to(device, dtype) if rank() == 0 else torch.empty(tensor.shape, dtype=dtype, device=device)
            dist.broadcast(value, 0)
            with torch.no_grad():
                local(tensor).copy_(value[local_rows(tensor)] if tensor.ndim else value)
    return model


@contextlib.contextmanager
def parameters_on_meta():
    """Modules made inside have parameters without storage, but real buffers (rotary frequencies are in no file)."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # one that is: a tied weight, to stay the same object
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def model_tensors(model) -> dict[str, torch.Tensor]:
    """Name -> parameter or persistent buffer, sharded or not; tied ones once, under the first of their names."""
    names: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return {name: tensor for tensor, name in names.items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that lies on this rank; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_rows(tensor: torch.Tensor) -> slice:
    """The rows of a tensor that lie on this rank: FSDP2 cuts dimension 0 as torch.chunk does."""
    for dim, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_shard():
            rows = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
            start = min(rows * tensor.device_mesh.get_local_rank(dim), tensor.shape[0])
            return slice(start, min(start + rows, tensor.shape[0]))
    return slice(0, tensor.shape[0] if tensor.ndim else None)


def open_tensors(folder: Path, stem: str) -> dict:
    """Tensor name -> open file, for the tensors in a folder's `stem*.safetensors`; nothing is read yet."""
    from safetensors import safe_open
    handles = [safe_open(file, "pt") for file in sorted(Path(folder).glob(f"{stem}*.safetensors"))]
    return {name: handle for handle in handles for name in handle.keys()}


def read_rows(handle, name: str, like: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a stored tensor that is cut over the ranks as `like` is. Raises SystemExit at another shape."""
    stored = handle.get_slice(name)
    if stored.get_shape() != list(like.shape):
        refuse_shape(name, stored.get_shape(), like.shape)
    return stored[local_rows(like)] if like.ndim else handle.get_tensor(name)


@torch.no_grad()
def fill(model, stored: dict):
    """Read every tensor of a model, each rank its own rows, one at a time. Refuses missing ones."""
    refuse_missing("the checkpoint", set(model_tensors(model)) - set(stored))
    for name, tensor in model_tensors(model).items():
        local(tensor).copy_(read_rows(stored[name], name, tensor))


def without_autograd(function):
    """Run a function in inference_mode, which is a little faster, or in no_grad where FSDP2's forward needs that."""
    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.no_grad() if dist.is_initialized() else torch.inference_mode():
            return function(*args, **kwargs)
    return run


@contextlib.contextmanager
def unsharded(model):
    """Hold the whole model on every rank for the time of a rollout.

    A sharded forward is a collective: a gather for every token, and a deadlock as soon as two ranks decode different
    numbers of tokens. With the weights gathered once, ranks are free until the end of the block.
    """
    from torch.distributed.fsdp import FSDPModule
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()  # not recursive
        # FSDP's hooks would only cost time, and make streams wait for each other, which no CUDA graph can capture.
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield model
    finally:
        if parts:  # the update wants the memory; and the weights move, under the feet of captured decode steps
            model.kv_cache = None
        for part, (before, after) in zip(parts, hooks):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


# ---------------------------------------------------------------------------------------------------------------
# Memory for the KV cache

def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated for this rank's use; on a CPU its share of what the system has available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds in reserve counts as free
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(available[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except OSError:  # not Linux
        return 2**62


SAMPLING_BYTES = 48  # of a logit while its row's token is drawn: softmax, noise and top-p's sorted copies, in fp32


def cache_bytes(model_config, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = model_config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    key = value = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):  # DeepSeek's latent attention hands its keys and values out unpacked
        key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return config.num_hidden_layers * heads * (key + value) * dtype.itemsize


def reserve_cache(model, rows: int, length: int, at_least: int = 1) -> KVCache:
    """The model's KV cache for `rows` sequences of `length` tokens, kept from call to call (while sharded: of a rollout).

    It takes at most 0.8 of a GPU's free memory, half of a CPU's; more rows than fit wait for a slot. Raises SystemExit
    when not even `at_least` rows fit.
    """
    cache = getattr(model, "kv_cache", None)
    if cache is not None and cache.length >= length and (cache.slots >= rows or cache.full and cache.slots >= at_least):
        return cache
    model.kv_cache = cache = None  # free the old one first
    length = -(-length // 64) * 64  # prompts a little longer still fit
    cuda, free = model.device.type == "cuda", free_memory(model.device)
    row_bytes = length * cache_bytes(model.config, torch.bfloat16 if cuda else model.dtype)  # what it computes in
    sampling = SAMPLING_BYTES * model.config.get_text_config().vocab_size
    slots = min(rows, int(free * (0.8 if cuda else 0.5)) // (row_bytes + sampling))
    if slots < at_least:
        fail(f"{at_least} sequences of {length} tokens need a KV cache of {at_least * row_bytes / 1e9:.1f} GB, too much for "
             f"{free / 1e9:.1f} GB of free memory; lower --max_completion_tokens")
    if (slots, length) != getattr(model, "kv_cache_shape", None):
        print0(f"KV cache: {slots} rows x {length} tokens = {slots * row_bytes / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
               + (f"; {rows} rows run in waves" if slots < rows else ""))
    model.kv_cache_shape = slots, length
    model.kv_cache = KVCache(slots, length)
    model.kv_cache.full = slots < rows  # more rows would not fit either
    return model.kv_cache


# ---------------------------------------------------------------------------------------------------------------
# Logprobs of given sequences

# Logits made at a time: 128 MiB in fp32, 512 on a GPU. Of each chunk the head gets a gradient, and in bf16 many additions
# would lose digits.
CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**27}


def _head(model, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies (N,) of `targets` (N,) given hidden states (N, D), in fp32."""
    logits = model.get_output_embeddings()(hidden).float()  # (N, V)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # of some Gemma models
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    logits = logits / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def token_logprobs(model, packed: Packed, temperature: float = 1.0,
                   chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies (B, T-1) of the tokens that `packed.mask` marks; 0 elsewhere.

    Column t is about token t+1 of a sequence, given tokens 0..t: this shift is made in `pack` and nowhere else. The
    temperature divides the logits of the policy, the old policy and the reference alike, as it did in sampling.
    Logits dominate memory (152,000 floats a token for Qwen), so they are made `chunk` tokens at a time, for marked
    tokens only, and made again in the backward pass. On a sharded model call it as `model.token_logprobs(packed, …)`.
    """
    hidden = model.get_decoder()(input_ids=packed.ids[None], position_ids=packed.positions[None], use_cache=False,
                                 packed=packed).last_hidden_state[0]  # (N, D)
    if not packed.seen:  # sequences would have seen each other
        fail(f"{type(model).__name__} does not hand its arguments on to its attention layers: it cannot train packed")
    chunk = chunk or max(1, CHUNK_LOGITS[hidden.device.type] // model.config.get_text_config().vocab_size)
    parts = [checkpoint(_head, model, h, t, temperature, use_reentrant=False)
             for h, t in zip(hidden[packed.parents].split(chunk), packed.ids[packed.targets].split(chunk))]
    return tuple(torch.where(packed.mask, torch.cat(part)[packed.columns], 0.0) for part in zip(*parts))


# ---------------------------------------------------------------------------------------------------------------
# Micro-batches

def micro_batches(sequences: list[list[int]], tokens: int, device, share: bool = True) -> list[list[int]]:
    """Row indices cut into micro-batches of at most `tokens` tokens, in the order in which `pack` shares most.

    A row longer than `tokens` gets a micro-batch of its own. A forward of a sharded model is a collective, so every
    rank gets equally many micro-batches (empty ones at the end) or the backward pass would hang.
    """
    # Rows that begin alike become neighbours; without sharing, rows of like length do.
    order = sorted(range(len(sequences)), key=lambda i: sequences[i] if share else -len(sequences[i]))
    batches, room = [], -1
    for i in order:
        new = len(sequences[i])
        if share and batches:
            new -= shared_beginning(np.asarray(sequences[batches[-1][-1]]), np.asarray(sequences[i]))
        if new > room:
            batches.append([])
            new, room = len(sequences[i]), tokens
        batches[-1].append(i)
        room -= new
    return batches + [[]] * (all_max(len(batches), device) - len(batches))


# ---------------------------------------------------------------------------------------------------------------
# One optimiser step

def make_optimizer(model, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], lr=lr)


SCHEDULES = ("constant", "linear", "cosine")


def lr_at(step: int, steps: int, lr: float, warmup_steps: int, schedule: str) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then constant, or linear or cosine decay to 0 at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


def warmup_within(steps: int, warmup_steps: int) -> int:
    """`warmup_steps`; a tenth of the steps, and a line about it, where it would fill the run."""
    if warmup_steps < steps:
        return warmup_steps
    print0(f"--warmup_steps {warmup_steps} is too long for {steps} steps: "
           f"the warm-up takes {steps // 10}")
    return steps // 10


def optimizer_step(model, optimizer, lr: float, max_grad_norm: float) -> float:
    """Clip, step, zero. Returns the gradient's norm; a step whose norm is not finite is skipped (on all ranks alike)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # sharded gradients: a DTensor
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
