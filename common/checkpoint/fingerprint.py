"""Checksums of arrays that do not depend on how the arrays are sharded.

Each element's bits are multiplied by an odd number made from its position, and everything is added
modulo 2**32. Integer addition commutes, so one device or a pod gets the same number, and each
device reads only its own shard.
"""

import math

import jax
import jax.numpy as jnp


def fingerprints(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Returns a 32-bit checksum for every named array.

    On one device arrays of one shape share a program, whatever tree they are of. On several there
    is one program for all: collectives of programs that run together may wait for each other.
    """
    alone = all(len(leaf.sharding.device_set) == 1 for leaf in leaves.values())
    values = (_each if alone else _together)(leaves)
    return {name: int(value) for name, value in jax.device_get(values).items()}


def _each(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _fingerprint(leaf) for name, leaf in leaves.items()}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    bits = _bits(x)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += iota * jnp.uint32(stride)
    factor = position * jnp.uint32(2654435761)  # Knuth's multiplicative hash.
    factor = (factor ^ (factor >> 15)) | jnp.uint32(1)
    return jnp.sum(bits * factor, dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """Returns the bits of `x` as uint32, with one more dimension where elements are wider."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _bits(jnp.stack([x.real, x.imag], axis=-1))
    width = x.dtype.itemsize
    target = {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, target).astype(jnp.uint32)


_together = jax.jit(_each)
