"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from neighbour_rules import RULES

from faults.judges import OURS, SELF_TEST

Row = dict[str, Any]
"""One case on one encoder, as in the JSON file."""

JUDGES = (OURS, SELF_TEST, *(rule.name for rule in RULES))
_SHOWN = {"caught": "●", "warned": "◐", "missed": "·", "n/a": "–", "failed": "?"}


def as_markdown(rows: Sequence[Row], encoders: Sequence[str], machine: dict[str, Any]) -> str:
    """The page: how to read it, a summary, faults, harmless variants, and what byol-deploy said.

    Args:
        rows: One for each case and encoder.
        encoders: In the order in which a cell shows them.
        machine: Of `backbones.machine`.
    """
    faults = [row for row in rows if not row["harmless"] and not row["on_merit"]]
    harmless = [row for row in rows if row["harmless"]]
    on_merit = [row for row in rows if row["on_merit"]]
    names = list(dict.fromkeys(row["case"] for row in faults))
    lines = [
        "# Deployment faults, and who notices",
        "",
        f"Written by `python benchmarks/faults` on {machine['date']}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['system']}; Python {machine['python']}, PyTorch {machine['torch']}, ONNX Runtime "
        f"{machine['onnxruntime']}.",
        "",
        f"{len(names)} faults and {len({row['case'] for row in harmless})} harmless variants, each really made, on "
        f"{len(encoders)} encoders that were really trained ({', '.join(encoders)}; benchmarks/encoders.py). All "
        "judges get the same files.",
        "",
        f"* **{OURS}**: `byol-deploy verify FILE --against RUN --data IMAGES`. A refusal to open the file counts as "
        "caught.",
        f"* **{SELF_TEST}**: `byol-deploy verify FILE`, on the device: no checkpoint, no images, no PyTorch. It knows "
        "what the file carries, so an encoder that was wrong before its golden cases were made agrees with itself.",
        *(f"* **{rule.name}**: {rule.described}." for rule in RULES),
        "",
        "A neighbour compares a file with the module that its exporter held: where that module is the fault, it "
        "compares the fault with itself. The second number in the summary is what the same rule finds on the same "
        "inputs when somebody hands it the right reference. A fault of the runtime lies outside every tensor "
        "comparison. (lightly-train's check is that of its task models: it does not export an encoder to ONNX.)",
        "",
        "What is replayed is each tool's documented rule, not the tool. A rule that catches every fault and rejects "
        "nearly every harmless variant is only too strict to tell them apart. The limits for reduced precision in "
        f"{OURS} were settled with the files of these three encoders at hand: for them the table is no independent "
        "test.",
        "",
        f"Each cell shows {', '.join(encoders)}: {_SHOWN['caught']} caught, {_SHOWN['warned']} warned and published "
        f"all the same, {_SHOWN['missed']} missed, {_SHOWN['n/a']} not applicable to this encoder, "
        f"{_SHOWN['failed']} broke down.",
        "",
        "## Summary",
        "",
        f"| judge | faults caught of {len(faults)} | warned only | caught or warned with the right reference | "
        f"harmless rejected of {len(harmless)} |",
        "|---|---|---|---|---|",
    ]
    for judge in JUDGES:
        helped = "" if judge in (OURS, SELF_TEST) else _count(faults, judge, ("caught", "warned"), "helped")
        lines.append(
            f"| {judge} | {_count(faults, judge, ('caught',))} | {_count(faults, judge, ('warned',))} | {helped} | "
            f"{_count(harmless, judge, ('caught', 'warned', 'failed'))} |"
        )
    for title, part in (
        ("Faults", faults),
        ("Harmless variants (a mark is a false alarm)", harmless),
        ("Files judged on their merits", on_merit),
    ):
        if part:
            lines += ["", f"## {title}", "", *_matrix(part, encoders)]
    missed = [row for row in faults if row["verdicts"][OURS]["mark"] == "missed"]
    alarms = [row for row in harmless if row["verdicts"][OURS]["mark"] != "missed"]
    lines += ["", f"## What {OURS} said", ""]
    lines += [f"- MISSED {row['case']}, {row['encoder']}" for row in missed]
    lines += [f"- FALSE ALARM {row['case']}, {row['encoder']}: {_brief(row)}" for row in alarms]
    for case in dict.fromkeys(row["case"] for row in [*faults, *on_merit]):
        first = next((row for row in rows if row["case"] == case and row["verdicts"][OURS]["reason"]), None)
        if first is not None:
            lines.append(f"- {case} ({first['encoder']}): {_brief(first)}")
    return "\n".join(lines) + "\n"


def _count(rows: Iterable[Row], judge: str, marks: Sequence[str], key: str = "verdicts") -> int:
    return sum(row[key][judge]["mark"] in marks for row in rows)


def _matrix(rows: Sequence[Row], encoders: Sequence[str]) -> list[str]:
    found = {(row["case"], row["encoder"]): row for row in rows}
    lines = [f"| | {' | '.join(JUDGES)} | |", f"|{'---|' * (len(JUDGES) + 2)}"]

    def cell(case: str, mark: Callable[[Row], str]) -> str:
        return " ".join(
            _SHOWN[mark(found[case, encoder])] if (case, encoder) in found else _SHOWN["n/a"] for encoder in encoders
        )

    for case, what in dict.fromkeys((row["case"], row["what"]) for row in rows):
        marks = [cell(case, lambda row, judge=judge: row["verdicts"][judge]["mark"]) for judge in JUDGES]  # type: ignore[misc]
        lines.append(f"| {case} | {' | '.join(marks)} | {what} |")
    return lines


def _brief(row: Row) -> str:
    reason: str = row["verdicts"][OURS]["reason"]
    return reason if len(reason) <= 300 else f"{reason[:297]}..."
