"""Captioning: an encoder-decoder that learns to name drawings, with CoCa's loss.

python -m examples.captioning
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer
from diptych.handlers import (
    GradientClipping,
    LearningRate,
    default_handlers,
    new_run,
    parameter_groups,
)
from diptych.losses import CaptioningLoss
from examples.emoji import names as named
from examples.emoji.data import Batch, Emoji, read_emoji
from examples.emoji.labels import unseen_emoji_drawings
from examples.emoji.model import ImageEncoder
from examples.emoji.names import EDGE, PAD, Words, overlap, split
from examples.emoji.splits import UNSEEN_DRAWING

EPOCHS, WIDTH = 12, 256


class Captioner(nn.Module):
    """An image encoder, a text encoder, and a decoder that sees the image and writes the text."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.image = ImageEncoder(WIDTH, width=16)
        self.embedding = nn.Embedding(words, WIDTH, padding_idx=PAD)
        self.reader = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.writer = nn.GRU(2 * WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, words)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image and text features [B, WIDTH], and logits [B, T, words]."""
        image_features, read = self.image(image), self.reader(self.embedding(tokens))[0]
        last = (tokens != PAD).sum(dim=1) - 1
        text_features = read[torch.arange(len(read)), last]
        seen = image_features[:, None].expand(-1, tokens.shape[1], -1)
        logits = self.head(self.writer(torch.cat([read, seen], dim=2))[0])
        return image_features, text_features, logits

    @torch.no_grad()
    def name(self, image: Tensor, length: int = 12) -> Tensor:
        """Return the name of each drawing by greedy decoding, [B, length + 1]."""
        tokens = torch.full((len(image), 1), EDGE)
        for _ in range(length):
            tokens = torch.cat([tokens, self(image, tokens)[2][:, -1:].argmax(dim=2)], dim=1)
        return tokens


def captioned(model: Captioner, batch: Batch) -> Batch:
    """The task: return the features that the loss compares, the logits and the target names."""
    image, text, logits = model(batch["image"], batch["tokens"])
    outputs = {"image_features": image, "text_features": text, "logits": logits}
    return {**outputs, "labels": batch["tokens"], "groups": batch["group"]}


def main(emoji: Sequence[Emoji], epochs: int = EPOCHS) -> tuple[dict[str, float], list[str]]:
    """Train; return the accuracy of names for unseen drawings, and some of the names."""
    torch.manual_seed(0)
    words, collate = Words(emoji), named.collate_named
    model, loss = Captioner(len(words)), CaptioningLoss(pad_id=PAD)
    loader = SeededLoader(named.NamedDrawings(emoji, words), 64, seed=0, collate=collate)
    groups = parameter_groups(model, weight_decay=0.01, lr=2e-3, loss=loss)
    trainer = Trainer(model, loss, torch.optim.AdamW(groups), task=captioned, seed=0)
    trainer.attach(
        LearningRate(warmup=len(loader)),
        GradientClipping(max_norm=1.0),
        *default_handlers(new_run("runs", "captioning")),
    )
    trainer.run(loader, max_epochs=epochs)
    model.eval()
    results, written = {}, []
    drawings = [(i, "twemoji") for i, one in enumerate(emoji) if one.split == UNSEEN_DRAWING]
    for kind, chosen in (("drawing", drawings), ("emoji", unseen_emoji_drawings(emoji))):
        batch = named.named_batch(emoji, chosen, words)
        found = [words.decode(name) for name in model.name(batch["image"])]
        names = [" ".join(split(emoji[i].name)) for i, _ in chosen]
        results[f"unseen {kind}, word for word"] = sum(map(str.__eq__, found, names)) / len(names)
        results[f"unseen {kind}, words in common"] = overlap(found, names)
        others = names[len(names) // 2 :] + names[: len(names) // 2]
        results[f"unseen {kind}, with other names"] = overlap(found, others)
        written += [f"{a} -> {b}" for a, b in list(zip(names, found, strict=True))[:60:10]]
    return results, written


if __name__ == "__main__":
    shares, names = main(read_emoji())
    for where, share in shares.items():
        print(f"{where:32} {share:6.1%}")
    print("\n".join(names))
