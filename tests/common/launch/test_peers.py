"""What a process of several does when it, or another one, ends early: one line, a code, no wait."""

import signal
import time

import pytest
from process_group import ProcessGroup

from common.launch.peers import LOST

# Every process says that it is there, does what the case asks, or waits for the others for ever.
PROGRAM = """
import os, sys
from common.errors import UserError
from common.launch import launch

def main(run):
    import jax
    from common.sharding import barrier
    case, index = sys.argv[1], jax.process_index()
    print("here", flush=True)
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
    ("killed", "seconds", "says"),
    [
        (1, 6 + 10, "no sign of process 1 for 6 s, so process 0 ends too"),
        pytest.param(0, 10, "process 0, which coordinates, is gone", marks=pytest.mark.slow),
    ],
)
def test_the_survivor_of_a_killed_process_ends_in_time(waiting, killed, seconds, says):
    other = 1 - killed
    start = time.monotonic()
    waiting.signal(killed, signal.SIGKILL)
    codes = waiting.ended(60)
    assert codes[killed] == -signal.SIGKILL
    assert codes[other] == LOST
    assert time.monotonic() - start < seconds
    said = waiting.complained(other)
    assert said.startswith(f"error: {says}")
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
