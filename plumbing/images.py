"""Pictures in the prompts of Qwen2.5-VL and Qwen3-VL: their tokens, features and 3-D positions.

In a prompt's token ids an image token is a negative number: -1 - its place among the image tokens
of all pictures that this process has met. So two prompts that differ in their pictures differ in
their ids. What sequences share is found by ids, and a placeholder, the same one for all pictures,
would let a question see another one's picture. Embeddings and positions follow from the ids, too.

The vision tower is frozen. So features are computed once per picture and step, outside of autograd,
and wait in CPU memory for prefill, scoring, reference and update. Sharded models keep their tower
whole on every rank: encoding is no collective, and a rank without pictures does nothing.

Shapes: B sequences of T tokens, R image tokens of the pictures in sight, D width of the model.
"""

import base64
import functools
import io

import torch

from plumbing.ranks import fail, require
from plumbing.weights import load_config, sees

LARGEST = 50_000_000  # pixels of a picture as it is stored: more are not decoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's others run programs, or are rare
HINT = "choose a model of the families qwen2_5_vl or qwen3_vl"


class Unusable(ValueError):
    """A picture, or a prompt with pictures, that cannot be used. The text says why."""


# --------------------------------------------------------------------------------------------------
# Files


def open_picture(source):
    """A picture of an allowed kind, not decoded yet. `source`: a path, or an open file.

    Raises Unusable for what is no picture, is larger than LARGEST pixels, or moves.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(source, formats=FORMATS)
        moves = getattr(picture, "is_animated", False) and picture.format != "MPO"  # a phone's JPEG
    except FileNotFoundError:
        raise Unusable("there is no such file") from None
    except UnidentifiedImageError:
        raise Unusable(f"it is no picture of the kinds {', '.join(FORMATS)}") from None
    except Exception as error:  # of many kinds, where a header is damaged or a decompression bomb
        raise Unusable(f"it cannot be read ({error})") from None
    width, height = picture.size
    if width * height > LARGEST:
        raise Unusable(f"it has {width} x {height} pixels, and at most {LARGEST:,} are read")
    if moves:
        raise Unusable("it is an animation, and only still pictures are read")
    return picture


def decode_picture(source):
    """A picture in RGB, upright, what is transparent in white. Raises Unusable as open_picture."""
    from PIL import Image, ImageOps

    with open_picture(source) as picture:
        try:
            picture = ImageOps.exif_transpose(picture)  # a camera may store it lying
            if not picture.has_transparency_data:
                return picture.convert("RGB")
            picture = picture.convert("RGBA")  # RGB alone would show what is hidden, often black
            paper = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(paper, picture).convert("RGB")
        except Exception as error:  # of many kinds, where a file is damaged
            raise Unusable(f"it cannot be read ({error})") from None


@functools.cache
def picture_size(path: str) -> tuple[int, int]:
    """Width and height of a picture, which is decoded once to see that it can be."""
    return decode_picture(path).size


def thumbnail(path: str, side: int = 320) -> str:
    """A small copy of a picture as a data URI, for a page. One that cannot be read is blank."""
    from PIL import Image

    try:
        picture = decode_picture(path)
    except Unusable:
        picture = Image.new("RGB", (16, 16), "white")
    picture.thumbnail((side, side))
    small, kind = io.BytesIO(), "PNG" if picture.width * picture.height < 10_000 else "JPEG"
    picture.save(small, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(small.getvalue()).decode()}"


# --------------------------------------------------------------------------------------------------
# The album


class Album:
    """The pictures of a run's prompts, in the order in which they came, and those in sight.

    All ranks meet the same pictures in the same order, so ids mean the same on all of them.
    """

    def __init__(self, processor, tokenizer, config, max_pixels: int):
        self.processor, self.token = processor, config.image_token_id
        special = (config.vision_start_token_id, self.token, config.vision_end_token_id)
        self.mark = "".join(tokenizer.convert_ids_to_tokens(special))
        if max_pixels:
            low = min(processor.size["shortest_edge"], max_pixels)
            processor.size = {"shortest_edge": low, "longest_edge": max_pixels}
        self.paths, self.numbers = [], {}  # of the pictures; path -> its place among them
        self.sides: list[tuple[int, int]] = []  # of each picture: rows and columns of image tokens
        self.ends = [0]  # image tokens up to each picture
        self.sight: dict[int, list[torch.Tensor]] = {}  # picture -> features, (tokens, D) each
        self.geometry = None
        # Where each picture begins in the table of features; -1: it is not in sight.
        self.places, self.table = torch.empty(0, dtype=torch.long), []

    def number(self, path: str) -> range:
        """The ids that stand for a picture: as many as its size asks for. Raises Unusable."""
        if path not in self.numbers:
            self.sides.append(self.grid(*picture_size(path)))
            self.numbers[path] = len(self.paths)
            self.paths.append(path)
            self.ends.append(self.ends[-1] + self.sides[-1][0] * self.sides[-1][1])
            self.geometry = None
        place = self.numbers[path]
        return range(-1 - self.ends[place], -1 - self.ends[place + 1], -1)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of image tokens of a picture of so many pixels. Raises Unusable."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        side, limits = self.processor.patch_size * self.processor.merge_size, self.processor.size
        try:
            low, high = limits["shortest_edge"], limits["longest_edge"]
            height, width = smart_resize(height, width, side, low, high)
        except ValueError as error:
            raise Unusable(f"it cannot be resized ({error})") from None
        return height // side, width // side

    def expand(self, ids: list[int], paths: list[str]) -> list[int]:
        """Token ids with one placeholder per picture -> with an id per image token.

        Raises Unusable where placeholders and pictures are not equally many.
        """
        if ids.count(self.token) != len(paths):
            raise Unusable(f"it has {ids.count(self.token)} places for {len(paths)} pictures")
        out, paths = [], iter(paths)
        for token in ids:
            out += self.number(next(paths)) if token == self.token else [token]
        return out

    # What stands where

    def measures(self) -> torch.Tensor:
        """(4, P): of each picture its first image token, rows, columns, and number of tokens."""
        if self.geometry is None:
            sides = torch.tensor(self.sides)
            starts = torch.tensor(self.ends[:-1], dtype=torch.long)
            self.geometry = torch.stack([starts, *sides.T, sides.prod(1)])
        return self.geometry

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of image tokens (any shape): which picture, and the place in it. Others give anything."""
        rows, starts = (-1 - ids).clamp_min(0), self.measures()[0]
        which = torch.searchsorted(starts, rows, right=True) - 1
        return which, rows - starts[which]

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Temporal, row and column position of each token: ids (B, T) on the CPU -> (3, B, T).

        A text token moves all three on by 1. The tokens of a picture that begins at p have p, p +
        row, p + column, and text goes on at p + its longer side (multimodal RoPE,
        arXiv 2409.12191).
        """
        if not self.sides:
            return torch.arange(ids.shape[1]).expand(3, *ids.shape)
        image, (which, place) = ids < 0, self.find(ids)
        _, rows, columns, count = self.measures()[:, which]
        last = torch.where(place == count - 1, torch.maximum(rows, columns), 0)
        advance = torch.where(image, last, 1)
        start = advance.cumsum(1) - advance
        inside = torch.stack([torch.zeros_like(place), place // columns, place % columns])
        return start + torch.where(image, inside, 0)

    def shift(self, prompt: list[int]) -> int:
        """Position less place of the tokens after a prompt: 0, or less."""
        return int(self.positions(torch.tensor([[*prompt, 0]]))[0, 0, -1]) - len(prompt)

    # What a model sees

    @torch.no_grad()
    def look(self, model, sequences: list[list[int]]):
        """Bring the pictures of these sequences into sight, and no others.

        Those that were in sight keep their features: the tower is frozen.
        """
        if not self.sides:
            return
        images = {token for sequence in sequences for token in sequence if token < 0}
        wanted = self.find(torch.tensor(sorted(images), dtype=torch.long))[0].unique().tolist()
        old, self.sight = self.sight, {}
        for number in wanted:
            self.sight[number] = old[number] if number in old else self.encode(model, number)
        self.places = torch.full((len(self.sides),), -1)
        sizes = self.measures()[3][wanted]
        self.places[wanted] = sizes.cumsum(0) - sizes
        self.table = [torch.cat(parts) for parts in zip(*self.sight.values())]

    def encode(self, model, number: int) -> list[torch.Tensor]:
        """A picture's features (tokens, D) on the CPU: for the embedding, and Qwen3-VL's layers.

        One picture at a time, so that what is encoded beside it changes nothing, not even rounding.
        """
        path, device = self.paths[number], getattr(model, "compute_device", model.device)
        try:
            inputs = self.processor([decode_picture(path)], return_tensors="pt")
        except Unusable as error:
            fail(f"the picture {path} was there when the run began, and now: {error}; restore it")
        pixels, grids = (inputs[name].to(device) for name in ("pixel_values", "image_grid_thw"))
        side = self.processor.merge_size
        same = grids.tolist() == [[1, *(side * n for n in self.sides[number])]]
        require(same, f"the picture {path} has another size than when the run began: restore it")
        out = model.get_image_features(pixels, grids, return_dict=True)  # in the tower's own dtype
        layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        return [layer[0].cpu() for layer in layers]

    def features(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The features of image tokens (R,), whose pictures are in sight: (R, D) each."""
        which, place = self.find(ids)
        rows = self.places[which] + place
        assert bool((self.places[which] >= 0).all()), "a picture is not in sight"
        return [layer[rows] for layer in self.table]


# --------------------------------------------------------------------------------------------------
# What the stages call


def open_album(tokenizer, config):
    """Let `tokenizer` make prompts with pictures, if the model of a stage's `config` can see them.

    Raises SystemExit where the model's image processor cannot be read.
    """
    model_config = load_config(config.model)
    if not sees(model_config):
        return
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(config.model, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:150]
        require(False, f"no usable image processor at {config.model!r} ({reason}); copy the "
                "model's preprocessor_config.json there")
    tokenizer.album = Album(processor, tokenizer, model_config, config.max_pixels)


def mark_pictures(tokenizer, problem: str, count: int) -> str:
    """A problem whose marks `<image>` have become the model's own, one for each of its pictures.

    Pictures without a mark come first. Raises Unusable where there are too many marks, and
    SystemExit for a model without eyes.
    """
    album, marks = getattr(tokenizer, "album", None), problem.count("<image>")
    require(album, f"the data have pictures, and this model sees none: {HINT}")
    if marks > count:
        raise Unusable(f"its problem has {marks} marks <image> for {count} pictures")
    before = album.mark * (count - marks)
    return before + problem.replace("<image>", album.mark)


def show(tokenizer, sequences: list[list[int]], *models):
    """Let models see the pictures of these token ids. The first one's tower looks at them."""
    album = getattr(tokenizer, "album", None)
    if album is None:
        return
    for model in models:
        if model is not None:
            model.album = album
    album.look(models[0], sequences)


def processors(tokenizer) -> list:
    """What a saved model needs beside its tokenizer to see pictures."""
    album = getattr(tokenizer, "album", None)
    return [] if album is None else [album.processor]


# --------------------------------------------------------------------------------------------------
# What models call


def has_pictures(model, ids: torch.Tensor) -> bool:
    """Whether there are image tokens among the ids. Other models do not wait for a GPU's answer."""
    return hasattr(model, "album") and bool((ids < 0).any())


def embedded(model, ids: torch.Tensor, positions: torch.Tensor) -> dict:
    """Ids (B, T) as the decoder takes them, with 3-D positions (3, B, T) if they hold pictures."""
    image = ids < 0
    embeds = model.get_input_embeddings()(ids.clamp_min(0))
    features = model.album.features(ids[image].cpu())
    first, *deep = (part.to(embeds.device, embeds.dtype) for part in features)
    inputs = dict(inputs_embeds=embeds.masked_scatter(image[..., None], first))
    if deep:
        inputs.update(visual_pos_masks=image, deepstack_visual_embeds=deep)
    return {**inputs, "position_ids": positions.to(ids.device)}


def prompt_inputs(model, ids: torch.Tensor) -> tuple:
    """What to call for a prefill of ids (B, T), and with which arguments."""
    if not has_pictures(model, ids):
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        return model, dict(input_ids=ids, position_ids=places, logits_to_keep=1)
    return model.get_decoder(), embedded(model, ids, model.album.positions(ids.cpu()))


def packed_inputs(model, packed) -> dict:
    """What the decoder gets for a packed batch (plumbing/attention.py)."""
    ids = packed.ids[None]
    if not has_pictures(model, ids):
        return dict(input_ids=ids, position_ids=packed.positions[None])
    laid_out = [model.album.positions(packed.ids[p].cpu()).flatten(1) for p in packed.places]
    return embedded(model, ids, torch.cat(laid_out, 1)[:, packed.owner.cpu()][:, None])


def shifts(model, sequences: list) -> dict[int, int] | None:
    """How far positions are from places after each prompt, by id(prompt); None without an album."""
    if not hasattr(model, "album"):
        return None
    prompts = {id(s.prompt): s.prompt for s in sequences}
    return {key: model.album.shift(prompt) for key, prompt in prompts.items()}


# --------------------------------------------------------------------------------------------------
# The tower of a model


def tower_of(model):
    """The vision tower of a model, or None."""
    return model.model.visual if sees(model.config) else None


def without_tower(model):
    """A reference: it takes the features of the policy, which has the same tower."""
    if sees(model.config):
        model.model.visual = None
    return model


def freeze_tower(model, device=None) -> set | None:
    """The parameters of the tower, which are not trained from here on, on `device` if it is given.

    None without a tower.
    """
    tower = tower_of(model)
    if tower is None:
        return None
    return set((tower if device is None else tower.to(device)).requires_grad_(False).parameters())


def tokens_at_most(config, max_pixels: int) -> int:
    """The image tokens of a picture of `max_pixels`; 0 where nothing is known."""
    if not sees(config):
        return 0
    vision = config.vision_config
    return max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
