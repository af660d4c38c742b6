"""Shapes of DINOv2's backbones: every public one, by the names of their releases."""

import dataclasses
import functools
from typing import Literal

from common.errors import UserError
from common.models.vit import ViTConfig

Color = tuple[float, float, float]
IMAGENET_MEAN: Color = (0.485, 0.456, 0.406)
IMAGENET_STD: Color = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A backbone, and what its images are like.

    Attributes:
      vit: the shape.
      image_mean, image_std: of red, green and blue from 0 to 1; images are normalised by them.
    """

    vit: ViTConfig
    image_mean: Color = IMAGENET_MEAN
    image_std: Color = IMAGENET_STD

    def __post_init__(self) -> None:
        if min(self.image_std) <= 0:
            raise UserError(f"image_std must be positive, not {self.image_std}")


@dataclasses.dataclass(frozen=True)
class _Size:
    """Row of the specification's table 2.1."""

    width: int
    layers: int
    heads: int
    mlp: Literal["mlp", "swiglu"] = "mlp"


_SIZES = {
    "s": _Size(384, 12, 6),
    "b": _Size(768, 12, 12),
    "l": _Size(1024, 24, 16),
    "g": _Size(1536, 40, 24, "swiglu"),
}
REGISTERS = 4


def public(size: str, registers: int = 0) -> ViTConfig:
    """A released shape: size "s", "b", "l" or "g", patches of 14 pixels, a table for 518."""
    row = _SIZES[size]
    return ViTConfig(
        width=row.width,
        num_layers=row.layers,
        num_heads=row.heads,
        mlp=row.mlp,
        registers=registers,
        interpolation="antialias" if registers else "offset",
    )


def vitl14_swiglu() -> ViTConfig:
    """ViT-L as it is trained from scratch, with SwiGLU; the released one was distilled."""
    return dataclasses.replace(public("l"), mlp="swiglu")


def vitl16() -> ViTConfig:
    """ViT-L with patches of 16 pixels and a table for 512, as chest X-rays are read."""
    return dataclasses.replace(public("l"), patch_size=16, image_size=512)


def smoke_model() -> ViTConfig:
    """A backbone of a few ten thousand parameters for images of 16 pixels."""
    return ViTConfig(width=32, num_layers=2, num_heads=2, patch_size=4, image_size=16)


# Every shape by name.
MODELS = {
    "smoke": smoke_model,
    **{f"vit{size}14": functools.partial(public, size) for size in _SIZES},
    **{f"vit{size}14_reg": functools.partial(public, size, REGISTERS) for size in _SIZES},
    "vitl14_swiglu": vitl14_swiglu,
    "vitl16": vitl16,
}
