"""Thumbnails, sheets and heat maps, looked at pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from diptych.handlers.pictures.drawing import (
    COLOR_SCALE,
    QueryResults,
    RetrievedItem,
    _font,
    _shortened,
    as_bytes,
    draw_results,
    heat_map,
    image_grid,
    thumbnails,
)

GREEN = torch.tensor([26, 152, 80], dtype=torch.uint8)


def has_green(picture: torch.Tensor) -> bool:
    return bool((picture == GREEN[:, None, None]).all(0).any())


def test_floats_and_bytes_give_the_same_picture():
    whole = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)

    assert torch.equal(as_bytes(whole.float() / 255), as_bytes(whole))
    assert as_bytes(whole).shape == (1, 3, 16, 16)


def test_what_is_out_of_range_or_no_number_is_drawn_all_the_same():
    image = torch.tensor([-1.0, 2.0, torch.nan]).view(1, 1, 1, 3)

    assert as_bytes(image)[0, 0].tolist() == [[0, 255, 0]]


@pytest.mark.parametrize("size", [(4, 8), (200, 100), (48, 48)])
def test_a_thumbnail_shows_the_whole_image_on_white(size):
    shown = thumbnails(torch.zeros(1, 3, *size), 48)[0]

    inside = size[0] * size[1] * (48 / max(size)) ** 2
    assert shown.shape == (3, 48, 48)
    assert (shown[0] == 0).sum() == inside
    assert (shown[0] == 255).sum() == 48 * 48 - inside


@pytest.mark.parametrize("content", [torch.rand(3, 8, 8), "a caption that is rather long " * 9])
def test_a_right_result_is_green_and_a_wrong_one_is_not(content):
    def row(*, right: bool) -> torch.Tensor:
        return draw_results([QueryResults("query", 3, [RetrievedItem(content, right)])])

    assert has_green(row(right=True))
    assert not has_green(row(right=False))


@pytest.mark.parametrize("width", [0, 20, 100, 190])
def test_a_text_is_cut_to_the_longest_beginning_that_fits(width):
    text = "woman getting a haircut, and what else one may say of it"

    cut = _shortened(text, width)

    longer = text[: len(cut) - 2] + "..."
    assert text.startswith(cut.removesuffix("..."))
    assert cut == "..." or _font().getlength(cut) <= width
    assert _font().getlength(longer) > width


def test_a_text_that_fits_is_left_whole():
    assert _shortened("a  red\nheart", 190) == "a red heart"


def test_queries_are_lines_of_one_height():
    row = QueryResults(
        torch.rand(3, 8, 8), None, [RetrievedItem("a", False), RetrievedItem("b", True)]
    )

    assert draw_results([row] * 3).shape[1] == 3 * draw_results([row]).shape[1]


def test_a_heat_map_goes_from_dark_to_light():
    picture = heat_map(torch.tensor([[-1.0, 0.0], [1.0, torch.nan]]), side=2)

    assert picture[:, 0, 0].tolist() == list(COLOR_SCALE[0])
    assert picture[:, 0, 1].tolist() == list(COLOR_SCALE[0])
    assert picture[:, 1, 0].tolist() == list(COLOR_SCALE[-1])


def test_tiles_fill_lines_from_the_left():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1)

    assert image_grid(images, 2, gap=0)[0].tolist() == [[0, 1], [2, 255]]


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (13, 3)])
def test_images_of_any_number_of_channels_have_a_thumbnail(channels: int, shown: int) -> None:
    images = torch.rand(1, channels, 8, 8)
    expected = (images[:, :shown] * 255).round().to(torch.uint8).expand(1, 3, 8, 8)
    assert torch.equal(thumbnails(images, 8), expected)
    assert thumbnails(images > 0.5, 8).unique().tolist() == [0, 255]
