"""The training step: the same on every mesh, exact where an update is skipped, in place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tiny_task import TinyTask, batch_at

from common.errors import UserError
from common.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from common.train import (
    ModelParts,
    OptimizerConfig,
    abstract_train_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)
from common.train.optimizer import learning_rate
from common.train.state import init_state, shardings_of

# Plain gradient descent with rate 1: the change of the parameters is the gradient.
DESCENT = OptimizerConfig(
    "sgd", learning_rate=1.0, schedule="constant", b1=0.0, weight_decay=0.0, clip_norm=None
)


class Rig:
    """A task ready to step on some mesh."""

    def __init__(
        self,
        mesh: MeshConfig,
        count: int = 8,
        task: Any = None,
        optimizer: OptimizerConfig = DESCENT,
        **step_options: Any,
    ):
        self.mesh = make_mesh(mesh, jax.devices()[:count])
        self.parts = ModelParts(task or TinyTask(), seed=3)
        self.optimizer = self.parts.optimizer(optimizer, 10)
        self.abstract = abstract_train_state(self.parts, self.optimizer, self.mesh)
        self.step = make_train_step(
            self.parts, self.optimizer, learning_rate(optimizer, 10), self.mesh, self.abstract,
            **step_options,
        )  # fmt: skip
        with use_mesh(self.mesh, self.parts.task.rules):
            self.state = jax.jit(
                lambda: init_state(self.parts, self.optimizer),
                out_shardings=shardings_of(self.abstract),
            )()

    def place(self, batch: Any) -> Any:
        return jax.device_put(batch, batch_sharding(self.mesh))

    def __call__(self, batch: Any) -> dict[str, float]:
        self.state, metrics = self.step(self.state, self.place(batch))
        return {name: value.item() for name, value in jax.device_get(metrics).items()}

    def params(self) -> Any:
        return jax.tree.map(np.array, self.state.params)


def gradients(rig: Rig) -> tuple[dict[str, float], Any]:
    before = rig.params()
    metrics = rig(batch_at(0, 16))
    return metrics, jax.tree.map(np.subtract, before, rig.params())


@pytest.fixture(name="one_device", scope="module")
def _one_device():
    return gradients(Rig(MeshConfig(), 1))


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        (MeshConfig(2, 2, 2), 1),
        (MeshConfig(2, 2, 2), 4),
        (MeshConfig(1, 8, 1), 2),
        (MeshConfig(2, 1, 2, 2), 1),
    ],
)
def test_loss_and_gradients_equal_one_device(one_device, mesh, accumulation):
    metrics, grads = gradients(Rig(mesh, accumulation=accumulation))
    expected_metrics, expected = one_device
    for name in ("loss", "grad_norm", "accuracy", "weight"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5)
    for leaf, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(leaf - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_accumulation_weighs_micro_batches_by_their_tokens(one_device):
    rig = Rig(MeshConfig(), 1, accumulation=2)
    metrics, grads = gradients(rig)
    assert metrics["loss"] == pytest.approx(one_device[0]["loss"], rel=1e-6)
    for leaf, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(one_device[1]), strict=True):
        assert np.linalg.norm(leaf - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert rig.state.rest["calls"] == 2  # What is not a parameter is carried through.


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_lie_like_their_parameters_and_all_is_donated(name):
    config = OptimizerConfig(name, learning_rate=1e-2)
    rig = Rig(MeshConfig(2, 2, 2), optimizer=config)
    lowered = rig.step.lower(rig.state, rig.place(batch_at(0)))
    per_device = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(rig.abstract)
    )
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= per_device
    specs = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(rig.state.params)
    }
    assert specs["['blocks']['up']"] == PartitionSpec(None, "fsdp", "tensor")
    for _ in range(2):  # as initialised, and as a step returns them
        moments = jax.tree_util.tree_leaves_with_path(rig.state.opt_state)
        mirrored = 0
        for path, leaf in moments:
            own = jax.tree_util.keystr(path)
            for parameter, spec in specs.items():
                same = leaf.shape == rig.abstract.params["embed"].shape or leaf.ndim == 3
                if own.endswith(parameter) and same:
                    assert leaf.sharding.spec == spec, own
                    mirrored += 1
        assert mirrored >= 3
        before = [np.array(leaf) for _, leaf in moments]
        old = rig.state
        rig(batch_at(0))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    after = [np.array(leaf) for leaf in jax.tree.leaves(rig.state.opt_state)]
    assert any((a != b).any() for a, b in zip(before, after) if a.ndim >= 2)


def test_update_that_is_not_finite_is_skipped_exactly():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4)
    rig = Rig(MeshConfig(), 2, optimizer=config, accumulation=2)
    first = rig(batch_at(0))
    before = jax.tree.map(np.array, rig.state)
    for count, poison in enumerate([np.nan, np.inf], 1):
        bad = batch_at(1)
        bad["weights"][1, 2] = poison
        metrics = rig(bad)
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (count, count)
        assert rig.state.step == 1 + count
        for part in ("params", "opt_state", "rest", "extra"):
            now = jax.tree.map(np.array, getattr(rig.state, part))
            jax.tree.map(np.testing.assert_array_equal, now, getattr(before, part))
    after = rig(batch_at(2))
    assert (after["skipped"], after["skipped_in_a_row"]) == (2, 0)
    # The schedule has not moved on: warm-up is at its second update, not its third.
    assert first["learning_rate"] == pytest.approx(0.025)
    assert after["learning_rate"] == pytest.approx(0.05)


class FrozenEmbedding(TinyTask):
    def trainable(self, path: Any, variable: nnx.Variable) -> bool:
        return "embed" not in path


def test_frozen_parameters_get_no_gradient_no_moment_no_decay():
    rig = Rig(MeshConfig(), 2, FrozenEmbedding(), OptimizerConfig(weight_decay=1.0))
    assert len(jax.tree.leaves(rig.state.opt_state[1].mu)) == 3
    before = rig.params()
    rig(batch_at(0))
    after = rig.params()
    np.testing.assert_array_equal(before["embed"], after["embed"])
    assert (before["blocks"]["up"] != after["blocks"]["up"]).all()


def test_a_task_may_slow_parameters_down_and_clip_them_apart():
    class Apart(TinyTask):
        def learning_rate_factor(self, path: Any, variable: nnx.Variable) -> Any:
            return 0.5 if path[-1] == "embed" else np.array([1.0, 0.0, 2.0])[:, None, None]

        def clip_group(self, path: Any, variable: nnx.Variable) -> str:
            return path[0]

    class Plain(Apart):
        def learning_rate_factor(self, path: Any, variable: nnx.Variable) -> Any:
            return 1.0

        def trainable(self, path: Any, variable: nnx.Variable) -> bool:
            return path[-1] != "scale"

    class Slowed(Apart):
        trainable = Plain.trainable

    clipped = dataclasses.replace(DESCENT, clip_norm=0.01)
    plain, slowed = (
        gradients(Rig(MeshConfig(), 1, task(), clipped))[1] for task in (Plain, Slowed)
    )
    norms = [np.linalg.norm(plain["embed"])]
    norms.append(np.sqrt(sum((plain["blocks"][name] ** 2).sum() for name in ("up", "down"))))
    np.testing.assert_allclose(norms, 0.01, rtol=1e-4)
    np.testing.assert_allclose(slowed["embed"], 0.5 * plain["embed"], atol=1e-7)
    for name in ("up", "down"):
        factors = np.array([1.0, 0.0, 2.0])[:, None, None]
        np.testing.assert_allclose(
            slowed["blocks"][name], factors * plain["blocks"][name], atol=1e-7
        )


def test_nothing_to_train_is_an_error():
    class Frozen(TinyTask):
        def trainable(self, path: Any, variable: nnx.Variable) -> bool:
            return False

    with pytest.raises(UserError, match="trainable"):
        ModelParts(Frozen(), 0)


def test_no_array_of_the_state_is_weakly_typed():
    class Weak(TinyTask):
        def build(self, rngs: nnx.Rngs) -> nnx.Module:
            model = super().build(rngs)
            model.gain = nnx.Param(jnp.asarray(1.0))
            model.noise = nnx.Dropout(0.1, rngs=rngs)
            return model

        def init_extra(self, params: Any) -> Any:
            return {"gain": jnp.asarray(2.0)}

    parts = ModelParts(Weak(), 0)
    assert parts.fresh()[0]["gain"].weak_type
    state = jax.eval_shape(
        lambda: init_state(parts, make_optimizer(OptimizerConfig(), 5, parts.decays))
    )
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_decay_takes_matrices_and_not_stacked_vectors():
    decays = ModelParts(TinyTask(), 0).decays
    assert decays == {"blocks": {"down": True, "scale": False, "up": True}, "embed": True}


class Averaged(TinyTask):
    """Evaluates an average of the parameters, half old and half new."""

    def init_extra(self, params: Any) -> Any:
        return {"average": params}

    def after_update(self, params: Any, extra: Any, step: jax.Array) -> tuple[Any, Any]:
        average = jax.tree.map(lambda a, p: (a + p) / 2, extra["average"], params)
        return params, {"average": average}

    def eval_params(self, params: Any, extra: Any) -> Any:
        return extra["average"]


def test_an_average_follows_the_parameters_and_is_evaluated():
    rig = Rig(MeshConfig(2, 2, 2), task=Averaged())
    average = jax.tree.map(np.array, rig.state.extra["average"])
    for index in range(2):
        rig(batch_at(index))
        average = jax.tree.map(lambda a, p: (a + p) / 2, average, rig.params())
    for leaf, wanted in zip(jax.tree.leaves(rig.state.extra), jax.tree.leaves(average)):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)
    up = rig.state.extra["average"]["blocks"]["up"]
    assert up.sharding == rig.state.params["blocks"]["up"].sharding
    eval_step = make_eval_step(rig.parts, rig.mesh, rig.abstract)
    batch = rig.place(batch_at(5))
    loss = eval_step(rig.state, batch, jax.random.key(0))
    model = rig.parts.merge(average, jax.tree.map(jnp.asarray, rig.state.rest))
    wanted = TinyTask().loss(model, batch_at(5), jax.random.key(0))
    assert float(loss.total) == pytest.approx(float(wanted.total), rel=1e-5)


def test_the_random_key_depends_on_the_step_alone():
    class Drawing(TinyTask):
        def loss(self, model: Any, batch: Any, key: jax.Array) -> Any:
            loss = super().loss(model, batch, key)
            draw = jax.random.bits(key, (), jax.numpy.uint16)
            return dataclasses.replace(loss, metrics={"draw": draw})

    rig = Rig(MeshConfig(), 1, Drawing())
    again = jax.tree.map(jax.numpy.copy, rig.state)
    draws = [
        metrics["draw"] * metrics["weight"] for metrics in (rig(batch_at(0)), rig(batch_at(1)))
    ]
    rig.state = again
    repeated = rig(batch_at(5))
    assert repeated["draw"] * repeated["weight"] == pytest.approx(draws[0])
    assert draws[0] != pytest.approx(draws[1])
