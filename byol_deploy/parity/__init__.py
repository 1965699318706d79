"""Does an exported model compute what the trained one computes? Verdicts, never exceptions.

:func:`compare` takes two mappings from output name to an array whose rows belong to the same images, and gives one
:class:`ParityRow` per output; :func:`compare_callables` takes any two functions. Nothing here knows where the numbers
came from, and nothing needs PyTorch. What may differ, and why, is told in :mod:`byol_deploy.parity.limits`.
"""

from __future__ import annotations

from byol_deploy.parity.comparing import (
    FEWEST_FOR_AGREEMENT,
    Outputs,
    cannot_run,
    compare,
    compare_callables,
    compare_run,
    first_line,
    not_comparable,
    run_in_batches,
    unsteady,
)
from byol_deploy.parity.limits import (
    LEAST_AGREEMENT,
    LEAST_REL_L2,
    MOST_MARGIN,
    NOISE_MULTIPLE,
    AnyLimit,
    FidelityLimit,
    Limit,
    derive_limits,
    fidelity_limits,
    image_noise,
)
from byol_deploy.parity.measures import (
    FEWEST_FOR_NEIGHBOURS,
    FEWEST_FOR_OVERLAP,
    Neighbours,
    Share,
    as_rows,
    bootstrap_share,
    distance_apart,
    neighbour_agreement,
    neighbours,
    relative_l2,
    separation_margin,
)
from byol_deploy.parity.report import ParityReport, ParityRow

__all__ = [
    "FEWEST_FOR_AGREEMENT",
    "FEWEST_FOR_NEIGHBOURS",
    "FEWEST_FOR_OVERLAP",
    "LEAST_AGREEMENT",
    "LEAST_REL_L2",
    "MOST_MARGIN",
    "NOISE_MULTIPLE",
    "AnyLimit",
    "FidelityLimit",
    "Limit",
    "Neighbours",
    "Outputs",
    "ParityReport",
    "ParityRow",
    "Share",
    "as_rows",
    "bootstrap_share",
    "cannot_run",
    "compare",
    "compare_callables",
    "compare_run",
    "derive_limits",
    "distance_apart",
    "fidelity_limits",
    "first_line",
    "image_noise",
    "neighbour_agreement",
    "neighbours",
    "not_comparable",
    "relative_l2",
    "run_in_batches",
    "separation_margin",
    "unsteady",
]
