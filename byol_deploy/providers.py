"""ONNX Runtime as it really is on this machine: cores, execution providers, sessions.

``onnxruntime.get_available_providers()`` names what a build was compiled with, CUDA on machines without a GPU too, and
a session that cannot have the provider it was asked for falls back to the CPU with a line in a log. Here a provider
counts when it computed something, and a session runs where it was asked to run or is not made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import onnxruntime

from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, ProviderError, UsageError
from byol_deploy.images import printable

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# Listed by builds, but no choice for "auto": they compile an engine for minutes, or send the data elsewhere.
NEVER_AUTOMATIC = {"TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider", "AzureExecutionProvider"}
_NVIDIA = {CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"}
_OPTIMIZATION = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FATAL_ONLY = 4
_CUDA_NO_DEVICE = 100


def provider_name(name: str) -> str:
    """ONNX Runtime's name of a provider: "cuda" gives "CUDAExecutionProvider", full names stay.

    Raises:
        UsageError: ONNX Runtime knows no such provider.
    """
    known = onnxruntime.get_all_providers()
    for full in known:
        if name.lower() in (full.lower(), short_name(full)):
            return str(full)
    shown = ", ".join(sorted({short_name(full) for full in known}))
    raise UsageError(f"provider {name!r} is not one that ONNX Runtime knows; use auto, {shown}")


def short_name(full: str) -> str:
    """The short name of a provider: "CUDAExecutionProvider" gives "cuda"."""
    return full.removesuffix("ExecutionProvider").lower()


def probe_provider(name: str) -> tuple[bool, str]:
    """Find out by trying whether an execution provider works here. The answer is kept for the life of the process.

    A two-line model is run with the provider alone, the CPU's help switched off. Nothing is written to stderr.

    Args:
        name: "cpu", "cuda", ... or ONNX Runtime's own name.

    Returns:
        Whether it works, and in words why not, or that it computed.

    Raises:
        UsageError: ONNX Runtime knows no such provider.
    """
    return _probe(provider_name(name))


def working_providers() -> list[str]:
    """The providers of this build that really work here, best first. The CPU is always the last."""
    return [name for name in onnxruntime.get_available_providers() if probe_provider(name)[0]]


@functools.cache
def _probe(full: str) -> tuple[bool, str]:
    if full not in onnxruntime.get_available_providers():
        wanted = " (the package onnxruntime-gpu has it, in place of onnxruntime)" if full == CUDA else ""
        return False, f"this build of ONNX Runtime {onnxruntime.__version__} does not contain it{wanted}"
    if full in _NVIDIA:
        missing = _missing_driver()
        if missing:
            return False, missing
        _preload_cuda()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if full != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    failure: Exception | None = None
    with _captured_stderr() as log:
        try:
            session = onnxruntime.InferenceSession(doubling_model(), options, providers=[full], enable_fallback=0)
            (doubled,) = session.run(None, {"x": np.array([1.5], np.float32)})
        except Exception as error:
            # Providers come as plug-ins, and raise whatever their libraries make of a machine that lacks something.
            failure = error
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    if failure is not None:
        return False, _in_words(f"{said}\n{failure}")
    if session.get_providers()[0] != full:
        return False, _in_words(said)
    if doubled.tolist() != [3.0]:
        return False, f"it computes wrongly: 2 x 1.5 gave {doubled.tolist()}"
    return True, "it computed a test model"


def create_session(
    model: str | os.PathLike[str] | bytes,
    provider: str = "cpu",
    threads: int | None = None,
    optimization: str | None = None,
    *,
    allow_spinning: bool = True,
    channels_last: bool = False,
    provider_options: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Make a session that runs on the provider that was asked for.

    Args:
        model: Path or bytes of an ONNX model.
        provider: "cpu", "cuda", ONNX Runtime's own name, or "auto" for the best that works here;
            ``session.get_providers()[0]`` says which one that is. On CUDA, TF32 is off: it would round to 10 bits.
        threads: Threads inside an operator; None takes :func:`usable_cores`. Operators run one after another.
        optimization: Graph optimisation: "none", "basic", "extended" or "all" (None).
        allow_spinning: Whether idle threads wait busily for the next operator. That gives the least latency, and costs
            a core's time where several processes or other work share the cores: switch it off there.
        channels_last: Whether convolutions run so on CUDA, which takes effect there alone. On an H200 float16 gains a
            twentieth (batch 64) to a half (batch 1) by it, and float32 loses up to 7 % (benchmarks/results/gpu.md).
        provider_options: Further options of the provider, e.g. ``{"enable_cuda_graph": "1"}``.

    Raises:
        BundleError: Not an ONNX model, damaged, or without its external data.
        ProviderError: The provider does not work here. The message says why.
        UsageError: An unknown provider or optimisation, or fewer than one thread.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads is {threads!r}; use a whole number from 1, e.g. {usable_cores()}")
    if optimization not in (None, *_OPTIMIZATION):
        raise UsageError(f"optimization is {optimization!r}; use one of {', '.join(_OPTIMIZATION)}")
    full = _best() if provider == "auto" else provider_name(provider)
    works, reason = _probe(full)
    if not works:
        raise ProviderError(
            f"provider {provider} does not work here: {reason}; use --provider cpu, or see byol-deploy doctor"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = _OPTIMIZATION[optimization or "all"]
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning else "0")
    cuda = {"use_tf32": "0", "prefer_nhwc": str(int(channels_last))}
    chosen = (cuda if full == CUDA else {}) | dict(provider_options or {})
    providers: list[Any] = [full] if full == CPU else [(full, chosen), CPU]
    source = model if isinstance(model, bytes) else os.fspath(model)
    name = "the model" if isinstance(model, bytes) else printable(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise _not_loadable(error, name) from error
    if session.get_providers()[0] != full:
        active = ", ".join(session.get_providers())
        raise ProviderError(f"{name} would run on {active}, not on {full} as asked; use --provider cpu")
    return session


def _best() -> str:
    for name in onnxruntime.get_available_providers():
        if name not in NEVER_AUTOMATIC and _probe(name)[0]:
            return str(name)
    return CPU


def _not_loadable(error: Exception, name: str) -> Exception:
    text = str(error)
    again = "copy or export it again"
    if "external" in text.lower() or ("filesystem error" in text.lower() and "file_size" in text):
        return BundleError(
            f"{name} keeps its weights in a second file, which is missing or too short beside it; "
            f"copy the .data file of the export into the same folder ({_last_words(text)})"
        )
    kind = type(error).__name__
    if kind in ("InvalidProtobuf", "NoModel", "NoSuchFile"):
        what = "does not exist" if kind == "NoSuchFile" else "is not an ONNX file, or one that was cut off"
        return BundleError(f"{name} {what}; {again}")
    if kind in ("InvalidGraph", "InvalidArgument", "Fail", "NotImplemented", "RuntimeException", "ModelLoadCanceled"):
        return BundleError(
            f"{name} cannot be run by ONNX Runtime {onnxruntime.__version__}: {_last_words(text)}; {again}"
        )
    return error


def _last_words(text: str) -> str:
    return " ".join(re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text).split())[:300]


def _missing_driver() -> str:
    """Why the NVIDIA driver cannot be used, in words; empty when it can."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"there is no NVIDIA driver on this machine ({library} is not found)"
    status = driver.cuInit(0)
    if status == _CUDA_NO_DEVICE:
        return "the NVIDIA driver finds no GPU (CUDA error 100)"
    if status:
        return f"the NVIDIA driver does not start (CUDA error {status}); try nvidia-smi"
    return ""


def _preload_cuda() -> None:
    """Load the CUDA libraries that pip installed (PyTorch's, for example), where ONNX Runtime does not look itself."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        # It prints to stdout, which belongs to data here. What stays missing shows in the probe.
        with contextlib.redirect_stdout(None), contextlib.suppress(RuntimeError):
            preload()


@contextlib.contextmanager
def _captured_stderr() -> Iterator[IO[bytes]]:
    """Collect what native code writes to stderr. (ONNX Runtime logs from C++, and tells the reason only there.)"""
    with tempfile.TemporaryFile() as log:
        try:
            saved = os.dup(2)
        except OSError:  # a daemon may have closed it
            yield log
            return
        try:
            os.dup2(log.fileno(), 2)
            yield log
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _in_words(said: str) -> str:
    library = re.search(r"([\w.+-]+\.(?:so[\w.]*|dll|dylib)): cannot open shared object file", said)
    if library:
        found = library.group(1)
        hint = {"libcurand": "nvidia-curand", "libcudnn": "nvidia-cudnn-cu13", "libcufft": "nvidia-cufft"}
        package = next((name for part, name in hint.items() if found.startswith(part)), "")
        return f"the library {found} is missing" + (f" (the package {package} brings it)" if package else "")
    if "no CUDA-capable device" in said:
        return "there is no GPU that CUDA can use"
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in said.splitlines()]
    return next((_last_words(line) for line in reversed(lines) if line), "it gave no reason")


def doubling_model() -> bytes:
    """The ONNX model y = x + x over one float, written by hand: no package that writes ONNX is needed.

    A ModelProto is a protobuf message: fields one after another, each a key byte (number << 3 | wire type) and then a
    varint (type 0), or a length and that many bytes (type 2). All lengths here are below 128, so one byte holds each.
    Field numbers are those of onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
    """

    def varint(number: int, value: int) -> bytes:
        return struct.pack("BB", number << 3, value)

    def block(number: int, content: bytes) -> bytes:
        return struct.pack("BB", number << 3 | 2, len(content)) + content

    one_float = block(1, varint(1, 1) + block(2, block(1, varint(1, 1))))  # TypeProto.tensor: float, shape [1]
    value = {name: block(1, name) + block(2, one_float) for name in (b"x", b"y")}  # ValueInfoProto: name, type
    node = block(1, b"x") + block(1, b"x") + block(2, b"y") + block(4, b"Add")  # NodeProto: input, output, op_type
    graph = block(1, node) + block(2, b"g") + block(11, value[b"x"]) + block(12, value[b"y"])  # node, name, in, out
    return varint(1, 8) + block(7, graph) + block(8, varint(2, 14))  # ir_version 8, graph, opset 14
