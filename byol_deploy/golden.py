"""Golden cases: real images, and what the trained model gives for them. A self-test that travels with a file.

Two kinds: preprocessed pixels, which test the graph alone, and whole image files as bytes, which test the device's own
decoder and preprocessing too. Packed as an npz file, and read as data from a stranger.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from byol_deploy.errors import BundleError

MAX_GOLDEN_BYTES = 64 << 20
MAX_GOLDEN_UNPACKED_BYTES = 256 << 20
MAX_GOLDEN_FILES = 64
MAX_GOLDEN_FILE_BYTES = 4 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Golden:
    """A few real images and what the trained PyTorch model gives for them.

    Attributes:
        images: (n, H, W, 3) uint8 RGB, n at least 1, already preprocessed.
        outputs: For each output its expected values, (n, D) float32, finite.
        files: Encoded image files by name, e.g. "exif-6.jpg"; at most 64, each of 1 byte to 4 MiB.
        pixels_sha256: For each of these files the hash of its preprocessed pixels on the exporting machine, see
            :func:`pixels_hash`.
        file_outputs: For each output its expected values for these files, (m, D) float32, in the order of ``files``.

    Raises:
        ValueError: Another shape, type, or a value that is not finite; files without hashes or outputs.
    """

    images: np.ndarray
    outputs: Mapping[str, np.ndarray]
    files: Mapping[str, bytes] = field(default_factory=dict)
    pixels_sha256: Mapping[str, str] = field(default_factory=dict)
    file_outputs: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
            raise ValueError(f"golden images are {images.shape} {images.dtype}; they must be (n, H, W, 3) uint8")
        if not self.outputs:
            raise ValueError("golden cases have no expected output")
        _check_outputs("golden output", self.outputs, len(images))
        if len(self.files) > MAX_GOLDEN_FILES:
            raise ValueError(f"there are {len(self.files)} golden files; at most {MAX_GOLDEN_FILES} are allowed")
        for name, content in self.files.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"a golden file is called {name[:80]!r}; use letters, digits, dots and dashes")
            if not 0 < len(content) <= MAX_GOLDEN_FILE_BYTES:
                raise ValueError(
                    f"golden file {name} has {len(content)} bytes; 1 to {MAX_GOLDEN_FILE_BYTES} are allowed"
                )
        if set(self.pixels_sha256) != set(self.files):
            raise ValueError("golden files and the hashes of their pixels do not have the same names")
        for name, digest in self.pixels_sha256.items():
            if not _SHA256.fullmatch(digest):
                raise ValueError(f"the pixels of golden file {name} have the hash {digest[:80]!r}; use 64 hex digits")
        if set(self.file_outputs) != (set(self.outputs) if self.files else set()):
            raise ValueError("golden files must have expected values of the same outputs as the golden images")
        _check_outputs("golden output of files", self.file_outputs, len(self.files))
        for name, values in self.file_outputs.items():
            if values.shape[1] != self.outputs[name].shape[1]:
                raise ValueError(f"golden output {name} has two widths, for images and for files")


def pixels_hash(pixels: np.ndarray) -> str:
    """SHA-256 of preprocessed pixels (H, W, 3) uint8, row by row: 64 lower-case hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(pixels, np.uint8).tobytes()).hexdigest()


def golden_to_bytes(golden: Golden) -> bytes:
    """Pack golden cases as an npz file. Equal cases give equal bytes.

    Members: ``images``, ``outputs.<output>``; and where there are files ``files.<name>`` (their bytes),
    ``pixels.<name>`` (32 bytes of hash) and ``file_outputs.<output>``. Versions that know no files leave these out.
    """
    packed = io.BytesIO()
    arrays = {"images": golden.images, **{f"outputs.{name}": value for name, value in golden.outputs.items()}}
    for name, content in golden.files.items():
        arrays[f"files.{name}"] = np.frombuffer(content, np.uint8)
        arrays[f"pixels.{name}"] = np.frombuffer(bytes.fromhex(golden.pixels_sha256[name]), np.uint8)
    arrays |= {f"file_outputs.{name}": value for name, value in golden.file_outputs.items()}
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            # np.savez would write the current time into the archive.
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, member.getvalue())
    return packed.getvalue()


def golden_from_bytes(data: bytes) -> Golden:
    """Read what :func:`golden_to_bytes` wrote, from a stranger: no pickle, and no more memory than the limits allow.

    Raises:
        BundleError: Not such a file, damaged, or larger than the limits.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        if len(data) > MAX_GOLDEN_BYTES:
            raise ValueError(f"it has {len(data)} bytes, more than the limit of {MAX_GOLDEN_BYTES}")
        left = MAX_GOLDEN_UNPACKED_BYTES
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                # The size in the directory may lie: what counts is what comes out.
                with archive.open(entry) as member:
                    content = member.read(left + 1)
                if len(content) > left:
                    raise ValueError(f"it unpacks to more than {MAX_GOLDEN_UNPACKED_BYTES} bytes")
                left -= len(content)
                arrays[entry.filename.removesuffix(".npy")] = _array(content, entry.filename)
        if "images" not in arrays:
            raise ValueError("it holds no images")
        return Golden(
            images=arrays["images"],
            outputs=_under(arrays, "outputs."),
            files={name: _bytes(array, name) for name, array in _under(arrays, "files.").items()},
            pixels_sha256={name: _bytes(array, name).hex() for name, array in _under(arrays, "pixels.").items()},
            file_outputs=_under(arrays, "file_outputs."),
        )
    except Exception as error:
        # Malformed archives and headers make zipfile, its decompressors and NumPy's parser raise nearly anything.
        again = "export it again with: byol-deploy export CHECKPOINT"
        raise BundleError(f"the golden cases are damaged: {error}; {again}") from error


def _check_outputs(what: str, outputs: Mapping[str, np.ndarray], count: int) -> None:
    for name, values in outputs.items():
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != count:
            raise ValueError(f"{what} {name} is {values.shape} {values.dtype}; it must be ({count}, D) float32")
        if not np.isfinite(values).all():
            raise ValueError(f"{what} {name} holds NaN or infinite values")


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def _bytes(array: np.ndarray, name: str) -> bytes:
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"{name[:80]} is {array.shape} {array.dtype}, not bytes")
    return array.tobytes()


def _array(content: bytes, name: str) -> np.ndarray:
    """Parse one .npy member. NumPy's reader would allocate whatever size the header claims, so compare first."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} has an unknown npy version")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    body = content[stream.tell() :]
    if by_columns or dtype not in (np.dtype("uint8"), np.dtype("<f4")):
        raise ValueError(f"{name} has type {dtype}, which golden cases never have")
    if len(shape) > 4 or math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(f"{name} claims shape {shape} but holds {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape)
