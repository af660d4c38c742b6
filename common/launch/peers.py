"""Ending together: how a run of several processes stops when one of them ends early.

Left alone, a process that has failed would wait for the others at its exit, and they for it in a
collective, until JAX aborts all of them minutes later. Instead, a process that ends early leaves
word and goes; the others look for such word every second, tell it, and end with the same exit
code. One that is gone without a word, killed or with its host, JAX misses after a while
(`TENFOLD_HEARTBEAT_SECONDS`; at once if it is process 0), and the others end with the code LOST.
"""

import json
import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING

from common.launch.runtime_log import RuntimeLog

if TYPE_CHECKING:
    from common.sharding import Cluster

LOST = 75  # For schedulers: nothing is wrong with the command, start it again.
_POLL_SECONDS = 1.0
_WORD = "ended_early"
_AGAIN = "start all of them again, and training resumes from its last checkpoint"
# Signs in the runtime's errors that a collective has lost its other end.
_LOST_CONTACT = re.compile(
    r"gloo|nccl|coordination service|heartbeat|barrier|socket closed"
    r"|connection (closed|reset|refused)|broken pipe",
    re.IGNORECASE,
)
# How the runtime names those that it misses: one a line, or in a sentence.
_SILENT = re.compile(r"stopped sending heartbeats\):\s*((?:\d+\s+)+)|Task (\d+) heartbeat timeout")


class Peers:
    """This process among the others of its run."""

    def __init__(self, cluster: "Cluster", debug: bool):
        self._cluster = cluster
        self._joined = False
        self._ending = threading.Lock()  # Taken once, by whoever ends this process.
        self._code: int | None = None  # With which it ends, once that is known.
        self._finished = threading.Event()
        self._poll = threading.Thread(target=self._look_for_word, name="peers", daemon=True)
        self._log = RuntimeLog(self._on_fatal, show_all=debug)

    def join(self) -> None:
        """Says that the processes have met: from now on word is looked for."""
        self._joined = True
        self._poll.start()

    def finish(self) -> None:
        """Waits for the others at the end of a run that has done all its work, and parts."""
        import jax

        from common.sharding import barrier

        barrier("finished")
        self._finished.set()
        self._poll.join()
        # Left to JAX's own exit, it would come when nobody reads the log any more.
        jax.distributed.shutdown()
        self._log.close()

    def leave(self, code: int, why: str) -> None:
        """Says why this process ends, leaves word for the others, and ends it."""
        from common.sharding import post

        self._ending.acquire()
        self._code = code
        if why:
            print(why, file=sys.stderr)
        if self._joined:
            word = json.dumps({"process": self._index(), "code": code, "why": why})
            # Where the others are lost already the runtime may take it, refuse it, or never answer.
            posting = threading.Thread(target=post, args=(_WORD, word), daemon=True)
            posting.start()
            posting.join(_POLL_SECONDS)
        self._exit(code)

    def explain(self, error: Exception) -> tuple[int, str] | None:
        """Returns exit code and line for an error that another process's end has caused, if so."""
        word = self._word()
        if word is not None:
            return word
        if is_lost_contact(error):
            lost = self._silent(str(error)) or (
                f"contact was lost to another process ({_first_line(error)})"
            )
            return LOST, self._lost(lost)
        return None

    def _look_for_word(self) -> None:
        while not self._finished.wait(_POLL_SECONDS):
            word = self._word()
            if word is not None:
                self._end(*word)

    def _word(self) -> tuple[int, str] | None:
        """Exit code and line, if another process has ended early."""
        from common.sharding import posted

        text = posted(_WORD) if self._joined else None
        if text is None:
            return None
        word = json.loads(text)
        why = word["why"].removeprefix("error: ") or f"exit code {word['code']}"
        return word["code"], f"error: process {word['process']} ended early: {why}"

    def _on_fatal(self, text: str) -> None:
        if self._code is not None:
            # On its way to the end already, for which the runtime's abort leaves this long.
            time.sleep(4)
            os._exit(self._code)
        silent = self._silent(text)
        if "RegisterTask" in text:
            self._end(LOST, self._not_met("newer incarnation" in text))
        elif silent:
            self._end(LOST, self._lost(silent))
        elif "Failed to send RPC" in text or "leader" in text:
            self._end(LOST, self._lost("process 0, which coordinates, is gone"))
        else:
            self._end(LOST, self._lost(f"contact was lost to the others ({_status(text)})"))

    def _silent(self, text: str) -> str | None:
        """Which process the runtime misses, if it says so."""
        named = _SILENT.search(text)
        if named is None:
            return None
        names = ", ".join((named[1] or named[2]).split())
        return f"no sign of process {names} for {self._cluster.heartbeat_seconds} s"

    def _lost(self, what: str) -> str:
        return f"error: {what}, so process {self._index()} ends too: {_AGAIN}"

    def _not_met(self, twice: bool) -> str:
        found = self._cluster
        this = f"process {found.index}" + (f" of {found.count}" if found.count else "")
        if twice:
            return f"error: two processes say that they are {this}: give each its JAX_PROCESS_ID"
        return (
            f"error: {this} waited {found.start_seconds} s at {found.coordinator} for the others: "
            "start all of them with the same address, which process 0's host must have"
        )

    def _index(self) -> int | None:
        if not self._joined:
            return self._cluster.index
        import jax

        return jax.process_index()

    def _end(self, code: int, line: str) -> None:
        """Ends this process from whatever thread, unless it is about to end by itself."""
        if self._ending.acquire(blocking=False):
            self._code = code
            print(line, file=sys.stderr)
            self._exit(code)

    def _exit(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if self._joined and self._index() == 0:
            # Word lies with this process: the others shall have read it.
            time.sleep(2 * _POLL_SECONDS + 0.5)
        # Not `sys.exit`, at which JAX waits for the others.
        os._exit(code)


def is_lost_contact(error: Exception) -> bool:
    """Returns whether an error says that a collective or a barrier has lost its other end."""
    import jax

    # Orbax turns the runtime's errors into the second kind.
    kinds = (jax.errors.JaxRuntimeError, TimeoutError)
    return isinstance(error, kinds) and _LOST_CONTACT.search(str(error)) is not None


_peers: Peers | None = None


def watch(cluster: "Cluster", debug: bool) -> Peers:
    """Begins to stand between this process and its peers; once, before they meet."""
    global _peers
    _peers = Peers(cluster, debug)
    return _peers


def current() -> Peers | None:
    """Returns what `watch` has begun, None in a run of one process."""
    return _peers


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


def _status(text: str) -> str:
    """The runtime's reason in its last words, without what surrounds it."""
    reason = text.partition("absl::Status:")[2] or text.partition("what():")[2] or text
    return " ".join(reason.partition("***")[0].split())[:160]
