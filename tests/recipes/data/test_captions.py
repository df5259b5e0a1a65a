"""Captions in the layouts that people have, recognised by content, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diptych.recipes.data import captions as captions_module
from diptych.recipes.data.captions import read_captions, read_folder
from diptych.recipes.data.image_table import image_rows
from diptych.recipes.data.rows import DataError, Problem, problem_report
from tests.recipes.emoji_files import LAYOUTS, captions, write_images


def written(folder: Path, content: str | bytes, name: str = "captions.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(row.image, row.caption) for row in read_captions(path).rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_every_caption_of_every_image(layout, tmp_path):
    name, write = LAYOUTS[layout]
    images = write_images(tmp_path / "images")
    write(tmp_path / name, captions())

    table = image_rows(images, tmp_path / name)

    expected = [(image, text) for image, texts in captions().items() for text in texts]
    assert (table.layout, table.problems) == (layout, ())
    assert [(row.name, row.caption) for row in table.rows] == expected


def test_the_splits_of_karpathy_are_kept_and_restval_is_for_training(tmp_path):
    images = write_images(tmp_path / "images")
    LAYOUTS["Karpathy's splits"][1](tmp_path / "dataset.json", captions())

    parts = image_rows(images, tmp_path / "dataset.json").parts(held_out=0.5)

    names = {part: list(dict.fromkeys(row.name for row in rows)) for part, rows in parts.items()}
    everything = list(captions())
    assert names == {"train": everything[2:], "val": everything[:2], "test": []}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("image;caption\na.jpg;one; two\n", []),
        ('image;caption\na.jpg;"one; two"\n', [("a.jpg", "one; two")]),
        ("image,caption\r\na.jpg,one\r\n", [("a.jpg", "one")]),
        ("image,caption\ra.jpg,one\rb.jpg,two\r", [("a.jpg", "one"), ("b.jpg", "two")]),
        ("\ufeffimage,caption\na.jpg,one\n", [("a.jpg", "one")]),
        ('image,caption\na.jpg,"a ""big"" dog,\nasleep"\n', [("a.jpg", 'a "big" dog,\nasleep')]),
        ('image\tcaption\na.jpg\t"Stop" sign\n', [("a.jpg", '"Stop" sign')]),
        ('image\tcaption\na.jpg\t"the ""Stop"" sign"\n', [("a.jpg", 'the "Stop" sign')]),
        ("Title\tFilePath\none\ta.jpg\n", [("a.jpg", "one")]),
        ("a.jpg,one\nb.jpg,two\n", [("a.jpg", "one"), ("b.jpg", "two")]),
        ("one\ta.JPG\n", [("a.JPG", "one")]),
        ("image,caption\n\n\na.jpg,one\n\n", [("a.jpg", "one")]),
        ('[{"image": "a.jpg", "caption": "one"}]', [("a.jpg", "one")]),
        ('{"data": [{"file": "a.jpg", "text": "one"}]}', [("a.jpg", "one")]),
        ('{"file_name": "a.jpg", "text": "one"}', [("a.jpg", "one")]),
        ('{"file_name": "a.jpg", "text": "one\u2028two"}\n' * 2, [("a.jpg", "one two")] * 2),
        ('{"a.jpg": ["one", "two"]}', [("a.jpg", "one"), ("a.jpg", "two")]),
        ('{"a.jpg": {"caption": "one"}, "b.jpg": "two"}', [("a.jpg", "one"), ("b.jpg", "two")]),
        ('{"train": [{"image": "a.jpg", "caption": "one"}], "val": []}', [("a.jpg", "one")]),
        ('{"Image": {"0": "a.jpg"}, "Caption": {"0": "one"}}', [("a.jpg", "one")]),
        ('["a.jpg", "one"]\n["b.jpg", "two"]\n', [("a.jpg", "one"), ("b.jpg", "two")]),
        (
            '[{"image": {"path": "a  b.jpg"}, "captions": ["one", {"raw": "two"}]}]',
            [("a  b.jpg", "one"), ("a  b.jpg", "two")],
        ),
        (
            '[{"image": "a.jpg", "caption": NaN}, {"image": "\\ud83d.jpg", "text": "\\ud83d"}]',
            [("a.jpg", ""), ("?.jpg", "?")],
        ),
        ("raw,filename\n\"['one', 'it\"\"s']\",a.jpg\n", [("a.jpg", "one"), ("a.jpg", 'it"s')]),
        ('image, caption\na.jpg, "one, two"\n', [("a.jpg", "one, two")]),
        (" \nimage,caption\na.jpg,one\n", [("a.jpg", "one")]),
        ("a.jpg,0,one\na.jpg,1,two\n", [("a.jpg", "one"), ("a.jpg", "two")]),
        ("7\tval\tone\ta.jpg\n", [("a.jpg", "one")]),
        ('image\tcaption\na.jpg\t"one\ntwo"\n', [("a.jpg", "one\ntwo")]),
        (
            'caption\tfile\n"one\n\ntwo\tthree"\ta.jpg\nfour\tb.jpg\n',
            [("a.jpg", "one\ntwo\tthree"), ("b.jpg", "four")],
        ),
        ('a.jpg\t"one\nb.jpg\ttwo"\n', [("a.jpg", '"one'), ("b.jpg", 'two"')]),
        ("image,caption_1,caption_2\na.jpg,one,two\n", [("a.jpg", "one"), ("a.jpg", "two")]),
        ("file|captions[0]|captions[1]\na.jpg|one|two\n", [("a.jpg", "one"), ("a.jpg", "two")]),
        ("Text 2;Text 10;File\n;two;a.jpg\n;;b.jpg\n", [("a.jpg", "two"), ("b.jpg", "")]),
        ("Image  Name|Prompt\na.jpg|one\n", [("a.jpg", "one")]),
        ("image_name|comment_number|comment\na.jpg|0|one | two\n", [("a.jpg", "one | two")]),
        ('[{"image": 7, "caption": "one"}]', [("7", "one")]),
        ("image,caption,caption\na.jpg,one,two\n", [("a.jpg", "one"), ("a.jpg", "two")]),
        (
            '{"image": "a.jpg", "caption_1": "one", "caption_2": null, "caption_3": ["two"]}',
            [("a.jpg", "one"), ("a.jpg", "two")],
        ),
        ("sep=;\r\nimage;caption\r\na.jpg;one, two\r\n", [("a.jpg", "one, two")]),
        ('"SEP=;"\none, two;a.jpg\n', [("a.jpg", "one, two")]),
        ("# of the farm\n#2020, Ann\n\nimage,caption\na.jpg,#1\n", [("a.jpg", "#1")]),
        ("#image\tcaption\n#1.jpg\tone\n", [("#1.jpg", "one")]),
        ("#1.jpg,one\n#2.jpg,two\n", [("#1.jpg", "one"), ("#2.jpg", "two")]),
        ('# one\n{"a.jpg": "one"}\n', [("a.jpg", "one")]),
        (
            '{"images": [{"filename": "a.jpg", "sentences": [{"tokens": ["a", "cat", 3]}, '
            '{"raw": null, "tokens": "a dog"}]}]}',
            [("a.jpg", "a cat 3"), ("a.jpg", "a dog")],
        ),
        (
            '{"images": [{"id": "7", "file_name": "a.jpg"}], '
            '"annotations": [{"image_id": 7, "caption": "one"}]}',
            [("a.jpg", "one")],
        ),
    ],
)
def test_variants_of_separators_quotes_line_ends_and_columns_are_read(tmp_path, content, expected):
    path = written(tmp_path, content)
    assert pairs(path) == expected
    assert all(row.where.startswith("captions.csv:") for row in read_captions(path).rows)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"]
)
def test_encodings_give_the_same_rows(tmp_path, encoding):
    path = written(tmp_path, "image,caption\ncafé.jpg,ein Café\n".encode(encoding))

    assert pairs(path) == [("café.jpg", "ein Café")]


def test_other_columns_are_named(tmp_path):
    path = written(tmp_path, "one,two\na red square,red.png\n")

    listed = read_captions(path, columns=("two", "one"))

    assert [(row.image, row.caption) for row in listed.rows] == [("red.png", "a red square")]
    with pytest.raises(DataError, match=r"must have two and three, got 'one', 'two'\."):
        read_captions(path, columns=("two", "three"))
    with pytest.raises(DataError, match=r"got 'one', 'two'\. Name yours with --image-column"):
        read_captions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an empty first line"),
        ("image,caption\na.jpg,caf\xe9\n".encode("latin-1"), "other bytes on line 2"),
        ('image,caption\na.jpg,one\nb.jpg,"two\nc.jpg,three\n', "an invalid row from line 3"),
        ('{"images": [', "must be valid JSON"),
        ("[" * 100_000, "JSON"),
        ('{"a": 1, "b": 2}', "got 'a', 'b'"),
        ("a.jpg,a cat, asleep\n", "got 'a.jpg', 'a cat', 'asleep'"),
        (",".join(f"column {number}" for number in range(5000)) + "\n", "and 4,992 more"),
        ("x" * 100_000 + ",y\n", "must have a column"),
        ('[{"image": "a.jpg", "caption": "one"},]', r"must be valid JSON.* line 1 column"),
        ('{"a.jpg": "one", "a.jpg": "two"}', r"got an error: 'a\.jpg' is twice in an object"),
        (b"PAR1\x15\xff", r"must be text, got a Parquet file\. Write it as CSV"),
        (b"PK\x03\x04\x14", "an Excel file or a zip archive"),
        (b"a.jpg".ljust(257, b"\0") + b"ustar", r"got a tar archive\. Pass shards with --shards"),
    ],
    ids=range(14),
)
def test_a_file_that_is_none_of_captions_gets_a_short_message(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as raised:
        read_captions(written(tmp_path, content))

    assert len(str(raised.value).splitlines()) < 5
    assert len(str(raised.value)) < 1200


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(captions_module, "MOST_BYTES", 10)

    with pytest.raises(DataError, match=r"at most 10 bytes, got 23\. Split it"):
        read_captions(written(tmp_path, "image,caption\na.jpg,one"))


def test_rows_that_cannot_be_read_are_problems_with_their_lines(tmp_path):
    lines = ["image_name| comment_number| comment", "a.jpg| 0| one", "b.jpg| 1 two", "c.jpg| 2| x"]
    listed = read_captions(written(tmp_path, "\n".join(lines)))
    assert [row.image for row in listed.rows] == ["a.jpg", "c.jpg"]
    assert [problem.where for problem in listed.problems] == ["captions.csv:3"]

    jsonl = '{"file_name": "a.jpg", "text": "one"}\nno json\n{"text": "two"}\n'
    listed = read_captions(written(tmp_path, jsonl))
    assert [problem.where for problem in listed.problems] == ["captions.csv:2", "captions.csv:3"]

    boxes, nameless = {"image_id": 1, "bbox": [0, 0, 2, 2]}, {"caption": "of no image"}
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"file_name": "b.jpg"}],
        "annotations": [{"image_id": 4, "caption": "x"}, "nothing", boxes, nameless],
    }
    listed = read_captions(written(tmp_path, json.dumps(coco)))
    assert listed.rows == ()
    places = [problem.where for problem in listed.problems]
    assert places == [f"captions.csv: annotations[{number}]" for number in range(4)]
    assert "captions_*.json" in listed.problems[2].kind


def test_a_folder_without_captions_has_its_subfolders_as_classes(tmp_path):
    for name in ("train/big_cat/1.JPG", "train/dog/deep/2.png", "test/dog/3.jpeg", "train/no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")

    rows = read_folder(tmp_path).rows

    assert [(row.image, row.label, row.split) for row in rows] == [
        ("test/dog/3.jpeg", "dog", "test"),
        ("train/big_cat/1.JPG", "big_cat", "train"),
        ("train/dog/deep/2.png", "dog", "train"),
    ]
    table = image_rows(tmp_path)
    assert [(row.caption, row.group) for row in table.rows][1] == ("big cat", "big cat")


def test_an_imagefolder_has_its_captions_and_its_parts_in_files_of_metadata(tmp_path):
    for part in ("train", "test"):
        images = write_images(tmp_path / part)
        LAYOUTS["JSON lines"][1](images / "metadata.jsonl", captions())

    listed = read_folder(tmp_path)

    first = next(iter(captions()))
    assert (listed.layout, len(listed.rows)) == ("imagefolder with metadata", 32)
    assert {row.split for row in listed.rows} == {"train", "test"}
    assert (listed.rows[0].image, listed.rows[0].where) == (
        f"test/{first}",
        "test/metadata.jsonl:1",
    )


def test_text_files_beside_images_have_a_caption_in_each_line(tmp_path):
    images, texts = write_images(tmp_path / "images" / "00012").parent, tmp_path / "texts"
    (texts / "00012").mkdir(parents=True)
    with pytest.raises(DataError, match="--captions must be a file, or a folder with a text file"):
        image_rows(images, texts)
    said_of = {f"00012/{name}": said for name, said in captions().items()}
    for name, said in said_of.items():
        (images / name).with_suffix(".txt").write_text("\n\n".join(said), "utf-16")
        (texts / name).with_suffix(".caption").write_text(f"{said[0]}\n0 0.5 0.5 0.1 0.1\n")

    tables = [image_rows(images), image_rows(images, texts)]

    both = [(name, text) for name, said in sorted(said_of.items()) for text in said]
    assert [(row.name, row.caption) for row in tables[0].rows] == both
    assert [(row.name, row.caption) for row in tables[1].rows] == both[::2]
    assert len(image_rows(images, task="two_views").rows) == len(said_of)
    (images / next(iter(said_of))).with_suffix(".txt").unlink()
    (problem,) = image_rows(images).problems
    assert problem.kind == "the image has no caption: name their file with --captions"


def test_hidden_files_are_no_images_of_a_folder(tmp_path):
    for name in ("a.png", "._a.png", ".thumbnails/a.png", "__MACOSX/._a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    assert [row.image for row in read_folder(tmp_path).rows] == ["a.png"]


def test_two_files_of_metadata_are_refused_and_not_both_read(tmp_path):
    written(tmp_path, "file_name,text\na.jpg,one\n", "metadata.csv")
    written(tmp_path, '{"file_name": "a.jpg", "text": "one"}\n', "metadata.jsonl")

    with pytest.raises(DataError, match=r"one file of metadata, .* Name one of them with --capt"):
        read_folder(tmp_path)


def test_no_report_is_longer_than_twenty_lines():
    kinds = [Problem(f"file:{n}", f"kind {n % 30}", "x" * 10) for n in range(500)]
    one = [Problem(f"file:{n}", "the file is missing", "x") for n in range(500)]

    assert len(problem_report(kinds, 0).splitlines()) <= 18
    assert problem_report(one, 7).splitlines() == [
        "500 of 507 rows cannot be used:",
        "  500: the file is missing",
        *(f"      file:{n}: x" for n in range(4)),
        "      file:4: x (and 495 more)",
    ]
