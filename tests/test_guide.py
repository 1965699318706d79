"""The guide to verifying any model: its commands and scripts run, and it states the real limits."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")


from byol_deploy.parity import (  # noqa: E402
    FEWEST_FOR_AGREEMENT,
    FEWEST_FOR_NEIGHBOURS,
    FEWEST_FOR_OVERLAP,
    LEAST_AGREEMENT,
    LEAST_REL_L2,
    MOST_MARGIN,
    NOISE_MULTIPLE,
)
from byol_deploy.parity.limits import BLIND_REL_L2  # noqa: E402
from byol_deploy.parity.report import _HEADER  # noqa: E402
from byol_deploy.pipeline.foreign import FEWEST_IMAGES  # noqa: E402
from byol_deploy.pipeline.proof import BATCH_SIZES, LARGEST_BATCH  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "verify-any-model.md").read_text(encoding="utf-8")


def test_every_command_and_script_of_the_guide_runs(
    tmp_path: Path, fashion: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(fashion)
    blocks = re.findall(r"^```(?:python)?\n(.*?)^```", GUIDE, re.S | re.M)
    scripts = {name: block for block in blocks for name in re.findall(r"\A# (\w+\.py)$", block, re.M)}
    assert list(scripts) == ["my_model.py", "verify_it.py", "compare_two.py"]
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)

    def python(name: str) -> str:
        done = subprocess.run([sys.executable, name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ran = []
    try:
        for command, code in re.findall(r"^\$ (.*)\n(?:# exit code (\d))?", GUIDE, re.M):
            words = shlex.split(command)
            if words[0] == "python":
                python(words[1])
            else:
                done = program(*words[1:])
                assert done.returncode == int(code), done.stdout + done.stderr
                if "--json" in words:
                    assert json.loads(done.stdout)["verdict"] == "FAIL"
                else:
                    assert done.stdout.startswith("FAIL" if int(code) else "PASS model.onnx")
            ran.append(words[0])
    finally:
        sys.modules.pop("my_model", None)
    assert ran == ["python", "byol-deploy", "byol-deploy", "byol-deploy"]
    assert "features" in python("verify_it.py")
    said = python("compare_two.py")
    assert "model.onnx, batch 7" in said
    assert "FAIL" not in said
    # The same functions, one of them wrong.
    (tmp_path / "wrong.py").write_text(
        scripts["compare_two.py"].replace("x})[0]}", "x})[0] * 1.0001}").replace("assert report", "assert not report")
    )
    assert "relative L2 error" in python("wrong.py")


def test_the_guide_explains_every_column_and_states_the_real_limits() -> None:
    rows = re.findall(r"^\| (`.*?) \|", GUIDE, re.M)
    assert re.findall(r"`([^`]+)`", " ".join(rows)) == list(_HEADER)
    text = " ".join(GUIDE.split())
    for stated in (
        f"may be {NOISE_MULTIPLE:g} floors away, and never has to be nearer than {LEAST_REL_L2:g}",
        f"the limit is {BLIND_REL_L2:g},",
        f"margin (at most {MOST_MARGIN:g})",
        f"at least {LEAST_AGREEMENT:.0%}".replace("%", " %"),
        f"which needs {FEWEST_FOR_AGREEMENT} images",
        f"from {FEWEST_FOR_NEIGHBOURS} images on",
        f"from {FEWEST_FOR_OVERLAP} images on",
        f"fewer than {FEWEST_IMAGES} different images",
        f"batch sizes {', '.join(map(str, BATCH_SIZES))} and {LARGEST_BATCH}",
    ):
        assert stated in text
