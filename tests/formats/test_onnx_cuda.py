"""IO binding. The calls are the same for every device, so they are tried here with buffers in the host's memory.

What only a GPU shows is in tests/gpu/test_gpu_formats.py.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from byol_deploy import formats, providers
from byol_deploy.errors import ProviderError, UsageError
from byol_deploy.formats import RunOptions, _onnx_cuda
from byol_deploy.formats._onnx_cuda import OnDevice, runner
from byol_deploy.providers import create_session, probe_provider
from byol_deploy.quantization import Calibration

tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))
SIDE = 16
without_cuda = pytest.mark.skipif(probe_provider("cuda")[0], reason="CUDA works here; see tests/gpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle: Path = tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle", side=SIDE)
    return bundle / "model.onnx"


@pytest.fixture(scope="module")
def session(file: Path) -> Any:
    return create_session(file, threads=1)


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)


def test_the_same_call_as_session_run(session: Any) -> None:
    run = OnDevice(session, "cpu")
    names = list(run.outputs)
    kept = []
    for count in (1, 5, 2, 1, 9, 3, 8, 1):
        for wanted in (names, names[1:2]):
            feed = {"images": images(count, seed=count)[:, ::-1]}
            kept.append((run(wanted, feed), session.run(wanted, feed)))
    for found, expected in kept:  # compared at the end: no later call may have written into an earlier result
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_buffers_stay_and_are_few(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = OnDevice(session, "cpu")
    made = []
    slot = OnDevice._host_slot
    monkeypatch.setattr(OnDevice, "_host_slot", lambda *given: made.append(len(given[1])) or slot(*given))
    for count in (1, 2, 1, 2, 1):
        run(["embedding"], {"images": images(count)})
    assert made == [1, 2]
    for count in range(3, 3 + _onnx_cuda._SHAPES):
        run(["embedding"], {"images": images(count)})
    run(["embedding"], {"images": images(6)})
    assert made == [1, 2, *range(3, 3 + _onnx_cuda._SHAPES)]
    run(["embedding"], {"images": images(1)})
    assert made[-1] == 1, "the oldest went"
    assert len(run._local.slots) == _onnx_cuda._SHAPES


def test_threads_do_not_share_buffers(session: Any) -> None:
    run = OnDevice(session, "cpu")
    wrong = []

    def work(seed: int) -> None:
        feed = {"images": images(4, seed)}
        (expected,) = session.run(["embedding"], feed)
        for _ in range(30):
            if not np.array_equal(run(["embedding"], feed)[0], expected):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_foreign_file_of_other_types(file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    node = next(node for node in model.graph.node if model.graph.output[1].name in node.output)
    used = [other for other in model.graph.node if model.graph.output[1].name in other.input]
    node.output[0] = "before"
    for other in used:
        other.input[:] = ["before" if name == model.graph.output[1].name else name for name in other.input]
    cast = onnx.helper.make_node("Cast", ["before"], [model.graph.output[1].name], to=onnx.TensorProto.DOUBLE)
    model.graph.node.append(cast)
    onnx.save(model, tmp_path / "other.onnx")
    plain = create_session(tmp_path / "other.onnx", threads=1)
    run = OnDevice(plain, "cpu")
    names, feed = list(run.outputs), {"images": images(3)}
    for mine, theirs in zip(run(names, feed), plain.run(names, feed), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(UsageError, match="projection is not float32 of a fixed width"):
        run.tensors(torch.from_numpy(images(3)))


@pytest.mark.parametrize("captured", [False, True])
def test_tensors_are_taken_and_given_where_they_lie(session: Any, captured: bool) -> None:
    run = OnDevice(session, "cpu", captured=captured)
    kept = []
    for count in (2, 5, 2):
        pixels = images(count, seed=len(kept))[:, ::-1].copy()
        kept.append((run.tensors(torch.from_numpy(pixels)), session.run(None, {"images": pixels})))
    for found, expected in kept:
        assert list(found) == list(run.outputs)
        for mine, theirs in zip(found.values(), expected, strict=True):
            np.testing.assert_array_equal(mine.numpy(), theirs)
    assert list(run.tensors(torch.from_numpy(images(2)), ["prediction"])) == ["prediction"]


def test_each_shape_is_a_graph_of_its_own(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed under the number of another shape, a graph would read and write the other one's buffers."""
    run = OnDevice(session, "cpu", captured=True)
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(run, "session", Watched(session, asked))
    for count in (1, 4, 1):
        run.tensors(torch.from_numpy(images(count)))
    assert asked == ["1", "2", "1"]
    run(["embedding"], {"images": images(2)})
    assert asked[-1] == "-1", "arrays of the host are not captured"


class Watched:
    """A session that notes the number of the graph that is asked for."""

    def __init__(self, session: Any, asked: list[Any]) -> None:
        self._session, self._asked = session, asked
        self.io_binding = session.io_binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._asked.append(options.get_run_config_entry("gpu_graph_id"))
        self._session.run_with_iobinding(binding, options)


def test_a_tensor_elsewhere_or_of_another_type_is_refused(session: Any) -> None:
    run = OnDevice(session, "cpu")
    with pytest.raises(UsageError, match=r"torch\.float32 on cpu; move them"):
        run.tensors(torch.from_numpy(images(1)).float())
    with pytest.raises(UsageError, match="on meta; move them"):
        run.tensors(torch.from_numpy(images(1)).to("meta"))


@without_cuda
def test_the_cpu_keeps_session_run(session: Any, file: Path) -> None:
    assert runner(session) == session.run
    assert formats.get("onnx").load(file, RunOptions()).provider == "CPUExecutionProvider"
    with pytest.raises(ProviderError, match="provider cuda does not work here"):
        OnDevice.open(file, cuda_graphs=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_benchmark_measures_nothing_without_a_gpu(tmp_path: Path) -> None:
    script, out = Path(__file__).parents[2] / "benchmarks" / "gpu.py", tmp_path / "gpu.md"
    done = subprocess.run([sys.executable, str(script), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no NVIDIA GPU that PyTorch can use here: nothing was measured, and nothing written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_gpu_gets_bound_buffers(session: Any) -> None:
    class OnGpu:
        get_inputs, get_outputs = session.get_inputs, session.get_outputs

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    assert isinstance(runner(OnGpu()), OnDevice)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_float16_runs_channels_last_on_cuda(
    half: bool, captured: bool, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if half:
        reduced = tmp_path / "half.onnx"
        full = formats.get("onnx")
        full.reducer(None, None, file, "fp16", Calibration(images(16), "x86")).write(reduced, {}, "", ())
        file = reduced
    asked: list[Any] = []

    class Noting:
        """Stands in for a session on a GPU."""

        def __init__(self, source: Any, options: Any, *, providers: Any, **rest: Any) -> None:
            asked.append(providers)
            self._session = real(source, options, providers=["CPUExecutionProvider"], **rest)
            self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    real = providers.onnxruntime.InferenceSession
    monkeypatch.setattr(providers.onnxruntime, "InferenceSession", Noting)
    monkeypatch.setattr(providers, "_probe", lambda full: (True, "a stand-in"))
    if captured:
        run = OnDevice.open(file, outputs=["embedding"], cuda_graphs=True)
        assert list(run.outputs) == ["embedding"]
    else:
        formats.get("onnx").load(file, RunOptions("cuda"))
    (((name, options), last),) = asked
    assert (name, last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    graphs = {"enable_cuda_graph": "1"} if captured else {}
    assert options == {"use_tf32": "0", "prefer_nhwc": "1" if half else "0", **graphs}
