"""Real deployment faults, each really made, and who notices: byol-deploy beside the rules of its neighbours.

    pip install openvino onnxslim        # for two of the harmless variants
    python benchmarks/faults [--encoder NAME] [--only FAULT]

* `subject`: a trained encoder and the clean files that everything starts from;
* `modules`, `files`, `reduced`, `runtimes`: the faults, by the place where they happen;
* `harmless`: what must not be rejected;
* `judges`: who looks at a file, and what each said;
* `table`: the results as Markdown and JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults import files, harmless, modules, reduced, runtimes
from faults.judges import Judges
from faults.making import Case
from faults.subject import Subject

CASES: tuple[Case, ...] = (
    *modules.CASES,
    *files.CASES,
    *runtimes.CASES,
    *sorted(reduced.CASES, key=lambda case: case.harmless),
    *harmless.CASES,
)
"""Every fault and every harmless variant."""


def judge(case: Case, subject: Subject, judges: Judges, folder: Path) -> dict[str, Any] | None:
    """Make one case in an empty folder, and ask every judge.

    Returns:
        A row of the results; None where the encoder has no such part.
    """
    made = case.make(subject, folder)
    if made is None:
        return None
    verdicts = {**judges.ours(made), **judges.neighbours(made)}
    helped = judges.neighbours_helped(made)
    return {
        "encoder": subject.name,
        "case": case.name,
        "place": case.place,
        "what": case.what,
        "harmless": case.harmless,
        "on_merit": case.on_merit,
        "verdicts": {name: verdict.to_dict() for name, verdict in verdicts.items()},
        "helped": {name: verdict.to_dict() for name, verdict in helped.items()},
    }
