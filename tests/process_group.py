"""Several processes of one command, for tests of runs over more than one host."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Compiling less well is faster than compiling; what is compared is compiled alike.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class ProcessGroup:
    """Processes that meet over loopback, and end with the `with` block at the latest.

    Args:
      arguments: of the Python interpreter, the same for all.
      folder: where their output is kept.
      count: how many processes the run has, as they are told.
      start: which of them to start.
      devices: of each process.
      heartbeat: seconds after which a silent process counts as lost.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        *,
        count: int = 2,
        start: Sequence[int] | None = None,
        devices: int = 4,
        heartbeat: int = 6,
        **environment: str,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._arguments = [str(argument) for argument in arguments]
        self._indices = list(range(count) if start is None else start)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
            "TENFOLD_HEARTBEAT_SECONDS": str(heartbeat),
            "XLA_FLAGS": QUICK_COMPILATION,
            **environment,
        }
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "ProcessGroup":
        for index in self._indices:
            with (
                open(self._file(index, "out"), "wb") as out,
                open(self._file(index, "err"), "wb") as err,
            ):
                self.processes[index] = subprocess.Popen(
                    [sys.executable, *self._arguments],
                    env=self._environment | {"JAX_PROCESS_ID": str(index)},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                )
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def signal(self, index: int, number: signal.Signals) -> None:
        self.processes[index].send_signal(number)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 200) -> None:
        """Waits for a condition while all processes run."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it took too long:\n{self}"
            ended = [i for i, process in self.processes.items() if process.poll() is not None]
            assert not ended, f"{ended} ended early:\n{self}"
            time.sleep(0.01)

    def ended(self, seconds: float = 200) -> list[int]:
        """Returns the exit codes; none may take longer than that."""
        deadline = time.monotonic() + seconds
        codes = []
        for index, process in self.processes.items():
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {index} hangs:\n{self}") from None
        return codes

    def said(self, index: int) -> str:
        return self._file(index, "out").read_text()

    def complained(self, index: int) -> str:
        return self._file(index, "err").read_text()

    def __str__(self) -> str:
        parts = (
            f"--- {kind} of {index}\n{self._file(index, kind).read_text()}"
            for index in self.processes
            for kind in ("out", "err")
        )
        return "\n".join(parts)

    def _file(self, index: int, kind: str) -> Path:
        return self._folder / f"process_{index}.{kind}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
