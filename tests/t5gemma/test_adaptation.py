"""Adaptation: a donor's function survives wherever its mask does."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import t5gemma
from common import generate
from common.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from common.errors import UserError
from common.models import Decoder, DecoderConfig
from common.models.decoder import GEMMA2_PATTERN, GEMMA3_PATTERN
from common.sharding import MeshConfig, make_mesh, state_shardings
from common.sharding.rules import DEFAULT_RULES
from t5gemma.adaptation import in_cross_attention

pytestmark = pytest.mark.usefixtures("highest_precision")

VOCAB = 40
SHAPE = {
    "vocab_size": VOCAB,
    "width": 24,
    "mlp_width": 40,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_length": 64,
}
FAMILIES = {
    "gemma2": DecoderConfig(
        **SHAPE,
        num_layers=4,
        pattern=GEMMA2_PATTERN,
        window=4,
        query_scale=0.3,
        attention_softcap=5.0,
        logits_softcap=10.0,
        post_norms=True,
        bfloat16_scale=False,
    ),
    "gemma3": DecoderConfig(
        **SHAPE,
        num_layers=7,
        pattern=GEMMA3_PATTERN,
        window=4,
        rope_base=1e6,
        local_rope_base=1e4,
        qk_norm=True,
        post_norms=True,
    ),
    "llama": DecoderConfig(
        **SHAPE,
        num_layers=2,
        activation="silu",
        tied=False,
        scale_embedding=False,
        zero_centred_norm=False,
        qkv_bias=True,
    ),
}
TOKENS = np.random.default_rng(0).integers(1, VOCAB, (2, 12))
OTHERS = np.random.default_rng(1).integers(1, VOCAB, (2, 9))


def donor(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A decoder all of whose parameters are random."""
    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, noisy))


@jax.jit
def read(model, tokens):
    return model.hidden(tokens)


@jax.jit
def call(model, *tokens):
    return model(*tokens)


def flat(model) -> dict:
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request) -> Decoder:
    return donor(FAMILIES[request.param])


def test_causal_encoder_equals_its_donor(source):
    model = t5gemma.adapt(source, causal_encoder=True)
    # Operation by operation: compiled programs that differ elsewhere may round otherwise here.
    with jax.disable_jit():
        np.testing.assert_array_equal(model.encode(TOKENS), source.hidden(TOKENS))


def test_bidirectional_encoder_sees_what_comes(source):
    model = t5gemma.adapt(source)
    changed = TOKENS.copy()
    changed[:, -1] = TOKENS[:, -1] % (VOCAB - 1) + 1
    encode = jax.jit(lambda model, tokens: model.encode(tokens))
    first, second = encode(model, TOKENS), encode(model, changed)
    assert np.abs(first - second)[:, 0].max() > 1e-3


def test_decoder_without_cross_attention_equals_its_donor(source):
    model = t5gemma.adapt(source, cross="zero")
    with jax.disable_jit():
        np.testing.assert_array_equal(model(TOKENS, OTHERS), source(OTHERS))


def test_cross_attention_is_copied_from_the_same_layer(source):
    model = t5gemma.adapt(source)
    parameters, given = flat(model), flat(source)
    copied = 0
    for path, leaf in parameters.items():
        if in_cross_attention(path):
            path = tuple(p.replace("cross", "attention") if isinstance(p, str) else p for p in path)
            copied += 1
        if path[:2] != ("encoder", "head"):
            np.testing.assert_array_equal(leaf, given[path[1:]])
    assert copied >= 5
    assert np.abs(call(model, TOKENS, OTHERS) - call(source, OTHERS)).max() > 1e-3


def test_donors_of_different_sizes():
    small = FAMILIES["gemma2"]
    wide = dataclasses.replace(small, width=32, head_dim=16, num_layers=2)
    encoder, decoder = donor(wide), donor(small, seed=1)
    model = t5gemma.adapt(encoder, decoder)
    parameters, read_from, written_from = flat(model), flat(encoder), flat(decoder)
    for path, leaf in parameters.items():
        if in_cross_attention(path):
            if path[-1] == "scale":
                assert not np.asarray(leaf).any()
            else:
                assert np.std(leaf) > 0.05
        else:
            source = read_from if path[0] == "encoder" else written_from
            np.testing.assert_array_equal(leaf, source[path[1:]])
    assert model.config.num_parameters() == sum(leaf.size for leaf in parameters.values())
    assert call(model, TOKENS, OTHERS).shape == (2, 9, VOCAB)
    again = t5gemma.adapt(encoder, decoder, seed=1)
    assert not np.array_equal(call(model, TOKENS, OTHERS), call(again, TOKENS, OTHERS))
    still = t5gemma.adapt(encoder, decoder, cross="zero")
    np.testing.assert_allclose(call(still, TOKENS, OTHERS), call(decoder, OTHERS), atol=1e-5)


def test_nothing_is_shared_with_the_donor():
    source = donor(FAMILIES["llama"])
    model = t5gemma.adapt(source)
    before = np.asarray(read(source, TOKENS))
    leaves = jax.tree.leaves(nnx.state(model))
    jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(leaves)
    np.testing.assert_array_equal(read(source, TOKENS), before)


def test_donors_on_a_mesh():
    source = donor(FAMILIES["gemma2"])
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    graphdef, state = nnx.split(source)
    placed = jax.device_put(nnx.to_pure_dict(state), state_shardings(state, mesh, DEFAULT_RULES))
    nnx.replace_by_pure_dict(state, placed)
    model = t5gemma.adapt(nnx.merge(graphdef, state), cross="random")
    whole = t5gemma.adapt(source, cross="random")
    expected = flat(whole)
    for path, leaf in flat(model).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6)
        if in_cross_attention(path) and path[-1] == "kernel":
            assert not leaf.sharding.is_fully_replicated, path


def test_saved_and_loaded(tmp_path):
    model = t5gemma.adapt(donor(FAMILIES["llama"]), donor(FAMILIES["gemma3"]))
    t5gemma.save(model, tmp_path / "model")
    again = t5gemma.load(tmp_path / "model")
    assert again.config == model.config
    np.testing.assert_array_equal(call(again, TOKENS, OTHERS), call(model, TOKENS, OTHERS))
    with pytest.raises(UserError, match="has post_norms True: a model whose encoder has False"):
        t5gemma.save(model, tmp_path / "exported", format="huggingface")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("gemma2", "wide"), {"cross": "copy"}, "24 wide and the decoder 32; use cross='random'"),
        (("gemma2",), {"cross": "off"}, "one of copy, random, zero, not 'off'"),
        (("gemma2", "bfloat16"), {}, "must be the same"),
    ],
)
def test_donors_that_do_not_fit(arguments, options, message):
    shapes = FAMILIES | {
        "wide": dataclasses.replace(FAMILIES["gemma2"], width=32),
        "bfloat16": dataclasses.replace(FAMILIES["gemma2"], dtype="bfloat16"),
    }
    donors = [Decoder(shapes[name], rngs=nnx.Rngs(0)) for name in arguments]
    with pytest.raises(UserError, match=message):
        t5gemma.adapt(*donors, **options)


class Words(ByteTokenizer):
    """A tokenizer without a beginning, whose padding is its end (SmolLM2's)."""

    bos_id, eos_id, pad_id = -1, 3, 3
    stop_tokens = (3,)


def test_tokenizer_and_special_tokens_come_along():
    source = Decoder(dataclasses.replace(FAMILIES["llama"], vocab_size=260), rngs=nnx.Rngs(0))
    source.tokenizer, source.stop_tokens = Words(), (3,)
    model = t5gemma.adapt(source)
    assert model.tokenizer is source.tokenizer
    assert (model.stop_tokens, model.config.bos_token, model.config.pad_token) == ((3,), 3, -1)
    assert generate.generate(model, ["abc", "a"], max_new_tokens=3)[0].text is not None
    other = Decoder(source.config, rngs=nnx.Rngs(0))
    other.tokenizer = SentencePieceTokenizer.train(["some words and more"] * 20, 275)
    with pytest.raises(UserError, match="tokenizers differ"):
        t5gemma.adapt(other, source)


def test_only_decoders_are_donors():
    with pytest.raises(UserError, match=r"must be a decoder of common\.models"):
        t5gemma.adapt(t5gemma.adapt(donor(FAMILIES["llama"])))


def test_adapt_stays_a_function_beside_the_launcher(tmp_path):
    """Whether or not, and before or after, `t5gemma.adapt` is imported as the launcher it is."""
    (tmp_path / "adapt.py").write_text("def main(): return 'launched'\n")
    program = f"""
import importlib, t5gemma
before = t5gemma.adapt
t5gemma.__path__.insert(0, {str(tmp_path)!r})
module = importlib.import_module("t5gemma.adapt")
from t5gemma.adapt import main
from t5gemma import adapt
assert main() == "launched" and module.main is main
assert callable(t5gemma.adapt) and t5gemma.adapt is before is adapt
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"JAX_PLATFORMS": "cpu"})
