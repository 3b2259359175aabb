"""Models on disk: their config and their safetensors files, read so that no rank holds all of it.

Whatever is wrong with the files is said in one sentence that names the remedy. Code that comes with
a model is never run: without trust_remote_code=False in every from_pretrained and from_config,
transformers would ask on the terminal, and run it after a `y`. Pickles are never loaded, because
loading one can run code, too.
"""

import contextlib
import functools
import json
import os
import resource
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing.ranks import barrier, fail, print0, rank, require

SLOW_BILLIONS = 1.0  # parameters from which on a CPU is no place for a model
NO_PICKLES = "pickles, such as pytorch_model.bin, are never loaded"
INDEX = "model.safetensors.index.json"
MOST_LAYERS = 2000
SIZES = "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"
TEMPLATE_LIMITS = 20.0, 2 << 30  # seconds and bytes that a chat template may take for one prompt

# --------------------------------------------------------------------------------------------------
# Refusals


def in_short(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def refuse_code(path: str, error: Exception):
    """Refuse a model that needs code of its own, if that is what transformers' error says."""
    require(
        "custom code" not in str(error),
        f"{path} needs Python code that comes with it, and such code is never run here: choose a "
        "model that transformers knows by itself",
    )


def refuse_missing(where, names):
    """Refuse weights that lack tensors, if there are `names` of such."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    require(
        not names,
        f"the weights in {where} lack {min(names, default='')}{more}: copy the model's files there "
        "again, or choose another model",
    )


def refuse_shape(name: str, stored, wanted):
    fail(
        f"{name} is stored with shape {list(stored)}, the model has {list(wanted)}: config.json "
        "and weights do not belong together; copy the model's files there again"
    )


def of_usable_weights(load):
    """Let a function that loads a model from a path say in one sentence what is wrong there."""

    @functools.wraps(load)
    def run(path: str, *args, **options):
        from safetensors import SafetensorError

        try:
            return load(path, *args, **options)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            refuse_code(path, error)
            remedy = (
                "copy the model's files there again"
                if Path(path).is_dir()
                else "check the network, the model's id and the free disk space"
            )
            if "attention implementation" in str(error):
                fail(
                    f"{path} cannot use PyTorch's own attention ({in_short(error)}), which "
                    "sampling and training need; choose another model"
                )
            if "model.safetensors" in str(error):  # is missing
                remedy = f"{NO_PICKLES}: convert them to safetensors, or choose another model"
            fail(f"no usable weights at {path!r} ({in_short(error)}); {remedy}")

    return run


@contextlib.contextmanager
def without_pickles():
    """Inside, torch.load refuses: a model's list of files may name pickles among the others."""
    load = torch.load

    def refuse(file, *args, **options):
        fail(f"{file} is no safetensors file; {NO_PICKLES}: convert it, or choose another model")

    torch.load = refuse
    try:
        yield
    finally:
        torch.load = load


def check_folder(path: str):
    """Refuse a model's folder that leads out of itself, or that cannot be read to an end."""
    folder = Path(path)
    if not folder.is_dir():
        return
    for file in folder.iterdir():  # a pipe would be waited for, and /dev/zero has no end
        require(
            file.is_file() or file.is_dir() or not file.exists(),
            f"{file} is neither a file nor a folder: copy the model's files there again",
        )
    files = read_object(folder / INDEX).get("weight_map")
    for name in files.values() if isinstance(files, dict) else ():
        require(
            isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors"),
            f"{folder / INDEX} names {name!r:.80}, which is no safetensors file of this folder: "
            "copy the model's files there again",
        )
    settings = read_object(folder / "config.json")
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            check_settings(path, part)


def read_object(file: Path) -> dict:
    """The object in a JSON file; {} where there is none that can be read."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def check_settings(path: str, settings: dict):
    """Refuse a config.json by what transformers would make of it as soon as it reads it."""
    sizes = {name: settings[name] for name in SIZES if isinstance(settings.get(name), int)}
    odd = [f"{name} {size}" for name, size in sizes.items() if size < 1]
    if sizes.get(SIZES[0], 1) > MOST_LAYERS:  # transformers would list them all
        odd.append(f"{SIZES[0]} {sizes[SIZES[0]]}")
    require(not odd, f"{path} cannot have {', '.join(odd):.80}: copy its own config.json there")
    file = settings.get("transformers_weights") or ".safetensors"
    require(
        str(file).endswith((".safetensors", ".safetensors.index.json")),
        f"{path} names {file!r:.80} for its weights, which is no safetensors file: {NO_PICKLES}",
    )
    kernels = [f"{value}" for name, value in settings.items() if "implementation" in name]
    require(
        not any("/" in kernel for kernel in kernels),
        f"{path} names a kernel on the hub, and code that comes with a model is never run here: "
        f"take {', '.join(kernels):.80} out of its config.json, or choose another model",
    )
    require(
        not settings.get("quantization_config"),
        f"{path} is quantised, which cannot be trained here: choose the same model in plain form",
    )


@contextlib.contextmanager
def bounded(seconds: float, size: int):
    """Inside, Python code ends with an error after so many seconds, or bytes of further memory.

    Where that can be had: on the main thread, and where /proc tells how much memory is taken.
    """

    def too_long(*_):
        raise TimeoutError(f"it takes more than {seconds:g} s")

    main, statm = threading.current_thread() is threading.main_thread(), Path("/proc/self/statm")
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + size
        most = most if limit == resource.RLIM_INFINITY else min(most, limit)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    if main:
        before = signal.signal(signal.SIGALRM, too_long)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def check_template(path: str, tokenizer):
    """Refuse a chat template that raises, or takes long or much memory for one prompt.

    jinja2's sandbox keeps it from everything else.
    """
    user = {"role": "user", "content": "1 + 1"}
    turns, render = [{"role": "system", "content": "Add."}, user], tokenizer.apply_chat_template
    try:
        with bounded(*TEMPLATE_LIMITS):
            try:
                text = render(turns, tokenize=False)
            except Exception as error:
                if "role" not in str(error).lower():  # Gemma's refuses a system turn
                    raise
                text = render([user], tokenize=False)
        if user["content"] not in text:
            raise ValueError("it leaves the question out")
    except Exception as error:  # of many kinds: a template is a program
        fail(
            f"the chat template of {path} cannot be used ({in_short(error)}): mend it, or choose "
            "another model"
        )


# --------------------------------------------------------------------------------------------------
# The config


def load_config(path: str):
    """The model's config, read before any weights, so that bad settings are refused early.

    Raises SystemExit if there is no model at `path`, or one that this code cannot run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    require(not Path(path).is_file(), f"{path} is a file: give the folder with the model's files")
    try:
        check_folder(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds, where config.json is damaged
        refuse_code(path, error)
        fail(why_no_config(path, error))
    require(
        sees(config) or type(config) in AutoModelForCausalLM._model_mapping,
        f"{path} is of model_type {config.model_type!r}, for which transformers has no causal "
        "language model; choose another model",
    )
    if getattr(config, "auto_map", None):
        print0(
            f"{path} brings Python code, which is not run: transformers' own {config.model_type} "
            "is used"
        )
    text = config.get_text_config()
    require(
        hasattr(text, "to_dict"),
        f"{path} has a text_config that its kind of model does not have: copy the model's own "
        "config.json there",
    )
    for part in (config, text):  # of the hub's models, nothing has been looked at before
        kernel = getattr(part, "_attn_implementation", None)
        check_settings(path, {**vars(part), "implementation": kernel})
    require(
        not getattr(text, "attn_logit_softcapping", None),
        f"{path} caps its attention scores (Gemma 2), which plumbing/attention.py does not do; "
        "choose another model",
    )
    return config


def sees(config) -> bool:
    """Whether a model takes pictures, in the way that plumbing/images.py knows."""
    return config.model_type in ("qwen2_5_vl", "qwen3_vl")


def model_class(config):
    """The class of transformers that makes a model of this config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def why_no_config(path: str, error: Exception) -> str:
    """Why transformers found no config that it can use at `path`, and the remedy."""
    from transformers import CONFIG_MAPPING

    file = Path(path) / "config.json"
    if not Path(path).is_dir() and isinstance(error, OSError):
        return (
            f"no model at {path!r}: give a Hugging Face folder or the id of a model that can be "
            "downloaded (for the embedded default see `make demo`)"
        )
    if Path(path).is_dir() and not file.exists():
        return (
            f"the folder {path} holds no config.json, so no model: copy the model's files there, "
            "or give the folder that holds them"
        )
    kind = read_object(file).get("model_type")
    if kind and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        return (
            f"{file} names the model_type {kind!r:.80}, which this transformers does not know: "
            "install a version that does, or choose another model"
        )
    return f"{file} cannot be used ({in_short(error)}); copy the model's own there again"


def check_context(model_config, prompt_tokens: int, completion_tokens: int):
    """Refuse lengths that the model has no positions for, before any weights are loaded."""
    needed = prompt_tokens + completion_tokens
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None) or needed
    require(
        needed <= context,
        f"a prompt of {prompt_tokens} tokens and --max_completion_tokens {completion_tokens} do "
        f"not fit the model's context of {context}; lower --max_completion_tokens or "
        "--max_prompt_tokens",
    )


# --------------------------------------------------------------------------------------------------
# Tensors, whole or sharded


def model_tensors(model) -> dict[str, torch.Tensor]:
    """Name -> parameter or persistent buffer, sharded or not; tied ones once, by one name."""
    names: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return {name: tensor for tensor, name in names.items()}


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this rank holds; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_rows(tensor: torch.Tensor) -> slice:
    """The rows of a tensor that this rank holds: FSDP2 cuts dimension 0 as torch.chunk does."""
    for dim, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_shard():
            rows = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
            start = min(rows * tensor.device_mesh.get_local_rank(dim), tensor.shape[0])
            return slice(start, min(start + rows, tensor.shape[0]))
    return slice(0, tensor.shape[0] if tensor.ndim else None)


def open_tensors(folder: Path, stem: str) -> dict:
    """Tensor name -> open file, for a folder's `stem*.safetensors`. Nothing is read yet."""
    from safetensors import safe_open

    files = sorted(Path(folder).glob(f"{stem}*.safetensors"))
    handles = [safe_open(file, "pt") for file in files]
    return {name: handle for handle in handles for name in handle.keys()}


def read_rows(handle, name: str, like: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a stored tensor that is cut over the ranks as `like` is.

    Raises SystemExit if the stored tensor has another shape.
    """
    stored = handle.get_slice(name)
    if stored.get_shape() != list(like.shape):
        refuse_shape(name, stored.get_shape(), like.shape)
    return stored[local_rows(like)] if like.ndim else handle.get_tensor(name)


@torch.no_grad()
def load_tensors(model, stored: dict):
    """Read every tensor of a model from open files, each rank its own rows, one at a time.

    Raises SystemExit if one is missing.
    """
    refuse_missing("the checkpoint", set(model_tensors(model)) - set(stored))
    for name, tensor in model_tensors(model).items():
        local_part(tensor).copy_(read_rows(stored[name], name, tensor))


# --------------------------------------------------------------------------------------------------
# Loading


def read_model(path: str, dtype):
    """The whole model, as transformers loads it.

    Raises SystemExit if a tensor is missing or of another shape: transformers would fill it at
    random, and differently in policy and reference. Tied weights and what no file holds (rotary
    frequencies) are not missing.
    """
    from transformers import AutoConfig

    check_folder(path)
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # which a hub service would do
    kind = model_class(AutoConfig.from_pretrained(path, trust_remote_code=False))
    with without_pickles():
        model, report = kind.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to say it in a sentence of our own
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        refuse_shape(name, stored, wanted)
    refuse_missing(path, report["missing_keys"])
    return model


def say_if_slow(model, device: torch.device):
    """The model. Where it is a large one on a CPU, a warning: only the pace would tell."""
    billions = model.num_parameters() / 1e9
    if device.type == "cpu" and billions >= SLOW_BILLIONS:
        print0(
            f"warning: there is no GPU here, and this model has {billions:.1f} B parameters: a CPU "
            "takes hours where a GPU takes minutes; stop the run unless you mean it"
        )
    return model


def empty_model(path: str, dtype: torch.dtype):
    """The model with parameters without storage, but real buffers (no file holds those)."""
    from transformers import GenerationConfig

    options = dict(dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    config = load_config(path)
    with parameters_on_meta():
        model = model_class(config).from_config(config, **options).eval()
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


@contextlib.contextmanager
def parameters_on_meta():
    """Modules made inside have parameters without storage, but real buffers."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        # One that is on meta already is a tied weight, which must stay the same object.
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def fill_model(model, path: str, device: torch.device, home: torch.device):
    """Give an empty, sharded model its storage on `home` and its weights. A collective.

    Each rank reads its own rows from the safetensors files. Where the names in them are not the
    model's own (transformers renames some when it loads), rank 0 loads all and broadcasts.
    """
    # to_empty would empty buffers, too.
    model._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t.to(device))
    model.tie_weights()
    stored, tensors = open_tensors(weights_folder(path), "model"), model_tensors(model)
    if set(tensors) <= set(stored):
        return load_tensors(model, stored)
    whole = read_model(path, "auto").state_dict() if rank() == 0 else {}
    for name, tensor in tensors.items():
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if rank() == 0:
            value = whole[name].to(device, tensor.dtype)
        dist.broadcast(value, 0)
        with torch.no_grad():
            local_part(tensor).copy_(value[local_rows(tensor)] if tensor.ndim else value)


def weights_folder(path: str) -> Path:
    """The folder of a model's safetensors files. A hub id is downloaded once per node."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        snapshot_download(path, allow_patterns=["*.safetensors"])
    barrier()
    return Path(snapshot_download(path, allow_patterns=["*.safetensors"]))
