"""Dense and block-diagonal linear maps with fp32 accumulation."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.param import Axes, Initializer, fan_in_normal, param, zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x [..., D] @ kernel [D, ...]` with operands in `dtype` and an fp32 sum; returns fp32.

    Asking for the fp32 result keeps the accumulator visible to what is fused behind it. The
    gradient is written out because JAX's own multiplies the fp32 cotangent with the `dtype`
    operand, which accelerators do at fp32 speed, and forms the kernel's gradient transposed.
    """
    return _dot(x.astype(dtype), kernel.astype(dtype), (x.ndim - 1,), (0,))


def _product_forward(x, kernel, dtype):
    return product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype, operands, g):
    x, kernel = operands
    dx, d_kernel = product_gradients(x, kernel, g, dtype)
    return dx.astype(x.dtype), d_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def product_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `product` with respect to `x` and `kernel`, both fp32, for the cotangent `g`."""
    g = g.astype(dtype)
    trailing = tuple(range(1, kernel.ndim))
    dx = _dot(g, kernel.astype(dtype), tuple(range(x.ndim - 1, g.ndim)), trailing)
    return dx, _sum_of_outer(x.astype(dtype), g, x.ndim - 1)


def _dot(
    a: jax.Array, b: jax.Array, contract_a: tuple[int, ...], contract_b: tuple[int, ...]
) -> jax.Array:
    dimensions = ((contract_a, contract_b), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _sum_of_outer(a: jax.Array, b: jax.Array, tokens: int) -> jax.Array:
    """`a [..., m]`, `b [..., n]` -> `[m, n]` summed over the first `tokens` axes.

    XLA's CPU backend transposes the first operand of such a product in memory. In fp32 that is made
    the smaller one, and the small result turned instead; in 16 bits the backend lacks that form.
    """
    axes = tuple(range(tokens))
    if a.size <= b.size or a.dtype != jnp.float32:
        return _dot(a, b, axes, axes)
    turned = _dot(b, a, axes, axes)
    return jnp.moveaxis(turned, tuple(range(b.ndim - tokens)), tuple(range(tokens - b.ndim, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tied_product(x: jax.Array, table: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x [..., D] @ table.T` for a `table [V, D]`, as `product`; returns fp32.

    A function of its own, because `product(x, table.T)` would have a gradient in transposed form,
    which XLA's CPU backend cannot run with 16-bit operands and an fp32 sum.
    """
    return _dot(x.astype(dtype), table.astype(dtype), (x.ndim - 1,), (1,))


def _tied_forward(x, table, dtype):
    return tied_product(x, table, dtype), (x, table)


def _tied_backward(dtype, operands, g):
    x, table = operands
    g = g.astype(dtype)
    dx = _dot(g, table.astype(dtype), (g.ndim - 1,), (0,))
    d_table = _sum_of_outer(g, x.astype(dtype), x.ndim - 1)
    return dx.astype(x.dtype), d_table.astype(table.dtype)


tied_product.defvjp(_tied_forward, _tied_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def block_product(x: jax.Array, w: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x [..., H, m]`, `w [H, m, n]` -> `[..., H, n]` fp32, block by block; else as `product`.

    Block-major operands are the form of batched product that every backend runs at full speed. Axes
    before the blocks stay as they are: merged, they would be gathered where a mesh divides two.
    """
    y = _per_block(_block_major(x, dtype), w.astype(dtype), 1)
    return jnp.moveaxis(y, 0, -2)


def _block_forward(x, w, dtype):
    return block_product(x, w, dtype), (x, w)


def _block_backward(dtype, operands, g):
    x, w = operands
    g = _block_major(g, dtype)
    dx = jnp.moveaxis(_per_block(g, w.astype(dtype), 2), 0, -2)
    tokens = tuple(range(1, x.ndim - 1))
    dimensions = ((tokens, tokens), ((0,), (0,)))
    dw = jax.lax.dot_general(
        _block_major(x, dtype), g, dimensions, preferred_element_type=jnp.float32
    )
    return dx.astype(x.dtype), dw.astype(w.dtype)


block_product.defvjp(_block_forward, _block_backward)


def _block_major(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.moveaxis(x.astype(dtype), -2, 0)


def _per_block(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    dimensions = (((x.ndim - 1,), (contracted,)), ((0,), (0,)))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """`y = x W + b` with `kernel [in, out]`, optional `bias [out]`, computed in `dtype`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: Axes,
        use_bias: bool = False,
        init: Initializer | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = param(rngs, init or fan_in_normal(), (in_features, out_features), axes)
        self.bias = param(rngs, zeros, (out_features,), (axes[-1],)) if use_bias else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., out]` in the compute dtype."""
        y = product(x, self.kernel[...], self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)


class BlockDiagonalLinear(nnx.Module):
    """H independent maps of width E/H: `y[h] = x[h] w[h] + b[h]` (Griffin, section 2.4).

    `w [H, E/H, E/H]` is stored (block, in, out); `b [H, E/H]`.
    """

    def __init__(
        self,
        width: int,
        num_blocks: int,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width % num_blocks:
            raise ValueError(f"width {width} is not a multiple of {num_blocks} gate blocks")
        block = width // num_blocks
        self.num_blocks = num_blocks
        init = fan_in_normal(batch_axis=(0,))
        self.w = param(rngs, init, (num_blocks, block, block), ("lru", None, None))
        self.b = param(rngs, zeros, (num_blocks, block), ("lru", None))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., E] -> [..., E]`, returned in fp32 for the gates that follow."""
        blocks = x.reshape(*x.shape[:-1], self.num_blocks, x.shape[-1] // self.num_blocks)
        y = block_product(blocks, self.w[...], self.dtype) + self.b[...].astype(jnp.float32)
        return y.reshape(x.shape)
