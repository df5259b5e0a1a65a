"""Take the pictures of a run for the documentation: TensorBoard's overview, and the report.

    python -m examples.emoji.train
    python -m examples.emoji.screens runs/emoji/2026-01-31_09-30-00Z

Needs Chromium or Chrome, and the extra `images`. Takes half a minute, and writes
`docs/guide/pictures/tensorboard.png` and `report.png`.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "guide" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OVERVIEW = "#custom_scalars&_smoothingWeight=0"
WIDTH, HEIGHT = 1100, 1400
COLORS = 256  # of a picture, which is half as large as one with all of them
PATIENCE = 60  # seconds that TensorBoard may take to start


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description="Take the pictures of a run.")
    parser.add_argument("run", type=Path, help="the run directory")
    run = parser.parse_args().run.resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(
            f"One of {', '.join(BROWSERS)} must be on the PATH, got none. Install one."
        )
    screenshot(browser, (run / "report.html").as_uri(), PICTURES / "report.png")
    with tensorboard(run) as address:
        screenshot(browser, f"{address}/{OVERVIEW}", PICTURES / "tensorboard.png")


@contextmanager
def tensorboard(run: Path) -> Iterator[str]:
    """Serve a run alone in TensorBoard, and provide the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as root:
        for file in run.rglob("events.out.*"):
            copy = Path(root, "runs", *run.parts[-2:], file.relative_to(run))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir=runs", f"--port={port}"]
        with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as server:  # noqa: S603
            address = f"http://127.0.0.1:{port}"
            try:
                wait_for(f"{address}/data/plugin/custom_scalars/layout")
                yield address
            finally:
                server.terminate()


def wait_for(address: str) -> None:
    """Wait until an address answers with more than an empty object.

    Raises:
        TimeoutError: if it does not.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address) as answer:  # noqa: S310 - of this machine
                if len(answer.read()) > len("{}"):
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{address} must answer within {PATIENCE} s, got nothing.")


def screenshot(browser: str, address: str, path: Path) -> None:
    """Write the first screen of an address as a PNG of few colours."""
    with TemporaryDirectory() as folder:
        shot = Path(folder, "shot.png")
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{HEIGHT}",
            "--virtual-time-budget=15000",
            f"--screenshot={shot}",
            address,
        ]
        subprocess.run(  # noqa: S603
            command, check=True, stderr=subprocess.DEVNULL, timeout=PATIENCE
        )
        with Image.open(shot) as picture:
            picture.convert("RGB").quantize(COLORS).save(path, optimize=True)


if __name__ == "__main__":
    main()
