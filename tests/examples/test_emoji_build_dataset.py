"""The archive is a function of the packages that it is built from."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image, ImageDraw

from examples.emoji.build_dataset import (
    KEPT_TWINS,
    add_splits,
    drop_twins,
    read_entries,
    write_archive,
)
from examples.emoji.data import read_emoji

CAT = {"unified": "1F408", "image": "1f408.png", "has_img_google": True, "has_img_twitter": True}
HEART = {
    "unified": "2764-FE0F",
    "image": "2764.png",
    "has_img_google": True,
    "has_img_twitter": True,
}
UNDRAWN = {"unified": "1F9FF", "image": "x.png", "has_img_google": True, "has_img_twitter": False}
TONE = {"unified": "1F3FB", "image": "1f3fb.png", "has_img_google": True, "has_img_twitter": True}
LABELS = [
    {"hexcode": "1F408", "label": "cat", "tags": ["pet"], "group": 3, "subgroup": 34, "order": 2},
    {"hexcode": "2764", "label": "red heart", "group": 0, "subgroup": 14, "order": 1},
    {"hexcode": "1F9FF", "label": "amulet", "group": 0, "subgroup": 14, "order": 3},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2, "subgroup": 32, "order": 4},
]
GROUPS = {
    "groups": {"0": "smileys-emotion", "2": "component", "3": "animals-nature"},
    "subgroups": {"14": "heart", "32": "skin-tone", "34": "animal-mammal"},
}


def draw_shape(color, corner):
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).rectangle((corner, corner, 60, 60), fill=color)
    return image


@pytest.fixture
def packages(tmp_path):
    """Folders with the layout of the unpacked packages, four emoji in each."""
    colors = {"google": {"1f408": "orange", "2764": "red"}, "twitter": {"1f408": "brown"}}
    folders = {"noto": tmp_path / "google", "twemoji": tmp_path / "twitter"}
    for folder in folders.values():
        images = folder / "img" / folder.name / "64"
        images.mkdir(parents=True)
        (folder / "emoji.json").write_text(json.dumps([CAT, HEART, UNDRAWN, TONE]))
        for corner, name in enumerate(("1f408", "2764", "1f3fb"), start=4):
            color = colors[folder.name].get(name, "blue")
            draw_shape(color, 5 * corner).save(images / f"{name}.png")
    emojibase = tmp_path / "emojibase"
    (emojibase / "en").mkdir(parents=True)
    (emojibase / "meta").mkdir()
    (emojibase / "en/data.json").write_text(json.dumps(LABELS))
    (emojibase / "meta/groups.json").write_text(json.dumps(GROUPS))
    return folders, emojibase


def build(packages, path):
    folders, emojibase = packages
    entries = sorted(read_entries(folders, emojibase), key=lambda entry: entry.order)
    return write_archive(add_splits(entries), path)


def test_building_twice_gives_the_same_bytes(packages, tmp_path):
    first, second = tmp_path / "first.tar.gz", tmp_path / "second.tar.gz"
    assert build(packages, first) == build(packages, second)
    assert first.read_bytes() == second.read_bytes()


def test_what_was_built_reads_back(packages, tmp_path):
    build(packages, tmp_path / "emoji.tar.gz")
    heart, cat = read_emoji(tmp_path / "emoji.tar.gz")
    assert (heart.name, heart.keywords, heart.subcategory) == ("red heart", [], "heart")
    assert (cat.name, cat.keywords, cat.category) == ("cat", ["pet"], "animals-nature")
    assert cat.drawings["noto"][:, 0, 0].tolist() == [255, 255, 255]
    assert cat.drawings["noto"][:, 20, 20].tolist() == [255, 165, 0]
    assert cat.drawings["twemoji"][:, 20, 20].tolist() == [165, 42, 42]


def test_skin_tones_and_what_one_style_lacks_are_left_out(packages):
    assert {entry.hexcode for entry in read_entries(*packages)} == {"1F408", "2764"}


def test_members_of_a_sample_follow_one_another_and_hold_no_time_or_owner(packages, tmp_path):
    build(packages, tmp_path / "emoji.tar.gz")
    with tarfile.open(tmp_path / "emoji.tar.gz") as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:3]] == ["2764.noto.png", "2764.twemoji.png", "2764.json"]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        png = archive.extractfile(members[0])
        assert png is not None
        assert Image.open(io.BytesIO(png.read())).mode == "P"


def test_twins_keep_the_one_that_the_script_names(packages, monkeypatch):
    cat, heart = read_entries(*packages)
    heart.sources["noto"] = cat.sources["noto"]
    monkeypatch.setattr("examples.emoji.build_dataset.KEPT_TWINS", {"1F408"})
    assert drop_twins([cat, heart]) == [cat]


def test_twins_that_the_script_does_not_name_are_an_error(packages):
    cat, heart = read_entries(*packages)
    heart.sources["noto"] = cat.sources["noto"]
    assert not {cat.hexcode, heart.hexcode} & KEPT_TWINS
    with pytest.raises(ValueError, match=r"KEPT_TWINS must name one emoji .*1F408.*2764"):
        drop_twins([cat, heart])
