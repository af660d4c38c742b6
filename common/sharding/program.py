"""A program that can be compiled before there is a device to run it, and the work it stands for.

A paper's `plan.py` makes them, `python -m common.plan` compiles them and tells what they take.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from common.errors import UserError
from common.sharding.mesh import MeshConfig, make_mesh
from common.sharding.rules import DEFAULT_RULES, Rules, use_mesh


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the arguments it will be called with.

    Attributes:
      function: jitted, as it runs later; static arguments are bound or among `keywords`.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings on the mesh's devices.
      holds: what the arguments are, by name ("parameters", "optimizer", "cache"): parts of them.
      mesh, rules: where and how it runs.
      flops: of the model in one step, all devices together: what MFU means, counted by hand.
      recomputed_flops: what rematerialisation adds to them.
      items: how many of `unit` a step works off.
      shape: what a step is given, in words.
      unit: "tokens", "images".
      loops: the program is a loop whose number of turns only the data knows, and a step is a turn.
      keywords: further arguments by name.
      notes: what a reader of its plan should know.
    """

    function: Any
    arguments: tuple[Any, ...]
    holds: Mapping[str, Any]
    mesh: Mesh
    flops: float
    items: int
    shape: str
    unit: str = "tokens"
    recomputed_flops: float = 0.0
    rules: Rules = DEFAULT_RULES
    loops: bool = False
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    def lower(self, platform: str) -> jax.stages.Lowered:
        """Traces the function and lowers it for "tpu", "cuda" or "cpu"."""
        with use_mesh(self.mesh, self.rules):
            traced = self.function.trace(*self.arguments, **self.keywords)
            return traced.lower(lowering_platforms=(platform,))


@dataclasses.dataclass(frozen=True)
class Inference:
    """What programs that do not train are to be planned for.

    Attributes:
      rows: of a batch (texts, images).
      context: tokens that a row has room for.
      prompt: tokens of a row that are read in one call.
      tensor: devices that share one copy of the parameters; None leaves it to the program.
    """

    rows: int = 1
    context: int = 8192
    prompt: int = 2048
    tensor: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "context", "prompt", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")

    def mesh(self, devices: Sequence[jax.Device], divides: int) -> Mesh:
        """Returns `data × tensor` over all devices.

        By default as many devices share the parameters as divide `divides` (a model's heads), and
        the groups that this gives work on rows of their own, as far as there are rows for them.
        """
        count = len(devices)
        groups = math.gcd(count // math.gcd(count, divides), self.rows)
        tensor = self.tensor or count // groups
        if count % tensor:
            raise UserError(f"{count} devices do not divide into groups of {tensor}")
        return make_mesh(MeshConfig(data=count // tensor, tensor=tensor), devices)
