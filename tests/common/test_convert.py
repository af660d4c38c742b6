"""The conversion launcher: a stand-in package, refusals, nothing half written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import convert as launcher
from common.checkpoint import open_checkpoint

PACKAGE = """
from pathlib import Path
from common.checkpoint import open_checkpoint, write_safetensors
from common.errors import UserError

def load(path):
    reader = open_checkpoint(path)
    return {name: reader.read(name) for name in reader.keys()}

def save(model, path, *, format, dtype):
    assert not Path(path).exists()
    write_safetensors(path, {n: a.astype(dtype or a.dtype) for n, a in model.items()})
    Path(path, "format").write_text(format)
    if "bad" in model:
        raise UserError("this model cannot be saved")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "code" / "stand_in").mkdir(parents=True)
    (tmp_path / "code" / "stand_in" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "code" / "broken.py").write_text("import no_such_module_at_all")
    (tmp_path / "code" / "bare.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield "stand_in"
    for name in ("stand_in", "broken", "bare"):
        sys.modules.pop(name, None)


def source(folder, name="w"):
    from common.checkpoint import write_safetensors

    write_safetensors(folder, {name: np.arange(4, dtype=np.float32)})
    return folder


def run(*arguments):
    """Runs the launcher in this process; returns its exit code."""
    try:
        launcher.main(arguments)
    except SystemExit as ended:
        return ended.code
    return 0


def arguments(package, source, destination, format="workspace"):
    flags = {"package": package, "from": source, "to": destination, "format": format}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.smoke
def test_converts(package, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    given = arguments(package, source(tmp_path / "in"), tmp_path / "out" / "deep" / "model")
    assert run(*given, "--dtype=bfloat16") == 0
    written = tmp_path / "out" / "deep" / "model"
    assert f"wrote {written}: workspace format" in capsys.readouterr().out
    assert sorted(p.name for p in written.iterdir()) == ["format", "model.safetensors"]
    assert (written / "format").read_text() == "workspace"
    assert open_checkpoint(written).dtype("w").name == "bfloat16"
    assert [p.name for p in written.parent.iterdir()] == ["model"]


def test_keeps_the_dtype_and_takes_an_empty_folder(package, tmp_path):
    (tmp_path / "out").mkdir()
    given = arguments(package, source(tmp_path / "in"), tmp_path / "out", "huggingface")
    assert run(*given) == 0
    assert open_checkpoint(tmp_path / "out").dtype("w") == np.float32


def test_writes_over_nothing(package, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    given = arguments(package, source(tmp_path / "in"), tmp_path / "out")
    assert run(*given) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert run(*arguments(package, tmp_path / "in", tmp_path / "in")) == 2
    assert run(*arguments(package, tmp_path / "in", tmp_path / "out" / "mine.txt")) == 2
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_save_that_fails_leaves_nothing(package, tmp_path, capsys):
    given = arguments(package, source(tmp_path / "in", "bad"), tmp_path / "out" / "model")
    assert run(*given) == 2
    assert capsys.readouterr().err == "error: this model cannot be saved\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"package": "recurrentgema"}, "did you mean 'recurrentgemma'"),
        ({"package": "../x"}, "not a package"),
        ({"package": "bare"}, "has no load and save"),
        ({"from": "/nowhere"}, "no checkpoint at /nowhere"),
        ({"format": "pickle"}, "huggingface|workspace"),
        ({"to": ""}, "--to missing"),
        ({"package": "", "from": ""}, "--package, --from missing"),
    ],
)
def test_mistakes_are_one_line(changes, message, package, tmp_path, capsys):
    flags = {"package": package, "from": source(tmp_path / "in"), "to": tmp_path / "out"}
    flags |= {"format": "workspace"} | changes
    assert run(*(f"--{name}={value}" for name, value in flags.items())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_defect_of_the_package_is_no_mistake_of_the_user(package, tmp_path):
    given = arguments("broken", source(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        run(*given)


def test_help_and_damaged_checkpoint_as_a_process(tmp_path):
    root = Path(launcher.__file__).parent.parent
    command = [sys.executable, "-m", "common.convert"]
    shown = subprocess.run([*command, "--help"], cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0
    for part in ("--package", "--from", "--to", "--format", "--dtype", "Examples:"):
        assert part in shown.stdout
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").write_bytes((2**50).to_bytes(8, "little") + b"{}")
    (tmp_path / "in" / "config.json").write_text("{}")
    given = arguments("recurrentgemma", tmp_path / "in", tmp_path / "out")
    done = subprocess.run([*command, *given], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
