"""Killed at any moment, nothing half-written is taken for whole and the next run starts cleanly.

Training's own kill test is in tests/training/. Here: export and embedding, killed by SIGKILL at many moments.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from byol_deploy import Bundle, Encoder

CALL = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()"]


pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")


def bytes_below(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += (Path(root) / name).stat().st_size
            except OSError:  # renamed meanwhile
                continue
    return total


def kill_when_written(call: list[str], folder: Path, more_than: int, timeout_s: float = 120) -> bool:
    """Start ``call``, SIGKILL it once ``folder`` holds more than ``more_than`` bytes. Returns: killed in time."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        if bytes_below(folder) > more_than:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    process.kill()
    process.wait()
    return False


def test_export_killed_leaves_the_old_bundle_and_the_next_run_cleans_up(
    tiny_run: Path, fashion: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    shutil.copytree(tiny_bundle, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    size = bytes_below(tmp_path)
    call = [
        *CALL,
        "export",
        str(tiny_run / "checkpoints" / "last.ckpt"),
        "--format",
        "onnx",
        "--data",
        str(fashion),
        "--out",
        str(out),
    ]

    killed = kill_when_written(call, tmp_path, size + 1000)

    assert killed, "the export ended before it wrote anything beside its target"
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    Bundle.open(out)
    assert len(list(tmp_path.iterdir())) > 1, "nothing was half-written: the kill came too early to show anything"
    subprocess.run(call, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"], "leftovers of the killed run were not removed"
    assert Encoder(out)(next(fashion.rglob("*.png"))).shape[0] == 1


def test_embed_killed_leaves_no_file_that_looks_whole(tiny_bundle: Path, fashion: Path, tmp_path: Path) -> None:
    out = tmp_path / "embeddings.npy"
    call = [*CALL, "embed", str(tiny_bundle), str(fashion), "--out", str(out), "--batch-size", "1"]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not out.exists()
    subprocess.run(call, check=True, capture_output=True)
    assert np.load(out, allow_pickle=False).shape[0] == 400
    assert all(".partial" not in path.name and not path.name.startswith(".") for path in tmp_path.iterdir())
