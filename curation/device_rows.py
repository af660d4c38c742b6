"""Rows on the devices of a mesh: all at once where they fit, else a chunk at a time.

Rows are computed in blocks of a fixed number, cut from the first row on. Which device a block is
on, and in which chunk it comes, therefore changes nothing about its arithmetic, and results are the
same to the last bit on any mesh.
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.sharding import MESH_AXES
from curation.embeddings import Centred

BLOCK = 4096
_CHUNK_BYTES = 1 << 26  # of rows on one device, where they are streamed
_RESIDENT_BYTES = 1 << 30  # of rows on one device, where they stay
_WITH_ROUNDED = 1.5  # their bfloat16 stays too


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows.

    Attributes:
      first: number of the first of them.
      valid: how many they are; what is behind them is zero.
      x: float32 `[R, D]`, its rows divided over all axes of the mesh.
    """

    first: int
    valid: int
    x: jax.Array


class DeviceRows:
    """Centred embeddings on a mesh.

    Attributes:
      data: the embeddings.
      mesh: over the devices of all processes.
      memory: bytes of rows that a device may hold, if that was given.
      shards: into how many parts the rows of a chunk are divided.
      block: rows computed at a time.
      shard_rows: rows of a chunk on one device, a multiple of `block`.
      resident: whether all rows are one chunk that stays on the devices.
    """

    def __init__(
        self, data: Centred, mesh: Mesh, *, memory: int | None = None, block: int | None = None
    ):
        """Lays rows out.

        Args:
          data: the embeddings.
          mesh: rows are divided over all its axes.
          memory: bytes of rows that a device may hold; None for a gigabyte.
          block: rows computed at a time; None for what suits their number. Results are the same on
            any mesh only if it is the same.
        """
        self.data, self.mesh, self.memory = data, mesh, memory
        self.shards = mesh.size
        self.block = block or block_for(data.rows)
        self.shard_rows, self.resident = shard_rows(
            data.rows, data.width, self.shards, memory=memory, block=self.block
        )
        self._sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._kept: Chunk | None = None

    @property
    def chunk_rows(self) -> int:
        """Rows of a whole chunk."""
        return self.shard_rows * self.shards

    @property
    def num_chunks(self) -> int:
        return -(-self.data.rows // self.chunk_rows)

    def chunks(self) -> Iterator[Chunk]:
        """Yields all chunks in order; the next one is read while one is computed."""
        if self.resident:
            self._kept = self._kept or self._place(0)
            yield self._kept
            return
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            following = pool.submit(self._place, 0)
            for number in range(self.num_chunks):
                chunk = following.result()
                if number + 1 < self.num_chunks:
                    following = pool.submit(self._place, number + 1)
                yield chunk

    def place(self, of_rows: np.ndarray) -> jax.Array:
        """Puts `[chunk_rows]` onto the mesh, divided as the rows of a chunk."""
        return jax.make_array_from_callback(
            of_rows.shape, self._sharding, lambda index: of_rows[index]
        )

    def _place(self, number: int) -> Chunk:
        first = number * self.chunk_rows
        valid = min(self.chunk_rows, self.data.rows - first)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self.chunk_rows)
            rows = np.empty((stop - start, self.data.width), np.float32)
            there = max(0, min(stop, valid) - start)
            self.data.read_into(first + start, first + start + there, rows)
            rows[there:] = 0
            return rows

        shape = (self.chunk_rows, self.data.width)
        return Chunk(first, valid, jax.make_array_from_callback(shape, self._sharding, shard))


def shard_rows(
    rows: int, width: int, shards: int, *, memory: int | None, block: int
) -> tuple[int, bool]:
    """Returns how many rows of a chunk one device has, and whether one chunk is all there is."""
    blocks = -(-rows // (block * shards))
    most = _RESIDENT_BYTES if memory is None else memory
    block_bytes = 4 * width * block
    if blocks * block_bytes * _WITH_ROUNDED <= most:
        return block * rounded_blocks(blocks), True
    # Three chunks are there at a time: computed, waiting, and read.
    return block * max(1, min(_CHUNK_BYTES, most // 3) // block_bytes), False


def block_for(rows: int) -> int:
    """Returns how many rows to compute at a time, of so many."""
    return min(BLOCK, 1 << max(3, (rows - 1).bit_length()))


def rounded_blocks(blocks: int) -> int:
    """Rounds small numbers up to one of few, so that similar sizes share a compiled program."""
    if blocks <= 4 or blocks > 64:
        return blocks
    step = 1 << (blocks.bit_length() - 3)
    return -(-blocks // step) * step
