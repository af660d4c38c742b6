"""Steps and tokens per second, not counting pauses for evaluation and checkpoints."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from common.train.goodput import Goodput


class RateMeter:
    """Counts steps between two looks at it."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted and starts the clock anew."""
        self._start = time.perf_counter()
        self._paused = 0.0
        self._steps = 0
        self._weight = 0.0

    def count(self, weight: float) -> None:
        """Adds one step with that many tokens."""
        self._steps += 1
        self._weight += weight

    @contextlib.contextmanager
    def paused(self, pending: Any = None) -> Iterator[None]:
        """Stops the clock, once the arrays of `pending` are ready."""
        jax.block_until_ready(pending)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def take(self, goodput: Goodput) -> tuple[float, dict[str, float]]:
        """Returns seconds a step and the metrics of the time since the last call."""
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        seconds = elapsed / max(1, self._steps)
        rates = {
            "perf/steps_per_second": 1 / seconds,
            "perf/weight_per_second": self._weight / elapsed,
            "perf/goodput": goodput.fraction,
        }
        self.restart()
        return seconds, rates
