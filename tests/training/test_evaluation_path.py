"""The two implementations of the evaluation transform agree on every file, and disagree when one of them is wrong."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byol_deploy import images, preprocess
from byol_deploy.awkward import awkward_files
from byol_deploy.errors import DataError
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training import evaluation_path
from byol_deploy.training.evaluation_path import reference_pixels, reference_tensor

CONTRACTS = [
    Preprocessing(28),
    Preprocessing(32, 37, "bilinear"),
    Preprocessing(96, 110, "lanczos", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
    Preprocessing(224, 256),
    Preprocessing(224),
    Preprocessing(31, 40, "box"),
    Preprocessing(33, filter="hamming"),
]


def colours(height: int = 37, width: int = 53, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def transparent_palette() -> Image.Image:
    image = Image.fromarray(colours()).quantize(16)
    image.info["transparency"] = 3
    return image


def sources() -> dict[str, Any]:
    """Images of every mode and kind of source that no awkward file holds."""
    rgb = Image.fromarray(colours())
    deep = np.random.default_rng(0).integers(0, 65536, (37, 53), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "array grey": colours()[..., 0],
        "array grey, one channel": colours(channels=1),
        "array RGB, not contiguous": colours()[::-1, ::2],
        "array RGBA": colours(channels=4),
        "image RGBa": Image.fromarray(colours(channels=4)).convert("RGBa"),
        "image LA": Image.fromarray(colours(channels=4)).convert("LA"),
        "image La": Image.fromarray(colours(channels=4)).convert("LA").convert("La"),
        "image PA": transparent_palette().convert("PA"),
        "image YCbCr": rgb.convert("YCbCr"),
        "image HSV": rgb.convert("HSV"),
        "image CMYK": Image.frombytes("CMYK", (53, 37), colours(channels=4).tobytes()),
        "image I": Image.fromarray(deep.astype(np.int32)),
        "palette": encoded(rgb.quantize(16)),
        "palette, one transparent": encoded(transparent_palette(), transparency=3),
        "RGB with a transparent colour": encoded(rgb, transparency=tuple(colours()[0, 0].tolist())),
        "grey with a transparent value": encoded(rgb.convert("L"), transparency=100),
        "16 bits with a transparent value": encoded(Image.fromarray(deep), transparency=int(deep[0, 0])),
        "16 bits, TIFF": encoded(Image.fromarray(deep), "TIFF"),
        "TIFF, turned": encoded(rgb, "TIFF", exif=exif),
        "WebP with alpha": encoded(Image.fromarray(colours(channels=4)), "WEBP", lossless=True),
        "GIF": encoded(rgb, "GIF"),
        "damaged EXIF": encoded(rgb, exif=b"Exif\0\0this is no TIFF header"),
    }


@pytest.mark.parametrize("contract", CONTRACTS, ids=Preprocessing.describe)
def test_both_implementations_agree_bit_for_bit(contract: Preprocessing, fashion: Path) -> None:
    garments = {path.name: path for path in sorted(fashion.rglob("*.png"))[::40]}
    for name, source in {**awkward_files(), **sources(), **garments}.items():
        shipped = contract(source)
        np.testing.assert_array_equal(reference_pixels(source, contract), shipped, err_msg=name)
        tensor = reference_tensor(source, contract)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), contract.normalize(shipped[None])[0], err_msg=name)


def test_no_source_is_changed() -> None:
    for name, source in sources().items():
        before = source.copy() if isinstance(source, np.ndarray) else source
        raw = source.tobytes() if isinstance(source, Image.Image) else b""
        reference_pixels(source, Preprocessing(28))
        if isinstance(source, np.ndarray):
            np.testing.assert_array_equal(source, before, err_msg=name)
        elif isinstance(source, Image.Image):
            assert source.tobytes() == raw, name


def test_it_shares_no_code_with_what_it_checks() -> None:
    tree = ast.parse(Path(evaluation_path.__file__).read_text(encoding="utf-8"))
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imported]
    assert "torchvision.transforms" in names
    assert [name for name in names if name.startswith("byol_deploy")] == ["byol_deploy.errors"]


def upright_as_stored(image: Image.Image) -> Image.Image:
    return image


def over(*background: int) -> Callable[[Image.Image], Image.Image]:
    right = images._to_rgb

    def to_rgb(image: Image.Image) -> Image.Image:
        if image.mode in ("RGBA", "LA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), rgba).convert("RGB")
        return right(image)

    return to_rgb


def clipped(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.minimum(np.asarray(image), 255).astype(np.uint8)).convert("RGB")


def high_byte(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")


def inverted_cmyk() -> Callable[[Image.Image], Image.Image]:
    right = images._to_rgb

    def to_rgb(image: Image.Image) -> Image.Image:
        if image.mode == "CMYK":
            image = Image.frombytes("CMYK", image.size, bytes(255 - value for value in image.tobytes()))
        return right(image)

    return to_rgb


def alpha_ignored(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").convert("RGB") if not image.mode.startswith("I") else images._grey16_to_rgb(image)


def filtered(name: str) -> dict[str, Image.Resampling]:
    return dict.fromkeys(preprocess._FILTERS, Image.Resampling[name])


def not_antialiased() -> Callable[..., Image.Image]:
    """Bicubic at the sampling points alone where the image shrinks, as OpenCV and PyTorch's plain interpolation do."""
    right = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *how: Any) -> Image.Image:
        if size[0] >= image.width:
            return right(image, size, *how)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        sampled = torch.nn.functional.interpolate(tensor, size[::-1], mode="bicubic", align_corners=False)
        return Image.fromarray(sampled[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy())

    return resize


def cropped(dx: int, dy: int) -> Callable[..., Image.Image]:
    def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        return right_crop(image, (left + dx, top + dy, right + dx, bottom + dy))

    right_crop = Image.Image.crop
    return crop


def bgr(source: Any) -> Image.Image:
    return Image.merge("RGB", images.decode(source).split()[::-1])


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "EXIF ignored": lambda patch: patch.setattr(images, "_upright", upright_as_stored),
    "EXIF 5 and 7 exchanged": lambda patch: patch.setattr(
        images, "_UPRIGHT", {**images._UPRIGHT, 5: images._UPRIGHT[7], 7: images._UPRIGHT[5]}
    ),
    "alpha over black": lambda patch: patch.setattr(images, "_to_rgb", over(0, 0, 0)),
    "alpha ignored": lambda patch: patch.setattr(images, "_to_rgb", alpha_ignored),
    "16 bits clipped": lambda patch: patch.setattr(images, "_grey16_to_rgb", clipped),
    "16 bits cut to the high byte": lambda patch: patch.setattr(images, "_grey16_to_rgb", high_byte),
    "CMYK inverted": lambda patch: patch.setattr(images, "_to_rgb", inverted_cmyk()),
    "BGR": lambda patch: patch.setattr(preprocess, "decode", bgr),
    "bilinear": lambda patch: patch.setattr(preprocess, "_FILTERS", filtered("BILINEAR")),
    "lanczos": lambda patch: patch.setattr(preprocess, "_FILTERS", filtered("LANCZOS")),
    "nearest": lambda patch: patch.setattr(preprocess, "_FILTERS", filtered("NEAREST")),
    "no antialias": lambda patch: patch.setattr(Image.Image, "resize", not_antialiased()),
    "crop one to the right": lambda patch: patch.setattr(Image.Image, "crop", cropped(1, 0)),
    "crop one up": lambda patch: patch.setattr(Image.Image, "crop", cropped(0, -1)),
    "crop rounded down": lambda patch: patch.setattr(preprocess, "round", int, raising=False),
    "crop rounded half up": lambda patch: patch.setattr(preprocess, "round", lambda x: int(x + 0.5), raising=False),
    "longer side rounded up": lambda patch: patch.setattr(preprocess, "int", lambda x: -int(-x // 1), raising=False),
}


@pytest.mark.parametrize("size", [28, 224])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_shipped_path_shows(fault: str, size: int) -> None:
    contract = Preprocessing(size)
    expected = {name: reference_pixels(content, contract) for name, content in awkward_files().items()}
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        found = {name: contract(content) for name, content in awkward_files().items()}
    assert any((found[name] != expected[name]).any() for name in expected)
    repaired = {name: contract(content) for name, content in awkward_files().items()}
    assert all((repaired[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"no image", "8 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "EPS"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (Image.new("F", (4, 4)), "floating-point"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "70000"),
        (Path("/nowhere/to/be/found.png"), "found.png"),
    ],
)
def test_what_cannot_be_decoded_is_named(source: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        reference_pixels(source, Preprocessing(28))
