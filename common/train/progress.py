"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_SECONDS = 10.0  # Between lines where there is no terminal.


class Progress:
    """Shows step, loss, rate, time left and, on accelerators, MFU.

    Args:
      step: where the run stands.
      steps: where it ends.
      unit: of what there is a rate.
      counted: what a step is.
      active: whether to show anything.
    """

    def __init__(
        self,
        step: int,
        steps: int,
        *,
        unit: str = "tokens",
        counted: str = "step",
        active: bool = True,
    ):
        self._active = active
        self._steps = steps
        self._unit = unit
        self._counted = counted
        self._first: tuple[int, float] | None = None  # Step and time of the first update.
        self._printed = 0.0
        self._bar: Any = None
        if active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit=counted, dynamic_ncols=True)

    def update(self, step: int, values: Mapping[str, float | int], *, force: bool = False) -> None:
        """Shows the numbers of a step; lines appear every few seconds, or when forced."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary(values), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        first_step, first_time = self._first = self._first or (step, now)
        if not force and now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        left = ""
        if step > first_step:
            seconds = (now - first_time) / (step - first_step) * (self._steps - step)
            left = f"  {_duration(seconds)} left"
        self._print(f"{self._counted} {step}/{self._steps}  {self._summary(values)}{left}")

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._active:
            self._print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _summary(self, values: Mapping[str, float | int]) -> str:
        parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
        for name, value in values.items():
            match name.split("/"):
                case ["eval", *_, "loss"]:
                    parts.append(f"{name.removeprefix('eval/')} {value:.4f}")
                case ["perf", "steps_per_second"]:
                    parts.append(f"{value:.3g} steps/s")
                case ["perf", rate] if rate == f"{self._unit}_per_second":
                    parts.append(f"{_thousands(value)} {self._unit}/s")
                case ["perf", "mfu"]:
                    parts.append(f"MFU {value:.1%}")
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


def _thousands(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000 or unit == "G":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
