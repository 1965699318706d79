"""The seal of a lone file: every changed character shows, and it cannot get lost."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_deploy import formats
from byol_deploy.bundle import (
    CARRIED_ARTEFACT_KEY,
    CARRIED_GOLDEN_KEY,
    CARRIED_MANIFEST_KEY,
    Bundle,
    CarriedArtefact,
    carry,
    read_artefact,
    seal_artefact,
)
from byol_deploy.errors import BundleError

tiny = runpy.run_path(str(Path(__file__).with_name("tiny_encoder.py")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle")


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
