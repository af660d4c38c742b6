"""`rg_lru` against a float64 oracle: values, all gradients, dtypes, transforms, sharding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from common.kernels import rg_lru
from common.kernels.rg_lru import gpu, tpu

FORMS = ["reference", "xla", "tpu", "gpu"]
NAMES = ("h", "h_last", "dv", "d_gate_x", "d_gate_a", "d_a_param", "dh0")
INPUTS = ("v", "gate_x", "gate_a", "a_param", "h0")


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch):
    """What a device does ahead or unrolled only adds to the interpreter's compilations."""
    monkeypatch.setattr(tpu, "_UNROLL", 1)
    for cut in (gpu._FORWARD, gpu._BACKWARD):
        monkeypatch.setitem(cut, "steps", 2)


def draw(shape, seed=0, dtype=np.float32):
    """Inputs and cotangents, exact in `dtype`; decays from 1 (Lambda = -40) to nearly 0."""
    rng = np.random.default_rng(seed)
    batch, length, width = shape
    values = {
        "v": rng.normal(size=shape),
        "gate_x": 3 * rng.normal(size=shape),
        "gate_a": 3 * rng.normal(size=shape),
        "a_param": rng.permutation(np.append(np.linspace(-12, 5, width - 1), -40.0)),
        "h0": rng.normal(size=(batch, width)),
        "reset": rng.random((batch, length)) < 0.1,
        "valid": rng.random((batch, length)) < 0.9,
        "dh": rng.normal(size=shape),
        "dh_last": rng.normal(size=(batch, width)),
    }
    narrow = ("v", "gate_x", "gate_a", "dh")
    for name, value in values.items():
        if value.dtype != bool:
            kept = jnp.asarray(value, dtype if name in narrow else jnp.float32)
            values[name] = np.asarray(kept, np.float64)
    return values


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def oracle(v, gate_x, gate_a, a_param, h0, reset, valid, dh, dh_last):
    """One step after the other in float64, forwards and then backwards."""
    i, r = sigmoid(gate_x), sigmoid(gate_a)
    rate = 8.0 * np.log1p(np.exp(a_param))
    log_a = -r * rate
    square = -np.expm1(2.0 * log_a)
    started = reset[..., None]
    a = np.where(started, 0.0, np.exp(log_a))
    m = np.where(started, 1.0, np.sqrt(square))
    states = [h0]
    for t in range(v.shape[1]):
        stepped = a[:, t] * states[-1] + m[:, t] * i[:, t] * v[:, t]
        states.append(np.where(valid[:, t, None], stepped, states[-1]))

    dv, di, dr = (np.zeros_like(v) for _ in range(3))
    d_rate, carry = np.zeros_like(a_param), dh_last
    for t in reversed(range(v.shape[1])):
        g = dh[:, t] + carry
        real = valid[:, t, None]
        dv[:, t] = np.where(real, g * m[:, t] * i[:, t], 0.0)
        di[:, t] = np.where(real, g * m[:, t] * v[:, t], 0.0)
        slope = np.minimum(0.5 / np.sqrt(np.maximum(square[:, t], 1e-300)), 1000.0)
        d_log_a = g * states[t] * a[:, t] - g * i[:, t] * v[:, t] * slope * 2.0 * a[:, t] ** 2
        d_log_a = np.where(real & ~reset[:, t, None], d_log_a, 0.0)
        dr[:, t] = -d_log_a * rate
        d_rate = d_rate - np.sum(d_log_a * r[:, t], axis=0)
        carry = np.where(real, a[:, t] * g, g)
    h = np.stack(states[1:], axis=1)
    d_gate_x, d_gate_a = di * i * (1.0 - i), dr * r * (1.0 - r)
    return h, states[-1], dv, d_gate_x, d_gate_a, d_rate * 8.0 * sigmoid(a_param), carry


@functools.partial(jax.jit, static_argnums=0)
def both(form, v, gate_x, gate_a, a_param, h0, reset, valid, dh, dh_last):
    """Returns what the oracle returns, of one implementation."""

    def function(*inputs):
        return rg_lru(*inputs, reset=reset, valid=valid, implementation=form)

    outputs, pullback = jax.vjp(function, v, gate_x, gate_a, a_param, h0)
    return *outputs, *pullback((dh, dh_last))


def run(form, values, dtype=jnp.float32, gate_dtype=None):
    gate_dtype = gate_dtype or dtype
    kinds = {"v": dtype, "dh": dtype, "gate_x": gate_dtype, "gate_a": gate_dtype}
    kinds |= {"reset": bool, "valid": bool}
    return both(form, *(jnp.asarray(x, kinds.get(n, jnp.float32)) for n, x in values.items()))


def assert_near(have, want, tolerance):
    for name, value, expected in zip(NAMES, have, want, strict=True):
        error = np.max(np.abs(np.asarray(value, np.float64) - expected))
        assert error <= tolerance * max(1.0, np.max(np.abs(expected))), (name, error)


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_smoke_rg_lru_values_and_gradients(form):
    values = draw((2, 9, 5))
    assert_near(run(form, values), oracle(**values), 1e-5)


# One step; less than a block; several ragged blocks of time and channels, several stretches.
@pytest.mark.parametrize("shape", [(3, 1, 5), (1, 70, 130), (2, 300, 130)])
@pytest.mark.parametrize("form", FORMS[1:])
def test_equals_oracle(form, shape):
    values = draw(shape, seed=1)
    assert_near(run(form, values), oracle(**values), 2e-5)


def test_tpu_kernel_reads_nothing_uninitialised():
    """A simulated TPU whose memory is NaN until written, over blocks that hang over both edges."""
    values = draw((1, 200, 130), seed=2)
    kinds = {"reset": bool, "valid": bool}
    arrays = {n: jnp.asarray(x, kinds.get(n, jnp.float32)) for n, x in values.items()}
    *inputs, dh, dh_last = arrays.values()
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    h, h_last = tpu.forward(*inputs, interpret=simulated)
    gradients = tpu.backward(*inputs, h, dh, dh_last, interpret=simulated)
    assert_near((h, h_last, *gradients), oracle(**values), 2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_multiplier_keeps_its_digits_near_one(form):
    """h = m i v of a first step; 1 - exp(2 log a) would lose all of m at the end of the range."""
    width = 64
    values = draw((1, 1, width))
    values["a_param"] = np.linspace(-40, 6, width, dtype=np.float32).astype(np.float64)
    values["v"] = 1.0 + np.abs(values["v"])
    values["reset"][:], values["valid"][:], values["h0"] = False, True, np.zeros((1, width))
    inputs = [jnp.asarray(values[name], jnp.float32) for name in INPUTS]
    reset = jnp.zeros((1, 1), bool)
    h, _ = jax.jit(lambda *x: rg_lru(*x, reset=reset, implementation=form))(*inputs)
    np.testing.assert_allclose(h, oracle(**values)[0], rtol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_where_the_decay_is_one(form):
    values = draw((1, 40, 6))
    values["a_param"][:] = -200.0  # softplus underflows, a = 1, m = 0
    have = run(form, values)
    assert all(np.isfinite(np.asarray(x)).all() for x in have)
    assert_near(have, oracle(**values), 1e-5)


@pytest.mark.parametrize(
    ("form", "gate_dtype"),
    [("xla", jnp.float32), ("tpu", jnp.bfloat16), ("tpu", jnp.float32), ("gpu", jnp.bfloat16)],
)
def test_bfloat16_keeps_gates_and_state_in_float32(form, gate_dtype):
    values = draw((1, 100, 7), dtype=jnp.bfloat16)
    have = run(form, values, jnp.bfloat16, gate_dtype)
    half, full = jnp.bfloat16, jnp.float32
    assert [x.dtype for x in have] == [half, full, half, gate_dtype, gate_dtype, full, full]
    want = oracle(**values)
    np.testing.assert_allclose(have[1], want[1], rtol=1e-5, atol=1e-5)
    assert_near(have, want, 0.01)


@pytest.mark.parametrize("form", ["xla", "tpu", "gpu"])
def test_resets_forget_exactly_and_padding_holds_exactly(form):
    values = draw((1, 40, 6))
    values["reset"][:], values["valid"][:] = False, True
    values["reset"][:, 17] = True
    values["valid"][:, 30:] = False
    values["v"][:, 30:] = np.nan
    h, h_last, *_ = run(form, values)
    other = {**values, "v": np.where(np.arange(40)[:, None] < 17, 7.0, values["v"])}
    other["h0"] = values["h0"] + 1e30
    np.testing.assert_array_equal(h[:, 17:], run(form, other)[0][:, 17:])
    np.testing.assert_array_equal(h[:, 30:], np.repeat(h[:, 29:30], 10, axis=1))
    np.testing.assert_array_equal(h_last, h[:, -1])


def test_absent_arguments():
    values = draw((2, 9, 3))
    inputs = [jnp.asarray(values[name], jnp.float32) for name in INPUTS[:4]]
    reset = jnp.arange(9)[None] == 0
    have = rg_lru(*inputs, reset=reset)
    every = jnp.ones((2, 9), bool)
    want = rg_lru(*inputs, jnp.zeros((2, 3)), reset=reset & every, valid=every)
    for a, b in zip(have, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", ["xla", "tpu", "gpu"])
def test_vmap(form):
    stacked = [draw((1, 12, 4), seed) for seed in range(2)]
    arrays = [jnp.asarray(np.stack([s[name] for s in stacked])) for name in stacked[0]]
    have = jax.jit(jax.vmap(functools.partial(both, form)))(*arrays)
    for k, values in enumerate(stacked):
        assert_near([x[k] for x in have], oracle(**values), 1e-5)


def loss_of(sharded):
    """Sum of weighted outputs and its gradients, of a function of inputs and masks."""

    def loss(*operands):
        h, h_last = sharded(*operands)
        weights = jnp.cos(jnp.arange(h.size, dtype=jnp.float32)).reshape(h.shape)
        return jnp.sum(h * weights) + jnp.sum(h_last)

    return jax.jit(jax.value_and_grad(loss, argnums=range(5)))


@pytest.mark.parametrize("axis", ["batch", "time"])
def test_sharded_equals_one_device(axis):
    """Rows are independent; along time, devices pass on the state that reaches the next one."""
    mesh = jax.make_mesh((4, 2), ("spread", "lru"), axis_types=(AxisType.Auto,) * 2)
    values = draw((4, 24, 6), seed=3)
    values["reset"][1:, :] = False  # one row with documents, three whose state goes all the way
    operands = [jnp.asarray(values[name], jnp.float32) for name in INPUTS]
    masks = [jnp.asarray(values[name]) for name in ("reset", "valid")]
    row, step = ("spread", None) if axis == "batch" else (None, "spread")
    wide, flat = P(row, step, "lru"), P(row, "lru")

    def function(v, gate_x, gate_a, a_param, h0, reset, valid, axis_name=None):
        inputs = v, gate_x, gate_a, a_param, h0
        return rg_lru(*inputs, reset=reset, valid=valid, axis_name=axis_name)

    sharded = jax.shard_map(
        lambda *x: function(*x, axis_name=step),
        mesh=mesh,
        in_specs=(wide, wide, wide, P("lru"), flat, P(row, step), P(row, step)),
        out_specs=(wide, flat),
        check_vma=False,
    )
    (have, have_gradients), (want, want_gradients) = (
        loss_of(f)(*operands, *masks) for f in (sharded, function)
    )
    np.testing.assert_allclose(have, want, rtol=1e-5)
    for a, b in zip(have_gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_platform_is_chosen_at_lowering():
    """A CPU runs one loop each way and no kernel; a TPU runs one kernel each way and no loop."""
    values = draw((2, 16, 8))
    operands = [jnp.asarray(values[name], jnp.float32) for name in INPUTS]
    traced = loss_of(lambda *x: rg_lru(*x, reset=jnp.zeros((2, 16), bool))).trace(*operands)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    assert "stablehlo.while" not in text
    compiled = traced.lower().compile().as_text()
    assert len(re.findall(r" while\(", compiled)) == 2
    assert "custom-call" not in compiled
    assert "conditional" not in compiled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_a": (2, 3, 5)}, "of one shape"),
        ({"v": (3, 4), "gate_x": (3, 4), "gate_a": (3, 4)}, r"\[B, L, E\]"),
        ({"a_param": (5,)}, r"a_param of shape \(4,\)"),
        ({"h0": (2, 3)}, r"h0 of shape \(2, 4\)"),
        ({"reset": (3, 2)}, "reset of shape"),
        ({"v": (2, 0, 4), "gate_x": (2, 0, 4), "gate_a": (2, 0, 4)}, "at least one step"),
    ],
)
def test_mistakes_are_named(changes, message):
    shapes = dict.fromkeys(INPUTS[:3], (2, 3, 4)) | {"a_param": (4,), "h0": (2, 4)}
    shapes |= {"reset": (2, 3)} | changes
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=message):
        rg_lru(**{**arrays, "reset": arrays["reset"].astype(bool)})


def test_wrong_kinds_are_named():
    wide, flat, reset = jnp.zeros((1, 2, 3)), jnp.zeros(3), jnp.zeros((1, 2), bool)
    with pytest.raises(UserError, match="v is int32"):
        rg_lru(wide.astype(jnp.int32), wide, wide, flat, reset=reset)
    with pytest.raises(UserError, match="dtype bool"):
        rg_lru(wide, wide, wide, flat, reset=reset.astype(jnp.int32))
    with pytest.raises(UserError, match="no implementation 'cuda'"):
        rg_lru(wide, wide, wide, flat, reset=reset, implementation="cuda")
