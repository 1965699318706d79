"""Any ONNX file against any PyTorch module: files of plain torch.onnx.export, right ones and wrong ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from plain_files import SIZE, Named, Pixels, Two, floats, write
from torch import Tensor, nn

from byol_deploy.errors import BundleError, DataError, UsageError
from byol_deploy.parity import (
    Limit,
)
from byol_deploy.pipeline.foreign import verify_foreign
from byol_deploy.pipeline.verifying import VerifyReport

ROOT = Path(__file__).resolve().parent.parent.parent


def failures(report: VerifyReport) -> str:
    (verdict,) = report.artefacts
    found = [] if verdict.parity is None or verdict.parity.passed else verdict.parity.failures
    return "\n".join([*found, *(check.detail for check in report.checks if not check.passed)])


def said(report: VerifyReport) -> str:
    return "\n".join([*report.warnings, *report.artefacts[0].notes])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A name for the folder of files that are exported once."""
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="session")
def two(folder: Path) -> Path:
    return write(Two(), folder / "two.onnx", floats())


# --- right ones ---


def test_a_right_file_passes_and_says_on_what(two: Path, colours: Path) -> None:
    lines: list[str] = []
    report = verify_foreign(two, against=Two(), data=colours, mean=(0.5,) * 3, std=(0.2,) * 3, say=lines.append)
    assert report.passed, report.text()
    assert report.verdict == "PASS", report.warnings
    assert "60 of the folder" in report.images
    (verdict,) = report.artefacts
    subjects = {row.subject for row in verdict.parity.rows}
    assert {f"two.onnx, real images, batch {size}" for size in (1, 2, 3, 7)} <= subjects
    assert {"two.onnx, real images, optimisation none, batch 7", "two.onnx, 60 real images, batch 32"} <= subjects
    assert any("awkward" in subject for subject in subjects)
    limits = [row.limit for row in verdict.parity.rows]
    assert all(isinstance(limit, Limit) and 0 < limit.noise_rel_l2 < 1e-5 for limit in limits)
    assert any(row.overlap is not None for row in verdict.parity.rows)
    assert any("float64" in line for line in lines)


def test_default_normalisation_is_said_loudly(two: Path, colours: Path) -> None:
    report = verify_foreign(two, against=Two(), data=colours)
    assert report.verdict == "PASS with warnings"
    assert "0.485, 0.456, 0.406" in said(report)
    assert "--mean" in said(report)


def test_the_callers_module_stays_as_it_is(two: Path, colours: Path) -> None:
    lent = Two().double().train()
    lent.norm.eval()
    before = {name: value.clone() for name, value in lent.state_dict().items()}
    seed = torch.get_rng_state()
    report = verify_foreign(two, against=lent, data=colours)
    assert report.passed, report.text()
    assert "torch.float64" in said(report)
    assert lent.training
    assert not lent.norm.training
    assert all(parameter.requires_grad for parameter in lent.parameters())
    assert all(torch.equal(before[name], value) for name, value in lent.state_dict().items())
    assert torch.equal(seed, torch.get_rng_state())


def test_pixels_in_channels_last(tmp_path: Path, colours: Path) -> None:
    example = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    path = write(Pixels(Two()), tmp_path / "pixels.onnx", example, dims=(1, 2))
    report = verify_foreign(path, against=Pixels(Two()), data=colours)
    assert report.verdict == "PASS", report.text()
    assert "uint8 (N, H, W, 3)" in report.checks[0].detail
    # The cast to float32 inside does not keep its noise from being measured.
    assert all(row.limit.noise_rel_l2 > 0 for row in report.artefacts[0].parity.rows)
    wrong = verify_foreign(path, against=Pixels(Two(), mean=0.46), data=colours)
    assert not wrong.passed


def test_pixels_in_the_file_against_the_network_alone(tmp_path: Path, colours: Path) -> None:
    example = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    path = write(Pixels(Two()), tmp_path / "pixels.onnx", example)
    right = verify_foreign(path, against=Two(), data=colours, mean=(0.45,) * 3, std=(0.22,) * 3)
    assert right.passed, right.text()
    assert "takes pixels and the other normalised" in said(right)
    wrong = verify_foreign(path, against=Two(), data=colours)
    assert not wrong.passed
    assert "relative L2 error" in failures(wrong)


class Viewing(nn.Module):
    """Flattens with ``view``, so no memory layout but its own will do. A vector, a map and a number for each image."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * height * width // 4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.relu(self.conv(x))
        return self.head(x.view(x.size(0), -1)), [x, x.mean(dim=(1, 2, 3))]


@pytest.mark.parametrize("batch", [1, None])
def test_sides_that_differ_outputs_of_any_rank_and_a_view(tmp_path: Path, colours: Path, batch: int | None) -> None:
    net = Viewing(32, 48)
    example = torch.randn(batch or 2, 3, 32, 48)
    path = write(net, tmp_path / "view.onnx", example, batch=batch is None, outputs=("vector", "map", "number"))
    report = verify_foreign(path, against=net, data=colours)
    assert report.passed, report.text()
    assert "32 x 48 px" in report.checks[0].detail
    assert {row.output for row in report.artefacts[0].parity.rows} == {"vector", "map", "number"}
    assert "fixed numbers" not in said(report)
    with torch.no_grad():
        net.head.bias += 1e-3
    assert {line.split(": ")[1] for line in failures(verify_foreign(path, against=net, data=colours)).splitlines()} == {
        "vector"
    }


def test_channels_last_in_floating_point_against_channels_first(tmp_path: Path, colours: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Two()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x.permute(0, 3, 1, 2))

    path = write(Last(), tmp_path / "last.onnx", torch.randn(3, SIZE, SIZE, 3))
    report = verify_foreign(path, against=Two(), data=colours)
    assert report.passed, report.text()
    assert "takes float32 (N, 3, H, W)" in report.checks[0].detail
    assert "the file takes float32 (N, H, W, 3)" in report.checks[0].detail


def test_resnet18_of_torchvision(tmp_path: Path, colours: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    path = write(net, tmp_path / "resnet18.onnx", floats(2, 64), outputs=("logits",))
    assert verify_foreign(path, against=net, data=colours).passed
    other = copy.deepcopy(net)
    for layer in other.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3
    assert not verify_foreign(path, against=other, data=colours).passed


def test_vit_of_timm(tmp_path: Path, colours: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_vit", img_size=64, num_classes=0).eval()
    path = write(net, tmp_path / "vit.onnx", floats(2, 64), outputs=("embedding",))
    report = verify_foreign(path, against=lambda: net, data=colours)
    assert report.passed, report.text()


# --- wrong ones ---


def test_other_weights(two: Path, colours: Path) -> None:
    report = verify_foreign(two, against=Two(seed=1), data=colours)
    assert not report.passed
    assert "relative L2 error" in failures(report)


def test_another_epsilon_in_batch_norm(two: Path, colours: Path) -> None:
    assert not verify_foreign(two, against=Two(eps=2e-5), data=colours).passed


def test_exported_in_training_mode(tmp_path: Path, colours: Path) -> None:
    path = write(Two(), tmp_path / "training.onnx", floats(), eval_mode=False, trace=True)
    report = verify_foreign(path, against=Two(), data=colours)
    assert not report.passed
    assert "relative L2 error" in failures(report)


def test_swapped_outputs(tmp_path: Path, colours: Path) -> None:
    path = write(Named(), tmp_path / "named.onnx", floats(), outputs=("one", "two"))
    right = verify_foreign(path, against=Named(), data=colours)
    assert right.passed, right.text()
    assert "matched by name" in right.checks[1].detail
    swapped = write(Named(), tmp_path / "swapped.onnx", floats(), outputs=("two", "one"))
    assert not verify_foreign(swapped, against=Named(), data=colours).passed
    # In order the names do not matter.
    assert verify_foreign(swapped, against=Two(), data=colours).passed


def test_a_fixed_batch_passes_with_a_warning(tmp_path: Path, colours: Path) -> None:
    path = write(Two(), tmp_path / "fixed.onnx", floats(4), batch=False)
    report = verify_foreign(path, against=Two(), data=colours, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert report.verdict == "PASS with warnings", report.text()
    assert "fixed batch of 4" in said(report)
    assert {row.subject.rpartition(", ")[2] for row in report.artefacts[0].parity.rows} == {"batch 4"}


def test_a_batch_baked_inside_fails(tmp_path: Path, colours: Path) -> None:
    class Baked(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = super().forward(x)
            return one + torch.zeros(int(x.shape[0]), 1), two

    path = write(Baked(), tmp_path / "baked.onnx", floats(3), trace=True)
    report = verify_foreign(path, against=Baked(), data=colours)
    assert not report.passed
    assert "batch 7: one: the file cannot run this" in failures(report)
    assert "batch 3:" not in failures(report)


def test_open_sides(tmp_path: Path, colours: Path) -> None:
    path = write(Two(), tmp_path / "open.onnx", floats(), sides=True)
    report = verify_foreign(path, against=Two(), data=colours, image_size=64)
    assert report.passed, report.text()
    subjects = " ".join(row.subject for row in report.artefacts[0].parity.rows)
    assert "real images of 32 px" in subjects
    assert "real images of 96 px" in subjects
    with pytest.raises(UsageError, match="--image-size"):
        verify_foreign(path, against=Two(), data=colours)


def test_a_resolution_baked_inside_fails_and_one_that_the_reference_refuses_does_not(
    tmp_path: Path, colours: Path
) -> None:
    path = write(Two(), tmp_path / "open.onnx", floats(), sides=True)

    class Crops(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x[:, :, :64, :64])

    class Picky(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if x.shape[-1] > 64:
                raise ValueError("at most 64 px")
            return super().forward(x)

    baked = verify_foreign(path, against=Crops(), data=colours, image_size=64)
    assert not baked.passed
    assert "96 px" in failures(baked)
    assert "32 px" not in failures(baked)
    picky = verify_foreign(path, against=Picky(), data=colours, image_size=64)
    assert picky.passed, picky.text()
    assert "96 px was left out: the reference itself refuses it" in said(picky)


def test_float16_is_held_to_margins(two: Path, tmp_path: Path, colours: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = write(Two().half(), tmp_path / "half.onnx", floats().half())
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    report = verify_foreign(path, against=Two(), data=colours)
    assert report.passed, report.text()
    assert report.artefacts[0].precision == "fp16"
    assert "fp16" in said(report)
    assert not verify_foreign(path, against=Two(seed=1), data=colours).passed


# --- functions ---


def test_plain_functions(two: Path, colours: Path) -> None:
    net = Two().eval()

    def on_tensors(images: Tensor) -> tuple[Tensor, ...]:
        return net(images)

    def on_arrays(images: np.ndarray) -> list[np.ndarray]:
        assert isinstance(images, np.ndarray)
        return [values.numpy() for values in net(torch.from_numpy(images))]

    for function in (on_tensors, on_arrays):
        report = verify_foreign(two, against=function, data=colours)
        assert report.passed, report.text()
        assert "limits are fixed numbers" in said(report)  # the float32 parameters inside are not ours to double
    other = Two(seed=1).eval()
    assert not verify_foreign(two, against=lambda images: other(images), data=colours).passed


def test_a_function_without_parameters_has_its_noise_measured(tmp_path: Path, colours: Path) -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.float() ** 2).mean(dim=(2, 3)).sqrt()

    path = write(Power(), tmp_path / "power.onnx", floats(), outputs=("power",))
    report = verify_foreign(path, against=lambda x: (x.float() ** 2).mean(dim=(2, 3)).sqrt(), data=colours)
    assert report.passed, report.text()
    assert "fixed numbers" not in said(report)
    assert all(row.limit.noise_rel_l2 > 0 for row in report.artefacts[0].parity.rows)


# --- not comparable ---


def test_a_reference_that_is_not_steady(two: Path, colours: Path) -> None:
    dropping = verify_foreign(two, against=Two(dropout=0.3), data=colours)
    assert "gives other numbers when it is asked again" in failures(dropping)
    training = Two().train()
    for layer in training.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    mixing = verify_foreign(two, against=lambda images: training(images), data=colours)
    assert "gives other numbers when it is asked again" in failures(mixing)


@pytest.mark.parametrize(
    ("bend", "reason"),
    [
        (lambda y: y * float("nan"), "the reference itself has NaN"),
        (lambda y: y * 0 + 1, "same vector for all"),
        (lambda y: (y * 10).long(), "floating point is needed"),
        (lambda y: y.mean(), "first dimension is not the batch"),
        (lambda y: y[:, :, None, None], "has shape (6,) for one image"),
    ],
    ids=["NaN", "constant", "integers", "no batch", "another shape"],
)
def test_outputs_that_cannot_be_compared(
    two: Path, colours: Path, bend: Callable[[Tensor], Tensor], reason: str
) -> None:
    class Bent(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = super().forward(x)
            return bend(one), two

    report = verify_foreign(two, against=Bent(), data=colours)
    assert not report.passed
    assert reason in failures(report)


def test_a_file_that_gives_nan(tmp_path: Path, colours: Path) -> None:
    class Broken(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = super().forward(x)
            return torch.log(one * 0), two

    path = write(Broken(), tmp_path / "broken.onnx", floats())
    assert "vectors have NaN or infinite numbers" in failures(verify_foreign(path, against=Two(), data=colours))


def test_other_names_and_counts(two: Path, colours: Path) -> None:
    class Renamed(Two):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            one, two = super().forward(x)
            return {"one": one, "three": two}

    class Single(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Triple(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            one, two = super().forward(x)
            return one, two, one

    renamed = failures(verify_foreign(two, against=Renamed(), data=colours))
    assert "three: not comparable: the output is missing" in renamed
    assert "two: not comparable: the reference has no such output" in renamed
    assert "the file has 2 (one, two), the reference 2 (one, three); they are matched by name: export" in renamed
    assert "two: not comparable: the reference has no such output" in failures(
        verify_foreign(two, against=Single(), data=colours)
    )
    assert "reference output 3: not comparable: the output is missing" in failures(
        verify_foreign(two, against=Triple(), data=colours)
    )


def test_too_few_images_and_images_all_alike(two: Path, colours: Path, tmp_path: Path) -> None:
    few, copies = tmp_path / "few", tmp_path / "copies"
    for root, count, name in ((few, 5, "0{}.png"), (copies, 5, "00.png")):
        root.mkdir()
        for number in range(count):
            (root / f"{number}.png").write_bytes((colours / name.format(number)).read_bytes())
    report = verify_foreign(two, against=Two(), data=few)
    assert report.passed
    assert "only 5 different images" in said(report)
    assert "overlap of ten neighbours needs 30 images" in report.text()
    alike = verify_foreign(two, against=Two(), data=copies)
    assert not alike.passed
    assert "only 1 different images" in failures(alike)


def test_without_images_of_the_users_own(two: Path) -> None:
    report = verify_foreign(two, against=Two())
    assert report.passed, report.text()
    assert "Fashion-MNIST" in report.images
    assert "no --data" in said(report)


# --- bad input ---


def test_files_that_are_refused(two: Path, tmp_path: Path, colours: Path) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x + y).mean(dim=(2, 3))

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

    pair = tmp_path / "pair.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Pair(), (floats(), floats()), str(pair), dynamo=False, verbose=False)
    text, cut = tmp_path / "text.onnx", tmp_path / "cut.onnx"
    text.write_text("not a model")
    cut.write_bytes(two.read_bytes()[:400])
    grey = write(Flat(), tmp_path / "grey.onnx", torch.zeros(2, 1, 8, 8), outputs=("mean",))
    both = write(Flat(), tmp_path / "both.onnx", torch.zeros(2, 3, 8, 3), outputs=("mean",))
    vector = write(nn.Linear(4, 2), tmp_path / "vector.onnx", torch.zeros(2, 4), outputs=("y",))
    for path, kind, reason in (
        (pair, BundleError, "takes 2 inputs"),
        (text, BundleError, "not an ONNX file"),
        (cut, BundleError, "not an ONNX file"),
        (tmp_path / "absent.onnx", BundleError, "does not exist"),
        (tmp_path, BundleError, "is a folder"),
        (grey, UsageError, "three channels"),
        (both, UsageError, "cannot be told"),
        (vector, BundleError, "four dimensions"),
    ):
        with pytest.raises(kind, match=reason):
            verify_foreign(path, against=Flat(), data=colours, image_size=None)
    with pytest.raises(UsageError, match="takes 32 x 32 px, image size 64 was given"):
        verify_foreign(two, against=Two(), data=colours, image_size=64)
    with pytest.raises(UsageError, match="std is"):
        verify_foreign(two, against=Two(), data=colours, std=(0.0, 1.0, 1.0))
    with pytest.raises(DataError, match="does not exist"):
        verify_foreign(two, against=Two(), data=tmp_path / "nothing")
