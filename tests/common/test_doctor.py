"""The doctor: what it finds here, what it says where packages are missing or do not pair."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def versions(monkeypatch):
    """Replaces the installed versions by name; None is a package that is not there."""
    real = importlib.metadata.version

    def fake(changes):
        def version(name):
            if name in changes and changes[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return changes.get(name) or real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return fake


@pytest.mark.smoke
def test_it_works_here(capsys):
    doctor.main([])
    out = capsys.readouterr().out
    assert "The core works here" in out
    assert "matrix product" in out
    assert "FAIL" not in out


def test_json(capsys):
    doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["devices"]["detail"].startswith("cpu: 8 ×")
    assert checks["jax"]["ok"]


def test_a_missing_core_package_fails_with_its_fix(versions, capsys):
    versions({"optax": None, "torch": None})
    with pytest.raises(SystemExit) as exit_:
        doctor.main([])
    assert exit_.value.code == 1
    out = capsys.readouterr().out
    assert "The core does not work here: optax." in out
    assert "for parity: pip install torch==2.13.0 && pip install -e '.[parity]'" in out


def test_a_missing_extra_does_not_fail(versions):
    versions({"torch": None, "grain": None})
    checks = doctor.examine()
    missing = {check.name for check in checks if not check.ok}
    assert {"parity", "grain"} <= missing
    assert doctor.works(checks)


@pytest.mark.parametrize(
    ("python", "jax", "flax", "supported"),
    [
        ((3, 11), "0.10.2", "0.12.8", True),
        ((3, 11), "0.10.2", "0.12.12", False),
        ((3, 13), "0.12.0.1", "0.12.12", True),
        ((3, 13), "0.12.0.1", "0.12.8", False),
        ((3, 12), "0.10.2", "0.12.12", False),
        ((3, 13), "0.12.0", "0.13.0rc1", True),
    ],
)
def test_pairing(monkeypatch, python, jax, flax, supported):
    class Version(tuple):
        major, minor = python

    monkeypatch.setattr(doctor.sys, "version_info", Version(python))
    assert doctor._pair(jax, flax).ok is supported


def test_a_broken_backend_is_told_not_raised(monkeypatch):
    import jax

    def broken():
        raise RuntimeError("no driver\nat all")

    monkeypatch.setattr(jax, "devices", broken)
    check = doctor._guarded("devices", doctor._devices)
    assert not check.ok
    assert check.detail == "RuntimeError: no driver at all"


def test_a_folder_that_cannot_be_written():
    check = doctor._writable("Folders", "runs", Path("/proc/here"), required=True)
    assert not check.ok
    assert check.fix


def test_an_interpreter_with_nothing_installed():
    # -S leaves out site-packages, and with them all that pip installed.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "common.doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "The core does not work here: jax, flax, absl-py" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "one: the environment names no others"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:99", "JAX_PROCESS_ID": "1"}, "this one is 1 of ?"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1"}, "give host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "no.such.host.invalid:99"}, "for no.such.host.invalid"),
    ],
)
def test_other_processes(monkeypatch, environment, says):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check = doctor._processes()
    assert says in check.detail
    assert check.ok is (says.startswith(("one", "this")))
