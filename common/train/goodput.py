"""Where the time of a run goes."""

import contextlib
import time
from collections.abc import Iterator

PHASES = ("init", "compile", "restore", "data", "step", "eval", "save")


class Goodput:
    """Adds up the seconds of each phase; what is in none of them is overhead."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what runs inside to `name`, one of `PHASES`; phases do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @property
    def wall(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    @property
    def fraction(self) -> float:
        """The part of the run that was spent on steps."""
        return self.seconds["step"] / max(self.wall, 1e-9)

    def describe(self) -> str:
        """Returns one line: the goodput and the seconds of each phase."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"goodput {self.fraction:.0%} of {self.wall:.1f} s (seconds: {parts})"
