"""A training recipe: frozen dataclasses, YAML in and out, every fault in one error.

A recipe holds everything that decides what a training computes. ``Recipe()`` equals ``data/default.yaml``. A YAML
file may name only what differs from those defaults. ``auto`` values are settled by :meth:`Recipe.resolved`, so that
the copy in a run directory says what was done.
"""

# ruff: noqa: RUF009 -- the settings' defaults are made by functions that carry their checks

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from byol_deploy import checks
from byol_deploy.atomic import publish_file
from byol_deploy.checks import Check
from byol_deploy.errors import RecipeError

if TYPE_CHECKING:
    from byol_deploy.preprocess import Preprocessing

Auto = Literal["auto"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALLEST_BLURRED_PX = 64
"""Below this size ``blur: auto`` means no blur: the paper's kernel would cover 3 to 5 pixels (recipe of CIFAR runs)."""

_DATA = Path(__file__).parent / "data"
_ZOO = Path(__file__).parent.parent / "models"
_MAX_BYTES = 1 << 20


def _setting(default: Any, check: Check) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"check": check})
    return field(default=default, metadata={"check": check})


def _section(kind: type[Any], **changes: Any) -> Any:
    return field(default_factory=lambda: kind(**changes), metadata={"section": kind})


class _Checked:
    """Checks and normalises its own fields on construction, so that no invalid recipe can exist."""

    def __post_init__(self) -> None:
        faults = []
        for spec in fields(cast(Any, self)):
            value = getattr(self, spec.name)
            if kind := spec.metadata.get("section"):
                if not isinstance(value, kind):
                    faults.append(f"{spec.name} is {value!r}; give a {kind.__name__}")
                continue
            try:
                object.__setattr__(self, spec.name, spec.metadata["check"](value))
            except ValueError as expectation:
                faults.append(f"{spec.name} is {_show(value)}; use {expectation}")
        if faults:
            raise RecipeError(faults)


# --- the sections -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataRecipe(_Checked):
    """Which images, and how they reach the network.

    Attributes:
        image_size: side of the square views, in pixels.
        resize: shorter side before the centre crop of the *evaluation* preprocessing, in pixels; auto = image_size.
        store_size: images whose shorter side is longer are reduced to it once, when they are decoded, so that large
            photographs fit into memory; auto = 4 image_size; 0 = never. (Crops of a quarter of the side and more are
            still reduced, not enlarged.)
        mean: per-channel mean of RGB in [0, 1] that is subtracted.
        std: per-channel standard deviation of RGB in [0, 1] that is divided by.
        max_bad_share: the run fails when more than this share of the files cannot be decoded.
        workers: loader processes; auto measures the cores and the cache. Never changes the numbers.
        cache_mb: decoded images are kept in memory while all of them fit into this many MB. Never changes the numbers.
    """

    image_size: int = _setting(96, checks.number(8, 2048, integer=True))
    resize: int | Auto = _setting("auto", checks.number(8, 4096, integer=True, auto=True))
    store_size: int | Auto = _setting("auto", checks.number(0, 65536, integer=True, auto=True))
    mean: tuple[float, float, float] = _setting(IMAGENET_MEAN, checks.numbers(3, 0, 1))
    std: tuple[float, float, float] = _setting(IMAGENET_STD, checks.numbers(3, 0, 10, above=True))
    max_bad_share: float = _setting(0.05, checks.number(0, 1))
    workers: int | Auto = _setting("auto", checks.number(0, 256, integer=True, auto=True))
    cache_mb: int = _setting(1500, checks.number(0, math.inf, integer=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if self.resize != "auto" and self.resize < self.image_size:
            faults.append(f"resize is {self.resize}; use at least image_size, {self.image_size}, or auto")
        if self.store_size != "auto" and 0 < self.store_size < self.image_size:
            faults.append(f"store_size is {self.store_size}; use at least image_size, {self.image_size}, auto or 0")
        if faults:
            raise RecipeError(faults)


@dataclass(frozen=True)
class ViewRecipe(_Checked):
    """One of the two random views. Order: crop, flip, rotation, colour, grey, blur, solarise, clip, normalise.

    Attributes:
        crop_area: share of the image's area that the crop covers, drawn uniformly.
        crop_ratio: width over height of the crop, its logarithm drawn uniformly.
        flip: probability of the horizontal flip.
        vertical_flip: probability of the vertical flip (for images without an up: microscopes, aerial views).
        rotation_degrees: rotation drawn uniformly from -x to x degrees; the corners are mirrored.
        jitter: probability of the colour jitter.
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
        saturation: largest relative change of saturation.
        hue: largest change of the hue, in turns of the colour circle.
        grey: probability of turning grey.
        blur: probability of the Gaussian blur; auto = the paper's (1.0 in view 1, 0.1 in view 2), 0 below 64 px.
        blur_sigma: standard deviation of the blur in pixels, drawn uniformly.
        blur_kernel: width of the blur kernel in pixels; auto = 2 int(image_size / 20) + 1 (23 at 224 px).
        solarise: probability of solarisation.
        solarise_threshold: values in [0, 1] at or above it are inverted.
    """

    crop_area: tuple[float, float] = _setting((0.2, 1.0), checks.numbers(2, 0, 1, rising=True, above=True))
    crop_ratio: tuple[float, float] = _setting((3 / 4, 4 / 3), checks.numbers(2, 0, 10, rising=True, above=True))
    flip: float = _setting(0.5, checks.number(0, 1))
    vertical_flip: float = _setting(0.0, checks.number(0, 1))
    rotation_degrees: float = _setting(0.0, checks.number(0, 180))
    jitter: float = _setting(0.8, checks.number(0, 1))
    brightness: float = _setting(0.4, checks.number(0, 1))
    contrast: float = _setting(0.4, checks.number(0, 1))
    saturation: float = _setting(0.2, checks.number(0, 1))
    hue: float = _setting(0.1, checks.number(0, 0.5))
    grey: float = _setting(0.2, checks.number(0, 1))
    blur: float | Auto = _setting("auto", checks.number(0, 1, auto=True))
    blur_sigma: tuple[float, float] = _setting((0.1, 2.0), checks.numbers(2, 0, 100, rising=True, above=True))
    blur_kernel: int | Auto = _setting("auto", checks.odd_size)
    solarise: float = _setting(0.0, checks.number(0, 1))
    solarise_threshold: float = _setting(0.5, checks.number(0, 1))


@dataclass(frozen=True)
class AugmentRecipe(_Checked):
    """The two asymmetric views (BYOL, appendix B; table 6 of arXiv:2006.07733)."""

    view1: ViewRecipe = _section(ViewRecipe)
    view2: ViewRecipe = _section(ViewRecipe, solarise=0.2)


@dataclass(frozen=True)
class ModelRecipe(_Checked):
    """The network.

    Attributes:
        backbone: a timm or torchvision name (``resnet18``, ``timm/convnext_nano``, ``torchvision/resnet50``), or
            ``module:callable``.
        backbone_args: keyword arguments for it.
        projection_hidden: hidden width of the projection and the prediction head.
        projection_size: output width of both heads.
    """

    backbone: str = _setting("resnet18", checks.name)
    backbone_args: dict[str, Any] = _setting({}, checks.plain_mapping)
    projection_hidden: int = _setting(4096, checks.number(1, 65536, integer=True))
    projection_size: int = _setting(256, checks.number(1, 65536, integer=True))


@dataclass(frozen=True)
class OptimRecipe(_Checked):
    """The optimiser: linear warm-up, then cosine to zero, per optimiser step.

    Attributes:
        name: sgd, adamw or lars.
        lr: peak learning rate, *for the loss scale below*.
        lr_scaling: multiply lr by (effective batch) / 256, as the paper does.
        weight_decay: not applied to biases and normalisation parameters.
        momentum: of sgd and lars.
        warmup_epochs: length of the warm-up; shortened to a quarter of the training where that is less.
        loss_scale: the gradient is multiplied by this. 1 = this class's loss 0.5 (-cos - cos), for which most
            libraries' learning rates hold; 4 = the paper's per-sample loss (2 - 2 cos) + (2 - 2 cos). It matters to
            sgd and, for biases and normalisation parameters, to lars; adamw does not feel it.
        clip_grad_norm: largest norm of the gradient; 0 = no clipping.
    """

    name: str = _setting("sgd", checks.choice("sgd", "adamw", "lars"))
    lr: float = _setting(0.12, checks.number(0, math.inf, above=True))
    lr_scaling: bool = _setting(True, checks.flag)
    weight_decay: float = _setting(5e-4, checks.number(0, math.inf))
    momentum: float = _setting(0.9, checks.number(0, 0.9999))
    warmup_epochs: float = _setting(10.0, checks.number(0, math.inf))
    loss_scale: float = _setting(1.0, checks.number(0, math.inf, above=True))
    clip_grad_norm: float = _setting(0.0, checks.number(0, math.inf))


@dataclass(frozen=True)
class TrainRecipe(_Checked):
    """The loop.

    Attributes:
        epochs: passes over the images.
        batch_size: images in one forward pass on one device.
        accumulate: forward passes per optimiser step (effective batch = batch_size x accumulate x devices).
        base_tau: the target network's momentum at the start; it rises to 1 by a cosine over the whole training.
        precision: 32, bf16, or auto (bf16 where the processor has instructions for it).
        seed: of weights, views and order.
        deterministic: refuse operations without a deterministic implementation (GPU; slower there).
        checkpoint_every_epochs: how often an ``epoch=NNN.ckpt`` is kept beside ``last.ckpt``; 0 = never.
        log_every_steps: optimiser steps between two rows of metrics.csv.
    """

    epochs: int = _setting(100, checks.number(1, 1_000_000, integer=True))
    batch_size: int = _setting(64, checks.number(2, 1_000_000, integer=True))
    accumulate: int = _setting(1, checks.number(1, 1_000_000, integer=True))
    base_tau: float = _setting(0.99, checks.number(0, 1))
    precision: str = _setting("auto", checks.choice("auto", "32", "bf16"))
    seed: int = _setting(0, checks.number(0, 2**31 - 1, integer=True))
    deterministic: bool = _setting(False, checks.flag)
    checkpoint_every_epochs: int = _setting(10, checks.number(0, 1_000_000, integer=True))
    log_every_steps: int = _setting(10, checks.number(1, 1_000_000, integer=True))


@dataclass(frozen=True)
class Recipe(_Checked):
    """A whole recipe.

    Raises:
        RecipeError: with all faults, from every way to make one.
    """

    description: str = _setting("", checks.text)
    data: DataRecipe = _section(DataRecipe)
    augment: AugmentRecipe = _section(AugmentRecipe)
    model: ModelRecipe = _section(ModelRecipe)
    optim: OptimRecipe = _section(OptimRecipe)
    train: TrainRecipe = _section(TrainRecipe)

    # --- reading and writing ------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path_or_name: str | os.PathLike[str]) -> Recipe:
        """Read a YAML file, or a recipe by name: ``default``, ``paper``, or a model of the zoo."""
        path = _find(path_or_name)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise RecipeError([f"{path} has {path.stat().st_size} bytes; a recipe has a few hundred"])
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError([f"{path} cannot be read as text: {error}"]) from error
        try:
            document = yaml.load(text, Loader=_StrictLoader)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise RecipeError([f"{path} is not valid YAML: {' '.join(str(error).split())}"]) from error
        try:
            return cls.from_dict({} if document is None else document)
        except RecipeError as error:
            raise RecipeError([f"{path}: {fault}" for fault in error.faults]) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML, whole or not at all.

        Raises:
            OutputError: when the file cannot be written.
        """
        text = yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        with publish_file(path, force=True) as file:
            file.write(text.encode())

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data (texts, numbers, lists, dicts), with every key."""
        return cast(dict[str, Any], _to_plain(self))

    @classmethod
    def from_dict(cls, document: object) -> Recipe:
        """Build a recipe from plain data; keys that are absent take their defaults."""
        faults: list[str] = []
        made = _build(cls, document, "", {}, faults)
        if faults:
            raise RecipeError(faults)
        return cast(Recipe, made)

    # --- changing -----------------------------------------------------------------------------------------------

    def with_overrides(self, overrides: Iterable[str]) -> Recipe:
        """A copy with ``section.key=value`` texts applied; values are read as YAML."""
        changes: dict[str, Any] = {}
        faults = []
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals or not key.strip():
                faults.append(f"{text!r} is not an override; use section.key=value, such as optim.lr=0.1")
                continue
            try:
                changes[key.strip()] = yaml.load(value, Loader=_StrictLoader)
            except (yaml.YAMLError, RecursionError, ValueError) as error:
                faults.append(f"{text!r}: the value is not valid YAML: {' '.join(str(error).split())}")
        try:
            changed = self.updated(changes)
        except RecipeError as error:
            raise RecipeError([*faults, *error.faults]) from None
        if faults:
            raise RecipeError(faults)
        return changed

    def updated(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced: ``{"train.epochs": 3, "augment.view1.blur": 0.5}``."""
        document = self.to_dict()
        faults = []
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            place: Any = document
            for depth, name in enumerate(parents):
                if name not in place and parents[:2] != ["model", "backbone_args"]:
                    faults.append(_unknown(".".join(parents[: depth + 1]), name, place))
                    place = None
                    break
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    faults.append(f"{dotted} does not exist: {'.'.join(parents[: depth + 1])} is not a section")
                    place = None
                    break
            if place is not None:
                place[last] = value
        try:
            changed = Recipe.from_dict(document)
        except RecipeError as error:
            raise RecipeError([*faults, *error.faults]) from None
        if faults:
            raise RecipeError(faults)
        return changed

    def resolved(self) -> Recipe:
        """A copy in which the views' and the evaluation's ``auto`` values are numbers.

        ``data.workers`` and ``train.precision`` stay: they belong to the machine, not to the recipe.
        """
        size = self.data.image_size

        def settle(view: ViewRecipe, paper_blur: float) -> ViewRecipe:
            blur = (paper_blur if size >= SMALLEST_BLURRED_PX else 0.0) if view.blur == "auto" else view.blur
            # DM utils/augmentations.py: a tenth of the image, made odd; 23 at 224 px.
            kernel = 2 * int(size / 10 / 2) + 1 if view.blur_kernel == "auto" else view.blur_kernel
            return replace(view, blur=blur, blur_kernel=min(kernel, 255))

        return replace(
            self,
            data=replace(
                self.data,
                resize=size if self.data.resize == "auto" else self.data.resize,
                store_size=4 * size if self.data.store_size == "auto" else self.data.store_size,
            ),
            augment=AugmentRecipe(settle(self.augment.view1, 1.0), settle(self.augment.view2, 0.1)),
        )

    def differences(self, other: Recipe) -> list[tuple[str, Any, Any]]:
        """Every ``(dotted key, own value, other's value)`` in which the two differ."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [(key, mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)]

    def preprocessing(self) -> Preprocessing:
        """How an image reaches the trained encoder: the evaluation counterpart of the views."""
        from byol_deploy.preprocess import Preprocessing

        data = self.resolved().data
        return Preprocessing(size_px=data.image_size, resize_px=cast(int, data.resize), mean=data.mean, std=data.std)


def recipe_names() -> list[str]:
    """Names that :meth:`Recipe.load` knows: the shipped recipes and, in a checkout, the model zoo."""
    return sorted(
        {path.stem for path in _DATA.glob("*.yaml")} | {path.parent.name for path in _ZOO.glob("*/recipe.yaml")}
    )


# --- helpers ----------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """One key a line, lists on their key's line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


class _StrictLoader(yaml.SafeLoader):
    """YAML without anchors (a few lines of them can fill the memory) and without keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not used in recipes; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep=deep)


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    text = os.fspath(path_or_name)
    path = Path(text)
    if path.is_file():
        return path
    if "/" not in text and os.sep not in text:
        for candidate in (_DATA / f"{text}.yaml", _ZOO / text / "recipe.yaml"):
            if candidate.is_file():
                return candidate
    if path.is_dir():
        raise RecipeError([f"{text} is a folder; give a recipe file, or a name: {', '.join(recipe_names())}"])
    raise RecipeError([f"there is no recipe {text!r}{_meant(text, recipe_names())}; give a YAML file or one of: "
                       f"{', '.join(recipe_names())}"])  # fmt: skip


def _build(kind: type[Any], document: object, prefix: str, base: Mapping[str, Any], faults: list[str]) -> Any:
    """Build ``kind`` from plain data, adding to ``faults``; None when this section has one."""
    if not isinstance(document, Mapping):
        where = prefix.rstrip(".") or "the recipe"
        faults.append(f"{where} is {_show(document)}; use a mapping of keys to values")
        return None
    specs = {spec.name: spec for spec in fields(kind)}
    before = len(faults)
    for key in document:
        if key not in specs:
            faults.append(_unknown(f"{prefix}{key}", str(key), specs))
    values: dict[str, Any] = {}
    for name, spec in specs.items():
        section = spec.metadata.get("section")
        if name not in document:
            continue
        if section is not None:
            # A section that names a few keys keeps the other defaults *of its place*: view 2 differs from view 1.
            default = cast(Any, spec.default_factory)()
            values[name] = _build(section, document[name], f"{prefix}{name}.", vars(default), faults)
            continue
        try:
            values[name] = spec.metadata["check"](document[name])
        except ValueError as expectation:
            faults.append(f"{prefix}{name} is {_show(document[name])}; use {expectation}")
    if len(faults) > before:
        return None
    try:
        return kind(**{**base, **values})
    except RecipeError as error:  # what only the section as a whole can see
        faults.extend(f"{prefix}{fault}" for fault in error.faults)
        return None


def _unknown(dotted: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    return f"{dotted} is not a key of a recipe{_meant(name, names)}; known here: {', '.join(names)}"


def _meant(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return {spec.name: _to_plain(getattr(value, spec.name)) for spec in fields(value)}
    if isinstance(value, tuple | list):
        return [_to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    return value


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping) and key != "backbone_args":
            result.update(_flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
