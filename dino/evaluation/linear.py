"""A grid of linear classifiers on frozen features, trained in one pass (specification, 6.2).

Heads differ in what they read (class tokens of the last blocks, with or without the mean of the
last block's patches) and in their learning rate. All are trained on the same batches, so that the
trunk, which costs most, runs once for all of them.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.data.image_sources import ImageSource
from common.data.image_transforms import random_flip, random_resized_crop
from common.data.pipeline import RowOrder
from common.errors import UserError
from dino.evaluation.features import FeatureModel, ImageFeatures, ImageReader, pooled_features

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_SCALE = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)

FeatureBatch = tuple[jax.Array, jax.Array, np.ndarray]
"""Class tokens [layers, B, D] in order of depth, mean patches [B, D], labels [B]."""


@dataclass(frozen=True)
class LinearConfig:
    """The grid and its training.

    Attributes:
        learning_rates: For a batch of 256; scaled in proportion to it.
        blocks: Of how many last blocks the class tokens are read.
        avgpool: Whether the mean of the last block's patches is read too.
        steps: Of SGD with momentum, the rate falling to 0 along a cosine.
        batch: Images of a step.
        momentum: Of SGD.
        seed: Of weights and order.
    """

    learning_rates: tuple[float, ...] = LEARNING_RATES
    blocks: tuple[int, ...] = (1, 4)
    avgpool: tuple[bool, ...] = (False, True)
    steps: int = 12_500
    batch: int = 1024
    momentum: float = 0.9
    seed: int = 0

    @property
    def inputs(self) -> list[tuple[int, bool]]:
        """What heads read: number of blocks, and whether the mean patch."""
        return [(n, pooled) for n in self.blocks for pooled in self.avgpool]

    @property
    def names(self) -> list[str]:
        """Of the heads, in the order of their results."""
        return [
            f"blocks={n} avgpool={'yes' if pooled else 'no'} lr={rate:g}"
            for n, pooled in self.inputs
            for rate in self.learning_rates
        ]


Heads = list[dict[str, jax.Array]]
"""For each input `kernel` [rates, width, C] and `bias` [rates, C]."""


def head_inputs(cls: jax.Array, mean: jax.Array, config: LinearConfig) -> list[jax.Array]:
    """What each kind of head reads, [B, width]: class tokens by depth, then the mean patch."""
    found = []
    for blocks, pooled in config.inputs:
        parts = [*cls[len(cls) - blocks :], *([mean] if pooled else [])]
        found.append(jnp.concatenate(parts, -1).astype(jnp.float32))
    return found


def init_heads(width: int, pooled_width: int, classes: int, config: LinearConfig) -> Heads:
    """Weights from N(0, 0.01²), biases 0; equal for all rates of one input.

    Args:
        width: Of a class token.
        pooled_width: Of a mean patch, the same for any model but pixels.
        classes: C.
        config: The grid.
    """
    heads, rates = [], len(config.learning_rates)
    for key, (blocks, pooled) in zip(
        jax.random.split(jax.random.key(config.seed), len(config.inputs)), config.inputs
    ):
        kernel = 0.01 * jax.random.normal(key, (width * blocks + pooled_width * pooled, classes))
        heads.append({
            "kernel": jnp.tile(kernel, (rates, 1, 1)), "bias": jnp.zeros((rates, classes))
        })  # fmt: skip
    return heads


def head_logits(heads: Heads, inputs: list[jax.Array]) -> list[jax.Array]:
    """Logits [rates, B, C] for each input."""
    return [
        jnp.einsum("bd,rdc->rbc", x, head["kernel"], precision="highest") + head["bias"][:, None]
        for head, x in zip(heads, inputs, strict=True)
    ]


def head_losses(heads: Heads, inputs: list[jax.Array], labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of each head over the batch, [heads]."""
    losses = []
    for logits in head_logits(heads, inputs):
        right = jnp.take_along_axis(logits, labels[None, :, None], -1)[..., 0]
        losses.append(jnp.mean(jax.nn.logsumexp(logits, -1) - right, -1))
    return jnp.concatenate(losses)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def _step(
    heads: Heads,
    velocity: Heads,
    cls: jax.Array,
    mean: jax.Array,
    labels: jax.Array,
    progress: jax.Array,
    *,
    config: LinearConfig,
) -> tuple[Heads, Heads, jax.Array]:
    """One step of SGD with momentum of all heads; `progress` goes from 0 to 1."""
    inputs = head_inputs(cls, mean, config)

    def total(heads: Heads) -> tuple[jax.Array, jax.Array]:
        losses = head_losses(heads, inputs, labels)
        return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(heads)
    rates = jnp.array(config.learning_rates) * config.batch / 256
    rates = rates * (0.5 * (1 + jnp.cos(jnp.pi * progress)))
    velocity = jax.tree.map(lambda v, g: config.momentum * v + g, velocity, grads)
    heads = jax.tree.map(
        lambda p, v: p - rates.reshape(-1, *[1] * (p.ndim - 1)) * v, heads, velocity
    )
    return heads, velocity, losses


def train_heads(batches: Iterator[FeatureBatch], classes: int, config: LinearConfig) -> Heads:
    """Trains all heads on `config.steps` batches of features."""
    heads, velocity = None, None
    for step in tqdm(range(config.steps), desc="linear heads", unit="step", disable=None):
        cls, mean, labels = next(batches)
        if heads is None:
            heads = init_heads(cls.shape[-1], mean.shape[-1], classes, config)
            velocity = jax.tree.map(jnp.zeros_like, heads)
        heads, velocity, _ = _step(
            heads,
            velocity,
            cls,
            mean,
            jnp.asarray(labels, jnp.int32),
            jnp.float32(step / config.steps),
            config=config,
        )
    if heads is None:
        raise UserError("linear heads need one step or more")
    return heads


@functools.partial(jax.jit, static_argnames="config")
def _predict(heads: Heads, cls: jax.Array, mean: jax.Array, *, config: LinearConfig) -> jax.Array:
    logits = head_logits(heads, head_inputs(cls, mean, config))
    return jnp.concatenate([jnp.argmax(part, -1) for part in logits])


def predict(heads: Heads, features: ImageFeatures, config: LinearConfig) -> np.ndarray:
    """Class of each image by each head, int64 [heads, N], heads as in `config.names`."""
    count, batch = len(features.indices), min(config.batch, len(features.indices))
    found = []
    for start in range(0, count, batch):
        part = np.minimum(np.arange(start, start + batch), count - 1)  # One shape for all.
        cls, mean = features.cls[:, part], features.patch_mean[part]
        found.append(np.asarray(_predict(heads, cls, mean, config=config)))
    return np.concatenate(found, 1)[:, :count].astype(np.int64)


def stored_batches(features: ImageFeatures, config: LinearConfig) -> Iterator[FeatureBatch]:
    """Endless batches of features that were computed once, in an order new in each epoch."""
    if features.labels is None:
        raise UserError("linear heads need labels: images in class folders, or --train_labels")
    order = RowOrder(len(features.indices), config.seed)
    step = 0
    while True:
        rows = order.at(np.arange(step * config.batch, (step + 1) * config.batch))
        yield features.cls[:, rows], features.patch_mean[rows], features.labels[rows]
        step += 1


def augmented_batches(
    model: FeatureModel,
    source: ImageSource,
    crop: int,
    config: LinearConfig,
    *,
    error_budget: float = 0.01,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[FeatureBatch]:
    """Endless batches of features of random crops and flips, the trunk run on each."""
    if source.labels is None:
        raise UserError("linear heads need labels: images in class folders")
    order = RowOrder(len(source), config.seed)
    reader = ImageReader(source, _Augmentation(crop, config.seed), error_budget)
    for numbers, images in reader.training_batches(order, config.batch):
        cls, mean = pooled_features(model, images, max(config.blocks), mesh)
        yield cls, mean, source.labels[numbers]


@dataclass(frozen=True)
class _Augmentation:
    """A random crop of 8 to 100% of an image, flipped half the time."""

    size: int
    seed: int

    def __call__(self, image: np.ndarray, place: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, place])
        picture = random_resized_crop(rng, Image.fromarray(image), self.size, _SCALE, _ASPECT)
        return np.asarray(random_flip(rng, picture))


def best_head(
    predicted: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    metric: Callable[[np.ndarray, np.ndarray], float],
) -> tuple[int, dict[str, float]]:
    """Number of the best head, and the score of each."""
    scores = [metric(row, labels) for row in predicted]
    return int(np.argmax(scores)), dict(zip(names, scores, strict=True))
