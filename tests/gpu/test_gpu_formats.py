"""Files on a GPU: ONNX with buffers that stay there and CUDA graphs, TensorRT's provider, and TensorRT itself."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_deploy import Encoder, export, formats, verify
from byol_deploy.errors import ExportError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.formats._onnx_cuda import OnDevice, runner
from byol_deploy.graph import EncoderGraph
from byol_deploy.parity import compare, derive_limits, separation_margin
from byol_deploy.preprocess import Preprocessing
from byol_deploy.providers import create_session, probe_provider
from byol_deploy.quantization import Calibration
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL

works, reason = probe_provider("cuda")
there = works and torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not there, reason=f"the CUDA provider: {reason}; torch.cuda: {torch.cuda.is_available()}"),
]
SIZE = 64


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def graph() -> EncoderGraph:
    torch.manual_seed(0)
    model = BYOL(build_backbone("timm/resnet10t"), projection_hidden=64, projection_size=32)
    with torch.no_grad():
        for key, values in model.named_parameters():
            if values.dim() == 1 and key.endswith("weight"):
                values.uniform_(0.5, 1.5)
        model.train()(torch.randn(16, 3, SIZE, SIZE))
    return EncoderGraph(model, Preprocessing(SIZE))


def write(graph: EncoderGraph, name: str, precision: str, folder: Path) -> Path:
    format, signature = formats.get(name), Signature(SIZE, graph.outputs)
    full = folder / f"model{format.suffix}"
    format.export(graph, signature, full, {})
    if precision == "fp32":
        return full
    path = folder / f"model.{precision}{format.suffix}"
    reducer = format.reducer(graph, signature, full, precision, Calibration(images(64, seed=9), "x86-vnni"))
    reducer.write(path, {}, reducer.methods[0], ())
    return path


@pytest.fixture(scope="module")
def onnx_file(graph: EncoderGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(graph, "onnx", "fp32", tmp_path_factory.mktemp("onnx"))


def faults(graph: EncoderGraph, run: Any, counts: tuple[int, ...] = (1, 2, 7, 64, 70)) -> list[str]:
    """The comparisons that fail, of these numbers of images; empty when all are within the model's rounding noise."""
    found = []
    for count in counts:
        pixels = images(count, seed=count)
        expected = graph.run(pixels)
        limits = derive_limits(expected, graph.doubled().run(pixels))
        report = compare(expected, run(pixels), limits=limits, subject=f"{count} images")
        found += [] if report.passed else [report.table()]
    return found


def from_tensors(run: Any) -> Any:
    def computed(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values.cpu().numpy() for name, values in run(torch.from_numpy(pixels).cuda()).items()}

    return computed


def test_arrays_through_buffers_that_stay(graph: EncoderGraph, onnx_file: Path) -> None:
    opened = formats.get("onnx").load(onnx_file, RunOptions("cuda"))
    assert isinstance(runner(opened.session), OnDevice)
    assert faults(graph, opened) == []


def test_tensors_are_taken_and_given_on_the_device(graph: EncoderGraph, onnx_file: Path) -> None:
    run = OnDevice(create_session(onnx_file, "cuda"))
    found = run.tensors(torch.from_numpy(images(3)).cuda())
    assert all(values.is_cuda and values.dtype == torch.float32 for values in found.values())
    assert faults(graph, from_tensors(run.tensors)) == []


def test_a_tensor_that_is_still_being_written_is_waited_for(graph: EncoderGraph, onnx_file: Path) -> None:
    run = OnDevice(create_session(onnx_file, "cuda"))
    pixels = torch.from_numpy(images(32)).cuda()
    expected = run.tensors(pixels)["embedding"].clone()
    for _ in range(5):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 64
        late = pixels + (busy.sum() * 0).nan_to_num().to(torch.uint8)  # ready only after the products
        assert torch.equal(run.tensors(late)["embedding"], expected)


@pytest.fixture(scope="module")
def captured(onnx_file: Path) -> OnDevice:
    return OnDevice.open(onnx_file, cuda_graphs=True)


def test_graphs_of_several_shapes_replay_on_new_images(graph: EncoderGraph, captured: OnDevice) -> None:
    for _ in range(3):  # captured, replayed, replayed again
        assert faults(graph, from_tensors(captured.tensors), counts=(1, 4, 16)) == []

    def arrays(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(captured.outputs, captured(list(captured.outputs), {"images": pixels}), strict=True))

    assert faults(graph, arrays, counts=(2, 4)) == []
    assert faults(graph, from_tensors(captured.tensors), counts=(4,)) == []


@pytest.mark.parametrize("how", ["arrays", "tensors", "captured"])
def test_threads_do_not_mix_their_images(how: str, onnx_file: Path, captured: OnDevice) -> None:
    plain = OnDevice(create_session(onnx_file, "cuda"))
    wrong: list[int] = []

    def run(pixels: np.ndarray) -> np.ndarray:
        if how == "arrays":
            return plain(["embedding"], {"images": pixels})[0]
        tensors = (captured if how == "captured" else plain).tensors
        found: np.ndarray = tensors(torch.from_numpy(pixels).cuda(), ["embedding"])["embedding"].cpu().numpy()
        return found

    def work(seed: int) -> None:
        pixels = images(4, seed)
        expected = plain(["embedding"], {"images": pixels})[0]
        for _ in range(20):
            if not np.allclose(run(pixels), expected, rtol=1e-4, atol=1e-4):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_float16_keeps_its_margin_on_cuda(graph: EncoderGraph, tmp_path: Path) -> None:
    opened = formats.get("onnx").load(write(graph, "onnx", "fp16", tmp_path), RunOptions("cuda"))
    assert separation_margin(opened(images(64))["embedding"], graph.run(images(64))["embedding"]) < 0.25


def test_an_export_is_compared_on_cuda_too(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    bundle = export(tiny_run, formats=("onnx",), out=tmp_path / "bundle", data=fashion)
    assert any("provider cuda" in row["subject"] for row in bundle.manifest.artefacts[0].parity["rows"])
    assert verify(bundle.path, against=tiny_run, data=fashion).passed
    assert Encoder(bundle.path, provider="cuda")(sorted(fashion.rglob("*.png"))[:3]).shape[0] == 3


def test_onnx_runtimes_tensorrt_provider(graph: EncoderGraph, onnx_file: Path) -> None:
    there, why = probe_provider("tensorrt")
    if not there:
        pytest.skip(f"the TensorRT provider: {why}")
    assert faults(graph, from_tensors(OnDevice(create_session(onnx_file, "tensorrt")).tensors), counts=(4,)) == []


# --- TensorRT itself ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine_file(graph: EncoderGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt")
    return write(graph, "tensorrt", "fp32", tmp_path_factory.mktemp("tensorrt"))


def test_an_engine_in_float32_is_float32(graph: EncoderGraph, engine_file: Path) -> None:
    assert formats.get("tensorrt").runs_here() == ""
    opened = formats.get("tensorrt").load(engine_file, RunOptions())
    assert faults(graph, opened) == []
    assert faults(graph, from_tensors(opened.session), counts=(1, 32)) == []


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_engine_of_reduced_precision_keeps_its_margin(precision: str, graph: EncoderGraph, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    opened = formats.get("tensorrt").load(write(graph, "tensorrt", precision, tmp_path), RunOptions())
    margin = separation_margin(opened(images(64))["embedding"], graph.run(images(64))["embedding"])
    # Noise images, and int8 without a search for layers that must stay in float.
    assert margin < (0.25 if precision == "fp16" else 0.5)


def test_an_engine_of_a_graph_that_it_cannot_take(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    from byol_deploy.formats._tensorrt_engine import build

    (tmp_path / "x.onnx").write_bytes(b"nothing of that kind")
    with pytest.raises(ExportError, match="cannot take this graph"):
        build(tmp_path / "x.onnx", "images", [[1, 8, 8, 3]] * 3)
