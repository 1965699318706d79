"""Each operation of the views against torchvision's functional form, image by image, and the draws' distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from byol_deploy.recipe import AugmentRecipe, Recipe, ViewRecipe
from byol_deploy.training import augment

KEEP = {"flip": 0, "jitter": 0, "grey": 0, "blur": 0, "solarise": 0, "blur_kernel": 3}


@pytest.fixture
def photographs() -> torch.Tensor:
    """Six crops of a real photograph, (6, 3, 40, 48) in [0, 1]."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    return torch.stack([image[:, 30 * i : 30 * i + 40, 60 * i : 60 * i + 48] for i in range(6)])


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (augment.brightness, reference.adjust_brightness, (0.6, 0.8, 1.0, 1.2, 1.4, 0.0)),
        (augment.contrast, reference.adjust_contrast, (0.6, 0.8, 1.0, 1.2, 1.4, 0.0)),
        (augment.saturation, reference.adjust_saturation, (0.8, 0.9, 1.0, 1.1, 1.2, 0.0)),
        (augment.hue, reference.adjust_hue, (-0.1, -0.05, 0.0, 0.05, 0.1, 0.5)),
    ],
)
def test_colour_operations_are_torchvisions(photographs, ours, theirs, values) -> None:
    result = ours(photographs, column(*values))
    for image, value, made in zip(photographs, values, result, strict=True):
        torch.testing.assert_close(made, theirs(image, value), atol=2e-6, rtol=0)


def test_grey_is_torchvisions(photographs) -> None:
    torch.testing.assert_close(augment.to_grey(photographs), reference.rgb_to_grayscale(photographs))


@pytest.mark.parametrize("kernel", [3, 9, 23])
def test_blur_is_torchvisions(photographs, kernel) -> None:
    sigmas = (0.1, 0.5, 1.0, 1.5, 2.0, 3.0)
    result = augment.gaussian_blur(photographs, column(*sigmas), kernel)
    for image, sigma, made in zip(photographs, sigmas, result, strict=True):
        torch.testing.assert_close(made, reference.gaussian_blur(image, [kernel, kernel], [sigma, sigma]))


def test_blur_with_a_kernel_wider_than_the_image() -> None:
    """torchvision refuses this; mirroring again and again keeps a constant image constant."""
    x = torch.full((2, 1, 4, 4), 0.25)
    torch.testing.assert_close(augment.gaussian_blur(x, column(1.0, 5.0), 23), x)


def test_solarise_is_torchvisions(photographs) -> None:
    torch.testing.assert_close(augment.solarise(photographs, 0.5), reference.solarize(photographs, 0.5))


def test_rotation_is_torchvisions_away_from_the_border(photographs) -> None:
    angles = (10.0, -10.0, 45.0, 90.0, 180.0, 0.0)
    result = augment.rotate(photographs, column(*angles))
    mode = reference.InterpolationMode.BILINEAR
    for image, angle, made in zip(photographs, angles, result, strict=True):
        expected = reference.rotate(image, angle, interpolation=mode)
        inner = (slice(None), slice(10, 30), slice(14, 34))
        torch.testing.assert_close(made[inner], expected[inner], atol=1e-4, rtol=0)


def test_operations_leave_grey_images_grey() -> None:
    x = torch.rand(3, 1, 8, 8)
    assert augment.hue(x, column(0.1, 0.2, 0.3)) is x
    assert augment.saturation(x, column(0.1, 0.2, 0.3)) is x
    three = x.expand(-1, 3, -1, -1)
    for operation in (augment.brightness, augment.contrast):
        torch.testing.assert_close(
            operation(three, column(0.7, 1.0, 1.3))[:, :1], operation(x, column(0.7, 1.0, 1.3)), atol=1e-4, rtol=0
        )


def test_a_view_composes_the_operations_in_the_paper_s_order(photographs) -> None:
    view = ViewRecipe(blur=1.0, blur_kernel=5, solarise=1.0, grey=0.5, flip=0.5)
    pixels = (photographs * 255).round().to(torch.uint8)
    (draws, _) = augment.draw_views(
        AugmentRecipe(view, view), seed=3, epoch=1, indices=range(6), sizes=np.full((6, 2), 40.0)
    )
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    made = augment.apply_view(pixels.permute(0, 2, 3, 1), draws, view, mean, std)
    assert made.is_contiguous(memory_format=torch.channels_last)
    names = ("brightness", "contrast", "saturation", "hue")
    seen = set()
    for i in range(6):
        x = pixels[i].float() / 255
        if draws["flip"][i]:
            x = reference.hflip(x)
            seen.add("flip")
        if draws["jitter"][i]:
            seen.add("jitter")
            for number in draws["order"][i]:
                x = getattr(reference, f"adjust_{names[number]}")(x, float(draws[names[number]][i]))
        if draws["grey"][i]:
            seen.add("grey")
            x = reference.rgb_to_grayscale(x, 3)
        sigma = float(draws["sigma"][i])
        x = reference.gaussian_blur(x, [5, 5], [sigma, sigma])
        x = reference.solarize(x, 0.5)
        x = (x.clamp(0, 1) - mean[0]) / std[0]
        # A value on the threshold may fall on either side in float32: compare all but a few pixels.
        close = (made[i] - x).abs() < 1e-4
        assert close.float().mean() > 0.99
    assert seen == {"flip", "jitter", "grey"}


def test_nothing_drawn_changes_nothing(photographs) -> None:
    view = ViewRecipe(**KEEP)
    pixels = (photographs * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    draws, _ = augment.draw_views(AugmentRecipe(view, view), seed=0, epoch=0, indices=range(6), sizes=np.ones((6, 2)))
    made = augment.apply_view(pixels, draws, view, torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    torch.testing.assert_close(made, pixels.permute(0, 3, 1, 2) / 255)


def test_uniforms_are_uniform_independent_and_stateless() -> None:
    u = augment.uniforms(7, 3, np.arange(20000), 8)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.allclose(u.mean(0), 0.5, atol=0.01)
    assert np.allclose(u.var(0), 1 / 12, atol=0.002)
    correlation = np.corrcoef(u.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert np.array_equal(augment.uniforms(7, 3, [19999, 5], 8), u[[19999, 5]])
    assert not np.isin(augment.uniforms(7, 4, np.arange(100), 8), u).any()
    assert not np.isin(augment.uniforms(8, 3, np.arange(100), 8), u).any()


def test_crops_follow_the_recipe() -> None:
    view = ViewRecipe(crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), blur=0)
    sizes = np.tile([[300.0, 200.0]], (20000, 1))
    box = augment.draw_views(AugmentRecipe(view, view), seed=0, epoch=0, indices=range(20000), sizes=sizes)[0]["box"]
    w, h = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    assert box.min() >= 0
    assert (box[:, 2] <= 300).all()
    assert (box[:, 3] <= 200).all()
    share, ratio = w * h / 60000, w / h
    assert 0.08 <= share.min() < 0.09
    # A square-ish crop of the whole area does not fit a 3:2 image: the largest share is 4/3 of the height, 0.889.
    assert 0.86 < share.max() <= 0.889
    assert ratio.min() >= 0.75 - 1e-9
    assert ratio.max() <= 4 / 3 + 1e-9
    small = share < 0.4  # of the larger ones, the wide image refuses more tall than wide crops
    assert abs(np.log(ratio[small]).mean()) < 0.01
    centre = (box[:, 0] + box[:, 2]) / 2
    assert abs(centre.mean() - 150) < 2


def test_a_very_long_image_gets_the_largest_allowed_crop() -> None:
    view = ViewRecipe(crop_area=(0.9, 1.0), blur=0)
    draws, _ = augment.draw_views(
        AugmentRecipe(view, view), seed=0, epoch=0, indices=range(3), sizes=[[1000.0, 10.0], [10.0, 1000.0], [1.0, 1.0]]
    )
    box = draws["box"]
    np.testing.assert_allclose(box[0], [500 - 20 / 3, 0, 500 + 20 / 3, 10])
    np.testing.assert_allclose(box[1], [0, 500 - 20 / 3, 10, 500 + 20 / 3])


def test_draws_have_the_recipe_s_probabilities() -> None:
    recipe = Recipe.load("paper").resolved().augment
    first, second = augment.draw_views(recipe, seed=1, epoch=2, indices=range(20000), sizes=np.full((20000, 2), 224.0))
    for draws, blur, solarise in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        assert math.isclose((draws["sigma"] > 0).mean(), blur, abs_tol=0.01)
        assert math.isclose(draws["solarise"].mean(), solarise, abs_tol=0.01)
        assert math.isclose(draws["flip"].mean(), 0.5, abs_tol=0.02)
        assert math.isclose(draws["jitter"].mean(), 0.8, abs_tol=0.02)
        assert math.isclose(draws["grey"].mean(), 0.2, abs_tol=0.02)
        assert 0.6 <= draws["brightness"].min() < 0.61
        assert 1.39 < draws["brightness"].max() <= 1.4
        assert -0.1 <= draws["hue"].min() < -0.099
        assert np.array_equal(np.sort(draws["order"], axis=1), np.tile(np.arange(4), (20000, 1)))
        assert len({tuple(order) for order in draws["order"]}) == 24
    assert (first["sigma"] >= 0.1).all()
    assert first["sigma"].max() <= 2.0
    assert not np.array_equal(first["box"], second["box"])


def test_operations_without_meaning_for_grey_images_are_named() -> None:
    assert augment.left_out(ViewRecipe()) == ["saturation", "hue", "grey"]
    assert augment.left_out(ViewRecipe(hue=0, grey=0)) == ["saturation"]
    assert augment.left_out(ViewRecipe(jitter=0, grey=0)) == []
