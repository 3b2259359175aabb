"""Prompts through the families' own chat templates, as the TRL package carries them.

The tokenizers are made here.
"""

from pathlib import Path

import pytest

from model_utils import INSTRUCTION, PLAIN_TEMPLATE, encode_prompt, find_stop_ids, load_tokenizer
from rewards import build_completion, parse_completion
from sft import encode_record

trl = pytest.importorskip(
    "trl", reason="the families' chat templates come with the TRL package: run `pip install trl`"
)
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PROBLEM = "What is 1 + 1?"
RECORD = {"id": "a", "problem": PROBLEM, "plan": "add both", "think": "1 + 1 = 2", "answer": "2"}

# family: (template file, special tokens, bos, eos, pad). The ids are those of a small vocabulary,
# the roles are the real ones.
LLAMA_TOKENS = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> "
    "<|finetune_right_pad_id|>"
)
DEEPSEEK_TOKENS = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
DEEPSEEK_BEGIN, DEEPSEEK_END = DEEPSEEK_TOKENS.split()[:2]
QWEN_TOKENS = "<|endoftext|> <|im_start|> <|im_end|>"
GEMMA_TOKENS = "<pad> <eos> <bos> <start_of_turn> <end_of_turn>"
FAMILIES = {
    "qwen2.5": ("qwen2_5.jinja", QWEN_TOKENS, None, "<|im_end|>", "<|endoftext|>"),
    "qwen3": ("qwen3.jinja", QWEN_TOKENS, None, "<|im_end|>", "<|endoftext|>"),
    "llama3.2": ("llama3_2.jinja", LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>", None),
    "gemma": ("gemma.jinja", GEMMA_TOKENS, "<bos>", "<eos>", "<pad>"),
    "deepseek-r1": (
        "deepseek_r1_distill.jinja", DEEPSEEK_TOKENS, DEEPSEEK_BEGIN, DEEPSEEK_END, DEEPSEEK_END,
    ),
    "base": (None, "<|endoftext|>", None, "<|endoftext|>", None),
}  # fmt: skip


def make_tokenizer(family: str):
    """A byte-level tokenizer with the family's special tokens and its own chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    file, special, bos, eos, pad = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # one token per byte
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special.split()])
    if family == "qwen3":  # ordinary tokens there, not special ones
        words = ("<think>", "</think>")
        tokenizer.add_tokens([AddedToken(word, special=False) for word in words])
    template = (TEMPLATES / file).read_text() if file else None
    ends = dict(bos_token=bos, eos_token=eos, pad_token=pad)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **ends)


@pytest.fixture
def load(tmp_path):
    """load(family, **options): the tokenizer as a stage sees it, saved and loaded again."""

    def load(family, **options):
        make_tokenizer(family).save_pretrained(tmp_path / family)
        return load_tokenizer(str(tmp_path / family), **options)

    return load


def prompt(tokenizer):
    return tokenizer.decode(encode_prompt(tokenizer, PROBLEM))


QWEN = (
    f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{PROBLEM}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    f"{INSTRUCTION}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    f"{PROBLEM}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = (
    f"<bos><start_of_turn>user\n{INSTRUCTION}\n\n{PROBLEM}<end_of_turn>\n<start_of_turn>model\n"
)


@pytest.mark.parametrize(
    "family, expected",
    [
        ("qwen2.5", QWEN),  # with our system turn, so that Qwen's own is not put in
        ("qwen3", QWEN),
        ("llama3.2", LLAMA),
        ("gemma", GEMMA),  # it has no system turn
        ("base", f"{INSTRUCTION}\n\n{PROBLEM}\n\nSolution:\n"),
    ],
)
def test_prompts_render_as_the_family_expects(load, family, expected):
    tokenizer = load(family)
    ids = encode_prompt(tokenizer, PROBLEM)
    assert tokenizer.decode(ids) == expected
    assert all(type(i) is int for i in ids)
    if tokenizer.bos_token_id is not None:
        # The template writes it; the tokenizer must not add another.
        assert ids.count(tokenizer.bos_token_id) == 1


def test_qwen3_without_thinking(load, tmp_path):
    tokenizer, expected = load("qwen3", thinking=False), QWEN + "<think>\n\n</think>\n\n"
    assert prompt(tokenizer) == expected
    saved = str(tmp_path / "saved")
    tokenizer.save_pretrained(saved)  # as sft.py does: later stages need no flag
    assert prompt(load_tokenizer(saved)) == expected
    assert prompt(load_tokenizer(saved, thinking=False)) == expected
    assert prompt(load("qwen2.5", thinking=False)) == QWEN  # no such switch: no difference


def test_an_open_think_tag_is_removed_from_the_prompt(load):
    text = prompt(load("deepseek-r1"))
    assert text.endswith("<｜Assistant｜>") and PROBLEM in text and INSTRUCTION in text


def test_the_date_in_llamas_prompt_does_not_drift(load, monkeypatch):
    import datetime

    tokenizer = load("llama3.2")
    before = encode_prompt(tokenizer, PROBLEM)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    turns = [{"role": "user", "content": "x"}]
    unpinned = tokenizer.apply_chat_template(turns, tokenize=False)
    assert "02 Jan 2031" in unpinned  # the template itself would drift
    assert encode_prompt(tokenizer, PROBLEM) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_never_templated(load, family):
    """Qwen3's and DeepSeek's templates would cut the plan out of an assistant turn."""
    tokenizer = load(family)
    ids, length, _ = encode_record(tokenizer, RECORD, use_plan=True)
    assert ids[:length] == encode_prompt(tokenizer, PROBLEM)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(ids[-1]) == 1 + ids[:length].count(ids[-1])
    text = tokenizer.decode(ids[length:-1])
    assert text == build_completion("add both", "1 + 1 = 2", "2")
    assert parse_completion(text).plan == "add both"
    if family == "qwen3":
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        turn = tokenizer.apply_chat_template(turns, tokenize=False)
        assert "add both" not in turn  # why completions stay away from the template


@pytest.mark.parametrize(
    "family, pad",
    [
        ("qwen2.5", "<|endoftext|>"),
        ("qwen3", "<|endoftext|>"),
        ("llama3.2", "<|finetune_right_pad_id|>"),
        ("gemma", "<pad>"),
        ("base", "<|endoftext|>"),
    ],
)
def test_end_and_pad(load, family, pad):
    tokenizer = load(family)
    assert tokenizer.pad_token == pad and tokenizer.eos_token == FAMILIES[family][3]
    if family == "llama3.2":
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_end_of_the_model_stops_a_completion(load):
    from types import SimpleNamespace

    tokenizer = load("llama3.2")
    words = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    ends = [tokenizer.convert_tokens_to_ids(word) for word in words]
    config, generation = SimpleNamespace(eos_token_id=ends[0]), SimpleNamespace(eos_token_id=ends)
    model = SimpleNamespace(config=config, generation_config=generation)
    assert find_stop_ids(model, tokenizer) == sorted(ends)


def test_base_models_get_the_plain_template_and_it_is_said(load, capsys):
    assert load("base").chat_template == PLAIN_TEMPLATE
    assert "has no chat template" in capsys.readouterr().out
