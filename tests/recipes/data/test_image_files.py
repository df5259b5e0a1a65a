"""Files of images: names that lead to them or must not, modes, and what is wrong with a file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.recipes.data import image_files, rows
from diptych.recipes.data.image_files import (
    ImageError,
    ImageFolder,
    read_image,
    to_tensor,
    unreadable,
)
from diptych.recipes.towers.resize import Resize


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    Image.new("L", (20, 20), 128).save(folder / "more" / "gray.JPG", format="JPEG")
    return folder


def found(images: Path, *names: str, **options: bool) -> list[object]:
    return list(ImageFolder(images, **options).find(names).values())


def problem(path: Path) -> str | None:
    return unreadable([path], 32).get(path)


def tiff(path: Path, values: list[int], *, bits: int, data: bytes, kind: int = 1) -> Path:
    """Write a grey TIFF of one row by hand: Pillow cannot write these depths."""
    tags = [(256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(data)), (339, 3, kind)]
    entries = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    offset = 8 + len(data) + len(data) % 2
    body = data.ljust(offset - 8, b"\0") + struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", offset) + body)
    return path


def grey(path: Path) -> list[int]:
    return np.asarray(read_image(path, 1))[0, :, 0].tolist()


def test_a_name_is_found_however_it_is_written(images):
    names = ["red.png", "./red.png", "more/gray.JPG", "more\\gray.JPG", "more/gray.jpg"]
    names += ["more/../red.png", "red.PNG"]

    assert [Path(str(path)).resolve().name for path in found(images, *names)] == [
        *("red.png", "red.png", "gray.JPG", "gray.JPG", "gray.JPG", "red.png", "red.png")
    ]


def test_a_name_may_lack_its_suffix_or_be_percent_encoded_or_a_url(images):
    (images / "red.png").rename(images / "dark red.png")
    for name in ("two.jpg", "two.png"):
        (images / name).touch()

    assert found(images, "dark red", "dark%20red.png") == [images / "dark red.png"] * 2
    assert found(images, "two") == [image_files.MISSING]  # one of two is not chosen
    urls = ("http://a.org/more/gray.JPG", "http://a.org/gone.png?size=3")
    assert found(images, *urls) == [images / "more/gray.JPG", image_files.A_URL]


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(rows, "PAUSE", 0.0)

    assert list(rows.reported("abc", "Checked images", total=5, size=2)) == ["a", "b", "c"]

    assert capsys.readouterr().err.splitlines() == [
        f"Checked images: {number} of 5" for number in (2, 4, 5)
    ]


def test_a_subfolder_that_has_the_images_is_named_if_the_folder_has_none(images):
    place = f"{image_files.MISSING}: {images / 'more'} has it, which --images may name"
    (images.parent / "more").mkdir()
    assert found(images, "gray.JPG", "gone.png") == [place, place]
    top = f"{image_files.MISSING}: {images} has it, which --images may name"
    assert found(images.parent, "more/gray.JPG") == [top]
    assert found(images, "gray.JPG", "red.png") == [image_files.MISSING, images / "red.png"]


def test_folders_that_all_names_begin_with_and_that_are_not_there_are_left_out(images):
    names = ["C:\\data\\red.png", "C:\\data\\more\\gray.JPG", "C:\\data\\gone.png"]

    assert found(images, *names)[:2] == [images / "red.png", images / "more/gray.JPG"]
    assert found(images, *names)[2] == image_files.MISSING
    # Two names would become one: neither is taken for the other.
    assert found(images, "train/red.png", "test/red.png") == [image_files.MISSING] * 2


def test_a_file_outside_the_folder_is_refused_unless_it_is_allowed(images):
    secret = images.parent / "secret" / "red.png"
    secret.parent.mkdir()
    secret.write_bytes((images / "red.png").read_bytes())
    (images / "link.png").symlink_to(secret)
    (images / "linked").symlink_to(secret.parent)
    names = [str(secret), "../secret/red.png", "more/../../secret/red.png", "link.png"]
    names += ["linked/red.png"]

    assert found(images, *names) == [image_files.OUTSIDE] * 5
    assert all(isinstance(one, Path) for one in found(images, *names, allow_outside=True))
    assert found(images, "../nothing.png") == [image_files.OUTSIDE]
    (images / "inside.png").symlink_to(images / "red.png")
    assert found(images, "inside.png") == [images / "inside.png"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", image_files.NO_NAME),
        ("red\0.png", image_files.BAD_NAME),
        ("x" * 300 + ".png", image_files.LONG_NAME),
        ("more/" + "ü" * 130, image_files.LONG_NAME),
        ("/".join(["d" * 200] * 30), "the file cannot be read: File name too long"),
        ("more", image_files.NO_FILE),
        ("loop.png", "the file cannot be read: "),
        ("red.png/blue.png", image_files.MISSING),
    ],
    ids=range(8),
)
def test_a_name_that_leads_to_no_file_says_why(images, name, expected):
    (images / "loop.png").symlink_to(images / "loop.png")

    assert str(found(images, name)[0]).startswith(expected)


def test_a_file_that_is_no_image_says_so(images):
    whole = (images / "red.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("not an image")
    Image.new("RGB", (8, 8)).save(images / "drawn.png", format="EPS")

    assert problem(images / "red.png") is None
    assert problem(images / "cut.png") == image_files.UNREADABLE
    assert problem(images / "text.png") == image_files.UNREADABLE
    assert problem(images / "drawn.png") == image_files.A_PROGRAM


def test_postscript_is_not_run_to_draw_an_image(images, monkeypatch):
    Image.new("RGB", (8, 8)).save(images / "drawn.png", format="EPS")
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *given, **_: started.append(given))

    assert problem(images / "drawn.png") == image_files.A_PROGRAM
    assert not started


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError, EOFError])
def test_whatever_a_decoder_raises_the_file_is_reported(images, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error("cannot decode frame 0")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)

    assert problem(images / "red.png") == image_files.UNREADABLE


def test_the_limits_of_bytes_and_pixels_are_named(images, monkeypatch):
    monkeypatch.setattr(image_files, "MOST_PIXELS", 1000)
    assert problem(images / "red.png") == image_files.TOO_MANY_PIXELS  # 40 x 30
    assert problem(images / "more/gray.JPG") is None  # 20 x 20
    monkeypatch.setattr(image_files, "MOST_BYTES", 20)
    assert found(images, "red.png") == [image_files.TOO_LARGE]


@pytest.mark.parametrize("side", [9_000, 40_000])
def test_a_picture_of_a_few_bytes_that_would_fill_the_memory_is_not_decoded(images, side):
    whole = (images / "red.png").read_bytes()
    header = whole[:16] + side.to_bytes(4, "big") * 2 + whole[24:]
    checksum = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (images / "bomb.png").write_bytes(header[:29] + checksum + header[33:])

    assert problem(images / "bomb.png") == image_files.TOO_MANY_PIXELS


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_keep_their_shades(tmp_path, suffix):
    shades = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(1, 64)
    Image.fromarray(shades).save(tmp_path / f"deep.{suffix}")

    assert grey(tmp_path / f"deep.{suffix}") == (shades // 257)[0].tolist()


def test_images_of_12_and_32_bits_are_scaled_by_their_white(tmp_path):
    path = tmp_path / "deep.tif"
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10])  # 0x000, 0x800, 0xFFF, 0x010

    assert grey(tiff(path, [0] * 4, bits=12, data=packed)) == [0, 127, 255, 0]
    for values, expected in (
        ([0, 100, 255], [0, 100, 255]),  # 8 bits in 32
        ([0, 257, 65_535], [0, 1, 255]),  # 16 bits in 32
        ([0, 2**31, 2**32 - 1], [0, 127, 255]),
    ):
        data = struct.pack("<3I", *values)
        assert grey(tiff(path, values, bits=32, data=data)) == expected
    with pytest.raises(ImageError, match="negative or fractional"):
        grey(tiff(path, [1, 2], bits=32, data=struct.pack("<2i", -5, 9), kind=2))


def test_fractions_are_colours_from_0_to_1_alone(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "ok.tif")
    Image.fromarray(np.array([[0, 7.5]], np.float32)).save(tmp_path / "depth.tif")

    assert grey(tmp_path / "ok.tif") == [0, 128, 255]
    assert problem(tmp_path / "depth.tif") == image_files.NO_COLOURS


def test_every_mode_becomes_rgb_and_transparency_lies_on_white(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"):
        suffix = "jpg" if mode in {"CMYK", "YCbCr"} else "tif"
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        Image.new(mode, (6, 4)).save(path)
        assert to_tensor(Resize(4)(read_image(path, 4))).shape == (3, 4, 4), mode
    Image.new("RGBA", (6, 6), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert to_tensor(Resize(4)(read_image(tmp_path / "clear.png", 4))).unique().tolist() == [255]


def test_an_image_is_turned_as_its_exif_says_and_the_first_of_several_is_read(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])

    assert read_image(tmp_path / "turned.jpg", 4).size == (4, 8)
    assert read_image(tmp_path / "two.gif", 4).getpixel((0, 0)) == (255, 0, 0)


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_that_is_still_large_enough(tmp_path):
    Image.new("RGB", (1600, 1200), "red").save(tmp_path / "large.jpg")

    assert read_image(tmp_path / "large.jpg", 64).size == (200, 150)
    assert read_image(tmp_path / "large.jpg", 1000).size == (1600, 1200)
