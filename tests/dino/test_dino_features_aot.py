"""Features compiled for accelerators that are not here: they fit, and are bound by arithmetic."""

import dataclasses

import pytest

from common.plan.measure import plan
from common.sharding import topology
from dino.ahead import features_program
from dino.config import MODELS

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(
    ("size", "where", "rows"), [("vitl14", "h100:1", 64), ("vitg14_reg", "v5e:2x2", 64)]
)
def test_features(size, where, rows):
    config = dataclasses.replace(MODELS[size](), dtype="bfloat16")
    target = topology(where)
    found = plan("features", features_program(config, target.devices, rows), target)
    assert found.fits, found
    assert found.flops == pytest.approx(rows * config.flops(518, 518))
    # One block at a time: nowhere near the activations of all of them.
    block = 4 * rows / len(target.devices) * 1370 * config.hidden
    assert found.memory.temporary < 8 * block, found.memory
    assert not found.collectives
