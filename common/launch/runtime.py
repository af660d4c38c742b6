"""What every launcher sets up before its work: logging, the compilation cache, the cluster."""

import hashlib
import logging
import os
import platform
import sys
from pathlib import Path

from absl import flags

from common.errors import UserError
from common.launch import peers

_HANDLER_NAME = "tenfold"
_LOG = logging.getLogger(__name__)


def start(package: str, debug: bool = False, alone: bool = True) -> None:
    """Sets up JAX for a run: cluster, compilation cache, logging with the process's index.

    Raises:
      UserError: the environment makes this process one of several where it has to be `alone`, or
        does not say how.
    """
    import jax

    from common.launch.host_memory import keep_freed_memory
    from common.sharding import cluster, initialize_distributed

    keep_freed_memory()
    # Data pipelines read absl's global flags, which no launcher uses, and refuse unparsed ones.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    found = cluster()
    if found is not None and alone:
        raise UserError(
            "this command runs as one process, and the environment says that there are others: "
            f"unset {' and '.join(found.variables)} for it"
        )
    others = peers.watch(found, debug) if found is not None else None
    if not debug:
        logging.getLogger("jax._src.xla_bridge").addFilter(_shorten_plugin_error)
    set_up_logging(package, debug)
    initialize_distributed()
    use_compilation_cache()
    # Asking for the index starts the backend: before this line nothing may have done so.
    if jax.process_count() > 1:
        set_up_logging(package, debug, jax.process_index(), jax.process_count())
    if others is not None:
        others.join()


def _shorten_plugin_error(record: logging.LogRecord) -> bool:
    """A line for JAX's page about a plugin that does not start; nothing where no GPU is missed.

    Such plugins are there to compile for GPUs on machines that have none (`make compile`).
    """
    text = record.getMessage()
    if "plugin configuration error" not in text:
        return True
    record.exc_info, record.exc_text, record.args = None, None, ()
    record.msg = text.partition("\n")[0]
    return Path("/dev/nvidiactl").exists()


def set_up_logging(package: str, debug: bool = False, process: int = 0, processes: int = 1) -> None:
    """Sends every log to stderr in one format.

    Libraries tell warnings, the workspace and `package` also informative lines, the latter from
    process 0 only.
    """
    rank = f" [{process}/{processes}]" if processes > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s{rank} %(name)s: %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    for former in [h for h in root.handlers if h.get_name() == _HANDLER_NAME]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(logging.INFO if debug else logging.WARNING)
    # absl's own level hides warnings of Orbax unless it is told.
    logging.getLogger("absl").setLevel(logging.INFO if debug else logging.WARNING)
    own = logging.INFO if process == 0 else logging.WARNING
    for name in ("common", package, "__main__"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else own)


def compilation_cache_dir() -> Path:
    """Returns the folder for compiled programs when the environment names none.

    CPU programs hold instructions of the machine that compiled them, and homes are shared between
    machines, so each kind of processor has its own folder.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tenfold" / "jax" / f"{platform.machine()}-{_processor_digest()}"


def use_compilation_cache() -> Path | None:
    """Keeps compiled programs between runs, unless the environment has already said where.

    Returns:
      The folder in use, or None where it cannot be written (a warning says so).
    """
    import jax

    named = jax.config.jax_compilation_cache_dir
    if named:
        return Path(named)
    folder = compilation_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _LOG.warning("compiled programs are not kept: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def _processor_digest() -> str:
    information = Path("/proc/cpuinfo")
    described = platform.processor() + platform.system()
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        described += "".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    return hashlib.sha256(described.encode()).hexdigest()[:12]
