"""How many cores a process may use: affinity, and control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from byol_deploy import cores
from byol_deploy.cores import usable_cores


def cgroup(root: Path, line: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("_us", "_us")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_usable_cores_follow_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    quota = cores.cgroup_quota
    assert quota(tmp_path / "absent") is None
    v2 = cgroup(tmp_path / "v2", "0::/job/inner", job__cpu_max="150000 100000\n", job__inner__cpu_max="max 100000\n")
    assert quota(v2) == 1.5
    # A container that sees its host's path: its own group is the root of what is mounted.
    assert quota(cgroup(tmp_path / "container", "0::/docker/abc", cpu_max="50000 100000")) == 0.5
    assert quota(cgroup(tmp_path / "free", "0::/", cpu_max="max 100000")) is None
    v1 = tmp_path / "v1"
    cgroup(v1, "4:cpu,cpuacct:/job\n3:memory:/job")
    (v1 / "sys/fs/cgroup/cpu,cpuacct/job").mkdir(parents=True)
    (v1 / "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us").write_text("300000\n")
    (v1 / "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us").write_text("100000\n")
    assert quota(v1) == 3.0
    (v1 / "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us").write_text("-1\n")
    assert quota(v1) is None

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    for limit, expected in ((None, 16), (0.5, 1), (1.5, 2), (64.0, 16)):
        monkeypatch.setattr(cores, "cgroup_quota", lambda _, limit=limit: limit)
        assert usable_cores() == expected
