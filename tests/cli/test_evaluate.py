"""`byol-deploy evaluate`, as a person runs it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()"]
tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, "evaluate", *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle")


def test_a_table_for_a_person(bundle: Path, fashion: Path) -> None:
    shown = run(bundle, fashion, "--threads", 1)
    assert shown.returncode == 0, shown.stderr
    assert "raw pixels, 32 px" in shown.stdout
    assert "320 training and 80 test images, 10 classes; split: 80% / 20% within each class, seed 0" in shown.stdout
    assert "kNN is below the raw pixels" in shown.stdout


def test_json_of_a_lone_file_with_a_bad_image(bundle: Path, fashion: Path, tmp_path: Path) -> None:
    for path in sorted(fashion.rglob("*.png"))[:80]:
        place = tmp_path / "images" / path.relative_to(fashion)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    place.write_bytes(b"not an image")
    shown = run(bundle / "model.onnx", tmp_path / "images", "--json", "--seed", 5, "--test-share", "0.25")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert (document["train"], document["test"]) in {(60, 19), (59, 20)}
    assert [Path(path).name for path, _ in document["bad"]] == [place.name]
    assert place.name in shown.stderr
    assert set(document["verdicts"]) == {"knn", "probe"}
    assert "seed 5" in document["split"]


def test_a_checkpoint_scores_as_its_export_does(tiny_run: Path, tiny_bundle: Path, fashion: Path) -> None:
    trained, exported = (json.loads(run(path, fashion, "--json").stdout) for path in (tiny_run, tiny_bundle))
    for classifier in ("knn", "probe"):
        # Float32 noise may move an image that lies on a border, not more.
        assert trained["encoder"][classifier]["accuracy"] == pytest.approx(
            exported["encoder"][classifier]["accuracy"], abs=1.5 / 80
        )
    assert trained["raw_pixels"] == exported["raw_pixels"]


def test_bad_input_is_one_sentence_and_its_exit_code(bundle: Path, fashion: Path, tmp_path: Path) -> None:
    one_class = next(path for path in fashion.iterdir() if path.is_dir())
    for words, code, text in (
        ((bundle, one_class), 3, "lie directly in it"),
        ((bundle, tmp_path / "absent"), 3, "does not exist"),
        ((tmp_path / "absent.onnx", fashion), 3, "does not exist"),
        ((bundle, fashion, "--test-share", "2"), 2, "test_share is 2"),
        ((bundle, fashion, "--provider", "nonsense"), 2, "nonsense"),
    ):
        shown = run(*words)
        assert shown.returncode == code, shown.stdout + shown.stderr
        assert text in shown.stderr
        assert "Traceback" not in shown.stderr
        assert shown.stdout == ""
