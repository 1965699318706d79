"""What a fault is, and what comes out when it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from faults.subject import EXAMPLE_BATCH, Subject

Compute = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""(N, H, W, 3) uint8 to output name → (N, D) float32."""


@dataclass(frozen=True)
class Made:
    """A file that was really written, and the circumstances under which it is judged.

    Attributes:
        path: The file.
        module: What an exporter held when it wrote the file, and so what a neighbour compares with; None is the
            trained encoder.
        traced_batch: Batch of the tensor that was traced.
        against: The run directory that ``byol-deploy verify --against`` is given; None is the subject's.
        runtime: Enters the runtime in which the file is judged: a broken one, or another good one.
        threads: ``verify(threads=...)``.
    """

    path: Path
    module: Compute | None = None
    traced_batch: int = EXAMPLE_BATCH
    against: Path | None = None
    runtime: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    threads: int | None = None


@dataclass(frozen=True)
class Case:
    """A fault, or a harmless variant.

    Attributes:
        name: Short, as in the table.
        place: Where it happens: "export", "file", "precision" or "runtime".
        what: One sentence for a reader of the table.
        make: Takes the subject and an empty folder. None comes back where the encoder has no such part.
        harmless: Must not be rejected.
        on_merit: May pass or fail: its numbers are shown, and it is counted nowhere.
    """

    name: str
    place: str
    what: str
    make: Callable[[Subject, Path], Made | None] = field(repr=False)
    harmless: bool = False
    on_merit: bool = False
