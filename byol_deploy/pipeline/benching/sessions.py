"""Processes for each item: the ones that only start, and the ones that are compared and timed."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from byol_deploy.bench import CandidateFailed
from byol_deploy.bundle import Manifest
from byol_deploy.environment import memory
from byol_deploy.errors import UsageError
from byol_deploy.parity import run_in_batches
from byol_deploy.pipeline.benching.fidelity import Anchor, against_checkpoint, by_golden
from byol_deploy.pipeline.benching.items import Item
from byol_deploy.pipeline.benching.processes import PATIENCE_S, Worker
from byol_deploy.pipeline.benching.rows import ColdStart, Fidelity
from byol_deploy.pipeline.reference import CROWD, Reference, real_images
from byol_deploy.preprocess import Preprocessing

COMPILE_PATIENCE_S = 300.0
"""``torch.compile`` calls a C++ compiler for every batch size and number of threads; not for longer than this."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured of each item.

    Attributes:
        batches: Sizes of a batch, ascending.
        threads: Numbers of threads, ascending.
        starts: Fresh processes for each cold start.
    """

    batches: tuple[int, ...]
    threads: tuple[int, ...]
    starts: int


@dataclass(eq=False)
class Measured:
    """One item, and what is known of it so far.

    Attributes:
        item: The item.
        images: (N, H, W, 3) uint8, as many as the largest batch at least; None where nothing can be run.
        failed: Why it is not measured; empty as long as it is.
        cold: Its cold start.
        peaks: Batch size to the most memory of a fresh process.
        fidelity: Threads and batch size to the verdict.
        worker: The process that is timed.
    """

    item: Item
    images: np.ndarray | None = None
    failed: str = ""
    cold: ColdStart | None = None
    peaks: dict[int, int | None] = field(default_factory=dict)
    fidelity: dict[tuple[int, int], Fidelity] = field(default_factory=dict)
    worker: Worker | None = None

    @property
    def compiles(self) -> bool:
        """Whether it is ``torch.compile``, which takes minutes for what takes others milliseconds."""
        return self.item.what.get("baseline") == "compile"


class Pixels:
    """The images that items are timed on, for each preprocessing once.

    Args:
        data: Folder of real images; None takes the golden cases of each file.
        reference: Brings its own images where there is one.
        most: The largest batch.
    """

    def __init__(self, data: str | os.PathLike[str] | None, reference: Reference | None, most: int) -> None:
        self.data, self.most = data, most
        self.described = "the golden cases that travel with the files" if reference is None else reference.described
        self._crowd = None if reference is None else reference.crowd.images
        self._found: dict[Preprocessing, np.ndarray] = {}

    def of(self, item: Item) -> np.ndarray:
        """(N, H, W, 3) uint8 that this item takes, N at least the largest batch."""
        assert item.contract is not None
        manifest, golden = item.contract
        images = self.real(manifest.preprocessing)
        side = manifest.preprocessing.size_px
        if images is None and self._crowd is not None and self._crowd.shape[1:] == (side, side, 3):
            images = self._crowd
        images = golden.images if images is None else images
        return np.ascontiguousarray(images[np.arange(max(self.most, len(images))) % len(images)])

    def real(self, preprocessing: Preprocessing) -> np.ndarray | None:
        """The images of ``data``; None where there is no such folder.

        Raises:
            DataError: It holds no usable image.
        """
        if self.data is None or self._crowd is not None:
            return None
        if preprocessing not in self._found:
            sources, self.described = real_images(self.data, preprocessing, CROWD)
            self._found[preprocessing] = preprocessing.batch(sources)
        return self._found[preprocessing]


def cold_starts(measured: Sequence[Measured], plan: Plan, say: Say) -> None:
    """Start each item in some fresh processes, in turn, and note what the parts take and how much memory is needed."""
    ready = [one for one in measured if not one.failed and not one.compiles]
    say(f"cold starts: {plan.starts} fresh processes for each of {len(ready)} files")
    samples: dict[int, list[ColdStart]] = {}
    for number in range(plan.starts):
        for one in ready if number % 2 == 0 else reversed(ready):
            if one.failed:
                continue
            try:
                worker, sample = _start(one, plan, {})
                worker.close()
                samples.setdefault(id(one), []).append(sample)
            except CandidateFailed as error:
                one.failed = str(error)
    for one in ready:
        if not one.failed:
            one.cold = _median(samples[id(one)])


def check_memory(measured: Sequence[Measured]) -> None:
    """Whether all processes fit into the memory at once: where they do not, the times would be those of the disk.

    Raises:
        UsageError: They do not.
    """
    peaks = [max((peak or 0 for peak in one.peaks.values()), default=0) for one in measured if not one.failed]
    needed = sum(peaks) + max(peaks, default=0)  # and the control
    found = memory()
    limits = [size for size in (found["available_bytes"], found["limit_bytes"]) if size is not None]
    if limits and needed > min(limits):
        raise UsageError(
            f"{len(peaks) + 1} processes at once need about {needed / 1e9:.1f} GB of memory, and "
            f"{min(limits) / 1e9:.1f} GB are free; measure fewer files at once, or smaller batches"
        )


def open_worker(one: Measured, plan: Plan, scratch: Path, stack: contextlib.ExitStack) -> None:
    """Open a process for one item, with a session for each number of threads, that stays until ``stack`` is closed.

    What goes wrong is noted in ``one.failed``; one that failed already is left alone.
    """
    if one.failed:
        return
    assert one.images is not None
    # A cache of compiled code from an earlier run would hide what compiling takes.
    own = {"TORCHINDUCTOR_CACHE_DIR": str(scratch), "TORCHINDUCTOR_COMPILE_THREADS": "1"} if one.compiles else {}
    try:
        worker, sample = _start(one, plan, own)
        stack.callback(worker.close)
        if one.cold is None:
            one.cold = sample
        for count in plan.threads[:-1]:
            worker.open(count)
        for count in plan.threads:
            for size in plan.batches:
                worker.run(count, one.images[:size])
        worker.keep(one.images[: plan.batches[-1]])
        one.worker = worker
    except CandidateFailed as error:
        one.failed = str(error)


def judge(measured: Sequence[Measured], plan: Plan, reference: Reference | None, pixels: Pixels, say: Say) -> None:
    """Fill in the verdicts of all items that are open."""
    ready = [one for one in measured if one.worker is not None]
    anchors: dict[tuple[str, Preprocessing], Anchor] = {}
    # Files in float32 first: those of reduced precision are compared with them where there is no checkpoint.
    for one in sorted(ready, key=lambda one: one.item.precision != "fp32"):
        item, worker = one.item, one.worker
        assert worker is not None
        assert item.contract is not None
        manifest, golden = item.contract
        say(f"comparing {item.name}")
        key = (manifest.model.parameter_hash, manifest.preprocessing)
        for count in plan.threads:
            run = partial(worker.run, count)
            if reference is not None:
                found = against_checkpoint(reference, item.outputs, run, item.precision, plan.batches)
            else:
                found = by_golden(manifest, golden, run, item.precision, plan.batches)
                if item.precision != "fp32" and key in anchors:
                    found = anchors[key].judge(run, plan.batches, found)
            for size, fidelity in found.items():
                one.fidelity[count, size] = _with_fault(fidelity, item.fault)
        good = all(fidelity.status == "passed" for fidelity in one.fidelity.values())
        if reference is None and item.precision == "fp32" and good and key not in anchors:
            made = _anchor(one, manifest, plan, pixels)
            anchors |= {} if made is None else {key: made}


def _start(one: Measured, plan: Plan, environment: Mapping[str, str]) -> tuple[Worker, ColdStart]:
    """A fresh process, opened with the most threads; its parts, and its memory where that is not known yet."""
    assert one.images is not None
    worker = Worker(
        one.item.what, patience_s=COMPILE_PATIENCE_S if one.compiles else PATIENCE_S, environment=environment
    )
    try:
        count = plan.threads[-1]
        load_s = worker.open(count)
        first_s = worker.first(count, one.images[:1])
        for size in plan.batches if len(one.peaks) < len(plan.batches) else ():
            worker.run(count, one.images[:size])
            one.peaks[size] = worker.peak_bytes
    except BaseException:
        worker.close()
        raise
    return worker, ColdStart(1000 * worker.start_s, 1000 * worker.import_s, 1000 * load_s, 1000 * first_s, 1)


def _median(samples: Sequence[ColdStart]) -> ColdStart:
    parts = ("start_ms", "import_ms", "load_ms", "first_ms")
    found = {part: statistics.median(getattr(sample, part) for sample in samples) for part in parts}
    return ColdStart(**found, starts=len(samples))


def _anchor(one: Measured, manifest: Manifest, plan: Plan, pixels: Pixels) -> Anchor | None:
    """The outputs of a float32 file that passed, for many real images; None without a folder of them."""
    images = pixels.real(manifest.preprocessing)
    if images is None or one.worker is None:
        return None
    try:
        outputs = run_in_batches(partial(one.worker.run, plan.threads[-1]), images, plan.batches[-1])
    except CandidateFailed:
        return None
    return Anchor(one.item.name, images, outputs)


def _with_fault(fidelity: Fidelity, fault: str) -> Fidelity:
    """What speaks against a file before it is run makes it fail, whatever it computes."""
    if not fault:
        return fidelity
    reason = f"{fault}; {fidelity.reason}" if fidelity.reason else fault
    return replace(fidelity, status="failed", reason=reason)
