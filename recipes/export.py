"""A trained model as files for other programs, with a model card."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.entries import Entry
from diptych.handlers.checkpointing.export import export_weights
from diptych.handlers.contained_paths import is_plain_file
from diptych.handlers.extras import check_extra
from diptych.handlers.files import make_folder, write_atomically
from diptych.handlers.run_directory import WEIGHTS, RunDirectory
from diptych.recipes.data.rows import DataError, shortened
from diptych.recipes.encoder import Encoder, Which, weights_file
from diptych.recipes.settings import RECIPE
from diptych.recipes.towers.models import merge_lora
from diptych.recipes.towers.parts import LICENCES
from diptych.recipes.towers.registry import OWN, SMALL
from diptych.recipes.towers.small_towers import TextEncoder
from diptych.recipes.training import CLASSES, DATA, TOWERS, Factory
from diptych.recipes.transformers_export import write_preprocessor, write_two_towers

Format = Literal["safetensors", "huggingface", "onnx"]
CARD = "README.md"
EXAMPLES = ("a red bicycle", "two dogs in the snow")
"""Texts with which the text tower is traced for ONNX."""
DECIDES = ("task", "image_tower", "text_tower", "pretrained", "loss_name", "epochs", "batch_size")
"""The settings that a card shows."""
LICENCE = {
    SMALL: "built into Diptych, under its licence",
    OWN: "of the user's own code",
}
UNKNOWN = "unknown: see the page of the model"
RANDOM = "trained from random weights"


def export(
    run: Path | str,
    to: Format,
    out: Path | str,
    *,
    factory: Factory | None = None,
    checkpoint: Which = "best",
) -> Path:
    """Write a trained model for other programs, with a card of its data, settings and results.

    `safetensors` writes the weights and all that `Encoder.load` needs. `huggingface` writes a CLIP
    of transformers, or two models of it if the towers are from two names (`hf:NAME`, or `timm:NAME`
    for images); the card has the code that encodes with them. `onnx` writes `image.onnx`
    (pixels, uint8 [B, 3, S, S], to features) and `text.onnx` (tokens to features); the batch and
    the length of the texts may vary.

    Args:
        run: the run's directory.
        to: the format.
        out: the folder to write; it must be new or empty.
        factory: the function that built the towers, if they are of own code.
        checkpoint: the best one, or the last one.

    Returns:
        The folder.

    Raises:
        DataError: if the folder is in use, or the model has no such format.
        ImportError: if the format needs a package that is not installed.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"--out must be a new or empty folder, got {folder}, which has files in it."
        )
    encoder = Encoder.load(run, factory=factory, checkpoint=checkpoint, device="cpu")
    make_folder(folder)
    use = WRITERS[to](encoder, Path(run), folder)
    write_atomically(folder / CARD, model_card(Path(run), encoder, use, checkpoint))
    return folder


def _write_safetensors(encoder: Encoder, run: Path, folder: Path) -> str:
    check_extra("safetensors", "safetensors", needed_by="export")
    for name in (RECIPE, CLASSES, DATA):
        _copy(run / name, folder)
    for part in (".", "image", "text"):
        for saved in _files(run / TOWERS / part):
            make_folder(folder / TOWERS / part)
            _copy(saved, folder / TOWERS / part)
    export_weights(encoder.model.state_dict(), folder / WEIGHTS)
    return _python("from diptych.recipes import Encoder", "", 'encoder = Encoder.load(".")')


def _write_huggingface(encoder: Encoder, run: Path, folder: Path) -> str:
    whole = encoder.towers.whole
    for tower in (encoder.towers.image, encoder.towers.text):
        if tower is not None:
            merge_lora(tower)
    added = getattr(encoder.model, "encode_text", None)
    if whole is None or added is None or not isinstance(added[-1], nn.Identity):
        return write_two_towers(encoder, run, folder)
    whole.save_pretrained(folder)
    write_preprocessor(encoder.towers.image, folder)
    for saved in _files(run / TOWERS / "image"):
        if not (folder / saved.name).exists():
            _copy(saved, folder)
    return _python(
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'model = AutoModel.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _copy(file: Path, folder: Path) -> None:
    """Copy a file of a run; a link, which may lead out of the run, is left out."""
    if is_plain_file(file):
        write_atomically(folder / file.name, file.read_bytes())


def _write_onnx(encoder: Encoder, _: Path, folder: Path) -> str:
    check_extra("onnx", "onnxscript", needed_by="export to onnx")
    size = encoder.towers.image.size
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    encode_image: Any = encoder.model.encode_image
    _to_onnx(encode_image, {"pixels": pixels}, folder / "image.onnx", varies={0: "batch"})
    text, encode_text = encoder.towers.text, getattr(encoder.model, "encode_text", None)
    if text is not None and encode_text is not None:
        tokens = text.tokenize(list(EXAMPLES))
        given = {"tokens": tokens} if isinstance(tokens, Tensor) else tokens
        side = _ByPosition(encode_text, [] if isinstance(tokens, Tensor) else list(given))
        _to_onnx(side, given, folder / "text.onnx", varies={0: "batch", 1: "length"})
        if text.save is not None:  # with its tokenizer
            text.save(folder)
    return (
        f"`image.onnx` maps pixels, uint8 [B, 3, {size}, {size}], to features. Images are resized "
        f"by `{encoder.towers.image.resize}`. `text.onnx`, if the model has a text tower, maps "
        "the tokens of its tokenizer to features."
    )


WRITERS: Mapping[Format, Callable[[Encoder, Path, Path], str]] = {
    "safetensors": _write_safetensors,
    "huggingface": _write_huggingface,
    "onnx": _write_onnx,
}


class _ByPosition(nn.Module):
    """A text tower that takes its tokens one by one, as ONNX does.

    Args:
        encode: the tower.
        names: the names under which it takes them; none: it takes a tensor.
    """

    def __init__(self, encode: Any, names: list[str]) -> None:
        super().__init__()
        self.encode, self._names = encode, names

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Return features."""
        given = dict(zip(self._names, (first, second), strict=False)) or first
        features: Tensor = self.encode(given)
        return features


def _to_onnx(
    module: nn.Module, inputs: Mapping[str, Tensor], path: Path, *, varies: Mapping[int, str]
) -> None:
    """Trace a module whose inputs may vary in some of their dimensions."""
    shapes = dict.fromkeys(varies, torch.export.Dim.DYNAMIC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=["features"],
            dynamic_shapes=tuple(shapes for _ in inputs),
            verbose=False,
        )
    assert program is not None
    write_atomically(path, lambda temporary: program.save(temporary, external_data=False))


def model_card(run: Path, encoder: Encoder, use: str, checkpoint: Which) -> str:
    """Return a card in Markdown: use, data, settings, results, and the licence of the towers."""
    settings = encoder.settings
    assert settings is not None
    data = (run / DATA).read_text("utf-8") if is_plain_file(run / DATA) else "not recorded\n"
    shown = {name: getattr(settings, name) for name in DECIDES}
    entry = _entry(run, checkpoint)
    results = {} if entry is None else {k: v for k, v in entry.metrics.items() if "val/" in k}
    lines = [
        "---",
        "library_name: diptych",
        "tags: [contrastive-learning, image-text]",
        "---",
        f"# {RunDirectory(run).name}",
        "",
        "Trained with Diptych. Features are compared after normalisation to unit length.",
        "",
        "## Use",
        "",
        use,
        "",
        "## Data",
        "",
        "```text",
        data.rstrip(),
        "```",
        "",
        "## Settings",
        "",
        *_table(("setting", "value"), {name: value for name, value in shown.items() if value}),
        "",
        "## Results",
        "",
        *(_table(("metric", "value"), {k: f"{v:.4f}" for k, v in results.items()}) or ["none"]),
        "",
        "## Licence of the towers",
        "",
        *(f"- {text}" for text in _licences(encoder, run / TOWERS / LICENCES)),
        "",
    ]
    return "\n".join(lines)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]


def _licences(encoder: Encoder, file: Path) -> list[str]:
    """Return the licence of each tower: as its files stated it when the run began, if they did."""
    stated = json.loads(file.read_text("utf-8")) if is_plain_file(file) else []
    assert encoder.settings is not None
    start = RANDOM if encoder.settings.pretrained is None else UNKNOWN
    return [
        f"{side} tower `{name}`: {LICENCE.get(name) or shortened(licence) or start}"
        for (side, name), licence in zip(_names(encoder).items(), [*stated, "", ""], strict=False)
    ]


def _names(encoder: Encoder) -> dict[str, str]:
    """Return the names of the towers of an encoder."""
    settings, text = encoder.settings, encoder.towers.text
    assert settings is not None
    if text is None:
        return {"image": settings.image_tower}
    own = SMALL if isinstance(text.module, TextEncoder) else settings.image_tower
    return {"image": settings.image_tower, "text": settings.text_tower or own}


def _entry(run: Path, checkpoint: Which) -> Entry | None:
    """Return the entry of the checkpoint that was exported."""
    directory = RunDirectory(run)
    file = weights_file(directory, checkpoint).name
    entries = CheckpointStore(directory.checkpoints).entries()
    return next((entry for entry in entries if entry.file == file), None)
