"""A trained model beside the one that trains: its weights are state of the run, not parameters.

They lie on the mesh by their own logical axes, are in the run's checkpoints, so that a resumed run
needs nothing else, and are no constants of the compiled step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.sharding import variable_axes
from common.train.task import PureDict


class FrozenWeight(nnx.Variable):
    """A weight that never trains."""


class Frozen:
    """A model as a task holds it: graph and shapes, and the weights until the run has them.

    Args:
      model: the trained model; for a program that only gets compiled it may be abstract.
    """

    def __init__(self, model: nnx.Module):
        self._graphdef, self._state = nnx.split(model)

    def room(self) -> nnx.List:
        """An attribute for the model that `Task.build` makes, with room for the weights.

        They would be constants of the initialisation if they were put there at once.
        """
        variables = [variable for _, variable in nnx.to_flat_state(self._state)]
        return nnx.List(
            [FrozenWeight(jnp.zeros(v.shape, v.dtype), axes=variable_axes(v)) for v in variables]
        )

    def weights(self, abstract: PureDict) -> PureDict:
        """What `Task.initial_rest` gives for that attribute.

        Args:
          abstract: its part of the variables that are not parameters.
        """
        flat = nnx.to_flat_state(self._state)
        values = {number: variable.get_value() for number, (_, variable) in enumerate(flat)}
        return jax.device_put(values, {number: leaf.sharding for number, leaf in abstract.items()})

    def model(self, room: Any) -> Any:
        """The model, out of the weights that lie in that attribute."""
        weights = [weight.get_value() for weight in room]
        return nnx.merge(
            self._graphdef, jax.tree.unflatten(jax.tree.structure(self._state), weights)
        )
