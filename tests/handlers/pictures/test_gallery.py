"""The gallery of retrieval results."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych.engine import Trainer
from diptych.engine.errors import BatchError
from diptych.handlers import PairSamples, RetrievalGallery, TensorBoard
from diptych.handlers.pictures.gallery import evenly_spaced, ranks_of_best, similarity_of_groups
from diptych.handlers.pictures.pair_samples import PairFeatures
from tests.handlers.runs import loader, make_trainer

CAPTIONS = ["a red heart", "a dog", "a cat", "the sun"]


def fixed(_: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def samples(**changes: Any) -> PairSamples:
    """Return four pairs: the second and third text are each nearer to the other's image."""
    images = torch.eye(4)
    texts = images[[0, 2, 1, 3]] + 0.1 * images
    given: dict[str, Any] = {
        "batches": [{"image_features": images, "text_features": texts}],
        "images": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "captions": CAPTIONS,
        "task": fixed,
    }
    return PairSamples(**{**given, **changes})


def run(folder: Path, *, epochs: int = 1, **settings: Any) -> Trainer:
    gallery = RetrievalGallery(settings.pop("samples", None) or samples(), **settings)
    trainer = make_trainer().attach(TensorBoard(folder), gallery)
    trainer.run(loader(), max_epochs=epochs)
    return trainer


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_pictures_of_both_directions_and_the_matrix_are_drawn_before_training_and_each_epoch(
    tmp_path,
):
    from PIL import Image

    run(tmp_path, epochs=2)

    events = read(tmp_path)
    for tag in ("image_to_text", "text_to_image", "similarity"):
        pictures = events.Images(f"visual/gallery/{tag}")
        assert [picture.step for picture in pictures] == [0, 6, 12]
        with Image.open(io.BytesIO(pictures[0].encoded_image_string)) as image:
            assert min(image.size) > 100


def test_the_list_marks_what_is_right_and_names_the_rank(tmp_path):
    run(tmp_path, k=2, every=5)

    event = read(tmp_path).Tensors("visual/gallery/image_to_text/text_summary")[0]
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0].startswith("1. rank 1: **a red heart** | ")
    assert lines[1] == "2. rank 2: a cat | **a dog**"


def test_one_sided_batches_with_groups_need_not_pair_up(tmp_path):
    batches = [
        {"image_features": torch.eye(3), "groups": torch.tensor([7, 7, 5])},
        {"text_features": torch.eye(3)[:2], "groups": torch.tensor([5, 7])},
    ]
    given = samples(batches=batches, images=torch.zeros(3, 1, 4, 4), captions=["five", "seven"])

    features = given.features(make_trainer())

    assert features.image_groups.tolist() == [7, 7, 5]
    assert features.text_groups.tolist() == [5, 7]
    run(tmp_path, samples=given)


def test_samples_without_a_group_match_their_own_pair_alone():
    pairs = {"image_features": torch.eye(4), "text_features": torch.eye(4)}
    shown = samples(batches=[{**pairs, "groups": torch.tensor([3, -100, -100, 3])}])
    features = shown.features(make_trainer())
    matches = features.image_groups[:, None] == features.text_groups
    assert matches.tolist() == [[i == j or {i, j} == {0, 3} for j in range(4)] for i in range(4)]


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 10_000))
def test_the_rank_is_one_more_than_the_strangers_that_are_as_similar(queries, results, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(0, 4, (queries, results), generator=generator).float()
    matches = torch.rand(queries, results, generator=generator) < 0.3

    found = ranks_of_best(similarity, matches)

    for row, own, place in zip(similarity.tolist(), matches.tolist(), found, strict=True):
        right = [value for value, match in zip(row, own, strict=True) if match]
        wrong = [value for value, match in zip(row, own, strict=True) if not match]
        expected = 1 + sum(value >= max(right) for value in wrong) if right else None
        assert place == expected


def test_a_similarity_that_is_no_number_counts_against_the_match():
    similarity = torch.tensor([[0.5, torch.nan]])

    assert ranks_of_best(similarity, torch.tensor([[True, False]])) == [2]


def test_the_matrix_is_in_the_order_of_the_groups():
    features = PairFeatures(
        torch.eye(3), torch.eye(3)[[1, 0]], torch.tensor([9, 2, 4]), torch.tensor([2, 9])
    )

    assert torch.equal(similarity_of_groups(features), torch.eye(2))


@pytest.mark.parametrize(("count", "wanted"), [(3, 8), (8, 3), (1, 1), (100, 8)])
def test_queries_are_spread_over_the_samples_and_differ(count, wanted):
    chosen = evenly_spaced(count, wanted)

    assert len(set(chosen)) == min(count, wanted)
    assert all(0 <= index < count for index in chosen)


def test_captions_that_are_too_few_are_refused(tmp_path):
    with pytest.raises(BatchError, match="captions must be those of the batches, 4 in all, got 2"):
        run(tmp_path, samples=samples(captions=CAPTIONS[:2]))


def test_a_task_without_features_is_refused(tmp_path):
    with pytest.raises(BatchError, match="task of samples must return image_features, got x"):
        run(tmp_path, samples=samples(batches=[{"x": torch.eye(4)}]))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 3)])
def test_images_that_are_no_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be a tensor \[N, 1 to 4, H, W\], got"):
        samples(images=torch.zeros(shape))


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 3)])
def test_pairs_of_images_with_an_alpha_channel_are_drawn_without_it(channels, shown, tmp_path):
    images = torch.randint(256, (4, channels, 8, 8), dtype=torch.uint8)
    pictures = []
    for folder, part in (("all", images), ("shown", images[:, :shown])):
        run(tmp_path / folder, samples=samples(images=part))
        drawn = read(tmp_path / folder).Images("visual/gallery/text_to_image")
        pictures.append([event.encoded_image_string for event in drawn])
    assert pictures[0] == pictures[1] != []


def test_a_gallery_without_a_board_is_an_error_when_the_run_starts():
    trainer = make_trainer().attach(RetrievalGallery(samples()))

    with pytest.raises(ValueError, match="needs a TensorBoard among the trainer's handlers"):
        trainer.run(loader(), max_epochs=1)


def test_other_ranks_draw_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.handlers.pictures.board_handler.rank", lambda: 1)

    run(tmp_path)

    assert read(tmp_path).Tags()["images"] == []
