"""Image files of every kind as arrays, and hostile ones as errors that name them."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.data.images import open_image, to_rgb, to_uint8
from common.data.sources import DamagedRecord
from common.errors import UserError


@pytest.fixture
def pixels():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_rgb_grey_and_bilevel(tmp_path, pixels):
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    np.testing.assert_array_equal(open_image(path), pixels)
    np.testing.assert_array_equal(open_image(path.read_bytes()), pixels)
    grey = open_image(saved(tmp_path / "g.png", Image.fromarray(pixels[..., 0])))
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, -1))
    bits = pixels[..., 0] > 128
    one = open_image(saved(tmp_path / "b.png", Image.fromarray(bits)))
    np.testing.assert_array_equal(one, np.repeat(bits[..., None] * np.uint8(255), 3, -1))


def test_transparent_over_background(tmp_path, pixels):
    opacity = np.array([0, 255, 51] * 12, np.uint8)[:35].reshape(5, 7, 1)
    path = saved(tmp_path / "a.png", Image.fromarray(np.concatenate([pixels, opacity], -1)))
    for background in ((255, 255, 255), (0, 10, 200)):
        alpha = opacity / 255.0
        expected = pixels * alpha + np.array(background) * (1 - alpha)
        assert np.abs(open_image(path, background=background) - expected).max() <= 0.5 + 1e-9
    grey = np.concatenate([pixels[..., :1], opacity], -1)
    path = saved(tmp_path / "la.png", Image.fromarray(grey, "LA"))
    expected = grey[..., :1] * alpha + 255 * (1 - alpha)
    assert np.abs(open_image(path) - expected).max() <= 0.5 + 1e-9


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for name in ("p.png", "p.gif"):
        result = open_image(saved(tmp_path / name, image, transparency=1))
        expected = [[[255, 0, 0], [255] * 3], [[0, 0, 255], [255] * 3]]
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path, suffix):
    values = np.array([[0, 257, 32768], [65535, 4095, 128]], np.uint16)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(values))
    np.testing.assert_array_equal(open_image(path)[..., 1], np.round(values / 257))
    twelve = saved(tmp_path / f"b.{suffix}", Image.fromarray(np.array([[100, 4095]], np.uint16)))
    np.testing.assert_array_equal(open_image(twelve, stretch=True)[..., 0], [[0, 255]])


def test_floats_and_large_integers(tmp_path):
    path = saved(tmp_path / "f.tif", Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)))
    np.testing.assert_array_equal(open_image(path)[0, :, 2], [0, 128, 255])
    path = saved(tmp_path / "g.tif", Image.fromarray(np.array([[-9.0, 3.0]], np.float32)))
    with pytest.raises(DamagedRecord, match=r"g\.tif.*values from -9 to 3; stretch"):
        open_image(path)
    np.testing.assert_array_equal(open_image(path, stretch=True)[0, :, 0], [0, 255])
    path = saved(tmp_path / "n.tif", Image.fromarray(np.array([[np.nan]], np.float32)))
    with pytest.raises(DamagedRecord, match="not finite"):
        open_image(path, stretch=True)


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    result = open_image(saved(tmp_path / "c.jpg", image))
    assert (np.abs(result.astype(int) - [255, 0, 0]) < 12).all()


def test_orientation_of_exif(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # A camera held upright: the picture is to be turned clockwise.
    path = saved(tmp_path / "e.png", Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(open_image(path), np.rot90(pixels, -1))
    values = (pixels[..., 0].astype(np.uint16)) * 257
    path = saved(tmp_path / "e16.png", Image.fromarray(values), exif=exif)
    np.testing.assert_array_equal(open_image(path)[..., 0], np.rot90(pixels[..., 0], -1))


def test_first_frame(tmp_path, pixels):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (open_image(path) == 10).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_truncated_anywhere(tmp_path, suffix):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for length in (0, 3, 20, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedRecord, match=rf"cut\.{suffix}"):
            open_image(path)


def test_flipped_bytes_never_end_in_another_error(tmp_path):
    rng = np.random.default_rng(2)
    noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp", "ppm", "jp2"):
        whole = bytearray(saved(tmp_path / f"a.{suffix}", noise).read_bytes())
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            try:
                result = open_image(bytes(data), max_pixels=10**6)
            except DamagedRecord:
                continue
            assert result.dtype == np.uint8
            assert result.ndim == 3


def png_of(width, height):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    ends = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    for width, height in ((9000, 9999), (60000, 60000)):
        path.write_bytes(png_of(width, height))
        with pytest.raises(DamagedRecord, match=r"bomb\.png"):
            open_image(path, max_pixels=10**6)
    with pytest.raises(DamagedRecord, match="20 × 20 pixels are more than the limit of 399"):
        open_image(png_of(20, 20), max_pixels=399)


def test_what_is_no_image(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(touched) print quit\n"
    path = tmp_path / "a.png"
    for data in (script, b"hello", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(data)
        with pytest.raises(DamagedRecord, match=r"a\.png"):
            open_image(path)
    with pytest.raises(DamagedRecord, match=r"none\.png.*No such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="record 7: not an image"):
        open_image(b"x", name="record 7")


def test_arrays_of_other_types():
    np.testing.assert_array_equal(to_uint8(np.array([True, False])), [255, 0])
    np.testing.assert_array_equal(to_uint8(np.full(3, 7.0), stretch=True), [0, 0, 0])
    with pytest.raises(ValueError, match="stretch"):
        to_uint8(np.array([2.0]))
    assert to_rgb(np.zeros((2, 3), np.uint8)).shape == (2, 3, 3)
