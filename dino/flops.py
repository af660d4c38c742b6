"""FLOPs of a training step, counted by hand: two for each multiply-add of a matrix product.

What is elementwise (norms, softmaxes, Sinkhorn-Knopp over the logits, the optimizer) and KoLeo's
products of class tokens, a thousandth of the rest, are left out.
"""

import dataclasses
from collections.abc import Mapping

import jax

from common.models.vit import ViTConfig
from dino.heads import HeadConfig
from dino.networks import NetworkConfig


def head_flops(config: HeadConfig, width: int) -> float:
    """FLOPs of one row's way through a head, its logits included."""
    mlp = width * config.hidden + config.hidden**2 + config.hidden * config.bottleneck
    return 2.0 * (mlp + config.bottleneck * config.prototypes)


@dataclasses.dataclass(frozen=True)
class Views:
    """What a batch holds for each image.

    Attributes:
      images: B.
      local_views: V.
      global_size, local_size: pixels, height and width.
      patches: rows of the patch head for each image, places of padding included.
    """

    images: int
    local_views: int
    global_size: tuple[int, int]
    local_size: tuple[int, int]
    patches: int


def views_in(batch: Mapping[str, jax.ShapeDtypeStruct]) -> Views:
    """Reads the shapes of a batch of `dino.data`."""
    images, local_views = batch["local_crops"].shape[:2]
    return Views(
        images,
        local_views,
        batch["global_crops"].shape[2:4],
        batch["local_crops"].shape[2:4],
        batch["masked_indices"].shape[1],
    )


def student_flops(config: NetworkConfig, views: Views) -> float:
    """FLOPs of the student's forward pass over a batch, without the rows that drop path saves."""
    vit = config.backbone
    kept = 1.0 - vit.drop_path
    backbone = sum(
        count * (_embedding(vit, size) + kept * (vit.flops(*size) - _embedding(vit, size)))
        for count, size in ((2, views.global_size), (views.local_views, views.local_size))
        if count
    )
    return views.images * (backbone + heads_flops(config, 2 + views.local_views, views.patches))


def teacher_flops(config: NetworkConfig, views: Views) -> float:
    """FLOPs of the teacher's forward pass over the global views."""
    backbone = 2 * config.backbone.flops(*views.global_size)
    return views.images * (backbone + heads_flops(config, 2, views.patches))


def training_flops(student: NetworkConfig, teacher: NetworkConfig, views: Views) -> float:
    """FLOPs of a step: the student forward and twice that backward, the teacher forward."""
    return 3.0 * student_flops(student, views) + teacher_flops(teacher, views)


def heads_flops(config: NetworkConfig, crops: int, patches: int) -> float:
    """FLOPs of both heads for an image's views and patches, forward."""
    width = config.backbone.width
    of_images = crops * head_flops(config.dino_head, width)
    return of_images + patches * head_flops(config.patch_head, width)


def _embedding(model: ViTConfig, size: tuple[int, int]) -> float:
    patches = (size[0] // model.patch_size) * (size[1] // model.patch_size)
    return 2.0 * patches * model.patch_size**2 * model.channels * model.width
