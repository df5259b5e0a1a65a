"""Print versions and devices: what a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from diptych.version import __version__

REQUIRED = ("pytorch-ignite", "numpy", "attrs", "tensorboard")
EXTRAS = {
    "images": "pillow",
    "plots": "matplotlib",
    "safetensors": "safetensors",
    "recipes": "tyro",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "clearml": "clearml",
    "transformers": "transformers",
    "open-clip": "open_clip_torch",
    "timm": "timm",
    "peft": "peft",
    "onnx": "onnx",
    "kornia": "kornia",
}
"""The package that each extra installs."""
MISSING = "not installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what to do with the output; the command takes no arguments."""
    parser.epilog = "Paste the whole output into a bug report."


def run(_: argparse.Namespace) -> int:
    """Print the table."""
    sections = {"": [*_versions()], "devices": [*_devices()], "extras": [*_extras()]}
    rows = [row for section in sections.values() for row in section]
    width = max(len(name) for name, _ in rows)
    for title, section in sections.items():
        lines = [f"{name:<{width}}  {value}\n" for name, value in section]
        sys.stdout.write("".join([f"\n{title}\n" if title else "", *lines]))
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    yield "diptych", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", str(torch.__version__)
    yield "CUDA", _cuda()
    for package in (*REQUIRED, "triton"):
        yield package, _version(package) or MISSING


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none: torch is built without it"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "unknown"
    return f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory, capability = device.total_memory / 2**30, f"{device.major}.{device.minor}"
        yield f"cuda:{index}", f"{device.name}, {memory:.0f} GiB, compute capability {capability}"
    if torch.backends.mps.is_available():
        yield "mps", platform.processor()


def _extras() -> Iterator[tuple[str, str]]:
    for extra, package in EXTRAS.items():
        version = _version(package)
        yield extra, f"{package} {version}" if version else MISSING


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
