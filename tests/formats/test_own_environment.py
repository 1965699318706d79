"""Environments of their own: told of, made once by one process at a time, and made anew where they are half made."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from byol_deploy.errors import ExportError, MissingError
from byol_deploy.formats import _own_environment as own
from byol_deploy.formats._own_environment import Environment, call

SCRIPT = """
import json, sys
import tiny_package, numpy
request = json.load(open(sys.argv[1]))
print("noise on standard output")
if request.get("fail") == "silently":
    sys.exit("no answer")
answer = {"error": "a sentence"} if "fail" in request else {
    "sum": sum(request["numbers"]), "tiny": tiny_package.VERSION, "numpy": numpy.__version__, "path": sys.path,
}
json.dump(answer, open(sys.argv[2], "w"))
"""


def wheel(folder: Path, name: str = "tiny-package") -> Path:
    """A package that pip installs without a network."""
    module = name.replace("-", "_")
    path, info = folder / f"{module}-1.0-py3-none-any.whl", f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}.py", "VERSION = '1.0'\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture
def tiny(place: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.setenv(own.PLACE, str(place / "environments"))
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    return Environment("tiny", (str(wheel(place)),), "a few MB, seconds")


def test_it_is_told_made_once_and_used_again(tiny: Environment, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    answer = call(tiny, place / "script.py", {"numbers": [1, 2]}, said.append)
    assert (answer["sum"], answer["tiny"]) == (3, "1.0")
    assert len(said) == 2
    assert "making an environment of its own for tiny, once: a few MB, seconds" in said[0]
    assert str(tiny.folder()) in said[0]
    # What the maker has need not be installed; what the environment has comes first.
    assert answer["numpy"] == np.__version__
    assert "/nowhere" not in answer["path"]
    paths = [path for path in answer["path"] if "site-packages" in path]
    assert paths[0].startswith(str(tiny.folder()))
    assert call(tiny, place / "script.py", {"numbers": [4]}, said.append)["sum"] == 4
    assert len(said) == 2
    assert capfd.readouterr() == ("", "")


def test_a_failure_is_one_sentence(tiny: Environment, place: Path) -> None:
    with pytest.raises(ExportError, match=r"^a sentence$"):
        call(tiny, place / "script.py", {"fail": "loudly"})
    with pytest.raises(ExportError, match=r"tiny ended with status 1: no answer; .*delete .*tiny-"):
        call(tiny, place / "script.py", {"fail": "silently"})


def test_a_half_made_one_is_made_anew(tiny: Environment, place: Path) -> None:
    call(tiny, place / "script.py", {"numbers": []})
    (tiny.folder() / "ready.json").unlink()
    (tiny.folder() / "pyvenv.cfg").write_text("cut of")
    said: list[str] = []
    assert call(tiny, place / "script.py", {"numbers": [5]}, said.append)["sum"] == 5
    assert len(said) == 2


def test_two_processes_make_it_once(tiny: Environment, place: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from byol_deploy.formats._own_environment import Environment, call;"
        "tiny = Environment('tiny', (sys.argv[1],), 'a few MB');"
        "print(call(tiny, Path(sys.argv[2]), {'numbers': [7]})['sum'])"
    )
    words = [sys.executable, "-c", code, tiny.packages[0], str(place / "script.py")]
    variables = {**own._variables(), own.PLACE: str(tmp_path)}
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [out for out, _ in said] == ["7\n", "7\n"], said
    assert "".join(error for _, error in said).count("making an environment") == 1, said
    assert len([item for item in tmp_path.iterdir() if item.is_dir()]) == 1


def test_a_package_that_is_not_there_is_named(tiny: Environment, place: Path) -> None:
    absent = Environment("absent", (str(place / "no-such-1.0-py3-none-any.whl"),), "nothing")
    with pytest.raises(MissingError, match=r"absent cannot be made: pip says ERROR: .*no-such.*export again"):
        call(absent, place / "script.py", {}, lambda line: None)
    assert not (absent.folder() / "ready.json").exists()


def test_a_folder_that_cannot_be_made_names_the_variable(
    tiny: Environment, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(own.PLACE, str(place / "script.py" / "below-a-file"))
    with pytest.raises(MissingError, match=r"cannot be made in .*; name another folder with BYOL_DEPLOY_ENVIRONMENTS"):
        call(tiny, place / "script.py", {}, lambda line: None)


def test_another_list_of_packages_is_another_folder(tiny: Environment) -> None:
    assert Environment("tiny", (*tiny.packages, "more==1"), "").folder() != tiny.folder()
    assert tiny.folder() == Environment("tiny", tiny.packages, "told otherwise").folder()


@pytest.mark.parametrize(
    ("system", "variable", "expected"),
    [("Linux", "XDG_CACHE_HOME", "cache"), ("Windows", "LOCALAPPDATA", "cache"), ("Darwin", "", "Library/Caches")],
)
def test_the_users_cache(
    system: str, variable: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(own.PLACE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(own.platform, "system", lambda: system)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert own.root() == tmp_path / expected / "byol-deploy" / "environments"
