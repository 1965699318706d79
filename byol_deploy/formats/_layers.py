"""What the reading of a written file layer by layer has in common, whatever the format.

The trained model is recorded by whoever calls (this half knows no torch modules): a list of :class:`Call`, in the order
of execution, and one array per *slot*. A slot is one tensor of the reference: the output of one call is the input of
the next, and both say so with the same number. A file answers with :class:`Point`: the places in it that hold a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ROOT = ""
"""The path of the whole model, as ``named_modules`` has it."""


@dataclass(frozen=True)
class Call:
    """One call of one module of the reference.

    Attributes:
        path: The module's path, such as ``backbone.layer1.0.conv1``; :data:`ROOT` for the whole.
        class_name: The module's class.
        number: Which call of this module it is, from 0.
        of: How often the module was called.
        inner: Whether no other module was called inside it.
        source: ``package/file.py:line`` of the call in Python; empty where it is not known.
        input: Slot of its first tensor argument; None without one.
        outputs: Slots of the tensors that it gave, in order.
        idle: It gave back the very tensor that it took, as dropout does in evaluation mode.
    """

    path: str
    class_name: str
    number: int
    of: int
    inner: bool
    source: str
    input: int | None
    outputs: tuple[int, ...]
    idle: bool


@dataclass(frozen=True)
class Point:
    """A place in a file that holds a tensor of the reference.

    Attributes:
        slot: Which tensor.
        path: Path of the module that computes it in the file.
        class_name: That module's class; empty where it is not known.
        number: Which call of the module, from 0; -1 where the module was called once.
        kind: ``module``: what a module gave. ``operation``: what a functional operation between modules gave (a
            residual addition, an attention product). ``output``: an output of the whole.
        nodes: What computes it in the file, from the points before it on, in order.
        name: The value's name in the file.
        source: ``package/file.py:line`` where the file says so.
        after: Positions of the points that it is computed from; -1 is the input of the whole.
    """

    slot: int
    path: str
    class_name: str
    number: int
    kind: str
    nodes: tuple[str, ...]
    name: str
    source: str = ""
    after: tuple[int, ...] = ()


class LayeredFile(Protocol):
    """A written file, opened so that its intermediate values can be read."""

    points: tuple[Point, ...]
    """In the order of execution in the file."""
    unmatched: tuple[tuple[str, str], ...]
    """Modules of the reference that have no place of their own in the file, each with the reason."""
    adds_up: bool
    """Whether :meth:`values` shows drift as it adds up along the file, or each module's own on the reference's."""

    def values(self, images: np.ndarray, slots: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the file computes at each point.

        Args:
            images: (1, H, W, 3) uint8.
            slots: The reference's value of every slot, for files that begin behind the preprocessing.

        Returns:
            One float32 array per point, in the layout of the reference.
        """

    def fed(self, images: np.ndarray, slots: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """What the file computes at each point when every point before it is fed the reference's value.

        Args:
            images: (1, H, W, 3) uint8.
            slots: The reference's value of every slot.

        Returns:
            As :meth:`values`; None where this file cannot be fed.
        """

    def cut(self, place: int, folder: Path) -> Cut | None:
        """Write the file's part that computes the point at ``place`` from the points right before it, alone.

        Returns:
            What was written, or None where it cannot be cut out.
        """

    def prefix(self, place: int, folder: Path) -> Cut | None:
        """Write the file from its input up to the point at ``place``."""


@dataclass(frozen=True)
class Layout:
    """How a file lays out a tensor of the reference.

    Attributes:
        permutation: Applied to the reference's axes it gives the file's; None for the same order.
        shape: The file's shape behind the batch; differs from the reference's by axes of length 1 only.
    """

    permutation: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def to_file(self, value: np.ndarray) -> np.ndarray:
        """A value of the reference as the file has it."""
        if self.permutation is not None:
            value = value.transpose(self.permutation)
        return value if self.shape is None else value.reshape(value.shape[0], *self.shape)

    def to_reference(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A value of the file as the reference has it; ``shape`` is the reference's, without the batch."""
        if self.permutation is not None:
            return value.transpose(np.argsort(self.permutation))
        return value if self.shape is None else value.reshape(value.shape[0], *shape)


@dataclass(frozen=True)
class Cut:
    """A part of a file that was written as a file of its own.

    Attributes:
        file: Name of the file.
        inputs: What the part takes, in order.
        layout: How it lays out what it gives.
    """

    file: str
    inputs: tuple[CutInput, ...]
    layout: Layout


@dataclass(frozen=True)
class CutInput:
    """One input of a part.

    Attributes:
        name: Its name in the part.
        slot: The tensor of the reference that it takes; None for the images.
        type: NumPy's name of the type that it takes it in.
        layout: How it lays it out.
    """

    name: str
    slot: int | None
    type: str
    layout: Layout


_CHANNELS_LAST = (0, 2, 3, 1)
_CHANNELS_FIRST = (0, 3, 1, 2)


def find_layout(reference: tuple[int, ...], file: tuple[int, ...]) -> Layout | None:
    """The layout that explains a file's shape, or None where there is none or more than one could.

    Args:
        reference: The whole shape in the reference.
        file: The whole shape in the file.
    """
    if reference == file:
        return Layout()
    if not reference or not file or reference[0] != file[0]:
        return None
    if [size for size in reference[1:] if size != 1] == [size for size in file[1:] if size != 1]:
        return Layout(shape=file[1:])
    if len(reference) == len(file) == 4:
        found = [
            order
            for order in (_CHANNELS_LAST, _CHANNELS_FIRST)
            if tuple(reference[axis] for axis in order) == file and len(set(reference[1:])) > 1
        ]
        if len(found) == 1:
            return Layout(permutation=found[0])
    return None


def leaf_calls(calls: Sequence[Call]) -> list[Call]:
    """The calls that compute something and call no other module, in order."""
    return [call for call in calls if call.inner and not call.idle and call.outputs and call.path != ROOT]


def class_at(calls: Sequence[Call]) -> dict[str, str]:
    """Class name by module path."""
    return {call.path: call.class_name for call in calls}


def chunks(items: Sequence[Any], count: int) -> list[Sequence[Any]] | None:
    """``items`` in ``count`` parts of one length, or None where that does not come out."""
    if count < 1 or not items or len(items) % count:
        return None
    each = len(items) // count
    return [items[start : start + each] for start in range(0, len(items), each)]
