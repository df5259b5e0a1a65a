"""parameter_groups: each parameter in one group, with its rate and weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diptych.engine.name_patterns import matches
from diptych.handlers import parameter_groups
from diptych.losses import CLIPLoss


class Encoder(nn.Module):
    """A stem, twelve blocks and a head: enough for `blocks.1` and `blocks.10`."""

    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(blocks)
        )
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Encoder(2), Encoder(3)


def placed(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the group of each parameter by the parameter's name; each must be in one."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [(names[id(p)], group) for group in groups for p in group["params"] if id(p) in names]
    assert len(held) == len(dict(held))
    return dict(held)


def test_every_parameter_is_in_one_group_and_the_optimizer_takes_them():
    model, loss = Encoder(), CLIPLoss()
    groups = parameter_groups(model, 0.1, lr=1e-3, loss=loss)
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in (*model.parameters(), *loss.parameters())}
    assert len(held) == len({id(p) for p in held})
    optimizer = torch.optim.AdamW(groups)
    assert [group["name"] for group in optimizer.param_groups] == [g["name"] for g in groups]


def test_biases_norms_and_temperatures_get_no_weight_decay():
    model, loss = Encoder(2), CLIPLoss()
    groups = parameter_groups(model, 0.1, lr=1e-3, loss=loss)
    decayed = {name for name, group in placed(model, groups).items() if group["weight_decay"]}
    assert decayed == {"stem.weight", "blocks.0.1.weight", "blocks.1.1.weight", "head.weight"}
    (temperature,) = loss.parameters()
    (group,) = (g for g in groups if any(p is temperature for p in g["params"]))
    assert (group["name"], group["weight_decay"]) == ("loss/no_decay", 0.0)


def test_no_decay_exempts_further_parameters_by_pattern():
    model = Encoder(2)
    groups = parameter_groups(model, 0.1, lr=1e-3, no_decay=["blocks.*.1", "head"])
    assert {n for n, g in placed(model, groups).items() if g["weight_decay"]} == {"stem.weight"}


def test_a_pattern_matches_whole_parts_of_a_path():
    model = Encoder()
    groups = parameter_groups(model, by_component={"blocks.1": 1e-5}, lr=1e-3)
    rates = {name: group["lr"] for name, group in placed(model, groups).items()}
    slow = {name for name, rate in rates.items() if rate == 1e-5}
    assert slow == {f"blocks.1.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert rates["blocks.10.1.weight"] == 1e-3


@given(st.lists(st.sampled_from(["a", "ab", "b", "1", "10"]), min_size=1, max_size=4), st.data())
@settings(max_examples=50, deadline=None)
def test_a_pattern_matches_only_beginnings_of_names(parts, data):
    length = data.draw(st.integers(1, len(parts)))
    other = data.draw(
        st.lists(st.sampled_from(["a", "ab", "b", "1", "10"]), min_size=1, max_size=4)
    )
    assert matches(".".join(parts), ".".join(parts[:length]))
    assert matches(".".join(parts), ".".join(other)) == (parts[: len(other)] == other)


def test_a_component_may_have_options_of_the_optimizer():
    model = Encoder(2)
    options = {"lr": 1e-5, "weight_decay": 0.3, "betas": (0.9, 0.98)}
    groups = parameter_groups(model, 0.1, {"head": options}, lr=1e-3)
    assert [group["name"] for group in groups if "betas" in group] == ["head", "head/no_decay"]
    held = placed(model, groups)
    assert held["head.weight"]["weight_decay"] == 0.3
    assert held["head.bias"]["weight_decay"] == 0.0
    assert held["stem.weight"]["weight_decay"] == 0.1


def test_rates_fall_from_block_to_block_down_to_the_stem():
    model = Encoder(3)
    held = placed(model, parameter_groups(model, 0.1, layer_decay=0.5, lr=1.0))
    expected = {"stem": 0.5**4, "norm": 1.0, "head": 1.0}
    expected |= {f"blocks.{i}": 0.5 ** (3 - i) for i in range(3)}
    for name, group in held.items():
        (rate,) = (rate for path, rate in expected.items() if name.startswith(f"{path}."))
        assert group["lr"] == pytest.approx(rate), name
    assert held["blocks.1.1.weight"]["name"] == "model/layer_2"
    assert held["blocks.1.1.bias"]["name"] == "model/layer_2/no_decay"


def test_each_tower_has_layers_of_its_own():
    model = TwoTowers()
    decay = {"image.blocks": 0.5, "text.blocks": 0.1}
    held = placed(model, parameter_groups(model, layer_decay=decay, lr=1.0))
    assert held["image.stem.weight"]["lr"] == pytest.approx(0.5**3)
    assert held["text.stem.weight"]["lr"] == pytest.approx(0.1**4)
    assert held["text.blocks.2.1.weight"]["lr"] == pytest.approx(0.1)
    assert held["image.head.weight"]["lr"] == 1.0
    found = placed(model, parameter_groups(model, layer_decay=0.5, lr=1.0))
    assert found["text.stem.weight"]["lr"] == pytest.approx(0.5**4)


def test_parameters_without_requires_grad_are_left_out():
    model = Encoder(2)
    model.stem.requires_grad_(requires_grad=False)
    assert not any(n.startswith("stem") for n in placed(model, parameter_groups(model, lr=1e-3)))


def test_a_shared_parameter_is_in_one_group():
    model = TwoTowers()
    model.text.head = model.image.head
    groups = parameter_groups(model, lr=1e-3)
    held = [p for group in groups for p in group["params"] if p is model.image.head.weight]
    assert len(held) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"by_component": {"block.1": 1e-5}},
            r"got 'block.1', which matches none. Similar names: .*blo",
        ),
        ({"no_decay": ["hed"]}, "got 'hed', which matches none. Similar names: head"),
        ({"layer_decay": {"layers": 0.5}}, "got 'layers', which matches none"),
        ({"layer_decay": 1.5}, r"layer_decay must be a factor in \(0, 1\], got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0 and finite, got -0.1"),
        ({"by_component": {"head": -1.0}}, "lr of 'head' must be >= 0 and finite, got -1.0"),
        (
            {"by_component": {"blocks": 1.0, "blocks.1": 2.0}},
            r"in one group, got blocks.1.0.weight in blocks and in blocks.1. Make",
        ),
        (
            {"by_component": {"blocks": 1.0}, "lr": None},
            "must be in a group, got stem.weight in none of blocks. Add a component",
        ),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(Encoder(2), **{"lr": 1e-3, **arguments})


def test_layers_need_a_sequence_of_blocks():
    with pytest.raises(ValueError, match="two or more modules of one class, got none"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), layer_decay=0.5, lr=1e-3)
