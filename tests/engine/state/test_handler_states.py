"""States of a checkpoint go to the handlers that they belong to."""

from __future__ import annotations

import pytest

from diptych.engine import CheckpointError
from diptych.engine.state.handler_states import match_states, paired_by_settings

SAVED = {"Early[a]": 1, "Early[b]": 2, "Curriculum[x]": 3, "Curriculum[x]#2": 4}


def test_states_follow_the_keys_whatever_the_order():
    here = ["Curriculum[x]", "Early[b]", "Early[a]", "Curriculum[x]#2"]

    assert match_states(SAVED, here) == SAVED


def test_a_new_handler_has_no_state_and_a_missing_one_drops_its_own():
    assert match_states(SAVED, ["Early[b]", "Early[c]"]) == {"Early[b]": 2}


def test_handlers_of_one_key_must_be_as_many_as_they_were():
    with pytest.raises(CheckpointError, match=r"Curriculum\[x\].*2, got 1"):
        match_states(SAVED, ["Curriculum[x]"])


def test_names_of_the_first_format_are_matched_by_class_and_order():
    saved = {"Early": 1, "Early_2": 2, "Own_Name": 3}
    here = ["Early[a]", "Own_Name", "Early[b]"]

    assert match_states(saved, here, by_class=True) == {
        "Early[a]": 1,
        "Early[b]": 2,
        "Own_Name": 3,
    }


def test_the_first_format_tells_no_more_handlers_of_a_class_apart_than_it_had():
    with pytest.raises(CheckpointError, match="Early"):
        match_states({"Early": 1}, ["Early[a]", "Early[b]"], by_class=True)


def test_handlers_of_one_key_are_told_apart_by_their_settings():
    saved = {"Early[x]": {"patience": 4}, "Early[x]#2": {"patience": 40}}

    def paired(*patience: int) -> dict[str, str]:
        keys = ("Early[x]", "Early[x]#2", "Early[x]#3")
        own = ({"patience": number} for number in patience)
        return paired_by_settings(saved, dict(zip(keys, own, strict=False)))

    assert paired(40, 4) == {"Early[x]": "Early[x]#2", "Early[x]#2": "Early[x]"}
    assert paired(40) == {"Early[x]": "Early[x]#2"}
    assert paired(9, 40, 4) == {"Early[x]#2": "Early[x]#2", "Early[x]#3": "Early[x]"}
    assert paired(40, 9) == {"Early[x]": "Early[x]#2", "Early[x]#2": "Early[x]"}
    assert paired(9) == {}  # either of them may have changed
    assert paired(4, 4) == {}
