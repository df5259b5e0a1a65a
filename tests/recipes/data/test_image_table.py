"""The table of a user's images: what can be used, the parts, and the summary."""

from __future__ import annotations

import csv
from pathlib import Path

import attrs
import pytest
import torch
from PIL import Image

from diptych.recipes.data import image_table
from diptych.recipes.data.image_batches import ImageRows, PairBatch, evaluation_loader, views_batch
from diptych.recipes.data.image_table import image_rows, read_table
from diptych.recipes.data.rows import DataError, problem_report
from diptych.recipes.settings import Settings
from diptych.recipes.towers.resize import Resize
from diptych.recipes.towers.small_towers import tokenize_all

COLORS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for color in COLORS:
        Image.new("RGB", (40, 30), color).save(tmp_path / "images" / f"{color}.png")
    return tmp_path / "images"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = [(f"{color}.png", f"a {word} square") for color in COLORS for word in (color, color * 2)]
    return write_csv(tmp_path / "captions.csv", rows)


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    (images / "text.png").write_text("not an image")
    rows = [(f"{color}.png", color) for color in COLORS]
    bad = [("gone.png", "x"), ("text.png", "x"), ("red.png", " "), ("", "x"), ("red.png",)]
    return write_csv(tmp_path / "broken.csv", [*rows, *bad, ("red.png", "a", "b")])


def test_every_problem_is_counted_and_shown_with_file_and_line(images, broken):
    settings = Settings(images=images, captions=broken)

    with pytest.raises(DataError) as raised:
        read_table(settings)

    assert str(raised.value).splitlines() == [
        "6 of 14 rows cannot be used:",
        "  1: the row has fewer columns than the file's other rows",
        "      broken.csv:14: red.png",
        "  1: the row has more columns than the first one: put captions with a comma in quotes",
        "      broken.csv:15: red.png, a, b",
        "  1: the file is missing",
        "      broken.csv:10: gone.png: 'x'",
        "  1: the file cannot be read as an image",
        "      broken.csv:11: text.png: 'x'",
        "  1: the caption is empty",
        "      broken.csv:12: red.png",
        "  1: the image name is empty",
        "      broken.csv:13: : 'x'",
        "Fix them, or skip them with --skip-broken.",
    ]
    table = read_table(attrs.evolve(settings, skip_broken=True))
    assert (len(table.rows), len(table.problems), table.images) == (8, 6, 8)
    assert "  skipped                       6" in table.summary(0.1)


def test_the_names_alone_are_checked_if_the_settings_say_so(images, broken):
    settings = Settings(images=images, captions=broken, check="names", skip_broken=True)

    table = read_table(settings)

    assert "text.png" in {row.name for row in table.rows}
    with pytest.raises(
        DataError, match=r"text\.png can no longer be used: the file cannot be read"
    ):
        ImageRows(table.rows, Resize(32))[8]


def test_a_missing_folder_file_or_image_is_named(images, captions, tmp_path):
    with pytest.raises(DataError, match=r"--images must be a folder, got .*nowhere"):
        image_rows(tmp_path / "nowhere", captions)
    with pytest.raises(DataError, match=r"--captions must be a file, got .*nowhere\.csv"):
        image_rows(images, tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match=r"--images must be a folder, got none"):
        read_table(Settings(captions=captions))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"must have images in it"):
        image_rows(tmp_path / "empty")
    one = write_csv(tmp_path / "one.csv", [("red.png", "x")])
    with pytest.raises(DataError, match="at least 2 usable images, got 1"):
        read_table(Settings(images=images, captions=one))


def test_a_row_of_an_unknown_part_is_not_trained_on(images, tmp_path):
    parts = ["train2014", "Validate", "", "holdout"]
    rows = [f"{color}.png,x,{part}\n" for color, part in zip(COLORS, parts, strict=False)]
    (tmp_path / "parts.csv").write_text("image,caption,split\n" + "".join(rows))

    table = image_rows(images, tmp_path / "parts.csv")

    assert [row.split for row in table.rows] == ["train", "val", ""]
    assert [(one.where, one.kind) for one in table.problems] == [
        ("parts.csv:5", "the split must be one of train, val, test, or empty")
    ]


def test_the_split_follows_the_names_and_keeps_captions_together(images, captions):
    table = image_rows(images, captions)

    parts = table.parts(0.25)
    again = attrs.evolve(table, rows=table.rows[::-1]).parts(0.25)

    names = [{row.name for row in part} for part in (parts["train"], parts["val"], again["val"])]
    assert (len(names[0]), len(names[1])) == (6, 2)
    assert names[0].isdisjoint(names[1])
    assert names[1] == names[2]


def test_names_of_files_and_folders_may_have_bytes_that_are_no_text(images, tmp_path):
    folder = tmp_path / "classes" / "caf\udce9"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(images.iterdir())):
        (folder / f"{number}\udcff.png").write_bytes(path.read_bytes())

    table = image_rows(tmp_path / "classes", task="classification")

    assert (table.classes, table.problems) == (["caf\ufffd"], ())
    assert len(table.parts(held_out=0.5)["val"]) == len(table.rows) // 2


def test_captions_of_an_image_share_a_group_however_its_name_is_written(images, tmp_path):
    rows = [("red.png", "a"), ("./red.png", "b"), ("x/../blue.png", "c"), ("blue.PNG", "d")]
    (images / "x").mkdir()
    table = image_rows(images, write_csv(tmp_path / "names.csv", rows))
    dataset = ImageRows(table.rows, Resize(32))

    batch = PairBatch(tokenize_all)([dataset[index] for index in range(4)])

    assert batch["group"].tolist() == batch["image_id"].tolist()
    assert batch["group"].tolist()[:3] == [0, 0, 1]
    assert batch["caption_id"].tolist() == [0, 1, 2, 3]
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["text"].dtype == torch.int64


def test_images_with_the_same_captions_match_and_one_caption_in_common_is_not_enough(
    images, tmp_path
):
    said = {"red": ["a", "b"], "blue": ["b", "a"], "green": ["a"], "black": ["a"], "white": ["c"]}
    rows = [(f"{name}.png", text) for name, texts in said.items() for text in texts]

    table = image_rows(images, write_csv(tmp_path / "same.csv", rows))

    groups = {row.name.removesuffix(".png"): row.group for row in table.rows}
    assert groups["red"] == groups["blue"]
    assert groups["green"] == groups["black"]
    assert len(set(groups.values())) == 3


def test_captions_beyond_the_limit_are_problems(images, tmp_path, monkeypatch):
    monkeypatch.setattr(image_table, "MOST_LETTERS", 5)
    table = image_rows(images, write_csv(tmp_path / "long.csv", [("red.png", "too long")]))

    assert [problem.kind for problem in table.problems] == [image_table.LONG_CAPTION]


def test_a_report_quotes_the_beginning_of_what_is_long_and_no_control_characters(images, tmp_path):
    rows = [("n" * 250, "x"), ("red.png", "w" * 20_000), ("red.png", "x", "y" * 1000)]
    rows += [("\x1b[31m.png", "x")]

    report = problem_report(image_rows(images, write_csv(tmp_path / "l.csv", rows)).problems, 0)

    assert max(map(len, report.splitlines())) < 250
    assert "\x1b" not in report


def test_classification_needs_a_class_and_two_views_nothing(images):
    kinds = {problem.kind for problem in image_rows(images, task="classification").problems}

    assert kinds == {image_table.NO_CLASS}
    assert len(image_rows(images, task="two_views").rows) == 8


def test_augmentations_depend_on_the_sample_and_the_seed_alone(images, captions):
    rows = image_rows(images, captions).rows
    dataset = ImageRows(
        rows, Resize(32), augment=("crop:0.2", "flip", "color", "blur:1", "gray"), views=2
    )

    torch.manual_seed(3)
    first = dataset[0]["views"]
    torch.manual_seed(3)
    again = dataset[0]["views"]

    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], first[1])
    assert set(views_batch([dataset[0]])) == {"first", "second"}


def test_an_evaluation_reads_every_row_once_in_order(images, captions):
    rows = image_rows(images, captions).rows
    loader = evaluation_loader(ImageRows(rows, Resize(32)), PairBatch(tokenize_all))

    groups = torch.cat([batch["group"] for batch in loader])

    assert groups.tolist() == [number // 2 for number in range(16)]


def refusal(folder: str) -> str:
    try:
        read_table(Settings(images=folder, captions=f"{folder}/captions.tsv"))
    except DataError as error:
        return str(error)
    return ""


def test_the_first_rank_alone_reports_the_rows_and_all_ranks_stop(ranks, tmp_path):
    (tmp_path / "captions.tsv").write_text("image\tcaption\ngone.png\tlost\n")

    first, second = ranks.run(refusal, [(str(tmp_path),)] * 2)

    assert "captions.tsv:2: gone.png" in first
    assert second == "the data cannot be used, for the reason that rank 0 reports"
