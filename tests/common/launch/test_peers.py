"""What a process of several does when it, or another one, ends early: one line, a code, no wait."""

import signal

import jax
import pytest
from process_group import ProcessGroup

from common.launch.peers import LOST, is_lost_contact

# Every process says that it is there, does what the case asks, or waits for the others for ever.
PROGRAM = """
import ctypes, os, sys, threading
from common.errors import UserError
from common.launch import launch

def main(run):
    import jax
    from common.sharding import barrier
    case, index = sys.argv[1], jax.process_index()
    print("here", flush=True)
    if case == f"abort {index}":
        words = "Terminating process because the JAX distributed service detected fatal errors"
        os.write(2, f"{words}\\n".encode())
        threading.Timer(0.1, ctypes.CDLL(None).abort).start()
        raise UserError("the disk is full")
    if case == f"mistake {index}":
        raise UserError("the disk\\nis full")
    if case == f"defect {index}":
        raise KeyError("k")
    if case != "work":
        barrier(f"of {index} alone")

launch(main, package="paper", verb="run", description="", examples=[], several_processes=True,
       argv=[])
"""


def group(tmp_path, case, **options):
    return ProcessGroup(["-c", PROGRAM, case], tmp_path, **options)


@pytest.fixture(name="waiting")
def _waiting(tmp_path):
    """Two processes, each in a barrier that it never leaves."""
    with group(tmp_path, "wait") as processes:
        processes.wait_for(lambda: all("here" in processes.said(i) for i in (0, 1)))
        yield processes


@pytest.mark.smoke
def test_nothing_happens(tmp_path):
    with group(tmp_path, "work") as processes:
        assert processes.ended(60) == [0, 0], str(processes)
        assert (processes.complained(0), processes.complained(1)) == ("", "")


def test_a_mistake_in_one_process_ends_all(tmp_path):
    with group(tmp_path, "mistake 1") as processes:
        assert processes.ended(60) == [2, 2], str(processes)
        assert processes.complained(1) == "error: the disk is full\n"
        assert processes.complained(0) == "error: process 1 ended early: the disk is full\n"


def test_a_defect_in_the_coordinator_ends_all(tmp_path):
    with group(tmp_path, "defect 0") as processes:
        assert processes.ended(60) == [1, 1], str(processes)
        assert processes.complained(0).startswith("Traceback")
        assert processes.complained(1) == "error: process 0 ended early: KeyError: 'k'\n"


@pytest.mark.parametrize(
    ("killed", "says"),
    [
        (1, "no sign of process 1 for 6 s, so process 0 ends too"),
        pytest.param(0, "process 0, which coordinates, is gone", marks=pytest.mark.slow),
    ],
)
def test_the_survivor_of_a_killed_process_ends_in_time(waiting, killed, says):
    other = 1 - killed
    waiting.signal(killed, signal.SIGKILL)
    # Half of what it would take if the heartbeat were not as the group has set it.
    codes = waiting.ended(50)
    assert codes[killed] == -signal.SIGKILL
    assert codes[other] == LOST
    said = waiting.complained(other)
    # The runtime may refuse the barrier before it tells which process it misses.
    assert said.startswith((f"error: {says}", "error: contact was lost to another process"))
    assert "start all of them again" in said
    assert said.count("\n") == 1, said


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_whose_peers_do_not_come_says_so(tmp_path, index):
    with group(tmp_path, "work", start=[index], TENFOLD_START_SECONDS="3") as alone:
        assert alone.ended(60) == [LOST]
        said = alone.complained(index)
        assert said.startswith(f"error: process {index} of 2 waited 3 s at 127.0.0.1:")
        assert said.count("\n") == 1, said


def test_a_port_in_use_is_a_mistake(tmp_path):
    import socket

    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with group(tmp_path, "work", start=[0], JAX_COORDINATOR_ADDRESS=address) as alone:
            assert alone.ended(60) == [2]
            assert "choose another one" in alone.complained(0)
            assert alone.complained(0).count("\n") == 1


def test_a_command_for_one_process_refuses_to_be_one_of_several(tmp_path):
    program = PROGRAM.replace("several_processes=True", "several_processes=False")
    with ProcessGroup(["-c", program, "work"], tmp_path, start=[1]) as alone:
        assert alone.ended(60) == [2]
        assert "unset JAX_COORDINATOR_ADDRESS for it" in alone.complained(1)


def test_errors_of_a_lost_process_are_told_from_others():
    """Orbax, whose barrier a lost process does not reach, raises a TimeoutError."""
    orbax = "Timeout waiting at barrier '[op=2.state] save_and_finalize_2.state_commit_complete'."
    assert is_lost_contact(TimeoutError(orbax))
    assert is_lost_contact(jax.errors.JaxRuntimeError("INTERNAL: Gloo: Connection reset by peer"))
    assert not is_lost_contact(TimeoutError("the disk"))
    assert not is_lost_contact(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not is_lost_contact(ValueError("at a barrier"))


def test_an_abort_does_not_overtake_the_exit(tmp_path):
    """The runtime gives up while a process is on its way to its end: the code is still its own."""
    with group(tmp_path, "abort 0") as processes:
        assert processes.ended(60) == [2, 2], str(processes)
        assert processes.complained(0) == "error: the disk is full\n"
