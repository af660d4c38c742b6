"""Several processes as one run: joining them, and what they settle without their devices.

Settling goes through the coordination service that JAX starts in process 0, whose client JAX keeps
to itself: this is the only file that reaches for it. A collective of the devices would do too, but
on CPU its processes must arrive within half a minute of each other.
"""

import collections
import contextlib
import dataclasses
import errno
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from common.errors import UserError

COORDINATOR_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
START_SECONDS = "TENFOLD_START_SECONDS"
HEARTBEAT_SECONDS = "TENFOLD_HEARTBEAT_SECONDS"

# A dead process ends a wait long before this does; a slow one may take as long as it takes.
_FOREVER = 7 * 24 * 3600 * 1000  # Milliseconds.
_uses: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the environment says of the run's processes.

    Attributes:
      coordinator: where process 0 listens, `host:port`; None if a cluster manager says it.
      count, index: how many processes there are and which this one is; None likewise.
      start_seconds: how long to wait for all of them to come.
      heartbeat_seconds: after how long a silence a process counts as lost.
      variables: those that make this process one of several.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    start_seconds: int
    heartbeat_seconds: int
    variables: tuple[str, ...]


def cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Returns what the environment says of other processes, or None if there are none.

    There are if it names a coordinator (`JAX_COORDINATOR_ADDRESS`, with `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` unless a cluster manager gives them) or a TPU pod's list of hosts.

    Raises:
      UserError: a variable has a value that cannot be meant.
    """
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    # A TPU cross-compile on this machine names a host without there being a pod.
    on_tpu = environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    variables = tuple(v for v in COORDINATOR_VARIABLES if environment.get(v))
    if on_tpu and len(hosts) > 1:
        variables += ("TPU_WORKER_HOSTNAMES",)
    if not variables:
        return None
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS") or None
    if coordinator and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={coordinator}: give host:port of process 0")
    count = _whole_number(environment, "JAX_NUM_PROCESSES", least=1)
    index = _whole_number(environment, "JAX_PROCESS_ID", least=0)
    if count is not None and index is not None and index >= count:
        raise UserError(f"JAX_PROCESS_ID={index}: {count} processes are numbered 0..{count - 1}")
    return Cluster(
        coordinator,
        count,
        index,
        _whole_number(environment, START_SECONDS, least=1) or 300,
        _whole_number(environment, HEARTBEAT_SECONDS, least=1) or 100,
        variables,
    )


def initialize_distributed() -> bool:
    """Joins the run's other processes; returns whether this process is one of several.

    Decided by the environment alone (`cluster`), before any device is touched. A run that was meant
    to be one of many does not carry on alone.

    Raises:
      UserError: the environment does not say enough, or the coordinator's port is taken.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    found = cluster()
    if found is None:
        return False
    if found.index == 0 and found.coordinator:
        _check_port_is_free(int(found.coordinator.rpartition(":")[2]))
    try:
        jax.distributed.initialize(
            num_processes=found.count,
            process_id=found.index,
            initialization_timeout=found.start_seconds,
            heartbeat_timeout_seconds=found.heartbeat_seconds,
            # Process 0 may still be writing a report when the others are done.
            shutdown_timeout_seconds=3600,
        )
    except ValueError as error:  # Some number is neither given nor known to a cluster manager.
        raise UserError(
            f"{' and '.join(found.variables)} says that there are other processes, but not how "
            "many or which one this is: set JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Waits until every process is here, however long the slowest takes."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(_key(name), _FOREVER)


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Lets process 0 do what is inside before the others do it.

    For what one process makes and the others find made. If it fails in process 0, the launcher
    tells the others, which then do not wait any longer.
    """
    if jax.process_index() != 0:
        barrier(name)
    yield
    if jax.process_index() == 0:
        barrier(name)


def from_first(name: str, text: str) -> str:
    """Returns process 0's `text` in every process; the others wait for it."""
    if jax.process_count() == 1:
        return text
    key = _key(name)
    if jax.process_index() == 0:
        _client().key_value_set(key, text)
        return text
    return _client().blocking_key_value_get(key, _FOREVER)


def everywhere(name: str, here: bool) -> bool:
    """Returns whether `here` is true in every process; each waits for all."""
    if jax.process_count() == 1:
        return here
    key = _key(name)
    if not here:
        _client().key_value_set(f"{key}/{jax.process_index()}", "no")
    _client().wait_at_barrier(key, _FOREVER)
    return not _client().key_value_dir_get(key)


def check_same(name: str, text: str) -> None:
    """Raises UserError in the processes where `text`, which says of `name`, is not process 0's."""
    first = from_first(name, text)
    if text != first:
        raise UserError(
            f"the {name} of process {jax.process_index()} is {text} and that of process 0 {first}: "
            "every host must have the same"
        )


def post(key: str, text: str) -> None:
    """Leaves a text for the other processes; the first one under a key stays."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"tenfold/posted/{key}", text)


def posted(key: str) -> str | None:
    """Returns what any process has left under a key, or None; never waits."""
    try:
        return _client().key_value_try_get(f"tenfold/posted/{key}")
    except jax.errors.JaxRuntimeError:
        return None


def _client() -> Any:
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("this process has not joined any others")
    return client


def _check_port_is_free(port: int) -> None:
    # JAX's runtime, which binds it next, may crash when it cannot.
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("::", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"process 0 cannot listen at port {port}, which something else uses: choose "
                "another one in every JAX_COORDINATOR_ADDRESS"
            ) from error


def _key(name: str) -> str:
    """A name's key in the service; every process goes through the same sequence of them."""
    _uses[name] += 1
    return f"tenfold/{name}/{_uses[name]}"


def _whole_number(environment: Mapping[str, str], name: str, least: int) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text}: give a whole number from {least}")
    return int(text)
