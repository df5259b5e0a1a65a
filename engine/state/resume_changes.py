"""The changes of a script between the saved run and the one that resumes from it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import attrs
from torch import Tensor
from torch.optim import Optimizer

from diptych.engine.errors import CheckpointError, ResumeError
from diptych.engine.handler import Handler
from diptych.engine.state.description import tensor_digest
from diptych.engine.state.differences import (
    ABSENT,
    Difference,
    Kind,
    as_lines,
    differences,
    order_differences,
)
from diptych.engine.state.handler_states import paired_by_settings
from diptych.engine.state.run_identity import RunIdentity, tensors_of
from diptych.engine.state.run_parts import RunParts
from diptych.engine.state.script_changes import apply_script, restore_current

logger = logging.getLogger(__name__)

WhenChanged = Literal["apply", "refuse"]


@attrs.frozen
class ResumeChanges:
    """The differences between a saved run's identity and this run's, and what becomes of each.

    A value that the script declares as it did then is restored as it was when the run was saved. A
    value that it declares otherwise applies from here on, and is logged. Another order of samples
    inside an epoch cannot be applied.

    Attributes:
        saved: the identity of the saved run; None if the checkpoint has none (formats 1 and 2):
            nothing is compared, and every saved value is restored.
        here: the identity of this run.
        found: the differences.
        pairs: the saved key of handlers that share a key here, and differ in their settings.
    """

    saved: RunIdentity | None
    here: RunIdentity
    found: Sequence[Difference] = ()
    pairs: Mapping[str, str] = attrs.field(factory=dict)

    @classmethod
    def between(cls, state: Mapping[str, Any], here: RunIdentity) -> ResumeChanges:
        """Compare the identity in a checkpoint, if it has one, with this run's.

        The initial value of a buffer that the saved run has changed since does not count.
        """
        if "identity" not in state:
            return cls(None, here)
        there = state["identity"]
        pairs = paired_by_settings(there["handlers"], here.values["handlers"])
        saved = RunIdentity(there).with_keys(pairs)
        found = [one for one in differences(saved, here) if not _has_moved(one, state["loss"])]
        return cls(saved, here, found, pairs)

    @property
    def groups_declared(self) -> int:
        """The number of parameter groups that the saved run started with."""
        declared = (self.saved or self.here).values["optimizer"]["groups"]
        return len(declared)

    def check(self, changes: WhenChanged, *, inside_epoch: bool) -> None:
        """Raise an error for a change that cannot be applied, or must not be.

        Args:
            changes: "refuse" to refuse every change of the script.
            inside_epoch: whether the run was saved inside an epoch.

        Raises:
            ResumeError: if the run was saved inside an epoch and the loader orders its samples
                otherwise.
            CheckpointError: if the script has changed, and `changes` is "refuse".
        """
        if self.saved is None:
            return
        order = order_differences(self.saved, self.here) if inside_epoch else []
        if order:
            first = order[0]
            raise ResumeError(
                f"the loader's {first.name} must be {first.before}, as when the run was saved "
                f"inside an epoch, got {first.now}. Change it between two epochs: resume from a "
                "checkpoint that was saved at the end of one"
            )
        of_script = [one for one in self.found if one.kind in {Kind.SCRIPT, Kind.INITIAL}]
        if changes == "refuse" and of_script:
            raise CheckpointError(
                'the script must be as it was when the run was saved, because of changes="refuse", '
                f"got {'; '.join(as_lines(of_script))}. Undo the changes, or pass "
                'changes="apply" to continue with them'
            )

    def reapply_settings(self, handlers: Mapping[str, Any]) -> None:
        """Set the settings that the script has changed on handlers of other libraries.

        The state of such a handler, a torch scheduler for example, contains its settings too, so
        that loading it has put the earlier ones back.
        """
        for one in self.found:
            section, _, rest = one.name.partition(".")
            key, _, name = rest.rpartition(".")
            holder = handlers.get(key) if section == "handlers" else None
            if holder is None or isinstance(holder, Handler) or ABSENT in (one.before, one.now):
                continue
            if isinstance(one.now, (bool, int, float, str)) and hasattr(holder, name):
                setattr(holder, name, one.now)

    def rebase_schedulers(self, handlers: Mapping[str, Any]) -> None:
        """Set the base rates that the script has changed on torch schedulers and their parts.

        The groups of their optimizers are loaded already.
        """
        if any(one.name.endswith("lr") for one in self.found):
            for holder in handlers.values():
                _rebase(holder)

    def groups_with_changes(
        self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return an optimizer's saved groups, with the options that the script has changed."""
        if self.saved is None:
            return [dict(group) for group in groups]
        return apply_script(optimizer, groups, self.saved, self.here)

    def restore_current(self, trainer: RunParts, current: Mapping[str, Any] | None) -> None:
        """Restore the modes and attributes that handlers and functions had changed."""
        if self.saved is not None and current is not None:
            restore_current(trainer, current, self.saved, self.here)

    def script_tensors(self, trainer: RunParts) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors that the script has changed, which a checkpoint's would overwrite.

        Returns:
            Each with a copy of its value.
        """
        held = tensors_of(trainer)
        names = [one.name.partition(".")[2] for one in self.found if one.name[:8] == "tensors."]
        return [(held[name], held[name].detach().clone()) for name in names if name in held]

    def log(self, fresh: Collection[str], missing: Collection[str]) -> None:
        """Log each change, and the handlers that have no saved state, or are gone."""
        if fresh:
            logger.warning(
                "The checkpoint has no state of %s; they start fresh.", ", ".join(sorted(fresh))
            )
        if missing:
            logger.warning(
                "The checkpoint has states of handlers that are not attached, which are ignored: "
                "%s.",
                ", ".join(sorted(missing)),
            )
        if self.saved is None:
            logger.warning(
                "The checkpoint, of an earlier version, does not say how its run was built: "
                "changes of the script are not found."
            )
        told = {f"handlers.{key}" for key in (*fresh, *missing)}
        rest = [one for one in self.found if one.name not in told]
        for kind in Kind:
            level = logging.INFO if kind is Kind.FUNCTION else logging.WARNING
            for line in as_lines(one for one in rest if one.kind is kind):
                logger.log(level, "%s.", line)


def _rebase(scheduler: Any) -> None:
    """Set the base rates of a scheduler to those of its optimizer's groups."""
    for part in getattr(scheduler, "_schedulers", ()):
        _rebase(part)
    rates, optimizer = getattr(scheduler, "base_lrs", None), getattr(scheduler, "optimizer", None)
    if isinstance(rates, list) and isinstance(optimizer, Optimizer):
        groups = optimizer.param_groups[: len(rates)]
        rates[: len(groups)] = [
            group.get("initial_lr", rate) for group, rate in zip(groups, rates, strict=False)
        ]


def _has_moved(one: Difference, saved: Mapping[str, Any]) -> bool:
    """Return whether a difference is that of a buffer of the loss that a run has changed."""
    buffer = saved.get(one.name.partition(".")[2]) if one.kind is Kind.INITIAL else None
    if not isinstance(buffer, Tensor) or not isinstance(one.before, str):  # no digest
        return False
    return tensor_digest(buffer) != one.before
