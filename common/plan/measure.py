"""One program on one topology: compiled, and what its text and its memory say."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from common.plan import hlo
from common.plan.cost import Collective, Cost, cost_of
from common.sharding.program import Program
from common.sharding.topology import Topology, compile_lowered

# Share of the memory that a program may take. A TPU's compiler keeps its own part free and refuses
# what does not fit; on a GPU, CUDA and NCCL need some beside the program.
USABLE = {"tpu": 1.0, "cuda": 0.92, "cpu": 1.0}
# What JAX takes of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
PREALLOCATED = 0.75
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# A TPU's compiler gives up with the sum, or earlier with what comes beside the arguments alone.
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_TEMPORARIES = re.compile(r"for HLO temporaries \(([\d.]+)([KMGT]?)\)")
_REPLICATED = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      holds: the arguments by name, from their shapes.
      arguments, outputs: of the compiled program; `aliased` is counted in both.
      temporary: activations, gathered parameters, what else lives only inside.
      code: the program itself.
      peak: all of it together; None where the compiler refused and gave no figure.
      capacity: of the device; None if it is not declared.
    """

    holds: dict[str, float]
    arguments: float | None
    outputs: float | None
    aliased: float | None
    temporary: float | None
    code: float | None
    peak: float | None
    capacity: float | None


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least seconds of a step, were nothing else in the way.

    Attributes:
      compute: FLOPs, recomputed ones too, at the peak rate.
      bandwidth: memory traffic at the full bandwidth.
      link: what each device sends, at the speed of all its links together.
    """

    compute: float
    bandwidth: float
    link: float

    @property
    def step(self) -> float:
        """The greatest: a step in which everything overlaps."""
        return max(self.compute, self.bandwidth, self.link)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program takes on a topology.

    Attributes:
      name: of the program.
      shape: what a step is given.
      mesh: axes longer than 1.
      compile_seconds: here, just now.
      fits: whether it runs in the devices' memory.
      refusal: the compiler's words if it refused.
      memory: bytes on one device.
      flops: of the model in one step, all devices.
      recomputed_flops: done a second time beside them.
      traffic: bytes that a step moves to and from one device's memory; None without a program.
      least_traffic: arguments read and results written once.
      collectives: of a step, as one device sees them.
      setup_traffic: bytes moved before a loop whose turns are the steps.
      bounds: None where nothing is declared of the device.
      items, unit: a step's tokens.
      items_per_second: at the bound.
      mfu: model FLOPs utilisation at the bound.
      calls: custom calls by target, in one step.
      notes: what else to know.
    """

    name: str
    shape: str
    mesh: dict[str, int]
    compile_seconds: float
    fits: bool
    refusal: str | None
    memory: Memory
    flops: float
    recomputed_flops: float
    traffic: float | None
    least_traffic: float | None
    collectives: list[Collective]
    setup_traffic: float
    bounds: Bounds | None
    items: int
    unit: str
    items_per_second: float | None
    mfu: float | None
    calls: dict[str, int]
    notes: list[str]


def plan(name: str, program: Program, where: Topology, *, quick: bool = False) -> Plan:
    """Compiles a program and takes its measure; a refusal for want of memory is a result too.

    Args:
      name: of the program.
      program: what to compile.
      where: for which devices.
      quick: see `compile_lowered`.
    """
    started = time.perf_counter()
    compiled, said = _compiled(program, where, quick)
    seconds = time.perf_counter() - started
    refusal = compiled if isinstance(compiled, str) else None
    executable = None if isinstance(compiled, str) else compiled
    memory = _memory(program, where, executable, refusal)
    devices = program.mesh.size
    step, setup = Cost(), 0.0
    if executable is not None:
        whole = cost_of(hlo.parse(executable.as_text()), devices)
        step, setup = _step(whole) if program.loops else (whole, 0.0)
    bounds = _bounds(program, where, step) if executable is not None else None
    rate = program.items / bounds.step if bounds and bounds.step else None
    known = where.accelerator
    mfu = None
    if bounds and known and bounds.step:
        mfu = program.flops / devices / known.flops / bounds.step
    return Plan(
        name=name,
        shape=program.shape,
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
        compile_seconds=seconds,
        fits=refusal is None and _fits(memory, where),
        refusal=refusal,
        memory=memory,
        flops=program.flops,
        recomputed_flops=program.recomputed_flops,
        traffic=step.traffic if executable is not None else None,
        least_traffic=_least(memory),
        collectives=step.listed(),
        setup_traffic=setup,
        bounds=bounds,
        items=program.items,
        unit=program.unit,
        items_per_second=rate,
        mfu=mfu,
        calls=dict(step.calls),
        notes=[*program.notes, *_notes(program, where, memory, step, said)],
    )


def _compiled(
    program: Program, where: Topology, quick: bool
) -> tuple[jax.stages.Compiled | str, str]:
    """The compiled program, or the words of a refusal; and what the compiler said beside."""
    lowered = program.lower(where.platform)
    with _stderr() as said:
        try:
            return compile_lowered(where, lowered, quick=quick), said()
        except jax.errors.JaxRuntimeError as error:
            text = " ".join(str(error).split())
            if not text.startswith("RESOURCE_EXHAUSTED"):
                raise
            return text, said()


def _memory(
    program: Program, where: Topology, compiled: jax.stages.Compiled | None, refusal: str | None
) -> Memory:
    holds = {name: per_device(tree) for name, tree in program.holds.items()}
    holds = {name: size for name, size in holds.items() if size}
    capacity = capacity_of(where)
    if compiled is None:
        temporary, peak = refused(refusal or "", sum(holds.values()))
        return Memory(holds, None, None, None, temporary, None, peak, capacity)
    m = compiled.memory_analysis()
    arguments, outputs = m.argument_size_in_bytes, m.output_size_in_bytes
    aliased, temporary = m.alias_size_in_bytes, m.temp_size_in_bytes
    code = m.generated_code_size_in_bytes
    # The compiler's own peak leaves gaps between buffers out; what is allocated is this.
    peak = arguments + outputs - aliased + temporary + code
    return Memory(holds, arguments, outputs, aliased, temporary, code, peak, capacity)


def refused(text: str, arguments: float) -> tuple[float | None, float | None]:
    """Returns the temporary and all bytes that a refusal speaks of, None where it does not.

    Args:
      text: the compiler's words.
      arguments: bytes of the program's arguments.
    """
    used, temporaries = _USED.search(text), _TEMPORARIES.search(text)
    if used:
        return None, float(used[1]) * _UNITS[used[2]]
    if temporaries:
        size = float(temporaries[1]) * _UNITS[temporaries[2]]
        return size, arguments + size
    return None, None


def per_device(tree: Any) -> float:
    """Bytes of a tree of arrays on one device."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def capacity_of(where: Topology) -> float | None:
    """Bytes of one device's memory; virtual CPU devices share this machine's."""
    if where.accelerator is not None:
        return where.accelerator.memory
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(where.devices)


def _fits(memory: Memory, where: Topology) -> bool:
    if memory.peak is None or memory.capacity is None:
        return memory.peak is not None
    return memory.peak <= USABLE[where.platform] * memory.capacity


def _least(memory: Memory) -> float | None:
    if memory.arguments is None or memory.outputs is None:
        return None
    return memory.arguments + memory.outputs


def _step(whole: Cost) -> tuple[Cost, float]:
    """One turn of the greatest loop whose turns are not known, and the traffic before it."""
    if not whole.open_loops:
        return whole, 0.0
    turn = max(whole.open_loops, key=lambda cost: cost.traffic)
    return turn, whole.traffic - turn.traffic


def _bounds(program: Program, where: Topology, step: Cost) -> Bounds | None:
    known = where.accelerator
    if known is None:
        return None
    flops = (program.flops + program.recomputed_flops) / program.mesh.size
    return Bounds(
        compute=flops / known.flops,
        bandwidth=step.traffic / known.bandwidth,
        link=step.link_bytes / known.link,
    )


def _notes(
    program: Program, where: Topology, memory: Memory, step: Cost, said: str
) -> Iterator[str]:
    inner = len(step.open_loops)
    if inner:
        yield f"{inner} inner loop(s) whose turns only the data knows are counted as one turn"
    if replicated := said.count(_REPLICATED):
        yield f"the partitioner made {replicated} array(s) whole on every device to reshard them"
    if where.platform == "tpu":
        yield from _misaligned(program)
    if where.platform == "cuda" and memory.peak and memory.capacity:
        share = memory.peak / memory.capacity
        if PREALLOCATED < share <= USABLE["cuda"]:
            yield (
                f"takes {share:.0%} of the memory: set XLA_PYTHON_CLIENT_MEM_FRACTION="
                f"{USABLE['cuda']}, JAX takes {PREALLOCATED:.0%} by default"
            )


def _misaligned(program: Program) -> Iterator[str]:
    """A TPU gathers and scatters whole tiles of 8 rows; other shards it reduces at full size."""
    worst: dict[tuple[str, int, int], int] = {}
    for leaf in jax.tree.leaves(program.holds.get("parameters", ())):
        spec = leaf.sharding.spec
        for size, axes in zip(leaf.shape, spec):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            ways = math.prod(program.mesh.shape[axis] for axis in axes)
            if ways > 1 and (size // ways) % 8 and leaf.size > 2**20:
                worst[" × ".join(axes), size, ways] = size // ways
    for (axes, size, ways), part in worst.items():
        yield (
            f"{axes} cuts a dimension of {size} into {ways} parts of {part}, no multiple of 8: a "
            "TPU then sums whole matrices instead of gathering and scattering parts"
        )


@contextlib.contextmanager
def _stderr() -> Iterator[Callable[[], str]]:
    """Takes in what is written to the process's stderr: the compiler's log goes there directly."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        former = os.dup(2)
        os.dup2(file.fileno(), 2)

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield text
        finally:
            os.dup2(former, 2)
            os.close(former)
