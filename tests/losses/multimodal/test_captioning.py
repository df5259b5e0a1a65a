"""CaptioningLoss against plain loops over tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from diptych.losses import CaptioningLoss, CLIPLoss, SigLIPLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, logits, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

PAD = 3


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return six pairs with captions of 1 to 5 tokens."""
    labels = torch.randint(8, (6, 5), generator=torch.Generator().manual_seed(2))
    labels = torch.where(labels == PAD, 7, labels)
    for row, length in enumerate((5, 1, 3, 4, 2, 5)):
        labels[row, length:] = PAD
    return draw(6, 8), draw(6, 8, seed=1), draw(6, 5, 8, seed=2), labels


def caption_loop(scores: Tensor, labels: Tensor) -> float:
    """Return the mean over tokens that are no pads of -log p(next token)."""
    return mean(
        lse(scores[b, t].tolist()) - float(scores[b, t, labels[b, t + 1]])
        for b in range(scores.shape[0])
        for t in range(scores.shape[1] - 1)
        if labels[b, t + 1] != PAD
    )


def clip_loop(first: Tensor, second: Tensor) -> float:
    """Return the mean over both directions of -log p(own pair)."""
    rows = logits(first, second, 0.07)
    directions = (rows, [list(column) for column in zip(*rows, strict=True)])
    return mean(lse(row) - row[i] for matrix in directions for i, row in enumerate(matrix))


def test_terms_are_clip_and_twice_the_cross_entropy_of_the_next_token() -> None:
    image, text, scores, labels = example()

    terms = CaptioningLoss(pad_id=PAD).terms(image, text, scores, labels)

    assert list(terms) == ["contrastive", "caption"]
    contrastive, caption = (float(term.detach()) for term in terms.values())
    assert contrastive == pytest.approx(clip_loop(image, text), rel=1e-12)
    assert caption == pytest.approx(2 * caption_loop(scores, labels), rel=1e-12)


def test_weights_scale_their_terms() -> None:
    inputs = example()
    once = CaptioningLoss(pad_id=PAD, caption_weight=1).terms(*inputs)

    thrice = CaptioningLoss(pad_id=PAD, contrastive_weight=3, caption_weight=0).terms(*inputs)

    torch.testing.assert_close(thrice["contrastive"], 3 * once["contrastive"])
    assert thrice["caption"] == 0


def test_a_batch_of_only_padding_has_no_caption_term() -> None:
    image, text, scores, labels = example()
    scores.requires_grad_()

    terms = CaptioningLoss(pad_id=PAD).terms(image, text, scores, torch.full_like(labels, PAD))
    sum(terms.values()).backward()

    assert terms["caption"] == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_captions_of_one_token_have_nothing_to_predict() -> None:
    image, text, scores, labels = example()

    terms = CaptioningLoss(pad_id=PAD).terms(image, text, scores[:, :1], labels[:, :1])

    assert terms["caption"] == 0


def test_an_end_token_that_is_the_padding_token_is_learned_from_labels_of_minus_100() -> None:
    image, text, scores, _ = example()
    ends = [[1, 2, PAD, -100, -100], [4, PAD, -100, -100, -100], [5, 6, 7, 1, PAD]] * 2
    labels = torch.tensor(ends)

    caption = CaptioningLoss(pad_id=None).terms(image, text, scores, labels)["caption"]

    expected = [
        lse(scores[b, t].tolist()) - float(scores[b, t, row[t + 1]])
        for b, row in enumerate(ends)
        for t in range(4)
        if row[t + 1] >= 0
    ]
    assert len(expected) == 14
    assert float(caption) == pytest.approx(2 * mean(expected), rel=1e-12)


def test_the_last_position_and_the_first_token_do_not_count() -> None:
    image, text, scores, labels = example()
    loss = CaptioningLoss(pad_id=PAD)
    value = loss(image, text, scores, labels)
    scores, labels = scores.clone(), labels.clone()
    scores[:, -1] += draw(6, 8, seed=5)
    labels[:, 0] = 1

    assert torch.equal(loss(image, text, scores, labels), value)


def test_each_rank_counts_by_its_tokens(ranks: Ranks) -> None:
    *features, labels = example()
    labels[:3, 2:] = PAD  # of the first rank's three captions one token each is left
    assert (labels[:3, 1:] != PAD).sum() < (labels[3:, 1:] != PAD).sum()

    assert_same_on_ranks(ranks, partial(CaptioningLoss, pad_id=PAD), (*features, labels))


def test_a_rank_with_only_padding_has_no_weight(ranks: Ranks) -> None:
    *features, labels = example()
    labels[:3] = PAD

    assert_same_on_ranks(ranks, partial(CaptioningLoss, pad_id=PAD), (*features, labels))


def test_groups_reach_the_contrastive_part() -> None:
    inputs, groups = example(), torch.tensor([0, 1, 0, 2, 1, 0])

    terms = CaptioningLoss().terms(*inputs, groups)

    torch.testing.assert_close(terms["contrastive"], CLIPLoss()(*inputs[:2], groups))


def test_the_contrastive_part_can_be_replaced() -> None:
    inputs = example()

    terms = CaptioningLoss(contrastive=SigLIPLoss()).terms(*inputs)

    torch.testing.assert_close(terms["contrastive"], SigLIPLoss()(*inputs[:2]))
    check_loss(lambda: CaptioningLoss(contrastive=SigLIPLoss()))


def test_the_temperature_is_learned_published_and_kept_within_its_bounds() -> None:
    loss = CaptioningLoss()
    (scale,) = loss.parameters()
    with torch.no_grad():
        scale.fill_(9.0)

    for module in loss.modules():
        getattr(module, "constrain", lambda: None)()

    assert float(scale.detach().exp()) == pytest.approx(100)
    assert float(loss.scalars()["contrastive/temperature"]) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (draw(6, 8), "labels must have the logits' shape without the classes"),
        (draw(5, 5, 8), "labels must have the logits' shape without the classes"),
        (draw(6, 5, 8).long(), "logits must be floating point"),
    ],
)
def test_wrong_logits_are_refused(scores: Tensor, sentence: str) -> None:
    image, text, _, labels = example()
    with pytest.raises((ValueError, TypeError), match=sentence):
        CaptioningLoss()(image, text, scores, labels)


def test_captions_of_another_batch_are_refused() -> None:
    image, text, scores, labels = example()
    with pytest.raises(
        ValueError, match=r"logits must be \[batch, tokens, classes\] with batch = 6"
    ):
        CaptioningLoss()(image, text, scores[:5], labels[:5])


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="caption_weight must be >= 0, got -1"):
        CaptioningLoss(caption_weight=-1)
    with pytest.raises(ValueError, match="contrastive_weight must be >= 0, got -2"):
        CaptioningLoss(contrastive_weight=-2)
