"""ncnn, for phones and small boards (ARM, x86, RISC-V; C++): two files, ``.ncnn.param`` (text) and ``.ncnn.bin``.

Made by pnnx. ncnn knows neither uint8 tensors nor batches: the input ``images`` is float32 (3, H, W) RGB with values 0
to 255, one image at a time; scale, mean and deviation are in the graph. Natively, in C++::

    net.load_param("model.ncnn.param"); net.load_model("model.ncnn.bin"); ncnn::Extractor run = net.create_extractor();
    run.input("images", ncnn::Mat::from_pixels(rgb, ncnn::Mat::PIXEL_RGB, W, H)); run.extract("embedding", embedding);

with ``net.opt`` set as in :func:`_options`: by itself ncnn computes in float16 where the processor can, and its largest
Winograd transform costs a digit. ``bf16`` is the float32 file with a note for byol-deploy, the name of its first layer:
computed with ``net.opt.use_bf16_storage``, in which weights and activations are bfloat16 and sums float32.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, DataError, ProviderError
from byol_deploy.formats import Opened, Port, RunOptions, Signature
from byol_deploy.formats._native_output import captured, give_back
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.quantization import Calibration, Reducer

INPUT = "images"
_BRAIN = "images.bf16"
_MAGIC = "7767517"


@dataclass(frozen=True)
class _Outline:
    """What a ``.param`` file says about itself.

    Attributes:
        size_px: Side of the images.
        outputs: Names of the values that no layer takes.
        brain: Whether it is to be computed in bfloat16.
        lines: Its lines.
    """

    size_px: int
    outputs: tuple[str, ...]
    brain: bool
    lines: tuple[str, ...]


class _Ncnn(SidecarFormat):
    name = "ncnn"
    suffix = ".ncnn.param"
    extra = "ncnn"
    requires = ("pnnx", "ncnn", "torch")
    runs_with = ("ncnn",)
    opens_in_encoder = True
    precisions = ("fp32", "bf16")

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        from byol_deploy.formats import _ncnn_convert as converter

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            converter.trace(graph, signature.size_px, folder / "model.pt")
            lines = converter.convert(folder, signature)
            param, weights = folder / "named.param", folder / "model.ncnn.bin"
            param.write_text("\n".join(lines) + "\n", encoding="ascii")
            converter.run_once(param, weights, signature)
            shutil.copyfile(param, path)
            shutil.copyfile(weights, _weights(path))
        return self.finish(path, carried, [_weights(path)])

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`. Made from the float32 file alone."""
        return _Brain(self, full)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`."""
        self.carried(path)
        if options.provider not in ("cpu", "auto"):
            raise ProviderError(f"ncnn is used on the CPU here, not on {options.provider!r}; use --provider cpu")
        import ncnn

        outline = _outline(path)
        net, side = _open(path, outline, options.threads or usable_cores()), outline.size_px

        def compute(images: np.ndarray, wanted: Sequence[str] | None) -> dict[str, np.ndarray]:
            if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
                raise DataError(
                    f"images are {images.shape} {images.dtype}; {path.name} takes (N, {side}, {side}, 3) uint8"
                )
            names = outline.outputs if wanted is None else tuple(wanted)
            found: dict[str, list[np.ndarray]] = {name: [] for name in names}
            for planes in np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32):
                run = net.create_extractor()  # one a call: the net itself is only read
                run.input(INPUT, ncnn.Mat(planes).clone())  # cloned into ncnn's own alignment of planes
                for name in names:
                    status, value = run.extract(name)
                    if status:
                        raise BundleError(f"{path.name} cannot be run by ncnn {ncnn.__version__} (status {status})")
                    found[name].append(np.array(value, np.float32).reshape(-1))
            return {name: np.stack(rows) for name, rows in found.items()}

        outputs = tuple(Port(name, "float32", (None, None)) for name in outline.outputs)
        return Opened(compute, outputs, (Port(INPUT, "uint8", (None, side, side, 3)),), "CPU", net)


class _Brain:
    methods: tuple[str, ...] = ("",)
    layers: tuple[str, ...] = ()

    def __init__(self, format: _Ncnn, full: Path) -> None:
        self._format, self._full = format, full

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        lines = _outline(self._full).lines
        first = lines[2].replace(f" {INPUT} ", f" {_BRAIN} ", 1)  # the layer's name; the value's stays
        path.write_text("\n".join([*lines[:2], first, *lines[3:]]) + "\n", encoding="ascii")
        shutil.copyfile(_weights(self._full), _weights(path))
        return self._format.finish(path, carried, [_weights(path)])


def _options(net: Any, threads: int, brain: bool) -> None:
    """Float32 on every processor, and the Winograd transforms whose noise is that of other convolutions."""
    option = net.opt
    option.num_threads = threads
    option.use_vulkan_compute = False
    option.use_fp16_packed = option.use_fp16_storage = option.use_fp16_arithmetic = False
    option.use_bf16_packed = option.use_bf16_storage = brain
    option.use_winograd63_convolution = False


def _weights(path: Path) -> Path:
    return path.with_suffix(".bin")


def blobs(words: Sequence[str]) -> Sequence[str]:
    """The values that a layer takes and gives."""
    return words[4 : 4 + int(words[2]) + int(words[3])]


def _outline(path: Path) -> _Outline:
    """Read a ``.param`` file.

    Raises:
        BundleError: It is damaged, or not written here.
    """
    damaged = f"{path.name} is not an ncnn file of byol-deploy, or is damaged; export it again"
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        layers = [line.split() for line in lines[2:]]
        taken = {name for words in layers for name in words[4 : 4 + int(words[2])]}
        outputs = [name for words in layers for name in blobs(words)[int(words[2]) :] if name not in taken]
        first = re.fullmatch(rf"Input ({INPUT}|{re.escape(_BRAIN)}) 0 1 {INPUT} 0=(\d+) 1=\2 2=3", lines[2])
    except (OSError, ValueError, IndexError):
        raise BundleError(damaged) from None
    if lines[0] != _MAGIC or first is None or not outputs:
        raise BundleError(damaged)
    return _Outline(int(first[2]), tuple(outputs), first[1] == _BRAIN, tuple(lines))


def _open(path: Path, outline: _Outline, threads: int) -> Any:
    import ncnn

    net = ncnn.Net()
    _options(net, threads, outline.brain)
    said: list[str] = []
    with captured(said, 2):
        failed = net.load_param(str(path)) or net.load_model(str(_weights(path)))
    if failed:
        reason = said[-1].strip() if said else f"status {failed}"
        raise BundleError(
            f"{path.name} or {_weights(path).name} is damaged, or too new for ncnn {ncnn.__version__}: {reason}; "
            "export it again"
        )
    give_back(said, 2)
    return net


FORMAT = _Ncnn()
