"""ImageTextMatchingLoss: its draw of mismatches, its value, and equality across ranks."""

from __future__ import annotations

import bisect
import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych.losses import FusionHead, ImageTextMatchingLoss
from diptych.losses.contract import Case, check_loss
from diptych.losses.multimodal.fusion import _sample
from tests.losses.oracles import cosine, draw, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks, split

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0])


def inner_product(image: Tensor, text: Tensor) -> Tensor:
    """Fuse without parameters: the logit of "matches" is the inner product."""
    score = (image * text).sum(-1)
    return torch.stack([torch.zeros_like(score), score], dim=-1)


class Recorder(nn.Module):
    """A fusion that keeps the pairs that it was called with."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        self.pairs = image.detach(), text.detach()
        return inner_product(image, text)


def drawn(loss: ImageTextMatchingLoss, groups: Tensor | None = None, size: int = 6) -> list[int]:
    """Return the indices that a call draws: texts for images, then images for texts."""
    features = torch.eye(size, dtype=torch.float64)  # equally dissimilar, identified by their one
    loss(features, features, groups)
    images, texts = loss.fusion.pairs
    return [*texts[size : 2 * size].argmax(1).tolist(), *images[2 * size :].argmax(1).tolist()]


def draw_loop(own: Tensor, others: Tensor, groups: Tensor, numbers: Tensor) -> list[int | None]:
    """Draw by adding up probabilities until the number is passed; None: nothing to draw."""
    found = []
    for i, number in enumerate(numbers.tolist()):
        allowed = [j for j in range(len(others)) if groups[j] != groups[i]]
        if not allowed:
            found.append(None)
            continue
        logit = [cosine(own[i].tolist(), others[j].tolist()) / 0.07 for j in allowed]
        share = [math.exp(x - lse(logit)) for x in logit]
        found.append(allowed[bisect.bisect_right(list(itertools.accumulate(share)), number)])
    return found


@pytest.mark.parametrize("groups", [None, GROUPS, torch.zeros(6, dtype=torch.int64)])
def test_value_is_the_cross_entropy_of_matches_and_drawn_mismatches(groups: Tensor | None) -> None:
    image, text = draw(6, 5), draw(6, 5, seed=1)
    ids = torch.arange(6) if groups is None else groups
    numbers = torch.rand(2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    texts, images = draw_loop(image, text, ids, numbers[0]), draw_loop(text, image, ids, numbers[1])
    pairs = [(i, i, True) for i in range(6)]
    pairs += [(i, j, False) for i, j in enumerate(texts) if j is not None]
    pairs += [(j, i, False) for i, j in enumerate(images) if j is not None]
    values = []
    for i, j, matches in pairs:
        score = math.fsum(a * b for a, b in zip(image[i].tolist(), text[j].tolist(), strict=True))
        values.append(lse([0.0, score]) - (score if matches else 0.0))

    generator = torch.Generator().manual_seed(4)
    value = ImageTextMatchingLoss(fusion=inner_product, generator=generator)(image, text, groups)

    assert float(value) == pytest.approx(mean(values), rel=1e-13)


def test_draws_follow_the_softmax_of_similarity() -> None:
    logits = draw(1, 5).expand(10_000, 5)
    allowed = torch.tensor([[True, True, False, True, True]]).expand(10_000, 5)
    evenly = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000

    counts = torch.bincount(_sample(logits, allowed, evenly), minlength=5)

    weights = [math.exp(x) if j != 2 else 0.0 for j, x in enumerate(logits[0].tolist())]
    expected = [10_000 * w / math.fsum(weights) for w in weights]
    assert counts.tolist() == pytest.approx(expected, abs=1)


@given(
    seed=st.integers(0, 2**31),
    number=st.sampled_from([0.0, 0.5, 1 - 2**-53, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    spread=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_a_draw_is_always_an_allowed_column(
    seed: int, number: float, dtype: torch.dtype, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(4, 9, generator=generator, dtype=dtype)
    allowed = torch.rand(4, 9, generator=generator) < 0.3
    allowed[:, int(seed % 9)] = True

    found = _sample(logits, allowed, torch.full((4,), number, dtype=dtype))

    assert bool(allowed.gather(1, found[:, None]).all())


def test_no_pair_of_one_group_is_drawn() -> None:
    loss = ImageTextMatchingLoss(fusion=Recorder())
    ids = GROUPS.tolist()

    for _ in range(50):
        found = drawn(loss, GROUPS)
        assert all(ids[i % 6] != ids[j] for i, j in enumerate(found))


def test_the_hardest_are_drawn_when_the_temperature_is_low() -> None:
    image, text = draw(6, 5), draw(6, 5, seed=1)
    loss = ImageTextMatchingLoss(fusion=Recorder(), temperature=1e-4)

    loss(image, text)

    similarity = nn.functional.normalize(image) @ nn.functional.normalize(text).T
    hardest = similarity.fill_diagonal_(-2).argmax(1)
    assert torch.equal(loss.fusion.pairs[1][6:12], text[hardest])


def test_equal_generators_draw_the_same_and_calls_differ() -> None:
    first, second = (
        ImageTextMatchingLoss(fusion=Recorder(), generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )

    draws = [drawn(first) for _ in range(4)]

    assert draws == [drawn(second) for _ in range(4)]
    assert len({tuple(found) for found in draws}) > 1


def test_the_state_dict_restores_the_draws() -> None:
    loss = ImageTextMatchingLoss(fusion=Recorder())
    drawn(loss)
    state = copy.deepcopy(loss.state_dict())
    following = [drawn(loss) for _ in range(3)]

    resumed = ImageTextMatchingLoss(fusion=Recorder())
    resumed.load_state_dict(state)

    assert [drawn(resumed) for _ in range(3)] == following


def test_evaluation_does_not_change_the_draws_of_training() -> None:
    loss, undisturbed = (ImageTextMatchingLoss(fusion=Recorder()) for _ in range(2))
    loss.eval()
    evaluated = [drawn(loss) for _ in range(2)]
    loss.train()

    assert evaluated[0] == evaluated[1]
    assert [drawn(loss) for _ in range(3)] == [drawn(undisturbed) for _ in range(3)]


def test_torchs_global_generator_is_not_used() -> None:
    before = torch.get_rng_state()

    drawn(ImageTextMatchingLoss(fusion=Recorder()))

    assert torch.equal(torch.get_rng_state(), before)


def test_the_draw_has_no_gradient_but_the_drawn_have() -> None:
    image, text = draw(2, 5).requires_grad_(), draw(2, 5, seed=1).requires_grad_()

    ImageTextMatchingLoss(fusion=inner_product)(image, text).backward()

    # Of two pairs each is the other's only mismatch: six fused pairs for every draw.
    scores = image.detach() @ text.detach().T
    chance = scores.sigmoid()
    weight = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64) / 6
    gradient = weight * (chance - torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(image.grad, gradient @ text.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(text.grad, gradient.T @ image.detach(), rtol=1e-12, atol=1e-15)


class TokenFusion(nn.Module):
    """Cross attention from image tokens to text tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        attention = (image @ text.mT).softmax(-1)
        return self.head((attention @ text + image).mean(1))


def match_tokens() -> ImageTextMatchingLoss:
    return ImageTextMatchingLoss(fusion=TokenFusion())


def draw_tokens(batch: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
    image = torch.randn(batch, 3, 8, generator=generator)
    text = torch.randn(batch, 4, 8, generator=generator)
    return image, text, torch.arange(batch) // 2


def test_tokens_are_fused_and_the_first_token_is_compared(ranks: Ranks) -> None:
    check_loss(match_tokens, draw_tokens_alone)
    assert_same_on_ranks(ranks, match_tokens, Case(match_tokens, draw_tokens).inputs())


def draw_tokens_alone(batch: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
    return draw_tokens(batch, generator=generator)[:2]


def seeded_by_rank(image: Tensor, text: Tensor) -> Tensor:
    """Return the loss with a generator that differs from rank to rank, averaged over ranks."""
    torch.manual_seed(0)
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(10 + rank)
    value = ImageTextMatchingLoss(fusion=inner_product, generator=generator)(image, text)
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def test_the_draw_is_rank_0s_even_if_generators_differ(ranks: Ranks) -> None:
    inputs = draw(6, 8), draw(6, 8, seed=1)
    expected = seeded_by_rank(*inputs)

    for value in ranks.run(seeded_by_rank, split(inputs, (1, 3, 2))):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_a_fusion_with_a_wrong_output_is_refused() -> None:
    loss = ImageTextMatchingLoss(fusion=lambda image, text: (image * text).sum(-1))
    with pytest.raises(ValueError, match=r"fusion must return logits \[n, 2\].*\(18,\) for n = 18"):
        loss(draw(6, 5), draw(6, 5))
    with pytest.raises(TypeError, match="fusion must be callable, got str"):
        ImageTextMatchingLoss(fusion="concat")


def test_wrong_sides_are_refused() -> None:
    loss = ImageTextMatchingLoss(fusion=inner_product)
    with pytest.raises(ValueError, match="image and text must agree in batch and features"):
        loss(draw(6, 5), draw(6, 4))
    with pytest.raises(ValueError, match=r"text must be \[batch, features\]"):
        loss(draw(6, 5), draw(6, 2, 2, 5))


def test_a_temperature_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        ImageTextMatchingLoss(fusion=inner_product, temperature=0)


def test_the_fusion_head_returns_two_logits_for_each_pair() -> None:
    head = FusionHead(dim=5, hidden_dim=7).double()

    assert head(draw(4, 5), draw(4, 5, seed=1)).shape == (4, 2)
    assert {name for name, _ in ImageTextMatchingLoss(fusion=head).named_parameters()} == {
        f"fusion.{name}" for name, _ in head.named_parameters()
    }
