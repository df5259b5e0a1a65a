"""Towers of transformers, open_clip and peft, where they are installed, and their exports."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diptych.recipes import DataError, Encoder, Settings, export, train
from diptych.recipes.data.image_files import read_image, to_tensor
from diptych.recipes.towers.models import add_lora, checkpoint_gradients
from diptych.recipes.towers.parts import ImageTower, TowerError, TowerOptions
from diptych.recipes.towers.registry import build_towers
from diptych.recipes.training import build_training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "face", "smile", "grin", "eye", "joy", "tear", "a"]
UNKNOWN, PADDING = {"unk_token": "[UNK]"}, {"pad_token": "[PAD]"}
QUICK = {"batch_size": 4, "epochs": 1, "log_every": 1}


def save_tokenizer(folder: Path) -> None:
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    words = {word: number for number, word in enumerate(WORDS)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, **UNKNOWN))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, **PADDING, **UNKNOWN
    ).save_pretrained(folder)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Return a folder with a small CLIP of transformers, as a hub would hold it."""
    transformers = pytest.importorskip("transformers")
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    layer["num_attention_heads"] = 2
    config = transformers.CLIPConfig(
        text_config={**layer, "vocab_size": len(WORDS), "max_position_embeddings": 16}
        | {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0},
        vision_config={**layer, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        '{"crop_size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], '
        '"image_std": [0.4, 0.5, 0.6], "image_processor_type": "CLIPImageProcessor"}'
    )
    return tmp_path / "clip"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """Return a folder with a small text model of transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    return tmp_path / "bert"


def trained(photos: Path, run: Path, **settings: object) -> None:
    texts = photos / "captions.txt"
    train(Settings(images=photos / "images", captions=texts, **QUICK, **settings), run)


def test_a_clip_of_transformers_trains_its_own_weights_and_exports_to_them(photos, clip, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, out = tmp_path / "run", tmp_path / "out"
    trained(photos, run, image_tower=f"hf:{clip}", pretrained="default")
    shutil.rmtree(clip)  # the run is complete without it

    encoder = Encoder.load(run, device="cpu")
    export(run, "huggingface", out)

    model = transformers.AutoModel.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["a smile", "joy"]
    pixels = torch.rand(3, 3, 32, 32).mul(255).to(torch.uint8)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    with torch.no_grad():
        theirs = model(
            **tokenizer(texts, padding=True, return_tensors="pt"),
            pixel_values=(pixels / 255 - mean) / std,
        )
        ours = nn.functional.normalize(encoder.model.encode_image(pixels), dim=1)
    torch.testing.assert_close(theirs.image_embeds, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        theirs.text_embeds, encoder.encode_texts(texts), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(model.logit_scale, encoder.model.logit_scale)
    assert encoder.model.logit_scale.item() != pytest.approx(2.6592, abs=1e-6)  # it was trained


def test_a_text_model_of_transformers_beside_the_small_image_tower(photos, bert, tmp_path):
    trained(photos, tmp_path / "run", text_tower=f"hf:{bert}", image_size=32, dim=8)
    shutil.rmtree(bert)

    encoder = Encoder.load(tmp_path / "run")

    alone, padded = encoder.encode_texts(["a smile"]), encoder.encode_texts(["a smile", "a a a a"])
    torch.testing.assert_close(alone[0], padded[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="towers that transformers has"):
        export(tmp_path / "run", "huggingface", tmp_path / "out")


def image_model(kind: str, folder: Path) -> str:
    """Write a small image model, and return the name of its tower."""
    if kind == "timm":
        pytest.importorskip("torchvision")
        pytest.importorskip("timm")
        return "timm:vit_tiny_patch16_224"
    transformers = pytest.importorskip("transformers")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(hidden_size=16, image_size=32, patch_size=16, **layers)
    if kind == "convnext":
        config = transformers.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32
        )
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"height": 32, "width": 32}, "resample": 2}'
    )
    return f"hf:{folder}"


@pytest.mark.parametrize("kind", ["vit", "convnext", "timm", "lora"])
def test_two_towers_export_to_two_models_with_the_code_that_encodes(
    kind, photos, bert, tmp_path, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    tower, more = image_model(kind, tmp_path / "vit"), {"text_tower": f"hf:{bert}"}
    if kind == "lora":
        pytest.importorskip("peft")
        more["lora"] = 2
    trained(photos, tmp_path / "run", image_tower=tower, image_size=32, dim=8, **more)
    encoder = Encoder.load(tmp_path / "run", device="cpu")
    paths, texts = sorted((photos / "images").iterdir())[:3], ["a smile", "joy with a tear"]

    export(tmp_path / "run", "huggingface", tmp_path / "out")

    card = (tmp_path / "out" / "README.md").read_text()
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)  # noqa: S102 - our own
    image = encoder.towers.image
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (image.mean, image.std))
    pixels = torch.stack([to_tensor(image.resize(read_image(path, 32))) for path in paths])
    found = names["encode_images"]((pixels / 255 - mean) / std), names["encode_texts"](texts)
    expected = encoder.encode_images(paths), encoder.encode_texts(texts)
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    # An odd margin is halved in another way there, which shifts a cropped image by a pixel.
    if image.resize.kept == 1 and importlib.util.find_spec("torchvision") is not None:
        processor = transformers.CLIPImageProcessor.from_pretrained("image")
        pictures = [read_image(path, 32) for path in paths]
        theirs = processor(pictures, return_tensors="pt")["pixel_values"] * std + mean
        torch.testing.assert_close(theirs, pixels / 255, rtol=0, atol=3 / 255)


def test_micro_batches_of_tokens_with_masks_change_nothing(photos, bert):
    losses = []
    for size in (None, 1):
        data = {"images": photos / "images", "captions": photos / "captions.txt"}
        settings = Settings(
            **data, text_tower=f"hf:{bert}", image_size=32, microbatch_size=size, **QUICK
        )
        training = build_training(settings)
        training.trainer.run(training.loader, max_epochs=1)
        losses.append(training.trainer.metrics.get_history("train/loss"))

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) > 0


def test_lora_trains_few_weights_and_reloads(photos, clip, tmp_path):
    pytest.importorskip("peft")
    images, texts = photos / "images", photos / "captions.txt"
    settings = Settings(
        images=images,
        captions=texts,
        image_tower=f"hf:{clip}",
        lora=2,
        pretrained="default",
        **QUICK,
    )
    training = build_training(settings)
    names = [n for n, p in training.trainer.model.named_parameters() if p.requires_grad]

    assert names
    assert all("lora_" in name or name == "logit_scale" for name in names)
    train(settings, tmp_path / "run")
    assert Encoder.load(tmp_path / "run").encode_texts(["joy"]).shape == (1, 12)


def test_a_layer_that_is_not_used_is_neither_trained_nor_adapted(bert):
    pytest.importorskip("peft")
    tower = build_towers("small", f"hf:{bert}", TowerOptions()).text
    assert not any(p.requires_grad for p in tower.module.model.pooler.parameters())

    add_lora(tower, 2)
    tower.module(tower.tokenize(["a smile"])).sum().backward()

    trained = [p for p in tower.module.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def test_recomputed_activations_give_the_same_gradients(clip):
    torch.manual_seed(0)
    towers = build_towers(f"hf:{clip}", None, TowerOptions(pretrained="default"))
    pixels, gradients = torch.rand(2, 3, 32, 32), []
    for tower, given in ((towers.image, pixels), (towers.text, towers.text.tokenize(["joy", "a"]))):
        for recompute in (False, True):
            if recompute:
                checkpoint_gradients(tower)
            tower.module.train().zero_grad()
            tower.module(given).square().sum().backward()
            gradients.append([p.grad for p in tower.module.parameters() if p.grad is not None])
        for before, after in zip(*gradients[-2:], strict=True):
            torch.testing.assert_close(before, after)


@pytest.mark.parametrize("kind", ["small", "hf"])
def test_onnx_computes_the_features_for_any_batch_and_length(kind, photos, request, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    tower = "small" if kind == "small" else f"hf:{request.getfixturevalue('clip')}"
    trained(photos, tmp_path / "run", image_tower=tower, image_size=32, dim=12)
    encoder = Encoder.load(tmp_path / "run", device="cpu")

    export(tmp_path / "run", "onnx", tmp_path / "out")

    assert (tmp_path / "out" / "image" / "tokenizer.json").is_file() == (kind == "hf")
    image, text = (
        onnxruntime.InferenceSession(str(tmp_path / "out" / f"{side}.onnx"))
        for side in ("image", "text")
    )
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder.towers.text.tokenize(["a smile with joy", "tear", "a"])
    given = {"tokens": tokens} if isinstance(tokens, torch.Tensor) else tokens
    with torch.no_grad():
        expected = [encoder.model.encode_image(pixels), encoder.model.encode_text(tokens)]
    [found_image] = image.run(None, {"pixels": pixels.numpy()})
    [found_text] = text.run(None, {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(found_image), expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(found_text), expected[1], rtol=1e-3, atol=1e-4)


def test_an_image_size_that_a_model_does_not_take_is_refused(clip):
    with pytest.raises(TowerError, match="image_size must be 32"):
        build_towers(f"hf:{clip}", None, TowerOptions(image_size=64))


def test_a_tower_that_cannot_adapt_says_so():
    tower = ImageTower(module=nn.Flatten(), width=4, size=2)

    with pytest.raises(TowerError, match="gradient_checkpointing must be off"):
        checkpoint_gradients(tower)
    pytest.importorskip("peft")
    with pytest.raises(TowerError, match="linear layers to adapt"):
        add_lora(tower, 2)


def test_a_model_that_the_machine_does_not_have_is_an_error_in_a_few_lines(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(TowerError, match="that this machine has or can fetch") as raised:
        build_towers(f"hf:{tmp_path / 'nothing'}", None, TowerOptions())

    assert len(str(raised.value).splitlines()) < 5


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:resnet10t"])
def test_a_tower_of_timm_starts_from_a_file_of_weights(name, photos, tmp_path):
    pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name.partition(":")[2], num_classes=7)  # with a classifier
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)

    tower = build_towers(name, None, TowerOptions(pretrained=str(file))).image
    trained(photos, tmp_path / "run", image_tower=name, pretrained=str(file), image_size=32)
    file.unlink()

    weights = theirs.state_dict()
    for key, value in tower.module.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert tower.licence == ""
    card = export(tmp_path / "run", "safetensors", tmp_path / "out") / "README.md"
    assert f"image tower `{name}`: unknown: see the page of the model" in card.read_text()
    assert "text tower `small`: built into Diptych" in card.read_text()
    paths = sorted((photos / "images").iterdir())[:2]
    first, again = (Encoder.load(tmp_path / one, device="cpu") for one in ("run", "out"))
    assert torch.equal(first.encode_images(paths), again.encode_images(paths))


def test_both_towers_of_open_clip_start_from_a_file_and_search(photos, tmp_path):
    pytest.importorskip("torchvision")
    open_clip = pytest.importorskip("open_clip")
    theirs, _, transform = open_clip.create_model_and_transforms("RN50", force_image_size=64)
    file = tmp_path / "weights.pt"
    torch.save(theirs.state_dict(), file)
    settings = {"image_tower": "open_clip:RN50", "image_size": 64, "learning_rate": 0.0}
    paths, texts = sorted((photos / "images").iterdir())[:2], ["a smile", "joy"]

    trained(photos, tmp_path / "run", pretrained=str(file), lock_image=True, **settings)
    encoder = Encoder.load(tmp_path / "run", device="cpu")

    theirs.eval()
    with torch.no_grad():
        pixels = torch.stack([transform(read_image(path, 64)) for path in paths])
        images = theirs.encode_image(pixels, normalize=True)
        found = theirs.encode_text(open_clip.get_tokenizer("RN50")(texts), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(texts), found, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(encoder.encode_images(paths), images, rtol=0, atol=0.02)
    assert encoder.model.logit_scale.item() == pytest.approx(theirs.logit_scale.item())


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "open_clip:RN50"])
@pytest.mark.parametrize("content", ["another model", "no weights"])
def test_a_file_of_weights_of_another_model_is_refused(name, content, tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip(name.partition(":")[0])
    file = tmp_path / "weights.pth"
    torch.save({"layer.weight": torch.zeros(3)}, file)
    if content == "no weights":
        file.write_text("<html>")

    with pytest.raises(TowerError, match=r"the tower must be|must be a file of timm") as raised:
        build_towers(name, None, TowerOptions(pretrained=str(file)))

    assert len(str(raised.value).splitlines()) < 10


def test_weights_and_licence_of_a_folder_that_the_machine_has(clip, photos, tmp_path):
    (clip / "README.md").write_text("---\nlicense: mit\n---\n# A CLIP\n")

    trained(photos, tmp_path / "run", image_tower=f"hf:{clip}", pretrained="default")
    shutil.rmtree(clip)

    first = export(tmp_path / "run", "safetensors", tmp_path / "first")
    card = (export(first, "huggingface", tmp_path / "second") / "README.md").read_text()
    assert f"image tower `hf:{clip}`: mit" in card
    assert f"text tower `hf:{clip}`: mit" in card
    with pytest.raises(TowerError, match="pretrained must be default for hf:some"):
        build_towers("hf:some/model", None, TowerOptions(pretrained="laion2b"))
    with pytest.raises(TowerError, match="pretrained must be default or a file"):
        build_towers("timm:resnet18", None, TowerOptions(pretrained="laion2b"))
