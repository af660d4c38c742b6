"""A backbone with its heads, as student and teacher."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.vit import ViT, ViTConfig
from common.sharding import DEFAULT_RULES, shard
from dino.heads import HeadConfig, ProjectionHead

# A head's prototypes are its only long dimension: they are what FSDP divides.
RULES = DEFAULT_RULES.replace(prototypes=("tensor", "fsdp"))


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Shape of a backbone with its heads.

    Attributes:
      backbone: the vision transformer.
      dino_head: of class tokens.
      ibot_head: of masked patches, with weights of its own; None: `dino_head` serves both.
    """

    backbone: ViTConfig
    dino_head: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(131_072, 384))
    ibot_head: HeadConfig | None = dataclasses.field(
        default_factory=lambda: HeadConfig(131_072, 256)
    )

    @property
    def patch_head(self) -> HeadConfig:
        """The head of masked patches, whichever it is."""
        return self.dino_head if self.ibot_head is None else self.ibot_head


class Network(nnx.Module):
    """A vision transformer and the heads that are trained on it.

    `ibot_head` is None where one head serves class tokens and patches.
    """

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs):
        width, dtype = config.backbone.width, jnp.dtype(config.backbone.dtype)

        def head(shape: HeadConfig) -> ProjectionHead:
            return ProjectionHead(width, shape, dtype=dtype, rngs=rngs)

        self.backbone = ViT(config.backbone, rngs=rngs)
        self.dino_head = head(config.dino_head)
        self.ibot_head = None if config.ibot_head is None else head(config.ibot_head)

    @property
    def patch_head(self) -> ProjectionHead:
        """The head of masked patches."""
        return self.dino_head if self.ibot_head is None else self.ibot_head


class Centre(nnx.Variable):
    """A moving mean of the teacher's logits."""


class Count(nnx.Variable):
    """Updates made before."""


class Pair(nnx.Module):
    """The student and the teacher that follows it, which start as one.

    Attributes:
      student, teacher: two `Network`s of one shape. The teacher's parameters do not train.
      updates: `[]` int32, for the schedules of the loss.
      dino_centre, ibot_centre: `[K]` of the teacher's logits, where they are centred so.
    """

    def __init__(self, config: NetworkConfig, *, centres: bool = False, rngs: nnx.Rngs):
        self.student = Network(config, rngs=rngs)
        self.teacher = nnx.clone(self.student)
        self.updates = Count(jnp.zeros((), jnp.int32))

        def centre(count: int) -> Centre | None:
            return Centre(jnp.zeros(count), axes=("vocab",)) if centres else None

        self.dino_centre = centre(config.dino_head.prototypes)
        self.ibot_centre = centre(config.patch_head.prototypes)


def gather_patches(patches: jax.Array, indices: jax.Array, images: int) -> jax.Array:
    """The masked patches of a batch, `[B, S, D]` (see `dino.data` for the list).

    Args:
      patches: `[2B, N, D]`, of both global views of each image.
      indices: `[B, S]` int32, numbers among the tokens of each group of images.
      images: g, images of a group.
    """
    rows, places = indices.shape
    groups = rows // images
    tokens = shard(patches.reshape(groups, -1, patches.shape[-1]), "batch", None, None)
    lists = shard(indices.reshape(groups, images * places), "batch", None)
    # Mapped, so that the compiler sees that no patch leaves its group.
    found = jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(tokens, lists)
    return shard(found.reshape(rows, places, -1), "batch", None, None)
