"""Which implementation runs where."""

import jax
import jax.numpy as jnp
import pytest

from common.errors import UserError
from common.kernels.dispatch import check_implementation, dispatch


def xla(x):
    return x + 1.0


def kernel(offset):
    """A stand-in that shows in its result which form ran."""
    return lambda x, *, interpret: x + offset + (0.5 if interpret else 0.0)


def run(name, **kernels):
    return float(jax.jit(lambda x: dispatch("k", name, x, xla=xla, **kernels))(jnp.zeros(())))


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
    lowered = function.trace(jnp.zeros(())).lower(lowering_platforms=(platform,))
    text = lowered.as_text().lower()
    assert [n for n in ("1.0e+01", "2.0e+01", "1.0e+00") if f"{n[:3]}00000{n[3:]}" in text] == [
        number
    ]


def test_without_a_kernel():
    assert run(None) == 1.0
    with pytest.raises(UserError, match=r"k has no tpu kernel for operands of shapes \(\)"):
        run("tpu")


def test_unknown_name():
    with pytest.raises(UserError, match="choose one of reference, xla, tpu, gpu, or None"):
        check_implementation("k", "cuda")
