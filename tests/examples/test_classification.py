"""The classification example trains with both of its losses."""

from __future__ import annotations

import pytest

from examples.classification import LOSSES, main


@pytest.mark.parametrize("loss", LOSSES)
def test_it_trains_and_tells_its_accuracies(loss, emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = main(loss, emoji[::12], epochs=2)
    assert ("trained, logits" in results) == (loss == "cross_entropy")
    assert {"constant", "untrained, kNN", "trained, kNN"} <= results.keys()
    assert all(0 <= accuracy <= 1 for accuracy in results.values())
