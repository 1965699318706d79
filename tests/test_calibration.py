"""Images to calibrate with: spread out, kept, and refused where they calibrate nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from byol_deploy import calibration
from byol_deploy.errors import DataError
from byol_deploy.preprocess import Preprocessing


def of_brightness(*levels: int) -> list[np.ndarray]:
    return [np.full((20, 20, 3), level, np.uint8) for level in levels]


def test_the_pick_is_spread_out_and_without_copies() -> None:
    crowd = of_brightness(*[120] * 30, *range(121, 151), 0, 255)
    chosen = calibration.pick(crowd, Preprocessing(16), count=31)
    levels = sorted(int(image[0, 0, 0]) for image in chosen)
    assert len(chosen) == 31
    assert len(set(levels)) == 31
    assert {0, 255} <= set(levels), "the two that lie apart come first"
    again = calibration.pick(crowd, Preprocessing(16), count=31)
    assert np.array_equal(chosen, again)


def test_what_cannot_be_decoded_is_skipped(tmp_path: Path) -> None:
    broken = tmp_path / "x.png"
    broken.write_bytes(b"no image")
    chosen = calibration.pick([broken, *of_brightness(3, 9)], Preprocessing(16))
    assert sorted(int(image[0, 0, 0]) for image in chosen) == [3, 9]
    assert calibration.pick([broken], Preprocessing(16)).shape == (0, 16, 16, 3)


def test_a_run_keeps_its_pick(tmp_path: Path) -> None:
    assert calibration.kept(tmp_path) is None
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    calibration.keep(tmp_path, images)
    found = calibration.kept(tmp_path)
    assert found is not None
    assert np.array_equal(found, images)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_a_damaged_pick_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / calibration.CALIBRATION_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"calibration\.npz is damaged.*--calibration"):
        calibration.kept(tmp_path)


def test_pickled_arrays_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / calibration.CALIBRATION_FILE, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="is damaged"):
        calibration.kept(tmp_path)


def test_too_few_and_all_alike_are_refused() -> None:
    random = np.random.default_rng(0).integers(0, 256, (calibration.FEWEST, 8, 8, 3), dtype=np.uint8)
    calibration.check(random, "the folder")
    with pytest.raises(DataError, match="the folder holds 15 different images; calibration takes 16"):
        calibration.check(random[1:], "the folder")
    with pytest.raises(DataError, match="all alike"):
        calibration.check(np.full_like(random, 7), "the folder")
