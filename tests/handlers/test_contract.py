"""What every exported handler promises; a new one needs an entry in EXAMPLES to pass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diptych import handlers
from diptych.engine import Trainer, tasks


class Example(NamedTuple):
    """A handler to try.

    Attributes:
        build: returns a new one, which may write into a folder.
        observes: whether it only looks, so that the run must not notice it.
        refused: arguments that must be refused, each in place of a good one.
    """

    build: Callable[[Path], Any]
    observes: bool
    refused: tuple[dict[str, Any], ...] = ()


def make_loader(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 4, 3, generator=generator)
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


def make_samples() -> handlers.PairSamples:
    def both(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = model(batch["image"])
        return {"image_features": features, "text_features": features}

    images = torch.linspace(0, 1, 24 * 3).view(24, 3, 1, 1)
    captions = [f"caption {index}" for index in range(24)]
    return handlers.PairSamples(
        batches=make_loader(seed=2), images=images, captions=captions, task=both
    )


class Reported(handlers.HistoryPlots):
    """Brings what it reads."""

    def attach(self, trainer: Trainer) -> None:
        handlers.JsonLines(self.directory).attach(trainer)
        super().attach(trainer)


class Unsent:
    """Stands for the service: what a handler would send goes nowhere."""

    def _check_package(self) -> None:
        self.sent: list[Any] = []

    def _open(self, run: str) -> tuple[Any, str]:
        return self, run or "new"

    def _describe(self, *told: Any) -> None:
        self.sent.append(told)

    def _write(self, *told: Any) -> None:
        self.sent.append(told)

    def _close(self, *, failed: bool) -> None:
        self.sent.append((failed,))


def unsent(service: type) -> Any:
    return type(service.__name__, (Unsent, service), {})("pairs")


EXAMPLES = {
    "CheckpointManager": Example(
        lambda folder: handlers.CheckpointManager(folder / "checkpoints"),
        observes=True,
        refused=({"directory": ".", "every": 0}, {"directory": ".", "keep": 0}),
    ),
    "ClearML": Example(lambda _: unsent(handlers.ClearML), observes=True, refused=({},)),
    "Curriculum": Example(
        lambda _: handlers.Curriculum("loss.label_smoothing", end=0.3, over=5, shape="cosine"),
        observes=False,
        refused=({"path": "loss.alpha"}, {"path": "loss.alpha", "end": 1, "over": -1}),
    ),
    "EarlyStopping": Example(
        lambda _: handlers.EarlyStopping(metric="train/loss", patience=99),
        observes=True,
        refused=({"patience": 0}, {"mode": "up"}),
    ),
    "EmbeddingProjector": Example(
        lambda folder: handlers.EmbeddingProjector(
            make_samples(), board=handlers.TensorBoard(folder)
        ),
        observes=True,
        refused=({}, {"samples": []}),
    ),
    "Evaluation": Example(
        lambda _: handlers.Evaluation(make_loader(seed=1), every=2, at_start=True),
        observes=True,
        refused=({"loader": iter([])}, {"loader": [], "every": 0}, {"loader": [], "prefix": ""}),
    ),
    "FirstLayerFilters": Example(
        lambda folder: handlers.FirstLayerFilters(board=handlers.TensorBoard(folder)),
        observes=True,
        refused=({"every": 0}, {"every": "step"}),
    ),
    "GradientClipping": Example(
        lambda _: handlers.GradientClipping(max_norm=0.1),
        observes=False,
        refused=({}, {"max_norm": 0.0}, {"max_value": -1.0}),
    ),
    "GradientDiagnostics": Example(
        lambda _: handlers.GradientDiagnostics(every=2),
        observes=True,
        refused=({"every": 0}, {"components": "image"}),
    ),
    "Histograms": Example(
        lambda folder: handlers.Histograms(every=2, board=handlers.TensorBoard(folder)),
        observes=True,
        refused=({"every": 0},),
    ),
    "HistoryPlots": Example(
        Reported,
        observes=True,
        refused=({"directory": ".", "every": 0},),
    ),
    "InBatchAccuracy": Example(
        lambda _: handlers.InBatchAccuracy(features=("logits", "logits")),
        observes=True,
        refused=({"every": 0}, {"features": ("logits",)}),
    ),
    "JsonLines": Example(handlers.JsonLines, observes=True, refused=({},)),
    "LearningRate": Example(
        lambda _: handlers.LearningRate(warmup=3),
        observes=False,
        refused=({"warmup": -1}, {"decay": "none"}, {"floor": 2.0}),
    ),
    # Its job is to intervene, but a healthy run must not notice it.
    "LossGuard": Example(
        lambda folder: handlers.LossGuard(folder / "caught", window=4),
        observes=True,
        refused=({"policy": "ignore"}, {"budget": -1}, {"window": 0}),
    ),
    "MLflow": Example(lambda _: unsent(handlers.MLflow), observes=True, refused=({},)),
    "ModalityBalancing": Example(
        lambda _: handlers.ModalityBalancing(components=("0", "3"), warmup=2),
        observes=False,
        refused=({"components": ("image",)}, {"ratio": 0.0}, {"smoothing": 1.0}),
    ),
    "MomentumEncoder": Example(
        lambda _: handlers.MomentumEncoder(online="2.online", target="2.target"),
        observes=False,
        refused=({"momentum": 1.0}, {"schedule": "linear"}, {"total": 0}),
    ),
    "OnlineLinearProbe": Example(
        lambda _: handlers.OnlineLinearProbe(classes=2, features="logits"),
        observes=True,
        refused=({"classes": 1}, {"classes": 2, "lr": 0.0}),
    ),
    "Profile": Example(
        lambda folder: handlers.Profile(folder / "profile", skip=2, steps=2),
        observes=True,
        refused=({"directory": ".", "skip": 0}, {"directory": ".", "steps": 0}),
    ),
    "ProgressBar": Example(
        lambda _: handlers.ProgressBar(),
        observes=True,
        refused=({"refresh": -1.0}, {"interval": -1.0}),
    ),
    "RepresentationHealth": Example(
        lambda _: handlers.RepresentationHealth(features=("logits",), every=2, warmup=0),
        observes=True,
        refused=({"every": 0}, {"samples": 1}, {"patience": 0}, {"features": "logits"}),
    ),
    "RetrievalGallery": Example(
        lambda folder: handlers.RetrievalGallery(
            make_samples(), board=handlers.TensorBoard(folder), k=2
        ),
        observes=True,
        refused=({}, {"samples": []}, {"samples": make_samples(), "k": 0}),
    ),
    "RunCard": Example(
        lambda folder: handlers.RunCard(directory=folder, best="train/loss", mode="min"),
        observes=True,
        refused=({"mode": "up"},),
    ),
    "RunRecord": Example(handlers.RunRecord, observes=True, refused=({},)),
    "StagePlan": Example(
        lambda _: handlers.StagePlan(
            [
                handlers.Stage("last", trains="3", epochs=1, lr=0.1),
                handlers.Stage("all", epochs=1, lr=0.01, metric="train/loss"),
            ]
        ),
        observes=False,
        refused=({"stages": []},),
    ),
    "TensorBoard": Example(handlers.TensorBoard, observes=True, refused=({},)),
    "Throughput": Example(lambda _: handlers.Throughput(), observes=True),
    "ToLogger": Example(
        lambda _: handlers.ToLogger(lambda values, step: None),
        observes=True,
        refused=({}, {"write": "log"}),
    ),
    "WandB": Example(lambda _: unsent(handlers.WandB), observes=True, refused=({},)),
    "WeightAverage": Example(
        lambda _: handlers.WeightAverage(),
        observes=True,
        refused=({"decay": 1.0}, {"buffers": "alias"}),
    ),
}

EXPORTED = {
    name: member
    for name in handlers.__all__
    if inspect.isclass(member := getattr(handlers, name)) and hasattr(member, "attach")
}
OBSERVERS = sorted(name for name, example in EXAMPLES.items() if example.observes)

every_handler = pytest.mark.parametrize("name", sorted(EXAMPLES))
every_observer = pytest.mark.parametrize("name", OBSERVERS)


def make_trainer() -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].online, model[2].target = nn.Linear(2, 2), nn.Linear(2, 2)  # no part of the output
    model[2].pixels = nn.Conv2d(3, 4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        task=tasks.classification,
        device="cpu",
        seed=3,
        log_every=4,
    )


def trained(*attached: Any) -> Trainer:
    trainer = make_trainer().attach(*attached)
    trainer.run(make_loader(), max_epochs=2)
    return trainer


def assert_same_run(trainer: Trainer, bare: Trainer) -> None:
    for name, value in bare.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    assert trainer.metrics.get_history("train/loss") == bare.metrics.get_history("train/loss")


def assert_same_state(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_state(one, other)
    else:
        assert found == expected


def test_every_exported_handler_has_an_example():
    metrics = {name for name, member in EXPORTED.items() if hasattr(member, "compute")}
    assert set(EXPORTED) - metrics == set(EXAMPLES)


@every_handler
def test_a_handler_attaches_and_lets_the_run_end(name, tmp_path):
    handler = EXAMPLES[name].build(tmp_path)
    trainer = trained(handler)
    assert trainer.handlers[-1] is handler  # after a board of its own, where it has one
    assert trainer.state.iteration == 12


@every_observer
def test_an_observer_changes_no_number(name, tmp_path):
    assert_same_run(trained(EXAMPLES[name].build(tmp_path)), trained())


def test_all_observers_together_change_no_number(tmp_path):
    assert_same_run(trained(*(EXAMPLES[name].build(tmp_path) for name in OBSERVERS)), trained())


@every_handler
def test_a_state_survives_a_file_that_is_read_without_pickle(name, tmp_path):
    handler = EXAMPLES[name].build(tmp_path)
    assert hasattr(handler, "state_dict") == hasattr(handler, "load_state_dict")
    if not hasattr(handler, "state_dict"):
        return
    trained(handler)
    torch.save(handler.state_dict(), tmp_path / "state.pt")
    again = EXAMPLES[name].build(tmp_path)
    make_trainer().attach(again)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_state(again.state_dict(), handler.state_dict())


@every_handler
def test_a_misspelt_or_unfit_argument_is_refused(name):
    cls = EXPORTED[name]
    with pytest.raises(TypeError, match="misspelt"):
        cls(misspelt=1)
    for arguments in EXAMPLES[name].refused:
        with pytest.raises((TypeError, ValueError)):
            cls(**arguments)


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_the_docstring_states_event_and_cost(name):
    doc = inspect.getdoc(EXPORTED[name]) or ""
    assert re.search(r"^Event: \S", doc, re.MULTILINE), "say on which events it acts"
    assert re.search(r"^Cost: \S", doc, re.MULTILINE), "say what it costs"
