"""The bundle: written whole or not at all, and read as data from a stranger."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import runpy
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_deploy import bundle as bundle_module
from byol_deploy import formats
from byol_deploy import golden as golden_module
from byol_deploy.bundle import (
    CARRIED_ARTEFACT_KEY,
    CARRIED_GOLDEN_KEY,
    CARRIED_MANIFEST_KEY,
    Bundle,
    CarriedArtefact,
    Golden,
    Manifest,
    carry,
    golden_from_bytes,
    golden_to_bytes,
    parameter_hash,
    publish,
    read_artefact,
    read_carried,
    seal_artefact,
    sha256_file,
)
from byol_deploy.errors import BundleError, OutputError

tiny = runpy.run_path(str(Path(__file__).with_name("tiny_encoder.py")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- reading ---------------------------------------------------------------------------------------------------


def test_a_whole_bundle_opens(whole: Path) -> None:
    opened = Bundle.open(whole)
    assert opened.manifest.model.backbone == "tests/tiny"
    assert opened.manifest.preprocessing.size_px == 16
    assert opened.golden.images.shape == (3, 16, 16, 3)
    assert opened.artefact() == opened.artefact("onnx", "fp32") == whole / "model.onnx"
    with pytest.raises(BundleError, match=r"has no torchscript; it has model\.onnx"):
        opened.artefact("torchscript")
    assert Bundle.open(str(whole)).manifest == opened.manifest


def test_manifest_comes_back_from_json(whole: Path) -> None:
    manifest = Bundle.open(whole).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads((whole / "manifest.json").read_text())["input"]["channels"] == "RGB"


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing", "empty"])
def test_every_file_is_checked_and_named(name: str, how: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes({"changed": data, "cut": data[:-9], "empty": b""}[how])
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.open(copy)


def test_extra_files_are_checked_too(copy: Path) -> None:
    (copy / "model.onnx.data").write_bytes(b"weights")
    entry = {"file": "model.onnx.data", "sha256": sha256_file(copy / "model.onnx.data"), "bytes": 7}
    edit(copy, lambda manifest: manifest["artefacts"][0].update(extra_files=[entry]))
    Bundle.open(copy)
    (copy / "model.onnx.data").write_bytes(b"weighty")
    with pytest.raises(BundleError, match=r"model\.onnx\.data was changed"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/hostname",
        "a/../../secret",
        "./model.onnx",
        "a//b",
        "model.onnx/",
        "..",
        "",
        "C:\\model.onnx",
        "C:model.onnx",
        "a\\b",
        "nul",
        "aux.onnx",
        "model.onnx\0.txt",
        "model.onnx ",
        "model.onnx.",
        "x" * 300,
        "line\nbreak",
    ],
)
@pytest.mark.parametrize("where", ["artefact", "golden"])
def test_a_path_that_leaves_the_folder_is_refused(name: str, where: str, copy: Path) -> None:
    (copy.parent / "secret").write_text("x")
    edit(copy, lambda m: (m["artefacts"][0] if where == "artefact" else m["golden"]).update(file=name))
    with pytest.raises(BundleError, match=r"stays in the bundle|must be text"):
        Bundle.open(copy)


def test_a_link_that_leaves_the_folder_is_refused(copy: Path) -> None:
    shutil.move(copy / "model.onnx", copy.parent / "elsewhere.onnx")
    os.symlink(copy.parent / "elsewhere.onnx", copy / "model.onnx")
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(copy)
    (copy / "model.onnx").unlink()
    shutil.move(copy.parent / "elsewhere.onnx", copy / "kept.onnx")
    os.symlink("kept.onnx", copy / "model.onnx")
    assert Bundle.open(copy).artefact() == copy / "model.onnx"


def test_a_newer_schema_is_refused_with_the_version_that_reads_it(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(schema=2, readable_from="0.7.0", model="quite another form"))
    with pytest.raises(BundleError, match=r"schema 2.*reads schema 1.*'byol-deploy>=0\.7\.0'"):
        Bundle.open(copy)
    edit(copy, lambda manifest: manifest.update(readable_from="$(rm -rf ~)"))
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert "rm -rf" not in str(caught.value)


@pytest.mark.parametrize("schema", [None, "1", True, 0, -1, 1.5, [1]])
def test_a_schema_that_is_none_of_ours(schema: object, copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(schema=schema))
    with pytest.raises(BundleError, match="not a byol-deploy manifest"):
        Bundle.open(copy)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown preprocessing": (lambda m: m["input"].update(sharpen=2), "unknown key 'sharpen'"),
    "bgr": (lambda m: m["input"].update(channels="BGR"), "channels is 'BGR'"),
    "float input": (lambda m: m["input"].update(dtype="float32"), "input.dtype"),
    "std of zero": (lambda m: m["input"].update(std=[0, 1, 1]), "three positive numbers"),
    "no outputs": (lambda m: m.update(outputs=[]), "at least one"),
    "twice the same": (lambda m: m.update(outputs=m["outputs"][:1] * 2), "its own name"),
    "width as text": (lambda m: m["outputs"][0].update(width="8"), "outputs[0].width is '8'"),
    "huge width": (lambda m: m["outputs"][0].update(width=10**400), "outputs[0].width"),
    "short hash": (lambda m: m["artefacts"][0].update(sha256="abc"), "artefacts[0].sha256"),
    "negative size": (lambda m: m["artefacts"][0].update(bytes=-1), "artefacts[0].bytes"),
    "size is true": (lambda m: m["artefacts"][0].update(bytes=True), "artefacts[0].bytes is True"),
    "artefacts as text": (lambda m: m.update(artefacts="model.onnx"), "a list of at most"),
    "artefact as text": (lambda m: m.update(artefacts=["model.onnx"]), "a list of objects"),
    "momentum branch": (lambda m: m["model"].update(branch="momentum"), "model.branch is 'momentum'"),
    "no hash": (lambda m: m["model"].pop("parameter_hash"), "model.parameter_hash is missing"),
    "keys as numbers": (lambda m: m["model"].update(stripped_keys=[1]), "a list of texts"),
    "infinite limit": (lambda m: m["limits"]["embedding"].update(cosine=1e999), "not JSON"),
    "limit as text": (lambda m: m["limits"]["embedding"].update(cosine="1"), "an object of finite numbers"),
    "no model": (lambda m: m.pop("model"), "model is missing"),
    "no golden": (lambda m: m.pop("golden"), "lists no golden cases"),
    "no artefacts": (lambda m: m.update(artefacts=[]), "lists no artefacts"),
    "golden count": (lambda m: m["golden"].update(count=2), "there are 3 golden cases"),
    "golden width": (lambda m: m["outputs"][0].update(width=9), "8 wide"),
    "golden size": (lambda m: m["input"].update(size_px=17), "(17, 17, 3)"),
    "output without golden": (lambda m: m["outputs"].append({"name": "more", "width": 1}), "more has no golden"),
    "half a surrogate": (lambda m: m.update(created="\ud800"), "not JSON"),
    "endless text": (lambda m: m.update(created="x" * 10_000), "created"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_manifest_is_named(fault: str, copy: Path) -> None:
    change, said = FAULTS[fault]
    edit(copy, change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert said in str(caught.value)


def test_all_faults_are_listed_at_once(copy: Path) -> None:
    edit(copy, lambda m: (m["model"].update(width=0), m.update(created=3), m["input"].update(layout="NCHW")))
    with pytest.raises(BundleError, match=r"3 fault\(s\)") as caught:
        Bundle.open(copy)
    for part in ("model.width", "created", "input.layout"):
        assert part in str(caught.value)


def test_keys_that_are_not_known_are_ignored_outside_the_input(copy: Path) -> None:
    edit(copy, lambda m: (m.update(remark="x"), m["model"].update(licence="x"), m["artefacts"][0].update(speed=1)))
    assert Bundle.open(copy).manifest.model.width == 8


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b"9" * 10_000, b'"x"']
)
def test_a_manifest_that_is_no_json_object(text: bytes, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(copy)


def test_a_manifest_beyond_the_size_limit(copy: Path) -> None:
    with open(copy / "manifest.json", "ab") as file:
        file.truncate(bundle_module.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match="larger than the limit"):
        Bundle.open(copy)


def test_any_value_anywhere_is_a_bundle_error_or_fine(whole: Path) -> None:
    """Replace each value of the manifest in turn by awkward ones: never another exception."""
    text = (whole / "manifest.json").read_text()
    awkward: list[Any] = [None, True, -1, 1.5, 10**400, "", "x", [], {}, [[]], [None], {"a": None}]

    def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]

    count = 0
    for *parents, last in places(json.loads(text)):
        for value in awkward:
            data = json.loads(text)
            node = data
            for key in parents:
                node = node[key]
            node[last] = value
            try:
                Manifest.from_dict(data)
            except BundleError:
                count += 1
    assert count > 300


def test_what_is_no_bundle(tmp_path: Path, whole: Path) -> None:
    for path, said in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path, "not a bundle"),
        (whole / "model.onnx", "is a file"),
    ):
        with pytest.raises(BundleError, match=said):
            Bundle.open(path)


# --- golden cases and carried metadata -------------------------------------------------------------------------


def cases(count: int = 2) -> Golden:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    widths = {"embedding": 8, "projection": 4, "prediction": 4}
    return Golden(images, {name: draw.standard_normal((count, w)).astype(np.float32) for name, w in widths.items()})


def test_golden_cases_come_back_and_numpy_reads_them() -> None:
    golden = cases()
    data = golden_to_bytes(golden)
    assert data == golden_to_bytes(golden)
    back = golden_from_bytes(data)
    np.testing.assert_array_equal(back.images, golden.images)
    assert list(back.outputs) == list(golden.outputs)
    np.testing.assert_array_equal(back.outputs["embedding"], golden.outputs["embedding"])
    np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False)["images"], golden.images)


def with_files(count: int = 2, **changes: Any) -> Golden:
    """Golden cases with image files; any bytes will do here."""
    golden = cases()
    files = {f"picture-{number}.png": bytes([number + 1]) * 5 for number in range(count)}
    values = {
        "files": files,
        "pixels_sha256": {name: f"{number:064x}" for number, name in enumerate(files)},
        "file_outputs": {name: np.ones((count, rows.shape[1]), np.float32) for name, rows in golden.outputs.items()},
    }
    return Golden(golden.images, golden.outputs, **(values | changes))


def test_golden_files_come_back_in_their_order() -> None:
    golden = with_files(files := 5)
    data = golden_to_bytes(golden)
    assert data == golden_to_bytes(golden)
    back = golden_from_bytes(data)
    assert list(back.files) == list(golden.files)
    assert back.files == golden.files
    assert back.pixels_sha256 == golden.pixels_sha256
    assert back.file_outputs["embedding"].shape == (files, 8)
    assert golden_from_bytes(golden_to_bytes(cases())).files == {}


def test_golden_cases_of_an_older_version_are_read() -> None:
    golden = cases()
    stream = io.BytesIO()
    np.savez(stream, images=golden.images, **{f"outputs.{name}": rows for name, rows in golden.outputs.items()})
    back = golden_from_bytes(stream.getvalue())
    np.testing.assert_array_equal(back.outputs["embedding"], golden.outputs["embedding"])
    assert back.files == back.pixels_sha256 == back.file_outputs == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {"../x": b"1"}}, "is called"),
        ({"files": {"x": b""}}, "0 bytes"),
        ({"files": {"x": b"1" * (golden_module.MAX_GOLDEN_FILE_BYTES + 1)}}, "allowed"),
        ({"files": {f"{number}": b"1" for number in range(65)}}, "at most 64"),
        ({"pixels_sha256": {}}, "same names"),
        ({"pixels_sha256": {"picture-0.png": "ff", "picture-1.png": "ff"}}, "64 hex"),
        ({"file_outputs": {}}, "same outputs"),
        ({"file_outputs": {name: np.ones((3, 8), np.float32) for name in cases().outputs}}, r"\(2, D\)"),
        ({"file_outputs": {name: np.ones((2, 99), np.float32) for name in cases().outputs}}, "two widths"),
        ({"file_outputs": {name: np.full((2, 8), np.inf, np.float32) for name in cases().outputs}}, "infinite"),
        ({"files": {}, "pixels_sha256": {}}, "same outputs"),
    ],
)
def test_golden_files_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_files(**changes)


def packed(**members: bytes | np.ndarray) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            if isinstance(value, np.ndarray):
                member = io.BytesIO()
                np.lib.format.write_array(member, value, allow_pickle=True)
                value = member.getvalue()
            archive.writestr(f"{name.replace('__', '.')}.npy", value)
    return stream.getvalue()


def lying(shape: str) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


IMAGES = np.zeros((1, 4, 4, 3), np.uint8)
ROWS = np.zeros((1, 2), np.float32)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 and no more", "damaged"),
        (packed(images=IMAGES), "no expected output"),
        (packed(outputs__embedding=ROWS), "no images"),
        (packed(images=np.array([{"a": 1}], object), outputs__embedding=ROWS), "type object"),
        (packed(images=lying("(1000000000, 1000000000, 4, 3)"), outputs__embedding=ROWS), "claims shape"),
        (packed(images=lying("(1,) * 99"), outputs__embedding=ROWS), "damaged"),
        (packed(images=b"not npy", outputs__embedding=ROWS), "damaged"),
        (packed(images=IMAGES.astype(np.float32), outputs__embedding=ROWS), "uint8"),
        (packed(images=IMAGES, outputs__embedding=ROWS.astype(np.float64)), "type float64"),
        (packed(images=IMAGES, outputs__embedding=np.full((1, 2), np.nan, np.float32)), "NaN"),
        (packed(images=IMAGES, outputs__embedding=np.zeros((2, 2), np.float32)), r"\(1, D\)"),
        (golden_to_bytes(cases())[:-30], "damaged"),
        (packed(images=IMAGES, outputs__embedding=ROWS, **{"files__a.png": ROWS}), "not bytes"),
        (packed(images=IMAGES, outputs__embedding=ROWS, **{"files__a.png": IMAGES[0, 0, 0]}), "same names"),
        (packed(images=IMAGES, outputs__embedding=ROWS, file_outputs__embedding=ROWS), "same outputs"),
    ],
)
def test_golden_cases_from_a_stranger(data: bytes, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        golden_from_bytes(data)


def test_a_zip_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_module, "MAX_GOLDEN_UNPACKED_BYTES", 1 << 20)
    bomb = packed(images=b"\0" * (8 << 20))
    assert len(bomb) < 1 << 16
    with pytest.raises(BundleError, match="unpacks to more than 1048576"):
        golden_from_bytes(bomb)
    monkeypatch.setattr(golden_module, "MAX_GOLDEN_BYTES", 100)
    with pytest.raises(BundleError, match="more than the limit of 100"):
        golden_from_bytes(golden_to_bytes(cases()))


def test_fuzzed_golden_cases_are_an_error_or_cases() -> None:
    whole, draw = np.frombuffer(golden_to_bytes(cases()), np.uint8), np.random.default_rng(0)
    for _ in range(200):
        broken = whole.copy()
        broken[draw.integers(0, len(broken), 2)] = draw.integers(0, 256, 2)
        try:
            found = golden_from_bytes(broken.tobytes())
        except BundleError:
            continue
        assert found.images.dtype == np.uint8
        assert {len(rows) for rows in found.outputs.values()} == {len(found.images)}


def test_a_lone_file_carries_everything(whole: Path) -> None:
    opened = Bundle.open(whole)
    metadata = carry(opened.manifest, opened.golden)
    manifest, golden = read_carried(metadata)
    assert manifest.artefacts == ()
    assert manifest.model == opened.manifest.model
    assert manifest.input == opened.manifest.input
    np.testing.assert_array_equal(golden.images, opened.golden.images)


def test_carried_metadata_from_a_stranger(whole: Path) -> None:
    opened = Bundle.open(whole)
    metadata = carry(opened.manifest, opened.golden)
    with pytest.raises(BundleError, match="not a byol-deploy file"):
        read_carried({})
    with pytest.raises(BundleError, match="not a byol-deploy file"):
        read_carried({CARRIED_MANIFEST_KEY: metadata[CARRIED_MANIFEST_KEY]})
    with pytest.raises(BundleError, match="have changed"):
        read_carried(metadata | {CARRIED_GOLDEN_KEY: base64.b64encode(golden_to_bytes(cases(3))).decode()})
    with pytest.raises(BundleError, match="damaged"):
        read_carried(metadata | {CARRIED_GOLDEN_KEY: "not base64!"})
    with pytest.raises(BundleError, match=r"manifest in x\.onnx is not JSON"):
        read_carried(metadata | {CARRIED_MANIFEST_KEY: "{"}, "x.onnx")


def test_cases_from_files_must_cover_the_outputs(whole: Path) -> None:
    opened = Bundle.open(whole)
    outputs = {name: values for name, values in opened.golden.outputs.items() if name != "prediction"}
    files = {name: values for name, values in opened.golden.file_outputs.items() if name != "prediction"}
    golden = dataclasses.replace(opened.golden, outputs=outputs, file_outputs=files)
    with pytest.raises(BundleError, match="prediction has no golden cases") as caught:
        read_carried(carry(opened.manifest, golden))
    assert "from files" in str(caught.value)


# --- the seal ----------------------------------------------------------------------------------------------------

SEAL = CarriedArtefact(
    "onnx",
    "int8",
    f"sha256:{'0' * 64}",
    ("model.onnx.data",),
    {"machine": "x86_64", "threads": "2"},
    {CARRIED_GOLDEN_KEY: f"sha256:{'1' * 64}"},
)


def resealed(change: Callable[[dict[str, Any]], object]) -> str:
    """A seal with other values and the right hash of itself: what a stranger could write."""
    data = json.loads(SEAL.to_json())
    del data["sha256"]
    change(data)
    text = json.dumps(data, sort_keys=True, indent=1)
    data["sha256"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return json.dumps(data, sort_keys=True, indent=1)


def test_a_seal_comes_back_and_ignores_what_a_later_version_adds() -> None:
    assert CarriedArtefact.from_json(SEAL.to_json()) == SEAL
    assert CarriedArtefact.from_json(resealed(lambda data: data.update(signed_by="someone"))) == SEAL


def test_every_changed_character_of_a_seal_is_caught() -> None:
    text = SEAL.to_json()
    draw = np.random.default_rng(0)
    for place in range(len(text)):
        other = chr(ord(text[place]) ^ (1 << int(draw.integers(7))))
        with pytest.raises(BundleError, match="seal of"):
            CarriedArtefact.from_json(text[:place] + other + text[place + 1 :])
    for changed in (text + " ", " " + text, text.replace("\n", ""), text[:-1]):
        with pytest.raises(BundleError, match="seal of"):
            CarriedArtefact.from_json(changed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(format=3), "format is 3"),
        (lambda data: data.update(precision="FP 32"), "precision is 'FP 32'"),
        (lambda data: data.update(content="sha256:0"), "content is"),
        (lambda data: data.update(extra_files=["../secret"]), "extra_files is"),
        (lambda data: data.update(extra_files="x"), "extra_files is"),
        (lambda data: data.update(host={"a": 1}), "host is"),
        (lambda data: data.update(host={"a": "x" * 501}), "host is"),
        (lambda data: data.update(host={"a": "line\nbreak"}), "host is"),
        (lambda data: data.update(host={str(number): "" for number in range(65)}), "host is"),
        (lambda data: data.update(texts={"a": "b"}), "texts is"),
        (lambda data: data.pop("host"), "host is missing"),
        (lambda data: (data.pop("content"), data.pop("texts")), r"2 fault\(s\)"),
    ],
)
def test_a_seal_from_a_stranger(change: Callable[[dict[str, Any]], object], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        CarriedArtefact.from_json(resealed(change))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', "9" * 9999])
def test_a_seal_that_is_none(text: str) -> None:
    with pytest.raises(BundleError, match="seal of x"):
        CarriedArtefact.from_json(text, "x")


def test_a_seal_covers_the_other_texts_and_cannot_get_lost(whole: Path) -> None:
    texts = formats.get("onnx").carried(whole / "model.onnx")
    assert read_artefact(texts) is not None
    assert read_artefact(texts | {"somebody.else": "x"}) == read_artefact(texts)
    for changed, said in (
        (texts | {CARRIED_MANIFEST_KEY: texts[CARRIED_MANIFEST_KEY] + " "}, CARRIED_MANIFEST_KEY),
        (texts | {"byol_deploy.more": "x"}, "byol_deploy.more"),
        ({key: text for key, text in texts.items() if key != CARRIED_GOLDEN_KEY}, CARRIED_GOLDEN_KEY),
        ({key: text for key, text in texts.items() if key != CARRIED_ARTEFACT_KEY}, "its seal is gone"),
    ):
        with pytest.raises(BundleError, match=said):
            read_artefact(changed, "x.onnx")
    opened = Bundle.open(whole)
    assert read_artefact(carry(opened.manifest, opened.golden)) is None


def test_what_no_reader_would_take_is_not_sealed(tmp_path: Path, whole: Path) -> None:
    opened = Bundle.open(whole)
    path = tmp_path / "x.onnx"
    tiny["write_onnx"](path, opened.manifest.preprocessing, carry(opened.manifest, opened.golden, sealed=True))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="precision is"):
        seal_artefact(path, formats.get("onnx"), "FP 32", {})
    assert path.read_bytes() == before


# --- publishing ------------------------------------------------------------------------------------------------


def test_publishing_replaces_a_bundle_and_leaves_nothing_beside_it(copy: Path) -> None:
    old = Bundle.open(copy).manifest.model.parameter_hash
    tiny["write_bundle"](copy, seed=5)
    assert Bundle.open(copy).manifest.model.parameter_hash != old
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_an_error_leaves_the_old_bundle(copy: Path) -> None:
    before = content(copy)
    with pytest.raises(ZeroDivisionError), publish(copy) as folder:
        1 / (folder / "model.onnx").write_bytes(b"")
    assert content(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, copy: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    foreign = tmp_path / "web"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "a web application"}')
    for target, said in ((thesis, "not a bundle"), (tmp_path / "file", "is a file"), (foreign, "not a bundle")):
        with pytest.raises(OutputError, match=said), publish(target):
            raise AssertionError("the work must not begin")
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"), publish(copy):
        raise AssertionError("the work must not begin")
    (copy / "notes.txt").unlink()
    (copy / "sub").mkdir()
    (copy / "sub" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"sub/mine\.txt"), publish(copy):
        raise AssertionError("the work must not begin")


def test_a_file_that_appears_meanwhile_is_not_lost(copy: Path) -> None:
    before = content(copy)
    with pytest.raises(OutputError, match=r"late\.txt"), publish(copy):
        (copy / "late.txt").write_text("mine")
    (copy / "late.txt").unlink()
    assert content(copy) == before


def test_a_damaged_or_newer_bundle_can_be_replaced(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(schema=9))
    (copy / "model.onnx").write_bytes(b"damaged")
    tiny["write_bundle"](copy)
    assert (copy / "model.onnx").read_bytes() != b"damaged"
    assert Bundle.open(copy).manifest.artefacts


def test_parameter_hash_does_not_depend_on_order_or_byte_order() -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array(3, np.int64)
    reference = parameter_hash({"a": a, "b": b})
    assert reference.startswith("sha256:")
    assert len(reference) == 71
    assert parameter_hash({"b": b.astype(">i8"), "a": np.asfortranarray(a.astype(">f4"))}) == reference
    for other in ({"a": a.T, "b": b}, {"a": a + 1, "b": b}, {"a": a, "c": b}, {"a": a.astype(np.float64), "b": b}):
        assert parameter_hash(other) != reference
