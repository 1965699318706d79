"""`byol-deploy embed`, as a person runs it."""

from __future__ import annotations

import csv
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_deploy.embedding import embed_folder
from byol_deploy.runtime import Encoder

PROGRAM = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()"]
tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, "embed", *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in two folders, one of them broken."""
    root = tmp_path_factory.mktemp("data") / "images"
    draw = np.random.default_rng(0)
    for number in range(39):
        path = root / f"class {number % 2}" / f"{number:02d}, é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).save(path)
    (root / "class 0" / "broken.png").write_bytes(b"no")
    return root


@pytest.fixture(scope="module")
def expected(whole: Path, data: Path) -> dict[str, np.ndarray]:
    encoder = Encoder(whole)
    paths = sorted(path for path in data.rglob("*.png") if path.name != "broken.png")
    rows = encoder(paths)
    return {path.relative_to(data).as_posix(): row for path, row in zip(paths, rows, strict=True)}


def check(names: list[str], rows: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    assert names == list(expected)
    np.testing.assert_allclose(rows, np.stack(list(expected.values())), rtol=1e-5, atol=1e-6)


def test_npy_with_its_paths(whole: Path, data: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    shown = run(whole, data, "--out", tmp_path / "x.npy", "--batch-size", 8, "--json")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["rows"] == 39
    assert document["width"] == 8
    assert document["provider"] == "CPUExecutionProvider"
    assert [Path(item["path"]).name for item in document["bad"]] == ["broken.png"]
    assert "skipped" in shown.stderr
    assert "broken.png" in shown.stderr
    rows = np.load(tmp_path / "x.npy", allow_pickle=False, mmap_mode="r")
    assert rows.dtype == np.float32
    with open(tmp_path / "x.paths.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [int(line["row"]) for line in listed] == list(range(39))
    check([line["path"] for line in listed], rows, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.paths.csv"]


def test_csv_gives_back_the_same_float32(
    whole: Path, data: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    embed_folder(whole, data, tmp_path / "x.csv", batch_size=8)
    embed_folder(whole, data, tmp_path / "x.npy", batch_size=8)
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["path", *(f"e{number}" for number in range(8))]
    rows = np.array([line[1:] for line in lines], np.float32)
    check([line[0] for line in lines], rows, expected)
    np.testing.assert_array_equal(rows, np.load(tmp_path / "x.npy"))


def test_parquet(
    whole: Path, data: Path, expected: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("byol_deploy.embedding._ROW_GROUP_BYTES", 500)
    seen: list[tuple[int, int]] = []
    done = embed_folder(
        whole,
        data,
        tmp_path / "x.parquet",
        batch_size=8,
        progress=lambda *count: seen.append(count),
        output="projection",
    )
    assert done.rows == 39
    assert seen[-1] == (40, 40)
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["path", "projection"]
    assert str(table.schema.field("projection").type) == "fixed_size_list<element: float>[4]"
    assert table.column("path").to_pylist() == list(expected)
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups > 1
    rows = np.stack(table.column("projection").to_numpy())
    known = np.stack([*expected.values()]) @ tiny["weights"]()["project"]
    np.testing.assert_allclose(rows, known, rtol=1e-4, atol=1e-4)


def test_a_single_image_and_a_lone_file(
    whole: Path, data: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    name = next(iter(expected))
    embed_folder(whole / "model.onnx", data / name, tmp_path / "x.npy")
    np.testing.assert_allclose(np.load(tmp_path / "x.npy")[0], expected[name], rtol=1e-5, atol=1e-6)
    assert Path(name).name in (tmp_path / "x.paths.csv").read_text(encoding="utf-8")


def test_too_many_bad_images_write_nothing(whole: Path, data: Path, tmp_path: Path) -> None:
    shown = run(whole, data, "--out", tmp_path / "x.parquet", "--max-bad-share", 0.01)
    assert shown.returncode == 3
    assert "1 of 40 images cannot be read" in shown.stderr
    assert "broken.png" in shown.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(whole: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"mine")
    (tmp_path / "y.paths.csv").write_bytes(b"mine")
    for name in ("x.npy", "y.npy"):
        shown = run(whole, data, "--out", tmp_path / name)
        assert shown.returncode == 3
        assert "there already" in shown.stderr
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.paths.csv").read_bytes() == b"mine"
    assert run(whole, data, "--out", tmp_path / "x.npy", "--force").returncode == 0
    assert len(np.load(tmp_path / "x.npy")) == 39


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--out", "x.txt"], 2, "ends in .npy, .csv, .parquet"),
        (["--out", "x.npy", "--batch-size", "0"], 2, "batch_size is 0"),
        (["--out", "x.npy", "--max-bad-share", "2"], 2, "--max-bad-share is 2.0"),
        (["--out", "x.npy", "--provider", "gpu"], 2, "provider 'gpu'"),
        (["--out", "x.npy", "--provider", "dml"], 6, "does not work here"),
        (["--out", "x.npy", "--output", "features"], 3, "no output 'features'"),
        (["--out", "/proc/nowhere/x.npy"], 3, "cannot be written"),
    ],
)
def test_wrong_options(words: list[str], code: int, said: str, whole: Path, data: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [*PROGRAM, "embed", str(whole), str(data), *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert shown.returncode == code, shown.stderr
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_images(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shown = run(whole, tmp_path / "empty", "--out", tmp_path / "x.npy", "--json")
    assert shown.returncode == 3
    assert json.loads(shown.stdout)["error"]["type"] == "DataError"


def test_a_bomb_is_listed_without_pillows_own_warning(whole: Path, tmp_path: Path) -> None:
    images = runpy.run_path(str(Path(__file__).parents[1] / "test_images.py"))
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bomb.png").write_bytes(images["png"](10_000, 10_000, b"\0"))
    Image.new("RGB", (9, 9)).save(folder / "good.png")
    shown = run(whole, folder, "--out", tmp_path / "x.npy", "--max-bad-share", 0.5)
    assert shown.returncode == 0, shown.stderr
    assert "decompression bomb?" in shown.stderr
    assert "Warning" not in shown.stderr


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
from byol_deploy.cli.main import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
@pytest.mark.parametrize("suffix", ["npy", "csv", "parquet"])
def test_a_full_disk_is_said_and_leaves_nothing(suffix: str, whole: Path, data: Path, tmp_path: Path) -> None:
    words = ["embed", str(whole), str(data), "--out", str(tmp_path / f"x.{suffix}"), "--batch-size", "4"]
    shown = subprocess.run([sys.executable, "-c", FULL, *words], capture_output=True, text=True)
    assert shown.returncode == 3, shown.stderr
    assert "cannot be written" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_killed_it_leaves_no_file_that_looks_whole(whole: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x.npy"
    slow = (
        "import time; from byol_deploy import embedding as e; from byol_deploy.embedding import embed_folder; "
        f"embed_folder({str(whole)!r}, {str(data)!r}, {str(out)!r}, batch_size=4, progress=lambda *_: time.sleep(0.2))"
    )
    process = subprocess.Popen([sys.executable, "-c", slow])
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None and not out.parent.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert list(out.parent.iterdir()) != []
    embed_folder(whole, data, out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.npy", "x.paths.csv"]
    assert len(np.load(out)) == 39
