"""`dino.train` as two processes: stopped, and gone on with as one."""

import signal

import numpy as np
from process_group import ProcessGroup

from common.train import read_metrics
from dino import train


def test_two_processes_train_stop_and_go_on_as_one(tmp_path):
    """SIGTERM to one of two; one process goes on. The losses are those of one process alone."""
    options = [
        "--config=smoke",
        "--set=model.backbone.width=16",
        "--set=model.backbone.num_layers=1",
        # Class tokens that start all but alike have distances, and a KoLeo, of rounding alone.
        "--set=model.backbone.layer_scale=1.0",
        "--set=data.images.drawn_count=64",
        "--set=data.crops.local_crops=2",
        "--set=data.masks.group=4",  # Longer than a device's rows, and than none of a process's.
        "--set=objective.centring=moving",
        "--set=train.steps=12",
        "--set=train.mesh.data=2",
        "--set=train.mesh.fsdp=4",
    ]

    def losses(name):
        return [(line["loss"], line["koleo"]) for line in read_metrics(tmp_path / name)]

    train.main([*options, f"--workdir={tmp_path}/whole"])
    arguments = [*options, f"--workdir={tmp_path}/run", "--set=train.checkpoint_every=1"]
    with ProcessGroup(["-m", "dino.train", *arguments], tmp_path / "logs") as group:
        # JAX looks for a signal once a second; saving after every step makes the steps long enough.
        group.wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 2)
        group.signal(1, signal.SIGTERM)
        assert group.ended(240) == [0, 0], str(group)
    assert 2 <= len(losses("run")) < 12
    train.main([*options, f"--workdir={tmp_path}/run"])
    np.testing.assert_allclose(losses("run"), losses("whole"), rtol=1e-4)
