"""Invertible array transforms: how tensors of a foreign checkpoint become a parameter.

Each knows the shapes of its sources from the shape of its target, so that a key map is checked
before any data is read, and which part of each source a part of the target needs, so that a
sharded parameter is read in parts. Arrays are numpy; everything but `AddConstant` moves bits only.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from common.checkpoint.reader import Index, Shape

# (number of the source, slices of it), in the order in which `forward` takes the arrays.
Reads = list[tuple[int, Index]]


class Transform(Protocol):
    """Maps source arrays to one target array and back."""

    def source_shapes(self, shape: Shape, count: int) -> list[Shape]:
        """Returns the shapes of `count` sources of a target of `shape`; ValueError if none fit."""
        ...

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        """Returns what of the sources gives `target[index]`, or None for all of all of them.

        `index` has one slice with start, stop and step 1 for each dim of `shape`.
        """
        ...

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        """Returns the target, or the part of it with `shape` whose `reads` gave `arrays`."""
        ...

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        """Returns the `count` sources of a whole target."""
        ...


class _OneToOne:
    """Checks that a transform of one source is given one."""

    def source_shapes(self, shape: Shape, count: int) -> list[Shape]:
        if count != 1:
            raise ValueError(f"{self} takes one source, not {count}")
        return [self.source_shape(shape)]

    def source_shape(self, shape: Shape) -> Shape:
        return shape


@dataclasses.dataclass(frozen=True)
class Identity(_OneToOne):
    """The source as it is."""

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        return [(0, index)]

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return arrays[0]

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return [array]


@dataclasses.dataclass(frozen=True)
class Transpose(_OneToOne):
    """`target = source.transpose(axes)`; reverses the dims without `axes` (torch's Linear)."""

    axes: tuple[int, ...] | None = None

    def source_shape(self, shape: Shape) -> Shape:
        return tuple(shape[i] for i in self._inverse_axes(len(shape)))

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        return [(0, tuple(index[i] for i in self._inverse_axes(len(shape))))]

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return arrays[0].transpose(self.axes)

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return [array.transpose(self._inverse_axes(array.ndim))]

    def _inverse_axes(self, rank: int) -> list[int]:
        axes = self.axes or tuple(reversed(range(rank)))
        if sorted(axes) != list(range(rank)):
            raise ValueError(f"{self} cannot give {rank} dims")
        return [axes.index(i) for i in range(rank)]


@dataclasses.dataclass(frozen=True)
class Reshape(_OneToOne):
    """`target = source.reshape(...)`, the source having shape `source` (one dim may be -1)."""

    source: Shape

    def source_shape(self, shape: Shape) -> Shape:
        known = math.prod(d for d in self.source if d != -1)
        size = math.prod(shape)
        fits = known > 0 and size % known == 0 if -1 in self.source else known == size
        if not fits:
            raise ValueError(f"{self} cannot give shape {shape}")
        return tuple(size // known if d == -1 else d for d in self.source)

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        return None

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return arrays[0].reshape(shape)

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return [array.reshape(self.source)]


@dataclasses.dataclass(frozen=True)
class DepthwiseConv(_OneToOne):
    """Target [width, channels] from the [channels, 1, width] of torch's grouped Conv1d."""

    def source_shape(self, shape: Shape) -> Shape:
        if len(shape) != 2:
            raise ValueError(f"{self} gives 2 dims, not {len(shape)}")
        return (shape[1], 1, shape[0])

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        return [(0, (index[1], slice(0, 1, 1), index[0]))]

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return arrays[0][:, 0, :].T

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return [array.T[:, None, :]]


@dataclasses.dataclass(frozen=True)
class FirstRows(_OneToOne):
    """The first rows of a source that has `rows` of them: a table with unused rows at its end.

    Backwards the unused rows are zeros.
    """

    rows: int

    def source_shape(self, shape: Shape) -> Shape:
        if not shape or shape[0] > self.rows:
            raise ValueError(f"{self} cannot give shape {shape}")
        return (self.rows, *shape[1:])

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        return [(0, index)]

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return arrays[0][: shape[0]]

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        padding = [(0, self.rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
        return [np.pad(array, padding)]


@dataclasses.dataclass(frozen=True)
class LeadingZeros(_OneToOne):
    """The source behind `rows` rows of zeros: a table that lacks its first rows.

    Backwards those rows are dropped, whatever they hold.
    """

    rows: int

    def source_shape(self, shape: Shape) -> Shape:
        if not shape or shape[0] < self.rows:
            raise ValueError(f"{self} cannot give shape {shape}")
        return (shape[0] - self.rows, *shape[1:])

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        return None

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        padding = [(self.rows, 0)] + [(0, 0)] * (arrays[0].ndim - 1)
        return np.pad(arrays[0], padding)

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return [array[self.rows :]]


@dataclasses.dataclass(frozen=True)
class AddConstant(_OneToOne):
    """`target = source + constant` (a norm stored without its one), computed in float64.

    The one transform that rounds: a source comes back bit for bit as long as the target's dtype
    holds the sum exactly, as float32 does for bfloat16 sources above about 2^-16 of the constant.
    """

    constant: float

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        return [(0, index)]

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return arrays[0].astype(np.float64) + self.constant

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return [array.astype(np.float64) - self.constant]


@dataclasses.dataclass(frozen=True)
class InterleavedRotary(_OneToOne):
    """Rows whose heads are rotated in pairs (i, i + h/2), from rows with (2i, 2i + 1) as pairs.

    The target's first dim holds heads of `head_dim` = h rows, one after the other.
    """

    head_dim: int

    def source_shape(self, shape: Shape) -> Shape:
        if not shape or self.head_dim < 2 or self.head_dim % 2 or shape[0] % self.head_dim:
            raise ValueError(f"{self} cannot give shape {shape}")
        return shape

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        whole_heads = not (index[0].start % self.head_dim or index[0].stop % self.head_dim)
        return [(0, index)] if whole_heads else None

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return self._swapped(arrays[0], (self.head_dim // 2, 2))

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return [self._swapped(array, (2, self.head_dim // 2))]

    def _swapped(self, array: np.ndarray, split: tuple[int, int]) -> np.ndarray:
        heads = array.reshape(-1, *split, *array.shape[1:])
        return heads.swapaxes(1, 2).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Sources of equal shape along a new dim `axis` of the target."""

    axis: int = 0

    def source_shapes(self, shape: Shape, count: int) -> list[Shape]:
        axis = _axis(self, self.axis, shape)
        if shape[axis] != count:
            raise ValueError(f"{self} of {count} sources cannot give shape {shape}")
        return [shape[:axis] + shape[axis + 1 :]] * count

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        axis = _axis(self, self.axis, shape)
        part = index[:axis] + index[axis + 1 :]
        return [(i, part) for i in range(index[axis].start, index[axis].stop)]

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return np.stack(arrays, _axis(self, self.axis, shape))

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        return list(np.moveaxis(array, self.axis, 0))


@dataclasses.dataclass(frozen=True)
class Concat:
    """Sources one after the other along `axis`, of `sizes` there (None: equal ones)."""

    axis: int = 0
    sizes: tuple[int, ...] | None = None

    def source_shapes(self, shape: Shape, count: int) -> list[Shape]:
        axis = _axis(self, self.axis, shape)
        sizes = self._sizes(shape[axis], count)
        return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        axis = _axis(self, self.axis, shape)
        result: Reads = []
        begin = 0
        for i, size in enumerate(self._sizes(shape[axis], count)):
            start = max(index[axis].start - begin, 0)
            stop = min(index[axis].stop - begin, size)
            if start < stop:
                result.append((i, (*index[:axis], slice(start, stop, 1), *index[axis + 1 :])))
            begin += size
        return result

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return np.concatenate(arrays, self.axis)

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        sizes = self._sizes(array.shape[self.axis], count)
        return np.split(array, np.cumsum(sizes)[:-1], self.axis)

    def _sizes(self, total: int, count: int) -> tuple[int, ...]:
        sizes = self.sizes or (total // count,) * count
        if len(sizes) != count or sum(sizes) != total:
            raise ValueError(f"{self} of {count} sources cannot give a dim of {total}")
        return sizes


@dataclasses.dataclass(frozen=True)
class Chain:
    """Transforms one after the other; only the first may take several sources."""

    steps: tuple[Transform, ...]

    def source_shapes(self, shape: Shape, count: int) -> list[Shape]:
        return self.steps[0].source_shapes(self._shapes(shape)[0], count)

    def reads(self, index: Index, shape: Shape, count: int) -> Reads | None:
        shapes = self._shapes(shape)
        for step, after in reversed(list(zip(self.steps[1:], shapes[1:]))):
            reads = step.reads(index, after, 1)
            if reads is None:
                return None
            index = reads[0][1]
        return self.steps[0].reads(index, shapes[0], count)

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        for step, after in zip(self.steps, self._shapes(shape)):
            arrays = [step.forward(arrays, after)]
        return arrays[0]

    def inverse(self, array: np.ndarray, count: int) -> list[np.ndarray]:
        for step in reversed(self.steps[1:]):
            array = step.inverse(array, 1)[0]
        return self.steps[0].inverse(array, count)

    def _shapes(self, shape: Shape) -> list[Shape]:
        """Returns the shape after each step, the last being `shape`."""
        shapes = [shape]
        for step in reversed(self.steps[1:]):
            shapes.insert(0, step.source_shapes(shapes[0], 1)[0])
        return shapes


IDENTITY = Identity()
TRANSPOSE = Transpose()
DEPTHWISE_CONV = DepthwiseConv()
PLUS_ONE = AddConstant(1.0)


def chain(*steps: Transform) -> Chain:
    """Returns the transform that applies `steps` from left to right, reading from the file."""
    return Chain(steps)


def _axis(transform: Transform, axis: int, shape: Shape) -> int:
    """Returns `axis` counted from the front."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{transform} cannot give {len(shape)} dims")
    return axis % len(shape)
