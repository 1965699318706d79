"""Who looks at a file, and what each said: byol-deploy with a checkpoint and without, and the neighbours' rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from neighbour_rules import RULES, Rule, metric_kept

from byol_deploy import formats, verify
from byol_deploy.bundle import read_carried
from byol_deploy.errors import ByolDeployError
from byol_deploy.evaluation import knn
from byol_deploy.formats import RunOptions
from byol_deploy.images import find_images, labels_from_folders
from faults.making import Compute, Made
from faults.subject import Subject

OURS = "byol-deploy"
SELF_TEST = "byol-deploy self-test"
DATA_IMAGES = 16
_BATCH = 32
LABELLED = 512


@dataclass(frozen=True)
class Verdict:
    """What one judge said.

    Attributes:
        mark: "caught": it stops, or says FAIL. "warned": it warns and goes on. "missed": it is content. "failed": it
            broke down without a verdict.
        reason: In its words.
    """

    mark: str
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)


class Judges:
    """All judges of one encoder's files. The labelled images are embedded once."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._trained: float | None = None

    def _without_folders(self, made: Made, reason: str) -> str:
        """A reason without the folders of this machine."""
        for folder in (made.path.parent, self.subject.data, self.subject.run.parent):
            reason = reason.replace(f"{folder}/", "")
        return reason

    def ours(self, made: Made) -> dict[str, Verdict]:
        """``byol-deploy verify FILE --against RUN --data IMAGES``, and ``byol-deploy verify FILE`` on the device."""
        against = made.against or self.subject.run
        return {
            OURS: self._verify(made, against=against, data=self.subject.data),
            SELF_TEST: self._verify(made),
        }

    def _verify(self, made: Made, **options: Any) -> Verdict:
        try:
            with made.runtime():
                report = verify(made.path, threads=made.threads, **options)
        except ByolDeployError as error:
            return Verdict("caught", self._without_folders(made, f"refused: {error}"))
        except Exception as error:  # a bug of byol-deploy: no verdict, and the table says so
            return Verdict("failed", self._without_folders(made, f"{type(error).__name__}: {error}"))
        if report.passed:
            return Verdict("missed")
        reasons = [f"{check.name}: {check.detail}" for check in report.checks if not check.passed]
        for artefact in report.artefacts:
            if artefact.status == "failed":
                found = artefact.parity.failures if artefact.parity is not None and not artefact.parity.passed else []
                reasons += [artefact.reason] * bool(artefact.reason) + found[:3]
        return Verdict("caught", self._without_folders(made, "; ".join(reasons)))

    def neighbours(self, made: Made) -> dict[str, Verdict]:
        """Each rule as its tool applies it: against the module that the exporter held."""
        with made.runtime():
            return self._replayed(made, made.module or self.subject.graph.run)

    def neighbours_helped(self, made: Made) -> dict[str, Verdict]:
        """The same rules on the same inputs, as if somebody had handed them the right reference."""
        if made.module is None or made.against is not None:
            return self.neighbours(made)
        with made.runtime():
            return self._replayed(made, self.subject.graph.run)

    def _replayed(self, made: Made, reference: Compute) -> dict[str, Verdict]:
        format = formats.of_file(made.path)
        assert format is not None
        found: dict[str, Verdict] = {}
        try:
            run = format.load(made.path, RunOptions(threads=made.threads))
        except ByolDeployError as error:
            reason = self._without_folders(made, f"the file does not open: {error}")
            return {rule.name: Verdict("caught", reason) for rule in RULES}
        for rule in RULES:
            try:
                content, reason = self._content(rule, made, reference, run)
            except Exception as error:  # whatever a runtime raises on input that it cannot take stops these tools too
                reason = self._without_folders(made, f"cannot run: {(str(error).splitlines() or [''])[0][:200]}")
                found[rule.name] = Verdict("caught", reason)
                continue
            mark = "missed" if content else "caught" if rule.consequence == "stops" else "warned"
            found[rule.name] = Verdict(mark, reason)
        return found

    def _content(self, rule: Rule, made: Made, reference: Compute, run: Compute) -> tuple[bool, str]:
        if rule.drop is not None:
            size = 1 if made.traced_batch == 1 else _BATCH
            mine, theirs = self._reference_metric(made, reference, size), self._metric(run, size)
            return metric_kept(mine, theirs, drop=rule.drop), f"{mine:.3f} to {theirs:.3f}"
        if rule.content is None:
            return True, ""
        baked = made.traced_batch == 1
        images = {
            "traced": lambda: self.subject.example(made.traced_batch),
            "dummy": lambda: self.subject.example(1 if baked else 2),
            "data": lambda: self.subject.test_images[:DATA_IMAGES],
            "bundled": lambda: read_carried(self.subject.carried, "the clean file")[1].images,
        }[rule.inputs]()
        # One shape is what these tools run; a file that takes one image at a time is given one at a time.
        size = 1 if baked else len(images)
        return rule.content(_in_batches(reference, images, size), _in_batches(run, images, size)), ""

    def _metric(self, run: Compute, size: int) -> float:
        """Accuracy of a 20-neighbour vote on 512 labelled test images among 512 labelled training images."""
        (train, train_labels), (test, test_labels) = (
            labelled(folder, self.subject) for folder in (self.subject.training, self.subject.data)
        )
        gallery, queries = (_in_batches(run, images, size)["embedding"] for images in (train, test))
        if not (np.isfinite(gallery).all() and np.isfinite(queries).all()):
            return 0.0
        return float((knn(gallery, train_labels, queries) == test_labels).mean())

    def _reference_metric(self, made: Made, reference: Compute, size: int) -> float:
        if reference != self.subject.graph.run:
            return self._metric(reference, size)
        if self._trained is None:
            self._trained = self._metric(reference, _BATCH)
        return self._trained


def _in_batches(run: Callable[[np.ndarray], Mapping[str, np.ndarray]], images: np.ndarray, size: int) -> Any:
    parts = [run(images[start : start + size]) for start in range(0, len(images), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


_LABELLED: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}


def labelled(folder: Any, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Up to 512 images (N, H, W, 3) uint8 of a labelled folder, and their labels (N,)."""
    key = (subject.name, str(folder))
    if key not in _LABELLED:
        paths = find_images(folder)
        order = np.random.default_rng(1).permutation(len(paths))[:LABELLED]
        chosen = [paths[place] for place in order]
        assert subject.loaded.preprocessing is not None
        labels, _ = labels_from_folders(chosen, folder)
        _LABELLED[key] = subject.loaded.preprocessing.batch(chosen), labels
    return _LABELLED[key]
