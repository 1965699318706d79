"""The program as a whole: fast to answer, honest in its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from byol_deploy.cli.main import main

from byol_deploy import __version__
from byol_deploy.errors import DataError

PROGRAM = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()"]
COMMANDS = ("demo", "train", "export", "verify", "embed", "evaluate", "inspect", "doctor")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *words], capture_output=True, text=True)


def test_help_lists_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert [command for command in COMMANDS if f"  {command} " not in shown.stdout] == []


def test_help_is_quick() -> None:
    # User CPU seconds rather than wall time, least of five: other work on the machine must not decide this.
    script = shutil.which("byol-deploy", path=os.path.dirname(sys.executable))
    call = [script, "--help"] if script else [*PROGRAM, "--help"]
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run(call, check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.4


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_json(command: str) -> None:
    shown = run(command, "--help")
    assert shown.returncode == 0
    assert "--json" in shown.stdout


@pytest.mark.parametrize("command", ["export", "verify", "evaluate"])
def test_whatever_reads_a_checkpoint_offers_what_its_errors_ask_for(command: str) -> None:
    offered = run(command, "--help").stdout
    assert "--backbone" in offered
    assert "--trust-backbone" in offered


def test_version() -> None:
    assert run("--version").stdout.strip() == f"byol-deploy {__version__}"


def test_wrong_usage_is_2() -> None:
    assert run("trian").returncode == 2
    assert run("verify").returncode == 2
    assert run("verify", "x", "--no-such-option").returncode == 2


def test_bad_input_is_3_in_one_line_and_in_json(tmp_path: Path) -> None:
    shown = run("verify", str(tmp_path / "absent"))
    assert shown.returncode == 3
    assert len(shown.stderr.strip().splitlines()) == 1
    assert "Traceback" not in shown.stderr
    document = json.loads(run("verify", str(tmp_path / "absent"), "--json").stdout)
    assert document["error"]["exit_code"] == 3
    assert document["error"]["message"] in shown.stderr.strip()


def test_our_own_bug_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("byol_deploy.cli.main.app", broken)
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_users_fault_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise DataError("photos is empty; pass a folder that holds images")

    monkeypatch.setattr("byol_deploy.cli.main.app", broken)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
    assert capsys.readouterr().err == "byol-deploy: photos is empty; pass a folder that holds images\n"
