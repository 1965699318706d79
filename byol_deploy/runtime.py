"""Embedding images with an exported encoder, without PyTorch: with ONNX Runtime, or with the engine it was tuned for.

::

    from byol_deploy import Encoder

    encoder = Encoder("bundle")
    embeddings = encoder(["a.jpg", "b.png"])  # (2, D) float32
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from byol_deploy import formats
from byol_deploy.bundle import Bundle, Golden, read_carried
from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, DataError, MissingExtraError, UsageError
from byol_deploy.formats import Format, Opened, Port, RunOptions
from byol_deploy.images import BadImages, ImageSource, printable
from byol_deploy.manifest import Artefact, Manifest
from byol_deploy.preprocess import Preprocessing
from byol_deploy.providers import create_session, probe_provider, working_providers

__all__ = ["Batch", "Encoder", "create_session", "probe_provider", "usable_cores", "working_providers"]

_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of a stream.

    Attributes:
        positions: For each row the position of its source in what was streamed.
        sources: The sources themselves.
        outputs: Arrays (n, D) float32 by output name.
    """

    positions: list[int]
    sources: list[ImageSource]
    outputs: dict[str, np.ndarray]


class Encoder:
    """An exported encoder, ready to embed images with ONNX Runtime. It may be called from several threads at once.

    Attributes:
        path: What was opened.
        manifest: What the export says about itself.
        preprocessing: What is done to an image before the graph.
        golden: The self-test cases that came with it.
        provider: The active execution provider, e.g. "CPUExecutionProvider".
        threads: Threads inside an operator.
        outputs: Names of the outputs that are computed.
        width: Width D of the first of them.
        session: The runtime's own object (an ONNX Runtime session, for an ONNX file), for those who need it.
    """

    path: Path
    manifest: Manifest
    preprocessing: Preprocessing
    golden: Golden
    provider: str
    threads: int
    outputs: tuple[str, ...]
    width: int
    session: Any

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "cpu",
        threads: int | None = None,
        outputs: str | Sequence[str] | None = None,
        precision: str | None = None,
        prefer: Literal["speed", "accuracy"] = "speed",
        allow_spinning: bool | None = None,
        batches: Sequence[int] | None = None,
        streams: int | None = None,
    ) -> None:
        """Open a bundle, or a lone file that byol-deploy wrote.

        Args:
            path: The bundle folder, or the .onnx file (or one of another format that runs without PyTorch).
            provider: "cpu", "cuda", the runtime's own name of a provider, or "auto" for the best that works here.
            threads: Threads inside an operator; None takes what tuning chose, and no more than what affinity and
                cgroup leave to this process.
            outputs: Names of the outputs to give, "all", or None for the first one, the embedding.
            precision: Which file of a bundle, e.g. "fp32" or "int8"; None leaves it to ``prefer``. Of no effect on a
                lone file.
            prefer: "speed" takes the file that ``export --tune`` chose, and without tuning the float32 one; "accuracy"
                always takes float32. Of no effect on a lone file.
            allow_spinning: Whether idle threads wait busily: least latency, at the cost of a core's time. Switch it
                off where several processes share the cores. None takes what tuning chose, otherwise True.
            batches: Numbers of images that come often. OpenVINO is prepared for each of them, which takes the time of
                an opening at the first call with it and makes the later ones faster; every other number works too.
                None takes what tuning chose, otherwise none.
            streams: Parts of such a batch that run side by side, each on its share of the threads. None takes what
                tuning chose, otherwise 1.

        Raises:
            BundleError: Absent, damaged, foreign, or from a newer schema.
            MissingExtraError: The engine of the chosen file is not installed. There is no silent fallback.
            ProviderError: The provider does not work here. There is no silent fallback.
            UsageError: An unknown provider or preference, fewer than one thread or stream, a batch of less than one
                image.
        """
        self.path = Path(path)
        shown = printable(self.path)
        if self.path.is_dir():
            bundle = Bundle.open(self.path)
            self.manifest, self.golden = bundle.manifest, bundle.golden
            entry = _chosen(bundle, precision, prefer, shown)
            file, format = self.path / entry.file, formats.get(entry.format)
            tuned = self.manifest.tuned
            if tuned is not None and tuned.file == entry.file:
                threads = min(tuned.threads, usable_cores()) if threads is None else threads
                allow_spinning = tuned.allow_spinning if allow_spinning is None else allow_spinning
                batches = tuned.batches if batches is None else batches
                streams = tuned.streams if streams is None else streams
        else:
            file, format = self.path, _format_of(self.path, shown)
        _require(format, shown)
        if file is self.path:
            self.manifest, self.golden = read_carried(format.carried(file), shown)
        self.preprocessing = self.manifest.preprocessing
        self.threads = threads or usable_cores()
        names = [output.name for output in self.manifest.outputs]
        wanted = names if outputs == "all" else names[:1] if outputs is None else outputs
        self.outputs = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        if not self.outputs:
            raise UsageError(f"outputs is empty; choose from {', '.join(names)}")
        widths = [self.manifest.output(name).width for name in self.outputs]
        self.width = widths[0]
        # The heads may be half of the work, and few ask for them.
        chosen = RunOptions(provider, threads, outputs=self.outputs, allow_spinning=allow_spinning is not False,
                            batches=tuple(batches or ()), streams=1 if streams is None else streams)  # fmt: skip
        self._opened = format.load(file, chosen)
        self.session, self.provider = self._opened.session, self._opened.provider
        _check_graph(self._opened, self.manifest, shown)

    def __repr__(self) -> str:
        """E.g. ``Encoder('bundle', timm/resnet10t, 32 px, embedding 512, cpu)``."""
        return (
            f"Encoder({str(self.path)!r}, {self.manifest.model.backbone}, {self.preprocessing.size_px} px, "
            f"{self.outputs[0]} {self.width}, {self.provider})"
        )

    def __call__(self, images: ImageSource | Iterable[ImageSource], batch_size: int = 32) -> np.ndarray:
        """Embed images.

        Args:
            images: One image, or many: paths, bytes of image files, Pillow images, uint8 arrays (H, W), (H, W, 3) or
                (H, W, 4). An array (N, H, W, C) is N images. Every one goes through the same preprocessing, an array
                of the right size too.
            batch_size: How many images the graph sees at once.

        Returns:
            (N, D) float32 of the first output; one image gives (1, D).

        Raises:
            DataError: An image cannot be decoded. The message names it.
            UsageError: A batch size below one.
        """
        rows = [batch.outputs[self.outputs[0]] for batch in self.stream(_many(images), batch_size)]
        return np.concatenate(rows) if rows else np.empty((0, self.width), np.float32)

    def stream(
        self, images: Iterable[ImageSource], batch_size: int = 32, bad: BadImages | None = None
    ) -> Iterator[Batch]:
        """Embed any number of images in bounded memory; the next batches are decoded while one is computed.

        Args:
            images: The images. They are taken from the iterable as they are needed.
            batch_size: How many images the graph sees at once.
            bad: Takes the images that cannot be decoded, which are then skipped; None raises at the first one.

        Yields:
            Batches in the order of the images, of ``batch_size`` rows except the last one.

        Raises:
            DataError: An image cannot be decoded, and ``bad`` is None.
            UsageError: A batch size below one.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; use a whole number from 1, e.g. 32")
        positions: list[int] = []
        sources: list[ImageSource] = []
        pixels: list[np.ndarray] = []
        for position, source, found in self._decoded(images, batch_size):
            if isinstance(found, DataError):
                if bad is None:
                    raise found
                bad.add(source, found)
                continue
            positions.append(position)
            sources.append(source)
            pixels.append(found)
            if len(pixels) == batch_size:
                yield Batch(positions, sources, self.run(np.stack(pixels)))
                positions, sources, pixels = [], [], []
        if pixels:
            yield Batch(positions, sources, self.run(np.stack(pixels)))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the graph on images that are preprocessed already, all at once.

        Args:
            images: (N, size_px, size_px, 3) uint8 RGB.

        Returns:
            (N, D) float32 by output name.

        Raises:
            DataError: Another shape or type.
        """
        side = self.preprocessing.size_px
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            shape = f"{images.shape} {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
            raise DataError(
                f"images are {shape}; run takes (N, {side}, {side}, 3) uint8 RGB, see encoder.preprocessing"
            )
        if len(images) == 0:
            return {name: np.empty((0, self.manifest.output(name).width), np.float32) for name in self.outputs}
        return self._opened.compute(np.ascontiguousarray(images), self.outputs)

    def _decoded(
        self, images: Iterable[ImageSource], batch_size: int
    ) -> Iterator[tuple[int, ImageSource, np.ndarray | DataError]]:
        def attempt(source: ImageSource) -> np.ndarray | DataError:
            try:
                return self.preprocessing(source)
            except DataError as error:
                return error

        numbered = enumerate(images)
        first = list(itertools.islice(numbered, 2))
        workers = min(self.threads, 8)
        if len(first) < 2 or workers < 2:
            for position, source in itertools.chain(first, numbered):
                yield position, source, attempt(source)
            return
        # Pillow decodes and resizes without holding Python's lock, so threads are enough.
        with ThreadPoolExecutor(workers, thread_name_prefix="byol-deploy-decode") as pool:
            ahead: list[tuple[int, ImageSource, Future[np.ndarray | DataError]]] = []
            try:
                for position, source in itertools.chain(first, numbered):
                    ahead.append((position, source, pool.submit(attempt, source)))
                    if len(ahead) > batch_size + workers:
                        done = ahead.pop(0)
                        yield done[0], done[1], done[2].result()
                for done in ahead:
                    yield done[0], done[1], done[2].result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _many(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return iter(images)
    if isinstance(images, str | bytes | os.PathLike | Image.Image | np.ndarray) or not isinstance(images, Iterable):
        return [images]
    return images


def _chosen(bundle: Bundle, precision: str | None, prefer: str, shown: str) -> Artefact:
    """The file of a bundle that an encoder opens."""
    if prefer not in ("speed", "accuracy"):
        raise UsageError(f"prefer is {prefer!r}; use speed or accuracy")
    entries = [entry for entry in bundle.manifest.artefacts if _opens(entry.format)]
    tuned = bundle.manifest.tuned
    if precision is None and prefer == "speed" and tuned is not None:
        return next(entry for entry in entries if entry.file == tuned.file)
    matching = [entry for entry in entries if precision in (None, entry.precision)]
    if not matching:
        wanted = "file that runs without PyTorch" if precision is None else f"{precision} file that Encoder opens"
        there = ", ".join(f"{entry.file} ({entry.format} {entry.precision})" for entry in bundle.manifest.artefacts)
        raise BundleError(f"{shown} has no {wanted}; it has {there}")
    return next((entry for entry in matching if entry.precision == "fp32"), matching[0])


def _opens(format: str) -> bool:
    return format in formats.available() and formats.get(format).opens_in_encoder


def _require(format: Format, shown: str) -> None:
    missing = formats.missing_to_run(format)
    if missing:
        raise MissingExtraError(f"{shown} ({format.name})", missing, format.extra)


def _format_of(path: Path, shown: str) -> Format:
    """The format of a lone file. What is plainly no model file is named before a runtime parses it."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise BundleError(f"{shown} does not exist; pass a bundle or an .onnx file of byol-deploy export") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{shown} cannot be read: {error}") from error
    if not start:
        raise BundleError(f"{shown} is empty; copy or export it again")
    named = formats.of_file(path)
    if named is not None and named.opens_in_encoder:
        return named
    if start.startswith(_ZIP_MAGIC):
        raise BundleError(
            f"{shown} is a TorchScript file or a checkpoint, not ONNX; pass the bundle or its model.onnx "
            "(byol-deploy export CHECKPOINT --format onnx)"
        )
    return formats.get("onnx")  # by its content, whatever it is called: the runtime says when it is none


def _check_graph(opened: Opened, manifest: Manifest, shown: str) -> None:
    """Compare the graph with its manifest: names, type of the input, widths; as far as its format declares them."""
    faults = []
    inputs = {port.name: port for port in opened.inputs}
    found = inputs.get(manifest.input.name)
    side = manifest.preprocessing.size_px
    if inputs and (found is None or len(inputs) != 1):
        faults.append(f"its inputs are {', '.join(inputs)}, not {manifest.input.name} alone")
    elif found is not None and (found.dtype != "uint8" or not _fits(found.shape, (side, side, 3))):
        faults.append(f"its input is {_told(found)}, not uint8 (N, {side}, {side}, 3)")
    given = {port.name: port for port in opened.outputs}
    for output in manifest.outputs if given else ():
        if output.name not in given:
            faults.append(f"it has no output {output.name}")
        elif given[output.name].dtype != "float32" or not _fits(given[output.name].shape, (output.width,)):
            faults.append(f"its output {output.name} is {_told(given[output.name])}, not float32 (N, {output.width})")
    if faults:
        raise BundleError(f"{shown} contradicts its manifest: {'; '.join(faults)}; export it again")


def _told(port: Port) -> str:
    return f"{port.dtype} ({', '.join('N' if size is None else str(size) for size in port.shape)})"


def _fits(shape: Sequence[int | None], sizes: Sequence[int]) -> bool:
    """Whether a declared shape is (N, *sizes); sizes that the graph leaves open fit."""
    return len(shape) == len(sizes) + 1 and all(
        found in (None, size) for found, size in zip(shape[1:], sizes, strict=True)
    )
