"""What neighbouring tools check after an export, replayed: the same numbers, the same tolerances, the same consequence.

Each rule takes what the tool's reference gave and what the file gave, and says whether the tool would be content. The
tolerances are those of the tools' documentation and defaults; none of their code is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Outputs = Mapping[str, np.ndarray]
"""Output name to (N, D)."""

Consequence = Literal["stops", "warns"]
Inputs = Literal["traced", "dummy", "data", "bundled", "labelled", "none"]


def within(expected: Outputs, actual: Outputs, *, atol: float, rtol: float) -> bool:
    """|actual - expected| <= atol + rtol |expected| for every number: NumPy's and PyTorch's ``allclose``."""
    return _every(expected, actual, lambda a, e: np.abs(a - e) <= atol + rtol * np.abs(e))


def within_either(expected: Outputs, actual: Outputs, *, atol: float, rtol: float) -> bool:
    """For every number the absolute or the relative error is within its tolerance."""

    def close(a: np.ndarray, e: np.ndarray) -> np.ndarray:
        error = np.abs(a - e)
        return (error <= atol) | (error <= rtol * np.abs(e))

    return _every(expected, actual, close)


def cosine_at_least(expected: Outputs, actual: Outputs, *, least: float) -> bool:
    """The cosine of each output, all of its numbers taken as one vector, is ``least`` or more."""
    if not _same_form(expected, actual):
        return False
    for name, value in expected.items():
        e, a = value.ravel().astype(np.float64), actual[name].ravel().astype(np.float64)
        # Written so that NaN is not at least anything.
        if not e @ a >= least * np.linalg.norm(e) * np.linalg.norm(a):
            return False
    return True


def metric_kept(expected: float, actual: float, *, drop: float) -> bool:
    """The metric fell by no more than ``drop``."""
    return expected - actual <= drop


def _every(expected: Outputs, actual: Outputs, close: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    return _same_form(expected, actual) and all(
        bool(close(actual[name].astype(np.float64), value.astype(np.float64)).all()) for name, value in expected.items()
    )


def _same_form(expected: Outputs, actual: Outputs) -> bool:
    return set(expected) == set(actual) and all(actual[name].shape == value.shape for name, value in expected.items())


@dataclass(frozen=True)
class Rule:
    """What one tool does.

    Attributes:
        name: As in the table.
        inputs: What it computes on.
        content: From the reference's and the file's outputs to whether it is content; None for a rule on a metric, and
            for a tool that compares nothing.
        consequence: Of a comparison that fails.
        described: Inputs, tolerance and consequence in words.
        drop: For a rule on a metric the largest drop.
    """

    name: str
    inputs: Inputs
    content: Callable[[Outputs, Outputs], bool] | None
    consequence: Consequence
    described: str
    drop: float | None = None


RULES = (
    Rule("torch.onnx verify", "traced", lambda e, a: within(e, a, atol=5e-3, rtol=1e-1), "warns",
         "the traced tensor, abs 5e-3 + rel 1e-1; warns"),
    Rule("lightly-train", "traced", lambda e, a: within(e, a, atol=5e-3, rtol=1e-1), "stops",
         "the traced tensor, abs 5e-3 + rel 1e-1; raises"),
    Rule("optimum-onnx", "dummy", lambda e, a: within(e, a, atol=1e-5, rtol=1e-5), "warns",
         "one dummy batch, abs 1e-5 (NumPy's rel 1e-5 on top); warns and exits with 0"),
    Rule("timm", "traced", lambda e, a: within(e, a, atol=1.5e-3, rtol=0.0), "stops",
         "the traced tensor, abs 1.5e-3; raises"),
    Rule("Polygraphy", "data", lambda e, a: within_either(e, a, atol=1e-5, rtol=1e-5), "stops",
         "your data in one shape, abs or rel 1e-5 for each number; raises"),
    Rule("Polygraphy cosine", "data", lambda e, a: cosine_at_least(e, a, least=0.997), "stops",
         "your data in one shape, cosine 0.997 of each output; raises"),
    Rule("Olive", "data", lambda e, a: within(e, a, atol=0.1, rtol=0.0), "warns",
         "your data, abs 0.1; a status in JSON"),
    Rule("Ultralytics", "none", None, "warns", "nothing is compared"),
    Rule("ExecuTorch", "bundled", lambda e, a: within(e, a, atol=1e-8, rtol=1e-5), "stops",
         "bundled cases on the device, abs 1e-8 + rel 1e-5; the runner says so"),
    Rule("NNCF", "labelled", None, "stops",
         "a labelled set, here the vote of 20 neighbours; a drop of more than 0.01 reverts layers", drop=0.01),
)  # fmt: skip
