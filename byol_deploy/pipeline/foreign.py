"""Any ONNX file against any PyTorch module, for those who never trained BYOL.

The same measurement as for an encoder: limits from the reference's own float32 noise on the same images, every batch
size, one thread, no optimisation, several resolutions where the file leaves them open.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from byol_deploy import formats
from byol_deploy.errors import BundleError, UsageError, require_packages
from byol_deploy.formats import Format, Run, RunOptions
from byol_deploy.images import ImageSource, printable
from byol_deploy.parity import (
    FEWEST_FOR_NEIGHBOURS,
    AnyLimit,
    ParityReport,
    as_rows,
    distance_apart,
    first_line,
    not_comparable,
    unsteady,
)
from byol_deploy.pipeline.asking import Asked, Form, Layout, RefusedError, ask, find_target, lent
from byol_deploy.pipeline.proof import LARGEST_BATCH, Condition, Sessions, few, limits_for, matrix
from byol_deploy.pipeline.reference import (
    CROWD,
    REAL_IMAGES,
    SYNTHETIC,
    ImageSet,
    Noise,
    crowd_limits,
    real_images,
    synthetic_images,
)
from byol_deploy.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

if TYPE_CHECKING:
    import torch

    from byol_deploy.pipeline.verifying import Check, VerifyReport

FEWEST_IMAGES = 3
"""With fewer different images than this a constant output cannot be told from a right one."""

_STEP_PX = 32
_ELEMENTS = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
}
_AWKWARD_BATCH = 7
_FOR_RESOLUTIONS = 8
_MOST_NUMBERS = 1 << 25
"""Numbers of all outputs for all real images: a segmentation network gives a million for each."""
_REDUCED = {"float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8", "int4": "int8", "uint4": "int8"}
_REDUCED_SHARE = 0.1


@dataclass(frozen=True)
class _File:
    """An ONNX file from elsewhere. Of ``batch``, ``height_px`` and ``width_px`` those are None that it leaves open."""

    path: Path
    format: Format
    form: Form
    batch: int | None
    height_px: int | None
    width_px: int | None
    outputs: tuple[str, ...]
    precision: str

    def words(self) -> str:
        """What it takes, for the report."""
        sides = " x ".join("any" if side is None else str(side) for side in (self.height_px, self.width_px))
        batch = "any batch size" if self.batch is None else f"batch size {self.batch} only"
        return f"the file takes {self.form}, {sides} px, {batch}"

    def cut(self, images: np.ndarray) -> np.ndarray:
        """The centre of (N, S, S, 3) square images, for a file that takes none that are square."""
        side = images.shape[1]
        height, width = self.height_px or side, self.width_px or side
        top, left = (side - height) // 2, (side - width) // 2
        return images[:, top : top + height, left : left + width]

    def side_px(self, image_size: int | None) -> int:
        """The side of the square that images are brought to first."""
        sides = [side for side in (self.height_px, self.width_px) if side is not None]
        return max(sides) if len(sides) == 2 else max([*sides, image_size or 0])


def verify_foreign(
    path: str | os.PathLike[str],
    *,
    against: str | Callable[..., Any] | torch.nn.Module,
    data: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Does this ONNX file compute what that PyTorch module computes?

    Args:
        path: An ONNX file with one input for images: uint8 or floating point, NCHW or NHWC, any sizes left open.
        against: What is right. ``module:callable``, importable from the current directory too, or the thing itself:
            a module, a class or function without arguments that gives one, or a function from images to outputs
            (a tensor or array, a list or tuple of them, or a dict, which is matched by name).
        data: A folder of images; None takes photographs that ship with byol-deploy.
        image_size: Side in pixels, where the file leaves it open.
        mean: Mean of the R, G and B channels in 0..1, for a side that takes normalised images; None is ImageNet's.
        std: Their standard deviation.
        provider: Where the file runs: ``cpu``, ``cuda``, ``auto``, or a name of ONNX Runtime.
        threads: Threads inside an operator; None takes what this process may use.
        say: Called with a line of progress now and then.

    Returns:
        The verdict. A difference is no exception.

    Raises:
        BundleError: The file is absent, damaged or not ONNX, or takes something else than images.
        UsageError: The reference cannot be imported, built or called; a size is missing or contradicts the file.
        DataError: No usable image.
        ProviderError: The provider does not work here.
        MissingExtraError: PyTorch or onnx is not installed.
    """
    # Here, because that module calls this one.
    from byol_deploy.pipeline.verifying import ArtefactVerdict, Check, VerifyReport

    require_packages("comparing with a PyTorch module", "train", "torch", "onnx")
    say = say or (lambda line: None)
    options = RunOptions(provider, threads)
    with lent(), np.errstate(invalid="ignore", over="ignore"):
        file = _open(Path(path), options, image_size)
        say(f"importing the reference {against}" if isinstance(against, str) else "looking at the reference")
        target = find_target(against)
        size_px = file.side_px(image_size)
        preprocessing = _preprocessing(size_px, mean, std)
        found, described = real_images(data, preprocessing, CROWD)
        crowd = file.cut(preprocessing.batch(found))
        example = crowd[np.arange(file.batch or 2) % len(crowd)]
        asked = ask(target, _forms(file.form), preprocessing, file.outputs, file.batch, example)
        trial = _Trial(file, asked, options)
        say(f"computing the reference in float32 and float64 on {described}")
        trial.on_images(crowd)
        if None in (file.height_px, file.width_px):
            trial.on_resolutions(found[:_FOR_RESOLUTIONS], size_px, say)
        parity = ParityReport.merged(trial.reports)
    checks = [
        Check("reference", True, f"{target.words} takes {asked.form}; {file.words()}"),
        trial.outputs_check(Check),
        Check("images", len(found) >= FEWEST_IMAGES, _about_images(found, data)),
    ]
    warnings = [*target.warnings, *trial.warnings]
    if file.batch is not None:
        warnings.append(
            f"the file has a fixed batch of {file.batch}: it was run at that size alone, and cannot be run at another; "
            "export it with a dynamic first dimension unless that is meant"
        )
    if "uint8" in (file.form.dtype, asked.form.dtype) and file.form.dtype != asked.form.dtype:
        warnings.append(
            f"one side takes pixels and the other normalised images, with {_numbers(preprocessing)}; if the one that "
            "takes pixels normalises otherwise, that is the difference: give --mean and --std"
        )
    elif asked.form.dtype != "uint8" and (mean is None or std is None):
        warnings.append(
            f"--mean and --std were not both given: both sides got images normalised with {_numbers(preprocessing)}, "
            "ImageNet's where not given; give those that your model was trained with"
        )
    if file.precision != "fp32":
        warnings.append(
            f"the file's weights are {file.precision}: it was held to the margin and to neighbours, not to float32's "
            "rounding"
        )
    if data is None:
        warnings.append("no --data: images like those that your model is for say more")
    if FEWEST_IMAGES <= len(found) < FEWEST_FOR_NEIGHBOURS:
        warnings.append(f"only {len(found)} different images were compared; {FEWEST_FOR_NEIGHBOURS} or more say more")
    verdict = ArtefactVerdict(
        file.path.name, file.format.name, "passed" if parity.passed else "failed", "", parity, file.precision,
        tuple(trial.notes),
    )  # fmt: skip
    return VerifyReport(printable(path), (verdict,), tuple(checks), tuple(dict.fromkeys(warnings)), described)


class _Trial:
    """The comparisons of one file, and what was noted on the way."""

    def __init__(self, file: _File, asked: Asked, options: RunOptions) -> None:
        self.file, self.asked, self.options = file, asked, options
        self.reports: list[ParityReport] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.conditions = list(self._conditions(matrix(file.format, options)))
        self.sessions = Sessions(file.path.name, lambda asked: self._rows(file.format.load(file.path, asked)))
        self._look(file.format.load(file.path, options))

    def _conditions(self, all_of_them: Sequence[Condition]) -> Iterator[Condition]:
        """Those that are possible: a fixed batch leaves one of the batch sizes."""
        seen = set()
        for condition in all_of_them:
            chosen = replace(condition, batch_size=self.file.batch or condition.batch_size)
            if chosen not in seen:
                seen.add(chosen)
                yield chosen

    def _look(self, run: Run) -> None:
        """Run the file once, for the shapes of its outputs."""
        images = self.asked.example
        try:
            outputs = run(self.file.form.of(images, self.asked.preprocessing))
        except Exception as error:
            # Every comparison will say so, as a failed row.
            self.notes.append(f"the file cannot be run on the images of its shape: {first_line(error)}")
            return
        for name, values in outputs.items():
            if values.ndim == 0 or len(values) != len(images):
                self.asked.left_out.setdefault(name, f"the file gives shape {values.shape} for {len(images)} images")
            else:
                self.shapes[name] = values.shape[1:]

    def outputs_check(self, check: type[Check]) -> Check:
        """Whether both sides have the same outputs, by name or in order, of the same shapes."""
        theirs, ours = list(self.file.outputs), [*self.asked.shapes, *self.asked.left_out]
        faults = []
        if set(theirs) != set(ours):
            by_name = f"they are matched by name: export the file with output_names={list(dict.fromkeys(ours))}"
            how = by_name if self.asked.named else "they are matched in order: give as many"
            faults.append(
                f"not comparable: the file has {len(theirs)} ({', '.join(theirs)}), the reference "
                f"{len(set(ours))} ({', '.join(dict.fromkeys(ours))}); {how}"
            )
        faults += [f"not comparable: {name}: {reason}" for name, reason in self.asked.left_out.items()]
        faults += [
            f"{name} has shape {self.shapes[name]} for one image, the reference's {self.asked.shapes[name]}"
            for name in theirs
            if name in self.shapes and self.asked.shapes.get(name, self.shapes[name]) != self.shapes[name]
        ]
        how = "matched by name" if self.asked.named else "matched in order"
        return check("outputs", not faults, "; ".join(faults) or f"{', '.join(theirs)}, {how}")

    def on_images(self, crowd: np.ndarray) -> None:
        """Real images under every condition, awkward ones, and many real ones."""
        numbers = sum(int(np.prod(shape)) for shape in self.asked.shapes.values())
        crowd = crowd[: max(REAL_IMAGES, min(len(crowd), _MOST_NUMBERS // max(numbers, 1)))]
        count = min(REAL_IMAGES, len(crowd))
        expected = self.asked.run(crowd)
        name, reason = self.file.path.name, "its first dimension is not the batch"
        for output, seen in self.asked.left_out.items():
            nothing = {output: np.empty((0, 0), np.float32)}
            expected.pop(output, None)
            self.reports.append(not_comparable(nothing, f"not comparable: {reason}: {seen}", subject=name))
        if not expected:
            return
        noise = self._noise(np.concatenate([crowd[:count], self.file.cut(synthetic_images(max(crowd.shape[1:3])))]),
                            expected, ordinary=count)  # fmt: skip
        real = noise.image_set("real images", range(count))
        fault = self._unsteady(real)
        if fault:
            self.reports.append(not_comparable(expected, fault, subject=name))
            return
        told = noise.told(range(count, count + len(SYNTHETIC)))
        left = [what for place, what in enumerate(SYNTHETIC, count) if place not in told]
        if left:
            self.notes.append(f"left out of the awkward images, where float32 determines nothing: {few(left, 5)}")
        for condition in self.conditions:
            self._run(condition, real)
        if told:
            awkward = noise.image_set("awkward images", told, different=False)
            for size in (_AWKWARD_BATCH, 1) if self.file.batch is None else (self.file.batch,):
                self._run(Condition(self.options, size, ""), awkward)
        known = {output: limit for output, limit in real.limits.items() if output in expected}
        allowed = known if noise.blind else crowd_limits(cast(Any, self.asked), crowd, expected, known)
        whole = ImageSet(f"{len(crowd)} real images", crowd, expected, allowed)
        self._run(Condition(self.options, self.file.batch or LARGEST_BATCH, ""), whole, agreement=True)

    def on_resolutions(self, found: Sequence[ImageSource], size_px: int, say: Callable[[str], None]) -> None:
        """A smaller and a larger resolution, where the file leaves it open and the reference takes it."""
        smaller, larger = (size_px - 1) // _STEP_PX * _STEP_PX, (size_px // _STEP_PX + 1) * _STEP_PX
        least = max(self.file.height_px or 0, self.file.width_px or 0)
        for side in (smaller, larger):
            if side < max(_STEP_PX, least):
                continue
            say(f"comparing at {side} px")
            images = self.file.cut(replace(self.asked.preprocessing, size_px=side, resize_px=None).batch(found))
            try:
                expected = self.asked.run(images)
            except RefusedError as error:
                self.notes.append(f"{side} px was left out: the reference itself refuses it ({first_line(error)})")
                continue
            at = self._noise(images, expected, ordinary=len(images)).image_set(
                f"real images of {side} px", range(len(images))
            )
            self._run(Condition(self.options, self.file.batch or 3, ""), at)

    def _noise(self, images: np.ndarray, expected: Mapping[str, np.ndarray], *, ordinary: int) -> Noise:
        apart = {name: distance_apart(as_rows(v)) if v.dtype.kind == "f" else None for name, v in expected.items()}
        noise = Noise(cast(Any, self.asked), images, apart, ordinary=ordinary)
        self.warnings += [noise.blind] if noise.blind else []
        return noise

    def _unsteady(self, real: ImageSet) -> str:
        """Asked again with the images in other company: dropout shows, and so does batch norm in training mode."""
        fewer = slice(0, max(1, len(real.images) - 1))
        floats = {name: values[fewer] for name, values in real.expected.items() if values.dtype.kind == "f"}
        second = self.asked.run(real.images[fewer][::-1], 5)
        return unsteady(floats, {name: values[::-1] for name, values in second.items()}, real.limits)

    def _run(self, condition: Condition, images: ImageSet, *, agreement: bool = False) -> None:
        limits: Mapping[str, AnyLimit] = limits_for(images, self.file.precision, agreement=agreement)
        self.reports.append(self.sessions.compare(condition, images, limits))

    def _rows(self, run: Run) -> Run:
        """The file as a function from pixels to rows."""

        def rows(images: np.ndarray) -> dict[str, np.ndarray]:
            outputs = run(self.file.form.of(images, self.asked.preprocessing))
            return {
                name: values.reshape(len(values), -1) if values.ndim else values
                for name, values in outputs.items()
                if name not in self.asked.left_out
            }

        return rows


def _open(path: Path, options: RunOptions, image_size: int | None) -> _File:
    from byol_deploy.providers import create_session

    shown = printable(path)
    if not path.is_file():
        raise BundleError(f"{shown} {'is a folder' if path.is_dir() else 'does not exist'}; pass an ONNX file")
    format = formats.of_file(path)
    if format is None or not format.opens_in_encoder:
        raise BundleError(f"{shown} is not a file that ONNX Runtime opens; pass an ONNX file, named .onnx")
    session = create_session(path, options.provider, options.threads)
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs) or "none"
        raise BundleError(
            f"{shown} takes {len(inputs)} inputs ({names}); a comparison on images needs exactly one: wrap the module "
            "so that the others are constants, and export it again"
        )
    dtype = _ELEMENTS.get(inputs[0].type)
    shape = [side if isinstance(side, int) and side > 0 else None for side in inputs[0].shape]
    if dtype is None or len(shape) != 4:
        raise BundleError(
            f"{shown} takes {inputs[0].name} of type {inputs[0].type} and shape {list(inputs[0].shape)}; images are "
            f"uint8 or floating point of four dimensions, (N, 3, H, W) or (N, H, W, 3)"
        )
    layout = _layout(shown, shape)
    height, width = (shape[2], shape[3]) if layout == "NCHW" else (shape[1], shape[2])
    if (height is None or width is None) and image_size is None:
        raise UsageError(f"{shown} leaves the image's size open ({list(inputs[0].shape)}); give --image-size, e.g. 224")
    if image_size is not None and height is not None and width is not None and image_size != max(height, width):
        raise UsageError(f"{shown} takes {height} x {width} px, image size {image_size} was given; leave that out")
    if image_size is not None and image_size < max(height or 0, width or 0):
        raise UsageError(
            f"{shown} takes {height or 'any'} x {width or 'any'} px, image size {image_size} was given; use "
            f"{max(height or 0, width or 0)} or more"
        )
    outputs = tuple(entry.name for entry in session.get_outputs())
    return _File(path, format, Form(dtype, layout), shape[0], height, width, outputs, _precision(format, path))


def _layout(shown: str, shape: Sequence[int | None]) -> Layout:
    """Where the channels are: at the one 3 that is fixed in second or last place."""
    second, last = shape[1] == 3, shape[3] == 3
    if second != last:
        return "NCHW" if second else "NHWC"
    if not second and None not in (shape[1], shape[3]):
        raise UsageError(f"{shown} takes images of shape {shape}; three channels, R, G and B, are what is compared")
    raise UsageError(
        f"{shown} takes images of shape {['open' if side is None else side for side in shape]}: whether its channels "
        "come second or last cannot be told; export it with the 3 of the channels fixed and the other one not 3 "
        "(dynamic_shapes for N, H and W only)"
    )


def _precision(format: Format, path: Path) -> str:
    """What most of a file's weights are stored in: "fp32", or the reduced one that holds a tenth of them or more."""
    sizes: Counter[str] = Counter()
    for array in format.tensors(path).values():
        if array.ndim >= 2:
            sizes[_REDUCED.get(array.dtype.name, "fp32")] += array.size
    reduced = {name: size for name, size in sizes.items() if name != "fp32" and size >= _REDUCED_SHARE * sizes.total()}
    return max(reduced, key=lambda name: reduced[name], default="fp32")


def _preprocessing(size_px: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Preprocessing:
    try:
        return Preprocessing(
            size_px,
            mean=cast(tuple[float, float, float], tuple(IMAGENET_MEAN if mean is None else mean)),
            std=cast(tuple[float, float, float], tuple(IMAGENET_STD if std is None else std)),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _forms(file: Form) -> list[Form]:
    """What a reference may take, the likeliest first: what the file takes, then the other layout, then another type."""
    same = "uint8" if file.dtype == "uint8" else "float32"
    layouts: list[Layout] = [file.layout, "NHWC" if file.layout == "NCHW" else "NCHW"]
    arrays: list[Literal["torch", "numpy"]] = ["torch", "numpy"]
    return [
        Form(dtype, layout, array)
        for dtype in (same, "float32" if same == "uint8" else "uint8")
        for layout in layouts
        for array in arrays
    ]


def _numbers(preprocessing: Preprocessing) -> str:
    mean, std = (", ".join(f"{number:g}" for number in values) for values in (preprocessing.mean, preprocessing.std))
    return f"mean {mean} and std {std}"


def _about_images(found: Sequence[ImageSource], data: str | os.PathLike[str] | None) -> str:
    if len(found) >= FEWEST_IMAGES:
        return f"{len(found)} different images"
    where = "the built-in ones" if data is None else printable(data)
    return (
        f"not comparable: only {len(found)} different images in {where}; {FEWEST_IMAGES} are needed to tell a constant "
        f"output, {FEWEST_FOR_NEIGHBOURS} for neighbours: add images, "
        "or look whether all are alike"
    )
