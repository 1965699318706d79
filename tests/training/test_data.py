"""From a folder to batches: what counts as bad, what is kept, and that loader processes change nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from byol_deploy.errors import DataError
from byol_deploy.recipe import Recipe
from byol_deploy.training import data as module
from byol_deploy.training.data import (
    ByolData,
    EpochBatches,
    ImageFile,
    ImageStore,
    TwoCrops,
    changes,
    choose_workers,
    list_text,
    load_pixels,
    plan_epoch,
    read_list,
)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Grey, colour, 16-bit, palette and alpha images of several sizes in two folders, from a photograph."""
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("flower.jpg"))
    root = tmp_path / "images"
    (root / "a/b").mkdir(parents=True)
    photo.resize((60, 40)).save(root / "a/colour.jpg")
    photo.resize((33, 50)).convert("L").save(root / "a/grey.png")
    photo.resize((40, 40)).convert("P").save(root / "a/b/palette.png")
    photo.resize((50, 30)).convert("RGBA").save(root / "a/b/alpha.webp", lossless=True)
    grey16 = np.asarray(photo.resize((48, 48)).convert("L"), np.uint16) * 257
    Image.fromarray(grey16).save(root / "deep.tif")
    photo.resize((300, 200)).save(root / "large.bmp")
    return root


def recipe(**changes: object) -> Recipe:
    return Recipe().updated({"data.image_size": 32, "train.batch_size": 2, **changes}).resolved()


def test_a_scan_keeps_grey_images_in_one_channel_and_reduces_large_ones(mixed) -> None:
    store, bad = ImageStore.scan(mixed, store_px=64)
    assert [file.name for file in store.files] == [
        "a/b/alpha.webp",
        "a/b/palette.png",
        "a/colour.jpg",
        "a/grey.png",
        "deep.tif",
        "large.bmp",
    ]
    assert [file.channels for file in store.files] == [3, 3, 3, 1, 1, 3]
    assert [store[i].shape for i in range(6)] == [
        (30, 50, 3),
        (40, 40, 3),
        (40, 60, 3),
        (50, 33),
        (48, 48),
        (64, 96, 3),
    ]
    assert store.channels == 3
    assert store.cached_share == 1
    assert store.cached_bytes == sum(store[i].nbytes for i in range(6))
    assert not bad.items
    np.testing.assert_array_equal(store[3], np.asarray(Image.open(mixed / "a/grey.png")))


def test_what_does_not_fit_into_the_cache_is_decoded_again(mixed) -> None:
    kept, _ = ImageStore.scan(mixed, store_px=64)
    fresh, _ = ImageStore.scan(mixed, store_px=64, cache_mb=0)
    assert fresh.cached_share == 0
    assert fresh.fingerprint == kept.fingerprint
    for place in range(6):
        np.testing.assert_array_equal(kept[place], fresh[place])


def test_bad_files_are_counted_and_fail_past_the_share(mixed) -> None:
    (mixed / "zero.png").write_bytes(b"")
    (mixed / "noise.jpg").write_bytes(np.random.default_rng(0).bytes(3000))
    whole = (mixed / "large.bmp").read_bytes()
    (mixed / "cut.bmp").write_bytes(whole[: len(whole) // 2])
    store, bad = ImageStore.scan(mixed, max_bad_share=0.5)
    assert len(store) == 6
    assert {Path(name).name for name, _ in bad.items} == {"zero.png", "noise.jpg", "cut.bmp"}
    with pytest.raises(DataError, match=r"3 of 9"):
        ImageStore.scan(mixed, max_bad_share=0.05)


def test_a_scan_in_several_processes_finds_the_same(mixed, monkeypatch) -> None:
    (mixed / "a/zero.png").write_bytes(b"")
    alone, bad_alone = ImageStore.scan(mixed, max_bad_share=1)
    monkeypatch.setattr(module, "_SCAN_CHUNK", 2)
    monkeypatch.setattr(module, "_POOL_PAYS_S", 0.0)
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    seen = []
    together, bad = ImageStore.scan(mixed, max_bad_share=1, progress=lambda *told: seen.append(told))
    assert together.files == alone.files
    assert bad.items == bad_alone.items
    assert seen[-1] == (7, 7, 1)
    for place in range(6):
        np.testing.assert_array_equal(together[place], alone[place])
    # Full cache and known files: nothing is decoded a second time, even where a file is bad by now.
    (mixed / "deep.tif").write_bytes(b"x" * (mixed / "deep.tif").stat().st_size)
    trusting, bad = ImageStore.scan(mixed, max_bad_share=1, cache_mb=0, trusted=alone.files)
    assert trusting.files == alone.files
    assert len(bad.items) == 1


def test_no_folder_no_image(tmp_path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ImageStore.scan(tmp_path / "absent")
    with pytest.raises(DataError, match="no image"):
        ImageStore.scan(tmp_path)


def test_the_list_of_images_survives_any_name(tmp_path) -> None:
    files = [ImageFile("a/ü\t\\n\n\u2028b.png", 3, 1), ImageFile("\udcff.jpg", 4, 3)]
    (tmp_path / "l.tsv").write_bytes(list_text(files))
    assert read_list(tmp_path / "l.tsv") == files
    (tmp_path / "l.tsv").write_text("1\t2\n")
    with pytest.raises(DataError, match="damaged"):
        read_list(tmp_path / "l.tsv")


def test_changed_images_are_named() -> None:
    before = [ImageFile("a", 1, 1), ImageFile("b", 2, 1), ImageFile("c", 3, 3)]
    now = [ImageFile("a", 1, 1), ImageFile("b", 9, 1), ImageFile("d", 3, 3)]
    assert changes(before, now) == ["1 added (d)", "1 gone or no longer readable (c)", "1 changed in size (b)"]
    assert changes(before, before) == []


def test_crops_are_pillow_s_and_depend_on_seed_epoch_and_image_only(mixed) -> None:
    store, _ = ImageStore.scan(mixed)
    crops = TwoCrops(store, recipe().augment, 32, seed=5)
    pixels, draws = crops.__getitems__([6 + 3, 6 + 2, 6 + 5])  # epoch 1
    assert pixels.shape == (2, 3, 32, 32, 3)
    assert "box" not in draws[0]
    alone, _ = crops.__getitems__([6 + 2])
    assert torch.equal(alone[:, 0], pixels[:, 1])
    other, _ = crops.__getitems__([2])
    assert not torch.equal(other, alone)
    drawn = module.draw_views(recipe().augment, seed=5, epoch=1, indices=[2], sizes=[[60, 40]])
    for view in (0, 1):
        image = Image.open(mixed / "a/colour.jpg")
        expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=drawn[view]["box"][0].tolist())
        np.testing.assert_array_equal(pixels[view, 1].numpy(), np.asarray(expected))
    grey = pixels[:, 0]
    assert torch.equal(grey[..., 0], grey[..., 2])


def test_loader_processes_do_not_change_the_batches(mixed) -> None:
    store, _ = ImageStore.scan(mixed, cache_mb=0)
    settled = recipe()
    feed = ByolData(store, settled, plan_epoch(6, 2, 1), 0)

    def batches(workers: int) -> list[torch.Tensor]:
        sampler = EpochBatches(6, 2, 3, 0, lambda: 4, 0, 1)
        loader = DataLoader(feed.crops, batch_sampler=sampler, num_workers=workers, collate_fn=module._as_is)
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork in a process with threads.
            warnings.filterwarnings("ignore", message=".*fork.*")
            return [torch.stack(feed.views(raw)) for raw in loader]

    for one, two in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one, two)


def test_every_epoch_has_its_own_order_and_every_process_its_own_share() -> None:
    epoch = 0

    def order(rank: int, world: int) -> list[int]:
        batches = plan_epoch(103, 5, 2, world).batches
        sampler = EpochBatches(103, 5, batches, 9, lambda: epoch, rank, world)
        assert len(list(sampler)) == len(sampler)
        assert all(len(batch) == 5 for batch in sampler)
        return [index for batch in sampler for index in batch]

    first = order(0, 1)
    assert len(set(first)) == len(first) == 100
    two = order(0, 2) + order(1, 2)
    assert len(set(two)) == len(two) == 100
    epoch = 1
    second = order(0, 1)
    assert {index // 103 for index in second} == {1}
    assert [index % 103 for index in second] != first


@pytest.mark.parametrize(
    ("count", "batch", "accumulate", "world", "expected"),
    [
        (100, 32, 1, 1, (32, 1, 3)),
        (100, 16, 4, 1, (16, 4, 4)),
        (100, 256, 16, 1, (100, 1, 1)),
        (100, 30, 16, 1, (30, 3, 3)),
        (100, 64, 1, 2, (50, 1, 1)),
        (2, 64, 1, 1, (2, 1, 1)),
    ],
)
def test_steps_are_of_equal_size(count, batch, accumulate, world, expected) -> None:
    plan = plan_epoch(count, batch, accumulate, world)
    assert (plan.batch_size, plan.accumulate, plan.batches) == expected
    assert plan.steps * plan.accumulate == plan.batches
    assert len(plan.notes) == (plan.batch_size < batch) + (plan.accumulate < accumulate)


def test_one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="1 usable image; training needs at least 2"):
        plan_epoch(1, 64, 1)


def test_grey_data_stays_in_one_channel_until_the_end(mixed) -> None:
    for path in mixed.rglob("*.*"):
        if path.name not in {"grey.png", "deep.tif"}:
            path.unlink()
    store, _ = ImageStore.scan(mixed)
    feed = ByolData(store, recipe(), plan_epoch(2, 2, 1), 0)
    raw = feed.crops.__getitems__([0, 1])
    assert raw[0].shape == (2, 2, 32, 32, 1)
    first, second = feed.views(raw)
    assert first.shape == second.shape == (2, 3, 32, 32)
    shown, _ = feed.first_pairs(2)
    torch.testing.assert_close(shown[:, 0], shown[:, 2])
    assert 0 <= shown.min() < shown.max() <= 1


def test_workers(mixed, monkeypatch) -> None:
    store, _ = ImageStore.scan(mixed)
    crops = TwoCrops(store, recipe().augment, 32, seed=5)
    assert choose_workers(3, crops, 2, on_cpu=True) == (3, "as asked")
    monkeypatch.setattr(module, "usable_cores", lambda: 4)
    assert choose_workers("auto", crops, 2, on_cpu=True)[0] == 0
    assert choose_workers("auto", crops, 10**6, on_cpu=True)[0] == 4
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    assert choose_workers("auto", crops, 10**6, on_cpu=True) == (0, "one core")


def test_colour_of_one_pixel_is_seen(tmp_path) -> None:
    pixels = np.full((9, 9, 3), 77, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    assert load_pixels(tmp_path / "grey.png", 0).shape == (9, 9)
    pixels[8, 8, 1] = 78
    Image.fromarray(pixels).save(tmp_path / "nearly.png")
    assert load_pixels(tmp_path / "nearly.png", 0).shape == (9, 9, 3)
