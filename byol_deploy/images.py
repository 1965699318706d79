"""Decoding images and finding them in folders: the only place where bytes become pixels.

Every user of the package, training included, decodes through :func:`decode`, so that an image means the same pixels
everywhere.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from byol_deploy.errors import DataError, UsageError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""What :func:`decode` takes: a path, the bytes of an image file, a Pillow image or a uint8 array."""

# Opening these hands the data to Ghostscript or to a handler that somebody registered, or only reads a header.
_NOT_DECODED_HERE = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SHOWN = 5


def decode(source: ImageSource) -> Image.Image:
    """Decode an image to upright 8-bit RGB.

    The first frame is taken (of a Pillow image the current one), the EXIF orientation is applied, transparent pixels
    are laid over white, 16-bit greys are divided by 257 and rounded, every other mode is converted by Pillow. Pillow's
    limits on the number of pixels and on truncated files stay on.

    Args:
        source: A path, the bytes of an image file, a Pillow image, or a uint8 array of shape (H, W), (H, W, 1),
            (H, W, 3) RGB or (H, W, 4) RGBA. What is passed in is not changed.

    Returns:
        A Pillow image of mode "RGB".

    Raises:
        DataError: It cannot be decoded. The message names the file and the reason.
    """
    name = describe(source)
    try:
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source))
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        opened = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
        with Image.open(opened) as image:
            _refuse_unsafe(image)
            return _upright_rgb(image)
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    except Warning as error:  # a warning that the caller's filters turned into an error
        raise DataError(f"{name} was refused: {error}") from error
    except Exception as error:
        # Malformed files make Pillow's plugins raise nearly anything (struct.error, SyntaxError, IndexError, ...).
        raise DataError(f"{name} cannot be decoded: {_reason(error)}") from error


def describe(source: object) -> str:
    """Name an image source for a message: its path, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return printable(source)
    if isinstance(source, bytes):
        return f"an image given as {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"an array of shape {source.shape} and type {source.dtype}"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or f"an image of size {source.size} and mode {source.mode}"
    return f"{type(source).__name__} {source!r:.60}"


def printable(path: str | os.PathLike[str]) -> str:
    """``path`` as text that can always be written as UTF-8 (a POSIX file name may be any bytes)."""
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """List the images below ``folder``, recursively, sorted by their POSIX paths relative to it.

    Images are recognised by file extension, in any case. Names that begin with a dot are skipped, linked folders are
    followed (each folder once).

    Raises:
        DataError: The folder is absent, is a file, cannot be read, or holds no image.
    """
    root = Path(folder)
    shown = printable(root)
    if not root.exists():
        raise DataError(f"{shown} does not exist; pass a folder of images")
    if not root.is_dir():
        raise DataError(f"{shown} is a file; pass a folder of images")
    suffixes = _suffixes()
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def stop(error: OSError) -> None:
        raise DataError(f"{printable(error.filename or root)} cannot be read: {error.strerror}; check its permissions")

    for parent, folders, files in os.walk(root, onerror=stop, followlinks=True):
        status = os.stat(parent)
        # A link to a folder above would make the walk endless. (Windows may report no inode: then all are walked.)
        if status.st_ino and (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in suffixes and path.is_file():
                found.append(path)
    if not found:
        raise DataError(f"{shown} holds no image (looked for .jpg, .png, .webp, .tif and the like, in sub-folders too)")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def labels_from_folders(
    paths: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str]
) -> tuple[np.ndarray, list[str]]:
    """Read the labels of a LABELLED_FOLDER: the first folder below ``root`` is the class.

    Args:
        paths: Image paths below ``root``, as :func:`find_images` returns them.
        root: The labelled folder.

    Returns:
        Labels (n,) int64, and the sorted class names that they index.

    Raises:
        DataError: An image lies directly in ``root``, or there are fewer than two classes.
    """
    shown = printable(root)
    names: list[str] = []
    loose: list[str] = []
    for path in paths:
        parts = Path(path).relative_to(root).parts
        if len(parts) < 2:
            loose.append(printable(path))
        else:
            names.append(parts[0])
    if loose:
        raise DataError(
            f"{shown} must have one sub-folder per class, but {len(loose)} images lie directly in it "
            f"({', '.join(loose[:_SHOWN])}); move them into a class folder"
        )
    classes = sorted(set(names))
    if len(classes) < 2:
        raise DataError(
            f"{shown} has {len(classes)} class folder(s) with images ({', '.join(classes) or 'none'}); "
            "labels need at least 2 sub-folders, one per class"
        )
    index = {name: number for number, name in enumerate(classes)}
    return np.array([index[name] for name in names], dtype=np.int64), classes


class BadImages:
    """Counts and lists the images of a run that could not be read, and fails the run when they are too many.

    Attributes:
        items: (name, reason) of each bad image, in the order in which they were met.
        max_share: The share of bad images, 0 to 1, up to which a run goes on.
    """

    def __init__(self, max_share: float = 0.05) -> None:
        if not 0 <= max_share <= 1:
            raise UsageError(f"--max-bad-share is {max_share}; use a share from 0 to 1, e.g. 0.05")
        self.max_share = max_share
        self.items: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, path: ImageSource, reason: str | BaseException) -> None:
        """Note one bad image."""
        self.items.append((describe(path), str(reason)))

    def check(self, total: int) -> None:
        """Fail when more than ``max_share`` of ``total`` images (the bad ones included) are bad, or all are.

        Raises:
            DataError: Lists the first few of them.
        """
        bad = len(self.items)
        if bad and (bad >= total or bad / total > self.max_share):
            limit = "none is left" if bad >= total else f"at most {self.max_share:.1%} may be (--max-bad-share)"
            raise DataError(f"{bad} of {total} images cannot be read; {limit}. {self._first()}")

    def summary(self) -> str:
        """One sentence for a person, empty when no image was bad."""
        if not self.items:
            return ""
        return f"{len(self.items)} bad image(s) skipped. {self._first()}"

    def _first(self) -> str:
        shown = "; ".join(reason if name in reason else f"{name}: {reason}" for name, reason in self.items[:_SHOWN])
        rest = len(self.items) - _SHOWN
        return shown + (f"; and {rest} more" if rest > 0 else "")


def _suffixes() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _NOT_DECODED_HERE)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image file, or one that is damaged at its start"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return str(error) or type(error).__name__


def _refuse_unsafe(image: Image.Image) -> None:
    if image.format in _NOT_DECODED_HERE:
        raise DataError(f"is a {image.format} file, which is not decoded here; convert it to PNG")
    limit = Image.MAX_IMAGE_PIXELS
    pixels = image.width * image.height
    if limit is not None and pixels > limit:
        # Pillow only warns up to twice this size.
        raise DataError(
            f"has {image.width} x {image.height} pixels, more than Pillow's limit of {limit} (a decompression bomb?); "
            "scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise DataError("is not uint8; pass 8-bit pixels, e.g. (x * 255).round().astype('uint8') for floats in 0..1")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise DataError("is not one image; pass (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA")
    if array.size == 0:
        raise DataError("holds no pixel")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width == 0 or image.height == 0:
        raise DataError("holds no pixel")
    # Before the orientation is read: the TIFF plugin applies it while loading, and then drops the tag.
    image.load()
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        # A damaged EXIF block says nothing about the pixels, which are there: take them as they lie.
        orientation = 1
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    upright = image.transpose(method)
    if "transparency" in image.info:
        upright.info["transparency"] = image.info["transparency"]
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if mode == "F":
        raise DataError("has floating-point pixels, whose range nobody knows; convert it to 8 or 16 bits first")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if mode in ("La", "PA"):
            image = image.convert("LA" if mode == "La" else "RGBA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if mode == "RGB":
        return image.copy()
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(f"has grey values from {low} to {high}; 16-bit images have 0 to 65535: convert it to 8 bits")
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
