"""Rotary positions: angles of the unscaled and scaled frequencies."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from common.nn.rope import RopeScaling, rope


def angles(position, width, **options):
    """The angle that each pair is turned by, from what becomes of (1, 0)."""
    x = jnp.concatenate([jnp.ones(width // 2), jnp.zeros(width // 2)])[None, None, None]
    y = rope(x, jnp.array([[position]]), **options)[0, 0, 0]
    return np.arctan2(y[width // 2 :], y[: width // 2])


def test_frequencies():
    np.testing.assert_allclose(angles(1, 8, base=16.0), [1, 0.5, 0.25, 0.125], rtol=1e-6)


def test_linear_scaling_divides():
    scaling = RopeScaling("linear", factor=8.0)
    np.testing.assert_allclose(
        angles(2, 8, base=16.0, scaling=scaling), np.array([2, 1, 0.5, 0.25]) / 8, rtol=1e-6
    )


def test_llama3_scaling_keeps_short_waves_and_divides_long_ones():
    # Wavelengths 2 pi, 20 pi, 200 pi, 2000 pi against bounds 100 and 1000 of a text of 1000.
    scaling = RopeScaling("llama3", 8.0, 1.0, 10.0, 1000)
    turned = angles(1, 8, base=10_000.0, scaling=scaling)
    turns = 1000 * 0.01 / (2 * math.pi)
    smooth = (turns - 1) / 9
    between = 0.01 * (smooth + (1 - smooth) / 8)
    np.testing.assert_allclose(turned, [1, 0.1, between, 0.001 / 8], rtol=1e-5)


def test_scaling_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="positive factor"):
        RopeScaling(factor=0.0)
    with pytest.raises(ValueError, match="high_frequency_factor"):
        RopeScaling("llama3", low_frequency_factor=4.0, high_frequency_factor=4.0)
