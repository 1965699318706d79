"""What must be reached, what was tried, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from byol_deploy.errors import UsageError
from byol_deploy.parity import MOST_MARGIN


@dataclass(frozen=True)
class Goal:
    """What a file of reduced precision must reach on the trial images.

    Attributes:
        agreement: Smallest share of images that keep their nearest neighbour.
        margin: Largest drift in distances between different images, see :func:`byol_deploy.parity.separation_margin`.
    """

    agreement: float = 0.98
    margin: float = MOST_MARGIN

    def __post_init__(self) -> None:
        """Refuse what is no share and no distance."""
        if not 0 < self.agreement <= 1 or not 0 < self.margin <= 1:
            raise UsageError(
                f"the goal is an agreement of {self.agreement} and a margin of {self.margin}; both lie above 0 and up "
                "to 1, e.g. 0.98 and 0.25"
            )


@dataclass(frozen=True)
class Trial:
    """One file that was written and measured.

    Attributes:
        method: Calibration method; empty where there is none.
        kept: The layers that stay in float32 (or in what the format computes instead).
        agreement: Share of images that keep their nearest neighbour.
        margin: Drift in distances between different images.
        outliers: Margin of the images far from those that calibrate, and of the heads, in units of what is allowed.
        drift: Root mean square of the images' drift on the unit sphere: what trials are ordered by.
        latency: Time of one image, in those of the float32 file; measured side by side.
        bytes: Size of the file and what belongs to it.
        passed: Whether the goal is reached.
    """

    method: str
    kept: tuple[str, ...]
    agreement: float
    margin: float
    outliers: float
    drift: float
    latency: float
    bytes: int
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes None."""
        values = {**asdict(self), "kept": list(self.kept)}
        return {key: None if isinstance(item, float) and not math.isfinite(item) else item
                for key, item in values.items()}  # fmt: skip


@dataclass(frozen=True)
class Trade:
    """What :func:`search` tried and chose.

    Attributes:
        precision: The precision.
        goal: What had to be reached.
        trials: All files that were measured, in their order.
        chosen: The one to publish; None when none reached the goal and was faster.
        reason: Why none was chosen; empty otherwise.
        sensitivity: For each layer the drift that it alone causes when it is reduced; empty where that was not needed.
        images: Number of trial images.
        calibration: Number of calibration images.
        target: Processor that the file is for.
    """

    precision: str
    goal: Goal
    trials: tuple[Trial, ...]
    chosen: Trial | None
    reason: str
    sensitivity: Mapping[str, float]
    images: int
    calibration: int
    target: str

    def to_dict(self) -> dict[str, Any]:
        """As in a manifest."""
        return {
            "method": self.chosen.method if self.chosen else None,
            "kept": list(self.chosen.kept) if self.chosen else [],
            "target": self.target,
            "goal": asdict(self.goal),
            "images": self.images,
            "calibration": self.calibration,
            "trials": [trial.to_dict() for trial in self.trials],
            "sensitivity": {name: value for name, value in self.sensitivity.items() if math.isfinite(value)},
        }

    def table(self) -> str:
        """The trade as text: one line a trial."""
        head = ("calibration", "kept", "neighbours", "margin", "the rest", "latency", "size", "")
        full = [("", *head)]
        for trial in self.trials:
            mark = "chosen" if trial is self.chosen else "" if trial.passed else "below the goal"
            full.append(
                (
                    "",
                    trial.method or "none",
                    str(len(trial.kept)),
                    f"{trial.agreement:.1%}",
                    f"{trial.margin:.3f}",
                    f"{trial.outliers:.0%} of limit",
                    f"{trial.latency:.2f}x",
                    f"{trial.bytes / 1e6:.1f} MB",
                    mark,
                )
            )
        widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in full
        )
