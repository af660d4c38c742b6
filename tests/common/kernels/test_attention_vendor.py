"""The vendor's attention: when it is taken, and that the same call computes the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.kernels import attention, tuning
from common.kernels.attention import vendor
from common.kernels.attention.options import Options

CAUSAL = Options(0.25, None, None, 0)


def arrays(keys=12, heads=(4, 2), width=16, dtype=jnp.bfloat16):
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, length, n, width), dtype)
        for i, (length, n) in enumerate([(12, heads[0]), (keys, heads[1]), (keys, heads[1])])
    )
    return q, k, v


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A GPU whose table prefers the vendor near 12 keys."""
    entry = {
        "device": tuning.device_name(jax.devices()[0]),
        "kernel": "route",
        "dtype": "bfloat16",
        "shape": {"T": 12, "S": 12, "W": 12, "h": 16},
        "blocks": {"route": vendor.VENDOR},
    }
    (tmp_path / "tuning.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(vendor, "__file__", str(tmp_path / "vendor.py"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(
    ("options", "keys", "arguments"),
    [
        (CAUSAL, 12, {"causal": True}),
        (Options(0.25, None, None, None), 7, {}),
        (Options(0.25, None, 3, 0), 12, {"window": 4}),
    ],
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_the_same_call_computes_the_same(options, keys, arguments, heads):
    q, k, v = arrays(keys, heads)
    assert vendor.unfit(options, q, k) is None
    want = attention(q, k, v, scale=0.25, implementation="reference", **arguments)
    have = vendor.attention(options, q, k, v, implementation="xla")
    np.testing.assert_allclose(
        have.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize(
    ("options", "changes", "why"),
    [
        (Options(0.25, 50.0, None, 0), {}, "no soft cap"),
        (CAUSAL, {"dtype": jnp.float32}, "not a 16-bit dtype"),
        (CAUSAL, {"width": 256}, "head width 256"),
        (CAUSAL, {"width": 20}, "head width 20"),
        (CAUSAL, {"keys": 13}, "12 queries do not stand at 13 keys"),
        (Options(0.25, None, 3, 3), {}, "no keys ahead"),
        (Options(0.25, None, 3, None), {}, "no keys ahead"),
    ],
)
def test_what_it_does_not_compute(on_a_gpu, options, changes, why):
    q, k, _ = arrays(**changes)
    assert why in vendor.unfit(options, q, k)
    assert not vendor.preferred(options, q, k, None, None, None)


def test_it_is_taken_where_the_table_says_so(on_a_gpu):
    q, k, _ = arrays()
    assert vendor.preferred(CAUSAL, q, k, None, None, None)
    assert not vendor.preferred(CAUSAL, q, k, jnp.ones((1, 1, 12, 12), bool), None, None)
    assert not vendor.preferred(CAUSAL, q, k, None, (None, None), None)
    far = jnp.concatenate([q] * 100, axis=1)
    assert not vendor.preferred(CAUSAL, far, jnp.concatenate([k] * 100, axis=1), None, None, None)


def test_it_is_not_taken_without_a_gpu():
    q, k, _ = arrays()
    with tuning.trial({}) as trial:
        assert not vendor.preferred(CAUSAL, q, k, None, None, None)
    assert not trial.asked


def test_the_search_learns_that_there_is_no_third_way(on_a_gpu):
    q, k, _ = arrays()
    with tuning.trial({}) as trial:
        vendor.preferred(CAUSAL, q, k, None, None, None)
    [question] = trial.asked
    with tuning.trial({question: {"route": 3}}), pytest.raises(UserError, match="not 3"):
        vendor.preferred(CAUSAL, q, k, None, None, None)
