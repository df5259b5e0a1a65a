"""The commands from own images to a model in use."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diptych.__main__ import main
from diptych.recipes import Embeddings, Encoder
from tests.recipes.conftest import SMALL
from tests.recipes.emoji_files import LAYOUTS, captions, write_images

FIVE = (
    *("Flickr8k.token.txt", "Flickr30k results.csv", "COCO captions", "Karpathy's splits"),
    "tab-separated with a header",
)


@pytest.mark.slow
def test_the_five_commands_of_the_page_run_as_they_are_written(tmp_path, capsys, monkeypatch):
    page = Path("docs/how_to/own_data.md").read_text("utf-8")
    commands = page.partition("```bash\n")[2].partition("```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos")
    LAYOUTS["tab-separated with a header"][1](tmp_path / "captions.tsv", captions())

    for command in commands:
        program, *arguments = shlex.split(command)
        assert (program, main(arguments)) == ("diptych", 0), command

    printed = capsys.readouterr().out
    assert [line.split()[1] for line in commands] == [
        *("train", "evaluate", "embed", "search", "export")
    ]
    assert "Wrote 8 features to photos.safetensors." in printed
    assert Encoder.load("runs/photos/safetensors").encode_texts(["a"]).shape == (1, 256)


@pytest.mark.parametrize("layout", FIVE)
def test_each_layout_trains_by_the_command_and_is_searched(layout, tmp_path, capsys):
    name, write = LAYOUTS[layout]
    images, run_dir = write_images(tmp_path / "images"), tmp_path / "run"
    write(tmp_path / name, captions())
    flags = ["--images", str(images), "--captions", str(tmp_path / name), *SMALL]

    assert main(["train", *flags, "--epochs", "1", "--run-dir", str(run_dir)]) == 0
    assert layout in capsys.readouterr().out
    assert main(["search", str(run_dir), "a smile", "--images", str(images), "--top", "3"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(r"-?\d\.\d{4}  (.+)", line)[1] in captions() for line in lines] == [
        True
    ] * 3


def test_a_row_that_cannot_be_used_stops_the_command_before_a_file_is_written(
    photos, tmp_path, capsys
):
    path = tmp_path / "bad.tsv"
    first = next(iter(captions()))
    path.write_text(f"image\tcaption\n{first}\tok\ngone.png\tlost\n")
    flags = ["--images", str(photos / "images"), "--captions", str(path), *SMALL]

    assert main(["train", *flags, "--run-dir", str(tmp_path / "run")]) == 2

    printed = capsys.readouterr()
    assert "diptych train: error: 1 of 2 rows cannot be used:" in printed.err
    assert "bad.tsv:3: gone.png: 'lost'" in printed.err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.tsv"]


@pytest.mark.parametrize(
    "case",
    [
        (["--epochs", "0"], "epochs must be a whole number of passes >= 1, got 0"),
        (["--epochs", "x"], "--epochs"),
        (["--image-tower", "nosuch:x"], "image_tower must be one of small, timm:NAME"),
        (["--image-tower", "os:system"], "image_tower must be one of"),
        (["--augment", "mixup"], "augment must name some of crop"),
        (["--loss", "clp"], "Did you mean 'clip'"),
        (["--loss", "cross_entropy"], "loss must be one for the task image_text, got 'cross_ent"),
        (["--resume"], "--resume must come with --run-dir or --config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml must be a file of settings"),
        (["--imagse", "x"], "--imagse"),
    ],
    ids=range(10),
)
def test_a_flag_that_cannot_be_used_is_exit_code_2_and_names_the_way_out(
    photos, tmp_path, capsys, monkeypatch, case
):
    flags, message = case
    monkeypatch.chdir(tmp_path)
    texts = str(photos / "captions.txt")
    given = ["--images", str(photos / "images"), "--captions", texts, *SMALL, *flags]

    try:
        code = main(["train", *given])
    except SystemExit as stopped:  # what the parser of the flags refuses
        code = stopped.code

    assert code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_run_is_repeated_by_its_settings_and_continued_by_resume_alone(run, tmp_path, capsys):
    config = ["train", "--config", str(run / "recipe.yaml")]
    assert main([*config, "--epochs", "1", "--run-dir", str(tmp_path / "r")]) == 0
    assert main([*config, "--run-dir", str(tmp_path / "r")]) == 2
    assert "Continue the run with --resume" in capsys.readouterr().err

    resume = ["train", "--config", str(tmp_path / "r" / "recipe.yaml"), "--resume"]
    assert main([*resume, "--epochs", "2"]) == 0

    printed = "".join(capsys.readouterr())
    assert "resumed after epoch 1" in printed
    assert float(re.findall(r"  lr (\S+)", printed)[-1]) > 0  # the schedule is longer, too
    assert (tmp_path / "r" / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (settings["epochs"], settings["image_size"]) == (2, 32)


@pytest.mark.slow
def test_the_same_settings_give_the_same_weights(run, tmp_path):
    config = ["train", "--config", str(run / "recipe.yaml"), "--run-dir", str(tmp_path / "again")]
    assert main(config) == 0

    first, again = (Encoder.load(one, checkpoint="last") for one in (run, tmp_path / "again"))
    theirs = again.model.state_dict()

    assert all(torch.equal(value, theirs[n]) for n, value in first.model.state_dict().items())


@pytest.mark.parametrize(
    "trial",
    [
        (["--dry-run"], "Dry run: everything below was done once and undone."),
        pytest.param((["--overfit", "1"], "updates on 1 batch: loss"), marks=pytest.mark.slow),
    ],
)
def test_a_trial_leaves_nothing_behind(photos, tmp_path, capsys, monkeypatch, trial):
    monkeypatch.chdir(tmp_path)
    flags, said = trial
    data = ["--images", str(photos / "images"), "--captions", str(photos / "captions.txt")]

    assert main(["train", *data, *SMALL, *flags]) == 0

    assert said in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_features_are_written_to_a_file_that_search_reads(run, photos, tmp_path, capsys):
    out = tmp_path / "photos.safetensors"
    assert main(["embed", str(run), "--images", str(photos / "images"), "--out", str(out)]) == 0
    assert "Wrote 8 features" in capsys.readouterr().out
    assert load_file(out)["features"].shape == (8, 16)
    assert set(Embeddings.load(out).names) == set(captions())

    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for use in (["search", "a cat"], ["zero-shot", "--classes", str(tmp_path / "classes.txt")]):
        printed = []
        for images in (out, photos / "images"):
            assert main([use[0], str(run), *use[1:], "--images", str(images)]) == 0
            printed.append(capsys.readouterr().out)

        assert printed[0] == printed[1]
        assert len(printed[0].splitlines()) == 8


def test_mistakes_in_the_use_of_a_model_name_the_way_out(run, photos, tmp_path, capsys):
    images = ["--images", str(photos / "images")]
    texts = ["--captions", str(photos / "captions.txt")]
    Embeddings(("a",), torch.ones(1, 7)).save(tmp_path / "f.safetensors")
    features, classes = ["--images", str(tmp_path / "f.safetensors")], tmp_path / "classes.txt"
    classes.write_text("cat\ndog\n")
    mistakes = [
        (["search", str(run.parent), "a cat", *images], f"Name a run in it, such as {run}"),
        (["embed", str(run), *images, "--out", str(tmp_path)], "--out must be a file to write"),
        (["evaluate", str(run), *images, *texts, "--part", "test"], "all 16, train 12, val 4, te"),
        (["evaluate", str(run), *images], "must have captions (--captions names their file)"),
        (["zero-shot", str(run), *images, "--classes", "cat,dog"], "--classes must be a file with"),
        (["zero-shot", str(run), *features, "--classes", str(classes)], "16 features each"),
    ]

    for command, message in mistakes:
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_names_that_are_no_text_are_printed_and_arguments_out_of_range_have_messages(
    run, photos, tmp_path, capsys, monkeypatch
):
    odd, new = tmp_path / "odd", tmp_path / "new" / "f.safetensors"
    odd.mkdir()
    (odd / "caf\udce9.png").write_bytes(next((photos / "images").iterdir()).read_bytes())
    (tmp_path / "classes.txt").write_text("cat\n", "utf-16")
    search = ["search", str(run), "a cat", "--images", str(odd)]
    for wrong in (["--top", "0"], ["--device", "abacus"], ["--batch-size", "0"]):
        assert main([*search, *wrong]) == 2
    messages = capsys.readouterr().err.splitlines()
    rules = ("top must be >= 1", "device must be one", "batch_size must be >= 1")
    assert [rule in line for rule, line in zip(rules, messages, strict=True)] == [True] * 3

    assert main(["embed", str(run), "--images", str(odd), "--out", str(new)]) == 0
    strict = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    monkeypatch.setattr(sys, "stdout", strict)
    classes = ["--classes", str(tmp_path / "classes.txt")]
    for command in (search, ["zero-shot", str(run), "--images", str(odd), *classes]):
        monkeypatch.setattr(sys, "argv", ["diptych", *command])
        assert main() == 0
    strict.flush()
    first, second = strict.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert first.endswith("  caf\\udce9.png")
    assert second == "1.000  cat  caf\\udce9.png"


def test_zero_shot_prints_a_class_for_each_image(run, photos, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("cat\n\nsmiling face\n")
    flags = ["--images", str(photos / "images"), "--classes", str(tmp_path / "classes.txt")]

    assert main(["zero-shot", str(run), *flags]) == 0

    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [name for _, _, name in lines] == sorted(captions())
    assert {label for _, label, _ in lines} <= {"cat", "smiling face"}
    assert all(0.5 <= float(probability) <= 1 for probability, _, _ in lines)


def test_evaluate_prints_retrieval_both_ways_and_writes_json(run, photos, tmp_path, capsys):
    texts, out = str(photos / "captions.txt"), tmp_path / "results.json"
    flags = ["--images", str(photos / "images"), "--captions", texts, "--out", str(out)]

    assert main(["evaluate", str(run), *flags]) == 0

    values = json.loads(out.read_text())
    assert {"image_to_text/recall@1", "text_to_image/recall@5", "recall@10"} <= set(values)
    head, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["reached", "chance"]
    reached = {name: value for name, value in values.items() if not name.startswith("chance/")}
    assert [line[:2] for line in lines] == [[n, f"{value:.4f}"] for n, value in reached.items()]
    assert values["text_to_image/recall@10"] == 1.0  # of 8 images, each counted once
    assert values["chance/text_to_image/recall@1"] == pytest.approx(1 / 8)
    assert "0.1250" in {line[2] for line in lines if line[0] == "text_to_image/recall@1"}

    assert main(["evaluate", str(run), *flags, "--part", "val"]) == 0
    values = json.loads(out.read_text())
    assert values["chance/text_to_image/recall@1"] == pytest.approx(1 / 2)  # 0.3 were held out


def test_an_export_loads_like_the_run_and_has_a_card(run, photos, tmp_path, capsys):
    assert main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0

    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"## {part}" in card for part in ("Use", "Data", "Settings", "Results", "Licence"))
    assert re.search(r"\| val/recall@1 \| \d\.\d{4} \|", card)
    paths = sorted((photos / "images").iterdir())
    ours, theirs = (Encoder.load(one).encode_images(paths) for one in (run, tmp_path / "out"))
    assert torch.equal(ours, theirs)
    assert main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 2
    assert main(["export", str(run), "--to", "huggingface"]) == 2
    assert (
        "--to huggingface must be given for a run with towers that transformers has"
        in capsys.readouterr().err
    )


def test_a_command_of_a_missing_extra_names_it(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['tyro'] = None; from diptych.__main__ import main; "
    script = hidden + "sys.exit(main(['search', 'x']))"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "it needs tyro: pip install 'diptych[recipes]'" in done.stderr
