"""`byol-deploy embed`: images to a file of embeddings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOption, emit, talk


def embed(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE|FILE", help="A bundle, or an .onnx file of ours.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder of images, or one image.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write: .npy, .csv or .parquet.")],
    output: Annotated[
        str | None, typer.Option(help="Which output: embedding (the default), projection, prediction.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 32,
    provider: Annotated[str, typer.Option(help="Execution provider: cpu, cuda, ..., or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads; the default is what this process may use.")] = None,
    max_bad_share: Annotated[
        float, typer.Option("--max-bad-share", help="Share of images, 0 to 1, that may be unreadable.")
    ] = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Embed every image of a folder into one .npy, .csv or .parquet file."""
    import warnings

    from PIL import Image

    from ..embedding import embed_folder
    from ..images import printable

    # A bomb is refused and listed as a bad image; Pillow need not warn of it too.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    talk(f"embedding the images of {printable(data)} with {printable(model)}")
    done = embed_folder(
        model,
        data,
        out,
        output=output,
        batch_size=batch_size,
        provider=provider,
        threads=threads,
        max_bad_share=max_bad_share,
        force=force,
        progress=_meter(),
    )
    for name, reason in done.bad:
        talk(f"skipped {name}: {reason.removeprefix(name).strip()}")
    rate = done.rows / done.seconds if done.seconds > 0 else 0.0
    document = {
        "out": printable(done.out),
        "paths_file": None if done.paths_file is None else printable(done.paths_file),
        "rows": done.rows,
        "width": done.width,
        "output": done.output,
        "provider": done.provider,
        "bad": [{"path": name, "reason": reason} for name, reason in done.bad],
        "seconds": round(done.seconds, 3),
        "images_per_s": round(rate, 1),
    }
    beside = f" (paths in {printable(done.paths_file)})" if done.paths_file else ""
    skipped = f", {len(done.bad)} bad image(s) skipped" if done.bad else ""
    text = (
        f"wrote {done.rows} x {done.width} {done.output} to {printable(done.out)}{beside}: "
        f"{rate:.0f} images/s on {done.provider}{skipped}"
    )
    emit(document, text, as_json=as_json)


def _meter() -> Callable[[int, int], None]:
    """Progress on stderr: a line that is rewritten on a terminal, a new line every ten seconds elsewhere."""
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if done < total and now - last < (0.1 if terminal else 10):
            return
        last = now
        line = f"{done} of {total} images, {done / max(now - start, 1e-9):.0f} images/s"
        if terminal:
            print(f"\r{line} ", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        else:
            talk(line)

    return show
