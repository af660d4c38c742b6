"""Numbers of the published JAX implementation, fp32 (specification, appendix B)."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common import generate
from common.checkpoint import load_tensors
from common.checkpoint.reader import ArrayTensors
from recurrentgemma.convert import release_rows
from recurrentgemma.model import Griffin, GriffinConfig

pytestmark = pytest.mark.usefixtures("highest_precision")

CONFIG = GriffinConfig(
    vocab_size=40,
    width=16,
    mlp_width=24,
    num_heads=2,
    lru_width=24,
    num_layers=4,
    attention_window=4,
)
TOKENS = jnp.array(
    [[2, 5, 9, 13, 17, 21, 25, 29, 33, 37], [2, 7, 11, 4, 8, 12, 3, 6, 10, 14]], jnp.int32
)


def release_tree() -> dict[str, np.ndarray]:
    """The appendix's filling: leaf n of the sorted release names is s sin(.37 j + n)."""
    d, f, e, h = CONFIG.width, CONFIG.mlp_width, CONFIG.lru_width, CONFIG.num_heads
    shapes = {"embedder/input_embedding": (CONFIG.vocab_size, d), "final_norm/scale": (d,)}
    for i, mixer in enumerate(CONFIG.mixers()):
        block = f"blocks.{i}"
        for norm in ("temporal_pre_norm", "channel_pre_norm"):
            shapes[f"{block}/{norm}/scale"] = (d,)
        shapes[f"{block}/mlp_block/ffw_up/w"] = (2, d, f)
        shapes[f"{block}/mlp_block/ffw_up/b"] = (2, 1, 1, f)
        shapes[f"{block}/mlp_block/ffw_down/kernel"] = (f, d)
        shapes[f"{block}/mlp_block/ffw_down/bias"] = (d,)
        if mixer == "attention":
            inner = f"{block}/attention_block"
            for name, width in (("q", d), ("k", CONFIG.head_dim), ("v", CONFIG.head_dim)):
                shapes[f"{inner}/proj_{name}/kernel"] = (d, width)
            shapes[f"{inner}/proj_final/kernel"] = (d, d)
            shapes[f"{inner}/proj_final/bias"] = (d,)
            continue
        inner = f"{block}/recurrent_block"
        for name, (rows, cols) in (("x", (d, e)), ("y", (d, e)), ("out", (e, d))):
            shapes[f"{inner}/linear_{name}/kernel"] = (rows, cols)
            shapes[f"{inner}/linear_{name}/bias"] = (cols,)
        shapes[f"{inner}/conv_1d/w"] = (4, e)
        shapes[f"{inner}/conv_1d/b"] = (e,)
        shapes[f"{inner}/rg_lru/a_param"] = (e,)
        for gate in ("input_gate", "a_gate"):
            shapes[f"{inner}/rg_lru/{gate}/w"] = (h, e // h, e // h)
            shapes[f"{inner}/rg_lru/{gate}/b"] = (h, e // h)
    assert len(shapes) == 70
    tree = {}
    for n, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        scale = 0.3 if len(shape) > 1 else 0.2
        leaf = scale * np.sin(0.37 * np.arange(np.prod(shape)) + n)
        leaf = leaf + (-3.0 if name.endswith("a_param") else 0.0)
        tree[name] = leaf.astype(np.float32).reshape(shape)
    return tree


def build(window: int = 4) -> Griffin:
    """The golden model, filled through the key map of the original release."""
    config = dataclasses.replace(CONFIG, attention_window=window)
    model = Griffin(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state)
    )
    reader = ArrayTensors(Path("release"), release_tree())
    nnx.replace_by_pure_dict(state, load_tensors(reader, release_rows(config), abstract))
    return nnx.merge(graphdef, state)


@pytest.fixture(scope="module")
def model() -> Griffin:
    return build()


@jax.jit
def jitted(model: Griffin, *arguments: jax.Array) -> jax.Array:
    return model(*arguments)


def nll(model: Griffin, tokens: jax.Array) -> jax.Array:
    logits = model(tokens)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=tolerance, rtol=0)


def test_logits(model):
    logits = jitted(model, TOKENS)
    near(logits[0, 0, :4], [3.30071, 2.95839, 2.23061, 1.20923])
    near(logits[0, 9, :4], [2.69426, 1.78860, 0.64619, -0.58238])
    near(logits[1, 9, -4:], [-0.63872, -1.81272, -2.74655, -3.32061])
    near(jnp.abs(logits).mean(), 2.182806)
    assert logits.argmax(-1).tolist() == [
        [17, 11, 29, 31, 33, 31, 28, 30, 32, 33],
        [17, 27, 30, 30, 11, 30, 15, 10, 12, 14],
    ]
    near(jax.jit(nll)(model, TOKENS), 5.232863)


def test_packed_positions(model):
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]] * 2)
    logits = jitted(model, TOKENS, positions)
    near(logits[0, 9, :4], [2.33232, 1.29174, 0.07943, -1.14350])
    near(logits[1, 9, -4:], [-0.56613, -1.74894, -2.69990, -3.29697])
    near(jnp.abs(logits).mean(), 2.187496)


def test_wide_window():
    logits = jitted(build(window=64), TOKENS)
    near(logits[0, 9, :4], [2.51885, 1.54105, 0.35877, -0.87139])
    near(logits[1, 9, -4:], [-0.47788, -1.67059, -2.64168, -3.26624])
    near(jnp.abs(logits).mean(), 2.183399)


def test_states_after_prefill(model):
    _, cache = jax.jit(lambda m, t: m.prefill(t))(model, TOKENS)
    recurrent, _, attention = cache.units
    near(recurrent.h[0, 0, :4], [-0.23034, -0.18466, -0.13204, -0.06996])
    near(recurrent.conv[0, 0, :, 0], [-0.07795, 0.33048, 0.30306])
    near(attention.keys[0, 0, 0, :, 0], [-0.00501, 0.19107, 0.20972, 0.10069])
    assert cache.cached.tolist() == [10, 10]
    near(cache.rest[0].h[0, :4], [-0.23123, -0.26561, -0.26302, -0.24041])
    near(cache.rest[0].conv[0, :, 0], [0.21110, 0.19216, 0.18879])


def test_greedy_continuation(model):
    out = generate.generate(model, TOKENS.tolist(), max_new_tokens=6)
    assert [g.tokens for g in out] == [[33, 15, 14, 31, 31, 31], [14, 14, 31, 31, 31, 31]]


def test_gradient_norms(model):
    graphdef, state = nnx.split(model)
    pure = nnx.to_pure_dict(state)

    def loss(pure):
        nnx.replace_by_pure_dict(state, pure)
        return nll(nnx.merge(graphdef, state), TOKENS)

    grads = jax.jit(jax.grad(loss))(pure)
    block = grads["units"]["blocks"]
    norm = jnp.linalg.norm
    near(norm(block[0]["mixer"]["rg_lru"]["a_param"][0]), 0.00121431, 1e-7)
    near(norm(block[0]["mixer"]["rg_lru"]["a_gate"]["w"][0]), 0.000304108, 1e-7)
    near(norm(block[2]["mixer"]["k"]["kernel"]), 2.038174)
    near(norm(grads["embed"]["table"]), 5.561144)
