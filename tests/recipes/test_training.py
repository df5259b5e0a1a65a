"""Training from settings: tasks, towers of one's own, frozen towers, scales, shards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import attrs
import pytest
import torch
from PIL import Image
from torch import nn

from diptych.engine.errors import CheckpointError
from diptych.recipes import (
    DataError,
    Embeddings,
    Encoder,
    ImageTower,
    Settings,
    TextTower,
    TowerError,
    Towers,
    evaluate,
    export,
    image_rows,
    train,
)
from diptych.recipes.settings import read_settings
from diptych.recipes.towers import libraries
from diptych.recipes.towers.parts import TowerOptions
from diptych.recipes.towers.registry import build_towers
from diptych.recipes.training import build_model, build_training
from tests.recipes.data.test_shards import jpeg, write_shard
from tests.recipes.emoji_files import emoji, write_images

QUICK = {"batch_size": 4, "epochs": 1, "image_size": 32, "log_every": 1}


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Return a folder with two classes of four drawings each."""
    for number, (name, (image, _)) in enumerate(emoji().items()):
        folder = tmp_path / "data" / ("odd_one" if number % 2 else "even_one")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return tmp_path / "data"


class Scaled(nn.Module):
    """A text tower with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(128, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.bag(tokens)
        return features


class Malicious:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def build(_: Settings) -> Towers:
    image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8))
    return Towers(
        image=ImageTower(module=image, width=8, size=8, projected=True),
        text=TextTower(
            module=Scaled(),
            width=8,
            tokenize=lambda texts: torch.tensor([[ord(t[0]) % 128, len(t) % 128] for t in texts]),
            projected=True,
        ),
        logit_scale=nn.Parameter(torch.tensor(3.0)),
    )


def test_two_views_train_on_images_alone_and_encode_them(classes, tmp_path):
    trainer = train(Settings(images=classes, task="two_views", **QUICK), tmp_path / "run")

    encoder = Encoder.load(tmp_path / "run")

    assert trainer.state.iteration == 1
    assert encoder.embed(classes).features.shape == (8, 256)
    with pytest.raises(DataError, match="without a text tower"):
        encoder.encode_texts(["x"])
    assert set(evaluate(encoder, image_rows(classes, task="two_views"))) == {
        "knn_accuracy",
        "linear_probe_accuracy",
    }


def test_classification_trains_on_folders_by_class(classes, tmp_path):
    settings = Settings(images=classes, task="classification", held_out=0.5, **QUICK)
    trainer = train(settings, tmp_path / "run")

    encoder = Encoder.load(tmp_path / "run")
    values = evaluate(encoder, image_rows(classes, task="classification"))

    assert 0 <= trainer.metrics.get_history("val/accuracy")[-1] <= 1
    assert encoder.classes == ("even_one", "odd_one")
    assert 0 <= values["accuracy"] <= 1


def test_folders_by_class_train_on_the_names_of_the_classes(classes, tmp_path):
    train(Settings(images=classes, dim=8, **QUICK), tmp_path / "run")

    values = evaluate(Encoder.load(tmp_path / "run"), image_rows(classes))

    assert {"zero_shot_accuracy", "knn_accuracy"} <= set(values)


def test_shards_train_and_the_last_one_is_held_out(tmp_path):
    for shard in range(2):
        members = {f"{n}.jpg": jpeg(30 * n) for n in range(8)}
        texts = {f"{n}.txt": f"shade {shard} {n}".encode() for n in range(8)}
        merged = {name: (members | texts)[name] for name in sorted(members | texts)}
        write_shard(tmp_path / f"{shard}.tar", merged)
    settings = Settings(shards=f"{tmp_path}/{{0..1}}.tar", dim=8, **QUICK)

    trainer = train(settings, tmp_path / "run")

    assert trainer.state.iteration == 2
    assert 0 <= trainer.metrics.get_history("val/recall@1")[-1] <= 1
    assert Encoder.load(tmp_path / "run").encode_texts(["shade 1"]).shape == (1, 8)
    with pytest.raises(DataError, match="--task must be image_text for shards"):
        train(Settings(shards=str(tmp_path / "0.tar"), task="two_views"))
    with pytest.raises(DataError, match="--shards must not come with --images or --captions"):
        train(attrs.evolve(settings, images=tmp_path))
    table = image_rows(write_images(tmp_path / "images"), task="two_views")
    with pytest.raises(DataError, match=r"got val of .*: all 8, train 8, val 0"):
        evaluate(Encoder.load(tmp_path / "run"), table, part="val")  # of images it has trained on


def test_towers_of_own_code_are_built_by_the_callers_function_alone(photos, tmp_path):
    settings = Settings(images=photos / "images", captions=photos / "captions.txt", **QUICK)
    train(settings, tmp_path / "run", factory=build)

    assert read_settings(tmp_path / "run" / "recipe.yaml").image_tower == "own"
    with pytest.raises(DataError, match="Pass the function that built them"):
        Encoder.load(tmp_path / "run")
    encoder = Encoder.load(tmp_path / "run", factory=build)
    assert encoder.encode_texts(["a", "b"]).shape == (2, 8)


def test_the_scale_of_the_towers_is_the_one_that_is_trained_saved_and_used(photos, tmp_path):
    settings = Settings(images=photos / "images", captions=photos / "captions.txt", **QUICK)

    trainer = train(settings, tmp_path / "run", factory=build)
    encoder = Encoder.load(tmp_path / "run", factory=build, checkpoint="last", device="cpu")

    trained = trainer.model.logit_scale
    assert trained.item() != 3.0
    assert trainer.loss.temperature.logit_scale is trained
    trained = trained.cpu()
    assert torch.equal(encoder.model.logit_scale, trained)
    images = encoder.embed(photos / "images").features
    classes = encoder.encode_texts(["a photo of a x.", "a photo of a yy."])
    expected = (images @ classes.T * trained.exp()).softmax(dim=1)
    torch.testing.assert_close(encoder.zero_shot(images, ["x", "yy"]), expected.detach())


def test_a_loss_with_a_bias_trains_one_of_the_model(photos):
    settings = Settings(
        images=photos / "images", captions=photos / "captions.txt", loss="siglip", **QUICK
    )

    training = build_training(settings)

    names = dict(training.trainer.model.named_parameters())
    assert {"logit_scale", "logit_bias"} <= set(names)
    held = {id(p) for group in training.trainer.optimizer.param_groups for p in group["params"]}
    assert {id(one) for one in names.values()} == held


def test_a_locked_tower_stays_as_it_is(photos):
    settings = Settings(
        images=photos / "images", captions=photos / "captions.txt", lock_image=True, dim=8, **QUICK
    )
    training = build_training(settings)
    model, tower = training.trainer.model, training.towers.image.module
    before = {name: value.clone() for name, value in tower.state_dict().items()}

    training.trainer.run(training.loader, max_epochs=1)

    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert not any(part.training for part in tower.modules())
    assert model.encode_image[2].weight.grad is not None  # the projection learns


def test_a_text_tower_can_be_of_another_size_than_the_features():
    torch.manual_seed(0)
    settings = Settings(dim=24)
    towers = build_towers("small", "small", TowerOptions(image_size=48))

    model, _ = build_model(settings, towers, classes=0)
    image, text = model(
        torch.zeros(2, 3, 48, 48, dtype=torch.uint8), towers.text.tokenize(["a", "dog"])
    )

    assert image.shape == text.shape == (2, 24)


@pytest.mark.parametrize(
    ("image", "text"),
    [("big", None), ("small:x", None), ("hf", None), ("small", "timm:x"), ("os.path:join", None)],
)
def test_a_name_that_is_not_in_the_registry_is_refused(image, text):
    with pytest.raises(TowerError, match="must be one of small"):
        build_towers(image, text, TowerOptions())


@pytest.mark.parametrize(
    ("prefix", "extra"), [("timm", "timm"), ("open_clip", "open-clip"), ("hf", "transformers")]
)
def test_a_tower_of_a_missing_library_names_the_extra(prefix, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(ImportError, match=rf"diptych\[{extra}\]"):
        build_towers(f"{prefix}:some/model", None, TowerOptions())


def test_a_library_that_cannot_be_imported_is_named_with_the_reason(monkeypatch):
    def fail(name):
        raise RuntimeError(f"{name} was built for another torch")

    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr(libraries, "import_module", fail)

    with pytest.raises(ImportError, match=r"timm:x needs .* cannot be imported: timm was built"):
        build_towers("timm:x", None, TowerOptions())


def test_settings_of_somebody_else_are_checked(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, message in (
        ("epoch: 3", "Did you mean epochs"),
        ("epochs: many", "epochs must be a whole number"),
        ("images: [1]", "a setting that cannot be used"),
        ("- 1", "must be a mapping"),
        ("a: [", "must be a file of settings"),
        ("images: !!python/object/apply:os.system [echo]", "must be a file of settings"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_settings(path)


def test_a_run_of_somebody_else_executes_nothing_and_leads_nowhere(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "secret").write_text("secret")
    (copy / "towers" / "image").mkdir(parents=True)
    (copy / "towers" / "image" / "config.json").symlink_to(tmp_path / "secret")
    (copy / "classes.txt").symlink_to(tmp_path / "secret")
    export(copy, "safetensors", tmp_path / "out")
    assert not any("secret" in f.read_text("latin-1") for f in (tmp_path / "out").rglob("*.*"))

    recipe = copy / "recipe.yaml"
    for name in ("os:system", "timm:hf-hub:somebody/model", "tests.recipes.test_training:build"):
        recipe.write_text(recipe.read_text().replace("image_tower: small", f"image_tower: {name}"))
        with pytest.raises((TowerError, ImportError)):
            Encoder.load(copy)
        recipe.write_text((run / "recipe.yaml").read_text())
    latest, here = (Encoder.load(one, checkpoint="last") for one in (copy, run))
    assert torch.equal(latest.encode_texts(["a"]), here.encode_texts(["a"]))  # but it is loaded
    assert latest.classes == ()
    for file in (copy / "checkpoints").glob("*.pt"):
        torch.save({"model": Malicious(tmp_path / "made")}, file)
    with pytest.raises(CheckpointError):
        Encoder.load(copy)
    assert not (tmp_path / "made").exists()


def test_features_are_those_that_training_computed(run, photos):
    encoder = Encoder.load(run, checkpoint="last", device="cpu")
    training = build_training(encoder.settings)
    training.trainer.model.load_state_dict(encoder.model.state_dict())
    table = image_rows(photos / "images", photos / "captions.txt")
    rows = table.parts(0.3)["val"]
    batch = next(iter(training.trainer.handlers[-1].loader))

    with torch.no_grad():
        features = training.trainer.model.cpu().eval()(batch["image"], batch["text"])

    mine = (
        encoder.encode_images(row.path for row in rows),
        encoder.encode_texts([r.caption for r in rows]),
    )
    for ours, theirs in zip(mine, features, strict=True):
        torch.testing.assert_close(
            ours, nn.functional.normalize(theirs, dim=1), rtol=1e-5, atol=1e-6
        )


def test_an_image_that_cannot_be_read_is_named_and_left_out_of_a_folder(run, tmp_path, caplog):
    image = next(iter(emoji().values()))[0]
    for name in ("a.png", "c.png"):
        image.save(tmp_path / name)
    (tmp_path / "b.png").write_text("no image")
    encoder = Encoder.load(run, batch_size=1)

    found = encoder.embed(tmp_path)

    assert (found.names, found.features.shape) == (("a.png", "c.png"), (2, 16))
    assert "1 of 3 rows cannot be used" in caplog.text
    assert "b.png" in caplog.text
    with pytest.raises(DataError, match=r"b\.png: the file cannot be read as an image"):
        encoder.encode_images([tmp_path / "a.png", tmp_path / "b.png"])


def test_batches_precision_and_pillow_images_give_the_same_features(run, photos):
    paths = sorted((photos / "images").iterdir())
    whole = Encoder.load(run).encode_images(paths)

    pieces = Encoder.load(run, batch_size=3).encode_images(
        Image.open(path).convert(mode)
        for path, mode in zip(paths, ["RGB", "RGBA"] * 4, strict=True)
    )
    half = Encoder.load(run, precision="bf16").encode_images(paths)

    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half, whole, rtol=0, atol=0.05)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(8))


def test_what_an_encoder_cannot_use_is_named(run, photos):
    encoder, other = Encoder.load(run), Embeddings(("x",), torch.ones(1, 3))
    one = str(next((photos / "images").iterdir()))
    images = encoder.encode_images([one])
    for use, name in (
        (lambda: encoder.encode_texts("a cat"), "texts"),
        (lambda: encoder.encode_images(one), "images"),
        (lambda: encoder.zero_shot(images, "cat"), "classes"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be several, in a list"):
            use()
    with pytest.raises(TypeError, match=r"images of Pillow, got a Tensor"):
        encoder.encode_images([torch.zeros(3, 8, 8)])
    with pytest.raises(DataError, match=r"images must have 16 features each, .* got 3"):
        encoder.search("a cat", other)
    with pytest.raises(ValueError, match="checkpoint must be 'best' or 'last', got 'worst'"):
        Encoder.load(run, checkpoint="worst")
