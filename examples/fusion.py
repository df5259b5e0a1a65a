"""Image-text matching: a network that sees a drawing and a caption, on two towers (ALBEF).

python -m examples.fusion
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    GradientClipping,
    LearningRate,
    default_handlers,
    new_run,
    parameter_groups,
)
from diptych.losses import CLIPLoss, FusionHead, ImageTextMatchingLoss, WeightedSum
from examples.emoji.data import Emoji, TrainingPairs, collate, read_emoji, unseen_drawings
from examples.emoji.model import TwoTowers

EPOCHS, WIDTH, CANDIDATES = 12, 128, 10


@torch.no_grad()
def results_of(trainer: Trainer, emoji: Sequence[Emoji]) -> dict[str, float]:
    """Return the accuracy of the fusion on pairs and mismatches, and its recall as a reranker."""
    model, fusion = trainer.model.eval(), trainer.loss.losses["fusion"].fusion.eval()
    batches = unseen_drawings(emoji)
    encoded = {"image": model.encode_image, "text": model.encode_text}
    image, text = (
        torch.cat([encode(batch[side]) for batch in batches if side in batch])
        for side, encode in encoded.items()
    )
    own = torch.cat([batch["group"] for batch in batches if "image" in batch])
    towers = F.normalize(image) @ F.normalize(text).T
    _, nearest = towers.topk(CANDIDATES, dim=1)
    mismatch = torch.where(nearest[:, 0] == own, nearest[:, 1], nearest[:, 0])

    def matches(chosen: Tensor) -> Tensor:
        """Return the log odds that each image matches its chosen captions [n, k]."""
        pairs = image[:, None].expand(-1, chosen.shape[1], -1), text[chosen]
        no, yes = fusion(*(side.flatten(0, 1) for side in pairs)).unbind(dim=1)
        return (yes - no).view(chosen.shape)

    recognised = (matches(own[:, None]) > 0).float().mean()
    others = own.roll(len(own) // 2)
    rejected = [(matches(c[:, None]) <= 0).float().mean() for c in (others, mismatch)]
    ranked = nearest.gather(1, matches(nearest).argmax(dim=1, keepdim=True))[:, 0]
    return {
        "pairs recognised": float(recognised),
        "other captions rejected": float(rejected[0]),
        "nearest mismatches rejected": float(rejected[1]),
        "recall@1, towers": float((nearest[:, 0] == own).float().mean()),
        f"recall@1, fusion of the best {CANDIDATES}": float((ranked == own).float().mean()),
        f"recall@{CANDIDATES}, towers": float((nearest == own[:, None]).any(dim=1).float().mean()),
    }


def main(emoji: Sequence[Emoji], epochs: int = EPOCHS) -> dict[str, float]:
    """Train towers and fusion together; return the results on unseen drawings."""
    torch.manual_seed(0)
    model = TwoTowers(WIDTH)
    matching = ImageTextMatchingLoss(fusion=FusionHead(dim=WIDTH, hidden_dim=256))
    loss = WeightedSum(losses={"clip": CLIPLoss(), "fusion": matching})
    loader = SeededLoader(TrainingPairs(emoji), 128, seed=0, drop_last=True, collate=collate)
    groups = parameter_groups(model, weight_decay=0.01, lr=2e-3, loss=loss)
    trainer = Trainer(model, loss, torch.optim.AdamW(groups), task=tasks.image_text, seed=0)
    trainer.attach(
        LearningRate(warmup=len(loader)),
        GradientClipping(max_norm=1.0),
        *default_handlers(new_run("runs", "fusion")),
    )
    trainer.run(loader, max_epochs=epochs)
    return results_of(trainer, emoji)


if __name__ == "__main__":
    for name, value in main(read_emoji()).items():
        print(f"{name:32} {value:6.1%}")
