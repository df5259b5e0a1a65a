"""Storage for `torch.distributed.checkpoint` that keeps what is where as plain values.

Torch's own keeps it in a pickled file, which runs whatever code somebody puts there. The tensors
themselves are in files that load with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

Index = dict[str, dict[str, Any]]
"""For each tensor its `shape`, `dtype` and `chunks`: offsets, sizes, file, start and length."""


@attrs.frozen
class Span:
    """Where a chunk is: what torch's reader asks for.

    Attributes:
        relative_path: the file in the folder.
        offset: its first byte there.
        length: bytes.
        transform_descriptors: none.
    """

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


class ShardWriter(FileSystemWriter):
    """Writes one file for each rank.

    Attributes:
        index: of all of them, on the rank that coordinates, once they are written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index: Index = {}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Keep where each chunk is, in place of writing it."""
        spans = {result.index: result.storage_data for own in results for result in own}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            self.index[name] = {
                "shape": list(stored.size),
                "dtype": stored.properties.dtype,
                "chunks": [
                    _plain(chunk, spans[MetadataIndex(name, chunk.offsets)])
                    for chunk in stored.chunks
                ],
            }


class ShardReader(FileSystemReader):
    """Reads what a `ShardWriter` wrote.

    Args:
        folder: of the files.
        index: of the tensors to read.
    """

    def __init__(self, folder: Path, index: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what the index says, as torch has it."""
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=stored["dtype"]),
                    size=torch.Size(stored["shape"]),
                    chunks=[chunk for chunk, _ in _chunks(stored)],
                )
                for name, stored in self._index.items()
            },
            storage_data={
                MetadataIndex(name, chunk.offsets): span
                for name, stored in self._index.items()
                for chunk, span in _chunks(stored)
            },
        )


def _plain(chunk: ChunkStorageMetadata, span: Any) -> list[Any]:
    return [
        list(chunk.offsets),
        list(chunk.sizes),
        span.relative_path,
        span.offset,
        span.length,
    ]


def _chunks(stored: Mapping[str, Any]) -> Iterator[tuple[ChunkStorageMetadata, Span]]:
    for offsets, sizes, file, start, length in stored["chunks"]:
        yield (
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
            Span(file, start, length),
        )
