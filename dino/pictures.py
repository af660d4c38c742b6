"""Pictures of what a backbone sees: its patches' principal components as colours, and attention."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

_EDGES = (1.0, 99.0)  # Percentiles that become the darkest and the brightest value.
_COLUMNS = 4  # Of pictures in a row, where there are no more.
_FEWEST = 8  # Patches of foreground below which there is none worth the name.


def principal_colors(
    patches: Sequence[np.ndarray], grids: Sequence[tuple[int, int]], foreground: bool = True
) -> list[np.ndarray]:
    """Colours the patches of several images by their first three principal components.

    The components are those of all images together, so that a colour means the same in each. With
    `foreground`, the first component over all patches tells the subject from what is behind it,
    which becomes black, and the colours are the components of the subject alone. Which of its two
    signs is the subject nothing says: it is taken to lie less along the images' edges.

    Args:
      patches: of each image, `[h w, D]`, after the final norm.
      grids: `(h, w)` of each image.
      foreground: whether to leave out the background.

    Returns:
      uint8 `[h, w, 3]` for each image.
    """
    tokens = np.concatenate([np.asarray(p, np.float32) for p in patches])
    shown = np.ones(len(tokens), bool)
    if foreground:
        first = _components(tokens, 1)[:, 0]
        edge = np.concatenate([_edge(grid) for grid in grids])
        if edge.any() and not edge.all() and first[edge].mean() > first[~edge].mean():
            first = -first
        subject = first > 0
        if subject.sum() >= _FEWEST:
            shown = subject
    colors = np.zeros((len(tokens), 3), np.float32)
    values = _components(tokens[shown], 3)
    low, high = np.percentile(values, _EDGES, axis=0)
    colors[shown] = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    ends = np.cumsum([h * w for h, w in grids])[:-1]
    pixels = np.round(colors * 255).astype(np.uint8)
    return [part.reshape(*grid, 3) for part, grid in zip(np.split(pixels, ends), grids)]


def attention_colors(weights: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What one query takes of each patch, `[h w]`, as uint8 `[h, w, 3]`.

    From black over red and yellow to white, which is the patch it takes most of.
    """
    values = np.asarray(weights, np.float64).reshape(grid)
    values = values / max(values.max(), 1e-12)
    ramp = np.stack([values * 3, values * 3 - 1, values * 3 - 2], axis=-1)
    return np.round(np.clip(ramp, 0, 1) * 255).astype(np.uint8)


def side_by_side(
    image: np.ndarray, patches: Sequence[np.ndarray], smooth: bool = False
) -> Image.Image:
    """An image and pictures of its patches, each as large as the image, row by row.

    Args:
      image: uint8 `[H, W, 3]`.
      patches: uint8 `[h, w, 3]` each.
      smooth: blend from patch to patch, instead of showing each as a square.
    """
    height, width = image.shape[:2]
    total = 1 + len(patches)
    columns = total if total <= _COLUMNS else math.ceil(math.sqrt(total))
    gap = max(width // 64, 1)
    rows = -(-total // columns)
    across, down = columns * (width + gap) - gap, rows * (height + gap) - gap
    canvas = Image.new("RGB", (across, down), "white")
    manner = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    for n, picture in enumerate([image, *patches]):
        row, column = divmod(n, columns)
        tile = Image.fromarray(picture)
        if tile.size != (width, height):
            tile = tile.resize((width, height), manner)
        canvas.paste(tile, (column * (width + gap), row * (height + gap)))
    return canvas


def _components(tokens: np.ndarray, count: int) -> np.ndarray:
    """`[N, D]` -> `[N, count]`: along the directions of most variance, most first.

    A direction points to where its weight of largest magnitude is positive.
    """
    centred = tokens - tokens.mean(axis=0)
    covariance = centred.T.astype(np.float64) @ centred
    _, vectors = np.linalg.eigh(covariance)
    chosen = vectors[:, ::-1][:, :count]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(chosen.shape[1])])
    found = centred @ chosen.astype(np.float32)
    return np.pad(found, [(0, 0), (0, count - found.shape[1])])


def _edge(grid: tuple[int, int]) -> np.ndarray:
    """`[h w]` bool: the outermost patches of an image."""
    inner = np.zeros(grid, bool)
    inner[1:-1, 1:-1] = True
    return ~inner.reshape(-1)
