"""Augmentations by name: what each changes, and names and numbers that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.recipes.data.augmentations import AUGMENTATIONS, augmentations


def picture() -> Image.Image:
    values = np.arange(40 * 30 * 3).reshape(30, 40, 3) % 251
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_changes_a_picture_and_follows_the_seed(name):
    [augment] = augmentations([f"{name}:1"])

    torch.manual_seed(1)
    first = augment(picture())
    torch.manual_seed(1)
    again = augment(picture())

    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    changed = [augment(picture()).tobytes() != picture().tobytes() for _ in range(8)]
    assert any(changed)


def test_a_crop_keeps_at_least_its_share_of_the_area():
    [crop] = augmentations(["crop:0.5"])

    areas = [crop(Image.new("RGB", (100, 100))).size for _ in range(200)]

    shares = [width * height / 10_000 for width, height in areas]
    assert 0.48 < min(shares) < 0.55
    assert max(shares) > 0.9
    assert all(max(w, h) <= min(w, h) * 1.4 for w, h in areas)


def test_probabilities_are_those_of_the_number():
    flips = augmentations(["flip:0.25"])[0]

    flipped = [flips(picture()).tobytes() != picture().tobytes() for _ in range(400)]

    assert sum(flipped) / 400 == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("name", ["mixup", "crop:0", "crop:2", "crop:much", "flip:nan"])
def test_a_name_or_number_that_cannot_be_used_is_an_error(name):
    with pytest.raises(ValueError, match="augment must"):
        augmentations([name])
