"""The page itself: what may stand on it, and how it is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from byol_deploy import __version__
from byol_deploy.atomic import publish_file
from byol_deploy.drawing import draw_curve, draw_drift, draw_map, picture
from byol_deploy.errors import MissingExtraError
from byol_deploy.parity import NOISE_MULTIPLE
from byol_deploy.report import numbers
from byol_deploy.report.blocks import CheckRow, DriftBlock, Fact, ParityBlock, ResultRow
from byol_deploy.report.gallery import ChangedGallery, Gallery
from byol_deploy.report.plane import EmbeddingMap
from byol_deploy.separation import Separation

if TYPE_CHECKING:
    import jinja2

# Colours that hold on white and on black; the lines differ in dashes as well.
_DRIFT_STYLE = """
svg{background:#fff;color:#222}text{font:12px system-ui,sans-serif;fill:currentColor}
.grid{stroke:currentColor;opacity:.16}
.d-line{fill:none;stroke-linecap:round}.d-drift{stroke:#1f6fb5;stroke-width:2}.d-noise{stroke:#888;stroke-dasharray:2 3}
.d-budget{stroke:#b5651d;stroke-dasharray:7 4}.d-own{fill:none;stroke:#c62828;stroke-width:1.5}.d-first{stroke:#c62828}
.d-name{fill:#c62828;font-weight:600}.d-hover{fill:transparent}
@media(prefers-color-scheme:dark){svg{background:#14171a;color:#e6e6e6}.d-drift{stroke:#6cb4f0}.d-budget{stroke:#e0a060}
.d-own,.d-first{stroke:#ff7b72}.d-name{fill:#ff7b72}}
"""

FEWEST_ROWS_TO_FOLD = 10
"""A table of facts with more rows than this is folded."""


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    passed: bool,
    verdict: str,
    results: Sequence[ResultRow] = (),
    parity: Sequence[ParityBlock] = (),
    sections: Sequence[str] = (),
    checks: Sequence[CheckRow] = (),
    separation: Separation | None = None,
    gallery: Gallery | None = None,
    changed: Sequence[ChangedGallery] = (),
    drift: Sequence[DriftBlock] = (),
    map: EmbeddingMap | None = None,
    maps: Sequence[EmbeddingMap] = (),
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    facts: Mapping[str, Sequence[Fact]] | None = None,
    commands: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Write the page, whole or not at all; a page that is there is replaced.

    Args:
        path: The HTML file.
        title: Heading.
        passed: The verdict. A file in ``parity`` or a check that did not pass makes it FAIL, whatever this says, and so
            does a list of files none of which could be compared. With warnings a pass is shown as such.
        verdict: The verdict in a sentence.
        results: Rows of the table of results; a column in which no row has a number is left out.
        parity: The files and their comparisons.
        sections: Further sections as HTML, after the comparisons; empty ones are left out.
        checks: Further checks.
        separation: How far apart the encoder holds different images. Its warnings are added to the page's.
        gallery: Images with their nearest neighbours.
        changed: For each file what became of the nearest neighbours.
        drift: For each file the drift along its graph.
        map: Embeddings in the plane.
        maps: For each file where it puts the embeddings.
        curves: Title to (steps, values); values that are not finite interrupt the line.
        facts: Title to a table of keys and values.
        commands: What to type to get all this again.
        warnings: What a reader should see first. The comparisons' own warnings are added.

    Raises:
        OutputError: The place is full or cannot be written.
        MissingExtraError: Jinja2 is not installed.
        ValueError: The lists of a drift have different lengths.
    """
    environment = _environment()
    failed = [block for block in parity if block.status == "fail"]
    listed = [f"{block.artefact} did not pass its comparison with the trained model." for block in failed]
    listed += [f"The check of {name} did not pass: {detail}" for name, right, detail in checks if not right]
    listed += [*warnings, *(separation.warnings if separation else ())]
    listed += [warning for block in parity for warning in block.report.warnings]
    listed += [f"{block.artefact} was not compared here: {block.not_run}" for block in parity if block.not_run]
    compared = not parity or any(block.status in ("pass", "warn") for block in parity)
    good = passed and compared and not failed and all(right for _, right, _ in checks)
    page = environment.get_template("report.html.j2").render(
        title=title,
        status=("warn" if listed else "pass") if good else "fail",
        verdict=verdict,
        warnings=list(dict.fromkeys(_sentence(warning) for warning in listed)),
        results=results,
        columns={name for name in vars(ResultRow("")) if any(getattr(row, name) not in (None, "") for row in results)},
        parity=[(block, block.shown_rows()) for block in parity],
        sections=[section for section in sections if section],
        noise_multiple=NOISE_MULTIPLE,
        checks=checks,
        separation=separation,
        gallery=gallery,
        changed=changed,
        drift=[(block, draw_drift(block.series)) for block in drift],
        map=None if map is None else _drawn(map),
        maps=_together([_drawn(one) for one in maps]),
        curves=[draw_curve(name, *series) for name, series in (curves or {}).items()],
        facts=facts or {},
        fold_from=FEWEST_ROWS_TO_FOLD,
        commands=commands,
        version=__version__,
    )
    with publish_file(path, force=True) as file:
        # File names may hold halves of surrogate pairs, which UTF-8 cannot write.
        file.write(page.encode("utf-8", "backslashreplace"))


def drift_svg(series: Mapping[str, Sequence[Any]], *, title: str = "", verdict: str = "") -> str:
    """The plot of the drift along the graph as a drawing of its own: one SVG file that loads nothing.

    Args:
        series: As :func:`byol_deploy.drawing.draw_drift` takes it.
        title: What it shows, for whoever cannot see it.
        verdict: A sentence that names the layer, likewise.

    Raises:
        MissingExtraError: Jinja2 is not installed.
        ValueError: The lists have different lengths.
    """
    template = _environment().get_template("drift.svg.j2")
    return template.render(drawn=draw_drift(series), title=f"{title}. {verdict}", alone=_DRIFT_STYLE).strip() + "\n"


def render(name: str, **values: Any) -> str:
    """A template of this package, such as a section of the page.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    return _environment().get_template(name).render(**values)


def _environment() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("the report", "jinja2", "train") from error

    def load(name: str) -> str:
        return (files("byol_deploy") / "data" / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = ("percent", "interval", "short", "cosine", "decibels", "floors", "share", "latency", "size")
    environment.filters.update({name: getattr(numbers, name) for name in shown} | {"picture": picture})
    environment.tests["text"] = lambda value: isinstance(value, str)
    environment.tests["by_fidelity"] = numbers.by_fidelity
    return environment


def _drawn(found: EmbeddingMap) -> dict[str, Any]:
    drawn = draw_map(found.points, found.labels, found.names, moved=found.moved)
    return drawn | {"method": found.method, "title": found.title}


def _together(drawn: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Maps on which nothing can be seen to move show the same points: one drawing for all of them."""
    found: list[dict[str, Any]] = []
    for one in drawn:
        same = next(
            (old for old in found if not one["moved"] and not old["moved"] and _looks(one) == _looks(old)), None
        )
        if same is None:
            found.append(one)
        else:
            same["title"] = f"{same['title']}, {one['title']}"
            same["largest"] = max(same["largest"] or 0.0, one["largest"] or 0.0)
    return found


def _looks(drawn: Mapping[str, Any]) -> list[str]:
    return [group["path"] for group in drawn["groups"]]


def _sentence(text: str) -> str:
    """A warning as a sentence: the same one may come with and without its capital letter."""
    return text[:1].upper() + text[1:] if text[:4] == "the " else text
