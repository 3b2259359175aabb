"""Turn a GGUF file, in which llama.cpp keeps a model, into an ordinary model folder.

The folder holds config, weights (safetensors, dequantised), tokenizer with chat template, and
generation config, as the stages and all other tools read them. transformers does the reading. The
model is what the file holds: what quantisation took away stays lost.

    python -m data.gguf FILE_OR_FOLDER --out FOLDER

It reads the families Llama and Qwen2. It cannot read others, a file in several parts, Llama 3.1's
scaled positions (transformers would leave them out without a word), or a file without tokenizer.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

import torch

from plumbing.ranks import fail, print0, require
from plumbing.signals import guarded
from plumbing.weights import in_short, model_tensors, open_tensors, refuse_missing

FAMILIES = ("llama", "qwen2")
PACKAGES = ("gguf", "accelerate")  # what transformers wants for a GGUF


def find_file(path: Path) -> Path:
    """The GGUF file at `path`, or the only one in that folder. SystemExit if it cannot be one."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    require(len(files) == 1, f"{path} holds {len(files)} .gguf files: give the path of one")
    require(files[0].is_file(), f"there is no file {files[0]}: give a GGUF file or its folder")
    return files[0]


def check_file(file: Path):
    """Refuse a file that transformers cannot turn into a whole model, before it is loaded."""
    for name in PACKAGES:
        there = importlib.util.find_spec(name)
        require(there, f"reading a GGUF needs the package {name}: run `pip install {name}`")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        found = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of many kinds, where the file is damaged
        fail(f"{file} is no whole GGUF file ({in_short(error)}); fetch it again")
    family, names = found.get("general.architecture"), {tensor.name for tensor in reader.tensors}
    require(
        family in FAMILIES,
        f"{file} holds a model of the family {family!r}: only llama and qwen2 can be read",
    )
    require(
        found.get("split.count", 1) <= 1,
        f"{file} is one of {found.get('split.count')} parts: join them with llama.cpp's "
        "llama-gguf-split --merge, and give the result",
    )
    scaling = found.get(f"{family}.rope.scaling.type", "none")
    require(
        scaling == "none" and "rope_freqs.weight" not in names,
        f"{file} scales its positions, as Llama 3.1 does, and transformers does not read that: "
        "take the model's own safetensors files",
    )
    require(
        found.get("tokenizer.ggml.tokens") and "tokenizer.ggml.model" in found,
        f"{file} holds no tokenizer: take a GGUF that has one, or the model's own files",
    )


def read_gguf(file: Path, dtype: torch.dtype):
    """(model, tokenizer) of a GGUF file, dequantised. SystemExit if a tensor is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    # Without it the weights would stay packed where transformers finds a kernel for them.
    plain = GgufConfig(dequantize=True)
    options = dict(dtype=dtype, quantization_config=plain, output_loading_info=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model, report = AutoModelForCausalLM.from_pretrained(**place, **options)
    except Exception as error:  # of many kinds, where a field is missing or a tensor is cut
        fail(f"transformers cannot read {file} ({in_short(error)}); fetch it again, or another")
    refuse_missing(file, report["missing_keys"])
    wrong = sorted(report["unexpected_keys"]) + sorted(k[0] for k in report["mismatched_keys"])
    require(not wrong, f"{file} holds {wrong[:1]}, which the model has no place for: take another")
    # The model is an ordinary one now. With these, save_pretrained would refuse it as quantised.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def convert(path: Path, out: Path, dtype: torch.dtype = torch.float32):
    """Write the model of a GGUF file to the folder `out`, which appears only when it is whole."""
    file = find_file(path)
    check_file(file)
    model, tokenizer = read_gguf(file, dtype)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        refuse_missing(part, set(model_tensors(model)) - set(open_tensors(part, "model")))
        part.rename(out)
    except OSError as error:
        fail(f"{out} cannot be written ({in_short(error)}): make room, or choose another --out")
    template = "its own chat template" if tokenizer.chat_template else "no chat template"
    size = f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, {template}"
    print0(f"{out}: {model.config.model_type}, {size}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("path", type=Path, help="a GGUF file, or a folder that holds one")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; a new one")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="of the stored weights")
    parser.error = fail
    args = parser.parse_args()
    require(not args.out.exists(), f"{args.out} exists already: choose another --out or remove it")
    convert(args.path, args.out, getattr(torch, args.dtype))


if __name__ == "__main__":
    guarded(main)
