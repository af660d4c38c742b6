"""Freed memory is used again: a compiled program that runs anew takes no new pages."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from common.launch.host_memory import keep_freed_memory
kept = keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def needs_much(x):
    large = jax.lax.optimization_barrier(jnp.outer(x, x))  # 64 MB
    return jnp.sum(large, axis=0)

x = jnp.ones(4096)
for _ in range(3):
    needs_much(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    needs_much(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * 2**26 // 4096  # What four runs touch.


def run(**environment: str) -> tuple[bool, int]:
    inherited = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = result.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of GNU's C library alone")
def test_pages_are_kept_unless_the_environment_says_otherwise():
    kept, faults = run(JAX_PLATFORMS="cpu")
    assert kept
    assert faults < PAGES / 10
    kept, faults = run(JAX_PLATFORMS="cpu", MALLOC_TOP_PAD_="131072")
    assert not kept
    assert faults > PAGES / 2


def test_programs_of_an_accelerator_are_left_alone(monkeypatch):
    from common.launch import host_memory

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr(host_memory, "_on_cpu", lambda: False)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", None)  # Calling it would fail.
    assert not host_memory.keep_freed_memory()
