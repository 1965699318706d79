"""Verdicts: one row per output and comparison, and the report over them. Passed only when something was compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from byol_deploy.parity.limits import NOISE_MULTIPLE, AnyLimit, FidelityLimit, Limit
from byol_deploy.parity.measures import FEWEST_FOR_NEIGHBOURS, FEWEST_FOR_OVERLAP, Share

_OPTIONAL = ("sqnr_db", "centred_cosine_min", "margin")
_SHOWN_FAILURES = 6
_NUMBERS = ("max_abs", "rel_l2", "tolerance", "severity", "cosine_min", "cosine_p1", "cosine_mean")


@dataclass(frozen=True)
class ParityRow:
    """One output in one comparison.

    Attributes:
        subject: What was compared, e.g. ``model.onnx, real images, batch 7``.
        output: Name of the output.
        n: Number of images.
        max_abs: Largest absolute difference of two numbers.
        rel_l2: |actual - expected| / |expected| of the worst image: the one that comes nearest to its limit, or lies
            farthest beyond.
        tolerance: The smallest relative L2 tolerance that would have passed all images: the largest of their errors.
        severity: The error in limits: above 1 fails; infinite where nothing could be compared.
        sqnr_db: Signal to noise over all images, in decibels; None where there is no difference.
        cosine_min: Smallest cosine of an image's vector with its reference.
        cosine_p1: 1st percentile of these cosines.
        cosine_mean: Their mean.
        centred_cosine_min: The smallest after each side's mean vector was subtracted; None for one image or where
            the vectors are all alike.
        margin: Drift in distances between different images; None for fewer than 3 images.
        neighbours: Share of images whose nearest neighbour is the same; None for fewer than 8 images.
        overlap: Share of the ten nearest neighbours that are the same; None for fewer than 30 images.
        limit: What was allowed: a :class:`Limit` of the worst image, or a :class:`FidelityLimit`; None when there was
            nothing to compare with.
        image: Position of the worst image; None where nothing could be compared.
        passed: The verdict.
        reason: Why it did not pass; empty when it did.
    """

    subject: str
    output: str
    n: int
    max_abs: float
    rel_l2: float
    tolerance: float
    severity: float
    sqnr_db: float | None
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    centred_cosine_min: float | None
    margin: float | None
    neighbours: Share | None
    overlap: Share | None
    limit: AnyLimit | None
    image: int | None
    passed: bool
    reason: str = ""

    @property
    def neighbour_agreement(self) -> float | None:
        """``neighbours`` without its interval."""
        return None if self.neighbours is None else self.neighbours.value

    @property
    def floors(self) -> float | None:
        """The smallest tolerance that would have passed, in noise floors of each image; None without a noise floor."""
        known = isinstance(self.limit, Limit) and self.limit.noise_rel_l2 > 0 and math.isfinite(self.severity)
        return self.severity * NOISE_MULTIPLE if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        document = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name, value in document.items():
            if isinstance(value, float) and not math.isfinite(value):
                document[name] = None
            elif isinstance(value, Share):
                document[name] = value.to_list()
        document["limit"] = None if self.limit is None else self.limit.to_dict()
        return document

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParityRow:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: A key is missing or unknown, or a value has the wrong type.
        """
        names = {spec.name for spec in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise ValueError(f"a row of a parity report must have exactly the keys {', '.join(sorted(names))}")
        values = dict(data)
        for name in _NUMBERS:
            values[name] = math.nan if values[name] is None else _number(name, values[name])
        if math.isnan(values["severity"]):
            values["severity"] = math.inf
        for name in _OPTIONAL:
            values[name] = None if values[name] is None else _number(name, values[name])
        for name in ("neighbours", "overlap"):
            values[name] = None if values[name] is None else Share.from_list(values[name])
        for name, kind in (("subject", str), ("output", str), ("reason", str), ("n", int), ("passed", bool)):
            if not isinstance(values[name], kind):
                raise ValueError(f"{name} is {values[name]!r}; it must be of type {kind.__name__}")
        if values["image"] is not None and (not isinstance(values["image"], int) or isinstance(values["image"], bool)):
            raise ValueError(f"image is {values['image']!r}; it must be a position")
        if values["limit"] is not None:
            fidelity = isinstance(values["limit"], Mapping) and "margin" in values["limit"]
            values["limit"] = (FidelityLimit if fidelity else Limit).from_dict(values["limit"])
        return cls(**values)


@dataclass(frozen=True)
class ParityReport:
    """The verdict over some comparisons: passed when there is at least one row and every row passed.

    Attributes:
        rows: One per output and comparison.
        warnings: What a reader should know although it is no difference, such as a collapsed encoder.
    """

    rows: tuple[ParityRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing compared means not passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """One sentence for each row that did not pass."""
        if not self.rows:
            return ["nothing was compared"]
        return [f"{row.subject}: {row.output}: {row.reason}" for row in self.rows if not row.passed]

    def worst(self) -> list[ParityRow]:
        """For each output the row that comes nearest to its limit, or is farthest beyond.

        What only larger comparisons can say (neighbours, overlap, margin) is filled in from the worst of them.
        """
        outputs: dict[str, list[ParityRow]] = {}
        for row in self.rows:
            outputs.setdefault(row.output, []).append(row)
        found = []
        for rows in outputs.values():
            worst = max(rows, key=lambda row: (not row.passed, row.severity))
            # A margin belongs to its limit: awkward images are held to a wider one than real ones.
            alike = [row for row in rows if not isinstance(row.limit, FidelityLimit) or row.limit == worst.limit]
            margin = max((row.margin for row in alike if row.margin is not None), default=None)
            near, ten = _least(row.neighbours for row in rows), _least(row.overlap for row in rows)
            found.append(replace(worst, margin=margin, neighbours=near, overlap=ten))
        return found

    @property
    def left_out(self) -> tuple[str, ...]:
        """Which statistics could not be formed because there were too few images, and how many they need."""
        most = max((row.n for row in self.rows), default=0)
        said = []
        if self.rows and most < FEWEST_FOR_NEIGHBOURS:
            said.append(f"agreement of nearest neighbours needs {FEWEST_FOR_NEIGHBOURS} images")
        if self.rows and most < FEWEST_FOR_OVERLAP:
            said.append(f"overlap of ten neighbours needs {FEWEST_FOR_OVERLAP} images")
        return (f"left out, with {most} images at most: {'; '.join(said)}",) if said else ()

    @classmethod
    def merged(cls, reports: Iterable[ParityReport]) -> ParityReport:
        """All rows and warnings in one report, each warning once."""
        listed = list(reports)
        return cls(
            tuple(row for report in listed for row in report.rows),
            tuple(dict.fromkeys(warning for report in listed for warning in report.warnings)),
        )

    def with_warnings(self, warnings: Iterable[str]) -> ParityReport:
        """A copy that also carries ``warnings``."""
        return replace(self, warnings=tuple(dict.fromkeys([*self.warnings, *warnings])))

    def to_dict(self) -> dict[str, Any]:
        """``{"passed", "rows", "warnings"}`` as plain JSON values."""
        return {
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParityReport:
        """Read what :meth:`to_dict` wrote; the verdict is formed anew from the rows.

        Raises:
            ValueError: It is not such a document, or its verdict contradicts its rows.
        """
        if not isinstance(data, Mapping) or set(data) != {"passed", "rows", "warnings"}:
            raise ValueError("a parity report must have exactly the keys passed, rows and warnings")
        if not isinstance(data["rows"], list) or not isinstance(data["warnings"], list):
            raise ValueError("rows and warnings of a parity report must be lists")
        made = cls(
            tuple(ParityRow.from_dict(row) for row in data["rows"]), tuple(str(item) for item in data["warnings"])
        )
        if data["passed"] is not made.passed:
            raise ValueError(f"a parity report says passed={data['passed']!r}, but its rows say {made.passed}")
        return made

    def table(self, *, all_rows: bool = False) -> str:
        """The verdict as text: for each output its worst row, or all rows; then failures and warnings."""
        shown = list(self.rows) if all_rows else self.worst()
        lines = [_cells(row, all_rows) for row in shown]
        texts = _columns([[*(["compared"] if all_rows else []), *_HEADER], *lines]) if lines else []
        if not all_rows and len(self.rows) > len(lines) > 0:
            texts.append(f"for each output the worst of its comparisons, {len(self.rows)} in all")
        texts += self.left_out
        if not self.passed:
            texts += [f"FAIL {failure}" for failure in self.failures[:_SHOWN_FAILURES]]
            more = len(self.failures) - _SHOWN_FAILURES
            texts += [f"and {more} more comparisons that failed"] if more > 0 else []
        texts += [f"WARNING {warning}" for warning in self.warnings]
        return "\n".join(texts)


_HEADER = (
    "output", "n", "max abs", "rel L2", "limit", "passes from", "SQNR", "cosine min", "1%", "mean", "centred", "margin",
    "same neighbour", "same ten", "verdict",
)  # fmt: skip


def _cells(row: ParityRow, with_subject: bool) -> list[str]:
    limit = row.limit
    allowed = "–" if limit is None else short(limit.rel_l2) if isinstance(limit, Limit) else f"margin {limit.margin:g}"
    passes_from = "–" if row.floors is None else f"{row.floors:.2g} floors"
    cells = [
        row.output,
        str(row.n),
        short(row.max_abs),
        short(row.rel_l2),
        allowed,
        passes_from if isinstance(limit, Limit) and row.floors is not None else short(row.tolerance),
        "–" if row.sqnr_db is None else f"{row.sqnr_db:.0f} dB",
        near_one(row.cosine_min),
        near_one(row.cosine_p1),
        near_one(row.cosine_mean),
        near_one(row.centred_cosine_min),
        short(row.margin),
        "–" if row.neighbours is None else str(row.neighbours),
        "–" if row.overlap is None else str(row.overlap),
        "PASS" if row.passed else "FAIL",
    ]
    return [row.subject, *cells] if with_subject else cells


def short(value: float | None) -> str:
    """A small number in two digits."""
    return "–" if value is None or math.isnan(value) else f"{value:.1e}"


def near_one(value: float | None) -> str:
    """A cosine near 1 as its distance from 1: 1-2e-13 says more than 1.000000."""
    if value is None or math.isnan(value):
        return "–"
    return f"1-{max(1 - value, 0.0):.0e}" if value > 0.999 else f"{value:.4f}"


def _least(shares: Iterable[Share | None]) -> Share | None:
    """The smallest share; of equal ones the one that is known best, from the most images."""
    known = [share for share in shares if share is not None]
    return min(known, key=lambda share: (share.value, -share.low), default=None)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = []
    for line in lines:
        cells = [cell.ljust(width) if column == 0 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        texts.append("  ".join(cells).rstrip())
    return texts
