"""`byol-deploy doctor`: what this machine and this installation can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .output import JsonOption, emit, table, talk

if TYPE_CHECKING:
    from ..environment import Environment


def doctor(as_json: JsonOption = False) -> None:
    """Say what works here: packages, execution providers, CPU features, GPU. Exit 6 when something must be mended."""
    from ..environment import survey
    from ..errors import MissingError

    talk("looking at this machine (a few seconds)")
    found = survey()
    emit(found.to_dict(), _shown(found), as_json=as_json)
    if found.conflicts:
        raise typer.Exit(MissingError.exit_code)


def _shown(found: Environment) -> str:
    cpu, memory = found.cpu, found.memory
    features = cpu["features"]
    if features is None:
        known = "not readable on this system"
    else:
        have, lack = ([name for name, there in features.items() if there is wanted] for wanted in (True, False))
        known = f"{', '.join(have) or 'none'} (not: {', '.join(lack) or 'none'})"
    lines = [
        ("byol-deploy", found.version),
        ("python", found.python),
        ("system", found.system),
        ("cpu", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['host_cores']} cores usable by this process"),
        ("features", known),
        ("memory", _memory(memory)),
        ("gpu", "; ".join(found.gpus) or "none that nvidia-smi sees"),
    ]
    if found.torch is not None:
        lines.append(("pytorch", _torch(found.torch)))
    lines.append(("onnxruntime", str(found.runtime.get("version") or "cannot be imported")))
    width = max(len(name) for name, _ in lines)
    parts = ["\n".join(f"{name:<{width}}  {text}" for name, text in lines)]
    parts.append(
        table(
            "",
            ("execution provider", "works", "because"),
            [(provider.name, provider.works, provider.reason) for provider in found.providers],
        )
    )
    parts.append(
        table("", ("package", "version"), [(name, version or "absent") for name, version in found.packages.items()])
    )
    parts.append(
        table(
            "",
            ("extra", "installed", "missing", "to install"),
            [
                (name, extra.installed, ", ".join(extra.missing) or None, None if extra.installed else extra.command)
                for name, extra in found.extras.items()
            ],
        )
    )
    parts.append("\n".join(f"MEND: {conflict}" for conflict in found.conflicts) or "Nothing needs mending.")
    return "\n".join(parts)


def _memory(memory: dict[str, int | None]) -> str:
    total, available, limit = (memory[key] for key in ("total_bytes", "available_bytes", "limit_bytes"))
    if total is None:
        return "not readable on this system"
    parts = [f"{total / 1e9:.1f} GB"]
    if available is not None:
        parts.append(f"{available / 1e9:.1f} GB available")
    if limit is not None:
        parts.append(f"this process is limited to {limit / 1e9:.1f} GB")
    return ", ".join(parts)


def _torch(torch: dict[str, object]) -> str:
    if "error" in torch:
        return f"{torch['version']}: {torch['error']}"
    devices = torch["devices"]
    on = f"CUDA works on {', '.join(map(str, devices))}" if isinstance(devices, list) and devices else "no CUDA GPU"
    return f"{torch['version']}, {on}"
