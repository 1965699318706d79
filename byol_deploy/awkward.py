"""Image files on which decoders and preprocessings disagree, made on the spot from one drawn picture.

A folder of ordinary photographs says nothing about EXIF orientation, CMYK, transparency or 16 bits: most hold none.
These files do, so that a comparison from file bytes on also reaches what the user's next folder may hold. The picture
is colourful, asymmetric and full of fine detail: swapped channels, a mirrored or turned image, a crop that is off by
one, another filter or a missing antialias each change the pixels of at least one file, at small and at large sizes.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

_ORIENTATION_TAG = 0x0112
_LONG_PX = 97


def awkward_files() -> dict[str, bytes]:
    """Make the awkward files: file name, with its extension, to encoded file; about 60 kB in all.

    =================================  =============================================================================
    file                               what it shows
    =================================  =============================================================================
    ``rgb.png``                        nothing special: a fault here is in the resize, the crop or the channels
    ``rgb-large.png``                  larger than usual inputs: an antialias that is missing
    ``crop-{41,42,43}x32.png``         odd and even margins: a centre crop that is off by one
    ``black.png``                      nothing at all: numbers that are not finite where there is no variance
    ``1x1.png``                        one pixel
    ``3x97.png``, ``97x3.png``         extreme aspect; at sizes above about 1600 px the resize would exceed Pillow's
                                       limit on pixels, and preprocessing refuses them
    ``exif-{2..8}.{png,jpg}``          each EXIF orientation; the picture upright is that of ``rgb.png``
    ``jpeg.jpg``                       baseline JPEG with halved chroma
    ``progressive.jpg``                progressive JPEG
    ``cmyk.jpg``                       CMYK, stored inverted as Adobe does
    ``grey.png``, ``bilevel.png``      8 bits and 1 bit of grey
    ``grey16.png``                     16 bits of grey over their full range: clipping to 8 bits shows
    ``grey-alpha.png``, ``rgba.png``   transparency in steps, over colours that differ from what lies behind
    ``palette-alpha.png``              a palette with transparent and half transparent entries
    ``icc-wide-gamut.png``             a profile of wide gamut. Colour profiles are not applied: the pixels are those
                                       of ``rgb.png``
    =================================  =============================================================================

    Returns:
        A new dictionary, the same bytes in every process with the same Pillow and the compression libraries it was
        built with. Other versions may encode otherwise: PNG files still decode to the same pixels (:data:`LOSSLESS`),
        JPEG files to nearly the same ones.
    """
    return dict(_made())


@functools.cache
def _made() -> dict[str, bytes]:
    return {name: make() for name, make in _MAKERS.items()}


def _picture(width: int, height: int) -> np.ndarray:
    """Draw (height, width, 3) uint8 in integers alone, so that it is the same on every processor."""
    y, x = np.indices((height, width))
    red = 255 * x // max(width - 1, 1)
    green = 255 * y // max(height - 1, 1)
    # A ramp that goes neither along x nor along y, so no flip or turn maps the picture onto itself.
    blue = (40 + 3 * x + 5 * y) % 256 * 4 // 5
    picture = np.stack([red, green, blue], axis=-1)
    # Fine detail that an antialias must average: single-pixel checks on one side, thin lines on the other.
    checks = (x + y) % 2 == 0
    picture[checks & (x < width // 3)] //= 3
    lines = (2 * x + y) % 7 == 0
    picture[lines & (y > height // 2) & (x >= width // 3)] = (250, 240, 20)
    # Two solid shapes off the centre, in colours that differ in every channel.
    picture[(x - width // 4) ** 2 + (y - height // 3) ** 2 < (min(width, height) // 6) ** 2] = (230, 30, 90)
    picture[(x > 2 * width // 3) & (y < height // 4)] = (10, 60, 200)
    return picture.astype(np.uint8)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _png(pixels: np.ndarray, **options: Any) -> bytes:
    return _encode(Image.fromarray(pixels), "PNG", optimize=True, **options)


def _jpeg(image: Image.Image, **options: Any) -> bytes:
    return _encode(image, "JPEG", quality=88, **options)


_upright = functools.partial(_picture, 61, 44)


def _turned(orientation: int, kind: str) -> bytes:
    """The picture as a camera held that way stores it, with the tag that turns it upright (EXIF 2.3, 4.6.4 A)."""
    upright = _upright()
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    stored = np.ascontiguousarray(stored)
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = orientation
    return _png(stored, exif=exif) if kind == "png" else _jpeg(Image.fromarray(stored), exif=exif)


def _cmyk() -> bytes:
    # Not Image.convert: its CMYK has no black, and a wrong black would not show.
    ink = 255 - _upright().astype(np.int64)
    black = ink.min(axis=2, keepdims=True) // 2
    colours = (ink - black) * 255 // (255 - black)
    return _jpeg(Image.fromarray(np.concatenate([colours, black], axis=2).astype(np.uint8), "CMYK"))


def _grey16() -> bytes:
    red, green, blue = np.moveaxis(_upright().astype(np.int64), -1, 0)
    grey = 77 * red + 150 * green + 29 * blue  # 0 to 65280
    grey -= grey.min()
    return _png((grey * 65535 // grey.max()).astype(np.uint16))


def _alpha(height: int, width: int) -> np.ndarray:
    """(height, width, 1) uint8: bands of every kind, from fully transparent to opaque."""
    y, x = np.indices((height, width))
    alpha: np.ndarray = np.minimum((x + 2 * y) // 12 * 23, 255).astype(np.uint8)
    return alpha[..., None]


def _grey_alpha() -> bytes:
    picture = _upright()
    return _png(np.concatenate([picture[..., :1], _alpha(*picture.shape[:2])], axis=2))


def _rgba() -> bytes:
    picture = _upright()
    return _png(np.concatenate([picture, _alpha(*picture.shape[:2])], axis=2))


def _palette_alpha() -> bytes:
    picture = _upright().astype(np.int64)
    index = picture[..., 0] // 64 * 16 + picture[..., 1] // 64 * 4 + picture[..., 2] // 64
    entry = np.arange(64)
    palette = np.stack([entry // 16, entry // 4 % 4, entry % 4], axis=1) * 85
    image = Image.frombytes("P", (index.shape[1], index.shape[0]), index.astype(np.uint8).tobytes())
    image.putpalette(palette.astype(np.uint8).tobytes())
    return _encode(image, "PNG", transparency=bytes(0 if n % 5 == 0 else 128 if n % 5 == 1 else 255 for n in entry))


def _bilevel() -> bytes:
    return _encode(Image.fromarray(_upright()[..., 1] > 110), "PNG")


def _wide_gamut_profile() -> bytes:
    """An ICC profile (ICC.1:2001-04, version 2.4) of matrix and gamma, with far wider primaries than sRGB.

    By hand, because a profile that LittleCMS makes holds the time of its making.
    """

    def fixed(*numbers: float) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(x, y, z)

    name = b"wide gamut\0"
    white = (0.9642, 1.0, 0.8249)  # D50, the connection space's
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(1.8 * 256))
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78 + (-len(name)) % 4 + 2),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(*white),
        # The columns add up to the white point.
        b"rXYZ": xyz(0.7977, 0.2880, 0.0),
        b"gXYZ": xyz(0.1352, 0.7119, 0.0),
        b"bXYZ": xyz(0.0313, 0.0001, 0.8249),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    offset = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size, version, made = offset + len(data), 0x02400000, (2024, 1, 1, 0, 0, 0)
    header = struct.pack(">I4xI", size, version) + b"mntrRGB XYZ " + struct.pack(">6H", *made)
    header += b"acsp" + bytes(28) + fixed(*white) + bytes(48)
    return header + table + data


_MAKERS: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: _png(_upright()),
    "rgb-large.png": lambda: _png(_picture(263, 239) // 51 * 51),
    "crop-41x32.png": lambda: _png(_picture(41, 32)),
    "crop-42x32.png": lambda: _png(_picture(42, 32)),
    "crop-43x32.png": lambda: _png(_picture(43, 32)),
    "black.png": lambda: _png(np.zeros((32, 32), np.uint8)),
    "1x1.png": lambda: _png(np.array([[[200, 90, 30]]], np.uint8)),
    "3x97.png": lambda: _png(_picture(3, _LONG_PX)),
    "97x3.png": lambda: _png(_picture(_LONG_PX, 3)),
    "exif-2.jpg": lambda: _turned(2, "jpg"),
    "exif-3.png": lambda: _turned(3, "png"),
    "exif-4.jpg": lambda: _turned(4, "jpg"),
    "exif-5.jpg": lambda: _turned(5, "jpg"),
    "exif-6.png": lambda: _turned(6, "png"),
    "exif-7.png": lambda: _turned(7, "png"),
    "exif-8.jpg": lambda: _turned(8, "jpg"),
    "jpeg.jpg": lambda: _jpeg(Image.fromarray(_upright()), subsampling="4:2:0"),
    "progressive.jpg": lambda: _jpeg(Image.fromarray(_upright()), progressive=True),
    "cmyk.jpg": _cmyk,
    "grey.png": lambda: _png(_upright()[..., 1]),
    "bilevel.png": _bilevel,
    "grey16.png": _grey16,
    "grey-alpha.png": _grey_alpha,
    "rgba.png": _rgba,
    "palette-alpha.png": _palette_alpha,
    "icc-wide-gamut.png": lambda: _png(_upright(), icc_profile=_wide_gamut_profile()),
}

LOSSLESS: frozenset[str] = frozenset(name for name in _MAKERS if name.endswith(".png"))
"""Those of :func:`awkward_files` whose decoded pixels are the same everywhere."""
