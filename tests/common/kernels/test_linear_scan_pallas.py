"""The TPU and GPU kernels in Pallas' interpreter, against a float64 oracle; sequences in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from linear_scan_oracle import draw, oracle

from common.errors import UserError
from common.kernels import linear_scan
from common.kernels.linear_scan import gpu, tpu, xla
from common.sharding import per_shard, use_mesh

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16

# Shape, direction, dtypes of a and x, blocks: edges that no block divides, blocks with one step
# left over, several blocks in time and width, one step, one channel.
TPU_CASES = [
    ((1, 1, 1), False, F32, F32, None),
    ((3, 7, 5), True, F32, BF16, None),
    ((1, 130, 130), False, F32, F32, tpu.Blocks(16, 128, 16)),
    ((1, 40, 5), True, F32, BF16, tpu.Blocks(32, 128, 16)),
    ((2, 64, 256), True, F32, F32, tpu.Blocks(32, 128, 16)),
    ((1, 33, 5), False, BF16, BF16, tpu.Blocks(16, 128, 16)),
    ((2, 32, 128), False, BF16, F32, tpu.Blocks(16, 128, 16)),
]
GPU_CASES = [
    ((1, 1, 1), False, F32, F32, None),
    ((3, 7, 5), True, F32, BF16, None),
    ((1, 130, 130), False, F32, F32, gpu.Blocks(64, 2, 3)),
    ((1, 23, 5), True, BF16, BF16, gpu.Blocks(4, 2, 1)),
    ((2, 24, 32), True, F32, F16, gpu.Blocks(16, 2, 4)),
    ((1, 2, 8), False, BF16, F32, gpu.Blocks(8, 4, 3)),
]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The interpreter's unrolled loops take XLA longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def operands(shape, a_dtype, x_dtype, seed=0):
    """Returns the arguments, and the same numbers, rounded as they are, in float64."""
    a, x, h0, dh, dh_last = (jnp.asarray(value, F32) for value in draw(shape, seed).values())
    arrays = [a.astype(a_dtype), x.astype(x_dtype), h0, dh.astype(x_dtype), dh_last]
    return arrays, [np.asarray(array, np.float64) for array in arrays]


def check_kernel(module, shape, reverse, a_dtype, x_dtype, blocks):
    (a, x, h0, dh, dh_last), exact = operands(shape, a_dtype, x_dtype)
    static = {"interpret": True, "blocks": blocks}
    h, h_last = module.forward(a, x, h0, reverse=reverse, **static)
    da, dx, dh0 = module.backward(a, h, h0, dh, dh_last, reverse=reverse, **static)
    want = dict(zip(("h", "h_last", "da", "dx", "dh0"), oracle(*exact, reverse), strict=True))
    # The gradient of a is that of the stored, rounded states.
    entering, stored = exact[2][:, None], np.asarray(h, np.float64)
    parts = [stored[:, 1:], entering] if reverse else [entering, stored[:, :-1]]
    want["da"] = want["dx"] * np.concatenate(parts, axis=1)
    have = {"h": h, "h_last": h_last, "da": da, "dx": dx, "dh0": dh0}
    dtypes = {"h": x_dtype, "h_last": F32, "da": a_dtype, "dx": x_dtype, "dh0": F32}
    assert {name: value.dtype for name, value in have.items()} == dtypes
    for name, value in have.items():
        rounding = float(jnp.finfo(dtypes[name]).eps)
        tolerance = {"rtol": rounding, "atol": rounding / 100} if rounding > 1e-5 else {}
        np.testing.assert_allclose(
            np.asarray(value, np.float64), want[name], err_msg=name,
            **(tolerance or {"rtol": 2e-5, "atol": 2e-5}),
        )  # fmt: skip


@pytest.mark.parametrize(("shape", "reverse", "a_dtype", "x_dtype", "blocks"), TPU_CASES)
def test_tpu_kernels_equal_oracle(shape, reverse, a_dtype, x_dtype, blocks):
    check_kernel(tpu, shape, reverse, a_dtype, x_dtype, blocks)


@pytest.mark.parametrize(("shape", "reverse", "a_dtype", "x_dtype", "blocks"), GPU_CASES)
def test_gpu_kernels_equal_oracle(shape, reverse, a_dtype, x_dtype, blocks):
    check_kernel(gpu, shape, reverse, a_dtype, x_dtype, blocks)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("summary", "length"),
    [
        (xla.summary, 37),
        (functools.partial(tpu.summary, interpret=True, blocks=tpu.Blocks(16, 128, 16)), 37),
        (functools.partial(gpu.summary, interpret=True, blocks=gpu.Blocks(4, 3, 2)), 9),
    ],
    ids=["xla", "tpu", "gpu"],
)
def test_summary_says_what_a_sequence_does_to_a_state(summary, length, reverse):
    (a, x, h0, dh, dh_last), exact = operands((2, length, 5), F32, F32)
    product, last = summary(a, x, reverse=reverse, decayed=False)
    _, h_last, _, _, dh0 = oracle(*exact, reverse)
    np.testing.assert_allclose(product * h0 + last, h_last, rtol=1e-5, atol=1e-5)
    product, last = summary(a, dh, reverse=not reverse, decayed=True)
    np.testing.assert_allclose(product * dh_last + last, dh0, rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_smoke_linear_scan_kernels_reset_exactly(form):
    """Through the public function: values, gradients, and nothing that passes a decay of zero."""
    values = draw((1, 12, 4))
    values["a"][:, 5] = 0.0
    values["dh"][:, :5] = 0.0
    a, x, h0, dh, dh_last = (jnp.asarray(value, F32) for value in values.values())

    @jax.jit
    def run(a, x, h0):
        outputs, pullback = jax.vjp(functools.partial(linear_scan, implementation=form), a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    for have, want in zip(run(a, x, h0), oracle(*values.values(), False), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
    h, h_last, *_, dh0 = run(a, x, h0 * 1e30)
    np.testing.assert_array_equal(h[:, 5:], run(a, x, h0)[0][:, 5:])
    np.testing.assert_array_equal(h_last, run(a, x, h0)[1])
    np.testing.assert_array_equal(dh0, np.zeros((1, 4)))


@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_vmap_over_a_leading_axis(form):
    stacked = [draw((2, 6, 5), seed) for seed in range(2)]
    values = {name: np.stack([one[name] for one in stacked]) for name in stacked[0]}

    @jax.jit
    @jax.vmap
    def mapped(a, x, h0, dh, dh_last):
        outputs, pullback = jax.vjp(functools.partial(linear_scan, implementation=form), a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    results = mapped(*(jnp.asarray(value, F32) for value in values.values()))
    for i, have in enumerate(zip(*results, strict=True)):
        for value, expected in zip(have, oracle(*stacked[i].values(), False), strict=True):
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)


def test_a_kernel_refuses_dtypes_it_does_not_have():
    a = jnp.ones((1, 2, 3), F16)
    with pytest.raises(UserError, match="no tpu kernel"):
        linear_scan(a, a, implementation="tpu")


# --- The sequence over several devices. ---

WIDE, FLAT = ("batch", "seq", "lru"), ("batch", "lru")


def mesh_of_eight():
    axes = ("data", "tensor", "context")
    return jax.make_mesh((2, 1, 4), axes, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("form", "reverse"),
    [("reference", False), ("xla", True), (None, False), ("tpu", True), ("gpu", False)],
)
def test_sequence_over_devices_equals_one_device(form, reverse):
    values = draw((2, 12, 4))

    @jax.jit
    def both(a, x, h0, dh, dh_last):
        function = functools.partial(linear_scan, reverse=reverse, implementation=form)

        def scan(*arguments):
            return per_shard(function, arguments, (WIDE, WIDE, FLAT), (WIDE, FLAT), sequence="seq")

        outputs, pullback = jax.vjp(scan, a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    with use_mesh(mesh_of_eight()):
        have = both(*(jnp.asarray(value, F32) for value in values.values()))
    assert have[0].sharding.spec == P("data", "context")
    names = ("h", "h_last", "da", "dx", "dh0")
    for name, value, want in zip(names, have, oracle(*values.values(), reverse), strict=True):
        np.testing.assert_allclose(value, want, rtol=2e-5, atol=2e-5, err_msg=name)


def test_batch_width_and_sequence_over_devices():
    values = draw((2, 10, 6))
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "context"), axis_types=(AxisType.Auto,) * 3)

    @jax.jit
    def both(a, x, h0, dh, dh_last):
        def scan(*arguments):
            return per_shard(
                linear_scan, arguments, (WIDE, WIDE, FLAT), (WIDE, FLAT), sequence="seq"
            )

        outputs, pullback = jax.vjp(scan, a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    arguments = [jnp.asarray(value, F32) for value in values.values()]
    with use_mesh(mesh):
        compiled = both.lower(*arguments).compile()
        have = compiled(*arguments)
    assert have[0].sharding.spec == P("data", "context", "tensor")
    for value, want in zip(have, oracle(*values.values(), False), strict=True):
        np.testing.assert_allclose(value, want, rtol=2e-5, atol=2e-5)


def test_sequence_over_devices_with_checked_variance():
    values = draw((2, 12, 4))
    whole, state = P("data", "context"), P("data")
    mapped = jax.shard_map(
        functools.partial(linear_scan, axis_name="context"),
        mesh=mesh_of_eight(), in_specs=(whole, whole, state), out_specs=(whole, state),
    )  # fmt: skip

    @jax.jit
    def both(a, x, h0, dh, dh_last):
        outputs, pullback = jax.vjp(mapped, a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    have = both(*(jnp.asarray(value, F32) for value in values.values()))
    for value, want in zip(have, oracle(*values.values(), False), strict=True):
        np.testing.assert_allclose(value, want, rtol=2e-5, atol=2e-5)
