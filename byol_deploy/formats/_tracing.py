"""The one place where PyTorch's TorchScript is called deprecated and its tracer talks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from byol_deploy.errors import ExportError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the deprecation of TorchScript and the tracer's remarks."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated", category=DeprecationWarning)
        # "Converting a tensor to a Python boolean ...": whether it mattered is what the parity check finds out.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def as_export_error() -> Iterator[None]:
    """Whatever tracing raises on a stranger's module is that module's trouble, not a bug here.

    Raises:
        ExportError: Of one sentence, for any exception inside.
    """
    import torch

    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise ExportError(
            f"torch.jit.trace of PyTorch {torch.__version__} failed: {type(error).__name__}: {lines[0][:300]}"
        ) from error
