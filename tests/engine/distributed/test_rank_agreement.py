"""Ranks whose trainers differ raise an error that names the difference, on all of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import unlike_ranks
from tests.losses.ranks import Ranks

pytestmark = pytest.mark.xdist_group("rank_agreement")  # its processes start once, on one worker


@pytest.fixture(scope="module")
def outcomes(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the errors of two processes in each script."""
    return ranks.run(unlike_ranks.outcomes, [(tmp_path_factory.mktemp("unlike"),)] * 2)


@pytest.mark.parametrize("name", unlike_ranks.REFUSED)
def test_a_difference_that_would_change_or_hang_the_run_is_named_on_all_ranks(outcomes, name: str):
    _, parts = unlike_ranks.REFUSED[name]
    for outcome in outcomes:
        assert "must be the same on all ranks, got" in outcome[name]
        for part in parts:
            assert part in outcome[name]
    assert outcomes[0][name] == outcomes[1][name]


@pytest.mark.parametrize("name", unlike_ranks.ALLOWED)
def test_what_decides_no_result_may_differ(outcomes, name: str):
    assert [outcome[name] for outcome in outcomes] == ["", ""]
