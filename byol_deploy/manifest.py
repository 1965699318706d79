"""The manifest of an exported model: typed, written as JSON, read as data from a stranger.

Reading is strict about what it knows: every fault is listed in one error. Keys that it does not know are ignored (a
later 0.x may add information) except in ``input``, where an unknown key would be a preprocessing step silently left
out. What changes the meaning of a known key raises ``schema``, and then ``readable_from`` names the version to install.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from byol_deploy import __version__
from byol_deploy.errors import BundleError
from byol_deploy.preprocess import Preprocessing
from byol_deploy.strict_json import MAX_TEXT, Reader, is_finite, short

SCHEMA = 1
"""The manifest schema that this version writes and reads."""
READABLE_FROM = "0.1.0"
"""The first version that reads :data:`SCHEMA`."""

_MOST_IMAGES = 4096  # that a runtime is prepared for at once: it reserves their memory
_MAX_CASES = 1000
_VERSION = re.compile(r"\d+(\.\d+){0,3}[0-9a-z.+-]{0,20}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARAMETER_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Output:
    """One output of the graph: its name and its width D; values are (N, D) float32."""

    name: str
    width: int


@dataclass(frozen=True)
class ExtraFile:
    """A file that belongs to an artefact, such as ONNX external data."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class GoldenFile:
    """Where the golden cases lie and how many there are."""

    file: str
    sha256: str
    count: int


@dataclass(frozen=True)
class Artefact:
    """One written model file.

    Attributes:
        file: Path inside the bundle, with forward slashes.
        format: e.g. "onnx", "torchscript".
        precision: e.g. "fp32".
        sha256: 64 lower-case hexadecimal digits.
        bytes: Its size.
        extra_files: What must lie beside it.
        parity: The verdict of the comparison with the trained model, ``ParityReport.to_dict()``.
        host: Machine and versions with which it was compared.
        reduction: How a file of reduced precision was made, and what else was tried; empty for float32.
    """

    file: str
    format: str
    precision: str
    sha256: str
    bytes: int
    extra_files: tuple[ExtraFile, ...] = ()
    parity: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    reduction: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """What ``export --tune`` chose on the machine that it ran on.

    Attributes:
        file: The artefact.
        threads: Threads inside an operator.
        allow_spinning: Whether idle threads wait busily.
        batches: Numbers of images that the runtime is prepared for, see :class:`byol_deploy.formats.RunOptions`.
        streams: Parts of such a batch that run side by side.
        evidence: What was measured: machine, time budget, and one entry for each batch size and candidate.
    """

    file: str
    threads: int
    allow_spinning: bool = True
    batches: tuple[int, ...] = ()
    streams: int = 1
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """What was exported, and from where.

    Attributes:
        backbone: e.g. "timm/resnet10t".
        width: Width of the embedding.
        parameters: Number of parameters in the exported graph.
        parameter_hash: :func:`byol_deploy.bundle.parameter_hash` of the online tensors.
        checkpoint_sha256: SHA-256 of the checkpoint file.
        global_step: Optimiser steps of the training, None when the checkpoint does not say.
        epoch: Epochs of the training, None when the checkpoint does not say.
        backbone_args: Keyword arguments of the backbone.
        stripped_keys: State-dict keys of the checkpoint that were left out: the momentum branch.
        branch: Always "online": the momentum branch is not reachable from the graph.
    """

    backbone: str
    width: int
    parameters: int
    parameter_hash: str
    checkpoint_sha256: str
    global_step: int | None = None
    epoch: int | None = None
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    stripped_keys: tuple[str, ...] = ()
    branch: Literal["online"] = "online"


@dataclass(frozen=True)
class InputContract:
    """The input of the graph: (N, size_px, size_px, 3) uint8 RGB, made by ``preprocessing``."""

    preprocessing: Preprocessing
    name: str = "images"
    dtype: Literal["uint8"] = "uint8"
    layout: Literal["NHWC"] = "NHWC"


@dataclass(frozen=True)
class Manifest:
    """Everything that a bundle says about itself.

    Attributes:
        model: What was exported.
        input: What the graph takes.
        outputs: What it gives, in order.
        limits: For each output what a self-test may differ by: ``noise_rel_l2``, ``rel_l2``, ``cosine``, and ``each``,
            the limits of the single golden cases.
        golden: Where the golden cases lie.
        artefacts: The written files; empty in the copy that a lone file carries.
        tuned: What tuning chose, None where nothing was tuned.
        recipe: The training recipe, None when it is not known.
        written_by: Versions by package name.
        created: UTC time, ISO 8601.
        schema: Schema version.
        readable_from: First version of byol-deploy that reads this schema.
    """

    model: ModelInfo
    input: InputContract
    outputs: tuple[Output, ...]
    limits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    golden: GoldenFile | None = None
    artefacts: tuple[Artefact, ...] = ()
    tuned: Tuned | None = None
    recipe: Mapping[str, Any] | None = None
    written_by: Mapping[str, str] = field(default_factory=lambda: {"byol-deploy": __version__})
    created: str = ""
    schema: int = SCHEMA
    readable_from: str = READABLE_FROM

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the input."""
        return self.input.preprocessing

    def output(self, name: str) -> Output:
        """The output called ``name``.

        Raises:
            BundleError: There is none. The message lists what there is.
        """
        for output in self.outputs:
            if output.name == name:
                return output
        raise BundleError(f"the model has no output {name!r}; it has {', '.join(item.name for item in self.outputs)}")

    def carried(self, golden: GoldenFile) -> Manifest:
        """The copy that travels inside a lone file: no artefacts, since a file cannot hold its own hash."""
        return replace(self, artefacts=(), tuned=None, golden=golden)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values in the order in which a person reads them."""
        model = self.model
        document: dict[str, Any] = {
            "schema": self.schema,
            "readable_from": self.readable_from,
            "written_by": dict(self.written_by),
            "created": self.created,
            "model": {
                "backbone": model.backbone,
                "backbone_args": dict(model.backbone_args),
                "width": model.width,
                "branch": model.branch,
                "parameters": model.parameters,
                "parameter_hash": model.parameter_hash,
                "checkpoint_sha256": model.checkpoint_sha256,
                "global_step": model.global_step,
                "epoch": model.epoch,
                "stripped_keys": list(model.stripped_keys),
            },
            "input": {
                "name": self.input.name,
                "dtype": self.input.dtype,
                "layout": self.input.layout,
                **self.input.preprocessing.to_dict(),
            },
            "outputs": [{"name": output.name, "width": output.width} for output in self.outputs],
            "limits": {name: dict(limit) for name, limit in self.limits.items()},
        }
        if self.golden is not None:
            document["golden"] = vars(self.golden).copy()
        document["artefacts"] = [
            {
                **vars(artefact),
                "extra_files": [vars(extra).copy() for extra in artefact.extra_files],
                "parity": dict(artefact.parity),
                "host": dict(artefact.host),
                "reduction": dict(artefact.reduction),
            }
            for artefact in self.artefacts
        ]
        if self.tuned is not None:
            plain = {"batches": list(self.tuned.batches), "evidence": dict(self.tuned.evidence)}
            document["tuned"] = vars(self.tuned) | plain
        document["recipe"] = None if self.recipe is None else dict(self.recipe)
        return document

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads. A number that is not finite is a bug and a ValueError."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=True, allow_nan=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        (folder / "manifest.json").write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "the manifest") -> Manifest:
        """Parse JSON text from a stranger.

        Raises:
            BundleError: Not JSON, or what :meth:`from_dict` refuses.
        """
        try:
            data = json.loads(text, parse_constant=_no_constant)
            # JSON can spell half a surrogate pair, which no terminal and no file takes.
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise BundleError(f"{name} is not JSON: {reason}; copy or export it again") from None
        return cls.from_dict(data, name)

    @classmethod
    def from_dict(cls, data: object, name: str = "the manifest") -> Manifest:
        """Check and type the values of a parsed manifest.

        Raises:
            BundleError: It has another schema (the message names the version that reads it), or faults (all listed).
        """
        if not isinstance(data, Mapping):
            raise BundleError(f"{name} is a JSON {type(data).__name__}, not an object; copy or export it again")
        _check_schema(data, name)
        read = Reader(data)
        model = read.section("model")
        manifest_input = read.section("input")
        try:
            contract = InputContract(
                _preprocessing(manifest_input),
                manifest_input.text("name", _NAME),
                manifest_input.choice("dtype", "uint8"),
                manifest_input.choice("layout", "NHWC"),
            )
        except ValueError as error:
            read.faults.append(f"input: {error}")
            contract = InputContract(Preprocessing(1))
        outputs = tuple(Output(item.text("name", _NAME), item.count("width", 1)) for item in read.items("outputs"))
        names = [output.name for output in outputs]
        if not names or len(set(names)) != len(names):
            read.faults.append(f"outputs are {names}; there must be at least one, each with its own name")
        golden = _golden(read.section("golden")) if data.get("golden") is not None else None
        artefacts = tuple(_artefact(item) for item in read.items("artefacts")) if "artefacts" in data else ()
        manifest = cls(
            model=ModelInfo(
                backbone=model.text("backbone"),
                width=model.count("width", 1),
                parameters=model.count("parameters"),
                parameter_hash=model.text("parameter_hash", _PARAMETER_HASH),
                checkpoint_sha256=model.text("checkpoint_sha256", _SHA256),
                global_step=model.optional_count("global_step"),
                epoch=model.optional_count("epoch"),
                backbone_args=model.mapping("backbone_args"),
                stripped_keys=model.texts("stripped_keys"),
                branch=model.choice("branch", "online"),
            ),
            input=contract,
            outputs=outputs,
            limits=_limits(read.section("limits")),
            golden=golden,
            artefacts=artefacts,
            tuned=_tuned(read, artefacts),
            recipe=read.mapping("recipe") if data.get("recipe") is not None else None,
            written_by={key: str(value)[:MAX_TEXT] for key, value in read.mapping("written_by").items()},
            created=read.text("created"),
            readable_from=read.text("readable_from", _VERSION),
        )
        if read.faults:
            shown = "; ".join(read.faults[:20])
            raise BundleError(f"{name} has {len(read.faults)} fault(s): {shown}; copy or export it again")
        return manifest


def _check_schema(data: Mapping[str, Any], name: str) -> None:
    schema = data.get("schema")
    if schema == SCHEMA and not isinstance(schema, bool):
        return
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(
            f"{name} is not a byol-deploy manifest: its schema is {short(schema)}; pass an export of ours"
        )
    since = data.get("readable_from")
    version = since if isinstance(since, str) and _VERSION.fullmatch(since) else None
    install = f"'byol-deploy>={version}'" if version else "--upgrade byol-deploy"
    raise BundleError(
        f"{name} has schema {short(schema)}; byol-deploy {__version__} reads schema {SCHEMA}. "
        f"{'Version ' + version if version else 'A newer version'} reads it: pip install {install}"
    )


def _preprocessing(section: Reader) -> Preprocessing:
    own = {"name", "dtype", "layout"}
    return Preprocessing.from_dict({key: value for key, value in section.data.items() if key not in own})


def _golden(section: Reader) -> GoldenFile:
    return GoldenFile(section.path("file"), section.text("sha256", _SHA256), section.count("count", 1))


def _limits(section: Reader) -> dict[str, Mapping[str, Any]]:
    limits: dict[str, Mapping[str, Any]] = {}
    for name in section.data:
        values = section.mapping(name)
        lists = [value if isinstance(value, list) else [value] for value in values.values()]
        if not all(len(numbers) <= _MAX_CASES and all(map(is_finite, numbers)) for numbers in lists):
            section.fault(name, "an object of finite numbers")
        else:
            limits[name] = dict(values)
    return limits


def _artefact(item: Reader) -> Artefact:
    extra = [
        ExtraFile(entry.path("file"), entry.text("sha256", _SHA256), entry.count("bytes"))
        for entry in item.items("extra_files")
    ]
    return Artefact(
        file=item.path("file"),
        format=item.text("format", _NAME),
        precision=item.text("precision", _NAME),
        sha256=item.text("sha256", _SHA256),
        bytes=item.count("bytes"),
        extra_files=tuple(extra),
        parity=item.mapping("parity"),
        host=item.mapping("host"),
        reduction=item.mapping("reduction") if "reduction" in item.data else {},
    )


def _tuned(read: Reader, artefacts: Sequence[Artefact]) -> Tuned | None:
    if read.data.get("tuned") is None:
        return None
    section = read.section("tuned")
    # The three in the middle are absent in older bundles.
    spinning = section.data.get("allow_spinning", True)
    if not isinstance(spinning, bool):
        section.fault("allow_spinning", "true or false")
    batches = section.counts("batches", 1, _MOST_IMAGES) if "batches" in section.data else ()
    streams = section.count("streams", 1) if "streams" in section.data else 1
    found = Tuned(
        section.path("file"), section.count("threads", 1), bool(spinning), batches, streams, section.mapping("evidence")
    )
    if found.file not in [artefact.file for artefact in artefacts]:
        section.fault("file", "one of the artefacts")
    return found


def _no_constant(name: str) -> Callable[[], None]:
    raise ValueError(f"{name} is not a JSON number")
