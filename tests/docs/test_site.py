"""The documentation builds without a warning."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORDS = """
callback; hook; AMP; autocast; GradScaler; DDP; DistributedDataParallel; torchrun; FSDP; ZeRO;
gradient accumulation; accumulate_grad_batches; out of memory; gradient checkpointing; freeze;
fine-tuning; fine-tune CLIP; LoRA; EMA; early stopping; patience; inference; predict; embeddings;
export; safetensors; sweep; Optuna; profiling; bottleneck; NaN; overfit one batch; fast_dev_run;
two optimizers; custom sampler; collate; log images; resume; Slurm; several nodes; warm-up;
scheduler; ReduceLROnPlateau; LR finder; clip_grad_norm_; weight decay; layer decay; torch.compile;
seed; distillation; multi-task; ModelCheckpoint; Weights & Biases; MLflow; metric;
transfer learning; manual optimization; max_steps; augmentation; Lightning; Hugging Face; open_clip;
lightly; Ignite; SigLIP; WebDataset; command line; locks; benchmarks
"""
"""What users of other trainers look for."""


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("ruff", reason="signatures are formatted by a development tool")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trainer" in (tmp_path / "api" / "engine" / "index.html").read_text("utf-8")
    handlers = (tmp_path / "api" / "handlers" / "index.html").read_text("utf-8")
    shown = " ".join(re.sub(r"<[^>]+>", "", handlers).split())
    # What attrs makes and what a docstring says of events are for griffe to be told.
    assert "GradientClipping( *, max_norm: float | None = None" in shown
    assert "Evaluation( loader: Iterable[Any], *, metrics: Metrics = ()" in shown
    assert "loss: bool = ..., )" in shown
    assert "<strong>Event:</strong>" in handlers
    index = json.loads((tmp_path / "search" / "search_index.json").read_text("utf-8"))
    titles = [html.unescape(re.sub(r"<[^>]+>", "", one["title"])).lower() for one in index["docs"]]
    words = [word.strip().lower() for word in WORDS.replace("\n", " ").split(";")]
    assert [word for word in words if not any(word in title for title in titles)] == []
    losses = (tmp_path / "api" / "losses" / "index.html").read_text("utf-8")
    assert losses.index("Symmetric InfoNCE") < losses.index('id="diptych.losses.CLIPLoss"')
