"""Random operands of `linear_scan`, and the recurrence with its gradient in float64."""

import numpy as np


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    batch, _, width = shape
    return {
        "a": rng.uniform(0.2, 1.0, shape),
        "x": rng.normal(size=shape),
        "h0": rng.normal(size=(batch, width)),
        "dh": rng.normal(size=shape),
        "dh_last": rng.normal(size=(batch, width)),
    }


def oracle(a, x, h0, dh, dh_last, reverse):
    """Runs the recurrence and its gradient in float64, one step after the other."""
    if reverse:
        turned = (value[:, ::-1] for value in (a, x))
        h, h_last, da, dx, dh0 = oracle(*turned, h0, dh[:, ::-1], dh_last, False)
        return h[:, ::-1], h_last, da[:, ::-1], dx[:, ::-1], dh0
    states = [h0]
    for t in range(x.shape[1]):
        states.append(a[:, t] * states[-1] + x[:, t])
    da, dx, carry = np.zeros_like(a), np.zeros_like(x), dh_last
    for t in reversed(range(x.shape[1])):
        dx[:, t] = carry + dh[:, t]
        da[:, t] = dx[:, t] * states[t]
        carry = a[:, t] * dx[:, t]
    return np.stack(states[1:], axis=1), states[-1], da, dx, carry
