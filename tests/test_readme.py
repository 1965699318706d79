"""The README and the guides say what is so: their links exist, their commands and options are real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "models").glob("*/README.md"),
    ]
)
COMMANDS = ("demo", "train", "export", "verify", "embed", "evaluate", "inspect", "doctor")


@cache
def help_of(command: str) -> str:
    call = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()", command, "--help"]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def command_lines(page: Path) -> list[str]:
    """Every `byol-deploy ...` line in the page's code blocks, continuation lines joined, prompts removed."""
    lines = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("byol-deploy "):
                lines.append(line.split(" #")[0])
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    broken = [
        t for t in targets if not t.startswith(("http://", "https://", "mailto:")) and not (page.parent / t).exists()
    ]
    assert not broken, f"{page.name} links to what is not there: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    wrong = []
    for line in command_lines(page):
        words = shlex.split(line)
        if words[1].startswith("-"):
            continue
        if words[1] not in COMMANDS:
            wrong.append(f"{line}: no command {words[1]}")
            continue
        offered = help_of(words[1])
        wrong += [
            f"{line}: no option {word}"
            for word in words[2:]
            if word.startswith("--") and word.split("=")[0] not in offered
        ]
    assert not wrong, "\n".join(wrong)


def test_the_readme_names_every_command_and_the_two_that_start_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [c for c in COMMANDS if f"`byol-deploy {c}" not in text and f"byol-deploy {c}" not in text] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in text
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_python_of_the_readme_runs(tmp_path: Path, tiny_bundle: Path, fashion: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert blocks, "README.md shows no Python"
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    photograph = next(fashion.rglob("*.png"))
    for name in re.findall(r'"([\w./-]+\.(?:png|jpg))"', "".join(blocks)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(photograph.read_bytes())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks[0]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
