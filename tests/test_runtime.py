"""The encoder, on real sessions of a tiny real graph, against NumPy."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_deploy.bundle import Bundle, carry
from byol_deploy.errors import BundleError, DataError, ProviderError, UsageError
from byol_deploy.images import BadImages, ImageSource
from byol_deploy.runtime import Encoder, create_session, probe_provider, usable_cores, working_providers

tiny = runpy.run_path(str(Path(__file__).with_name("tiny_encoder.py")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle")


@pytest.fixture(scope="module")
def encoder(whole: Path) -> Encoder:
    return Encoder(whole, threads=2)


def picture(seed: int = 0, height: int = 30, width: int = 25) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- embedding -------------------------------------------------------------------------------------------------


def test_it_computes_what_numpy_computes(encoder: Encoder) -> None:
    images = [picture(seed) for seed in range(5)]
    expected = tiny["expected"](encoder.preprocessing.batch(images), encoder.preprocessing)["embedding"]
    found = encoder(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_it_describes_itself(encoder: Encoder, whole: Path) -> None:
    assert encoder.path == whole
    assert encoder.width == 8
    assert encoder.outputs == ("embedding",)
    assert encoder.provider == "CPUExecutionProvider"
    assert encoder.threads == 2
    assert encoder.manifest.model.backbone == "tests/tiny"
    assert encoder.golden.images.shape == (3, 16, 16, 3)
    assert "tests/tiny" in repr(encoder)


def test_every_kind_of_source(encoder: Encoder, tmp_path: Path) -> None:
    array = picture()
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    one = encoder(tmp_path / "a.png")
    assert one.shape == (1, 8)
    for source in (str(tmp_path / "a.png"), data, image, array, [array], (array,), array[None]):
        np.testing.assert_array_equal(encoder(source), one)
    sources: list[ImageSource] = [tmp_path / "a.png", data, image, array]
    np.testing.assert_allclose(encoder(sources), np.repeat(one, 4, axis=0), rtol=1e-5)
    np.testing.assert_allclose(encoder(iter(sources)), np.repeat(one, 4, axis=0), rtol=1e-5)


def test_an_array_of_images_goes_through_the_same_preprocessing(encoder: Encoder) -> None:
    stack = np.stack([picture(seed, 16, 16) for seed in range(3)])
    np.testing.assert_allclose(encoder(stack), encoder(list(stack)), rtol=1e-6)
    # 16 px is the right size already, but the contract resizes to 20 and crops: no shortcut.
    assert not np.allclose(encoder(stack), encoder.run(stack)["embedding"])


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32])
def test_any_batch_size_gives_the_same_rows_in_order(batch_size: int, encoder: Encoder) -> None:
    images = [picture(seed) for seed in range(11)]
    singly = np.concatenate([encoder(image) for image in images])
    np.testing.assert_allclose(encoder(images, batch_size), singly, rtol=1e-5, atol=1e-6)


def test_nothing_gives_no_rows(encoder: Encoder) -> None:
    assert encoder([]).shape == (0, 8)
    assert encoder.run(np.empty((0, 16, 16, 3), np.uint8))["embedding"].shape == (0, 8)
    assert encoder(np.empty((0, 16, 16, 3), np.uint8)).shape == (0, 8)


def test_outputs_are_chosen(whole: Path, encoder: Encoder) -> None:
    images = encoder.golden.images
    everything = Encoder(whole, outputs="all").run(images)
    assert {name: value.shape for name, value in everything.items()} == {
        "embedding": (3, 8),
        "projection": (3, 4),
        "prediction": (3, 4),
    }
    for name, value in encoder.golden.outputs.items():
        np.testing.assert_allclose(everything[name], value, rtol=1e-4, atol=1e-4)
    projecting = Encoder(whole, outputs="projection")
    assert projecting.width == 4
    np.testing.assert_array_equal(projecting.run(images)["projection"], everything["projection"])
    assert Encoder(whole, outputs=("prediction", "embedding")).outputs == ("prediction", "embedding")
    with pytest.raises(BundleError, match="no output 'features'; it has embedding, projection, prediction"):
        Encoder(whole, outputs=("embedding", "features"))
    with pytest.raises(UsageError, match="outputs is empty"):
        Encoder(whole, outputs=())


def test_run_takes_preprocessed_images_only(encoder: Encoder) -> None:
    for images in (picture(), np.zeros((1, 17, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.float32), [picture()]):
        with pytest.raises(DataError, match=r"\(N, 16, 16, 3\) uint8"):
            encoder.run(images)  # type: ignore[arg-type]


def test_bad_images_raise_or_are_skipped_with_their_places(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"x")
    sources: list[ImageSource] = [picture(0), tmp_path / "bad.png", picture(1), b"", picture(2)]
    with pytest.raises(DataError, match=r"bad\.png"):
        encoder(sources)
    bad = BadImages(1)
    batches = list(encoder.stream(sources, 2, bad))
    assert [batch.positions for batch in batches] == [[0, 2], [4]]
    assert [name for name, _ in bad.items] == [str(tmp_path / "bad.png"), "an image given as 0 bytes"]
    good = encoder([picture(0), picture(1), picture(2)])
    np.testing.assert_allclose(np.concatenate([batch.outputs["embedding"] for batch in batches]), good, rtol=1e-5)
    with pytest.raises(DataError):
        encoder(3)  # type: ignore[arg-type]


def test_a_stream_takes_no_more_than_it_needs(encoder: Encoder) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield picture(taken)

    stream = encoder.stream(endless(), 4)
    for _ in range(3):
        next(stream)
    stream.close()
    assert 12 <= taken <= 12 + 4 + 8 + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("byol-deploy-decode")]


def test_many_threads_may_call_it(encoder: Encoder) -> None:
    images = [picture(seed) for seed in range(8)]
    expected = [encoder(image) for image in images]
    found: dict[int, np.ndarray] = {}

    def work(position: int) -> None:
        for _ in range(5):
            found[position] = encoder(images[position])

    threads = [threading.Thread(target=work, args=(position,)) for position in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for position, row in enumerate(expected):
        np.testing.assert_array_equal(found[position], row)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_batch_sizes_out_of_range(batch_size: int, encoder: Encoder) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        encoder(picture(), batch_size)


# --- opening ---------------------------------------------------------------------------------------------------


def test_a_lone_file_is_a_whole_encoder(whole: Path, encoder: Encoder, tmp_path: Path) -> None:
    lone = Encoder(shutil.copy(whole / "model.onnx", tmp_path / "mailed.onnx"), threads=2)
    np.testing.assert_array_equal(lone(picture()), encoder(picture()))
    assert lone.manifest.model == encoder.manifest.model


def foreign(path: Path) -> Path:
    from byol_deploy.providers import doubling_model

    path.write_bytes(doubling_model())
    return path


def test_files_that_are_not_ours(whole: Path, tmp_path: Path) -> None:
    model = (whole / "model.onnx").read_bytes()
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/code/x.py", "")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "cut.onnx").write_bytes(model[: len(model) // 2])
    (tmp_path / "random.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    foreign(tmp_path / "foreign.onnx")
    (tmp_path / "folder").mkdir()
    for name, said in {
        "absent.onnx": "does not exist",
        "model.pt": "TorchScript",
        "empty.onnx": "is empty",
        "cut.onnx": "not an ONNX file, or is damaged",
        "random.onnx": "not an ONNX file, or is damaged",
        "text.onnx": "not an ONNX file, or is damaged",
        "foreign.onnx": "not a byol-deploy file",
        "folder": "not a bundle",
    }.items():
        with pytest.raises(BundleError, match=said) as caught:
            Encoder(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_external_data_that_stayed_behind(whole: Path, tmp_path: Path) -> None:
    opened = Bundle.open(whole)
    target = tmp_path / "model.onnx"
    tiny["write_onnx"](
        target,
        opened.manifest.preprocessing,
        carry(opened.manifest, opened.golden),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    assert Encoder(target)(picture()).shape == (1, 8)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"second file.*\.data file"):
        Encoder(target)


def test_a_graph_that_contradicts_its_manifest(whole: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from byol_deploy.bundle import Golden, Output

    opened = Bundle.open(whole)
    more = replace(opened.manifest, outputs=(*opened.manifest.outputs, Output("features", 5)))
    golden = Golden(opened.golden.images, {**opened.golden.outputs, "features": np.zeros((3, 5), np.float32)})
    tiny["write_onnx"](tmp_path / "model.onnx", more.preprocessing, carry(more, golden))
    with pytest.raises(BundleError, match="has no output features"):
        Encoder(tmp_path / "model.onnx")


def test_heads_that_nobody_asks_for_are_not_computed(whole: Path) -> None:
    few, every = Encoder(whole), Encoder(whole, outputs="all")
    assert [output.name for output in few.session.get_outputs()] == ["embedding"]
    assert [output.name for output in every.session.get_outputs()] == ["embedding", "projection", "prediction"]
    assert np.array_equal(few(picture()), every(picture()))


# --- providers, threads, memory --------------------------------------------------------------------------------


def test_the_cpu_works_and_is_the_last_resort() -> None:
    assert probe_provider("cpu") == (True, "it computed a test model")
    assert probe_provider("CPUExecutionProvider")[0]
    assert working_providers()[-1] == "CPUExecutionProvider"


def test_a_provider_that_does_not_work_is_an_error_that_says_why(whole: Path) -> None:
    works, reason = probe_provider("CoreMLExecutionProvider" if sys.platform != "darwin" else "DmlExecutionProvider")
    assert not works
    assert "does not contain it" in reason
    with pytest.raises(ProviderError, match=r"does not work here.*does not contain it.*--provider cpu"):
        Encoder(whole, provider="coreml" if sys.platform != "darwin" else "dml")
    with pytest.raises(UsageError, match=r"provider 'gpu' is not one .*cuda"):
        Encoder(whole, provider="gpu")


def test_the_probe_of_a_gpu_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    from byol_deploy import providers

    for name in ("cuda", "tensorrt"):
        providers._probe.cache_clear()
        works, reason = probe_provider(name)
        assert works or len(reason) > 10
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == ""


def test_libraries_that_are_missing_are_named() -> None:
    from byol_deploy import providers

    said = (
        "[E:onnxruntime] Failed to load library x.so with error: libcudnn.so.9: cannot open shared object file: No such"
    )
    assert "libcudnn.so.9 is missing" in providers._in_words(said)
    assert "no GPU" in providers._in_words("CUDA failure 100: no CUDA-capable device is detected")
    assert providers._in_words("\x1b[1;31mfirst\n\x1b[mlast words") == "last words"
    assert providers._in_words("") == "it gave no reason"


def test_auto_takes_the_best_that_works(whole: Path) -> None:
    assert Encoder(whole, provider="auto").provider in working_providers()


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_thread_counts_out_of_range(threads: int, whole: Path) -> None:
    with pytest.raises(UsageError, match="threads is"):
        Encoder(whole, threads=threads)


def test_session_options_arrive(whole: Path) -> None:
    session = create_session((whole / "model.onnx").read_bytes(), threads=3, optimization="none", allow_spinning=False)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert create_session(whole / "model.onnx").get_session_options().intra_op_num_threads == usable_cores()
    with pytest.raises(UsageError, match="optimization is 'fast'"):
        create_session(whole / "model.onnx", optimization="fast")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_an_encoder_process_stays_small_and_light(whole: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(0, 480, 640)).save(tmp_path / "a.jpg")
    code = f"""
import re, sys
from byol_deploy import Encoder
encoder = Encoder({str(whole)!r})
encoder([{str(tmp_path / "a.jpg")!r}] * 100)
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(int(peak) // 1024, [name for name in ("torch", "onnx", "scipy", "pandas", "pyarrow") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    megabytes, loaded = shown.stdout.split(maxsplit=1)
    assert int(megabytes) < 150
    assert loaded.strip() == "[]"
