"""A GGUF file becomes an ordinary model folder: tiny files that the test writes itself."""

import sys

import pytest
import torch

from conftest import make_tiny

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from data import gguf as script  # noqa: E402
from model_utils import encode_prompt, find_stop_ids, load_model, load_tokenizer  # noqa: E402

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>"]
# The 256 bytes as byte-level BPE writes them, and two merges.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(b) for b in PRINTED] + [chr(256 + i) for i in range(256 - len(PRINTED))]
TOKENS = [*SPECIAL, *BYTES, "ap", "app"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of transformers' tensors."""
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in fixed:
        return f"{fixed[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A Llama projection with its rotary halves interleaved, as llama.cpp stores it."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, 2, width // 2, -1).transpose(1, 2).reshape(weight.shape)


def write(path, model, tokenizer: bool = True, **more):
    """Write a model as llama.cpp's converter does, in fp32."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, more.pop("family", family))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if family == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))  # 3: control tokens
        writer.add_token_merges(["a p", "ap p"])
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(0)
        writer.add_chat_template(TEMPLATE)
    for name, value in more.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("_", "."), value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        if family == "llama" and part in heads:
            tensor = interleaved(tensor, heads[part])
        writer.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source():
    """source(family): a tiny model, four heads on two key heads, with random biases if any."""

    def source(family: str, **settings):
        model = make_tiny(family, vocab_size=len(TOKENS), **settings)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model

    return source


@pytest.mark.parametrize("family, tied", [("llama", True), ("llama", False), ("qwen2", False)])
def test_weights_logits_and_texts_are_those_of_the_source(tmp_path, capsys, source, family, tied):
    model = source(family, tie_word_embeddings=tied)
    file, out = write(tmp_path / "tiny.gguf", model), tmp_path / "model"
    script.convert(tmp_path, out)
    assert f"{family}, {model.num_parameters():,} parameters" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part")) and file.exists()
    loaded, ids = load_model(str(out), CPU), torch.tensor([[7, 100, 42, 258, 3, 9, 77]])
    stored, expected = loaded.state_dict(), model.state_dict()
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert not hasattr(loaded.config, "quantization_config")

    tokenizer = load_tokenizer(str(out))
    assert find_stop_ids(loaded, tokenizer) == [1]
    assert tokenizer.tokenize("an apple") == ["a", "n", "Ġ", "app", "l", "e"]
    text = tokenizer.decode(encode_prompt(tokenizer, "2 apples?"))
    assert text.startswith("<|system|>Solve") and text.endswith("<|user|>2 apples?<|assistant|>")


def test_what_cannot_be_converted_is_said_in_one_sentence(tmp_path, monkeypatch, source):
    def refusal(path) -> str:
        monkeypatch.setattr(sys, "argv", ["gguf.py", str(path), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as refused:
            script.main()
        return str(refused.value)

    model = source("llama", tie_word_embeddings=True)
    whole = write(tmp_path / "whole.gguf", model)
    other = write(tmp_path / "other.gguf", model, family="gpt2")
    assert "family 'gpt2': only llama and qwen2 can be read" in refusal(other)
    bare = write(tmp_path / "bare.gguf", model, tokenizer=False)
    assert "holds no tokenizer" in refusal(bare)
    scaled = write(tmp_path / "scaled.gguf", model, llama_rope_scaling_type="linear")
    assert "scales its positions" in refusal(scaled)
    part = write(tmp_path / "part.gguf", model, split_count=3)
    assert "is one of 3 parts" in refusal(part)
    assert "holds 5 .gguf files" in refusal(tmp_path)
    assert "there is no file" in refusal(tmp_path / "nowhere.gguf")
    data = whole.read_bytes()
    for size in (0, 3, 100, len(data) // 2, len(data) - 40):
        whole.write_bytes(data[:size])
        assert "is no whole GGUF file" in refusal(whole)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part"))
    (tmp_path / "out").mkdir()
    assert "out exists already: choose another --out" in refusal(other)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs the package gguf: run `pip install gguf`"):
        script.convert(other, tmp_path / "new")


def test_a_file_without_one_of_the_tensors_is_refused(tmp_path, source):
    model = source("llama", tie_word_embeddings=True)
    del model.model.layers[1].mlp.up_proj
    file = write(tmp_path / "short.gguf", model)
    with pytest.raises(SystemExit, match="lack model.layers.1.mlp.up_proj.weight"):
        script.convert(file, tmp_path / "out")
