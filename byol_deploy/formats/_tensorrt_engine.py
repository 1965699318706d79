"""The part of TensorRT that needs an NVIDIA GPU: build a plan, and run it on buffers that stay on the device.

Written against TensorRT 10 and 11. Networks are strongly typed in both, so precision is what the ONNX file says, and
TF32, which would round float32 to 10 bits, is off.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import ExportError, ProviderError


def build(path: Path, input_name: str, shapes: Sequence[Sequence[int]]) -> bytes:
    """Build a plan for the GPU of this machine, which takes a while.

    Args:
        path: The prepared ONNX file.
        input_name: Name of its input.
        shapes: Its smallest, usual and largest shape.

    Returns:
        The plan: machine code for this kind of GPU and this version of TensorRT.

    Raises:
        ExportError: TensorRT cannot take the graph; the message names the node where TensorRT does.
    """
    import tensorrt

    said: list[str] = []

    class Log(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                said.append(message)

    def refused() -> ExportError:
        words = " ".join(" ".join(said).split())[:300] or "it gave no reason"
        return ExportError(f"TensorRT {tensorrt.__version__} cannot take this graph: {words}")

    log = Log()
    builder = tensorrt.Builder(log)
    # TensorRT 11 has no other kind of network, and may one day drop the word for it.
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        said += [parser.get_error(place).desc() for place in range(parser.num_errors)]
        raise refused()
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape(input_name, *map(tuple, shapes))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refused()
    return bytes(plan)


class Engine:
    """A plan on a GPU. Threads may share it: each has a context and a stream of its own.

    Args:
        plan: What :func:`build` gave, on this machine.
        largest: The largest batch of its profile.
        device: ``torch.device`` of the GPU.
    """

    def __init__(self, plan: bytes, largest: int, device: Any) -> None:
        import tensorrt

        self.largest, self.device = largest, device
        self._log = tensorrt.Logger(tensorrt.Logger.ERROR)
        self._runtime = tensorrt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ProviderError(f"TensorRT {tensorrt.__version__} does not open the plan that it built; try again")
        names = [self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)]
        taken = [self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT for name in names]
        (self.input,) = (name for name, is_input in zip(names, taken, strict=True) if is_input)
        self.outputs = tuple(name for name, is_input in zip(names, taken, strict=True) if not is_input)
        self._local = threading.local()

    def __call__(self, images: Any) -> dict[str, Any]:
        """Compute on the device: nothing is copied to or from the host, and nothing is waited for.

        Args:
            images: (N, H, W, 3) uint8 tensor on this device, contiguous, N at most ``largest``.

        Returns:
            Tensors (N, D) float32 on this device by output name, ready when the current stream is.
        """
        import torch

        context = getattr(self._local, "context", None)
        if context is None:
            context = self._local.context = self._engine.create_execution_context()
        stream = torch.cuda.current_stream(self.device)
        _did(context.set_input_shape(self.input, tuple(images.shape)), f"a batch of {len(images)}")
        _did(context.set_tensor_address(self.input, images.data_ptr()), "the address of the images")
        values = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            values[name] = torch.empty(shape, dtype=torch.float32, device=self.device)
            _did(context.set_tensor_address(name, values[name].data_ptr()), f"the address of {name}")
        _did(context.execute_async_v3(stream.cuda_stream), "the run")
        return values

    def from_host(self, images: np.ndarray, names: Sequence[str] | None) -> Mapping[str, np.ndarray]:
        """The same for any number of images (N, H, W, 3) uint8 in the host's memory."""
        import torch

        stream = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        wanted = self.outputs if names is None else names
        parts: list[dict[str, np.ndarray]] = []
        with torch.cuda.stream(stream):
            for start in range(0, len(images), self.largest):
                chunk = np.require(images[start : start + self.largest], requirements=["C", "W"])
                values = self(torch.from_numpy(chunk).to(self.device))
                parts.append({name: values[name].cpu().numpy() for name in wanted})  # waits for the stream
        return {name: np.concatenate([part[name] for part in parts]) for name in wanted}


def _did(worked: bool, what: str) -> None:
    if not worked:
        raise RuntimeError(f"TensorRT did not accept {what}")
