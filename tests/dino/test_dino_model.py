"""A backbone as its users call it: what it takes, what it compiles, what it says of mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dino
from common.errors import UserError
from common.models.vit import ViT, ViTConfig
from dino import model as models

VIT = ViTConfig(
    width=16, num_layers=3, num_heads=2, patch_size=4, image_size=16, registers=1, layer_scale=0.5
)
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return dino.Backbone(dino.BackboneConfig(VIT), rngs=nnx.Rngs(0))


def test_features_are_the_trunk_s(model):
    trunk = ViT.features(model, IMAGES, [0, 2], False)
    found = model.features(IMAGES, layers=[0, 2], norm=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, trunk)
    one = model.features(IMAGES)
    assert one.cls.shape == (2, 16)
    assert one.registers.shape == (2, 1, 16)
    assert one.patches.shape == (2, 15, 16)
    several = model.features(IMAGES, layers=2)
    assert isinstance(several.cls, tuple)
    np.testing.assert_allclose(several.cls[1], one.cls, atol=1e-5)
    assert isinstance(model.features(IMAGES, layers=[1]).patches, tuple)
    maps = model.attention_maps(IMAGES, -2)
    np.testing.assert_allclose(maps, ViT.attention_maps(model, IMAGES, 1), atol=1e-6)


def test_one_program_for_each_size(model):
    before = models.features_of._cache_size()
    for size in (8, 12, 8, 12, 8):
        model.features(np.zeros((1, size, 8, 3), np.float32))
    # New parameters of the same shapes are no new program.
    other = dino.Backbone(dino.BackboneConfig(VIT), rngs=nnx.Rngs(1))
    assert (
        np.abs(
            other.features(IMAGES[:1, :8, :8]).cls - model.features(IMAGES[:1, :8, :8]).cls
        ).max()
        > 0
    )
    assert models.features_of._cache_size() == before + 2


def test_features_follow_the_parameters(model):
    """What is kept for the next call is taken apart anew when a parameter is another array."""
    own = nnx.clone(model)
    before = own.features(IMAGES).cls
    own.norm.bias[...] = own.norm.bias[...] + 1.0
    np.testing.assert_allclose(own.features(IMAGES).cls, before + 1.0, atol=1e-5)
    own.blocks.gamma1[...] = own.blocks.gamma1[...] * 2.0
    assert np.abs(own.features(IMAGES).cls - before - 1.0).max() > 1e-3
    np.testing.assert_allclose(model.features(IMAGES).cls, before, atol=1e-6)


def test_inside_other_programs(model):
    """Features have a gradient, and are no obstacle to `jit` and `vmap`."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state, images):
        return jnp.sum(nnx.merge(graphdef, state).features(images).cls[:, 0])

    gradients = jax.grad(loss, argnums=(0, 1))(state, IMAGES)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    assert jnp.abs(gradients[1]).max() > 0
    each = jax.vmap(lambda image: model.features(image[None]).cls[0])(jnp.asarray(IMAGES))
    np.testing.assert_allclose(each, model.features(IMAGES).cls, atol=1e-5)


def test_normalize(model):
    images = np.array([[[[0, 127.5, 255]]]], np.float32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        model.normalize(images)[0, 0, 0], (np.array([0, 0.5, 1]) - mean) / std, atol=1e-6
    )
    grey = dataclasses.replace(model.backbone_config, image_mean=(0.5,) * 3, image_std=(0.25,) * 3)
    other = dino.Backbone(grey, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(other.normalize(images)[0, 0, 0], [-2, 0, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 13, 16, 3), np.float32), "resize them to 12 x 16 or pad them to 16 x 16"),
        (np.zeros((1, 3, 16, 16), np.float32), "channels come last"),
        (np.zeros((16, 16, 3), np.float32), "a single image is a batch of one"),
        (np.zeros((1, 16, 16, 1), np.float32), "channels come last"),
        (np.zeros((1, 16, 16, 3), np.uint8), "pass them through normalize"),
        (np.zeros((1, 0, 16, 3), np.float32), "no multiples of the patch size"),
    ],
)
def test_images_that_are_none(model, images, message):
    for call in (model.features, model.attention_maps):
        with pytest.raises(UserError, match=message):
            call(images)


def test_blocks_that_are_not_there(model):
    for layers in (0, 4, [3], [-4], []):
        with pytest.raises(UserError, match="blocks"):
            model.features(IMAGES, layers=layers)
    with pytest.raises(UserError, match="blocks"):
        model.attention_maps(IMAGES, 3)


def test_every_shape_is_one():
    for name, build in dino.MODELS.items():
        config = build()
        assert config.width % config.num_heads == 0, name
        assert (config.registers > 0) == name.endswith("_reg")
        assert config.interpolation == ("antialias" if config.registers else "offset")
    assert {f"vit{size}14{kind}" for size in "sblg" for kind in ("", "_reg")} <= set(dino.MODELS)
    assert "smoke" in dino.MODELS


def test_bad_colours():
    with pytest.raises(UserError, match="image_std"):
        dino.BackboneConfig(VIT, image_std=(0.2, 0.0, 0.2))
