"""Optimizers and schedules by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.train import OptimizerConfig, make_optimizer, make_schedule

PARAMS = {"matrix": jnp.ones((4, 4)), "vector": jnp.ones(4)}
MASK = {"matrix": True, "vector": False}


def update(config: OptimizerConfig, grads: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(config, 10, MASK)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return jax.tree.map(np.array, updates)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_goes_downhill_and_decays_matrices_alone(name):
    config = OptimizerConfig(name, learning_rate=0.1, schedule="constant", weight_decay=0.0)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    plain = update(config, grads)
    assert all((leaf < 0).all() for leaf in plain.values())
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    decayed = update(OptimizerConfig(name, 0.1, schedule="constant", weight_decay=0.5), zero)
    np.testing.assert_allclose(decayed["matrix"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(decayed["vector"], 0, atol=1e-12)


def test_clipping_bounds_the_global_norm():
    config = OptimizerConfig("sgd", 1.0, schedule="constant", weight_decay=0.0, clip_norm=0.5)
    large = jax.tree.map(lambda x: 100 * x, PARAMS)
    assert float(optax.tree.norm(update(config, large))) == pytest.approx(0.5, rel=1e-5)


def test_first_moment_may_be_smaller():
    optimizer = make_optimizer(OptimizerConfig(moment_dtype="bfloat16"), 10, MASK)
    adam = optax.tree.get(optimizer.init(PARAMS), "mu")
    assert adam["matrix"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"learning_rate": -1.0}, "negative"),
        ({"b1": 1.0}, "b1"),
        ({"moment_dtype": "int8"}, "moment_dtype"),
    ],
)
def test_bad_fields_are_user_errors(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**changes), 10, MASK)


@pytest.mark.parametrize(
    ("name", "middle", "last"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0), ("wsd", 1.0, 0.1)],
)
def test_schedules_warm_up_and_end_where_they_should(name, middle, last):
    schedule = make_schedule(name, 2.0, steps=104, warmup_steps=4, final_fraction=0.1)
    assert [float(schedule(i)) for i in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert float(schedule(54)) == pytest.approx(2.0 * middle)
    assert float(schedule(104)) == pytest.approx(2.0 * last)
    no_warmup = make_schedule(name, 2.0, steps=100, final_fraction=0.1)
    assert float(no_warmup(0)) == pytest.approx(2.0)


def test_wsd_decays_over_the_last_fifth():
    schedule = make_schedule("wsd", 1.0, steps=100, warmup_steps=10, final_fraction=0.0)
    assert float(schedule(80)) == pytest.approx(1.0)
    assert float(schedule(90)) == pytest.approx(0.5)


def test_a_run_shorter_than_its_warm_up_ends_on_the_way_up():
    schedule = make_schedule("cosine", 1.0, steps=5, warmup_steps=10)
    assert float(schedule(4)) == pytest.approx(0.5)


def test_parameters_held_back_stay_bit_for_bit_and_then_train():
    config = OptimizerConfig("adamw", 0.1, schedule="constant", weight_decay=0.5)
    held, free = (
        make_optimizer(config, 10, MASK, trains_from)
        for trains_from in ({"matrix": 3, "vector": 0}, None)
    )
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    params, state = PARAMS, held.init(PARAMS)
    alone, alone_state = PARAMS, free.init(PARAMS)
    for step in range(4):
        updates, state = held.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, alone_state = free.update(grads, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
        assert (params["matrix"] == PARAMS["matrix"]).all() == (step < 3)
        np.testing.assert_array_equal(params["vector"], alone["vector"])


def test_without_held_parameters_the_state_has_no_count_of_its_own():
    none, zero = (
        make_optimizer(OptimizerConfig(), 10, MASK, trains_from).init(PARAMS)
        for trains_from in (None, {"matrix": 0, "vector": 0})
    )
    assert jax.tree.structure(none) == jax.tree.structure(zero)
