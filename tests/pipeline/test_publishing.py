"""Export on real images: what passes, and that every way to break a file is caught and nothing lost."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from untrained import RECIPE, write_checkpoint

from byol_deploy import Bundle, Encoder, export, formats, verify
from byol_deploy.awkward import awkward_files
from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, DataError, ExportError, OutputError, ParityError, UsageError
from byol_deploy.pipeline import reference
from byol_deploy.pipeline.reference import SYNTHETIC
from byol_deploy.training.checkpoints import load_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- what an export leaves ---


def test_the_bundle_says_what_was_exported(bundle: Path, checkpoint: Path) -> None:
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    loaded = load_checkpoint(checkpoint)
    assert (model.branch, model.backbone, model.width) == ("online", "timm/test_resnet", 96)
    assert (model.global_step, model.epoch, model.checkpoint_sha256) == (12, 3, loaded.sha256)
    assert model.stripped_keys == loaded.momentum_keys
    assert len(model.stripped_keys) > 50
    assert opened.manifest.preprocessing == loaded.preprocessing
    assert [output.name for output in opened.manifest.outputs] == ["embedding", "projection", "prediction"]
    assert len(opened.golden.images) == 8
    assert len({image.tobytes() for image in opened.golden.images}) == 8
    for artefact in opened.manifest.artefacts:
        assert artefact.parity["passed"] is True
        subjects = {row["subject"] for row in artefact.parity["rows"]}
        named = {subject.removeprefix(f"{artefact.file}, ") for subject in subjects}
        assert named - {"real images, 1 thread, batch 7"} == {
            "real images, batch 1", "real images, batch 2", "real images, batch 3", "real images, batch 7",
            "real images, optimisation none, batch 7", "awkward images, batch 1", "awkward images, batch 7",
            "128 real images, batch 32", "from the image files on",
        }  # fmt: skip
        assert ("real images, 1 thread, batch 7" in named) == (usable_cores() > 1)


def test_no_momentum_tensor_is_in_any_file(bundle: Path, checkpoint: Path) -> None:
    state = load_checkpoint(checkpoint).model.state_dict()
    momentum = {value.numpy().tobytes() for key, value in state.items() if "_momentum." in key and value.numel() > 16}
    online = {value.numpy().tobytes() for key, value in state.items() if "_momentum." not in key}
    for artefact in Bundle.open(bundle).manifest.artefacts:
        stored = formats.get(artefact.format).tensors(bundle / artefact.file)
        held = {value.tobytes() for value in stored.values() if value.dtype == np.float32}
        assert not held & (momentum - online)
        assert len(held & online) > 50


def test_the_encoder_runs_the_bundle_as_pytorch_computes_it(bundle: Path, checkpoint: Path, fashion: Path) -> None:
    files = sorted(fashion.rglob("*.png"))[::40]
    loaded = load_checkpoint(checkpoint)
    assert loaded.preprocessing is not None
    x = torch.from_numpy(loaded.preprocessing.normalize(loaded.preprocessing.batch(files)))
    with torch.no_grad():
        expected = loaded.model.embed(x).numpy()
    for path in (bundle, bundle / "model.onnx"):
        assert np.allclose(Encoder(path)(files), expected, rtol=1e-4, atol=1e-5)


def test_no_local_folder_is_written_down(bundle: Path, checkpoint: Path, fashion: Path) -> None:
    for content in contents(bundle).values():
        assert str(checkpoint.parent).encode() not in content
        assert str(fashion.parent).encode() not in content


def test_the_checkpoint_is_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint.read_bytes()
    got = export(checkpoint, formats=["torchscript"], outputs=["embedding"], out=tmp_path / "out")
    assert checkpoint.read_bytes() == before
    assert [output.name for output in got.manifest.outputs] == ["embedding"]
    stored = formats.get("torchscript").tensors(got.path / "model.torchscript.pt")
    assert not any(name.startswith(("projection_head", "prediction_head")) for name in stored)
    assert "Fashion-MNIST" in got.manifest.artefacts[0].host["images"]
    assert verify(got.path, against=checkpoint).passed


def test_a_bundle_with_external_data(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byol_deploy.formats.onnx.EXTERNAL_ABOVE_BYTES", 100_000)
    got = export(checkpoint, outputs=["embedding"], out=tmp_path / "bundle")
    (artefact,) = got.manifest.artefacts
    assert [extra.file for extra in artefact.extra_files] == ["model.onnx.data"]
    moved = tmp_path / "elsewhere"
    got.path.rename(moved)
    assert verify(moved, against=checkpoint).passed
    with open(moved / "model.onnx.data", "r+b") as file:
        file.write(b"stale")
    with pytest.raises(BundleError, match=r"model\.onnx\.data was changed"):
        verify(moved)


def test_default_places(tmp_path: Path, checkpoint: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    RECIPE.save(run / "recipe.yaml")
    shutil.copy(checkpoint, run / "checkpoints" / "last.ckpt")
    options: dict[str, Any] = {"formats": ["torchscript"], "outputs": ["embedding"]}
    assert export(run, **options).path == run / "bundle"
    lone = shutil.copy(checkpoint, tmp_path / "mine.ckpt")
    assert export(lone, **options).path == tmp_path / "mine-bundle"


# --- broken files ---


class Swapped(nn.Module):
    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, images: Tensor) -> Any:
        return self.inner(images.flip(3))


class BakedBatch(Swapped):
    def forward(self, images: Tensor) -> Any:
        return self.inner(images.reshape(3, 32, 32, 3))


def momentum_branch(graph: Any, model: Any) -> Any:
    broken = copy.deepcopy(graph)
    broken.backbone = copy.deepcopy(model.backbone_momentum).eval()
    return broken


def momentum_under_its_own_name(graph: Any, model: Any) -> Any:
    broken = copy.deepcopy(graph)
    broken.backbone_momentum = copy.deepcopy(model.backbone_momentum).eval()
    plain = type(broken).forward

    class Both(type(broken)):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Any:
            extra = self.backbone_momentum(self.preprocessing(images)).mean() * 0
            return tuple(value + extra for value in plain(self, images))

    broken.__class__ = Both
    return broken


def wrong_mean(graph: Any, model: Any) -> Any:
    broken = copy.deepcopy(graph)
    broken.preprocessing.mean.copy_(torch.full_like(broken.preprocessing.mean, 0.5))
    return broken


def wrong_epsilon(graph: Any, model: Any) -> Any:
    broken = copy.deepcopy(graph)
    for module in broken.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return broken


def one_weight(graph: Any, model: Any) -> Any:
    broken = copy.deepcopy(graph)
    broken.backbone.layer1[0].conv1.weight[0, 0, 0, 0] += 0.05
    return broken


def projector_for_embedding(graph: Any, model: Any) -> Any:
    broken = copy.deepcopy(graph)
    plain = type(broken).forward

    class Wrong(type(broken)):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Any:
            embedding, _, prediction = plain(self, images)
            return embedding, prediction, prediction

    broken.__class__ = Wrong
    return broken


FAULTS: dict[str, Callable[[Any, Any], Any]] = {
    "swapped channels": lambda graph, model: Swapped(graph).eval(),
    "momentum branch": momentum_branch,
    "momentum branch beside": momentum_under_its_own_name,
    "training mode": lambda graph, model: copy.deepcopy(graph).train(),
    "wrong mean": wrong_mean,
    "wrong epsilon": wrong_epsilon,
    "baked batch": lambda graph, model: BakedBatch(graph).eval(),
    "one weight": one_weight,
    "wrong output": projector_for_embedding,
}


def break_format(name: str, fault: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a format write a really broken model: everything after the graph is the real thing."""
    format = formats.get(name)
    whole = format.export
    model = load_checkpoint(checkpoint).model

    def broken(graph: Any, signature: Any, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        with torch.no_grad():
            return whole(FAULTS[fault](graph, model), signature, path, carried)

    monkeypatch.setattr(format, "export", broken)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_torchscript_is_not_published(
    fault: str, checkpoint: Path, bundle: Path, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)
    before = contents(out)
    break_format("torchscript", fault, checkpoint, monkeypatch)
    with pytest.raises(ParityError, match="nothing was published") as caught:
        export(checkpoint, formats=["torchscript"], data=fashion, out=out)
    assert caught.value.exit_code == 5
    if fault.startswith("momentum"):
        assert "momentum" in str(caught.value)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("fault", ["swapped channels", "momentum branch", "wrong epsilon"])
def test_a_broken_onnx_is_not_published(
    fault: str, checkpoint: Path, bundle: Path, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_format("onnx", fault, checkpoint, monkeypatch)
    with pytest.raises(ParityError):
        export(checkpoint, formats=["onnx"], data=fashion, out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_with_a_baked_batch_is_not_published(
    checkpoint: Path, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    format = formats.get("onnx")
    whole = format.export

    def baked(graph: Any, signature: Any, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        further = whole(graph, signature, path, carried)
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
        onnx.save(model, path)
        return further

    monkeypatch.setattr(format, "export", baked)
    with pytest.raises(ParityError, match="cannot run this"):
        export(checkpoint, formats=["onnx"], data=fashion, out=tmp_path / "bundle", keep_failed=tmp_path / "failed")
    assert [path.name for path in tmp_path.iterdir()] == ["failed"]
    kept = json.loads((tmp_path / "failed" / "failed.json").read_text(encoding="utf-8"))
    assert kept["model.onnx"]["parity"]["passed"] is False
    assert (tmp_path / "failed" / "model.onnx").exists()


def test_an_exporter_that_fails_is_one_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = formats.get("torchscript")

    def failing(*args: Any) -> tuple[Path, ...]:
        raise ExportError("the exporter has no such operator")

    monkeypatch.setattr(format, "export", failing)
    with pytest.raises(ExportError, match=r"timm/test_resnet cannot be exported to torchscript: the exporter has no"):
        export(checkpoint, formats=["torchscript"], out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def collapsing(scale: float) -> Callable[[Any], None]:
    def collapse(model: Any) -> None:
        for parameter in model.backbone.layer4.parameters():
            parameter.mul_(scale)
        model.backbone.layer4[0].bn2.bias.fill_(1.0)

    return collapse


def test_an_encoder_that_is_nearly_one_point_is_exported_with_a_loud_warning(tmp_path: Path) -> None:
    said: list[str] = []
    path = write_checkpoint(tmp_path / "collapsed.ckpt", change=collapsing(0.05))
    got = export(path, formats=["torchscript"], out=tmp_path / "bundle", say=said.append)
    (warning,) = (text for text in got.manifest.artefacts[0].parity["warnings"] if "collapsed" in text)
    assert any("WARNING the encoder has collapsed" in line for line in said)
    report = verify(got.path, against=path)
    assert report.passed
    assert report.text().startswith("PASS with warnings")
    assert warning in report.text()


def test_an_encoder_that_is_one_point_cannot_be_compared(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "collapsed.ckpt", change=collapsing(1e-4))
    with pytest.raises(ParityError, match="same vector for all 16 images: a constant output, a collapsed encoder"):
        export(path, formats=["torchscript"], out=tmp_path / "bundle")
    assert [item.name for item in tmp_path.iterdir()] == ["collapsed.ckpt"]


@pytest.mark.parametrize("chaotic", [("white", "rgba.png"), SYNTHETIC])
def test_awkward_images_that_float32_does_not_determine(
    chaotic: tuple[str, ...], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reference.Noise.told

    def told(self: Any, places: Any) -> list[int]:
        first = len(self.images) - len(SYNTHETIC) - len(awkward_files())
        names = dict(enumerate([*SYNTHETIC, *awkward_files()], first))
        return [place for place in whole(self, places) if names[place] not in chaotic]

    monkeypatch.setattr(reference.Noise, "told", told)
    options: dict[str, Any] = {"formats": ["torchscript"], "outputs": ["embedding"], "out": tmp_path / "bundle"}
    if chaotic == SYNTHETIC:
        with pytest.raises(ParityError, match="not comparable"):
            export(checkpoint, **options)
        return
    got = export(checkpoint, **options)
    parity = got.manifest.artefacts[0].parity
    (warning,) = (text for text in parity["warnings"] if "left out" in text)
    assert "left out of the awkward images: white, rgba.png;" in warning
    assert {row["n"] for row in parity["rows"] if "awkward" in row["subject"]} == {4}
    assert {row["n"] for row in parity["rows"] if "files on" in row["subject"]} == {8 + len(awkward_files()) - 1}
    assert "rgba.png" not in got.golden.files
    assert "exif-6.png" in got.golden.files


# --- wrong use ---


def test_wrong_use_is_told_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(UsageError, match="did you mean onnx"):
        export(checkpoint, formats=["onxn"], out=out)
    with pytest.raises(UsageError, match="no format"):
        export(checkpoint, formats=[], out=out)
    with pytest.raises(UsageError, match="outputs are loss"):
        export(checkpoint, outputs=["loss"], out=out)
    with pytest.raises(UsageError, match="trained for 32 px"):
        export(checkpoint, image_size=64, out=out)
    with pytest.raises(UsageError, match="--against"):
        verify(tmp_path, data=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a bundle"):
        export(checkpoint, formats=["torchscript"], out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_data_without_images(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError):
        export(checkpoint, formats=["torchscript"], out=tmp_path / "bundle", data=tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_checkpoint_without_preprocessing_needs_a_size(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pt"
    torch.save(torch.load(checkpoint, weights_only=True)["state_dict"], bare)
    options: dict[str, Any] = {"formats": ["torchscript"], "backbone": "timm/test_resnet", "out": tmp_path / "bundle"}
    with pytest.raises(UsageError, match="--image-size"):
        export(bare, **options)
    assert export(bare, image_size=32, **options).manifest.preprocessing.size_px == 32
