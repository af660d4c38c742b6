"""Features compiled for accelerators that are not here: they fit, one block at a time."""

import pytest

from common.plan import __main__ as command
from common.sharding.program import Inference
from dino.config import MODELS

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(("preset", "where"), [("vitl14", "h100:1"), ("vitg14", "v5e:2x2")])
def test_features(preset, where):
    rows = 64
    overrides = ("data.crops.global_size=518", "model.backbone.dtype=bfloat16")
    target, [plan] = command.plans("dino", preset, where, overrides, ["features"], Inference(rows))
    assert plan.fits, plan
    config = MODELS["vitl14_swiglu" if preset == "vitl14" else preset]()
    assert plan.flops == pytest.approx(rows * config.flops(518, 518))
    # Nowhere near the activations of all blocks.
    block = 4 * rows / len(target.devices) * 1370 * config.hidden
    assert plan.memory.temporary < 8 * block, plan.memory
    assert not plan.collectives
