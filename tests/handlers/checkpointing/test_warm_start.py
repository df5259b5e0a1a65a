"""Weights from a file in a model that may differ from the saved one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych.engine import CheckpointError, SeededLoader
from diptych.handlers import CheckpointManager, load_weights
from tests.handlers.runs import loader, make_trainer


def net(classes: int = 4, seed: int = 0) -> nn.Sequential:
    """Return a small model with a batch norm and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


class Wrapped(nn.Module):
    """A model with a backbone, and a head of its own."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.backbone = net(seed=seed)
        self.head = nn.Linear(4, 2)


class Tied(nn.Module):
    """A model whose two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.output.weight = self.embedding.weight


def copied(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's weights and buffers."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def saved(content: Any, path: Path) -> Path:
    """Write a file with torch, and return its path."""
    torch.save(content, path)
    return path


FILES: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "a state dict": lambda state, folder: saved(state, folder / "weights.pt"),
    "under state_dict": lambda state, folder: saved(
        {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, folder / "weights.pth"
    ),
    "under model": lambda state, folder: saved({"model": state}, folder / "weights.ckpt"),
    "of a compiled model": lambda state, folder: saved(
        {f"_orig_mod.{key}": value for key, value in state.items()}, folder / "weights.pt"
    ),
    "of a wrapped model": lambda state, folder: saved(
        {f"module.{key}": value for key, value in state.items()}, folder / "weights.pt"
    ),
    "of a part": lambda state, folder: saved(
        {f"net.encoder.{key}": value for key, value in state.items()}, folder / "weights.pt"
    ),
    "an old file": lambda state, folder: (
        torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
        or folder / "old.pt"
    ),
    "safetensors": lambda state, folder: (
        save_file(state, folder / "weights.safetensors") or folder / "weights.safetensors"
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_all_weights_of_a_file_are_loaded(kind, tmp_path):
    source, model = net(seed=1), net()
    path = FILES[kind](source.state_dict(), tmp_path)
    report = load_weights(model, path, strict=True)
    expected = copied(source)
    assert report.matched == tuple(expected)
    assert report.is_complete
    assert all(value.equal(expected[key]) for key, value in model.state_dict().items())


def test_weights_of_a_checkpoint_and_of_its_directory_are_loaded(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, every="epoch"))
    trainer.run(loader(), max_epochs=2)
    expected = copied(trainer.model)
    newest = max(tmp_path.glob("*.pt"), key=lambda path: path.stat().st_mtime)
    for path in (newest, tmp_path, str(tmp_path)):
        other = make_trainer()
        with torch.no_grad():
            other.model[0].weight.zero_()
        assert load_weights(other.model, path, strict=True).is_complete
        assert all(value.equal(expected[key]) for key, value in other.model.state_dict().items())


def test_a_new_head_is_left_as_it_is(tmp_path):
    source, model = net(), net(classes=7, seed=1)
    head = copied(model[2])
    report = load_weights(model, saved(source.state_dict(), tmp_path / "weights.pt"))
    assert report.other_shape == {"2.weight": ((4, 5), (7, 5)), "2.bias": ((4,), (7,))}
    assert model[0].weight.equal(source[0].weight)
    assert all(value.equal(head[key]) for key, value in model[2].state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_go_into_a_part_of_a_model(prefix, tmp_path):
    source, model = net(), Wrapped()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    report = load_weights(model, saved(state, tmp_path / "weights.pt"))
    assert report.prefix == ("-module. " if prefix else "") + "+backbone."
    assert report.missing == ("head.weight", "head.bias")
    assert all(
        value.equal(copied(source)[key]) for key, value in model.backbone.state_dict().items()
    )


def test_weights_of_a_part_come_out_of_a_larger_model(tmp_path):
    source, model = Wrapped(), net()
    report = load_weights(model, saved(source.state_dict(), tmp_path / "weights.pt"))
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.prefix == "-backbone."
    assert model[0].weight.equal(source.backbone[0].weight)


def test_prefixes_are_renamed_the_longest_first(tmp_path):
    source = net()
    state = {f"old.{key}": value for key, value in source.state_dict().items()}
    path = saved({**state, "old.extra.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    model = Wrapped()
    report = load_weights(model, path, rename={"old.": "backbone.", "old.extra.": "other."})
    assert report.unexpected == ("other.weight",)
    assert model.backbone[2].weight.equal(source[2].weight)


def test_an_empty_prefix_stands_before_all_names(tmp_path):
    source, model = nn.Linear(3, 3), nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    path = saved(source.state_dict(), tmp_path / "weights.pt")
    before = copied(model)
    with pytest.raises(CheckpointError, match=r"equally well with the prefixes \+a\., \+b\."):
        load_weights(model, path)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    load_weights(model, path, rename={"": "b."})
    assert model["b"].weight.equal(source.weight)
    assert model["a"].weight.equal(before["a.weight"])


@pytest.mark.parametrize("names", [{"embedding.weight"}, {"output.weight"}])
def test_a_tied_weight_that_the_file_holds_once_is_loaded(names, tmp_path):
    state = {name: torch.full((3, 3), 2.0) for name in names}
    path = saved({**state, "output.bias": torch.ones(3)}, tmp_path / "weights.pt")
    model = Tied()
    assert load_weights(model, path, strict=True).is_complete
    assert model.embedding.weight.eq(2.0).all()
    assert model.output.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("2.bias"), "missing"),
        (lambda state: state.update(more=torch.zeros(1)), "unexpected"),
        (lambda state: state.update({"2.bias": torch.zeros(9)}), r"other shape.*\(9,\) -> \(4,\)"),
    ],
)
def test_strict_raises_and_changes_nothing(change, message, tmp_path):
    model, state = net(), copied(net(seed=1))
    change(state)
    path, before = saved(state, tmp_path / "weights.pt"), copied(model)
    with pytest.raises(CheckpointError, match=f"(?s)strict=True.*{message}"):
        load_weights(model, path, strict=True)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not load_weights(model, path).is_complete


def test_a_file_of_another_model_is_an_error_that_names_both(tmp_path):
    path = saved(nn.Conv2d(1, 2, 3).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"none fits: it has weight, bias; .*0\.weight"):
        load_weights(net(), path)


class Payload:
    """An object that would run code if it were unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("code has run",))


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "does not exist": lambda path: None,
    "cannot be read": lambda path: path.write_bytes(b"no weights"),
    "got an object of print": lambda path: torch.save({"model": Payload()}, path),
    r"only, got an object of argparse.Namespace\. .*torch.save\(model.state_dict\(\), path\)$": (
        lambda path: torch.save({"state_dict": {}, "args": Namespace(lr=1)}, path)
    ),
    r"got an object of torch.nn.modules.linear.Linear\.": lambda path: torch.save(
        nn.Linear(2, 2), path, _use_new_zipfile_serialization=False
    ),
    r"must hold a state dict of tensors, got .* with epoch": lambda path: torch.save(
        {"epoch": 3}, path
    ),
    "must hold a checkpoint": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_file_without_weights_is_a_clear_error(message, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    UNREADABLE[message](path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(net(), path)
    assert "weights_only" not in str(caught.value)  # torch's advice, which would run the code
    assert "code has run" not in capsys.readouterr().out


def test_a_prefix_that_no_name_has_is_an_error(tmp_path):
    path = saved(net().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"rename must have .*, got 'visual\.'"):
        load_weights(net(), path, rename={"visual.": "image."})
    with pytest.raises(CheckpointError, match="rename must keep names apart"):
        load_weights(net(), path, rename={"0.": "2."})


def test_a_report_is_a_short_table(tmp_path):
    state = {f"module.{key}": value for key, value in net().state_dict().items()}
    state["module.extra"] = torch.zeros(2)
    del state["module.0.bias"]
    report = load_weights(net(classes=7), saved(state, tmp_path / "weights.pt"))
    assert str(report).splitlines() == [
        "weights.pt: 6 of 9 loaded (prefix -module.)",
        "  missing, kept         1  0.bias",
        "  other shape, kept     2  2.weight (4, 5) -> (7, 5), 2.bias (4,) -> (7,)",
        "  unexpected            1  extra",
    ]


def test_values_take_the_type_of_the_model(tmp_path):
    source, model = net().half(), net(seed=1)
    load_weights(model, saved(source.state_dict(), tmp_path / "weights.pt"))
    assert model[0].weight.dtype is torch.float32
    assert model[0].weight.equal(source[0].weight.float())


def test_a_model_without_memory_is_refused(tmp_path):
    path = saved(net().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="meta device"):
        load_weights(net().to("meta"), path)


def test_training_starts_from_the_loaded_weights_at_iteration_0(tmp_path):
    trained = make_trainer()
    trained.attach(CheckpointManager(tmp_path / "first"))
    trained.run(loader(), max_epochs=1)
    trainer = make_trainer()
    load_weights(trainer.model, tmp_path / "first")
    assert trainer.model[0].weight.equal(trained.model[0].weight)
    batches = loader()
    assert isinstance(batches, SeededLoader)
    trainer.run(batches, max_epochs=1)
    assert trainer.state.iteration == trained.state.iteration
    assert not trainer.model[0].weight.equal(trained.model[0].weight)
