"""The state of a whole run, as a checkpoint holds it: read from a trainer, and loaded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diptych.engine.checks import numbers_in
from diptych.engine.distributed.agreement import wait_for_all_ranks
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import CheckpointError
from diptych.engine.loop.position import position_from
from diptych.engine.metrics.metrics_buffer import mean_of_buffers
from diptych.engine.name_patterns import listed
from diptych.engine.random_state import (
    preserved_random_state,
    random_state,
    set_random_state,
)
from diptych.engine.state.checkpoint_structure import FORMAT
from diptych.engine.state.handler_states import match_states, stateful_handlers
from diptych.engine.state.left_iteration import left_iteration, restore_left_iteration
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.state.optimizer_state import (
    add_later_groups,
    check_class,
    check_optimizer,
    parameter_names,
    sharded_as,
    with_added_parts,
)
from diptych.engine.state.plain_state import plain_state
from diptych.engine.state.resume_changes import ResumeChanges, WhenChanged
from diptych.engine.state.script_changes import current_values

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

_of_all_ranks = waits_at("collecting the ranks' metrics for a checkpoint")(gather_values)


def run_state(trainer: Trainer) -> dict[str, Any]:
    """Return everything that the rest of the run depends on, as tensors, numbers and strings.

    Call it when nothing is pending (`RunEvents.SAFE_POINT`). Tensors are not copied. Over several
    ranks the call is collective: random states, metrics and positions in the data are those of all
    ranks, handlers' states are this rank's, and sharded tensors are this rank's shards.

    Raises:
        CheckpointError: if a checkpoint cannot hold a value; the message gives its path.
    """
    wait_for_all_ranks("taking the state of the run")
    with preserved_random_state():  # the state_dict() of some loaders draws random numbers
        place = trainer.batches.place()
    state = {
        "format": FORMAT,
        "model": clean_state_dict(trainer.model),
        "loss": clean_state_dict(trainer.loss),
        "optimizer": trainer.optimizer.state_dict(),
        "parameters": parameter_names(trainer),
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "skipped_steps": trainer.skipped_steps,
        "skipped_batches": trainer.skipped_batches,
        "trainer": dict(trainer.state_dict()),
        "metrics": _of_all_ranks(trainer.metrics.state_dict()),
        "last_metrics": numbers_in(trainer.state.metrics),
        "handlers": {name: h.state_dict() for name, h in stateful_handlers(trainer).items()},
        "random": _of_all_ranks(random_state()),
        "data": _of_all_ranks(place),
        "identity": dict(trainer.identity.values),
        "current": current_values(trainer, trainer.identity),
    }
    iteration = left_iteration(trainer)
    if iteration is not None:
        state["iteration"] = _of_all_ranks(iteration)
    return dict(plain_state(state))


def load_run_state(
    trainer: Trainer, state: Mapping[str, Any], changes: WhenChanged = "apply"
) -> None:
    """Restore a trainer, and everything attached to it, from a state that `run_state` returned.

    Tensors may be whole or sharded, in the state and in the trainer. The trainer's loader is the
    one in `trainer.state.dataloader`. A handler's state goes to the handler with the same key; it
    is loaded before the model, so that it may add parameter groups. A handler that the saved run
    did not have starts fresh, and a saved state whose handler is gone is dropped; both are logged.

    What the script declares otherwise than the saved run did applies from here on, with a log line
    for each change: see `ResumeChanges`. With `changes="refuse"`, a change of the script is an
    error.

    Raises:
        CheckpointError: if the state belongs to another model, loss or optimizer; several handlers
            share a key and their number has changed; or the script has changed and `changes` is
            "refuse". Nothing has been modified then.
        ResumeError: if the loader cannot go to the position, or orders its samples otherwise inside
            an epoch. Nothing has been modified then.
    """
    # 1. Check what can be checked without loading anything.
    _check(trainer, state)
    place, inside = _of_this_rank(state["data"]), position_from(state["trainer"]).inside_epoch
    found = ResumeChanges.between(state, trainer.identity)
    found.check(changes, inside_epoch=inside)
    handlers = stateful_handlers(trainer)
    by_class = state.get("format", 0) < 2
    states = match_states(state["handlers"], handlers, found.pairs, by_class=by_class)
    # 2. Handlers come first: they may add parameter groups. Until the rest fits, they are undone.
    with _undone_on_error(trainer):
        for key, handler_state in states.items():
            handlers[key].load_state_dict(handler_state)
        found.reapply_settings(handlers)
        add_later_groups(trainer, state, found.groups_declared)
        check_optimizer(trainer, state)
        trainer.batches.try_place(trainer.state.dataloader, place, inside=inside)
    # 3. Nothing from here on can fail because the script is another one.
    _load_modules(trainer, state, found)
    _load_optimizer(trainer, state, found)
    found.rebase_schedulers(handlers)
    found.restore_current(trainer, state.get("current"))
    _load_position(trainer, state, place, inside=inside)
    # 4. Loaders draw random numbers when they go to a position.
    set_random_state(state["random"][min(rank(), len(state["random"]) - 1)])
    if rank() == 0:
        found.log(fresh=set(handlers) - set(states), missing=_missing(state["handlers"], states))


def _load_modules(trainer: Trainer, state: Mapping[str, Any], found: ResumeChanges) -> None:
    kept = found.script_tensors(trainer)
    load_clean_state_dict(trainer.model, state["model"])
    load_clean_state_dict(trainer.loss, state["loss"])
    for tensor, value in kept:
        tensor.detach().copy_(value)


def _load_position(trainer: Trainer, state: Mapping[str, Any], place: Any, *, inside: bool) -> None:
    """Load the position, which resets the metrics and the loader's place, and then these two."""
    trainer.load_state_dict(state["trainer"])
    trainer.skipped_batches = state.get("skipped_batches", 0)
    trainer.metrics.load_state_dict(_metrics_of_this_rank(state["metrics"]))
    trainer.state.metrics.clear()
    trainer.state.metrics.update(state["last_metrics"])
    if inside or trainer.state.dataloader is not None:
        trainer.batches.switch(trainer.state.dataloader)
        trainer.batches.restore_place(place, inside=inside)
    if "iteration" in state:
        restore_left_iteration(trainer, _of_this_rank(state["iteration"]))


def _of_this_rank(states: Sequence[Any]) -> Any:
    """Return this rank's state; if the number of ranks has changed, that of rank 0."""
    return states[rank()] if len(states) == world_size() else states[0]


@contextmanager
def _undone_on_error(trainer: Trainer) -> Iterator[None]:
    """If the context raises, undo what handlers' states have changed."""
    handlers = stateful_handlers(trainer)
    before: dict[str, Any] = {}
    for key, handler in handlers.items():
        with suppress(Exception):  # some have no state before a run has started
            before[key] = copy.deepcopy(handler.state_dict())
    parameters = [*trainer.model.parameters(), *trainer.loss.parameters()]
    trainable = [parameter.requires_grad for parameter in parameters]
    groups, loader, task = [*trainer.optimizer.param_groups], trainer.state.dataloader, trainer.task
    options = [dict(group) for group in groups]
    try:
        yield
    except BaseException:
        for key, handler_state in before.items():
            handlers[key].load_state_dict(handler_state)
        trainer.optimizer.param_groups = groups
        for group, own in zip(groups, options, strict=True):
            group.clear()
            group.update(own)
        for parameter, flag in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(flag)
        trainer.state.dataloader, trainer.task = loader, task
        raise


def _load_optimizer(trainer: Trainer, state: Mapping[str, Any], found: ResumeChanges) -> None:
    saved = sharded_as(trainer.optimizer, state["optimizer"])
    groups = found.groups_with_changes(trainer.optimizer, saved["param_groups"])
    trainer.optimizer.load_state_dict(with_added_parts(trainer.optimizer, saved, groups))
    if trainer.scaler is not None and state["scaler"] is not None:
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.skipped_steps.copy_(state["skipped_steps"])


def _missing(saved: Mapping[str, Any], matched: Mapping[str, Any]) -> set[str]:
    """Return the names of saved states that no handler takes."""
    taken = {id(state) for state in matched.values()}
    return {name for name, state in saved.items() if id(state) not in taken}


def _check(trainer: Trainer, state: Mapping[str, Any]) -> None:
    if state.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"the checkpoint's format must be at most {FORMAT} for this version of diptych, got "
            f"{state['format']}. Update diptych"
        )
    for part, module in (("model", trainer.model), ("loss", trainer.loss)):
        _check_keys(part, state[part], clean_state_dict(module))
    check_class(trainer.optimizer, state)


def _check_keys(part: str, saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    lacking = sorted(set(here) - set(saved))
    extra = sorted(set(saved) - set(here))
    shapes = [
        f"{key} {tuple(saved[key].shape)} instead of {tuple(here[key].shape)}"
        for key in here
        if key in saved and isinstance(here[key], Tensor) and saved[key].shape != here[key].shape
    ]
    told = [
        f"{what} {listed(keys)}"
        for what, keys in (("lacks", lacking), ("has extra", extra), ("has", shapes))
        if keys
    ]
    if told:
        raise CheckpointError(
            f"{part} must match the checkpoint, which {'; which '.join(told)}. To start a new run "
            "from the weights that fit, use load_weights"
        )


def _metrics_of_this_rank(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return this rank's metrics; if the number of ranks has changed, the mean of all ranks'.

    The values since the last log point are each rank's own; a log point averages over ranks.
    """
    if len(states) == world_size():
        return states[rank()]
    return {**states[0], "window": mean_of_buffers([state["window"] for state in states])}
