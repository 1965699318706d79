"""Smaller files that are still the same encoder: which calibration, and which layers must stay in float32.

Nothing here knows a format. A :class:`Reducer` writes files; :func:`search` decides between them by what an embedding
is used for: do images keep their nearest neighbours, and by what part of the distance between two images do they drift?
"""

from __future__ import annotations

from byol_deploy.quantization.reducer import Calibration, Reducer
from byol_deploy.quantization.searching import search
from byol_deploy.quantization.targets import TARGETS, resolve_target, this_target
from byol_deploy.quantization.trade import Goal, Trade, Trial
from byol_deploy.quantization.trials import Outliers

__all__ = [
    "TARGETS",
    "Calibration",
    "Goal",
    "Outliers",
    "Reducer",
    "Trade",
    "Trial",
    "resolve_target",
    "search",
    "this_target",
]
