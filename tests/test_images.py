"""Decoding: every kind of file that a folder holds in practice, and everything that only looks like one."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from byol_deploy.errors import DataError, UsageError
from byol_deploy.images import BadImages, decode, find_images, labels_from_folders, printable


def picture(height: int = 6, width: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(source: object) -> np.ndarray:
    image = decode(source)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG by hand: a header of any size, with whatever data follows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_path_bytes_image_and_array_are_the_same_pixels(tmp_path: Path) -> None:
    array = picture()
    file = tmp_path / "a.png"
    Image.fromarray(array).save(file)
    for source in (file, str(file), file.read_bytes(), Image.fromarray(array), array, Image.open(file)):
        np.testing.assert_array_equal(pixels(source), array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = picture()
    # What a camera that was held that way stores, by the definition of the tag (EXIF 2.3, 4.6.4 A).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = as_bytes(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
        np.testing.assert_array_equal(pixels(data), upright, err_msg=kind)


def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    array = picture()
    data = as_bytes(Image.fromarray(array), "PNG", exif=b"Exif\0\0this is no TIFF header")
    np.testing.assert_array_equal(pixels(data), array)


def test_transparency_is_laid_over_white() -> None:
    rgba = np.dstack([picture(), np.full((6, 9), 255, np.uint8)])
    rgba[0, 0, 3] = 0
    expected = rgba[..., :3].copy()
    expected[0, 0] = 255
    np.testing.assert_array_equal(pixels(as_bytes(Image.fromarray(rgba))), expected)
    np.testing.assert_array_equal(pixels(rgba), expected)
    grey = Image.fromarray(rgba).convert("LA")
    assert pixels(as_bytes(grey))[0, 0].tolist() == [255, 255, 255]
    half = np.array([[[0, 0, 0, 128]]], np.uint8)
    assert pixels(half)[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("how", ["number", "bytes"])
def test_a_palette_with_transparency(how: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    data = as_bytes(image, "PNG", transparency=1 if how == "number" else b"\xff\x00")
    assert pixels(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_rgb_with_a_transparent_colour() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(as_bytes(image, "PNG", transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_sixteen_bits_are_divided_by_257_and_rounded() -> None:
    values = np.array([[0, 128, 129, 257, 40000, 65535]], np.uint16)
    expected = np.round(values.astype(float) / 257)
    for kind in ("PNG", "TIFF"):
        found = pixels(as_bytes(Image.fromarray(values), kind))
        np.testing.assert_array_equal(found[..., 0], expected)
        np.testing.assert_array_equal(found[..., 2], expected)
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    np.testing.assert_array_equal(pixels(wide)[..., 1], expected)


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    image = Image.fromarray(np.array([[0, 1000]], np.uint16))
    image.info["transparency"] = 1000
    assert pixels(image)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("values", [[[-1, 0]], [[0, 65536]]])
def test_32_bit_values_beyond_16_bits_are_refused(values: list[list[int]]) -> None:
    with pytest.raises(DataError, match="grey values from"):
        decode(Image.fromarray(np.array(values, np.int32)))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(DataError, match=r"f\.tiff has floating-point pixels"):
        decode(tmp_path / "f.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa", "La", "PA"])
def test_other_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    source = Image.fromarray(picture())
    for step in {"RGBa": ["RGBA"], "La": ["LA"], "PA": ["P"]}.get(mode, []):
        source = source.convert(step)
    image = source.convert(mode)
    direct = image.convert("RGBA").convert("RGB") if mode in ("RGBa", "PA") else image
    direct = image.convert("LA").convert("RGB") if mode == "La" else direct.convert("RGB")
    np.testing.assert_array_equal(pixels(image), np.asarray(direct))


def test_lab(tmp_path: Path) -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    flat = Image.new("RGB", (4, 4), (200, 100, 50))
    image = ImageCms.applyTransform(flat, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert image is not None
    assert np.abs(pixels(image).astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_is_decoded_at_full_size(options: dict[str, object]) -> None:
    smooth = Image.fromarray(picture(4, 4)).resize((64, 48))
    data = as_bytes(smooth, "JPEG", **options)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def test_cmyk_jpeg() -> None:
    data = as_bytes(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert pixels(data).min() > 250


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_what_is_lent_is_not_changed() -> None:
    image = Image.fromarray(np.dstack([picture(), picture()[..., :1]]))
    before, array = image.tobytes(), picture()
    decode(image)
    found = decode(array)
    found.paste((0, 0, 0), (0, 0, 9, 6))
    assert image.tobytes() == before
    np.testing.assert_array_equal(array, picture())
    same = Image.fromarray(picture())
    decode(same).paste((0, 0, 0), (0, 0, 9, 6))
    np.testing.assert_array_equal(np.asarray(same), picture())


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 1), (1, 1), (3, 2000)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    grey = array.reshape(shape[:2])
    np.testing.assert_array_equal(pixels(array), np.dstack([grey] * 3))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), "not uint8"),
        (np.zeros((4, 4, 2), np.uint8), "not one image"),
        (np.zeros((4,), np.uint8), "not one image"),
        (np.zeros((2, 4, 4, 3), np.uint8), "not one image"),
        (np.zeros((0, 4, 3), np.uint8), "no pixel"),
    ],
)
def test_arrays_that_are_no_image(array: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        decode(array)


def broken_files() -> dict[str, bytes]:
    whole = as_bytes(Image.fromarray(picture(64, 64)), "JPEG")
    tiff = as_bytes(Image.fromarray(picture(64, 64)), "TIFF")
    return {
        "empty.png": b"",
        "text.jpg": b"<html>404</html>",
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": as_bytes(Image.fromarray(picture(64, 64)))[:300],
        "cut.tif": tiff[: len(tiff) // 2],
        "cut.webp": as_bytes(Image.fromarray(picture(64, 64)), "WEBP")[:60],
        "cut.gif": as_bytes(Image.fromarray(picture(64, 64)), "GIF")[:50],
        "short.png": png(20, 20, b"\0" * 10),
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_named_with_a_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(broken_files()[name])
    with pytest.raises(DataError) as caught:
        decode(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) > len(str(tmp_path / name)) + 15


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    # 100 million pixels are more than Pillow warns of, 3.6 billion more than it opens.
    with pytest.raises(DataError, match=r"(?i)pixels|bomb"):
        decode(png(side, side, b"\0"))


def test_every_cut_of_a_file_is_an_error_or_an_image() -> None:
    data = as_bytes(Image.fromarray(picture(16, 16)), "PNG")
    for end in range(0, len(data), 7):
        try:
            found = decode(data[:end])
        except DataError:
            continue
        assert (found.mode, found.size) == ("RGB", (16, 16))


def test_fuzzed_files_are_an_error_or_an_image() -> None:
    draw = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"):
        whole = np.frombuffer(as_bytes(Image.fromarray(picture(16, 16)), kind), np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[draw.integers(0, len(broken), 3)] = draw.integers(0, 256, 3)
            try:
                assert decode(broken.tobytes()).mode == "RGB"
            except DataError:
                continue


def test_absent_folder_and_closed_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        decode(tmp_path / "absent.png")
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(tmp_path)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode("with\0nul.png")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    with pytest.raises(DataError):
        decode(closed)
    with pytest.raises(DataError, match="int"):
        decode(5)  # type: ignore[arg-type]


def test_find_images_walks_sorts_and_skips(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpg", "a.webp", ".hidden.png", ".cache/x.png", "notes.txt", "b/m.h5", "c/d/e.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.webp", "b/10.jpg", "b/2.PNG", "c/d/e.tiff"]


def test_find_images_follows_links_once(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    real.mkdir()
    (real / "1.png").write_bytes(b"x")
    data = tmp_path / "data"
    data.mkdir()
    os.symlink(real, data / "class-a")
    os.symlink(data, real / "loop")
    assert [path.relative_to(data).as_posix() for path in find_images(data)] == ["class-a/1.png"]


def test_find_images_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "absent")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        find_images(tmp_path / "file.txt")
    with pytest.raises(DataError, match="holds no image"):
        find_images(tmp_path)


def test_labels_are_the_first_folder(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("cat/1.png", "ant/deep/2.png", "cat/3.png")]
    labels, classes = labels_from_folders(paths, tmp_path)
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 0, 1]
    assert classes == ["ant", "cat"]
    with pytest.raises(DataError, match=r"loose\.png"):
        labels_from_folders([*paths, tmp_path / "loose.png"], tmp_path)
    with pytest.raises(DataError, match="at least 2"):
        labels_from_folders(paths[:1], tmp_path)


def test_bad_images_are_counted_listed_and_limited() -> None:
    bad = BadImages(0.1)
    assert bad.summary() == ""
    bad.check(0)
    for number in range(10):
        bad.add(f"{number}.png", f"{number}.png is empty")
    bad.check(100)
    assert len(bad) == 10
    assert "10 bad image(s)" in bad.summary()
    assert "and 5 more" in bad.summary()
    with pytest.raises(DataError, match=r"10 of 99 .*--max-bad-share.*0\.png is empty"):
        bad.check(99)
    everything = BadImages(1.0)
    everything.add("x.png", "no")
    with pytest.raises(DataError, match="none is left"):
        everything.check(1)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="max-bad-share"):
            BadImages(share)


def test_names_of_any_bytes_can_be_printed() -> None:
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    assert printable("café.png") == "café.png"
