"""What a comparison of candidates found: times, ratios with intervals, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 0.03
"""How far a candidate may seem to differ from itself."""


@dataclass(frozen=True)
class Candidate:
    """What one candidate took.

    Attributes:
        name: Its name.
        calls: Calls that count.
        p50_ms: Median of all of them.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; None for fewer than 100 calls.
        ratio: Median over the rounds of (its time / its base's time in the same round), of the medians of the blocks.
            None where the base could not be measured, as for the two ends.
        low: Lower end of the 95 % interval of the ratio.
        high: Upper end.
    """

    name: str
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Control:
    """The A/A control: one candidate, opened twice, compared with itself like any other two.

    Attributes:
        name: Of the candidate.
        ratio: Of the second opening to the first; 1 where nothing but the candidates matters.
        low: Lower end of its 95 % interval.
        high: Upper end.
        tolerance: How far the ratio may be from 1.
    """

    name: str
    ratio: float
    low: float
    high: float
    tolerance: float = TOLERANCE

    @property
    def within(self) -> bool:
        """Whether the ratio is within the tolerance."""
        return abs(self.ratio - 1) <= self.tolerance

    @property
    def resolution(self) -> float:
        """Differences smaller than this may be noise: how far the interval reaches from 1."""
        return max(abs(self.low - 1), abs(self.high - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "within": self.within, "resolution": self.resolution}


@dataclass(frozen=True)
class Comparison:
    """What :func:`measure_candidates` found.

    Attributes:
        candidates: Those that were measured, in the order they were given.
        control: The control; None where it could not be measured.
        rounds: Rounds that count.
        asked: Rounds that were asked for.
        seconds: What all of it took.
        failed: For each candidate that was left out the reason.
    """

    candidates: tuple[Candidate, ...]
    control: Control | None
    rounds: int
    asked: int
    seconds: float
    failed: Mapping[str, str]

    def __getitem__(self, name: str) -> Candidate:
        """The candidate ``name``; KeyError where it was not measured."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    @property
    def reliable(self) -> bool:
        """Whether the control is within its tolerance; without a control nothing is known, which is no yes."""
        return self.control is not None and self.control.within

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before the numbers."""
        said = []
        control = self.control
        if control is None:
            said.append("the A/A control could not be measured: nothing is known about how far these times are right")
        elif not control.within:
            said.append(
                f"these times are not reliable: {control.name}, opened twice, seems to differ from itself by "
                f"{abs(control.ratio - 1):.1%}, and {control.tolerance:.0%} is allowed; measure again with nothing "
                "else running, or with more time (--budget)"
            )
        elif control.resolution > control.tolerance:
            said.append(
                f"differences below {control.resolution:.0%} may be noise: that is how far the interval of the A/A "
                "control reaches"
            )
        if self.rounds < self.asked:
            said.append(f"{self.rounds} of {self.asked} rounds fitted into the time budget")
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "reliable": self.reliable,
            "control": None if self.control is None else self.control.to_dict(),
            "rounds": self.rounds,
            "asked": self.asked,
            "seconds": self.seconds,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "failed": dict(self.failed),
            "warnings": list(self.warnings),
        }
