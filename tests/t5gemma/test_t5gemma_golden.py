"""Numbers of both public implementations, fp32 (specification, appendix B)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_model import CONFIG, DECODER_TOKENS, ENCODER_TOKENS, golden, shapes

from common import generate
from t5gemma.model import T5Gemma

pytestmark = pytest.mark.usefixtures("highest_precision")


@jax.jit
def outputs(model: T5Gemma) -> tuple[jax.Array, jax.Array]:
    return model.encode(ENCODER_TOKENS), model(ENCODER_TOKENS, DECODER_TOKENS)


@jax.jit
def mean_nll(model: T5Gemma) -> jax.Array:
    targets = jnp.pad(DECODER_TOKENS[:, 1:], ((0, 0), (0, 1)), constant_values=1)
    return jnp.mean(model.nll(model.hidden(ENCODER_TOKENS, DECODER_TOKENS), targets, chunk=3))


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=tolerance, rtol=0)


def test_filling():
    names = sorted(shapes(CONFIG))
    assert len(names) == 60
    assert names[0] == "model.decoder.embed_tokens.weight"
    assert names[5] == "model.decoder.layers.0.mlp.down_proj.weight"
    assert names[59] == "model.encoder.norm.weight"


def test_wide_window():
    model = golden()
    states, logits = outputs(model)
    near(states[0, 0, :4], [0.00998, 0.17358, 0.12138, -0.84043])
    near(states[0, 9, :4], [0.33416, -0.23792, -0.58720, -0.88465])
    near(states[1, 6, :4], [1.07778, 0.23138, -0.36018, -0.68874])
    near(logits[0, 0, :4], [0.30609, -0.87335, 1.18755, -1.15818])
    near(logits[0, 5, :4], [1.12443, -0.33405, -0.55348, 1.28011])
    near(logits[1, 5, -4:], [1.28197, 0.30524, -1.80270, 2.77401])
    near(jnp.abs(logits).mean(), 1.114546)
    assert logits.argmax(-1).tolist() == [[14, 28, 27, 26, 11, 10], [14, 6, 31, 15, 16, 34]]
    near(mean_nll(model), 5.601341)


def test_window_as_published():
    model = golden(window=4)
    states, logits = outputs(model)
    near(states[0, 0, :4], [-0.01946, 0.14492, 0.13900, -0.80738])
    near(states[0, 9, :4], [-0.08248, 0.40346, -0.09180, -1.11320])
    near(states[1, 6, :4], [0.67583, 0.40575, -0.04913, -0.72519])
    near(logits[0, 5, :4], [1.12532, -0.34289, -0.53927, 1.26466])
    near(logits[1, 5, -4:], [1.24592, 0.29136, -1.74305, 2.68624])
    near(jnp.abs(logits).mean(), 1.101382)
    near(mean_nll(model), 5.576077)


def test_window_of_the_transformers_library():
    model = golden(window=4, encoder_window="transformers")
    states, logits = outputs(model)
    near(states[0, 9, :4], [0.26345, 0.04751, -0.47840, -1.05579])
    near(logits[0, 5, :4], [1.12442, -0.34425, -0.53604, 1.26050])
    near(logits[1, 5, -4:], [1.26828, 0.30348, -1.78605, 2.74741])
    near(jnp.abs(logits).mean(), 1.108293)
    near(mean_nll(model), 5.590262)


def test_active_caps():
    states, logits = outputs(golden(stressed=True))
    near(states[0, 0, :4], [0.26168, 0.63126, 0.00023, -1.28186])
    near(states[0, 9, :4], [0.26767, -0.25976, -0.53172, -0.84682])
    near(states[1, 6, :4], [0.91489, 0.48115, -0.20287, -0.83205])
    near(logits[0, 0, :4], [10.07115, -17.17448, 19.31401, -17.28474], 5e-5)
    near(logits[0, 5, :4], [14.17042, -7.34898, -2.55519, 11.29799], 5e-5)
    near(logits[1, 5, -4:], [8.48521, 2.59637, -12.38877, 17.43925], 5e-5)
    near(jnp.abs(logits).mean(), 12.258911, 5e-5)
    assert logits.argmax(-1).tolist() == [[2, 23, 10, 14, 35, 22], [2, 1, 31, 32, 33, 5]]


def test_number_of_parameters():
    state = nnx.state(golden())
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == CONFIG.num_parameters()


def test_greedy_generation():
    prompts = [row[row > 0].tolist() for row in np.asarray(ENCODER_TOKENS)]
    out = generate.generate(golden(), prompts, max_new_tokens=8)
    assert [g.tokens for g in out] == [
        [14, 26, 38, 21, 21, 21, 21, 21],
        [14, 38, 4, 4, 33, 4, 33, 4],
    ]
