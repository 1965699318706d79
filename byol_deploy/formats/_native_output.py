"""What native libraries print to the process's standard output and error, past Python."""

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
def captured(said: list[str], descriptor: int = 1) -> Iterator[None]:
    """Catch what is written to a file descriptor (1 is standard output, 2 is error) and put its lines into ``said``.

    The descriptor is the whole process's: what other threads write meanwhile is among the lines. Keep it short, and
    give the lines that are not the library's back with :func:`give_back`.
    """
    with _LOCK, tempfile.TemporaryFile() as file:
        stream = sys.stdout if descriptor == 1 else sys.stderr
        if stream is not None:
            stream.flush()
        try:
            before = os.dup(descriptor)
        except OSError:  # a process without it
            yield
            return
        os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)  # C's own buffer
            os.dup2(before, descriptor)
            os.close(before)
            file.seek(0)
            said += file.read().decode("utf-8", "replace").splitlines()


def give_back(lines: list[str], descriptor: int = 1) -> None:
    """Write lines after all."""
    if lines:
        os.write(descriptor, ("\n".join(lines) + "\n").encode())
