"""Parameter groups for all stages of a plan, and the frozen parameters of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import attrs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from diptych.engine.modules import named_parameters, unwrapped
from diptych.engine.name_patterns import check_pattern, matches, near_matches
from diptych.engine.trainer import Trainer
from diptych.handlers.optimization.parameter_groups import Membership, memberships
from diptych.handlers.optimization.schedules import set_rate
from diptych.handlers.stages.stage import Stage


@attrs.frozen(eq=False)
class StageGroup:
    """A group of parameters that have common options in every stage.

    Attributes:
        name: the path of the module that contains the parameters.
        names: the names of the parameters.
        options: the group's options in each stage; None if it is frozen there.
    """

    name: str
    names: list[str]
    options: list[dict[str, Any] | None]


class StageGroups:
    """Divides the parameters into groups that fit all stages and so never change.

    A checkpoint of any stage can be loaded into the optimizer of a new run.

    Raises:
        ValueError: see `parameter_groups`; the message names the stage.
    """

    def __init__(self, trainer: Trainer, stages: Sequence[Stage]) -> None:
        self.named = named_parameters(trainer.model, trainer.loss)
        found = [_members_of(stage, trainer, self.named) for stage in stages]
        self.trained = [list(members) for members in found]
        self.groups = _refined(list(self.named), found)
        first = trainer.optimizer.param_groups[0]
        self.defaults = {key: first[key] for key in trainer.optimizer.defaults}
        for group in self.groups:
            for options in group.options:
                _check_options(group, options, trainer.optimizer)
        self._norms = _norms(trainer)
        self._frozen_norms: list[nn.Module] = []

    def install(self, optimizer: Optimizer) -> None:
        """Replace the optimizer's groups; the states of the parameters are kept.

        Raises:
            ValueError: if the optimizer has several groups, whose options would be lost.
        """
        if len(optimizer.param_groups) > 1:
            raise ValueError(
                "a StagePlan makes the optimizer's groups, got an optimizer with "
                f"{len(optimizer.param_groups)}. Build it from plain parameters, and give the "
                "rates to the stages"
            )
        optimizer.param_groups = []
        for group in self.groups:
            rate = self.defaults["lr"]
            optimizer.add_param_group(
                {
                    "params": [self.named[name] for name in group.names],
                    "name": group.name,
                    "lr": rate.clone() if isinstance(rate, Tensor) else rate,
                }
            )

    def remove(self, optimizer: Optimizer) -> None:
        """Put the parameters into one group, as before `install`."""
        parameters = [self.named[name] for group in self.groups for name in group.names]
        optimizer.param_groups = []
        optimizer.add_param_group({"params": parameters, **self.defaults})

    def freeze(self, stage: int) -> None:
        """Set `requires_grad` on the parameters that a stage trains, and clear it on all others."""
        trained = set(self.trained[stage])
        for name, parameter in self.named.items():
            parameter.requires_grad_(name in trained)
            if name not in trained:
                parameter.grad = None
        before = self._frozen_norms
        self._frozen_norms = [n for n, names in self._norms if names and trained.isdisjoint(names)]
        for norm in before:
            norm.train(norm not in self._frozen_norms)

    def keep_frozen_norms(self) -> None:
        """Put the frozen norms back into eval mode if something has called `train()`."""
        for norm in self._frozen_norms:
            if norm.training:
                norm.eval()

    def set_options(self, optimizer: Optimizer, stage: int) -> None:
        """Set the options of the optimizer's groups in a stage, except the rates.

        Groups that were added during the run come last, and keep their own options and rates.
        """
        for group, plan in zip(optimizer.param_groups, self.groups, strict=False):
            options = {**self.defaults, **(plan.options[stage] or {})}
            group.update({key: value for key, value in options.items() if key != "lr"})

    def set_rates(self, optimizer: Optimizer, stage: int, factor: float) -> None:
        """Set the rates of the optimizer's groups in a stage times a factor; 0 for frozen ones."""
        for group, plan in zip(optimizer.param_groups, self.groups, strict=False):
            options = plan.options[stage]
            set_rate(group, 0.0 if options is None else factor * options["lr"])


def _members_of(
    stage: Stage, trainer: Trainer, named: dict[str, nn.Parameter]
) -> dict[str, Membership]:
    """Return the group of each parameter that a stage trains, by name."""
    try:
        for pattern in stage.trains:
            check_pattern(pattern, named)
        trained = [name for name in named if any(matches(name, p) for p in stage.trains)]
        members = memberships(trainer.model, trainer.loss, stage.rules, trained)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from error
    if not members:
        raise ValueError(f"stage {stage.name!r} must train a parameter, got {stage.trains!r}")
    return members


def _refined(names: Sequence[str], found: Sequence[dict[str, Membership]]) -> list[StageGroup]:
    """Group the parameters of each top-level part that every stage trains alike, or freezes."""
    parts: dict[str, list[str]] = {}
    for name in names:
        members = [members.get(name) for members in found]
        if any(members):
            # Top-level parts stay apart, so that each group can be named after its part.
            parts.setdefault(f"{name.partition('.')[0]}: {members}", []).append(name)
    groups: list[StageGroup] = []
    for held in parts.values():
        members = [members.get(held[0]) for members in found]
        options = [None if member is None else member.options for member in members]
        title = _title(held, members)
        same = sum(group.name.split("#")[0] == title for group in groups)
        groups.append(StageGroup(f"{title}#{same + 1}" if same else title, held, options))
    return groups


def _title(names: Sequence[str], members: Sequence[Membership | None]) -> str:
    paths = [name.split(".")[:-1] for name in names]
    levels = zip(*paths, strict=False)  # the first parts of all paths, the second parts, ...
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]
    spared = any(member is not None and member.name.endswith("/no_decay") for member in members)
    return (".".join(common) or "model") + ("/no_decay" if spared else "")


def _check_options(group: StageGroup, options: dict[str, Any] | None, optimizer: Optimizer) -> None:
    for key in options or {}:
        # A weight decay of 0 is fine for an optimizer that has no such option.
        unset = key == "weight_decay" and not (options or {})[key]
        if key not in optimizer.defaults and not unset:
            raise ValueError(
                f"options of {group.name!r} must be options of {type(optimizer).__name__}, got "
                f"{key!r}. {near_matches(key, optimizer.defaults)}"
            )


def _norms(trainer: Trainer) -> list[tuple[nn.Module, list[str]]]:
    """Return each norm with running statistics, and the parameters that decide if it is frozen.

    They are its own or, if it has none, those of the innermost module around it that has some.
    """
    found: list[tuple[nn.Module, list[str]]] = []
    for root, module in (("", trainer.model), ("loss.", trainer.loss)):
        bare = unwrapped(module)
        for path, part in bare.named_modules():
            if isinstance(part, _NormBase) and part.track_running_stats:
                found.append((part, _deciding(bare, path, root)))
    return found


def _deciding(root: nn.Module, path: str, prefix: str) -> list[str]:
    while True:
        module = root.get_submodule(path)
        names = [name for name, _ in module.named_parameters()]
        if names or not path:
            start = f"{prefix}{path}." if path else prefix
            return [f"{start}{name}".replace("_orig_mod.", "") for name in names]
        path = path.rpartition(".")[0]
