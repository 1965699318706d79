"""Embedding a folder of images into one file, in bounded memory and all or nothing.

Formats, by suffix:

* ``.npy``: (N, D) float32, and beside it ``<name>.paths.csv`` with the columns row, path.
* ``.csv``: the columns path, e0, e1, ... with nine significant digits, which give back the same float32.
* ``.parquet``: the column path and a column of fixed-size float32 lists named after the output (extra ``parquet``).

Paths are written relative to the folder, with forward slashes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from byol_deploy.atomic import check_file, publish_file
from byol_deploy.errors import UsageError, require_packages
from byol_deploy.images import BadImages, find_images, printable
from byol_deploy.runtime import Encoder

_ROW_GROUP_BYTES = 16 << 20


@dataclass(frozen=True)
class Embedded:
    """What :func:`embed_folder` wrote.

    Attributes:
        out: The file.
        paths_file: The list of paths beside an .npy file, else None.
        rows: Number of embeddings.
        width: Their width D.
        output: The output that they are.
        provider: The execution provider that computed them.
        bad: (path, reason) of every image that was skipped.
        seconds: Time from the first image to the last.
    """

    out: Path
    paths_file: Path | None
    rows: int
    width: int
    output: str
    provider: str
    bad: tuple[tuple[str, str], ...]
    seconds: float


class _Writer(ABC):
    """One file format. ``paths`` is the second file, for a format that needs one."""

    def __init__(self, file: IO[bytes], paths: IO[bytes] | None, output: str, encoder: Encoder) -> None:
        self.file = file
        self.paths_out = paths
        self.output = output
        self.width = encoder.width
        self.model = encoder.manifest.model
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Write what stands before the first row."""

    @abstractmethod
    def add(self, paths: Sequence[str], rows: np.ndarray) -> None:
        """Write rows (n, D) float32 and their n paths."""

    def finish(self) -> None:  # noqa: B027 - most formats have nothing to add
        """Write what stands after the last row."""

    def close(self) -> None:  # noqa: B027 - most formats hold nothing
        """Let go of the file; called after an error too."""


def embed_folder(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    output: str | None = None,
    batch_size: int = 32,
    provider: str = "cpu",
    threads: int | None = None,
    max_bad_share: float = 0.05,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Embed every image below a folder, or a single image, and write one file.

    The file appears under its name only when it is complete.

    Args:
        model: A bundle, or a lone .onnx file of ours.
        data: A folder of images, or one image.
        out: The file to write; its suffix (.npy, .csv, .parquet) chooses the format.
        output: Which output of the graph; None takes the first, the embedding.
        batch_size: How many images the graph sees at once.
        provider: See :class:`byol_deploy.runtime.Encoder`.
        threads: See :class:`byol_deploy.runtime.Encoder`.
        max_bad_share: The share of images, 0 to 1, that may be unreadable and are skipped.
        force: Replace a file that is there.
        progress: Called with (images done, images in all) after each batch.

    Raises:
        UsageError: An unknown suffix, or options out of range.
        OutputError: The file is there and ``force`` is off, or the place cannot be written.
        DataError: No images, or too many bad ones; nothing is written then.
        BundleError: The model cannot be opened.
        MissingExtraError: .parquet without pyarrow.
        ProviderError: The provider does not work here.
    """
    target = Path(out)
    writer_of = _writer(target)
    beside = _paths_file(target)
    for path in (target, beside):
        if path is not None:
            check_file(path, force=force)
    bad = BadImages(max_bad_share)
    root = Path(data)
    images = [root] if root.is_file() else find_images(root)
    # Decoding shares the cores with the graph: threads that wait busily would take them from it.
    encoder = Encoder(model, provider=provider, threads=threads, outputs=output, allow_spinning=False)
    name = encoder.outputs[0]
    rows = 0
    start = time.monotonic()
    with contextlib.ExitStack() as files:
        # Left in reverse: first the embeddings are published, then their paths.
        paths_out = files.enter_context(publish_file(beside, force=force)) if beside is not None else None
        file = files.enter_context(publish_file(target, force=force))
        writer = writer_of(file, paths_out, name, encoder)
        files.callback(writer.close)
        for batch in encoder.stream(images, batch_size, bad):
            names = [_relative(images[position], root) for position in batch.positions]
            writer.add(names, batch.outputs[name])
            rows += len(names)
            if progress is not None:
                progress(batch.positions[-1] + 1, len(images))
        bad.check(len(images))
        writer.finish()
        if beside is not None and paths_out is not None:
            for written in (file, paths_out):
                written.flush()
                os.fsync(written.fileno())
            # So that at no moment old paths stand beside new embeddings. Both new files are complete by now.
            beside.unlink(missing_ok=True)
    return Embedded(
        out=target,
        paths_file=beside,
        rows=rows,
        width=encoder.width,
        output=name,
        provider=encoder.provider,
        bad=tuple(bad.items),
        seconds=time.monotonic() - start,
    )


def _writer(target: Path) -> type[_Writer]:
    writers: dict[str, type[_Writer]] = {".npy": _Npy, ".csv": _Csv, ".parquet": _Parquet}
    suffix = target.suffix.lower()
    if suffix not in writers:
        raise UsageError(f"--out is {printable(target)}; use a name that ends in {', '.join(writers)}")
    if suffix == ".parquet":
        require_packages("Writing .parquet", "parquet", "pyarrow")
    return writers[suffix]


def _paths_file(target: Path) -> Path | None:
    return target.with_name(f"{target.stem}.paths.csv") if target.suffix.lower() == ".npy" else None


def _relative(path: Path, root: Path) -> str:
    return printable(path.name if path == root else path.relative_to(root).as_posix())


@contextlib.contextmanager
def _text(file: IO[bytes]) -> Iterator[IO[str]]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    try:
        yield text
    finally:
        text.detach()  # the file belongs to whoever opened it


class _Npy(_Writer):
    def begin(self) -> None:
        self.rows = 0
        self._header()
        self.header_bytes = self.file.tell()
        self._list(["row", "path"])

    def add(self, paths: Sequence[str], rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self._list(*enumerate(paths, self.rows))
        self.rows += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._header()
        # NumPy pads the header so that the first axis may grow to 21 digits in place.
        assert self.file.tell() == self.header_bytes
        self.file.seek(0, os.SEEK_END)

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
        )

    def _list(self, *lines: Iterable[object]) -> None:
        assert self.paths_out is not None  # every .npy has its list of paths
        with _text(self.paths_out) as text:
            csv.writer(text).writerows(lines)


class _Csv(_Writer):
    def begin(self) -> None:
        self._write([["path", *(f"e{number}" for number in range(self.width))]])

    def add(self, paths: Sequence[str], rows: np.ndarray) -> None:
        self._write([path, *(f"{value:.9g}" for value in row)] for path, row in zip(paths, rows.tolist(), strict=True))

    def _write(self, lines: Iterable[Iterable[object]]) -> None:
        with _text(self.file) as text:
            csv.writer(text).writerows(lines)


class _Parquet(_Writer):
    def begin(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self.arrow = pyarrow
        origin = {
            "byol_deploy.backbone": self.model.backbone,
            "byol_deploy.parameter_hash": self.model.parameter_hash,
        }
        self.schema = pyarrow.schema(
            [("path", pyarrow.string()), (self.output, pyarrow.list_(pyarrow.float32(), self.width))], metadata=origin
        )
        self.writer = pyarrow.parquet.ParquetWriter(self.file, self.schema)
        self.names: list[str] = []
        self.blocks: list[np.ndarray] = []

    def add(self, paths: Sequence[str], rows: np.ndarray) -> None:
        self.names += paths
        self.blocks.append(rows)
        if len(self.names) * self.width * 4 >= _ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self.close()

    def close(self) -> None:
        self.writer.close()

    def _flush(self) -> None:
        if not self.names:
            return
        flat = self.arrow.array(np.concatenate(self.blocks).ravel(), self.arrow.float32())
        lists = self.arrow.FixedSizeListArray.from_arrays(flat, self.width)
        self.writer.write_table(self.arrow.Table.from_arrays([self.arrow.array(self.names), lists], schema=self.schema))
        self.names, self.blocks = [], []
