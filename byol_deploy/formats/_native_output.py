"""What native libraries print to the process's standard output, which belongs to the user's data."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

_LOCK = threading.Lock()


@contextlib.contextmanager
def captured(said: list[str]) -> Iterator[None]:
    """Catch what is written to file descriptor 1 and put its lines into ``said``.

    The descriptor is the whole process's: what other threads write meanwhile is among the lines. Keep it short, and
    give the lines that are not the library's back with :func:`give_back`.
    """
    with _LOCK, tempfile.TemporaryFile() as file:
        if sys.stdout is not None:
            sys.stdout.flush()
        try:
            before = os.dup(1)
        except OSError:  # a process without standard output
            yield
            return
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)  # C's own buffer
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            said += file.read().decode("utf-8", "replace").splitlines()


def give_back(lines: list[str]) -> None:
    """Write lines to file descriptor 1 after all."""
    if lines:
        os.write(1, ("\n".join(lines) + "\n").encode())
