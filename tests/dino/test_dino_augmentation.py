"""Multi-crop: which views, how often what happens to them, and from which random numbers."""

import math

import numpy as np
import pytest
from PIL import Image

from dino import augmentation
from dino.augmentation import CropConfig, MultiCrop

SMALL = CropConfig(global_size=16, local_size=8, local_crops=3)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_views(image):
    views = MultiCrop(SMALL)(np.random.default_rng(1), image)
    assert {name: (v.shape, v.dtype) for name, v in views.items()} == {
        "global_crops": ((2, 16, 16, 3), np.uint8),
        "local_crops": ((3, 8, 8, 3), np.uint8),
    }
    again = MultiCrop(SMALL)(np.random.default_rng(1), image)
    other = MultiCrop(SMALL)(np.random.default_rng(2), image)
    for name in views:
        np.testing.assert_array_equal(views[name], again[name])
        assert (views[name] != other[name]).any()


def test_without_local_crops(image):
    views = MultiCrop(CropConfig(global_size=16, local_crops=0))(np.random.default_rng(1), image)
    assert views["local_crops"].shape == (0, 98, 98, 3)


def test_paper_defaults():
    config = CropConfig()
    assert (config.global_size, config.local_size, config.local_crops) == (224, 98, 8)
    assert (config.global_scale, config.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (config.flip, config.jitter, config.grayscale, config.solarize) == (0.5, 0.8, 0.2, 0.2)
    assert (config.brightness, config.contrast, config.saturation, config.hue) == (
        0.4, 0.4, 0.2, 0.1,
    )  # fmt: skip
    assert config.blur == "as_trained"
    assert config.blur_sigma == (0.1, 2.0)


@pytest.mark.parametrize(
    ("blur", "shares"), [("as_trained", (0.0, 0.9, 0.5)), ("intended", (1.0, 0.1, 0.5))]
)
def test_how_often_views_change(monkeypatch, image, blur, shares):
    """Counts the operations by the view they are applied to, over many images."""
    seen: dict[str, list[int]] = {}
    current = []

    def counted(name):
        original = getattr(augmentation, name)

        def operation(*arguments):
            seen.setdefault(name, []).append(len(current) % 3)
            return original(*arguments)

        return operation

    for name in ("color_jitter", "grayscale", "gaussian_blur", "solarize"):
        monkeypatch.setattr(augmentation, name, counted(name))
    draw = MultiCrop._draw
    monkeypatch.setattr(
        MultiCrop, "_draw", lambda *arguments: (draw(*arguments), current.append(0))[0]
    )
    config = CropConfig(global_size=8, local_size=8, local_crops=1, blur=blur)
    crop, rng, count = MultiCrop(config), np.random.default_rng(3), 600
    for _ in range(count):
        crop(rng, image)
    expected = {
        "color_jitter": (0.8, 0.8, 0.8),
        "grayscale": (0.2, 0.2, 0.2),
        "gaussian_blur": shares,
        "solarize": (0.0, 0.2, 0.0),
    }
    for name, probabilities in expected.items():
        for view, share in enumerate(probabilities):
            found = seen[name].count(view) / count
            assert abs(found - share) <= 5 * math.sqrt(share * (1 - share) / count), (name, view)


def test_scales_of_views(monkeypatch):
    """Global views cover 32 to 100% of the image, local ones 5 to 32%."""
    areas = []
    original = augmentation.random_resized_crop

    def measured(rng, image, size, scale, aspect):
        areas.append(scale)
        return original(rng, image, size, scale, aspect)

    monkeypatch.setattr(augmentation, "random_resized_crop", measured)
    MultiCrop(SMALL)(np.random.default_rng(0), np.zeros((50, 50, 3), np.uint8))
    assert areas == [(0.32, 1.0)] * 2 + [(0.05, 0.32)] * 3


def test_an_image_of_one_pixel():
    views = MultiCrop(SMALL)(np.random.default_rng(0), np.full((1, 1, 3), 7, np.uint8))
    assert views["global_crops"].shape == (2, 16, 16, 3)


def test_all_off_is_a_resized_crop(image):
    config = CropConfig(
        global_size=10, local_size=10, local_crops=1, global_scale=(1.0, 1.0), aspect=(1.0, 1.0),
        flip=0.0, jitter=0.0, grayscale=0.0, solarize=0.0, blur="as_trained",
    )  # fmt: skip
    square = image[:, :20]
    views = MultiCrop(config)(np.random.default_rng(0), square)
    expected = np.asarray(Image.fromarray(square).resize((10, 10), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(views["global_crops"][0], expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5},
        {"global_scale": (0.5, 0.2)},
        {"local_scale": (0.0, 0.2)},
        {"local_size": 2},
        {"hue": 0.7},
        {"aspect": (2.0, 1.0)},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError):
        CropConfig(**wrong)


def test_the_blur_is_as_strong_as_configured(monkeypatch, image):
    seen = []

    def blurred(picture, sigma):
        seen.append(sigma)
        return picture

    monkeypatch.setattr(augmentation, "gaussian_blur", blurred)
    config = CropConfig(
        global_size=8, local_size=8, local_crops=2, blur="intended", blur_sigma=(0.3, 0.4)
    )
    for seed in range(20):
        MultiCrop(config)(np.random.default_rng(seed), image)
    assert len(seen) > 20
    assert 0.3 <= min(seen) < max(seen) <= 0.4
    with pytest.raises(ValueError, match="blur_sigma"):
        CropConfig(blur_sigma=(2.0, 0.1))
