"""Meshes from configs, and what is said when the sizes do not fit."""

import jax
import pytest

from common.errors import UserError
from common.sharding import MESH_AXES, MeshConfig, batch_sharding, batch_shards, make_mesh


def test_left_over_devices_go_to_the_axis_of_minus_one():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert tuple(mesh.shape.items()) == tuple(zip(MESH_AXES, (2, 2, 2, 1)))
    assert batch_shards(mesh) == 4


def test_explicit_sizes_and_devices():
    mesh = make_mesh(MeshConfig(1, 2, 1, 2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1, "context": 2}


@pytest.mark.parametrize(
    ("config", "data", "fsdp"),
    [
        (MeshConfig(data=1, fsdp=-1, most_fsdp=16), 1, 8),
        (MeshConfig(data=1, fsdp=-1, most_fsdp=4), 2, 4),
        (MeshConfig(data=1, fsdp=-1, most_fsdp=3), 4, 2),
        (MeshConfig(data=2, fsdp=-1, most_fsdp=2, tensor=2), 2, 2),
        (MeshConfig(data=2, fsdp=4, most_fsdp=2), 2, 4),
    ],
)
def test_what_fsdp_may_not_take_goes_to_data(config, data, fsdp):
    shape = make_mesh(config).shape
    assert (shape["data"], shape["fsdp"]) == (data, fsdp)


def test_auto_axes_leave_eager_code_alone():
    mesh = make_mesh(MeshConfig())
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(tensor=3),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=-1, fsdp=-1, most_fsdp=4),
        MeshConfig(data=3, fsdp=-1, most_fsdp=4),
        MeshConfig(fsdp=-1, data=1, most_fsdp=0),
        MeshConfig(data=0),
        MeshConfig(data=-2),
        MeshConfig(data=4, fsdp=4),
        MeshConfig(data=-1, fsdp=16),
    ],
)
def test_sizes_that_do_not_fit_name_themselves(config):
    with pytest.raises(UserError, match=f"tensor={config.tensor}|most_fsdp must be"):
        make_mesh(config)


def test_error_names_the_device_count():
    with pytest.raises(UserError, match=r"8 device"):
        make_mesh(MeshConfig(data=3))


def test_batch_rows_lie_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = jax.device_put(jax.numpy.zeros((8, 5)), batch_sharding(mesh))
    assert {s.data.shape for s in rows.addressable_shards} == {(2, 5)}
