"""The doctor's knowledge: from real files where the machine has them, from written ones for other machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from byol_deploy import environment
from byol_deploy.environment import cpu, memory, requirements, runtime_conflicts, survey

X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_tile\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nModel\t\t: Raspberry Pi 5 Model B\n"


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_survey_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_torch", lambda: None)  # importing it takes seconds; see the test below
    found = survey()
    document = json.loads(json.dumps(found.to_dict()))
    assert document["healthy"] is True, found.conflicts
    assert document["packages"]["numpy"]
    assert document["cpu"]["usable_cores"] >= 1
    by_name = {provider["name"]: provider for provider in document["providers"]}
    assert by_name["CPUExecutionProvider"]["works"] is True
    assert all(provider["reason"] for provider in by_name.values())
    assert document["extras"]["edge"]["installed"] is True


def test_the_extras_are_those_of_the_package() -> None:
    needs = requirements()
    assert {"edge", "train", "evaluate", "parquet", "tensorboard"} <= set(needs)
    assert "dev" not in needs
    assert "onnxruntime" in needs["edge"]
    assert len(needs["train"]) == len(set(needs["train"]))


def test_an_extra_that_is_absent_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", {"onnxruntime-gpu": "1", "numpy": "2"}.get)
    extras = environment._extras({"edge": ["numpy", "onnxruntime"], "parquet": ["pyarrow"]})
    assert extras["edge"].installed, "any build of ONNX Runtime satisfies it"
    assert extras["parquet"].missing == ("pyarrow",)
    assert extras["parquet"].command == "pip install 'byol-deploy[parquet]'"


def test_two_builds_of_onnxruntime_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_conflicts() == []
    monkeypatch.setattr(environment, "installed_version", {"onnxruntime": "1.22", "onnxruntime-gpu": "1.22"}.get)
    (conflict,) = runtime_conflicts()
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in conflict


def test_an_onnxruntime_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, providers, broken = environment._runtime()
    assert providers == ()
    assert "onnxruntime cannot be imported" in broken[0]


def test_processors(tmp_path: Path) -> None:
    x86 = cpu(write(tmp_path / "x86", proc__cpuinfo=X86))
    assert x86["model"] == "AMD EPYC 9B14"
    assert x86["features"] == {"AVX2": True, "AVX-512": True, "VNNI": True, "bf16": False, "fp16": False, "AMX": True}
    arm = cpu(write(tmp_path / "arm", proc__cpuinfo=ARM))
    assert arm["model"] == "Raspberry Pi 5 Model B"
    assert arm["features"]["NEON"]
    assert arm["features"]["dot product"]
    assert not arm["features"]["SVE"]
    assert cpu(tmp_path / "none")["features"] is None
    assert cpu(tmp_path / "none")["model"]


def test_memory_and_its_limit(tmp_path: Path) -> None:
    info = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n"
    free = memory(write(tmp_path / "free", proc__meminfo=info))
    assert free == {"total_bytes": 16_384_000_000, "available_bytes": 8_192_000_000, "limit_bytes": None}
    caged = write(tmp_path / "caged", proc__meminfo=info)
    (caged / "sys/fs/cgroup").mkdir(parents=True)
    (caged / "sys/fs/cgroup/memory.max").write_text("512000000\n")
    assert memory(caged)["limit_bytes"] == 512_000_000
    (caged / "sys/fs/cgroup/memory.max").write_text("9223372036854771712\n")
    assert memory(caged)["limit_bytes"] is None
    assert memory(tmp_path / "none") == {"total_bytes": None, "available_bytes": None, "limit_bytes": None}


def test_programs_that_are_absent_fail_or_hang_say_nothing() -> None:
    assert environment._said(["no-such-program"], 1) == ""
    assert environment._said([sys.executable, "-c", "print(1); raise SystemExit(1)"], 20) == ""
    assert environment._said([sys.executable, "-c", "import time; time.sleep(9)"], 0.2) == ""
    assert environment._said([sys.executable, "-c", "print(1)"], 20) == "1\n"


def test_torch_is_asked_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    found = environment._torch()
    assert found is not None
    assert found["version"]
    assert found["cuda_works"] in (True, False)
    monkeypatch.setattr(environment, "_ASK_TORCH", "raise ImportError")
    failed = environment._torch()
    assert failed is not None
    assert "import torch fails" in failed["error"]
