"""RecurrentGemma's production programs, compiled for accelerators: they fit where it is said."""

import pytest

from common.plan import __main__ as command
from common.sharding.program import Inference

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("where", ["v5e:1x1", "h100:1"])
def test_2b_decodes_on_one_device(where):
    """Five GiB of bf16 weights and a state of fixed size; a token is bound by reading both."""
    _, [plan] = command.plans(
        "recurrentgemma", "2b", where, (), ["decode"], Inference(1, 8192, 2048, None)
    )
    assert plan.fits, plan
    assert 5.0e9 < plan.traffic < 6.5e9


def test_2b_trains_on_one_host():
    overrides = ("train.batch_size=8", "data.sequence_length=4096")
    _, [plan] = command.plans("recurrentgemma", "2b", "h100:8", overrides, ["train"])
    assert plan.fits, plan
    assert {c.kind for c in plan.collectives} >= {"all-gather", "reduce-scatter"}
    # FSDP gathers the parameters and scatters their gradients: nowhere near all logits or keys.
    logits = 4096 * 256_000 * 4
    assert plan.memory.temporary < 3 * logits, plan.memory


@pytest.mark.parametrize(
    ("size", "where", "overrides"),
    [
        ("2b", "v5p:4x4x4", ("train.batch_size=64", "data.sequence_length=8192")),
        ("9b", "v5p:4x4x4", ("train.batch_size=64", "data.sequence_length=8192")),
        ("2b", "v5e:16x16", ("train.batch_size=256", "data.sequence_length=4096")),
    ],
)
def test_pods_train(size, where, overrides):
    """Compiled with less effort than a run's program is: the kernels, shardings and memory hold."""
    _, [plan] = command.plans("recurrentgemma", size, where, overrides, ["train"], quick=True)
    assert plan.fits, plan
    assert plan.calls["tpu_custom_call"] > 0, "the recurrence and attention are kernels"
    moved = {c.kind for c in plan.collectives}
    assert moved >= {"all-gather", "reduce-scatter"}, "parameters are not summed whole"
