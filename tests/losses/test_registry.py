"""Losses are found by name, and a wrong name or argument is told with the right ones."""

import pytest
from torch import Tensor, nn

from diptych.losses import CLIPLoss, available_losses, get_loss, get_loss_class, register_loss
from diptych.losses import registry as room
from diptych.losses.registry import UnknownLossError


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a registry of its own."""
    monkeypatch.setattr(room, "_REGISTERED", dict(room._REGISTERED))


class Mine(nn.Module):
    """A loss of one's own.

    More about it.
    """

    def forward(self, first: Tensor) -> Tensor:
        return first.sum()


def test_a_loss_is_built_by_name_with_its_arguments() -> None:
    loss = get_loss("clip", temperature=0.1, learn_temperature=False)
    assert isinstance(loss, CLIPLoss)
    assert loss.temperature.value == 0.1


def test_available_losses_tells_each_name_with_one_line() -> None:
    register_loss("mine")(Mine)
    losses = available_losses()
    assert losses["mine"] == "A loss of one's own."
    assert all(line and "\n" not in line for line in losses.values())
    assert list(losses) == sorted(losses)


def test_a_misspelt_name_lists_the_close_ones() -> None:
    with pytest.raises(UnknownLossError, match=r"unknown loss 'clp'; did you mean 'clip'\?"):
        get_loss("clp")


def test_a_name_like_none_lists_all() -> None:
    with pytest.raises(ValueError, match=r"known: .*'clip'.*'siglip'"):
        get_loss("xyzzy")


def test_a_misspelt_argument_names_the_accepted_ones() -> None:
    with pytest.raises(TypeError, match=r"no argument 'temprature' \(did you mean 'temperature'"):
        get_loss("clip", temprature=0.1)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(TypeError, match="loss 'moco' needs the argument 'dim'"):
        get_loss("moco")


def test_a_second_class_under_one_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'clip' is taken by .*CLIPLoss; register Mine under"):
        register_loss("clip")(Mine)
    assert get_loss_class("clip") is CLIPLoss


def test_registering_one_class_twice_under_its_name_is_fine() -> None:
    assert register_loss("mine")(register_loss("mine")(Mine)) is Mine


@pytest.mark.parametrize("name", ["", "Mine", "my-loss", "my loss", "1st"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lower case with underscores"):
        register_loss(name)


def test_what_is_no_documented_module_class_is_refused() -> None:
    with pytest.raises(TypeError, match=r"decorates an nn\.Module class"):
        register_loss("mine")(dict)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="needs a docstring"):
        register_loss("mine")(type("Silent", (nn.Module,), {}))
