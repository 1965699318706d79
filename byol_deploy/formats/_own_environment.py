"""Environments of their own for converters whose packages do not go together with PyTorch's, made when first needed.

An environment is a folder in the user's cache (or in the folder that ``BYOL_DEPLOY_ENVIRONMENTS`` names). It sees the
packages of the environment that made it, PyTorch above all, behind its own: what is already there is not downloaded
again, and what must be another version lies in the folder alone. Nothing outside that folder is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from byol_deploy.errors import ExportError, MissingError

PLACE = "BYOL_DEPLOY_ENVIRONMENTS"
"""Environment variable: the folder that holds the environments."""
_READY = "ready.json"
"""Written last: an environment without it was interrupted while it was made, and is made anew."""
_SHARED = ("torch", "torchao", "numpy", "protobuf")
"""Packages of the maker whose other version makes another environment."""
_INSTALL_TIMEOUT_S = 3600
_RUN_TIMEOUT_S = 3600

Say = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """What an environment holds.

    Attributes:
        name: Begins its folder's name.
        packages: Requirements of pip, pinned.
        cost: Size and time, in words, told before it is made.
    """

    name: str
    packages: tuple[str, ...]
    cost: str

    def folder(self) -> Path:
        """Where it lies; another one for each Python, each list of packages and each PyTorch that it sees."""
        shared = [f"{name}=={_version(name)}" for name in _SHARED]
        parts = [*self.packages, *shared, sys.version, platform.machine(), *_paths()]
        return root() / f"{self.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def root() -> Path:
    """The folder of all environments, which need not exist."""
    chosen = os.environ.get(PLACE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    system = platform.system()
    if system == "Windows":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif system == "Darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "byol-deploy" / "environments"


def call(environment: Environment, script: Path, request: dict[str, Any], say: Say | None = None) -> dict[str, Any]:
    """Run a script in an environment, which is made when it is not there.

    Args:
        environment: The environment.
        script: Takes two files: JSON to read and JSON to write. What it prints is kept from the user.
        request: What it reads; files are named by absolute paths.
        say: Called with a line before something takes long; None prints it to standard error.

    Returns:
        What it wrote: a JSON object.

    Raises:
        ExportError: It ended without writing, or wrote ``{"error": sentence}``.
        MissingError: The environment cannot be made.
    """
    python = _ready(environment, say or _tell)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        try:
            done = subprocess.run(
                [str(python), "-I", "-W", "ignore", str(script), str(asked), str(answered)],
                capture_output=True, env=_variables(), cwd=folder, timeout=_RUN_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ExportError(f"the converter of {environment.name} was still busy after {_RUN_TIMEOUT_S} s") from None
        if not answered.is_file():
            raise ExportError(
                f"the converter of {environment.name} ended with status {done.returncode}: "
                f"{_last_line(done.stderr)}; if it cannot even start, delete {python.parents[1]} and export again"
            )
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "error" in answer:
        raise ExportError(str(answer["error"]))
    return answer


def _ready(environment: Environment, say: Say) -> Path:
    """The Python of an environment, made when it is not there or half made."""
    folder = environment.folder()
    if (folder / _READY).is_file() and _python(folder).is_file():
        return _python(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), say):
            if not (folder / _READY).is_file() or not _python(folder).is_file():  # another process may have made it
                _make(environment, folder, say)
    except OSError as error:
        raise MissingError(
            f"the environment of {environment.name} cannot be made in {folder.parent}: {error.strerror or error}; name "
            f"another folder with {PLACE}"
        ) from error
    return _python(folder)


def _make(environment: Environment, folder: Path, say: Say) -> None:
    say(
        f"making an environment of its own for {environment.name}, once: {environment.cost}; in {folder} "
        f"({PLACE} names another place)"
    )
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)], environment, "venv")
    python = _python(folder)
    own = subprocess.run(
        [str(python), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, env=_variables(), check=True,
    ).stdout.decode().strip()  # fmt: skip
    # Python appends these to its path, behind the environment's own packages.
    Path(own, "byol_deploy_maker.pth").write_text("".join(f"{path}\n" for path in _paths()), encoding="utf-8")
    pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    _run([*pip, *environment.packages], environment, "pip")
    (folder / _READY).write_text(json.dumps({"packages": environment.packages}), encoding="utf-8")
    say(f"the environment of {environment.name} is ready")


def _run(words: list[str], environment: Environment, program: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, env=_variables(), timeout=_INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise MissingError(
            f"{program} was still busy after {_INSTALL_TIMEOUT_S} s; is the network reachable?"
        ) from None
    if done.returncode:
        raise MissingError(
            f"the environment of {environment.name} cannot be made: {program} says {_last_line(done.stderr)}; mend "
            "that (a network is needed once) and export again"
        )


def _last_line(said: bytes) -> str:
    """What a program said last; of pip the error and not the notes behind it."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing"])[-1][:300]


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """One process at a time; the system gives the lock back when its holder ends, however it ends."""
    with open(path, "a+b") as file:
        if not _try_lock(file):
            say("another process is making that environment; waiting for it")
            _lock(file)
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        _lock(file, wait=False)
    except OSError:
        return False
    return True


def _lock(file: IO[bytes], *, wait: bool = True) -> None:
    if os.name == "nt":
        _lock_on_windows(file, wait)
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_on_windows(file: IO[bytes], wait: bool) -> None:
    import importlib
    import time

    msvcrt: Any = importlib.import_module("msvcrt")
    while True:
        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return
        except OSError:
            if not wait:
                raise
            time.sleep(1)


def _python(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def _paths() -> list[str]:
    """Folders of packages that this process sees."""
    return list(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _variables() -> dict[str, str]:
    """The process's variables without those that lead Python elsewhere; hubs of models are not asked."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _tell(line: str) -> None:
    print(f"byol-deploy: {line}", file=sys.stderr, flush=True)
