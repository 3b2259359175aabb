"""Hostile model folders: a table of what is done to a good one.

Whatever runs or unpickles there writes MARK beside the folder.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

from bench.strangers_teacher import ODD

MARK = "mark"

# --------------------------------------------------------------------------------------------------
# Tools


class Payload:
    """Unpickled, it writes the mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def put_pickle(folder: Path, *names: str):
    data = pickle.dumps(Payload(folder.parent / MARK))
    for name in names:
        (folder / name).write_bytes(data)


def put_code(folder: Path, *names: str):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(folder.parent / MARK)!r}, 'w')\nclass Own: pass\n")


def change(folder: Path, name: str, **values):
    """Set values in one of the folder's JSON files."""
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **values}))


def drop(folder: Path, name: str = "model.safetensors"):
    (folder / name).unlink()


def template(text: str) -> Callable:
    """Another chat template. CMD in it stands for a shell command that writes the mark."""

    def spoil(folder: Path):
        command = f"touch {folder.parent / MARK}"
        for file in folder.glob("chat_template*"):
            file.unlink()
        change(folder, "tokenizer_config.json", chat_template=text.replace("CMD", command))

    return spoil


def index(target: str) -> Callable:
    """An index in the place of the weights, which says that they are in `target`."""

    def spoil(folder: Path):
        known = (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        put_pickle(folder, "pytorch_model.bin")
        target_ = target.replace("OUTSIDE", str(known))
        names = ("model.embed_tokens.weight", "lm_head.weight")
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, target_)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def in_place_of(name: str, make: Callable[[Path], None]) -> Callable:
    """Another thing under a file's name."""

    def spoil(folder: Path):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def settings(name: str = "config.json", **values) -> Callable:
    return lambda folder: change(folder, name, **values)


def text(name: str, content: str) -> Callable:
    return lambda folder: (folder / name).write_text(content)


# --------------------------------------------------------------------------------------------------
# What is done


def pickles(folder: Path):
    put_pickle(folder, "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt")
    put_pickle(folder, "rng_state.pth", "tokenizer.pkl", "model.pt", "adapter_model.bin")


def only_pickle(folder: Path):
    drop(folder)
    put_pickle(folder, "pytorch_model.bin")


def pickle_as_safetensors(folder: Path):
    drop(folder)
    put_pickle(folder, "model.safetensors")


def named_weights(name: str) -> Callable:
    def spoil(folder: Path):
        pickles(folder)
        drop(folder)
        change(folder, "config.json", transformers_weights=name)

    return spoil


def own_code(folder: Path):
    put_code(folder, "modeling.py", "configuration.py", "tokenization.py", "__init__.py")
    put_code(folder, "custom_generate/generate.py", "torch.py", "sitecustomize.py", "conftest.py")
    names = {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.Own"}
    change(folder, "config.json", auto_map=names)
    both = {"AutoTokenizer": ["tokenization.Own", "tokenization.Own"]}
    change(folder, "tokenizer_config.json", auto_map=both, tokenizer_class="Own")


def own_kind(folder: Path):
    own_code(folder)
    change(folder, "config.json", model_type="own")


def code_of_others(folder: Path):
    own_code(folder)
    change(folder, "config.json", auto_map={"AutoModelForCausalLM": "evil/repo--modeling.Own"})


def own_tokenizer(folder: Path):
    before = (folder / "config.json").read_text()
    own_code(folder)
    (folder / "config.json").write_text(before)
    drop(folder, "tokenizer.json")


def adapter(folder: Path):
    put_pickle(folder, "adapter_model.bin")
    change(folder, "adapter_config.json", base_model_name_or_path="evil/repo", peft_type="LORA")


def odd_tensor(folder: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    one = next(iter(tensors.values()))[:1].clone()
    more = {ODD: one, "../../outside": one.clone()}
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt", "a": ODD})


def header(size: int, content: bytes = b"{}") -> Callable:
    def spoil(folder: Path):
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + content)

    return spoil


EVERYTHING = pickles, own_code, adapter, odd_tensor, template(
    "{{ '{0.__class__}'.format(messages) }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
)  # fmt: skip
SUBCLASSES = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c('CMD', shell=True) }}{% endfor %}"
)
OFFSETS = b'{"model.norm.weight": {"dtype": "F32", "shape": [9], "data_offsets": [0, 99999999]}}'

# Name -> (what is done, what must become of a run: "refused", "runs", or "either").
MODELS: dict[str, tuple[Callable, str]] = {
    # pickles
    "pickles beside the weights": (pickles, "runs"),
    "a pickle for weights": (only_pickle, "refused"),
    "a pickle named safetensors": (pickle_as_safetensors, "refused"),
    "an index of a pickle": (index("pytorch_model.bin"), "refused"),
    "an index that leads out": (index("../outside.safetensors"), "refused"),
    "an index with a whole path": (index("OUTSIDE"), "refused"),
    "an index with escapes": (index(f"{ODD}.bin"), "refused"),
    "config names an adapter's pickle": (named_weights("adapter_model.bin"), "refused"),
    "config names weights outside": (named_weights("../outside.safetensors"), "refused"),
    "an adapter of another model": (adapter, "runs"),
    # code
    "code for all": (own_code, "runs"),
    "code for a kind of its own": (own_kind, "refused"),
    "code of another repository": (code_of_others, "runs"),
    "a tokenizer of its own": (own_tokenizer, "refused"),
    "a kernel for attention": (settings(_attn_implementation="evil/kernel:run"), "refused"),
    "a kernel for experts": (settings(experts_implementation="evil/kernel:run"), "refused"),
    "a kernel in the text part": (
        settings(text_config={"_attn_implementation": "evil/kernel"}), "refused"
    ),
    "a text part of no kind": (settings(text_config={"hidden_size": 8}), "refused"),
    "quantised by a package": (settings(quantization_config={"quant_method": "gptq"}), "refused"),
    # chat templates
    "subclasses": (template(SUBCLASSES), "refused"),
    "globals": (template("{{ cycler.__init__.__globals__.os.popen('CMD').read() }}"), "refused"),
    "globals of a function": (
        template("{{ raise_exception.__globals__['__builtins__']['eval']('CMD') }}"), "refused"
    ),
    "a format string": (template("{{ '{0.__class__}'.format(messages) }}"), "refused"),
    "attr": (template("{{ (messages|attr('__class__')).mro() }}"), "refused"),
    "map of attributes": (
        template("{{ [messages]|map(attribute='__class__')|first|string }}"), "refused"
    ),
    "namespace": (template("{% set n = namespace(__class__=1) %}{{ n.__init__ }}"), "refused"),
    "an include": (template("{% include '/etc/hostname' %}"), "refused"),
    "an import": (template("{% import 'os' as os %}{{ os.system('CMD') }}"), "refused"),
    "changes the messages": (template("{{ messages.append(1) }}"), "refused"),
    "raises escapes": (template("{{ raise_exception('" + ODD + "') }}"), "refused"),
    "no template": (template("{% for"), "refused"),
    "an empty prompt": (template("{# nothing #}"), "refused"),
    "loops for ever": (
        template(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        ), "refused"
    ),
    "takes all memory": (template("{{ 'x' * 3999999999 }}"), "refused"),
    "calls itself": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "refused"),
    # files that are none
    "config is a pipe": (in_place_of("config.json", os.mkfifo), "refused"),
    "config is endless": (
        in_place_of("config.json", lambda path: path.symlink_to("/dev/zero")), "refused"
    ),
    "config is a folder": (in_place_of("config.json", Path.mkdir), "refused"),
    "config leads to itself": (
        in_place_of("config.json", lambda path: path.symlink_to(path)), "refused"
    ),
    "template is a pipe": (in_place_of("chat_template.jinja", os.mkfifo), "refused"),
    "tokenizer is a folder": (in_place_of("tokenizer.json", Path.mkdir), "refused"),
    "weights are endless": (
        in_place_of("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "refused"
    ),
    "weights are a folder": (in_place_of("model.safetensors", Path.mkdir), "refused"),
    # contents
    "a tensor with escapes": (odd_tensor, "runs"),
    "a header of an exabyte": (header(1 << 60), "refused"),
    "tensors beyond the end": (header(len(OFFSETS), OFFSETS), "refused"),
    "deep JSON": (text("config.json", "[" * 200_000), "refused"),
    "a list for a config": (text("config.json", "[]"), "refused"),
    "escapes in its kind": (settings(model_type=ODD), "refused"),
    "escapes in its dtype": (settings(dtype=ODD), "refused"),
    "a billion layers": (settings(num_hidden_layers=10**9, layer_types=None), "refused"),
    "sizes in words": (settings(hidden_size="large"), "refused"),
    "a huge vocabulary": (settings(vocab_size=10**12), "refused"),
    "a negative size": (settings(intermediate_size=-5), "refused"),
    "an end token in words": (settings("generation_config.json", eos_token_id=ODD), "refused"),
    "deep tokenizer": (text("tokenizer.json", "[" * 200_000), "refused"),
    "a tokenizer with escapes": (text("tokenizer_config.json", json.dumps({"x": ODD})), "either"),
}
