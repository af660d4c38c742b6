"""Segmentation and depth heads: their formulas in NumPy, their data, and that they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from common.data.sources import DamagedRecord
from common.errors import UserError
from dino.evaluation import dense_data, depth, segmentation
from dino.evaluation.dense_data import PairedFolders, open_labels, read_depth, read_labels
from dino.evaluation.dense_features import (
    padded_to_patches,
    patch_map,
    resize_map,
    resize_matrix,
    resize_scores,
    to_pixels,
)
from dino.evaluation.depth import DepthConfig
from dino.evaluation.diagnostics import patch_probe, spread_of
from dino.evaluation.features import Pixels
from dino.evaluation.metrics import confusion, mean_iou
from dino.evaluation.segmentation import SegmentationConfig


def test_mean_intersection_over_union():
    labels = np.array([0, 0, 1, 1, 255, 2])
    predicted = np.array([0, 1, 1, 1, 0, 0])
    counts = confusion(predicted, labels, 4)
    np.testing.assert_array_equal(counts[:3, :3], [[1, 1, 0], [0, 2, 0], [1, 0, 0]])
    mean, ratios = mean_iou(counts)
    np.testing.assert_allclose(ratios, [1 / 3, 2 / 3, 0, np.nan])
    assert mean == pytest.approx(1 / 3)


@pytest.mark.parametrize(("size", "new"), [(1, 4), (3, 3), (4, 9), (9, 4), (37, 512)])
def test_bilinear_resizing(size, new):
    """Each output by hand: the two nearest values by distance, nothing beyond the edge."""
    x = np.random.default_rng(0).normal(size=size)
    expected = []
    for i in range(new):
        place = min(max((i + 0.5) * size / new - 0.5, 0), size - 1)
        low = int(np.floor(place))
        high = min(low + 1, size - 1)
        expected.append(x[low] * (1 - (place - low)) + x[high] * (place - low))
    np.testing.assert_allclose(resize_matrix(size, new) @ x, expected, atol=1e-6)


def test_resizing_of_maps_and_scores_agree():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    whole = resize_map(jnp.asarray(x), 7, 11)
    np.testing.assert_allclose(whole[1], resize_scores(x[1], 7, 11), atol=1e-5)


def test_padding_to_patches_is_centred_and_cut_off_again():
    assert padded_to_patches(512, 14) == (3, 3)
    assert padded_to_patches(28, 14) == (0, 0)
    assert padded_to_patches(29, 14) == (6, 7)
    images = np.zeros((1, 10, 12, 3), np.uint8)
    images[:, :, 6:] = 255
    patches = patch_map(Pixels(4), images, 4, 1)
    assert patches.shape == (1, 3, 3, 48)
    pixels = to_pixels(patches.mean(-1, keepdims=True), 4, 10, 12)[0, :, :, 0]
    assert pixels.shape == (10, 12)
    # The edge between black and white stays where it was.
    np.testing.assert_allclose(pixels[4], -pixels[4, ::-1], atol=1e-5)


def test_class_tokens_beside_patches():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    both = patch_map(Pixels(4), images, 4, (0, 1), with_cls=True)
    assert both.shape == (2, 2, 2, 2 * (48 + 192))
    plain = patch_map(Pixels(4), images, 4, 1)
    np.testing.assert_array_equal(both[..., :48], plain)
    np.testing.assert_array_equal(both[0, 0, 0, 48:240], both[0, 1, 1, 48:240])


def test_batch_norm_and_cross_entropy():
    rng = np.random.default_rng(0)
    head = {
        "scale": rng.normal(size=5), "shift": rng.normal(size=5), "mean": rng.normal(size=5),
        "variance": rng.random(5), "kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3),
    }  # fmt: skip
    x = rng.normal(size=(2, 4, 4, 5))
    normal = (x - head["mean"]) / np.sqrt(head["variance"] + 1e-5) * head["scale"] + head["shift"]
    logits = normal @ head["kernel"] + head["bias"]
    found = segmentation.head_logits(jax.tree.map(jnp.float32, head), jnp.float32(x))
    np.testing.assert_allclose(found, logits, atol=1e-4)
    labels = rng.integers(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = [-np.log(shares[i][labels[i]]) for i in np.ndindex(2, 4, 4) if labels[i] < 255]
    value = segmentation.pixel_cross_entropy(jnp.float32(logits), jnp.asarray(labels))
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-4)


def test_windows_cover_everything():
    assert segmentation._starts(512, 512, 341) == [0]
    assert segmentation._starts(700, 512, 341) == [0, 188]
    assert segmentation._starts(1400, 512, 341) == [0, 341, 682, 888]


def test_schedule_of_segmentation():
    config = SegmentationConfig(3)
    rate = segmentation._schedule(config)
    assert float(rate(0)) == pytest.approx(1e-9, rel=1e-3)
    assert float(rate(1500)) == pytest.approx(1e-3 * (1 - 1500 / 40000))
    assert float(rate(40000)) == 0
    ms = segmentation.multi_scale(3)
    assert (ms.layers, ms.crop, ms.scales) == (4, 640, (1.0, 1.32, 1.73, 2.28, 3.0))


@pytest.fixture(scope="module")
def pairs():
    """Images whose left is dark and right is bright; the side is the class, and the depth."""

    class Sides(dense_data.DenseSource):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            rng = np.random.default_rng(index)
            edge = int(rng.integers(8, 24))
            right = np.arange(32) >= edge
            image = np.where(right, 210, 40)[None, :, None] + rng.normal(0, 8, (32, 32, 3))
            labels = np.broadcast_to(right.astype(np.int32), (32, 32))
            return np.clip(image, 0, 255).astype(np.uint8), labels

    class Depths(Sides):
        def __getitem__(self, index):
            image, labels = super().__getitem__(index)
            return image, np.where(labels, 2.0, 6.0).astype(np.float32)

    return Sides(), Depths()


@pytest.mark.parametrize("layers", [1, 4])
def test_a_segmentation_head_learns(pairs, layers):
    changes = {"crop": 32, "steps": 60, "batch": 4, "warm_up": 5, "learning_rate": 0.02,
               "stride": 16, "layers": layers}  # fmt: skip
    if layers == 4:
        config = segmentation.multi_scale(2, scales=(1.0, 1.5), **changes)
    else:
        config = SegmentationConfig(2, **changes)
    head = segmentation.train_segmentation(Pixels(4), pairs[0], 4, config)
    assert head["kernel"].shape == (48 * layers, 2)
    result = segmentation.score_segmentation(Pixels(4), head, pairs[0], 4, config)
    assert result.mean_iou > 0.85
    assert result.accuracy > 0.9
    assert result.iou.shape == (2,)


def test_a_segmentation_head_of_nothing_is_poor(pairs):
    config = SegmentationConfig(2, crop=32, batch=4, stride=16)
    head = segmentation.init_head(48, config)
    head["kernel"] = jnp.zeros_like(head["kernel"])
    result = segmentation.score_segmentation(Pixels(4), head, pairs[0], 4, config)
    assert result.mean_iou < 0.5


def test_depth_losses():
    config = DepthConfig()
    rng = np.random.default_rng(0)
    p, t = rng.uniform(1, 9, (2, 1, 12, 12)).astype(np.float32)
    t[0, :3] = 0
    t[0, 5, 5] = 11.0  # Deeper than counts.
    valid = (t > 0) & (t <= 10)
    g = (np.log(p + 1e-3) - np.log(t + 1e-3))[valid]
    early, late = (float(depth.sig_loss(p, t, config, step)) for step in (99, 100))
    assert early == pytest.approx(np.sqrt(0.15 * g.mean() ** 2), rel=1e-4)
    assert late == pytest.approx(np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2), rel=1e-4)
    total = 0.0
    for s in (1, 2, 4, 8):
        e = np.where(valid, np.log(p + 1e-3) - np.log(t + 1e-3), 0)[0, ::s, ::s]
        v = valid[0, ::s, ::s]
        size = len(e)
        terms = sum(abs(e[i, j] - e[i + 2, j]) * v[i, j] * v[i + 2, j]
                    for i in range(size - 2) for j in range(size))  # fmt: skip
        terms += sum(abs(e[i, j] - e[i, j + 2]) * v[i, j] * v[i, j + 2]
                     for i in range(size) for j in range(size - 2))  # fmt: skip
        total += terms / v.sum()
    assert float(depth.gradient_loss(p, t, config)) == pytest.approx(total, rel=1e-4)
    slope = jax.grad(lambda p: depth.sig_loss(p, t, config, 0))(jnp.asarray(np.maximum(t, 1)))
    assert np.isfinite(slope).all()


def test_depth_of_bins():
    config = DepthConfig(bins=3, least=1.0, most=5.0)
    head = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    logits = np.random.default_rng(0).normal(size=(1, 2, 3, 3)).astype(np.float32)
    up = np.asarray(resize_map(jnp.asarray(logits), 8, 12))
    shares = np.maximum(up, 0) + 0.1
    expected = (shares / shares.sum(-1, keepdims=True)) @ [1.0, 3.0, 5.0]
    np.testing.assert_allclose(depth.head_depth(head, logits, config), expected, rtol=1e-5)


def test_layers_of_depth_heads():
    assert depth.chosen_layers(1, 12) == (11,)
    assert depth.chosen_layers(4, 12) == (2, 5, 8, 11)
    assert depth.chosen_layers(4, 24) == (4, 11, 17, 23)
    assert depth.chosen_layers(4, 40) == (9, 19, 29, 39)
    assert depth.chosen_layers(4, 4) == (0, 1, 2, 3)
    with pytest.raises(UserError, match="needs as many blocks"):
        depth.chosen_layers(4, 2)


def test_depth_errors():
    config = DepthConfig(eval_crop="none")
    true = np.array([[2.0, 4.0, 0.0]], np.float32)
    predicted = np.array([[2.2, 2.0, 7.0]], np.float32)
    errors = depth.depth_errors(predicted, true, config)
    assert errors["rmse"] == pytest.approx(np.sqrt((0.04 + 4) / 2), rel=1e-5)
    assert errors["abs_rel"] == pytest.approx((0.1 + 0.5) / 2, rel=1e-5)
    assert errors["delta1"] == 0.5
    assert errors["log10"] == pytest.approx((np.log10(1.1) + np.log10(2)) / 2, rel=1e-5)
    logs = np.log([1.1, 0.5])
    assert errors["silog"] == pytest.approx(100 * logs.std(), rel=1e-5)
    assert depth.depth_errors(predicted, np.zeros((1, 3)), config) is None
    eigen = depth._eigen((480, 640))
    assert (eigen.sum(), eigen[45, 41], eigen[44, 41]) == (426 * 560, True, False)
    garg = depth._garg((352, 1216))
    assert (garg[:143].any(), garg[143:349, 43:1172].all()) == (False, True)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_depth_head_learns(pairs, layers):
    config = DepthConfig(
        layers=layers, bins=16, crop=(24, 32), steps=150, batch=4, warm_up=10, learning_rate=0.02,
        eval_crop="none", rotation=2.0,
    )  # fmt: skip
    model = Pixels(4, whole=False)
    head = depth.train_depth(model, pairs[1], 4, 4, config)
    errors = depth.score_depth(model, head, pairs[1], 4, 4, config)
    assert errors["rmse"] < 1.0  # Of 2 for the best constant.
    assert errors["delta1"] > 0.8


def test_folders_of_pairs(tmp_path):
    for name in ("a/x.jpg", "b.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "maps" / "a").mkdir(parents=True)
    labels = np.array([[0, 1, 255, 2, 3, 4]] * 4, np.uint8)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([7] * 768)
    palette.save(tmp_path / "maps" / "a" / "x.png")
    opened = str(tmp_path / "images"), str(tmp_path / "maps")
    with pytest.raises(UserError, match=r"b\.png' has no map 'b'"):
        open_labels(*opened)
    Image.fromarray(labels[:, :5]).save(tmp_path / "maps" / "b.png")
    source = open_labels(*opened)
    np.testing.assert_array_equal(source[0][1], labels)
    with pytest.raises(DamagedRecord, match=r"b\.png' is \[4, 5\], its image \[4, 6\]"):
        source[1]
    reduced = open_labels(*opened, reduce_zero=True)[0][1]
    np.testing.assert_array_equal(reduced[0], [255, 0, 255, 1, 2, 3])
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "maps" / "b.png")
    with pytest.raises(DamagedRecord, match="one channel was expected"):
        read_labels(tmp_path / "maps" / "b.png")


def test_depth_files(tmp_path):
    Image.fromarray(np.array([[1500, 0]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_depth(tmp_path / "a.png", 1000.0), [[1.5, 0]])
    np.save(tmp_path / "b.npy", np.array([[1.5, np.nan, -1.0]]))
    np.testing.assert_array_equal(read_depth(tmp_path / "b.npy", 1.0), [[1.5, 0, 0]])
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    for name in ("c.npy", "none.npy"):
        with pytest.raises(DamagedRecord, match="no whole"):
            read_depth(tmp_path / name, 1.0)
    assert len(PairedFolders(str(tmp_path / "a.png"), str(tmp_path), read_labels)) == 1


def test_drawn_labels():
    train, test = (
        open_labels(f"shapes:{part}", None, drawn=(24, 16)) for part in ("train", "heldout")
    )
    assert (len(train), len(test)) == (16, 4)
    image, labels = train[3]
    assert set(np.unique(labels)) == {0, 4}
    assert (image != test[3][0]).any()
    with pytest.raises(UserError, match="did you mean 'shapes:train'"):
        open_labels("shapes:trains", None)


def test_spread_of_features():
    rng = np.random.default_rng(0)
    wide = spread_of(rng.normal(size=(400, 16)))
    narrow = spread_of(np.ones(16) + 0.01 * rng.normal(size=(400, 16)))
    assert narrow.nearest < 0.05 < 0.5 < wide.nearest
    assert narrow.mean_cosine > 0.99 > 0.1 > abs(wide.mean_cosine)
    # Directions of equal variance count in full, one of them alone as 1.
    assert 14.5 < wide.effective_rank <= 16
    line = np.stack([np.cos(t := np.linspace(0, 0.1, 50)), np.sin(t)], 1)
    assert spread_of(line).effective_rank < 1.1
    corners = np.concatenate([np.eye(3), -np.eye(3)])
    found = spread_of(corners)
    assert found.nearest == pytest.approx(np.sqrt(2))
    assert found.mean_cosine == pytest.approx(-1 / 5)
    assert found.effective_rank == pytest.approx(3)
    assert spread_of(np.ones((4, 3))).effective_rank == pytest.approx(1)
    with pytest.raises(UserError, match="2 features or more"):
        spread_of(np.ones((1, 3)))


def test_probe_of_patches(pairs):
    """Sides are told by brightness; what knows nothing is near one class of two."""
    sides, _ = pairs
    assert patch_probe(Pixels(4), sides, sides, 4, 2, batch=5) > 0.9

    class Blind(Pixels):
        def normalize(self, images):
            return super().normalize(images) * 0

    assert patch_probe(Blind(4), sides, sides, 4, 2, batch=5) < 0.5
