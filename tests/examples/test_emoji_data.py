"""The emoji archive is whole, and its batches are what training and evaluation say they are."""

from __future__ import annotations

import gzip
import hashlib

import pytest
import torch

from diptych.engine import SeededLoader
from diptych.recipes.towers.small_towers import BUCKETS, tokenize
from examples.emoji.augment import NUMBER_OF_DRAWS, augment
from examples.emoji.data import (
    ARCHIVE,
    IMAGE_SIZE,
    STYLES,
    TrainingPairs,
    collate,
    evaluation_caption,
    training_drawings,
    unseen_drawings,
    unseen_emoji,
)
from examples.emoji.splits import UNSEEN_DRAWING, UNSEEN_EMOJI

DIGEST = "9d50bed9f454f15884dd0e3d38161b80e7d5e821bf4d81997396a2be0e079bc6"


@pytest.fixture(scope="module")
def pairs(emoji):
    return TrainingPairs(emoji)


def join(batches, side):
    """The rows of one side of evaluation batches, and their groups."""
    chosen = [batch for batch in batches if side in batch]
    return torch.cat([b[side] for b in chosen]), torch.cat([b["group"] for b in chosen])


def test_the_archive_is_the_one_that_the_readme_describes():
    assert hashlib.sha256(gzip.decompress(ARCHIVE.read_bytes())).hexdigest() == DIGEST
    assert DIGEST in (ARCHIVE.parent / "README.md").read_text("utf-8")
    assert sum(path.stat().st_size for path in ARCHIVE.parent.iterdir()) < 5_000_000


def test_every_emoji_has_two_drawings_a_name_and_a_category(emoji):
    assert len(emoji) == 1871
    for one in emoji:
        assert one.name
        assert one.category
        assert one.subcategory
        assert one.hexcode
        assert tuple(one.drawings) == STYLES
        for drawing in one.drawings.values():
            assert drawing.dtype == torch.uint8
            assert drawing.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
            assert drawing.float().std() > 1
    assert len({one.hexcode for one in emoji}) == len({one.name for one in emoji}) == 1871
    assert len({one.category for one in emoji}) == 9


def test_no_two_emoji_have_one_drawing(emoji):
    for style in STYLES:
        assert len({one.drawings[style].numpy().tobytes() for one in emoji}) == len(emoji)


def test_a_caption_in_training_changes_from_draw_to_draw(pairs):
    torch.manual_seed(0)
    drawn = {tuple(pairs[0]["text"].tolist()) for _ in range(20)}
    assert len(drawn) > 5


def test_a_caption_in_training_holds_the_name_and_only_its_own_keywords(emoji, pairs):
    for index in range(0, len(pairs), 97):
        one = emoji[pairs[index]["group"]]
        tokens = pairs[index]["text"].tolist()
        name = tokenize(one.name).tolist()
        kept = zip(tokens[: len(name)], name, strict=True)
        assert all(token in {0, expected} for token, expected in kept)
        own = {token for words in (one.name, *one.keywords) for token in tokenize(words).tolist()}
        assert set(tokens) <= {0, *own}


def test_a_fifth_of_a_captions_tokens_is_left_out_in_training(pairs):
    torch.manual_seed(0)
    tokens = torch.cat([pairs[index]["text"] for index in range(0, len(pairs), 10)])
    assert (tokens == 0).double().mean() == pytest.approx(0.2, abs=0.02)


def test_a_sample_is_a_function_of_torchs_global_generator_alone(pairs):
    def sample(seed):
        torch.manual_seed(seed)
        return pairs[3]

    first, again, other = sample(1), sample(1), sample(2)
    assert all(torch.equal(first[key], again[key]) for key in ("image", "draws", "text"))
    assert not torch.equal(first["draws"], other["draws"])


def test_the_two_drawings_of_an_emoji_are_one_group(emoji, pairs):
    for index, (number, style) in enumerate(training_drawings(emoji)):
        if index % 50 == 0:
            sample = pairs[index]
            assert sample["group"] == number
            assert torch.equal(sample["image"], emoji[number].drawings[style])


def test_a_training_batch_has_images_texts_and_groups(pairs):
    loader = SeededLoader(pairs, 8, collate=collate)
    batch = next(iter(loader))
    assert batch["image"].shape == (8, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["image"].dtype == torch.float32
    assert batch["text"].dtype == batch["group"].dtype == torch.int64
    assert len(batch["text"]) == len(batch["group"]) == 8


def test_augmentation_without_change_is_the_drawing(emoji):
    images = torch.stack([one.drawings["noto"] for one in emoji[:16]])
    middle = torch.full((16, NUMBER_OF_DRAWS), 0.5)
    torch.testing.assert_close(augment(images, middle), images / 255, atol=1e-5, rtol=0)


def test_augmentation_moves_in_white_and_treats_each_drawing_alone(emoji):
    images = torch.stack([one.drawings["noto"] for one in emoji[:16]])
    draws = torch.rand(16, NUMBER_OF_DRAWS, generator=torch.Generator().manual_seed(0))
    whole = augment(images, draws)
    torch.testing.assert_close(whole[5:6], augment(images[5:6], draws[5:6]))
    shifted = draws.clone()
    shifted[:, :] = 0.5
    shifted[:, 2] = 1.0  # the whole shift to one side
    moved = augment(torch.zeros_like(images), shifted)
    assert torch.equal(moved[:, :, :, 0], torch.zeros(16, 3, IMAGE_SIZE))
    assert torch.equal(moved[:, :, :, -1], torch.ones(16, 3, IMAGE_SIZE))


def test_unseen_drawings_stand_against_the_captions_of_all(emoji):
    images, groups = join(unseen_drawings(emoji), "image")
    texts, text_groups = join(unseen_drawings(emoji), "text")
    assert groups.tolist() == [i for i, one in enumerate(emoji) if one.split == UNSEEN_DRAWING]
    assert torch.equal(images[7], emoji[groups[7]].drawings["twemoji"] / 255)
    assert text_groups.tolist() == list(range(1871))
    assert len(texts) == 1871


def test_unseen_emoji_stand_against_the_captions_of_the_unseen(emoji):
    images, groups = join(unseen_emoji(emoji), "image")
    _, text_groups = join(unseen_emoji(emoji), "text")
    unseen = [i for i, one in enumerate(emoji) if one.split == UNSEEN_EMOJI]
    assert text_groups.tolist() == unseen
    assert groups.tolist() == [i for i in unseen for _ in STYLES]
    assert len(images) == 380


def test_a_caption_in_evaluation_holds_all_keywords_and_never_changes(emoji):
    first, again = (join(unseen_emoji(emoji), "text") for _ in range(2))
    assert torch.equal(first[0], again[0])
    row, number = first[0][0], int(first[1][0])
    expected = tokenize(" ".join([emoji[number].name, *emoji[number].keywords]))
    assert evaluation_caption(emoji[number]).startswith(emoji[number].name)
    assert torch.equal(row[: len(expected)], expected)
    assert not row[len(expected) :].any()


def test_tokens_are_words_and_trigrams_in_the_range_of_the_embedding():
    tokens = tokenize("Red heart!")
    # words: red, heart, !; trigrams: <re red ed>, <he hea ear art rt>, <!>
    assert len(tokens) == 3 + 3 + 5 + 1
    assert tokens.min() >= 1
    assert tokens.max() <= BUCKETS
    assert torch.equal(tokens, tokenize("red HEART !"))


def test_related_words_share_trigrams_and_others_do_not():
    ski, skis, dog = (set(tokenize(word).tolist()) for word in ("ski", "skis", "dog"))
    assert len(ski & skis) == 2
    assert not ski & dog
