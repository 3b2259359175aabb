"""Records with pictures: JSONL files, and small local files with the columns of the data sets."""

import io
import json
import os
import sys

import pytest
from PIL import Image

from conftest import ROOT
from data import pictures, sources
from data.sources import hold_out, load_gradable, load_records
from data.verifiers import locate, verify
from data.vision import open_answer, place


def png(shade: int, size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def store(path, rows: list[dict], images=()):
    """A parquet file as the hub has it: its schema says which columns are pictures."""
    from datasets import Dataset, List
    from datasets import Image as Picture

    table = Dataset.from_list(rows)
    for column in images:
        kind = List(Picture()) if isinstance(rows[0][column], list) else Picture()
        table = table.cast_column(column, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Pictures of the hub's rows are written to a folder of the test."""
    kept = pictures.keep_pictures
    monkeypatch.setattr(
        sources, "keep_pictures", lambda record, _, home: kept(record, tmp_path / "kept", home)
    )
    return tmp_path / "kept"


def content(record: dict) -> list[bytes]:
    return [open(path, "rb").read() for path in record["images"]]


LETTER = "Answer with the letter of the right option."


def mmmu(**columns):
    row = {"id": "x", "question": "q", "options": "[]", "answer": "A", "explanation": ""}
    return {**row, **{f"image_{i}": None for i in range(1, 8)}, **columns}


def test_mmmu(tmp_path):
    a, b, c = ({"bytes": png(shade), "path": None} for shade in (1, 2, 3))
    rows = [
        mmmu(
            question="See <image 2>, then <image 1>; <image 2>?",
            options="['it\\'s 1', '2 N']",
            answer="B",
            image_1=a,
            image_2=b,
        ),
        mmmu(
            question="Which?", options="['<image 1>', '<image 2>']", image_1=a, image_2=b, image_3=c
        ),
        mmmu(question="<image 1> How many?", answer="8", image_1=a),
        mmmu(question="<image 1> Where?", answer="['Left lobe', 'left']", image_1=a),
        mmmu(question="<image 1>?", options="['1', '2']", image_1={"bytes": b"x", "path": None}),
    ]
    store(
        tmp_path / "data/validation-00000-of-00001.parquet",
        rows,
        [f"image_{i}" for i in range(1, 8)],
    )
    several, options, number, open_one = load_records(f"mmmu={tmp_path}")
    said = "See <image>, then <image>; (picture 2)?\n\n(A) it's 1\n(B) 2 N\n\n" + LETTER
    assert (several["problem"], several["answer"]) == (said, "B")
    assert content(several) == [png(2), png(1)]  # in the order of their marks
    assert options["problem"].startswith("Which?\n\n(A) <image>\n(B) <image>\n")
    assert content(options) == [png(3), png(1), png(2)]  # without a mark: before the text
    for record in (number, open_one):
        locate(record, "")
    judged = lambda record, *answers: verify([record] * len(answers), list(answers), ["", "", ""])
    assert judged(several, "B", "2 N", "A") == [True, True, False]
    assert judged(options, "(A)", "B", "<image>") == [True, False, False]
    assert judged(number, "8.0", "\\frac{16}{2}", "18") == [True, True, False]
    assert judged(open_one, "left", "the left lobe", "LEFT LOBE.") == [True, False, True]


def test_a_mark_without_a_picture_is_text():
    assert place(["<image 4> or <image>?"], {}) == (["(picture 4) or ?"], [])


def test_mmmu_pro_in_both_forms(tmp_path):
    row = mmmu(
        question="<image 1>",
        options=str(list("abcdefghij")),
        answer="J",
        image_1={"bytes": png(1), "path": None},
    )
    store(
        tmp_path / "standard (10 options)/test-00000-of-00001.parquet",
        [row],
        [f"image_{i}" for i in range(1, 8)],
    )
    row = {"id": "x", "image": {"bytes": png(2), "path": None}, "options": "['u', 'v']"}
    store(tmp_path / "vision/test-00000-of-00001.parquet", [{**row, "answer": "B"}], ["image"])
    (standard,) = load_records(f"mmmu_pro={tmp_path}")
    (seen,) = load_records(f"mmmu_pro_vision={tmp_path}")
    assert standard["problem"].startswith("<image>\n\n(A) a\n") and standard["answer"] == "J"
    assert seen["problem"].startswith("<image>\n\nThe picture shows a question")
    assert content(seen) == [png(2)]
    assert verify([standard, seen, seen], ["j", "B", "C"], [""] * 3) == [True, True, False]


def test_emma(tmp_path):
    row = {
        "pid": "1",
        "context": "Given.",
        "question": "<image_1>?",
        "options": ["1", "2"],
        "answer": "B",
        "type": "Multiple Choice",
        "image_1": {"bytes": png(1), "path": None},
    }
    rows = [row, {**row, "context": None, "type": "Open-ended", "answer": "\\frac12"}]
    store(tmp_path / "Physics/test-00000-of-00001.parquet", rows, ["image_1"])
    choice, free = load_records(f"emma_physics={tmp_path}")
    assert choice["problem"] == f"Given.\n\n<image>?\n\n(A) 1\n(B) 2\n\n{LETTER}"
    assert free["problem"] == "<image>?" and open_answer([free], ["0.5"]) == [True]


def test_mmk12_for_training_and_evaluation(tmp_path):
    row = {
        "id": "x",
        "question": "<image>?\nA. 1\nB. 2",
        "answer": "B",
        "subject": "Physics",
        "image": {"bytes": png(1), "path": None},
    }
    store(
        tmp_path / "data/test-00000-of-00001.parquet", [row, {**row, "subject": "math"}], ["image"]
    )
    same, other = "the same text", {"bytes": png(2), "path": None}
    train = {**row, "question": same, "answer": "$$6$$"}
    store(
        tmp_path / "data/train-00000-of-00001.parquet",
        [train, {**train, "image": other}, train],
        ["image"],
    )
    (record,) = load_records(f"mmk12_physics={tmp_path}")
    assert record["problem"] == f"<image>?\nA. 1\nB. 2\n\n{LETTER}" and len(record["images"]) == 1
    # The same text with another picture is another problem.
    first, second = load_records(f"mmk12={tmp_path}")
    assert first["answer"] == "6" and first["images"] != second["images"]
    training, held_out = hold_out([{**first, "images": [f"{i}.png"]} for i in range(20)], 1, 0)
    assert len(held_out) == 1 and len(training) == 19


def test_geometry3k(tmp_path):
    row = {
        "images": [{"bytes": png(1), "path": None}],
        "problem": "<image>Find x.",
        "answer": "\\sqrt{3}",
    }
    store(tmp_path / "data/train-00000-of-00001.parquet", [row], ["images"])
    (record,) = load_records(f"geometry3k={tmp_path}")
    assert (record["problem"], record["answer"]) == ("<image>Find x.", "\\sqrt{3}")
    assert content(record) == [png(1)]


def test_srpos_sets_name_pictures_in_their_folder_only(tmp_path):
    home, secret = tmp_path / "srpo", tmp_path / "secret.png"
    (home / "pictures").mkdir(parents=True)
    (home / "pictures/a.png").write_bytes(png(1))
    secret.write_bytes(png(2))
    turn = lambda path: json.dumps(
        [
            {"role": "system", "content": "Think."},
            {
                "role": "user",
                "content": [{"type": "image", "image": path}, {"type": "text", "text": "Find x."}],
            },
        ]
    )
    rows = [
        {"id": str(i), "message": turn(path), "answer": "$7$"}
        for i, path in enumerate(["pictures/a.png", "../secret.png", str(secret)])
    ]
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,) = load_records(f"srpo_rl={home}")
    assert (record["problem"], record["answer"]) == ("<image>\nFind x.", "7")
    assert content(record) == [png(1)]
    reply = "<think>\nhm\n</think>\n<answer>\\boxed{7}</answer>"
    messages = [{"role": "user", "content": "<image>x?"}, {"role": "assistant", "content": reply}]
    cold = home / "cold"
    os.makedirs(cold / "pictures")
    (cold / "pictures/a.png").write_bytes(png(1))
    row = {"messages": messages, "images": ["pictures/a.png"]}
    (cold / "train.json").write_text(json.dumps([row]))
    (record,) = load_records(f"srpo_sft={cold}", ("problem", "answer", "solution"))
    assert [record[n] for n in ("problem", "answer", "solution")] == ["<image>x?", "7", "hm"]


def test_prepared_files_have_their_pictures_beside_them(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    row = {"images": [{"bytes": png(1), "path": None}], "problem": "<image>Find x.", "answer": "3"}
    store(tmp_path / "hub/data/train-00000-of-00001.parquet", [row], ["images"])
    out = tmp_path / "there/geometry.jsonl"
    words = ["x", f"geometry3k={tmp_path}/hub", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    sources.main()
    (line,) = [json.loads(line) for line in out.read_text().splitlines()]
    (image,) = line["images"]
    assert image.startswith("geometry_images/") and image.endswith(".png")
    out.parent.rename(tmp_path / "elsewhere")  # paths are relative to the file
    (record,) = load_records(str(tmp_path / "elsewhere/geometry.jsonl"))
    assert content(record) == [png(1)]


@pytest.mark.parametrize(
    "images, reason",
    [
        ("a.png", "'images' wants a list of paths"),
        ([7], "'images' wants a list of paths"),
        (["missing.png"], "missing.png: there is no such file; replace it, or remove the record"),
    ],
)
def test_a_file_with_pictures_that_cannot_be_used_is_refused(tmp_path, images, reason):
    record = {"id": "7", "problem": "<image>?", "answer": "1", "images": images}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit) as stop:
        load_records(str(tmp_path / "p.jsonl"))
    assert "record 7: " in str(stop.value) and reason in str(stop.value)
    assert "\n" not in str(stop.value)


def test_prompts_that_cannot_be_made_are_refused_or_left_out(tmp_path, capsys):
    """Left out and counted in hub data, refused in a file."""
    from plumbing.images import Unusable

    def encode(problem: dict) -> list[int]:
        if problem["problem"] == "bad":
            raise Unusable("it has 2 places for 1 pictures")
        return [len(problem["images"])]

    rows = [
        {"images": [{"bytes": png(i), "path": None}], "problem": text, "answer": "3"}
        for i, text in enumerate(["bad", "good"])
    ]
    store(tmp_path / "data/train-00000-of-00001.parquet", rows, ["images"])
    (record,) = load_gradable(f"geometry3k={tmp_path}", encode, 9, 0, 0)
    assert record["problem"] == "good" and record["prompt"] == [1]
    assert "1 records left out, because of their pictures (first: geometry3k-0, it has 2" in (
        capsys.readouterr().out
    )
    (tmp_path / "a.png").write_bytes(png(1))
    record = {"id": "7", "problem": "bad", "answer": "1", "images": ["a.png"]}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit, match="record 7: it has 2 places for 1 pictures; mend"):
        load_gradable(str(tmp_path / "p.jsonl"), encode, 9, 0, 0)
