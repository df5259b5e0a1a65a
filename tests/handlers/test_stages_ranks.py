"""A plan on several ranks trains as it does in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.engine import Trainer, tasks
from diptych.handlers import Evaluation, Stage, StagePlan
from diptych.losses import CLIPLoss
from tests.handlers.stages.test_curriculum import TwoTowers, loader


def train_in_stages() -> dict[str, Tensor]:
    """Train in three stages, of which the second ends by its patience; return the weights."""
    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=1.0)
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu", seed=0)
    plan = StagePlan([
        Stage("image", trains="image", steps=3, lr=0.1),
        Stage("text", trains=["text", "loss"], epochs=9, lr=0.1, metric="val/loss", patience=1),
        Stage("both", epochs=1, lr=0.05, batch_size=10),
    ])  # fmt: skip
    trainer.attach(plan, Evaluation(list(loader()), loss=True))
    trainer.run(loader())
    both: nn.Module = nn.ModuleList([trainer.model, trainer.loss])
    weights = {name: value.detach().clone() for name, value in both.state_dict().items()}
    return {**weights, "iteration": torch.tensor(float(trainer.state.iteration))}


def test_two_ranks_end_with_the_weights_of_one(ranks):
    alone = train_in_stages()
    for weights in ranks.run(train_in_stages, [(), ()]):
        assert weights.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, msg=name)
