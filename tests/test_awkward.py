"""The built-in awkward files are what they say, and the same in every process."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from byol_deploy.awkward import LOSSLESS, awkward_files
from byol_deploy.images import decode
from byol_deploy.preprocess import Preprocessing


def opened(name: str) -> Image.Image:
    return Image.open(io.BytesIO(awkward_files()[name]))


def pixels(name: str) -> np.ndarray:
    return np.asarray(decode(awkward_files()[name])).astype(int)


def digest() -> str:
    whole = hashlib.sha256()
    for name, content in awkward_files().items():
        whole.update(name.encode() + content)
    return whole.hexdigest()


def test_every_process_makes_the_same_bytes() -> None:
    code = (
        "import hashlib; from byol_deploy.awkward import awkward_files as f; whole = hashlib.sha256(); "
        "[whole.update(n.encode() + c) for n, c in f().items()]; print(whole.hexdigest())"
    )
    for seed in ("1", "2"):
        other = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert other.stdout.strip() == digest()


def test_what_a_caller_does_to_the_dictionary_stays_with_the_caller() -> None:
    before = digest()
    awkward_files().clear()
    assert digest() == before


def test_the_files_are_small() -> None:
    assert sum(map(len, awkward_files().values())) < 80_000


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("rgb.png", "PNG", "RGB"),
        ("jpeg.jpg", "JPEG", "RGB"),
        ("progressive.jpg", "JPEG", "RGB"),
        ("cmyk.jpg", "JPEG", "CMYK"),
        ("grey.png", "PNG", "L"),
        ("bilevel.png", "PNG", "1"),
        ("grey16.png", "PNG", "I;16"),
        ("grey-alpha.png", "PNG", "LA"),
        ("rgba.png", "PNG", "RGBA"),
        ("palette-alpha.png", "PNG", "P"),
    ],
)
def test_each_file_is_of_its_kind(name: str, kind: str, mode: str) -> None:
    image = opened(name)
    assert (image.format, image.mode) == (kind, mode)


def test_special_content() -> None:
    assert opened("progressive.jpg").info["progressive"]
    assert "progressive" not in opened("jpeg.jpg").info
    grey = np.asarray(opened("grey16.png"))
    assert (grey.min(), grey.max()) == (0, 65535)
    assert len(np.unique(grey % 257)) > 100  # the low byte says something too
    for name in ("rgba.png", "grey-alpha.png"):
        alpha = np.asarray(opened(name))[..., -1]
        assert {0, 255} < set(np.unique(alpha).tolist())
    assert set(opened("palette-alpha.png").info["transparency"]) == {0, 128, 255}
    ink = np.asarray(opened("cmyk.jpg"))
    assert (np.ptp(ink.reshape(-1, 4), axis=0) > 60).all()
    assert b"eXIf" in awkward_files()["exif-6.png"]


def test_every_orientation_is_there_and_upright_is_one_picture() -> None:
    upright = pixels("rgb.png")
    names = [name for name in awkward_files() if name.startswith("exif-")]
    assert sorted(opened(name).getexif()[0x0112] for name in names) == [2, 3, 4, 5, 6, 7, 8]
    assert {name.rpartition(".")[2] for name in names} == {"png", "jpg"}
    lossy = np.abs(pixels("jpeg.jpg") - upright).mean()
    for name in names:
        found = pixels(name)
        assert found.shape == upright.shape
        # JPEG's own loss, which single-pixel checks make large; a wrong orientation is far above it.
        limit = 0 if name.endswith("png") else 1.1 * lossy
        assert np.abs(found - upright).mean() <= limit, name
        stored = np.asarray(opened(name)).astype(int)
        if stored.shape == upright.shape:
            assert np.abs(stored - upright).mean() > 3 * lossy, name


def test_the_profile_is_real_and_not_applied() -> None:
    image = opened("icc-wide-gamut.png")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    applied = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"))
    assert applied is not None
    upright = pixels("rgb.png")
    assert np.abs(np.asarray(applied).astype(int) - upright).mean() > 5
    np.testing.assert_array_equal(pixels("icc-wide-gamut.png"), upright)


def test_cmyk_is_the_same_picture() -> None:
    assert np.abs(pixels("cmyk.jpg") - pixels("rgb.png")).mean() < 6


def test_lossless_names_are_the_png_files() -> None:
    files = awkward_files()
    assert set(files) > LOSSLESS
    for name, content in files.items():
        assert (name in LOSSLESS) == content.startswith(b"\x89PNG"), name


@pytest.mark.parametrize("size", [28, 32, 96, 224, 1600])
def test_all_of_them_can_be_preprocessed(size: int) -> None:
    ours = Preprocessing(size)
    names = awkward_files() if size < 1000 else ["3x97.png", "97x3.png", "1x1.png"]
    for name in names:
        assert ours(awkward_files()[name]).shape == (size, size, 3)


@pytest.mark.parametrize("size", [28, 32, 96, 224])
def test_the_crops_tell_rounding_down_up_and_half_up(size: int) -> None:
    margins = [(int(size * width / 32) - size) / 2 for width in (41, 43)]
    halves = [margin for margin in margins if margin % 1]
    assert {int(margin) % 2 for margin in halves} == {0, 1}, margins
