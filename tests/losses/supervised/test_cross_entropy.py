"""Cross entropy: torch's values over the labels that count, on any number of ranks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from diptych.losses import CrossEntropyLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks, assert_same_on_ranks

WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5])
LOGITS = draw(6, 4)
LABELS = torch.tensor([3, 0, -100, 1, 2, 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_value_and_gradient_are_torchs(weight: torch.Tensor | None, smoothing: float) -> None:
    results = []
    reference = weight if weight is None else weight.double()
    for function in (
        CrossEntropyLoss(weight=weight, label_smoothing=smoothing),
        partial(F.cross_entropy, weight=reference, label_smoothing=smoothing),
    ):
        logits = LOGITS.clone().requires_grad_()
        value = function(logits, LABELS)
        results.append((value.detach(), torch.autograd.grad(value, logits)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


def test_tokens_are_flattened_with_the_classes_last() -> None:
    logits, labels = draw(2, 3, 4), torch.tensor([[0, 1, 2], [3, -1, -1]])
    found = CrossEntropyLoss(ignore_index=-1)(logits, labels)
    expected = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_batch_with_only_ignored_labels_gives_zero_not_nan() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = CrossEntropyLoss(weight=WEIGHT)(logits, torch.full((6,), -100))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_each_rank_counts_by_its_labels(weight: torch.Tensor | None, ranks: Ranks) -> None:
    build = partial(CrossEntropyLoss, weight=weight, label_smoothing=0.1)
    assert_same_on_ranks(ranks, build, (LOGITS, LABELS))


def test_weights_and_smoothing_keep_the_contract() -> None:
    check_loss(lambda: CrossEntropyLoss(weight=torch.rand(8), label_smoothing=0.1))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (LOGITS[:, 0], LABELS, ValueError, r"logits must be \[batch, ..., classes\]"),
        (LOGITS.long(), LABELS, TypeError, "logits must be floating point"),
        (LOGITS, LABELS.float(), TypeError, "labels must be integers, got torch.float32"),
        (LOGITS, LABELS[:4], ValueError, r"\(6,\), got \(4,\). Put the classes last"),
    ],
)
def test_wrong_inputs_are_refused(
    logits: torch.Tensor, labels: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CrossEntropyLoss()(logits, labels)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\)"):
        CrossEntropyLoss(label_smoothing=-0.1)
    with pytest.raises(ValueError, match=r"weight must hold a number >= 0 for each class"):
        CrossEntropyLoss(weight=-WEIGHT)
