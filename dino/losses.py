"""The three losses of a batch: between views, of masked patches, and for spread (section 3)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from common.nn.losses import by_chunks
from common.sharding import per_shard
from dino.heads import logits_of, unit

_KOLEO_EPSILON = 1e-8


def cross_entropy(
    logits: jax.Array, targets: jax.Array, temperature: jax.typing.ArrayLike
) -> jax.Array:
    """`-sum_k t_k log softmax(logits / temperature)_k`, `[..., K] -> [...]` fp32.

    Args:
      logits: `[..., K]`.
      targets: `[..., K]`; the rows sum to 1, so that no logarithm of the softmax is ever written.
      temperature: of the student.
    """
    logits = logits.astype(jnp.float32) / temperature
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(targets * logits, axis=-1)


def dino_loss(
    z: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    temperature: jax.typing.ArrayLike,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Image-level losses: of global views against each other's targets, of local against both's.

    Each of the 2 pairs of global views weighs like each of the 2V pairs of a local and a global
    one. A local view's sum over both targets is taken at once: the targets are added up first,
    `CE(t_1, s) + CE(t_2, s) = 2 lse(s) - <t_1 + t_2, s>`, which is exact.

    Args:
      z: `[B, 2 + V, d]`, the student's unit vectors, the two global views first.
      table: `[K, d]`, its prototypes.
      targets: `[B, 2, K]`, of the teacher's global views.
      temperature: of the student.
      chunk: views of which logits exist at a time, at most; None: all.

    Returns:
      The global and the local part of each image's loss, `[B]` fp32 each.
    """
    views, local_views = targets.shape[1], z.shape[1] - targets.shape[1]
    pairs = views + max(views * local_views, 1)

    def global_view(z: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(logits_of(z, table), targets, temperature)

    both = jnp.sum(targets, axis=1, keepdims=True)

    def local_view(z: jax.Array) -> jax.Array:
        logits = logits_of(z, table) / temperature
        return views * jax.nn.logsumexp(logits, axis=-1) - jnp.sum(both * logits, axis=-1)

    others = jnp.flip(targets, axis=1)
    of_global = _by_chunks(global_view, (z[:, :views], others), chunk)
    if not local_views:
        return jnp.sum(of_global, axis=1) / pairs, jnp.zeros(len(z), jnp.float32)
    of_local = _by_chunks(local_view, (z[:, views:],), chunk)
    return jnp.sum(of_global, axis=1) / pairs, jnp.sum(of_local, axis=1) / pairs


def ibot_loss(
    z: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    temperature: jax.typing.ArrayLike,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """Weighted sum of the cross-entropies of masked patches: fp32 [].

    Over the number of *all* global views, also those without a mask, it is the loss of section 3.2.

    Args:
      z: `[G, S, d]`, the student's unit vectors of masked patches, in some groups.
      table: `[K, d]`.
      targets: `[G, S, K]`.
      weights: `[G, S]`: 1 / (masked patches of the same view), 0 for padding.
      temperature: of the student.
      chunk: places of a group of which logits exist at a time, at most; None: all.
    """

    def patches(z: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(logits_of(z, table), targets, temperature)

    return jnp.sum(_by_chunks(patches, (z, targets), chunk) * weights)


def _by_chunks(
    function: Callable[..., jax.Array], rows: Sequence[jax.Array], chunk: int | None
) -> jax.Array:
    """`by_chunks` of the largest size up to `chunk` that divides the rows' length."""
    length = rows[0].shape[1]
    if chunk is not None and length:
        chunk = max(size for size in range(1, min(chunk, length) + 1) if length % size == 0)
    return by_chunks(function, rows, chunk)


def koleo_loss(features: jax.Array, *, group: int | str | None = None) -> jax.Array:
    """Minus the logarithm of the distance to the nearest neighbour: `[B, D] -> [B]` fp32.

    Its mean spreads the features of a batch over the sphere (section 3.4).

    Args:
      features: before any head.
      group: neighbours are looked for among so many consecutive rows; B must be a multiple. None:
        among all, on whatever devices they are. "device": among the rows of the same device, as in
        the paper's runs, where the loss depends on the number of devices.
    """
    if group == "device":
        return per_shard(_koleo, (features,), (("batch", None),), ("batch",))
    if group is None:
        return _koleo(features)
    assert isinstance(group, int)
    grouped = features.reshape(-1, group, features.shape[-1])
    return jax.vmap(_koleo)(grouped).reshape(-1)


def _koleo(features: jax.Array) -> jax.Array:
    z = unit(features)
    nearest = jax.lax.stop_gradient(nearest_neighbours(z))
    distance = jnp.linalg.norm(z - z[nearest] + _KOLEO_EPSILON, axis=-1)
    return -jnp.log(distance + _KOLEO_EPSILON)


def nearest_neighbours(z: jax.Array) -> jax.Array:
    """Of unit vectors `[B, D]`, each one's nearest other: `[B]` int32."""
    similarity = jnp.einsum("id,jd->ij", z, z, precision="highest")
    # The paper sets the diagonal to -1, which is no neighbour unless there is but one row.
    own = jnp.eye(len(z), dtype=bool)
    return jnp.argmax(jnp.where(own, -1.0, similarity), axis=1)
