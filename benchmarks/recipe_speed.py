"""The speed of `diptych train` on a folder of JPEGs, compared with a loop written by hand.

    python benchmarks/recipe_speed.py

The data are JPEGs of 256 to 500 pixels with a caption each, made from a seed. A ViT-S of timm and a
BERT of six layers are trained at 224 pixels with CLIP's loss, AdamW, clipping and a schedule; in
bf16 on a GPU. The loop by hand has the same towers, torchvision's random crop, torch's DataLoader
with as many workers, and CLIP's loss in torch's functions; it saves nothing and logs nothing. The
first epoch of each is a warm-up. Then both loops run on batches that are already on the device.

Needs timm, transformers, tokenizers and torchvision, and no network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from ignite.engine import Events
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from diptych.handlers import default_handlers
from diptych.recipes import Settings, train
from diptych.recipes.settings import read_settings
from diptych.recipes.towers.models import TwoTowers
from diptych.recipes.training import build_training, towers_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WORDS = [f"word{number}" for number in range(2000)]
Batch = dict[str, Any]
LEAST, MOST = 256, 500


def draw(folder: Path, number: int) -> None:
    """Write a JPEG: a coarse random pattern, scaled up, with fine noise."""
    generator = torch.Generator().manual_seed(number)
    width, height = torch.randint(LEAST, MOST + 1, (2,), generator=generator).tolist()
    coarse = torch.randint(0, 256, (1, 3, 9, 12), generator=generator).float()
    pixels = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    pixels += torch.randint(-12, 13, pixels.shape, generator=generator)
    image = pixels.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(image).save(folder / f"{number:06}.jpg", quality=90)


def write_data(folder: Path, images: int, workers: int) -> None:
    """Write images and captions, and a text model with its tokenizer."""
    (folder / "images").mkdir(parents=True)
    one_thread = (torch.set_num_threads, (1,))  # of each process
    with ProcessPoolExecutor(max(1, workers), None, *one_thread) as pool:
        list(pool.map(partial(draw, folder / "images"), range(images), chunksize=32))
    chosen = random.Random(0)
    lines = (f"{n:06}.jpg\t{' '.join(chosen.choices(WORDS, k=12))}\n" for n in range(images))
    (folder / "captions.tsv").write_text("image\tcaption\n" + "".join(lines))


def write_text_model(folder: Path, width: int) -> None:
    """Write a BERT of six layers and a tokenizer of whole words."""
    import tokenizers
    import transformers

    known = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, special["unk_token"]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)
    transformers.BertConfig(
        vocab_size=len(known),
        hidden_size=width,
        num_hidden_layers=6,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=64,
    ).save_pretrained(folder)


class Folder(Dataset[tuple[Tensor, str]]):
    """The images and captions of the folder, as most scripts read them."""

    def __init__(self, folder: Path, size: int) -> None:
        from torchvision import transforms

        rows = (folder / "captions.tsv").read_text().splitlines()[1:]
        self.rows = [tuple(row.split("\t")) for row in rows]
        self.folder = folder / "images"
        crop = transforms.RandomResizedCrop(
            size, scale=(0.7, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
        )
        self.transform = transforms.Compose([crop, transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        name, caption = self.rows[index]
        with Image.open(self.folder / name) as image:
            return self.transform(image.convert("RGB")), caption


def joined(tokenize: Callable[[Sequence[str]], Any], samples: list[tuple[Tensor, str]]) -> Batch:
    """Return a batch of samples."""
    images, captions = zip(*samples, strict=True)
    return {"image": torch.stack(images), "text": tokenize(captions)}


def on_device(batch: Batch) -> Batch:
    """Return a batch on the device."""
    move = {name: batch[name] for name in ("image", "text")}
    return {
        name: {k: v.to(DEVICE, non_blocking=True) for k, v in value.items()}
        if isinstance(value, dict)
        else value.to(DEVICE, non_blocking=True)
        for name, value in move.items()
    }


def clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Return CLIP's loss, in torch's functions."""
    logits = (
        log_scale.exp() * F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T
    )
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class ByHand:
    """A training loop written by hand.

    Args:
        settings: those of the command.
        updates: updates of the whole run, for the schedule.
    """

    def __init__(self, settings: Settings, updates: int) -> None:
        torch.manual_seed(0)
        towers = towers_of(settings)
        assert towers.text is not None
        self.tokenize = towers.text.tokenize
        self.model = TwoTowers(towers).to(DEVICE).train()
        self.log_scale = nn.Parameter(torch.tensor(2.66, device=DEVICE))
        self.weights = [*self.model.parameters(), self.log_scale]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, updates)
        self.half = settings.precision == "bf16"

    def step(self, batch: Batch) -> None:
        """Make an update."""
        batch = on_device(batch)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.half):
            features = self.model(batch["image"], batch["text"])
        clip_loss(*features, self.log_scale).backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def epoch(self, batches: Iterable[Batch]) -> float:
        """Return the seconds of an epoch."""
        finish()
        start = time.perf_counter()
        for batch in batches:
            self.step(batch)
        finish()
        return time.perf_counter() - start


def finish() -> None:
    """Wait until the device is idle."""
    if CUDA:
        torch.cuda.synchronize()


def by_hand(settings: Settings, folder: Path) -> float:
    """Return the images/s of the loop by hand: of its fastest epoch after the first."""
    data = Folder(folder, settings.image_size or 224)
    updates = len(data) // settings.batch_size
    loop = ByHand(settings, updates * settings.epochs)
    loader: Any = DataLoader(
        data,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=CUDA,
        collate_fn=partial(joined, loop.tokenize),
    )
    seconds = [loop.epoch(loader) for _ in range(settings.epochs)]
    print(f"by hand, epochs: {', '.join(f'{one:.2f} s' for one in seconds)}", flush=True)
    return updates * settings.batch_size / min(seconds[1:])


def by_command(settings: Settings, run: Path) -> tuple[float, float]:
    """Return the images/s of `train`.

    Returns:
        Of its fastest epoch after the first; and of its last epoch, what comes between two epochs
        (the checkpoint) included.
    """
    trainer = train(settings, run)
    assert read_settings(run / "recipe.yaml") == settings
    lines = (run / "metrics.measured.jsonl").read_text().splitlines()
    speeds = [json.loads(line).get("time/samples_per_second", 0.0) for line in lines]
    updates = trainer.state.epoch_length or 0
    last = trainer.state.times[Events.EPOCH_COMPLETED.name]
    return max(speeds[1:]), updates * settings.batch_size / last


def in_memory(settings: Settings, updates: int) -> tuple[float, float]:
    """Return the images/s of both loops on a batch that is on the device; by hand first."""
    training = build_training(attrs.evolve(settings, check="names"))
    batch = next(iter(training.loader))
    batch = on_device(batch) | {"group": batch["group"].to(DEVICE)}
    loop = ByHand(settings, 2 * updates)
    hand = min(loop.epoch([batch] * updates) for _ in range(3))
    trainer, stamps = training.trainer, list[float]()

    def stamp() -> None:
        finish()
        stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer.attach(*default_handlers(Path(folder), every=10**9))
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=updates), stamp)
        trainer.run([batch] * updates * 4, max_epochs=1)
    ours = min(after - before for before, after in itertools.pairwise(stamps))
    samples = updates * settings.batch_size
    print(f"batches on the device: {samples / hand:,.0f}, {samples / ours:,.0f}", flush=True)
    return samples / hand, samples / ours


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the data, measure, and print the table."""
    start = time.perf_counter()
    write_data(folder, arguments.images, arguments.workers)
    write_text_model(folder / "text", arguments.text_width)
    print(f"{arguments.images:,} images written in {time.perf_counter() - start:.0f} s", flush=True)
    settings = Settings(
        images=folder / "images",
        captions=folder / "captions.tsv",
        held_out=0.0,
        image_tower=arguments.image_tower,
        text_tower=f"hf:{folder / 'text'}",
        image_size=arguments.size,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        precision="bf16" if CUDA else "fp32",
        workers=arguments.workers,
    )
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"\n{name}, torch {torch.__version__}, {os.cpu_count()} cores, ", end="")
    print(f"{settings.image_tower} at {settings.image_size}, {settings.workers} workers, ", end="")
    print(f"batch {settings.batch_size}, {settings.precision}\n")
    rows = {"batches on the device": in_memory(settings, arguments.updates)}
    hand, (epoch, whole) = by_hand(settings, folder), by_command(settings, folder / "run")
    rows["a folder of JPEGs: an epoch"] = hand, epoch
    rows["a folder of JPEGs: an epoch and its checkpoint"] = hand, whole
    print("\n| images from | by hand, images/s | diptych train, images/s | ratio |")
    print("|---|---:|---:|---:|")
    for what, (theirs, ours) in rows.items():
        print(f"| {what} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.3f} |")


def main() -> None:
    """Parse the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6144 if CUDA else 128)
    parser.add_argument("--batch-size", type=int, default=256 if CUDA else 32)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--epochs", type=int, default=3, help="the first one is a warm-up")
    parser.add_argument("--updates", type=int, default=32 if CUDA else 2)
    parser.add_argument("--size", type=int, default=224 if CUDA else 32)
    parser.add_argument("--text-width", type=int, default=384 if CUDA else 64)
    parser.add_argument("--image-tower", default="timm:vit_small_patch16_224" if CUDA else "small")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loaders' processes are parallel enough
    with tempfile.TemporaryDirectory() as folder:
        measure(parser.parse_args(), Path(folder))


if __name__ == "__main__":
    main()
