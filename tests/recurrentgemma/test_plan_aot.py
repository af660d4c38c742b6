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
