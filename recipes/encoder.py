"""A trained model in use: features of images and texts, search, and labels without training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs
import torch
import torch.nn.functional as F
from ignite import distributed as idist
from torch import Tensor, nn
from torch.utils.data import Dataset

from diptych.engine.data.batches import to_device
from diptych.engine.data.worker_loader import WorkerLoader
from diptych.engine.evaluator import evaluation_mode
from diptych.engine.settings import AUTOCAST, Precision
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.entries import Ranking
from diptych.handlers.checkpointing.warm_start import load_weights
from diptych.handlers.contained_paths import is_plain_file
from diptych.handlers.files import make_folder, write_atomically
from diptych.handlers.run_directory import WEIGHTS, RunDirectory
from diptych.recipes.data.captions import images_in
from diptych.recipes.data.image_files import (
    ImageError,
    ImageFolder,
    in_colour,
    read_image,
    to_tensor,
)
from diptych.recipes.data.rows import DataError, Problem, problem_report, reported
from diptych.recipes.settings import RECIPE, Settings, read_settings
from diptych.recipes.towers.parts import Towers
from diptych.recipes.towers.resize import Resize
from diptych.recipes.training import CLASSES, TOWERS, Factory, build_model, towers_of

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Which = Literal["best", "last"]
NAMES = "diptych.names"
"""The key of the names in the metadata of a file of features."""
TEMPLATES = ("a photo of a {}.",)


@attrs.frozen
class Hit:
    """A result of a search.

    Attributes:
        name: the name of the image.
        score: its cosine similarity to the query.
    """

    name: str
    score: float


@attrs.frozen(eq=False)
class Embeddings:
    """Features with the names of what they were computed from.

    Attributes:
        names: of the images, or the texts.
        features: unit features, float32 [N, D], on the CPU.
    """

    names: tuple[str, ...]
    features: Tensor

    def save(self, path: Path | str) -> None:
        """Write a safetensors file of `features`, with the names as JSON in its metadata."""
        from safetensors.torch import save_file  # noqa: PLC0415 - an extra

        metadata = {NAMES: json.dumps(self.names)}
        content = {"features": self.features.contiguous()}
        make_folder(Path(path).parent)
        write_atomically(Path(path), partial(save_file, content, metadata=metadata))

    @classmethod
    def load(cls, path: Path | str) -> Embeddings:
        """Read a file that `save` has written.

        Raises:
            DataError: if it is none.
        """
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an extra

        try:
            with safe_open(path, framework="pt") as file:
                names = json.loads((file.metadata() or {})[NAMES])
                features = file.get_tensor("features")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise DataError(
                f"{path} must be a file of features (diptych embed writes one), got an error: "
                f"{error!s:.200}"
            ) from error
        if len(names) != len(features):
            raise DataError(f"{path} must have a name for each of its {len(features)} features")
        return cls(tuple(map(str, names)), features)


class Encoder:
    """A trained model that encodes images and texts.

    ```python
    encoder = Encoder.load("runs/photos")
    images = encoder.embed("photos")
    print(encoder.search("a red bicycle", images, top=12))
    ```

    Features are those that training computed in its evaluation, normalised to unit length.

    Args:
        model: has `encode_image` and, for pairs, `encode_text`; put into eval mode.
        towers: the towers: their images' size and their tokenizer.
        settings: the settings of the run; None: the model is of no run.
        classes: the names of the classes of the model's head.
        device: the device; None: this process's accelerator, else the CPU.
        precision: fp32, bf16 or fp16.
        batch_size: images or texts at once.
        workers: processes that read images.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        towers: Towers,
        settings: Settings | None = None,
        *,
        classes: Sequence[str] = (),
        device: torch.device | str | None = None,
        precision: Precision = "fp32",
        batch_size: int = 256,
        workers: int = 0,
    ) -> None:
        if precision not in get_args(Precision):
            choices = ", ".join(get_args(Precision))
            raise ValueError(f"precision must be one of {choices}, got {precision!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.device = _usable(device or idist.device())
        self.model, self.towers, self.settings = model.to(self.device).eval(), towers, settings
        self.classes, self.precision = tuple(classes), precision
        self.batch_size, self.workers = batch_size, workers

    @classmethod
    def load(
        cls,
        run: Path | str,
        *,
        factory: Factory | None = None,
        checkpoint: Which = "best",
        **options: Any,
    ) -> Encoder:
        """Return the encoder of a run, or of an exported folder.

        The names of the towers are looked up in the registry, and weights are read without
        unpickling objects: a run from somebody else executes nothing.

        Args:
            run: the run's directory.
            factory: the function that built the towers, if they are of own code.
            checkpoint: the best one by the run's metric (the last one, if there is none), or the
                last one.
            options: arguments of `Encoder`.

        Raises:
            DataError: if the directory is not that of such a run, or needs a factory.
            CheckpointError: if its weights cannot be read.
        """
        if checkpoint not in get_args(Which):
            raise ValueError(f"checkpoint must be 'best' or 'last', got {checkpoint!r}")
        directory = RunDirectory(run)
        path = directory.path
        if not (path / RECIPE).is_file():
            inside = sorted(path.glob(f"*/{RECIPE}"))
            hint = (
                f"Name a run in it, such as {inside[-1].parent}." if inside else "Check the path."
            )
            raise DataError(
                f"run must be the directory of a run of diptych train, got {path}, which has no "
                f"{RECIPE}. {hint}"
            )
        settings = read_settings(path / RECIPE)
        names = path / CLASSES
        classes = names.read_text("utf-8").splitlines() if is_plain_file(names) else []
        towers = towers_of(settings, factory=factory, saved=path / TOWERS)
        # Features are the same; activations are not kept here anyway.
        plain = attrs.evolve(settings, gradient_checkpointing=False)
        model, _ = build_model(plain, towers, classes=len(classes))
        load_weights(model, weights_file(directory, checkpoint), strict=True)
        return cls(model, towers, settings, classes=classes, **options)

    def encode_images(self, images: Iterable[Path | str | Image.Image]) -> Tensor:
        """Return the unit features of images, float32 [N, D], on the CPU.

        Args:
            images: paths, or images of Pillow.

        Raises:
            ImageError: if a file cannot be read as an image; the message names it.
            TypeError: if it is one path, or holds something else.
        """
        images = _several("images", images)
        features, problems = self._encode_files(images)
        for number, problem in problems.items():
            raise ImageError(f"{images[number]}: {problem}")
        return features

    def encode_texts(self, texts: Iterable[str]) -> Tensor:
        """Return the unit features of texts, float32 [N, D], on the CPU.

        Raises:
            DataError: if the model has no text tower.
            TypeError: if it is one text.
        """
        texts = _several("texts", texts)
        text, encode = self.towers.text, getattr(self.model, "encode_text", None)
        if text is None or encode is None:
            raise DataError("a model without a text tower cannot encode texts")
        starts = range(0, len(texts), self.batch_size)
        batches = (text.tokenize(texts[i : i + self.batch_size]) for i in starts)
        return self._encoded(encode, batches)

    def similarity(
        self, images: Iterable[Path | str | Image.Image], texts: Sequence[str]
    ) -> Tensor:
        """Return the cosine similarity of each image with each text, [images, texts]."""
        return self.encode_images(images) @ self.encode_texts(texts).T

    def embed(self, folder: Path | str) -> Embeddings:
        """Return the features of all images in a folder and its subfolders, by name.

        Images that cannot be read are left out, and reported in the log.

        Raises:
            DataError: if it is not a folder of images.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"--images must be a folder, got {folder}. Check the path.")
        found = ImageFolder(folder).find(row.image for row in images_in(folder))
        files = {name: path for name, path in found.items() if isinstance(path, Path)}
        if not files:
            raise DataError(f"--images must have images in it, got {folder}, which has none.")
        paths = list(files.values())
        features, problems = self._encode_files(paths)
        if problems:
            rows = [Problem(str(paths[number]), kind, "") for number, kind in problems.items()]
            logger.warning("Left out: %s", problem_report(rows, len(features)))
        names = [name for number, name in enumerate(files) if number not in problems]
        return Embeddings(tuple(names), features)

    def search(self, query: str, images: Embeddings, *, top: int = 12) -> list[Hit]:
        """Return the images that are most similar to a text, the best first.

        Args:
            query: the text.
            images: features that this model has computed.
            top: the most results, >= 1.

        Raises:
            DataError: if the features are of another model.
            ValueError: if `top` is below 1.
        """
        if top < 1:
            raise ValueError(f"top must be >= 1, got {top}")
        text = self.encode_texts([query])
        _check_same(images.features, text)
        scores = images.features @ text.T if len(images.features) else text.new_zeros(0, 1)
        scores = scores.squeeze(1)
        best = scores.topk(min(top, len(scores)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Hit(images.names[index], score) for index, score in found]

    def zero_shot(
        self, images: Tensor, classes: Sequence[str], *, templates: Sequence[str] = TEMPLATES
    ) -> Tensor:
        """Return the probability of each class for each image, float32 [N, C].

        The features of a class are the normalised mean of those of its prompts. Similarities are
        divided by the trained temperature, if the model has one (CLIP, arXiv:2103.00020).

        Args:
            images: features of `encode_images`.
            classes: names of the classes.
            templates: texts with "{}" where the name goes.

        Raises:
            DataError: if there are no classes, a template has no "{}", or the features are of
                another model.
        """
        classes, templates = _several("classes", classes), _several("templates", templates)
        if not classes or not templates or any("{}" not in one for one in templates):
            raise DataError("zero_shot must have classes, and templates with {} in each")
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        features = self.encode_texts(prompts).unflatten(0, (len(classes), len(templates)))
        _check_same(images, features)
        logits = images @ F.normalize(features.mean(dim=1), dim=1).T
        scale = getattr(self.model, "logit_scale", None)
        return (logits * (1.0 if scale is None else scale.detach().cpu().exp())).softmax(dim=1)

    def _encode_files(self, images: list[Any]) -> tuple[Tensor, dict[int, str]]:
        """Return the features of the images that can be read; by place, the others' problems."""
        pixels = _Pixels(images, self.towers.image.resize)
        loader = WorkerLoader(pixels, batch_size=self.batch_size, num_workers=self.workers)
        problems: list[str] = []

        def readable() -> Iterator[Tensor]:
            for batch, kinds in reported(loader, "Encoded images", len(images), self.batch_size):
                problems.extend(kinds)
                kept = [number for number, kind in enumerate(kinds) if not kind]
                if kept:
                    yield batch[kept]

        encode: Any = self.model.encode_image
        features = self._encoded(encode, readable())
        return features, {number: kind for number, kind in enumerate(problems) if kind}

    @torch.no_grad()
    def _encoded(self, encode: Callable[[Any], Tensor], batches: Iterable[Any]) -> Tensor:
        """Return the unit features of batches."""
        dtype, found = AUTOCAST.get(self.precision), []
        with evaluation_mode(self.model):
            for batch in batches:
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    features = encode(to_device(batch, self.device))
                found.append(F.normalize(features.float(), dim=1).cpu())
        return torch.cat(found) if found else torch.zeros(0, 0)


def _check_same(images: Tensor, texts: Tensor) -> None:
    if len(images) and images.shape[-1] != texts.shape[-1]:
        raise DataError(
            f"images must have {texts.shape[-1]} features each, as this model's texts, got "
            f"{images.shape[-1]}. Encode them with this model"
        )


def _several(name: str, values: Iterable[Any]) -> list[Any]:
    """Return several values as a list.

    Raises:
        TypeError: if it is a single path or text, whose letters would be the values.
    """
    if isinstance(values, (str, Path)):
        raise TypeError(f"{name} must be several, in a list, got {values!r}. Pass [{values!r}]")
    return list(values)


def _usable(device: torch.device | str) -> torch.device:
    """Return a device that this process can use.

    Raises:
        ValueError: if it cannot.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that this computer has, such as cpu or cuda:0, got {device}"
        ) from error
    return found


def weights_file(run: RunDirectory, which: Which) -> Path:
    """Return the file with a run's weights: of an exported folder, or a checkpoint.

    Raises:
        DataError: if there is none.
    """
    exported = run / WEIGHTS
    if exported.is_file():
        return exported
    entries = CheckpointStore(run.checkpoints).entries()
    if not entries:
        raise DataError(f"run must have a checkpoint, got {run}, which has none yet")
    latest = max(entries, key=lambda entry: entry.iteration)
    scores = Ranking(metric=latest.scored_by, mode="max", keep=1)
    best = scores.ranked(entries) if which == "best" and latest.scored_by else []
    return run.checkpoints / (best[0] if best else latest).file


class _Pixels(Dataset[tuple[Tensor, str]]):
    """The pixels of images, as the image tower takes them, and what is wrong with each."""

    def __init__(self, images: Sequence[Any], resize: Resize) -> None:
        self._images, self._resize = images, resize

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image = self._images[index]
        try:
            if isinstance(image, (str, Path)):
                image = read_image(Path(image), self._resize.resized)
            elif not hasattr(image, "convert"):
                raise TypeError(
                    f"images must be paths, or images of Pillow, got a {type(image).__name__}"
                )
            else:
                image = in_colour(image, self._resize.resized)
        except ImageError as error:
            side = self._resize.size
            return torch.zeros(3, side, side, dtype=torch.uint8), str(error)
        return to_tensor(self._resize(image)), ""
