"""Joining the other processes of a run, when the environment says that there are any."""

import os

import jax

COORDINATOR_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")


def initialize_distributed() -> bool:
    """Joins the run's other processes; returns whether this process is one of several.

    Decided by the environment alone, before any device is touched: a coordinator's address
    (`JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` unless a cluster
    manager gives them) or a TPU pod's list of hosts. Errors of the runtime are not caught: a run
    that was meant to be one of many must not carry on alone.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if not _is_one_of_many():
        return False
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=int(count) if count else None, process_id=int(index) if index else None
    )
    return jax.process_count() > 1


def _is_one_of_many() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    # A TPU cross-compile on this machine names a host without there being a pod.
    on_tpu = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return any(os.environ.get(v) for v in COORDINATOR_VARIABLES) or (on_tpu and len(hosts) > 1)
