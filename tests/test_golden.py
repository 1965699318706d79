"""Golden cases: what is packed comes back, and what a stranger packed is an error or cases."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest

from byol_deploy import golden as golden_module
from byol_deploy.bundle import (
    Golden,
    golden_from_bytes,
    golden_to_bytes,
)
from byol_deploy.errors import BundleError


def cases(count: int = 2) -> Golden:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    widths = {"embedding": 8, "projection": 4, "prediction": 4}
    return Golden(images, {name: draw.standard_normal((count, w)).astype(np.float32) for name, w in widths.items()})


def test_golden_cases_come_back_and_numpy_reads_them() -> None:
    golden = cases()
    data = golden_to_bytes(golden)
    assert data == golden_to_bytes(golden)
    back = golden_from_bytes(data)
    np.testing.assert_array_equal(back.images, golden.images)
    assert list(back.outputs) == list(golden.outputs)
    np.testing.assert_array_equal(back.outputs["embedding"], golden.outputs["embedding"])
    np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False)["images"], golden.images)


def with_files(count: int = 2, **changes: Any) -> Golden:
    """Golden cases with image files; any bytes will do here."""
    golden = cases()
    files = {f"picture-{number}.png": bytes([number + 1]) * 5 for number in range(count)}
    values = {
        "files": files,
        "pixels_sha256": {name: f"{number:064x}" for number, name in enumerate(files)},
        "file_outputs": {name: np.ones((count, rows.shape[1]), np.float32) for name, rows in golden.outputs.items()},
    }
    return Golden(golden.images, golden.outputs, **(values | changes))


def test_golden_files_come_back_in_their_order() -> None:
    golden = with_files(files := 5)
    data = golden_to_bytes(golden)
    assert data == golden_to_bytes(golden)
    back = golden_from_bytes(data)
    assert list(back.files) == list(golden.files)
    assert back.files == golden.files
    assert back.pixels_sha256 == golden.pixels_sha256
    assert back.file_outputs["embedding"].shape == (files, 8)
    assert golden_from_bytes(golden_to_bytes(cases())).files == {}


def test_golden_cases_of_an_older_version_are_read() -> None:
    golden = cases()
    stream = io.BytesIO()
    np.savez(stream, images=golden.images, **{f"outputs.{name}": rows for name, rows in golden.outputs.items()})
    back = golden_from_bytes(stream.getvalue())
    np.testing.assert_array_equal(back.outputs["embedding"], golden.outputs["embedding"])
    assert back.files == back.pixels_sha256 == back.file_outputs == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {"../x": b"1"}}, "is called"),
        ({"files": {"x": b""}}, "0 bytes"),
        ({"files": {"x": b"1" * (golden_module.MAX_GOLDEN_FILE_BYTES + 1)}}, "allowed"),
        ({"files": {f"{number}": b"1" for number in range(65)}}, "at most 64"),
        ({"pixels_sha256": {}}, "same names"),
        ({"pixels_sha256": {"picture-0.png": "ff", "picture-1.png": "ff"}}, "64 hex"),
        ({"file_outputs": {}}, "same outputs"),
        ({"file_outputs": {name: np.ones((3, 8), np.float32) for name in cases().outputs}}, r"\(2, D\)"),
        ({"file_outputs": {name: np.ones((2, 99), np.float32) for name in cases().outputs}}, "two widths"),
        ({"file_outputs": {name: np.full((2, 8), np.inf, np.float32) for name in cases().outputs}}, "infinite"),
        ({"files": {}, "pixels_sha256": {}}, "same outputs"),
    ],
)
def test_golden_files_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_files(**changes)


def packed(**members: bytes | np.ndarray) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            if isinstance(value, np.ndarray):
                member = io.BytesIO()
                np.lib.format.write_array(member, value, allow_pickle=True)
                value = member.getvalue()
            archive.writestr(f"{name.replace('__', '.')}.npy", value)
    return stream.getvalue()


def lying(shape: str) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


IMAGES = np.zeros((1, 4, 4, 3), np.uint8)
ROWS = np.zeros((1, 2), np.float32)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 and no more", "damaged"),
        (packed(images=IMAGES), "no expected output"),
        (packed(outputs__embedding=ROWS), "no images"),
        (packed(images=np.array([{"a": 1}], object), outputs__embedding=ROWS), "type object"),
        (packed(images=lying("(1000000000, 1000000000, 4, 3)"), outputs__embedding=ROWS), "claims shape"),
        (packed(images=lying("(1,) * 99"), outputs__embedding=ROWS), "damaged"),
        (packed(images=b"not npy", outputs__embedding=ROWS), "damaged"),
        (packed(images=IMAGES.astype(np.float32), outputs__embedding=ROWS), "uint8"),
        (packed(images=IMAGES, outputs__embedding=ROWS.astype(np.float64)), "type float64"),
        (packed(images=IMAGES, outputs__embedding=np.full((1, 2), np.nan, np.float32)), "NaN"),
        (packed(images=IMAGES, outputs__embedding=np.zeros((2, 2), np.float32)), r"\(1, D\)"),
        (golden_to_bytes(cases())[:-30], "damaged"),
        (packed(images=IMAGES, outputs__embedding=ROWS, **{"files__a.png": ROWS}), "not bytes"),
        (packed(images=IMAGES, outputs__embedding=ROWS, **{"files__a.png": IMAGES[0, 0, 0]}), "same names"),
        (packed(images=IMAGES, outputs__embedding=ROWS, file_outputs__embedding=ROWS), "same outputs"),
    ],
)
def test_golden_cases_from_a_stranger(data: bytes, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        golden_from_bytes(data)


def test_a_zip_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_module, "MAX_GOLDEN_UNPACKED_BYTES", 1 << 20)
    bomb = packed(images=b"\0" * (8 << 20))
    assert len(bomb) < 1 << 16
    with pytest.raises(BundleError, match="unpacks to more than 1048576"):
        golden_from_bytes(bomb)
    monkeypatch.setattr(golden_module, "MAX_GOLDEN_BYTES", 100)
    with pytest.raises(BundleError, match="more than the limit of 100"):
        golden_from_bytes(golden_to_bytes(cases()))


def test_fuzzed_golden_cases_are_an_error_or_cases() -> None:
    whole, draw = np.frombuffer(golden_to_bytes(cases()), np.uint8), np.random.default_rng(0)
    for _ in range(200):
        broken = whole.copy()
        broken[draw.integers(0, len(broken), 2)] = draw.integers(0, 256, 2)
        try:
            found = golden_from_bytes(broken.tobytes())
        except BundleError:
            continue
        assert found.images.dtype == np.uint8
        assert {len(rows) for rows in found.outputs.values()} == {len(found.images)}
