"""`linear_scan` forward and backward compiled for accelerators that are not here."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

from common.kernels import linear_scan
from common.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    compile_for,
    make_mesh,
    partition_spec,
    per_shard,
    topology,
    use_mesh,
)

pytestmark = pytest.mark.compile

DEVICES = ["v5e:1x1", "v5p:2x2x1", "v6e:1x1", "h100:1"]
KERNEL = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
COLLECTIVE = re.compile(r" (?:all|collective|reduce-scatter)[\w-]*\(")
F32, BF16 = jnp.float32, jnp.bfloat16
# Shape `[B, L, D]`, dtypes of a and x: a production layer, and one that no block divides.
CASES = {
    "float32": ((8, 2048, 2560), F32, F32),
    "bfloat16": ((8, 2048, 2560), BF16, BF16),
    "mixed": ((8, 2048, 2560), F32, BF16),
    "ragged": ((1, 1000, 2500), F32, BF16),
}
WIDE, FLAT = ("batch", "seq", "lru"), ("batch", "lru")


def gradients(scan):
    def both(a, x, h0, dh, dh_last):
        outputs, pullback = jax.vjp(scan, a, x, h0)
        return *outputs, *pullback((dh, dh_last))

    return both


def arguments(shape, a_dtype, x_dtype, wide, flat):
    def array(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    state = array(shape[::2], F32, flat)
    whole = array(shape, x_dtype, wide)
    return array(shape, a_dtype, wide), whole, state, whole, state


def kernels(compiled, platform):
    return compiled.as_text().count(f'custom_call_target="{KERNEL[platform]}"')


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DEVICES)
def test_forward_and_backward_move_nothing_twice(name, case):
    """One kernel each way, and no array of the size of an operand beside operands and results."""
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])
    shape, a_dtype, x_dtype = CASES[case]
    compiled = compile_for(
        where, gradients(linear_scan), *arguments(shape, a_dtype, x_dtype, alone, alone)
    )
    # The ragged case has too few channels for a GPU: its time is cut, and first summarised.
    few = where.platform == "cuda" and case == "ragged"
    assert kernels(compiled, where.platform) == (4 if few else 2)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * 2 * math.prod(shape)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["v5e:4x4", "h100:8"])
def test_over_a_mesh(name, reverse):
    """Batch, width and sequence over devices: only summaries of the parts are exchanged."""
    where = topology(name)
    count = len(where.devices)
    mesh = make_mesh(MeshConfig(data=count // 4, tensor=2, context=2), devices=where.devices)
    shape = (8, 2048, 2560)

    def scan(a, x, h0):
        def part(a, x, h0, axis_name):
            return linear_scan(a, x, h0, reverse=reverse, axis_name=axis_name)

        return per_shard(part, (a, x, h0), (WIDE, WIDE, FLAT), (WIDE, FLAT), sequence="seq")

    wide, flat = (
        NamedSharding(mesh, partition_spec(axes, sizes, mesh, DEFAULT_RULES))
        for axes, sizes in ((WIDE, shape), (FLAT, shape[::2]))
    )
    with use_mesh(mesh):
        compiled = compile_for(where, gradients(scan), *arguments(shape, F32, BF16, wide, flat))
    assert kernels(compiled, where.platform) == 4, "a summary and a scan each way"
    share = math.prod(shape) // count
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 2 * share
    exchanged = [line for line in compiled.as_text().splitlines() if COLLECTIVE.search(line)]
    sizes = [sizes for line in exchanged for sizes in re.findall(r"\w\[([\d,]+)\]", line)]
    assert sizes
    assert all(math.prod(map(int, size.split(","))) < 0.02 * share for size in sizes)
