"""Where a run's numbers go: `metrics.jsonl`, and TensorBoard events if tensorboardX is there.

One JSON object a line, one line a logged step, with at least `step` and `loss`. Floats are written
so that they read back exactly; a number that is not finite is written as null.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends the numbers of steps; on a resumed run, first drops those that will come again."""

    def __init__(self, workdir: Path, step: int, *, active: bool = True):
        """Args:
        workdir: the run's folder.
        step: the step the run starts from; later lines are dropped.
        active: False in all processes but the first, where nothing is written.
        """
        self._file: IO[str] | None = None
        self._events: Any = None
        if not active:
            return
        path = workdir / FILE
        _truncate(path, step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 -- closed by `close`.
        self._events = _event_writer(workdir / "tensorboard", step)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Writes one line, which has reached the operating system when this returns."""
        if self._file is None:
            return
        line = {name: _number(value) for name, value in values.items()}
        # The loss comes first, where a person reading the file looks.
        line = {"step": step, "loss": line["loss"], **line}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in line.items():
                if value is not None and name != "step":
                    tag = name if "/" in name else f"train/{name}"
                    self._events.add_scalar(tag, value, step)

    def sync(self) -> None:
        """Returns when all lines are on disk, as they must be before a checkpoint is."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`; a torn last line is left out."""
    path = workdir / FILE
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        line = _parse(text)
        if line is None:
            break
        lines.append(line)
    return lines


def _truncate(path: Path, step: int) -> None:
    """Cuts the file after its last whole line of at most `step`."""
    if not path.exists():
        return
    end = 0
    for text in path.read_bytes().splitlines(keepends=True):
        line = _parse(text) if text.endswith(b"\n") else None
        if line is None or line["step"] > step:
            break
        end += len(text)
    if end < path.stat().st_size:
        os.truncate(path, end)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _number(value: float | int) -> float | int | None:
    return value if isinstance(value, int) or math.isfinite(value) else None


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        log.warning("no TensorBoard events: tensorboardX is not installed")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None, flush_secs=20)
