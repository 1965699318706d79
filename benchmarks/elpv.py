"""The industrial-inspection walk-through on ELPV: 2,624 electroluminescence photographs of solar cells.

Sorts the images of the installed package ``elpv-dataset`` into two class folders (as links: no pixel is copied), then
runs the commands of docs/industrial-inspection.md one after another and records what they print.

    pip install elpv-dataset==1.0.0.post1
    python benchmarks/elpv.py --work elpv-work

The data are CC-BY-NC-SA-4.0: nothing that this writes below ``--work`` (images, weights, bundle) belongs in a
repository. Only the printed session does; it goes to benchmarks/results/elpv-session.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COMMANDS = (
    "byol-deploy train elpv/ --backbone resnet18 --image-size 96 --epochs {epochs} --out elpv-run",
    "byol-deploy export elpv-run --format onnx --format torchscript --data elpv/ --out elpv-bundle",
    "byol-deploy verify elpv-bundle --against elpv-run --data elpv/",
    "byol-deploy evaluate elpv-bundle elpv/",
    "byol-deploy inspect elpv-bundle",
)


def sort_into_classes(target: Path, data: Path | None) -> None:
    """Link every photograph into target/defective (probability of a defect >= 0.5) or target/functional."""
    if data is None:
        package = importlib.util.find_spec("elpv_dataset")
        if package is None or package.origin is None:
            sys.exit("elpv-dataset is not installed; run: pip install elpv-dataset==1.0.0.post1")
        data = Path(package.origin).parent / "data"
    for line in (data / "labels.csv").read_text().splitlines():
        path, probability, _kind = line.split()
        folder = target / ("defective" if float(probability) >= 0.5 else "functional")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(path).name).symlink_to(data / path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for everything that is made")
    parser.add_argument("--data", type=Path, help="folder with labels.csv and images/ (default: the installed package)")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    options.work.mkdir(parents=True)
    sort_into_classes(options.work / "elpv", options.data and options.data.resolve())
    session = []
    for template in COMMANDS:
        command = template.format(epochs=options.epochs)
        began = time.monotonic()
        program = f"{sys.executable} -c 'from byol_deploy.cli.main import main; main()'"
        words = shlex.split(command.replace("byol-deploy", program, 1))
        done = subprocess.run(words, cwd=options.work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        took_s = time.monotonic() - began
        session.append(f"$ {command}\n{done.stdout.rstrip()}\n# exit code {done.returncode}, {took_s:.0f} s\n")
        print(session[-1], flush=True)
        if done.returncode:
            sys.exit(done.returncode)
    text = "\n".join(session).replace(str(options.work.resolve()) + "/", "")
    (RESULTS / "elpv-session.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
