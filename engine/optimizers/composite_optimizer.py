"""CompositeOptimizer: several torch optimizers behind the interface of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class CompositeOptimizer(Optimizer):
    """Several torch optimizers behind the interface of one.

    ```python
    optimizer = CompositeOptimizer(
        torch.optim.SGD(model.body.parameters(), lr=0.1),
        torch.optim.AdamW(model.head.parameters(), lr=1e-3),
    )
    trainer = Trainer(model, loss, optimizer, task=tasks.classification)
    ```

    A trainer with this optimizer treats all parameters alike: learning rates, clipping, guards,
    diagnostics, checkpoints and fp16's scaler see the parameter groups of every member. `step`
    makes the update of each member, exactly as the members alone would. A training step of your own
    may call `optimizer.members[0].step()`; with fp16's scaler it calls
    `scaler.step(optimizer, members=[0])`.

    Args:
        members: the optimizers; each parameter belongs to one of them.

    Attributes:
        members: the optimizers.

    Raises:
        TypeError: if a member is no torch optimizer.
        ValueError: if there is no member, or two of them hold one parameter.
    """

    members: tuple[Optimizer, ...]
    _owners: list[int]

    # torch's constructor would make groups of its own, so that it is not called.
    def __init__(self, *members: Optimizer) -> None:
        if not members:
            raise ValueError("members must be one optimizer or more, got none")
        for member in members:
            if not isinstance(member, Optimizer):
                raise TypeError(f"a member must be a torch Optimizer, got {member!r}")
        _check_disjoint(members)
        common = [key for key in members[0].defaults if all(key in m.defaults for m in members)]
        self.__setstate__(
            {
                "members": members,
                "defaults": {key: members[0].defaults[key] for key in common},
                "_owners": [],
            }
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members, as they are now; groups that are added later come last."""
        positions = dict.fromkeys(range(len(self.members)), 0)
        groups = []
        for owner in self._current_owners():
            groups.append(self.members[owner].param_groups[positions[owner]])
            positions[owner] += 1
        return groups

    @param_groups.setter
    def param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Keep only these of the groups, in this order."""
        owners = dict(zip(map(id, self.param_groups), self._current_owners(), strict=True))
        self._owners = [owners[id(group)] for group in groups]
        for index, member in enumerate(self.members):
            member.param_groups[:] = [group for group in groups if owners[id(group)] == index]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The states of all parameters."""
        return _States(self.members)

    def _current_owners(self) -> list[int]:
        """Return the member of each group, after groups were added to or removed from members."""
        for index, member in enumerate(self.members):
            more = len(member.param_groups) - self._owners.count(index)
            self._owners += [index] * more
            for _ in range(-more):
                self._owners.reverse()
                self._owners.remove(index)
                self._owners.reverse()
        return self._owners

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        members: Sequence[int] | None = None,
    ) -> float | None:
        """Make the update of every member.

        Args:
            closure: computes the loss and the gradients, once for all members.
            members: the numbers of the members to step. Default: all.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        given = ("grad_scale", "found_inf")  # from fp16's scaler, for fused members
        flags = {name: vars(self)[name] for name in given if name in vars(self)}
        for index in range(len(self.members)) if members is None else members:
            member = self.members[index]
            vars(member).update(flags)
            try:
                member.step()
            finally:
                for name in flags:
                    delattr(member, name)
        return value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether fp16's scaler lets the device decide on an update: if all members are fused."""
        name = "_step_supports_amp_scaling"
        return all(getattr(member, name, False) for member in self.members)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's
        """Clear the gradients of every member's parameters."""
        for member in self.members:
            member.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any], member: int | None = None) -> None:
        """Add a parameter group to a member.

        Args:
            param_group: the group, as in torch; its key "member" may hold the number too.
            member: the number of the member. Default: the only one.

        Raises:
            ValueError: if there are several members and none is named, or another one holds one of
                the parameters.
        """
        group = dict(param_group)
        named = group.pop("member", None)
        index = named if member is None else member
        if index is None and len(self.members) > 1:
            raise ValueError(
                f"member must be the number of one of the {len(self.members)} members, got None. "
                "Pass add_param_group(group, member=0)"
            )
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        held = {id(p) for own in self.param_groups for p in own["params"]}
        if any(id(p) in held for p in group["params"]):
            raise ValueError(
                "a parameter group must hold new parameters, got one that a member holds already"
            )
        self.members[index or 0].add_param_group(group)
        self._current_owners()

    def train(self) -> None:
        """Put members that have modes, such as schedule-free optimizers, into training mode."""
        for member in self.members:
            if hasattr(member, "train"):
                member.train()

    def eval(self) -> None:
        """Put members that have modes, such as schedule-free optimizers, into evaluation mode."""
        for member in self.members:
            if hasattr(member, "eval"):
                member.eval()

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all members in torch's layout: parameters are numbered throughout.

        Each group has the number of its member too, and `members` has their classes.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        parts = [member.state_dict() for member in self.members]
        groups, numbers = self._packed([part["param_groups"] for part in parts])
        state: dict[str, Any] = {
            "state": {
                numbers[owner, local]: values
                for owner, part in enumerate(parts)
                for local, values in part["state"].items()
            },
            "param_groups": groups,
            "members": self._classes(),
        }
        extra = [_without(part, "state", "param_groups") for part in parts]
        if any(extra):
            state["extra"] = extra
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def _packed(
        self, parts: Sequence[Sequence[dict[str, Any]]]
    ) -> tuple[list[dict[str, Any]], dict[tuple[int, int], int]]:
        """Return the groups of all members in order, and the number of each member's parameter."""
        left = [iter(part) for part in parts]
        numbers: dict[tuple[int, int], int] = {}
        groups = []
        for owner in self._current_owners():
            group = next(left[owner])
            for local in group["params"]:
                numbers[owner, local] = len(numbers)
            params = [numbers[owner, local] for local in group["params"]]
            groups.append({**group, "params": params, "member": owner})
        return groups, numbers

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of all members.

        Args:
            state_dict: from `state_dict`.

        Raises:
            ValueError: if it is of other members, or of other groups.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else changed
        if (saved := state.get("members", self._classes())) != self._classes():
            raise ValueError(
                f"members must be those of the state, {', '.join(saved)}, got "
                f"{', '.join(self._classes())}"
            )
        groups = [dict(group) for group in state["param_groups"]]
        owners = self._owners_of(groups)
        extra = state.get("extra", [{}] * len(self.members))
        for index, member in enumerate(self.members):
            own = [group for group, owner in zip(groups, owners, strict=True) if owner == index]
            member.load_state_dict({**extra[index], **_renumbered(own, state["state"])})
        self._owners = owners
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _owners_of(self, groups: list[dict[str, Any]]) -> list[int]:
        """Return the member of each saved group; remove it from the group."""
        here = self._current_owners()
        guessed = here if len(here) == len(groups) else [-1] * len(groups)
        owners = [group.pop("member", own) for group, own in zip(groups, guessed, strict=True)]
        if sorted(owners) != sorted(here):
            raise ValueError(
                f"members must have the groups of the state, which belong to the members {owners}, "
                f"got {here}"
            )
        return owners

    def _classes(self) -> list[str]:
        return [type(member).__name__ for member in self.members]

    def __getstate__(self) -> dict[str, Any]:
        names = ("members", "defaults", "_owners")
        return {name: self.__dict__[name] for name in names}


class _States(MutableMapping[Tensor, Any]):
    """The states of the parameters of several optimizers, each in its own optimizer."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = members

    def _of(self, parameter: Tensor) -> MutableMapping[Tensor, Any]:
        for member in self._members:
            if any(p is parameter for group in member.param_groups for p in group["params"]):
                return member.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, values: Any) -> None:
        self._of(parameter)[parameter] = values

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in member.state for member in self._members)

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        """Return the state of a parameter; the default, and no new state, if it has none."""
        found: Any = next(
            (m.state[parameter] for m in self._members if parameter in m.state), default
        )
        return found

    def __iter__(self) -> Iterator[Tensor]:
        for member in self._members:
            yield from list(member.state)

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)

    def clear(self) -> None:
        """Forget the states of all parameters."""
        for member in self._members:
            member.state.clear()


def _check_disjoint(members: Sequence[Optimizer]) -> None:
    holders: dict[int, int] = {}
    for index, member in enumerate(members):
        for parameter in (p for group in member.param_groups for p in group["params"]):
            other = holders.setdefault(id(parameter), index)
            if other != index:
                raise ValueError(
                    "members must hold different parameters, got one of shape "
                    f"{tuple(parameter.shape)} in the members {other} and {index}"
                )


def _renumbered(groups: list[dict[str, Any]], state: dict[int, Any]) -> dict[str, Any]:
    """Return the state dict of one member, whose parameters are numbered from 0."""
    numbers: dict[int, int] = {}
    for group in groups:
        for number in group["params"]:
            numbers[number] = len(numbers)
        group["params"] = [numbers[number] for number in group["params"]]
    own = {local: state[number] for number, local in numbers.items() if number in state}
    return {"state": own, "param_groups": groups}


def _without(part: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in names}
