"""Linked quantities as pictures: the facts of data/toy.py drawn, and only the question as text.

    problem   <image> F ?         the picture: one line of cells of 8 x 8 pixels, a word in each
    plan      F needs A E ; E needs A ; A needs nothing
    CoT       A = 4 ; E = A + 2 = 4 + 2 = 6 ; F = A + E = 4 + 6 = 0

A name that is defined ("F =" is one word) stands light on dark. Letters are shifted, of several
greys, and noisy. The model is data/toy_base as the language model of a Qwen2.5-VL, with a vision
tower of 47 K parameters. One cell is one image token. The tower alone is trained here, to give each
cell the embedding of its word, so the model can then do what toy_base could, and no more.

    python -m data.toy_pictures --out runs/toy_pictures      writes sft, train, validation and
                                                             test.jsonl, pictures/ and model/
"""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import torch

from data import toy
from plumbing.ranks import fail, print0

CELL = 8  # pixels on each side
FONT = {  # 5 x 7 pixels, a hexadecimal number of two digits per row
    "A": "0e11111f111111",
    "B": "1e11111e11111e",
    "C": "0e11101010110e",
    "D": "1e11111111111e",
    "E": "1f10101e10101f",
    "F": "1f10101e101010",
    "0": "0e11131519110e",
    "1": "040c040404040e",
    "2": "0e11010204081f",
    "3": "1f02040201110e",
    "4": "02060a121f0202",
    "5": "1f101e0101110e",
    "6": "0608101e11110e",
    "7": "1f010204080808",
    "8": "0e11110e11110e",
    "9": "0e11110f01020c",
    "+": "0004041f040400",
    "-": "0000001f000000",
    ";": "00000004000408",
}
VISION = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


# --------------------------------------------------------------------------------------------------
# Pictures


def words_of(problem: str) -> list[str]:
    """The words of a problem's facts, without its question: what its picture shows."""
    return re.findall(r"[A-Z] =|\S", problem.rpartition(";")[0] + ";")


def glyph(sign: str) -> np.ndarray:
    """A sign as zeros and ones, (7, 5)."""
    rows = bytes.fromhex(FONT[sign])
    return np.array([[row >> (4 - x) & 1 for x in range(5)] for row in rows], dtype=float)


def draw(words: list[str], rng: random.Random, noise: float = 0.1) -> np.ndarray:
    """Words as a line of cells: grey values 0 to 255, (CELL, CELL * words)."""
    page = np.zeros((CELL, CELL * len(words)))
    for cell, word in zip(np.split(page, len(words), 1), words):
        top, left = rng.randint(0, 1), rng.randint(1, 2)
        cell[top : top + 7, left : left + 5] = glyph(word[0]) * rng.uniform(0.7, 1.0)
        if len(word) > 1:
            cell[:] = rng.uniform(0.8, 1.0) - 0.8 * cell
    page += np.random.default_rng(rng.randrange(2**32)).normal(0, noise, page.shape)
    return (255 * page.clip(0, 1)).astype(np.uint8)


def picture_record(record: dict, folder: Path, rng: random.Random) -> dict:
    """The record of data/toy.py with its facts in a picture, which is written to `folder`."""
    from PIL import Image

    path, question = folder / f"{record['id']}.png", record["problem"].rpartition(";")[2].strip()
    Image.fromarray(draw(words_of(record["problem"]), rng)).save(path)
    images = [f"{folder.name}/{path.name}"]
    return {**record, "problem": f"<image> {question}", "images": images}


# --------------------------------------------------------------------------------------------------
# Model


def make_tokenizer():
    """The tokenizer of data/toy.py, with the three tokens around and in place of a picture."""
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(VISION, special_tokens=True)
    del tokenizer.init_kwargs["auto_map"]  # for a Qwen2.5-VL model AutoTokenizer trusts its class
    return tokenizer


def make_processor():
    """The image processor of a tower with patches of 4 x 4 pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": CELL**2, "longest_edge": 64 * CELL**2}
    scale = dict(image_mean=[0.3] * 3, image_std=[0.4] * 3)
    return Qwen2VLImageProcessorPil(patch_size=CELL // 2, merge_size=2, size=size, **scale)


def make_model(tokenizer, base: str = "data/toy_base", seed: int = 0):
    """A Qwen2.5-VL whose language model is `base`, with a tower of random weights."""
    from transformers import AutoModelForCausalLM, Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    text = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    sizes = """hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads max_position_embeddings rms_norm_eps""".split()
    settings = {name: getattr(text.config, name) for name in sizes}
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    settings |= special | dict(vocab_size=len(tokenizer), bos_token_id=None)
    # Positions by column alone: a line of cells then has the positions of a text.
    half = text.config.hidden_size // text.config.num_attention_heads // 2
    theta = text.config.rope_parameters["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": [0, 0, half]}
    width = text.config.hidden_size
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        window_size=2 * CELL,
        patch_size=CELL // 2,
        spatial_merge_size=2,
        fullatt_block_indexes=[0],
        out_hidden_size=width,
        initializer_range=0.05,
    )
    start, image, end = tokenizer.convert_tokens_to_ids(VISION)
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={**settings, "rope_parameters": rope, "initializer_range": 0.05},
        vision_config=vision,
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=image,
        tie_word_embeddings=True,
        **special,
    )
    model, weights = Model(config).eval(), dict(text.model.named_parameters())
    with torch.no_grad():
        for name, own in model.model.language_model.named_parameters():
            own[: len(weights[name])] = weights[name]
    return model


def align(model, tokenizer, pages: list[tuple[np.ndarray, list[str]]], steps: int, seed: int = 0):
    """Train the tower to give each cell of a page the embedding of its word. Returns the share
    of the cells of the last 50 steps whose nearest embedding is their word's.

    Of the rest of the model nothing is trained.
    """
    from PIL import Image

    processor, table = make_processor(), model.get_input_embeddings().weight.detach()
    rng, right, cells = random.Random(seed), 0, 0
    optimizer = torch.optim.AdamW(model.model.visual.parameters(), weight_decay=0.01)
    for step in range(1, steps + 1):
        batch = rng.sample(pages, 16)
        pictures = [Image.fromarray(page).convert("RGB") for page, _ in batch]
        inputs = processor(pictures, return_tensors="pt")
        features = torch.cat(model.get_image_features(**inputs, return_dict=True).pooler_output)
        words = [word for _, page_words in batch for word in page_words]
        wanted = torch.tensor(tokenizer.convert_tokens_to_ids(words))
        loss = (features - table[wanted]).square().mean() / table.var()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > steps - 50:
            right += int((torch.cdist(features.detach(), table).argmin(1) == wanted).sum())
            cells += len(wanted)
    return right / cells


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = toy.parse_arguments(__doc__)
    out, rng, seed = Path(args.out), random.Random(args.seed), args.seed
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        problems = toy.make_problems("train", args.sft + args.train, seed=seed, terse=0.5)
        files = {"sft": problems[: args.sft], "train": problems[args.sft :]}
        for split in ("validation", "test"):
            files[split] = toy.make_problems(split, args.test, seed=seed)
    except (ValueError, OSError) as error:
        fail(str(error))
    pages = [words_of(record["problem"]) for record in files["sft"]]
    pages = [(draw(words, rng), words) for words in pages[:3000]]
    for name, records in files.items():
        records = [picture_record(record, out / "pictures", rng) for record in records]
        if name != "sft":  # reinforcement learning and evaluation see answers only
            records = [{k: v for k, v in r.items() if k != "solution"} for r in records]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(lines)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    read = align(model, tokenizer, pages, steps=600, seed=seed)
    for part in (tokenizer, model, make_processor()):
        part.save_pretrained(out / "model")
    tower = sum(p.numel() for p in model.model.visual.parameters())
    counts = ", ".join(f"{len(records)} {name}" for name, records in files.items())
    size = f"{model.num_parameters():,}"
    print0(
        f"{out}: {counts}; a model of {size} parameters, {tower:,} of them in a vision tower "
        f"that reads {100 * read:.1f} % of the cells right"
    )


if __name__ == "__main__":
    main()
