"""ONNX Runtime on a GPU with inputs and outputs that stay there (IO binding), and with CUDA graphs.

``session.run`` allocates on the device and copies both ways at every call. Here each batch size has buffers of its own
that stay, and who has a tensor on the device already copies nothing at all::

    run = OnDevice.open("bundle/model.onnx")      # or OnDevice(encoder.session)
    embedding = run.tensors(images)["embedding"]  # (N, H, W, 3) uint8 and (N, D) float32, both torch tensors on cuda

A CUDA graph replays all kernels of one shape with a single launch, which helps small batches, where launching costs
more than computing. The whole model must be on the GPU for it, and each shape costs memory; so it is asked for, never
automatic.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from byol_deploy.errors import UsageError

_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
_SHAPES = 4
"""How many batch sizes keep their buffers, for each thread."""
_NOT_CAPTURED = "-1"
_FLOAT = "tensor(float)"

Runner = Callable[[Sequence[str], Mapping[str, np.ndarray]], Sequence[np.ndarray]]


def runner(session: Any) -> Runner:
    """What takes the place of ``session.run``: on a GPU the same call with buffers that stay there."""
    run: Runner = OnDevice(session) if session.get_providers()[0] in _ON_CUDA else session.run
    return run


class _Slot(NamedTuple):
    """Buffers on the device for one batch size, and the binding that names them."""

    binding: Any
    taken: Any
    given: dict[str, Any]
    options: Any


class OnDevice:
    """Runs a session on buffers of its device. May be called from several threads at once.

    Args:
        session: An ``onnxruntime.InferenceSession`` of one input.
        device: ONNX Runtime's and PyTorch's name of the kind of device.
        index: Which one of that kind.
        captured: Whether the session was opened for CUDA graphs, see :meth:`open`.
    """

    def __init__(self, session: Any, device: str = "cuda", index: int = 0, *, captured: bool = False) -> None:
        self.session = session
        (taken,) = session.get_inputs()
        self.input = str(taken.name)
        # A foreign file may leave its widths open or give other types: then the runtime allocates.
        self.outputs = {
            str(port.name): tuple(port.shape[1:]) if port.type == _FLOAT and _is_fixed(port.shape[1:]) else None
            for port in session.get_outputs()
        }
        self._device, self._index, self._captured = device, index, captured
        self._local = threading.local()
        self._lock = threading.Lock()
        self._graphs: dict[tuple[int, ...], _Slot] = {}
        self._numbers = itertools.count(1)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, outputs: Sequence[str] | None = None, cuda_graphs: bool = False
    ) -> OnDevice:
        """Open an ONNX file on the GPU.

        Args:
            path: The file, e.g. ``bundle/model.fp16.onnx``.
            outputs: Those that are computed; None is all. What only the others need is not computed, whereas a session
                of all outputs computes all, whichever a call asks for.
            cuda_graphs: Whether each batch size becomes a CUDA graph, with buffers that it keeps. On an H200 that took
                .4 of the time in float16 at batch 1, and .94 at batch 64 (benchmarks/results/gpu.md, ResNet-18).

        Raises:
            BundleError: It is damaged, or with ``cuda_graphs`` a part of it cannot run on the GPU.
            ProviderError: CUDA does not work here.
        """
        from byol_deploy.formats import _onnx_file
        from byol_deploy.providers import create_session

        graphs = {"enable_cuda_graph": "1"} if cuda_graphs else {}
        channels_last = _onnx_file.holds_float16(Path(path))
        part = None if outputs is None else _onnx_file.with_outputs(Path(path), outputs)
        source = path if part is None else part
        session = create_session(source, "cuda", channels_last=channels_last, provider_options=graphs)
        return cls(session, captured=cuda_graphs)

    def __call__(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """As ``session.run``: arrays in the host's memory, copied to and from buffers that stay on the device."""
        images = np.ascontiguousarray(feed[self.input])
        slots: OrderedDict[tuple[Any, ...], _Slot] = self._local.__dict__.setdefault("slots", OrderedDict())
        key = (images.dtype, images.shape, *names)
        if key not in slots:
            slots[key] = self._host_slot(images, names)
            while len(slots) > _SHAPES:
                slots.popitem(last=False)
        slots.move_to_end(key)
        slot = slots[key]
        slot.taken.update_inplace(images)
        self.session.run_with_iobinding(slot.binding, slot.options)
        if not slot.given:
            return [np.array(values) for values in slot.binding.copy_outputs_to_cpu()]
        # Copied where the buffers lie in the host's memory already: the next call writes into them.
        return [np.array(slot.given[name].numpy()) for name in names]

    def tensors(self, images: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Compute on the device; nothing is copied to or from the host.

        Args:
            images: (N, H, W, 3) uint8 torch tensor on this device.
            names: Outputs; None is all.

        Returns:
            (N, D) float32 torch tensors on this device by output name. They are the caller's.

        Raises:
            UsageError: The tensor lies elsewhere, or is of another type.
        """
        import torch

        where = torch.device(self._device, self._index) if self._device != "cpu" else torch.device("cpu")
        if images.device != where or images.dtype != torch.uint8:
            raise UsageError(f"the images are {images.dtype} on {images.device}; move them: images.to({str(where)!r}), "
                             "as torch.uint8")  # fmt: skip
        images = images.contiguous()
        if where.type == "cuda":
            torch.cuda.current_stream(where).synchronize()  # the runtime has a stream of its own
        wanted = tuple(self.outputs if names is None else names)
        if not self._captured:
            slot = self._tensor_slot(images, wanted, _NOT_CAPTURED)
            self.session.run_with_iobinding(slot.binding, slot.options)
            return slot.given
        with self._lock:  # a graph has one set of buffers
            shape = tuple(images.shape)
            if shape not in self._graphs:
                buffer = torch.empty_like(images)
                self._graphs[shape] = self._tensor_slot(buffer, tuple(self.outputs), str(next(self._numbers)))
            slot = self._graphs[shape]
            slot.taken.copy_(images)
            if where.type == "cuda":
                torch.cuda.current_stream(where).synchronize()
            self.session.run_with_iobinding(slot.binding, slot.options)
            copies = {name: slot.given[name].clone() for name in wanted}
            if where.type == "cuda":
                torch.cuda.current_stream(where).synchronize()  # before another thread writes into the buffers
            return copies

    def _host_slot(self, images: np.ndarray, names: Sequence[str]) -> _Slot:
        from onnxruntime import OrtValue

        def buffer(shape: Sequence[int], kind: Any) -> Any:
            return OrtValue.ortvalue_from_shape_and_type(list(shape), kind, self._device, self._index)

        binding, taken = self.session.io_binding(), buffer(images.shape, images.dtype.type)
        binding.bind_ortvalue_input(self.input, taken)
        widths = {name: self.outputs[name] for name in names}
        given = {name: buffer((len(images), *width), np.float32) for name, width in widths.items() if width is not None}
        if len(given) < len(widths):
            given = {}
        for name in names:
            if given:
                binding.bind_ortvalue_output(name, given[name])
            else:
                binding.bind_output(name, self._device, self._index)
        return _Slot(binding, taken, given, self._options(_NOT_CAPTURED))

    def _tensor_slot(self, images: Any, names: Sequence[str], number: str) -> _Slot:
        import torch

        binding = self.session.io_binding()
        binding.bind_input(self.input, self._device, self._index, np.uint8, list(images.shape), images.data_ptr())
        given = {}
        for name in names:
            width = self.outputs[name]
            if width is None:
                raise UsageError(f"the output {name} is not float32 of a fixed width; run this file with session.run")
            shape = [len(images), *width]
            given[name] = torch.empty(shape, dtype=torch.float32, device=images.device)
            binding.bind_output(name, self._device, self._index, np.float32, shape, given[name].data_ptr())
        return _Slot(binding, images, given, self._options(number))

    def _options(self, number: str) -> Any:
        from onnxruntime import RunOptions

        if not self._captured:
            return None
        options = RunOptions()
        options.add_run_config_entry("gpu_graph_id", number)
        return options


def _is_fixed(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)
