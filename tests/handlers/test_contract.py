"""The contract of every exported handler; a new one needs an entry in EXAMPLES to pass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diptych import handlers
from diptych.engine import Change, Handler, SeededLoader, Trainer, certify
from diptych.engine.evaluator import EvaluatesModel
from diptych.engine.handler import contract_of
from diptych.handlers.evaluation.evaluation import AveragesWeights
from diptych.handlers.loss_guard.guard import SavesCheckpoints
from tests.handlers import guarded
from tests.handlers.observed_changes import ChangeObserver
from tests.handlers.runs import classifier


class Example(NamedTuple):
    """An exported handler, and runs in which it acts.

    Attributes:
        build: returns a new handler, which may write into a folder.
        refused: arguments that must be refused.
        acting: runs in which the handler makes, together, all the changes it can; each returns
            what was observed. Default: the run of the other tests.
    """

    build: Callable[[Path], Any]
    refused: tuple[dict[str, Any], ...] = ()
    acting: tuple[Callable[[Path], ChangeObserver], ...] = ()


def observe(
    *attached: Any, trainer: Trainer | None = None, loader: Any = None, **limits: int
) -> ChangeObserver:
    """Run handlers, and return what they were observed to change."""
    observer = ChangeObserver(make_trainer() if trainer is None else trainer)
    observer.attach(*attached)
    observer.run(make_loader() if loader is None else loader, **limits)
    return observer


def make_loader(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 4, 3, generator=generator)
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


class Mining(handlers.HardNegativeMining):
    """Attaches the evaluation whose features it mines."""

    def attach(self, trainer: Trainer) -> None:
        def sides(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            logits = model(batch["image"])
            return {"image_features": logits, "text_features": logits, "groups": batch["label"]}

        if self.evaluation not in {one.prefix for one in trainer.handlers_of(handlers.Evaluation)}:
            trainer.attach(handlers.Evaluation(make_loader(), task=sides, prefix=self.evaluation))
        super().attach(trainer)


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
    """Attaches the sink whose file it reads."""

    def attach(self, trainer: Trainer) -> None:
        handlers.JsonLines(self.directory).attach(trainer)
        super().attach(trainer)


class Unsent:
    """Replaces the client of a service: the values are kept instead of sent."""

    def _check_package(self) -> None:
        self.sent: list[Any] = []

    def _open(self, run: str) -> tuple[Any, str]:
        return self, run or "new"

    def _describe(self, *values: Any) -> None:
        self.sent.append(values)

    def _send(self, *values: Any) -> None:
        self.sent.append(values)

    def _close_run(self, *, failed: bool) -> None:
        self.sent.append((failed,))


def unsent(service: type) -> Any:
    return type(service.__name__, (Unsent, service), {})("pairs")


class Twins(nn.Module):
    """An online and a target part with statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = (
            nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)) for _ in range(2)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.online(image)


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The samples of `make_loader`, one by one."""

    def __init__(self) -> None:
        self.batches = make_loader()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index % 4] for key, value in self.batches[index // 4].items()}


def momentum_encoder_that_follows(_: Path) -> ChangeObserver:
    model = Twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = classifier(model, optimizer)
    return observe(handlers.MomentumEncoder(momentum=0.9), trainer=trainer, max_epochs=1)


def stages_that_change_everything(_: Path) -> ChangeObserver:
    first = handlers.Stage("all", epochs=2, lr=0.05, metric="train/loss", mode="max")
    last = handlers.Stage(
        "last",
        trains="3",
        epochs=1,
        lr=0.1,
        load="best",
        batch_size=2,
        settings={"loss.label_smoothing": 0.1},
    )
    return observe(handlers.StagePlan([first, last]), loader=SeededLoader(Samples(), 4))


def guard_of_a_bad_batch(
    folder: Path | None, optimizer: str = "adamw", **settings: Any
) -> ChangeObserver:
    guard = handlers.LossGuard(folder, window=3, **settings)
    trainer = guarded.make_trainer(optimizer)
    return observe(guard, trainer=trainer, loader=guarded.batches("nan"), max_epochs=1)


EXAMPLES = {
    "CheckpointManager": Example(
        lambda folder: handlers.CheckpointManager(folder / "checkpoints"),
        refused=({"directory": ".", "every": 0}, {"directory": ".", "keep": 0}),
    ),
    "ClearML": Example(lambda _: unsent(handlers.ClearML), refused=({},)),
    "Curriculum": Example(
        lambda _: handlers.Curriculum("loss.label_smoothing", end=0.3, over=5, shape="cosine"),
        refused=({"path": "loss.alpha"}, {"path": "loss.alpha", "end": 1, "over": -1}),
    ),
    "EarlyStopping": Example(
        lambda _: handlers.EarlyStopping(metric="train/loss", patience=99),
        refused=({"patience": 0}, {"mode": "up"}),
        acting=(
            lambda _: observe(
                handlers.EarlyStopping(metric="train/loss", patience=1, min_delta=99.0),
                max_epochs=9,
            ),
        ),
    ),
    "EmbeddingProjector": Example(
        lambda folder: handlers.EmbeddingProjector(
            make_samples(), board=handlers.TensorBoard(folder)
        ),
        refused=({}, {"samples": []}),
    ),
    "Evaluation": Example(
        lambda _: handlers.Evaluation(make_loader(seed=1), every=2, at_start=True),
        refused=({"loader": iter([])}, {"loader": [], "every": 0}, {"loader": [], "prefix": ""}),
    ),
    "FirstLayerFilters": Example(
        lambda folder: handlers.FirstLayerFilters(board=handlers.TensorBoard(folder)),
        refused=({"every": 0}, {"every": "step"}),
    ),
    "GradientClipping": Example(
        lambda _: handlers.GradientClipping(max_norm=0.1),
        refused=({}, {"max_norm": 0.0}, {"max_value": -1.0}),
    ),
    "GradientDiagnostics": Example(
        lambda _: handlers.GradientDiagnostics(every=2),
        refused=({"every": 0}, {"components": "image"}),
    ),
    "HardNegativeMining": Example(
        lambda _: Mining("mining", torch.eye(2), group="label"),
        refused=(
            {"evaluation": "mining"},
            {"evaluation": "mining", "candidates": torch.eye(1)},
            {"evaluation": "mining", "candidates": torch.eye(2), "k": 0},
        ),
    ),
    "Histograms": Example(
        lambda folder: handlers.Histograms(every=2, board=handlers.TensorBoard(folder)),
        refused=({"every": 0},),
    ),
    "HistoryPlots": Example(
        Reported,
        refused=({"directory": ".", "every": 0},),
    ),
    "InBatchAccuracy": Example(
        lambda _: handlers.InBatchAccuracy(features=("logits", "logits")),
        refused=({"every": 0}, {"features": ("logits",)}),
    ),
    "JsonLines": Example(handlers.JsonLines, refused=({},)),
    "LearningRate": Example(
        lambda _: handlers.LearningRate(warmup=3),
        refused=({"warmup": -1}, {"decay": "none"}, {"floor": 2.0}),
    ),
    "LossGuard": Example(
        lambda folder: handlers.LossGuard(folder / "caught", window=4),
        refused=({"policy": "ignore"}, {"budget": -1}, {"window": 0}),
        acting=(
            guard_of_a_bad_batch,
            lambda folder: guard_of_a_bad_batch(folder, policy="stop"),
            lambda _: guard_of_a_bad_batch(None, "fused adamw"),
        ),
    ),
    "MLflow": Example(lambda _: unsent(handlers.MLflow), refused=({},)),
    "ModalityBalancing": Example(
        lambda _: handlers.ModalityBalancing(components=("0", "3"), warmup=2),
        refused=({"components": ("image",)}, {"ratio": 0.0}, {"smoothing": 1.0}),
    ),
    "MomentumEncoder": Example(
        lambda _: handlers.MomentumEncoder(online="2.online", target="2.target"),
        refused=({"momentum": 1.0}, {"schedule": "linear"}, {"total": 0}),
        acting=(momentum_encoder_that_follows,),
    ),
    "OnlineLinearProbe": Example(
        lambda _: handlers.OnlineLinearProbe(classes=2, features="logits"),
        refused=({"classes": 1}, {"classes": 2, "lr": 0.0}),
    ),
    "Profile": Example(
        lambda folder: handlers.Profile(folder / "profile", skip=2, steps=2),
        refused=({"directory": ".", "skip": 0}, {"directory": ".", "steps": 0}),
    ),
    "ProgressBar": Example(
        lambda _: handlers.ProgressBar(),
        refused=({"refresh": -1.0}, {"interval": -1.0}),
    ),
    "ReduceOnPlateau": Example(
        lambda _: handlers.ReduceOnPlateau(metric="train/loss", patience=99),
        refused=({"factor": 1.0}, {"mode": "up"}, {"patience": -1}),
        acting=(
            lambda _: observe(
                handlers.ReduceOnPlateau(metric="train/loss", patience=0, threshold=9.0),
                max_epochs=3,
            ),
        ),
    ),
    "RepresentationHealth": Example(
        lambda _: handlers.RepresentationHealth(features=("logits",), every=2, warmup=0),
        refused=({"every": 0}, {"samples": 1}, {"patience": 0}, {"features": "logits"}),
    ),
    "RetrievalGallery": Example(
        lambda folder: handlers.RetrievalGallery(
            make_samples(), board=handlers.TensorBoard(folder), k=2
        ),
        refused=({}, {"samples": []}, {"samples": make_samples(), "k": 0}),
    ),
    "RunCard": Example(
        lambda folder: handlers.RunCard(directory=folder, best="train/loss", mode="min"),
        refused=({"mode": "up"},),
    ),
    "RunRecord": Example(handlers.RunRecord, refused=({},)),
    "StagePlan": Example(
        lambda _: handlers.StagePlan(
            [
                handlers.Stage("last", trains="3", epochs=1, lr=0.1),
                handlers.Stage("all", epochs=1, lr=0.01, metric="train/loss"),
            ]
        ),
        refused=({"stages": []},),
        acting=(stages_that_change_everything,),
    ),
    "Teacher": Example(
        lambda _: handlers.Teacher(make_trainer().model, names=("teacher_logits",)),
        refused=({}, {"model": nn.Linear(3, 2), "names": ("logits",)}),
    ),
    "TensorBoard": Example(handlers.TensorBoard, refused=({},)),
    "Throughput": Example(lambda _: handlers.Throughput()),
    "ToLogger": Example(
        lambda _: handlers.ToLogger(lambda values, step: None),
        refused=({}, {"write": "log"}),
    ),
    "WandB": Example(lambda _: unsent(handlers.WandB), refused=({},)),
    "WeightAverage": Example(
        lambda _: handlers.WeightAverage(),
        refused=({"decay": 1.0}, {"buffers": "alias"}),
        acting=(
            lambda _: observe(
                handlers.WeightAverage(),
                handlers.Evaluation(make_loader(seed=1), every=2, at_start=True),
                max_epochs=2,
            ),
        ),
    ),
}

EXPORTED = {
    name: member
    for name in handlers.__all__
    if inspect.isclass(member := getattr(handlers, name)) and hasattr(member, "attach")
}
OBSERVERS = sorted(name for name in EXAMPLES if not EXPORTED[name].changes)

every_handler = pytest.mark.parametrize("name", sorted(EXAMPLES))
every_observer = pytest.mark.parametrize("name", OBSERVERS)


def make_trainer(norm: type[nn.Module] = nn.BatchNorm1d) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].online, model[2].target = nn.Linear(2, 2), nn.Linear(2, 2)  # no part of the output
    model[2].pixels = nn.Conv2d(3, 4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return classifier(model, optimizer, seed=3, log_every=4)


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
    bases = {name for name, member in EXPORTED.items() if inspect.isabstract(member)}
    assert set(EXPORTED) - metrics - bases == set(EXAMPLES)


@every_handler
def test_a_handler_attaches_and_lets_the_run_end(name, tmp_path):
    handler = EXAMPLES[name].build(tmp_path)
    trainer = trained(handler)
    assert trainer.handlers[-1] is handler  # a sink that it attaches itself comes before it
    assert trainer.state.iteration == 12


@every_handler
def test_the_declared_changes_are_those_observed_while_it_acts(name, tmp_path):
    example = EXAMPLES[name]
    runs = example.acting or (lambda folder: observe(example.build(folder), max_epochs=2),)
    observed: dict[Change, str] = {}
    for index, run in enumerate(runs):
        observed |= run(tmp_path / str(index)).observed
    declared = contract_of(example.build(tmp_path / "declared")).changes
    assert issubclass(EXPORTED[name], Handler)
    assert observed.keys() == declared, (
        f"{name} declares {words(declared)}, and was observed to change {words(observed)}: "
        f"{observed}"
    )


def words(changes: Iterable[Change]) -> str:
    return ", ".join(sorted(change.name for change in changes)) or "nothing"


@pytest.mark.parametrize(
    ("protocol", "name", "members"),
    [
        (EvaluatesModel, "Evaluation", ("prefix", "evaluator")),
        (AveragesWeights, "WeightAverage", ("averaged",)),
        (SavesCheckpoints, "CheckpointManager", ("get_latest_checkpoint",)),
    ],
)
def test_a_protocol_finds_its_handler_in_every_python(protocol, name, members, tmp_path):
    handler = EXAMPLES[name].build(tmp_path)
    trainer = make_trainer().attach(handler)
    assert trainer.handlers_of(protocol) == [handler]
    for member in members:  # from Python 3.12 on, isinstance looks members up like this
        inspect.getattr_static(handler, member)
        assert hasattr(handler, member)


@every_observer
def test_a_handler_that_only_reports_changes_no_number(name, tmp_path):
    assert_same_run(trained(EXAMPLES[name].build(tmp_path)), trained())


@every_handler
def test_a_handler_that_does_not_act_changes_no_number(name, tmp_path):
    observer = observe(EXAMPLES[name].build(tmp_path), max_epochs=2)
    if not observer.observed:
        assert_same_run(observer.trainer, trained())


def test_all_handlers_that_only_report_change_no_number_together(tmp_path):
    assert_same_run(trained(*(EXAMPLES[name].build(tmp_path) for name in OBSERVERS)), trained())


@every_handler
def test_certify_passes_with_the_handler_attached(name, tmp_path):
    trainer = make_trainer(nn.LayerNorm).attach(EXAMPLES[name].build(tmp_path))
    trainer.run(make_loader(), max_epochs=1)
    report = certify(trainer, make_loader(seed=5)[0], ranks=False)
    assert report.passed, f"with {name}:\n{report}"
    boards = trainer.handlers_of(handlers.TensorBoard)
    assert not any(board._writer for board in boards), "a file that the certificate opened is open"


@every_handler
def test_a_key_is_the_class_and_the_role(name, tmp_path):
    handler = EXAMPLES[name].build(tmp_path)
    kind = type(handler).__name__
    assert handler.key == (f"{kind}[{handler.role}]" if handler.role else kind)
    assert str(tmp_path) not in handler.key


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
def test_a_misspelt_or_invalid_argument_is_refused(name):
    cls = EXPORTED[name]
    with pytest.raises(TypeError, match="misspelt"):
        cls(misspelt=1)
    for arguments in EXAMPLES[name].refused:
        with pytest.raises((TypeError, ValueError)):
            cls(**arguments)


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_the_docstring_states_event_and_cost(name):
    doc = inspect.getdoc(EXPORTED[name]) or ""
    assert re.search(r"^Event: \S", doc, re.MULTILINE), "state the events on which it acts"
    assert re.search(r"^Cost: \S", doc, re.MULTILINE), "state its cost"
