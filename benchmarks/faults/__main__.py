"""See the package's docstring. Results are merged: a part that is run again replaces its rows."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import encoders
from machine import machine

from faults import CASES, judge
from faults.judges import OURS, Judges
from faults.subject import Subject
from faults.table import as_markdown

RESULTS = Path(__file__).parents[1] / "results" / "faults.md"
NAMES = tuple(encoders.ENCODERS)


def main() -> int:
    parser = argparse.ArgumentParser(description="Real deployment faults, and who notices")
    parser.add_argument("--encoder", choices=NAMES, help="judge one encoder's files")
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="judge one case again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = arguments.out.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.exists() else []
    here = machine()
    for name in NAMES:
        if arguments.encoder not in (None, name):
            continue
        images = encoders.images()
        subject = Subject.open(
            name, encoders.trained(name), images / "test", images / "train", encoders.OUT.parent / "faults" / name
        )
        judges = Judges(subject)
        for case in CASES:
            if arguments.only and case.name not in arguments.only:
                continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's exporters; what counts is in the verdicts
                row = judge(case, subject, judges, Path(folder))
            rows = [old for old in rows if (old["encoder"], old["case"]) != (name, case.name)]
            if row is not None:
                rows.append(row)
                ours = row["verdicts"][OURS]
                print(f"{name}, {case.name}: {ours['mark']} ({time.perf_counter() - start:.0f} s) "
                      f"{ours['reason'][:160]}", file=sys.stderr, flush=True)  # fmt: skip
            order = {case.name: place for place, case in enumerate(CASES)}
            rows = [old for old in rows if old["case"] in order]
            rows.sort(key=lambda old: (order[old["case"]], NAMES.index(old["encoder"])))
            results.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            arguments.out.write_text(as_markdown(rows, NAMES, here), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
