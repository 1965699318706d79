"""From a folder of images to pairs of random views.

The folder is scanned once at the start: every file is decoded, the bad ones are counted and left out, and the decoded
pixels stay in memory while they fit. Per image, in the loader: two random crops, resampled by Pillow. Per batch, on
the device: everything else (:mod:`byol_deploy.training.augment`). What an image looks like depends on the seed, the
epoch and the image only, so the number of loader processes never changes a result.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from byol_deploy.cores import usable_cores
from byol_deploy.errors import DataError
from byol_deploy.images import BadImages, decode, find_images
from byol_deploy.recipe import AugmentRecipe, Recipe
from byol_deploy.training.augment import Draws, apply_view, draw_views, stateless_seed

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int, int], None]
"""Called with (files looked at, files in all, bad files) now and then."""
RawBatch = tuple[Tensor, tuple[Draws, Draws]]
"""(2, N, H, W, C) uint8 crops and the draws for the rest, see :func:`apply_view`."""

_SCAN_CHUNK = 32
_POOL_PAYS_S = 3.0
"""Starting processes and sending pixels through pipes costs about a second: below this, one process is as fast."""
_WORKERS_PAY_MS = 60.0
"""Milliseconds of loading per batch below which processes of their own do not pay on a CPU that computes anyway."""


@dataclass(frozen=True)
class ImageFile:
    """One usable file: its path below the root with forward slashes, its size on disk and its colour channels."""

    name: str
    bytes: int
    channels: int


def load_pixels(path: Path, store_px: int) -> Pixels:
    """Decode one file, reduced to a shorter side of ``store_px`` (0 = as it is).

    Returns:
        (H, W) uint8 where the image is grey, (H, W, 3) uint8 RGB otherwise.

    Raises:
        DataError: when it cannot be decoded.
    """
    image = decode(path)
    shorter = min(image.size)
    if store_px and shorter > store_px:
        width, height = (max(store_px, round(side * store_px / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(image, np.uint8)
    red = pixels[..., 0]
    # One glance at a row settles it for most colour images.
    row = pixels[len(pixels) // 2]
    if (row == row[:, :1]).all() and np.array_equal(red, pixels[..., 1]) and np.array_equal(red, pixels[..., 2]):
        return np.ascontiguousarray(red)
    return pixels.copy() if not pixels.flags.owndata else pixels


class ImageStore:
    """The usable images of a folder, decoded ones in memory while they fit. Made by :meth:`scan`."""

    def __init__(self, root: Path, files: list[ImageFile], cached: list[Pixels | None], store_px: int) -> None:
        self.root = root
        self.files = files
        self._cached = cached
        self._store_px = store_px

    @classmethod
    def scan(
        cls,
        root: str | os.PathLike[str],
        *,
        max_bad_share: float = 0.05,
        cache_mb: int = 1500,
        store_px: int = 0,
        trusted: Sequence[ImageFile] = (),
        progress: Progress | None = None,
    ) -> tuple[ImageStore, BadImages]:
        """Decode every image below ``root`` once.

        Args:
            root: walked recursively.
            max_bad_share: largest share of files that may be bad.
            cache_mb: decoded pixels are kept up to this many MB.
            store_px: see :func:`load_pixels`.
            trusted: files that an earlier scan found usable; they are only decoded again while the cache has room.
            progress: told how far it is.

        Raises:
            DataError: no folder, no image, or more bad ones than allowed.
        """
        folder = Path(root)
        paths = find_images(folder)
        known = {file.name: file for file in trusted}
        sizes = [_bytes(path) for path in paths]
        names = [path.relative_to(folder).as_posix() for path in paths]
        bad = BadImages(max_bad_share)
        files: list[ImageFile] = []
        cached: list[Pixels | None] = []
        room = cache_mb * 1_000_000
        trusting = [name in known and known[name].bytes == size for name, size in zip(names, sizes, strict=True)]

        def full_and_known(place: int) -> bool:
            return room <= 0 and trusting[place]

        for place, found in _decoded(paths, store_px, full_and_known):
            if isinstance(found, str):
                bad.add(paths[place], found)
            elif found is None:
                files.append(known[names[place]])
                cached.append(None)
            else:
                files.append(ImageFile(names[place], sizes[place], 1 if found.ndim == 2 else 3))
                room -= found.nbytes
                cached.append(found if room >= 0 else None)
            if progress is not None and ((place + 1) % _SCAN_CHUNK == 0 or place + 1 == len(paths)):
                progress(place + 1, len(paths), len(bad.items))
        bad.check(len(paths))
        return cls(folder, files, cached, store_px), bad

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Pixels:
        """(H, W) or (H, W, 3) uint8."""
        pixels = self._cached[place]
        return load_pixels(self.root / self.files[place].name, self._store_px) if pixels is None else pixels

    @property
    def channels(self) -> int:
        """1 where every image is grey, otherwise 3."""
        return 3 if any(file.channels == 3 for file in self.files) else 1

    @property
    def cached_share(self) -> float:
        """Share of the images that are in memory."""
        return sum(pixels is not None for pixels in self._cached) / max(len(self), 1)

    @property
    def cached_bytes(self) -> int:
        """Memory that the decoded images take."""
        return sum(pixels.nbytes for pixels in self._cached if pixels is not None)

    @property
    def fingerprint(self) -> str:
        """Changes when a usable file is added, removed, renamed or changes its size on disk."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.bytes}\n".encode("utf-8", "surrogateescape"))
        return f"sha256:{digest.hexdigest()}"


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a broken link: decoding says so in words
        return -1


def _decode_or_say(path: Path, store_px: int) -> Pixels | str:
    try:
        return load_pixels(path, store_px)
    except DataError as error:
        return str(error)


class _Scan(Dataset[Any]):
    """Decodes files in loader processes; NumPy arrays travel through pipes, not through scarce shared memory."""

    def __init__(self, paths: Sequence[Path], store_px: int) -> None:
        self.paths = paths
        self.store_px = store_px

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Pixels | str:
        return _decode_or_say(self.paths[place], self.store_px)


def _decoded(
    paths: Sequence[Path], store_px: int, skip: Callable[[int], bool]
) -> Iterator[tuple[int, Pixels | str | None]]:
    """Yield (place, pixels or the fault or None where skipped), in order; in several processes when that pays."""
    start = time.perf_counter()
    for place, path in enumerate(paths):
        if skip(place):
            yield place, None
            continue
        yield place, _decode_or_say(path, store_px)
        done = place + 1
        left_s = (time.perf_counter() - start) / done * (len(paths) - done)
        if done == _SCAN_CHUNK and left_s > _POOL_PAYS_S and usable_cores() > 1:
            break
    else:
        return
    # The loader asks for places some batches ahead; what it was told of each is remembered.
    wanted: dict[int, bool] = {}

    def ahead() -> Iterator[list[int]]:
        batch: list[int] = []
        for place in range(_SCAN_CHUNK, len(paths)):
            wanted[place] = not skip(place)
            if wanted[place]:
                batch.append(place)
            if len(batch) == 8 or (batch and place + 1 == len(paths)):
                yield batch
                batch = []

    loader = DataLoader(
        _Scan(paths, store_px),
        batch_sampler=cast(Any, ahead()),
        num_workers=min(usable_cores(), 8),
        collate_fn=_as_is,
        generator=torch.Generator(),
    )
    batches = iter(loader)
    found: deque[Pixels | str] = deque()
    for place in range(_SCAN_CHUNK, len(paths)):
        while place not in wanted or (wanted[place] and not found):
            found.extend(next(batches, ()))
        yield place, (found.popleft() if wanted[place] else None)


def _as_is(batch: Any) -> Any:
    return batch


def changes(before: Sequence[ImageFile], now: Sequence[ImageFile]) -> list[str]:
    """What differs between two lists of images, in words; empty when nothing does."""
    old, new = ({file.name: file.bytes for file in files} for files in (before, now))
    kinds = {
        "added": [name for name in new if name not in old],
        "gone or no longer readable": [name for name in old if name not in new],
        "changed in size": [name for name in new if name in old and old[name] != new[name]],
    }
    return [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]


class TwoCrops(Dataset[RawBatch]):
    """Batches of crops. An index is ``epoch * len(store) + place``, so that loader processes need no other word."""

    def __init__(self, store: ImageStore, augment: AugmentRecipe, image_size: int, seed: int) -> None:
        self.store = store
        self.augment = augment
        self.image_size = image_size
        self.seed = seed
        self.channels = store.channels

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: Sequence[int]) -> RawBatch:
        epoch = indices[0] // len(self.store)
        places = [index % len(self.store) for index in indices]
        images = [self.store[place] for place in places]
        sizes = np.array([(pixels.shape[1], pixels.shape[0]) for pixels in images])
        draws = draw_views(self.augment, seed=self.seed, epoch=epoch, indices=places, sizes=sizes)
        side = (self.image_size, self.image_size)
        mode = "L" if self.channels == 1 else "RGB"
        boxes = [draw.pop("box").tolist() for draw in draws]
        # Small images spend more time in Python than in Pillow: bytes are the shortest way in and out of it.
        made: tuple[list[bytes], list[bytes]] = ([], [])
        for row, pixels in enumerate(images):
            own = "L" if pixels.ndim == 2 else "RGB"
            image = Image.frombuffer(own, (pixels.shape[1], pixels.shape[0]), pixels, "raw", own, 0, 1)
            for view in (0, 1):
                crop = image.resize(side, Image.Resampling.BICUBIC, box=boxes[view][row])
                made[view].append((crop if own == mode else crop.convert(mode)).tobytes())
        crops = torch.frombuffer(bytearray().join(made[0] + made[1]), dtype=torch.uint8)
        return crops.view(2, len(images), *side, self.channels), draws


class EpochBatches:
    """Batch sampler: a new order each epoch, every process its own share, no part-filled batch.

    Args:
        count: number of images.
        batch_size: images in a batch of one process.
        batches: batches of one epoch.
        seed: the recipe's.
        epoch: asked at the start of each pass.
        rank: this process's number.
        world: number of processes.
    """

    def __init__(
        self, count: int, batch_size: int, batches: int, seed: int, epoch: Callable[[], int], rank: int, world: int
    ) -> None:
        self.count, self.batch_size, self.batches = count, batch_size, batches
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch()
        order = np.random.default_rng(stateless_seed(self.seed, epoch, 1)).permutation(self.count)
        whole = self.batch_size * self.world
        for batch in range(self.batches):
            start = batch * whole + self.rank * self.batch_size
            yield [epoch * self.count + int(place) for place in order[start : start + self.batch_size]]


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut into steps."""

    batch_size: int
    accumulate: int
    batches: int
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimiser steps of one epoch."""
        return self.batches // self.accumulate


def plan_epoch(count: int, batch_size: int, accumulate: int, world: int = 1) -> Plan:
    """Cut ``count`` images into optimiser steps of equal size; what does not fill a step waits for the next epoch.

    A batch larger than the data is reduced, with a note.

    Raises:
        DataError: when there are not even two images for each process; batch normalisation needs two.
    """
    if count < 2 * world:
        raise DataError(
            f"there {'is' if count == 1 else 'are'} {count} usable image{'' if count == 1 else 's'}; "
            f"training needs at least {2 * world}, and a few hundred to learn anything"
        )
    notes = []
    batch = min(batch_size, count // world)
    if batch < batch_size:
        notes.append(f"train.batch_size {batch_size} is more than the {count} images allow; reduced to {batch}")
    steps = min(accumulate, count // (batch * world))
    if steps < accumulate:
        notes.append(f"train.accumulate {accumulate} is more than the {count} images allow; reduced to {steps}")
    return Plan(batch, steps, count // (batch * world * steps) * steps, tuple(notes))


class ByolData(L.LightningDataModule):  # type: ignore[misc]
    """Feeds BYOL: crops from the loader, everything else on the device.

    Args:
        store: the images.
        recipe: resolved.
        plan: from :func:`plan_epoch`.
        workers: loader processes.
    """

    def __init__(self, store: ImageStore, recipe: Recipe, plan: Plan, workers: int) -> None:
        super().__init__()
        self.crops = TwoCrops(store, recipe.augment, recipe.data.image_size, recipe.train.seed)
        self.recipe = recipe
        self.plan = plan
        self.workers = workers
        self._mean = torch.tensor(recipe.data.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(recipe.data.std).view(1, 3, 1, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of crops for this process."""
        trainer = self.trainer
        assert trainer is not None
        progress = trainer.fit_loop.epoch_progress.current
        batches = EpochBatches(
            len(self.crops),
            self.plan.batch_size,
            self.plan.batches,
            self.recipe.train.seed,
            # Not trainer.current_epoch: that is one behind while a resumed loop makes its first iterator.
            lambda: int(progress.processed),
            trainer.global_rank,
            trainer.world_size,
        )
        return DataLoader(
            self.crops,
            batch_sampler=cast(Any, batches),
            num_workers=self.workers,
            collate_fn=_as_is,
            persistent_workers=self.workers > 0,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            # The loader draws a seed for its processes, which use none: the global generator stays as it was.
            generator=torch.Generator(),
        )

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Finish both views on the device. Returns two (N, 3, H, W) float32, normalised, channels-last."""
        return self.views(batch)

    def views(self, batch: RawBatch) -> tuple[Tensor, Tensor]:
        """Both views of a raw batch, on the device that its pixels are on."""
        pixels, (first, second) = batch
        if self._mean.device != pixels.device:
            self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        augment = self.recipe.augment
        return (
            apply_view(pixels[0], first, augment.view1, self._mean, self._std),
            apply_view(pixels[1], second, augment.view2, self._mean, self._std),
        )

    def first_pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """The views that epoch 0 has of the first ``count`` images, each (N, 3, H, W) float32 in [0, 1], on the CPU."""
        step = max(len(self.crops) // count, 1)
        places = list(range(0, len(self.crops), step))[:count]
        mean, std = self._mean.cpu(), self._std.cpu()
        first, second = ((view.cpu() * std + mean).clamp(0, 1) for view in self.views(self.crops.__getitems__(places)))
        return first, second


def choose_workers(asked: int | str, data: TwoCrops, batch_size: int, on_cpu: bool) -> tuple[int, str]:
    """Settle ``data.workers``. Returns the number of loader processes, and why."""
    if asked != "auto":
        return int(asked), "as asked"
    if usable_cores() == 1:
        return 0, "one core"
    places = list(range(min(len(data), 16)))
    data.__getitems__(places[:2])
    start = time.perf_counter()
    data.__getitems__(places)
    batch_ms = (time.perf_counter() - start) * 1e3 / len(places) * batch_size
    if batch_ms < (_WORKERS_PAY_MS if on_cpu else _WORKERS_PAY_MS / 20):
        return 0, f"a batch loads in {batch_ms:.0f} ms"
    return min(usable_cores(), 8), f"a batch loads in {batch_ms:.0f} ms"


def list_text(files: Sequence[ImageFile]) -> bytes:
    """The images that a run uses, one a line: channels, bytes, name."""
    lines = "".join(f"{file.channels}\t{file.bytes}\t{_escape(file.name)}\n" for file in files)
    return lines.encode("utf-8", "surrogateescape")


def read_list(path: Path) -> list[ImageFile]:
    """Read what :func:`list_text` made.

    Raises:
        DataError: when the file is damaged.
    """
    files = []
    try:
        for line in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
            channels, size, name = line.split("\t")
            files.append(ImageFile(_unescape(name), int(size), int(channels)))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); start a new run") from error
    return files


_ESCAPES: Mapping[str, str] = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def _escape(name: str) -> str:
    return "".join(_ESCAPES.get(letter, letter) for letter in name)


def _unescape(name: str) -> str:
    back = {escaped[1]: letter for letter, escaped in _ESCAPES.items()}
    letters = iter(name)
    return "".join(back[next(letters)] if letter == "\\" else letter for letter in letters)
