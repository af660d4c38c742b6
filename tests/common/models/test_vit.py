"""The vision transformer trunk: shapes, several blocks' outputs, drop path, meshes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.vit import ViT, ViTConfig
from common.nn.drop_path import add_to_subset
from common.nn.positions import INTERPOLATIONS, resize_matrix, resized_positions
from common.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    make_mesh,
    state_shardings,
    use_mesh,
)

CONFIG = ViTConfig(
    width=16, num_layers=3, num_heads=2, patch_size=4, image_size=16, registers=2, layer_scale=0.5
)
IMAGES = jax.random.normal(jax.random.key(7), (8, 12, 20, 3))


def lively(config: ViTConfig) -> ViT:
    """A model none of whose parameters is zero or tiny."""
    model = ViT(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module")
def model() -> ViT:
    return lively(CONFIG)


def close(a, b, tolerance: float = 2e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=0), a, b)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (ViTConfig(384, 12, 6), 22_056_576),
        (ViTConfig(768, 12, 12, registers=4), 86_583_552),
        (ViTConfig(1024, 24, 16), 304_368_640),
        (ViTConfig(1024, 24, 16, mlp="swiglu"), 304_794_880),
        (ViTConfig(1536, 40, 24, mlp="swiglu", registers=4), 1_136_486_912),
    ],
)
def test_published_sizes(size, count):
    assert size.num_parameters() == count
    built = nnx.eval_shape(lambda: ViT(size, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built))) == count


def test_work_of_one_image():
    assert ViTConfig(384, 12, 6).flops(224, 224) == pytest.approx(2 * 6.1e9, rel=0.01)
    assert ViTConfig(1024, 24, 16).flops(518, 518) == pytest.approx(2 * 506.8e9, rel=0.01)
    giant = ViTConfig(1536, 40, 24, mlp="swiglu")
    assert giant.flops(224, 224) == pytest.approx(2 * 299e9, rel=0.02)


def test_blocks_one_after_the_other(model):
    """`features` of several blocks are what a plain loop over them gives."""
    x = model.embed(IMAGES)
    each = []
    for n in range(CONFIG.num_layers):
        x = jax.tree.map(lambda leaf, n=n: leaf[n], model.blocks)(x)
        each.append(x)
    raw = model.features(IMAGES, layers=[0, 1], norm=False)
    close(raw.cls, tuple(x[:, 0] for x in each[:2]))
    close(raw.registers, tuple(x[:, 1:3] for x in each[:2]))
    close(raw.patches, tuple(x[:, 3:] for x in each[:2]))
    last = model.features(IMAGES, layers=2)
    close(last.patches, tuple(model.norm(x)[:, 3:] for x in each[1:]))
    close(model.features(IMAGES), model(IMAGES))
    close(model(IMAGES, norm=False).patches, each[-1][:, 3:])
    close(model.features(IMAGES, layers=[-3]).cls, (model.norm(each[0])[:, 0],))
    with pytest.raises(UserError, match="3 blocks"):
        model.features(IMAGES, layers=4)
    with pytest.raises(UserError, match="names others"):
        model.features(IMAGES, layers=[3])


def test_attention_maps(model):
    """The maps of a block times its values give what its attention puts out."""
    maps = model.attention_maps(IMAGES, block=1)
    assert maps.shape == (8, 2, 18, 18)
    close(maps.sum(-1), np.ones((8, 2, 18)), 1e-5)
    x = jax.tree.map(lambda leaf: leaf[0], model.blocks)(model.embed(IMAGES))
    block = jax.tree.map(lambda leaf: leaf[1], model.blocks)
    normed = block.norm1(x)
    values = normed @ block.attention.qkv[...][:, 2] + block.attention.qkv_bias[...][2]
    mixed = jnp.einsum("bhts,bshd->bthd", maps, values.reshape(8, 18, 2, 8)).reshape(8, 18, 16)
    expected = mixed @ block.attention.out.kernel[...] + block.attention.out.bias[...]
    close(block.attention(normed), expected)
    assert model.attention_maps(IMAGES[:, :8, :8]).shape == (8, 2, 7, 7)


def test_mask_of_the_attention(model):
    """What a query may not see does not change what it gives."""
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    x = model.embed(IMAGES)
    seen = jnp.tril(jnp.ones((18, 18), bool))
    out = block(x, mask=seen)
    changed = block(x.at[:, 10:].add(1.0), mask=seen)
    close(out[:, :10], changed[:, :10])
    assert jnp.abs(out[:, 10:] - changed[:, 10:]).max() > 0.1
    weights = block.attention.weights(block.norm1(x), seen)
    assert float(weights[..., ~np.tril(np.ones((18, 18), bool))].max()) == 0.0


def test_masked_patches(model):
    """A masked patch's pixels do not matter, and its place still does."""
    masks = jnp.zeros((8, 15), bool).at[:, 3].set(True).at[2, 7].set(True)
    other = IMAGES.at[:, :4, 12:16].set(9.0)  # Patch 3.
    close(model(IMAGES, masks=masks), model(other, masks=masks))
    embedded = model.embed(IMAGES, masks)[:, CONFIG.prefix :]
    assert jnp.abs(embedded[2, 3] - embedded[2, 7]).max() > 0.1
    plain = model.embed(IMAGES)[:, CONFIG.prefix :]
    close(jnp.where(masks[..., None], 0, embedded), jnp.where(masks[..., None], 0, plain), 0)


def test_sizes_that_do_not_fit(model):
    with pytest.raises(UserError, match="resize them to 12 x 16 or pad them to 16 x 20"):
        model(IMAGES[:, :, :18].repeat(2, 1)[:, :13])


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_changes_no_gradient(model, policy):
    """Nor does it matter whether a loop runs the blocks."""

    def gradient(config):
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))

        def loss(state):
            tokens = nnx.merge(graphdef, state)(IMAGES[:2], key=jax.random.key(3))
            return jnp.sum(tokens.cls * tokens.patches.mean(1))

        return jax.jit(jax.grad(loss))(nnx.state(model))

    dropping = dataclasses.replace(CONFIG, drop_path=0.4)
    plain = gradient(dropping)
    close(gradient(dataclasses.replace(dropping, remat=policy)), plain, 1e-4)
    close(gradient(dataclasses.replace(dropping, remat=policy, unroll=True)), plain, 1e-4)
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(plain) if x.shape != (16,))


def test_unrolled(model):
    """Blocks with arrays of their own compute the same."""
    apart = model.unrolled()
    assert len(apart.blocks) == 3
    assert apart.blocks[1].gamma1[...].shape == (16,)
    close(apart(IMAGES), model(IMAGES), 1e-5)
    layers = {"layers": [0, 2], "norm": False}
    close(apart.features(IMAGES, **layers), model.features(IMAGES, **layers), 1e-5)
    close(apart.attention_maps(IMAGES, 1), model.attention_maps(IMAGES, 1), 1e-6)
    assert len(apart.unrolled().blocks) == 3


def test_drop_path_of_rows():
    """`keep` rows of each group get the branch, scaled; on average all get it once."""
    x = jax.random.normal(jax.random.key(0), (12, 2, 3))

    def draw(key):
        return add_to_subset(x, lambda rows: 2 * rows, key, 0.4, groups=2)

    once = np.asarray((draw(jax.random.key(1)) - x) / (2 * x))
    per_row = once[:, 0, 0]
    close(once, np.broadcast_to(per_row[:, None, None], once.shape), 1e-5)
    for group in (per_row[:6], per_row[6:]):
        assert sorted(np.round(group, 4)) == [0, 0, 0, 2, 2, 2]  # int(6 * 0.6) = 3 of 6.
    many = jax.vmap(draw)(jax.random.split(jax.random.key(2), 4000)).mean(0)
    close((many - x) / x, np.full(x.shape, 2.0), 0.2)
    # At least one row, however large the rate.
    least = add_to_subset(x[:2], lambda rows: rows, jax.random.key(0), 0.9) / x[:2]
    assert sorted(np.round(least[:, 0, 0], 4)) == [1, 3]
    with pytest.raises(ValueError, match="does not divide"):
        add_to_subset(x, lambda rows: rows, jax.random.key(0), 0.4, groups=5)


def test_drop_path_saves_the_work():
    """The branch runs on the kept rows alone."""
    rows = []
    add_to_subset(
        jnp.ones((10, 2, 3)), lambda x: rows.append(x.shape[0]) or x, jax.random.key(0), 0.4
    )
    assert rows == [6]


def test_drop_path_differs_by_layer_and_branch(model):
    dropping = dataclasses.replace(CONFIG, drop_path=0.5)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(dropping, rngs=nnx.Rngs(0))))
    trained = nnx.merge(graphdef, nnx.state(model))
    one, same = trained(IMAGES, key=jax.random.key(0)), trained(IMAGES, key=jax.random.key(0))
    close(one, same, 0)
    other = trained(IMAGES, key=jax.random.key(1))
    assert jnp.abs(one.cls - other.cls).max() > 0.05
    close(trained(IMAGES), model(IMAGES), 0)


MESHES = [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.mark.parametrize("mesh_config", MESHES, ids=["data8", "data2fsdp2tensor2"])
def test_meshes(model, mesh_config):
    """A mesh changes neither features nor gradients, drop path of fixed groups included."""
    config = dataclasses.replace(CONFIG, drop_path=0.5, drop_path_groups=4)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))
    images = jnp.concatenate([IMAGES, IMAGES[::-1] * 0.5])
    masks = jax.random.bernoulli(jax.random.key(4), 0.3, (16, 15))

    def loss(state, images, masks):
        tokens = nnx.merge(graphdef, state)(images, masks=masks, key=jax.random.key(5))
        return jnp.mean(tokens.cls * tokens.patches.mean(1)) * 16

    step = jax.jit(jax.value_and_grad(loss))
    expected = step(nnx.state(model), images, masks)
    mesh = make_mesh(mesh_config)
    shardings = state_shardings(nnx.state(model), mesh, DEFAULT_RULES)
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, s), nnx.to_pure_dict(nnx.state(model)), shardings
    )
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, placed)
    with use_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss))(state, images, masks)
    close(got[0], expected[0], 1e-5)
    close(got[1], expected[1], 1e-4)


def test_drop_path_moves_no_row_between_devices():
    """By default each device draws among its own rows: nothing is communicated."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((32, 4, 8), jnp.float32, sharding=rows)

    def loss(x, key):
        y = add_to_subset(x, lambda rows: jnp.sin(rows), key, 0.5)
        return y, jax.vjp(lambda x: add_to_subset(x, jnp.sin, key, 0.5), x)[1](y)

    with use_mesh(mesh):
        compiled = jax.jit(loss).lower(x, jax.random.key(0)).compile().as_text()
    found = re.findall(r"= \S+ (all-gather|all-to-all|all-reduce|collective-permute)", compiled)
    assert not found
    sizes = {
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)]", compiled)
    }
    one = 4 * 8
    assert max(sizes) == 4 * one  # A device's rows and never the batch,
    assert 2 * one in sizes  # of which it keeps two.


def test_positions_of_their_own_size_are_as_stored():
    table = jax.random.normal(jax.random.key(0), (5, 5, 3))
    for manner in INTERPOLATIONS:
        np.testing.assert_array_equal(resized_positions(table, (5, 5), manner), table)


@pytest.mark.parametrize("manner", INTERPOLATIONS)
@pytest.mark.parametrize("target", [3, 7, 16, 37, 50])
def test_resizing_a_constant_leaves_it(manner, target):
    matrix = resize_matrix(16, target, manner)
    assert matrix.shape == (target, 16)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)


def test_antialiased_positions_are_those_of_jax():
    table = jax.random.normal(jax.random.key(0), (16, 16, 3))
    for grid in ((7, 7), (5, 20), (37, 30)):
        expected = jax.image.resize(table, (*grid, 3), "cubic", antialias=True)
        close(resized_positions(table, grid, "antialias"), expected, 1e-5)


def test_offset_moves_the_coordinates():
    """Point 7 of 20 out of 37, by hand: where it lies, and Keys's weights with a = -0.75."""
    for manner, scale in (("offset", 37 / 20.1), ("size", 37 / 20)):
        at = 7.5 * scale - 0.5
        t = at - 13
        outer, inner = 1 + t, 2 - t
        expected = np.zeros(37)
        expected[12] = -0.75 * (outer**3 - 5 * outer**2 + 8 * outer - 4)
        expected[13] = 1.25 * t**3 - 2.25 * t**2 + 1
        expected[14] = 1.25 * (1 - t) ** 3 - 2.25 * (1 - t) ** 2 + 1
        expected[15] = -0.75 * (inner**3 - 5 * inner**2 + 8 * inner - 4)
        np.testing.assert_allclose(resize_matrix(37, 20, manner)[7], expected, atol=1e-5)


def test_positions_learn_through_the_resize():
    """Every entry of the table gets a gradient from a grid that is not its own."""
    table = jnp.ones((5, 5, 2))
    for manner in INTERPOLATIONS:
        gradient = jax.grad(lambda t, m=manner: resized_positions(t, (3, 7), m).sum())(table)
        assert jnp.abs(gradient).min() > 0
        assert float(gradient.sum()) == pytest.approx(3 * 7 * 2, rel=1e-5)


def test_bfloat16_stays_close(model):
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: ViT(dataclasses.replace(CONFIG, dtype="bfloat16"), rngs=nnx.Rngs(0)))
    )
    rough = nnx.merge(graphdef, nnx.state(model))(IMAGES)
    assert rough.patches.dtype == jnp.bfloat16
    exact = np.asarray(model(IMAGES).patches, np.float64)
    rough = np.asarray(rough.patches, np.float64)
    cosine = (exact * rough).sum(-1) / np.linalg.norm(exact, axis=-1)
    assert (cosine / np.linalg.norm(rough, axis=-1)).min() > 0.9999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "multiple of model.num_heads"),
        ({"image_size": 17}, "multiple of model.patch_size"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"interpolation": "bilinear"}, "interpolation"),
        ({"registers": -1}, "registers"),
        ({"mlp": "moe"}, "model.mlp"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(CONFIG, **change)
