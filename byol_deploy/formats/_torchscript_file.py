"""A TorchScript file as bytes: a zip archive of stored entries, with the texts that it carries at its end.

The archive is always written in one way: the model's entries first, in PyTorch's order; then the texts, in the order of
their names; nothing compressed, one fixed date, each entry's bytes on a multiple of 64 as PyTorch lays them. So equal
models give equal bytes, texts can be added later, and a reader sees whether a byte between the entries is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from byol_deploy.errors import BundleError
from byol_deploy.images import printable

_TEXTS = "/extra/"
KIND = "a TorchScript file"
"""How messages call such a file; other archives of PyTorch are laid out alike."""

_MAX_TEXT_BYTES = 128 << 20
_ALIGNMENT = 64
_DATE = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER_BYTES = 30
_CHUNK = 1 << 20


def texts(path: Path, kind: str = KIND) -> dict[str, str]:
    """The texts that a file carries (extra files), by key.

    Raises:
        BundleError: It is not a TorchScript file, or damaged.
    """
    found: dict[str, str] = {}
    with _opened(path, kind) as archive:
        for entry in archive.infolist():
            _, _, name = entry.filename.partition(_TEXTS)
            if not name:
                continue
            with archive.open(entry) as member:
                data = member.read(_MAX_TEXT_BYTES + 1)
            if len(data) > _MAX_TEXT_BYTES:
                raise ValueError(f"{name} has more than {_MAX_TEXT_BYTES} bytes")
            if name in found:
                raise ValueError(f"it carries {name} twice")
            found[name] = data.decode("utf-8")
    return found


def write(source: IO[bytes], path: Path) -> None:
    """Write what PyTorch saved without its debug records, whose stack traces name the builder's folders."""
    with zipfile.ZipFile(source) as archive, open(path, "wb") as target:
        _lay_out(archive, target, {})


def add_texts(path: Path, added: Mapping[str, str], kind: str = KIND) -> None:
    """Add texts to a file; its model's entries stay as they lie.

    Raises:
        ValueError: One of the keys is there already.
        BundleError: It is not a TorchScript file, or damaged.
    """
    twice = sorted(set(texts(path, kind)) & set(added))
    if twice:
        raise ValueError(f"{path.name} carries {', '.join(twice)} already")
    written = path.with_name(f"{path.name}.sealed")
    try:
        with _opened(path, kind) as archive, open(written, "wb") as target:
            _lay_out(archive, target, added)
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def content_hash(path: Path, kind: str = KIND) -> str:
    """``sha256:`` and 64 digits over the name and the bytes of every entry but the texts.

    Raises:
        BundleError: It is not a TorchScript file, damaged, or another program wrote the archive anew.
    """
    digest = hashlib.sha256()
    with _opened(path, kind) as archive, open(path, "rb") as file:
        # First, so that no entry can be a bomb: stored entries are never larger than the file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("entries are compressed, which byol-deploy never does")
        same = _Compared(file)
        _lay_out(archive, same, {}, digest)
        other = same.first_difference(os.fstat(file.fileno()).st_size)
        if other is not None:
            raise ValueError(f"byte {other} of the archive is not as it was written")
    return f"sha256:{digest.hexdigest()}"


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise BundleError(f"{printable(path)} does not exist; pass a file that byol-deploy export wrote") from None
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        # All that zipfile is known to raise on a damaged archive: a flipped byte may name a compression of the future.
        raise BundleError(
            f"{printable(path)} is not {kind}, or is damaged: {error}; copy or export it again"
        ) from error


def _lay_out(source: zipfile.ZipFile, target: Any, added: Mapping[str, str], digest: Any = None) -> None:
    """Write the entries of ``source`` and ``added`` texts to the file-like ``target``; hash what is no text."""
    entries = [entry for entry in source.infolist() if not entry.filename.endswith(".debug_pkl")]
    names = [entry.filename for entry in entries]
    if not names or len(set(names)) != len(names):
        raise ValueError("it has no entries, or two of one name")
    model = [entry for entry in entries if _TEXTS not in entry.filename]
    root = names[0].partition("/")[0]
    late: dict[str, zipfile.ZipInfo | bytes] = {entry.filename: entry for entry in entries if _TEXTS in entry.filename}
    late |= {f"{root}{_TEXTS}{key}": value.encode() for key, value in added.items()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for entry in model:
            if digest is not None:
                digest.update(f"{entry.filename}\0{entry.file_size}\0".encode())
            with source.open(entry) as member, _entry(archive, target, entry.filename, entry.file_size) as writer:
                while chunk := member.read(_CHUNK):
                    writer.write(chunk)
                    if digest is not None:
                        digest.update(chunk)
        for name in sorted(late):
            content = late[name]
            size = len(content) if isinstance(content, bytes) else content.file_size
            with _entry(archive, target, name, size) as writer:
                if isinstance(content, bytes):
                    writer.write(content)
                else:
                    with source.open(content) as member:
                        shutil.copyfileobj(member, writer, _CHUNK)


def _entry(archive: zipfile.ZipFile, target: Any, name: str, size: int) -> IO[bytes]:
    entry = zipfile.ZipInfo(name, _DATE)
    # Its defaults depend on the system that writes.
    entry.create_system = 3
    entry.external_attr = 0o600 << 16
    entry.file_size = size
    # An extra field of PyTorch's kind ("FB", length, filling) moves the bytes on to the next multiple of 64.
    begin = target.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + 4
    filling = -begin % _ALIGNMENT
    entry.extra = b"FB" + filling.to_bytes(2, "little") + b"Z" * filling
    return archive.open(entry, "w")


class _Compared:
    """Takes what is written as if it were a file, and notes where another file has other bytes at that place."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0
        self._size = 0
        self._other: dict[int, int] = {}

    def write(self, data: bytes) -> int:
        self._file.seek(self._at)
        found = self._file.read(len(data))
        # A header is written twice: at first without its checksum, at last as it stays.
        self._other.pop(self._at, None)
        if found != bytes(data):
            pairs = zip(found, data, strict=False)
            self._other[self._at] = next((place for place, (a, b) in enumerate(pairs) if a != b), len(found))
        self._at += len(data)
        self._size = max(self._size, self._at)
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, place: int, whence: int = 0) -> int:
        assert whence == 0
        self._at = place
        return place

    def flush(self) -> None:
        pass

    def first_difference(self, size: int) -> int | None:
        """Offset of the first other byte in a file of ``size`` bytes; None when there is none."""
        places = [at + place for at, place in self._other.items()] + ([] if size == self._size else [self._size])
        return min(places, default=None)
