"""The optimizer's groups for all stages of a plan at once, and what is frozen in each."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Parameters that share a group in every stage.

    Attributes:
        name: the path of the module that holds them.
        names: theirs.
        options: for each stage the options of the group, None where it is frozen.
    """

    name: str
    names: list[str]
    options: list[dict[str, Any] | None]


class StageGroups:
    """Divides the parameters once for all stages, so that the optimizer's groups never change.

    A checkpoint of any stage then fits into the optimizer of a run that begins.

    Args:
        trainer: whose model, loss and optimizer.
        stages: of the plan.

    Raises:
        ValueError: as `parameter_groups`, naming the stage; or if the optimizer has groups already.
    """

    def __init__(self, trainer: Trainer, stages: Sequence[Stage]) -> None:
        self.named = named_parameters(trainer.model, trainer.loss)
        self.trained = [_trained(stage, self.named) for stage in stages]
        found = [
            _memberships(trainer, stage, names)
            for stage, names in zip(stages, self.trained, strict=True)
        ]
        self.groups = _refined(list(self.named), found)
        first = trainer.optimizer.param_groups[0]
        self.defaults = {key: first[key] for key in trainer.optimizer.defaults}
        for group in self.groups:
            for options in group.options:
                _check_options(group, options, trainer.optimizer)
        self._norms = _norms(trainer)
        self._frozen_norms: list[nn.Module] = []

    def install(self, optimizer: Optimizer) -> None:
        """Give the optimizer the groups; the state that it has of their parameters stays.

        Raises:
            ValueError: if it has several groups, whose options would be lost.
        """
        if len(optimizer.param_groups) > 1:
            raise ValueError(
                "a StagePlan makes the optimizer's groups, got an optimizer with "
                f"{len(optimizer.param_groups)}: build it with plain parameters, and give the "
                "stages the rates"
            )
        optimizer.param_groups.clear()
        for group in self.groups:
            rate = self.defaults["lr"]
            optimizer.add_param_group(
                {
                    "params": [self.named[name] for name in group.names],
                    "name": group.name,
                    "lr": rate.clone() if isinstance(rate, Tensor) else rate,
                }
            )

    def freeze(self, stage: int) -> None:
        """Let the parameters of a stage require gradients, and no others."""
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
        """Put the frozen norms into eval mode, where somebody has put them into train mode."""
        for norm in self._frozen_norms:
            if norm.training:
                norm.eval()

    def set_options(self, optimizer: Optimizer, stage: int) -> None:
        """Give the optimizer's groups the options that they have in a stage; rates come later."""
        for group, plan in zip(optimizer.param_groups, self.groups, strict=True):
            options = {**self.defaults, **(plan.options[stage] or {})}
            group.update({key: value for key, value in options.items() if key != "lr"})

    def set_rates(self, optimizer: Optimizer, stage: int, factor: float) -> None:
        """Give the optimizer's groups their rates in a stage times a factor; 0 where frozen."""
        for group, plan in zip(optimizer.param_groups, self.groups, strict=True):
            options = plan.options[stage]
            set_rate(group, 0.0 if options is None else factor * options["lr"])


def _trained(stage: Stage, named: dict[str, nn.Parameter]) -> list[str]:
    try:
        for pattern in stage.trains:
            check_pattern(pattern, named)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from error
    trained = [name for name in named if any(matches(name, p) for p in stage.trains)]
    if not trained:
        raise ValueError(f"stage {stage.name!r} must train something, got {stage.trains!r}")
    return trained


def _memberships(trainer: Trainer, stage: Stage, names: Sequence[str]) -> dict[str, Membership]:
    try:
        return memberships(trainer.model, trainer.loss, stage.rules, names)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from error


def _refined(names: Sequence[str], found: Sequence[dict[str, Membership]]) -> list[StageGroup]:
    """Return groups so fine that each lies within one group, or is frozen, in every stage."""
    parts: dict[str, list[str]] = {}
    for name in names:
        members = [members.get(name) for members in found]
        if any(members):
            # Two towers stay apart, so that each group has the name of its part.
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
    spared = any(member is not None and member.name.endswith("/no_decay") for member in members)
    return _common_path(names) + ("/no_decay" if spared else "")


def _common_path(names: Sequence[str]) -> str:
    paths = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or "model"


def _check_options(group: StageGroup, options: dict[str, Any] | None, optimizer: Optimizer) -> None:
    for key in options or {}:
        # Plain SGD has a weight decay too; an optimizer without takes none.
        unset = key == "weight_decay" and not (options or {})[key]
        if key not in optimizer.defaults and not unset:
            raise ValueError(
                f"options of {group.name!r} must be the optimizer's, got {key!r}, which "
                f"{type(optimizer).__name__} has not; {near_matches(key, optimizer.defaults)}"
            )


def _norms(trainer: Trainer) -> list[tuple[nn.Module, list[str]]]:
    """Return each norm with running statistics, and the parameters that decide whether it trains.

    Those are its own or, where it has none, those of the nearest module around it that has some.
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
