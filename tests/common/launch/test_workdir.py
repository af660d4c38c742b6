"""The run folder: who may write in it, what may change on resume, how it is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from common import sharding
from common.errors import UserError
from common.launch import RunFolder
from common.launch.workdir import write_atomically

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 10
    rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    train: Train = Train()


def test_first_and_second_run(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    assert folder.open(Config()) is False
    assert json.loads(folder.config.read_text()) == {
        "seed": 0,
        "train": {"steps": 10, "rate": 0.001},
    }
    assert folder.checkpoints == tmp_path / "deep" / "run" / "checkpoints"
    folder.close()
    assert RunFolder(folder.path).open(Config()) is True


def test_another_configuration_is_refused_with_its_fields(tmp_path):
    RunFolder(tmp_path).open(Config())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path).open(Config(seed=4, train=Train(rate=0.5)))
    assert "seed 0 → 4, train.rate 0.001 → 0.5" in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("allowed", ["train.steps", "train"])
def test_a_field_that_may_change_is_kept(tmp_path, allowed):
    RunFolder(tmp_path).open(Config())
    longer = Config(train=Train(steps=20))
    assert RunFolder(tmp_path).open(longer, may_change=[allowed]) is True
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 20
    with pytest.raises(UserError, match=r"train\.steps 20 → 10"):
        RunFolder(tmp_path).open(Config(), may_change=["train.st"])


def test_a_folder_of_someone_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"is not empty and holds no run \(there is 'thesis.tex'"):
        RunFolder(tmp_path).open(Config())
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_configuration(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        RunFolder(tmp_path).open(Config())
    assert (tmp_path / "config.json").read_text() == content


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "run").open(Config())
    with pytest.raises(UserError, match="cannot use"):
        RunFolder(tmp_path / "run" / "below").open(Config())


def test_a_folder_that_cannot_be_made():
    with pytest.raises(UserError, match="cannot use /proc/run"):
        RunFolder("/proc/run").open(Config())


def test_another_process_that_writes_is_noticed(tmp_path):
    RunFolder(tmp_path).open(Config())
    program = (
        "import sys, fcntl\n"
        f"file = open({str(tmp_path / '.lock')!r}, 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing"):
            RunFolder(tmp_path).open(Config())
    finally:
        other.kill()
        other.communicate()
    assert RunFolder(tmp_path).open(Config()) is True


class TestTheOtherProcessesOfARun:
    """They take process 0's word that the folder is claimed, and look whether it is the same."""

    @pytest.fixture(autouse=True)
    def _two_processes(self, monkeypatch):
        said = []

        def from_first(name, text):
            if text:
                said.append(text)
            return said[-1]

        self.index = 0
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: self.index)
        monkeypatch.setattr(sharding, "from_first", from_first)

    def both_open(self, folder, other=None, config=None):
        self.index = 0
        first = RunFolder(folder)
        resumed = first.open(Config())
        self.index = 1
        try:
            assert RunFolder(other or folder).open(config or Config()) is resumed
        finally:
            first.close()
        return resumed

    def test_the_same_folder(self, tmp_path):
        assert self.both_open(tmp_path / "run") is False
        written = (tmp_path / "run" / "config.json").stat().st_mtime_ns
        assert self.both_open(tmp_path / "run") is True
        assert (tmp_path / "run" / "config.json").stat().st_mtime_ns == written
        assert sorted(os.listdir(tmp_path / "run")) == [".lock", "config.json"]

    def test_a_folder_of_their_own_is_refused_and_stays_as_it_was(self, tmp_path):
        with pytest.raises(UserError, match=r"process 1 does not find .* storage that all"):
            self.both_open(tmp_path / "run", tmp_path / "other")
        assert not (tmp_path / "other").exists()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with pytest.raises(UserError, match="storage that all hosts share"):
            self.both_open(tmp_path / "run", tmp_path / "copy")

    def test_another_command_is_refused_with_its_fields(self, tmp_path):
        with pytest.raises(
            UserError, match=r"process 1 .* \(seed 0 → 4\): give all of them the same"
        ):
            self.both_open(tmp_path, config=Config(seed=4))


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "former")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text() == "former"
    assert os.listdir(tmp_path) == ["file.json"]
