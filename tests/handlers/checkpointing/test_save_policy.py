"""The decision to save: equal to that of the flags before it, and to what the docs promise."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.handlers.checkpointing.save_policy import (
    Decision,
    Known,
    Memory,
    decide_at_end,
    decide_at_safe_point,
)
from tests.handlers.checkpointing.previous_policy import Action, PreviousPolicy

known = st.builds(
    Known,
    at=st.tuples(st.integers(0, 3), st.integers(0, 1)),
    is_finished=st.booleans(),
    position_is_lost=st.booleans(),
    signal=st.sampled_from([0, 0, 0, 15]),
    timeouts=st.integers(0, 3),
    values=st.lists(st.floats(0, 1), max_size=3),
    missing=st.sampled_from([None, None, None, "best must be a metric that the run publishes"]),
    save_failed=st.booleans(),
)
KINDS = ["safe point", "safe point", "safe point", "end", "due", "restore", "load", "start"]
moments = st.lists(st.tuples(st.sampled_from(KINDS), known), max_size=30)


class Policy:
    """The functions under test, called as `CheckpointManager` calls them."""

    def __init__(self) -> None:
        self.memory = Memory()

    def at(self, kind: str, known: Known) -> list[Action]:
        if kind == "due":
            self.memory = self.memory._replace(due=True)
        elif kind == "restore":
            self.memory = self.memory._replace(saved=None)
        elif kind == "load":
            self.memory = self.memory._replace(values=None)
        elif kind == "start":
            if self.memory.values is None:
                self.memory = self.memory._replace(values=len(known.values))
        else:
            decide = decide_at_safe_point if kind == "safe point" else decide_at_end
            decision = decide(self.memory, known)
            self.memory = decision.memory
            return actions(decision)
        return []


def actions(decision: Decision) -> list[Action]:
    """Return what the manager does on a decision, in order."""
    taken: list[Action] = [("save", decision.score)] if decision.save else []
    if decision.missing is not None:
        return [*taken, ("raise", decision.missing)]
    return [*taken, ("leave", decision.signal)] if decision.signal else taken


def previously(policy: PreviousPolicy, kind: str, known: Known) -> list[Action]:
    policy.actions = []
    calls: dict[str, Any] = {
        "safe point": lambda: policy.at_safe_point(known),
        "end": lambda: policy.at_end(known),
        "due": policy.fall_due,
        "restore": policy.restore,
        "load": lambda: policy.load(None),
        "start": lambda: policy.start(known),
    }
    calls[kind]()
    return policy.actions


@settings(max_examples=500)
@given(moments=moments, best=st.booleans(), timed=st.booleans())
def test_any_sequence_of_facts_gives_the_actions_and_the_memory_of_the_previous_code(
    moments, best, timed
):
    policy, previous = Policy(), PreviousPolicy(best=best, timed=timed)
    for kind, drawn in moments:
        known = drawn if best else drawn._replace(values=(), missing=None)
        known = known if timed else known._replace(timeouts=0)
        assert policy.at(kind, known) == previously(previous, kind, known)
        memory = policy.memory
        assert (memory.due, memory.timeouts) == (previous._due, previous._timed)
        assert memory.saved == previous._saved
        if best:
            assert memory.values == previous._scored


def test_an_idle_safe_point_leaves_the_memory_as_it_is():
    memory = Memory(values=2, timeouts=1, saved=(3, 3))
    decision = decide_at_safe_point(memory, Known(at=(4, 4), values=[0.1, 0.2], timeouts=1))
    assert decision == Decision(memory)
    assert decision.memory is memory


def test_a_due_save_waits_for_a_position_from_which_a_run_can_resume():
    lost = decide_at_safe_point(Memory(due=True), Known(at=(2, 2), position_is_lost=True))
    assert not lost.save
    at_epoch_end = decide_at_safe_point(lost.memory, Known(at=(3, 0)))
    assert at_epoch_end.save
    assert not at_epoch_end.memory.due


def test_a_new_score_is_saved_even_where_a_run_cannot_resume():
    decision = decide_at_safe_point(
        Memory(due=True), Known(at=(2, 2), position_is_lost=True, values=[0.5])
    )
    assert (decision.save, decision.score) == (True, 0.5)
    assert decision.memory.due  # the save that was due is still to come


def test_a_signal_saves_and_ends_the_run():
    decision = decide_at_safe_point(Memory(), Known(at=(2, 2), signal=15))
    assert (decision.save, decision.signal) == (True, 15)


def test_the_end_is_saved_unless_the_last_save_holds_it():
    assert decide_at_end(Memory(saved=(5, 5)), Known(at=(6, 0))).save
    assert not decide_at_end(Memory(saved=(6, 0)), Known(at=(6, 0))).save
    assert decide_at_end(Memory(saved=(6, 0)), Known(at=(6, 0), save_failed=True)).save
