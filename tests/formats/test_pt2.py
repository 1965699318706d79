"""torch.export files: what a native user gets, and files of strangers that would run code in ``torch.export.load``."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_deploy import formats
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import Port, RunOptions, Signature

SIZE = 16
PREFIX = "archive/"
PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
Entries = dict[str, bytes]


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.convolution(images.permute(0, 3, 1, 2).float() / 255).mean((2, 3))
        return values, values.reshape(-1, 2).relu().reshape(-1, 4)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    found: Path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    formats.get("pt2").export(Small().eval(), Signature(SIZE, ("embedding", "other")), found, {"note": "ünïcode"})
    return found


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def test_the_file_says_what_it_takes_and_gives(path: Path) -> None:
    opened = formats.get("pt2").load(path, RunOptions())
    assert opened.inputs == (Port("images", "uint8", (None, SIZE, SIZE, 3)),)
    assert opened.outputs == (Port("embedding", "float32", (None, 4)), Port("other", "float32", (None, 4)))
    assert list(opened.compute(images(2), ["other"])) == ["other"]


def test_pytorch_alone_opens_it_and_finds_names_and_texts(path: Path) -> None:
    code = (
        "import sys, torch; sys.modules['byol_deploy'] = None; texts = {'note': ''};"
        "model = torch.export.load(sys.argv[1], extra_files=texts).module();"
        "out = model(torch.full((5, 16, 16, 3), 7, dtype=torch.uint8));"
        "print(ascii([list(out), out['embedding'][4].tolist(), texts['note']]))"
    )
    got = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    names, values, note = ast.literal_eval(got)
    assert (names, note) == (["embedding", "other"], "ünïcode")
    expected = formats.get("pt2").load(path, RunOptions())(np.full((1, SIZE, SIZE, 3), 7, np.uint8))
    assert np.allclose(values, expected["embedding"][0], rtol=1e-5)


def test_equal_graphs_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    again = tmp_path / "another name.pt2"
    formats.get("pt2").export(Small().eval(), Signature(SIZE, ("embedding", "other")), again, {"note": "ünïcode"})
    assert again.read_bytes() == path.read_bytes()


def test_another_provider_is_refused(path: Path) -> None:
    with pytest.raises(ProviderError, match="cpu here, not on 'cuda'"):
        formats.get("pt2").load(path, RunOptions("cuda"))


def test_a_batch_size_that_is_built_in_is_an_export_error(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (images.float().reshape(3, -1),)

    with pytest.raises(ExportError, match=r"torch\.export of PyTorch"):
        formats.get("pt2").export(Fixed().eval(), Signature(SIZE, ("embedding",)), tmp_path / "x.pt2", {})


# --- Files of strangers ------------------------------------------------------------------------------------------


def entries_of(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {name.removeprefix(PREFIX): archive.read(name) for name in archive.namelist()}


def write(path: Path, entries: Entries) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(PREFIX + name, content)
    return path


class Touch:
    """Pickled, this makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def replaced(entry: str, pattern: str, new: str) -> Callable[[Entries, Path], None]:
    def change(entries: Entries, mark: Path) -> None:
        text, count = re.subn(pattern, lambda _: new.replace("MARK", str(mark)), entries[entry].decode())
        assert count, "the file is laid out in another way than this test thinks"
        json.loads(text)
        entries[entry] = text.encode()

    return change


def added(name: str, content: bytes = b"x") -> Callable[[Entries, Path], None]:
    return lambda entries, _: entries.update({name: content})


def example_inputs(entries: Entries, mark: Path) -> None:
    packed = io.BytesIO()
    torch.save((Touch(mark),), packed)
    entries["data/sample_inputs/model.pt"] = packed.getvalue()


def pickled_weight(entries: Entries, mark: Path) -> None:
    replaced(WEIGHTS, '"use_pickle": false', '"use_pickle": true')(entries, mark)
    entries["data/weights/weight_0"] = pickle.dumps(Touch(mark))


CODE = "open('MARK', 'w')"
ATTACKS = {
    "a pickle for example inputs": (example_inputs, "example inputs are a pickle"),
    "a pickle for a weight": (pickled_weight, "is pickled"),
    "weights as of old": (added("data/weights/model.pt"), "neither the program nor a tensor"),
    "an object": (added("data/constants/custom_obj_0"), "neither the program nor a tensor"),
    "native code": (added("data/aotinductor/model/model.so"), "neither the program nor a tensor"),
    "a second program": (added("models/other.json"), "neither the program nor a tensor"),
    "Python for a size": (replaced(PROGRAM, r"Symbol\('[^)]*\)", CODE), "which is no arithmetic"),
    "a guard": (replaced(PROGRAM, r'"guards_code": \[\]', f'"guards_code": ["{CODE}"]'), "Python code"),
    "a name": (
        replaced(PROGRAM, r"p_convolution_bias", f"a={CODE}"),
        "which could be code",
    ),
    "a name of a weight": (replaced(WEIGHTS, r"convolution\.bias", 'x\\");(y'), "which could be code"),
    "any function of PyTorch": (replaced(PROGRAM, r"torch\.ops\.aten\.relu\.default", "torch.hub.load"), "it calls"),
    "an operator on files": (
        replaced(PROGRAM, r"torch\.ops\.aten\.relu\.default", "torch.ops.aten.from_file.default"),
        "it calls",
    ),
    "an argument that is an object": (
        replaced(PROGRAM, '"as_scalar_type"', '"as_custom_obj"'),
        "of the kind 'as_custom_obj'",
    ),
    "a container of another module": (
        replaced(PROGRAM, r"builtins\.dict", "collections.defaultdict"),
        "other than tensors in tuples",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_could_run_code_is_refused_unopened(attack: str, path: Path, tmp_path: Path) -> None:
    change, said = ATTACKS[attack]
    entries, mark = entries_of(path), tmp_path / "it ran"
    change(entries, mark)
    hostile = write(tmp_path / "hostile.pt2", entries)
    for opening in (
        lambda: formats.get("pt2").load(hostile, RunOptions()),
        lambda: formats.get("pt2").tensors(hostile),
    ):
        with pytest.raises(BundleError, match=said):
            opening()
    assert not mark.exists()


def test_the_same_entries_unchanged_are_opened(path: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again.pt2", entries_of(path))
    (first, second) = (formats.get("pt2").load(item, RunOptions())(images(3)) for item in (path, again))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_file_that_pytorch_alone_wrote_is_opened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, pixels = Small().eval(), torch.from_numpy(images(3))
    program = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "foreign.pt2")
    opened = formats.get("pt2").load(tmp_path / "foreign.pt2", RunOptions())
    assert [port.name for port in opened.outputs] == ["output_0", "output_1"]
    with torch.no_grad():
        assert np.allclose(opened(images(5))["output_0"], model(torch.from_numpy(images(5)))[0], rtol=1e-5, atol=1e-6)
    assert formats.get("pt2").carried(tmp_path / "foreign.pt2") == {}


@pytest.mark.parametrize("shape", ["[]", '{"config": []}', '{"config": {"a": 1}}', "[" * 100_000])
def test_json_of_another_shape_is_a_bundle_error(shape: str, path: Path, tmp_path: Path) -> None:
    hostile = write(tmp_path / "hostile.pt2", {**entries_of(path), WEIGHTS: shape.encode()})
    with pytest.raises(BundleError):
        formats.get("pt2").load(hostile, RunOptions())


def test_backbones_with_attention_pass_the_check(tmp_path: Path) -> None:
    """Windows multiply the batch size, so sizes are products here."""
    from byol_deploy.training.backbones import build_backbone

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build_backbone("timm/swin_tiny_patch4_window7_224")

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.backbone(images.permute(0, 3, 1, 2).float() / 255).flatten(1),)

    formats.get("pt2").export(Encoder().eval(), Signature(224, ("embedding",)), tmp_path / "model.pt2", {})
    assert b"Mul(Integer(" in entries_of(tmp_path / "model.pt2")[PROGRAM]
