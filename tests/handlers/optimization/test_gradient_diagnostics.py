"""GradientDiagnostics against norms computed by plain loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import StepEvents, Trainer, tasks
from diptych.handlers.optimization.gradient_clipping import GradientClipping
from diptych.handlers.optimization.gradient_diagnostics import GradientDiagnostics
from tests.handlers.runs import kept_records


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.scale * logits, labels)


class Parts(nn.Module):
    """Two parts, one of which may be switched off, or broken, in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image))


def make_loader(batches: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = 5 * torch.randn(batches, 4, 3, generator=generator)
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


def make_trainer(device: str = "cpu", **settings: object) -> Trainer:
    torch.manual_seed(1)
    model, loss = Parts(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.01)
    return Trainer(
        model,
        loss,
        optimizer,
        task=tasks.classification,
        device=device,
        **{"log_every": 1, **settings},
    )


def norm(*tensors: Tensor) -> float:
    """The L2 norm of all entries, by a loop."""
    return math.sqrt(sum(float(x) ** 2 for t in tensors for x in t.detach().double().flatten()))


def watched(*handlers: object, **settings: object) -> tuple[Trainer, list[dict], list[dict]]:
    """Return the trainer, its records, and each update's gradients and weights by name."""
    trainer = make_trainer(**settings)
    updates: list[dict[str, Tensor]] = []

    def named() -> dict[str, nn.Parameter]:
        loss = {f"loss.{name}": p for name, p in trainer.loss.named_parameters()}
        return {**dict(trainer.model.named_parameters()), **loss}

    trainer.add_event_handler(
        StepEvents.GRADIENTS_READY,
        lambda: updates.append(
            {
                "gradients": {n: p.grad.clone() for n, p in named().items() if p.grad is not None},
                "before": {n: p.detach().clone() for n, p in named().items()},
            }
        ),
    )
    trainer.attach(*handlers)
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEPPED,
        lambda: updates[-1].update(after={n: p.detach().clone() for n, p in named().items()}),
    )
    records = kept_records(trainer)
    trainer.run(make_loader(), max_epochs=1)
    return trainer, [record.values for record in records], updates


def test_the_total_norm_and_those_of_components_match_the_gradients():
    _, records, updates = watched(GradientDiagnostics(every=1))
    for record, update in zip(records, updates, strict=True):
        gradients = update["gradients"]
        parts = {
            part: norm(*(g for name, g in gradients.items() if name.startswith(part)))
            for part in ("body", "head", "spare", "loss")
        }
        assert record["gradients/norm"] == pytest.approx(norm(*gradients.values()), rel=1e-6)
        for part, expected in parts.items():
            assert record[f"gradients/norm/{part}"] == pytest.approx(expected, rel=1e-6)
        assert record["gradients/ratio/body_to_head"] == pytest.approx(
            parts["body"] / parts["head"], rel=1e-6
        )
        assert "gradients/ratio/body_to_loss" not in record
        each = [norm(g) for g in gradients.values()]
        assert record["gradients/largest"] == pytest.approx(max(each), rel=1e-6)
        assert record["gradients/smallest"] == pytest.approx(min(each), rel=1e-6)


def test_updates_are_measured_against_the_weights_before_them():
    _, records, updates = watched(GradientDiagnostics(every=1))
    for record, update in zip(records, updates, strict=True):
        before, after = update["before"], update["after"]
        for tag, start in (("updates/ratio", ""), ("updates/ratio/head", "head")):
            names = [name for name in before if name.startswith(start)]
            moved = norm(*(after[n].double() - before[n].double() for n in names))
            expected = moved / norm(*(before[n] for n in names))
            assert record[tag] == pytest.approx(expected, rel=1e-4)
        assert record["updates/ratio/spare"] == 0


def test_parameters_with_missing_zero_or_nonfinite_gradients_are_counted():
    trainer = make_trainer()

    @trainer.on(StepEvents.GRADIENTS_READY)
    def plant() -> None:
        trainer.model.body.weight.grad[0, 0] = math.nan
        trainer.model.head.bias.grad.zero_()
        trainer.loss.scale.grad.fill_(math.inf)

    trainer.attach(GradientDiagnostics(every=1))
    records = kept_records(trainer)
    trainer.run(make_loader(1), max_epochs=1)
    values = records[0].values
    assert values["gradients/missing"] == 2  # the spare layer's weight and bias
    assert values["gradients/zero"] == 1
    assert values["gradients/nonfinite"] == 2
    assert math.isnan(values["gradients/norm/body"])
    assert math.isfinite(values["gradients/norm/head"])


@pytest.mark.parametrize("first", ["clipping", "diagnostics"])
def test_with_clipping_the_norm_before_clipping_is_published_once(first):
    handlers = [GradientClipping(max_norm=0.01), GradientDiagnostics(every=1)]
    _, records, updates = watched(*(handlers if first == "clipping" else handlers[::-1]))
    for record, update in zip(records, updates, strict=True):
        gradients = update["gradients"]
        assert record["gradients/norm"] == pytest.approx(norm(*gradients.values()), rel=1e-6)
        head = norm(*(g for name, g in gradients.items() if name.startswith("head")))
        assert record["gradients/norm/head"] == pytest.approx(head, rel=1e-6)


def test_diagnostics_do_not_change_what_clipping_does():
    alone, _, _ = watched(GradientClipping(max_norm=0.01))
    both, _, _ = watched(GradientDiagnostics(every=1), GradientClipping(max_norm=0.01))

    def changed_between(trainer: Trainer) -> None:
        for parameter in trainer.model.head.parameters():
            parameter.grad.data.mul_(100)  # leaves no trace in the tensor's version

    for a, b in zip(alone.model.parameters(), both.model.parameters(), strict=True):
        assert torch.equal(a, b)
    runs = []
    for handlers in ([], [GradientDiagnostics(every=1)]):
        trainer = make_trainer().attach(*handlers)
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, changed_between)
        trainer.attach(GradientClipping(max_norm=0.01))
        trainer.run(make_loader(), max_epochs=1)
        runs.append(trainer)
    for a, b in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(a, b)


def test_norms_of_a_failed_update_are_not_reused():
    trainer = make_trainer()
    failures = []

    @trainer.on(StepEvents.GRADIENTS_READY)
    def scale() -> None:
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 if failures else 1000)

    trainer.attach(GradientDiagnostics(every=1))

    def fail(*_: Any) -> None:
        if not failures:
            failures.append(1)
            raise ValueError("planted")

    trainer.optimizer.register_step_pre_hook(fail)
    records = kept_records(trainer)
    loader = make_loader()
    with pytest.raises(ValueError, match="planted"):
        trainer.run(loader, max_iters=1)
    trainer.run(loader, max_iters=1)
    bare = watched(GradientDiagnostics(every=1))[1]
    expected = bare[0]["gradients/norm/body"]
    assert records[0].values["gradients/norm/body"] == pytest.approx(expected, rel=1e-5)


def test_each_of_two_updates_in_one_step_has_its_own_norm():
    def step(trainer: Trainer, _: object) -> None:
        for size in (1.0, 2.0):
            for parameter in trainer.model.parameters():
                parameter.grad = torch.full_like(parameter, size)
            trainer.fire_event(StepEvents.GRADIENTS_READY)

    trainer = make_trainer(step=step)
    trainer.attach(GradientDiagnostics(every=1, updates=False))
    records = kept_records(trainer)
    trainer.run(make_loader(1), max_epochs=1)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert records[0].values["gradients/norm"] == pytest.approx(1.5 * count**0.5)


def test_norms_are_measured_in_each_update_after_a_failed_attach():
    class Refused:
        def attach(self, _: Trainer) -> None:
            raise ValueError("planted")

    trainer = make_trainer()
    with pytest.raises(ValueError, match="planted"):
        trainer.attach(GradientDiagnostics(every=1), Refused())
    trainer.attach(GradientDiagnostics(every=1))
    records = kept_records(trainer)
    trainer.run(make_loader(), max_epochs=1)
    norms = [record.values["gradients/norm"] for record in records]
    assert len(set(norms)) == len(norms) > 1


def test_a_record_holds_the_means_of_the_measured_iterations():
    _, [record], updates = watched(GradientDiagnostics(every=2), log_every=50)
    seen = [norm(*update["gradients"].values()) for update in updates[1::2]]
    assert len(seen) == 2
    assert record["gradients/norm"] == pytest.approx(sum(seen) / 2, rel=1e-6)


def test_components_may_be_named_and_update_ratios_disabled():
    _, records, updates = watched(
        GradientDiagnostics(
            every=1, components={"layers": ("body", "head"), "t": "loss.scale"}, updates=False
        )
    )
    gradients = updates[0]["gradients"]
    layers = norm(*(g for name, g in gradients.items() if not name.startswith("loss")))
    assert records[0]["gradients/norm/layers"] == pytest.approx(layers, rel=1e-6)
    assert records[0]["gradients/ratio/layers_to_t"] == pytest.approx(
        layers / norm(gradients["loss.scale"]), rel=1e-6
    )
    assert not any(tag.startswith("updates/") for tag in records[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number of iterations >= 1, got 0"),
        ({"every": 2.0}, "got 2.0"),
        ({"components": "image"}, "components must be names of components, or a mapping"),
        ({"components": []}, r"got \[\]"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientDiagnostics(**arguments)


def test_an_unknown_component_is_refused_when_it_is_attached():
    with pytest.raises(ValueError, match="'image' must have parameters"):
        make_trainer().attach(GradientDiagnostics(components=["image"]))
