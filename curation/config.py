"""What a clustering of a whole pool takes: its size, its levels, the memory of a device."""

import dataclasses
from collections.abc import Callable, Mapping

from common.errors import UserError
from curation.hierarchy import REFERENCE, HierarchyConfig


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """A pool to be clustered, for `python -m common.plan --package=curation`.

    Attributes:
      rows, width: N and D of the embeddings.
      levels: how they are clustered.
      memory: GB of rows that a device may hold.
      seed: of all random choices.
    """

    rows: int
    width: int
    levels: HierarchyConfig
    memory: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.width) < 1 or not self.memory > 0:
            raise UserError("a pool needs rows, width and memory above 0")
        if self.levels.clusters[0] > self.rows:
            raise UserError(f"{self.levels.clusters[0]} clusters need as many rows")


def web() -> PoolConfig:
    """Returns a billion images of width 1024 with the paper's four levels.

    10 million clusters in two steps, then 500,000, 50,000 and 10,000 with nine resamplings each.
    Command: `python -m common.plan --package=curation --config=web --topology=v5p:4x4x8`. Hardware:
    a pod. Result: memory, FLOPs, least time and communication of a pass of every level.
    """
    levels = HierarchyConfig(
        clusters=(100_000, 500_000, 50_000, 10_000),
        resampling_steps=(0, 9, 9, 9),
        sample_sizes=(1, 10, 5, 3),
        splits=(100, 1, 1, 1),
        kmeans=REFERENCE,
    )
    return PoolConfig(rows=1_000_000_000, width=1024, levels=levels)


def smoke() -> PoolConfig:
    """Returns a pool of no size, for tests."""
    levels = HierarchyConfig(clusters=(64, 8), resampling_steps=(0, 1), sample_sizes=(2, 2))
    return PoolConfig(rows=200_000, width=32, levels=levels, memory=0.001)


PRESETS: Mapping[str, Callable[[], PoolConfig]] = {"web": web, "smoke": smoke}
