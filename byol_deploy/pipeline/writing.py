"""The files of one export: each is written, sealed, loaded again and compared, one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_deploy.bundle import Artefact, ExtraFile, seal_artefact, sha256_file
from byol_deploy.errors import ExportError
from byol_deploy.formats import Format, RunOptions, Signature
from byol_deploy.host import describe_host
from byol_deploy.parity import ParityReport
from byol_deploy.pipeline.proof import BranchProof, compare_file, few, momentum_tensors, prove_branch
from byol_deploy.pipeline.reducing import Material, reduce
from byol_deploy.pipeline.reference import Reference
from byol_deploy.pipeline.showing import drift_of, file_evidence
from byol_deploy.quantization import Trade
from byol_deploy.report import FileEvidence

if TYPE_CHECKING:
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.training.checkpoints import LoadedCheckpoint


@dataclass
class Writer:
    """Writes files into a folder and remembers what came of them.

    Attributes:
        folder: Where they are written.
        graph: The trained encoder.
        loaded: Its checkpoint.
        reference: What files are compared with.
        signature: Shapes and names.
        carried: Texts that every file carries.
        noted: What the manifest notes about the machine and versions, beside each comparison.
        say: Called with a line of progress now and then.
        artefacts: The files that are there.
        failures: What speaks against publishing.
        evidence: For the report, by file.
    """

    folder: Path
    graph: EncoderGraph
    loaded: LoadedCheckpoint
    reference: Reference
    signature: Signature
    carried: Mapping[str, str]
    noted: Mapping[str, Any]
    say: Callable[[str], None]
    artefacts: list[Artefact] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    evidence: dict[str, FileEvidence] = field(default_factory=dict)

    def full(self, format: Format, *, optional: bool) -> Path | None:
        """Write the float32 file of a format.

        Args:
            format: The format.
            optional: Leave it out, with a word, when it cannot be written or differs; nothing of it stays then.

        Returns:
            Its path; None when it was left out.

        Raises:
            ExportError: It cannot be written, and is not optional.
        """
        path = self.folder / f"model{format.suffix}"
        self.say(f"writing {path.name}")
        with self._whole_or_not_at_all(path, optional):
            further = format.export(self.graph, self.signature, path, self.carried)
            self._finish(path, format, "fp32", further, None, optional)
        return path if path.exists() else None

    def reduced(self, format: Format, full: Path, precision: str, material: Material, *, optional: bool) -> None:
        """Search for a file of reduced precision and write it.

        Where files of this format cannot run, nothing can be searched for: it is written with every layer reduced.

        Args:
            format: The format.
            full: Its float32 file.
            precision: The precision.
            material: Images and goal.
            optional: As in :meth:`full`.

        Raises:
            ExportError: It cannot be written, and is not optional.
        """
        path = self.folder / f"model.{precision}{format.suffix}"
        with self._whole_or_not_at_all(path, optional):
            if format.runs_here():
                self.say(f"writing {path.name}, with every layer in {precision}: no trial can run here")
                reducer = format.reducer(self.graph, self.signature, full, precision, material.calibration)
                further = reducer.write(path, self.carried, reducer.methods[0], ())
                self._finish(path, format, precision, further, None, optional)
                return
            self.say(f"searching for {path.name}")
            trade, further = reduce(
                format, self.graph, self.signature, full, path, precision, material, self.carried, self.say
            )
            self.say(trade.table())
            if trade.chosen is not None:
                self._finish(path, format, precision, further, trade, optional)
            elif optional:
                self.say(f"left out: {path.name}: {trade.reason}")
            else:
                self.failures.append(f"{path.name}: {trade.reason}")

    @contextlib.contextmanager
    def _whole_or_not_at_all(self, path: Path, optional: bool) -> Iterator[None]:
        """An optional file that cannot be written or is left out takes everything with it that came with it."""
        before = set(self.folder.iterdir())
        try:
            yield
        except ExportError as error:
            if not optional:
                raise
            self.say(f"left out: {path.name}: {error}")
        kept = {name for entry in self.artefacts for name in (entry.file, *(item.file for item in entry.extra_files))}
        if optional:
            for item in set(self.folder.iterdir()) - before:
                if item.name not in kept:
                    item.unlink()

    def _finish(
        self, path: Path, format: Format, precision: str, further: tuple[Path, ...], trade: Trade | None, optional: bool
    ) -> None:
        host = describe_host(runtime=format.runs_with[0])
        # The last thing that is done to a file: what is compared and published is what lies there now.
        seal_artefact(path, format, precision, host, tuple(item.name for item in further))
        tensors, momentum = format.tensors(path), momentum_tensors(self.loaded)
        proof = prove_branch(tensors, self.graph.tensors(), momentum, precision=precision)
        cannot = format.runs_here()
        if cannot:
            self.say(f"{path.name}: not run here: {cannot}")
            self.failures += [f"{path.name}: {failure}" for failure in proof.faults]
            self._note(
                path, further, format, precision, {**ParityReport(()).to_dict(), "not_run": cannot}, proof, trade
            )
            return
        self.say(f"comparing {path.name}, as written, with PyTorch")
        found = compare_file(path, format, self.reference, RunOptions(), precision=precision)
        report = found.report.with_warnings(self.reference.warnings)
        passed = report.passed and proof.passed
        self.say(f"{path.name}: {'PASS' if passed else 'FAIL'}\n{report.table()}\n{proof}")
        if optional and not passed:
            self.say(f"left out: {path.name}: {few([*proof.faults, *report.failures], 2)}")
            return
        drift = drift_of(path, format, self.graph, self.reference, broken=not report.passed, precision=precision)
        self.evidence[path.name] = file_evidence(self.reference, found.crowd, drift)
        self._note(path, further, format, precision, report.to_dict(), proof, trade)
        self.failures += [f"{path.name}: {failure}" for failure in proof.faults]
        self.failures += report.failures if not report.passed else []

    def _note(
        self,
        path: Path,
        further: tuple[Path, ...],
        format: Format,
        precision: str,
        parity: Mapping[str, Any],
        proof: BranchProof,
        trade: Trade | None,
    ) -> None:
        self.artefacts.append(
            Artefact(
                file=path.name,
                format=format.name,
                precision=precision,
                sha256=sha256_file(path),
                bytes=path.stat().st_size,
                extra_files=tuple(ExtraFile(item.name, sha256_file(item), item.stat().st_size) for item in further),
                parity=parity,
                host={**self.noted, "tensors": str(proof)},
                reduction=trade.to_dict() if trade else {},
            )
        )
