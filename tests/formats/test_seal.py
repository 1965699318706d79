"""A sealed file: texts are added without touching the model, and any changed byte shows, in every format."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_deploy import formats
from byol_deploy.bundle import CARRIED_ARTEFACT_KEY, Bundle, carry, read_artefact, read_carried, seal_artefact
from byol_deploy.errors import BundleError
from byol_deploy.formats import Signature
from byol_deploy.host import describe_host
from byol_deploy.selftest import check_content, self_test

tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))


class Twin(torch.nn.Module):
    """The tiny encoder of the torch-free tests in PyTorch."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, value in tiny["weights"]().items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(value)))
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = ((images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        embedding = torch.nn.functional.conv2d(x, self.conv, stride=2).relu().mean((2, 3))
        projection = embedding @ self.project
        return embedding, projection, projection @ self.predict


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One sealed lone file per format."""
    root = tmp_path_factory.mktemp("sealed")
    bundle = Bundle.open(tiny["write_bundle"](root / "bundle"))
    preprocessing = bundle.manifest.preprocessing
    twin = Twin(preprocessing.mean, preprocessing.std).eval()
    signature = Signature(preprocessing.size_px, tuple(tiny["WIDTHS"]))
    texts = carry(bundle.manifest, bundle.golden, sealed=True)
    found = {}
    for format in map(formats.get, formats.available()):
        if any(importlib.util.find_spec(package) is None for package in format.requires):
            continue
        if format.name == "aotinductor" and not (shutil.which("g++") or shutil.which("clang++")):
            continue
        path = root / format.name / f"lone{format.suffix}"
        path.parent.mkdir()
        further = format.export(twin, signature, path, texts)
        before = format.content_hash(path)
        host = describe_host(runtime=format.runs_with[0])
        made = seal_artefact(path, format, "fp32", host, tuple(item.name for item in further))
        assert made.content == before == format.content_hash(path)
        assert read_artefact(format.carried(path)) == made
        found[format.name] = path
    return found


@pytest.fixture(params=formats.available())
def lone(request: pytest.FixtureRequest, sealed: dict[str, Path], tmp_path: Path) -> tuple[Any, Path]:
    if request.param not in sealed:
        pytest.skip(f"{request.param} is not installed")
    source = sealed[request.param]
    for item in source.parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    return formats.get(request.param), tmp_path / source.name


def is_caught(format: Any, path: Path) -> bool:
    """Whether parsing, the hashes of the texts or the content hash refuse the file; nothing is run."""
    try:
        texts = format.carried(path)
        read_carried(texts)
        return read_artefact(texts) is None or check_content(path, format, "fp32")[0] != "passed"
    except BundleError:
        return True


def test_a_sealed_file_passes_its_self_test(lone: tuple[Any, Path]) -> None:
    format, path = lone
    assert not is_caught(format, path)
    if format.runs_here():
        pytest.skip(format.runs_here())
    found = self_test(path, threads=1)
    assert found.passed, found.text()
    assert found.content == "passed"
    assert {row.subject.partition(", ")[2] for row in found.report.rows} == {
        "golden cases, batch 3",
        "golden cases, batch 1",
        "golden files, same pixels",
    }


def test_any_changed_byte_is_caught(lone: tuple[Any, Path]) -> None:
    format, path = lone
    for file in sorted(path.parent.iterdir()):
        assert changed_bytes_that_pass(format, path, file) == [], file.name
    assert not is_caught(format, path)


def changed_bytes_that_pass(format: Any, path: Path, file: Path) -> list[int]:
    whole = file.read_bytes()
    draw = np.random.default_rng(0)
    # All over the file, and close together where the texts, their keys and the containers' bookkeeping lie.
    places = {
        *draw.integers(0, len(whole), 400).tolist(),
        *range(0, min(200, len(whole)), 3),
        *range(max(len(whole) - 400, 0), len(whole), 3),
    }
    for key in format.carried(path):
        at = whole.find(key.encode())
        places |= set(range(max(at - 45, 0), at + len(key) + 8))
    missed = []
    for place in sorted(places):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(draw.integers(8))
        file.write_bytes(changed)
        if not is_caught(format, path):
            missed.append(place)
    file.write_bytes(whole)
    return missed


@pytest.mark.parametrize(
    "change",
    [lambda data: data[: len(data) // 2], lambda data: data[:-1], lambda data: data + b"\0", lambda data: data + data],
    ids=["half", "one byte short", "one byte more", "twice"],
)
def test_a_cut_or_lengthened_file_is_caught(lone: tuple[Any, Path], change: Callable[[bytes], bytes]) -> None:
    format, path = lone
    for file in sorted(path.parent.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(change(whole))
        assert is_caught(format, path), file.name
        file.write_bytes(whole)


def test_the_model_of_another_file_under_this_files_texts_is_caught(
    lone: tuple[Any, Path], sealed: dict[str, Path], tmp_path: Path
) -> None:
    format, path = lone
    bundle = Bundle.open(sealed["onnx"].parents[1] / "bundle")
    twin = Twin(bundle.manifest.preprocessing.mean, bundle.manifest.preprocessing.std).eval()
    with torch.no_grad():
        twin.conv[0, 0, 0, 0] += 1e-6
    stale = tmp_path / f"stale{format.suffix}"
    format.export(twin, Signature(16, tuple(tiny["WIDTHS"])), stale, format.carried(path))
    assert check_content(stale, format, "fp32")[0] == "failed"
    if format.runs_here():
        pytest.skip(format.runs_here())
    found = self_test(stale, threads=1)
    assert found.report.passed, "the numbers alone cannot tell"
    assert found.content == "failed"
    assert not found.passed
    assert "not the file that was exported" in found.text()


def test_a_seal_cannot_be_added_twice(lone: tuple[Any, Path]) -> None:
    format, path = lone
    before = {item.name: item.read_bytes() for item in path.parent.iterdir()}
    with pytest.raises(ValueError, match="sealed already"):
        seal_artefact(path, format, "fp32", {})
    with pytest.raises(ValueError, match="already"):
        format.seal(path, {CARRIED_ARTEFACT_KEY: "x"})
    assert {item.name: item.read_bytes() for item in path.parent.iterdir()} == before


def test_a_foreign_text_beside_ours_is_no_change(lone: tuple[Any, Path]) -> None:
    format, path = lone
    format.seal(path, {"author": "someone, ünïcode"})
    assert format.carried(path)["author"] == "someone, ünïcode"
    assert not is_caught(format, path)
    format.seal(path, {"byol_deploy.more": "x"})
    assert is_caught(format, path)


# --- ONNX ------------------------------------------------------------------------------------------------------


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def nested(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    content = b""
    for _ in range(depth):
        for number in (6, 5, 1):
            size, length = len(content), bytearray()
            while True:
                length.append(size & 0x7F | (0x80 if size >= 0x80 else 0))
                size >>= 7
                if not size:
                    break
            content = bytes([number << 3 | 2]) + bytes(length) + content
    return content


GRAPH = field(7, field(2, b"g"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"\x08\x08", "no graph"),
        (GRAPH + b"\xff" * 11, "longer than any"),
        (GRAPH + b"\x72\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "reaches past the end"),
        (GRAPH + b"\x72\x80", "ends within a number"),
        (GRAPH + b"\x73", "begins no field"),
        (GRAPH + b"\x02\x00", "begins no field"),
        (GRAPH + b"\x09\x00", "reaches past the end"),
        (GRAPH + field(14, field(1, b"a") + field(1, b"b")), "no pair"),
        (GRAPH + field(14, field(1, b"a") + field(3, b"b")), "no pair"),
        (GRAPH + 2 * field(14, field(1, b"a") + field(2, b"b")), "twice"),
        (GRAPH + field(14, field(1, b"a") + field(2, b"\xff")), "not UTF-8"),
    ],
)
def test_an_onnx_file_from_a_stranger(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=said):
        formats.get("onnx").carried(path)


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    inner = nested(400)
    path.write_bytes(b"\x3a" + struct.pack("BB", len(inner) & 0x7F | 0x80, len(inner) >> 7) + inner)
    with pytest.raises(BundleError, match="nested more than"):
        formats.get("onnx").content_hash(path)


def test_texts_are_what_onnx_runtime_reads(sealed: dict[str, Path]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(sealed["onnx"], providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == formats.get("onnx").carried(sealed["onnx"])


def test_external_data_is_part_of_the_content(tmp_path: Path) -> None:
    bundle = tiny["write_bundle"](
        tmp_path / "bundle", save_as_external_data=True, location="model.onnx.data", size_threshold=64
    )
    path, data = bundle / "model.onnx", bundle / "model.onnx.data"
    assert self_test(bundle, threads=1).passed
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(path, lone / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx\.data, which is missing"):
        self_test(lone / "model.onnx", threads=1)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    (lone / "model.onnx.data").write_bytes(content)
    found = self_test(lone / "model.onnx", threads=1)
    assert found.content == "failed"
    assert not found.passed
    shutil.copy(data, lone / "model.onnx.data")
    assert self_test(lone / "model.onnx", threads=1).passed


@pytest.mark.parametrize("how", ["name", "link"])
def test_external_data_outside_the_folder_is_not_read(how: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(tmp_path / "secret", folder / "link")
    location = b"../secret" if how == "name" else b"link"
    tensor = field(13, field(1, b"location") + field(2, location))
    path = folder / "model.onnx"
    path.write_bytes(field(7, field(5, tensor)))
    with pytest.raises(BundleError, match="leaves its folder"):
        formats.get("onnx").content_hash(path)


# --- TorchScript -----------------------------------------------------------------------------------------------


def test_torchscript_entries_stay_aligned_and_stored(sealed: dict[str, Path]) -> None:
    path = sealed["torchscript"]
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
            assert (entry.header_offset + 30 + name + extra) % 64 == 0, entry.filename
            assert entry.compress_type == zipfile.ZIP_STORED
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)


def test_torchscript_written_anew_by_another_program_is_caught(sealed: dict[str, Path], tmp_path: Path) -> None:
    for method, said in ((zipfile.ZIP_STORED, "not as it was written"), (zipfile.ZIP_DEFLATED, "compressed")):
        anew = tmp_path / "anew.torchscript.pt"
        with zipfile.ZipFile(sealed["torchscript"]) as source, zipfile.ZipFile(anew, "w", method) as target:
            for entry in source.infolist():
                target.writestr(entry.filename, source.read(entry))
        with pytest.raises(BundleError, match=said):
            formats.get("torchscript").content_hash(anew)


def test_torchscript_with_two_entries_of_one_name_is_refused(sealed: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(sealed["torchscript"], tmp_path / "x.torchscript.pt"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(BundleError, match="two of one name"):
        formats.get("torchscript").content_hash(path)
