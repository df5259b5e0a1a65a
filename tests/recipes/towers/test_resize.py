"""The resize of a tower's images: against Pillow's resize and crop, and the libraries' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.recipes.data.image_files import to_tensor
from diptych.recipes.towers.parts import TowerOptions
from diptych.recipes.towers.registry import build_towers
from diptych.recipes.towers.resize import Resize


def waves(width: int, height: int) -> Image.Image:
    """Return an image away from black and white: which pass Pillow makes first shows there."""
    x, y = np.arange(width), np.arange(height)[:, None]
    values = [128 + 90 * np.sin(x / a + y / b) for a, b in ((5, 9), (7, 4), (11, 6))]
    return Image.fromarray(np.stack(values, axis=2).round().astype(np.uint8))


@pytest.mark.parametrize("shape", [(60, 41), (41, 60), (20, 20), (9, 30)])
@pytest.mark.parametrize("kept", [1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_is_that_of_the_whole_resized_image(shape, kept, interpolation):
    image, side = waves(*shape), int(16 / kept)
    ratio = side / min(shape)
    whole = image.resize(
        (int(shape[0] * ratio + 1e-9), int(shape[1] * ratio + 1e-9)),
        Image.Resampling[interpolation.upper()],
    )
    left, top = (round((length - 16) / 2) for length in whole.size)

    found = Resize(16, interpolation=interpolation, kept=kept)(image)

    expected = whole.crop((left, top, left + 16, top + 16))
    difference = to_tensor(found).int() - to_tensor(expected).int()
    assert difference.abs().max() <= 1


def test_squash_and_pad_keep_the_whole_image():
    image = Image.new("RGB", (40, 20), "red")

    squashed = Resize(10, mode="squash")(image)
    padded = to_tensor(Resize(10, mode="pad", fill=7)(image))

    assert squashed.getcolors() == [(100, (255, 0, 0))]
    assert padded[0, :, 0].tolist() == [7] * 2 + [255] * 5 + [7] * 3
    assert padded[1, :, 0].tolist() == [7] * 2 + [0] * 5 + [7] * 3


def test_a_long_thin_image_takes_no_more_memory_than_others():
    assert Resize(224)(Image.new("RGB", (60_000, 1), "red")).size == (224, 224)


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", 0), ("size", 2.5), ("kept", 0.0), ("mode", "stretch"), ("fill", 256)],
)
def test_a_value_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Resize(**{"size": 16, name: value})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["timm:vit_tiny_patch16_224", "timm:efficientnet_b0", "open_clip:ViT-B-32"]
)
def test_the_pixels_are_those_of_the_librarys_own_transform(name):
    pytest.importorskip("torchvision")
    library, model = name.split(":")
    package = pytest.importorskip(library)
    if library == "timm":
        settings = package.data.resolve_model_data_config(package.create_model(model))
        theirs = package.data.create_transform(**settings, is_training=False)
    else:
        _, _, theirs = package.create_model_and_transforms(model)
    image = waves(500, 333)

    tower = build_towers(name, None, TowerOptions()).image

    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (tower.mean, tower.std))
    found = theirs(image) * std + mean
    expected = to_tensor(tower.resize(image)) / 255
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255)
