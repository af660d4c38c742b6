"""Heads, Sinkhorn-Knopp and losses: the paper's golden values, float64 accounts, eight devices."""

import dino_account as account
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from dino.heads import HeadConfig, ProjectionHead, logits_of, unit
from dino.losses import cross_entropy, dino_loss, ibot_loss, koleo_loss, nearest_neighbours
from dino.sinkhorn import centred_softmax, moved_centre, sinkhorn_knopp


def wave(shape, k, phase):
    """The paper's test inputs."""
    flat = np.sin(np.float32(0.7 * k) * np.arange(np.prod(shape), dtype=np.float32) + phase)
    return flat.reshape(shape).astype(np.float32)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=4, fsdp=2))


def on(mesh, function, *arrays):
    """The function's values and gradients with the arrays' rows divided over a mesh."""
    with use_mesh(mesh):
        placed = jax.device_put(arrays, batch_sharding(mesh))
        return jax.tree.map(np.array, jax.jit(function)(*placed))


class TestGoldenValues:
    """Section 2.9."""

    targets = sinkhorn_knopp(wave((4, 8), 1, 0), 0.07)
    students = wave((4, 8), 1.3, 0.2)

    def test_sinkhorn(self):
        np.testing.assert_allclose(self.targets.sum(1), 1, rtol=1e-6)
        columns = [0.340484, 0.340512, 0.377852, 0.837456, 0.757122, 0.556240, 0.395680, 0.394654]
        np.testing.assert_allclose(self.targets.sum(0), columns, atol=2e-6)
        row = [0.339574, 0.339557, 0.314567, 0.006298, 3.0e-6, 0, 0, 0]
        np.testing.assert_allclose(self.targets[0], row, atol=1e-6)

    def test_cross_entropy_and_all_pairs(self):
        mean = cross_entropy(self.students, self.targets, 0.1).mean()
        assert float(mean) == pytest.approx(9.336107, abs=2e-5)
        students = [self.students, wave((4, 8), 0.9, 0.5)]
        teachers = [self.targets, self.targets[::-1]]
        total = sum(cross_entropy(s, t, 0.1).mean() for s in students for t in teachers)
        assert float(total) == pytest.approx(39.997139, abs=1e-4)
        # The same pairs by their sum: as local views of an image whose global ones say nothing.
        z = jnp.stack([jnp.zeros((4, 8)), jnp.zeros((4, 8)), *students], axis=1)
        both = jnp.stack(teachers, axis=1)
        _, local = dino_loss(z, jnp.eye(8), both, 0.1)
        assert float(local.mean()) * 6 == pytest.approx(39.997139, abs=1e-4)

    def test_ibot(self):
        masks = np.array([[1, 1, 1, 0], [0, 1, 0, 0]], bool)
        weights = np.array([[1 / 3, 1 / 3, 1 / 3, 1]])
        total = ibot_loss(self.students[None], jnp.eye(8), self.targets[None], weights, 0.1)
        assert float(total) / 2 == pytest.approx(8.114186, abs=2e-5)
        ours = account.ibot(np.float64(self.targets), np.float64(self.students), masks)
        assert ours == pytest.approx(8.114186, abs=2e-5)

    def test_koleo(self):
        x = wave((6, 5), 1, 0)
        assert float(koleo_loss(x).mean()) == pytest.approx(0.368660, abs=2e-6)
        assert nearest_neighbours(unit(x)).tolist() == [2, 3, 4, 5, 2, 3]

    def test_weight_norm(self):
        head = ProjectionHead(6, HeadConfig(prototypes=4, bottleneck=6, hidden=2), rngs=nnx.Rngs(0))
        head.last_layer.weight_g[...] = jnp.array([1, 1, 0.5, 2])
        head.last_layer.weight_v[...] = wave((4, 6), 0.5, 0.1)
        found = head.last_layer(unit(wave((2, 6), 1, 0)))
        wanted = [
            [0.618720, 0.298107, -0.399905, 1.250666],
            [0.186756, -0.969034, 0.244420, 0.348332],
        ]
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_head_equals_the_account_and_starts_as_the_paper_says():
    config = HeadConfig(prototypes=5000, bottleneck=16, hidden=64)
    head = ProjectionHead(12, config, rngs=nnx.Rngs(1))
    x = draw(0, 3, 12)
    layers = [(np.float64(m.kernel[...]), np.float64(m.bias[...])) for m in head.mlp]
    z = account.head_bottleneck(np.float64(x), layers)
    np.testing.assert_allclose(head.bottleneck(x), z, atol=2e-6)
    g, v = np.float64(head.last_layer.weight_g[...]), np.float64(head.last_layer.weight_v[...])
    np.testing.assert_allclose(head(x), account.prototypes(z, g, v), atol=2e-6)
    assert (g == 1).all()
    assert v.std() == pytest.approx(1 / np.sqrt(3 * 16), rel=0.02)
    assert np.abs(v).max() <= 0.25
    assert layers[1][0].std() == pytest.approx(0.02, rel=0.05)
    assert all((bias == 0).all() for _, bias in layers)
    # ViT-g's head of section 2.8.
    large = nnx.eval_shape(lambda: ProjectionHead(1536, HeadConfig(131_072, 384), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(large))) == 58_593_664


def test_sinkhorn_equals_the_account_with_padding_anywhere():
    logits = draw(1, 24, 40) / 3
    valid = np.random.default_rng(2).random(24) < 0.6
    logits[~valid] *= 100  # Whatever the padding says.
    found = np.array(sinkhorn_knopp(logits, 0.07, valid=valid))
    np.testing.assert_allclose(found[valid], account.sinkhorn(logits[valid], 0.07), atol=2e-6)
    assert (found[~valid] == 0).all()
    assert not np.array(sinkhorn_knopp(logits, 0.07, valid=np.zeros(24, bool))).any()


def test_sinkhorn_keeps_logits_that_overflow_and_prototypes_that_nobody_likes():
    logits = np.array([[9.0, 0.0, -9.0], [8.0, 1.0, -9.0], [9.5, 0.0, -9.0]], np.float32)
    found = np.array(sinkhorn_knopp(logits, 0.04))
    shifted = np.float64(logits) - 9  # Neutral, and what lets float64 hold it.
    np.testing.assert_allclose(found, account.sinkhorn(shifted, 0.04), atol=1e-5)


def test_sinkhorn_uses_all_prototypes_where_a_softmax_collapses():
    """Section 6.8, E2: one prototype a little ahead takes every row, unless they are balanced."""
    logits = 0.02 * draw(3, 512, 64)
    logits[:, 0] += 0.5

    def usage(assigned):
        mean = np.float64(assigned).mean(0)
        return -(mean * np.log(mean)).sum()

    assert usage(account.softmax(logits / 0.07)) < 0.6
    assert usage(sinkhorn_knopp(logits, 0.07)) > np.log(64) - 1e-3


@pytest.mark.parametrize("scope", ["global", "per_device"])
def test_sinkhorn_on_eight_devices(mesh, scope):
    logits = draw(4, 32, 24) / 3
    valid = np.arange(32) % 4 != 1
    found = on(mesh, lambda x, v: sinkhorn_knopp(x, 0.05, valid=v, scope=scope), logits, valid)
    parts = [slice(0, 32)] if scope == "global" else [slice(4 * i, 4 * i + 4) for i in range(8)]
    for part in parts:
        wanted = account.sinkhorn(logits[part][valid[part]], 0.05)
        np.testing.assert_allclose(found[part][valid[part]], wanted, atol=2e-6)
    assert (found[~valid] == 0).all()


def test_a_moving_centre(mesh):
    logits, centre = draw(5, 16, 6), draw(6, 6)
    valid = np.arange(16) % 3 != 0
    rows = np.float64(logits)
    wanted = account.softmax((rows - centre) / 0.04)
    np.testing.assert_allclose(centred_softmax(logits, centre, 0.04), wanted, atol=2e-6)
    wanted = 0.9 * centre + 0.1 * rows.mean(0)
    np.testing.assert_allclose(moved_centre(centre, logits), wanted, atol=1e-6)
    found = on(mesh, lambda x, v: moved_centre(centre, x, valid=v), logits, valid)
    np.testing.assert_allclose(found, 0.9 * centre + 0.1 * rows[valid].mean(0), atol=1e-6)
    nothing = np.zeros(16, bool)
    np.testing.assert_array_equal(moved_centre(centre, logits, valid=nothing), centre)


@pytest.mark.parametrize("local_views", [0, 1, 8])
@pytest.mark.parametrize("chunk", [None, 1])
def test_image_losses_equal_the_account_of_every_pair(local_views, chunk):
    z = unit(draw(7, 5, 2 + local_views, 6))
    table = draw(8, 11, 6)
    targets = account.softmax(np.float64(draw(9, 5, 2, 11)))
    found = dino_loss(z, table, np.float32(targets), 0.1, chunk=chunk)
    students = np.float64(z) @ np.float64(table).T
    wanted = account.dino(targets, students)
    np.testing.assert_allclose([x.mean() for x in found], wanted, rtol=2e-6)


def test_chunks_change_neither_losses_nor_gradients(mesh):
    z, table = np.array(unit(draw(10, 8, 10, 6))), draw(11, 16, 6)
    both = np.float32(account.softmax(draw(12, 8, 2, 16)))
    patches = np.float32(account.softmax(draw(13, 8, 10, 16)))
    weights = np.abs(draw(14, 8, 10))

    def total(chunk, z, both, patches, weights, table=table):
        parts = dino_loss(z, table, both, 0.1, chunk=chunk)
        return sum(p.sum() for p in parts) + ibot_loss(z, table, patches, weights, 0.1, chunk=chunk)

    def gradients(chunk):
        def both_ways(z, both, patches, weights):
            one = jax.value_and_grad(lambda z: total(chunk, z, both, patches, weights))(z)
            return one, jax.grad(lambda t: total(chunk, z, both, patches, weights, t))(table)

        return both_ways

    whole = jax.tree.map(np.array, gradients(None)(z, both, patches, weights))
    for found in (
        gradients(2)(z, both, patches, weights),
        on(mesh, gradients(None), z, both, patches, weights),
        on(mesh, gradients(5), z, both, patches, weights),
    ):
        for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_ibot_equals_the_account():
    masks = np.random.default_rng(3).random((6, 9)) < 0.4
    masks[2] = False
    count = masks.sum()
    z, table = unit(draw(15, 1, count + 3, 6)), draw(16, 11, 6)
    targets = account.softmax(np.float64(draw(17, count, 11)))
    padded = np.zeros((1, count + 3, 11), np.float32)
    padded[0, :count] = targets
    weights = np.zeros((1, count + 3), np.float32)
    weights[0, :count] = np.repeat(1 / np.maximum(masks.sum(1), 1), masks.sum(1))
    found = float(ibot_loss(z, table, padded, weights, 0.1)) / 6
    students = np.float64(z[0, :count]) @ np.float64(table).T
    assert found == pytest.approx(account.ibot(targets, students, masks), rel=2e-6)


@pytest.mark.parametrize(("group", "parts"), [(None, 1), (4, 4), ("device", 8)])
def test_koleo_on_eight_devices(mesh, group, parts):
    x = draw(18, 16, 6)

    def loss(x):
        return koleo_loss(x, group=group).mean()

    found, gradient = on(mesh, jax.value_and_grad(loss), x)
    wanted = np.mean([account.koleo(part) for part in np.split(x, parts)])
    assert found == pytest.approx(wanted, rel=2e-6)
    # Difference quotients in float64, along a few directions.
    for seed in range(3):
        step = 1e-5 * np.float64(draw(20 + seed, 16, 6))
        sides = [
            np.mean([account.koleo(part) for part in np.split(x + sign * step, parts)])
            for sign in (1, -1)
        ]
        slope = (np.float64(gradient) * step).sum()
        assert slope == pytest.approx((sides[0] - sides[1]) / 2, rel=2e-3, abs=1e-8)


def test_koleo_of_equal_rows_is_finite():
    value, gradient = jax.value_and_grad(lambda x: koleo_loss(x).mean())(jnp.ones((3, 4)))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_logits_take_operands_in_the_tables_dtype():
    z, table = unit(draw(30, 4, 8)), jnp.asarray(draw(31, 5, 8), jnp.bfloat16)
    found = logits_of(z, table)
    assert found.dtype == jnp.float32
    rounded = np.float32(jnp.asarray(z, jnp.bfloat16))
    np.testing.assert_allclose(found, rounded @ np.float32(table).T, rtol=1e-5, atol=1e-6)
