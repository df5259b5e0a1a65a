"""Every registered loss keeps the contract, alone and on several ranks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diptych.losses import BaseContrastiveLoss, available_losses, get_loss_class
from diptych.losses.contract import CHECKS, Case, check_compiles, check_loss
from tests.losses.ranks import Ranks, assert_same_on_ranks

NAMES = list(available_losses())


def build(name: str) -> Callable[[], nn.Module]:
    loss = get_loss_class(name)
    return getattr(loss, "example", loss)


def case(name: str) -> Case:
    return Case(build(name))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_keeps_the_contract(name: str, check: str) -> None:
    reasons = getattr(get_loss_class(name), "exempt", {})
    if check in reasons:
        pytest.skip(reasons[check])
    CHECKS[check](case(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_the_same_on_one_two_and_three_ranks(name: str, ranks: Ranks) -> None:
    assert_same_on_ranks(ranks, build(name), case(name).inputs())


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_on_pairs_is_the_same_on_ranks_with_groups(name: str, ranks: Ranks) -> None:
    inputs = case(name).inputs()
    if case(name).names()[len(inputs) :][:1] != ["groups"]:
        pytest.skip("takes no groups")
    groups = torch.tensor([4, 1, 4, 2, 1, 4])
    assert_same_on_ranks(ranks, build(name), (*inputs, groups))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch's own compiler
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_compiles_into_one_graph(name: str) -> None:
    reasons = getattr(get_loss_class(name), "exempt", {})
    if "compiles" in reasons:
        pytest.skip(reasons["compiles"])
    check_compiles(case(name))


class InTenLines(BaseContrastiveLoss):
    """A user's loss, written the short way."""

    symmetric = True

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        logits = self.compute_similarity(first, second)
        labels = torch.arange(len(logits), device=logits.device)
        rows, columns = (nn.functional.cross_entropy(x, labels) for x in (logits, logits.T))
        return (rows + columns) / 2


def test_a_users_own_loss_in_ten_lines_keeps_the_contract(ranks: Ranks) -> None:
    check_loss(lambda: InTenLines(temperature=0.1))
    assert_same_on_ranks(ranks, InTenLines, Case(InTenLines).inputs())


class Broken(InTenLines):
    """A loss with a fault that the checks must find."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        value = super().forward(first, second)
        faults = {
            "waits": lambda: value * float(value.item() > -1),
            "hides NaN": lambda: torch.nan_to_num(value),
            "order": lambda: value + first[0].sum(),
            "detached": lambda: value.detach() + 0 * first.sum(),
            "one side": lambda: value + first.mean(),
            "mean over dimensions": lambda: value[None],
        }
        return faults[self.fault]()


@pytest.mark.parametrize(
    ("fault", "check", "sentence"),
    [
        ("waits", "no_host_sync", "host waits"),
        ("hides NaN", "nan", "a NaN in argument 0"),
        ("order", "permutation", "depends on the batch's order"),
        ("detached", "gradients", "first gets no gradient"),
        ("one side", "symmetry", "swapping the sides"),
        ("mean over dimensions", "call", "scalar"),
    ],
)
def test_the_contract_finds_a_planted_fault_and_names_it(
    fault: str, check: str, sentence: str
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        CHECKS[check](Case(lambda: Broken(fault)))


def test_check_loss_runs_every_check() -> None:
    with pytest.raises(AssertionError, match="host waits"):
        check_loss(lambda: Broken("waits"))


class OwnRowsOnly(BaseContrastiveLoss):
    """A loss that ignores other ranks, as hand-written ones do."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        logits = self.normalize_features(first) @ self.normalize_features(second).T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def test_a_loss_that_ignores_other_ranks_is_found(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="samples by rank"):
        assert_same_on_ranks(ranks, OwnRowsOnly, Case(OwnRowsOnly).inputs())
