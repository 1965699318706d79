"""Comparing outputs with what they should be: two mappings of arrays, or any two callables. Never raises on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from byol_deploy.parity.limits import AnyLimit, FidelityLimit, Limit, derive_limits
from byol_deploy.parity.measures import (
    FEWEST_FOR_NEIGHBOURS,
    FEWEST_FOR_SEPARATION,
    all_alike,
    as_rows,
    bootstrap_share,
    centred_cosine_min,
    cosines,
    distance_apart,
    neighbours,
    relative_l2,
    separation_margin,
    sqnr_db,
)
from byol_deploy.parity.report import ParityReport, ParityRow, near_one, short

FEWEST_FOR_AGREEMENT = 50
"""With fewer images than this one exchanged neighbour moves an agreement by more than two points."""

Outputs = Mapping[str, np.ndarray]


def compare(
    expected: Outputs,
    actual: Outputs,
    *,
    limits: Mapping[str, AnyLimit],
    subject: str = "",
    different_images: bool = True,
    among: tuple[Outputs, Outputs] | None = None,
) -> ParityReport:
    """Compare two sets of outputs, image by image.

    Args:
        expected: Output name to (N, D) of the reference.
        actual: The same of the file under test. An output that is missing or that nobody expects fails.
        limits: Output name to what it may differ by.
        subject: What is compared, for the report.
        different_images: Whether the N images differ, so that their vectors should. Then vectors that are all alike
            are not comparable: whatever tells images apart is lost in the reference's own noise.
        among: The reference's outputs and the tested file's for photographs, whose means are the centres from which
            the margin is measured; None where the N images are such themselves.

    Returns:
        A report with one row per output. It never raises on data: other shapes, NaN, infinite numbers, no image and
        no limit are rows that did not pass, each with its reason.
    """
    rows = [
        _compare_one(name, expected.get(name), actual.get(name), limits.get(name), subject, different_images,
                     None if among is None else _centres(among[0].get(name), among[1].get(name)))
        for name in dict.fromkeys([*expected, *actual])
    ]  # fmt: skip
    return ParityReport(tuple(rows))


def compare_callables(
    reference: Callable[[np.ndarray], Outputs],
    candidate: Callable[[np.ndarray], Outputs],
    images: np.ndarray,
    *,
    double: Callable[[np.ndarray], Outputs] | None = None,
    limits: Mapping[str, AnyLimit] | None = None,
    batch_sizes: Sequence[int] = (1, 2, 3, 7),
    subject: str = "",
) -> ParityReport:
    """Compare any two functions from images to named outputs.

    Args:
        reference: What is right: (N, ...) to output name → (N, D).
        candidate: What is judged.
        images: (N, ...) of N different inputs, whatever the two take.
        double: The reference in float64, from which limits are derived.
        limits: Limits instead of derived ones.
        batch_sizes: Sizes of the batches in which ``candidate`` gets the images, beside all of them at once.
        subject: What is compared, for the report.

    Returns:
        Rows per output and batch size. What the candidate raises is a failed row; a reference that gives other
        numbers when it is asked again is not comparable, which is no pass.
    """
    expected = dict(reference(images))
    again = dict(reference(images))
    truth = None if double is None else dict(double(images))
    allowed = dict(limits) if limits is not None else dict(derive_limits([expected, again], truth))
    faults = unsteady(expected, again, allowed)
    if faults:
        return not_comparable(expected, faults, subject=subject, limits=allowed)
    reports = []
    for size in dict.fromkeys([*batch_sizes, len(images)]):
        what = f"{subject}, batch {size}".removeprefix(", ")
        reports.append(compare_run(candidate, images, size, expected, allowed, what))
    return ParityReport.merged(reports)


def compare_run(
    run: Callable[[np.ndarray], Outputs],
    images: np.ndarray,
    batch_size: int,
    expected: Outputs,
    limits: Mapping[str, AnyLimit],
    subject: str,
    *,
    different_images: bool = True,
    among: tuple[Outputs, Outputs] | None = None,
) -> ParityReport:
    """Run ``images`` (N, ...) through ``run`` in batches of exactly ``batch_size`` and compare.

    Whatever ``run`` raises (a baked-in batch size shows so) is a failed row, not an exception.
    """
    if len(images) == 0:
        return compare(expected, expected, limits=limits, subject=subject)
    try:
        actual = run_in_batches(run, images, batch_size)
    except Exception as error:
        return cannot_run(expected, limits, subject, error)
    return compare(expected, actual, limits=limits, subject=subject, different_images=different_images, among=among)


def run_in_batches(run: Callable[[np.ndarray], Outputs], images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Run ``images`` (N, ...), N at least 1, in batches of exactly ``batch_size``, and put the outputs together again.

    The images are repeated up to a whole number of batches: five images at batch 7 must really be seven.
    """
    n = len(images)
    places = np.arange(-(-n // batch_size) * batch_size) % n
    parts = [run(images[places[start : start + batch_size]]) for start in range(0, len(places), batch_size)]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts])[:n] for name in parts[0]}


def cannot_run(expected: Outputs, limits: Mapping[str, AnyLimit], subject: str, error: Exception) -> ParityReport:
    """Failed rows for something that raised ``error`` instead of giving outputs."""
    return not_comparable(expected, f"the file cannot run this: {first_line(error)}", subject=subject, limits=limits)


def not_comparable(
    expected: Outputs, reason: str, *, subject: str, limits: Mapping[str, AnyLimit] | None = None
) -> ParityReport:
    """Failed rows for outputs about which nothing can be said, each with the reason."""
    report = compare(expected, {}, limits=limits or {}, subject=subject)
    return ParityReport(tuple(replace(row, reason=reason) for row in report.rows))


def unsteady(first: Outputs, second: Outputs, limits: Mapping[str, AnyLimit]) -> str:
    """Why a reference that was asked twice cannot be compared with; empty when both answers are the same.

    They may differ by what the limits allow: some kernels add in an order that changes from run to run.
    """
    moved = []
    for name, values in first.items():
        if name not in second or second[name].shape != values.shape:
            moved.append(name)
            continue
        if not np.isfinite(values).all():
            continue  # has a reason of its own
        limit = limits.get(name)
        most = limit.rel_l2 if isinstance(limit, Limit) else 1e-3
        if not (relative_l2(as_rows(second[name]), as_rows(values)) <= most).all():
            moved.append(name)
    if not moved:
        return ""
    return (
        f"not comparable: the reference gives other numbers when it is asked again ({', '.join(moved)}); "
        "put it into evaluation mode, and switch off dropout and sampling"
    )


def first_line(error: BaseException) -> str:
    """An exception in one line for a person."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _compare_one(
    name: str,
    expected: np.ndarray | None,
    actual: np.ndarray | None,
    limit: AnyLimit | None,
    subject: str,
    different_images: bool,
    among: tuple[np.ndarray, np.ndarray] | None,
) -> ParityRow:
    def impossible(reason: str, n: int = 0) -> ParityRow:
        nan = math.nan
        shown = replace(limit, each=()) if isinstance(limit, Limit) else limit
        return ParityRow(subject, name, n, nan, nan, nan, math.inf, None, nan, nan, nan, None, None, None, None, shown,
                         None, False, f"not comparable: {reason}")  # fmt: skip

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
        bad = int((~np.isfinite(as_rows(actual)).all(axis=1)).sum())
        return impossible(f"{bad} of {n} vectors have NaN or infinite numbers", n)
    if limit is None:
        return impossible("there is no limit for it", n)
    each = limit.of_images(n) if isinstance(limit, Limit) else np.full(n, math.inf)
    if each is None:
        return impossible(f"there are {n} images, its limit was derived for {len(limit.each)}", n)  # type: ignore[union-attr]
    noise = limit.noise_of_images(n) if isinstance(limit, Limit) else np.zeros(n)
    reference, tested = as_rows(expected), as_rows(actual)
    if different_images and n >= FEWEST_FOR_SEPARATION and all_alike(reference, float(np.median(noise))):
        return impossible(f"the reference gives the same vector for all {n} images: a constant output, a collapsed "
                          "encoder, or images that are all alike", n)  # fmt: skip

    errors = relative_l2(tested, reference)
    image = int((errors / each).argmax()) if isinstance(limit, Limit) else int(errors.argmax())
    angles = cosines(tested, reference)
    apart = limit.apart if limit.apart is not None else distance_apart(reference) if different_images else None
    margin = None if apart is None else separation_margin(tested, reference, apart, among)
    near = neighbours(reference, tested, noise_rel_l2=noise) if different_images else None
    row = ParityRow(
        subject=subject,
        output=name,
        n=n,
        max_abs=float(np.abs(tested - reference).max()),
        rel_l2=float(errors[image]),
        tolerance=float(errors.max()),
        severity=math.inf,
        sqnr_db=sqnr_db(tested, reference),
        cosine_min=float(angles.min()),
        cosine_p1=float(np.percentile(angles, 1)),
        cosine_mean=float(angles.mean()),
        centred_cosine_min=centred_cosine_min(tested, reference, noise) if different_images else None,
        margin=margin,
        neighbours=None if near is None else bootstrap_share(near.same),
        overlap=None if near is None or near.overlap is None else bootstrap_share(near.overlap),
        limit=limit,
        image=image,
        passed=False,
    )
    if isinstance(limit, Limit):
        mine = Limit(float(each[image]), limit.cosine, float(noise[image]))
        return _by_rounding(replace(row, limit=mine, severity=row.rel_l2 / mine.rel_l2))
    return _by_fidelity(row, limit)


def _centres(mine: np.ndarray | None, theirs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Both sides' vectors of the same photographs as rows; None where they cannot give a centre."""
    if mine is None or theirs is None or np.shape(mine) != np.shape(theirs) or len(mine) < 2:
        return None
    found = as_rows(np.asarray(mine)), as_rows(np.asarray(theirs))
    return found if all(np.isfinite(rows).all() for rows in found) else None


def _by_rounding(row: ParityRow) -> ParityRow:
    limit = row.limit
    assert isinstance(limit, Limit)
    reasons = []
    if not row.rel_l2 <= limit.rel_l2:
        reasons.append(f"relative L2 error {short(row.rel_l2)} is above the limit {short(limit.rel_l2)}")
    # The cosine is known to a few float64 roundings only.
    if not row.cosine_min >= limit.cosine - 1e-14:
        reasons.append(f"cosine {near_one(row.cosine_min)} is below the limit {near_one(limit.cosine)}")
    return replace(row, passed=not reasons, reason="; ".join(reasons))


def _by_fidelity(row: ParityRow, limit: FidelityLimit) -> ParityRow:
    if row.margin is None:
        few = f"the margin needs {FEWEST_FOR_SEPARATION} different images, there are {row.n}"
        return replace(row, reason=f"not comparable: {few}")
    reasons = []
    severity = row.margin / limit.margin
    if not row.margin <= limit.margin:
        reasons.append(f"margin {row.margin:.2g} is above the limit {limit.margin:g}: images drift by that part of the "
                       "distance between different ones")  # fmt: skip
    if limit.agreement is not None:
        if row.n < FEWEST_FOR_AGREEMENT or row.neighbours is None:
            need = max(FEWEST_FOR_AGREEMENT, FEWEST_FOR_NEIGHBOURS)
            return replace(row, reason=f"not comparable: neighbour agreement needs {need} images, there are {row.n}")
        lost, allowed = 1 - row.neighbours.value, 1 - limit.agreement
        severity = max(severity, lost / allowed if allowed > 0 else (math.inf if lost > 0 else 0.0))
        if row.neighbours.value < limit.agreement:
            reasons.append(f"{row.neighbours.value:.1%} of {row.n} images keep their nearest neighbour, the limit is "
                           f"{limit.agreement:.0%}")  # fmt: skip
    return replace(row, severity=severity, passed=not reasons, reason="; ".join(reasons))
