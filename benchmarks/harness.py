"""Measures contenders side by side and writes the result as Markdown and JSON.

Contenders of one process take turns, so that a busy machine slows all of them alike. A contender
that needs another Python environment runs as a script in a process of its own, outside the
repository; arrays travel through `.npz` files. It times itself, with the baseline beside it where
it can, so that its ratio too compares neighbours in time.
"""

import dataclasses
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from common.launch.host_memory import keep_freed_memory
from common.sharding import accelerator_of

RESULTS = Path(__file__).parent / "results"
_kept = False


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Wall-clock seconds of one contender over its repeats.

    Attributes:
        median: Seconds.
        low: First quartile of the seconds.
        high: Third quartile of the seconds.
        fastest: Seconds of the best repeat.
        repeats: How many were timed.
        ratio: Median over repeats of this contender's time to the baseline's in the same turn.
    """

    median: float
    low: float
    high: float
    fastest: float
    repeats: int
    ratio: float


@dataclasses.dataclass(frozen=True)
class Section:
    """One table: contenders against a baseline."""

    title: str
    baseline: str
    measurements: Mapping[str, Measurement]


def run_as_launchers_do() -> None:
    """Sets this process up as launchers set up theirs, for all contenders; before JAX starts."""
    global _kept
    _kept = keep_freed_memory()


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    repeats: int = 20,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measurement]:
    """Times functions that return JAX arrays, in turns: all once, then all once more.

    Args:
        contenders: Functions by name; compile them beforehand or leave it to the warm-up.
        baseline: The name whose time the ratios divide by.
        repeats: Timed turns.
        warmup: Turns that are not timed.
        clock: Seconds now; `time.process_time` leaves out what other processes take of a processor.

    Returns:
        One measurement for each name.

    Raises:
        UserError: The baseline is none of the contenders.
    """
    if baseline not in contenders:
        raise UserError(f"baseline '{baseline}' is none of {', '.join(contenders)}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            start = clock()
            jax.block_until_ready(run())
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return summarise(seconds, baseline)


def summarise(
    seconds: Mapping[str, Sequence[float] | np.ndarray], baseline: str
) -> dict[str, Measurement]:
    """Turns the seconds of interleaved repeats into measurements."""
    reference = np.asarray(seconds[baseline])
    result = {}
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        ratio = float(np.median(np.asarray(values) / reference))
        result[name] = Measurement(
            float(median), float(low), float(high), float(min(values)), len(values), ratio
        )
    return result


def device_seconds(
    program: Callable[..., Any], operands: Any, *, calls: int, repeats: int = 5
) -> tuple[list[float], list[jax.Array]]:
    """Times `program(*operands)` on the device, without the host's share of starting it.

    One compiled loop calls it over and over. Its results are carried from call to call, so that
    each is computed as a whole, and a barrier ties a call to the results before it, so that the
    compiler cannot move it out of the loop.

    Args:
        program: A function of arrays, or of trees of them, that returns the like.
        operands: Its arguments.
        calls: How many the loop makes; so many that starting the loop is nothing beside them.
        repeats: Timed runs of the loop, after one that is not.

    Returns:
        Seconds of one call, for each run of the loop, and the leaves of the program's results.
    """

    def loop(operands: Any) -> Any:
        def once(_: Any, before: Any) -> Any:
            inputs, _ = jax.lax.optimization_barrier((operands, before))
            return jax.tree.leaves(program(*inputs))

        shapes = jax.tree.leaves(jax.eval_shape(program, *operands))
        return jax.lax.fori_loop(0, calls, once, [jnp.zeros(x.shape, x.dtype) for x in shapes])

    compiled = jax.jit(loop).lower(operands).compile()
    results = jax.block_until_ready(compiled(operands))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(operands))
        seconds.append((time.perf_counter() - start) / calls)
    return seconds, results


def least_seconds(flops: float, bytes_moved: float) -> float | None:
    """Returns the time that this device's declared capacities allow; None for a CPU.

    Args:
        flops: Operations of matrix units in 16 bits.
        bytes_moved: From and to the device's memory.
    """
    device = accelerator_of(jax.devices()[0])
    if device is None:
        return None
    return max(flops / device.flops, bytes_moved / device.bandwidth)


def run_elsewhere(
    python: str | Path,
    script: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    options: Sequence[str] = (),
    timeout: float = 1800.0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Runs `python -P script inputs.npz outputs.npz *options` outside the repository.

    The script writes the seconds of each repeat as `seconds/<name>` and any other array it wants
    compared under its own name.

    Args:
        python: Interpreter of the other environment.
        script: A file that imports nothing of this repository.
        arrays: Its inputs.
        options: Further command-line arguments.
        timeout: Seconds.

    Returns:
        The seconds by name, for `summarise`, and the other arrays that the script wrote.

    Raises:
        UserError: The interpreter is missing, or the script fails; with its last line.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(inputs, **arrays)
        command = [str(python), "-P", str(script.resolve()), str(inputs), str(outputs), *options]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"cannot run {script.name} with {python}: {error}") from error
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"{script.name} failed with {python}: {last[0]}")
        with np.load(outputs) as loaded:
            written = dict(loaded)
    prefix = "seconds/"
    seconds = {key[len(prefix) :]: v for key, v in written.items() if key.startswith(prefix)}
    others = {key: v for key, v in written.items() if not key.startswith(prefix)}
    return seconds, others


def write_report(
    name: str,
    title: str,
    sections: Sequence[Section],
    *,
    notes: Sequence[str] = (),
    directory: Path = RESULTS,
) -> Path:
    """Writes timed sections as a page; see `write_page`."""
    lines = [line for section in sections for line in ("", *markdown(section))]
    record = {"title": title, "sections": [dataclasses.asdict(section) for section in sections]}
    return write_page(directory, name, title, notes, lines, record)


def write_page(
    directory: Path,
    name: str,
    title: str,
    notes: Sequence[str],
    lines: Sequence[str],
    record: Mapping[str, Any],
) -> Path:
    """Writes `<name>.md` and `<name>.json`; returns the path of the former.

    Args:
      directory: made if need be. What somebody wrote there as `<name>.reading.md` ends the page.
      name, title: of the page.
      notes: points under those of the machine.
      lines: the tables.
      record: what besides machine and notes goes into the JSON file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    head = [f"# {title}", "", *(f"- {key}: {value}" for key, value in machine.items())]
    head += [f"- {note}" for note in notes]
    reading = directory / f"{name}.reading.md"
    tail = ["", reading.read_text().rstrip()] if reading.is_file() else []
    path = directory / f"{name}.md"
    path.write_text("\n".join([*head, *lines, *tail]) + "\n")
    whole = {"machine": machine, "notes": list(notes), **record}
    path.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")
    return path


def markdown(section: Section) -> list[str]:
    """Returns the lines of one table, times in milliseconds."""
    lines = [
        f"## {section.title}",
        "",
        f"| contender | median ms | quartiles ms | best ms | × {section.baseline} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, m in section.measurements.items():
        median, low, high, fastest = (1e3 * t for t in (m.median, m.low, m.high, m.fastest))
        spread = f"{low:.2f} – {high:.2f}"
        lines.append(f"| {name} | {median:.2f} | {spread} | {fastest:.2f} | {m.ratio:.2f} |")
    return lines


def describe_machine() -> dict[str, str]:
    """Returns device, processor, load and versions for the head of a report."""
    device = jax.devices()[0]
    memory = {"memory": "kept by the process once freed, as our launchers have it"} if _kept else {}
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return {
        "device": f"{device.device_kind} × {jax.device_count()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores{load}",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib")),
        **memory,
    }


def _processor() -> str:
    """Returns the model and, where Linux tells them, the matrix extensions of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in known if flag in facts.get("flags", "").split()]
    return " ".join([facts.get("model name", platform.machine()), *flags])
