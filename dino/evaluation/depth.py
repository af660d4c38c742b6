"""Depth from frozen patches by a classification of bins (specification, section 6.6)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageEnhance
from tqdm import tqdm

from common.data.pipeline import RowOrder
from common.errors import UserError
from dino.evaluation.dense_data import DenseSource, Pair, random_crop
from dino.evaluation.dense_features import patch_map, resize_map
from dino.evaluation.features import FeatureModel, ImageReader

_EPSILON = 1e-3  # Metres, added before logarithms.
_UPSAMPLED = 4
_SCALES = (1, 2, 4, 8)  # Strides at which the gradient loss is taken.
_VARIANCE_FROM = 100  # The step from which on the loss looks at the spread of errors.
# Blocks that four-layer heads read, counted from 0.
_LAYERS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}


@dataclass(frozen=True)
class DepthConfig:
    """The head, its training and its test; by default NYU's.

    Attributes:
        layers: 1, or 4 blocks spread over the depth of the model.
        bins: Depths that are mixed.
        least, most: Metres, of the first and last bin; deeper pixels are not counted.
        crop: Height and width of a training crop in pixels.
        steps, batch: Of AdamW.
        learning_rate, weight_decay: Of AdamW.
        warm_up: Steps until the full learning rate, from a thousandth of it; then a cosine.
        clip: Largest norm of a gradient.
        rotation: Largest turn of a training image in degrees, half the time.
        eval_crop: The part of a test image that counts: "eigen" (NYU), "garg" (KITTI), "none".
        flip: Average over the image and its mirror image when testing.
        seed: Of weights, order and augmentation.
    """

    layers: Literal[1, 4] = 1
    bins: int = 256
    least: float = 1e-3
    most: float = 10.0
    crop: tuple[int, int] = (416, 544)
    steps: int = 38_400
    batch: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warm_up: int = 12_800
    clip: float = 35.0
    rotation: float = 2.5
    eval_crop: Literal["eigen", "garg", "none"] = "eigen"
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.least < self.most:
            raise UserError(f"depths from {self.least} to {self.most} m are no range")
        if self.bins < 2 or min(self.steps, self.batch, *self.crop) < 1:
            raise UserError("there are 2 bins or more, and 1 step, image and pixel or more")


def chosen_layers(count: int, depth: int) -> tuple[int, ...]:
    """Blocks, counted from 0, that a head of `count` layers reads of a model `depth` deep."""
    if count == 1:
        return (depth - 1,)
    if depth < count:
        raise UserError(f"a head of {count} layers needs as many blocks; the model has {depth}")
    spread = tuple(round((i + 1) * depth / count) - 1 for i in range(count))
    return _LAYERS.get(depth, spread)


Head = dict[str, jax.Array]
"""`kernel` [D, bins] and `bias` [bins]."""


def init_head(width: int, config: DepthConfig) -> Head:
    """Weights and biases uniform within 1 / sqrt(D)."""
    bound = width**-0.5
    kernel, bias = jax.random.split(jax.random.key(config.seed))
    return {
        "kernel": jax.random.uniform(kernel, (width, config.bins), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias, (config.bins,), minval=-bound, maxval=bound),
    }


def head_depth(head: Head, patches: jax.Array, config: DepthConfig) -> jax.Array:
    """Patches [B, h, w, D] to metres [B, 4 h, 4 w].

    Interpolation and the head's product are exchanged, which changes nothing and saves most of it.
    """
    logits = jnp.matmul(patches, head["kernel"], precision="highest") + head["bias"]
    logits = resize_map(logits, _UPSAMPLED * patches.shape[1], _UPSAMPLED * patches.shape[2])
    shares = jax.nn.relu(logits) + 0.1
    shares = shares / shares.sum(-1, keepdims=True)
    return shares @ jnp.linspace(config.least, config.most, config.bins)


def pixel_depth(
    head: Head, patches: jax.Array, patch: int, size: tuple[int, int], config: DepthConfig
) -> jax.Array:
    """Patches [B, h, w, D] of padded images to metres [B, H, W] at the images' own size."""
    coarse = head_depth(head, patches, config)[..., None]
    # What lies around is cut off in pixels: 4 values of `coarse` stand for one patch.
    height, width = patches.shape[1] * patch, patches.shape[2] * patch
    full = resize_map(coarse, height, width)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return full[:, top : top + size[0], left : left + size[1], 0]


def sig_loss(predicted: jax.Array, true: jax.Array, config: DepthConfig, step: Any) -> jax.Array:
    """Root of the variance of log errors plus 0.15 times their squared mean.

    For the first hundred steps of that mean alone. Pixels without a depth do not count.

    Args:
        predicted, true: Metres, [B, H, W].
        config: For the range of depths.
        step: Of training, from 0.
    """
    valid = (true > 0) & (true <= config.most)
    count = valid.sum()
    error = jnp.where(valid, jnp.log(predicted + _EPSILON) - jnp.log(true + _EPSILON), 0)
    mean = error.sum() / jnp.maximum(count, 1)
    spread = jnp.where(valid, jnp.square(error - mean), 0).sum() / jnp.maximum(count - 1, 1)
    inside = 0.15 * jnp.square(mean) + jnp.where(step < _VARIANCE_FROM, 0, spread)
    # A root's slope at 0 is infinite.
    return jnp.where(inside > 0, jnp.sqrt(jnp.where(inside > 0, inside, 1)), 0)


def gradient_loss(predicted: jax.Array, true: jax.Array, config: DepthConfig) -> jax.Array:
    """Differences of log errors two pixels apart, summed over strides and divided by pixels."""
    total = jnp.float32(0)
    for stride in _SCALES:
        p, t = predicted[:, ::stride, ::stride], true[:, ::stride, ::stride]
        valid = (t > 0) & (t <= config.most)
        error = jnp.where(valid, jnp.log(p + _EPSILON) - jnp.log(t + _EPSILON), 0)
        down = jnp.abs(error[:, :-2] - error[:, 2:]) * (valid[:, :-2] & valid[:, 2:])
        along = jnp.abs(error[:, :, :-2] - error[:, :, 2:]) * (valid[..., :-2] & valid[..., 2:])
        total += (down.sum() + along.sum()) / jnp.maximum(valid.sum(), 1)
    return total


def train_depth(
    model: FeatureModel,
    source: DenseSource,
    patch: int,
    depth: int,
    config: DepthConfig,
    *,
    error_budget: float = 0.01,
    mesh: jax.sharding.Mesh | None = None,
) -> Head:
    """Trains a head on random crops of images with depths.

    Args:
        model: The frozen model.
        source: Images with depths.
        patch: Side of its patches.
        depth: Its number of blocks.
        config: The setting.
        error_budget: How many images may be damaged.
        mesh: Of the model.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        config.learning_rate * 1e-3,
        config.learning_rate,
        min(config.warm_up, config.steps - 1),
        config.steps,
        1e-8,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        head: Head, state: Any, patches: jax.Array, true: jax.Array, step: jax.Array
    ) -> tuple[Head, Any]:
        def loss(head: Head) -> jax.Array:
            predicted = pixel_depth(head, patches, patch, true.shape[1:], config)
            slopes = gradient_loss(predicted, true, config)
            return sig_loss(predicted, true, config, step) + 0.5 * slopes

        updates, state = optimizer.update(jax.grad(loss)(head), state, head)
        return optax.apply_updates(head, updates), state

    reader = ImageReader(source, functools.partial(_augmented, config=config), error_budget)
    batches = reader.training_batches(
        RowOrder(len(source), config.seed), config.batch, config.steps
    )
    head, state, step = None, None, 0
    layers = chosen_layers(config.layers, depth)
    with tqdm(total=config.steps, desc="depth head", unit="step", disable=None) as progress:
        for _, (images, true) in batches:
            patches = patch_map(model, images, patch, layers, norm=False, with_cls=True, mesh=mesh)
            if head is None:
                head = init_head(patches.shape[-1], config)
                state = optimizer.init(head)
            head, state = update(head, state, patches, jnp.asarray(true), jnp.int32(step))
            step += 1
            progress.update()
    assert head is not None
    return head


def _augmented(pair: Pair, place: int, *, config: DepthConfig) -> Pair:
    """Turned a little, cut, mirrored, and with other gamma, brightness and colour."""
    rng = np.random.default_rng([config.seed, place])
    image, true = pair
    if config.rotation and rng.random() < 0.5:
        angle = rng.uniform(-config.rotation, config.rotation)
        image = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
        true = np.asarray(Image.fromarray(true).rotate(angle, Image.Resampling.NEAREST))
    image, true = random_crop(rng, image, true, config.crop, 0)
    if rng.random() < 0.5:
        image, true = image[:, ::-1], true[:, ::-1]
    if rng.random() < 0.5:
        values = 255 * (image / 255.0) ** rng.uniform(0.9, 1.1)
        picture = Image.fromarray(np.rint(values).astype(np.uint8))
        picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.75, 1.25))
        colours = np.asarray(picture, np.float32) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
        image = np.clip(np.rint(colours), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image), np.ascontiguousarray(true)


def score_depth(
    model: FeatureModel,
    head: Head,
    source: DenseSource,
    patch: int,
    depth: int,
    config: DepthConfig,
    *,
    error_budget: float = 0.01,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """Means over images of `depth_errors`, at each image's own size."""
    layers = chosen_layers(config.layers, depth)
    predict = jax.jit(
        lambda patches, size: pixel_depth(head, patches, patch, size, config), static_argnums=1
    )

    def seen(image: np.ndarray) -> np.ndarray:
        patches = patch_map(model, image, patch, layers, norm=False, with_cls=True, mesh=mesh)
        return np.asarray(predict(patches, image.shape[1:3]))

    reader = ImageReader(source, lambda pair, place: pair, error_budget)
    errors = []
    order = np.arange(len(source))
    for _, (image, true) in tqdm(
        reader.batches(order, 1), total=len(order), desc="test", unit="image", disable=None
    ):
        predicted = seen(image)
        if config.flip:
            predicted = (predicted + seen(image[:, :, ::-1])[:, :, ::-1]) / 2
        found = depth_errors(predicted[0], true[0], config)
        if found is not None:
            errors.append(found)
    if not errors:
        raise UserError("no test image has a depth that counts")
    return {name: float(np.mean([found[name] for found in errors])) for name in errors[0]}


def depth_errors(
    predicted: np.ndarray, true: np.ndarray, config: DepthConfig
) -> dict[str, float] | None:
    """How far predictions [H, W] are from depths, in metres; None where none counts.

    Returns:
        `rmse`, `abs_rel`, `log10`, `silog`, and `delta1`: the share within a factor of 1.25.
    """
    valid = (true > config.least) & (true <= config.most) & _CROPS[config.eval_crop](true.shape)
    if not valid.any():
        return None
    p = np.clip(predicted[valid].astype(np.float64), max(config.least, 1e-9), config.most)
    t = true[valid].astype(np.float64)
    logs = np.log(p) - np.log(t)
    return {
        "rmse": float(np.sqrt(np.mean((p - t) ** 2))),
        "abs_rel": float(np.mean(np.abs(p - t) / t)),
        "log10": float(np.mean(np.abs(logs)) / np.log(10)),
        "silog": float(100 * np.sqrt(max(np.mean(logs**2) - np.mean(logs) ** 2, 0.0))),
        "delta1": float(np.mean(np.exp(np.abs(logs)) < 1.25)),
    }


def _eigen(shape: tuple[int, ...]) -> np.ndarray:
    """NYU's part: of 480 × 640 pixels rows 45 to 470 and columns 41 to 600, in proportion."""
    return _inside(shape, (45 / 480, 471 / 480), (41 / 640, 601 / 640))


def _garg(shape: tuple[int, ...]) -> np.ndarray:
    """KITTI's part, where its laser sees."""
    return _inside(shape, (0.40810811, 0.99189189), (0.03594771, 0.96405229))


def _inside(
    shape: tuple[int, ...], rows: tuple[float, float], columns: tuple[float, float]
) -> np.ndarray:
    mask = np.zeros(shape, bool)
    (top, bottom), (left, right) = (
        [int(share * size) for share in part] for part, size in zip((rows, columns), shape)
    )
    mask[top:bottom, left:right] = True
    return mask


_CROPS: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "eigen": _eigen,
    "garg": _garg,
    "none": lambda shape: np.ones(shape, bool),
}
