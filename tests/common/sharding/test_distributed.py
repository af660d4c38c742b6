"""When a process believes itself one of many."""

import jax
import pytest

from common.errors import UserError
from common.sharding import distributed


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_the_environment_decides(monkeypatch, environment, expected):
    for name in (*distributed.COORDINATOR_VARIABLES, "TPU_WORKER_HOSTNAMES", "JAX_PLATFORMS",
                 "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
    distributed.initialize_distributed()
    assert bool(calls) is expected


def test_numbers_from_the_environment_reach_jax(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("TENFOLD_HEARTBEAT_SECONDS", "7")
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
    distributed.initialize_distributed()
    (call,) = calls
    assert (call["num_processes"], call["process_id"]) == (4, 2)
    assert (call["initialization_timeout"], call["heartbeat_timeout_seconds"]) == (300, 7)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "give host:port of process 0"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: give a whole number from 1"),
        ({"JAX_NUM_PROCESSES": "0"}, "from 1"),
        ({"JAX_PROCESS_ID": "-1"}, "from 0"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "2 processes are numbered 0..1"),
        ({"TENFOLD_HEARTBEAT_SECONDS": "1.5"}, "TENFOLD_HEARTBEAT_SECONDS=1.5"),
    ],
)
def test_a_variable_that_cannot_be_meant_is_refused(environment, says):
    with pytest.raises(UserError, match=says):
        distributed.cluster({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", **environment})


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")

    def initialize(**kwargs):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        distributed.initialize_distributed()


def test_one_process_waits_for_nobody():
    distributed.barrier("here")
    distributed.check_same("corpus", "large")
    with distributed.first_process_first("here"):
        assert distributed.from_first("word", "mine") == "mine"
    assert distributed.everywhere("well", True)
    assert not distributed.everywhere("well", False)
