"""RecurrentGemma's production programs, compiled for accelerators: they fit where it is said."""

import pytest

from common.plan import __main__ as command
from common.sharding.program import Inference

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(
    ("preset", "where", "overrides"),
    [
        ("2b", "v5e:16x16", ()),
        ("2b", "h100:8", ("train.batch_size=8",)),
    ],
)
def test_training_fits(preset, where, overrides):
    _, [plan] = command.plans("recurrentgemma", preset, where, overrides, ["train"])
    assert plan.fits, plan
    assert plan.flops > 0


@pytest.mark.parametrize("where", ["v5e:1x1", "h100:1"])
def test_2b_decodes_on_one_device(where):
    _, [plan] = command.plans(
        "recurrentgemma", "2b", where, (), ["decode"], Inference(1, 8192, 2048, None)
    )
    assert plan.fits, plan
