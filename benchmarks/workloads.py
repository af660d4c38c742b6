"""What the kernels are measured and tuned on: arrays as the public models have them.

A `Workload` is one kernel in one direction on arrays of one shape, with what a user would run
instead. `of(kernel)` lists those of a kernel; `tiny` ones have the same code paths and no size.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.nearest_centroid import full_matrix
from common import kernels

Program = Callable[..., Any]
# Products of float32 are three of TF32, each at half the rate of 16 bits.
_FLOAT32_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Workload:
    """One kernel on arrays of one shape.

    Attributes:
        kernel: Its name, as `of` takes it.
        direction: "forward", or "backward": the gradients of all operands, residuals given.
        setting: Shapes and options, for a table.
        operands: Makes the arrays.
        ours: Returns our function of the operands in an implementation.
        peers: Other functions of the same operands, by name.
        flops: Operations of matrix units, nominal; 0 where memory decides.
        passes: Products of 16 bits that one of these operands costs.
    """

    kernel: str
    direction: str
    setting: str
    operands: Callable[[], tuple[Any, ...]]
    ours: Callable[[str | None], Program]
    peers: Mapping[str, Program]
    flops: float = 0.0
    passes: int = 1

    @property
    def name(self) -> str:
        """For a table: kernel, direction and setting."""
        return f"{self.kernel} {self.direction} {self.setting}"

    def prepare(self, function: Program) -> tuple[Program, tuple[Any, ...]]:
        """Returns the program to time, and its operands."""
        operands = self.operands()
        if self.direction == "forward":
            return function, operands
        # A pullback is a tree of its residuals, so that a compiled program takes it.
        outputs, pullback = jax.vjp(jax.jit(function), *operands)
        leaves, tree = jax.tree.flatten(outputs)
        keys = jax.random.split(jax.random.key(9), len(leaves))
        cotangents = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves)]
        return lambda pullback, cotangents: pullback(cotangents), (
            pullback,
            jax.tree.unflatten(tree, cotangents),
        )

    def bytes_moved(self) -> int:
        """Returns the bytes that our form must read and write: all operands and all results."""
        operands, function = jax.eval_shape(self.operands), self.ours(None)
        if self.direction == "forward":
            return _bytes((operands, jax.eval_shape(function, *operands)))
        outputs, pullback = jax.eval_shape(lambda *x: jax.vjp(function, *x), *operands)
        return _bytes((pullback, outputs, operands))  # the last two like cotangents and gradients


def of(kernel: str, *, tiny: bool = False) -> list[Workload]:
    """Returns the workloads of a kernel, one of `KERNELS`."""
    return _WORKLOADS[kernel](tiny)


def error(have: Any, want: Any) -> float:
    """Returns the largest relative difference of any result; of indices, the share that differs."""
    found = [0.0]
    for ours, theirs in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(ours.dtype, jnp.integer):
            found.append(float(jnp.mean(ours != theirs)))
            continue
        ours, theirs = (x.astype(jnp.float32).reshape(-1) for x in (ours, theirs))
        size = jnp.maximum(jnp.linalg.norm(theirs), 1e-30)
        found.append(float(jnp.linalg.norm(ours - theirs) / size))
    return float(np.max(found))  # NaN if any is


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _normal(*shapes: tuple[int, ...], dtype: Any) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes))


def _both(kernel: str, **fields: Any) -> list[Workload]:
    """Returns a workload in both directions; the backward has 2.5 times the products."""
    forward = Workload(kernel, "forward", **fields)
    backward = dataclasses.replace(forward, direction="backward", flops=2.5 * forward.flops)
    return [forward, backward]


def associative_scan(a: jax.Array, x: jax.Array) -> jax.Array:
    """Runs `h_t = a_t h_{t-1} + x_t` as JAX's documentation would, `[B, L, D]`."""

    def combine(earlier: tuple, later: tuple) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(combine, (a, x.astype(a.dtype)), axis=1)[1].astype(x.dtype)


def _linear_scan(tiny: bool) -> list[Workload]:
    shape = (2, 10, 128) if tiny else (8, 4096, 2560)
    found = []
    for dtype in (jnp.float32,) if tiny else (jnp.float32, jnp.bfloat16):

        def operands(dtype: Any = dtype) -> tuple[jax.Array, ...]:
            a = jax.random.uniform(jax.random.key(1), shape, minval=0.8, maxval=0.999)
            return a, *_normal(shape, dtype=dtype)

        found += _both(
            "linear_scan",
            setting=f"{list(shape)} a float32, x {jnp.dtype(dtype).name}",
            operands=operands,
            ours=lambda form: lambda a, x: kernels.linear_scan(a, x, implementation=form)[0],
            peers={"associative_scan": associative_scan},
        )
    return found


def _rg_lru(tiny: bool) -> list[Workload]:
    shape = (2, 10, 128) if tiny else (4, 8192, 2560)

    def operands() -> tuple[jax.Array, ...]:
        return *_normal(*[shape] * 3, dtype=jnp.bfloat16), jnp.linspace(-1.0, 1.0, shape[-1])

    def ours(form: str | None) -> Program:
        starts = jnp.zeros((1, shape[1]), bool).at[:, 0].set(True)
        return lambda *inputs: kernels.rg_lru(*inputs, reset=starts, implementation=form)[0]

    def unfused(v: jax.Array, gate_x: jax.Array, gate_a: jax.Array, rate: jax.Array) -> jax.Array:
        gated, r = (jax.nn.sigmoid(gate.astype(jnp.float32)) for gate in (gate_x, gate_a))
        log_a = -8.0 * r * jax.nn.softplus(rate)
        scale = jnp.sqrt(-jnp.expm1(2 * log_a)).at[:, 0].set(1.0)
        x = scale * gated * v.astype(jnp.float32)
        return associative_scan(jnp.exp(log_a), x).astype(v.dtype)

    return _both(
        "rg_lru",
        setting=f"{list(shape)} bfloat16",
        operands=operands,
        ours=ours,
        peers={"gates, then associative_scan": unfused},
    )


def _attention(tiny: bool) -> list[Workload]:
    # Queries and keys [B, T, H, h], key heads, window.
    shapes: list[tuple[tuple[int, ...], int, int | None]] = [
        ((2, 8192, 10, 256), 1, 2048),  # RecurrentGemma 2B
        ((4, 4096, 16, 128), 8, None),
    ]
    if tiny:
        shapes = [((1, 24, 2, 16), 1, 16)]
    found = []
    for (batch, length, heads, width), kv_heads, window in shapes:
        shape, kv_shape = (batch, length, heads, width), (batch, length, kv_heads, width)

        def ours(form: str | None, window: int | None = window) -> Program:
            return lambda q, k, v: kernels.attention(
                q, k, v, causal=True, window=window, implementation=form
            )

        seen = min(window or length, length)
        pairs = seen * (seen + 1) // 2 + (length - seen) * seen
        found += _both(
            "attention",
            setting=f"{list(shape)} over {kv_heads} heads, window {window}, bfloat16",
            operands=lambda shapes=(shape, kv_shape, kv_shape): _normal(
                *shapes, dtype=jnp.bfloat16
            ),
            ours=ours,
            peers=_jax_attention(window),
            flops=4.0 * batch * heads * width * pairs,
        )
    return found


def _decode_attention(tiny: bool) -> list[Workload]:
    # Rows, keys, heads, key heads, width of a head.
    settings = [(64, 2048, 10, 1, 256), (64, 8192, 16, 8, 128)]
    if tiny:
        settings = [(2, 24, 2, 1, 16)]
    found = []
    for batch, keys, heads, kv_heads, width in settings:
        shapes = (batch, 1, heads, width), *[(batch, kv_heads, keys, width)] * 2

        def operands(shapes: Any = shapes) -> tuple[jax.Array, ...]:
            batch, keys = shapes[1][0], shapes[1][2]
            return *_normal(*shapes, dtype=jnp.bfloat16), jnp.full((batch,), keys, jnp.int32)

        found.append(
            Workload(
                "decode_attention",
                "forward",
                f"{list(shapes[0])} over {keys} keys of {kv_heads} heads, bfloat16",
                operands,
                lambda form: lambda *x: kernels.decode_attention(*x, implementation=form),
                {  # every cache is full
                    name: lambda q, k, v, _, peer=peer: peer(
                        q, *(jnp.swapaxes(x, 1, 2) for x in (k, v))
                    )
                    for name, peer in _jax_attention(None, causal=False).items()
                },
                flops=4.0 * batch * keys * heads * width,
            )
        )
    return found


def _jax_attention(window: int | None, *, causal: bool = True) -> dict[str, Program]:
    def peer(name: str) -> Program:
        return lambda q, k, v: jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=name,
        )

    peers = {"jax.nn, xla": peer("xla")}
    if jax.default_backend() == "gpu":
        peers["jax.nn, cudnn"] = peer("cudnn")
    return peers


def _nearest_centroid(tiny: bool) -> list[Workload]:
    # Rows, centroids, dimensions.
    settings: list[tuple[int, int, int, Any]] = [
        (65536, 10000, 768, jnp.bfloat16),
        (65536, 10000, 768, jnp.float32),
        (131072, 16384, 128, jnp.bfloat16),
    ]
    if tiny:
        settings = [(70, 30, 20, jnp.bfloat16)]
    found = []
    for rows, centroids, width, dtype in settings:
        shapes = (rows, width), (centroids, width)
        found.append(
            Workload(
                "nearest_centroid",
                "forward",
                f"{[rows, centroids, width]} {jnp.dtype(dtype).name}",
                lambda shapes=shapes, dtype=dtype: _normal(*shapes, dtype=dtype),
                lambda form: lambda x, c: kernels.nearest_centroid(x, c, form),
                {"full matrix, argmin": full_matrix},
                flops=2.0 * rows * centroids * width,
                passes=_FLOAT32_PASSES if dtype == jnp.float32 else 1,
            )
        )
    return found


_WORKLOADS: dict[str, Callable[[bool], list[Workload]]] = {
    "linear_scan": _linear_scan,
    "rg_lru": _rg_lru,
    "attention": _attention,
    "decode_attention": _decode_attention,
    "nearest_centroid": _nearest_centroid,
}
KERNELS = tuple(_WORKLOADS)
