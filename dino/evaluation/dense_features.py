"""Maps of patch features, and resizing of what is predicted from them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dino.evaluation.features import FeatureModel, placed


def padded_to_patches(size: int, patch: int) -> tuple[int, int]:
    """Pixels to add before and after `size`, as equal as can be, to make whole patches."""
    missing = -size % patch
    return missing // 2, missing - missing // 2


def patch_map(
    model: FeatureModel,
    images: np.ndarray,
    patch: int,
    layers: int | Sequence[int],
    *,
    norm: bool = True,
    with_cls: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Features of the patches of images [B, H, W, 3], those of several layers side by side.

    Images are padded with black around to whole patches of side `patch`.

    Returns:
        float32 [B, h, w, width]; with `with_cls` each layer's patch, then its class token.
    """
    pads = [padded_to_patches(size, patch) for size in images.shape[1:3]]
    padded = np.pad(images, [(0, 0), *pads, (0, 0)])
    normalized = model.normalize(placed(padded, mesh))
    if any(sum(pad) for pad in pads):
        inside = np.pad(np.ones(images.shape[1:3], np.float32), pads)
        normalized = normalized * inside[..., None]  # Padding is 0 after normalisation.
    tokens = model.features(normalized, layers=layers, norm=norm)
    single = not isinstance(tokens.patches, tuple)
    cls = (tokens.cls,) if single else tokens.cls
    patches = (tokens.patches,) if single else tokens.patches
    grid = padded.shape[1] // patch, padded.shape[2] // patch
    parts = []
    for token, part in zip(cls, patches, strict=True):
        parts.append(part)
        if with_cls:
            parts.append(jnp.broadcast_to(token[:, None], (*part.shape[:2], token.shape[-1])))
    joined = jnp.concatenate([part.astype(jnp.float32) for part in parts], -1)
    return joined.reshape(len(images), *grid, -1)


def resize_matrix(size: int, new: int) -> np.ndarray:
    """Bilinear interpolation from `size` to `new` values as a matrix [new, size]; pixels have
    their values at their middle, and beyond the outermost nothing changes."""
    places = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
    low = np.minimum(places.astype(np.int64), max(size - 2, 0))
    share = places - low
    matrix = np.zeros((new, size), np.float32)
    matrix[np.arange(new), low] = 1 - share
    matrix[np.arange(new), np.minimum(low + 1, size - 1)] += share
    return matrix


def resize_map(x: jax.Array, height: int, width: int) -> jax.Array:
    """[B, h, w, C] to [B, height, width, C], bilinearly."""
    rows, columns = resize_matrix(x.shape[1], height), resize_matrix(x.shape[2], width)
    x = jnp.einsum("yh,bhwc->bywc", rows, x, precision="highest")
    return jnp.einsum("xw,bywc->byxc", columns, x, precision="highest")


def to_pixels(x: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """A map of patches [B, h, w, C] to pixels [B, height, width, C], the padding cut off again."""
    top, left = padded_to_patches(height, patch)[0], padded_to_patches(width, patch)[0]
    pixels = resize_map(x, x.shape[1] * patch, x.shape[2] * patch)
    return pixels[:, top : top + height, left : left + width]


def resize_scores(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, C] to [height, width, C], bilinearly, on the host: images have many sizes."""
    rows, columns = (
        resize_matrix(scores.shape[0], height), resize_matrix(scores.shape[1], width)
    )  # fmt: skip
    part = np.tensordot(rows, scores, (1, 0))  # [height, w, C]
    return np.moveaxis(np.tensordot(columns, part, (1, 1)), 0, 1)
