"""What a run has changed of modules, handlers and parts: restored, or named when it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import Trainer
from diptych.engine.state.run_state import load_run_state
from diptych.handlers import CheckpointManager
from tests.engine.state.scripts import (
    EPOCH,
    Script,
    lines,
    resumed,
    saved_by,
    scripts_of,
    shifted_by,
)


class Scaled(nn.Sigmoid):
    """An activation with settings of every kind, as a user would write them."""

    def __init__(self) -> None:
        super().__init__()
        self.options, self.sizes, self._hidden = {"scale": 1.0}, [1, 2], 1
        self.mask, self.weight, self._center = torch.ones(3), None, torch.zeros(1)
        self.later: Any = nn.ReLU()


def change_all(trainer: Trainer) -> None:
    part: Any = trainer.model[2]
    part.options["scale"] = 0.5
    part.sizes.append(3)
    part._hidden = 2
    part.mask[0] = 0
    part._center += 1
    part.weight = torch.tensor([1.0, 2.0])
    part.new = (1, "a")


def once(function: Any) -> Any:
    """Return a function at an event that acts in the first epoch only."""

    def act(trainer: Trainer) -> None:
        if trainer.state.epoch == 1:
            function(trainer)

    return act


def test_lists_tensors_and_private_attributes_that_a_function_has_changed_are_restored(
    caplog: pytest.LogCaptureFixture,
):
    script = Script(activation=Scaled, function=once(change_all))
    trainer = script.build()
    state, part = saved_by(script), cast("Any", trainer.model[2])
    options, mask = part.options, part.mask
    trainer.state.dataloader = script.data()
    load_run_state(trainer, state)

    assert options == part.options == {"scale": 0.5}
    assert part.sizes == [1, 2, 3]
    assert (part._hidden, part.new) == (2, (1, "a"))
    assert mask is part.mask
    assert mask.tolist() == [0, 1, 1]
    assert (part.weight.tolist(), part._center.item()) == ([1, 2], 1)
    assert not lines(caplog)


def other_scale() -> Scaled:
    part = Scaled()
    part.options["scale"] = 0.25
    return part


def test_a_dictionary_of_a_module_that_the_script_has_changed_applies_and_is_logged(
    caplog: pytest.LogCaptureFixture,
):
    change = once(change_all)
    before, now = (Script(activation=kind, function=change) for kind in (Scaled, other_scale))
    trainer = resumed(now, saved_by(before))

    assert cast("Any", trainer.model[2]).options == {"scale": 0.25}
    (line,) = lines(caplog)
    assert line.endswith("model.2.options.scale 1.0 -> 0.25 (changed in the script).")


def replace_parts(trainer: Trainer) -> None:
    trainer.set_data(Script(data_seed=1).data())
    trainer.transform = shifted_by(2.0)
    cast("Any", trainer.model[2]).later = nn.Identity()


def test_what_a_function_has_replaced_and_a_checkpoint_cannot_hold_is_logged(
    caplog: pytest.LogCaptureFixture,
):
    function = once(replace_parts)
    script = Script(activation=Scaled, function=function, transform=shifted_by(1.0))
    resumed(script, saved_by(script))
    found = lines(caplog)

    assert found[0].startswith("model.2.later was a torch.nn.modules.linear.Identity when")
    assert [line.partition(" during")[0] for line in found[1:]] == [
        "The transform was changed",
        "The loader was changed",
    ]


class Counting:
    """A handler with memory, and a private setting, but without a state."""

    def __init__(self, by: int) -> None:
        self._by, self.count = by, 0

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.add)

    def add(self) -> None:
        self.count += self._by


def test_the_memory_of_a_handler_without_a_state_is_named(caplog: pytest.LogCaptureFixture):
    script = Script(handlers=(Counting(2),))
    resumed(script, saved_by(script))
    (line,) = lines(caplog)
    assert "no state of functions and of handlers without state_dict(), which start" in line
    assert f"Counting.count was {2 * EPOCH}." in line


class Closures:
    """Functions at an event that keep something, and some that only read."""

    def attach(self, trainer: Trainer) -> None:
        count, counts, last, every, table = 0, {"steps": 0}, [0], 3, {"a": [1]}

        def add() -> None:
            nonlocal count
            count += every

        def add_to_dictionary() -> None:
            counts["steps"] += len(table["a"])

        def write() -> None:
            last[0] = trainer.state.iteration

        def read() -> int:
            here = every
            return here + table["a"][0]

        for function in (add, add_to_dictionary, lambda _: write(), read):
            trainer.add_event_handler(Events.ITERATION_COMPLETED, function)


def test_what_functions_keep_in_their_closures_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for stop in (3, EPOCH):
        caplog.clear()
        trainer = Script(handlers=(Closures(), CheckpointManager(tmp_path))).build()
        trainer.run(Script().data(), max_iters=stop)
        (line,) = [
            line for line in caplog.messages if "which start anew" in line or "functions at" in line
        ]
        if stop == 3:  # when a run starts: what can be seen in the code
            assert line.startswith("Checkpoints lack the variables that functions at events assign")
            assert "assign: add.count. A resumed run starts them anew." in line
        else:  # when it resumes: what has changed
            found = "add.count was 9, add_to_dictionary.counts was {'steps': 3}, write.last was [3]"
            assert f"start anew: {found}." in line


def test_a_private_setting_of_a_users_handler_that_has_changed_is_logged(
    caplog: pytest.LogCaptureFixture,
):
    before, now = scripts_of(handlers=((Counting(2),), (Counting(3),)))
    resumed(now, saved_by(before))
    assert "handlers.Counting._by 2 -> 3 (changed in the script)." in lines(caplog)
