"""Memory that a CPU program gives back after a step is kept for the next one."""

import ctypes
import os
import sys
from pathlib import Path

# Numbers of glibc's `mallopt` (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1  # Does what is free at the heap's end go back.
_ACCELERATORS = ("nvidiactl", "accel*", "vfio/[0-9]*", "kfd")


def keep_freed_memory() -> bool:
    """Lets this process use freed memory again instead of giving it back to the system.

    A compiled program on a CPU asks for all of its intermediate results at once, every time it
    runs. So large a piece comes from the system as pages that are filled with zeros when they are
    first touched, and goes back at the end: a fifth of the time of a training step. For this to
    hold in the threads that compiled programs run in, it has to come before JAX starts.

    The process then stays as large as it has once been. Where memory is short, have it otherwise:
    `MALLOC_ARENA_MAX=8` or any such variable in the environment leaves all as it was.

    Nothing changes where programs may run on an accelerator, where the C library is none of GNU's,
    or where the environment says itself how memory is to be had (`MALLOC_*`, `GLIBC_TUNABLES`).

    Returns:
      Whether it does so now.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    chosen = chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux") or not _on_cpu():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Threads with heaps of their own would still have large pieces from the system.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    return all(library.mallopt(*setting) for setting in settings)


def _on_cpu() -> bool:
    """Whether JAX, which must not be started for it, will have CPUs alone."""
    import jax  # Late: whoever asks for help alone waits for no library.

    platforms = jax.config.jax_platforms
    if platforms:
        return platforms == "cpu"
    return not any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS)
