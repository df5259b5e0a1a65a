"""The contract of a loss: its defaults, for losses of the package and for plain modules."""

import pytest
import torch
from torch import Tensor, nn

from diptych.losses import CLIPLoss, CrossEntropyLoss, WeightedSum, available_losses, get_loss_class
from diptych.losses.base.loss import Loss, sample_mean, with_defaults
from tests.losses.oracles import draw


class Declared(nn.Module):
    """A plain module that declares every optional member."""

    couples_samples = False
    minimum_batch = 3
    symmetric = True
    can_be_negative = True

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first * second).mean()

    def terms(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"half": self(first, second) / 2, "rest": self(first, second) / 2}

    def scalars(self) -> dict[str, Tensor]:
        return {"one": torch.ones(())}

    def total_and_weight(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return (first * second).sum(), torch.tensor(first.numel())


@pytest.mark.parametrize("name", list(available_losses()))
def test_every_loss_of_the_package_derives_from_loss(name: str) -> None:
    loss = get_loss_class(name).example()

    assert isinstance(loss, Loss)
    assert with_defaults(loss) is loss


def test_a_plain_module_has_the_defaults_of_loss() -> None:
    sides = draw(4, 5), draw(4, 5, seed=1)
    plain, loss = with_defaults(nn.MSELoss()), Loss()

    for member in ("couples_samples", "minimum_batch", "symmetric", "can_be_negative", "exempt"):
        assert getattr(plain, member) == getattr(loss, member)
    assert plain.scalars() == {}
    assert [side.shape for side in plain.example_inputs(3, dim=2)] == [(3, 2), (3, 2)]
    assert plain.terms(*sides) == {"loss": nn.functional.mse_loss(*sides)}
    assert sample_mean(nn.MSELoss()) is None


def test_members_that_a_plain_module_declares_are_used() -> None:
    sides = draw(4, 5), draw(4, 5, seed=1)
    part = Declared()
    declared = with_defaults(part)

    assert (declared.couples_samples, declared.minimum_batch) == (False, 3)
    assert (declared.symmetric, declared.can_be_negative) == (True, True)
    assert list(declared.scalars()) == ["one"]
    assert list(declared.terms(*sides)) == ["half", "rest"]
    assert sample_mean(part) is part


def test_a_mean_over_samples_needs_total_and_weight_and_uncoupled_samples() -> None:
    mean, coupled = CrossEntropyLoss(), CLIPLoss()

    assert sample_mean(mean) is mean
    assert sample_mean(coupled) is None
    assert sample_mean(WeightedSum(losses=[mean, coupled])) is None


def test_a_loss_without_terms_is_an_error_that_names_its_class() -> None:
    class Empty(Loss):
        """A loss that defines nothing."""

    with pytest.raises(NotImplementedError, match="Empty must define terms"):
        Empty()(draw(2, 2))


@pytest.mark.slow
def test_a_composite_of_plain_modules_compiles_into_one_graph() -> None:
    sides = draw(4, 5), draw(4, 5, seed=1)
    loss = WeightedSum(losses={"plain": nn.MSELoss(), "declared": Declared()})

    compiled = torch.compile(loss, fullgraph=True, backend="eager")

    torch.testing.assert_close(compiled(*sides), loss(*sides))
