"""Topologies by name, their capacities, and what is said of names that mean nothing."""

import types

import jax
import pytest

from common.errors import UserError
from common.sharding.accelerators import ACCELERATORS, accelerator, accelerator_of
from common.sharding.topology import GPU_KINDS, TPU_KINDS, topology


def device(kind, platform="tpu"):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    found = accelerator_of(device(kind))
    assert (found and found.name) == name


def test_a_cpu_has_no_declared_capacity():
    assert accelerator_of(jax.devices("cpu")[0]) is None


def test_every_kind_to_compile_for_has_capacities():
    assert all(accelerator(kind) for kind in (*TPU_KINDS, *GPU_KINDS))
    assert len({a.name for a in ACCELERATORS}) == len(ACCELERATORS)
    for a in ACCELERATORS:
        # A step from memory to arithmetic: every one does 100 to 700 FLOP for a byte that it reads.
        assert 100 < a.flops / a.bandwidth < 700, a.name
        assert 16e9 < a.memory < 200e9, a.name


def test_virtual_cpus():
    found = topology("cpu:4")
    assert (found.platform, len(found.devices), found.accelerator) == ("cpu", 4, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "a topology is <kind>:<shape>, as v5e:4x4, h100:8 or cpu:8; not 'v5e'"),
        ("v5e:", "not 'v5e:'"),
        ("v5e:4x", "not 'v5e:4x'"),
        ("v5e:-4", "not 'v5e:-4'"),
        ("v5x:4x4", "unknown accelerator 'v5x'"),
        ("cpu:0", "has no device"),
        ("cpu:4096", "JAX_NUM_CPU_DEVICES=4096"),
        ("v5p:4x4", "a v5p topology has 3 dimensions, as v5p:4x4x4"),
        ("v5e:4x4x4", "a v5e topology has 2 dimensions, as v5e:4x4"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UserError) as raised:
        topology(name)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "install"), [("v5e:2x2", "pip install 'jax[tpu]'"), ("h100:8", "jax-cuda13-pjrt")]
)
def test_a_compiler_that_is_not_installed(monkeypatch, kind, install):
    from jax.experimental import topologies

    def missing(**_):
        raise KeyError("plugin not found")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError) as raised:
        topology(kind)
    assert install in str(raised.value)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "count"), [("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("h100:2x8", 16)]
)
def test_devices_are_as_many_as_the_shape_says(name, count):
    found = topology(name)
    assert len(found.devices) == count
    assert accelerator_of(found.devices[0]) == found.accelerator


@pytest.mark.compile
@pytest.mark.parametrize("name", ["v5e:3x5", "v5p:1x1x7"])
def test_a_slice_that_does_not_exist(name):
    with pytest.raises(UserError, match="no topology"):
        topology(name)
