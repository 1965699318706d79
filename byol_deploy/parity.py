"""Does an exported model compute what the trained one computes? Verdicts, never exceptions.

A comparison takes two mappings from output name to an array whose rows belong to the same images, and gives one
:class:`ParityRow` per output. Nothing here knows where the arrays came from: any two callables can be compared.

**How much may a file differ?** That depends on the model: a deep transformer gathers more rounding error than a small
ResNet, and a fixed tolerance is either blind on the one or too strict for the other. So the limit is derived from the
model itself. The reference is computed twice, in float32 and in float64. Their distance is the *noise floor*: what
float32 arithmetic costs this model on these images. A correct float32 runtime orders its sums in another way and lands
at about the same distance from the float64 truth, so between the two of them up to about twice the floor is expected.
Measured on ten families (benchmarks/results/backbones.md), ONNX Runtime and TorchScript stay within two floors of
PyTorch on real images. The limit is :data:`NOISE_MULTIPLE` floors, which leaves room for other processors' instruction
sets and convolution algorithms. Real faults are orders of magnitude beyond it (wrong mean or channel order: 0.1 to 1
relative; another epsilon in batch norm: about 1e-4). :data:`LEAST_REL_L2` stands in where a tiny model's floor is below
what a float32 result can be held to at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

NOISE_MULTIPLE = 10.0
"""The limit on relative L2, in noise floors of the model."""

LEAST_REL_L2 = 2e-6
"""The limit where the noise floor is smaller than a tenth of it: 17 float32 roundings (2**-23)."""

FEWEST_FOR_NEIGHBOURS = 8
"""With fewer images than this a neighbour agreement says nothing."""


@dataclass(frozen=True)
class Limit:
    """What one output may differ by.

    Attributes:
        rel_l2: Largest relative L2 error of any image.
        cosine: Smallest cosine of any image with its reference.
        noise_rel_l2: The model's own noise floor that the two were derived from; 0 when it is not known.
    """

    rel_l2: float
    cosine: float
    noise_rel_l2: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """As in a manifest: ``{"rel_l2": ..., "cosine": ..., "noise_rel_l2": ...}``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limit:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: A key is missing or unknown, or a value cannot be a limit. A limit that lets everything pass
                (an error above 1, a cosine of 0 or below) is no limit.
        """
        names = [spec.name for spec in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"a limit is {data!r}; it has the keys {', '.join(names)}")
        for name in names:
            if isinstance(data[name], bool) or not isinstance(data[name], int | float):
                raise ValueError(f"{name} is {data[name]!r}; it must be a number")
        made = cls(**{name: float(data[name]) for name in names})
        if not (0 < made.rel_l2 <= 1 and 0 < made.cosine <= 1 and 0 <= made.noise_rel_l2 <= 1):
            raise ValueError(f"a limit is {dict(data)}; rel_l2 and cosine lie above 0 and up to 1, the noise in 0 to 1")
        return made


def derive_limits(
    single: Mapping[str, np.ndarray],
    double: Mapping[str, np.ndarray] | None,
    *,
    multiple: float = NOISE_MULTIPLE,
    least: float = LEAST_REL_L2,
) -> dict[str, Limit]:
    """Limits from the reference's own float32 noise.

    Args:
        single: Output name to (N, D), the reference in float32.
        double: The same images in float64; None where the model cannot compute in float64. The limit is then
            a round 1e-4, which every family measured so far keeps with an order to spare.
        multiple: Limit in noise floors.
        least: Smallest limit.

    Returns:
        Output name to its limit. A cosine belongs to a relative error r: the angle between a vector and one that
        lies r of its length away is at most asin(r), so the cosine is at least sqrt(1 - r^2).
    """
    limits = {}
    for name, expected in single.items():
        noise = 0.0
        rel_l2 = 1e-4
        if double is not None:
            noise = float(np.max(_relative(_rows(expected), _rows(double[name])), initial=0.0))
            rel_l2 = max(multiple * noise, least) if math.isfinite(noise) else least
        # More than a tenth of the vector's length is no rounding any more, whatever the model does with it.
        rel_l2 = min(rel_l2, 0.1)
        limits[name] = Limit(rel_l2, math.sqrt(1.0 - rel_l2**2), noise if math.isfinite(noise) else 0.0)
    return limits


def image_noise(single: Mapping[str, np.ndarray], double: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each image the largest relative L2 distance of any output's float32 from its float64.

    Args:
        single: Output name to (N, D), the reference in float32.
        double: The same images in float64.

    Returns:
        (N,) float64; infinite where an output is not finite.
    """
    noise = np.max([_relative(_rows(values), _rows(double[name])) for name, values in single.items()], axis=0)
    return np.asarray(np.where(np.isfinite(noise), noise, np.inf))


@dataclass(frozen=True)
class ParityRow:
    """One output in one comparison.

    Attributes:
        subject: What was compared, e.g. ``model.onnx, real images, batch 7``.
        output: Name of the output.
        n: Number of images.
        max_abs: Largest absolute difference of two numbers.
        rel_l2: Largest over the images of |actual - expected| / |expected|.
        cosine_min: Smallest cosine of an image's vector with its reference.
        cosine_mean: Mean of these cosines.
        centred_cosine_min: The smallest after each side's mean vector was subtracted; None for one image or where
            the vectors are all alike.
        neighbour_agreement: Share of images whose nearest neighbour is the same; None for fewer than 8 images.
        limit: What was allowed; None when there was nothing to compare with.
        passed: The verdict.
        reason: Why it did not pass; empty when it did.
    """

    subject: str
    output: str
    n: int
    max_abs: float
    rel_l2: float
    cosine_min: float
    cosine_mean: float
    centred_cosine_min: float | None
    neighbour_agreement: float | None
    limit: Limit | None
    passed: bool
    reason: str = ""

    @property
    def severity(self) -> float:
        """The error in limits: above 1 fails, infinite where nothing could be compared."""
        if self.limit is None or not math.isfinite(self.rel_l2):
            return math.inf
        return self.rel_l2 / self.limit.rel_l2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        document = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name, value in document.items():
            if isinstance(value, float) and not math.isfinite(value):
                document[name] = None
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
        for name in ("max_abs", "rel_l2", "cosine_min", "cosine_mean"):
            values[name] = math.nan if values[name] is None else _number(name, values[name])
        for name in ("centred_cosine_min", "neighbour_agreement"):
            values[name] = None if values[name] is None else _number(name, values[name])
        for name, kind in (("subject", str), ("output", str), ("reason", str), ("n", int), ("passed", bool)):
            if not isinstance(values[name], kind):
                raise ValueError(f"{name} is {values[name]!r}; it must be of type {kind.__name__}")
        values["limit"] = None if values["limit"] is None else Limit.from_dict(values["limit"])
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
        """For each output the row that comes nearest to its limit, or is farthest beyond."""
        found: dict[str, ParityRow] = {}
        for row in self.rows:
            known = found.get(row.output)
            if known is None or (not row.passed, row.severity) > (not known.passed, known.severity):
                found[row.output] = row
        return list(found.values())

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
        header: tuple[str, ...] = (
            "output",
            "n",
            "max abs",
            "rel L2",
            "limit",
            "noise",
            "cosine min",
            "centred",
            "neighbours",
            "verdict",
        )
        if all_rows:
            header = ("compared", *header)
        lines = []
        for row in self.rows if all_rows else self.worst():
            agreed = row.neighbour_agreement
            if not all_rows:
                # The worst row may be one of too few images to have neighbours.
                known = [other.neighbour_agreement for other in self.rows if other.output == row.output]
                agreed = min((value for value in known if value is not None), default=None)
            cells = (
                row.output,
                str(row.n),
                _short(row.max_abs),
                _short(row.rel_l2),
                _short(row.limit.rel_l2 if row.limit else None),
                _short(row.limit.noise_rel_l2 if row.limit else None),
                _cosine(row.cosine_min),
                _cosine(row.centred_cosine_min),
                "–" if agreed is None else f"{agreed:.1%}",
                "PASS" if row.passed else "FAIL",
            )
            lines.append((row.subject, *cells) if all_rows else cells)
        texts = _columns([header, *lines]) if lines else []
        if not all_rows and len(self.rows) > len(lines) > 0:
            texts.append(f"the worst of {len(self.rows) // len(lines)} comparisons per output")
        texts += [f"FAIL {failure}" for failure in self.failures] if not self.passed else []
        texts += [f"WARNING {warning}" for warning in self.warnings]
        return "\n".join(texts)


def compare(
    expected: Mapping[str, np.ndarray],
    actual: Mapping[str, np.ndarray],
    *,
    limits: Mapping[str, Limit],
    subject: str = "",
) -> ParityReport:
    """Compare two sets of outputs, image by image.

    Args:
        expected: Output name to (N, D) of the reference.
        actual: The same of the file under test. An output that is missing or that nobody expects fails.
        limits: Output name to what it may differ by.
        subject: What is compared, for the report.

    Returns:
        A report with one row per output. It never raises on data: other shapes, NaN, infinite numbers, no image and
        no limit are rows that did not pass, each with its reason.
    """
    rows = [_compare_one(name, expected.get(name), actual.get(name), limits.get(name), subject)
            for name in dict.fromkeys([*expected, *actual])]  # fmt: skip
    return ParityReport(tuple(rows))


def _compare_one(
    name: str, expected: np.ndarray | None, actual: np.ndarray | None, limit: Limit | None, subject: str
) -> ParityRow:
    def impossible(reason: str, n: int = 0) -> ParityRow:
        nan = math.nan
        return ParityRow(subject, name, n, nan, nan, nan, nan, None, None, limit, False, f"not comparable: {reason}")

    if expected is None:
        return impossible("the reference has no such output")
    if actual is None:
        return impossible("the output is missing")
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.shape != actual.shape:
        return impossible(f"its shape is {actual.shape}, the reference's {expected.shape}")
    if expected.ndim < 2 or expected.shape[0] == 0 or expected.size == 0:
        return impossible(f"its shape {expected.shape} holds no vector of any image")
    if expected.dtype.kind != "f" or actual.dtype.kind != "f":
        return impossible(f"its type is {actual.dtype}, the reference's {expected.dtype}; floating point is needed")
    n = len(expected)
    if not np.isfinite(expected).all():
        return impossible("the reference itself has NaN or infinite numbers", n)
    if not np.isfinite(actual).all():
        bad = int((~np.isfinite(_rows(actual)).all(axis=1)).sum())
        return impossible(f"{bad} of {n} vectors have NaN or infinite numbers", n)
    if limit is None:
        return impossible("there is no limit for it", n)

    reference, tested = _rows(expected), _rows(actual)
    rel_l2 = float(_relative(tested, reference).max())
    cosines = _cosines(tested, reference)
    row = ParityRow(
        subject=subject,
        output=name,
        n=n,
        max_abs=float(np.abs(tested - reference).max()),
        rel_l2=rel_l2,
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        centred_cosine_min=_centred_cosine_min(tested, reference, limit.noise_rel_l2),
        neighbour_agreement=neighbour_agreement(reference, tested, noise_rel_l2=limit.noise_rel_l2),
        limit=limit,
        passed=False,
    )
    reasons = []
    if not rel_l2 <= limit.rel_l2:
        reasons.append(f"relative L2 error {_short(rel_l2)} is above the limit {_short(limit.rel_l2)}")
    # The cosine is known to a few float64 roundings only.
    if not row.cosine_min >= limit.cosine - 1e-14:
        reasons.append(f"cosine {_cosine(row.cosine_min)} is below the limit {_cosine(limit.cosine)}")
    return replace(row, passed=not reasons, reason="; ".join(reasons))


def neighbour_agreement(
    reference: np.ndarray, other: np.ndarray, *, noise_rel_l2: float = 0.0, block: int = 1024
) -> float | None:
    """Share of images whose nearest neighbour among the others is the same on both sides.

    Neighbours are by cosine after each side's mean vector was subtracted: embeddings crowd around their mean, and
    without this every image looks like every other one. A neighbour exchanged for one that the reference itself
    holds level within its noise counts as agreement: vectors that are known to a relative e_i have a cosine known to
    e_i + e_j in first order, so two of an image's cosines cannot be told apart within 2 e_i + e_j + e_k.

    Args:
        reference: (N, D), the trained model's.
        other: (N, D) of the same images.
        noise_rel_l2: Relative L2 noise of the reference's vectors, before the mean is subtracted.
        block: Images per block, to bound memory at block x N numbers.

    Returns:
        0 to 1, or None for fewer than 8 images or vectors that are all alike.
    """
    a, b = _rows(np.asarray(reference)), _rows(np.asarray(other))
    n = len(a)
    if n < FEWEST_FOR_NEIGHBOURS or a.shape != b.shape:
        return None
    lengths = np.linalg.norm(a, axis=1)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    a_lengths, b_lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    if not (a_lengths > 0).any() or not (b_lengths > 0).any():
        return None
    tiny = np.finfo(np.float64).tiny
    error = noise_rel_l2 * lengths / np.maximum(a_lengths, tiny)
    a, b = a / np.maximum(a_lengths, tiny)[:, None], b / np.maximum(b_lengths, tiny)[:, None]
    agreed = 0
    for start in range(0, n, block):
        rows = np.arange(start, min(start + block, n))
        inside = np.arange(len(rows))
        a_cosines, b_cosines = a[rows] @ a.T, b[rows] @ b.T
        a_cosines[inside, rows] = b_cosines[inside, rows] = -np.inf
        mine, theirs = a_cosines.argmax(axis=1), b_cosines.argmax(axis=1)
        gap = a_cosines[inside, mine] - a_cosines[inside, theirs]
        level = 2 * error[rows] + error[mine] + error[theirs]
        agreed += int(((mine == theirs) | (gap <= level)).sum())
    return agreed / n


# --- helpers ----------------------------------------------------------------------------------------------------


def _rows(values: np.ndarray) -> np.ndarray:
    """(N, ...) as (N, D) float64."""
    flat: np.ndarray = values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64)
    return flat


def _relative(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|actual - expected| / |expected| of each row; 0 where both are zero, infinite where only the reference is."""
    difference, length = np.linalg.norm(actual - expected, axis=1), np.linalg.norm(expected, axis=1)
    safe = np.where(length > 0, length, 1.0)
    ratio: np.ndarray = np.where(length > 0, difference / safe, np.where(difference > 0, np.inf, 0.0))
    return ratio


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows; 1 where both are zero, 0 where one is."""
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~(a.any(axis=1) | b.any(axis=1))
    cosines: np.ndarray = np.where(
        product > 0, (a * b).sum(axis=1) / np.where(product > 0, product, 1.0), both_zero.astype(np.float64)
    )
    return cosines


def _centred_cosine_min(actual: np.ndarray, expected: np.ndarray, noise_rel_l2: float) -> float | None:
    """Smallest cosine after subtracting the means, over the images that are farther from the mean than noise."""
    centred = expected - expected.mean(axis=0)
    floor = 10 * noise_rel_l2 * np.linalg.norm(expected, axis=1)
    telling = np.linalg.norm(centred, axis=1) > floor
    if len(expected) < 2 or not telling.any():
        return None
    return float(_cosines(actual - actual.mean(axis=0), centred)[telling].min())


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)


def _short(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1e}"


def _cosine(value: float | None) -> str:
    """A cosine near 1 as its distance from 1: 1-2e-13 says more than 1.000000."""
    if value is None or math.isnan(value):
        return "–"
    return f"1-{max(1 - value, 0.0):.0e}" if value > 0.999 else f"{value:.4f}"


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = []
    for line in lines:
        cells = [cell.ljust(width) if column == 0 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        texts.append("  ".join(cells).rstrip())
    return texts
