"""Evaluation: sums over all batches of a set, divided once."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from common.train.task import Loss

HostBatch = Mapping[str, np.ndarray]
EvalSets = Mapping[str, Callable[[], Iterable[HostBatch]]]


def evaluate(
    eval_step: Callable[[Any, Any, jax.Array], Loss],
    state: Any,
    batches: Iterable[HostBatch],
    place: Callable[[HostBatch], Any],
    key: jax.Array,
    limit: int | None = None,
) -> dict[str, float]:
    """Returns the mean loss and metrics over the weights of all batches.

    Args:
      eval_step: `(state, batch, key) -> Loss`.
      state: the training state.
      batches: finite; the last padded to full size with rows of weight 0.
      place: puts a host batch onto the mesh.
      key: batch i gets `fold_in(key, i)`.
      limit: at most so many batches; None takes all.

    Raises:
      ValueError: the batches have no weight at all.
    """
    sums = {"loss": 0.0}
    weight = 0.0
    pending: Loss | None = None

    def add(loss: Loss) -> None:
        nonlocal weight
        loss = jax.device_get(loss)
        weight += float(loss.weight)
        for name, value in {"loss": loss.total, **loss.metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)

    for index, batch in enumerate(itertools.islice(batches, limit)):
        # Fetching one batch late keeps the device busy and bounds how far the host runs ahead.
        current = eval_step(state, place(batch), jax.random.fold_in(key, index))
        if pending is not None:
            add(pending)
        pending = current
    if pending is not None:
        add(pending)
    if weight == 0:
        raise ValueError("nothing to evaluate: no batches, or none with a weight")
    return {name: value / weight for name, value in sums.items()}
