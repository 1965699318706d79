"""Checkpoint → encoder graph → formats → parity → bundle: where the PyTorch half and the torch-free half meet.

Importing this package imports no PyTorch: :func:`verify` of a bundle or an ONNX file works where it is not installed.
"""

from __future__ import annotations

from byol_deploy.pipeline.opening import open_artefact, open_embedder
from byol_deploy.pipeline.publishing import export
from byol_deploy.pipeline.verifying import ArtefactVerdict, Check, VerifyReport, verify

__all__ = ["ArtefactVerdict", "Check", "VerifyReport", "export", "open_artefact", "open_embedder", "verify"]
