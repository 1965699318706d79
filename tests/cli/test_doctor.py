"""`byol-deploy doctor`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from byol_deploy.cli.doctor import _shown, doctor

from byol_deploy import environment
from byol_deploy.environment import Environment, Extra, Provider

PROGRAM = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()"]


def made(**changes: object) -> Environment:
    values: dict[str, object] = {
        "version": "0.1.0",
        "python": "3.12.1 (/usr/bin/python3)",
        "system": "Linux 6 on x86_64",
        "packages": {"numpy": "2.1", "torch": None},
        "runtime": {"version": "1.22"},
        "providers": (
            Provider("CUDAExecutionProvider", False, "there is no NVIDIA driver on this machine"),
            Provider("CPUExecutionProvider", True, "it computed a test model"),
        ),
        "cpu": {"model": "AMD", "usable_cores": 2, "host_cores": 64, "features": {"AVX2": True, "VNNI": False}},
        "memory": {"total_bytes": 8_000_000_000, "available_bytes": 4_000_000_000, "limit_bytes": 1_000_000_000},
        "gpus": (),
        "torch": None,
        "extras": {"parquet": Extra(False, ("pyarrow",), "pip install 'byol-deploy[parquet]'")},
    }
    return Environment(**(values | changes))  # type: ignore[arg-type]


def test_on_this_machine() -> None:
    shown = subprocess.run([*PROGRAM, "doctor", "--json"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["healthy"] is True
    assert any(provider["works"] for provider in document["providers"])


def test_what_a_person_reads() -> None:
    shown = _shown(made())
    for part in (
        "2 of 64 cores usable by this process",
        "AVX2 (not: VNNI)",
        "8.0 GB, 4.0 GB available, this process is limited to 1.0 GB",
        "there is no NVIDIA driver on this machine",
        "none that nvidia-smi sees",
        "absent",
        "pip install 'byol-deploy[parquet]'",
        "Nothing needs mending.",
    ):
        assert part in shown
    bare = made(
        cpu={"model": "Apple M3", "usable_cores": 8, "host_cores": 8, "features": None},
        memory={"total_bytes": None, "available_bytes": None, "limit_bytes": None},
        torch={"version": "2.9", "devices": ["NVIDIA A10"]},
    )
    assert "not readable on this system" in _shown(bare)
    assert "2.9, CUDA works on NVIDIA A10" in _shown(bare)
    assert "import torch fails" in _shown(made(torch={"version": "2.9", "error": "import torch fails"}))


def test_a_conflict_is_exit_6_and_still_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    monkeypatch.setattr(environment, "survey", lambda: made(conflicts=("onnxruntime twice; run: pip uninstall",)))
    with pytest.raises(typer.Exit) as caught:
        doctor()
    assert caught.value.exit_code == 6
    assert "MEND: onnxruntime twice" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        doctor(as_json=True)
    assert json.loads(capsys.readouterr().out)["conflicts"] == ["onnxruntime twice; run: pip uninstall"]
