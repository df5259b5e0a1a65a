"""The emoji by category, in pairs of views, and as words and characters."""

from __future__ import annotations

import torch

from examples.emoji import characters, labels, names
from examples.emoji.augment import NUMBER_OF_DRAWS, augment
from examples.emoji.data import STYLES, training_drawings
from examples.emoji.splits import SEEN, UNSEEN_DRAWING, UNSEEN_EMOJI


def test_a_label_is_the_place_of_the_category(emoji):
    categories = labels.category_names(emoji)
    drawings = [(0, "noto"), (700, "noto")]
    (batch,) = labels.labelled_batches(emoji, drawings)
    assert [categories[label] for label in batch["label"]] == [
        emoji[i].category for i, _ in drawings
    ]
    assert torch.equal(batch["image"][1], emoji[700].drawings["noto"] / 255)
    assert len(categories) == 9


def test_what_is_probed_was_never_trained_on(emoji):
    trained = {i for i, _ in training_drawings(emoji)}
    probed = {i for i, _ in labels.unseen_emoji_drawings(emoji)}
    assert trained.isdisjoint(probed)
    assert {emoji[i].family for i in trained}.isdisjoint(emoji[i].family for i in probed)


def test_a_constant_answer_is_right_for_the_largest_category():
    batches = [{"label": torch.tensor([0, 1, 1])}, {"label": torch.tensor([2, 1])}]
    assert labels.largest_share(batches) == 0.6


def test_views_are_drawings_of_one_emoji_that_training_has(emoji):
    few = [one for one in emoji if one.split != SEEN][:8]
    views = labels.ManyViews(few)
    assert len(views) == sum(one.split != UNSEEN_EMOJI for one in few)
    torch.manual_seed(0)
    for index in range(len(views)):
        sample = views[index]
        own = few[sample["group"]]
        assert own.split == UNSEEN_DRAWING  # so it has one drawing, which is both views
        assert all(torch.equal(image, own.drawings[STYLES[0]]) for image in sample["image"])


def test_views_of_an_emoji_with_two_drawings_are_both_at_times(emoji):
    seen = next(one for one in emoji if one.split == SEEN)
    views = labels.ManyViews([seen])
    torch.manual_seed(0)
    pairs = [views[0]["image"] for _ in range(20)]
    different = [not torch.equal(*pair) for pair in pairs]
    assert any(different)
    assert not all(different)


def test_a_batch_of_views_is_augmented_view_by_view(emoji):
    views = labels.ManyViews(emoji[:4])
    torch.manual_seed(0)
    batch = labels.collate_views([views[i] for i in range(len(views))])
    assert batch["first"].shape == batch["second"].shape == (len(views), 3, 32, 32)
    assert not torch.equal(batch["first"], batch["second"])
    assert batch["group"].tolist() == list(range(len(views)))


def test_the_first_two_views_are_the_large_crops_and_the_others_are_zoomed(emoji):
    views = labels.ManyViews(emoji[:3], 5)
    samples = [views[i] for i in range(3)]
    batch = labels.collate_crops(samples, zoom=2)
    for view in range(5):
        images, draws = (torch.stack([s[key][view] for s in samples]) for key in ("image", "draws"))
        crop = batch["large"][:, view] if view < 2 else batch["small"][:, view - 2]
        torch.testing.assert_close(crop, augment(images, draws, zoom=1 if view < 2 else 2))


def test_a_zoom_of_two_fills_the_image_with_the_inner_half():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[:, :, 8:24, 8:24] = 255
    still = torch.full((1, NUMBER_OF_DRAWS), 0.5)
    assert augment(image, still).mean() < 0.3
    assert augment(image, still, zoom=2)[:, :, 2:-2, 2:-2].min() > 0.99


def test_labelled_drawings_come_with_their_labels(emoji):
    few = emoji[::300]
    drawings = labels.LabelledDrawings(few)
    batch = labels.collate_labelled([drawings[i] for i in range(len(drawings))])
    expected = [
        labels.category_names(few).index(few[i].category) for i, _ in training_drawings(few)
    ]
    assert batch["label"].tolist() == expected
    assert batch["image"].dtype == torch.float32


def test_characters_come_back_and_rare_ones_are_marked():
    assert (
        characters.decode(characters.encode("Red heart: love, like & 1"))
        == "red heart: love, like & 1"
    )
    assert characters.decode(characters.encode("piñata!")) == "pi?ata?"
    assert characters.encode("a").tolist() == [characters.EDGE, 3, characters.EDGE]
    assert int(characters.encode(characters.ALPHABET).max()) == characters.CHARACTERS - 1


def test_words_come_back_and_unknown_ones_are_marked(emoji):
    seen = [one for one in emoji[:20] if one.split == SEEN]
    words = names.Words(seen)
    tokens = words.encode(f"{seen[0].name}: xyzzy")
    assert words.decode(tokens) == f"{seen[0].name} ?"
    assert int(max(words.encode(one.name).max() for one in seen)) < len(words)


def test_a_named_drawing_carries_its_own_name(emoji):
    few = emoji[::200]
    words = names.Words(few)
    drawings = names.NamedDrawings(few, words)
    batch = names.collate_named([drawings[i] for i in range(len(drawings))])
    for group, tokens in zip(batch["group"], batch["tokens"], strict=True):
        assert words.decode(tokens) == " ".join(names.split(few[group].name))
