"""What the formats share that begin with ``torch.export``: the program, and PyTorch's settings while it runs."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from byol_deploy.errors import ExportError
from byol_deploy.formats import Signature

_EXAMPLE_BATCH = 3  # not a batch size that the parity check runs, and not 1, which broadcasts


def exported(graph: Any, signature: Signature, *, named: bool = False, max_batch: int | None = None) -> Any:
    """A graph as a ``torch.export.ExportedProgram`` with an open batch size.

    Args:
        graph: As in :meth:`byol_deploy.formats.Format.export`.
        signature: Shapes and names.
        named: Give a dict, output name to tensor, instead of a tuple.
        max_batch: An upper bound of the batch size, for runtimes that plan their memory ahead.

    Raises:
        ExportError: PyTorch cannot, or not for every batch size.
    """
    return re_exported(_giving_names(graph, signature.outputs) if named else graph, signature, max_batch=max_batch)


def re_exported(graph: Any, signature: Signature, *, max_batch: int | None = None) -> Any:
    """A module as it is, e.g. one that was made from such a program, as :func:`exported` gives it."""
    import torch

    size = signature.size_px
    example = torch.zeros((_EXAMPLE_BATCH, size, size, 3), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    try:
        with quiet("torch.export", "torch._dynamo", "torch.fx"), torch.no_grad():
            program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:
        # Whatever tracing raises on a stranger's module is that module's trouble, not a bug here.
        raise ExportError(f"torch.export of PyTorch {torch.__version__} failed: {first_line(error)}") from error
    return program


def _giving_names(graph: Any, names: tuple[str, ...]) -> Any:
    """The same module, parameters shared and equally named, whose outputs carry their names."""
    kind = type(graph)

    def forward(self: Any, images: Any) -> Any:
        return dict(zip(names, kind.forward(self, images), strict=True))

    twin = copy.copy(graph)
    twin.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return twin


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """No warnings and no log lines of ``loggers``: what they say about their own insides is no news to the user."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    try:
        for logger in found:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let PyTorch use ``number`` threads; it has one number for the whole process. None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


_switches = threading.Lock()
_inside = 0
_before: list[str] = []


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Keep PyTorch from rounding float32 to TF32's 10 bits on CUDA devices, which it does in convolutions unasked.

    That alone moves a ResNet's embedding by 1e-3 of its length (measured on an H200). The setting belongs to the whole
    process: it is put back when the last of all threads that are inside has left.
    """
    import torch

    global _inside
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    with _switches:
        if _inside == 0:
            _before[:] = [switch.fp32_precision for switch in switches]
        _inside += 1
        for switch in switches:
            switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _switches:
            _inside -= 1
            if _inside == 0:
                for switch, value in zip(switches, _before, strict=True):
                    switch.fp32_precision = value


def first_line(error: BaseException) -> str:
    """The kind and the first line of an error, without control characters, at most 300 of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]
