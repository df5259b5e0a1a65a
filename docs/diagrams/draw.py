"""The documentation's diagrams and their texts. Draw them with `python -m docs.diagrams.draw`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from docs.diagrams.picture import FAINT, Picture

FOLDER = Path(__file__).parent

# The loop, from top to bottom: an event with some handlers that use it, or work (a text).
Row = tuple[str, Sequence[str]] | str
BEFORE: list[Row] = [("RESTORE", ["CheckpointManager"]), ("STARTED", ["RunCard", "RunRecord"])]
EPOCH_BEGINS: list[Row] = [("EPOCH_STARTED", ["StagePlan"])]
UPDATE: list[Row] = [
    "get the next batch from the loader",
    ("ITERATION_STARTED", ["LearningRate", "Curriculum"]),
    "move it to the device; transform",
    "`outputs = task(model, batch)",
    ("FORWARD_COMPLETED", ["InBatchAccuracy"]),
    "`terms = loss.terms(*outputs)",
    ("LOSS_COMPUTED", ["RepresentationHealth"]),
    "backward; average over ranks; unscale",
    ("GRADIENTS_READY", ["LossGuard", "GradientClipping"]),
    "`optimizer.step()",
    ("OPTIMIZER_STEPPED", ["WeightAverage", "MomentumEncoder"]),
    ("ITERATION_COMPLETED", ["Profile"]),
    ("LOGGED", ["TensorBoard", "JsonLines", "ProgressBar"]),
    ("SAFE_POINT", ["CheckpointManager"]),
]
EPOCH_ENDS: list[Row] = [
    ("EPOCH_COMPLETED", ["Evaluation"]),
    ("EVALUATED", ["StagePlan"]),
    ("EPOCH_PUBLISHED", ["EarlyStopping", "StagePlan"]),
]
AFTER: list[Row] = [
    ("EPOCH_CUT", ["Evaluation"]),
    ("COMPLETED", ["CheckpointManager"]),
    ("ENDED", ["TensorBoard", "JsonLines", "RunCard"]),
]
STEP, HEIGHT, PILL = 34, 26, 178


def _rows(picture: Picture, x: int, y: int, rows: Sequence[Row]) -> int:
    """Draw rows below one another; return the y coordinate of the next row."""
    for row in rows:
        if isinstance(row, str):
            picture.box((x, y, 330, HEIGHT), row, "work")
        else:
            event, handlers = row
            picture.box((x, y, PILL, HEIGHT), f"`{event}", "event")
            picture.text(x + PILL + 12, y + 18, ", ".join(handlers), color=FAINT, room=330)
        y += STEP
    return y


def loop() -> Picture:
    """Return the diagram of the loop, with its events and the handlers that use them."""
    rows = len(BEFORE) + len(EPOCH_BEGINS) + len(UPDATE) + len(EPOCH_ENDS) + len(AFTER)
    height = rows * STEP + 2 * (24 + 12) + 18
    title = "The training loop: run, epochs, updates, their events and the handlers that use them"
    picture = Picture("loop", 620, height, title)
    epoch = 4 + len(BEFORE) * STEP
    update = epoch + 24 + 4 + len(EPOCH_BEGINS) * STEP
    epoch_height = 24 + 12 + (len(EPOCH_BEGINS) + len(UPDATE) + len(EPOCH_ENDS)) * STEP + 36
    picture.frame((14, epoch, 602, epoch_height - 4), "every epoch")
    picture.frame((44, update, 562, 26 + len(UPDATE) * STEP), "every batch: one update")
    _rows(picture, 60, 2, BEFORE)
    _rows(picture, 60, epoch + 26, EPOCH_BEGINS)
    y = _rows(picture, 60, update + 26, UPDATE)
    picture.arrow((44, y - 20), (30, y - 20), (30, update + 40), (44, update + 40))
    y = _rows(picture, 60, y + 8, EPOCH_ENDS)
    picture.arrow((58, y - 20), (24, y - 20), (24, epoch + 40), (58, epoch + 40))
    _rows(picture, 60, y + 16, AFTER)
    return picture


def _pieces(picture: Picture, y: int, model: str, column: tuple[str, str]) -> None:
    """Draw four pieces, the model, and a column of the pieces' features or gradients."""
    name, kind = column
    for index in range(4):
        top = y + index * 28
        picture.box((6, top, 84, 22), f"piece {index + 1}", "plain")
        picture.arrow((92, top + 11), (150, top + 11))
        across = ((272, top + 11), (328, top + 11))
        picture.arrow(*(across if kind == "data" else reversed(across)))
        picture.box((330, top, 110, 22), f"{name} {index + 1}", kind)
    picture.box((152, y, 118, 106), model, "work")


def caching() -> Picture:
    """Return the diagram of gradient caching: two passes over the pieces, the loss between them."""
    title = "Gradient caching: a pass without a graph, the loss of the whole batch, a second pass"
    picture = Picture("caching", 640, 436, title)
    picture.text(6, 18, "1. Each piece forward, without a graph", color=FAINT)
    _pieces(picture, 28, "model", ("features", "data"))
    picture.text(452, 78, "kept for the whole batch", color=FAINT)
    picture.arrow((385, 136), (385, 164))
    picture.text(6, 192, "2. The loss of the whole batch, once", color=FAINT)
    picture.box((330, 168, 110, 40), "loss", "work")
    picture.text(452, 192, "each sample with all others", color=FAINT)
    picture.arrow((385, 210), (385, 258))
    picture.text(6, 252, "3. Each piece forward again, and backward", color=FAINT)
    _pieces(picture, 262, "model\nwith a graph,\nsame draws", ("gradient", "event"))
    picture.text(452, 312, "of the loss, by the features", color=FAINT)
    picture.arrow((211, 370), (211, 396))
    picture.box((106, 400, 210, 30), "gradients of the weights", "event")
    picture.text(328, 419, "added up over the pieces: one update", color=FAINT)
    return picture


def owners() -> Picture:
    """Return the diagram of the packages, what each contains, and who imports whom."""
    title = "Three packages: handlers import the engine; engine and losses import neither"
    picture = Picture("owners", 640, 350, title)
    picture.box(
        (6, 4, 628, 44),
        "your script imports all three\nand has the model, optimizer and loader",
        "data",
    )
    owned = {
        "handlers": "schedules, clipping\nevaluation, files\nstages, TensorBoard",
        "engine": "the loop, its events\nthe training step\nranks, precision",
        "losses": "a loss and its terms\ntemperature, queue\nthe global batch",
    }
    lefts = dict(zip(owned, (6, 240, 466), strict=True))
    for package, text in owned.items():
        picture.arrow((lefts[package] + 84, 50), (lefts[package] + 84, 92))
        picture.box((lefts[package], 96, 168, 96), f"`diptych.{package}\n{text}", "work")
    picture.arrow((176, 130), (236, 130))
    picture.text(180, 122, "imports", color=FAINT)
    picture.arrow((236, 164), (176, 164), dashed=True)
    picture.text(184, 180, "events", color=FAINT)
    picture.arrow((410, 164), (462, 164), dashed=True)
    picture.text(420, 180, "calls", color=FAINT)
    picture.box((6, 240, 402, 40), "PyTorch-Ignite", "plain")
    picture.box((6, 300, 628, 40), "PyTorch", "plain")
    picture.arrow((324, 194), (324, 236))
    picture.arrow((90, 194), (90, 236))
    picture.arrow((207, 282), (207, 296))
    picture.arrow((550, 194), (550, 296))
    return picture


DIAGRAMS: dict[str, Callable[[], Picture]] = {
    "loop": loop,
    "gradient_caching": caching,
    "owners": owners,
}


def main() -> None:
    """Write each diagram into its file."""
    for name, draw in DIAGRAMS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
