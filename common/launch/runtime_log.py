"""What JAX's C++ runtime writes to stderr, read before the user sees it.

In a run of several processes the runtime reports a lost one by a page of log lines and abort(), and
leaves no way to say it otherwise. So its stderr is a pipe here, and abort() sleeps for a moment, in
which Python puts a line in the place of the page and ends the process. Python's own `sys.stderr`
goes on as before.
"""

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

# As in `E1123 16:48:45.585846   10127 coordination_service.cc:1549] text`.
_HEAD = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] ")
# Where the runtime speaks of other processes only; the lines that follow belong to it.
_ABOUT_PROCESSES = re.compile(
    rb"coordination_service\w*\.cc|preemption_sync\w*\.cc|client\.h|add_port\.cc"
)
# Its last words, the second where a collective of CPUs has lost its other end.
_FATAL = (
    b"Terminating process because the JAX distributed service detected fatal errors",
    b"terminate called after throwing an instance of 'gloo::",
)
_GATHER_SECONDS = 0.5


class RuntimeLog:
    """Takes over file descriptor 2 until `close`."""

    def __init__(self, on_fatal: Callable[[str], None], show_all: bool = False):
        """Args:
        on_fatal: called in a thread of its own, with the runtime's text, when it gives up; has
          five seconds to end the process.
        show_all: let lines about other processes through too.
        """
        self._on_fatal = on_fatal
        self._show_all = show_all
        self._about_processes = False
        self._last_words: list[bytes] = []
        self._stderr = os.dup(2)
        self._replace_python_stderr()
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(writer)
        self._thread = threading.Thread(
            target=self._forward, args=(reader,), name="runtime-log", daemon=True
        )
        self._thread.start()
        _delay_aborts()

    def close(self) -> None:
        """Gives stderr back once all that was written to it has been read."""
        os.dup2(self._stderr, 2)  # The pipe's last writer: the thread reads to its end.
        self._thread.join(timeout=1)  # A child process may still hold the pipe.

    def _replace_python_stderr(self) -> None:
        former = sys.stderr
        former.flush()
        sys.stderr = open(  # noqa: SIM115 -- for the rest of the process.
            os.dup(self._stderr), "w", buffering=1, encoding=former.encoding, errors=former.errors
        )

    def _forward(self, reader: int) -> None:
        with open(reader, "rb") as lines:
            for line in lines:
                if self._last_words or any(words in line for words in _FATAL):
                    self._hear(line)
                elif self._is_shown(line):
                    os.write(self._stderr, line)

    def _is_shown(self, line: bytes) -> bool:
        head = _HEAD.match(line)
        if head:
            self._about_processes = _ABOUT_PROCESSES.fullmatch(head[1]) is not None
        return self._show_all or not self._about_processes

    def _hear(self, line: bytes) -> None:
        if not self._last_words:
            # A timer, not a last line to wait for: what comes after the first may change.
            threading.Timer(_GATHER_SECONDS, self._tell).start()
        self._last_words.append(line)
        if self._show_all:
            os.write(self._stderr, line)

    def _tell(self) -> None:
        self._on_fatal(b"".join(self._last_words).decode(errors="replace"))


def _delay_aborts() -> None:
    """Makes abort() wait six seconds before it ends the process.

    The handler of SIGABRT is the C library's `sleep`, which takes the signal's number, six, for its
    seconds. A handler in Python would not do: it runs in the main thread, when that is free.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
