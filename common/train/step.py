"""One optimizer step: gradients over micro-batches, clipping, update, non-finite guard."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.sharding import BATCH_AXES, batch_sharding, use_mesh
from common.train.state import ModelParts, TrainState, shardings_of
from common.train.task import Batch, Loss, PureDict

Metrics = dict[str, jax.Array]


def make_train_step(
    parts: ModelParts,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    abstract: TrainState,
    *,
    seed: int = 0,
    accumulation: int = 1,
    log_param_norm: bool = False,
) -> Any:
    """Returns the compiled-on-call step `(state, batch) -> (state, metrics)`; donates the state.

    The batch's rows are split into `accumulation` strided micro-batches, whose summed losses and
    gradients are added in fp32 and divided once by the total weight. Randomness comes from the
    seed and `state.step` alone. Where loss or gradient norm is not finite, the update is left out
    exactly (parameters, moments, statistics and the schedule's position stay) and counted, but the
    batch is spent: `step` goes on.

    Args:
      parts: the model's static part.
      optimizer: as `make_optimizer` gives it, over the trained parameters.
      schedule: its learning rate, for the metrics.
      mesh: where to run.
      abstract: as `abstract_train_state` gives it.
      seed: of the run.
      accumulation: number of micro-batches.
      log_param_norm: also report the global norm of the parameters.
    """
    shardings = shardings_of(abstract)
    optimizer = optax.with_extra_args_support(optimizer)
    gradients = _Gradients(parts, mesh, parts.split_trained(shardings.params)[0], accumulation)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads, rest = gradients(state, batch, key)
        weight = jnp.where(loss.weight == 0, 1.0, loss.weight)
        mean, grad_norm = loss.total / weight, optax.tree.norm(grads) / weight
        finite = jnp.isfinite(mean) & jnp.isfinite(grad_norm)
        new = _updated(parts, optimizer, state, grads, weight, grad_norm, rest, finite)
        metrics = {
            "loss": mean,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "weight": loss.weight,
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
            **{name: value / weight for name, value in loss.metrics.items()},
        }
        if log_param_norm:
            metrics["param_norm"] = optax.tree.norm(new.params)
        return new, metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
    )
    return _WithMesh(jitted, mesh, parts)


def make_eval_step(parts: ModelParts, mesh: Mesh, abstract: TrainState) -> Any:
    """Returns `(state, batch, key) -> Loss`: the task's evaluation sums of one batch."""

    def step(state: TrainState, batch: Batch, key: jax.Array) -> Loss:
        params = parts.task.eval_params(state.params, state.extra)
        return parts.task.evaluate(parts.merge(params, state.rest), batch, key)

    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        in_shardings=(shardings_of(abstract), batch_sharding(mesh), replicated),
        out_shardings=replicated,
    )
    return _WithMesh(jitted, mesh, parts)


def _updated(
    parts: ModelParts,
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    grads: PureDict,
    weight: jax.Array,
    norm: jax.Array,
    rest: PureDict,
    finite: jax.Array,
) -> TrainState:
    """Returns the state after an update, or, where it is not finite, without it.

    A branch, and no choice between old and new values: that would copy most of the state before it
    is written. The gradients, summed, are divided by the weight in here, as a factor that the
    compiler takes into what reads them; their mean's norm is `norm`.
    """

    def update() -> tuple[PureDict, Any, PureDict, Any]:
        trained, frozen = parts.split_trained(state.params)
        mean = jax.tree.map(lambda g: g * (1 / weight), grads)
        updates, opt_state = optimizer.update(mean, state.opt_state, trained, norm=norm)
        params = parts.join(optax.apply_updates(trained, updates), frozen)
        params, extra = parts.task.after_update(params, state.extra, state.step + 1)
        return params, opt_state, rest, extra

    def keep() -> tuple[PureDict, Any, PureDict, Any]:
        return state.params, state.opt_state, state.rest, state.extra

    params, opt_state, rest, extra = jax.lax.cond(finite, update, keep)
    return TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        rest=rest,
        extra=extra,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )


class _Gradients:
    """`(state, batch, key)` to summed loss, summed fp32 gradients, and the other variables after.

    Sums are over the micro-batches, and over the weights in each.
    """

    def __init__(self, parts: ModelParts, mesh: Mesh, shardings: PureDict, accumulation: int):
        self._parts = parts
        self._mesh = mesh
        self._shardings = shardings  # Of the gradients, like the trained parameters.
        self._accumulation = accumulation

    def __call__(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[Loss, PureDict, PureDict]:
        one = functools.partial(self._of_micro_batch, *self._parts.split_trained(state.params))
        if self._accumulation == 1:
            return one(state.rest, batch, jax.random.fold_in(key, 0))

        def micro(carry: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            sums, rest = carry
            index, batch = item
            loss, grads, rest = one(rest, batch, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, sums, (loss, grads)), rest), None

        batches = _micro_batches(batch, self._accumulation, self._mesh)
        shapes = jax.eval_shape(one, state.rest, jax.tree.map(lambda x: x[0], batches), key)
        loss, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
        start = ((loss, self._constrain(grads)), state.rest)
        (sums, rest), _ = jax.lax.scan(micro, start, (jnp.arange(self._accumulation), batches))
        return (*sums, rest)

    def _of_micro_batch(
        self, trained: PureDict, frozen: PureDict, rest: PureDict, batch: Batch, key: jax.Array
    ) -> tuple[Loss, PureDict, PureDict]:
        parts = self._parts

        def total(trained: PureDict) -> tuple[jax.Array, tuple[Loss, PureDict]]:
            model = parts.merge(parts.join(trained, frozen), rest)
            loss = parts.task.loss(model, batch, key)
            loss = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loss)
            return loss.total, (loss, parts.rest_of(model))

        (_, (loss, rest_after)), grads = jax.value_and_grad(total, has_aux=True)(trained)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return loss, self._constrain(grads), rest_after

    def _constrain(self, grads: PureDict) -> PureDict:
        # Said outright, so that FSDP's gradients are scattered and not summed whole everywhere.
        return jax.lax.with_sharding_constraint(grads, self._shardings)


def _micro_batches(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """[B, ...] to [count, B / count, ...], every `count`-th row together.

    Strided, so that each micro-batch takes the same number of rows from every device.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(split, batch)


class _WithMesh:
    """A jitted function that is traced and run with the mesh and the task's rules in force."""

    def __init__(self, function: Any, mesh: Mesh, parts: ModelParts):
        self._function = function
        self._context = lambda: use_mesh(mesh, parts.task.rules)

    def __call__(self, *arguments: Any) -> Any:
        with self._context():
            return self._function(*arguments)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """Traces for arguments or `jax.ShapeDtypeStruct`s, to be lowered for any platform."""
        with self._context():
            return self._function.trace(*arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Traces for arguments or `jax.ShapeDtypeStruct`s, to be compiled ahead of time."""
        with self._context():
            return self._function.lower(*arguments)
