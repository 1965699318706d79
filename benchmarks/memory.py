"""Peak memory of training the demo's model and of embedding with it.

    python benchmarks/memory.py [--recipe models/fashion-mnist/recipe.yaml] [--bundle models/fashion-mnist/bundle]

Each of the two runs in processes of its own, and what is measured is their resident memory, sampled every 20 ms:

* training: `byol-deploy train` on the 8,000 PNG files that the demo trains on, one epoch; the sum over the process and
  all its loader workers. Pages that processes share count in each of them, so the sum is an upper bound. Where the
  kernel offers it, the proportional set size (each shared page divided among its users) is stated beside it.
* embedding: an `Encoder` on 500 PNG files; the kernel's own high-water mark, which no sampling can miss.

Linux only: the numbers come from /proc. The exit code is 1 when a limit is broken.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from byol_deploy.bundle import Bundle
from byol_deploy.runtime import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PACKED = ROOT / "byol_deploy" / "data" / "fashion-mnist"
TRAINING_LIMIT = 3e9
EMBEDDING_LIMIT = 200e6
EVERY_S = 0.02
EVERY_PROPORTIONAL_S = 1.0

TRAIN = "from byol_deploy.cli.main import main; main()"
EMBED = """
import sys
from pathlib import Path
from byol_deploy import Encoder
images = sorted(Path(sys.argv[2]).rglob("*.png"))
found = Encoder(sys.argv[1])(images)
assert len(found) == len(images), (len(found), len(images))
loaded = {"torch", "lightning", "onnx"} & set(sys.modules)
assert not loaded, loaded
"""


@dataclass
class Peak:
    """What was seen of a command: bytes, number of processes at the peak, seconds."""

    high_water: int = 0
    together: int = 0
    processes: int = 0
    proportional: int = 0
    took_s: float = 0.0


def field(pid: int, file: str, name: str) -> int:
    """A kB field of /proc/PID/FILE in bytes; 0 when the process is gone, or does not say."""
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def family(pid: int) -> list[int]:
    """The process and everything that it started."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # The name in brackets may hold anything, spaces too: the parent is the second field after it.
                stat = Path(f"/proc/{entry}/stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
            except (OSError, ValueError, IndexError):
                continue
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def watch(command: Sequence[str]) -> Peak:
    """Run a command to its end and note its peak; a command that fails ends the benchmark."""
    peak = Peak()
    began = time.monotonic()
    measured = 0.0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            members = family(process.pid)
            together = sum(field(pid, "status", "VmRSS") for pid in members)
            if together > peak.together:
                peak.together, peak.processes = together, len(members)
            peak.high_water = max(peak.high_water, field(process.pid, "status", "VmHWM"))
            # The kernel walks every page for it, which slows the command down: seldom.
            if time.monotonic() - measured > EVERY_PROPORTIONAL_S:
                measured = time.monotonic()
                proportional = sum(field(pid, "smaps_rollup", "Pss") for pid in members)
                peak.proportional = max(peak.proportional, proportional)
            time.sleep(EVERY_S)
        peak.took_s = time.monotonic() - began
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command[:4])} ... failed:\n{said.read().decode(errors='replace')}")
    return peak


def embedding_peak(bundle: Path, images: Path) -> Peak:
    """The same for the embedding process, whose high-water mark it reports itself, when everything is done."""
    ask = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", EMBED + ask, str(bundle), str(images)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"embedding failed:\n{done.stderr}")
    return Peak(high_water=1024 * int(done.stdout.split()[-1]), processes=1, took_s=time.monotonic() - began)


def write_images(root: Path, chosen: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
    for place in chosen.tolist():
        folder = root / f"class-{labels[place]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[place]).save(folder / f"{place:05d}.png")


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(images, labels, training places, test places): 80 to 20 in each class, by lot."""
    images = np.frombuffer(gzip.decompress((PACKED / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((PACKED / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    random = np.random.default_rng(0)
    drawn = [random.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    train = np.concatenate([places[: len(places) * 4 // 5] for places in drawn])
    test = np.concatenate([places[len(places) * 4 // 5 :] for places in drawn])
    return images.reshape(-1, 28, 28), labels, train, test


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "models" / "fashion-mnist" / "recipe.yaml")
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "fashion-mnist" / "bundle")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.md")
    parser.add_argument("--train-images", type=int, default=8000, help="fewer only to try the script out")
    parser.add_argument("--embed-images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    if sys.platform != "linux":
        sys.exit(f"this reads /proc, which {sys.platform} does not have; run it on Linux")
    if not options.recipe.is_file():
        sys.exit(f"{options.recipe} does not exist; name the recipe with --recipe")
    manifest = Bundle.open(options.bundle).manifest

    images, labels, train, test = split()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "train", train[: options.train_images], images, labels)
        write_images(
            folder / "test", np.random.default_rng(0).permutation(test)[: options.embed_images], images, labels
        )
        trained = sum(1 for _ in (folder / "train").rglob("*.png"))
        embedded = sum(1 for _ in (folder / "test").rglob("*.png"))
        embedding = embedding_peak(options.bundle, folder / "test")
        print(f"embedding {embedded} images: {embedding.high_water / 1e6:.0f} MB", flush=True)
        command = [sys.executable, "-c", TRAIN, "train", str(folder / "train"), "--recipe", str(options.recipe)]
        command += ["--epochs", str(options.epochs), "--out", str(folder / "run")]
        training = watch(command)
        print(f"training on {trained} images: {training.together / 1e9:.2f} GB", flush=True)

    peak = max(training.together, training.high_water)
    shared = f"{training.proportional / 1e9:.2f} GB" if training.proportional else "not offered by this kernel"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "numpy", "pillow"))
    import onnxruntime

    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) * 1024
    model = f"{manifest.model.backbone}, {manifest.preprocessing.size_px} px"
    lines = (
        (f"`byol-deploy train`, {trained:,} images, {options.epochs} epoch(s)", training.took_s, peak, TRAINING_LIMIT),
        (f"`Encoder`, {embedded:,} images", embedding.took_s, embedding.high_water, EMBEDDING_LIMIT),
    )
    rows = "\n".join(
        f"| {what}, {took_s:.0f} s | {found / 1e6:,.0f} MB | {limit / 1e6:,.0f} MB | "
        f"{'kept' if found <= limit else 'BROKEN'} |"
        for what, took_s, found, limit in lines
    )
    text = f"""# Peak memory

`python benchmarks/memory.py`, {datetime.now(UTC):%Y-%m-%d}

{processor()}, {usable_cores()} usable cores, {memory / 1e9:.0f} GB of memory, {platform.system()} {platform.machine()};
Python {platform.python_version()}, {packages}, onnxruntime {onnxruntime.__version__}. 1 MB is 10^6 bytes.

| what | peak resident memory | limit | |
|---|---:|---:|---|
{rows}

Model: {model}, {manifest.model.parameters:,} parameters in the graph.
Training counts the process and everything that it started (at the peak {training.processes} in all), sampled every
{1000 * EVERY_S:.0f} ms; pages that they share are counted in each. Counted once: {shared}. The training process alone:
{training.high_water / 1e9:.2f} GB. Embedding is the kernel's high-water mark of a process that loads no PyTorch.
"""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(1 if any(found > limit for _, _, found, limit in lines) else 0)


if __name__ == "__main__":
    main()
