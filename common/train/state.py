"""The training state as plain arrays, and how each of them lies on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import UserError
from common.sharding import state_shardings, use_mesh
from common.train.optimizer import OptimizerConfig, make_optimizer
from common.train.task import Path, PureDict, Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes; pure dicts and arrays only.

    Attributes:
      step: [] int32, batches consumed.
      params: every `nnx.Param` of the model, trained or not.
      opt_state: moments of the trained parameters.
      rest: variables that are not parameters (statistics, random streams).
      extra: what the task keeps beside (averaged parameters).
      skipped: [] int32, updates left out because loss or gradient was not finite. The learning
        rate's position is `step - skipped`.
      skipped_in_a_row: [] int32, how many of them were the last ones.
    """

    step: jax.Array
    params: PureDict
    opt_state: optax.OptState
    rest: PureDict
    extra: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class ModelParts:
    """The static part of a task's model: its graph; which parameters train, when, and decay."""

    def __init__(self, task: Task, seed: int):
        self.task = task
        self._build = lambda: task.build(nnx.Rngs(seed))
        self.graphdef, self.abstract_params, self.abstract_rest = nnx.split(
            nnx.eval_shape(self._build), nnx.Param, ...
        )
        variables = nnx.to_flat_state(self.abstract_params)
        self.trained = {path for path, v in variables if task.trainable(path, v)}
        if not self.trained:
            raise UserError("no parameter is trainable")

        def of_each(what: Callable[[Path, nnx.Variable], Any]) -> PureDict:
            return _unflatten(
                {path: what(path, v) for path, v in variables if path in self.trained}
            )

        self.decays = of_each(task.decays)
        self.trains_from = of_each(task.trains_from)
        self.rates = of_each(task.learning_rate_factor)
        self.clip_groups = of_each(task.clip_group)

    def optimizer(self, config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
        """Returns what updates the trained parameters, as the task wants each of them treated."""
        return make_optimizer(
            config,
            steps,
            self.decays,
            self.trains_from,
            rates=self.rates,
            clip_groups=self.clip_groups,
        )

    def fresh(self) -> tuple[PureDict, PureDict]:
        """Returns newly initialised parameters and the other variables."""
        _, params, rest = nnx.split(self._build(), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def merge(self, params: PureDict, rest: PureDict) -> nnx.Module:
        """Returns the model holding these arrays."""
        # Mapping copies the abstract states, which are then filled.
        param_state = jax.tree.map(lambda leaf: leaf, self.abstract_params)
        rest_state = jax.tree.map(lambda leaf: leaf, self.abstract_rest)
        nnx.replace_by_pure_dict(param_state, params)
        nnx.replace_by_pure_dict(rest_state, rest)
        return nnx.merge(self.graphdef, param_state, rest_state)

    def rest_of(self, model: nnx.Module) -> PureDict:
        """Returns the variables of a merged model that are not parameters, as they are now."""
        return nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])

    def split_trained(self, params: PureDict) -> tuple[PureDict, PureDict]:
        """Returns trained and frozen parameters, each a pure dict without the other's branches."""
        flat = _flatten(params)
        trained = {path: leaf for path, leaf in flat.items() if path in self.trained}
        frozen = {path: leaf for path, leaf in flat.items() if path not in self.trained}
        return _unflatten(trained), _unflatten(frozen)

    def join(self, trained: PureDict, frozen: PureDict) -> PureDict:
        """The inverse of `split_trained`."""
        return _unflatten({**_flatten(frozen), **_flatten(trained)})


def init_state(
    parts: ModelParts,
    optimizer: optax.GradientTransformation,
    initial_params: PureDict | None = None,
    initial_rest: PureDict | None = None,
) -> TrainState:
    """Returns the state before the first step; traced inside `jit` for sharded arrays.

    Args:
      parts: the model's static part.
      optimizer: over the trained parameters.
      initial_params: used instead of fresh ones of the same names; may be a part of them.
      initial_rest: used instead of the fresh variables of the same names.
    """
    params, rest = parts.fresh()
    params = _unflatten({**_flatten(params), **_flatten(initial_params or {})})
    rest = _unflatten({**_flatten(rest), **_flatten(initial_rest or {})})
    # A weakly typed parameter would promote otherwise after it has been restored.
    params, rest = jax.tree.map(_strongly_typed, (params, rest))
    trained, _ = parts.split_trained(params)
    extra = jax.tree.map(_strongly_typed, parts.task.init_extra(params))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(trained), rest, extra, zero, zero)


def abstract_train_state(
    parts: ModelParts, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s that carry their shardings.

    Parameters and other variables lie as their logical axes say; whatever mirrors a parameter
    (moments, averages) lies like it; the rest is replicated.
    """
    rules = parts.task.rules
    with use_mesh(mesh, rules):
        abstract = jax.eval_shape(lambda: init_state(parts, optimizer))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = state_shardings(parts.abstract_params, mesh, rules)
    rest = state_shardings(parts.abstract_rest, mesh, rules)

    def mirror(tree: Any) -> Any:
        return _shardings_of_mirror(tree, abstract.params, params, replicated)

    shardings = TrainState(
        step=replicated,
        params=params,
        opt_state=mirror(abstract.opt_state),
        rest=rest,
        extra=mirror(abstract.extra),
        skipped=replicated,
        skipped_in_a_row=replicated,
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def shardings_of(abstract: Any) -> Any:
    """Returns the shardings that a tree of `jax.ShapeDtypeStruct` carries."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _strongly_typed(leaf: jax.Array) -> jax.Array:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else jax.lax.convert_element_type(leaf, leaf.dtype)


def _shardings_of_mirror(
    tree: Any, params: PureDict, shardings: PureDict, replicated: NamedSharding
) -> Any:
    """Gives a leaf the sharding of the parameter whose path its own path ends with."""
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            _flatten(params).items(), _flatten(shardings).values(), strict=True
        )
    }

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(getattr(key, "key", key) for key in path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, replicated))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def _flatten(tree: PureDict, prefix: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    flat: dict[tuple[Any, ...], Any] = {}
    for key, value in tree.items():
        path = (*prefix, key)
        flat.update(_flatten(value, path) if isinstance(value, dict) else {path: value})
    return flat


def _unflatten(flat: dict[tuple[Any, ...], Any]) -> PureDict:
    tree: PureDict = {}
    for path, value in flat.items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return tree
