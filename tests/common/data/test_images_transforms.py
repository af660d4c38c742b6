"""Crops, colours and blur of images against NumPy written from their definitions."""

import colorsys
import math

import numpy as np
import pytest
from PIL import Image

from common.data.image_transforms import (
    center_crop,
    change_contrast,
    color_jitter,
    gaussian_blur,
    grayscale,
    random_box,
    random_flip,
    random_resized_crop,
    resize_shorter_side,
    solarize,
    turn_hue,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def picture(rng):
    return Image.fromarray(rng.integers(0, 256, (31, 45, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(31, 45), (1, 1), (3, 200), (200, 3), (640, 480)])
def test_boxes_lie_inside(rng, size):
    for scale in ((0.05, 0.32), (0.32, 1.0), (1.0, 1.0)):
        for _ in range(100):
            left, top, right, bottom = random_box(rng, *size, scale, (3 / 4, 4 / 3))
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]


def test_areas_and_aspects_of_boxes(rng):
    """In a large image nothing is rejected below 3/4 of the area: both are as they were asked."""
    boxes = [random_box(rng, 4000, 4000, (0.05, 0.32), (3 / 4, 4 / 3)) for _ in range(4000)]
    left, top, right, bottom = np.array(boxes).T
    area = (right - left) * (bottom - top) / 4000**2
    aspect = np.log((right - left) / (bottom - top))
    for values, low, high in ((area, 0.05, 0.32), (aspect, math.log(3 / 4), math.log(4 / 3))):
        assert low - 0.002 < values.min() < values.max() < high + 0.002
        deviation = (high - low) / math.sqrt(12 * len(boxes))
        assert abs(values.mean() - (low + high) / 2) < 5 * deviation


def test_a_box_that_never_fits_is_centred(rng):
    assert random_box(rng, 1000, 10, (1.0, 1.0), (3 / 4, 4 / 3)) == (493, 0, 506, 10)
    assert random_box(rng, 10, 1000, (1.0, 1.0), (3 / 4, 4 / 3)) == (0, 493, 10, 506)


def test_resizing_does_not_look_beyond_the_box(rng):
    """Outside of the box is white, inside is black: a crop is black to its edge."""
    values = np.full((64, 64, 3), 255, np.uint8)
    state = rng.bit_generator.state
    left, top, right, bottom = random_box(rng, 64, 64, (0.1, 0.3), (1.0, 1.0))
    values[top:bottom, left:right] = 0
    rng.bit_generator.state = state
    crop = random_resized_crop(rng, Image.fromarray(values), 9, (0.1, 0.3), (1.0, 1.0))
    assert crop.size == (9, 9)
    assert not np.asarray(crop).any()


def test_resizing_averages_over_what_it_leaves_out(rng):
    noise = Image.fromarray(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8))
    crop = np.asarray(random_resized_crop(rng, noise, 10, (1.0, 1.0), (1.0, 1.0)), float)
    assert crop.std() < 12  # Of 74 without.


def test_shorter_side_and_centre(picture):
    resized = resize_shorter_side(picture, 62)
    assert resized.size == (90, 62)
    assert resize_shorter_side(picture.transpose(Image.Transpose.ROTATE_90), 20).size == (20, 29)
    middle = np.asarray(center_crop(picture, 21))
    np.testing.assert_array_equal(middle, np.asarray(picture)[5:26, 12:33])
    assert center_crop(picture, 40).size == (40, 40)


def test_flip(rng, picture):
    flipped = [random_flip(rng, picture) is not picture for _ in range(400)]
    assert abs(np.mean(flipped) - 0.5) < 5 * math.sqrt(0.25 / 400)
    np.testing.assert_array_equal(
        np.asarray(random_flip(rng, picture, 1.0)), np.asarray(picture)[:, ::-1]
    )


def test_contrast_and_grey(picture):
    values = np.asarray(picture, float)
    luma = np.asarray(picture.convert("L"), float)
    assert np.abs(luma - values @ [0.299, 0.587, 0.114]).max() <= 0.51
    np.testing.assert_array_equal(np.asarray(grayscale(picture)), np.repeat(luma[..., None], 3, -1))
    mean = math.floor(luma.mean() + 0.5)
    for factor in (0.0, 0.6, 1.0, 1.4):
        expected = np.clip(mean + factor * (values - mean), 0, 255)
        assert np.abs(np.asarray(change_contrast(picture, factor)) - expected).max() <= 1


@pytest.mark.parametrize("turn", [0.1, -0.1, 0.5, -0.004])
def test_hue(turn):
    colours = np.array([[[200, 30, 90], [10, 10, 10], [250, 250, 3], [0, 128, 255]]], np.uint8)
    result = np.asarray(turn_hue(Image.fromarray(colours), turn))[0] / 255
    for colour, got in zip(colours[0] / 255, result):
        h, s, v = colorsys.rgb_to_hsv(*colour)
        np.testing.assert_allclose(got, colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=0.06)


def test_solarize():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.repeat(values[..., None], 3, -1)
    expected = np.where(values < 128, values, 255 - values)
    np.testing.assert_array_equal(np.asarray(solarize(Image.fromarray(image)))[..., 2], expected)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur(picture, sigma):
    weights = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(np.asarray(picture, float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    expected = sum(
        kernel[i, j] * padded[i : i + 31, j : j + 45] for i in range(9) for j in range(9)
    )
    result = np.asarray(gaussian_blur(picture, sigma), float)
    assert np.abs(result - expected).max() <= 0.5 + 1e-3


def test_jitter_stays_within_its_factors(rng):
    """One grey level in, so that brightness alone shows; then colours, so that saturation does."""
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    levels = np.array([
        np.asarray(color_jitter(rng, grey, 0.4, 0.0, 0.0, 0.0))[0, 0, 0] for _ in range(600)
    ])  # fmt: skip
    assert 59 <= levels.min() < 65
    assert 135 < levels.max() <= 140
    assert abs(levels.mean() - 100) < 5 * 23.1 / math.sqrt(600) + 0.5
    red = Image.new("RGB", (4, 4), (150, 50, 50))
    spread = [np.ptp(np.asarray(color_jitter(rng, red, 0, 0, 0.2, 0))[0, 0]) for _ in range(300)]
    assert 78 <= min(spread) < 85
    assert 115 < max(spread) <= 121


def test_order_of_jitter_is_random(rng):
    """A factor each, so that only the order is left to chance; it changes the result."""
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))

    class Fixed:
        def permutation(self, count):
            return rng.permutation(count)

        def uniform(self, low, high):
            return high

    results = {np.asarray(color_jitter(Fixed(), picture, 0.4, 0.4, 0.2, 0.1)).tobytes()
               for _ in range(60)}  # fmt: skip
    assert len(results) > 8


def test_nothing_asked_nothing_changed(rng, picture):
    np.testing.assert_array_equal(
        np.asarray(color_jitter(rng, picture, 0, 0, 0, 0)), np.asarray(picture)
    )
