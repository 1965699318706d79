"""Processors, by what their int8 instructions want."""

from __future__ import annotations

import platform

from byol_deploy.environment import cpu
from byol_deploy.errors import UsageError

TARGETS = ("x86-vnni", "x86", "arm64")
"""Processors, by what their int8 instructions want: x86-64 with VNNI multiplies unsigned activations by signed weights;
without VNNI the same product saturates in 16 bits, so that weights get 7 bits; ARM multiplies signed by signed."""


def this_target() -> str | None:
    """The one of :data:`TARGETS` that this machine is; None for another processor."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        features = cpu()["features"] or {}
        return "x86-vnni" if any(there and "vnni" in name.lower() for name, there in features.items()) else "x86"
    return "arm64" if machine in ("arm64", "aarch64") else None


def resolve_target(target: str) -> tuple[str, bool]:
    """A target by name, "this" for this machine, and whether files for it are timed rightly here.

    Raises:
        UsageError: There is no such target, or this machine is none of them.
    """
    here = this_target()
    if target == "this":
        if here is None:
            raise UsageError(f"this machine ({platform.machine()}) is none of the targets; use {', '.join(TARGETS)}")
        return here, True
    if target not in TARGETS:
        raise UsageError(f"target {target!r} does not exist; use this, {', '.join(TARGETS)}")
    # A file for a processor without VNNI runs on one with it too, but its time there says nothing about the former.
    return target, target == here
