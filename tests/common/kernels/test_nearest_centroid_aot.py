"""`nearest_centroid` compiled for accelerators that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from common.kernels import nearest_centroid
from common.kernels.nearest_centroid.reranked import nearest_reranked
from common.sharding import compile_for, per_shard, topology, use_mesh

pytestmark = pytest.mark.compile

ROWS, CENTROIDS, WIDTH = 65536, 10000, 768
KERNEL = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


def arguments(dtype, rows, everywhere):
    return (
        jax.ShapeDtypeStruct((ROWS, WIDTH), dtype, sharding=rows),
        jax.ShapeDtypeStruct((CENTROIDS, WIDTH), dtype, sharding=everywhere),
    )


def assert_kernel_without_matrix(compiled, platform, rows):
    """The kernel alone holds scores: the program's own memory is a few values a row."""
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{KERNEL[platform]}"') == 1
    assert f"[{rows},{CENTROIDS}]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * (rows + CENTROIDS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "h100:1"])
def test_one_device(name, dtype):
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])
    compiled = compile_for(where, nearest_centroid, *arguments(dtype, alone, alone))
    assert_kernel_without_matrix(compiled, where.platform, ROWS)


@pytest.mark.parametrize("name", ["v5e:2x2", "h100:8"])
def test_rows_over_all_devices(name):
    where = topology(name)
    mesh = Mesh(np.array(where.devices), ("data",), axis_types=(AxisType.Auto,))
    operands = arguments(jnp.bfloat16, NamedSharding(mesh, P("data")), NamedSharding(mesh, P()))

    def search(x, c):
        axes = [("batch", None), (None, None)]
        return per_shard(nearest_centroid, [x, c], axes, (("batch",), ("batch",)))

    with use_mesh(mesh):
        compiled = compile_for(where, search, *operands)
    assert_kernel_without_matrix(compiled, where.platform, ROWS // len(where.devices))
    assert "all-" not in compiled.as_text()


@pytest.mark.parametrize("name", ["v5e:1x1", "h100:1"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 7, 5), (1100, 1300, 2500)])
def test_ragged_shapes_under_vmap(name, shape):
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])
    rows, centroids, width = shape
    operands = (
        jax.ShapeDtypeStruct((2, rows, width), jnp.bfloat16, sharding=alone),
        jax.ShapeDtypeStruct((2, centroids, width), jnp.bfloat16, sharding=alone),
    )
    compiled = compile_for(where, jax.vmap(nearest_centroid), *operands)
    assert KERNEL[where.platform] in compiled.as_text()


@pytest.mark.parametrize("name", ["v5e:1x1", "h100:1"])
def test_the_reranked_search_runs_the_kernel(name):
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])
    rows, centroids = 4096, 10_000
    operands = (
        jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32, sharding=alone),
        jax.ShapeDtypeStruct((centroids, WIDTH), jnp.float32, sharding=alone),
    )
    text = compile_for(where, nearest_reranked, *operands).as_text()
    # Once with the following scores in bfloat16, once for what float32 has to decide.
    assert text.count(f'custom_call_target="{KERNEL[where.platform]}"') == 2
    assert f"[{rows},{centroids}]" not in text
