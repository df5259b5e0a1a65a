"""A failed forward pass names the part of the model and of the batch that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import BatchError, Evaluator, Trainer, tasks
from diptych.engine.forward_faults import described, raise_likely_cause
from diptych.losses import CLIPLoss


class Tokenizing(nn.Module):
    """Takes captions as strings; its second layer fits only words of two letters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, image: Tensor, text: list[str]) -> tuple[Tensor, Tensor]:
        letters = torch.tensor([[float(ord(letter)) for letter in word] for word in text])
        return self.first(image), self.second(letters)


def make_trainer(model: nn.Module) -> Trainer:
    loss = CLIPLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    return Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu")


def batch_of(*words: str) -> dict[str, object]:
    return {"image": torch.randn(len(words), 3), "text": list(words)}


def test_a_model_that_takes_strings_gets_them():
    make_trainer(Tokenizing()).run([batch_of("ab", "cd")])


def test_the_innermost_part_that_fails_is_named_not_what_another_one_takes():
    with pytest.raises(BatchError) as caught:
        make_trainer(Tokenizing()).run([batch_of("abc", "def")])
    assert str(caught.value) == (
        "the input of second (Linear) must have 2 numbers in its last dimension for second "
        "(Linear), got float32 [2, 3]. Flatten it, or build the model for this size"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("expected", [BatchError, RuntimeError, TypeError, ValueError, IndexError])
def test_code_that_expects_what_torch_raises_catches_it(expected):
    with pytest.raises(expected):
        make_trainer(Tokenizing()).run([batch_of("abc", "def")])


def test_an_evaluation_names_the_part_too():
    evaluator = Evaluator(Tokenizing(), task=tasks.image_text, device="cpu")
    with pytest.raises(BatchError, match=r"the input of second \(Linear\) must have 2 numbers"):
        evaluator.evaluate([batch_of("abc", "def")])


def test_an_error_of_another_cause_is_left_as_it_is_with_the_inputs_in_a_note():
    model = Tokenizing()
    with pytest.raises(ValueError, match="expected sequence of length 2") as caught:
        make_trainer(model).run([batch_of("ab", "c")])
    assert not isinstance(caught.value, BatchError)
    if hasattr(caught.value, "__notes__"):  # from Python 3.11 on
        assert caught.value.__notes__ == [
            "the model (Tokenizing) was called with float32 [2, 3], a list of 2 strings. The "
            "batch: {'image': float32 [2, 3], 'text': a list of 2 strings}."
        ]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), BatchError("named"), KeyboardInterrupt()]
)
def test_exceptions_that_others_handle_or_that_are_named_are_left(error):
    raise_likely_cause(error, nn.Linear(1, 1), {"image": ["a"]})


class Failing(nn.Module):
    """Has a float32 parameter and a tensor that is not moved, and raises what it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.positions = error, nn.Parameter(torch.zeros(4))
        self.table = torch.zeros(3, device="meta")

    def forward(self, *, batch: object, words: object = None) -> Tensor:
        raise self.error


class TooSmallError(ValueError):
    """An error of the user, who may look for it."""


@pytest.mark.parametrize(
    ("error", "batch"),
    [
        (AttributeError("'Failing' object has no attribute 'encodr'"), {"image": 1}),
        (ValueError("the image is too small"), {"image": 1}),
        (IndexError("list index out of range"), ["a"]),
        (TooSmallError("a 'list' is too small"), ["a"]),
        (TypeError("add(): argument 'other' must be Tensor, not str"), torch.zeros(2)),
        (RuntimeError("The size of tensor a (7) must match tensor b"), torch.zeros(2, 7).long()),
        (RuntimeError("CUDA error: device-side assert triggered"), torch.zeros(2)),
    ],
)
def test_what_a_module_of_the_user_raises_for_reasons_of_its_own_is_left(error, batch):
    model = Failing(error)
    with pytest.raises(type(error)) as caught:
        model(batch=batch, words=batch)
    raise_likely_cause(caught.value, model, batch)


def test_an_input_that_cannot_be_looked_at_leaves_the_error_as_it_is():
    class Awkward(nn.BatchNorm1d):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            raise RuntimeError(f"{image.ndim} and {text.ndim} dimensions")

    batch = {"image": torch.zeros(2), "text": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="1 and 1 dimensions") as caught:
        make_trainer(Awkward(2)).run([batch])
    assert not isinstance(caught.value, BatchError)


def test_a_description_has_no_numbers_of_a_tensor():
    batch = {"image": torch.randn(2, 3), "views": [torch.zeros(2), torch.zeros(3)], "names": ("a",)}
    assert described(batch) == (
        "{'image': float32 [2, 3], 'views': a list of 2 tensors, 'names': a tuple of 1 strings}"
    )
