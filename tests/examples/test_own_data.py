"""Own images and captions: what cannot be used is told before training, and what can trains."""

from __future__ import annotations

import csv
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import own_data
from examples.own_data import main, problem_report, read_pairs, split

COLORS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for index, color in enumerate(COLORS):
        Image.new("RGB", (40 + index, 30), color).save(folder / f"{color}.png")
    Image.new("L", (20, 20), 128).save(folder / "more" / "gray.jpg")
    return folder


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = [(f"{color}.png", f"a {word} square") for color in COLORS for word in (color, color * 2)]
    return write_csv(tmp_path / "captions.csv", [("image", "caption"), *rows])


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    whole = (images / "red.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("not an image")
    rows = [(f"{color}.png", color) for color in COLORS]
    bad = [("gone.png", "x"), ("cut.png", "x"), ("text.png", "x"), ("red.png", " "), ("", "x")]
    bad += [("red.png",)]
    return write_csv(tmp_path / "broken.csv", [("image", "caption"), *rows, *bad])


def test_it_trains_on_a_folder_and_a_csv(images, captions, tmp_path):
    flags = ["--images", str(images), "--captions", str(captions), "--epochs", "2"]
    flags += ["--held-out", "0.25", "--run-dir", str(tmp_path / "run")]

    trainer = main(flags)

    assert trainer.state.epoch == 2
    assert trainer.metrics.get_history("train/loss")[-1] > 0
    assert 0 <= trainer.metrics.get_history("val/recall@1")[-1] <= 1
    assert (tmp_path / "run" / "settings.json").is_file()


def test_larger_images_train_too(images, captions, tmp_path):
    flags = ["--images", str(images), "--captions", str(captions), "--epochs", "1"]
    flags += ["--image-size", "64", "--held-out", "0", "--run-dir", str(tmp_path / "run")]

    trainer = main(flags)

    assert trainer.state.epoch == 1
    with pytest.raises(KeyError):
        trainer.metrics.get_history("val/recall@1")


def test_every_problem_is_counted_and_shown_with_its_line(images, broken):
    pairs, problems = read_pairs(images, broken)

    assert len(pairs) == 8
    assert problem_report(problems, len(pairs)).splitlines() == [
        "6 of 14 rows cannot be used:",
        "  2: the file cannot be read as an image",
        "      line 11: cut.png",
        "      line 12: text.png",
        "  2: the caption is empty",
        "      line 13: red.png: ''",
        "      line 15: red.png: ''",
        "  1: the file is missing",
        "      line 10: gone.png",
        "  1: the image name is empty",
        "      line 14: ",
    ]


def test_a_long_report_shows_the_first_lines(images, tmp_path):
    rows = [("image", "caption"), *[(f"{n}.png", "x") for n in range(9)]]

    pairs, problems = read_pairs(images, write_csv(tmp_path / "gone.csv", rows))
    report = problem_report(problems, len(pairs)).splitlines()

    assert report[1] == "  9: the file is missing"
    assert report[2] == "      line 2: 0.png"
    assert report[-2:] == ["      line 6: 4.png", "      ..."]


def test_broken_rows_stop_the_program_before_training(images, broken, tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--images", str(images), "--captions", str(broken), "--run-dir", str(run_dir)]

    with pytest.raises(SystemExit, match=r"6 of 14 rows[\s\S]*--skip-broken"):
        main(flags)

    assert not run_dir.exists()


def test_skip_broken_trains_on_the_other_rows(images, broken, tmp_path, capsys):
    flags = ["--images", str(images), "--captions", str(broken), "--skip-broken"]
    flags += ["--epochs", "1", "--run-dir", str(tmp_path / "run")]

    trainer = main(flags)

    assert trainer.state.iteration == 1
    assert "These rows are skipped." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("file", "text"), ("red.png", "x")], r"'image' and 'caption', got 'file', 'text'\. Name"),
        ([], "got an empty file"),
        ([("image", "caption"), ("red.png", "x")], "at least 2 usable images, got 1"),
    ],
)
def test_a_csv_that_does_not_fit_says_what_to_do(images, tmp_path, rows, message):
    path = write_csv(tmp_path / "wrong.csv", rows)

    with pytest.raises(SystemExit, match=message):
        main(["--images", str(images), "--captions", str(path)])


def test_other_columns_are_named_with_flags(images, tmp_path):
    path = write_csv(tmp_path / "other.csv", [("text", "file"), ("a red square", "red.png")])

    pairs, problems = read_pairs(images, path, columns=("file", "text"))

    assert ([pair.name for pair in pairs], problems) == (["red.png"], [])


def test_a_missing_folder_or_file_is_named(images, captions, tmp_path):
    with pytest.raises(SystemExit, match=r"--images must be a folder, got .*nowhere"):
        read_pairs(tmp_path / "nowhere", captions)
    with pytest.raises(SystemExit, match=r"--captions must be a file, got .*nowhere\.csv"):
        read_pairs(images, tmp_path / "nowhere.csv")


def test_a_csv_in_another_encoding_says_so(images, tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("image,caption\nred.png,caf\xe9\n".encode("latin-1"))

    with pytest.raises(SystemExit, match=r"must be in UTF-8, got other bytes on line 2\. Save"):
        read_pairs(images, path)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_and_a_byte_order_mark_are_read(images, tmp_path, separator):
    path = tmp_path / "excel.csv"
    lines = ["image,caption", "red.png,a red square", "blue.png,a blue one"]
    path.write_text("\r\n".join(lines).replace(",", separator), encoding="utf-8-sig")

    pairs, problems = read_pairs(images, path)

    assert ([pair.name for pair in pairs], problems) == (["red.png", "blue.png"], [])


def test_a_caption_with_commas_and_no_quotes_is_not_cut_short(images, tmp_path):
    path = tmp_path / "commas.csv"
    path.write_text('image,caption\nred.png,"red, and square"\nred.png,red, square, big\n')

    pairs, problems = read_pairs(images, path)

    assert len(pairs) == 1
    assert problem_report(problems, len(pairs)).splitlines()[1:] == [
        f"  1: {own_data.TOO_LONG}",
        "      line 3: red.png: 'red', ' square,  big'",
    ]


def test_an_unclosed_quotation_mark_is_an_error_with_its_line(images, tmp_path):
    path = tmp_path / "quote.csv"
    path.write_text('image,caption\nred.png,red\nblue.png,"blue\ngreen.png,green\n')

    with pytest.raises(SystemExit, match=r"from line 3 .*an unclosed quotation mark"):
        read_pairs(images, path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_keep_their_shades(images, tmp_path, suffix):
    shades = np.linspace(0, 65_535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(shades).save(images / f"deep.{suffix}")
    rows = [("image", "caption"), (f"deep.{suffix}", "shades")]

    ((pair,), problems) = read_pairs(images, write_csv(tmp_path / "deep.csv", rows))

    assert problems == []
    assert pair.image[0].tolist() == (shades // 257).tolist()


def test_an_image_of_measurements_is_none_of_colours(images, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(images / "depth.tif")
    rows = [("image", "caption"), ("depth.tif", "x")]

    pairs, problems = read_pairs(images, write_csv(tmp_path / "depth.csv", rows))

    assert (pairs, [problem.kind for problem in problems]) == ([], [own_data.NO_BYTES])


def test_images_are_squares_of_colours_and_transparent_ones_lie_on_white(images, tmp_path):
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(images / "clear.png")
    rows = [("image", "caption"), ("clear.png", "x"), ("more/gray.jpg", "x"), ("red.png", "x")]

    pairs, problems = read_pairs(images, write_csv(tmp_path / "three.csv", rows), size=64)

    assert problems == []
    assert all(pair.image.shape == (3, 64, 64) for pair in pairs)
    assert pairs[0].image.unique().tolist() == [255]
    assert pairs[1].image.float().mean().sub(128).abs() < 3
    assert pairs[2].image[:, 5, 5].tolist() == [255, 0, 0]


def test_the_split_follows_the_names_and_keeps_captions_together(images, captions):
    pairs, _ = read_pairs(images, captions)

    kept, held_out = split(pairs, 0.25)
    again = split(pairs[::-1], 0.25)[1]

    names = [{pair.name for pair in part} for part in (kept, held_out, again)]
    assert (len(names[0]), len(names[1])) == (6, 2)
    assert names[0].isdisjoint(names[1])
    assert names[1] == names[2]


def test_captions_of_an_image_share_a_group(images, captions):
    pairs, _ = read_pairs(images, captions)

    batch = own_data.collate([own_data.Pairs(pairs)[index] for index in range(4)])

    assert batch["group"].tolist() == [0, 0, 1, 1]
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["text"].dtype == torch.int64


def problem_of(images: Path, name: str, caption: str = "x", **settings: bool) -> str | None:
    """Return the problem of a row that names an image, or None if it can be used."""
    path = write_csv(images.parent / "one.csv", [("image", "caption"), (name, caption)])
    pairs, problems = read_pairs(images, path, **settings)
    assert len(pairs) + len(problems) == 1
    return problems[0].kind if problems else None


def outside_names(images: Path) -> list[str]:
    secret = images.parent / "secret" / "red.png"
    secret.parent.mkdir()
    secret.write_bytes((images / "red.png").read_bytes())
    (images / "link.png").symlink_to(secret)
    (images / "linked").symlink_to(secret.parent)
    relative = ["../secret/red.png", "more/../../secret/red.png", "link.png", "linked/red.png"]
    return [str(secret), *relative]


def test_a_file_outside_the_folder_is_refused_unless_it_is_allowed(images, tmp_path):
    for name in outside_names(images):
        assert problem_of(images, name) == own_data.OUTSIDE, name
        assert problem_of(images, name, allow_outside=True) is None, name
    assert problem_of(images, "../nothing.png") == own_data.OUTSIDE
    assert problem_of(images, "more/../red.png") is None
    (images / "inside.png").symlink_to(images / "red.png")
    assert problem_of(images, "inside.png") is None


def test_the_flag_that_allows_files_outside_is_passed_on(images, tmp_path):
    outside = outside_names(images)[0]
    rows = [("image", "caption"), (outside, "a red square"), ("blue.png", "a blue one")]
    path = write_csv(tmp_path / "outside.csv", rows)
    flags = ["--images", str(images), "--captions", str(path)]

    with pytest.raises(SystemExit, match="--allow-outside reads it"):
        own_data.usable_pairs(own_data.parse_flags(flags))
    pairs = own_data.usable_pairs(own_data.parse_flags([*flags, "--allow-outside"]))

    assert [pair.name for pair in pairs] == [outside, "blue.png"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x" * 300 + ".png", own_data.LONG_NAME),
        ("more/" + "ü" * 130, own_data.LONG_NAME),
        ("/".join(["d" * 200] * 30), "the file cannot be read: File name too long"),
        ("more", own_data.NO_FILE),
        ("loop.png", "the file cannot be read: "),
        ("red.png/blue.png", own_data.MISSING),
    ],
)
def test_a_name_that_leads_to_no_file_says_why(images, name, problem):
    (images / "loop.png").symlink_to(images / "loop.png")

    assert (problem_of(images, name) or "").startswith(problem)


def test_a_name_with_a_zero_is_refused(images, tmp_path):
    path = tmp_path / "zero.csv"
    path.write_bytes(b"image,caption\nred\0.png,x\n")

    _, problems = read_pairs(images, path)

    assert [problem.kind for problem in problems] == [own_data.BAD_NAME]


def test_images_and_captions_beyond_the_limits_are_named_by_their_limit(images, monkeypatch):
    monkeypatch.setattr(own_data, "MOST_PIXELS", 1000)
    assert problem_of(images, "red.png") == own_data.TOO_MANY_PIXELS  # 40 x 30
    assert problem_of(images, "more/gray.jpg") is None  # 20 x 20
    monkeypatch.setattr(own_data, "MOST_BYTES", 20)
    assert problem_of(images, "red.png") == own_data.TOO_LARGE
    monkeypatch.undo()
    assert problem_of(images, "red.png", "word " * 2001) == own_data.LONG_CAPTION
    assert problem_of(images, "red.png", "word " * 1999) is None


@pytest.mark.parametrize("side", [9_000, 14_000, 40_000])
def test_a_picture_of_a_few_bytes_that_would_fill_the_memory_is_not_decoded(images, side):
    header = b"".join(
        [
            (images / "red.png").read_bytes()[:16],
            side.to_bytes(4, "big") * 2,
            (images / "red.png").read_bytes()[24:],
        ]
    )
    body = header[12:29]
    checked = header[:29] + zlib.crc32(body).to_bytes(4, "big") + header[33:]
    (images / "bomb.png").write_bytes(checked)

    assert problem_of(images, "bomb.png") == own_data.TOO_MANY_PIXELS


def test_a_caption_file_that_is_too_large_is_not_read(images, captions, monkeypatch):
    monkeypatch.setattr(own_data, "MOST_CAPTION_BYTES", 50)

    with pytest.raises(SystemExit, match=r"must have at most 50 bytes, got \d+\. Split it"):
        read_pairs(images, captions)


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [' + '{"id": 1, "file_name": "a.jpg"},' * 5000 + "]}",
        '[{"image": "a.jpg", "caption": "a cat"}]' * 999,
        ",".join(f"column {number}" for number in range(5000)) + "\n",
        "x" * 100_000 + ",y\n",
        "image,caption\n" + '"' + "x" * 200_000 + "\n",
        'image\tcaption\na.jpg\t"Stop" sign\n',
    ],
)
def test_a_file_of_another_kind_gets_a_short_message(images, tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text)

    with pytest.raises(SystemExit) as raised:
        read_pairs(images, path)

    assert len(str(raised.value)) < 1000
    assert str(path) in str(raised.value)


def test_a_report_quotes_the_beginning_of_what_is_long(images, tmp_path):
    rows = [("image", "caption"), ("n" * 250, "x"), ("red.png", "w" * 20_000)]
    rows += [("red.png", "x", "y" * 1000)]

    _, problems = read_pairs(images, write_csv(tmp_path / "long.csv", rows))

    assert len(problems) == 3
    assert max(map(len, problem_report(problems, 0).splitlines())) < 250


@pytest.mark.parametrize(
    "header", ['"image,caption', '"image"x,caption', "image," + "x" * 200_000], ids=len
)
def test_a_broken_header_is_an_error_with_its_line(images, tmp_path, header):
    (tmp_path / "captions.csv").write_text(f"{header}\na.png,a red square\n")
    with pytest.raises(SystemExit, match="an invalid row from line 1"):
        read_pairs(images, tmp_path / "captions.csv")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError, EOFError])
def test_whatever_a_decoder_raises_the_row_is_reported(images, captions, monkeypatch, error):
    def fail(*_):
        raise error("cannot decode frame 0")

    monkeypatch.setattr(own_data.ImageOps, "exif_transpose", fail)
    pairs, problems = read_pairs(images, captions)
    assert not pairs
    assert {problem.kind for problem in problems} == {own_data.UNREADABLE}


def test_postscript_is_not_run_to_draw_an_image(images, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(images / "drawn.png", format="EPS")
    (tmp_path / "captions.csv").write_text("image,caption\ndrawn.png,a black square\n")
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *given, **_: started.append(given))
    _, problems = read_pairs(images, tmp_path / "captions.csv")
    assert [problem.kind for problem in problems] == [own_data.A_PROGRAM]
    assert not started
