"""A launcher of the tiny task that can be one process of several, for tests that start them.

python tiny_launcher.py train WORKDIR PAUSE    trains, a pause before every batch
python tiny_launcher.py meshes FOLDER NAME …   places rows on MESHES, and trains on those named
"""

import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import jax
import numpy as np
from tiny_task import Batches, NoisyTask, batch_at, tiny_config

from common.launch import Run, RunFolder, launch
from common.sharding import MeshConfig, batch_sharding, local_rows, make_mesh, place_rows
from common.train import TrainConfig, Trainer

STEPS = 40
# Sizes, and the devices' order: 0 to 3 are process 0's. Whose rows lie together, whose do not, and
# where several processes hold the same ones, some of them or all.
MESHES = {
    "apart": (MeshConfig(data=2, fsdp=2, tensor=2), (0, 1, 2, 3, 4, 5, 6, 7)),
    "interleaved": (MeshConfig(fsdp=8, data=1), (0, 4, 1, 5, 2, 6, 3, 7)),
    "scattered": (MeshConfig(data=2, fsdp=2, tensor=2), (0, 1, 4, 5, 6, 7, 2, 3)),
    "tensor across": (MeshConfig(data=1, tensor=8), (0, 1, 2, 3, 4, 5, 6, 7)),
    "tensor and context across": (MeshConfig(1, 2, 2, 2), (0, 4, 1, 5, 6, 2, 7, 3)),
    "uneven": (MeshConfig(data=4, tensor=2), (0, 1, 2, 4, 3, 5, 6, 7)),
    "backwards": (MeshConfig(data=8), (7, 6, 5, 4, 3, 2, 1, 0)),
}


class LocalBatches(Batches):
    """This process's rows of the batches that one process would draw.

    Args:
      mesh: decides which rows.
      pause: seconds before every batch.
      stop_at: the batch before which this process gets a SIGTERM.
    """

    def __init__(self, mesh: jax.sharding.Mesh, pause: float = 0, stop_at: int | None = None):
        super().__init__()
        self._local = local_rows(mesh, self.rows)
        self._pause = pause
        self._stop_at = stop_at

    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(self._pause)
        if self.index == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {name: array[self._local] for name, array in super().__next__().items()}


def config_of_run() -> TrainConfig:
    return tiny_config(steps=STEPS, checkpoint_every=5, eval_every=10)


def eval_sets(mesh: jax.sharding.Mesh) -> dict:
    local = local_rows(mesh, 8)

    def heldout() -> list:
        return [{n: x[local] for n, x in batch_at(index).items()} for index in (1000, 1001)]

    return {"heldout": heldout}


def train(workdir: Path, pause: float) -> None:
    config = config_of_run()
    mesh = make_mesh(config.mesh)
    folder = RunFolder(workdir)
    folder.open(config)
    batches = LocalBatches(mesh, pause)
    Trainer(NoisyTask(), config, workdir, batches, eval_sets(mesh)).run()
    folder.close()


def meshes(folder: Path, trained_on: list[str]) -> None:
    for name, (sizes, order) in MESHES.items():
        mesh = make_mesh(sizes, [jax.devices()[i] for i in order])
        assert [device.id for device in mesh.devices.flat] == [jax.devices()[i].id for i in order]
        check_rows(mesh)
        if name in trained_on:
            config = tiny_config(steps=3, eval_every=3, mesh=sizes)
            devices = [jax.devices()[i] for i in order]
            Trainer(
                NoisyTask(), config, folder / name, LocalBatches(mesh), eval_sets(mesh),
                devices=devices,
            ).run()  # fmt: skip
        print(f"{name}: rows {local_rows(mesh, 8).tolist()}", flush=True)


def check_rows(mesh: jax.sharding.Mesh) -> None:
    """Every device must hold what it would hold of a batch that one process has put there."""
    whole = {"a": np.arange(16 * 3).reshape(16, 3), "b": np.arange(16.0)}
    rows = local_rows(mesh, 16)
    placed = place_rows(mesh, {name: array[rows] for name, array in whole.items()})
    for name, array in placed.items():
        assert array.shape == whole[name].shape
        assert array.sharding == batch_sharding(mesh)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])


def main(run: Run) -> None:
    action, folder, *rest = sys.argv[1:]
    if action == "train":
        train(Path(folder), float(rest[0]))
    else:
        meshes(Path(folder), rest)


if __name__ == "__main__":
    sys.modules["tensorboardX"] = MagicMock()  # It imports torch where that is there: seconds.
    launch(
        main, package="tiny", verb="train", description="", examples=[], several_processes=True,
        argv=[],
    )  # fmt: skip
