"""Losses are built by name; errors for unknown names and arguments list the known ones."""

import re
from pathlib import Path

import pytest
from torch import Tensor, nn

from diptych.losses import (
    CLIPLoss,
    available_losses,
    get_loss,
    get_loss_class,
    register_loss,
    registry,
)
from diptych.losses.registry import UnknownLossError
from tests.losses.processes import printed

LOSSES = Path(__file__).parents[2] / "losses"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own registry."""
    available_losses()  # imports the families into the shared registry first
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


class Mine(nn.Module):
    """A user's loss.

    More about it.
    """

    def forward(self, first: Tensor) -> Tensor:
        return first.sum()


def test_a_loss_is_built_by_name_with_its_arguments() -> None:
    loss = get_loss("clip", temperature=0.1, learn_temperature=False)
    assert isinstance(loss, CLIPLoss)
    assert loss.temperature.value == 0.1


def test_available_losses_returns_each_name_with_one_line() -> None:
    register_loss("mine")(Mine)
    losses = available_losses()
    assert losses["mine"] == "A user's loss."
    assert all(line and "\n" not in line for line in losses.values())
    assert list(losses) == sorted(losses)


def test_an_error_for_a_misspelt_name_lists_close_names() -> None:
    with pytest.raises(UnknownLossError, match=r"unknown loss 'clp'. Did you mean 'clip'\?"):
        get_loss("clp")


def test_an_error_for_a_name_without_close_names_lists_all() -> None:
    with pytest.raises(ValueError, match=r"Known: .*'clip'.*'siglip'"):
        get_loss("xyzzy")


def test_an_error_for_a_misspelt_argument_names_the_accepted_ones() -> None:
    with pytest.raises(TypeError, match=r"no argument 'temprature' \(did you mean 'temperature'"):
        get_loss("clip", temprature=0.1)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(TypeError, match="loss 'moco' needs the argument 'dim'"):
        get_loss("moco")


def test_a_second_class_under_one_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'clip' is taken by .*CLIPLoss\. Register Mine under"):
        register_loss("clip")(Mine)
    assert get_loss_class("clip") is CLIPLoss


def test_a_class_whose_definition_is_run_again_takes_its_own_place() -> None:
    def define() -> type[nn.Module]:
        class OfANotebook(nn.Module):
            """A loss."""

        return register_loss("of_a_notebook")(OfANotebook)

    first, second = define(), define()
    assert get_loss_class("of_a_notebook") is second is not first


def test_a_name_of_the_library_is_refused_in_a_process_that_has_used_no_loss() -> None:
    code = """
from torch import nn
from diptych.losses.registry import register_loss
class Mine(nn.Module):
    'A loss.'
try:
    register_loss('vicreg')(Mine)
except ValueError as error:
    print(error)
"""
    assert "name 'vicreg' is taken by diptych.losses.contrastive.vicreg" in printed(code)


def test_losses_are_found_by_name_in_a_process_that_has_imported_none() -> None:
    code = "from diptych.losses import get_loss; print(type(get_loss('captioning')).__name__)"
    assert printed(code) == "CaptioningLoss"
    code = "from diptych.losses import available_losses; print(*available_losses())"
    sources = "".join(path.read_text("utf-8") for path in LOSSES.rglob("*.py"))
    # Not those of this process, in which another test may have registered a loss of its own.
    assert printed(code).split() == sorted(
        re.findall(r'^@register_loss\("(\w+)"\)', sources, re.MULTILINE)
    )


def test_registering_one_class_twice_under_its_name_is_fine() -> None:
    assert register_loss("mine")(register_loss("mine")(Mine)) is Mine


@pytest.mark.parametrize("name", ["", "Mine", "my-loss", "my loss", "1st"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lower case with underscores"):
        register_loss(name)


def test_only_module_classes_are_registered() -> None:
    with pytest.raises(TypeError, match=r"must decorate an nn\.Module class"):
        register_loss("mine")(dict)  # type: ignore[type-var]


def test_a_class_without_a_docstring_is_listed_by_its_name() -> None:
    loss = type("Silent", (CLIPLoss,), {})
    register_loss("mine")(loss)
    assert available_losses()["mine"] == "Silent"
    assert isinstance(get_loss("mine"), loss)


def test_a_class_without_a_constructor_needs_no_arguments() -> None:
    loss = type("Bare", (nn.Module,), {})  # nn.Module takes *args
    register_loss("bare")(loss)
    assert isinstance(get_loss("bare"), loss)
