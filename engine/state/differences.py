"""The differences of two run identities, and what becomes of each when a run resumes."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from diptych.engine.state.run_identity import RunIdentity, order_settings

ABSENT = "absent"
ENVIRONMENT = (
    "versions",
    "ranks",
    "trainer.device",
    "trainer.prefetch",
    "trainer.compile",
    "trainer.shard",
    "trainer.microbatch_size",
)
"""Values that, by the library's promise, change no result beyond rounding."""

MANY = ("requires_grad", "training")
"""Sections with a value for each parameter or module, whose differences are listed together."""


class Kind(enum.Enum):
    """The kind of a difference.

    Attributes:
        SCRIPT: the script has changed; its value applies from here on.
        INITIAL: the script has changed the initial value of a learned parameter, which the
            checkpoint holds: the checkpoint's value stays.
        FUNCTION: a function at an event has changed, of which it is not known what it does.
        ENVIRONMENT: the machine, or how the run is divided over it, has changed.
    """

    SCRIPT = "changed in the script"
    INITIAL = "changed in the script; the checkpoint's learned value stays"
    FUNCTION = "a function at an event, changed in the script"
    ENVIRONMENT = "another environment"


@attrs.frozen
class Difference:
    """A value in which two identities differ.

    Attributes:
        name: the dotted name of the value.
        before: the value of the first identity; `ABSENT` if it has none.
        now: the value of the second identity.
    """

    name: str
    before: Any
    now: Any

    @property
    def kind(self) -> Kind:
        """The kind of the difference, by the value's name."""
        if any(self.name == name or self.name.startswith(f"{name}.") for name in ENVIRONMENT):
            return Kind.ENVIRONMENT
        section = self.name.partition(".")[0]
        return {"functions": Kind.FUNCTION, "initial": Kind.INITIAL}.get(section, Kind.SCRIPT)

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.now} ({self.kind.value})"


def differences(first: RunIdentity, second: RunIdentity) -> list[Difference]:
    """Return every value in which two identities differ, by name.

    A handler, module or group that only one of them has is one difference.
    """
    found = list(_walk(first.values, second.values, ""))
    known = {"handlers": "handlers.", "order": "order"}
    changed = {d.name.split(".")[1] for d in found if d.name.startswith(known["handlers"])}
    # The order of handlers is a difference of its own only if the handlers are the same.
    only = {d.name for d in found if ABSENT in (d.before, d.now)}
    if any(f"handlers.{key}" in only for key in changed):
        found = [d for d in found if d.name != known["order"]]
    return found


def _walk(first: Any, second: Any, name: str) -> Iterator[Difference]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys((*first, *second)):
            path = f"{name}.{key}" if name else str(key)
            yield from _walk(first.get(key, ABSENT), second.get(key, ABSENT), path)
    elif _plain(first) != _plain(second):
        yield Difference(name, _shown(first), _shown(second))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> Any:
    """Return a value for a message: a part that only one identity has is "present"."""
    return "present" if isinstance(value, Mapping) else value


def as_lines(found: Iterable[Difference]) -> list[str]:
    """Return one line for each difference; parameters and modules that changed alike share one."""
    lines: list[str] = []
    alike: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for one in found:
        section, _, name = one.name.partition(".")
        if section in MANY:
            alike[section, f"{one.before} -> {one.now} ({one.kind.value})"].append(name)
        else:
            lines.append(str(one))
    lines += [f"{section} of {names(held)} {text}" for (section, text), held in alike.items()]
    return lines


def names(held: Sequence[str]) -> str:
    """Return a list of names, shortened."""
    return ", ".join(held[:8]) + (f" and {len(held) - 8} more" if len(held) > 8 else "")


def order_differences(saved: RunIdentity, here: RunIdentity) -> list[Difference]:
    """Return the differences that change the order of the samples inside an epoch."""
    there, own = (order_settings(one.values["loader"]) for one in (saved, here))
    return list(_walk(there, own, "")) if there and own else []
