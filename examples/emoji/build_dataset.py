"""Build `data/emoji.tar.gz` from the unpacked packages that contain the drawings and the names.

The packages are `emoji-datasource-google` 16.0.0, `emoji-datasource-twitter` 16.0.0 and
`emojibase-data` 16.0.3:

    python -m examples.emoji.build_dataset GOOGLE_FOLDER TWITTER_FOLDER EMOJIBASE_FOLDER
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from PIL import Image

from examples.emoji.data import ARCHIVE, IMAGE_SIZE, to_tensor
from examples.emoji.splits import assign_splits, find_families

PALETTE_COLORS = 64
VENDORS = {"noto": "google", "twemoji": "twitter"}
SKIN_TONE_SWATCHES = "component"
# Of several emoji with an identical drawing the data set keeps one, because no model could tell
# them apart: the country instead of territories with its flag, and the four family outlines.
KEPT_TWINS = {
    "1F1E6-1F1FA",  # Australia
    "1F1EA-1F1F8",  # Spain
    "1F1EB-1F1F7",  # France
    "1F1EE-1F1F4",  # British Indian Ocean Territory
    "1F1F3-1F1F4",  # Norway
    "1F1F8-1F1E6",  # Saudi Arabia
    "1F1FA-1F1F8",  # United States
    "1F9D1-200D-1F9D2",  # family: adult, child
    "1F9D1-200D-1F9D2-200D-1F9D2",  # family: adult, child, child
    "1F9D1-200D-1F9D1-200D-1F9D2",  # family: adult, adult, child
    "1F9D1-200D-1F9D1-200D-1F9D2-200D-1F9D2",  # family: adult, adult, child, child
}


@attrs.frozen
class Entry:
    """One emoji to be written to the archive.

    Attributes:
        metadata: the JSON member, without `family` and `split` at first.
        drawings: style to palette image of `IMAGE_SIZE` pixels square.
        sources: style to the bytes of the package's file, for finding duplicates.
        order: position in the Unicode order.
    """

    metadata: dict[str, Any]
    drawings: dict[str, Image.Image]
    sources: dict[str, bytes]
    order: int

    @property
    def hexcode(self) -> str:
        """The code points in hexadecimal, joined by hyphens."""
        return str(self.metadata["hexcode"])


def draw(source: bytes) -> Image.Image:
    """Return a drawing on white, scaled to `IMAGE_SIZE` and reduced to a palette."""
    image = Image.open(io.BytesIO(source)).convert("RGBA")
    flat = Image.new("RGBA", image.size, "white")
    flat.alpha_composite(image)
    small = flat.convert("RGB").reduce(image.width // IMAGE_SIZE)
    return small.quantize(PALETTE_COLORS, dither=Image.Dither.NONE)


def read_entries(folders: dict[str, Path], emojibase: Path) -> Iterator[Entry]:
    """Yield drawings joined with names.

    Emoji without a drawing in one of the styles are skipped, and so are the skin tone swatches.

    Args:
        folders: style to the folder of the unpacked package with its drawings.
        emojibase: folder of the unpacked `emojibase-data`.
    """
    labels = {without_selector(e["hexcode"]): e for e in read_json(emojibase / "en/data.json")}
    names = read_json(emojibase / "meta/groups.json")
    for row in read_json(folders["noto"] / "emoji.json"):
        label = labels[without_selector(row["unified"])]
        metadata = {
            "name": label["label"],
            "keywords": label.get("tags", []),
            "category": names["groups"][str(label["group"])],
            "subcategory": names["subgroups"][str(label["subgroup"])],
            "hexcode": label["hexcode"],
        }
        drawn = all(row[f"has_img_{VENDORS[style]}"] for style in folders)
        if drawn and metadata["category"] != SKIN_TONE_SWATCHES:
            sources = {
                style: (folder / "img" / VENDORS[style] / "64" / row["image"]).read_bytes()
                for style, folder in folders.items()
            }
            drawings = {style: draw(source) for style, source in sources.items()}
            yield Entry(metadata, drawings, sources, label["order"])


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def without_selector(hexcode: str) -> str:
    """Return code points without the variation selector, which some packages omit."""
    return hexcode.replace("-FE0F", "")


def drop_twins(entries: list[Entry]) -> list[Entry]:
    """Keep one of the emoji that have an identical drawing in some style.

    Raises:
        ValueError: if `KEPT_TWINS` does not name exactly one of them.
    """
    twins: dict[tuple[str, bytes], set[str]] = {}
    for entry in entries:
        for style, source in entry.sources.items():
            twins.setdefault((style, source), set()).add(entry.hexcode)
    dropped: set[str] = set()
    for cluster in twins.values():
        if len(cluster) == 1:
            continue
        if len(cluster & KEPT_TWINS) != 1:
            raise ValueError(
                f"KEPT_TWINS must name one emoji per drawing, got {sorted(cluster)}. Add one."
            )
        dropped |= cluster - KEPT_TWINS
    return [entry for entry in entries if entry.hexcode not in dropped]


def add_splits(entries: list[Entry]) -> list[Entry]:
    """Add `family` (the hexcode of its first member) and `split` to the metadata of each emoji."""
    drawings = torch.stack(
        [torch.stack([to_tensor(d) for d in e.drawings.values()]) for e in entries]
    )
    members = find_families([entry.metadata["name"] for entry in entries], drawings)
    families = [entries[first].hexcode for first in members]
    splits = assign_splits(families)
    return [
        attrs.evolve(entry, metadata=entry.metadata | {"family": family, "split": splits[family]})
        for entry, family in zip(entries, families, strict=True)
    ]


def write_archive(entries: list[Entry], path: Path) -> str:
    """Write the archive, and return the SHA-256 of the uncompressed tar stream.

    The PNG members are not compressed, only the whole stream: this is smaller, and the digest does
    not depend on the version of zlib.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for entry in entries:
            for style, drawing in entry.drawings.items():
                png = io.BytesIO()
                drawing.save(png, "PNG", compress_level=0)
                add_member(archive, f"{entry.hexcode.lower()}.{style}.png", png.getvalue())
            text = json.dumps(entry.metadata, ensure_ascii=False)
            add_member(archive, f"{entry.hexcode.lower()}.json", text.encode())
    path.write_bytes(gzip.compress(stream.getvalue(), compresslevel=9, mtime=0))
    return hashlib.sha256(stream.getvalue()).hexdigest()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add one file without owner and time, so that the stream depends only on the contents."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def main() -> None:
    """Read the packages, assign the splits and write the archive."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("google", type=Path, help="folder of the unpacked emoji-datasource-google")
    parser.add_argument(
        "twitter", type=Path, help="folder of the unpacked emoji-datasource-twitter"
    )
    parser.add_argument("emojibase", type=Path, help="folder of the unpacked emojibase-data")
    parser.add_argument(
        "--out", type=Path, default=ARCHIVE, help="where to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    folders = {"noto": arguments.google, "twemoji": arguments.twitter}
    entries = drop_twins(
        sorted(read_entries(folders, arguments.emojibase), key=lambda entry: entry.order)
    )
    digest = write_archive(add_splits(entries), arguments.out)
    print(f"{len(entries)} emoji, sha256 of the tar stream {digest}")


if __name__ == "__main__":
    main()
