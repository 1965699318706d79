"""Making an ``.mlpackage``, and looking at what was made; on any machine, with PyTorch and coremltools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import traceback
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import ExportError
from byol_deploy.formats import Signature
from byol_deploy.formats._coreml_evaluate import UnknownOperator, evaluate

INPUT = "images"
_PARTS = ("model.mlmodel", "weights")
# Of a vector's length. Float32 alone makes at most some 1e-5 of it in the 56 encoders of benchmarks/results/backbones,
# a batch norm's epsilon of 1e-3 for 1e-5 makes some 1e-3.
_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2}


def convert(graph: Any, signature: Signature, precision: str, package: Path) -> str:
    """Write ``graph`` as an ML program.

    Args:
        graph: As in :meth:`byol_deploy.formats.Format.export`.
        signature: Shapes and names.
        precision: "fp32" or "fp16".
        package: The folder that is made; its name ends in ``.mlpackage``.

    Returns:
        How far it could be checked here, in words.

    Raises:
        ExportError: coremltools cannot express the graph, or what it wrote is not the graph.
    """
    program = _program(graph, signature.size_px)
    side = signature.size_px
    with quiet() as said:
        import coremltools

        exact = precision == "fp32"
        try:
            coremltools.convert(
                program,
                inputs=[
                    coremltools.ImageType(INPUT, shape=(1, 3, side, side), color_layout=coremltools.colorlayout.RGB)
                ],
                outputs=[coremltools.TensorType(name) for name in signature.outputs],
                convert_to="mlprogram",
                compute_precision=coremltools.precision.FLOAT32 if exact else coremltools.precision.FLOAT16,
                minimum_deployment_target=coremltools.target.iOS15,
                skip_model_load=True,
                package_dir=str(package),
            )
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # in which coremltools leaves a folder to be cleared away
            where = "; ".join(line for line in said if "located at" in line)
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ExportError(
                f"coremltools {coremltools.__version__} cannot take this graph: {reason[:300]}"
                + (f" ({where[:300]})" if where else "")
            ) from error
        _settle(package, side)
        return _check(package, graph, signature, precision)


def _program(graph: Any, side: int) -> Any:
    """The graph over one image in planes, as an exported program without what coremltools does not know."""
    import torch

    class Planes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = graph
            self.training = False

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values: tuple[torch.Tensor, ...] = self.encoder(images.permute(0, 2, 3, 1))
            return values

    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(Planes(), (torch.zeros(1, 3, side, side),)).run_decompositions({})
    except Exception as error:
        # Whatever an exporter raises on a stranger's module is that module's trouble, not a bug here.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ExportError(
            f"torch.export of PyTorch {torch.__version__} failed: {type(error).__name__}: {reason[:300]}"
        ) from error
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # the same tensor under another name
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """The one place where prints, progress bars, log lines and warnings are silenced; gives coremltools' lines."""
    said: list[str] = []
    log = logging.getLogger("coremltools")
    before = log.handlers, log.propagate
    others = [logging.getLogger(name) for name in ("torch.export", "torch._dynamo", "torch.utils._pytree")]
    levels = [other.level for other in others]
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.handlers, log.propagate = [handler], False
    for other in others:
        other.setLevel(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield said
    finally:
        log.handlers, log.propagate = before
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)


def _settle(package: Path, side: int) -> None:
    """Take out what differs from one conversion to the next, and say what the input is."""
    from coremltools.models.utils import load_spec

    data = package / "Data" / "com.apple.CoreML"
    spec = load_spec(str(package))
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    spec.description.metadata.shortDescription = "An image encoder, written by byol-deploy"
    spec.description.input[0].shortDescription = f"RGB, {side} x {side} px; normalised inside the model"
    (data / _PARTS[0]).write_bytes(spec.SerializeToString(deterministic=True))
    # The package's own table of contents names its parts by identifiers that are drawn anew each time.
    names = {part: str(uuid.uuid5(uuid.NAMESPACE_URL, f"byol-deploy/{part}")) for part in _PARTS}
    about = dict(zip(_PARTS, ("CoreML Model Specification", "CoreML Model Weights"), strict=True))
    entries = {
        names[part]: {
            "author": "com.apple.CoreML",
            "description": about[part],
            "name": part,
            "path": f"com.apple.CoreML/{part}",
        }
        for part in _PARTS
        if (data / part).exists()
    }
    contents = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": names[_PARTS[0]]}
    (package / "Manifest.json").write_text(json.dumps(contents, indent=4), encoding="utf-8")


def _check(package: Path, graph: Any, signature: Signature, precision: str) -> str:
    """Compare a written package with the graph: its declared ports, and what its operators are documented to compute.

    Raises:
        ExportError: They differ.
    """
    import torch
    from coremltools.models.utils import load_spec

    spec = load_spec(str(package))
    found = ports(spec)
    side = signature.size_px
    wanted = ([(INPUT, "image", (side, side))], [(name, "float32") for name in signature.outputs])
    if found != wanted:
        raise ExportError(f"coremltools wrote a model that takes and gives {found}, not {wanted}")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 4, 4), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").round()
    noise = torch.randint(0, 256, (1, 3, side, side), generator=generator).float()
    for image in torch.cat([smooth, noise]).unsqueeze(1):
        with torch.inference_mode():
            expected = graph(image.permute(0, 2, 3, 1).to(torch.uint8).contiguous())
        try:
            actual = evaluate(package, {INPUT: image.numpy()})
        except UnknownOperator as error:
            return f"not run by Core ML; inputs and outputs compared, the numbers not, because of the operator {error}"
        for name, value in zip(signature.outputs, expected, strict=True):
            difference = float(np.linalg.norm(actual[name] - value.numpy()))
            length = float(np.linalg.norm(value.numpy()))
            if not difference <= _TOLERANCE[precision] * length:
                raise ExportError(
                    f"what coremltools wrote for {name} is not the graph: computed from the file's own operators it is "
                    f"{difference / max(length, 1e-30):.1e} of its length off"
                )
    return "not run by Core ML; inputs, outputs and numbers compared, as its operators are documented to compute them"


def ports(spec: Any) -> tuple[list[tuple[str, str, tuple[int, int]]], list[tuple[str, str]]]:
    """Inputs (name, kind, size) and outputs (name, type) as a Core ML specification declares them."""
    taken = []
    for port in spec.description.input:
        kind = port.type.WhichOneof("Type").removesuffix("Type")
        size = (port.type.imageType.height, port.type.imageType.width) if kind == "image" else (0, 0)
        taken.append((port.name, kind, size))
    types = {65568: "float32", 65552: "float16", 65600: "float64", 131104: "int32"}  # ArrayDataType
    given = [(port.name, types.get(port.type.multiArrayType.dataType, "?")) for port in spec.description.output]
    return taken, given
