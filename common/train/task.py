"""What a paper tells the Trainer: its model, its loss, and what trains."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from common.sharding import DEFAULT_RULES, Rules, variable_axes

Batch = Mapping[str, jax.Array]
PureDict = dict[Any, Any]
Path = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a batch as sums, so that batches of any size add up without bias.

    Attributes:
      total: [] f32, sum of the loss over the batch's weights.
      weight: [] f32, sum of these weights; the loss is `total / weight`.
      metrics: further sums over the same weights, each [] f32.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Task(abc.ABC):
    """One training objective. `build` and `loss` are what a paper must write."""

    rules: Rules = DEFAULT_RULES
    unit: str = "tokens"  # What the weights of a batch count.

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the model with fresh parameters; traced, so the arrays appear on the mesh."""

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Loss:
        """Returns the loss of one (micro-)batch.

        Variables of the model that are not parameters (running statistics) may be updated in
        place. A loss that is not a sum over examples must not be accumulated.
        """

    def evaluate(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Loss:
        """Returns the sums that evaluation adds up; the training loss unless overridden."""
        return self.loss(model, batch, key)

    def trainable(self, path: Path, variable: nnx.Variable) -> bool:
        """Returns whether a parameter trains; the others get neither gradient nor moments."""
        return isinstance(variable, nnx.Param)

    def decays(self, path: Path, variable: nnx.Variable) -> bool:
        """Returns whether weight decay applies: to matrices, not counting a stacked axis."""
        return sum(name != "layers" for name in variable_axes(variable)) >= 2

    def trains_from(self, path: Path, variable: nnx.Variable) -> int:
        """Returns after how many updates a trained parameter begins to change; the schedule of the
        learning rate goes on meanwhile, and its moments gather."""
        return 0

    def learning_rate_factor(self, path: Path, variable: nnx.Variable) -> Any:
        """Returns by what a parameter's learning rate (and decay) is multiplied: a number, or a
        numpy array that broadcasts to it, such as one of `[layers, 1, 1]` for stacked blocks."""
        return 1.0

    def clip_group(self, path: Path, variable: nnx.Variable) -> str:
        """Returns the name of the group that a parameter's gradient is clipped with."""
        return ""

    def init_extra(self, params: PureDict) -> Any:
        """Returns further state, such as averaged parameters; any pytree of arrays."""
        return {}

    def initial_rest(self, abstract: PureDict) -> PureDict:
        """Returns a new run's values for variables that are not parameters, as far as it has them.

        The place of a frozen model's weights: called outside of the compiled initialisation, where
        arrays are no constants of a program. A resumed run has them from its checkpoint.

        Args:
          abstract: those variables as `jax.ShapeDtypeStruct`s that carry their shardings.

        Returns:
          A part of the same tree; what `build` gives holds elsewhere.
        """
        return {}

    def after_update(self, params: PureDict, extra: Any, step: jax.Array) -> tuple[PureDict, Any]:
        """Returns parameters and extra state after update number `step` (the first is 1).

        Here an average follows the parameters (in `extra`), or a teacher its student (both among
        the parameters, the teacher not trainable). A skipped update skips this too.
        """
        return params, extra

    def eval_params(self, params: PureDict, extra: Any) -> PureDict:
        """Returns the parameters that evaluation uses."""
        return params

    def flops_per_step(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float | None:
        """Returns the FLOPs of one training step, counted by hand, or None if not known.

        Forward and backward, matrix products exact, nothing for rematerialisation: what MFU
        means.
        """
        return None
