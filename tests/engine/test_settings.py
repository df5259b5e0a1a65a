"""Settings: frozen, and checked where they enter."""

from __future__ import annotations

import attrs
import pytest
import torch

from diptych.engine import TrainerSettings


def test_the_defaults_are_plain():
    settings = TrainerSettings()
    assert attrs.asdict(settings) == {
        "precision": "fp32",
        "microbatch_size": None,
        "device": None,
        "prefetch": True,
        "compile": False,
        "seed": None,
        "log_every": 50,
        "shard": False,
    }


def test_a_device_may_be_a_name():
    assert TrainerSettings(device="cpu").device == torch.device("cpu")
    assert TrainerSettings(device=torch.device("meta")).device == torch.device("meta")


def test_settings_do_not_change():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        TrainerSettings().seed = 1


def test_settings_go_by_name_only():
    with pytest.raises(TypeError):
        TrainerSettings("bf16")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "half"}, "precision must be one of fp32, bf16, fp16, got 'half'"),
        ({"precision": None}, "precision must be one of fp32, bf16, fp16, got None"),
        ({"microbatch_size": 0}, "microbatch_size must be a whole number >= 1, got 0"),
        ({"microbatch_size": 2.0}, "microbatch_size must be a whole number >= 1, got 2.0"),
        ({"microbatch_size": True}, "microbatch_size must be a whole number >= 1, got True"),
        ({"log_every": 0}, "log_every must be a whole number >= 1, got 0"),
        ({"log_every": None}, "log_every must be a whole number >= 1, got None"),
        ({"seed": -1}, "seed must be a whole number from 0 to .*, got -1"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to .*, got 4294967296"),
        ({"seed": 1.0}, "seed must be a whole number from 0 to .*, got 1.0"),
    ],
)
def test_a_value_out_of_range_names_setting_rule_and_value(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainerSettings(**setting)


def test_compile_is_a_switch_or_a_mode():
    assert TrainerSettings(compile="reduce-overhead").compile == "reduce-overhead"
    with pytest.raises(ValueError, match="compile must be True, False or one of default, reduce"):
        TrainerSettings(compile="yes")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match=r"device must be .*got 'nowhere'"):
        TrainerSettings(device="nowhere")
