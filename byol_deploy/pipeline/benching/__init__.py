"""Bench: files, engines and PyTorch side by side, with what they need and whether they still compute what was trained.

Importing this imports neither PyTorch nor any engine: those are in processes of their own.
"""

from __future__ import annotations

from byol_deploy.pipeline.benching.rows import ColdStart, Fidelity, SpeedReport, SpeedRow
from byol_deploy.pipeline.benching.running import BATCHES, BUDGET_S, STARTS, bench

__all__ = ["BATCHES", "BUDGET_S", "STARTS", "ColdStart", "Fidelity", "SpeedReport", "SpeedRow", "bench"]
