"""What a compiled program moves: bytes to and from main memory, and between devices.

Counted in the scheduled text, each loop as often as it turns. A fusion reads its operands and
writes its results; what is inside stays on the chip. Of an array that is sliced or indexed, only
the slices count, and of one that is updated in place only the update. Arrays that the compiler
keeps in on-chip memory count nothing, and a kernel's custom call reads each operand and writes each
result once.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

from common.plan import hlo

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They name or rearrange what is there, or their work is counted elsewhere.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "opt-barrier",
        "after-all",
        "partition-id",
        "replica-id",
        "domain",
        "add-dependency",
        "get-dimension-size",
    ]
)
_READS_ITS_RESULT = ("slice", "dynamic-slice", "gather")
_STARTS, _ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"
# Calls that stand for no work: buffers, and views of what other instructions have fetched.
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over groups of one size.

    Attributes:
      kind: "all-gather", …
      group: devices that take part together.
      count: how often a device takes part.
      bytes: of whole arrays (gathered, or before they are scattered or reduced), all counts.
      link_bytes: what a device sends at the least, all counts.
    """

    kind: str
    group: int
    count: int
    bytes: float
    link_bytes: float


@dataclasses.dataclass
class Cost:
    """What one run of a program, or one turn of a loop, moves on each device.

    Attributes:
      traffic: bytes read from and written to main memory.
      collectives: number, bytes and link bytes of each (kind, group size).
      open_loops: loops whose number of turns only the data knows; each counts one turn.
      calls: how often each custom call's target runs.
    """

    traffic: float = 0.0
    collectives: dict[tuple[str, int], tuple[int, float, float]] = dataclasses.field(
        default_factory=dict
    )
    open_loops: list["Cost"] = dataclasses.field(default_factory=list)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds another cost so many times."""
        self.traffic += times * other.traffic
        for key, (count, size, sent) in other.collectives.items():
            self.add_collective(key, times * count, times * size, times * sent)
        self.open_loops += other.open_loops
        for target, count in other.calls.items():
            self.calls[target] += times * count

    def add_collective(self, key: tuple[str, int], count: int, size: float, sent: float) -> None:
        had = self.collectives.get(key, (0, 0.0, 0.0))
        self.collectives[key] = (had[0] + count, had[1] + size, had[2] + sent)

    @property
    def link_bytes(self) -> float:
        return sum(sent for _, _, sent in self.collectives.values())

    def listed(self) -> list[Collective]:
        """The collectives, those that send most first."""
        found = [Collective(kind, n, *sums) for (kind, n), sums in self.collectives.items()]
        return sorted(found, key=lambda c: -c.link_bytes)


def cost_of(module: hlo.Module, devices: int) -> Cost:
    """Counts one run of a program over `devices` devices."""
    return _Counter(module, devices).computation(module.entry, ())


class _Counter:
    def __init__(self, module: hlo.Module, devices: int):
        self._module = module
        self._devices = devices

    def computation(self, where: hlo.Computation, carried: Sequence[hlo.Known]) -> Cost:
        """One run of a computation, given what is known of the tuple that it takes."""
        total = Cost()
        for instruction in where:
            match instruction.opcode:
                case "while":
                    self._loop(instruction, where, carried, total)
                case "conditional":
                    branches = [self._called(name) for name in instruction.branches()]
                    total.add(max(branches, key=lambda cost: cost.traffic))
                case "call" | "async-start":
                    total.add(
                        self._called(
                            instruction.attribute("calls")
                            or instruction.attribute("to_apply")
                            or ""
                        )
                    )
                case "async-update" | "async-done":
                    pass
                case _:
                    total.traffic += self._traffic(instruction, where)
                    self._collectives(instruction, where, total)
                    if instruction.opcode == "custom-call":
                        total.calls[_target(instruction)] += 1
        return total

    def _loop(
        self,
        loop: hlo.Instruction,
        where: hlo.Computation,
        carried: Sequence[hlo.Known],
        total: Cost,
    ) -> None:
        start = hlo.carried_values(where.of(loop)[0], where, self._module, carried)
        count = hlo.turns(loop, self._module, start)
        body = self._module.computations[loop.attribute("body") or ""]
        cost = self.computation(body, hlo.invariant_values(body, start, self._module))
        total.add(cost, 1 if count is None else count)
        if count is None:
            total.open_loops.append(cost)

    def _called(self, name: str) -> Cost:
        return self.computation(self._module.computations[name], ())

    # Bytes to and from main memory.

    def _traffic(self, instruction: hlo.Instruction, where: hlo.Computation) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-start"):
            return 0.0
        parts, results = where.of(instruction), instruction.arrays
        if opcode.endswith("-done"):
            start = parts[0]
            opcode, parts = start.opcode.removesuffix("-start"), where.of(start)
        if opcode == "custom-call" and _target(instruction) in _NO_WORK:
            return 0.0
        written = sum(_in_memory(array) for array in results)
        if opcode == "fusion":
            inner = self._module.computations[instruction.attribute("calls") or ""]
            reads = (self._read(inner, n, part) for n, part in enumerate(parts))
            return sum(reads) + self._written(inner, results)
        if opcode in _READS_ITS_RESULT:
            source = sum(array.bytes for array in results) if _main(parts[0]) else 0.0
            return source + written
        if opcode in ("dynamic-update-slice", "scatter"):
            update = parts[1] if opcode == "dynamic-update-slice" else parts[-1]
            return (2.0 if _main(instruction) else 1.0) * sum(a.bytes for a in update.arrays)
        return written + sum(_in_memory(array) for part in parts for array in part.arrays)

    def _read(self, inner: hlo.Computation, index: int, operand: hlo.Instruction) -> float:
        """Bytes that a fusion reads of an operand in main memory."""
        whole = sum(_in_memory(array) for array in operand.arrays)
        parameter = inner.parameters.get(index)
        if not whole or parameter is None:
            return whole
        return min(whole, self._read_inside(inner, parameter))

    def _read_inside(self, inner: hlo.Computation, value: hlo.Instruction) -> float:
        """Bytes of `value` that the instructions of a fused computation look at."""
        total = 0.0
        for user in inner.users.get(value.name, []):
            first = user.operands[0] == value.name
            if user.opcode == "bitcast":
                total += self._read_inside(inner, user)
            elif user.opcode in _READS_ITS_RESULT and first:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                pass  # Updated in place.
            elif user.opcode == "tuple" or _is_piece(user):
                pass  # Handed through; a collective's traffic is counted where it starts.
            elif user.opcode == "fusion":
                nested = self._module.computations[user.attribute("calls") or ""]
                places = [n for n, name in enumerate(user.operands) if name == value.name]
                parameters = [nested.parameters[n] for n in places if n in nested.parameters]
                total += sum(self._read_inside(nested, p) for p in parameters)
            else:
                return sum(array.bytes for array in value.arrays)
        return total

    def _written(self, inner: hlo.Computation, results: Sequence[hlo.Array]) -> float:
        """Bytes that a fusion writes, of results updated in place the update alone."""
        roots = inner.of(inner.root) if inner.root.opcode == "tuple" else [inner.root]
        if len(roots) != len(results):
            return sum(_in_memory(array) for array in results)
        total = 0.0
        for root, result in zip(roots, results):
            written = self._update(inner, root)
            total += min(written, result.bytes) if _in_memory(result) else 0.0
        return total

    def _update(self, inner: hlo.Computation, root: hlo.Instruction) -> float:
        while root.opcode == "bitcast":
            root = inner.of(root)[0]
        if root.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in inner.of(root)[1].arrays)
        if root.opcode == "scatter":
            return sum(array.bytes for array in inner.of(root)[-1].arrays)
        if root.opcode == "get-tuple-element":
            root = inner.of(root)[0]
        if root.opcode == "parameter" or _is_piece(root):
            return 0.0  # Handed through.
        return math.inf

    # Bytes between devices.

    def _collectives(
        self, instruction: hlo.Instruction, where: hlo.Computation, total: Cost
    ) -> None:
        """Adds the collective that an instruction is, or those that it has fused.

        A TPU's compiler spreads one collective over the fusions that it runs beside, even those of
        loops in between; it counts where it starts.
        """
        if instruction.opcode == "fusion":
            inner = self._module.computations[instruction.attribute("calls") or ""]
            starts = any(_target(part) == _STARTS for part in inner)
            for part in inner:
                if starts or not _is_piece(part):
                    self._collectives(part, inner, total)
            return
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        if "all-reduce-scatter" in where.name:
            kind = "reduce-scatter"  # A TPU's: one fusion that keeps its slice of the sum.
        group = self._group(instruction)
        before = sum(a.bytes for part in where.of(instruction) for a in part.arrays)
        size = before * group if kind == "all-gather" else before
        if group == 1:
            return
        share = (group - 1) / group
        sent = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        total.add_collective((kind, group), 1, size, sent.get(kind, share) * size)

    def _group(self, instruction: hlo.Instruction) -> int:
        """How many devices take part together."""
        text = instruction.attributes
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
            return len(match[1].split(","))
        if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
            return int(match[1])
        if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
            named = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
            return math.prod(int(part or sizes[axis]) for axis, part in named)
        return self._devices


def _in_memory(array: hlo.Array) -> float:
    return array.bytes if array.space == 0 else 0.0


def _main(instruction: hlo.Instruction) -> bool:
    return any(array.space == 0 for array in instruction.arrays)


def _is_piece(instruction: hlo.Instruction) -> bool:
    """Whether this is a part of a collective that is spread over several fusions."""
    if instruction.opcode == "custom-call":
        return _target(instruction) in (_STARTS, _ENDS)
    return instruction.opcode in COLLECTIVES and "chain_id" in instruction.attributes


def _target(instruction: hlo.Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match[1] if match else "unknown"
