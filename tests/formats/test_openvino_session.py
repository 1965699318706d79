"""OpenVINO prepared for numbers of images: what it computes must not depend on that."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_deploy import Bundle, Encoder, export, formats
from byol_deploy.errors import UsageError
from byol_deploy.formats import RunOptions
from byol_deploy.selftest import self_test

openvino = pytest.importorskip("openvino")
from byol_deploy.formats._openvino_session import Session  # noqa: E402
from byol_deploy.formats.openvino import core, read  # noqa: E402


class Counting:
    """OpenVINO's core, and the shape and streams of everything that it compiled."""

    def __init__(self) -> None:
        self.made: list[tuple[int | None, int]] = []

    def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
        size = model.inputs[0].partial_shape[0]
        self.made.append((size.get_length() if size.is_static else None, settings["NUM_STREAMS"]))
        return core().compile_model(model, device, settings)


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tiny_run, formats=["openvino"], data=fashion, out=tmp_path_factory.mktemp("fixed") / "bundle")


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> np.ndarray:
    side = bundle.manifest.preprocessing.size_px
    return np.random.default_rng(0).integers(0, 256, (19, side, side, 3), dtype=np.uint8)


def session(bundle: Bundle, *batches: int, streams: int = 1) -> tuple[Session, Counting]:
    counting = Counting()
    settings = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
    return Session(counting, read(bundle.path / "model.openvino.xml"), settings, batches, streams), counting


@pytest.mark.parametrize("streams", [1, 2])
def test_every_number_of_images_gives_what_an_open_shape_gives(
    bundle: Bundle, images: np.ndarray, streams: int
) -> None:
    plain, fixed = session(bundle)[0], session(bundle, 1, 4, 8, streams=streams)[0]
    for count in range(1, len(images) + 1):
        expected, found = plain.run(images[:count], None), fixed.run(images[:count], None)
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert found[name].shape == values.shape
            assert np.allclose(found[name], values, rtol=1e-4, atol=1e-5), (count, name)


def test_a_form_is_compiled_when_it_is_first_needed(bundle: Bundle, images: np.ndarray) -> None:
    fixed, counting = session(bundle, 8, 1, streams=2)
    assert counting.made == [(1, 1)], "one image cannot be cut into two parts"
    fixed.run(images[:1], None)
    assert counting.made == [(1, 1)]
    for _ in range(2):
        fixed.run(images[:17], ["embedding"])
    assert counting.made == [(1, 1), (4, 2)], "8 + 8 + 1, the eight as four beside four"
    fixed.run(images[:3], None)
    assert counting.made == [(1, 1), (4, 2), (None, 1)], "three at once, not one after the other"
    assert session(bundle)[1].made == [(None, 1)]


@pytest.mark.parametrize("streams", [1, 2])
def test_pixels_that_may_only_be_read(bundle: Bundle, images: np.ndarray, streams: int) -> None:
    fixed, _ = session(bundle, 8, streams=streams)
    guarded = images[:8].copy()
    guarded.flags.writeable = False
    found, expected = fixed.run(guarded, None), fixed.run(images[:8], None)
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_outputs_are_not_overwritten_by_the_next_call(bundle: Bundle, images: np.ndarray) -> None:
    fixed, _ = session(bundle, 8, streams=2)
    first = fixed.run(images[:8], ["embedding"])["embedding"]
    kept = first.copy()
    fixed.run(images[8:16], ["embedding"])
    assert np.array_equal(first, kept)


def test_several_threads_may_call_at_once(bundle: Bundle, images: np.ndarray) -> None:
    fixed, counting = session(bundle, 1, 8, streams=2)
    expected = session(bundle)[0].run(images, ["embedding"])["embedding"]

    def rows(start: int) -> bool:
        found = fixed.run(images[start : start + 9], ["embedding"])["embedding"]
        return bool(np.allclose(found, expected[start : start + 9], rtol=1e-4, atol=1e-5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(rows, [0, 3, 5, 7, 9, 10] * 8))
    assert sorted(counting.made) == [(1, 1), (4, 2)], "each form once, whoever asks first"


def test_the_encoder_takes_batches_and_streams(bundle: Bundle, images: np.ndarray) -> None:
    plain, fixed = Encoder(bundle.path), Encoder(bundle.path, batches=(1, 8), streams=2, threads=2)
    assert fixed.session.inputs[0].partial_shape[0].is_static
    assert plain.session.inputs[0].partial_shape[0].is_dynamic
    assert np.allclose(plain(images), fixed(images), rtol=1e-4, atol=1e-5)
    for wrong in ({"batches": (1, 0)}, {"batches": (True,)}, {"streams": 0}):
        with pytest.raises(UsageError, match="is no whole number from 1"):
            Encoder(bundle.path, **wrong)  # type: ignore[arg-type]


def test_the_gate_runs_every_file_as_tuning_may_choose_it(bundle: Bundle) -> None:
    (entry,) = bundle.manifest.artefacts
    subjects = {row["subject"] for row in entry.parity["rows"]}
    assert any("fixed shapes, batch 9" in subject for subject in subjects), subjects


def test_one_thread_has_one_stream(bundle: Bundle, images: np.ndarray) -> None:
    path = bundle.path / "model.openvino.xml"
    opened = formats.get("openvino").load(path, RunOptions(threads=1, batches=(8,), streams=2))
    assert opened.session.inputs[0].partial_shape[0].get_length() == 8
    assert opened(images[:8])["embedding"].shape[0] == 8


def test_self_test_runs_the_tuned_file_as_it_was_tuned(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    made = export(tiny_run, formats=["openvino"], precisions=["bf16"], tune_s=15, agreement=0.9, data=fashion,
                  out=tmp_path / "bundle")  # fmt: skip
    assert made.manifest.tuned is not None
    assert self_test(made.path).file == made.manifest.tuned.file
