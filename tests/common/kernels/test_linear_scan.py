"""`linear_scan` against a float64 oracle: values, gradients, dtypes, transforms, sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from linear_scan_oracle import draw, oracle

from common.errors import UserError
from common.kernels import linear_scan
from common.kernels.linear_scan import xla

SHAPES = [(2, 1, 3), (1, 2, 1), (1, 37, 5), (3, 64, 8), (2, 131, 7)]
FORMS = ["reference", "xla", "chunked"]


def run(form, values, reverse, dtype=jnp.float32):
    """Returns `(h, h_last, da, dx, dh0)` of one form."""
    a, x, h0, dh, dh_last = (jnp.asarray(value, jnp.float32) for value in values.values())
    a, x, dh = (value.astype(dtype) for value in (a, x, dh))

    @jax.jit
    def both(a, x, h0, dh, dh_last):
        if form == "chunked":
            h, h_last = xla.chunked_forward(a, x, h0, reverse=reverse)
            return h, h_last, *xla.chunked_backward(a, h, h0, dh, dh_last, reverse=reverse)

        def scan(a, x, h0):
            return linear_scan(a, x, h0, reverse=reverse, implementation=form)

        outputs, pullback = jax.vjp(scan, a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    return both(a, x, h0, dh, dh_last)


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_smoke_linear_scan_values_and_gradients(form):
    values = draw((2, 20, 4))
    for have, want in zip(run(form, values, False), oracle(*values.values(), False), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_oracle(form, shape, reverse):
    values = draw(shape)
    names = ("h", "h_last", "da", "dx", "dh0")
    want = oracle(*values.values(), reverse)
    for name, have, expected in zip(names, run(form, values, reverse), want, strict=True):
        np.testing.assert_allclose(have, expected, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_keeps_a_float32_state(form):
    values = draw((2, 300, 4))
    # Decays that bfloat16 holds exactly, so that all error is that of the state.
    values["a"] = np.round(values["a"] * 128) / 128
    values["x"] = np.asarray(jnp.asarray(values["x"], jnp.bfloat16), np.float64)
    have = run(form, values, False, jnp.bfloat16)
    want = oracle(*values.values(), False)
    assert [value.dtype for value in have] == [
        jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32,
    ]  # fmt: skip
    np.testing.assert_allclose(have[1], want[1], rtol=1e-5, atol=1e-5)
    for value, expected in zip(have, want, strict=True):
        np.testing.assert_allclose(np.asarray(value, np.float32), expected, rtol=0.02, atol=0.05)


def test_decay_may_be_wider_than_input():
    values = draw((2, 30, 4))
    a, x = jnp.asarray(values["a"], jnp.float32), jnp.asarray(values["x"], jnp.bfloat16)
    (h, h_last), pullback = jax.vjp(linear_scan, a, x)
    da, dx = pullback((jnp.ones_like(h), jnp.ones_like(h_last)))
    assert (h.dtype, h_last.dtype) == (jnp.bfloat16, jnp.float32)
    assert (da.dtype, dx.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_zero_decay_resets_exactly(form):
    values = draw((1, 40, 6))
    values["a"][:, 17] = 0.0
    values["dh"][:, :17] = 0.0
    values["h0"] *= 1e30
    tail = {name: value[:, 17:] for name, value in values.items() if value.ndim == 3}
    tail = {**draw((1, 23, 6)), **tail, "h0": np.zeros((1, 6))}
    whole, alone = run(form, values, False), run(form, tail, False)
    if form == "chunked":  # Its chunks begin elsewhere, and with them the order of rounding.
        np.testing.assert_allclose(whole[0][:, 17:], alone[0], rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(whole[0][:, 17:], alone[0])
    np.testing.assert_array_equal(whole[-1], np.zeros((1, 6)))


def test_absent_initial_state_is_zero():
    values = draw((2, 9, 3))
    a, x = (jnp.asarray(values[name], jnp.float32) for name in ("a", "x"))
    for have, want in zip(linear_scan(a, x), linear_scan(a, x, jnp.zeros((2, 3))), strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0)])
def test_nothing_to_scan(shape):
    h, h_last = linear_scan(jnp.ones(shape), jnp.ones(shape))
    assert (h.shape, h_last.shape) == (shape, shape[::2])


def test_vmap_over_leading_axes():
    stacked = [draw((2, 33, 5), seed) for seed in range(3)]
    values = {name: np.stack([one[name] for one in stacked]) for name in stacked[0]}
    a, x, h0, dh, dh_last = (jnp.asarray(value, jnp.float32) for value in values.values())

    @jax.jit
    @jax.vmap
    def mapped(a, x, h0, dh, dh_last):
        outputs, pullback = jax.vjp(linear_scan, a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    for i, have in enumerate(zip(*mapped(a, x, h0, dh, dh_last), strict=True)):
        for value, expected in zip(have, oracle(*stacked[i].values(), False), strict=True):
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)


def test_loop_updates_its_buffer_in_place():
    values = draw((4, 96, 32))
    a, x, h0, dh, dh_last = (jnp.asarray(value, jnp.float32) for value in values.values())
    programs = {
        "forward": (lambda a, x, h0: linear_scan(a, x, h0), (a, x, h0)),
        "backward": (
            lambda *operands: xla.backward(*operands, reverse=False), (a, x, h0, dh, dh_last),
        ),
    }  # fmt: skip
    for name, (program, operands) in programs.items():
        text = jax.jit(program).lower(*operands).compile().as_text()
        assert "conditional" not in text, f"{name}: the platform was not resolved"
        copies = re.findall(r"f32\[4,96,32\]\S* copy\(", text)
        assert not copies, f"{name}: XLA copies whole arrays"


def test_platform_is_chosen_at_lowering():
    a = jnp.ones((2, 64, 8))
    traced = jax.jit(lambda a, x: linear_scan(a, x)[0]).trace(a, a)

    def lowered(platform):
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert lowered("cpu").count("stablehlo.while") == 1
    assert lowered("rocm").count("stablehlo.while") == 2, "others get the two-level scan"
    assert "tpu_custom_call" in lowered("tpu")


def mesh_of_eight():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("form", ["xla", "chunked"])
def test_sharded_equals_one_device_without_gathering(form):
    values = draw((4, 50, 6))
    mesh = mesh_of_eight()
    wide = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    flat = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    operands = [
        jax.device_put(jnp.asarray(value, jnp.float32), wide if value.ndim == 3 else flat)
        for value in values.values()
    ]

    def both(a, x, h0, dh, dh_last):
        if form == "chunked":
            h, h_last = xla.chunked_forward(a, x, h0, reverse=False)
            return h, h_last, *xla.chunked_backward(a, h, h0, dh, dh_last, reverse=False)
        outputs, pullback = jax.vjp(linear_scan, a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    compiled = jax.jit(both).lower(*operands).compile()
    assert not re.findall(r"(all-gather|all-to-all|all-reduce)\(", compiled.as_text())
    have = compiled(*operands)
    assert have[0].sharding.is_equivalent_to(wide, 3)
    for value, expected in zip(have, oracle(*values.values(), False), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)


def test_inside_a_rematerialised_sharded_layer_stack():
    mesh = mesh_of_eight()
    sharding = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (4, 512, 6)), sharding)
    scale = jnp.linspace(0.5, 1.5, 6)

    def loss(scale, x):
        @jax.checkpoint
        def layer(x, _):
            h, _ = linear_scan(jax.nn.sigmoid(x * scale), x)
            return jnp.tanh(h), None

        return jnp.mean(jax.lax.scan(layer, x, None, length=3)[0] ** 2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = grad.lower(scale, x).compile()
    assert not re.findall(r"\[(?:4|2),512,6\]\S* all-gather", compiled.as_text())
    alone = grad(scale, jax.device_put(np.asarray(x), jax.devices()[0]))
    for have, want in zip(compiled(scale, x), alone, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-6)


def test_under_shard_map():
    mesh = mesh_of_eight()
    spec = P(("data", "fsdp"), None, "tensor")
    values = draw((4, 21, 6))
    a, x = (jnp.asarray(values[name], jnp.float32) for name in ("a", "x"))
    mapped = jax.shard_map(
        lambda a, x: linear_scan(a, x)[0], mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    have = jax.jit(jax.grad(lambda a, x: jnp.sum(mapped(a, x)), argnums=(0, 1)))(a, x)
    want = jax.grad(lambda a, x: jnp.sum(linear_scan(a, x)[0]), argnums=(0, 1))(a, x)
    for value, expected in zip(have, want, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "x", "h0", "options", "message"),
    [
        ((2, 3, 4), (2, 3, 5), None, {}, "one shape"),
        ((3, 4), (3, 4), None, {}, r"\[B, L, D\]"),
        ((2, 0, 4), (2, 0, 4), None, {}, "L = 0"),
        ((2, 3, 4), (2, 3, 4), (2, 3), {}, r"h0 of shape \(2, 4\)"),
        ((2, 3, 4), (2, 3, 4), None, {"implementation": "fast"}, "no implementation 'fast'"),
    ],
)
def test_mistakes_are_named(a, x, h0, options, message):
    h0 = None if h0 is None else jnp.zeros(h0)
    with pytest.raises(UserError, match=message):
        linear_scan(jnp.zeros(a), jnp.zeros(x), h0, **options)


def test_integers_are_refused():
    with pytest.raises(UserError, match="x is int32"):
        linear_scan(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3), jnp.int32))
