"""What must not matter: chunking, packing, padding, the length of the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common import generate
from recurrentgemma.model import HAWK_PATTERN, Griffin, GriffinConfig

pytestmark = pytest.mark.usefixtures("highest_precision")

WINDOW = 4
CONFIG = GriffinConfig(
    vocab_size=40,
    width=16,
    mlp_width=24,
    num_heads=2,
    lru_width=24,
    num_layers=5,
    attention_window=WINDOW,
)


def randomised(config: GriffinConfig, seed: int = 0) -> Griffin:
    """A model whose biases and recurrence parameters are random as well."""
    model = Griffin(config, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, noisy))


@pytest.fixture(scope="module")
def model() -> Griffin:
    return randomised(CONFIG)


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def call(model):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda *a: nnx.merge(graphdef, state)(*a))


@pytest.fixture(scope="module")
def extend(model):
    graphdef, state = nnx.split(model)
    return jax.jit(
        lambda tokens, cache, positions=None, valid=None: nnx.merge(graphdef, state).extend(
            tokens, cache, positions, valid
        )
    )


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, pattern=HAWK_PATTERN)])
def test_parameter_count(config):
    model = Griffin(config, rngs=nnx.Rngs(0))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert count == config.num_parameters()


@pytest.mark.parametrize("chunk", [1, 2, 3, WINDOW, WINDOW + 1, 32])
def test_chunks_equal_the_whole(model, call, extend, chunk):
    text = tokens(2, 8 * WINDOW)
    cache, parts = model.init_cache(2), []
    for start in range(0, text.shape[1], chunk):
        logits, cache = extend(text[:, start : start + chunk], cache)
        parts.append(logits)
    near(jnp.concatenate(parts, axis=1), call(text))


@pytest.mark.parametrize("length", [1, 2, 3, WINDOW, WINDOW + 1, WINDOW + 2, 20])
def test_prefill_then_decode_equals_the_whole(model, call, extend, length):
    text = tokens(2, length + 6, seed=length)
    logits, cache = model.prefill(text[:, :length], last_only=True)
    whole = call(text)
    near(logits, whole[:, length - 1])
    for at in range(length, length + 6):
        logits, cache = extend(text[:, at : at + 1], cache)
        near(logits[:, 0], whole[:, at])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [2, 5, 16])
def test_ragged_prompts_equal_each_alone(model, call, extend, side, chunk):
    lengths, width = [1, 2, 3, 7, 16], 16
    rows = [tokens(1, n + 5, seed=n) for n in lengths]
    padded = np.zeros((len(rows), width), np.int32)
    valid = np.zeros((len(rows), width), bool)
    for r, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        padded[r, place] = rows[r][0, :n]
        valid[r, place] = True
    cache, logits = model.init_cache(len(rows)), []
    for start in range(0, width, chunk):
        part = slice(start, start + chunk)
        out, cache = extend(padded[:, part], cache, None, valid[:, part])
        logits.append(out)
    logits = np.concatenate(logits, axis=1)
    for r in range(len(rows)):
        near(logits[r, valid[r]], call(rows[r])[0, : lengths[r]])
    for step in range(5):
        following = jnp.stack([row[0, n + step] for row, n in zip(rows, lengths)])[:, None]
        out, cache = extend(following, cache)
        for r, n in enumerate(lengths):
            near(out[r, 0], call(rows[r])[0, n + step])


def test_left_padding_by_positions(call):
    text = tokens(2, 9)
    for pad in (1, 3, 6):
        padded = jnp.pad(text, ((0, 0), (pad, 0)), constant_values=7)
        positions = jnp.maximum(jnp.arange(9 + pad) - pad, -1)[None].repeat(2, 0)
        near(call(padded, positions)[:, pad:], call(text))


DOCUMENTS = (3, 1, 9, 2)


def packed() -> tuple[jax.Array, jax.Array, jax.Array]:
    positions = jnp.concatenate([jnp.arange(n) for n in DOCUMENTS])[None]
    segments = jnp.concatenate([jnp.full(n, i + 1) for i, n in enumerate(DOCUMENTS)])[None]
    return tokens(1, sum(DOCUMENTS)), positions, segments


@pytest.mark.parametrize("given", ["positions", "segments", "both"])
def test_packed_documents_equal_separate_ones(call, given):
    text, positions, segments = packed()
    together = call(
        text,
        None if given == "segments" else positions,
        None if given == "positions" else segments,
    )
    start = 0
    for n in DOCUMENTS:
        near(together[:, start : start + n], call(text[:, start : start + n]))
        start += n


@pytest.mark.parametrize("last", [1, 2, 3, 6])
@pytest.mark.parametrize("chunk", [4, 5, 64])
def test_decode_behind_packed_prefill(call, extend, model, last, chunk):
    """The last document must not see the earlier ones, however short it still is."""
    before, document = tokens(1, 7), tokens(1, last + 8, seed=last)
    text = jnp.concatenate([before, document[:, :last]], axis=1)
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(last)])[None]
    cache = model.init_cache(1)
    for start in range(0, text.shape[1], chunk):
        part = slice(start, start + chunk)
        logits, cache = extend(text[:, part], cache, positions[:, part])
    whole = call(document)
    near(logits[:, -1], whole[:, last - 1])
    for at in range(last, last + 8):
        logits, cache = extend(document[:, at : at + 1], cache)
        near(logits[:, 0], whole[:, at])


def test_a_stream_may_open_at_a_later_position(call, extend, model):
    text = tokens(1, 9)
    positions = jnp.arange(100, 109)[None]
    whole = call(text, positions)
    cache = model.init_cache(1)
    for at in range(9):
        logits, cache = extend(text[:, at : at + 1], cache, positions[:, at : at + 1])
        near(logits[:, 0], whole[:, at])


def test_cache_is_a_value_that_can_be_forked(model, extend):
    text = tokens(1, 6)
    _, cache = extend(text, model.init_cache(1))
    kept = jax.tree.map(jnp.copy, cache)
    first, _ = extend(jnp.array([[3]]), cache)
    extend(jnp.array([[5]]), cache)
    again, _ = extend(jnp.array([[3]]), kept)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("length", [10, 1000])
def test_cache_size_does_not_depend_on_the_text(model, length):
    cache = jax.eval_shape(lambda: model.init_cache(1))
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.units, cache.rest)))
    recurrent, local = 4, 1
    width, head = CONFIG.lru_width, CONFIG.head_dim
    assert state == 4 * (recurrent * (width + 3 * width) + local * 2 * WINDOW * head)
    grown = jax.eval_shape(lambda: model.extend(jnp.zeros((1, length), int), model.init_cache(1)))[1]
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, cache)


def test_published_state_sizes():
    """Bytes at batch 1 in bf16 (specification 5.1): 17.24 MB for 2B, 26.23 MB for 9B."""
    from recurrentgemma import config

    for preset, megabytes in ((config.recurrentgemma_2b, 17.24), (config.recurrentgemma_9b, 26.23)):
        shape = dataclasses.replace(preset().model, dtype="bfloat16")
        model = nnx.eval_shape(lambda shape=shape: Griffin(shape, rngs=nnx.Rngs(0)))
        cache = jax.eval_shape(lambda model=model: model.init_cache(1))
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.units, cache.rest)))
        assert state / 1e6 == pytest.approx(megabytes, abs=0.01)


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_changes_no_gradient(policy):
    def gradient(remat):
        model = randomised(dataclasses.replace(CONFIG, remat=remat))
        graphdef, state = nnx.split(model)
        text = tokens(2, 12)
        return jax.jit(jax.grad(lambda s: nnx.merge(graphdef, s)(text).var()))(state)

    plain, recomputed = gradient("none"), gradient(policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, recomputed)


def test_bf16_stays_near_fp32():
    half = randomised(dataclasses.replace(CONFIG, dtype="bfloat16"))
    full = randomised(CONFIG)
    text = tokens(2, 64)
    error = jnp.abs(half(text) - full(text)).mean() / jnp.abs(full(text)).mean()
    assert error < 0.05


class TestGenerate:
    def test_ragged_batch_equals_each_alone(self, model):
        prompts = [[3], [5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9], list(range(20))]
        together = generate.generate(model, prompts, max_new_tokens=12, stop=[])
        for prompt, result in zip(prompts, together):
            [alone] = generate.generate(model, [prompt], max_new_tokens=12, stop=[])
            assert alone.tokens == result.tokens
            near(alone.logprobs, result.logprobs)

    def test_greedy_equals_the_full_forward(self, model, call):
        prompt = [4, 8, 15, 16, 23]
        [result] = generate.generate(model, [prompt], max_new_tokens=10, stop=[])
        text = list(prompt)
        for token, logprob in zip(result.tokens, result.logprobs):
            logits = call(jnp.array([text]))[0, -1]
            assert token == int(logits.argmax())
            near(logprob, jax.nn.log_softmax(logits)[token])
            text.append(token)

    def test_prefill_in_chunks(self, model):
        prompts = [list(range(30)), [7, 8]]
        whole = generate.generate(model, prompts, max_new_tokens=5, stop=[])
        for chunk in (1, 4, 7):
            parts = generate.generate(
                model, prompts, max_new_tokens=5, stop=[], prefill_chunk=chunk
            )
            assert [g.tokens for g in parts] == [g.tokens for g in whole]

    def test_each_row_stops_by_itself(self, model):
        prompts = [[3], [5, 6], [1, 2, 3]]
        free = generate.generate(model, prompts, max_new_tokens=12, stop=[])
        stop = free[0].tokens[3]
        stopped = generate.generate(model, prompts, max_new_tokens=12, stop=stop)
        for long, short in zip(free, stopped):
            end = long.tokens.index(stop) + 1 if stop in long.tokens else 12
            assert short.tokens == long.tokens[:end]
            assert len(short.logprobs) == end

    def test_seed_decides_the_draw(self, model):
        def draw(seed, prompts=([3], [5, 6])):
            return [
                g.tokens
                for g in generate.generate(
                    model, prompts, max_new_tokens=16, temperature=1.0, seed=seed, stop=[]
                )
            ]

        assert draw(0) == draw(0)
        assert draw(0) != draw(1)
        assert draw(0, ([3],))[0] == draw(0)[0]

    def test_top_k_one_is_greedy(self, model):
        greedy = generate.generate(model, [[3]], max_new_tokens=8, stop=[])
        one = generate.generate(model, [[3]], max_new_tokens=8, stop=[], temperature=2.0, top_k=1)
        tiny = generate.generate(model, [[3]], max_new_tokens=8, stop=[], temperature=2.0, top_p=1e-6)
        assert greedy[0].tokens == one[0].tokens == tiny[0].tokens
