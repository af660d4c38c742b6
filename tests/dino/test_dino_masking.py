"""Block masks: how much they cover, the static bound, and the padded list of masked patches."""

import numpy as np
import pytest

from common.errors import UserError
from dino.augmentation import CropConfig
from dino.data import DataConfig, batch_shapes, group_masks
from dino.masking import GroupMasks, MaskConfig, block_mask


def test_ratios_are_those_measured_for_the_paper():
    """32 images at 16 × 16: 14.9% of all patches masked, 97.8% of the bound used (its 3.7)."""
    masks = GroupMasks(MaskConfig(), (16, 16), 32)
    assert masks.upper_bound == 2496
    drawn = [masks.draw(0, place)["masks"] for place in range(0, 40 * 32, 32)]
    counts = np.array([d.sum(-1).ravel() for d in drawn])
    assert ((counts > 0).sum(1) == 32).all()
    # A total's deviation over draws is about 1%; of the mean of 40, far below this tolerance.
    assert np.isclose(counts.sum(1).mean(), 2441, rtol=0.01)
    assert counts.sum(1).max() <= masks.upper_bound
    # One masked crop in each step between the least and the largest share.
    ordered = np.sort(counts, 1)[:, 32:] / 256
    steps = np.linspace(0.1, 0.5, 33)
    assert (ordered <= steps[1:] + 1e-9).all()
    assert np.mean(ordered >= steps[:-1] - 1 / 256) > 0.95


def test_masked_views_are_spread_over_both_and_over_images():
    masks = GroupMasks(MaskConfig(), (8, 8), 16)
    chosen = np.mean([masks.draw(1, place)["masks"].any(-1) for place in range(400)], 0)
    assert chosen.shape == (16, 2)
    assert np.abs(chosen - 0.5).max() < 6 * np.sqrt(0.25 / 400)


@pytest.mark.parametrize(("grid", "images"), [((16, 16), 3), ((4, 7), 1), ((2, 2), 5), ((1, 9), 2)])
def test_padded_list(grid, images):
    masks = GroupMasks(MaskConfig(), grid, images)
    for place in range(20):
        drawn = masks.draw(7, place)
        flat = drawn["masks"].reshape(-1)
        indices, weights = drawn["masked_indices"].ravel(), drawn["masked_weights"].ravel()
        assert drawn["masked_indices"].shape == (images, masks.slots)
        assert masks.upper_bound <= len(indices) < masks.upper_bound + images
        valid = weights > 0
        np.testing.assert_array_equal(indices[valid], np.flatnonzero(flat))
        assert not indices[~valid].any()
        assert valid[: valid.sum()].all()
        crops = np.zeros(images * 2)
        np.add.at(crops, indices[valid] // (grid[0] * grid[1]), weights[valid])
        np.testing.assert_allclose(crops, drawn["masks"].any(-1).ravel(), rtol=1e-5)


def test_draws_depend_on_seed_and_place_alone():
    one, two = (GroupMasks(MaskConfig(), (8, 8), 4) for _ in range(2))
    one.draw(3, 0)
    for name, array in one.draw(3, 12).items():
        np.testing.assert_array_equal(array, two.draw(3, 12)[name])
    assert (one.draw(3, 12)["masks"] != one.draw(4, 12)["masks"]).any()
    assert (one.draw(3, 12)["masks"] != one.draw(3, 16)["masks"]).any()


def test_blocks():
    """A target is not exceeded; what is covered is rectangles, never a whole side."""
    rng = np.random.default_rng(0)
    for target in (0, 1, 5, 60, 128):
        mask = block_mask(rng, (16, 16), target, MaskConfig())
        assert mask.sum() <= target
        assert target < 5 or mask.sum() >= 0.8 * target
    single = block_mask(np.random.default_rng(1), (16, 16), 20, MaskConfig(largest_block=0.05))
    assert not single.all(0).any()
    assert not single.all(1).any()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_none_and_all(probability):
    masks = GroupMasks(MaskConfig(probability=probability, ratio=(0.25, 0.25)), (8, 8), 4)
    drawn = masks.draw(0, 0)
    assert drawn["masks"].any(-1).sum() == 8 * probability
    assert masks.upper_bound == 8 * probability * 16


def test_shapes_of_a_batch():
    config = DataConfig(
        crops=CropConfig(global_size=32, local_size=16, local_crops=3), masks=MaskConfig(group=2)
    )
    shapes = batch_shapes(config, 8, 6)
    assert shapes["global_crops"].shape == (6, 2, 32, 32, 3)
    assert shapes["local_crops"].shape == (6, 3, 16, 16, 3)
    assert shapes["masks"].shape == (6, 2, 16)
    masks = group_masks(config, 8, 6)
    assert shapes["masked_indices"].shape == shapes["masked_weights"].shape == (6, masks.slots)
    for name, array in masks.draw(0, 0).items():
        assert (array.shape[1:], array.dtype) == (shapes[name].shape[1:], shapes[name].dtype)


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="global_size 224 is not a multiple of the patch size 15"):
        batch_shapes(DataConfig(), 15, 2)
    with pytest.raises(UserError, match=r"7 images is not whole groups of masks\.group 2"):
        batch_shapes(DataConfig(masks=MaskConfig(group=2)), 14, 7)
    with pytest.raises(ValueError, match="ratio"):
        MaskConfig(ratio=(0.5, 0.1))
