"""The vision transformer that several papers share (specification of DINOv2, section 2)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.nn.drop_path import add_to_subset
from common.nn.mlp import MLP, GatedMLP
from common.nn.norms import LayerNorm
from common.nn.param import param, zeros
from common.nn.patches import PatchEmbed, patch_grid
from common.nn.positions import INTERPOLATIONS, Interpolation, resized_positions
from common.nn.self_attention import SelfAttention
from common.nn.stack import remat, stack
from common.sharding import shard

# Cut at two, a hundred of its deviations: never.
_INIT = jax.nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer.

    Attributes:
      width: D.
      num_layers: number of blocks.
      num_heads: H.
      mlp_width: F; None is 4 D for "mlp", and 2 / 3 of that, rounded up to a multiple of 8, for
        "swiglu".
      mlp: the feed-forward layer: "mlp" (GELU) or "swiglu".
      patch_size: p, pixels.
      image_size: pixels of the square image whose patches the position table has.
      channels: of an image.
      registers: R, learned tokens without position behind the class token.
      layer_scale: what the factors of each branch's channels start from; None: no such factors.
      mask_token: whether there is a token to stand for masked patches.
      norm_epsilon: of every LayerNorm.
      interpolation: how the position table is resized to other grids (`resized_positions`).
      drop_path: share of the rows that each branch leaves out in training (`add_to_subset`).
      drop_path_groups: into how many parts the batch is cut for that, each with its own draw; None:
        one for each shard of the batch on the mesh.
      dtype: compute dtype.
      residual_dtype: of the sum that runs through the blocks. In bfloat16 it takes half the memory,
        and rounds after every branch.
      remat: what the backward pass recomputes: "none", "full" or "dots".
      unroll: the blocks are written out one after the other, and are no loop. The compiler takes
        longer, but what the backward pass needs is not copied into stacks: faster on a CPU.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int | None = None
    mlp: Literal["mlp", "swiglu"] = "mlp"
    patch_size: int = 14
    image_size: int = 518
    channels: int = 3
    registers: int = 0
    layer_scale: float | None = 1e-5
    mask_token: bool = True
    norm_epsilon: float = 1e-6
    interpolation: Interpolation = "offset"
    drop_path: float = 0.0
    drop_path_groups: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    unroll: bool = False

    def __post_init__(self) -> None:
        positive = ("width", "num_layers", "num_heads", "patch_size", "image_size", "channels")
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be positive, not {getattr(self, name)}")
        if self.width % self.num_heads:
            raise UserError(
                f"model.width ({self.width}) must be a multiple of model.num_heads "
                f"({self.num_heads})"
            )
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.image_size ({self.image_size}) must be a multiple of model.patch_size "
                f"({self.patch_size})"
            )
        if self.mlp_width is not None and self.mlp_width < 1:
            raise UserError(f"model.mlp_width must be positive, not {self.mlp_width}")
        if self.registers < 0:
            raise UserError(f"model.registers must not be negative: {self.registers}")
        if not 0.0 <= self.drop_path < 1.0:
            raise UserError(f"model.drop_path must be in [0, 1), not {self.drop_path}")
        if self.drop_path_groups is not None and self.drop_path_groups < 1:
            raise UserError(f"model.drop_path_groups must be positive, not {self.drop_path_groups}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"model.interpolation must be one of {', '.join(INTERPOLATIONS)}, not "
                f"{self.interpolation!r}"
            )
        if self.mlp not in ("mlp", "swiglu"):
            raise UserError(f"model.mlp must be 'mlp' or 'swiglu', not {self.mlp!r}")

    @property
    def hidden(self) -> int:
        """F."""
        if self.mlp_width is not None:
            return self.mlp_width
        full = 4 * self.width
        return full if self.mlp == "mlp" else (int(full * 2 / 3) + 7) // 8 * 8

    @property
    def table_size(self) -> int:
        """M: the position table is that of M × M patches."""
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: class token and registers."""
        return 1 + self.registers

    def num_parameters(self) -> int:
        """Exact parameter count."""
        d, f = self.width, self.hidden
        ways = 2 if self.mlp == "swiglu" else 1
        mlp = (ways + 1) * d * f + ways * f + d
        block = 4 * d * d + 4 * d + mlp + 4 * d + (2 * d if self.layer_scale is not None else 0)
        tokens = 1 + self.registers + (1 if self.mask_token else 0) + 1 + self.table_size**2
        patches = self.patch_size**2 * self.channels * d + d
        return patches + tokens * d + self.num_layers * block + 2 * d

    def flops(self, height: int, width: int) -> float:
        """FLOPs of one image's way forward: two for each multiply-add of a matrix product."""
        rows, columns = patch_grid(height, width, self.patch_size)
        patches, d = rows * columns, self.width
        tokens = patches + self.prefix
        ways = 2 if self.mlp == "swiglu" else 1
        block = tokens * (4 * d * d + (ways + 1) * d * self.hidden) + 2 * tokens * tokens * d
        embed = patches * self.patch_size**2 * self.channels * d
        return 2.0 * (embed + self.num_layers * block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a vision transformer makes of images; of several blocks, tuples in order of depth.

    Attributes:
      cls: `[B, D]`.
      registers: `[B, R, D]`.
      patches: `[B, N, D]`, row by row.
    """

    cls: Any
    registers: Any
    patches: Any


class ViTBlock(nnx.Module):
    """`x += gamma_1 * attention(norm(x)); x += gamma_2 * mlp(norm(x))`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        d, dtype = config.width, jnp.dtype(config.dtype)
        self.norm1 = LayerNorm(d, epsilon=config.norm_epsilon, rngs=rngs)
        self.attention = SelfAttention(d, config.num_heads, init=_INIT, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(d, epsilon=config.norm_epsilon, rngs=rngs)
        self.mlp: MLP | GatedMLP
        if config.mlp == "mlp":
            self.mlp = MLP(d, config.hidden, init=_INIT, dtype=dtype, rngs=rngs)
        else:
            self.mlp = GatedMLP(
                d,
                config.hidden,
                activation=jax.nn.silu,
                use_bias=True,
                up_init=_INIT,
                down_init=_INIT,
                dtype=dtype,
                rngs=rngs,
            )
        scaled = config.layer_scale is not None
        start = jax.nn.initializers.constant(config.layer_scale or 0.0)
        self.gamma1 = param(rngs, start, (d,), (None,)) if scaled else None
        self.gamma2 = param(rngs, start, (d,), (None,)) if scaled else None
        self.drop_path, self.drop_path_groups = config.drop_path, config.drop_path_groups
        self.dtype = dtype

    def __call__(
        self, x: jax.Array, key: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """`x [B, T, D] -> [B, T, D]`.

        Args:
          x: the tokens.
          key: of the rows that leave out a branch; None: all take both.
          mask: of the attention, `[T, T]` bool, or broadcastable to `[B, H, T, T]` if no row
            leaves out a branch.
        """

        def attend(x: jax.Array) -> jax.Array:
            y = self.attention(self.norm1(x).astype(self.dtype), mask)
            return _scaled(y, self.gamma1)

        def feed(x: jax.Array) -> jax.Array:
            return _scaled(self.mlp(self.norm2(x).astype(self.dtype)), self.gamma2)

        if key is None or self.drop_path == 0.0:
            x = x + attend(x).astype(x.dtype)
            return x + feed(x).astype(x.dtype)
        for branch, own in zip((attend, feed), jax.random.split(key)):
            x = add_to_subset(x, branch, own, self.drop_path, self.drop_path_groups)
        return x


class ViT(nnx.Module):
    """A vision transformer with a class token, learned positions and registers.

    Tokens stand in the order class token, registers, patches row by row.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        d, tiny = config.width, jax.nn.initializers.normal(1e-6)
        self.patch_embed = PatchEmbed(
            config.patch_size, config.channels, d, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        self.cls_token = param(rngs, tiny, (d,), (None,))
        # Row 0 is the class token's.
        self.pos_embed = param(rngs, _INIT, (1 + config.table_size**2, d), (None, "embed"))
        count = config.registers
        self.register_tokens = param(rngs, tiny, (count, d), (None, None)) if count else None
        self.mask_token = param(rngs, zeros, (d,), (None,)) if config.mask_token else None
        self.blocks = stack(lambda r: ViTBlock(config, rngs=r), config.num_layers, rngs)
        self.norm = LayerNorm(d, epsilon=config.norm_epsilon, rngs=rngs)
        self.config = config

    def __call__(
        self,
        images: jax.Array,
        *,
        masks: jax.Array | None = None,
        key: jax.Array | None = None,
        norm: bool = True,
    ) -> Tokens:
        """What the last block makes of images, in the compute dtype (before the norm: fp32).

        Args:
          images: `[B, H, W, C]`, normalised; H and W multiples of the patch size.
          masks: `[B, N]` bool; the mask token takes the place of the patches where it is True.
          key: of drop path; None: no row leaves anything out.
          norm: whether the final norm is applied.

        Raises:
          UserError: H or W is no multiple of the patch size.
        """
        x = self.run(self.embed(images, masks), key=key)
        return self._split(self.normed(x) if norm else x)

    def features(
        self,
        images: jax.Array,
        layers: int | Sequence[int] = 1,
        norm: bool = True,
    ) -> Tokens:
        """What one block or several make of images.

        Args:
          images: `[B, H, W, C]`.
          layers: 1: the last block, whose arrays are returned as they are. n: the last n blocks.
            A sequence: the blocks of these numbers, counted from 0, or from the end if negative.
          norm: apply the final norm to each; otherwise they are what the block puts out.

        Returns:
          `Tokens`, of arrays for `layers=1`, else of tuples in order of depth.

        Raises:
          UserError: no such block, or H or W is no multiple of the patch size.
        """
        x = self.embed(images)
        if isinstance(layers, int) and layers == 1:
            x = self.run(x)
            return self._split(self.normed(x) if norm else x)
        found = self.outputs(x, self._block_numbers(layers))
        each = [self._split(self.normed(x) if norm else x) for x in found]
        return Tokens(*(tuple(getattr(t, name) for t in each) for name in _NAMES))

    def attention_maps(self, images: jax.Array, block: int = -1) -> jax.Array:
        """What each token's query takes of each token: `[B, H, T, T]` fp32, T = 1 + R + N.

        Row 0 without its first 1 + R columns is where the class token looks.

        Args:
          images: `[B, H, W, C]`.
          block: number of the block, counted from the end if negative.
        """
        (number,) = self._block_numbers([block])
        x = self.embed(images)
        if number:
            (x,) = self.outputs(x, (number - 1,))
        one = self._block(number)
        return one.attention.weights(one.norm1(x).astype(one.dtype))

    def embed(self, images: jax.Array, masks: jax.Array | None = None) -> jax.Array:
        """`[B, H, W, C] -> [B, T, D]`: the tokens that the first block reads."""
        config = self.config
        height, width = images.shape[1:3]
        grid = patch_grid(height, width, config.patch_size)
        patches = self.patch_embed(images)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("masks were given, but the model has no mask token")
            token = self.mask_token[...].astype(patches.dtype)
            patches = jnp.where(masks[..., None], token, patches)
        table = self.pos_embed[...]
        size = config.table_size
        positions = resized_positions(table[1:].reshape(size, size, -1), grid, config.interpolation)
        patches = patches + positions.reshape(1, -1, config.width)
        first = [(self.cls_token[...] + table[0])[None]]
        if self.register_tokens is not None:
            first.append(self.register_tokens[...])
        prefix = jnp.concatenate(first).astype(patches.dtype)
        prefix = jnp.broadcast_to(prefix, (images.shape[0], *prefix.shape))
        x = jnp.concatenate([prefix, patches], axis=1)
        return shard(x.astype(config.residual_dtype), "batch", "seq", None)

    def run(
        self, x: jax.Array, *, key: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`: all blocks, not the final norm.

        Args:
          x: tokens.
          key: of drop path.
          mask: of the attention, see `ViTBlock`.
        """
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def body(x, block_and_key):
            block, key = block_and_key
            return shard(block(x, key, mask), "batch", "seq", None), None

        unroll = self.config.unroll
        body = remat(body, self.config.remat, in_loop=self._is_stacked and not unroll)
        if not self._is_stacked:
            for n in range(self.config.num_layers):
                x, _ = body(x, (self._block(n), None if keys is None else keys[n]))
            return x
        depth = self.config.num_layers if unroll else 1
        x, _ = jax.lax.scan(body, x, (self.blocks, keys), unroll=depth)
        return x

    def outputs(self, x: jax.Array, blocks: Sequence[int]) -> tuple[jax.Array, ...]:
        """`[B, T, D]` -> what each of `blocks`, ascending numbers, puts out; later ones rest."""
        last = blocks[-1] + 1
        if self.config.unroll or not self._is_stacked:
            found = []
            for n in range(last):
                x = shard(self._block(n)(x), "batch", "seq", None)
                found.append(x)
            return tuple(found[n] for n in blocks)
        used = self.blocks
        if last < self.config.num_layers:
            used = jax.tree.map(lambda leaf: leaf[:last], used)
        # A block writes where the next wanted one will write over it.
        place = [sum(wanted < n for wanted in blocks) for n in range(last)]
        kept = jnp.zeros((len(blocks), *x.shape), x.dtype)

        def body(carry, block_and_place):
            x, kept = carry
            block, place = block_and_place
            x = shard(block(x), "batch", "seq", None)
            return (x, jax.lax.dynamic_update_index_in_dim(kept, x, place, 0)), None

        carry, xs = (x, kept), (used, jnp.asarray(place))
        (_, kept), _ = jax.lax.scan(remat(body, self.config.remat), carry, xs)
        return tuple(kept)

    def unrolled(self) -> "ViT":
        """The same model without a stack: every block has arrays of its own.

        A scan slices each layer's weights out of their stack, and on a CPU copies them to do so,
        16-bit ones by way of fp32.
        """
        model = nnx.merge(*nnx.split(self))
        if model._is_stacked:
            blocks = [model._block(n) for n in range(self.config.num_layers)]
            model.blocks = nnx.List(blocks)
        return model

    @property
    def _is_stacked(self) -> bool:
        return isinstance(self.blocks, ViTBlock)

    def _block(self, number: int) -> ViTBlock:
        if not self._is_stacked:
            return self.blocks[number]
        graphdef, state = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[number], state))

    def normed(self, x: jax.Array) -> jax.Array:
        """The final norm, in the compute dtype."""
        return self.norm(x).astype(self.config.dtype)

    def _split(self, x: jax.Array) -> Tokens:
        prefix = self.config.prefix
        return Tokens(x[:, 0], x[:, 1:prefix], x[:, prefix:])

    def _block_numbers(self, layers: int | Sequence[int]) -> tuple[int, ...]:
        depth = self.config.num_layers
        if isinstance(layers, int):
            if not 1 <= layers <= depth:
                raise UserError(f"the model has {depth} blocks: layers must be 1...{depth}")
            return tuple(range(depth - layers, depth))
        numbers = tuple(sorted({n + depth if n < 0 else n for n in layers}))
        if not numbers or not 0 <= numbers[0] <= numbers[-1] < depth:
            raise UserError(
                f"the model has blocks 0...{depth - 1}: layers={list(layers)} names others"
            )
        return numbers


_NAMES = tuple(field.name for field in dataclasses.fields(Tokens))


def _scaled(y: jax.Array, gamma: nnx.Param | None) -> jax.Array:
    return y if gamma is None else y.astype(jnp.float32) * gamma[...].astype(jnp.float32)
