"""The layers of the package: imports point down only, and the edge half never sees PyTorch.

The rules are those of CONTRIBUTING.md. The imports are read with ``ast``, so a rule holds for every line of every
module and not only for what a test happens to run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "byol_deploy"

# First part of the name below byol_deploy -> layer. 3a and 3b stand beside each other; 3c opens formats.
LAYERS = {
    "errors": "0",
    "cores": "0",
    "checks": "0",
    "atomic": "1",
    "awkward": "1",
    "images": "1",
    "preprocess": "1",
    "recipe": "1",
    "manifest": "1",
    "strict_json": "1",
    "bundle": "1",
    "calibration": "1",
    "golden": "1",
    "sealing": "1",
    "providers": "2",
    "quantization": "2",
    "runtime": "3c",
    "embedding": "3c",
    "parity": "2",
    "separation": "2",
    "host": "2",
    "selftest": "4",
    "evaluation": "3c",
    "bench": "2",
    "environment": "2",
    "formats": "3a",
    "training": "3b",
    "graph": "3b",
    "pipeline": "4",
    "inspection": "4",
    "drawing": "2",
    "report": "4",
    "demo": "4",
    "cli": "5",
}
REACHES = {
    "0": {"0"},
    "1": {"0", "1"},
    "2": {"0", "1", "2"},
    "3a": {"0", "1", "2", "3a"},
    "3b": {"0", "1", "3b"},
    "3c": {"0", "1", "2", "3a", "3c"},
    "4": {"0", "1", "2", "3a", "3b", "3c", "4"},
    "5": {"0", "1", "2", "3a", "3b", "3c", "4", "5"},
}
EDGE = {"numpy", "PIL", "yaml"}
HEAVY = {"torch", "torchvision", "timm", "lightning", "onnx", "onnxscript", "onnx_ir", "sklearn", "pyarrow", "jinja2"}
# Third-party packages that a layer may import at the top of a file. Inside functions the heavy ones are allowed
# from layer 2 up: they are paid for by whoever calls the function.
AT_TOP = {
    "0": set(),
    "1": EDGE,
    "2": EDGE | {"onnxruntime"},
    "3a": EDGE | {"onnxruntime"},
    "3c": EDGE | {"onnxruntime"},
    "3b": EDGE | {"torch", "torchvision", "timm", "lightning"},
    "4": EDGE,
    "5": {"typer"},
}


@dataclass(frozen=True)
class Import:
    """One import statement of one module."""

    path: Path
    line: int
    target: str
    at_top: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def layer_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "cli"):
        return "5"
    relative = path.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        return "0"
    return LAYERS[relative.parts[0].removesuffix(".py")]


def imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = (
        ["byol_deploy", "cli"]
        if path.is_relative_to(ROOT / "cli")
        else ["byol_deploy", *path.relative_to(PACKAGE).parts[:-1]]
    )

    def walk(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue  # never executed
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, child.lineno, alias.name, at_top)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                prefix = ".".join([*base, *([child.module] if child.module else [])])
                if prefix in {"byol_deploy", "byol_deploy.cli"} or child.module is None:
                    for alias in child.names:
                        yield Import(path, child.lineno, f"{prefix}.{alias.name}", at_top)
                else:
                    yield Import(path, child.lineno, prefix, at_top)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, at_top and not inside)

    yield from walk(tree, True)


def test_every_module_has_a_layer() -> None:
    unknown = [
        str(path.relative_to(ROOT))
        for path in modules()
        if not path.is_relative_to(ROOT / "cli")
        and path != PACKAGE / "__init__.py"
        and path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in LAYERS
    ]
    assert not unknown, f"give these a layer in {Path(__file__).name} and in CONTRIBUTING.md: {unknown}"


def test_imports_point_down() -> None:
    upward = []
    for path in modules():
        allowed = REACHES[layer_of(path)]
        for found in imports(path):
            parts = found.target.split(".")
            if parts[0] != "byol_deploy" or len(parts) < 2 or parts[1].startswith("__"):
                continue
            if path == PACKAGE / "__init__.py":
                continue  # names only, loaded lazily
            layer = LAYERS.get(parts[1])
            if layer is not None and layer not in allowed:
                upward.append(f"{found} (layer {layer_of(path)} may not reach layer {layer})")
    assert not upward, "\n".join(upward)


def test_heavy_packages_stay_inside_functions() -> None:
    wrong = []
    for path in modules():
        layer = layer_of(path)
        for found in imports(path):
            top = found.target.split(".")[0]
            if top in sys.stdlib_module_names or top == "byol_deploy":
                continue
            if found.at_top and top not in AT_TOP[layer]:
                wrong.append(f"{found} at the top of a layer {layer} file")
            if not found.at_top and layer in {"0", "1"} and top in HEAVY:
                wrong.append(f"{found} in layer {layer}, which must work without it")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_plain_cli_or_clicks_private_parts() -> None:
    sources = [*modules(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    wrong = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno} {name}"
                for name in names
                if name.split(".")[0] in {"cli", "click"} or name.startswith("typer.")
            ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    "module",
    [
        "byol_deploy",
        "byol_deploy.cli.main",
        *(f"byol_deploy.{name}" for name, layer in LAYERS.items() if layer in {"0", "1", "2", "4"}),
    ],
)
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"import {module} loads {loaded}"
