"""Half-written is never taken for whole: errors, full disks, places that cannot be written, SIGKILL."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from byol_deploy.atomic import publish_file, publish_folder
from byol_deploy.errors import OutputError


def anything(_: Path) -> None:
    """Allow the replacement of any folder."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.bin"
    with publish_file(target) as file:
        file.write(b"one")
        assert not target.exists()
    assert target.read_bytes() == b"one"
    assert names(target.parent) == ["x.bin"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_replaced_only_by_force_and_after_success(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="there already"), publish_file(target):
        raise AssertionError("the work must not begin")
    with pytest.raises(ZeroDivisionError), publish_file(target, force=True) as file:
        1 / (file.write(b"half") - 4)
    assert target.read_bytes() == b"old"
    with publish_file(target, force=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["x.bin"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    with pytest.raises(OutputError, match="there already"), publish_file(target):
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    with publish_folder(tmp_path / "link", anything) as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["a"]
    os.symlink(tmp_path / "y.bin", tmp_path / "y-link")
    with publish_file(tmp_path / "y-link") as file:
        file.write(b"y")
    assert (tmp_path / "y.bin").read_bytes() == b"y"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "below", Path("/proc/nowhere"), tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match=r"cannot be written.*--out"), publish_folder(target, anything):
            raise AssertionError("the work must not begin")
        with pytest.raises(OutputError, match=r"cannot be written.*--out"), publish_file(target):
            raise AssertionError("the work must not begin")
    with pytest.raises(OutputError, match="is a folder"), publish_file(tmp_path):
        raise AssertionError("the work must not begin")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not permitted"), publish_file(tmp_path / "x"):
            raise AssertionError("the work must not begin")
    finally:
        tmp_path.chmod(0o700)


FULL = """
import resource, sys
from pathlib import Path
from byol_deploy.atomic import publish_file, publish_folder
from byol_deploy.errors import OutputError
target = Path(sys.argv[1])
# No file may grow past this: the write fails in the kernel, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    if sys.argv[2] == "file":
        with publish_file(target, force=True) as file:
            file.write(b"x" * 200_000)
    else:
        with publish_folder(target, lambda folder: None) as folder:
            (folder / "big").write_bytes(b"x" * 200_000)
except OutputError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.skipif(os.name != "posix", reason="resource limits are POSIX")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "x"
    if kind == "file":
        target.write_bytes(b"old")
    else:
        target.mkdir()
        (target / "old").write_bytes(b"old")
    shown = subprocess.run([sys.executable, "-c", FULL, str(target), kind], capture_output=True, text=True)
    assert shown.stderr.startswith(f"refused: {target} cannot be written: "), shown.stderr
    assert (target if kind == "file" else target / "old").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_a_full_disk_by_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    with pytest.raises(OutputError, match="the disk is full"), publish_folder(tmp_path / "x", anything):
        raise OSError(errno.ENOSPC, "No space left on device")
    # An error that is not about the place we write to stays what it is.
    with pytest.raises(PermissionError), publish_folder(tmp_path / "x", anything):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")
    with pytest.raises(RuntimeError, match="a bug"), publish_folder(tmp_path / "x", anything):
        raise RuntimeError("a bug")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(OutputError, match="the disk is full"), publish_folder(tmp_path / "x", anything):
        raise RuntimeError("a native writer failed")
    assert names(tmp_path) == []


HANG = """
import sys, time
from pathlib import Path
from byol_deploy import atomic
target, moment = Path(sys.argv[1]), sys.argv[2]
def stop(*_, **__):
    print("now", flush=True)
    time.sleep(60)
if moment == "between":
    rename, calls = atomic.os.rename, []
    def counted(old, new):
        calls.append(new)
        stop() if len(calls) == 2 else rename(old, new)
    atomic.os.rename = counted
if moment == "after":
    atomic.shutil.rmtree = stop
with (atomic.publish_file(target, force=True) if moment == "file" else
      atomic.publish_folder(target, lambda folder: None)) as made:
    if moment == "file":
        made.write(b"half")
        made.flush()
        stop()
    (made / "new").write_text("new")
    if moment == "writing":
        stop()
"""


def start_and_wait(target: Path, moment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HANG, str(target), moment], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("moment", ["writing", "between", "after"])
def test_a_folder_killed_at_the_worst_moments(moment: str, tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").write_text("old")
    kill(start_and_wait(target, moment))
    assert len(names(tmp_path)) > 1 or moment == "between"
    if moment == "writing":
        assert names(target) == ["old"]
    if moment == "after":
        assert names(target) == ["new"]
    # The next run finds the old folder again, even when it was killed between the two renames.
    seen = []
    with publish_folder(target, lambda folder: seen.append(names(folder))) as folder:
        (folder / "newer").write_text("newer")
    assert seen[0] == (["new"] if moment == "after" else ["old"])
    assert names(target) == ["newer"]
    assert names(tmp_path) == ["x"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_file_killed_while_it_was_written(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    kill(start_and_wait(target, "file"))
    assert target.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    with publish_file(target, force=True) as file:
        file.write(b"new")
    assert names(tmp_path) == ["x"]


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_a_run_that_is_alive_keeps_its_half_written_files(tmp_path: Path) -> None:
    target = tmp_path / "x"
    living = start_and_wait(target, "file")
    try:
        with publish_file(target) as file:
            file.write(b"second")
        assert target.read_bytes() == b"second"
        assert len(names(tmp_path)) == 2, "the living run's file was removed"
    finally:
        kill(living)
