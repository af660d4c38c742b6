"""FLOPs by hand against those of the compiled program, which XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from common.models.decoder import Decoder, DecoderConfig
from common.models.flops import decoder_flops, seen_keys, token_flops

# Wide, so that products are all that counts, and unrolled: XLA counts the body of a scan once.
WIDE = DecoderConfig(
    vocab_size=600,
    width=128,
    mlp_width=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_layers=1,
    pattern=("global", "local"),
    window=16,
    post_norms=True,
)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_forward_pass_as_the_compiler_counts_it(layers):
    config = dataclasses.replace(WIDE, num_layers=layers, window=64)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def run(state, tokens):
        return nnx.merge(graphdef, state).unrolled()(tokens)

    counted = jax.jit(run).lower(state, tokens).compile().cost_analysis()["flops"]
    assert decoder_flops(config, 2, 64) == pytest.approx(counted, rel=0.06)


def test_keys_that_are_seen():
    brute = sum(min(t + 1, 16) for t in range(40)) / 40
    assert seen_keys(WIDE, "local", 40) == pytest.approx(brute)
    assert seen_keys(WIDE, "global", 40) == pytest.approx(20.5)
    assert seen_keys(WIDE, "global", 40, causal=False) == 40
    both = sum(min(39, t + 15) - max(0, t - 15) + 1 for t in range(40)) / 40
    assert seen_keys(WIDE, "local", 40, causal=False) == pytest.approx(both)


def test_a_token_behind_a_context_sees_two_kinds_of_keys():
    config = dataclasses.replace(WIDE, num_layers=3)
    more = token_flops(config, 101, 16) - token_flops(config, 100, 16)
    assert more == 2 * 2 * 2 * 4 * 32  # two global blocks, two products, four heads of 32
    assert token_flops(config, 100, 17) - token_flops(config, 100, 16) == 2 * 2 * 4 * 32
