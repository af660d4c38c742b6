"""The text of a compiled program, read: computations, instructions, and how often loops turn.

Of the compiler's own figures none knows how often a loop turns: each counts a scanned layer once.
The text says it, outright (`known_trip_count`) or by the loop's condition.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      dtype: as the text writes it.
      dims: its shape.
      space: memory space; 0 is the device's main memory, others lie on the chip or the host.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) or (int(digits[0]) if digits else 0)
        size = 1
        for dim in self.dims:
            size *= dim
        return size * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the module.
      opcode: "fusion", "all-gather-start", …
      arrays: the result's arrays, a tuple's leaves in order.
      operands: names of instructions of the same computation.
      inside: what stands between the parentheses.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` or `calls` names."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match:
            return _NAME.findall(match[1])
        found = (self.attribute(f"{which}_computation") for which in ("true", "false"))
        return [name for name in found if name]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order they are scheduled, by name; the last or marked one is the root."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def of(self, instruction: Instruction) -> list[Instruction]:
        """The operands of one of its instructions."""
        return [self.instructions[name] for name in instruction.operands]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.inside): i for i in self if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program's computations by name, and the one that it starts with."""

    computations: Mapping[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Reads what `Compiled.as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry = None
    lines: dict[str, Any] = {}
    name, is_entry, root = "", False, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            is_entry, name, root, lines = bool(head[1]), head[2], None, {}
        elif line.startswith("}") and lines:
            last = root or next(reversed(lines.values()))
            computations[name] = Computation(name, lines, last)
            entry = computations[name] if is_entry else entry
            lines = {}
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3])
            lines[instruction.name] = instruction
            root = instruction if found[1] else root
    if entry is None:
        raise ValueError("this is no compiled program's text: it has no ENTRY")
    return Module(computations, entry)


@dataclasses.dataclass(frozen=True)
class Carried:
    """The element of that index in the tuple which a loop carries."""

    index: int


Known = int | Carried | None  # What is known of a scalar before the program runs.


def carried_values(
    operand: Instruction, where: Computation, module: Module, carried: Sequence[Known]
) -> list[Known]:
    """What is known of the elements of a tuple: `operand`, with which a loop starts."""
    if operand.opcode != "tuple":
        return [None] * len(operand.arrays)
    return [_constant(known(part, where, module, carried)) for part in where.of(operand)]


def invariant_values(body: Computation, values: Sequence[Known], module: Module) -> list[Known]:
    """`values` without the elements that the loop's body changes."""
    if body.root.opcode != "tuple":
        return [None] * len(values)
    after = [known(part, body, module) for part in body.of(body.root)]
    return [v if end == Carried(i) else None for i, (v, end) in enumerate(zip(values, after))]


def turns(loop: Instruction, module: Module, start: Sequence[Known]) -> int | None:
    """How often a `while` turns that starts with the values `start`; None: only the data knows."""
    if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(stated[1])
    body = module.computations[loop.attribute("body") or ""]
    condition = module.computations[loop.attribute("condition") or ""]
    compare = _unwrapped(condition.root, condition, module)
    if compare is None or compare[0].opcode != "compare" or body.root.opcode != "tuple":
        return None
    counter, limit = _sides(*compare, module)
    direction = re.search(r"direction=(\w\w)", compare[0].attributes)
    if isinstance(limit, Carried):
        limit = invariant_values(body, start, module)[limit.index]
    if not isinstance(counter, Carried) or not isinstance(limit, int) or direction is None:
        return None
    first = start[counter.index]
    step = _increment(body.of(body.root)[counter.index], counter, body, module)
    if not isinstance(first, int) or not step or direction[1] not in ("LT", "LE", "GT", "GE"):
        return None
    span = limit - first + (step // abs(step) if direction[1] in ("LE", "GE") else 0)
    return max(0, -(-span // step))


def known(
    instruction: Instruction,
    where: Computation,
    module: Module,
    carried: Sequence[Known] | None = None,
    arguments: Sequence[Known] | None = None,
) -> Known:
    """What is known of a scalar.

    Args:
      instruction: its instruction.
      where: the computation it stands in.
      module: the program.
      carried: values of the tuple that is the only parameter of a loop's body or condition; None
        to get the elements themselves, as `Carried`.
      arguments: the parameters' values if this is a fused computation.
    """
    parts = where.of(instruction)
    match instruction.opcode:
        case "constant":
            return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None
        case "parameter":
            return arguments[int(instruction.inside)] if arguments is not None else None
        case "copy" | "bitcast" | "convert" | "copy-start" | "copy-done" | "reshape":
            return known(parts[0], where, module, carried, arguments)
        case "get-tuple-element" if arguments is None:
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])  # type: ignore[index]
            if parts[0].opcode == "tuple":
                part = where.of(parts[0])[index]
                return known(part, where, module, carried, arguments)
            if parts[0].opcode == "parameter" and where is not module.entry:
                return Carried(index) if carried is None else carried[index]
    return None


def _constant(value: Known) -> Known:
    return value if isinstance(value, int) else None


def _unwrapped(
    instruction: Instruction, where: Computation, module: Module
) -> tuple[Instruction, Computation, list[Known] | None] | None:
    """The instruction that a fusion of scalars really is, its computation, and the arguments."""
    if instruction.opcode == "copy":
        return _unwrapped(where.of(instruction)[0], where, module)
    if instruction.opcode not in ("fusion", "call"):
        return instruction, where, None
    inner = module.computations.get(instruction.attribute("calls") or "")
    if inner is None:
        return None
    return inner.root, inner, [known(part, where, module) for part in where.of(instruction)]


def _sides(
    instruction: Instruction, where: Computation, arguments: list[Known] | None, module: Module
) -> tuple[Known, Known]:
    """The operands of a binary instruction, the carried one first."""
    a, b = (known(part, where, module, None, arguments) for part in where.of(instruction)[:2])
    return (b, a) if isinstance(a, int) else (a, b)


def _increment(
    instruction: Instruction, counter: Carried, body: Computation, module: Module
) -> int | None:
    added = _unwrapped(instruction, body, module)
    if added is None or added[0].opcode != "add":
        return None
    carried, step = _sides(*added, module)
    return step if carried == counter and isinstance(step, int) else None


def _instruction(name: str, rest: str) -> Instruction:
    arrays, end = _result(rest)
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"cannot read the instruction {name}: {rest[:80]}")
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    operands = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(name, opcode[1], arrays, operands, inside, rest[close + 1 :])


def _result(text: str) -> tuple[tuple[Array, ...], int]:
    """The arrays of the type that `text` starts with, and where it ends."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text[:end]):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        arrays.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(arrays), end


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"no end of parenthesis: {text[start : start + 80]}")
