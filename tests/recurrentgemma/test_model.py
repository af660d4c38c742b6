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


# Every test uses these sizes, so that few shapes are compiled.
BATCH, LONGEST = 4, 32


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (BATCH, length))


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def call(model):
    """The full forward on texts of any length: what comes later cannot matter."""
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda *a: nnx.merge(graphdef, state)(*a))

    def padded(x):
        return None if x is None else np.pad(x, ((0, 0), (0, LONGEST - x.shape[1])))

    def call(text, positions=None, segments=None):
        length = text.shape[1]
        return np.asarray(forward(padded(text), padded(positions), padded(segments))[:, :length])

    return call


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
    text = tokens(LONGEST)
    cache, parts = model.init_cache(BATCH), []
    for start in range(0, LONGEST - LONGEST % chunk, chunk):
        logits, cache = extend(text[:, start : start + chunk], cache)
        parts.append(logits)
    for at in range(LONGEST - LONGEST % chunk, LONGEST):
        logits, cache = extend(text[:, at : at + 1], cache)
        parts.append(logits)
    near(jnp.concatenate(parts, axis=1), call(text))


@pytest.mark.parametrize("length", [1, 2, WINDOW, WINDOW + 1, 20])
def test_prefill_then_decode_equals_the_whole(model, call, extend, length):
    text = tokens(length + 6, seed=length)
    logits, cache = jax.jit(lambda m, t: m.prefill(t, last_only=True))(model, text[:, :length])
    whole = call(text)
    near(logits, whole[:, length - 1])
    for at in range(length, length + 6):
        logits, cache = extend(text[:, at : at + 1], cache)
        near(logits[:, 0], whole[:, at])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [2, 5, 16])
def test_ragged_prompts_equal_each_alone(model, call, extend, side, chunk):
    lengths, width = [1, 2, 3, 16], 16
    text = tokens(max(lengths) + 5)
    padded = np.zeros((BATCH, width), np.int32)
    valid = np.zeros((BATCH, width), bool)
    for r, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        padded[r, place] = text[r, :n]
        valid[r, place] = True
    cache, logits = model.init_cache(BATCH), []
    extra = -width % chunk  # whole chunks alone, so that one shape is compiled
    padded, valid = (np.pad(x, ((0, 0), (0, extra))) for x in (padded, valid))
    for start in range(0, width + extra, chunk):
        part = slice(start, start + chunk)
        out, cache = extend(padded[:, part], cache, None, valid[:, part])
        logits.append(out)
    logits, whole = np.concatenate(logits, axis=1), call(text)
    for r, n in enumerate(lengths):
        near(logits[r, valid[r]], whole[r, :n])
    for step in range(5):
        following = np.array([text[r, n + step] for r, n in enumerate(lengths)])[:, None]
        out, cache = extend(following, cache)
        for r, n in enumerate(lengths):
            near(out[r, 0], whole[r, n + step])


@pytest.mark.parametrize("pad", [1, 6])
def test_left_padding_by_positions(call, pad):
    text = tokens(9)
    padded = np.pad(text, ((0, 0), (pad, 0)), constant_values=7)
    positions = np.maximum(np.arange(9 + pad) - pad, -1)[None].repeat(BATCH, 0)
    near(call(padded, positions)[:, pad:], call(text))


DOCUMENTS = (3, 1, 9, 2)


@pytest.mark.parametrize("given", ["positions", "segments", "both"])
def test_packed_documents_equal_separate_ones(call, given):
    text = tokens(sum(DOCUMENTS))
    positions = np.concatenate([np.arange(n) for n in DOCUMENTS])[None].repeat(BATCH, 0)
    segments = np.repeat(np.arange(4) + 1, DOCUMENTS)[None].repeat(BATCH, 0)
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
@pytest.mark.parametrize("chunk", [5, 16])
def test_decode_behind_packed_prefill(call, extend, model, last, chunk):
    """The last document must not see the earlier ones, however short it still is."""
    before = 16 - last
    document = tokens(last + 8, seed=last)
    text = np.concatenate([tokens(before), document[:, :last]], axis=1)
    positions = np.concatenate([np.arange(before), np.arange(last)])[None].repeat(BATCH, 0)
    cache = model.init_cache(BATCH)
    for start in range(0, 16, chunk):
        part = slice(start, start + chunk)
        logits, cache = extend(text[:, part], cache, positions[:, part])
    whole = call(document)
    near(logits[:, -1], whole[:, last - 1])
    for at in range(last, last + 8):
        logits, cache = extend(document[:, at : at + 1], cache)
        near(logits[:, 0], whole[:, at])


def test_a_stream_may_open_at_a_later_position(call, extend, model):
    text = tokens(9)
    positions = np.arange(100, 109)[None].repeat(BATCH, 0)
    whole = call(text, positions)
    cache = model.init_cache(BATCH)
    for at in range(9):
        logits, cache = extend(text[:, at : at + 1], cache, positions[:, at : at + 1])
        near(logits[:, 0], whole[:, at])


def test_cache_is_a_value_that_can_be_forked(model, extend):
    _, cache = extend(tokens(5), model.init_cache(BATCH))
    kept = jax.tree.map(jnp.copy, cache)
    first, _ = extend(np.full((BATCH, 1), 3), cache)
    extend(np.full((BATCH, 1), 5), cache)
    again, _ = extend(np.full((BATCH, 1), 3), kept)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("length", [10, 1000])
def test_cache_size_does_not_depend_on_the_text(model, length):
    cache = jax.eval_shape(lambda: model.init_cache(1))
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.units, cache.rest)))
    recurrent, local = 4, 1
    width, head = CONFIG.lru_width, CONFIG.head_dim
    assert state == 4 * (recurrent * (width + 3 * width) + local * 2 * WINDOW * head)
    grown = jax.eval_shape(lambda: model.extend(jnp.zeros((1, length), int), model.init_cache(1)))[
        1
    ]
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
        text = tokens(12)
        return jax.jit(jax.grad(lambda s: nnx.merge(graphdef, s)(text).var()))(state)

    plain, recomputed = gradient("none"), gradient(policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, recomputed)


def test_bf16_stays_near_fp32():
    half = randomised(dataclasses.replace(CONFIG, dtype="bfloat16"))
    full = randomised(CONFIG)
    text = tokens(64)
    run = jax.jit(lambda m, t: m(t))
    expected = run(full, text)
    assert jnp.abs(run(half, text) - expected).mean() < 0.05 * jnp.abs(expected).mean()


class TestGenerate:
    def test_ragged_batch_equals_each_alone(self, model):
        prompts = [[3], [5, 6], list(range(20))]
        together = generate.generate(model, prompts, max_new_tokens=12, stop=[])
        for prompt, result in zip(prompts, together):
            [alone] = generate.generate(model, [prompt], max_new_tokens=12, stop=[])
            assert alone.tokens == result.tokens
            near(alone.logprobs, result.logprobs)

    def test_greedy_equals_the_full_forward(self, model, call):
        prompt = [4, 8, 15, 16, 23]
        [result] = generate.generate(model, [prompt], max_new_tokens=12, stop=[])
        text = list(prompt)
        for token, logprob in zip(result.tokens, result.logprobs):
            logits = call(np.array([text] * BATCH))[0, -1]
            assert token == int(logits.argmax())
            near(logprob, jax.nn.log_softmax(logits)[token])
            text.append(token)

    def test_prefill_in_chunks(self, model):
        prompts = [list(range(20)), [7, 8]]
        whole = generate.generate(model, prompts, max_new_tokens=12, stop=[])
        parts = generate.generate(model, prompts, max_new_tokens=12, stop=[], prefill_chunk=7)
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
        tiny = generate.generate(
            model, [[3]], max_new_tokens=8, stop=[], temperature=2.0, top_p=1e-6
        )
        assert greedy[0].tokens == one[0].tokens == tiny[0].tokens
