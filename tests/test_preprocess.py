"""The one preprocessing, bit for bit against torchvision and number for number against its own contract."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from byol_deploy.errors import DataError
from byol_deploy.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("size", "resize"), [(32, 32), (32, 37), (31, 36), (96, 110), (224, 256), (1, 1), (7, 64)])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "lanczos", "box"])
def test_equals_torchvision_bit_for_bit(size: int, resize: int, filter: str) -> None:
    pytest.importorskip("torchvision")
    from torchvision.transforms import InterpolationMode, v2

    reference = v2.Compose(
        [v2.Resize(resize, interpolation=InterpolationMode(filter), antialias=True), v2.CenterCrop(size)]
    )
    ours = Preprocessing(size, resize, filter)
    shapes = [(28, 28), (300, 200), (201, 333), (33, 32), (1, 1), (2000, 3), (3, 301), (size, size), (resize, 99)]
    for seed, (height, width) in enumerate(shapes):
        image = picture(height, width, seed)
        np.testing.assert_array_equal(ours(image), np.asarray(reference(image)), err_msg=f"{height} x {width}")


def test_normalize_equals_torchvision() -> None:
    torch = pytest.importorskip("torch")
    from torchvision.transforms import v2

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    found = Preprocessing(8).normalize(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_sources_of_every_kind_give_the_same(tmp_path: object) -> None:
    image = picture(50, 40)
    ours = Preprocessing(16, 20)
    batch = ours.batch([image, np.asarray(image)])
    assert batch.shape == (2, 16, 16, 3)
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch[0], batch[1])
    assert ours.batch([]).shape == (0, 16, 16, 3)


def test_extreme_shapes_stay_within_pillows_pixel_limit() -> None:
    assert Preprocessing(224)(picture(3, 2000)).shape == (224, 224, 3)
    with pytest.raises(DataError, match="would become"):
        Preprocessing(224)(np.zeros((1, 60_000), np.uint8))


def test_normalize_refuses_other_shapes() -> None:
    for images in (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            Preprocessing(8).normalize(images)


def test_none_is_the_size_and_dicts_come_back() -> None:
    assert Preprocessing(32) == Preprocessing(32, 32)
    ours = Preprocessing(32, 36, "lanczos", (0.5, 0.5, 0.5), (1, 1, 1))
    assert Preprocessing.from_dict(ours.to_dict()) == ours
    assert hash(ours) == hash(Preprocessing.from_dict(ours.to_dict()))
    assert ours.to_dict()["channels"] == "RGB"
    assert "36 px" in ours.describe()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size_px": 0}, "size_px is 0"),
        ({"size_px": True}, "size_px is True"),
        ({"size_px": 8193}, "8193"),
        ({"size_px": 32.0}, "32.0"),
        ({"size_px": "32"}, "'32'"),
        ({"size_px": 32, "resize_px": 31}, "resize_px is 31"),
        ({"size_px": 32, "filter": "nearest"}, "nearest"),
        ({"size_px": 32, "filter": ["bicubic"]}, "filter"),
        ({"size_px": 32, "mean": (0.5, 0.5)}, "mean"),
        ({"size_px": 32, "mean": (0.5, 0.5, float("nan"))}, "mean"),
        ({"size_px": 32, "mean": (0, 0, 10**400)}, "mean"),
        ({"size_px": 32, "std": (1, 1, 0)}, "three positive numbers"),
    ],
)
def test_values_out_of_range(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Preprocessing(**values)  # type: ignore[arg-type]


def test_from_dict_lists_every_fault() -> None:
    data = Preprocessing(32).to_dict() | {"crop": "corner", "blur": 3, "mean": "grey", "filter": 7}
    with pytest.raises(ValueError, match="blur") as caught:
        Preprocessing.from_dict(data)
    for part in ("unknown key 'blur'", "crop is 'corner'", "mean is 'grey'", "filter is 7"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="size_px is missing"):
        Preprocessing.from_dict({})
    with pytest.raises(ValueError, match="must be a mapping"):
        Preprocessing.from_dict([])  # type: ignore[arg-type]
