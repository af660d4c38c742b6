"""`nearest_centroid` against a float64 oracle: ties, edges, dtypes, NaN, gradients, sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from common.kernels.nearest_centroid import gpu, nearest_centroid, tpu, xla
from common.sharding import per_shard, use_mesh

FORMS = ["reference", "xla", "tpu", "gpu"]
# Every axis once alone, once odd, once past a block.
SHAPES = [(1, 1, 1), (1, 300, 5), (130, 7, 256), (300, 300, 5)]


def draw(shape, seed=0):
    """Small integers: every form computes with them exactly, and many distances are equal."""
    rows, centroids, width = shape
    rng = np.random.default_rng(seed)
    return rng.integers(-2, 3, (rows, width)), rng.integers(-2, 3, (centroids, width))


def oracle(x, c):
    """Returns the first of the nearest, and its squared distance, in float64."""
    x, c = np.asarray(x, np.float64), np.asarray(c, np.float64)
    distances = np.sum(np.square(x[:, None] - c), axis=-1)
    return np.argmin(distances, axis=1), np.min(distances, axis=1)


def assert_exact(have, x, c):
    index, distance = oracle(x, c)
    assert (have[0].dtype, have[1].dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(have[0], index)
    np.testing.assert_array_equal(have[1], distance)


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_smoke_nearest_centroid(form):
    x, c = draw((20, 6, 4))
    have = nearest_centroid(jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32), form)
    assert_exact(have, x, c)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_oracle_ties_included(form, shape, dtype):
    x, c = draw(shape)
    assert_exact(nearest_centroid(jnp.asarray(x, dtype), jnp.asarray(c, dtype), form), x, c)


# Blocks smaller than the problem in every dimension, none of which they divide.
BLOCKS = {
    "xla": lambda *operands: xla.tiled(*operands, tile=(64, 50)),
    "tpu": lambda *operands: tpu._search(*operands, (128, 128, 128, 64), True),
    "gpu": lambda *operands: gpu._search(*operands, (64, 32, 16, 4, 2), True),
}


@pytest.mark.parametrize("form", sorted(BLOCKS))
def test_several_ragged_blocks(form):
    x, c = draw((150, 300, 150))
    half = jnp.asarray(0.5 * np.sum(np.square(c), axis=1), jnp.float32)
    index, score = BLOCKS[form](jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32), half)
    assert_exact((index, 2 * score + np.sum(np.square(x), axis=1)), x, c)


@pytest.mark.parametrize("form", FORMS)
def test_duplicates_and_points_on_a_centroid(form):
    _, c = draw((1, 140, 8))
    c[70:] = c[:70]
    have = nearest_centroid(jnp.asarray(c, jnp.float32), jnp.asarray(c, jnp.float32), form)
    assert_exact(have, c, c)
    assert int(have[0].max()) < 70
    assert float(have[1].max()) == 0


@pytest.mark.parametrize("form", FORMS)
def test_arbitrary_numbers_and_mixed_dtypes(form):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(40, 30)), jnp.bfloat16)
    c = rng.normal(size=(25, 30)).astype(np.float32)
    index, distance = nearest_centroid(x, c, form)
    best, least = oracle(x, c)
    np.testing.assert_array_equal(index, best)
    np.testing.assert_allclose(distance, least, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_not_a_number(form):
    x, c = draw((6, 140, 5))
    x, c = x.astype(np.float32), c.astype(np.float32)
    c[0, 1], c[3, 0], c[131, 2] = np.nan, np.inf, -np.inf
    x[2, 0] = np.nan
    index, distance = nearest_centroid(x, c, form)
    good = np.delete(np.arange(140), [0, 3, 131])
    fine = np.delete(np.arange(6), 2)
    best, least = oracle(x[fine], c[good])
    np.testing.assert_array_equal(index[fine], good[best])
    np.testing.assert_array_equal(distance[fine], least)
    assert index[2] == 0
    assert np.isnan(distance[2])
    nowhere = nearest_centroid(x[:1], np.full((3, 5), np.nan, np.float32), form)
    assert nowhere[0][0] == 0
    assert not np.isfinite(nowhere[1][0])


@pytest.mark.parametrize("form", ["reference", "xla", "gpu"])
def test_gradients_of_the_distance(form):
    rng = np.random.default_rng(2)
    x, c = (jnp.asarray(rng.normal(size=(size, 7)), jnp.float32) for size in (12, 5))
    weights = jnp.asarray(rng.normal(size=12), jnp.float32)

    def loss(x, c):
        return jnp.sum(weights * nearest_centroid(x, c, form)[1])

    dx, dc = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, c)
    index, _ = oracle(x, c)
    want = 2 * np.asarray(weights)[:, None] * (np.asarray(x) - np.asarray(c)[index])
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5)
    sums = np.zeros_like(c)
    np.subtract.at(sums, index, want)
    np.testing.assert_allclose(dc, sums, rtol=1e-5, atol=1e-5)
    _, forward = jax.jvp(loss, (x, c), (jnp.ones_like(x), c))
    np.testing.assert_allclose(forward, np.sum(want) + np.sum(sums * c), rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_leading_axes(form):
    x, c = zip(*(draw((9, 20, 4), seed) for seed in range(2)))
    x, c = (jnp.asarray(np.stack(arrays), jnp.float32) for arrays in (x, c))
    have = jax.jit(jax.vmap(lambda x, c: nearest_centroid(x, c, form)))(x, c)
    for i in range(2):
        assert_exact([part[i] for part in have], x[i], c[i])


def test_no_matrix_of_all_distances():
    size = 16_384
    shape = jax.ShapeDtypeStruct((size, 8), jnp.float32)
    compiled = jax.jit(nearest_centroid).lower(shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size * size * 4 / 32  # a few tiles
    text = compiled.as_text()
    assert f"[{size},{size}]" not in text
    assert "conditional" not in text, "the platform was not resolved"


def mesh_of_eight():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_sharded_rows_stay_where_they_are():
    x, c = draw((48, 30, 6))
    mesh = mesh_of_eight()
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    on_mesh = jax.device_put(jnp.asarray(x, jnp.float32), rows)
    centroids = jax.device_put(jnp.asarray(c, jnp.float32), NamedSharding(mesh, P()))

    def search(x, c):
        axes = [("batch", None), (None, None)]
        return per_shard(nearest_centroid, [x, c], axes, (("batch",), ("batch",)))

    def both(x, c):
        found = search(x, c)
        return *found, jax.grad(lambda c: jnp.sum(search(x, c)[1]))(c)

    with use_mesh(mesh):
        compiled = jax.jit(both).lower(on_mesh, centroids).compile()
        index, distance, dc = compiled(on_mesh, centroids)
    assert not re.findall(r"(all-gather|all-to-all|collective-permute)\(", compiled.as_text())
    assert index.sharding.is_equivalent_to(rows, 1)
    assert_exact((index, distance), x, c)
    want = np.zeros(c.shape)
    np.subtract.at(want, np.asarray(index), 2.0 * (x - c[np.asarray(index)]))
    np.testing.assert_array_equal(dc, want)


def test_no_rows():
    index, distance = nearest_centroid(jnp.zeros((0, 3)), jnp.zeros((2, 3)))
    assert (index.shape, distance.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("x", "c", "form", "message"),
    [
        (jnp.zeros((3, 4)), jnp.zeros((3, 5)), None, r"x \[N, D\]"),
        (jnp.zeros((2, 3, 4)), jnp.zeros((3, 4)), None, "jax.vmap"),
        (jnp.zeros((3, 4)), jnp.zeros((0, 4)), None, "at least one centroid"),
        (jnp.zeros((3, 0)), jnp.zeros((3, 0)), None, "one dimension"),
        (jnp.zeros((3, 4), jnp.int32), jnp.zeros((3, 4)), None, "x is int32"),
        (jnp.zeros((3, 4)), jnp.zeros((3, 4)), "fast", "no implementation 'fast'"),
    ],
)
def test_mistakes_are_named(x, c, form, message):
    with pytest.raises(UserError, match=message):
        nearest_centroid(x, c, form)
