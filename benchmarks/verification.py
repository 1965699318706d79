"""What proving costs: the default verification of a ResNet-50 export, and the self-test of a ResNet-18 on the device.

    python benchmarks/verification.py [--repeats 3] [--out benchmarks/results/verification.md]

Both are whole commands in fresh processes, interpreter start and imports included: `byol-deploy verify BUNDLE --against
CHECKPOINT` with all defaults, and `byol-deploy verify model.onnx` on a lone file, without PyTorch. The encoders are
untrained in which every parameter matters (benchmarks/backbones.py): their values do not change the work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from backbones import Entry, lively_model
from machine import machine

import byol_deploy
from byol_deploy.runtime import usable_cores

LIMITS_S = {"ResNet-50, against its checkpoint": 60.0, "ResNet-18, self-test of the lone file": 3.0}
# The command as it is installed, with PyTorch out of reach: as on a device.
_WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from byol_deploy.cli.main import main; main()"
_COMMAND = "from byol_deploy.cli.main import main; main()"


def checkpoint(name: str, size_px: int, path: Path) -> Path:
    """A checkpoint of ours of an untrained but lively model."""
    loaded = lively_model(name, Entry(size_px))
    assert loaded.recipe is not None
    assert loaded.preprocessing is not None
    own = {
        "schema": 1,
        "version": byol_deploy.__version__,
        "recipe": loaded.recipe.to_dict(),
        "preprocessing": loaded.preprocessing.to_dict(),
    }
    torch.save({"state_dict": loaded.model.state_dict(), "byol_deploy": own, "global_step": 1, "epoch": 0}, path)
    return path


def seconds(code: str, *words: object) -> float:
    """Wall time of a command in a fresh process, which must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=environment
    )
    took = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{words} failed with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return took


def measure(repeats: int, folder: Path) -> list[dict[str, Any]]:
    fifty = checkpoint("timm/resnet50", 224, folder / "resnet50.ckpt")
    eighteen = checkpoint("timm/resnet18", 224, folder / "resnet18.ckpt")
    export = [seconds(_COMMAND, "export", fifty, "--out", folder / "fifty")]
    seconds(_COMMAND, "export", eighteen, "--out", folder / "eighteen")
    timed = {
        "ResNet-50, against its checkpoint": (_COMMAND, "verify", folder / "fifty", "--against", fifty),
        "ResNet-18, self-test of the lone file": (_WITHOUT_TORCH, "verify", folder / "eighteen" / "model.onnx"),
    }
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, command in timed.items():
            times[name].append(seconds(*command))
    rows = [{"what": name, "seconds": taken, "limit_s": LIMITS_S[name]} for name, taken in times.items()]
    return [*rows, {"what": "ResNet-50, export to ONNX, for comparison", "seconds": export, "limit_s": None}]


def as_markdown(rows: list[dict[str, Any]], here: dict[str, Any]) -> str:
    lines = [
        "# What proving costs",
        "",
        f"Written by `python benchmarks/verification.py` on {here['date']}. {here['cpu']}, {here['cores']} cores, "
        f"{here['system']}; Python {here['python']}, PyTorch {here['torch']}, ONNX Runtime {here['onnxruntime']}.",
        "",
        "Whole commands in fresh processes, interpreter start and imports included; 224 px; default options. The "
        "self-test runs without PyTorch.",
        "",
        "| what | runs | median s | slowest s | asked s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        taken = row["seconds"]
        limit = "–" if row["limit_s"] is None else f"below {row['limit_s']:g}"
        lines.append(f"| {row['what']} | {len(taken)} | {statistics.median(taken):.1f} | {max(taken):.1f} | {limit} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "verification.md")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.repeats, Path(folder))
    text = as_markdown(rows, machine())
    print(text)
    arguments.out.write_text(text, encoding="utf-8")
    return 0 if all(row["limit_s"] is None or max(row["seconds"]) < row["limit_s"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
