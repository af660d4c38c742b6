"""The embedding table in parts: look-up and loss equal those of one device, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.nn.losses import token_nll
from common.nn.table import Head, look_up, through_head, tied_nll
from common.sharding import DEFAULT_RULES, MeshConfig, make_mesh, use_mesh

V, D, B, L = 24, 16, 8, 12
TABLE = np.asarray(jax.random.normal(jax.random.key(0), (V, D)))
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (B, L), 0, V))
TARGETS = np.asarray(jax.random.randint(jax.random.key(2), (B, L), 0, V))
WEIGHTS = np.asarray(jax.random.uniform(jax.random.key(3), (B, L)))


def cap(logits):
    return 5.0 * jnp.tanh(logits / 5.0)


def plain(table):
    x = table[TOKENS]
    return (token_nll(cap(jnp.einsum("bld,vd->blv", x, table)), TARGETS) * WEIGHTS).sum()


def in_parts(chunk):
    def loss(table):
        x = look_up(table, TOKENS, jnp.float32)
        nll = tied_nll(x, table, TARGETS, cap=cap, dtype=jnp.float32, chunk=chunk)
        return (nll * WEIGHTS).sum()

    return loss


@pytest.mark.parametrize(
    ("sizes", "rules", "chunk"),
    [
        (MeshConfig(data=1), DEFAULT_RULES, 4),
        (MeshConfig(data=2, fsdp=4), DEFAULT_RULES, 4),
        (MeshConfig(data=2, fsdp=2, tensor=2), DEFAULT_RULES, None),
        (MeshConfig(data=2, fsdp=2, context=2), DEFAULT_RULES, 3),
        # The table over both of the batch's axes, in their order.
        (MeshConfig(data=2, fsdp=4), DEFAULT_RULES.replace(embed=("data", "fsdp")), 4),
        # Columns that the mesh does not divide.
        (MeshConfig(data=8), DEFAULT_RULES.replace(embed=None), 5),
    ],
)
def test_equals_one_device(sizes, rules, chunk):
    expected, expected_gradient = jax.value_and_grad(plain)(TABLE)
    devices = jax.devices()[: 1 if sizes == MeshConfig(data=1) else 8]
    with use_mesh(make_mesh(sizes, devices), rules), jax.default_matmul_precision("highest"):
        loss, gradient = jax.jit(jax.value_and_grad(in_parts(chunk)))(TABLE)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_sixteen_bit_sums_stay_in_32_bits():
    """Gradients of many chunks are added in float32: no coarser than those of one chunk."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    hidden = jnp.asarray(TABLE[TOKENS], jnp.bfloat16)

    def gradient(chunk):
        def loss(table):
            nll = tied_nll(hidden, table, TARGETS, cap=cap, dtype=jnp.bfloat16, chunk=chunk)
            return nll.sum()

        with use_mesh(mesh):
            return jax.jit(jax.grad(loss))(TABLE)

    np.testing.assert_allclose(gradient(1), gradient(None), rtol=1e-5, atol=1e-5)


def surprise(logits, heads, targets):
    """A pair of losses, one of which takes another head's view of a further row."""
    (other,) = heads
    expected = jax.nn.softmax(other(jax.nn.one_hot(targets, 8)))
    return -(expected * jax.nn.log_softmax(logits)).sum(-1), logits.max(-1)


@pytest.mark.parametrize("chunk", [None, 4])
def test_any_loss_through_a_head_equals_one_device(chunk):
    """Two results, a row that is no target, and a frozen head of another width."""
    frozen = np.asarray(jax.random.normal(jax.random.key(4), (V, 8)))

    def loss(table, hidden, frozen):
        heads = [Head(t, cap, jnp.float32) for t in (table, frozen)]
        first, second = through_head(surprise, hidden, heads[0], (TARGETS,), heads[1:], chunk=chunk)
        assert first.shape == second.shape == (B, L)
        return ((first + 0.5 * second) * WEIGHTS).sum()

    def plain(table, hidden, frozen):
        logits, others = (
            cap(jnp.einsum("bld,vd->blv", x, t))
            for x, t in ((hidden, table), (jax.nn.one_hot(TARGETS, 8), frozen))
        )
        first = -(jax.nn.softmax(others) * jax.nn.log_softmax(logits)).sum(-1)
        return ((first + 0.5 * logits.max(-1)) * WEIGHTS).sum()

    arguments = TABLE, TABLE[TOKENS], frozen
    expected = jax.value_and_grad(plain, (0, 1))(*arguments)
    for sizes in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)):
        devices = jax.devices()[: 1 if sizes == MeshConfig(data=1) else 8]
        with use_mesh(make_mesh(sizes, devices)), jax.default_matmul_precision("highest"):
            found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        for one, other in zip(found[1], expected[1]):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    unsharded = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    np.testing.assert_allclose(unsharded[0], expected[0], rtol=1e-5)
