"""What every contender of the RecurrentGemma benchmark offers."""

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
        task: "prefill" reads the context into a cache, "decode" writes behind it, "train" makes one
            step of AdamW.
        dtype: Compute dtype. Inference keeps its parameters in it, training in float32.
        batch: Rows.
        context: Tokens of a row.
        new_tokens: Tokens that a decoding repeat writes in each row.
    """

    task: Literal["prefill", "decode", "train"]
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
