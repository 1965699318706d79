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
