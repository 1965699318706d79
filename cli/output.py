"""What every command prints, and where: stdout is data, stderr is talk.

With ``--json`` a command writes one JSON document to stdout and nothing else; all talk, tables included, goes to
stderr. Without it, the result is written to stdout for a person.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout; talk goes to stderr.")]


def talk(message: str = "") -> None:
    """Say something to the person at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


def emit_json(document: Mapping[str, Any]) -> None:
    """Write ``document`` to stdout as the command's one JSON document (NaN and infinities become null)."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def emit(document: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Write a command's result: ``document`` as JSON, or ``text`` for a person."""
    if as_json:
        emit_json(document)
    else:
        print(text, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out ``rows`` as a plain-text table, first column left, the others right-aligned."""
    from rich import box
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(_cell(value) for value in row))
    console = _plain_console()
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _plain_console() -> Console:
    from rich.console import Console

    # A fixed, generous width: a table that is redirected into a file must not depend on the terminal.
    return Console(width=140, color_system=None, markup=False, highlight=False, emoji=False)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
