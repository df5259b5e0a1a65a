"""Models of other libraries, small and random, as they are: their features, their own scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, certify, tasks
from diptych.handlers import CheckpointManager, LearningRate, parameter_groups
from diptych.losses import CLIPLoss, CrossEntropyLoss, NTXentLoss, SigLIPLoss, share_logit_scale

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} cannot be imported here", exc_type=ImportError)


def clip(*, seed: int = 0) -> nn.Module:
    transformers = library("transformers")
    torch.manual_seed(seed)
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return transformers.CLIPModel(config)


def siglip(*, seed: int = 0) -> nn.Module:
    transformers = library("transformers")
    torch.manual_seed(seed)
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return transformers.SiglipModel(config)


def make_pairs(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    tokens = torch.randint(3, 50, (count, 12), generator=generator)
    tokens[:, 0], tokens[:, -1] = 1, 2
    return [
        {"pixel_values": p, "input_ids": t, "attention_mask": torch.ones_like(t)}
        for p, t in zip(pixels, tokens, strict=True)
    ]


def whole_batch() -> dict[str, Tensor]:
    pairs = make_pairs()
    return {key: torch.stack([pair[key] for pair in pairs]) for key in pairs[0]}


MODELS = {"clip": (clip, CLIPLoss), "siglip": (siglip, SigLIPLoss)}
both = pytest.mark.parametrize("name", MODELS)


def build(name: str, **settings: Any) -> tuple[Trainer, SeededLoader]:
    make, loss_class = MODELS[name]
    model = make()
    loss = share_logit_scale(loss_class(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model, loss, optimizer, task=tasks.huggingface, device="cpu", seed=0, **settings
    )
    return trainer.attach(LearningRate(warmup=1, total=99)), SeededLoader(make_pairs(), 6, seed=0)


@both
def test_the_loss_and_its_gradients_are_those_of_the_models_own(name):
    make, loss_class = MODELS[name]
    model = make().eval()
    loss = share_logit_scale(loss_class(), model)
    batch = whole_batch()
    own = model(**batch, return_loss=True).loss
    own.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    value = loss(*tasks.huggingface(model, batch).values())
    value.backward()
    torch.testing.assert_close(value, own, rtol=1e-5, atol=1e-6)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert "logit_scale" in found
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)


@both
def test_training_moves_the_models_scale_and_no_other(name, tmp_path):
    trainer, loader = build(name)
    before = trainer.model.logit_scale.detach().clone()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.run(loader, max_epochs=3)
    assert not torch.equal(trainer.model.logit_scale, before)
    learned = {id(p) for p in trainer.loss.parameters()}
    assert learned <= {id(p) for p in trainer.model.parameters()}
    saved = torch.load(tmp_path / "checkpoint_epoch_3.pt", weights_only=True)
    assert torch.equal(saved["model"]["logit_scale"], trainer.model.logit_scale)
    assert torch.equal(saved["loss"]["temperature.logit_scale"], trainer.model.logit_scale)
    model = MODELS[name][0](seed=5)
    model.load_state_dict(saved["model"])  # the library's own model takes it back


@both
def test_an_interruption_changes_nothing(name):
    report = certify.interruption(lambda: build(name), steps=6, at=3)
    assert report.passed, str(report)


@both
def test_pieces_of_a_batch_give_the_same_gradients(name):
    found: list[dict[str, Tensor]] = []
    for size in (None, 2):
        trainer, loader = build(name, microbatch_size=size)

        def keep(trainer: Trainer) -> None:
            named = trainer.model.named_parameters()
            found.append({key: p.grad.clone() for key, p in named if p.grad is not None})

        trainer.add_event_handler("GRADIENTS_READY", keep)
        trainer.run(loader, max_iters=1)
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-3, atol=1e-5)


def open_clip_model(**options: Any) -> nn.Module:
    open_clip = library("open_clip")
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
        text_cfg={"context_length": 12, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1},
        **options,
    )


OPEN_CLIP = tasks.image_text.with_keys(image="pixel_values", text="input_ids")
OPEN_CLIP_MODELS = {
    "clip": (CLIPLoss, "ClipLoss", {}),
    "dictionary": (CLIPLoss, "ClipLoss", {"output_dict": True}),
    "scale of shape [1]": (CLIPLoss, "ClipLoss", {"nonscalar_logit_scale": True}),
    "siglip": (SigLIPLoss, "SigLipLoss", {"init_logit_scale": 2.3, "init_logit_bias": -10.0}),
}
open_clips = pytest.mark.parametrize("name", OPEN_CLIP_MODELS)


@open_clips
def test_the_loss_and_its_gradients_are_those_of_open_clip(name):
    losses = library("open_clip.loss")
    loss_class, own_name, options = OPEN_CLIP_MODELS[name]
    model, batch = open_clip_model(**options), whole_batch()
    output = model(batch["pixel_values"], batch["input_ids"])
    own = getattr(losses, own_name)()(*(output.values() if "output_dict" in options else output))
    own.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    value = share_logit_scale(loss_class(), model)(*OPEN_CLIP(model, batch).values())
    value.backward()
    torch.testing.assert_close(value, own.reshape(()), rtol=1e-5, atol=1e-6)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert "logit_scale" in found
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)


@open_clips
def test_open_clip_trains_with_its_own_scale(name):
    loss_class, _, options = OPEN_CLIP_MODELS[name]
    model = open_clip_model(**options)
    loss = share_logit_scale(loss_class(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(model, loss, optimizer, task=OPEN_CLIP, device="cpu", seed=0)
    before = model.logit_scale.detach().clone()
    trainer.run(SeededLoader(make_pairs(), 6, seed=0), max_epochs=2)
    assert not torch.equal(model.logit_scale, before)
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in model.parameters()}


def test_timm_models_are_classifiers():
    timm = library("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    batch = {"image": torch.randn(6, 3, 32, 32), "label": torch.arange(6) % 3}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(
        model, CrossEntropyLoss(), optimizer, task=tasks.classification, device="cpu", seed=0
    )
    losses = trainer.train([batch], num_epochs=4)
    assert losses[-1] < losses[0]


def test_timm_models_are_encoders_of_two_views():
    timm = library("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    batch = {"first": torch.randn(6, 3, 32, 32), "second": torch.randn(6, 3, 32, 32)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, NTXentLoss(), optimizer, task=tasks.two_views, device="cpu", seed=0)
    losses = trainer.train([batch], num_epochs=4)
    assert losses[-1] < losses[0]


def test_layer_wise_rates_are_those_of_timm():
    library("timm")
    optim = library("timm.optim")
    models = library("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=3
    )
    named = dict(model.named_parameters())
    spared = sorted(model.no_weight_decay() & named.keys())
    theirs = optim.param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=spared
    )
    expected = {id(p): (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    ours = parameter_groups(
        model, weight_decay=0.05, layer_decay={"blocks": 0.5}, lr=1.0, no_decay=spared
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in ours for p in g["params"]}
    assert found.keys() == expected.keys()
    for name, parameter in named.items():
        if name.startswith("norm."):  # timm counts it to the last block, the paper to the head
            assert found[id(parameter)] == (1.0, 0.0)
        else:
            assert found[id(parameter)] == pytest.approx(expected[id(parameter)]), name
