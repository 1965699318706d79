"""The self-test that travels: golden cases in a bundle or a lone file, against what the file computes here.

Needs no PyTorch, no network and no data: it answers, in seconds and on the device itself, whether this file on this
machine still computes what was trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np

from byol_deploy.bundle import Golden
from byol_deploy.errors import BundleError
from byol_deploy.manifest import Manifest
from byol_deploy.parity import Limit, ParityReport, compare
from byol_deploy.runtime import Encoder


def self_test(path: str | os.PathLike[str], *, provider: str = "cpu", threads: int | None = None) -> ParityReport:
    """Run the golden cases of a bundle or of a lone ONNX file through :class:`byol_deploy.Encoder`.

    Args:
        path: The bundle (its ONNX file is tested), or an .onnx file of byol-deploy.
        provider: As in ``Encoder``.
        threads: As in ``Encoder``.

    Returns:
        The verdict, one row per output, with all images at once and one by one.

    Raises:
        BundleError: Absent, damaged or foreign; a bundle without ONNX.
        ProviderError: The provider does not work here.
    """
    encoder = Encoder(path, provider=provider, threads=threads, outputs="all")
    name = os.path.basename(os.path.normpath(path))
    return check_golden(encoder.run, encoder.manifest, encoder.golden, subject=name)


def check_golden(
    run: Callable[[np.ndarray], Mapping[str, np.ndarray]], manifest: Manifest, golden: Golden, *, subject: str
) -> ParityReport:
    """Compare what ``run`` gives for the golden images with what was trained.

    Args:
        run: (N, H, W, 3) uint8 to output name → (N, D) float32.
        manifest: Says which outputs there are and what they may differ by.
        golden: The cases.
        subject: What is tested, for the report.

    Returns:
        Rows for all images in one batch, and for each image on its own.

    Raises:
        BundleError: The manifest's limits are no limits.
    """
    try:
        limits = {name: Limit.from_dict(limit) for name, limit in manifest.limits.items()}
    except ValueError as fault:
        raise BundleError(f"the limits in the manifest are not usable: {fault}; export it again") from fault
    expected = {output.name: golden.outputs[output.name] for output in manifest.outputs}
    images = golden.images
    reports = []
    for size in dict.fromkeys((len(images), 1)):
        actual = run_in_batches(run, images, size)
        reports.append(compare(expected, actual, limits=limits, subject=f"{subject}, golden cases, batch {size}"))
    return ParityReport.merged(reports)


def run_in_batches(
    run: Callable[[np.ndarray], Mapping[str, np.ndarray]], images: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """Run ``images`` (N, H, W, 3) in batches of ``batch_size`` and put the outputs together again."""
    parts = [run(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
