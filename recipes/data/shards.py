"""Images and captions in tar files (shards), as img2dataset and webdataset write them."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.utils.data import IterableDataset, get_worker_info

from diptych.engine.data.worker_loader import WorkerLoader
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.random_state import mixed_seed, preserved_random_state, seed_host
from diptych.recipes.data.augmentations import augmentations
from diptych.recipes.data.image_batches import Batch, view
from diptych.recipes.data.image_files import MOST_BYTES, TOO_LARGE, ImageError, read_image
from diptych.recipes.data.json_captions import captions_of
from diptych.recipes.data.rows import DataError, shortened
from diptych.recipes.data.text_tables import SUFFIXES
from diptych.recipes.towers.resize import Resize

logger = logging.getLogger(__name__)

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}", re.ASCII)
MOST_SHARDS = 1_000_000
BUFFER = 1000
"""Samples among which a reader draws the next one."""
NO_IMAGE, NO_CAPTION = "the sample has no image", "the sample has no caption"
DAMAGED = "a shard cannot be read to its end"
SKIPPED = "skipped"
"""The part of a batch with the members that its reader has skipped, which the loader takes out."""


def shard_paths(pattern: str) -> list[Path]:
    """Return the files of a pattern, such as `cc3m/{00000..00331}.tar` or `cc3m/*.tar`.

    Raises:
        DataError: if a file is missing, or none is named.
    """
    paths = [path for name in _all_of(pattern) for path in _matching(Path(name))]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None or not paths:
        raise DataError(
            f"--shards must name tar files on this machine, got {pattern}, where "
            f"{missing or 'nothing'} is no file. Check the path and the range of numbers, or name "
            "all in a folder: DIR/*.tar."
        )
    return paths


def _all_of(pattern: str) -> list[str]:
    """Return the names that a pattern with ranges stands for."""
    names = [pattern]
    while any(map(RANGE.search, names)):
        names = [one for name in names for one in _expanded(name)]
        if len(names) > MOST_SHARDS:
            raise DataError(f"--shards must name at most {MOST_SHARDS:,} files, got more")
    return names


def _expanded(name: str) -> Iterator[str]:
    match = RANGE.search(name)
    if match is None:
        yield name
        return
    first, last = match.groups()
    for number in itertools.islice(range(int(first), int(last) + 1), MOST_SHARDS + 1):
        yield f"{name[: match.start()]}{number:0{len(first)}}{name[match.end() :]}"


def _matching(path: Path) -> list[Path]:
    return sorted(path.parent.glob(path.name)) if "*" in path.name else [path]


def samples_of(path: Path, skipped: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the members of each sample in a tar file, by their suffixes.

    A sample is consecutive members whose names differ in the suffix alone. Nothing is unpacked.

    Args:
        path: the file.
        skipped: counts what cannot be read.
    """
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                stem, suffix = _parts(member.name)
                hidden = member.name.rpartition("/")[2].startswith(".")  # `._a.jpg` of macOS
                file = archive.extractfile(member) if member.isfile() and not hidden else None
                if file is None:
                    continue
                if stem != key and members:
                    yield key, members
                    members = {}
                key = stem
                if member.size <= MOST_BYTES:
                    members[suffix] = file.read()
                else:
                    skipped[TOO_LARGE] += 1
    except (tarfile.TarError, OSError, EOFError):
        skipped[DAMAGED] += 1
        return  # the sample that was cut off may lack its caption
    if members:
        yield key, members


def _parts(name: str) -> tuple[str, str]:
    stem, _, suffix = name.rpartition(".")
    return stem, f".{suffix.lower()}"


def caption_of(members: Mapping[str, bytes]) -> str:
    """Return the caption of a sample: of its text file, else of its JSON; empty if it has none.

    Of several captions in a list it is the first.
    """
    text = next((members[suffix] for suffix in (".txt", ".caption") if suffix in members), None)
    if text is not None:
        return text.decode(json.detect_encoding(text), errors="replace").strip()
    try:
        record = json.loads(members.get(".json", b"{}"))
    except (ValueError, RecursionError):
        return ""
    if not isinstance(record, dict):
        return ""
    return next(filter(None, captions_of({name: one for name, one in record.items() if one})), "")


@attrs.frozen(kw_only=True)
class ShardReader:
    """Turns samples of shards into samples of a batch.

    Attributes:
        resize: makes the images square.
        augment: names of augmentations.
        seed: the seed of the order and of the augmentations.
    """

    resize: Resize
    augment: Sequence[str] = ()
    seed: int = 0

    def read(
        self, samples: Iterator[tuple[str, dict[str, bytes]]], skipped: Counter[str], epoch: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the samples that can be used; the others are counted."""
        changes = augmentations(self.augment)
        for key, members in samples:
            image = next((value for name, value in members.items() if name in SUFFIXES), None)
            caption = caption_of(members)
            if image is None or not caption:
                skipped[NO_IMAGE if image is None else NO_CAPTION] += 1
                continue
            number = int.from_bytes(
                hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:7], "big"
            )
            try:
                picture = read_image(io.BytesIO(image), self.resize.resized)
            except ImageError as error:
                skipped[str(error)] += 1
                continue
            with preserved_random_state():
                seed_host(mixed_seed(self.seed, epoch, number))
                pixels = view(picture, changes, self.resize)
            ids = dict.fromkeys(("group", "image_id", "caption_id"), number)
            yield {"views": [pixels], "caption": caption, **ids}


class _Stream(IterableDataset[Batch]):
    """The batches of one epoch that a process reads; each worker has its own shards."""

    def __init__(self, loader: ShardLoader, epoch: int) -> None:
        self._loader, self._epoch = loader, epoch

    def __iter__(self) -> Iterator[Batch]:
        loader, skipped = self._loader, Counter[str]()
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        stream, streams = rank() * workers + number, world_size() * workers
        generator = torch.Generator().manual_seed(
            mixed_seed(loader.reader.seed, self._epoch, stream + 1)
        )
        paths = itertools.islice(loader.order(self._epoch), stream, None, streams)
        share = max(1, len(loader.paths) // streams)  # a reader's shards in one turn of all
        turns = iter(lambda: list(itertools.islice(paths, share)), [])
        raw = itertools.chain.from_iterable(_shuffled(t, generator, skipped) for t in turns)
        samples = loader.reader.read(raw, skipped, self._epoch)
        while True:
            part = list(itertools.islice(samples, loader.batch_size // world_size()))
            yield {**loader.collate(part), SKIPPED: dict(skipped)}
            skipped.clear()


def _shuffled(
    paths: Sequence[Path], generator: torch.Generator, skipped: Counter[str]
) -> Iterator[Any]:
    """Yield each sample of some shards once, drawn from a buffer that is filled as they come."""
    samples = itertools.chain.from_iterable(samples_of(path, skipped) for path in paths)
    buffer = list(itertools.islice(samples, BUFFER))
    for sample in samples:
        index = int(torch.randint(len(buffer), (), generator=generator))
        yield buffer[index]
        buffer[index] = sample
    yield from (buffer[i] for i in torch.randperm(len(buffer), generator=generator).tolist())


class ShardLoader:
    """Loads batches of shards; an epoch is a number of batches.

    Each epoch has an order of the shards that depends on the seed alone, and starts again when all
    are read. Readers (ranks times workers) take turns at it, so that another number of them gives
    another order of samples. Shards have no position inside an epoch: a run is saved at its end.
    Samples without an image or a caption, or that cannot be read, are skipped; each epoch logs how
    many.

    Args:
        paths: the tar files.
        batch_size: samples of an update over all ranks.
        batches: batches of an epoch.
        reader: reads the samples.
        collate: joins samples into a batch.
        workers: processes that read.

    Raises:
        DataError: if the batch size is no multiple of the ranks.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        batch_size: int,
        batches: int,
        *,
        reader: ShardReader,
        collate: Callable[[Sequence[Any]], Batch],
        workers: int = 0,
    ) -> None:
        if batch_size % world_size():
            raise DataError(
                f"--batch-size must be a multiple of {world_size()} ranks, got {batch_size}"
            )
        self.paths, self.batch_size, self._batches = paths, batch_size, batches
        self.reader, self.collate, self._workers = reader, collate, workers
        self._epoch = 0

    def __len__(self) -> int:
        return self._batches

    def set_epoch(self, epoch: int) -> None:
        """Start epoch `epoch`, counted from 0, with the next iterator."""
        self._epoch = epoch

    def order(self, epoch: int) -> Iterator[Path]:
        """Yield the shards of an epoch, again and again in new orders."""
        for turn in itertools.count():
            seed = mixed_seed(self.reader.seed, epoch, turn)
            generator = torch.Generator().manual_seed(seed)
            for index in torch.randperm(len(self.paths), generator=generator).tolist():
                yield self.paths[index]

    def __iter__(self) -> Iterator[Batch]:
        skipped = Counter[str]()
        stream = WorkerLoader(
            _Stream(self, self._epoch),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.reader.seed),
        )
        for batch in itertools.islice(stream, len(self)):
            skipped.update(batch.pop(SKIPPED))
            yield batch
        if skipped:
            counts = "; ".join(f"{count:,}: {kind}" for kind, count in skipped.most_common())
            logger.warning("Skipped %s samples of shards (%s).", f"{skipped.total():,}", counts)


def held_out_samples(path: Path, most: int, reader: ShardReader) -> list[dict[str, Any]]:
    """Return the first samples of a shard, not augmented.

    Args:
        path: the shard.
        most: the number of samples at most.
        reader: reads them.
    """
    skipped = Counter[str]()
    plain = attrs.evolve(reader, augment=())
    return list(itertools.islice(plain.read(samples_of(path, skipped), skipped, 0), most))


def count_samples(path: Path) -> int:
    """Return the number of samples in a shard.

    Raises:
        DataError: if it has none that can be used.
    """
    skipped, suffixes, usable = Counter[str](), set[str](), 0
    for _, members in samples_of(path, skipped):
        suffixes |= members.keys()
        usable += bool(caption_of(members)) and bool(SUFFIXES & members.keys())
    if not usable:
        found = shortened(", ".join([*sorted(suffixes), *skipped])) or "no file"
        raise DataError(
            "--shards must have samples of an image and a caption, one after the other (.jpg and "
            f".txt), got {path}, which has none, but {found}."
        )
    return usable
