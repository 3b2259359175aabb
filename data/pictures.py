"""Records with pictures: `images`, a list of paths relative to the records' JSONL file.

A picture stands where the problem has the mark `<image>`; those without a mark stand before it.
Pictures of the hub's data sets are written to files named by their content, so that copies are one
file, and equal problems with other pictures are other problems.
"""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plumbing.images import Unusable, decode_picture, open_picture, picture_size
from plumbing.ranks import fail, print0, require

FOLDER = Path("runs/data/pictures")  # of hub data sets that are read without a JSONL file

# --------------------------------------------------------------------------------------------------
# Records of a file


def locate_pictures(name: str, records: list[dict]):
    """Make the paths of the records of a JSONL file whole, and look at every picture once.

    Raises SystemExit with the record's id for a picture that cannot be used.
    """
    seen = [record for record in records if "images" in record]
    for record in seen:
        images = record["images"]
        listed = isinstance(images, list) and all(isinstance(p, str) and p for p in images)
        require(listed, f"{name}, record {record['id']}: 'images' wants a list of paths")
        record["images"] = [str(Path(name).parent / path) for path in images]

    def trouble(record: dict) -> str | None:
        for path in record["images"]:
            try:
                picture_size(path)
            except Unusable as error:
                return f"the picture {path}: {error}"

    # Pillow decodes without holding the interpreter.
    workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(min(8, workers)) as pool:
        for record, reason in zip(seen, pool.map(trouble, seen)):
            if reason:
                fail(f"{name}, record {record['id']}: {reason}; replace it, or remove the record")


def relative(images: list[str], file: Path) -> list[str]:
    """Whole paths as a record of `file` names them."""
    return [os.path.relpath(path, Path(file).parent) for path in images]


def with_prompts(name: str, problems: list[dict], encode: Callable, left_out: bool) -> list[dict]:
    """The problems with `prompt`, the token ids of their texts and pictures.

    Where that fails they are `left_out` and counted, or SystemExit names the first one.
    """
    reasons = []
    for problem in problems:
        try:
            problem["prompt"] = encode(problem)
        except Unusable as error:
            require(left_out, f"{name}, record {problem['id']}: {error}; mend or remove it")
            reasons.append(f"{problem['id']}, {error}")
    if reasons:
        print0(f"{name}: {len(reasons)} records left out, because of their pictures (first: "
               f"{reasons[0]})")
    return [problem for problem in problems if "prompt" in problem]


def identity(record: dict) -> str:
    """What tells a problem from others: its text, and its pictures."""
    return "\n".join([record["problem"], *map(os.path.basename, record.get("images", ()))])


# --------------------------------------------------------------------------------------------------
# Rows of the hub


def undecoded(table):
    """A table of `datasets` that gives its pictures as {"bytes", "path"}."""
    from datasets import Image

    for column, kind in (table.features or {}).items():
        if isinstance(kind, Image):
            table = table.cast_column(column, Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), Image):
            table = table.cast_column(column, type(kind)(Image(decode=False)))
    return table


def bytes_of(picture: dict, home: str) -> bytes:
    """A picture's file, from the row or from a path inside the folder `home`. Raises Unusable."""
    if picture.get("bytes"):
        return picture["bytes"]
    path = Path(home, picture.get("path") or "").resolve()
    # A data set must not read what is outside of its folder.
    if not home or not path.is_file() or not path.is_relative_to(Path(home).resolve()):
        raise Unusable("it is not in the data set's folder")
    return path.read_bytes()


def keep_pictures(record: dict, folder: Path, home: str = "") -> str | None:
    """Write the pictures of a hub row's record to files, and put their paths into `images`.

    A picture is {"bytes", "path"}; a path is inside `home`. Returns why one cannot be used, or
    None.
    """
    paths = []
    for picture in record.pop("images", None) or ():
        try:
            data = bytes_of(picture, home)
            kind = open_picture(io.BytesIO(data)).format.lower()
            decode_picture(io.BytesIO(data))
        except (Unusable, OSError):
            return "a picture that cannot be used"
        path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.{kind}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(path)  # whole or not at all: several ranks may write it
        paths.append(str(path))
    record |= {"images": paths} if paths else {}
