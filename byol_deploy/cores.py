"""How many cores this process may really use, which in a container is not how many the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores() -> int:
    """The number of cores that this process may really use: its affinity, and its cgroup's quota (v1 or v2)."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        allowed = os.cpu_count() or 1
    quota = cgroup_quota(Path("/"))
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def cgroup_quota(root: Path) -> float | None:
    """The CPU quota in cores of the control group that this process is in, the smallest on the way up.

    Args:
        root: Root of the file system.

    Returns:
        e.g. 1.5, or None without a quota.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            bases = [root / "sys/fs/cgroup" / name for name in ("cpu", "cpu,cpuacct", controllers)]
        else:
            continue
        for base in bases:
            # A container may see the path of the host, which does not exist in it: its own group is then the base.
            folder = base / path.lstrip("/")
            quotas += [_quota_of(group) for group in (folder, *folder.parents) if group.is_relative_to(base)]
    found = [quota for quota in quotas if quota is not None]
    return min(found, default=None)


def _quota_of(group: Path) -> float | None:
    try:
        if (group / "cpu.max").is_file():  # v2: "150000 100000" or "max 100000"
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return float(limit) / float(period) if limit not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
