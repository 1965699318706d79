"""Parity verdicts: every number against its definition, every way to have nothing to compare a failure."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from byol_deploy.parity import (
    LEAST_REL_L2,
    FidelityLimit,
    Limit,
    ParityReport,
    bootstrap_share,
    compare,
    compare_callables,
    derive_limits,
    image_noise,
    neighbour_agreement,
    neighbours,
    separation_margin,
)
from byol_deploy.separation import separation

LIMITS = {"embedding": Limit(rel_l2=1e-5, cosine=1 - 1e-10, noise_rel_l2=1e-6)}


def vectors(n: int = 12, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def one(expected: np.ndarray, actual: np.ndarray, limits: dict[str, Limit] = LIMITS) -> ParityReport:
    return compare({"embedding": expected}, {"embedding": actual}, limits=limits, subject="a file")


def test_equal_vectors_pass_with_exact_numbers() -> None:
    report = one(vectors(), vectors())
    (row,) = report.rows
    assert report.passed
    assert (row.max_abs, row.rel_l2, row.n, row.neighbour_agreement) == (0.0, 0.0, 12, 1.0)
    assert row.cosine_min == pytest.approx(1, abs=1e-15)


def test_numbers_equal_pytorchs() -> None:
    expected, actual = vectors(), vectors() + 0.3 * vectors(seed=1)
    (row,) = one(expected, actual).rows
    e, a = torch.from_numpy(expected).double(), torch.from_numpy(actual).double()
    cosine = torch.nn.functional.cosine_similarity(a, e)
    centred = torch.nn.functional.cosine_similarity(a - a.mean(0), e - e.mean(0))
    assert row.max_abs == pytest.approx((a - e).abs().max().item(), rel=1e-12)
    assert row.rel_l2 == pytest.approx(((a - e).norm(dim=1) / e.norm(dim=1)).max().item(), rel=1e-12)
    assert row.cosine_min == pytest.approx(cosine.min().item(), rel=1e-12)
    assert row.cosine_mean == pytest.approx(cosine.mean().item(), rel=1e-12)
    assert row.centred_cosine_min == pytest.approx(centred.min().item(), rel=1e-12)
    assert not row.passed


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2.0])
def test_the_limit_is_where_it_says(factor: float) -> None:
    expected = vectors().astype(np.float64)
    push = vectors(seed=1).astype(np.float64)
    push *= np.linalg.norm(expected, axis=1, keepdims=True) / np.linalg.norm(push, axis=1, keepdims=True)
    assert one(expected, expected + 1e-5 * factor * push).passed is (factor < 1)


def test_a_scaled_embedding_fails_although_its_cosine_is_one() -> None:
    report = one(vectors(), vectors() * 1.001)
    assert not report.passed
    assert report.rows[0].cosine_min == pytest.approx(1, abs=1e-12)
    assert "relative L2" in report.failures[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_fail(bad: float) -> None:
    broken = vectors()
    broken[3, 2] = bad
    assert "1 of 12" in one(vectors(), broken).failures[0]
    assert "reference itself" in one(broken, vectors()).failures[0]
    assert not one(broken, broken).passed


@pytest.mark.parametrize(
    ("expected", "actual", "reason"),
    [
        ({}, {}, "nothing was compared"),
        ({"embedding": vectors()}, {}, "missing"),
        ({}, {"embedding": vectors()}, "the reference has no such output"),
        ({"embedding": vectors()}, {"embedding": vectors(n=11)}, "shape"),
        ({"embedding": vectors(n=0)}, {"embedding": vectors(n=0)}, "no vector"),
        ({"embedding": vectors()[0]}, {"embedding": vectors()[0]}, "no vector"),
        ({"embedding": vectors()}, {"embedding": vectors().astype(np.int32)}, "floating point"),
        ({"other": vectors()}, {"other": vectors()}, "no limit"),
    ],
)
def test_nothing_to_compare_is_a_failure(
    expected: dict[str, np.ndarray], actual: dict[str, np.ndarray], reason: str
) -> None:
    report = compare(expected, actual, limits=LIMITS)
    assert not report.passed
    assert reason in report.failures[0]
    json.dumps(report.to_dict(), allow_nan=False)
    assert "FAIL" in report.table() or not report.rows


def test_zero_vectors() -> None:
    zeros = np.zeros((3, 8), np.float32)
    assert compare({"embedding": zeros}, {"embedding": zeros}, limits=LIMITS, different_images=False).passed
    assert not compare({"embedding": zeros}, {"embedding": zeros + 1e-9}, limits=LIMITS, different_images=False).passed
    assert not one(vectors(3, 8), zeros).passed


def test_limits_follow_the_models_own_noise() -> None:
    double = vectors().astype(np.float64)
    noisy = double * (1 + 3e-6)
    limit = derive_limits({"embedding": noisy}, {"embedding": double})["embedding"]
    assert limit.noise_rel_l2 == pytest.approx(3e-6, rel=1e-6)
    assert limit.rel_l2 == pytest.approx(3e-5, rel=1e-6)
    # The cosine's limit is that of a vector which uses the whole length that the other limit leaves, crosswise.
    assert limit.cosine == pytest.approx(math.sqrt(1 - limit.rel_l2**2), abs=1e-15)
    exact = derive_limits({"embedding": double}, {"embedding": double})["embedding"]
    assert exact.rel_l2 == LEAST_REL_L2
    assert derive_limits({"embedding": double}, None)["embedding"].rel_l2 == 1e-4
    assert derive_limits({"embedding": -double}, {"embedding": double})["embedding"].rel_l2 == 0.1


def test_noise_of_each_image_is_that_of_its_worst_output() -> None:
    double = {"a": vectors(3).astype(np.float64), "b": vectors(3, 4, seed=1).astype(np.float64)}
    single = {"a": double["a"] * [[1], [1.25], [1]], "b": double["b"] * [[1], [1.1], [1.5]]}
    assert image_noise(single, double).tolist() == pytest.approx([0, 0.25, 0.5])
    single["b"][0, 0] = np.nan
    assert image_noise(single, double)[0] == np.inf


def test_a_reports_copy_equals_it_and_a_forged_one_is_refused() -> None:
    report = ParityReport.merged(
        [one(vectors(), vectors()), one(vectors(), vectors() + 1, {}), compare({}, {}, limits={})]
    ).with_warnings(["look here"])
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    again = ParityReport.from_dict(document)
    assert again.to_dict() == report.to_dict()
    assert not again.passed
    with pytest.raises(ValueError, match="its rows say False"):
        ParityReport.from_dict({**document, "passed": True})
    with pytest.raises(ValueError, match="exactly the keys"):
        ParityReport.from_dict({**document, "extra": 1})
    row = {**document["rows"][0], "n": "twelve"}
    with pytest.raises(ValueError, match="must be of type int"):
        ParityReport.from_dict({**document, "rows": [row]})


@pytest.mark.parametrize(
    "limit",
    [
        {"rel_l2": 0.0, "cosine": 0.9, "noise_rel_l2": 0.0},
        {"rel_l2": 5.0, "cosine": 0.9, "noise_rel_l2": 0.0},
        {"rel_l2": 0.1, "cosine": -1.0, "noise_rel_l2": 0.0},
        {"rel_l2": math.nan, "cosine": 0.9, "noise_rel_l2": 0.0},
        {"rel_l2": "0.1", "cosine": 0.9, "noise_rel_l2": 0.0},
        {"rel_l2": True, "cosine": 0.9, "noise_rel_l2": 0.0},
        {"rel_l2": 0.1, "cosine": 0.9},
    ],
)
def test_a_limit_that_limits_nothing_is_refused(limit: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"limit|number"):
        Limit.from_dict(limit)


def test_neighbours_are_those_of_the_centred_cosine() -> None:
    a, b = vectors(40, 8) + 5, vectors(40, 8) + 5 + 0.5 * vectors(40, 8, seed=1)

    def nearest(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
        similarity = x @ x.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=1))
        np.fill_diagonal(similarity, -2)
        return similarity.argmax(1)

    expected = float((nearest(a) == nearest(b)).mean())
    assert 0 < expected < 1
    assert neighbour_agreement(a, b) == expected
    assert neighbour_agreement(a, b, block=7) == expected
    assert neighbour_agreement(a, a) == 1.0
    assert neighbour_agreement(a[:7], b[:7]) is None
    assert neighbour_agreement(np.ones((9, 4)), np.ones((9, 4))) is None


def test_a_neighbour_that_is_level_within_the_noise_counts_as_agreement() -> None:
    a = np.random.default_rng(3).normal(size=(12, 16))
    a[1] = a[0] + 1e-9 * a[5]
    a[2] = a[0] - 1e-9 * a[6]
    b = a.copy()
    b[[1, 2]] = b[[2, 1]]  # image 0 now has the other one as its nearest
    b[1] = a[0] + 1e-7 * a[5]
    assert neighbour_agreement(a, b) < 1
    assert neighbour_agreement(a, b, noise_rel_l2=1e-6) == 1.0
    assert neighbour_agreement(a, np.roll(b, 1, axis=0), noise_rel_l2=1e-6) < 1


def test_a_collapsed_encoder_is_called_so() -> None:
    healthy = separation(vectors())
    assert healthy.warnings == ()
    assert 5 < healthy.effective_rank <= 11
    point = np.tile(vectors(1), (12, 1))
    assert "collapsed" in separation(point).warnings[0]
    assert "collapsed" in separation(point + 1e-4 * vectors()).warnings[0]
    line = np.linspace(1, 9, 12)[:, None] * vectors(1) + vectors(1, seed=4)
    assert "one direction" in separation(line).warnings[0]
    assert separation(vectors(2)).warnings
    assert separation(vectors() * np.nan).warnings


def test_the_table_shows_the_worst_row_of_each_output() -> None:
    report = ParityReport.merged([one(vectors(), vectors()), one(vectors(), vectors() * 1.01)])
    assert report.worst()[0].rel_l2 == pytest.approx(0.01, rel=1e-4)
    text = report.table()
    assert text.count("FAIL") == 2
    assert "comparisons, 2 in all" in text
    assert len(report.table(all_rows=True).splitlines()) == 5


# --- limits of single images ---


def test_each_image_has_its_own_limit() -> None:
    double = {"embedding": vectors(6).astype(np.float64)}
    noise = np.array([1e-6, 1e-6, 2e-6, 1e-6, 5e-5, 1e-9])[:, None]
    limit = derive_limits({"embedding": double["embedding"] * (1 + noise)}, double)["embedding"]
    # No less than the median: a draw that happened to round well must not make its limit unreachable.
    assert limit.each == pytest.approx([1e-5, 1e-5, 2e-5, 1e-5, 5e-4, 1e-5], rel=1e-4)
    assert limit.rel_l2 == max(limit.each)
    drifted = double["embedding"].copy()
    drifted[4] *= 1 + 1e-4  # within what the noisy image may differ by
    assert one(double["embedding"], drifted, {"embedding": limit}).passed
    drifted[1] *= 1 + 1e-4  # far beyond what this one may
    report = one(double["embedding"], drifted, {"embedding": limit})
    assert not report.passed
    assert report.rows[0].image == 1
    assert report.rows[0].limit.rel_l2 == pytest.approx(1e-5, rel=1e-4)
    assert report.rows[0].floors == pytest.approx(100, rel=1e-2)
    assert "derived for 6" in one(double["embedding"][:5], drifted[:5], {"embedding": limit}).failures[0]


def test_images_that_are_no_photographs_do_not_widen_the_limits_of_those_that_are() -> None:
    double = {"embedding": vectors(6).astype(np.float64)}
    noise = np.array([1e-6, 1e-6, 1e-2, 1e-2, 1e-2, 1e-2])[:, None]
    limit = derive_limits({"embedding": double["embedding"] * (1 + noise)}, double, ordinary=2)["embedding"]
    assert limit.subset([0, 1]).rel_l2 == pytest.approx(1e-5, rel=1e-4)
    # Nor do they make every exchanged neighbour level, or all images alike.
    report = one(double["embedding"], double["embedding"], {"embedding": limit})
    assert report.passed
    assert limit.noise_of_images(6) == pytest.approx([1e-6, 1e-6, 1e-2, 1e-2, 1e-2, 1e-2], rel=1e-3)


def test_images_without_a_float64_get_room_for_the_spread_of_two_roundings() -> None:
    limit = Limit(1e-5, 0.999, 1e-6, (1e-5, 5e-6)).widened(np.array([1e-7, 4e-6, 1.0]))
    assert limit.each == pytest.approx((1e-5, 4e-5, 0.1))
    assert limit.rel_l2 == pytest.approx(0.1)


def test_the_noise_is_the_largest_of_several_evaluations() -> None:
    double = {"embedding": vectors().astype(np.float64)}
    quiet, loud = ({"embedding": double["embedding"] * (1 + noise)} for noise in (1e-7, 4e-6))
    assert derive_limits([quiet, loud], double)["embedding"].noise_rel_l2 == pytest.approx(4e-6, rel=1e-6)
    assert image_noise([quiet, loud], double) == pytest.approx(np.full(12, 4e-6), rel=1e-6)


def test_a_limit_survives_json_and_keeps_its_images() -> None:
    limit = Limit(1e-4, 0.999, 1e-5, (1e-5, 1e-4, 2e-5), 0.25)
    assert Limit.from_dict(json.loads(json.dumps(limit.to_dict()))) == limit
    assert Limit.from_dict({"rel_l2": 1e-4, "cosine": 0.9, "noise_rel_l2": 0}) == Limit(1e-4, 0.9)
    assert limit.subset([0, 2]).each == (1e-5, 2e-5)
    assert limit.subset([0, 2]).rel_l2 == 2e-5
    assert limit.subset([0, 2]).noise_rel_l2 == pytest.approx(2e-6), "what the noisy image is like says nothing here"
    for each in ([1e-3, 1e-5, 1e-5], [0.0, 1e-5, 1e-5], ["x"], 5):
        with pytest.raises(ValueError, match=r"limit|number"):
            Limit.from_dict(limit.to_dict() | {"each": each})


# --- the encoder's own measures ---


def test_sqnr_is_its_definition() -> None:
    expected, actual = vectors().astype(np.float64), vectors() + 0.01 * vectors(seed=1)
    (row,) = one(expected, actual.astype(np.float64)).rows
    signal, noise = (expected**2).sum(), ((actual - expected) ** 2).sum()
    assert row.sqnr_db == pytest.approx(10 * np.log10(signal / noise))
    assert one(expected, expected).rows[0].sqnr_db is None


def test_margin_is_drift_over_the_distance_of_different_images() -> None:
    expected = vectors(20, 6).astype(np.float64) + 3
    actual = expected + 0.1 * vectors(20, 6, seed=1)

    def sphere(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True)

    e, a = sphere(expected), sphere(actual)
    pairs = [np.linalg.norm(e[i] - e[j]) for i in range(20) for j in range(i)]
    drift = np.percentile(np.linalg.norm(a - e, axis=1), 99)
    margin = separation_margin(actual, expected)
    assert margin == pytest.approx(drift / np.percentile(pairs, 1), rel=1e-12)
    # What moves all images alike, or stretches them all, changes nothing about who is near whom.
    assert separation_margin(3 * actual + 5, expected) == pytest.approx(margin, rel=1e-9)
    assert separation_margin(actual, expected, apart=drift) == pytest.approx(1)
    assert separation_margin(actual[:2], expected[:2]) is None
    assert separation_margin(np.ones((4, 2)), np.ones((4, 2))) == 0


def test_overlap_of_ten_against_a_plain_count() -> None:
    a, b = vectors(60, 8), vectors(60, 8) + 0.4 * vectors(60, 8, seed=1)

    def ten(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
        similarity = x @ x.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=1))
        np.fill_diagonal(similarity, -2)
        return np.argsort(-similarity, axis=1)[:, :10]

    expected = [len(set(mine) & set(theirs)) / 10 for mine, theirs in zip(ten(a), ten(b), strict=True)]
    found = neighbours(a, b, block=17)
    assert found is not None
    assert 0.2 < np.mean(expected) < 0.95
    assert found.overlap.tolist() == expected
    assert neighbours(a[:29], b[:29]).overlap is None
    assert neighbours(a, a).overlap.min() == 1


def test_bootstrap_intervals() -> None:
    scores = np.repeat([1.0, 0.0], [90, 10])
    share = bootstrap_share(scores)
    # The interval of a mean of 100 coin tosses at .9: its standard error is .03.
    assert share.value == 0.9
    assert share.low == pytest.approx(0.9 - 1.96 * 0.03, abs=0.012)
    assert share.high == pytest.approx(0.9 + 1.96 * 0.03, abs=0.012)
    # All agree: resampling has nothing to show, and the exact binomial end is told.
    assert bootstrap_share(np.ones(59)).low == pytest.approx(0.05 ** (1 / 59))
    assert bootstrap_share(np.ones(59)).high == 1.0


# --- reduced precision ---


def fidelity(expected: np.ndarray, actual: np.ndarray, **limit: float | None) -> ParityReport:
    return compare({"embedding": expected}, {"embedding": actual}, limits={"embedding": FidelityLimit(**limit)})


def test_reduced_precision_is_judged_by_margin_and_neighbours() -> None:
    expected = vectors(80, 16)
    assert fidelity(expected, expected + 0.01 * vectors(80, 16, seed=1)).passed
    worn = fidelity(expected, expected + 0.9 * vectors(80, 16, seed=1))
    assert not worn.passed
    assert "margin" in worn.failures[0]
    assert "keep their nearest neighbour" in worn.failures[0]
    json.dumps(worn.to_dict(), allow_nan=False)
    assert ParityReport.from_dict(json.loads(json.dumps(worn.to_dict()))).rows[0].limit == FidelityLimit()


def test_reduced_precision_with_too_few_images_is_not_comparable() -> None:
    few = fidelity(vectors(20), vectors(20))
    assert not few.passed
    assert "needs 50 images, there are 20" in few.failures[0]
    assert fidelity(vectors(20), vectors(20), agreement=None).passed
    assert "needs 3 different images" in fidelity(vectors(2), vectors(2), agreement=None).failures[0]
    assert "left out, with 20 images at most: overlap of ten neighbours needs 30" in few.table()


@pytest.mark.parametrize(
    "limit",
    [{"margin": 0.0, "agreement": 0.9, "apart": None}, {"margin": 2.0, "agreement": 0.9, "apart": None}, {"margin": 1}],
)
def test_a_fidelity_limit_that_limits_nothing_is_refused(limit: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"limit|above 0 and up to 1"):
        FidelityLimit.from_dict(limit)


# --- what cannot be compared ---


@pytest.mark.parametrize("same", [np.zeros((12, 32), np.float32), np.tile(vectors(1), (12, 1))])
def test_constant_outputs_are_not_comparable(same: np.ndarray) -> None:
    report = one(same, same)
    assert not report.passed
    assert "the same vector for all 12 images" in report.failures[0]


def linear(weights: np.ndarray) -> Any:
    return lambda images: {"embedding": (images.reshape(len(images), -1) @ weights).astype(np.float32)}


def test_any_two_callables_can_be_compared() -> None:
    weights = np.random.default_rng(0).normal(size=(48, 8))
    images = np.random.default_rng(1).normal(size=(12, 4, 4, 3))
    exact = lambda images: {"embedding": images.reshape(len(images), -1) @ weights}  # noqa: E731
    report = compare_callables(linear(weights), linear(weights), images, double=exact, subject="mine")
    assert report.passed, report.table()
    assert [row.subject for row in report.rows] == [f"mine, batch {size}" for size in (1, 2, 3, 7, 12)]
    assert not compare_callables(linear(weights), linear(weights * 1.001), images, double=exact).passed

    def picky(batch: np.ndarray) -> Any:
        if len(batch) != 3:
            raise ValueError("this takes three images")
        return linear(weights)(batch)

    baked = compare_callables(linear(weights), picky, images, double=exact)
    assert {row.subject: row.passed for row in baked.rows} == {
        "batch 1": False, "batch 2": False, "batch 3": True, "batch 7": False, "batch 12": False
    }  # fmt: skip
    assert "three images" in baked.failures[0]


def test_a_reference_that_changes_its_mind_is_not_comparable() -> None:
    draw = np.random.default_rng(0)

    def restless(images: np.ndarray) -> Any:
        return {"embedding": images.reshape(len(images), -1) + 0.1 * draw.normal(size=(len(images), 48))}

    images = np.random.default_rng(1).normal(size=(9, 4, 4, 3))
    report = compare_callables(restless, restless, images)
    assert not report.passed
    assert "gives other numbers when it is asked again (embedding)" in report.failures[0]
