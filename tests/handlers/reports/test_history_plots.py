"""Reports of one run and of several: their content and format."""

from __future__ import annotations

import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import RunEvents, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    Evaluation,
    Finding,
    HistoryPlots,
    JsonLines,
    PairSamples,
    ProgressBar,
    RepresentationHealth,
    RetrievalGallery,
    RetrievalRecall,
    RunCard,
    RunRecord,
    default_handlers,
)
from diptych.handlers.reports.comparison import (
    best_texts,
    best_values,
    differing_settings,
    final_values,
)
from diptych.handlers.reports.page import drawings, page
from diptych.handlers.reports.run_history import RunHistory, read_run
from diptych.losses import CLIPLoss, InfoNCELoss
from tests.handlers.runs import Stop, loader, make_trainer, report_each_epoch, reported_run, stop_at


def test_a_run_leaves_a_report_with_every_tag_and_setting(tmp_path):
    text = (reported_run(tmp_path / "a") / "report.html").read_text("utf-8")

    for tag in ("train/loss", "val/recall@1"):
        assert f"<title>{tag}</title>" in text
    assert "<td>trainer.<wbr>precision</td><td>fp32</td>" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text
    assert "<script" not in text
    headings = ("Results", "Findings", "Starts and", "Does it learn?", "Last values", "Settings")
    places = [text.index(f">{heading}") for heading in headings]
    assert places == sorted(places)
    assert "done, epoch 2, step 12" in text
    assert "it has no RepresentationHealth." in text
    assert "<td>val/<wbr>recall@1</td><td>0.75</td><td>12</td><td>0.75</td>" in text
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    HTMLParser().feed(text)


class Scaled(nn.CrossEntropyLoss):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(self.scale * logits, labels)


def test_report_and_summary_count_the_parameters_of_model_and_loss_alike(tmp_path):
    model, loss, stream = nn.Linear(3, 2), Scaled(), io.StringIO()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    trainer = Trainer(model, loss, optimizer, task=tasks.classification, device="cpu")
    trainer.attach(JsonLines(tmp_path), RunRecord(tmp_path), HistoryPlots(tmp_path))
    trainer.attach(RunCard(stream=stream))
    trainer.run(loader(), max_epochs=1)
    report = (tmp_path / "report.html").read_text("utf-8")
    assert " | Linear, 8 parameters | Scaled, 1 parameter</p>" in report
    assert "Linear, 8 parameters, all train: weight 6, bias 2; the loss has 1 more" in (
        stream.getvalue()
    )


def test_only_a_run_that_was_judged_is_reported_as_free_of_problems(tmp_path):
    for warmup, verdict in ((99, "The rules of health have not judged"), (0, "No rule has found")):
        folder = tmp_path / str(warmup)
        trainer = make_trainer()
        health = RepresentationHealth(
            features=["logits"], every=1, warmup=warmup, patience=2, rules=()
        )
        trainer.attach(health, JsonLines(folder), HistoryPlots(folder))
        trainer.run(loader(), max_epochs=1)
        assert verdict in (folder / "report.html").read_text("utf-8")


def test_an_interrupted_run_has_its_report(tmp_path):
    trainer = make_trainer().attach(JsonLines(tmp_path), HistoryPlots(tmp_path, every=50))
    stop_at(trainer, 8)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=3)

    assert "train/loss" in (tmp_path / "report.html").read_text("utf-8")


def paired_trainer(folder: Path, end: int, *, rate: float = 0.5) -> Trainer:
    """Return a trainer of pairs, with a gallery, that is stopped in an iteration."""
    model = nn.Sequential(nn.Linear(3, 3))
    task = {"task": lambda m, batch: {"image_features": m(batch["image"]), **shown_texts(batch)}}
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification)
    samples = PairSamples(
        batches=list(loader()),
        images=torch.rand(11, 3, 40, 40, generator=torch.Generator().manual_seed(0)),
        captions=[f"<script>alert({number})</script> & more \ud800" for number in range(11)],
        **task,
    )
    metrics = [RetrievalRecall(k=(1, 5))]
    health = RepresentationHealth(features=("logits",), rules=())
    trainer.attach(
        Evaluation(loader(), metrics=metrics, **task),
        RetrievalGallery(samples, queries=3, prefix="<i>"),
        health,
        *default_handlers(folder, health=False),
    )
    finding = Finding("a <b>", 2, "spread 0.01", "Lower the rate")
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: health.findings.append(finding)
    )
    stop_at(trainer, end)
    return trainer


def shown_texts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"text_features": batch["image"] + 0.1}


def test_an_interrupted_and_resumed_run_has_one_report_of_its_whole_history(tmp_path):
    with pytest.raises(Stop):
        paired_trainer(tmp_path, 8).run(loader(), max_epochs=2)
    assert "failed, epoch 2, step 8" in (tmp_path / "report.html").read_text("utf-8")

    paired_trainer(tmp_path, 99, rate=0.25).run(loader(), max_epochs=2)
    paired_trainer(tmp_path, 99, rate=0.25).run(loader(), max_epochs=2)  # nothing is left to do

    text = (tmp_path / "report.html").read_text("utf-8")
    assert "done, epoch 2, step 12" in text
    starts = text[text.index("<h2>Starts") :]
    assert starts.count(": started</li>") == 1
    assert starts.count(": resumed after step 6, in epoch 1") == 1
    assert "0.lr 0.5 -&gt; 0.25 (changed in the script)" in starts
    assert text.count('<b class="warn">a &lt;b&gt;</b>, step 2: spread 0.01. Lower the rate') == 1
    # Of 11 pairs, a random image is among the first five texts of five in 11 queries.
    assert f"<td>{1 / 11:.2g}</td>" in text
    assert f"<td>{5 / 11:.2g}</td>" in text
    assert text.count("&lt;script&gt;alert") == 3 * 5 + 3
    assert text.count("data:image/jpeg;base64") == 3 + 3 * 5
    assert "<script" not in text
    assert "&lt;i&gt;: image to text, step 12" in text
    curve = r'points="([^"]*)"[^>]*class="curve"[^>]*><title>val/image_to_text/recall@1<'
    assert len(re.search(curve, text)[1].split()) == 2
    assert len(text) < 150_000


def test_the_folder_may_be_given_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer().attach(JsonLines("runs/a"), HistoryPlots("runs/a"))

    trainer.run(loader(), max_epochs=1)

    assert (tmp_path / "runs" / "a" / "report.html").exists()


def test_without_json_lines_the_run_does_not_start(tmp_path):
    trainer = make_trainer().attach(HistoryPlots(tmp_path))

    with pytest.raises(ValueError, match=r"needs a JsonLines .*got none. Attach"):
        trainer.run(loader(), max_epochs=1)


def test_the_settings_that_differ_come_first(tmp_path):
    runs = [
        read_run(reported_run(tmp_path / "a")),
        read_run(reported_run(tmp_path / "b", microbatch_size=1)),
    ]

    different = differing_settings(runs)

    assert different == {"trainer.microbatch_size": [None, 1]}
    text = page(runs)
    assert text.index("trainer.<wbr>microbatch_size") < text.index("<svg")


def test_handlers_are_compared_by_name_wherever_they_stand(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, seconds in zip(folders, (1.0, 2.0), strict=True):
        bars = [ProgressBar(interval=seconds), RunRecord(folder), JsonLines(folder)]
        trainer = make_trainer().attach(*(bars if seconds > 1 else bars[::-1]))
        trainer.run(loader(), max_epochs=1)

    different = differing_settings([read_run(folder) for folder in folders])

    assert different == {"handlers.ProgressBar.interval": [1.0, 2.0]}


def test_a_handler_that_a_run_lacks_is_one_row(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, more in zip(folders, ([], [ProgressBar()]), strict=True):
        trainer = make_trainer().attach(RunRecord(folder), JsonLines(folder), *more)
        trainer.run(loader(), max_epochs=1)

    different = differing_settings([read_run(folder) for folder in folders])

    assert different == {"handlers.ProgressBar": ["-", "attached"]}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (CLIPLoss, ["initial.temperature", "initial.temperature.logit_scale"]),
        (InfoNCELoss, ["modules.loss.temperature.value"]),
    ],
)
def test_the_temperature_is_compared_as_the_script_sets_it(kind, names, tmp_path):
    runs = []
    for temperature in (0.05, 0.1):
        model, loss, folder = nn.Linear(4, 3), kind(temperature=temperature), tmp_path / "run"
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        trainer = Trainer(model, loss, optimizer, task=lambda m, b: {"a": m(b), "b": m(-b)})
        trainer.attach(RunRecord(folder / str(temperature)), JsonLines(folder / str(temperature)))
        trainer.run([torch.randn(4, 4)], max_epochs=1)
        runs.append(read_run(folder / str(temperature)))
    different = differing_settings(runs)
    assert [*different] == names
    assert different[names[0]] == [0.05, 0.1]


def test_the_table_tells_the_last_value_and_the_range(tmp_path):
    rows = final_values([read_run(reported_run(tmp_path / "a", epochs=3))])

    assert rows["val/recall@1"] == ["0.5 (0.25 to 0.75)"]


def test_the_best_value_has_its_step_and_the_best_run_has_a_star():
    losses, recalls = ([(2, 0.5), (4, 0.25), (6, 0.75)], [(2, 0.1), (4, 0.4)])
    first = RunHistory("a", {}, {"val/loss": losses, "val/recall@1": recalls, "train/x": losses})
    second = RunHistory("b", {}, {"val/loss": [(2, 1.0)]})
    best = best_values([first, second])

    assert best == {"val/loss": [(4, 0.25), (2, 1.0)], "val/recall@1": [(4, 0.4), None]}
    assert best_texts([first, second]) == {
        "val/loss": ["0.25 (step 4) *", "1 (step 2)"],
        "val/recall@1": ["0.4 (step 4)", "-"],
    }


def test_what_is_better_is_what_a_handler_of_the_run_was_told():
    told = {"handlers.CheckpointManager.best": "val/gap", "handlers.CheckpointManager.mode": "min"}
    runs = [
        RunHistory(name, settings, {"val/gap": [(1, low), (2, low + 1)]})
        for name, settings, low in (("a", told, 3.0), ("b", told, 1.0), ("c", {}, 5.0))
    ]
    assert best_texts(runs[:2]) == {"val/gap": ["3 (step 1)", "1 (step 1) *"]}
    assert best_texts(runs[2:]) == {"val/gap": ["6 (step 2)"]}
    assert "*" not in str(best_texts(runs))  # they do not agree


def test_a_tag_that_one_run_lacks_is_drawn_in_the_others_colour(tmp_path):
    folder = tmp_path / "c"
    make_trainer().attach(JsonLines(folder)).run(loader(), max_epochs=1)
    runs = [read_run(folder), read_run(reported_run(tmp_path / "a"))]

    assert final_values(runs)["val/recall@1"][0] == "-"
    assert "#e65100" in page(runs)


def test_curves_that_answer_one_question_share_a_chart_of_a_single_run():
    curves = {tag: [(1, 2.0), (2, 1.0)] for tag in ("train/loss", "val/loss", "other/thing")}

    charts = drawings([RunHistory("a", {}, curves)])

    assert list(charts) == ["Does it learn?", "Everything else"]
    (loss,), (other,) = charts.values()
    assert [line.name for line in loss.lines] == ["train/loss", "val/loss"]
    assert [label.text[2:] for label in loss.labels[1:3]] == ["train", "val"]
    assert (other.title, len(other.lines)) == ("other/thing", 1)


def test_curves_beyond_the_colours_stand_in_a_further_chart():
    names = [f"gradients/norm/block{number}" for number in range(10)]
    charts = drawings([RunHistory("a", {}, {name: [(1, 1.0)] for name in names})])

    (healthy,) = charts.values()
    assert [len(chart.lines) for chart in healthy] == [8, 2]


def test_runs_side_by_side_have_each_tag_in_a_chart_of_its_own():
    curves = {"train/loss": [(1, 2.0)], "val/loss": [(1, 1.0)]}

    (charts,) = drawings([RunHistory(n, {}, curves) for n in ("a", "b")]).values()

    assert [chart.title for chart in charts] == ["train/loss", "val/loss"]
    assert [[line.name for line in chart.lines] for chart in charts] == [["a", "b"]] * 2


def test_the_report_is_drawn_at_each_checkpoint_with_all_that_was_logged_by_then(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("diptych.handlers.reports.history_plots.PAUSE", 0.0)
    trainer, seen = make_trainer(log_every=1), []
    plots = HistoryPlots(tmp_path)
    trainer.attach(JsonLines(tmp_path), plots, CheckpointManager(tmp_path / "c", every=4))

    def look() -> None:
        if (tmp_path / "report.html").exists():
            curve = read_run(tmp_path).curves["train/loss"]
            text = (tmp_path / "report.html").read_text("utf-8")
            drawn = re.search(r'points="([^"]*)"[^>]*class="curve"[^>]*><title>train/loss', text)
            seen.append((trainer.state.iteration, len(drawn[1].split()), len(curve)))

    trainer.add_event_handler(RunEvents.SAVED, look)
    trainer.run(loader(), max_epochs=2)

    assert [iteration for iteration, _, _ in seen] == [4, 8, 12]
    assert [logged for _, _, logged in seen] == [4, 8, 12]
    assert [drawn for _, drawn, _ in seen] == [4, 8, 12]


def test_checkpoints_that_follow_each_other_closely_share_a_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.handlers.reports.history_plots.PAUSE", 1e6)
    trainer, seen = make_trainer(log_every=1), []
    manager = CheckpointManager(tmp_path / "c", every=4)
    trainer.attach(JsonLines(tmp_path), HistoryPlots(tmp_path), manager)
    trainer.add_event_handler(
        RunEvents.SAVED,
        lambda: seen.append("epoch 1, step 4<" in (tmp_path / "report.html").read_text()),
    )
    trainer.run(loader(), max_epochs=2)

    assert seen == [True, True, True]
    assert "done, epoch 2, step 12" in (tmp_path / "report.html").read_text()


def test_every_so_many_epochs_replaces_the_checkpoints_cadence(tmp_path):
    trainer, changes = make_trainer(), []
    trainer.attach(JsonLines(tmp_path), HistoryPlots(tmp_path, every=2))

    def look() -> None:
        changes.append((tmp_path / "report.html").exists())

    trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
    trainer.run(loader(), max_epochs=3)

    assert changes == [False, True, True]


def test_the_picture_of_the_curves_is_a_png(tmp_path):
    from PIL import Image

    report_each_epoch(trainer := make_trainer(), 0.25, 0.75)
    trainer.attach(JsonLines(tmp_path), HistoryPlots(tmp_path, png=True))
    trainer.run(loader(), max_epochs=2)

    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x39, 0x49, 0xAB), (255, 255, 255)} <= colors


def test_the_picture_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ImportError, match=r"diptych\[plots\]"):
        HistoryPlots(tmp_path, png=True)
