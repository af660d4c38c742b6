"""Noticing that the run shall stop, at the same step in every process."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context in which SIGTERM and SIGINT ask for a save instead of ending the process.

    In a run of several processes JAX's own preemption service catches SIGTERM, however often it
    comes, and makes all processes agree on the step; SIGINT is passed on to it. A second signal (of
    several processes: a second SIGINT) ends the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}
        self._distributed = jax.distributed.is_initialized()

    def __enter__(self) -> "Preemption":
        # Python takes signals in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._distributed else self.SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def reached(self, step: int) -> bool:
        """Returns whether to stop after `step`; to be called once a step, by every process."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            before = self._before[signal.Signals(number)]
            self.__exit__()
            if before is signal.SIG_IGN:  # As shells start what runs in the background.
                raise KeyboardInterrupt
            signal.raise_signal(number)
            return
        self._asked = True
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)
        # Not `print`, which may be what the signal has interrupted.
        os.write(2, b"\nstopping after this step (a second signal stops at once)\n")
