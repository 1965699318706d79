"""The folder for a bug report shows the fault to whoever runs it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from damaged import (
    FORMATS,
    Damage,
    edit,
    explain,
    mean,
    one_weight,
    position,
    write,
)

from byol_deploy import formats
from byol_deploy.errors import OutputError, UsageError
from byol_deploy.pipeline.explain.reproduction import write_reproduction


class TestReproduction:
    """The folder for a bug report, run as whoever receives it would."""

    def run(self, folder: Path) -> subprocess.CompletedProcess[str]:
        # Without this package and without timm: the folder must be enough.
        blocked = "import sys; sys.modules['byol_deploy'] = sys.modules['timm'] = None; import runpy; "
        code = blocked + "runpy.run_path(sys.argv[1], run_name='__main__')"
        return subprocess.run(
            [sys.executable, "-c", code, str(folder / "reproduce.py")], capture_output=True, text=True, check=False
        )

    def files(self, folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()} - {"input.npz", "reproduce.py", "README.txt"}

    @pytest.mark.parametrize(
        ("family", "damage", "format", "written"),
        [
            ("resnet", one_weight, "onnx", {"layer.onnx", "layer.pt2"}),
            ("resnet", one_weight, "torchscript", {"layer.torchscript.pt", "layer.pt2"}),
            ("resnet", mean, "onnx", {"layer.onnx", "layer.pt2"}),
            ("vit", position, "onnx", {"layer.onnx", "layer.torch.pt"}),
        ],
    )
    def test_it_shows_the_fault(
        self, family: str, damage: Damage, format: str, written: set[str], encoders: Any, tmp_path: Path
    ) -> None:
        graph = copy.deepcopy(encoders[family][0])
        damage(graph)
        file = write(graph, format, tmp_path / f"model{formats.get(format).suffix}")
        explanation = explain(file, encoders[family])
        got = write_reproduction(tmp_path / "out", file, formats.get(format), *encoders[family], explanation)
        assert got.shows
        assert got.kind == "layer"
        assert explanation.culprit is not None
        assert got.layer == explanation.culprit.title
        assert self.files(tmp_path / "out") == written
        ran = self.run(tmp_path / "out")
        assert ran.returncode == 1, ran.stdout + ran.stderr
        assert "DIFFERS" in ran.stdout
        assert got.layer in (tmp_path / "out" / "README.txt").read_text(encoding="utf-8")
        assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < file.stat().st_size + 200_000

    def test_an_operation_with_two_inputs(self, encoders: Any, files: Any, tmp_path: Path) -> None:
        def subtract(model: Any) -> None:
            next(node for node in model.graph.node if node.name == "backbone/layer2/0/Add").op_type = "Sub"

        (tmp_path / "model.onnx").write_bytes(files["resnet", "onnx"].read_bytes())
        file = edit(tmp_path / "model.onnx", subtract)
        explanation = explain(file, encoders["resnet"])
        got = write_reproduction(tmp_path / "out", file, formats.get("onnx"), *encoders["resnet"], explanation)
        assert (got.kind, got.shows) == ("layer", True)
        assert [node.op_type for node in onnx.load(tmp_path / "out" / "layer.onnx").graph.node] == ["Sub", "Cast"]
        assert (tmp_path / "out" / "layer.torch.pt").stat().st_size < 20_000  # the addition, not the network
        assert self.run(tmp_path / "out").returncode == 1

    @pytest.mark.parametrize(("format", "kind"), [("onnx", "prefix"), ("torchscript", "whole")])
    def test_what_a_layer_inherits_needs_more_than_the_layer(
        self, format: str, kind: str, encoders: Any, tmp_path: Path
    ) -> None:
        graph = copy.deepcopy(encoders["resnet"][0])
        one_weight(graph)
        file = write(graph, format, tmp_path / f"model{formats.get(format).suffix}")
        explanation = explain(file, encoders["resnet"])
        layer = next(layer for layer in explanation.layers if layer.path == "backbone.layer2.0.act1")
        got = write_reproduction(
            tmp_path / "out", file, formats.get(format), *encoders["resnet"], explanation, layer=layer
        )
        assert (got.kind, got.shows) == (kind, True)
        assert self.run(tmp_path / "out").returncode == 1

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_right_layer_passes(self, format: str, encoders: Any, files: Any, tmp_path: Path) -> None:
        file = files["resnet", format]
        explanation = explain(file, encoders["resnet"])
        with pytest.raises(UsageError, match="no layer past its budget"):
            write_reproduction(tmp_path / "out", file, formats.get(format), *encoders["resnet"], explanation)
        layer = next(layer for layer in explanation.layers if layer.path == "backbone.layer2.0.bn1")
        got = write_reproduction(
            tmp_path / "out", file, formats.get(format), *encoders["resnet"], explanation, layer=layer
        )
        assert not got.shows
        ran = self.run(tmp_path / "out")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "the same" in ran.stdout
        with pytest.raises(OutputError):
            write_reproduction(
                tmp_path / "out", file, formats.get(format), *encoders["resnet"], explanation, layer=layer
            )
