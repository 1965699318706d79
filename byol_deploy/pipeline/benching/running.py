"""Bench: how fast is each file, what does it need, and does it still compute what was trained while it is that fast?"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from byol_deploy.atomic import check_file
from byol_deploy.bench import ROUNDS, Block, Comparison, check_budget, measure_blocks
from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, MissingError, UsageError, require_packages
from byol_deploy.host import describe_host
from byol_deploy.images import printable
from byol_deploy.pipeline.benching.items import Item, baselines, find_items
from byol_deploy.pipeline.benching.processes import empty_process_bytes
from byol_deploy.pipeline.benching.rows import Fidelity, SpeedReport, SpeedRow, by_condition
from byol_deploy.pipeline.benching.sessions import (
    Measured,
    Pixels,
    Plan,
    Say,
    check_memory,
    cold_starts,
    judge,
    open_worker,
)
from byol_deploy.pipeline.reference import Reference, build_reference
from byol_deploy.report.speed import check_plot, write_speed_plot, write_speed_report

BUDGET_S = 60.0
BATCHES = (1, 8)
STARTS = 3
MOST_BATCH = 1024


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    starts: int = STARTS,
    budget_s: float = BUDGET_S,
    plot: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    trust_backbone: bool = False,
    say: Say | None = None,
) -> SpeedReport:
    """Measure files side by side: cold start, latency, throughput, memory, size, and fidelity in the same row.

    Each file is opened in a process of its own; one works at a time, in rounds whose order is drawn anew, see
    :mod:`byol_deploy.pipeline.benching.worker` and :func:`byol_deploy.bench.measure_blocks`. The first file is opened
    twice and measured as two: the A/A control, which says how far the numbers can be trusted.

    Args:
        paths: Bundles, and lone files that byol-deploy wrote.
        against: A checkpoint or run directory: the truth for the fidelity columns, and PyTorch itself (eager,
            torch.compile, TorchScript) as further rows. Without it the golden cases are the truth, and for files of
            reduced precision the float32 file beside them too, on the images of ``data``.
        data: Folder of real images; None takes photographs that ship with byol-deploy with ``against``, and the golden
            cases without.
        batches: Images at once, one row for each.
        threads: Threads inside an operator, one row for each; None takes 1 and all that this process may use.
        rounds: Least number of rounds, where the budget allows.
        starts: Fresh processes for each cold start.
        budget_s: Seconds for the interleaved run. Cold starts and comparisons come before and are not counted.
        plot: An SVG or PNG file to write: latency against fidelity.
        report: An HTML file to write.
        backbone: For a checkpoint that does not say what its backbone is.
        trust_backbone: Import the recipe's own ``module:callable`` backbone.
        say: Called with a line of progress now and then.

    Returns:
        The rows. A file that fails its comparison, or cannot be run here, is a row that says so.

    Raises:
        UsageError: Nothing to measure, an impossible batch size or number of threads, a budget or a memory that is too
            small.
        BundleError: A path is no bundle and no file of byol-deploy, or no file could be run.
        CheckpointError, DataError: With ``against`` or ``data``.
        MissingError: No engine of any file is installed, or PyTorch for ``against``.
        OutputError: ``plot`` or ``report`` cannot be written.
    """
    say = say or (lambda line: None)
    plan = _plan(batches, threads, starts)
    check_budget(budget_s, rounds)
    if report is not None or (plot is not None and check_plot(plot) == "svg"):
        require_packages("a report or an SVG", "train", "jinja2")
    for target in (plot, report):
        if target is not None:
            check_file(target, force=True)
    items = find_items(paths)
    if all(item.missing for item in items):
        raise MissingError(f"nothing can be measured here: {items[0].name}: {items[0].missing}")
    reference = None
    if against is not None:
        require_packages("--against, the comparison with a checkpoint,", "train", "torch", "lightning", "timm")
        say("computing the reference in float32 and float64")
        reference, items = _against(items, against, data, backbone, trust_backbone)
    pixels = Pixels(data, reference, plan.batches[-1])
    measured = [Measured(item, None if item.missing else pixels.of(item), item.missing) for item in items]
    host = _host(items)
    cold_starts(measured, plan, say)
    check_memory(measured)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="byol-deploy-bench-")))
        for one in measured:
            say(f"opening {one.item.name}")
            open_worker(one, plan, scratch, stack)
        files = [one for one in measured if one.worker is not None and not one.item.baseline]
        if not files:
            first = next(one for one in measured if not one.item.baseline)
            raise BundleError(f"nothing could be measured: {first.item.name}: {first.failed}")
        # The control has the same history as its twin, all sessions and comparisons: where the memory of a process lies
        # is worth some per cent, too.
        twin = files[0]
        again = Measured(twin.item, twin.images, cold=twin.cold, peaks=twin.peaks)
        open_worker(again, plan, scratch, stack)
        judge([*measured, again], plan, reference, pixels, say)
        compared = _interleaved(measured, twin, again, plan, budget_s, rounds, say)
    warnings = dict.fromkeys([*compared.warnings, *(reference.warnings if reference is not None else ())])
    result = SpeedReport(
        paths=tuple(printable(path) for path in paths),
        rows=tuple(by_condition(_rows(measured, plan, compared))),
        control=compared.control,
        rounds=compared.rounds,
        seconds=compared.seconds,
        budget_s=budget_s,
        images=pixels.described,
        host=host,
        empty_bytes=empty_process_bytes(),
        warnings=tuple(warnings),
    )
    if plot is not None:
        write_speed_plot(plot, result)
    if report is not None:
        write_speed_report(report, result, _command(result, against, data))
    return result


def _plan(batches: Sequence[int], threads: Sequence[int] | None, starts: int) -> Plan:
    cores = usable_cores()
    counts = (1, cores) if threads is None else tuple(threads)
    for size in batches:
        if not 1 <= size <= MOST_BATCH:
            raise UsageError(f"a batch size is {size}; use whole numbers from 1 to {MOST_BATCH}, e.g. --batch 8")
    for count in counts:
        if not 1 <= count <= cores:
            raise UsageError(f"a number of threads is {count}; this process may use {cores} core(s): give 1 to {cores}")
    if not batches or not counts:
        raise UsageError("there is nothing to measure; give at least one batch size and one number of threads")
    if starts < 1:
        raise UsageError(f"there are {starts} starts for each file; use 1 or more")
    return Plan(tuple(sorted(set(batches))), tuple(sorted(set(counts))), starts)


def _against(
    items: Sequence[Item],
    against: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    backbone: str | None,
    trust_backbone: bool,
) -> tuple[Reference, list[Item]]:
    """The reference; PyTorch as further items; and what speaks against files that belong to another checkpoint."""
    from byol_deploy.graph import OUTPUTS, EncoderGraph
    from byol_deploy.training.checkpoints import load_checkpoint

    like = next(item for item in items if not item.missing)
    assert like.contract is not None
    names = {name for item in items for name in item.outputs}
    unknown = sorted(names - set(OUTPUTS))
    if unknown:
        raise BundleError(f"a file has the output {unknown[0]}; a checkpoint has {', '.join(OUTPUTS)}")
    loaded = load_checkpoint(against, backbone=backbone, trust_backbone=trust_backbone)
    preprocessing = loaded.preprocessing or like.contract[0].preprocessing
    graph = EncoderGraph(loaded.model, preprocessing, sorted(names))
    reference = build_reference(loaded, graph, preprocessing, data)
    # The hash is over what an output needs; files with fewer outputs hold fewer parameters.
    hashes = {
        tuple(item.outputs): EncoderGraph(loaded.model, preprocessing, item.outputs).parameter_hash()
        for item in items
        if item.outputs
    }

    def checked(item: Item) -> Item:
        if item.contract is None:
            return item
        manifest = item.contract[0]
        said = [item.fault] if item.fault else []
        if manifest.model.parameter_hash != hashes[tuple(item.outputs)]:
            said.append("it was exported from another checkpoint: the hash of its parameters is not that of --against")
        if manifest.preprocessing != preprocessing:
            said.append(
                f"its images are prepared otherwise: trained with {preprocessing.describe()}, exported with "
                f"{manifest.preprocessing.describe()}"
            )
        return replace(item, fault="; ".join(said))

    further = baselines(loaded.path, like, backbone, trust_backbone, preprocessing.to_dict())
    return reference, [*further, *map(checked, items)]


def _interleaved(
    measured: Sequence[Measured],
    twin: Measured,
    again: Measured,
    plan: Plan,
    budget_s: float,
    rounds: int,
    say: Say,
) -> Comparison:
    """All rows and the control in one run."""
    ready = [one for one in measured if one.worker is not None]
    blocks: dict[str, Block] = {}
    bases: dict[str, str] = {}
    for size in plan.batches:
        for count in plan.threads:
            for one in ready:
                assert one.worker is not None
                key = _key(one.item, count, size)
                blocks[key] = partial(one.worker.block, count, size)
                bases[key] = _key(ready[0].item, count, size)
    control = _key(twin.item, plan.threads[0], plan.batches[0])
    second = f"{control}, opened again"
    if again.worker is None:
        raise BundleError(f"{twin.item.name} cannot be opened twice: {again.failed}")
    blocks[second] = partial(again.worker.block, plan.threads[0], plan.batches[0])
    say(f"measuring {len(blocks)} rows side by side, for up to {budget_s:g} s")
    return measure_blocks(blocks, budget_s=budget_s, control=(control, second), bases=bases, rounds=rounds)


def _key(item: Item, threads: int, batch: int) -> str:
    return f"{item.name} ({threads} thread{'s' if threads > 1 else ''}, batch {batch})"


def _rows(measured: Sequence[Measured], plan: Plan, compared: Comparison) -> list[SpeedRow]:
    base = next(one.item.name for one in measured if one.worker is not None)
    rows = []
    for one in measured:
        for count in plan.threads:
            for size in plan.batches:
                row = _row(one, count, size, compared, base)
                # A file that could not be run at all is one row that says so, not one for each condition.
                if not one.failed or (count, size) == (plan.threads[0], plan.batches[0]):
                    rows.append(row)
    return rows


def _row(one: Measured, threads: int, batch: int, compared: Comparison, base: str) -> SpeedRow:
    item = one.item
    plain = SpeedRow(
        name=item.name,
        format=item.format,
        engine=describe_host(runtime=item.package)["runtime"] if item.package else "",
        precision=item.precision,
        threads=threads,
        batch=batch,
        baseline=item.baseline,
        file_bytes=item.bytes,
    )
    key = _key(item, threads, batch)
    reason = one.failed or compared.failed.get(key, "")
    if reason:
        return replace(plain, not_run=reason)
    found = compared[key]
    return replace(
        plain,
        calls=found.calls,
        p50_ms=found.p50_ms,
        p90_ms=found.p90_ms,
        p99_ms=found.p99_ms,
        images_per_s=1000 * batch / found.p50_ms,
        ratio=found.ratio,
        ratio_low=found.low,
        ratio_high=found.high,
        base=base,
        cold=one.cold,
        peak_bytes=one.peaks.get(batch),
        fidelity=one.fidelity.get((threads, batch), Fidelity("not compared", "it was not compared")),
    )


def _host(items: Sequence[Item]) -> dict[str, str]:
    """Where it is measured, the load that was there before this began, and the engines."""
    found = describe_host()
    host = {name: found[name] for name in ("machine", "cpu", "instructions", "cores", "system")}
    with contextlib.suppress(OSError, AttributeError):  # not on Windows
        host["load before"] = f"{os.getloadavg()[0]:.1f}"
    packages = sorted({item.package for item in items if item.package and not item.missing})
    host["engines"] = ", ".join(describe_host(runtime=package)["runtime"] for package in packages)
    return host


def _command(report: SpeedReport, against: object, data: object) -> str:
    words = ["byol-deploy", "bench", *report.paths]
    words += ["--against", printable(str(against))] if against is not None else []
    words += ["--data", printable(str(data))] if data is not None else []
    return shlex.join(words)
