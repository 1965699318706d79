"""What may stand on a page, as plain values in small frozen objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from byol_deploy.parity import FidelityLimit, ParityReport, ParityRow

Fact = tuple[str, str | Sequence[str]]
"""A key and its value; a list of values is folded behind its length."""

CheckRow = tuple[str, bool, str]
"""A yes-or-no check: its name, whether it passed, and the numbers or names behind it."""


@dataclass(frozen=True)
class ResultRow:
    """One encoder, or one file of it, in the table of results.

    Attributes:
        name: What was measured.
        knn: Accuracy of the nearest-neighbour vote, 0 to 1; None where it was not measured, as for all the numbers.
        knn_se: Its standard error.
        probe: Accuracy of the linear probe, 0 to 1.
        probe_se: Its standard error.
        agreement: Share of images whose nearest neighbour is the trained model's, 0 to 1.
        latency_ms: Median time for one image.
        note: A remark.
    """

    name: str
    knn: float | None = None
    knn_se: float | None = None
    probe: float | None = None
    probe_se: float | None = None
    agreement: float | None = None
    latency_ms: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ParityBlock:
    """One written file and how it compares with the trained model.

    Attributes:
        artefact: Name of the file.
        format: e.g. "onnx".
        precision: e.g. "fp32"; empty where it is not known.
        bytes: Size, with the files that belong to it; 0 where it is not known.
        report: The comparison.
        note: A sentence below the table, such as whose parameters the file holds.
        fault: What speaks against the file beside the comparison; empty where nothing does. A fault is a FAIL.
        not_run: Why the file was not compared here; empty where it was. No pass, and no FAIL of the page either as
            long as another file was compared and passed.
    """

    artefact: str
    format: str
    precision: str
    bytes: int
    report: ParityReport
    note: str = ""
    fault: str = ""
    not_run: str = ""

    @property
    def status(self) -> str:
        """``pass``, ``fail`` or ``not run``; ``warn`` for a pass with warnings."""
        if self.not_run:
            return "not run"
        if self.fault or not self.report.passed:
            return "fail"
        return "warn" if self.report.warnings else "pass"

    @property
    def failures(self) -> list[str]:
        """Why it did not pass: one sentence for each output and kind of failure."""
        if self.status != "fail":
            return []
        said = [self.fault] if self.fault else []
        if not self.report.rows:
            return [*said, *self.report.failures]
        kinds: dict[tuple[str, str], list[ParityRow]] = {}
        for row in self.report.rows:
            if not row.passed:
                kinds.setdefault((row.output, re.sub(r"\d[\d.e+-]*", "", row.reason)), []).append(row)
        # 28 comparisons of one bad file say one thing 28 times: the worst of those that differ in numbers only.
        for rows in sorted(kinds.values(), key=lambda rows: -max(row.severity for row in rows)):
            worst = max(rows, key=lambda row: row.severity)
            more = f" (the worst of {len(rows)} like it)" if len(rows) > 1 else ""
            said.append(f"{worst.subject.removeprefix(f'{self.artefact}, ')}: {worst.output}: {worst.reason}{more}")
        return said

    def shown_rows(self) -> list[ParityRow]:
        """For each output its worst row: what a reader sees before unfolding all.

        Unlike :meth:`byol_deploy.parity.ParityReport.worst` a number stays beside the limit that it was held to: margin
        and neighbours come from this row, or where it has none from the comparison of the most images, the one that
        is asked for them.
        """
        outputs: dict[str, list[ParityRow]] = {}
        for row in self.report.rows:
            outputs.setdefault(row.output, []).append(row)
        return [_with_neighbours(rows) for rows in outputs.values()]


def _with_neighbours(rows: Sequence[ParityRow]) -> ParityRow:
    worst = max(rows, key=lambda row: (not row.passed, row.severity))
    telling = [row for row in rows if row.neighbours is not None]
    if not telling:
        return worst
    most = max(telling, key=lambda row: (row.n, -(row.neighbour_agreement or 0.0)))
    margin, limit = worst.margin, worst.limit
    if margin is None:
        margin = most.margin
    if isinstance(limit, FidelityLimit) and isinstance(most.limit, FidelityLimit):
        limit = replace(limit, agreement=most.limit.agreement)
    return replace(worst, margin=margin, limit=limit, neighbours=most.neighbours, overlap=most.overlap)


@dataclass(frozen=True, eq=False)
class DriftBlock:
    """How a file's difference from the trained model grows along the graph.

    Attributes:
        name: Name of the file.
        series: As :func:`byol_deploy.drawing.draw_drift` takes it: ``names``, ``drift``, ``noise`` and ``budget``.
        verdict: A sentence that names the layer.
    """

    name: str
    series: Mapping[str, Sequence[Any]]
    verdict: str = ""
