"""A reference that is named as module:callable: what is found, and what is said of what is not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain_files import floats, write
from torch import Tensor, nn

from byol_deploy.errors import UsageError
from byol_deploy.pipeline.foreign import verify_foreign


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], str]]:
    """Writes a user's module into the current directory; forgets it afterwards, as a new process would."""
    monkeypatch.chdir(tmp_path)
    written = []

    def module(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return name

    before = list(sys.path)
    yield module
    assert sys.path == before
    for name in written:
        sys.modules.pop(name, None)


USERS = """
import sys
import torch
from torch import nn

print("loading")


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.width = width

    def forward(self, x):
        print("forward")
        return x.mean(dim=(2, 3)), x.amax(dim=(2, 3))


class Needy(Net):
    def __init__(self, width):
        super().__init__(width)


def build(width=6):
    return Net(width)


def broken():
    raise FileNotFoundError("weights.pt is not there")


def number():
    return 5


def picky(images):
    raise ValueError("I take no images")


def wordy(images):
    return "a tensor"


net = Net()
three = 3
"""


def test_what_is_found_by_name(
    workplace: Callable[[str, str], str], tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = workplace("users_own", USERS)
    workplace("leaves", "import sys\nsys.exit(2)\n")

    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean(dim=(2, 3)), x.amax(dim=(2, 3))

    path = write(Net(), tmp_path / "net.onnx", floats())
    for what in ("Net", "build", "net", "net.forward"):
        report = verify_foreign(path, against=f"{name}:{what}", data=colours)
        assert report.passed, report.text()
        assert report.checks[0].detail.startswith(f"{name}:{what}")
    said = capsys.readouterr()
    assert said.out == ""  # stdout is for the verdict
    assert "forward" in said.err
    for against, reason in (
        ("users_own", "against is 'users_own'; give an importable module"),
        ("not_there:build", "No module named 'not_there'"),
        ("users_own:nothing", "no attribute 'nothing'"),
        ("leaves:build", "SystemExit: 2"),
        ("users_own:Needy", "needs arguments"),
        ("users_own:broken", "FileNotFoundError: weights.pt is not there"),
        ("users_own:number", "gave something of type int"),
        ("users_own:three", "is of type int"),
        ("users_own:picky", "raised ValueError .*I take no images"),
        ("users_own:wordy", "gives something of type str"),
    ):
        with pytest.raises(UsageError, match=reason):
            verify_foreign(path, against=against, data=colours)
