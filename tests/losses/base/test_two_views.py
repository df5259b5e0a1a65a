"""Two views as one set: anchors, candidates and matches."""

import torch

from diptych.losses import CLIPLoss
from diptych.losses.base.two_views import two_views
from tests.losses.oracles import draw


def test_every_view_has_all_others_as_candidates_and_matches_its_partner() -> None:
    first, second = draw(3, 2), draw(3, 2, seed=1)
    pairs = CLIPLoss().prepare(first, second, torch.tensor([5, 6, 5]))
    anchors, positives, batch = two_views(pairs)
    assert batch.sizes == (6,)
    assert torch.equal(anchors, torch.cat((pairs.first, pairs.second)))
    matches = [[j for j in range(6) if row[j]] for row in positives.matches().tolist()]
    assert matches == [[2, 3, 5], [4], [0, 3, 5], [0, 2, 5], [1], [0, 2, 3]]
    assert [row.index(True) for row in positives.own().tolist()] == [3, 4, 5, 0, 1, 2]
    assert [row.index(True) for row in positives.holds_itself().tolist()] == list(range(6))
