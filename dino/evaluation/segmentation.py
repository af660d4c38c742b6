"""A linear head on frozen patches, and how well it names every pixel (specification, section 6.5).

"lin." reads the last block's patches; "+ms" those of the last four, on larger crops, and averages
over scales and flips when it is tested.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from tqdm import tqdm

from common.data.pipeline import RowOrder
from common.errors import UserError
from dino.evaluation.dense_data import (
    IGNORED,
    DenseSource,
    Pair,
    photometric_distortion,
    random_crop,
    resized,
)
from dino.evaluation.dense_features import patch_map, resize_scores, to_pixels
from dino.evaluation.features import FeatureModel, ImageReader
from dino.evaluation.metrics import confusion, mean_iou

_EPSILON = 1e-5  # Of the batch norm.
_MOMENTUM = 0.1  # Of its running statistics.


@dataclass(frozen=True)
class SegmentationConfig:
    """The head's input, its training and its test; by default as "lin.".

    Attributes:
        classes: Number of classes; larger labels are ignored.
        layers: Last blocks that are read.
        crop: Side of a training crop, and of a test window, in pixels.
        ratio: An image's shorter side becomes `crop` times a number from this range.
        steps, batch: Of AdamW.
        learning_rate, weight_decay: Of AdamW.
        warm_up: Steps until the full learning rate, from a millionth of it.
        stride: Pixels from one test window to the next.
        scales: At which an image is tested; the classes' probabilities are averaged.
        flip: Also test it mirrored.
        seed: Of weights, order and augmentation.
    """

    classes: int
    layers: int = 1
    crop: int = 512
    ratio: tuple[float, float] = (0.5, 2.0)
    steps: int = 40_000
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warm_up: int = 1500
    stride: int = 341
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= IGNORED:
            raise UserError(f"{self.classes} classes: a head tells 2 to {IGNORED} apart")
        if min(self.layers, self.crop, self.steps, self.batch, self.stride) < 1:
            raise UserError("layers, crop, steps, batch and stride are 1 or more")


def multi_scale(classes: int, **changes: Any) -> SegmentationConfig:
    """The "+ms" setting."""
    defaults = {
        "layers": 4, "crop": 640, "ratio": (1.0, 3.0), "stride": 426,
        "scales": (1.0, 1.32, 1.73, 2.28, 3.0), "flip": True,
    }  # fmt: skip
    return SegmentationConfig(classes, **(defaults | changes))


Head = dict[str, jax.Array]
"""`scale`, `shift`, `mean`, `variance` [D] of the batch norm, `kernel` [D, C], `bias` [C]."""
_STATISTICS = ("mean", "variance")


def init_head(width: int, config: SegmentationConfig) -> Head:
    """A batch norm that does nothing yet, and weights from N(0, 0.01²)."""
    key = jax.random.key(config.seed)
    return {
        "scale": jnp.ones(width),
        "shift": jnp.zeros(width),
        "mean": jnp.zeros(width),
        "variance": jnp.ones(width),
        "kernel": 0.01 * jax.random.normal(key, (width, config.classes)),
        "bias": jnp.zeros(config.classes),
    }


def head_logits(head: Head, patches: jax.Array) -> jax.Array:
    """[..., D] to [..., C] with the statistics of training."""
    x = (patches - head["mean"]) * jax.lax.rsqrt(head["variance"] + _EPSILON)
    x = x * head["scale"] + head["shift"]
    return jnp.matmul(x, head["kernel"], precision="highest") + head["bias"]


def _batch_statistics(patches: jax.Array) -> dict[str, jax.Array]:
    flat = patches.reshape(-1, patches.shape[-1])
    return {"mean": flat.mean(0), "variance": flat.var(0)}


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the pixels whose label is a class: logits [B, H, W, C], labels [B, H, W]."""
    counted = (labels >= 0) & (labels < logits.shape[-1])
    right = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
    losses = jnp.where(counted, jax.nn.logsumexp(logits, -1) - right, 0)
    return losses.sum() / jnp.maximum(counted.sum(), 1)


def _schedule(config: SegmentationConfig) -> optax.Schedule:
    """A rise from a millionth, then a straight line to 0 at the end."""

    def rate(step: jax.Array) -> jax.Array:
        line = config.learning_rate * (1 - step / config.steps)
        share = jnp.minimum(1.0, step / max(config.warm_up, 1))
        return line * (1e-6 + (1 - 1e-6) * share)

    return rate


def train_segmentation(
    model: FeatureModel,
    source: DenseSource,
    patch: int,
    config: SegmentationConfig,
    *,
    error_budget: float = 0.01,
    mesh: jax.sharding.Mesh | None = None,
) -> Head:
    """Trains a head on random crops of labelled images.

    Args:
        model: The frozen model.
        source: Images with labels.
        patch: Side of its patches.
        config: The setting.
        error_budget: How many images may be damaged.
        mesh: Of the model.
    """
    optimizer = optax.adamw(_schedule(config), b1=0.9, b2=0.999, weight_decay=config.weight_decay)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        head: Head, state: Any, patches: jax.Array, labels: jax.Array
    ) -> tuple[Head, Any, jax.Array]:
        statistics = _batch_statistics(patches)
        trained = {name: value for name, value in head.items() if name not in _STATISTICS}

        def loss(trained: Head) -> jax.Array:
            logits = head_logits(trained | statistics, patches)
            return pixel_cross_entropy(to_pixels(logits, patch, *labels.shape[1:]), labels)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(grads, state, trained)
        count = patches[..., 0].size
        statistics["variance"] = statistics["variance"] * count / max(count - 1, 1)
        running = {
            name: (1 - _MOMENTUM) * head[name] + _MOMENTUM * statistics[name]
            for name in _STATISTICS
        }
        return optax.apply_updates(trained, updates) | running, state, value

    reader = ImageReader(source, functools.partial(_augmented, config=config), error_budget)
    batches = reader.training_batches(
        RowOrder(len(source), config.seed), config.batch, config.steps
    )
    head, state = None, None
    progress = tqdm(total=config.steps, desc="segmentation head", unit="step", disable=None)
    with progress:
        for _, (images, labels) in batches:
            patches = patch_map(model, images, patch, config.layers, mesh=mesh)
            if head is None:
                head = init_head(patches.shape[-1], config)
                state = optimizer.init({n: v for n, v in head.items() if n not in _STATISTICS})
            head, state, _ = update(head, state, patches, jnp.asarray(labels))
            progress.update()
    assert head is not None
    return head


def _augmented(pair: Pair, place: int, *, config: SegmentationConfig) -> Pair:
    """A random size, part and side of an image, its colours changed."""
    rng = np.random.default_rng([config.seed, place])
    image, labels = pair
    scale = config.crop * rng.uniform(*config.ratio) / min(labels.shape)
    size = [max(1, round(side * scale)) for side in labels.shape]
    image, labels = resized(image, labels, (size[0], size[1]))
    image, labels = random_crop(rng, image, labels, (config.crop, config.crop), IGNORED)
    if rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    return photometric_distortion(rng, image), np.ascontiguousarray(labels)


@dataclass(frozen=True)
class SegmentationResult:
    """What a head's test came to.

    Attributes:
        mean_iou: Over the classes that occur.
        iou: Of each class, NaN where it neither occurs nor is predicted.
        accuracy: Share of pixels that are right.
        damaged: Why images could not be read.
    """

    mean_iou: float
    iou: np.ndarray
    accuracy: float
    damaged: list[str]


def score_segmentation(
    model: FeatureModel,
    head: Head,
    source: DenseSource,
    patch: int,
    config: SegmentationConfig,
    *,
    error_budget: float = 0.01,
    mesh: jax.sharding.Mesh | None = None,
) -> SegmentationResult:
    """Compares the head's classes with the labels, at each image's own size."""
    counts = np.zeros((config.classes, config.classes), np.int64)
    reader = ImageReader(source, lambda pair, place: pair, error_budget)
    order = np.arange(len(source))
    windows = _Windows(model, head, patch, config, mesh)
    for _, (image, labels) in tqdm(
        reader.batches(order, 1), total=len(order), desc="test", unit="image", disable=None
    ):
        predicted = predict_classes(windows, image[0], config)
        counts += confusion(predicted.ravel(), labels.ravel(), config.classes)
    mean, ratios = mean_iou(counts)
    right = float(np.trace(counts) / max(counts.sum(), 1))
    return SegmentationResult(mean, ratios, right, list(reader.damaged.values()))


def predict_classes(
    windows: "_Windows", image: np.ndarray, config: SegmentationConfig
) -> np.ndarray:
    """Class of each pixel of uint8 [H, W, 3], [H, W]."""
    height, width = image.shape[:2]
    total = np.zeros((height, width, config.classes), np.float32)
    for scale in config.scales:
        factor = config.crop * scale / min(height, width)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        picture = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        for mirrored in (False, True) if config.flip else (False,):
            scores = windows(picture[:, ::-1] if mirrored else picture)
            scores = resize_scores(scores[:, ::-1] if mirrored else scores, height, width)
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            total += scores / scores.sum(-1, keepdims=True)
    return total.argmax(-1)


class _Windows:
    """Logits of an image of any size, the mean over windows that slide across it."""

    def __init__(
        self,
        model: FeatureModel,
        head: Head,
        patch: int,
        config: SegmentationConfig,
        mesh: jax.sharding.Mesh | None,
    ):
        self._model, self._head, self._patch = model, head, patch
        self._config, self._mesh = config, mesh
        self._logits = jax.jit(
            lambda patches: to_pixels(head_logits(head, patches), patch, config.crop, config.crop)
        )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        side, batch = self._config.crop, self._config.batch
        height, width = image.shape[:2]
        image = np.pad(image, [(0, max(0, side - height)), (0, max(0, side - width)), (0, 0)])
        corners = [
            (top, left)
            for top in _starts(image.shape[0], side, self._config.stride)
            for left in _starts(image.shape[1], side, self._config.stride)
        ]
        total = np.zeros((*image.shape[:2], self._config.classes), np.float32)
        times = np.zeros((*image.shape[:2], 1), np.float32)
        for first in range(0, len(corners), batch):
            part = corners[first : first + batch]
            views = np.stack([image[t : t + side, l : l + side] for t, l in part])
            filled = np.pad(views, [(0, batch - len(views)), (0, 0), (0, 0), (0, 0)])
            patches = patch_map(
                self._model, filled, self._patch, self._config.layers, mesh=self._mesh
            )
            for (top, left), logits in zip(part, np.asarray(self._logits(patches))):
                total[top : top + side, left : left + side] += logits
                times[top : top + side, left : left + side] += 1
        return (total / times)[:height, :width]


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover everything, the last one at the end."""
    return sorted({min(start, size - window) for start in range(0, size - window + stride, stride)})
