"""Prefill and decode loop as programs to compile before there is a device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import UserError
from common.generate.decode import READ_IN_PLACE, decode, prefill
from common.generate.sampling import Sampling
from common.models import LanguageModel
from common.models.language_model import DecodeCache
from common.sharding import DEFAULT_RULES, Rules, partition_spec, state_shardings
from common.sharding.program import Inference, Program

# Static in the loop; it sets the size of the buffers of emitted tokens alone.
NEW_TOKENS = 128


def language_programs(
    build: Callable[[], LanguageModel],
    devices: Sequence[jax.Device],
    inference: Inference,
    *,
    heads: int,
    prefill_flops: Callable[[int, int], float],
    decode_flops: Callable[[int, int], float],
    empty_cache: Callable[[Any], DecodeCache] | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Mapping[str, Callable[[], Program]]:
    """Returns what `generate` runs: "prefill", the first chunk of prompts, and "decode".

    The parameters are held in the model's compute dtype, over `data × tensor` of all devices.

    Args:
      build: makes the model; only traced.
      devices: of a topology.
      inference: rows, context, prompt.
      heads: query heads, by which devices are grouped (`Inference.mesh`).
      prefill_flops: of so many rows of so many tokens each.
      decode_flops: of one token for so many rows, behind a context of so many tokens.
      empty_cache: makes the cache that the model decodes with, where that is not its `init_cache`.
      rules: logical axis names to mesh axes.
    """
    if inference.prompt > inference.context:
        raise UserError(
            f"a prompt of {inference.prompt} tokens needs a context of as many, not "
            f"{inference.context}: raise --context or lower --prompt"
        )
    mesh = inference.mesh(devices, heads)
    parts = _Parts(build, mesh, rules, inference)

    def prefill_program() -> Program:
        tokens = parts.rows((inference.prompt,), jnp.int32)
        valid = parts.rows((inference.prompt,), bool)
        return Program(
            function=prefill,
            arguments=(parts.graphdef, parts.state, tokens, valid),
            keywords={"capacity": inference.context},
            holds={"parameters": parts.state, "batch": (tokens, valid)},
            flops=prefill_flops(inference.rows, inference.prompt),
            items=inference.rows * inference.prompt,
            shape=f"{inference.rows} × {inference.prompt} tokens",
            mesh=mesh,
            rules=rules,
            notes=parts.notes,
        )

    def decode_program() -> Program:
        logits = parts.rows((parts.model.vocab_size,), jnp.float32)
        cache = parts.cache(empty_cache)
        key = jax.eval_shape(lambda: jax.random.key(0))
        stop = jax.ShapeDtypeStruct((1,), jnp.int32)
        whole = NamedSharding(mesh, PartitionSpec())
        key, stop = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in (key, stop))
        return Program(
            function=decode,
            arguments=(parts.graphdef, parts.state, logits, cache, key, stop),
            keywords={
                "sampling": Sampling(),
                "max_new_tokens": NEW_TOKENS,
                "in_place": devices[0].platform in READ_IN_PLACE,
            },
            holds={"parameters": parts.state, "cache": cache, "logits": logits},
            flops=decode_flops(inference.rows, inference.context),
            items=inference.rows,
            shape=f"{inference.rows} × 1 token, context {inference.context}",
            mesh=mesh,
            rules=rules,
            loops=True,
            notes=parts.notes,
        )

    return {"prefill": prefill_program, "decode": decode_program}


def place_parameters(
    model: nnx.Module, dtype: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> tuple[nnx.GraphDef, Any]:
    """Splits an abstract model into graph and state, in `dtype` and where its axes say."""
    graphdef, state = nnx.split(model)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
        nnx.to_pure_dict(state),
        state_shardings(state, mesh, rules),
    )
    nnx.replace_by_pure_dict(state, placed)
    return graphdef, state


class _Parts:
    """The abstract model and its state on the mesh."""

    def __init__(
        self, build: Callable[[], LanguageModel], mesh: Mesh, rules: Rules, inference: Inference
    ):
        self.model = nnx.eval_shape(build)
        self._mesh, self._rules, self._inference = mesh, rules, inference
        self.graphdef, self.state = place_parameters(self.model, self.model.dtype, mesh, rules)
        groups = mesh.shape["data"]
        self.notes = (
            []
            if inference.rows % groups == 0
            else [f"{inference.rows} rows do not divide among {groups} groups: each works on all"]
        )

    def rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array of rows `[B, *shape]`."""
        whole = (self._inference.rows, *shape)
        axes = ("batch", *(None,) * len(shape))
        spec = partition_spec(axes, whole, self._mesh, self._rules)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(self._mesh, spec))

    def cache(self, empty_cache: Callable[[Any], DecodeCache] | None) -> DecodeCache:
        """An empty decode cache, taken apart, its rows where the batch's are."""
        if empty_cache is None:
            rows, context = self._inference.rows, self._inference.context
            empty = jax.eval_shape(lambda: self.model.init_cache(rows, context))
        else:
            empty = jax.eval_shape(
                lambda state: empty_cache(nnx.merge(self.graphdef, state)), self.state
            )

        unrolled = jax.eval_shape(lambda cache: cache.unrolled(), empty)
        return jax.tree.map(lambda x: self.rows(x.shape[1:], x.dtype), unrolled)
