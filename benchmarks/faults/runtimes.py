"""Runtimes in which a file is judged: broken ones, whose decoding or resizing is wrong, and other good ones.

A broken runtime is the shipped one with one function replaced while the judges work. The file is the clean one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import byol_deploy.images as images
import byol_deploy.preprocess as preprocess
import byol_deploy.runtime as runtime
from byol_deploy.preprocess import Preprocessing
from faults.making import Case, Made
from faults.subject import Subject

Patch = Callable[[], contextlib.AbstractContextManager[object]]


def _shipped(broken: Patch) -> Callable[[Subject, Path], Made]:
    def make(subject: Subject, folder: Path) -> Made:
        del folder
        return Made(subject.clean, runtime=broken)

    return make


def _replace(owner: object, name: str, value: object) -> Patch:
    return lambda: mock.patch.object(owner, name, value)


def _bilinear() -> contextlib.AbstractContextManager[object]:
    return mock.patch.dict(preprocess._FILTERS, {"bicubic": Image.Resampling.BILINEAR})


def _steps(
    self: Preprocessing,
    source: Any,
    *,
    antialias: bool = True,
    shift: int = 0,
    squash: bool = False,
) -> np.ndarray:
    """The shipped preprocessing with one step changed."""
    image = preprocess.decode(source)
    width, height = (self.size_px, self.size_px) if squash else self._scaled(image.width, image.height)
    kind = preprocess._FILTERS[self.filter]
    if antialias:
        image = image.resize((width, height), kind)
    else:
        # Pillow's affine transform looks at the filter's few pixels only, however much the image shrinks.
        scale = (image.width / width, 0, 0, 0, image.height / height, 0)
        image = image.transform((width, height), Image.Transform.AFFINE, scale, Image.Resampling.BICUBIC)
    left = round((width - self.size_px) / 2.0) + shift
    top = round((height - self.size_px) / 2.0) + shift
    return np.array(image.crop((left, top, left + self.size_px, top + self.size_px)), dtype=np.uint8)


def _no_antialias(self: Preprocessing, source: Any) -> np.ndarray:
    return _steps(self, source, antialias=False)


def _off_by_one(self: Preprocessing, source: Any) -> np.ndarray:
    return _steps(self, source, shift=1)


def _squashed(self: Preprocessing, source: Any) -> np.ndarray:
    return _steps(self, source, squash=True)


_GOOD_CALL = Preprocessing.__call__


def _bgr(self: Preprocessing, source: Any) -> np.ndarray:
    return np.ascontiguousarray(_GOOD_CALL(self, source)[:, :, ::-1])


_GOOD_TO_RGB = images._to_rgb


def _over_black(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return _GOOD_TO_RGB(image)


def _clipped(image: Image.Image) -> Image.Image:
    """What ``Image.convert`` of older Pillow versions does: everything above 255 is white."""
    return Image.fromarray(np.clip(np.asarray(image), 0, 255).astype(np.uint8)).convert("RGB")


CASES = (
    Case("bilinear for bicubic", "runtime", "the runtime resizes with another filter", _shipped(_bilinear)),
    Case("no antialias", "runtime", "the runtime's bicubic skips pixels when it shrinks",
         _shipped(_replace(Preprocessing, "__call__", _no_antialias))),
    Case("crop off by one", "runtime", "the runtime's crop begins one pixel lower and to the right",
         _shipped(_replace(Preprocessing, "__call__", _off_by_one))),
    Case("squashed", "runtime", "the runtime resizes both sides to the same length",
         _shipped(_replace(Preprocessing, "__call__", _squashed))),
    Case("BGR runtime", "runtime", "the runtime's decoder gives blue first; the test images are grey",
         _shipped(_replace(Preprocessing, "__call__", _bgr))),
    Case("EXIF ignored", "runtime", "the runtime takes pixels as they lie in the file",
         _shipped(_replace(images, "_upright", lambda image: image))),
    Case("alpha over black", "runtime", "the runtime lays transparent pixels over black",
         _shipped(_replace(images, "_to_rgb", _over_black))),
    Case("16-bit clipped", "runtime", "the runtime clips 16-bit greys at 255",
         _shipped(_replace(images, "_grey16_to_rgb", _clipped))),
)  # fmt: skip


def unoptimised(level: str) -> Patch:
    """ONNX Runtime with another level of graph optimisation."""
    good = runtime.create_session
    signature = inspect.signature(good)

    def create(*args: Any, **options: Any) -> Any:
        asked = signature.bind(*args, **options)
        asked.arguments["optimization"] = level
        return good(*asked.args, **asked.kwargs)

    return lambda: mock.patch.object(runtime, "create_session", create)


class _Session:
    """Another engine behind the few methods of an ONNX Runtime session that byol-deploy calls."""

    def __init__(self, path: Any, run: Callable[[np.ndarray], Mapping[str, np.ndarray]], described: Any) -> None:
        self.path = path
        self._run = run
        self._described = described

    def __getattr__(self, name: str) -> Any:
        return getattr(self._described, name)

    def run(self, names: list[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        values = self._run(next(iter(feed.values())))
        return [values[name] for name in names]


@contextlib.contextmanager
def openvino() -> Iterator[None]:
    """OpenVINO computes, in float32; names, types and metadata are read by ONNX Runtime."""
    import openvino as ov

    core = ov.Core()
    good = runtime.create_session

    def create(path: Any, *args: Any, **options: Any) -> Any:
        compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(batch: np.ndarray) -> dict[str, np.ndarray]:
            found = compiled(batch)
            return {port.get_any_name(): np.array(found[port]) for port in compiled.outputs}

        return _Session(path, run, good(path, *args, **options))

    with mock.patch.object(runtime, "create_session", create):
        yield


@contextlib.contextmanager
def onnx_reference() -> Iterator[None]:
    """The ONNX project's own evaluator, in NumPy, computes."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    good = runtime.create_session

    def create(path: Any, *args: Any, **options: Any) -> Any:
        evaluator = ReferenceEvaluator(onnx.load(path))

        def run(batch: np.ndarray) -> dict[str, np.ndarray]:
            return dict(
                zip(evaluator.output_names, evaluator.run(None, {evaluator.input_names[0]: batch}), strict=True)
            )

        return _Session(path, run, good(path, *args, **options))

    with mock.patch.object(runtime, "create_session", create):
        yield
