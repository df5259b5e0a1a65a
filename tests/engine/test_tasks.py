"""Tasks: what a batch and a model's output may look like, and what is said when they do not fit."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor, nn

from diptych.engine import BatchError, tasks

IMAGE, TEXT, GROUP = torch.randn(3, 4), torch.randn(3, 2), torch.tensor([0, 1, 0])


class Named(NamedTuple):
    image: Any
    text: Any
    group: Any = None


@attrs.frozen
class Slotted:
    image: Any
    text: Any
    group: Any = None


class Returns(nn.Module):
    """Returns what it is told, and notes what it was called with."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output, self.seen = output, None

    def forward(self, *inputs: Tensor) -> Any:
        self.seen = inputs
        return self.output(*inputs) if callable(self.output) else self.output


PAIR = (torch.ones(3, 8), torch.zeros(3, 8))
BATCHES = [
    {"image": IMAGE, "text": TEXT, "group": GROUP},
    OrderedDict(image=IMAGE, text=TEXT, group=GROUP),
    Named(IMAGE, TEXT, GROUP),
    Slotted(IMAGE, TEXT, GROUP),
    SimpleNamespace(image=IMAGE, text=TEXT, group=GROUP),
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_image_text_takes_a_batch_of_any_kind(batch):
    model = Returns(PAIR)
    outputs = tasks.image_text(model, batch)
    assert model.seen == (IMAGE, TEXT)
    assert list(outputs) == ["image_features", "text_features", "groups"]
    assert list(outputs.values()) == [*PAIR, GROUP]


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_third_part_without_a_name_is_a_group_only_where_it_is_said_to_be(kind):
    batch, model = kind([IMAGE, TEXT, GROUP]), Returns(PAIR)
    assert list(tasks.image_text(model, batch)) == ["image_features", "text_features"]
    assert model.seen == (IMAGE, TEXT)
    grouped = tasks.image_text.with_keys(group=2)(model, batch)
    assert grouped["groups"] is GROUP


def test_the_label_beside_two_views_does_not_tell_the_loss_which_views_match():
    views = tasks.two_views(Returns(lambda both: both), (IMAGE, IMAGE, GROUP))
    assert list(views) == ["first_features", "second_features"]


def test_a_tuple_for_hugging_face_holds_pixels_then_tokens():
    seen = {}

    class Model(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            seen.update(inputs)
            return PAIR

    mask = torch.ones(3, 2)
    tasks.huggingface.with_keys(mask=2)(Model(), (IMAGE, TEXT, mask))
    assert seen["pixel_values"] is IMAGE
    assert seen["input_ids"] is TEXT
    assert seen["attention_mask"] is mask


@pytest.mark.parametrize(
    "batch", [{"image": IMAGE, "text": TEXT}, (IMAGE, TEXT), Named(IMAGE, TEXT)], ids=str
)
def test_without_a_group_there_are_no_groups(batch):
    assert list(tasks.image_text(Returns(PAIR), batch)) == ["image_features", "text_features"]


@pytest.mark.parametrize(
    "output",
    [
        PAIR,
        list(PAIR),
        (*PAIR, torch.tensor(2.0)),
        {"text_features": PAIR[1], "image_features": PAIR[0], "logit_scale": torch.ones(())},
        {"text_embeds": PAIR[1], "image_embeds": PAIR[0], "loss": None},
        SimpleNamespace(image_embeds=PAIR[0], text_embeds=PAIR[1]),
    ],
    ids=["tuple", "list", "tuple of three", "open_clip", "hugging face", "object"],
)
def test_image_text_takes_a_models_output_of_any_kind(output):
    outputs = tasks.image_text(Returns(output), (IMAGE, TEXT))
    assert (outputs["image_features"], outputs["text_features"]) == PAIR


@pytest.mark.parametrize(
    ("output", "described"),
    [
        (torch.ones(3, 8), r"float32 \[3, 8\]"),
        ((PAIR[0],), "a tuple of 1 tensors"),
        (
            {"image_features": PAIR[0], "logits": None},
            "{'image_features': float32 .*, 'logits': a None",
        ),
        (None, "a NoneType"),
    ],
)
def test_an_output_that_does_not_fit_is_described(output, described):
    with pytest.raises(BatchError, match=f"model must return.*got {described}"):
        tasks.image_text(Returns(output), (IMAGE, TEXT))


def test_with_keys_renames_by_key_or_index():
    task = tasks.image_text.with_keys(image="pixels", text="tokens", group="cluster")
    batch = {"pixels": IMAGE, "tokens": TEXT, "cluster": GROUP}
    assert list(task(Returns(PAIR), batch)) == ["image_features", "text_features", "groups"]
    swapped = tasks.image_text.with_keys(image=1, text=0)
    model = Returns(PAIR)
    swapped(model, (TEXT, IMAGE))
    assert model.seen == (IMAGE, TEXT)
    assert tasks.image_text.image == "image"


def test_with_keys_refuses_a_part_that_is_none():
    with pytest.raises(TypeError, match="which are image, text, group, got caption"):
        tasks.image_text.with_keys(caption="text")


@pytest.mark.parametrize(
    ("batch", "present"),
    [
        ({"image": IMAGE, "label": GROUP}, "'image', 'label'"),
        ((IMAGE,), "1 parts without names"),
        (Named(IMAGE, None), "'image', 'text', 'group'"),
        (Slotted(IMAGE, None), "'image', 'text', 'group'"),
        (SimpleNamespace(image=IMAGE, _hidden=1), "'image'"),
    ],
)
def test_a_missing_key_is_named_beside_those_present(batch, present):
    with pytest.raises(BatchError, match=f"must have 'text', got {present}.*with_keys"):
        tasks.image_text(Returns(PAIR), batch)
    with pytest.raises(BatchError, match="must have 'image', got nothing"):
        tasks.image_text(Returns(PAIR), {})


def test_two_views_of_one_shape_go_through_together():
    model = Returns(lambda x: x * 2)
    first, second = torch.randn(2, 3, 4)
    outputs = tasks.two_views(model, (first, second))
    assert len(model.seen[0]) == 6
    assert list(outputs) == ["first_features", "second_features"]
    assert outputs["first_features"].equal(first * 2)
    assert outputs["second_features"].equal(second * 2)


def test_two_views_of_different_shapes_go_through_one_by_one():
    model = Returns(lambda x: x.mean(1))
    first, second = torch.randn(3, 4), torch.randn(3, 6)
    outputs = tasks.two_views(model, {"first": first, "second": second, "group": GROUP})
    assert outputs["second_features"].equal(second.mean(1))
    assert outputs["groups"] is GROUP


def test_classification_gives_logits_and_labels():
    labels = torch.tensor([1, 0, 1])
    outputs = tasks.classification(Returns(lambda x: x), {"image": IMAGE, "label": labels})
    assert list(outputs) == ["logits", "labels"]
    assert outputs["logits"] is IMAGE
    assert outputs["labels"] is labels


@pytest.mark.parametrize("kind", ["mapping", "tuple"])
def test_next_token_pairs_each_position_with_the_token_after_it(kind):
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    batch = {"mapping": {"tokens": tokens}, "tuple": (tokens,)}[kind]
    outputs = tasks.next_token(Returns(lambda t: nn.functional.one_hot(t, 9).float()), batch)
    assert outputs["logits"].argmax(-1).tolist() == [[1, 2, 3], [5, 6, 7]]
    assert outputs["labels"].tolist() == [[2, 3, 4], [6, 7, 8]]


def test_crops_of_one_size_go_through_together_and_the_large_ones_through_the_target():
    large, small = torch.randn(3, 2, 4), torch.randn(3, 5, 2)
    model = Returns(lambda crops: crops[:, :2])
    outputs = tasks.multi_crop(model, {"large": large, "small": small, "group": GROUP})
    assert list(outputs) == ["features", "groups"]
    assert torch.equal(outputs["features"], torch.cat([large[..., :2], small], dim=1))
    assert torch.equal(model.seen[0], small.flatten(0, 1))

    model.target = nn.Linear(4, 2)
    outputs = tasks.multi_crop(model, {"large": large})
    assert list(outputs) == ["student", "teacher"]
    torch.testing.assert_close(outputs["teacher"], model.target(large).detach())
    assert not outputs["teacher"].requires_grad


def test_crops_that_are_not_stacked_are_an_error():
    crops = [torch.randn(3, 4), torch.randn(3, 4)]
    with pytest.raises(BatchError, match=r"large and small must be tensors .* a list of 2 tensors"):
        tasks.multi_crop(Returns(), {"large": crops})


@pytest.mark.parametrize("task", [tasks.two_views, tasks.classification, tasks.next_token])
def test_a_model_that_returns_several_things_is_described(task):
    batch = dict.fromkeys(("first", "second", "image", "label", "tokens"), IMAGE)
    with pytest.raises(BatchError, match=r"must return one tensor .*got a tuple of 2"):
        task(Returns(PAIR), batch)


class ByKeywords(nn.Module):
    """Called as the models of transformers are; the mask scales the text where there is one."""

    def forward(self, input_ids, pixel_values, attention_mask=None):
        text = input_ids if attention_mask is None else input_ids * attention_mask
        return {"text_embeds": 2 * text, "image_embeds": 3 * pixel_values}


@pytest.mark.parametrize("masked", [True, False])
def test_huggingface_calls_the_model_by_keywords(masked):
    batch = {"input_ids": torch.ones(2, 3), "pixel_values": torch.ones(2, 3)}
    extra = {"attention_mask": torch.zeros(2, 3), "group": torch.arange(2)} if masked else {}
    outputs = tasks.huggingface(ByKeywords(), batch | extra)
    assert torch.equal(outputs["image_features"], 3 * batch["pixel_values"])
    assert torch.equal(outputs["text_features"], torch.full((2, 3), 0.0 if masked else 2.0))
    assert ("groups" in outputs) == masked
