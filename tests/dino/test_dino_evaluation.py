"""k-NN, the linear grid, logistic regression and retrieval against NumPy from their definitions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from common.data.image_sets import Shapes
from common.data.image_sources import ImageArrays
from common.errors import UserError
from dino.evaluation.features import ImageFeatures, Pixels, View, extract, view_for
from dino.evaluation.knn import knn_predict
from dino.evaluation.linear import (
    LEARNING_RATES,
    LinearConfig,
    augmented_batches,
    best_head,
    head_inputs,
    init_heads,
    predict,
    stored_batches,
    train_heads,
)
from dino.evaluation.logistic import STRENGTHS, fit_logistic, logistic_predict
from dino.evaluation.metrics import accuracy, average_precision, mean_per_class
from dino.evaluation.retrieval import by_class, rankings, read_ground_truth, retrieval_scores


@pytest.fixture(scope="module")
def clusters():
    """Features of four overlapping classes: training and test."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))

    def drawn(count):
        labels = rng.integers(0, 4, count)
        features = centres[labels] + 1.2 * rng.normal(size=(count, 8))
        return features.astype(np.float32), labels

    return *drawn(300), *drawn(90)


def votes_by_hand(train, labels, test, ks, classes, temperature):
    """The protocol in float64, one query after another, by sorting."""
    train, test = (x.astype(np.float64) for x in (train, test))
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    test /= np.linalg.norm(test, axis=1, keepdims=True)
    result = {k: [] for k in ks}
    for query in test:
        similar = train @ query
        order = np.argsort(-similar, kind="stable")[: max(ks)]
        weights = np.exp(similar[order] / temperature)
        weights /= weights.sum()
        for k in ks:
            scores = [weights[:k][labels[order[:k]] == c].sum() for c in range(classes)]
            result[k].append(int(np.argmax(scores)))
    return {k: np.array(v) for k, v in result.items()}


@pytest.mark.parametrize("chunk", [32, 77, 1000])
def test_knn_is_the_protocol(clusters, chunk):
    train, labels, test, truth = clusters
    ks = (1, 5, 20, 30)
    found = knn_predict(train, labels, test, ks, batch=40, chunk=chunk)
    expected = votes_by_hand(train, labels, test, ks, 4, 0.07)
    for k in ks:
        np.testing.assert_array_equal(found[k], expected[k])
    assert accuracy(found[20], truth) > 0.5
    # The temperature matters: without it votes are counted.
    flat = votes_by_hand(train, labels, test, (30,), 4, 100.0)[30]
    assert (flat != found[30]).any()
    np.testing.assert_array_equal(
        knn_predict(train, labels, test, (30,), temperature=100.0)[30], flat
    )


def test_knn_leaves_out_what_cannot_be(clusters):
    train, labels, test, _ = clusters
    assert set(knn_predict(train[:15], labels[:15], test)) == {10}
    with pytest.raises(UserError, match="fewer than any k"):
        knn_predict(train[:5], labels[:5], test)
    with pytest.raises(UserError, match="8 values each, test features 7"):
        knn_predict(train, labels, test[:, :7])
    with pytest.raises(UserError, match="not finite"):
        knn_predict(np.full_like(train, np.nan), labels, test)
    with pytest.raises(UserError, match="300 training features and"):
        knn_predict(train, labels[:3], test)


def test_metrics():
    predicted, labels = np.array([0, 0, 1, 1, 0]), np.array([0, 0, 0, 1, 1])
    assert accuracy(predicted, labels) == 0.6
    assert mean_per_class(predicted, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)
    ranked = np.array([1, 0, 1, 0, 0], bool)
    assert average_precision(ranked, 3) == pytest.approx((1 + 2 / 3) / 3)
    # The revisited benchmarks: before and at each hit (1 and 1; 1/2 and 2/3).
    assert average_precision(ranked, 3, trapezoid=True) == pytest.approx((1 + 7 / 12) / 3)
    assert average_precision(ranked[:0], 0) == 0.0


def features_of(cls, mean, labels):
    return ImageFeatures(cls, mean, np.arange(len(labels)), labels)


@pytest.fixture(scope="module")
def layered(clusters):
    """Features of four blocks, the last of which knows the classes best."""
    train, labels, test, truth = clusters
    rng = np.random.default_rng(1)

    def blocks(x):
        return np.stack([x + s * rng.normal(size=x.shape) for s in (9, 4, 2, 0)]).astype(np.float32)

    return (
        features_of(blocks(train), train * 0.5, labels),
        features_of(blocks(test), test * 0.5, truth),
    )


def test_the_grid_has_52_heads_and_their_widths():
    config = LinearConfig()
    assert len(config.names) == len(set(config.names)) == 52
    heads = init_heads(6, 6, 3, config)
    assert [head["kernel"].shape for head in heads] == [(13, width, 3) for width in (6, 12, 24, 30)]
    assert abs(float(jnp.std(heads[3]["kernel"])) - 0.01) < 0.002
    cls = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 1, 2))
    inputs = head_inputs(cls, jnp.full((1, 2), 9.0), config)
    np.testing.assert_array_equal(inputs[0][0], [3, 3])
    np.testing.assert_array_equal(inputs[3][0], [0, 0, 1, 1, 2, 2, 3, 3, 9, 9])


def test_one_pass_trains_each_head_as_if_it_were_alone(layered):
    """SGD with momentum in float64, head by head, on the same batches."""
    train, _ = layered
    config = LinearConfig(
        learning_rates=(0.01, 0.1), blocks=(1, 2), avgpool=(False, True), steps=7, batch=32
    )
    heads = train_heads(stored_batches(train, config), 4, config)
    starts = init_heads(8, 8, 4, config)
    for number, (blocks, pooled) in enumerate(config.inputs):
        for r, base in enumerate(config.learning_rates):
            w = np.asarray(starts[number]["kernel"][r], np.float64)
            b = np.zeros(4)
            vw, vb = np.zeros_like(w), np.zeros_like(b)
            batches = stored_batches(train, config)
            for step in range(config.steps):
                cls, mean, labels = next(batches)
                x = np.concatenate([*cls[4 - blocks :], *([mean] if pooled else [])], -1)
                p = np.exp(x @ w + b)
                p /= p.sum(1, keepdims=True)
                p[np.arange(32), labels] -= 1
                rate = base * 32 / 256 * 0.5 * (1 + np.cos(np.pi * step / config.steps))
                vw, vb = 0.9 * vw + x.T @ p / 32, 0.9 * vb + p.mean(0)
                w, b = w - rate * vw, b - rate * vb
            np.testing.assert_allclose(heads[number]["kernel"][r], w, atol=1e-5)
            np.testing.assert_allclose(heads[number]["bias"][r], b, atol=1e-5)


def test_the_grid_finds_a_good_head(layered):
    train, test = layered
    config = LinearConfig(steps=150, batch=64)
    predicted = predict(train_heads(stored_batches(train, config), 4, config), test, config)
    assert predicted.shape == (52, 90)
    best, scores = best_head(predicted, test.labels, config.names, accuracy)
    assert scores[config.names[best]] == max(scores.values()) > 0.6
    # The least rate has learnt nothing yet, so heads differ.
    assert min(scores.values()) < max(scores.values()) - 0.1
    assert LEARNING_RATES[0] == 1e-5


def test_logistic_regression_is_the_minimum(clusters):
    """Against another method on the same objective, for a weak and a strong penalty."""
    train, labels, _, _ = clusters
    x, one_hot = train.astype(np.float64), np.eye(4)[labels]

    def objective(flat, strength):
        w, b = flat[:32].reshape(8, 4), flat[32:]
        z = x @ w + b
        peak = z.max(1, keepdims=True)
        log_sum = (peak + np.log(np.exp(z - peak).sum(1, keepdims=True)))[:, 0]
        return strength * (log_sum - (z * one_hot).sum(1)).sum() + 0.5 * (w**2).sum()

    for strength in (1e-3, 10.0):
        found = fit_logistic(train, labels, 4, strength)
        best = optimize.minimize(
            objective, np.zeros(36), args=(strength,), method="BFGS", options={"gtol": 1e-7}
        )
        flat = np.concatenate([found.kernel.ravel(), found.bias])
        assert objective(flat, strength) <= best.fun * (1 + 1e-7) + 1e-9
        np.testing.assert_allclose(found.kernel, best.x[:32].reshape(8, 4), atol=2e-3)
    assert found.kernel.dtype == np.float64
    # What does not vary has no weight, whatever else is there.
    constant = np.concatenate([train, np.full((len(train), 3), 7.0)], 1)
    wider = fit_logistic(constant, labels, 4, 10.0)
    np.testing.assert_allclose(wider.kernel[:8], found.kernel, atol=1e-5)
    assert np.abs(wider.kernel[8:]).max() < 1e-9
    nothing = fit_logistic(np.full((len(labels), 3), 7.0), labels, 4, 10.0)
    assert not nothing.kernel.any()
    shares = np.bincount(labels, minlength=4) / len(labels)
    odds = np.exp(nothing.bias - nothing.bias.max())
    np.testing.assert_allclose(odds / odds.sum(), shares, atol=1e-5)


def test_logistic_regression_chooses_its_strength(clusters):
    train, labels, test, truth = clusters
    assert len(STRENGTHS) == 45
    assert (STRENGTHS[0], STRENGTHS[-1]) == pytest.approx((1e-6, 1e5))
    result = logistic_predict(train, labels, test, strengths=(1e-6, 1e-2, 1.0), iterations=200)
    assert set(result.heldout) == {1e-6, 1e-2, 1.0}
    assert result.heldout[result.strength] == max(result.heldout.values())
    assert accuracy(result.predicted, truth) > 0.6
    # The labels are shuffled, so that a weak penalty learns noise and the search ends early.
    rng = np.random.default_rng(0)
    wide = np.concatenate([train, rng.normal(size=(len(train), 40))], 1)
    noisy = np.where(rng.random(len(labels)) < 0.5, rng.permutation(labels), labels)
    tried = logistic_predict(wide, noisy, wide, iterations=50).heldout
    assert len(tried) < len(STRENGTHS)
    assert sorted(tried) == sorted(STRENGTHS)[: len(tried)]
    assert all(tried[c] < max(tried.values()) for c in sorted(tried)[-10:])
    with pytest.raises(UserError, match="10 training images or more"):
        logistic_predict(train[:9], labels[:9], test)


def test_rankings_and_scores(clusters):
    train, labels, test, truth = clusters
    ranked = rankings(test[:7], train, batch=3)
    a = test[:7] / np.linalg.norm(test[:7], axis=1, keepdims=True)
    b = train / np.linalg.norm(train, axis=1, keepdims=True)
    similar = np.take_along_axis(a @ b.T, ranked, 1)
    assert (np.diff(similar, axis=1) <= 1e-6).all()
    assert (np.sort(ranked, 1) == np.arange(300)).all()
    scores = retrieval_scores(ranked, by_class(truth[:7], labels), ks=(1, 10))
    by_hand = []
    for order, label in zip(ranked, truth[:7]):
        hits = labels[order] == label
        by_hand.append((np.cumsum(hits) / np.arange(1, 301))[hits].mean())
    assert scores["mAP"] == pytest.approx(np.mean(by_hand))
    first = np.mean([labels[o[0]] == t for o, t in zip(ranked, truth)])
    assert scores["precision@1"] == pytest.approx(first)


def test_protocols_of_a_ground_truth(tmp_path):
    path = tmp_path / "truth.json"
    entry = {"query": "q", "easy": ["a"], "hard": ["c"], "junk": ["b"]}
    path.write_text(json.dumps([entry]))
    protocols = read_ground_truth(path, ["q"], ["a", "b", "c", "d"])
    ranked = np.array([[1, 3, 0, 2]])
    # Without b: d, a, c. Easy and hard are at ranks 1 and 2.
    medium = retrieval_scores(ranked, protocols["medium"])["mAP"]
    assert medium == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Without a and b: d, c.
    assert retrieval_scores(ranked, protocols["hard"])["mAP"] == pytest.approx(1 / 2)
    with pytest.raises(UserError, match="'b', for 'q', is not in the gallery"):
        read_ground_truth(path, ["q"], ["a", "c"])
    with pytest.raises(UserError, match="does not say what the query 'r'"):
        read_ground_truth(path, ["r"], ["a", "b", "c"])
    path.write_text("{")
    with pytest.raises(UserError, match="no list of queries"):
        read_ground_truth(path, ["q"], ["a"])
    with pytest.raises(UserError, match="no query has"):
        retrieval_scores(ranked, by_class(np.array([5]), np.zeros(4, int)))


def test_views():
    assert view_for(518, 14) == View(256, 224)
    assert view_for(32, 4) == View(32, 32)
    assert view_for(518, 14, crop=448) == View(512, 448)
    with pytest.raises(UserError, match="not whole patches of 14: use 210 or 224"):
        view_for(518, 14, crop=220)
    with pytest.raises(UserError, match="no middle"):
        view_for(518, 14, resize=100)
    image = np.zeros((30, 60, 3), np.uint8)
    image[:, 20:40] = 255
    assert (View(30, 20)(image) == 255).all()


def test_features_of_images_in_order_and_without_the_damaged(tmp_path):
    images = np.random.default_rng(0).random((11, 8, 8, 3)).astype(np.float32)
    images[4] = np.nan
    source = ImageArrays(images, np.arange(11))
    found = extract(Pixels(4), source, View(8, 8), batch=4, layers=2, error_budget=1)
    assert found.indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    np.testing.assert_array_equal(found.labels, found.indices)
    assert found.cls.shape == (2, 10, 192)
    expected = np.round(np.delete(images, 4, 0) * 255) / 127.5 - 1
    np.testing.assert_allclose(found.cls[1], expected.reshape(10, -1), atol=1e-5)
    patches = expected.reshape(10, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(10, 4, 48)
    np.testing.assert_allclose(found.patch_mean, patches.mean(1), atol=1e-5)
    assert len(found.damaged) == 1
    with pytest.raises(UserError, match=r"image 4.*--error_budget allows 0"):
        extract(Pixels(4), source, View(8, 8), batch=4, error_budget=0)


def test_augmented_features_are_new_every_time_but_reproducible():
    source = Shapes(16, 20)
    config = LinearConfig(blocks=(1,), batch=8)
    runs = [augmented_batches(Pixels(8), source, 8, config) for _ in range(2)]
    first, second = ([next(run) for _ in range(4)] for run in runs)
    for (a, _, labels), (b, _, again) in zip(first, second):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(labels, again)
    assert len({np.asarray(row).tobytes() for a, _, _ in first for row in a[0]}) == 32
    assert jax.tree.all(jax.tree.map(lambda x: x.shape[-1] == 192, [a for a, _, _ in first]))
