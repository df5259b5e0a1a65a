"""The decision to save: equal to that of the flags before it, and to what the docs promise."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.handlers.checkpointing.save_policy import (
    RunStatus,
    SaveDecision,
    SaveState,
    decide_at_end,
    decide_at_restore,
    decide_at_safe_point,
)
from tests.handlers.checkpointing.previous_policy import Action, PreviousPolicy

statuses = st.builds(
    RunStatus,
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
moments = st.lists(st.tuples(st.sampled_from(KINDS), statuses), max_size=30)


class Policy:
    """The functions under test, called as `CheckpointManager` calls them."""

    def __init__(self) -> None:
        self.state = SaveState()

    def at(self, kind: str, status: RunStatus) -> list[Action]:
        if kind == "due":
            self.state = self.state._replace(due=True)
        elif kind == "restore":
            self.state = self.state._replace(saved=None)
        elif kind == "load":
            self.state = self.state._replace(values=None)
        elif kind == "start":
            if self.state.values is None:
                self.state = self.state._replace(values=len(status.values))
        else:
            decide = decide_at_safe_point if kind == "safe point" else decide_at_end
            decision = decide(self.state, status)
            self.state = decision.state
            return actions(decision)
        return []


def actions(decision: SaveDecision) -> list[Action]:
    """Return what the manager does on a decision, in order."""
    taken: list[Action] = [("save", decision.score)] if decision.save else []
    if decision.missing is not None:
        return [*taken, ("raise", decision.missing)]
    return [*taken, ("leave", decision.signal)] if decision.signal else taken


def previously(policy: PreviousPolicy, kind: str, status: RunStatus) -> list[Action]:
    policy.actions = []
    calls: dict[str, Any] = {
        "safe point": lambda: policy.at_safe_point(status),
        "end": lambda: policy.at_end(status),
        "due": policy.fall_due,
        "restore": policy.restore,
        "load": lambda: policy.load(None),
        "start": lambda: policy.start(status),
    }
    calls[kind]()
    return policy.actions


@settings(max_examples=500)
@given(moments=moments, best=st.booleans(), timed=st.booleans())
def test_any_sequence_of_facts_gives_the_actions_and_the_state_of_the_previous_code(
    moments, best, timed
):
    policy, previous = Policy(), PreviousPolicy(best=best, timed=timed)
    for kind, drawn in moments:
        status = drawn if best else drawn._replace(values=(), missing=None)
        status = status if timed else status._replace(timeouts=0)
        assert policy.at(kind, status) == previously(previous, kind, status)
        state = policy.state
        assert (state.due, state.timeouts) == (previous._due, previous._timed)
        assert state.saved == previous._saved
        if best:
            assert state.values == previous._scored


def test_an_idle_safe_point_leaves_the_memory_as_it_is():
    state = SaveState(values=2, timeouts=1, saved=(3, 3))
    decision = decide_at_safe_point(state, RunStatus(at=(4, 4), values=[0.1, 0.2], timeouts=1))
    assert decision == SaveDecision(state)
    assert decision.state is state


def test_a_due_save_waits_for_a_position_from_which_a_run_can_resume():
    lost = decide_at_safe_point(SaveState(due=True), RunStatus(at=(2, 2), position_is_lost=True))
    assert not lost.save
    at_epoch_end = decide_at_safe_point(lost.state, RunStatus(at=(3, 0)))
    assert at_epoch_end.save
    assert not at_epoch_end.state.due


def test_a_new_score_is_saved_even_where_a_run_cannot_resume():
    decision = decide_at_safe_point(
        SaveState(due=True), RunStatus(at=(2, 2), position_is_lost=True, values=[0.5])
    )
    assert (decision.save, decision.score) == (True, 0.5)
    assert decision.state.due  # the save that was due is still to come


def test_a_signal_saves_and_ends_the_run():
    decision = decide_at_safe_point(SaveState(), RunStatus(at=(2, 2), signal=15))
    assert (decision.save, decision.signal) == (True, 15)


def test_a_score_that_comes_after_the_last_save_is_saved_at_the_end():
    decision = decide_at_end(SaveState(saved=(6, 0)), RunStatus(at=(6, 0), values=[0.5]))
    assert (decision.save, decision.score) == (True, 0.5)


def test_the_end_is_saved_unless_the_last_save_holds_it():
    assert decide_at_end(SaveState(saved=(5, 5)), RunStatus(at=(6, 0))).save
    assert not decide_at_end(SaveState(saved=(6, 0)), RunStatus(at=(6, 0))).save
    assert decide_at_end(SaveState(saved=(6, 0)), RunStatus(at=(6, 0), save_failed=True)).save


@settings(max_examples=200)
@given(judged=st.integers(0, 3), status=statuses)
def test_what_was_loaded_is_saved_only_for_a_score_that_nobody_has_judged(judged, status):
    state = SaveState(values=judged, saved=None)
    decision = decide_at_restore(state, status)
    unjudged = bool(status.values) and len(status.values) != judged
    assert decision.save is unjudged
    assert decision.score == (status.values[-1] if unjudged else None)
    assert decision.state.values == len(status.values)
    assert decision.state.saved == (status.at if unjudged else None)
    assert (decision.signal, decision.missing) == (0, None)  # they are for the run that follows
