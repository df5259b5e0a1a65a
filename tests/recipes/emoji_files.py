"""A few emoji as files, with their captions in the layouts that people have."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from examples.emoji.data import read_emoji

Captions = Mapping[str, Sequence[str]]
"""The captions of each image."""


@cache
def emoji(number: int = 8) -> dict[str, tuple[Image.Image, tuple[str, str]]]:
    """Return drawings with two captions each, by file name."""
    return {
        f"{one.hexcode}.png": (
            Image.fromarray(one.drawings["noto"].permute(1, 2, 0).numpy()),
            (one.name, ", ".join([one.name, *one.keywords])),
        )
        for one in read_emoji()[:number]
    }


def captions() -> dict[str, list[str]]:
    """Return the captions by file name."""
    return {name: [*texts] for name, (_, texts) in emoji().items()}


def write_images(folder: Path) -> Path:
    """Write the drawings into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, _) in emoji().items():
        image.save(folder / name)
    return folder


def flickr8k(path: Path, texts: Captions) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [(name, text) for name, some in texts.items() for text in some]
        csv.writer(file).writerows([("image", "caption"), *rows])


def flickr8k_tokens(path: Path, texts: Captions) -> None:
    lines = [f"{n}#{i}\t{text}\n" for n, some in texts.items() for i, text in enumerate(some)]
    path.write_text("".join(lines), "utf-8")


def flickr30k(path: Path, texts: Captions) -> None:
    lines = [f"{n}| {i}| {text}\n" for n, some in texts.items() for i, text in enumerate(some)]
    path.write_text("image_name| comment_number| comment\n" + "".join(lines), "utf-8")


def coco(path: Path, texts: Captions) -> None:
    images = [{"id": i, "file_name": name} for i, name in enumerate(texts)]
    said = [(i, text) for i, some in enumerate(texts.values()) for text in some]
    annotations = [{"id": n, "image_id": i, "caption": t} for n, (i, t) in enumerate(said)]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def karpathy(path: Path, texts: Captions) -> None:
    images = [
        {
            "filename": name,
            "filepath": "val2014",
            "split": "val" if number < 2 else "restval",
            "sentences": [{"raw": text, "tokens": text.split()} for text in some],
        }
        for number, (name, some) in enumerate(texts.items())
    ]
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))


def open_clip(path: Path, texts: Captions) -> None:
    lines = [f"./{name}\t{text}\n" for name, some in texts.items() for text in some]
    path.write_text("filepath\ttitle\n" + "".join(lines), "utf-16")


def tsv_without_header(path: Path, texts: Captions) -> None:
    lines = [f"C:\\photos\\{name}\t{text}\r\n" for name, some in texts.items() for text in some]
    path.write_bytes("".join(lines).encode("utf-8-sig"))


def imagefolder(path: Path, texts: Captions) -> None:
    lines = [{"file_name": name, "text": text} for name, some in texts.items() for text in some]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


LAYOUTS: dict[str, tuple[str, Callable[[Path, Captions], None]]] = {
    "comma-separated with a header": ("captions.txt", flickr8k),
    "Flickr8k.token.txt": ("Flickr8k.token.txt", flickr8k_tokens),
    "Flickr30k results.csv": ("results.csv", flickr30k),
    "COCO captions": ("captions_val2014.json", coco),
    "Karpathy's splits": ("dataset_coco.json", karpathy),
    "tab-separated with a header": ("train.csv", open_clip),
    "tab-separated without a header": ("captions.tsv", tsv_without_header),
    "JSON lines": ("metadata.jsonl", imagefolder),
}
"""For each layout, its file name and the function that writes it."""
