"""T5Gemma's production programs, compiled for accelerators: they fit where it is said."""

import pytest

from common.plan import __main__ as command
from common.sharding.program import Inference

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("where", ["v5e:1x1", "h100:1"])
def test_2b_2b_decodes_on_one_device(where):
    """A token reads the decoder's bf16 weights, and the keys of both sides in every layer."""
    _, [plan] = command.plans(
        "t5gemma", "2b-2b", where, (), ["decode"], Inference(1, 8192, 2048, None)
    )
    assert plan.fits, plan
    assert plan.traffic > 5.9e9


@pytest.mark.parametrize(
    ("size", "where"),
    [
        ("2b-2b", "v5p:4x4x8"),
        ("2b-2b", "v5e:16x16"),
        ("9b-2b", "v5p:4x4x8"),
        ("9b-2b", "v5e:16x16"),
    ],
)
def test_pods_train(size, where):
    """Compiled with less effort than a run's program is: the kernels, shardings and memory hold."""
    _, [plan] = command.plans("t5gemma", size, where, (), ["train"], quick=True)
    assert plan.fits, plan
    assert plan.calls["tpu_custom_call"] > 0, "attention is a kernel"
    moved = {c.kind for c in plan.collectives}
    assert moved >= {"all-gather", "reduce-scatter"}, "parameters are not summed whole"
