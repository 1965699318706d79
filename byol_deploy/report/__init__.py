"""One self-contained HTML page for a person: what was exported, how it was checked, what the encoder sees as alike.

The page holds no script and loads nothing: images are data URIs, drawings are inline SVG, and its own security policy
forbids the rest. Everything that is shown comes from elsewhere (names of files and classes above all), so it is escaped
without exception. Callers hand over plain values in small frozen objects; nothing here needs PyTorch.
"""

from __future__ import annotations

from byol_deploy.report.blocks import CheckRow, DriftBlock, Fact, ParityBlock, ResultRow
from byol_deploy.report.evidence import FileEvidence, write_bundle_report, write_verify_report
from byol_deploy.report.gallery import (
    ChangedGallery,
    ChangedRow,
    Gallery,
    GalleryRow,
    changed_gallery,
    nearest_gallery,
)
from byol_deploy.report.page import drift_svg, write_report
from byol_deploy.report.plane import EmbeddingMap, embedding_map

__all__ = [
    "ChangedGallery",
    "ChangedRow",
    "CheckRow",
    "DriftBlock",
    "EmbeddingMap",
    "Fact",
    "FileEvidence",
    "Gallery",
    "GalleryRow",
    "ParityBlock",
    "ResultRow",
    "changed_gallery",
    "drift_svg",
    "embedding_map",
    "nearest_gallery",
    "write_bundle_report",
    "write_report",
    "write_verify_report",
]
