"""Shared test setting: eight virtual CPU devices, a compilation cache, parsed absl flags."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
CACHE = Path(os.environ.get("TENFOLD_TEST_CACHE", Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
# Launchers started by tests in their own processes share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

if not flags.FLAGS.is_parsed():
    flags.FLAGS(["pytest"])  # grain reads an absl flag and refuses an unparsed one.


@pytest.fixture(scope="module", autouse=True)
def _drop_programs():
    """Drops a module's compiled programs when its tests have run.

    Each program keeps half a dozen mappings of memory, and Linux lets a process have
    65,530 of them: the whole suite in one process runs out, and the compiler then aborts it.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def highest_precision():
    """Runs a test's matrix products in full float32 on every backend."""
    with jax.default_matmul_precision("highest"):
        yield
