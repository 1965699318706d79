"""What ``bench`` found, as plain values: one row for each file, number of threads and batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from byol_deploy.bench import Control
from byol_deploy.parity import Share

Status = Literal["passed", "failed", "not compared"]

SHOWN = {"passed": "PASS", "failed": "FAIL", "not compared": "not compared", "not run": "not run"}
_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True)
class ColdStart:
    """From nothing to the first result: medians over fresh processes, in milliseconds. Files were read before, so they
    come from the system's cache.

    Attributes:
        start_ms: Python, NumPy and byol-deploy's own code.
        import_ms: The import of the engine.
        load_ms: Opening the file.
        first_ms: The first result, of one image.
        starts: Number of processes.
    """

    start_ms: float
    import_ms: float
    load_ms: float
    first_ms: float
    starts: int

    @property
    def total_ms(self) -> float:
        """All four."""
        return self.start_ms + self.import_ms + self.load_ms + self.first_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "total_ms": self.total_ms}


@dataclass(frozen=True)
class Fidelity:
    """Whether a row computes what was trained, in the very process and condition that is timed.

    Attributes:
        status: "passed", "failed", or "not compared", which is no pass.
        reason: Why it did not pass.
        against: What it was compared with, and on what.
        output: The output that the numbers are of.
        rel_l2: Largest relative L2 error of an image; None where there is no number, as for the others.
        cosine_min: Smallest cosine of an image's vector with the reference.
        margin: Drift in distances between different images.
        neighbours: Share of images that keep their nearest neighbour.
    """

    status: Status
    reason: str = ""
    against: str = ""
    output: str = ""
    rel_l2: float | None = None
    cosine_min: float | None = None
    margin: float | None = None
    neighbours: Share | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        document = {name: value if not isinstance(value, float) or math.isfinite(value) else None
                    for name, value in vars(self).items()}  # fmt: skip
        return {**document, "neighbours": None if self.neighbours is None else self.neighbours.to_list()}


@dataclass(frozen=True)
class SpeedRow:
    """One file (or PyTorch itself) with one number of threads at one batch size.

    Attributes:
        name: Of the file; "PyTorch eager", "torch.compile" or "TorchScript" for a baseline.
        format: Its format; "pytorch" for a baseline.
        engine: What runs it, with its version.
        precision: "fp32", "fp16", "bf16", "int8"; empty where it is not known.
        threads: Threads inside an operator.
        batch: Images at once.
        baseline: Whether it is PyTorch and no file.
        not_run: Why it was not measured; empty where it was.
        calls: Calls that count; 0 where it was not measured.
        p50_ms: Median time of a call; None where it was not measured, as for all that follow.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; None for fewer than 100 calls, too.
        images_per_s: Images a second, at the median.
        ratio: Time in that of ``base`` with the same threads and batch, formed round by round.
        ratio_low: Lower end of its 95 % interval.
        ratio_high: Upper end.
        base: Name of the row that the ratio is to.
        cold: The cold start.
        peak_bytes: The most memory that a fresh process needs for batches up to this one.
        file_bytes: Size of the file with what belongs to it.
        fidelity: Whether it computes what was trained.
    """

    name: str
    format: str
    engine: str
    precision: str
    threads: int
    batch: int
    baseline: bool = False
    not_run: str = ""
    calls: int = 0
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    images_per_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    base: str = ""
    cold: ColdStart | None = None
    peak_bytes: int | None = None
    file_bytes: int | None = None
    fidelity: Fidelity = field(default_factory=lambda: Fidelity("not compared"))

    @property
    def status(self) -> str:
        """That of ``fidelity``, or "not run". Only "passed" is green, whatever the speed."""
        return "not run" if self.not_run else self.fidelity.status

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "status": self.status,
            "cold": None if self.cold is None else self.cold.to_dict(),
            "fidelity": self.fidelity.to_dict(),
        }


@dataclass(frozen=True)
class SpeedReport:
    """What :func:`byol_deploy.pipeline.benching.bench` found.

    Attributes:
        paths: What was measured.
        rows: By batch size, then threads, then file.
        control: The A/A control; None where it could not be measured.
        rounds: Rounds of the interleaved run.
        seconds: What the interleaved run took.
        budget_s: What it was allowed to take.
        images: What was timed on, in words.
        host: Where it was measured.
        empty_bytes: The most memory of a process that opens nothing; None where it is not known.
        warnings: What a reader must know before the numbers.
    """

    paths: tuple[str, ...]
    rows: tuple[SpeedRow, ...]
    control: Control | None
    rounds: int
    seconds: float
    budget_s: float
    images: str = ""
    host: Mapping[str, str] = field(default_factory=dict)
    empty_bytes: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def reliable(self) -> bool:
        """Whether the times can be trusted: the A/A control is within its tolerance."""
        return self.control is not None and self.control.within

    @property
    def passed(self) -> bool:
        """At least one row was compared and passed, and none failed."""
        states = [row.status for row in self.rows]
        return "passed" in states and "failed" not in states

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "paths": list(self.paths),
            "passed": self.passed,
            "reliable": self.reliable,
            "control": None if self.control is None else self.control.to_dict(),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "budget_s": self.budget_s,
            "rows": [row.to_dict() for row in self.rows],
            "images": self.images,
            "host": dict(self.host),
            "empty_bytes": self.empty_bytes,
            "warnings": list(self.warnings),
        }

    def table(self, *, colour: bool = False) -> str:
        """All rows as text; with ``colour`` those that failed are red and those that are no pass are not green."""
        base = next((row.base for row in self.rows if row.base), "")
        header = ["file", "prec.", "thr.", "batch", "p50/p90/p99 ms", f"in {base}" if base else "ratio", "images/s",
                  "start+import+load+first ms", "peak MB", "file MB", "rel L2", "margin", "neighbours", "cosine",
                  "fidelity"]  # fmt: skip
        lines = [header, *([*_cells(row)] for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        texts = []
        for place, line in enumerate(lines):
            cells = [
                cell.ljust(width) if column in (0, 1, len(header) - 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            text = "  ".join(cells).rstrip()
            red = colour and place and self.rows[place - 1].status == "failed"
            texts.append(f"{_RED}{text}{_PLAIN}" if red else text)
        return "\n".join(texts)

    def text(self, *, colour: bool = False) -> str:
        """The table, why rows failed or were not run, the control, and the warnings."""
        lines = [self.table(colour=colour), ""]
        for name, said in self.remarks():
            lines.append(f"{name}: {said}")
        lines.append(self.control_line())
        lines.append(self.truth_line())
        if self.empty_bytes:
            lines.append(f"a process that opens nothing has a peak of {megabytes(self.empty_bytes)} MB")
        lines += [f"WARNING {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def remarks(self) -> list[tuple[str, str]]:
        """Why rows failed, were not compared or were not run: each sentence once for each file."""
        said: dict[tuple[str, str], None] = {}
        for row in self.rows:
            reason = row.not_run or row.fidelity.reason
            if reason:
                said[row.name, f"{SHOWN[row.status]}: {reason}"] = None
        return list(said)

    def truth_line(self) -> str:
        """What the times were taken on, and what the rows were compared with."""
        truths = dict.fromkeys(row.fidelity.against for row in self.rows if row.fidelity.against)
        compared = f"compared with {'; '.join(truths)}" if truths else "compared with nothing"
        return f"timed on {self.images}; {compared}" if self.images else compared

    def control_line(self) -> str:
        """The control in a sentence."""
        if self.control is None:
            return "A/A control: not measured"
        found = self.control
        return (
            f"A/A control: {found.name}, opened twice, takes {found.ratio:.3f} times its own time (95 % interval "
            f"{found.low:.3f} to {found.high:.3f}, allowed 1 ± {found.tolerance:g}); {self.rounds} rounds in "
            f"{self.seconds:.0f} s"
        )


def _cells(row: SpeedRow) -> list[str]:
    cold, fidelity = row.cold, row.fidelity
    interval = ""
    if row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None and row.name != row.base:
        interval = f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"
    times = "/".join(map(milliseconds, (row.p50_ms, row.p90_ms, row.p99_ms))) if row.calls else "–"
    return [
        row.name,
        row.precision or "–",
        str(row.threads),
        str(row.batch),
        times,
        "–" if row.ratio is None else f"{row.ratio:.2f}{interval}",
        "–" if row.images_per_s is None else f"{row.images_per_s:,.0f}",
        "–" if cold is None else "+".join(
            f"{value:.0f}" if value >= 10 else f"{value:.1f}"
            for value in (cold.start_ms, cold.import_ms, cold.load_ms, cold.first_ms)
        ),
        megabytes(row.peak_bytes),
        megabytes(row.file_bytes),
        "–" if fidelity.rel_l2 is None else f"{fidelity.rel_l2:.1e}",
        "–" if fidelity.margin is None else f"{fidelity.margin:.2g}",
        "–" if fidelity.neighbours is None else f"{fidelity.neighbours.value:.1%}",
        cosine(fidelity.cosine_min),
        SHOWN[row.status],
    ]  # fmt: skip


def milliseconds(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(value: int | None) -> str:
    """In millions of bytes, three digits."""
    if value is None:
        return "–"
    return f"{value / 1e6:.0f}" if value >= 100e6 else f"{value / 1e6:.3g}"


def cosine(value: float | None) -> str:
    """Near 1 as the distance from it."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if value <= 0.999 else f"1-{max(1 - value, 0.0):.0e}"


def by_condition(rows: Sequence[SpeedRow]) -> list[SpeedRow]:
    """Rows that are compared with each other stand together; within, in the order given."""
    return sorted(rows, key=lambda row: (row.batch, row.threads))
