"""Which implementation runs where."""

import jax
import jax.numpy as jnp
import pytest

from common.errors import UserError
from common.kernels.dispatch import check_implementation, dispatch, unfit


def xla(x):
    return x + 1.0


def kernel(offset):
    """A stand-in that shows in its result which form ran."""
    return lambda x, *, interpret: x + offset + (0.5 if interpret else 0.0)


def run(name, tpu="none is made", gpu="none is made"):
    function = jax.jit(lambda x: dispatch("k", name, x, xla=xla, tpu=tpu, gpu=gpu))
    return float(function(jnp.zeros(())))


@pytest.mark.parametrize(
    ("name", "expected"), [(None, 1.0), ("xla", 1.0), ("tpu", 10.5), ("gpu", 20.5)]
)
def test_on_a_cpu(name, expected):
    assert run(name, tpu=kernel(10.0), gpu=kernel(20.0)) == expected


@pytest.mark.parametrize(
    ("platform", "number"), [("tpu", "1.0e+01"), ("cuda", "2.0e+01"), ("cpu", "1.0e+00")]
)
def test_the_lowering_decides(platform, number):
    """`implementation=None` follows the platform compiled for, not the one compiled on."""
    function = jax.jit(
        lambda x: dispatch("k", None, x, xla=xla, tpu=kernel(10.0), gpu=kernel(20.0))
    )
    text = function.trace(jnp.zeros(())).lower(lowering_platforms=(platform,)).as_text()
    assert [n for n in ("1.0e+01", "2.0e+01", "1.0e+00") if f"{n[:3]}00000{n[3:]}" in text] == [
        number
    ]


def lowered(platform, **kernels):
    function = jax.jit(lambda x: dispatch("k", None, x, xla=xla, **kernels))
    return function.trace(jnp.zeros(())).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_what_a_kernel_does_not_take_falls_back_with_one_warning(platform):
    kernels = {"tpu": "no room on TPUs", "gpu": "no room on GPUs"}
    with pytest.warns(UserWarning, match="no room") as warned:
        text = lowered(platform, **kernels)
    assert "1.000000e+00" in text
    where = {"tpu": "TPUs", "cuda": "GPUs"}[platform]
    assert [str(w.message) for w in warned] == [
        f"k runs without its kernel, in plain JAX: no room on {where}"
    ]


@pytest.mark.filterwarnings("error")
def test_no_warning_where_no_kernel_is_missing():
    assert run(None, tpu="no room", gpu="no room") == 1.0
    lowered("tpu", tpu=kernel(10.0), gpu="no room")
    lowered("cpu", tpu="no room", gpu="no room")


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_asking_for_what_there_is_not_is_an_error(name):
    with pytest.raises(UserError, match=f"^k has no {name} kernel here: no room"):
        run(name, tpu="no room", gpu="no room")


@pytest.mark.parametrize("transform", [jax.vmap, jax.grad])
def test_fallback_under_transformations(transform):
    def fallback(x):
        return dispatch("k", None, x, xla=jnp.sin, tpu="no room", gpu="no room")

    x = jnp.arange(3.0) if transform is jax.vmap else jnp.float32(1.0)
    text = jax.jit(transform(fallback)).trace(x)
    with pytest.warns(UserWarning, match="no room"):
        text.lower(lowering_platforms=("tpu",))
    expected = jnp.sin(x) if transform is jax.vmap else jnp.cos(x)
    assert jnp.array_equal(transform(fallback)(x), expected)


def test_arrays_that_no_kernel_takes():
    arrays = {
        dtype: jax.ShapeDtypeStruct((2, 3), dtype)
        for dtype in ("float32", "bfloat16", "float16", "int32")
    }
    assert unfit("tpu", arrays["float32"], arrays["bfloat16"], arrays["int32"]) is None
    assert unfit("gpu", arrays["float16"]) is None
    assert unfit("tpu", arrays["float16"]) == "float16 is not one of float32, bfloat16"
    assert unfit("gpu", jax.ShapeDtypeStruct((2, 0), "float32")) == "an array (2, 0) is empty"


def test_unknown_name():
    with pytest.raises(UserError, match="choose one of reference, xla, tpu, gpu, or None"):
        check_implementation("k", "cuda")
