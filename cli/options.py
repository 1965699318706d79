"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

BackboneOption = Annotated[
    str | None, typer.Option(help="For a checkpoint that does not say what its backbone is, e.g. timm/resnet18.")
]
TrustBackboneOption = Annotated[
    bool, typer.Option("--trust-backbone", help="Import the checkpoint's own module:callable backbone.")
]


def three_numbers(option: str, text: str | None) -> tuple[float, float, float] | None:
    """``0.485,0.456,0.406`` as numbers; None stays None.

    Raises:
        UsageError: It is not three numbers with commas.
    """
    from ..errors import UsageError

    if text is None:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} is {text!r}; use three numbers with commas, e.g. 0.485,0.456,0.406") from None
    return red, green, blue
