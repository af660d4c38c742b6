"""What every contender of a model's benchmark offers."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

# One timed repeat: returns its seconds, without whatever must be set up for it.
Run = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One measurement.

    Attributes:
        task: What is done; the benchmark's docstring says what each means. "train" makes one step
            of AdamW.
        dtype: Compute dtype. Inference keeps its parameters in it, training in float32.
        batch: Rows.
        context: Tokens of a row.
        new_tokens: Tokens that a repeat which writes texts writes in each row.
    """

    task: str
    dtype: Literal["float32", "bfloat16"]
    batch: int
    context: int
    new_tokens: int


class Contender(Protocol):
    """One implementation with its weights."""

    vocab_size: int
    compile_seconds: float

    def describe(self) -> str:
        """Returns version and settings, one line."""
        ...

    def last_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the float32 logits `[B, V]` behind `tokens[:, :-1]`."""
        ...

    def prepare(self, setting: Setting, tokens: np.ndarray) -> Run:
        """Compiles for `tokens [batch, context + 1]`, the last column being the last target."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...
