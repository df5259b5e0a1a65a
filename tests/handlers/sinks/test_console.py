"""Everything that a run prints and logs without a terminal: short lines, each once."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import Evaluation, RetrievalRecall, default_handlers
from diptych.handlers.sinks.tensorboard import tensorboard_command
from diptych.losses import CLIPLoss


class Pairs(Dataset):
    """Sixteen pairs whose sides share their features."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {"image": features, "text": features}


class Towers(nn.Module):
    """Two linear towers of a long name, beside seven parts that only count as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a_tower_for_images = nn.Linear(6, 4)
        self.a_tower_for_texts = nn.Linear(6, 4)
        for number in range(4):
            self.add_module(f"another_component_{number}", nn.Linear(4, 4, bias=False))

    def encode_image(self, image: Tensor) -> Tensor:
        for number in range(4):
            image = image + 0 * self.get_submodule(f"another_component_{number}").weight.sum()
        return self.a_tower_for_images(image)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(image), self.encode_text(text)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.a_tower_for_texts(text)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """Return what a run of three epochs writes and logs."""
    folder, printed = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.write", printed.append)
        patch.setattr("sys.stderr.write", printed.append)
        patch.setattr("sys.stderr.isatty", lambda: False)
        patch.chdir(folder)
        keep = logging.Handler()
        keep.emit = lambda record: printed.append(f"{record.getMessage()}\n")
        logging.getLogger("diptych").addHandler(keep)
        try:
            _run()
        finally:
            logging.getLogger("diptych").removeHandler(keep)
    return "".join(printed).splitlines()


def _run() -> None:
    torch.manual_seed(0)
    model, loss = Towers(), CLIPLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu", log_every=2)
    held_out = SeededLoader(Pairs(), batch_size=8, shuffle=False)
    trainer.attach(
        Evaluation(held_out, metrics=[RetrievalRecall(k=(1, 5, 10))]),
        *default_handlers("runs/small", best="val/recall@1"),
    )
    trainer.run(SeededLoader(Pairs(), batch_size=4, seed=0), max_epochs=3)


def test_no_line_exceeds_120_characters(lines):
    assert [line for line in lines if len(line) > 120] == []
    assert any(len(line) > 80 for line in lines)  # there was something to break


def test_nothing_is_written_twice(lines):
    statements = re.split(r"\n(?! )", "\n".join(lines))  # a statement continues on indented lines

    assert len(statements) > 10
    assert sorted(statements) == sorted(set(statements))


def test_each_recall_stands_beside_chance(lines):
    beside = re.findall(r"recall@1 [\d.]+(?: \(chance ([\d.]+))?", "\n".join(lines))

    # One of 16 items, in three groups after each of three epochs; and the best.
    assert beside == ["0.062"] * (3 * 3 + 1)


def test_the_command_for_tensorboard_is_found_by_the_shell_that_it_is_printed_in(
    monkeypatch, tmp_path
):
    program = tmp_path / ".venv/bin/tensorboard"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))

    monkeypatch.setenv("PATH", str(program.parent))
    assert tensorboard_command("my runs") == "tensorboard --logdir 'my runs'"
    monkeypatch.setenv("PATH", "")
    assert tensorboard_command("runs") == ".venv/bin/tensorboard --logdir runs"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert tensorboard_command("runs") == f"{program} --logdir runs"
