"""A trained model as two models of transformers, with their projections."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch

from diptych.handlers.extras import check_extra
from diptych.handlers.files import write_atomically
from diptych.recipes.data.rows import DataError
from diptych.recipes.encoder import Encoder
from diptych.recipes.settings import Settings
from diptych.recipes.towers.parts import ImageTower
from diptych.recipes.towers.transformers_towers import RESAMPLE, HFPooled, longest_text

PROJECTIONS = "projections.safetensors"
TWO = """\
`image/` and `text/` are models of transformers; `{projections}` maps their pooled outputs to the
features that are compared. `transformers.CLIPImageProcessor.from_pretrained("image")` resizes and
normalises images.

```python
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

image_model = AutoModel.from_pretrained("image").eval()
text_model = AutoModel.from_pretrained("text").eval()
tokenizer = AutoTokenizer.from_pretrained("text")
projections = load_file("{projections}")


@torch.no_grad()
def encode_images(pixel_values):
    output = image_model(pixel_values=pixel_values)
    return normalize({pooled} @ projections["image"].T, dim=1)


@torch.no_grad()
def encode_texts(texts):
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length={longest}, return_tensors="pt"
    )
    mask = tokens["attention_mask"]
    hidden = text_model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
    pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return normalize(pooled @ projections["text"].T, dim=1)
```

Logits are the similarities times `projections["logit_scale"].exp()`."""


def write_two_towers(encoder: Encoder, run: Path, folder: Path) -> str:
    """Write two models of transformers, and return how they are used, in Markdown.

    Raises:
        DataError: if transformers has no model for a tower.
    """
    from safetensors.torch import save_file  # noqa: PLC0415 - an extra

    model: Any = encoder.model
    image, text = encoder.towers.image, encoder.towers.text
    plain = _of_timm(encoder.settings, image) or getattr(image.module, "model", None)
    if text is None or not isinstance(text.module, HFPooled) or text.save is None or plain is None:
        raise DataError(
            "--to huggingface must be given for a run with towers that transformers has (those of "
            "one CLIP without --dim; or hf:NAME or timm:NAME for images and hf:NAME for texts), "
            f"got {run}. Use --to safetensors or --to onnx."
        )
    text.save(folder)
    cast("Any", text.module.model).save_pretrained(folder / "text")
    plain.save_pretrained(folder / "image")
    write_preprocessor(image, folder / "image")
    projections = {
        "image": model.encode_image[-1].weight,
        "text": model.encode_text[-1].weight,
        "logit_scale": torch.zeros(()) if model.logit_scale is None else model.logit_scale,
    }
    content = {name: value.detach().contiguous() for name, value in projections.items()}
    write_atomically(folder / PROJECTIONS, partial(save_file, content))
    most = longest_text(cast("Any", text.module.model).config)
    return TWO.format(projections=PROJECTIONS, pooled=_pooled(image), longest=most)


def _of_timm(settings: Settings | None, tower: ImageTower) -> Any:
    """Return the model of transformers that wraps one of timm; None for another tower."""
    library, _, name = ("" if settings is None else settings.image_tower).partition(":")
    if library != "timm":
        return None
    check_extra("transformers", "transformers", needed_by="--to huggingface")
    transformers = import_module("transformers")
    size = None if settings is None else settings.image_size
    for given in [{"img_size": size}, {}] if size else [{}]:
        config = transformers.TimmWrapperConfig(architecture=name, model_args=given, num_labels=0)
        try:
            wrapper = transformers.TimmWrapperModel(config)
        except TypeError:  # a convolutional network takes any size, and no argument for it
            continue
        wrapper.timm_model = tower.module
        return wrapper
    return None


def _pooled(tower: ImageTower) -> str:
    """Return the code of an image's features before the projection."""
    if not isinstance(tower.module, HFPooled):
        return "output.pooler_output"
    size, model = tower.size, cast("Any", tower.module.model)
    with torch.no_grad():
        hidden = model(pixel_values=torch.zeros(1, 3, size, size)).last_hidden_state
    maps = ".flatten(2).mean(2)" if hidden.ndim == 4 else ".mean(1)"
    return f"output.last_hidden_state{maps}"


def write_preprocessor(tower: ImageTower, folder: Path) -> None:
    """Write how images are resized and normalised, for an image processor of transformers.

    Padding has no such form; then nothing is written.
    """
    resize = tower.resize
    if resize.mode == "pad":
        return
    side, both = resize.resized, {"height": resize.size, "width": resize.size}
    squashed = {"height": side, "width": side}
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": squashed if resize.mode == "squash" else {"shortest_edge": side},
        "resample": next(n for n, name in RESAMPLE.items() if name == resize.interpolation),
        "do_center_crop": True,
        "crop_size": both,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
        "do_convert_rgb": True,
    }
    write_atomically(folder / "preprocessor_config.json", json.dumps(values, indent=2) + "\n")
