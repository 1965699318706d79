"""Writing so that nothing half-written is ever taken for whole.

Files and folders are written beside their target under a name that begins with a dot and contains ``.partial-``, and
renamed when they are complete. What a killed run left there is removed by the next run that writes the same target; a
run that is still alive holds a lock on its own and keeps it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from byol_deploy.errors import OutputError
from byol_deploy.images import printable

try:
    import fcntl
except ImportError:  # Windows: no lock, so leftovers of other runs stay (see _unlocked)
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial-"
_PREVIOUS = ".previous-"
# What the place that we write to can do to us; any other OSError is somebody else's.
_PLACE = {
    errno.ENOSPC: "the disk is full; free some space or choose another --out",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another --out",
    errno.EFBIG: "the file would be larger than is allowed here; choose another --out",
    errno.EROFS: "it is on a read-only file system; choose another --out",
    errno.EACCES: "writing there is not permitted; choose another --out",
    errno.EPERM: "writing there is not permitted; choose another --out",
    errno.EIO: "the device reports an input/output error; choose another --out",
    errno.ENOTDIR: "a part of its path is a file; choose another --out",
    errno.EEXIST: "a part of its path is a file; choose another --out",
    errno.EBUSY: "it is in use, perhaps as a mount point; choose a folder inside it",
    errno.ENAMETOOLONG: "its name is too long; choose another --out",
    errno.EINVAL: "its name is not valid there; choose another --out",
}
# Said of the place before the work begins; later on, a missing file is somebody's bug.
_OPENING = {errno.ENOENT: "its folder does not exist and cannot be made; choose another --out"}
_NEARLY_NOTHING_BYTES = 1 << 16


@contextlib.contextmanager
def publish_folder(target: str | os.PathLike[str], may_replace: Callable[[Path], None]) -> Iterator[Path]:
    """Give a temporary folder beside ``target``; rename it to ``target`` when the block ends without an error.

    Args:
        target: The folder to be. Missing parents are made. A link is followed.
        may_replace: Called with a ``target`` that exists and is not empty, at the start and again before the rename;
            it raises OutputError unless that may be replaced. The old folder is renamed aside, the new one renamed in,
            and only then the old one deleted.

    Yields:
        The temporary folder, empty.

    Raises:
        OutputError: The target is a file or may not be replaced, or the place is full or cannot be written. The old
            folder is still there then, unchanged.
    """
    final = Path(os.path.realpath(target))
    shown = printable(target)
    with _explained(shown, final.parent, opening=True):
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(final)
        _check_folder(final, shown, may_replace)
        partial = _beside(final, _PARTIAL)
        partial.mkdir()
    lock = _lock(partial)
    try:
        with _explained(shown, partial):
            yield partial
            _check_folder(final, shown, may_replace)
            _flush(partial)
            _swap(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        _release(lock)


@contextlib.contextmanager
def publish_file(target: str | os.PathLike[str], *, force: bool = False) -> Iterator[IO[bytes]]:
    """Give a binary file to write (and seek in); rename it to ``target`` when the block ends without an error.

    Args:
        target: The file to be. Missing parents are made. A link is followed.
        force: Replace a file that is there.

    Yields:
        The temporary file, open for writing and reading.

    Raises:
        OutputError: The target is there and ``force`` is off, it is a folder, or the place is full or cannot be
            written. A file that was there is unchanged then.
    """
    final = Path(os.path.realpath(target))
    shown = printable(target)
    with _explained(shown, final.parent, opening=True):
        check_file(target, force=force)
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(final)
        partial = _beside(final, _PARTIAL)
        partial.touch(exist_ok=False)
    lock = _lock(partial)
    try:
        with _explained(shown, partial):
            with open(partial, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_file(target, force=force)
            os.replace(partial, final)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    finally:
        _release(lock)


def check_file(target: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse early, before the work, what :func:`publish_file` would refuse at once.

    Raises:
        OutputError: The target is a folder, or is there and ``force`` is off.
    """
    final = Path(os.path.realpath(target))
    if final.is_dir():
        raise OutputError(f"{printable(target)} is a folder; name a file in it")
    if final.exists() and not force:
        raise OutputError(f"{printable(target)} is there already; choose another --out, or pass --force to replace it")


def _check_folder(final: Path, shown: str, may_replace: Callable[[Path], None]) -> None:
    if final.exists() and not final.is_dir():
        raise OutputError(f"{shown} is a file; choose another --out")
    if final.is_dir() and any(final.iterdir()):
        may_replace(final)


def _swap(partial: Path, final: Path) -> None:
    if not final.is_dir() or not any(final.iterdir()):
        # POSIX renames over an empty folder, Windows does not.
        with contextlib.suppress(OSError):
            final.rmdir()
        os.rename(partial, final)
        return
    aside = _beside(final, _PREVIOUS)
    aside.mkdir()
    lock = _lock(aside)
    try:
        os.rename(final, aside / "old")
        try:
            os.rename(partial, final)
        except BaseException:
            os.rename(aside / "old", final)
            raise
    finally:
        # Either the new folder is in place and the old one goes, or the old one is back and this is empty.
        shutil.rmtree(aside, ignore_errors=True)
        _release(lock)


def _beside(final: Path, kind: str) -> Path:
    # Made by mkdir and open rather than by tempfile, so that permissions follow the umask as for any other file.
    return final.parent / f".{final.name}{kind}{os.getpid()}-{secrets.token_hex(4)}"


def _clear_leftovers(final: Path) -> None:
    """Remove what killed runs left beside ``final``; put back a folder that was killed between the two renames."""
    for path in final.parent.iterdir():
        if path.name.startswith(f".{final.name}{_PREVIOUS}") and _unlocked(path):
            old = path / "old"
            if not final.exists() and old.is_dir():
                os.rename(old, final)
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{final.name}{_PARTIAL}") and _unlocked(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _lock(path: Path) -> int | None:
    """Hold a lock on a file or folder for as long as this process lives; None where there are no such locks."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody else holds it, or a network file system that has no locks
        os.close(handle)
        return None
    return handle


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _unlocked(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        lock = _lock(path)
    except OSError:
        return False
    _release(lock)
    return lock is not None


@contextlib.contextmanager
def _explained(shown: str, place: Path, *, opening: bool = False) -> Iterator[None]:
    """Turn what the place did to us into an OutputError."""
    try:
        yield
    except OSError as error:
        reason = (_PLACE | _OPENING if opening else _PLACE).get(error.errno or 0)
        if reason is None or not _is_about(error, place):
            raise
        raise OutputError(f"{shown} cannot be written: {reason}") from error
    except RuntimeError as error:
        # Native writers (torch's, for one) report a full disk as a RuntimeError of their own.
        if not place.is_dir() or shutil.disk_usage(place).free > _NEARLY_NOTHING_BYTES:
            raise
        raise OutputError(f"{shown} cannot be written: {_PLACE[errno.ENOSPC]}") from error


def _is_about(error: OSError, place: Path) -> bool:
    if not isinstance(error.filename, str | bytes):
        # A failed write names no file; these say that a place is full or gone, and this is the one we write to.
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    name = Path(os.fsdecode(error.filename))
    return name.is_relative_to(place) or place.is_relative_to(name)


def _flush(folder: Path) -> None:
    """Bring everything to the disk before the rename, so that a power cut cannot leave empty files under the name."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb+") as file:
                os.fsync(file.fileno())
