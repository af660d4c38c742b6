"""DINOv2's training steps at the paper's batch, and features, compiled for accelerators."""

import jax
import pytest
from flax import nnx

from common.plan import __main__ as command
from common.sharding.program import Inference
from dino.networks import Network
from dino.presets import PRESETS

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("size", ["vitl14", "vitg14"])
def test_the_papers_batch_trains_on_a_pod(size):
    """Compiled with less effort than a run's program is: shardings and memory hold."""
    _, [plan] = command.plans("dino", size, "v5p:8x8x8", (), ["train"], quick=True)
    assert plan.fits, plan
    moved = {c.kind for c in plan.collectives}
    assert moved >= {"all-gather", "reduce-scatter"}, "parameters are not summed whole"
    # Views, patches and logits stay on their device. What travels: the student's parameters twice,
    # the teacher's once, the gradients.
    network = nnx.eval_shape(lambda: Network(PRESETS[size]().model, rngs=nnx.Rngs(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network)))
    sent = sum(c.link_bytes for c in plan.collectives)
    assert sent < 6 * 4 * parameters, plan.collectives


def test_features_on_one_gpu():
    _, [plan] = command.plans(
        "dino", "vitl14", "h100:1", (), ["features"], Inference(256, 8192, 2048, None)
    )
    assert plan.fits, plan
    assert not plan.collectives
