"""Optimizers and schedules by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.train import OptimizerConfig, make_optimizer, make_schedule
from common.train.optimizer import learning_rate, weight_decay
from common.train.schedules import half_cosine

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


def test_a_norm_that_is_known_is_not_taken_again():
    config = OptimizerConfig("sgd", 1.0, schedule="constant", weight_decay=0.0, clip_norm=0.5)
    optimizer = make_optimizer(config, 10, MASK)
    grads = jax.tree.map(lambda x: 100 * x, PARAMS)
    for told, left in ((optax.tree.norm(grads), 0.5), (4 * optax.tree.norm(grads), 0.125)):
        updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, norm=told)
        assert float(optax.tree.norm(updates)) == pytest.approx(left, rel=1e-5)


def test_gradients_below_the_bound_stay_bit_for_bit():
    config = OptimizerConfig("sgd", 1.0, schedule="constant", weight_decay=0.0, clip_norm=100.0)
    grads = {"matrix": jax.random.normal(jax.random.key(0), (4, 4)), "vector": jnp.zeros(4)}
    np.testing.assert_array_equal(update(config, grads)["matrix"], -grads["matrix"])


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
        ({"final_weight_decay": -0.1}, "negative"),
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


def test_a_warm_up_from_zero_has_the_peak_twice():
    """DINOv2's schedule (section 3.9): its warm-up includes both ends; golden points."""
    peak = 2e-4 * 3**0.5
    config = OptimizerConfig(
        learning_rate=peak,
        warmup_steps=100_000,
        warmup_from_zero=True,
        final_fraction=1e-6 / peak,
        weight_decay=0.04,
        final_weight_decay=0.2,
    )
    rate = learning_rate(config, 625_000)
    assert float(rate(0)) == 0.0
    points = {1: 3.464136e-9, 50_000: 1.732068e-4, 99_999: 3.464102e-4, 100_000: 3.464102e-4,
              362_500: 1.737051e-4, 624_999: 1.0000000031e-6, 700_000: 1e-6}  # fmt: skip
    for step, value in points.items():
        assert float(rate(step)) == pytest.approx(value, rel=2e-5), step
    decay = weight_decay(config, 625_000)
    ends = [float(decay(step)) for step in (0, 312_500, 624_999, 625_000, 10**6)]
    assert ends == pytest.approx([0.04, 0.12, 0.2, 0.2, 0.2], rel=1e-6)
    # What is left of a momentum that goes to 1 keeps its digits.
    left = half_cosine(0.006, 0.0, 625_000)
    assert float(left(624_999)) == pytest.approx(0.006 * (np.pi / 2 / 625_000) ** 2, rel=1e-4)


def test_decay_follows_its_course_and_each_parameters_rate():
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", weight_decay=0.5, final_weight_decay=1.0
    )
    rates = {"matrix": np.array([[1.0], [0.5], [0.25], [0.0]]), "vector": 0.5}
    optimizer = make_optimizer(config, 2, MASK, rates=rates)
    state = optimizer.init(PARAMS)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for decay in (0.5, 0.75, 1.0, 1.0):
        updates, state = optimizer.update(zero, state, PARAMS)
        wanted = -0.1 * decay * np.broadcast_to(rates["matrix"], (4, 4))
        np.testing.assert_allclose(updates["matrix"], wanted, rtol=1e-6)
        np.testing.assert_array_equal(updates["vector"], 0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    plain, _ = make_optimizer(config, 2, MASK).update(
        jax.tree.map(jnp.ones_like, PARAMS), make_optimizer(config, 2, MASK).init(PARAMS), PARAMS
    )
    first = optimizer.update(jax.tree.map(jnp.ones_like, PARAMS), optimizer.init(PARAMS), PARAMS)[0]
    np.testing.assert_allclose(first["matrix"], plain["matrix"] * rates["matrix"], rtol=1e-6)
    np.testing.assert_allclose(first["vector"], plain["vector"] * 0.5, rtol=1e-6)


def test_groups_are_clipped_each_by_itself():
    config = OptimizerConfig(
        "sgd", 1.0, b1=0.0, schedule="constant", weight_decay=0.0, clip_norm=3.0
    )
    params = {"a": jnp.zeros(4), "b": jnp.zeros((2, 2)), "c": jnp.zeros(2)}
    grads = {"a": jnp.full(4, 10.0), "b": jnp.full((2, 2), 1.0), "c": jnp.full(2, 30.0)}
    decays = dict.fromkeys(params, False)
    groups = {"a": "backbone", "b": "head", "c": "backbone"}
    optimizer = make_optimizer(config, 1, decays, clip_groups=groups)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    norm = np.sqrt(4 * 10.0**2 + 2 * 30.0**2)
    np.testing.assert_allclose(updates["a"], -10.0 * 3 / norm, rtol=1e-6)
    np.testing.assert_allclose(updates["c"], -30.0 * 3 / norm, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -1.0, rtol=1e-6)  # Of norm 2.


def test_what_is_not_asked_for_leaves_the_state_as_it_was():
    """So that runs go on from checkpoints of before."""
    plain = make_optimizer(OptimizerConfig(), 10, MASK).init(PARAMS)
    ones, same = {"matrix": 1.0, "vector": np.ones(4)}, {"matrix": "", "vector": ""}
    given = make_optimizer(OptimizerConfig(), 10, MASK, rates=ones, clip_groups=same).init(PARAMS)
    assert jax.tree.structure(plain) == jax.tree.structure(given)
