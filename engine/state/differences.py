"""The differences of two run identities, and what becomes of each when a run resumes."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from diptych.engine.name_patterns import SHOWN, listed
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
        name = "order of handlers" if self.name == "order" else self.name
        return f"{name} {_text(self.before)} -> {_text(self.now)} ({self.kind.value})"


def differences(first: RunIdentity, second: RunIdentity) -> list[Difference]:
    """Return every value in which two identities differ, by name.

    A handler, module or group that only one of them has is one difference. The order of handlers is
    one only if the handlers are the same. The current rate of a schedule, and the rates that a
    scheduler keeps, follow from the base rate of the group.
    """
    walked = _walk(first.values, second.values, "")
    found = {one.name: one for one in walked if not _is_unknown(one, first, second)}
    in_one = any(
        name.startswith("handlers.") and ABSENT in (one.before, one.now)
        for name, one in found.items()
    )
    return [
        one
        for name, one in found.items()
        if not (in_one and name == "order") and not _follows(one, found)
    ]


def _is_unknown(one: Difference, first: RunIdentity, second: RunIdentity) -> bool:
    """Return whether a value is missing because it was not described then, or not given yet."""
    if one.name.startswith("loader."):
        return not (first.values["loader"] and second.values["loader"])
    is_private = one.before == ABSENT and one.name.rpartition(".")[2].startswith("_")
    return "held" not in first.values and (is_private or one.name == "held")  # an earlier version


def _follows(one: Difference, found: Mapping[str, Difference]) -> bool:
    """Return whether a difference of rates follows from one that is listed."""
    path, _, name = one.name.rpartition(".")
    if name == "initial_lr":
        return ABSENT in (one.before, one.now)  # a schedule is new or gone
    if name == "base_lrs":
        return any(other.endswith(".initial_lr") for other in found)
    return (
        name == "lr"
        and f"{path}.initial_lr" in found
        and not _follows(found[f"{path}.initial_lr"], found)
    )


def _walk(first: Any, second: Any, name: str) -> Iterator[Difference]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.get("class") != second.get("class"):  # its settings are others too
            first, second = ({"class": one.get("class")} for one in (first, second))
        for key in dict.fromkeys((*first, *second)):
            path = f"{name}.{key}" if name else str(key)
            yield from _walk(first.get(key, ABSENT), second.get(key, ABSENT), path)
    elif _plain(first) != _plain(second):
        yield Difference(name, _shown(first), _shown(second))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _shown(value: Any) -> Any:
    """Return a value for a message: a part that only one identity has is "present"."""
    return "present" if isinstance(value, Mapping) else value


def as_lines(found: Iterable[Difference]) -> list[str]:
    """Return one line for each difference; parameters and modules that changed alike share one."""
    parts: defaultdict[str, list[str]] = defaultdict(list)
    alike: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for one in found:
        section, _, name = one.name.partition(".")
        if section in MANY:
            alike[section, f"{one.before} -> {one.now} ({one.kind.value})"].append(name)
        else:
            parts[".".join(one.name.split(".")[:2])].append(str(one))
    lines = [line for part, held in parts.items() for line in _shortened(part, held)]
    lines += [f"{section} of {listed(held)} {text}" for (section, text), held in alike.items()]
    return lines


def _shortened(part: str, lines: Sequence[str]) -> list[str]:
    """Return the lines about a part: the first ones, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"{part}: {more} more values differ"] if more > 0 else list(lines)


def order_differences(saved: RunIdentity, here: RunIdentity) -> list[Difference]:
    """Return the differences that change the order of the samples inside an epoch."""
    there, own = (order_settings(one.values["loader"]) for one in (saved, here))
    return list(_walk(there, own, "")) if there and own else []
