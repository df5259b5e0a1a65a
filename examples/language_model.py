"""Language model: learn to write the names and keywords of emoji, character by character.

python -m examples.language_model
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    Evaluation,
    GradientClipping,
    LearningRate,
    default_handlers,
    new_run,
    parameter_groups,
)
from diptych.losses import CrossEntropyLoss
from examples.emoji.characters import CHARACTERS, EDGE, PAD, Descriptions, collate_texts, decode
from examples.emoji.data import Emoji, read_emoji
from examples.emoji.splits import UNSEEN_EMOJI

EPOCHS, WIDTH = 8, 256


class CharacterModel(nn.Module):
    """A gated recurrent network over characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 64, padding_idx=PAD)
        self.recurrent = nn.GRU(64, WIDTH, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, CHARACTERS] of the character after each of tokens [B, T]."""
        return self.head(self.dropout(self.recurrent(self.embedding(tokens))[0]))

    @torch.no_grad()
    def write(self, texts: int, length: int = 60) -> list[str]:
        """Return sampled texts; the temperature of 0.5 favours likely characters."""
        tokens = torch.full((texts, 1), EDGE)
        for _ in range(length):
            shares = (self(tokens)[:, -1] / 0.5).softmax(dim=1)
            tokens = torch.cat([tokens, torch.multinomial(shares, 1)], dim=1)
        return [decode(text) for text in tokens]


def frequency_perplexity(trained: Descriptions, held_out: Descriptions) -> float:
    """Return the perplexity of a model that knows only the frequency of each character."""
    counts = torch.ones(CHARACTERS, dtype=torch.float64)
    for text in trained:
        counts += torch.bincount(text[1:], minlength=CHARACTERS)
    log_shares = (counts / counts.sum()).log()
    return float((-log_shares[torch.cat([text[1:] for text in held_out])]).mean().exp())


def main(emoji: Sequence[Emoji], epochs: int = EPOCHS) -> tuple[dict[str, float], list[str]]:
    """Train; return perplexities per character on unseen emoji, and texts of the model."""
    torch.manual_seed(0)
    seen = Descriptions([one for one in emoji if one.split != UNSEEN_EMOJI])
    unseen = Descriptions([one for one in emoji if one.split == UNSEEN_EMOJI])
    loader = SeededLoader(seen, 64, seed=0, collate=collate_texts)
    held_out = SeededLoader(unseen, 64, shuffle=False, collate=collate_texts)
    model, loss = CharacterModel(), CrossEntropyLoss(ignore_index=PAD)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01, lr=4e-3))
    trainer = Trainer(model, loss, optimizer, task=tasks.next_token, seed=0)
    trainer.attach(
        LearningRate(warmup=len(loader)),
        GradientClipping(max_norm=1.0),
        Evaluation(held_out, at_start=True),
        *default_handlers(new_run("runs", "language_model"), best="val/loss"),
    )
    trainer.run(loader, max_epochs=epochs)
    losses = trainer.metrics.get_history("val/loss")
    results = {
        "untrained": math.exp(losses[0]),
        "frequencies": frequency_perplexity(seen, unseen),
        "trained": math.exp(losses[-1]),
    }
    return results, model.eval().write(5)


if __name__ == "__main__":
    perplexities, texts = main(read_emoji())
    for name, perplexity in perplexities.items():
        print(f"{name:12} {perplexity:6.2f}")
    print("\n".join(["", *texts]))
