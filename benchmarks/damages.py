"""Random damages to the files of a run: how many are reported, do no harm, or stay silent.

Usage: python -m benchmarks.damages [--count 300] [--seed 0] [--kinds whole sharded read]

A run is interrupted. In each try, one file of a copy of its directory is damaged, and the run is
started again. A damage is *reported* if a warning or an error names the file, *harmless* if the run
ends as without it and says nothing, *unnamed* if the run ends with an error that names no file, and
*silent* if the run ends otherwise than without the damage and says nothing. The script fails if a
damage is silent or unnamed. The kind `read` damages the other files of a complete run (metrics,
settings, identity, events, report, caught batches), and then reads it as `diptych compare` and
`diptych replay` do. At last the default handlers run on a disk that is full for a while.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import full_disk
from benchmarks.damages_readers import READ, complete, read_everything
from diptych.engine import SeededLoader, Trainer, tasks
from diptych.engine.errors import CheckpointError, ResumeError
from diptych.handlers import CheckpointManager, JsonLines
from diptych.losses import CrossEntropyLoss

EPOCHS, STOP = 3, 7
KINDS = ("whole", "sharded", "read")
OUTCOMES = ("reported", "harmless", "unnamed", "silent")


# -- damages: functions of a file's content, an integer generator, and another file's content ------

Damage = Callable[[bytes, random.Random, bytes], bytes]


def _block(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.choice((1, 4, 64, 512, 4096)))


def flip_bit(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Flip one bit."""
    if not content:
        return b"\1"
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def change_digit(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Replace a digit by another, which leaves text readable."""
    places = [place for place, byte in enumerate(content) if chr(byte).isdecimal()]
    if not places:
        return content + b"7"
    place = draw.choice(places)
    other = draw.choice([digit for digit in b"0123456789" if digit != content[place]])
    return content[:place] + bytes([other]) + content[place + 1 :]


def cut(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Keep the first bytes."""
    return content[: draw.randrange(len(content) + 1)]


def empty(_: bytes, __: random.Random, ___: bytes) -> bytes:
    """Keep nothing."""
    return b""


def zero(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Overwrite a block with zeros, as a lost sector does."""
    start, end = _block(content, draw)
    return content[:start] + bytes(end - start) + content[end:]


def scramble(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Overwrite a block with noise."""
    start, end = _block(content, draw)
    return content[:start] + draw.randbytes(end - start) + content[end:]


def delete_block(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Leave a block out."""
    start, end = _block(content, draw)
    return content[:start] + content[end:]


def repeat_block(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Repeat a block."""
    start, end = _block(content, draw)
    return content[:end] + content[start:]


def append(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Add noise at the end."""
    return content + draw.randbytes(draw.choice((1, 16, 1000)))


def exchange(_: bytes, __: random.Random, other: bytes) -> bytes:
    """Replace the content by that of another file of the directory."""
    return other


def delete_line(content: bytes, draw: random.Random, _: bytes) -> bytes:
    """Leave a line out, which leaves a file of lines readable."""
    lines = content.splitlines(keepends=True)
    if lines:
        del lines[draw.randrange(len(lines))]
    return b"".join(lines)


DAMAGES: Sequence[Damage] = (
    flip_bit,
    change_digit,
    cut,
    empty,
    zero,
    scramble,
    delete_block,
    repeat_block,
    append,
    exchange,
    delete_line,
)


# -- the run ---------------------------------------------------------------------------------------


def build(directory: Path) -> tuple[Trainer, SeededLoader]:
    """Return a small training with every file that a run writes for itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator)
    )
    trainer = Trainer(
        model,
        CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        task=tasks.classification,
        seed=0,
        log_every=1,
        device="cpu",
        shard=True,  # on two ranks; one process trains it whole
    )
    checkpoints = CheckpointManager(
        directory / "checkpoints", every=2, best="train/loss", mode="min", keep=2, export=True
    )
    return trainer.attach(JsonLines(directory), checkpoints), SeededLoader(data, 16, seed=0)


def interrupt(directory: Path) -> None:
    """Start the training and stop it inside its second epoch."""
    trainer, loader = build(directory)
    trainer.run(loader, max_iters=STOP)


def _interrupt_on_rank(rank: int, directory: Path) -> None:
    store = dist.FileStore(str(directory.with_suffix(".store")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    interrupt(directory)
    dist.destroy_process_group()


def make_template(kind: str, directory: Path) -> None:
    """Interrupt a run; leave what a kill in a save leaves, too. For the readers, complete it."""
    if kind == "read":
        complete(directory)
        return
    if kind == "sharded":
        torch.multiprocessing.spawn(_interrupt_on_rank, (directory,), nprocs=2)
    else:
        interrupt(directory)
    checkpoints = directory / "checkpoints"
    for name in ("checkpoint_epoch_2_iteration_8.pt", "checkpoint_epoch_2_iteration_8.shards"):
        (checkpoints / f"{name}.unlisted").touch()
    (checkpoints / "checkpoint_epoch_2_iteration_8.pt.unfinished").write_bytes(b"half")


class Result(NamedTuple):
    """What a run has said and left."""

    weights: str
    files: dict[str, str]
    messages: list[str]
    error: Exception | None


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.held: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.held.append(record.getMessage())


def finish(directory: Path, kind: str = "whole") -> Result:
    """Run the training to its end, in this process; or read the files of a complete one."""
    messages, logger = _Messages(), logging.getLogger("diptych")
    logger.addHandler(messages)
    passed, logger.propagate = logger.propagate, False
    try:
        if kind == "read":
            return Result("", read_everything(directory), messages.held, None)
        trainer, loader = build(directory)
        trainer.run(loader, max_epochs=EPOCHS)
    except Exception as error:  # noqa: BLE001 - whatever a damage causes is counted
        return Result("", {}, messages.held, error)
    finally:
        logger.removeHandler(messages)
        logger.propagate = passed
    exported = load_file(directory / "checkpoints" / "model.safetensors")
    left = {
        "metrics.jsonl": hashlib.sha256((directory / "metrics.jsonl").read_bytes()).hexdigest(),
        "model.safetensors": digest_of(exported),
    }
    return Result(digest_of(trainer.model.state_dict()), left, messages.held, None)


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Return a digest of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- the tries -------------------------------------------------------------------------------------


def damage_one(directory: Path, draw: random.Random, kind: str) -> tuple[Path, str]:
    """Damage or remove a file; return it, and the name of the damage."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if kind == "read":
        files = [path for path in files if path.name.startswith(READ)]
    path, other = draw.choice(files), draw.choice(files)
    if kind != "read" and draw.random() < 1 / (len(DAMAGES) + 1):
        path.unlink()
        return path, "remove"
    damage = draw.choice(DAMAGES)
    path.write_bytes(damage(path.read_bytes(), draw, other.read_bytes()))
    return path, damage.__name__


def judge(result: Result, whole: Result, path: Path) -> str:
    """Return the outcome of a try."""
    told = is_named(path, result)
    if result.error is not None:
        return "reported" if told and is_ours(result.error) else "unnamed"
    if told:
        return "reported"
    same = (result.weights, result.files) == (whole.weights, whole.files)
    return "harmless" if same else "silent"


def is_named(path: Path, result: Result) -> bool:
    """Return whether a message or the error names a file."""
    names = {path.name}
    if path.suffix == ".tensors":
        names.add(path.parent.name)
    if path.name == "manifest.json":
        names.add("the manifest of")
    error = [] if result.error is None else [str(result.error)]
    return any(name in message for name in names for message in (*result.messages, *error))


def is_ours(error: Exception) -> bool:
    """Return whether an error is one that the library raises on purpose."""
    return isinstance(error, (CheckpointError, ResumeError)) or type(error) is ValueError


def tries(
    kind: str, count: int, seed: int
) -> tuple[Counter[tuple[str, str]], list[tuple[str, str, str, Result]]]:
    """Return the outcomes by kind of file, and the tries that must not be."""
    found, bad = Counter[tuple[str, str]](), []
    with tempfile.TemporaryDirectory() as folder:
        template, number = Path(folder) / "template", 0
        make_template(kind, template)
        shutil.copytree(template, Path(folder) / "whole")
        whole = finish(Path(folder) / "whole", kind)
        if whole.error is not None:
            raise whole.error
        for number in range(count):
            directory = Path(folder) / str(number)
            shutil.copytree(template, directory)
            path, damage = damage_one(directory, random.Random(f"{seed} {kind} {number}"), kind)
            result = finish(directory, kind)
            outcome = judge(result, whole, path)
            found[kind_of(path), outcome] += 1
            if outcome in {"unnamed", "silent"}:
                bad.append((path.name, damage, outcome, result))
            shutil.rmtree(directory)
    return found, bad


def kind_of(path: Path) -> str:
    """Return the row of the table to which a file belongs."""
    if path.name.startswith(("events.", "iteration_")):
        return "events" if path.name.startswith("events.") else "caught batch"
    ending = path.suffix if path.name.startswith(("checkpoint_", "rank_")) else ""
    return {".pt": "checkpoint", ".tensors": "shards", ".unlisted": "mark"}.get(
        ending, "unfinished file" if ending else path.name
    )


def print_outcomes(
    found: Counter[tuple[str, str]], bad: Sequence[tuple[str, str, str, Result]]
) -> None:
    """Print the outcomes by kind of file, and the tries that must not be."""
    print(f"{'file':24}{'tried':>9}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for row in (*sorted({name for name, _ in found}), "all"):
        counts = [
            sum(n for (r, o), n in found.items() if row in {r, "all"} and o == outcome)
            for outcome in OUTCOMES
        ]
        print(f"{row:24}{sum(counts):9}" + "".join(f"{count:10}" for count in counts))
    for name, damage, outcome, result in bad:
        print(f"{outcome}: {damage} of {name}: {result.error!r} {result.messages[-3:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of the outcomes; return 1 if a damage is silent or unnamed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="tries of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wrong = 0
    for kind in options.kinds:
        found, bad = tries(kind, options.count, options.seed)
        print(f"{kind}, seed {options.seed}")
        print_outcomes(found, bad)
        wrong += len(bad)
    same, words = full_disk.outcome()
    print(words)
    wrong += not same
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
