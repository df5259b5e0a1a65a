"""The cost of a trainer compared with a raw loop: samples/s of an image-text model.

    python benchmarks/train_step.py
    torchrun --nproc-per-node=2 benchmarks/train_step.py --only raw diptych

A ViT-S/16 and a text tower of six layers, CLIP's loss, AdamW, bf16 on a GPU (without a GPU, a small
model in float32). All loops run in turn in one process, on the same batch, which is already on the
device; the table shows the best of their turns. Then, on a GPU: whether anything waits for the
device between two log points, and the cost of a batch of 32,768 in micro-batches and tiles.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from diptych.engine import Trainer, process_group, tasks
from diptych.engine.distributed.collectives import rank, world_size
from diptych.handlers import default_handlers
from diptych.losses import CLIPLoss

LOG_EVERY = 50
Form = bool | Literal["reduce-overhead"]
MODES: dict[Form, str] = {True: "default", "reduce-overhead": "reduce-overhead"}
FORMS: dict[str, Form] = {"eager": False, "compiled": True, "reduce-overhead": "reduce-overhead"}
WORDS, LENGTH = 8192, 32


class Tower(nn.Module):
    """Transformer layers over the embedded pieces of an input, and the mean of their outputs."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, pieces: Tensor) -> Tensor:
        """Return [B, width] of [B, L, width]."""
        result: Tensor = self.norm(self.layers(pieces + self.place)).mean(1)
        return result


class ImageText(nn.Module):
    """Two towers: patches of 16 x 16 pixels, and tokens."""

    def __init__(self, *, width: int, image_layers: int, text_layers: int, pixels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.words = nn.Embedding(WORDS, width)
        self.image = Tower(width, image_layers, (pixels // 16) ** 2)
        self.text = Tower(width, text_layers, LENGTH)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of both."""
        return self.image(self.patches(image).flatten(2).mT), self.text(self.words(text))


LARGE = {"width": 384, "image_layers": 12, "text_layers": 6, "pixels": 224}
SMALL = {"width": 64, "image_layers": 2, "text_layers": 2, "pixels": 32}
CUDA = torch.cuda.is_available()
SIZES = LARGE if CUDA else SMALL


def parts() -> tuple[ImageText, CLIPLoss, torch.optim.Optimizer]:
    """Return a model, a loss and an optimizer, the same each time."""
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    model, loss = ImageText(**SIZES).to(device), CLIPLoss().to(device)
    weights = [*model.parameters(), *loss.parameters()]
    return model, loss, torch.optim.AdamW(weights, lr=1e-4, fused=CUDA)


def resident(samples: int) -> dict[str, Tensor]:
    """Return a batch that is already on the device."""
    device, pixels = "cuda" if CUDA else "cpu", SIZES["pixels"]
    dtype = torch.bfloat16 if CUDA else torch.float32
    return {
        "image": torch.randn(samples, 3, pixels, pixels, device=device, dtype=dtype),
        "text": torch.randint(WORDS, (samples, LENGTH), device=device),
    }


def autocast() -> torch.autocast:
    """Return an autocast context: bf16 on a GPU, disabled on a CPU."""
    return torch.autocast("cuda" if CUDA else "cpu", torch.bfloat16, enabled=CUDA)


def finish() -> None:
    """Wait until the device is idle."""
    if CUDA:
        torch.cuda.synchronize()


class Contender(Protocol):
    """A training loop that measures its own time."""

    def __call__(self, batch: dict[str, Tensor], warmup: int, steps: int) -> float:
        """Return the seconds of `steps` updates, after `warmup` updates that are not measured."""
        ...


def looped(step: Callable[[dict[str, Tensor]], object]) -> Contender:
    """Return a plain loop of a function that makes one update."""

    def run(batch: dict[str, Tensor], warmup: int, steps: int) -> float:
        for _ in range(warmup):
            step(batch)
        finish()
        start = time.perf_counter()
        for _ in range(steps):
            step(batch)
        finish()
        return time.perf_counter() - start

    return run


def raw(*, compiled: Form, item: bool = False) -> Contender:
    """Return a plain training loop; with `item`, it reads the loss at each step."""
    model, loss, optimizer = parts()
    if compiled:
        model.compile(mode=MODES[compiled])

    def step(batch: dict[str, Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = loss(*model(batch["image"], batch["text"]))
        value.backward()
        optimizer.step()
        if item:
            value.item()

    return looped(step)


def timed(engine: Engine, run: Callable[[], object], first: int, last: int) -> float:
    """Return the seconds from the end of one iteration to the end of another."""
    times: list[float] = []

    def stamp() -> None:
        finish()
        times.append(time.perf_counter())

    handles = [
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=at), stamp) for at in (first, last)
    ]
    run()
    for handle in handles:
        handle.remove()
    return times[1] - times[0]


def ignite_usual(*, compiled: Form) -> Contender:
    """Return an Ignite engine with RunningAverage and TensorboardLogger, as in Ignite's guide."""
    from ignite.handlers import TensorboardLogger
    from ignite.metrics import RunningAverage

    model, loss, optimizer = parts()
    if compiled:
        model.compile(mode=MODES[compiled])

    def step(_: Engine, batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = loss(*model(batch["image"], batch["text"]))
        value.backward()
        optimizer.step()
        return float(value.item())

    def run(batch: dict[str, Tensor], warmup: int, steps: int) -> float:
        engine = Engine(step)
        RunningAverage(output_transform=lambda output: output).attach(engine, "loss")
        with tempfile.TemporaryDirectory() as folder, TensorboardLogger(log_dir=folder) as logger:
            logger.attach_output_handler(
                engine,
                Events.ITERATION_COMPLETED(every=LOG_EVERY),
                tag="train",
                metric_names=["loss"],
            )
            data = [batch] * (warmup + steps)
            return timed(engine, lambda: engine.run(data, 1), warmup, warmup + steps)

    return run


def diptych(*, compiled: Form, microbatch_size: int | None = None) -> Contender:
    """Return a trainer with the default handlers."""
    model, loss, optimizer = parts()
    trainer = Trainer(
        model,
        loss,
        optimizer,
        task=tasks.image_text,
        precision="bf16" if CUDA else "fp32",
        compile=compiled,
        microbatch_size=microbatch_size,
        log_every=LOG_EVERY,
    )
    trainer.attach(*default_handlers(Path(tempfile.mkdtemp()), every=10**9))

    def run(batch: dict[str, Tensor], warmup: int, steps: int) -> float:
        trainer.state.max_epochs = trainer.state.max_iters = None
        data = [batch] * (warmup + steps)
        return timed(trainer, lambda: trainer.run(data), warmup, warmup + steps)

    return run


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "raw": raw,
    "raw, one .item() per step": lambda *, compiled: raw(compiled=compiled, item=True),
    "Ignite usual": ignite_usual,
    "diptych": diptych,
}


def compare(names: list[str], samples: int, steps: int, turns: int, *, compiled: Form) -> None:
    """Run the loops in turn on one batch; print samples/s, and the ratio to the first loop."""
    batch = resident(samples)
    contenders = {name: CONTENDERS[name](compiled=compiled) for name in names}
    best = dict.fromkeys(names, float("inf"))
    for turn in range(turns):
        for name, contender in contenders.items():
            warmup = 10 if turn == 0 else 3
            best[name] = min(best[name], contender(batch, warmup, steps) / steps)
    if rank() == 0:
        for name, seconds in best.items():
            rate = samples * world_size() / seconds
            how = {False: "eager", True: "compiled"}.get(compiled, compiled)
            ratio = best[names[0]] / seconds
            time_and_rate = f"{seconds * 1e3:.1f} | {rate:,.0f} | {ratio:.3f}"
            print(f"| {samples:,} | {how} | {name} | {time_and_rate} |")


def nothing_waits(samples: int) -> None:
    """Check that the default handlers do not wait for the device between two log points."""
    model, loss, optimizer = parts()
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, precision="bf16")
    modes = {5: "error", LOG_EVERY - 5: "default"}
    for iteration, mode in modes.items():
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=iteration), torch.cuda.set_sync_debug_mode, mode
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer.attach(*default_handlers(Path(folder), every=10**9))
        trainer.run([resident(samples)] * LOG_EVERY)
    print(f"\n{LOG_EVERY - 10} updates between two log points: nothing waits for the device")


def large_batch(samples: int, piece: int) -> None:
    """Print the samples/s of a large batch in micro-batches, with the loss in tiles."""
    plain = diptych(compiled=False)(resident(piece), 5, 20) / 20 / piece
    torch.cuda.reset_peak_memory_stats()
    pieces = diptych(compiled=False, microbatch_size=piece)(resident(samples), 1, 2) / 2 / samples
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"\nbatch {samples:,} in pieces of {piece:,}: {1 / pieces:,.0f} samples/s, "
        f"{plain / pieces:.2f} of the plain step at {piece:,}, {memory:.1f} GiB"
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--samples", nargs="+", type=int, default=[256, 1024] if CUDA else [32])
    parser.add_argument("--steps", type=int, default=50, help="measured updates per turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=FORMS,
        default=["eager", "compiled"],
        help="model forms",
    )
    parser.add_argument("--large", type=int, default=32_768, help="the large batch; 0: none")
    arguments = parser.parse_args()
    if rank() == 0:
        name = torch.cuda.get_device_name() if CUDA else "CPU"
        print(f"{name}, torch {torch.__version__}, ranks: {world_size()}\n")
        print("| batch | form | loop | ms per step | samples/s | relative to raw |")
        print("|---:|---|---|---:|---:|---:|")
    for form in arguments.forms:
        for samples in arguments.samples:
            compare(arguments.only, samples, arguments.steps, arguments.turns, compiled=FORMS[form])
    if CUDA and world_size() == 1:
        nothing_waits(arguments.samples[0])
        if arguments.large:
            large_batch(arguments.large, 1024)


if __name__ == "__main__":
    with process_group():
        main()
