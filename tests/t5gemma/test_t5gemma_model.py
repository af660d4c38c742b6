"""What must not matter: caching, chunking, packing, padding, the number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_model import CONFIG, randomised

from common.errors import UserError
from common.nn.cross_attention import CrossStates
from common.sharding import DEFAULT_RULES, MeshConfig, make_mesh, state_shardings, use_mesh
from t5gemma.model import T5Gemma, T5GemmaConfig

pytestmark = pytest.mark.usefixtures("highest_precision")

WINDOW = 4
# Three decoder layers: a whole pair, and one behind the stack.
SHAPE = CONFIG.with_stacks(window=WINDOW, max_length=64)
SHAPE = dataclasses.replace(SHAPE, decoder=dataclasses.replace(SHAPE.decoder, num_layers=3))
BATCH, SOURCE, TARGET = 4, 16, 12
LENGTHS, TARGET_LENGTHS = [16, 7, 1, 11], [5, 12, 9, 1]


@pytest.fixture(scope="module")
def model() -> T5Gemma:
    return randomised(SHAPE)


@pytest.fixture(scope="module")
def call(model):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda *tokens, **options: nnx.merge(graphdef, state)(*tokens, **options))


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=tolerance, rtol=0)


def drawn(lengths, width, seed, side="right") -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, some of them 0, and where they are real."""
    rng = np.random.default_rng(seed)
    valid = np.arange(width)[None] < np.asarray(lengths)[:, None]
    valid = valid if side == "right" else valid[:, ::-1]
    return rng.integers(0, 40, valid.shape).astype(np.int32), valid


SOURCES, SOURCE_VALID = drawn(LENGTHS, SOURCE, 1)
TARGETS, TARGET_VALID = drawn(TARGET_LENGTHS, TARGET, 2)
SOURCES[0, 3] = TARGETS[1, 2] = 0  # Real ones.


@pytest.fixture(scope="module")
def expected(call):
    """Logits of right-padded rows."""
    logits = call(SOURCES, TARGETS, encoder_valid=SOURCE_VALID, decoder_valid=TARGET_VALID)
    return np.asarray(logits)


def test_each_row_alone(call, expected):
    for row in (1, 2):
        read, written = SOURCES[row, SOURCE_VALID[row]], TARGETS[row, TARGET_VALID[row]]
        alone = call(
            read[None],
            written[None],
            encoder_valid=np.ones((1, len(read)), bool),
            decoder_valid=np.ones((1, len(written)), bool),
        )
        near(alone[0], expected[row, TARGET_VALID[row]])


def test_what_padding_holds_does_not_matter(call, expected):
    noise = np.random.default_rng(3).integers(0, 40, (BATCH, SOURCE)).astype(np.int32)
    logits = call(
        np.where(SOURCE_VALID, SOURCES, noise),
        np.where(TARGET_VALID, TARGETS, noise[:, :TARGET]),
        encoder_valid=SOURCE_VALID,
        decoder_valid=TARGET_VALID,
    )
    near(np.asarray(logits)[TARGET_VALID], expected[TARGET_VALID], 0)


def test_left_padding(call, expected):
    sources, source_valid = np.zeros_like(SOURCES), SOURCE_VALID[:, ::-1]
    targets, target_valid = np.zeros_like(TARGETS), TARGET_VALID[:, ::-1]
    sources[source_valid] = SOURCES[SOURCE_VALID]
    targets[target_valid] = TARGETS[TARGET_VALID]
    logits = call(sources, targets, encoder_valid=source_valid, decoder_valid=target_valid)
    near(np.asarray(logits)[target_valid], expected[TARGET_VALID])


def test_padding_told_by_tokens(call, expected):
    sources = np.where(SOURCE_VALID, np.maximum(SOURCES, 1), 0)
    targets = np.where(TARGET_VALID, np.maximum(TARGETS, 1), 0)
    told = call(sources, targets, encoder_valid=SOURCE_VALID, decoder_valid=TARGET_VALID)
    near(call(sources, targets), told, 0)
    # A token 0 that is said to be real is read.
    assert np.abs(np.asarray(told) - expected)[TARGET_VALID].max() > 1e-3


def test_packed_rows_equal_separate_ones(call, expected):
    """Rows 1 and 3, then 2, share a row: segments on both sides, and padding behind them."""
    order = (1, 3)
    sources, source_segments = np.zeros((2, 1, SOURCE + 4), np.int32)
    targets, target_segments = np.zeros((2, 1, TARGET + 2), np.int32)
    at, to, places = 0, 0, {}
    for segment, row in enumerate(order, 1):
        read, written = SOURCES[row, SOURCE_VALID[row]], TARGETS[row, TARGET_VALID[row]]
        sources[0, at : at + len(read)] = read
        source_segments[0, at : at + len(read)] = segment
        targets[0, to : to + len(written)] = written
        target_segments[0, to : to + len(written)] = segment
        places[row] = slice(to, to + len(written))
        at, to = at + len(read), to + len(written)
    logits = call(
        sources, targets, encoder_segments=source_segments, decoder_segments=target_segments
    )
    for row, place in places.items():
        near(logits[0, place], expected[row, TARGET_VALID[row]])


def test_given_positions_are_used(call):
    positions = np.broadcast_to(np.arange(SOURCE, dtype=np.int32), SOURCES.shape)
    valid = np.ones_like(SOURCE_VALID)
    plain = call(SOURCES, TARGETS, encoder_valid=valid, decoder_valid=TARGET_VALID)
    given = {"encoder_valid": valid, "decoder_valid": TARGET_VALID}
    near(call(SOURCES, TARGETS, encoder_positions=positions, **given), plain, 0)
    # Rotations are relative, so that only distances count.
    near(call(SOURCES, TARGETS, encoder_positions=positions + 5, **given), plain)
    apart = call(SOURCES, TARGETS, encoder_positions=2 * positions, **given)
    assert np.abs(np.asarray(apart - plain))[TARGET_VALID].max() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chunks", [(1,) * TARGET, (TARGET,), (5, 1, 6)])
def test_cached_decoding_equals_the_whole(model, expected, chunks, side):
    """T and S above the window; rows of several lengths, padded on either side."""
    sources, source_valid = SOURCES, SOURCE_VALID
    if side == "left":
        source_valid = SOURCE_VALID[:, ::-1]
        sources = np.full_like(SOURCES, 9)
        sources[source_valid] = SOURCES[SOURCE_VALID]
    graphdef, state = nnx.split(model)
    read = jax.jit(lambda *a: nnx.merge(graphdef, state).read(*a, max_length=TARGET))
    extend = jax.jit(lambda *a: nnx.merge(graphdef, state).decoder.extend(*a))
    cache, outs, at = read(sources, source_valid), [], 0
    for size in chunks:
        part = slice(at, at + size)
        valid = None if size == 1 else TARGET_VALID[:, part]
        logits, cache = extend(TARGETS[:, part], cache, None, valid)
        outs.append(logits)
        at += size
    near(np.concatenate(outs, axis=1)[TARGET_VALID], expected[TARGET_VALID])


def test_unrolled_decoding(model, expected):
    cache = model.read(SOURCES, SOURCE_VALID, max_length=TARGET).unrolled()
    decoder = model.decoder.unrolled()
    extend = jax.jit(lambda decoder, *a: decoder.extend(*a))
    for t in range(3):
        logits, cache = extend(decoder, TARGETS[:, t : t + 1], cache)
        near(logits[:, 0][TARGET_VALID[:, t]], expected[:, t][TARGET_VALID[:, t]])


def test_rows_that_share_what_was_read(model, expected):
    """Several texts of one row go on from its one copy of the encoder's keys."""
    cache = model.read(SOURCES, SOURCE_VALID, max_length=TARGET)
    twice = cache.take_rows(jnp.repeat(jnp.arange(BATCH), 2))
    assert twice.rest[0].memory.keys.shape[0] == BATCH
    assert twice.rest[0].own.keys.shape[0] == 2 * BATCH
    tokens = np.stack([TARGETS, (TARGETS + 1) % 40], axis=1).reshape(2 * BATCH, TARGET)
    graphdef, state = nnx.split(model)
    extend = jax.jit(lambda *a: nnx.merge(graphdef, state).decoder.extend(*a))
    chunk, _ = extend(tokens[:, :4], twice)
    outs, cache = [], twice
    for t in range(4):
        logits, cache = extend(tokens[:, t : t + 1], cache)
        outs.append(logits)
    near(np.concatenate(outs, axis=1), chunk)
    real = TARGET_VALID[:, :4]
    near(np.asarray(chunk)[::2][real], expected[:, :4][real])


def test_empty_cache_has_the_right_size(model):
    cache = model.read(SOURCES, SOURCE_VALID, max_length=TARGET)
    local, whole = cache.units
    assert local.own.keys.shape == (1, BATCH, 2, WINDOW - 1, 8)
    assert whole.own.keys.shape == (1, BATCH, 2, TARGET, 8)
    # Cross attention is never windowed.
    assert local.memory.keys.shape == whole.memory.keys.shape == (1, BATCH, 2, SOURCE, 8)


def loss_and_gradient(config: T5GemmaConfig):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0))))

    def loss(state):
        model = nnx.merge(graphdef, state)
        hidden = model.hidden(
            SOURCES, TARGETS, encoder_valid=SOURCE_VALID, decoder_valid=TARGET_VALID
        )
        nll = model.nll(hidden, (TARGETS * 7) % 40, chunk=4)
        return jnp.sum(jnp.where(TARGET_VALID, nll, 0.0))

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def plain(model):
    return loss_and_gradient(SHAPE)(nnx.state(model))


def test_recomputation_changes_nothing(model, plain):
    again = loss_and_gradient(SHAPE.with_stacks(remat="full"))(nnx.state(model))
    jax.tree.map(lambda x, y: near(x, y, 5e-5), again, plain)


@pytest.mark.parametrize(
    "sizes",
    [
        # More parts than key heads: each device gets a copy of the one that it needs.
        MeshConfig(data=1, fsdp=2, tensor=4),
        MeshConfig(data=2, context=4),
    ],
)
def test_eight_devices_equal_one(model, plain, sizes):
    state = nnx.state(model)
    value, gradient = plain
    mesh = make_mesh(sizes, jax.devices()[:8])
    placed = jax.device_put(nnx.to_pure_dict(state), state_shardings(state, mesh, DEFAULT_RULES))
    spread = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(spread, placed)
    with use_mesh(mesh):
        values, gradients = loss_and_gradient(SHAPE)(spread)
    near(values, value, 2e-4)
    for have, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_states_adds_up_in_full_precision(model):
    """In bfloat16, what each decoder layer adds is not rounded away (specification, 8.5)."""
    deep = dataclasses.replace(SHAPE.decoder, num_layers=2)
    config = dataclasses.replace(SHAPE, decoder=deep).with_stacks(dtype="bfloat16")
    graphdef, state = nnx.split(randomised(config))

    def memory_gradient(state):
        model = nnx.merge(graphdef, state)

        def loss(states):
            layout = model._layout(jnp.asarray(TARGETS), None, None, TARGET_VALID, -2)
            segments = jnp.where(SOURCE_VALID, 0, -1)
            memory = CrossStates(states, segments, layout.segments)
            hidden, _ = model.decoder.run(jnp.asarray(TARGETS), layout, None, memory)
            return jnp.sum(hidden.astype(jnp.float32) ** 2)

        return jax.grad(loss)(jnp.ones((BATCH, SOURCE, 32), jnp.float32))

    gradient = jax.jit(memory_gradient)(state)
    assert gradient.dtype == jnp.float32
    rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    assert (np.asarray(gradient) != np.asarray(rounded)).mean() > 0.5


def test_features_do_not_look_ahead(model):
    """What predicts target t depends on no later one."""
    graphdef, state = nnx.split(model)
    read = jnp.asarray(SOURCES[:1])

    def hidden(written):
        ones = jnp.ones((1, SOURCE), bool), jnp.ones((1, TARGET), bool)
        model = nnx.merge(graphdef, state)
        return model.hidden(read, written, encoder_valid=ones[0], decoder_valid=ones[1])

    run = jax.jit(hidden)
    first = run(jnp.asarray(TARGETS[:1]))
    changed = TARGETS[:1].copy()
    changed[0, 6:] = (changed[0, 6:] + 1) % 40
    second = run(jnp.asarray(changed))
    near(second[0, :6], first[0, :6], 0)
    assert (np.abs(np.asarray(second - first))[0, 6:].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_window": "wide"}, "must be 'published' or 'transformers'"),
        ({"bos_token": 40}, "must be a token of the decoder's, 0...39, not 40"),
        ({"pad_token": 2}, "other than model.bos_token"),
        ({"encoder": dataclasses.replace(SHAPE.encoder, dtype="bfloat16")}, "must be the same"),
    ],
)
def test_bad_shapes(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SHAPE, **changes)
