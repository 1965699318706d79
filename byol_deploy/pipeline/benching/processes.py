"""Processes that hold one file each, seen from the side that tells them what to do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from byol_deploy.bench import CandidateFailed
from byol_deploy.pipeline.benching.worker import receive, send

PATIENCE_S = 600.0
"""An answer that takes longer never comes."""

_PROGRAM = Path(__file__).with_name("worker.py")


class Worker:
    """One process. Whatever goes wrong in it is a :class:`byol_deploy.bench.CandidateFailed` with the reason.

    Args:
        what: What it holds, see :mod:`byol_deploy.pipeline.benching.worker`.
        patience_s: Seconds to wait for any one answer; then the process is ended.
        environment: Environment variables beside those of this process.

    Attributes:
        start_s: From the call of the program until Python, NumPy and byol-deploy's own code were there.
        import_s: Then until the engine was imported.
        peak_bytes: The most memory that it has had so far; None where it is not known.
    """

    def __init__(
        self,
        what: Mapping[str, Any],
        *,
        patience_s: float = PATIENCE_S,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.patience_s = patience_s
        self.peak_bytes: int | None = None
        self._late = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            # Where this process finds its packages, that one must too; a user's own module:callable above all.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
        )
        try:
            answer, _ = self._ask(what)
        except BaseException:
            self.close()
            raise
        self.import_s = float(answer.get("import_s", 0.0))
        self.start_s = time.perf_counter() - began - self.import_s

    def __enter__(self) -> Worker:
        """The process is there already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()

    def open(self, threads: int) -> float:
        """Open the file with this number of threads; the seconds that it took."""
        return float(self._ask({"do": "open", "threads": threads})[0]["seconds"])

    def run(self, threads: int, images: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs, (N, D) float32 by name, for images (N, H, W, 3) uint8; opened with ``threads`` before."""
        return self._ask({"do": "run", "threads": threads}, {"images": images})[1]

    def first(self, threads: int, images: np.ndarray) -> float:
        """The same for the sake of the time that it takes inside the process, in seconds."""
        return float(self._ask({"do": "run", "threads": threads}, {"images": images})[0]["seconds"])

    def keep(self, images: np.ndarray) -> None:
        """Hand over (N, H, W, 3) uint8, whose first ones :meth:`block` takes."""
        self._ask({"do": "images"}, {"images": images})

    def block(self, threads: int, batch: int, calls: int) -> list[float]:
        """Wall times of calls in a row on the first ``batch`` images, in milliseconds."""
        asked = {"do": "time", "threads": threads, "batch": batch, "calls": calls}
        return [float(value) for value in self._ask(asked)[0]["times_ms"]]

    def close(self) -> None:
        """End the process; more than once does no harm."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()

    def _ask(
        self, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(self.patience_s, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            send(process.stdin, message, arrays)
            answer, found = receive(process.stdout)
        except (EOFError, OSError, ValueError) as error:
            raise CandidateFailed(self._last_words()) from error
        finally:
            timer.cancel()
        if "error" in answer:
            raise CandidateFailed(str(answer["error"]))
        self.peak_bytes = answer.get("peak_bytes", self.peak_bytes)
        return answer, found

    def _give_up(self) -> None:
        self._late = True
        self._process.kill()

    def _last_words(self) -> str:
        if self._late:
            return f"it gave no answer within {self.patience_s:g} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        size = os.fstat(self._said.fileno()).st_size
        self._said.seek(max(0, size - 4000))
        lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return f"its process {how}" + (f": {lines[-1].strip()[:300]}" if lines else "")


def empty_process_bytes() -> int | None:
    """The most memory that a process takes which opens nothing: the zero that others are compared with."""
    try:
        with Worker({}) as nothing:
            return nothing.peak_bytes
    except CandidateFailed:
        return None
