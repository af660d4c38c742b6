"""The models that are compared: Griffin, Hawk, and full attention, of equal size."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models import Decoder, DecoderConfig, LanguageModel
from common.train import Task
from common.train.language import NextToken
from recurrentgemma.model import GRIFFIN_PATTERN, HAWK_PATTERN, Griffin, GriffinConfig
from recurrentgemma.objective import UNDECAYED

GRIFFIN, HAWK, ATTENTION = "griffin", "hawk", "attention"
RECURRENT = (GRIFFIN, HAWK)
LABELS = {GRIFFIN: "Griffin", HAWK: "Hawk", ATTENTION: "full attention"}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of the models.

    Attributes:
      name: GRIFFIN, HAWK or ATTENTION.
      config: its shape.
    """

    name: str
    config: GriffinConfig | DecoderConfig

    def build(self, rngs: nnx.Rngs) -> LanguageModel:
        """The model with fresh parameters."""
        if isinstance(self.config, DecoderConfig):
            return Decoder(self.config, rngs=rngs)
        return Griffin(self.config, rngs=rngs)

    def abstract(self) -> LanguageModel:
        """The model without arrays, to ask for shapes."""
        return nnx.eval_shape(lambda: self.build(nnx.Rngs(0)))

    def filled(self, seed: int) -> LanguageModel:
        """The model with small random numbers for parameters: all that timing needs.

        Nothing is compiled for it, unlike for the initialisation that training starts from.
        """
        graphdef, state = nnx.split(self.abstract())
        draw = np.random.default_rng(seed).normal
        return nnx.merge(
            graphdef, jax.tree.map(lambda x: jnp.asarray(draw(0, 0.05, x.shape), x.dtype), state)
        )

    def num_parameters(self) -> int:
        """Exact parameter count."""
        return self.config.num_parameters()


def contenders(config: GriffinConfig) -> tuple[Contender, ...]:
    """Griffin of the given shape, Hawk, and a full-attention decoder, all of its size.

    The decoder is the papers' baseline: rotary positions, multi-query attention with the same
    heads, the same kind of gated MLP, depth, width, embedding and head. Attention has fewer
    parameters than a recurrent block, so the width of the MLP makes up the difference.
    """
    griffin = dataclasses.replace(config, pattern=GRIFFIN_PATTERN)
    size = griffin.num_parameters()
    hawk = dataclasses.replace(config, pattern=HAWK_PATTERN)
    attention = DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.width,
        mlp_width=config.mlp_width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_layers=config.num_layers,
        max_length=None,
        rope_base=config.rope_base,
        scale_embedding=config.scale_embedding,
        logits_softcap=config.logits_softcap,
        dtype=config.dtype,
        remat=config.remat,
    )
    return (
        Contender(GRIFFIN, griffin),
        Contender(HAWK, _of_size(hawk, size)),
        Contender(ATTENTION, _of_size(attention, size)),
    )


def _of_size(config: Any, size: int) -> Any:
    """The shape with the MLP width that brings the parameter count closest to `size`."""
    wider = dataclasses.replace(config, mlp_width=config.mlp_width + 1)
    slope = wider.num_parameters() - config.num_parameters()
    change = round((size - config.num_parameters()) / slope)
    return dataclasses.replace(config, mlp_width=config.mlp_width + change)


class ContenderTask(NextToken):
    """Next-token prediction; the same kinds of parameters decay in every contender."""

    def __init__(self, contender: Contender, *, loss_chunk: int | None = None):
        super().__init__(contender.build, loss_chunk=loss_chunk)

    def decays(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        return not UNDECAYED.intersection(path) and Task.decays(self, path, variable)
