"""The bundle: written whole or not at all, and read as data from a stranger."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_deploy import bundle as bundle_module
from byol_deploy.bundle import (
    CARRIED_GOLDEN_KEY,
    CARRIED_MANIFEST_KEY,
    Bundle,
    Manifest,
    carry,
    golden_to_bytes,
    parameter_hash,
    publish,
    read_carried,
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


# --- carried metadata --------------------------------------------------------------------------------------------


def test_a_folder_around_a_bundle_names_it(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run" / "bundle")
    with pytest.raises(BundleError, match=r"pass .*run/bundle, which is one"):
        Bundle.open(tmp_path / "run")
    assert Bundle.open(tmp_path / "run" / "bundle").manifest.artefacts


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
    other = dataclasses.replace(opened.golden, images=255 - opened.golden.images)
    with pytest.raises(BundleError, match="not a byol-deploy file"):
        read_carried({})
    with pytest.raises(BundleError, match="not a byol-deploy file"):
        read_carried({CARRIED_MANIFEST_KEY: metadata[CARRIED_MANIFEST_KEY]})
    with pytest.raises(BundleError, match="have changed"):
        read_carried(metadata | {CARRIED_GOLDEN_KEY: base64.b64encode(golden_to_bytes(other)).decode()})
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
