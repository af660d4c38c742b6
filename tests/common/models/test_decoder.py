"""Decoders of every family: numbers of the transformers library, and what must not matter.

The goldens are those of transformers 5 in fp32 with eager attention, for the weights of
`sine_decoders`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sine_decoders as sine
from flax import nnx

from common import generate, models
from common.errors import UserError
from common.models import Decoder, DecoderConfig
from common.models.decoder import GEMMA2_PATTERN, GEMMA3_PATTERN
from common.sharding import MeshConfig, make_mesh, use_mesh

pytestmark = pytest.mark.usefixtures("highest_precision")

TOKENS = np.array(
    [
        [40, 30, 25, 13, 15, 2, 4, 1, 9, 39, 31, 43],
        [24, 29, 46, 35, 30, 26, 27, 44, 14, 39, 32, 1],
    ]
)
# logits[0, 0, :4], logits[1, -1, -4:], mean of their sizes, mean loss, greedy text of row 0
GOLDENS = {
    "gemma2": (
        [-1.94896, 1.01451, 0.51262, -1.70934],
        [-0.88222, 1.12265, -1.0613, 0.704],
        1.181848,
        4.511994,
        [45, 40, 33, 4, 4, 4, 4, 4, 4, 4],
    ),
    "gemma3": (
        [-1.13981, 0.57572, 0.15505, -0.84093],
        [-0.00829, 0.76347, -1.29762, 1.45609],
        0.582573,
        3.983683,
        [31, 19, 14, 43, 26, 9, 9, 38, 38, 38],
    ),
    "llama": (
        [-0.24843, 0.05746, 0.15015, -0.31429],
        [-0.31571, 0.40711, -0.38065, 0.24398],
        0.411982,
        3.965119,
        [24, 22, 15, 25, 40, 4, 43, 29, 10, 20],
    ),
    "qwen2": (
        [-0.80416, 0.7332, -0.44997, 0.03646],
        [0.25714, 0.18446, -0.57266, 0.79506],
        0.566872,
        3.90538,
        [43, 43, 43, 43, 43, 43, 43, 43, 43, 43],
    ),
}
# Norms of heads, windows, two rope bases, a remainder behind the scan; a head of its own.
VARIED = ("gemma3", "llama")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sine")
    return {
        name: models.load_decoder(sine.write(folder / name, data))
        for name, data in sine.FAMILIES.items()
    }


@jax.jit
def logits_of(model, tokens, positions=None, segments=None):
    return model(tokens, positions, segments)


@jax.jit
def extended(model, tokens, cache, valid=None):
    return model.extend(tokens, cache, None, valid)


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=tolerance, rtol=0)


def loss_of(model, tokens):
    return model.nll(model.hidden(tokens)[:, :-1], tokens[:, 1:]).mean()


@pytest.mark.parametrize("family", GOLDENS)
def test_golden(loaded, family):
    first, last, mean, loss, text = GOLDENS[family]
    model = loaded[family]
    logits = np.asarray(logits_of(model, TOKENS))
    near(logits[0, 0, :4], first)
    near(logits[1, -1, -4:], last)
    near(np.abs(logits).mean(), mean)
    near(jax.jit(loss_of)(model, jnp.asarray(TOKENS)), loss)
    [generation] = generate.generate(model, TOKENS[:1].tolist(), max_new_tokens=10, stop=[])
    assert generation.tokens == text


@pytest.mark.parametrize("family", GOLDENS)
def test_prefill_chunks_and_single_tokens_equal_the_whole(loaded, family):
    model = loaded[family]
    text = np.random.default_rng(1).integers(0, 48, (2, 21))
    whole = logits_of(model, text)
    logits, cache = jax.jit(lambda m, t: m.prefill(t, max_length=32))(model, text[:, :9])
    parts = [logits]
    for begin, end in [(9, 12), (12, 18), (18, 19), (19, 20), (20, 21)]:
        logits, cache = extended(model, text[:, begin:end], cache)
        parts.append(logits)
    near(np.concatenate(parts, axis=1), whole)


def test_caches_are_rings_of_the_window_and_grow_with_the_text_else(loaded):
    cache = loaded["gemma3"].init_cache(2, 32)
    assert [state.keys.shape[3] for state in cache.units] == [3, 3, 32]
    assert [state.keys.shape[2] for state in cache.rest] == [3]
    assert [state.keys.shape[3] for state in loaded["gemma2"].init_cache(2, 32).units] == [3, 32]


@pytest.mark.parametrize("family", VARIED)
def test_packed_documents_see_nothing_of_each_other(loaded, family):
    model = loaded[family]
    lengths = (3, 1, 9, 6)
    text = np.random.default_rng(2).integers(0, 48, (1, sum(lengths)))
    segments = np.repeat(np.arange(1, 5), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = logits_of(model, text, positions, segments)
    near(logits_of(model, text, None, segments), packed, 0)
    for begin, length in zip(np.cumsum((0, *lengths)), lengths):
        alone = logits_of(model, np.pad(text[:, begin : begin + length], ((0, 0), (0, 9 - length))))
        near(packed[:, begin : begin + length], alone[:, :length])


@pytest.mark.parametrize("family", VARIED)
def test_ragged_prompts_generate_as_each_alone(loaded, family):
    prompts = [TOKENS[0, :n].tolist() for n in (1, 5, 11)]
    together = generate.generate(loaded[family], prompts, max_new_tokens=8, stop=[])
    [alone] = generate.generate(loaded[family], prompts[1:2], max_new_tokens=8, stop=[])
    assert together[1].tokens == alone.tokens
    [alone] = generate.generate(loaded[family], prompts[:1], max_new_tokens=8, stop=[])
    assert together[0].tokens == alone.tokens


@pytest.mark.parametrize("family", VARIED)
def test_mesh_equals_one_device(family, tmp_path):
    """Loaded onto the mesh, the same logits, loss and gradients; decoding too."""
    random = np.random.default_rng(3)
    weights = sine.tensors(sine.FAMILIES[family])
    for name, sines in weights.items():  # In sums of sines much cancels; these keep more digits.
        if sines.ndim > 1:
            weights[name] = (random.normal(size=sines.shape) / 5).astype(np.float32)
    folder = sine.write(tmp_path, sine.FAMILIES[family], weights)
    tokens = jnp.asarray(random.integers(0, 48, (4, 12)))
    graphdef, state = nnx.split(models.load_decoder(folder))

    @jax.jit
    def program(state):
        return jax.value_and_grad(lambda s: loss_of(nnx.merge(graphdef, s), tokens))(state)

    @jax.jit
    def decoded(state):
        model = nnx.merge(graphdef, state)
        logits, cache = model.prefill(tokens[:, :8], max_length=16)
        return logits, model.extend(tokens[:, 8:9], cache)[0]

    want = (*program(state), decoded(state))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    placed = models.load_decoder(folder, mesh=mesh)
    on_mesh = nnx.state(placed)
    kernel = placed.units.blocks[0].attention.q.kernel[...]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    with use_mesh(mesh):
        have = (*program(on_mesh), decoded(on_mesh))
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        near(a, b)


def test_remat_changes_nothing(loaded):
    model = loaded["llama"]
    other = Decoder(dataclasses.replace(model.config, remat="full"), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(model))
    tokens = jnp.asarray(TOKENS)
    gradient = jax.jit(nnx.grad(loss_of))
    have, want = gradient(other, tokens), gradient(model, tokens)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        near(a, b)


@pytest.mark.parametrize("family", GOLDENS)
def test_every_parameter_is_counted_and_has_axes(loaded, family):
    model = loaded[family]
    state = nnx.state(model)
    assert sum(x.size for x in jax.tree.leaves(state)) == model.config.num_parameters()
    for path, variable in nnx.to_flat_state(state):
        stacked = path[0] == "units"
        assert len(variable.get_metadata()["axes"]) == variable.ndim - stacked, path


def test_public_sizes():
    """Parameters of the released models, to the unit (Gemma 2 2B, Gemma 3 1B, Llama 3.2 1B)."""
    gemma2 = DecoderConfig(
        256_000, 2304, 9216, 8, 4, 256, 26, pattern=GEMMA2_PATTERN, window=4096, post_norms=True
    )
    assert gemma2.num_parameters() == 2_614_341_888
    gemma3 = DecoderConfig(
        262_144,
        1152,
        6912,
        4,
        1,
        256,
        26,
        pattern=GEMMA3_PATTERN,
        window=512,
        post_norms=True,
        qk_norm=True,
    )
    assert gemma3.num_parameters() == 999_885_952
    llama = DecoderConfig(128_256, 2048, 8192, 32, 8, 64, 16)
    assert llama.num_parameters() == 1_235_814_400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"num_heads": 3}, "multiple"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"pattern": ("sliding",)}, "'global' or 'local'"),
        ({"pattern": GEMMA2_PATTERN}, "need model.window"),
    ],
)
def test_configuration_refuses(change, message):
    good = DecoderConfig(16, 8, 8, 4, 2, 2, 2)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(good, **change)
