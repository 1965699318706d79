"""Where an encoder was compared, and what is different here: only what can change numbers or pixels.

A correct file gives slightly other numbers on another processor (other instruction sets add in another order), provider
or version, and another JPEG decoder gives pixels that are a level or two apart. A self-test that fails must name these,
because they are the likely reason; one that passes lists them for the record.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping

import numpy as np
import PIL
from PIL import features

from byol_deploy.cores import usable_cores
from byol_deploy.environment import RUNTIMES, cpu, gpus, installed_version

_CPU = "cpu"
# What can change numbers or pixels, in words. Not the number of cores (the threads say it), and not NumPy's version.
_TOLD = {
    "machine": "machine",
    "instructions": "instruction set",
    "system": "system",
    "provider": "provider",
    "gpu": "GPU",
    "threads": "threads",
    "optimization": "graph optimisation",
    "runtime": "runtime",
    "pillow": "Pillow",
    "jpeg": "JPEG decoder",
}


def describe_host(
    *, provider: str = _CPU, threads: int | None = None, optimization: str = "all", runtime: str = "onnxruntime"
) -> dict[str, str]:
    """Where and how a file runs, as short texts that can travel inside it. Works without PyTorch.

    Args:
        provider: Short name of the execution provider, e.g. "cpu", "cuda".
        threads: Threads inside an operator; None is what this process may use.
        optimization: Level of graph optimisation.
        runtime: The package that runs the file, e.g. "onnxruntime", "torch".

    Returns:
        machine, cpu, instructions (empty where they cannot be read), cores, system, provider, gpu (empty on the CPU),
        threads, optimization, runtime, numpy, pillow, jpeg (the decoder's version).
    """
    processor = cpu()
    names = [name for name, there in (processor["features"] or {}).items() if there]
    found = {
        "machine": platform.machine(),
        "cpu": str(processor["model"]),
        "instructions": ", ".join(names),
        "cores": str(processor["usable_cores"]),
        "system": platform.system(),
        "provider": provider,
        "gpu": "" if provider == _CPU else "; ".join(gpus()),
        "threads": str(threads or usable_cores()),
        "optimization": optimization,
        "runtime": f"{runtime} {_version(runtime)}",
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "jpeg": _jpeg_decoder(),
    }
    return {key: value[:200] for key, value in found.items()}


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """What can change numbers and is different here, one sentence each; empty when nothing is.

    Args:
        then: :func:`describe_host` on the exporting machine. Keys that it lacks are not compared.
        now: The same here.
    """
    said = []
    for key, what in _TOLD.items():
        before, here = then.get(key), now.get(key)
        if before is None or here is None or before == here:
            continue
        said.append(f"{what}: exported with {before or 'unknown'}; here {here or 'unknown'}")
    # Two processors with the same instruction sets take the same paths; without the list the name must do.
    blind = not then.get("instructions") or not now.get("instructions")
    if blind and then.get("cpu") and now.get("cpu") and then["cpu"] != now["cpu"]:
        said.append(f"processor: exported with {then['cpu']}; here {now['cpu']}")
    return tuple(said)


def _version(runtime: str) -> str:
    """The version of a runtime without importing it; builds of ONNX Runtime come as several distributions."""
    loaded = getattr(sys.modules.get(runtime), "__version__", None)
    if loaded is not None:
        return str(loaded)
    names = RUNTIMES if runtime in RUNTIMES else (runtime,)
    found = (installed_version(name) for name in names)
    return next((version for version in found if version), "unknown")


def _jpeg_decoder() -> str:
    """E.g. "libjpeg-turbo 3.1.0"; empty where Pillow was built without one."""
    try:
        turbo = features.version_feature("libjpeg_turbo")
        return f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version_codec('jpg') or 'unknown'}"
    except (ValueError, ImportError):
        return ""
