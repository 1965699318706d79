"""What this machine and this installation can do, found by trying rather than by asking.

Used by ``byol-deploy doctor``. Nothing here needs more than the extra ``edge``; PyTorch, where it is installed, is
asked in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from byol_deploy import __version__

# Every one of these installs the same module onnxruntime, over the others' files.
RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-silicon",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
# By the line of /proc/cpuinfo that lists them, x86's and ARM's: name for a person, flags that mean it.
_FEATURES = {
    "flags": {
        "AVX2": {"avx2"},
        "AVX-512": {"avx512f"},
        "VNNI": {"avx512_vnni", "avx_vnni"},
        "bf16": {"avx512_bf16"},
        "fp16": {"avx512_fp16"},
        "AMX": {"amx_tile"},
    },
    "Features": {
        "NEON": {"asimd", "neon"},
        "dot product": {"asimddp"},
        "i8mm": {"i8mm"},
        "bf16": {"bf16"},
        "fp16": {"asimdhp"},
        "SVE": {"sve"},
    },
}
_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "built_for_cuda": torch.version.cuda,
    "cuda_works": cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "bf16_on_gpu": torch.cuda.is_bf16_supported() if cuda else None,
}))
"""
_PATIENCE_S = 120


@dataclass(frozen=True)
class Provider:
    """An execution provider that the build of ONNX Runtime lists, and whether it really computes here."""

    name: str
    works: bool
    reason: str


@dataclass(frozen=True)
class Extra:
    """An extra of byol-deploy: what of it is absent, and the command that installs it."""

    installed: bool
    missing: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Environment:
    """A survey of the machine. ``conflicts`` are what must be mended, each with its next step.

    Attributes:
        version: Of byol-deploy.
        python: Version and executable.
        system: Operating system and machine.
        packages: Installed version by package name, None where it is absent.
        runtime: Version and build of ONNX Runtime.
        providers: What that build lists, tried out.
        cpu: model, usable_cores (of this process), host_cores, features by name (None where they cannot be read).
        memory: total_bytes, available_bytes, limit_bytes (of the cgroup); None where they cannot be read.
        gpus: Name, memory and driver of each, as nvidia-smi gives them.
        torch: What PyTorch says about CUDA; None where it is not installed.
        extras: By name.
        conflicts: What must be mended.
    """

    version: str
    python: str
    system: str
    packages: dict[str, str | None]
    runtime: dict[str, Any]
    providers: tuple[Provider, ...]
    cpu: dict[str, Any]
    memory: dict[str, int | None]
    gpus: tuple[str, ...]
    torch: dict[str, Any] | None
    extras: dict[str, Extra]
    conflicts: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"healthy": not self.conflicts, **asdict(self)}


def survey() -> Environment:
    """Look at the machine and the installation. Takes a second, and some more where PyTorch is installed."""
    needs = requirements()
    names = sorted({name for listed in needs.values() for name in listed} | set(RUNTIMES[:2]), key=str.lower)
    packages = {name: installed_version(name) for name in names}
    conflicts = runtime_conflicts()
    runtime, providers, broken = _runtime()
    return Environment(
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} on {platform.machine()}",
        packages=packages,
        runtime=runtime,
        providers=providers,
        cpu=cpu(),
        memory=memory(),
        gpus=gpus(),
        torch=_torch() if packages.get("torch") else None,
        extras=_extras(needs),
        conflicts=(*conflicts, *broken),
    )


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def runtime_conflicts() -> list[str]:
    """Several builds of ONNX Runtime in one environment: they overwrite each other's files."""
    found = [name for name in RUNTIMES if installed_version(name)]
    if len(found) < 2:
        return []
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else found[0]
    return [
        f"{' and '.join(found)} are both installed and overwrite each other; run: pip uninstall -y {' '.join(found)} "
        f"&& pip install {keep}"
    ]


def requirements() -> dict[str, list[str]]:
    """The packages that each extra of byol-deploy names, "dev" apart; empty where its metadata is not installed."""
    try:
        lines = metadata.requires("byol-deploy") or []
    except metadata.PackageNotFoundError:
        return {}
    needs: dict[str, list[str]] = {}
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name and extra and extra.group(1) != "dev" and name.group() not in needs.setdefault(extra.group(1), []):
            needs[extra.group(1)].append(name.group())
    return needs


def cpu(root: Path = Path("/")) -> dict[str, Any]:
    """Model, cores and instruction sets of the processor."""
    from byol_deploy.cores import usable_cores

    text = _text(root / "proc/cpuinfo")
    fields: dict[str, str] = dict(re.findall(r"^([^:\n]+?)[ \t]*:[ \t]*(.*)$", text, re.MULTILINE))
    features = None
    for line, meanings in _FEATURES.items():
        if line in fields:
            flags = set(fields[line].split())
            features = {name: bool(flags & meaning) for name, meaning in meanings.items()}
    model = fields.get("model name") or fields.get("Model") or _mac_model() or platform.processor()
    return {
        "model": model or platform.machine(),
        "usable_cores": usable_cores(),
        "host_cores": os.cpu_count(),
        "features": features,
    }


def memory(root: Path = Path("/")) -> dict[str, int | None]:
    """Memory of the machine and of this process's control group, in bytes."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    info = {name: int(value) * 1024 for name, value in lines}
    limits = []
    for file in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(root / file).strip()
        if text.isdigit():
            limits.append(int(text))
    total = info.get("MemTotal")
    limit = min(limits, default=None)
    return {
        "total_bytes": total,
        "available_bytes": info.get("MemAvailable"),
        # "No limit" is written as a number near 2**63 by cgroup v1.
        "limit_bytes": limit if limit is not None and (total is None or limit < total) else None,
    }


def gpus() -> tuple[str, ...]:
    """One line for each NVIDIA GPU: name, memory, driver. Empty where nvidia-smi is absent or finds none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    said = _said(query, 20)
    return tuple(line.strip() for line in said.splitlines() if line.strip())


def _runtime() -> tuple[dict[str, Any], tuple[Provider, ...], list[str]]:
    try:
        import onnxruntime

        from byol_deploy.providers import probe_provider
    except Exception as error:
        # Whatever its import raises (a missing library, files of two builds mixed) is what the doctor must tell.
        mend = "run: pip install --force-reinstall onnxruntime"
        return {"version": None}, (), [f"onnxruntime cannot be imported: {error}; {mend}"]
    tried = [Provider(name, *probe_provider(name)) for name in onnxruntime.get_available_providers()]
    runtime = {"version": onnxruntime.__version__, "build": onnxruntime.get_build_info()}
    broken = [
        f"onnxruntime's CPU provider does not work: {provider.reason}; run: pip install --force-reinstall onnxruntime"
        for provider in tried
        if provider.name == "CPUExecutionProvider" and not provider.works
    ]
    return runtime, tuple(tried), broken


def _extras(needs: dict[str, list[str]]) -> dict[str, Extra]:
    def there(name: str) -> bool:
        # Any build of ONNX Runtime will do, and the one that a platform takes is decided by pip.
        return any(map(installed_version, RUNTIMES)) if name in RUNTIMES else installed_version(name) is not None

    extras = {}
    for extra, names in needs.items():
        missing = tuple(name for name in names if not there(name))
        extras[extra] = Extra(not missing, missing, f"pip install 'byol-deploy[{extra}]'")
    return extras


def _torch() -> dict[str, Any]:
    said = _said([sys.executable, "-c", _ASK_TORCH], _PATIENCE_S)
    try:
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return {"version": installed_version("torch"), "error": "import torch fails; run: python -c 'import torch'"}
    return found


def _mac_model() -> str:
    return _said(["sysctl", "-n", "machdep.cpu.brand_string"], 5).strip() if sys.platform == "darwin" else ""


def _said(command: list[str], patience_s: float) -> str:
    """What a program writes to stdout; empty where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
