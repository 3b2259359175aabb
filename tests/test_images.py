"""Pictures: tiny Qwen2.5-VL and Qwen3-VL against transformers' own `generate` and forward."""

import copy
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from grpo import Config, sample, sample_tree
from model_utils import encode_prompt, token_logprobs
from plumbing.attention import micro_batches, pack, use_attention
from plumbing.images import (
    LARGEST,
    Album,
    Unusable,
    decode_picture,
    freeze_tower,
    open_picture,
    picture_size,
    show,
)

IMAGE, END = 5, 1
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
ONE = [11, 7, IMAGE, 8, 12, 13]
TWO = [14, 7, IMAGE, 8, 15, 7, IMAGE, 8, 16, 17]
# Two questions with the same text and size but other pictures, one with two, one without.
TEXTS = [(ONE, ["a.png"]), (ONE, ["b.png"]), (TWO, ["c.png", "d.png"]), ([18, 19, 20, 21], [])]
SIZES = {"a.png": (16, 24), "b.png": (16, 24), "c.png": (24, 16), "d.png": (8, 32)}


def make_eyes(family: str, seed: int = 0):
    """A tiny model with a tower of 2 or 3 layers, of large random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(seed)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    text = dict(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        eos_token_id=END, pad_token_id=0, bos_token_id=None, rope_parameters=rope,
    )
    vision = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4,
                  spatial_merge_size=2, out_hidden_size=64)
    if family == "qwen2_5_vl":
        vision |= dict(window_size=16, fullatt_block_indexes=[2])
    else:
        text["head_dim"] = 16
        vision |= dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    special = dict(image_token_id=IMAGE, video_token_id=6, vision_start_token_id=7)
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, vision_end_token_id=8, **special
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model.float().eval()


def make_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 64, "longest_edge": 4096}
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)


def make_tokenizer(model, max_pixels: int = 0):
    """What stands for a tokenizer here: it has an album."""
    tokenizer = types.SimpleNamespace(convert_ids_to_tokens=lambda ids: map(str, ids))
    tokenizer.album = Album(make_processor(), tokenizer, model.config, max_pixels)
    return tokenizer


def save_picture(path, height: int, width: int, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


class Case:
    """The questions of TEXTS, for a model and a copy that only transformers calls."""

    def __init__(self, family: str, folder):
        self.plain = make_eyes(family)
        self.model = use_attention(copy.deepcopy(self.plain))
        self.tokenizer = make_tokenizer(self.model)
        self.folder, album = folder, self.tokenizer.album
        for seed, (name, size) in enumerate(SIZES.items()):
            save_picture(folder / name, *size, seed=seed)
        self.paths = [[str(folder / name) for name in names] for _, names in TEXTS]
        self.prompts = [album.expand(text, p) for (text, _), p in zip(TEXTS, self.paths)]
        show(self.tokenizer, self.prompts, self.model)

    def flat(self, ids: list[int]) -> list[int]:
        return [IMAGE if token < 0 else token for token in ids]

    def inputs(self, question: int, completion: list[int] = ()) -> dict:
        """What transformers wants for one question."""
        ids = torch.tensor([self.flat(self.prompts[question]) + list(completion)])
        kinds = (ids == IMAGE).int()
        options = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds)
        pictures = [Image.open(path) for path in self.paths[question]]
        if pictures:
            options |= make_processor()(pictures, return_tensors="pt")
        self.plain.model.rope_deltas = None  # kept from call to call
        return options


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_positions_are_those_of_transformers(case):
    album = case.tokenizer.album
    for question, prompt in enumerate(case.prompts[:3]):
        inputs = case.inputs(question)
        expected, delta = case.plain.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        assert torch.equal(album.positions(torch.tensor([prompt])), expected)
        assert album.shift(prompt) == int(delta) < 0
    assert album.shift(case.prompts[3]) == 0
    empty = make_tokenizer(case.model).album  # a run without pictures
    assert empty.positions(torch.tensor([[9, 8, 7]])).tolist() == [[[0, 1, 2]]] * 3
    assert empty.shift([9, 8, 7]) == 0


@torch.no_grad()
def test_greedy_decoding_equals_generate(case):
    """Through fewer slots than questions, so that one is prefilled late."""
    assert case.prompts[0] != case.prompts[1]
    assert case.flat(case.prompts[0]) == case.flat(case.prompts[1])
    options = dict(max_new_tokens=20, temperature=0.0, stop_ids=[END])
    ours, _ = sample(case.model, case.prompts, max_rows=3, **options)
    for question, ids in enumerate(ours):
        inputs = case.inputs(question)
        out = case.plain.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert ids == out[0, inputs["input_ids"].shape[1]:].tolist()
    assert ours[0] != ours[1]  # the pictures decide


def test_packed_logprobs_and_gradients_equal_the_models_own_forward(case):
    """Of the 16 completions of plan trees, with shared beginnings and forks of the cache."""
    config = Config(plans=2, cots=2, max_plan_tokens=8, max_completion_tokens=16, rollout_rows=5)
    closed = lambda ids: len(ids) >= 4 and ids[-1] % 3 == 0
    trees = sample_tree(
        case.model, case.prompts, config, plan_closed=closed, stop_ids=[END], seed=1
    )
    rollouts = [(q, r) for q, tree in enumerate(trees) for r in tree]
    assert any(r.plan_tokens for _, r in rollouts)
    sequences = [r.prompt + r.ids for _, r in rollouts]
    (order,) = micro_batches(sequences, 10**6, "cpu")
    starts = [len(rollouts[i][1].prompt) for i in order]
    packed = pack([sequences[i] for i in order], starts, "cpu")
    assert len(packed.ids) < sum(map(len, sequences))
    freeze_tower(case.model), freeze_tower(case.plain)
    weights = torch.randn(packed.mask.shape, generator=torch.Generator().manual_seed(3))
    logprobs, _ = token_logprobs(case.model, packed)
    (logprobs * weights).sum().backward()
    for row, i in enumerate(order):
        question, rollout = rollouts[i]
        inputs = case.inputs(question, rollout.ids)
        own = case.plain(**inputs, use_cache=False).logits[0].log_softmax(-1)
        own = own[:-1].gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]
        part = slice(starts[row] - 1, len(sequences[i]) - 1)
        assert torch.allclose(logprobs[row, part], own[part], atol=1e-5)
        assert torch.allclose(torch.tensor(rollout.logprobs), own[part], atol=1e-4)
        (own[part] * weights[row, part]).sum().backward()
    pairs = zip(case.model.named_parameters(), case.plain.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        if ".visual." in name:
            assert ours.grad is None and theirs.grad is None
        else:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-4), name
    case.model.zero_grad(), case.plain.zero_grad()


def test_a_picture_is_encoded_once_while_it_is_in_sight(case):
    looks, album = [], case.tokenizer.album
    hook = case.model.model.visual.register_forward_hook(lambda *_: looks.append(1))
    show(case.tokenizer, case.prompts[:1] * 3, case.model)
    show(case.tokenizer, case.prompts[:2], case.model)
    hook.remove()
    assert len(looks) == 1  # the second one came into sight
    assert sorted(album.sight) == [0, 1]
    show(case.tokenizer, case.prompts, case.model)


def test_two_ranks_one_without_pictures_equal_one_process(case):
    """The tower is whole on both, and a rank without a picture calls none of it."""
    from images_worker import figures

    if case.model.config.model_type != FAMILIES[0]:
        pytest.skip("one family is enough: features wait in the same table for both")
    case.plain.save_pretrained(case.folder / "model")
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 tests/images_worker.py"
    result = subprocess.run(
        [sys.executable, *command.split(), str(case.folder)], env=environment, cwd=ROOT,
        capture_output=True, text=True, timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    double, single = json.loads(result.stdout.splitlines()[-1]), figures(case.folder)
    for ours, theirs in zip(double["figures"], single["figures"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert double["weights"] == pytest.approx(single["weights"], rel=1e-6)
    assert double["tokens"] == single["tokens"]


# --------------------------------------------------------------------------------------------------
# Files


def test_pictures_that_are_not_read(tmp_path):
    def reason(path) -> str:
        with pytest.raises(Unusable) as error:
            picture_size(str(path))
        return str(error.value)

    assert "no such file" in reason(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "no picture of the kinds" in reason(tmp_path / "text.png")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "no picture of the kinds" in reason(tmp_path / "program.png")  # Pillow would run it
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert "animation" in reason(tmp_path / "moves.gif")
    save_picture(tmp_path / "whole.png", 64, 64, seed=0)
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:len(data) // 2])
    assert "cannot be read" in reason(tmp_path / "cut.png")


def test_a_huge_picture_is_refused_by_its_header(tmp_path, monkeypatch):
    side = int(LARGEST**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000  # it would become 150 MB
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(Unusable, match="at most 50,000,000 are read"):
        open_picture(tmp_path / "bomb.png")


def test_pictures_are_upright(tmp_path):
    """A camera stores a turn of its own beside the pixels: 6 is a quarter, clockwise."""
    picture, exif = Image.new("RGB", (24, 8)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(str(tmp_path / "turned.jpg")) == (8, 24)


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("limit, tokens", [(0, 16), (16 * 64, 16), (16 * 64 - 1, 9), (64, 1)])
def test_max_pixels_bounds_the_tokens(tmp_path, limit, tokens):
    """A picture of 32 x 32 pixels, where a token has 8 x 8."""
    path = save_picture(tmp_path / "square.png", 32, 32, seed=0)
    album = make_tokenizer(make_eyes("qwen2_5_vl"), limit).album
    assert len(album.number(path)) == tokens


def test_prompts_hold_pictures_where_they_are_marked(tmp_path):
    from data.toy_pictures import make_tokenizer as toy_tokenizer

    tokenizer = toy_tokenizer()
    start, image, end = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    )
    config = types.SimpleNamespace(
        image_token_id=image, vision_start_token_id=start, vision_end_token_id=end
    )
    tokenizer.album = Album(make_processor(), tokenizer, config, 0)
    a = save_picture(tmp_path / "a.png", 8, 16, seed=0)
    b = save_picture(tmp_path / "b.png", 8, 8, seed=1)
    words = tokenizer.convert_tokens_to_ids
    asked = [words("A"), start, -1, -2, end, words("?")]
    assert encode_prompt(tokenizer, "A <image> ?", [a])[1:-2] == asked
    both = [start, -1, -2, end, start, -3, end, words("?")]
    assert encode_prompt(tokenizer, "?", [a, b])[1:-2] == both
    assert encode_prompt(tokenizer, "<image> ?", [a, b])[1:-2] == both  # without a mark: before it
    again = [start, -3, end, start, -1, -2, end]
    assert encode_prompt(tokenizer, "<image> <image>", [b, a])[1:-2] == again  # the same ids
    with pytest.raises(Unusable, match="2 marks <image> for 1 pictures"):
        encode_prompt(tokenizer, "<image> <image>", [a])
    with pytest.raises(Unusable, match="2 places for 1 pictures"):
        encode_prompt(tokenizer, "<image> <|image_pad|>", [a])
    del tokenizer.album
    with pytest.raises(SystemExit, match="this model sees none"):
        encode_prompt(tokenizer, "<image> ?", [a])
