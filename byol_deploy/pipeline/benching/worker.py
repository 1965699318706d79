"""One file, opened in a process of its own and told over a pipe what to do: what ``bench`` measures.

**Why a process each.** In production a process holds one engine. In a process that holds several, each brings threads,
allocators and settings (PyTorch's number of threads, denormals, the first OpenMP library that was loaded) that change
what the others take, memory cannot be told apart at all, and a crash ends everything. So each file has a process, and
only one of them works at a time: the others wait for a line on their pipe. Threads that wait busily would still take
the cores from the next one; a block of calls therefore ends when the process has come to rest, see
:func:`byol_deploy.bench.wait_until_quiet`. Spinning itself stays switched on, as it is in production.

The program is this file, run by its path (``python -P worker.py``): as a module of the package it would first import
the whole pipeline, which a deployed process does not, and the start would be too slow and the memory too much.

A message is one line of JSON; the arrays that it names follow as plain bytes. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

BASELINES = ("eager", "compile", "torchscript")
"""PyTorch itself: as it is, ``torch.compile``, and traced and frozen TorchScript."""


def send(stream: IO[bytes], message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Write one message."""
    packed = {name: array.tobytes() for name, array in (arrays or {}).items()}
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in (arrays or {}).items()]
    stream.write(json.dumps({**message, "arrays": listed}).encode() + b"\n")
    for content in packed.values():
        stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read one message and its arrays.

    Raises:
        EOFError: The other side is gone.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message: dict[str, Any] = json.loads(line)
    arrays = {}
    for name, kind, shape in message.pop("arrays"):
        import numpy as np

        array: np.ndarray = np.empty(shape, np.dtype(kind))
        if stream.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
            raise EOFError
        arrays[name] = array
    return message, arrays


def peak_bytes() -> int | None:
    """The most memory that this process has had resident so far; None where the system does not tell.

    Linux's ``ru_maxrss`` begins at what the parent had when it started the process, so it is not asked there.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = [line for line in file if line.startswith("VmHWM:")]
        if found:
            return 1024 * int(found[0].split()[1])
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)


Run = Callable[[Any], dict[str, Any]]


class _Served:
    """What one process holds: a file, or a baseline; opened once for each number of threads."""

    def __init__(self, what: Mapping[str, Any]) -> None:
        self.what = what
        self.images: Any = None
        self.opened: dict[int, Run] = {}
        self._graph: Any = None

    def load_engine(self) -> None:
        """Import what runs the file, and nothing else."""
        from importlib import import_module

        for package in self.what["imports"]:
            import_module(package)

    def open(self, threads: int) -> str:
        """Open it with this number of threads; says where it runs."""
        self._settle(threads)
        if "baseline" in self.what:
            self.opened[threads] = self._baseline()
            return "cpu"
        from pathlib import Path

        from byol_deploy import formats

        given = self.what.get("options", {})
        options = formats.RunOptions(threads=threads, **{**given, "batches": tuple(given.get("batches", ()))})
        found = formats.get(self.what["format"]).load(Path(self.what["path"]), options)
        self.opened[threads] = found
        return found.provider

    def run(self, threads: int, images: Any) -> dict[str, Any]:
        """All outputs by name."""
        self._settle(threads)
        return self.opened[threads](images)

    def time(self, threads: int, batch: int, calls: int) -> list[float]:
        """Wall times of calls in a row, in milliseconds."""
        from byol_deploy.bench import time_block

        self._settle(threads)
        run, images = self.opened[threads], self.images[:batch]
        return time_block(lambda: run(images), calls)

    def _settle(self, threads: int) -> None:
        """PyTorch has one number of threads for the whole process; other engines have it in the session."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def _baseline(self) -> Run:
        import torch

        from byol_deploy.graph import EncoderGraph
        from byol_deploy.preprocess import Preprocessing
        from byol_deploy.training.checkpoints import load_checkpoint

        if self._graph is None:
            what = self.what
            loaded = load_checkpoint(
                what["checkpoint"], backbone=what["backbone"], trust_backbone=what["trust_backbone"]
            )
            self._graph = EncoderGraph(loaded.model, Preprocessing.from_dict(what["preprocessing"]), what["outputs"])
        graph, names = self._graph, tuple(self.what["outputs"])
        call: Any = graph
        if self.what["baseline"] == "compile":
            import torch._dynamo

            for limit in ("recompile_limit", "cache_size_limit"):  # the older name of the same number
                if hasattr(torch._dynamo.config, limit):
                    # One piece of code for each batch size and number of threads; beyond the limit it is eager again.
                    setattr(torch._dynamo.config, limit, 64)
            call = torch.compile(graph, dynamic=False)
        elif self.what["baseline"] == "torchscript":
            call = self._traced(graph)

        def run(images: Any) -> dict[str, Any]:
            with torch.inference_mode():
                values = call(torch.from_numpy(images))
            return {name: value.numpy() for name, value in zip(names, values, strict=True)}

        return run

    def _traced(self, graph: Any) -> Any:
        import warnings

        import torch

        example = torch.zeros((3, graph.size_px, graph.size_px, 3), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated is known
            return torch.jit.freeze(torch.jit.trace(graph, (example,), check_trace=False))  # type: ignore[no-untyped-call]


def serve(commands: IO[bytes], answers: IO[bytes]) -> None:
    """Do what the pipe says until it is closed."""
    what, _ = receive(commands)
    if not what.get("imports"):
        # The zero: a process that opens nothing.
        send(answers, {"peak_bytes": peak_bytes()})
        return
    import numpy  # noqa: F401

    if "baseline" not in what:
        from byol_deploy import formats  # noqa: F401
    ready = time.perf_counter()
    served = _Served(what)
    try:
        served.load_engine()
    except Exception as error:
        send(answers, _fault(error))
        return
    send(answers, {"import_s": time.perf_counter() - ready})
    while True:
        try:
            message, arrays = receive(commands)
        except EOFError:
            return
        try:
            began = time.perf_counter()
            found: dict[str, Any] = {}
            outputs: Mapping[str, Any] = {}
            if message["do"] == "images":
                served.images = arrays["images"]
            elif message["do"] == "open":
                found["provider"] = served.open(message["threads"])
            elif message["do"] == "run":
                outputs = served.run(message["threads"], arrays["images"])
            elif message["do"] == "time":
                found["times_ms"] = served.time(message["threads"], message["batch"], message["calls"])
            found |= {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes()}
            send(answers, found, outputs)
        except Exception as error:
            # Whatever an engine raises is told, and the other files go on.
            send(answers, _fault(error))


def _fault(error: Exception) -> dict[str, Any]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {"error": lines[0][:400] if lines else type(error).__name__, "kind": type(error).__name__}


def main() -> None:
    """Serve on stdin and stdout. What engines print there goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
    answers.flush()
    # Some engines wait for their threads, or crash, when Python takes them apart; all that matters has been said.
    os._exit(0)


if __name__ == "__main__":
    main()
