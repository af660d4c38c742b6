"""Training batches of images: what they depend on, resuming, processes, and damaged images."""

import jax.numpy as jnp
import numpy as np
import pytest

from common.data.image_corpus import ImageConfig, open_images
from common.data.image_sources import ImageArrays, ImageSource
from common.data.sources import DamagedRecord
from common.errors import UserError
from dino.augmentation import CropConfig
from dino.data import DataConfig, batch_shapes, normalize, training_batches
from dino.masking import MaskConfig

BATCH = 6
CONFIG = DataConfig(
    images=ImageConfig("shapes", drawn_size=24, drawn_count=10),
    crops=CropConfig(global_size=16, local_size=8, local_crops=2),
    masks=MaskConfig(group=3),
    threads=2,
)


def opened(config=CONFIG, batch=BATCH, **options):
    return training_batches(config, patch_size=4, batch=batch, seed=5, **options)


def take(iterator, count):
    result = [next(iterator) for _ in range(count)]
    iterator.close()
    return result


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def five():
    return take(opened(), 5)


def test_shapes_are_those_that_were_announced(five):
    shapes = batch_shapes(CONFIG, 4, BATCH)
    for batch in five:
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
            n: (s.shape, s.dtype) for n, s in shapes.items()
        }


def test_the_same_again_whatever_the_threads(five):
    config = DataConfig(CONFIG.images, CONFIG.crops, CONFIG.masks, threads=1, prefetch=0)
    for first, second in zip(five, take(opened(config), 5)):
        assert_same(first, second)


def test_resumes_exactly(five):
    iterator = opened()
    for _ in range(2):
        next(iterator)
    state = iterator.get_state()
    iterator.close()
    resumed = opened()
    resumed.set_state(state)
    for first, second in zip(five[2:], take(resumed, 3)):
        assert_same(first, second)


def test_epochs_and_seeds_differ(five):
    """10 images, batches of 6: the same image comes again in the second epoch, in other views."""
    arrays = {i: np.full((20, 20, 3), 25 * i, np.uint8) for i in range(10)}
    plain = CropConfig(
        global_size=16, local_size=8, local_crops=2, jitter=0.0, grayscale=0.0, solarize=0.0
    )
    config = DataConfig(CONFIG.images, plain, CONFIG.masks)
    source = ImageArrays(np.stack(list(arrays.values())))
    batches = take(opened(config, source=source), 5)
    shades = np.concatenate([b["local_crops"][:, 0, 4, 4, 0] for b in batches])
    for epoch in range(3):
        assert sorted(shades[epoch * 10 : epoch * 10 + 10]) == [25 * i for i in range(10)]
    assert (shades[:10] != shades[10:20]).any()
    other = next(training_batches(CONFIG, patch_size=4, batch=BATCH, seed=6))
    assert (other["global_crops"] != five[0]["global_crops"]).any()
    assert (other["masks"] != five[0]["masks"]).any()
    repeated = DataConfig(
        ImageConfig("shapes", drawn_size=24, drawn_count=1), CONFIG.crops, CONFIG.masks
    )
    views = next(opened(repeated))["global_crops"]
    assert len({view.tobytes() for view in views.reshape(12, -1)}) == 12


@pytest.mark.parametrize("group", [1, 3, 6, None])
def test_processes_divide_a_batch(group):
    config = DataConfig(CONFIG.images, CONFIG.crops, MaskConfig(group=group))
    whole = take(opened(config), 2)
    parts = [take(opened(config, local_rows=np.arange(i, i + 2)), 2) for i in (0, 2, 4)]
    for step in range(2):
        joined = {n: np.concatenate([part[step][n] for part in parts]) for n in whole[step]}
        assert_same(whole[step], joined)


def test_padded_list_names_the_masked_patches_of_each_group(five):
    for batch in five:
        groups = batch["masks"].reshape(2, -1)
        indices = batch["masked_indices"].reshape(2, -1)
        valid = batch["masked_weights"].reshape(2, -1) > 0
        for masks, numbers, used in zip(groups, indices, valid):
            np.testing.assert_array_equal(numbers[used], np.flatnonzero(masks))


def test_normalize():
    images = np.array([[[0, 128, 255]]], np.uint8)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(jnp.asarray(images)), expected, rtol=1e-5)


class Spoilt(ImageSource):
    """Another source, some of whose images are damaged."""

    def __init__(self, source, spoilt):
        self.source, self.spoilt = source, spoilt

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.spoilt:
            raise DamagedRecord(f"{self.describe(index)}: damaged")
        return self.source[index]

    def describe(self, index):
        return f"file{index}.png"

    def keys(self):
        return self.source.keys()

    def fingerprint(self):
        return self.source.fingerprint()


def test_damaged_images_are_replaced_named_and_counted(caplog):
    images = DataConfig(
        ImageConfig("shapes", drawn_size=24, drawn_count=10, error_budget=2),
        CONFIG.crops,
        CONFIG.masks,
    )
    source = open_images(CONFIG.images)
    batches = take(opened(images, source=Spoilt(source, {2, 3})), 4)
    assert_same(batches[0], take(opened(images, source=Spoilt(source, {2, 3})), 1)[0])
    assert {"file2.png", "file3.png"} <= {r.getMessage().split(":")[0] for r in caplog.records}
    with pytest.raises(UserError, match=r"file\d\.png: damaged .*number 3 of 10.*allows 2"):
        take(opened(images, source=Spoilt(source, {2, 3, 7})), 4)
    strict = DataConfig(
        ImageConfig("shapes", error_budget=0.0), CONFIG.crops, CONFIG.masks, prefetch=0
    )
    with pytest.raises(UserError, match="set error_budget"):
        take(opened(strict, source=Spoilt(source, {2})), 4)


def test_all_damaged():
    config = DataConfig(ImageConfig("shapes", error_budget=10), CONFIG.crops, CONFIG.masks)
    with pytest.raises(UserError, match="none of 10 images can be read"):
        next(opened(config, source=Spoilt(open_images(CONFIG.images), set(range(10)))))
