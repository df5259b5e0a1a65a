"""Mistakes in batches, samples and labels, each with words of its message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diptych.engine import tasks
from diptych.losses import (
    CLIPLoss,
    CrossEntropyLoss,
    NTXentLoss,
)
from tests.mistakes.makers import (
    BATCH,
    CAPTIONS,
    IMAGES,
    TOKENS,
    LeftBehind,
    Normalised,
    Pictures,
    TwoTowers,
    classify,
    load,
    run,
    see,
)

OF_BATCHES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    # -- batches that the model cannot take
    "captions as strings": (
        lambda _: see(text=CAPTIONS),
        ["batch['text'] must be a tensor for text (EmbeddingBag)", "4 strings", "Tokenize"],
    ),
    "captions as strings in a tuple": (
        lambda _: run((IMAGES, CAPTIONS), Pictures()),
        ["batch[1] must be a tensor", "Tokenize captions in the data set"],
    ),
    "a tokenizer's mapping": (
        lambda _: see(text={"input_ids": TOKENS}),
        ["batch['text'] must be a tensor", "'input_ids': int64 [4, 7]", "task of your own"],
    ),
    "images of 0 to 255": (
        lambda _: see(image=(IMAGES * 255).byte()),
        ["batch['image'] must be torch.float32", "uint8 [4, 3, 6, 6]", "image.float() / 255"],
    ),
    "images with the channels last": (
        lambda _: see(image=IMAGES.movedim(1, -1)),
        ["batch['image'] must be [batch, 3 channels", "[4, 6, 6, 3]", "images.movedim(-1, 1)"],
    ),
    "grey images": (
        lambda _: see(image=IMAGES[:, :1]),
        ["batch['image'] must be [batch, 3 channels", "[4, 1, 6, 6]", "Convert the images"],
    ),
    "images in float64": (
        lambda _: see(image=IMAGES.double()),
        ["batch['image'] must be torch.float32", "float64", ".float()"],
    ),
    "tokens as numbers with a fraction": (
        lambda _: see(text=TOKENS.float()),
        ["batch['text'] must be integers", "float32 [4, 7]", "Pass token ids"],
    ),
    "tokens of another vocabulary": (
        lambda _: see(text=TOKENS + 50),
        ["batch['text'] must lie in [0, 50)", "tokenizer must have the same vocabulary"],
    ),
    "features of another width": (
        lambda _: run({**BATCH, "image": torch.randn(4, 7)}),
        ["batch['image'] must have 3 numbers in its last dimension", "[4, 7]"],
    ),
    "pictures and captions of different number": (
        lambda _: see(image=IMAGES[:3]),
        ["must have equal shapes, one row for each pair", "(3, 4) and (4, 4)", "as many samples"],
    ),
    "the same, in micro-batches": (
        lambda _: run({"image": IMAGES[:3], "text": TOKENS}, Pictures(), microbatch_size=2),
        ["first dimension", "'text_features': (4, 4)", "the same number of samples"],
    ),
    "towers of different width": (
        lambda _: CLIPLoss()(torch.randn(4, 3), torch.randn(4, 5)),
        ["must have equal shapes", "(4, 3) and (4, 5)", "Project both sides"],
    ),
    "a part that is None": (
        lambda _: run({**BATCH, "text": None}),
        ["batch must have 'text', got None", "Leave out samples without 'text'"],
    ),
    "samples that are not collated": (
        lambda _: run([{"image": torch.randn(3)}, {"image": torch.randn(3)}]),
        ["batch[0] must be a tensor", "A list of samples must be collated"],
    ),
    "two views in one list": (
        lambda _: run([[IMAGES, IMAGES], torch.arange(4)], loss=NTXentLoss(), task=tasks.two_views),
        ["first must be a tensor with a view of each sample", "collate {'first': ..., 'second'"],
    ),
    "a tensor outside of the model's buffers": (
        lambda _: run(BATCH, LeftBehind()),
        ["model must be on one device", "scale on meta", "self.register_buffer('scale', ...)"],
    ),
    "a model in half precision": (
        lambda _: run(BATCH, TwoTowers().bfloat16()),
        ["batch['image'] must be torch.bfloat16", "Keep the model in float32", "precision='bf16'"],
    ),
    "one sample for a batch norm": (
        lambda _: run(BATCH, Normalised(), microbatch_size=1),
        ["2 samples or more for norm (BatchNorm1d)", "microbatch_size"],
    ),
    "a model with one input": (
        lambda _: run(BATCH, nn.Linear(3, 4)),
        ["model must take the 2 inputs that the task passes", "Linear.forward", "Choose the task"],
    ),
    "labels as captions": (
        lambda _: run((IMAGES, torch.arange(4)), Pictures()),
        ["batch[1] must be token ids [batch, tokens]", "int64 [4]", "tasks.classification"],
    ),
    "captions as images": (
        lambda _: run((TOKENS, IMAGES), Pictures()),
        ["batch[0] must be [batch, 3 channels", "int64 [4, 7]", "with_keys(image=...)"],
    ),
    "images of several sizes": (
        lambda _: load(lambda i: {"image": torch.zeros(3, 8 + i, 8)}),
        ["samples must have equal shapes", "in 'image'", "Resize images", "collate="],
    ),
    "texts of several lengths": (
        lambda _: load(lambda i: (torch.zeros(3), torch.arange(3 + i))),
        ["samples must have equal shapes", "in part 1", "pad texts"],
    ),
    "samples of no type that collates": (
        lambda _: load(lambda _: {"image": object()}),
        ["samples must hold tensors, arrays", "got a object in 'image'", "Convert it"],
    ),
    "a sample that is None": (
        lambda _: load(lambda i: None if i == 2 else {"image": torch.zeros(3)}),
        ["a sample must not be None", "Leave it out"],
    ),
    "samples with different keys": (
        lambda _: load(lambda i: {"image": i} if i == 2 else {"image": i, "text": i}),
        ["samples must have the same keys", "'image' and 'image', 'text'", "Complete them"],
    ),
    # -- labels
    "labels counted from 1": (
        lambda _: classify(torch.tensor([1, 2, 3, 3])),
        ["labels must lie in [0, 3)", "got 1 to 3", "labels - 1"],
    ),
    "more labels than classes": (
        lambda _: classify(torch.tensor([0, 1, 2, 7]), nn.CrossEntropyLoss()),
        ["labels must lie in [0, 3)", "got 0 to 7", "last layer as many outputs"],
    ),
    "a negative label": (
        lambda _: classify(torch.tensor([0, 1, 2, -2])),
        ["labels must lie in [0, 3)", "got -2 to 2", "without a label has -100"],
    ),
    "labels out of range in a loss alone": (
        lambda _: CrossEntropyLoss()(torch.randn(2, 3), torch.tensor([0, 3])),
        ["labels must lie in [0, 3)", "or be -100, got 0 to 3"],
    ),
    "labels with a fraction": (
        lambda _: classify(torch.tensor([0.0, 1.0, 2.0, 0.0])),
        ["labels must be integers", "torch.float32", ".long()"],
    ),
    "one-hot labels": (
        lambda _: classify(torch.eye(3)[[0, 1, 2, 0]]),
        ["labels must be one class number a sample, (4,)", "(4, 3)", "labels.argmax(-1)"],
    ),
    "labels in a column": (
        lambda _: classify(torch.zeros(4, 1, dtype=torch.int64)),
        ["labels must have the logits' shape without the classes, (4,)", "labels.squeeze(-1)"],
    ),
    "classes before the pixels": (
        lambda _: CrossEntropyLoss()(
            torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
        ),
        ["labels must have the logits' shape without the classes", "Put the classes last"],
    ),
    "a contrastive task with a loss for labels": (
        lambda _: run(BATCH, loss=CrossEntropyLoss()),
        ["labels must be one class number a sample", "contrastive loss, such as CLIPLoss"],
    ),
    "a task with labels for a contrastive loss": (
        lambda _: classify(torch.tensor([0, 1, 2, 0]), CLIPLoss()),
        ["second must be floating point, got torch.int64", "CrossEntropyLoss"],
    ),
}
