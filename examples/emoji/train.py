"""Train two towers on emoji and captions, and evaluate them on unseen emoji and drawings.

    python examples/emoji/train.py
    torchrun --nproc-per-node=2 examples/emoji/train.py

Takes some two minutes on two CPU cores. `--help` lists the flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite import distributed as idist
from torch import Tensor

from diptych.engine import (
    Evaluator,
    SeededLoader,
    Trainer,
    of_this_rank,
    process_group,
    tasks,
)
from diptych.handlers import (
    EmbeddingProjector,
    Evaluation,
    FirstLayerFilters,
    GradientClipping,
    LearningRate,
    PairSamples,
    RetrievalGallery,
    RetrievalRecall,
    default_handlers,
    latest_run,
    new_run,
)
from diptych.handlers.sinks.tensorboard import tensorboard_command
from diptych.losses import get_loss

sys.path.insert(0, str(Path(__file__).parents[2]))  # to find `examples` when run as a file
from examples.emoji.data import (
    Batch,
    Emoji,
    TrainingPairs,
    collate,
    collate_pairs,
    read_emoji,
    unseen_captions,
    unseen_drawings,
    unseen_emoji,
    unseen_pairs,
)
from examples.emoji.model import TwoTowers
from examples.emoji.results import RANKS, recall_of, results_table

LOSSES = ("clip", "siglip", "simclr", "decoupled", "hard_negative", "triplet", "vicreg")
RUNS, NAME = Path("runs"), "emoji"
OVERVIEW = "http://localhost:6006/#custom_scalars&_smoothingWeight=0"


def one_side(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task for evaluation batches, which contain either images or captions, with groups."""
    if "image" in batch:
        return {"image_features": model.encode_image(batch["image"]), "groups": batch["group"]}
    return {"text_features": model.encode_text(batch["text"]), "groups": batch["group"]}


def unseen_samples(emoji: list[Emoji], batches: list[Batch]) -> PairSamples:
    """Return the unseen emoji, for pictures of retrieval results."""
    images = torch.cat([batch["image"] for batch in batches if "image" in batch])
    captions = unseen_captions(emoji)
    return PairSamples(batches=batches, images=images, captions=captions, task=one_side)


def held_out_pairs(emoji: list[Emoji], size: int) -> SeededLoader:
    """Return one batch as large as those of training: a contrastive loss depends on the size."""
    pairs = unseen_pairs(emoji)[:size]
    return SeededLoader(pairs, len(pairs), shuffle=False, collate=collate_pairs)


def build_trainer(flags: argparse.Namespace) -> Trainer:
    """Return a trainer with model, loss and optimizer, without handlers."""
    torch.manual_seed(flags.seed)
    model, loss = TwoTowers(), get_loss(flags.loss)
    optimizer = torch.optim.Adam(
        [*model.parameters(), *loss.parameters()], lr=2e-3, betas=(0.9, 0.98), fused=True
    )
    return Trainer(
        model,
        loss,
        optimizer,
        task=tasks.image_text,
        precision=flags.precision,
        microbatch_size=flags.microbatch_size,
        seed=flags.seed,
    )


def main() -> None:
    """Train, evaluate, and print the results."""
    flags = parse_flags()
    run_dir = flags.run_dir or find_run(resume=flags.resume)
    emoji = read_emoji()
    loader = SeededLoader(
        TrainingPairs(emoji), flags.batch_size, seed=flags.seed, drop_last=True, collate=collate
    )
    splits = {"unseen_drawing": unseen_drawings(emoji), "unseen_emoji": unseen_emoji(emoji)}
    samples = unseen_samples(emoji, splits["unseen_emoji"])
    shares = {split: of_this_rank(batches) for split, batches in splits.items()}

    trainer = build_trainer(flags)
    trainer.attach(
        LearningRate(warmup=len(loader) * flags.epochs // 10, decay="cosine"),
        GradientClipping(max_norm=1.0),
        Evaluation(held_out_pairs(emoji, flags.batch_size), every=5 * len(loader)),
        *(
            Evaluation(
                batches,
                metrics=[RetrievalRecall(k=RANKS)],
                task=one_side,
                prefix=split,
                every=5 * len(loader),
            )
            for split, batches in shares.items()
        ),
        RetrievalGallery(samples, every=5 * len(loader)),
        FirstLayerFilters(every=5 * len(loader)),
        EmbeddingProjector(samples),
        *default_handlers(run_dir, resume="auto" if flags.resume else None),
    )
    trainer.run(loader, max_epochs=flags.epochs)

    metric = RetrievalRecall(k=RANKS)
    evaluator = Evaluator(trainer.model, task=one_side, metrics=[metric])
    results = recall_of(evaluator, metric, shares)
    if idist.get_rank() == 0:
        print(f"\n{results_table(results)}\n\nFor the curves, run this and open {OVERVIEW}:")
        print(tensorboard_command(flags.run_dir or RUNS))


def find_run(*, resume: bool) -> Path:
    """Return the directory of a new run or, with `resume`, of the last run.

    Raises:
        SystemExit: if there is no run to resume.
    """
    if not resume:
        return new_run(RUNS, NAME)
    last = latest_run(RUNS, NAME)
    if last is None:
        raise SystemExit(f"--resume needs a run in {RUNS / NAME}, got none. Start without it.")
    return last


def parse_flags() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description="Train an image-text model on emoji.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=45, help="passes over the 2,990 training drawings")
    add("--batch-size", type=int, default=256, help="pairs per update")
    add(
        "--microbatch-size",
        type=int,
        help="pairs that go through the model at once; bounds the memory and changes nothing else",
    )
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the model; bf16 is faster on a GPU, fp16 needs one",
    )
    add("--loss", choices=LOSSES, default="clip", help="name of the loss")
    add("--run-dir", type=Path, help="run directory; default: a new one in runs/emoji")
    add(
        "--resume",
        action="store_true",
        help="resume the run in --run-dir, or else the last run",
    )
    add("--seed", type=int, default=0, help="seed of weights, order, captions and augmentation")
    return parser.parse_args()


if __name__ == "__main__":
    with process_group():
        main()
