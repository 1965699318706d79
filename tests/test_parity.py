"""Parity verdicts: every number against its definition, every way to have nothing to compare a failure."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from byol_deploy.parity import (
    LEAST_REL_L2,
    Limit,
    ParityReport,
    compare,
    derive_limits,
    image_noise,
    neighbour_agreement,
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
    assert one(zeros, zeros).passed
    assert not one(zeros, zeros + 1e-9).passed
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
    assert "worst of 2" in text
    assert len(report.table(all_rows=True).splitlines()) == 4
