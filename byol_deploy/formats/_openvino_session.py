"""Runs an OpenVINO model: numbers of images that come often have a compiled form of their own, with a fixed shape.

With the number of images left open the runtime infers every shape again in each call and keeps some operators apart
that it fuses otherwise; a fixed shape is 5 to 20 % faster (docs/experiments.md). A batch can further be cut into parts
that run side by side, one on each share of the cores, which saves the threads of one part from waiting for each other
behind every operator. Each form holds weights of its own and takes the time of an opening, so that forms are compiled
when they are first needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Session:
    """An ``openvino.Model`` that runs on the CPU.

    Args:
        core: The entry to the runtime.
        model: The model, its first dimension open.
        settings: Of ``compile_model``.
        batches: Numbers of images with a fixed shape. Larger numbers are run in parts of the largest, and what is left
            over with an open shape.
        streams: Parts of such a batch that run side by side, where they divide it.

    Raises:
        RuntimeError: The runtime cannot compile the model. The first form is compiled at once.
    """

    def __init__(
        self, core: Any, model: Any, settings: Mapping[str, Any], batches: Sequence[int] = (), streams: int = 1
    ) -> None:
        self._core, self._model, self._settings = core, model, dict(settings)
        self.batches, self.streams = tuple(sorted(set(batches))), streams
        self._lock = threading.Lock()
        self._forms: dict[tuple[int | None, int], Any] = {}
        self._local = threading.local()  # a request holds the memory of one caller's outputs
        self.compiled = self._form(*self._cut(self.batches[0] if self.batches else None))
        """The form that was compiled first, for those who need the runtime's own object."""

    def run(self, images: np.ndarray, names: Sequence[str] | None) -> dict[str, np.ndarray]:
        """The outputs of these names, or all, for (N, H, W, 3) uint8, N from 1."""
        done = [self._whole(images[start:stop], size, names) for start, stop, size in self._parts(len(images))]
        return done[0] if len(done) == 1 else {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    def _parts(self, count: int) -> Iterator[tuple[int, int, int | None]]:
        """Where each part starts and ends, and its fixed number of images."""
        start = 0
        while start < count:
            left = count - start
            # Single images one after the other would be slower than all of them with an open shape.
            fitting = [size for size in self.batches if 1 < size <= left or size == left]
            size = fitting[-1] if fitting else None
            yield start, start + (size or left), size
            start += size or left

    def _cut(self, size: int | None) -> tuple[int | None, int]:
        """The shape and the number of parts that a batch of ``size`` is run with."""
        if size is None or self.streams == 1 or size % self.streams:
            return size, 1
        return size // self.streams, self.streams

    def _whole(self, images: np.ndarray, size: int | None, names: Sequence[str] | None) -> dict[str, np.ndarray]:
        shape, parts = self._cut(size)
        requests, ports = self._requests(shape, parts)
        # Set apart from the call: handed over with it, the wrapper first asks the request for all of its inputs, which
        # takes 5 % of the time of a small encoder.
        tensors = [_tensor(given) for given in np.split(images, parts)]  # they own the memory while the request runs
        for request, tensor in zip(requests, tensors, strict=True):
            request.set_input_tensor(tensor)
        if parts == 1:
            requests[0].infer(share_outputs=True)
        else:
            for request in requests:
                request.start_async()
            for request in requests:
                request.wait()
        wanted = ports if names is None else names
        # Copied, because the next call writes into the same memory.
        return {name: np.concatenate([request.get_tensor(ports[name]).data for request in requests])
                for name in wanted}  # fmt: skip

    def _requests(self, shape: int | None, parts: int) -> tuple[list[Any], dict[str, Any]]:
        """This thread's requests for a form, and the form's outputs by name."""
        mine: dict[tuple[int | None, int], tuple[list[Any], dict[str, Any]]]
        mine = self._local.__dict__.setdefault("requests", {})
        if (shape, parts) not in mine:
            compiled = self._form(shape, parts)
            ports = {port.any_name: port for port in compiled.outputs}
            mine[shape, parts] = [compiled.create_infer_request() for _ in range(parts)], ports
        return mine[shape, parts]

    def _form(self, shape: int | None, parts: int) -> Any:
        with self._lock:
            if (shape, parts) not in self._forms:
                model = self._model
                if shape is not None:
                    model = model.clone()
                    model.reshape([shape, *list(model.inputs[0].partial_shape)[1:]])
                aim = "LATENCY" if parts == 1 else "THROUGHPUT"
                settings = self._settings | {"PERFORMANCE_HINT": aim, "NUM_STREAMS": parts}
                self._forms[shape, parts] = self._core.compile_model(model, "CPU", settings)
            return self._forms[shape, parts]


def _tensor(images: np.ndarray) -> Any:
    """The pixels where they lie. The runtime takes no memory that may only be read: these are copied."""
    import openvino

    return openvino.Tensor(images if images.flags.writeable else images.copy(), shared_memory=True)
