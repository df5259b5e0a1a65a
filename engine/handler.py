"""The contract of a handler: what it attaches to, what it changes, and what names its state."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import attrs

from diptych._argument_names import names_the_right_arguments_of


class Change(enum.Enum):
    """A part of a run that a handler may change; the value is the word for people."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    BATCH = "batch"
    RATES = "rates"
    LOSS = "loss"
    TRAINABLE = "trainable parameters"
    MODE = "training mode"
    BUFFERS = "buffers"
    RUN_LENGTH = "length of the run"
    RANDOM_STATE = "random numbers"


@attrs.frozen
class Finding:
    """A problem that a handler has found in the run.

    Attributes:
        rule: the name of the rule that found it.
        step: the iteration at which it was found.
        evidence: the numbers that show it, in words.
        remedy: what to do about it.
    """

    rule: str
    step: int
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule} at iteration {self.step}: {self.evidence}. {self.remedy}"


@runtime_checkable
class Attachable(Protocol):
    """Any object that attaches itself to a trainer's events: this library's, Ignite's or yours."""

    def attach(self, engine: Any, /) -> object:
        """Add this object's functions to the events of the engine."""


@runtime_checkable
class Stateful(Protocol):
    """An object whose state is part of a checkpoint."""

    def state_dict(self) -> Any:
        """Return what the rest of the run needs."""

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Continue from a state that `state_dict` returned."""


class Handler(ABC):
    """A handler with a declared contract; every handler of this library derives from it.

    A plain object with `attach(engine)` works too: `contract_of` returns the defaults for it. A
    handler with memory also has `state_dict` and `load_state_dict`.

    ```python
    class ScaledGradients(Handler):
        changes = frozenset({Change.GRADIENTS})

        def attach(self, trainer):
            trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._scale)
    ```

    Attributes:
        changes: what the handler changes. Empty: it only reports, and the run is the same without
            it.
        collective: whether it communicates with the other ranks, or publishes values, which are
            averaged over ranks. Every rank must have such a handler, as every rank must have one
            that changes something; any other may exist on some ranks only.
        makes_weights: whether its state is a result of the run, as averaged weights are, though the
            training does not depend on it. Its settings are compared when a run resumes.
        findings: the problems that it has found so far.
        leaves_traces: whether what it does cannot be undone, as what it sends to a service. A dry
            run leaves it out.
    """

    __slots__ = ()

    changes: ClassVar[frozenset[Change]] = frozenset()
    leaves_traces: ClassVar[bool] = False
    collective: ClassVar[bool] = False
    makes_weights: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "__attrs_attrs__" in vars(cls):  # attrs makes a class anew, with a constructor
            names_the_right_arguments_of(cls)

    @abstractmethod
    def attach(self, trainer: Any, /) -> object:
        """Add this handler's functions to the trainer's events."""

    @property
    def role(self) -> str:
        """The part of `key` that tells two handlers of one class apart: a metric, a prefix."""
        return ""

    @property
    def key(self) -> str:
        """The key of the handler's state in a checkpoint; independent of the run directory."""
        return key_of(type(self), self.role)

    @property
    def findings(self) -> Sequence[Finding]:
        """The problems that the handler has found so far, in order."""
        return ()

    def for_trial(self, trial: Any) -> Handler | None:
        """Return a copy for a `Trial` of `Trainer.dry_run` that leaves no trace; None: left out.

        By default the handler is made again from its arguments; a path among them leads into the
        trial's scratch directory.
        """
        if self.leaves_traces:
            return None
        copied: Handler = trial.rebuilt(self)
        return copied


@attrs.frozen
class Contract:
    """The declared properties of an attached object.

    Checkpoints read the key, the certificate and TensorBoard's HParams the changes, and sinks the
    findings.

    Attributes:
        key: the name of its state in a checkpoint.
        changes: what it changes; empty: it only reports.
        findings: the problems that it has found so far.
    """

    key: str
    changes: frozenset[Change] = frozenset()
    findings: Sequence[Finding] = ()


def contract_of(attached: object) -> Contract:
    """Return the contract of an attached object; the defaults for one that is no `Handler`.

    A plain object, or a function's owner, may declare `changes` too: members of `Change` or their
    values.
    """
    if isinstance(attached, Handler):
        return Contract(attached.key, attached.changes, attached.findings)
    declared = getattr(attached, "changes", ())
    if not isinstance(declared, (tuple, list, set, frozenset)):  # another library's attribute
        declared = ()
    return Contract(key_of(type(attached)), frozenset(Change(change) for change in declared))


def key_of(kind: type, role: str = "") -> str:
    """Return the key of a handler of a class: the class's name, and the role in brackets."""
    return f"{kind.__name__}[{role}]" if role else kind.__name__
