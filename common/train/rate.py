"""Steps and tokens per second, not counting pauses for evaluation and checkpoints."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from common.train.goodput import Goodput


class RateMeter:
    """Counts steps between two looks at it."""

    def __init__(self, goodput: Goodput, unit: str) -> None:
        """Args:
        goodput: where the time spent on data is counted.
        unit: what the weights of a batch count, such as `tokens`.
        """
        self._goodput = goodput
        self._unit = unit
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted and starts the clock anew."""
        self._start = time.perf_counter()
        self._paused = 0.0
        self._data = self._goodput.seconds["data"]
        self._steps = 0
        self._weight = 0.0

    def count(self, weight: float) -> None:
        """Adds one step of that total weight."""
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

    def take(self) -> tuple[float, dict[str, float]]:
        """Returns seconds a step and the metrics of the time since the last call."""
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        steps = max(1, self._steps)
        seconds = elapsed / steps
        rates = {
            "perf/steps_per_second": 1 / seconds,
            f"perf/{self._unit}_per_second": self._weight / elapsed,
            "perf/data_ms": 1e3 * (self._goodput.seconds["data"] - self._data) / steps,
            "perf/goodput": self._goodput.fraction,
        }
        self.restart()
        return seconds, rates
