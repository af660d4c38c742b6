"""Block sizes per device and shape: small JSON tables beside the kernels, filled on real devices.

A table `<kernel>/tuning.json` is a list of entries

    {"device": "h200", "kernel": "forward", "dtype": "bfloat16", "shape": {"D": 2560, "L": 8192},
     "blocks": {"channels": 128, "chunk": 64}, "microseconds": 71.0}

The entry of the same device, kernel and dtype whose shape is nearest (in ratio) is taken. Without
one, a kernel takes its own default. `python -m benchmarks.tune` measures and writes them: whatever
asks `blocks` while it is traced can be tuned, and needs to declare nothing else.
"""

import contextlib
import contextvars
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

# A shape further away than this ratio, in all its dimensions together, says nothing.
_FARTHEST = math.log(16.0)


def blocks(
    folder: Path, kernel: str, dtype: Any, shape: Mapping[str, int], default: Mapping[str, int]
) -> dict[str, int]:
    """Returns block sizes for a kernel.

    Args:
      folder: where `tuning.json` lies.
      kernel: name within the table ("forward").
      dtype: of the main operand.
      shape: the dimensions that matter, by name.
      default: what to take where the table is silent; its keys are the block names.
    """
    question = Question(folder, kernel, _name(dtype), tuple(shape.items()))
    trial_here = _trial.get()
    if trial_here is not None and question in trial_here.answers:
        return dict(trial_here.answers[question])
    found = _nearest(folder, kernel, dtype, shape, default)
    if trial_here is not None:
        trial_here.asked[question] = found
    return found


def _nearest(
    folder: Path, kernel: str, dtype: Any, shape: Mapping[str, int], default: Mapping[str, int]
) -> dict[str, int]:
    device = _device()
    best, distance = {}, _FARTHEST
    for entry in table(folder):
        if (entry["device"], entry["kernel"], entry["dtype"]) != (device, kernel, _name(dtype)):
            continue
        if entry["shape"].keys() != shape.keys():
            continue
        far = sum(abs(math.log(entry["shape"][n] / size)) for n, size in shape.items())
        if far <= distance:
            best, distance = entry["blocks"], far
    return {name: int(best.get(name, value)) for name, value in default.items()}


@functools.cache
def table(folder: Path) -> tuple[dict[str, Any], ...]:
    """Returns the entries of a folder's table; none if there is no table."""
    path = folder / "tuning.json"
    return tuple(json.loads(path.read_text())) if path.exists() else ()


def device_name(device: jax.Device) -> str:
    """Returns the name under which a device's measurements are kept: "h200", "tpu v5 lite"."""
    kind = device.device_kind.lower()
    for name in ("h200", "h100", "a100", "b200"):
        if name in kind:
            return name
    return kind


class Question(NamedTuple):
    """What `blocks` was asked: everything but the default."""

    folder: Path
    kernel: str
    dtype: str
    shape: tuple[tuple[str, int], ...]


class Trial(NamedTuple):
    """Block sizes on trial.

    Attributes:
      answers: what `blocks` shall return.
      asked: what else it was asked inside, and what it returned.
    """

    answers: Mapping[Question, Mapping[str, int]]
    asked: dict[Question, dict[str, int]]


_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("trial", default=None)


@contextlib.contextmanager
def trial(answers: Mapping[Question, Mapping[str, int]]) -> Iterator[Trial]:
    """Lets kernels traced inside take the block sizes of `answers`.

    What was traced before is forgotten, here and at the end: programs in caches hold the block
    sizes of their time.
    """
    on_trial = Trial(answers, {})
    jax.clear_caches()
    token = _trial.set(on_trial)
    try:
        yield on_trial
    finally:
        _trial.reset(token)
        jax.clear_caches()


def _device() -> str:
    return device_name(jax.devices()[0])


def _name(dtype: Any) -> str:
    return jax.numpy.dtype(dtype).name
