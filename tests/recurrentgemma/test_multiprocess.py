"""`recurrentgemma.train` as two processes over loopback, started as a user starts it."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from process_group import ProcessGroup

import recurrentgemma
from common.launch.peers import LOST
from common.train import read_metrics
from recurrentgemma import train

# The smoke preset, smaller still: most of the time goes to compilation.
SMALL = [
    "--set=model.width=16",
    "--set=model.mlp_width=32",
    "--set=model.lru_width=16",
    "--set=model.vocab_size=400",
    "--set=model.num_layers=3",
    "--set=data.corpus.max_documents=30",
    "--set=data.sequence_length=32",
    "--set=train.eval_batches=2",
    "--set=train.steps=24",
    "--set=train.eval_every=8",
]


def command(workdir: Path, *arguments: str) -> list[str]:
    return ["--config=smoke", f"--workdir={workdir}", *arguments]


def two(workdir: Path, logs: Path, *arguments: str) -> ProcessGroup:
    return ProcessGroup(["-m", "recurrentgemma.train", *command(workdir, *arguments)], logs)


def trace(workdir: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(workdir) if name in line]


def steps_written(workdir: Path) -> int:
    return len(read_metrics(workdir))


def stopped_at(said: str) -> int:
    line, again = said.split("stopped at step ")[1].splitlines()[:2]
    assert again.startswith("  python -m recurrentgemma.train --config=smoke --workdir=")
    return int(line.split()[0])


def test_two_processes_train_stop_and_go_on_as_one(tmp_path):
    """SIGTERM to one of two saves in both; one process with as many devices goes on from there.

    All in all the losses are those of one process that nothing has disturbed, to 1e-5.
    """
    train.main(command(tmp_path / "whole", *SMALL))
    workdir = tmp_path / "run"
    # JAX looks for a signal once a second; saving after every step makes the steps long enough.
    slow = "--set=train.checkpoint_every=1"
    with two(workdir, tmp_path / "logs", *SMALL, slow) as group:
        group.wait_for(lambda: steps_written(workdir) >= 3)
        group.signal(1, signal.SIGTERM)
        assert group.ended(120) == [0, 0], str(group)
        (step,) = {stopped_at(group.said(index)) for index in (0, 1)}
    assert 3 < step < 24
    assert steps_written(workdir) == step
    assert (workdir / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").is_file()
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert not (workdir / "report").exists()
    # One of them has trained the tokenizer, the other has found it.
    assert "training a tokenizer" in group.said(0)
    assert "tokenizer" not in group.said(1)

    train.main(command(workdir, *SMALL))
    np.testing.assert_allclose(trace(workdir), trace(tmp_path / "whole"), rtol=1e-5)
    name = "eval/heldout/loss"
    np.testing.assert_allclose(trace(workdir, name), trace(tmp_path / "whole", name), rtol=1e-5)
    assert (workdir / "report" / "summary.json").is_file()
    tokens = np.arange(10)[None]
    one, other = (recurrentgemma.load(tmp_path / name) for name in ("whole", "run"))
    np.testing.assert_allclose(one(tokens), other(tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_smoke_preset_through_kills_and_process_counts(tmp_path):
    """2 × 4 devices whole; 2 × 4 killed, 1 × 8 stopped, 2 × 4 to the end; 1 × 8 and 1 × 1 whole."""
    options = ["--set=train.checkpoint_every=5"]
    for name, devices in (("one", 1), ("eight", 8)):
        with alone(tmp_path / name, tmp_path / f"{name}_logs", devices, *options) as group:
            assert group.ended(300) == [0], str(group)
    with two(tmp_path / "two", tmp_path / "two_logs", *options) as group:
        assert group.ended(300) == [0, 0], str(group)
    for name in ("one", "eight"):
        np.testing.assert_allclose(trace(tmp_path / "two"), trace(tmp_path / name), rtol=1e-5)

    workdir = tmp_path / "killed"
    with two(workdir, tmp_path / "first", *options) as group:
        group.wait_for(lambda: steps_written(workdir) >= 12)
        group.signal(1, signal.SIGKILL)
        assert group.ended(60) == [LOST, -signal.SIGKILL], str(group)
        assert group.complained(0).startswith("error: ")
        assert group.complained(0).count("\n") == 1
    with two(workdir, tmp_path / "second", *options) as group:
        assert group.ended(300) == [0, 0], str(group)
        assert "resumed from step 10 of 30" in group.said(0)
    assert trace(workdir) == trace(tmp_path / "two")  # Bit for bit.
    summaries = [
        json.loads((tmp_path / name / "report" / "summary.json").read_text())
        for name in ("two", "killed")
    ]
    assert summaries[0] == summaries[1]


def alone(workdir: Path, logs: Path, devices: int, *arguments: str) -> ProcessGroup:
    command_line = ["-m", "recurrentgemma.train", *command(workdir, *arguments)]
    return ProcessGroup(command_line, logs, count=1, devices=devices)


@pytest.mark.slow
def test_what_does_not_fit_is_one_line_everywhere(tmp_path):
    """The mesh is wrong in both; the folder is another run's, which process 0 alone looks into."""
    with two(tmp_path / "a", tmp_path / "logs_a", *SMALL, "--set=train.mesh.fsdp=3") as group:
        assert group.ended(120) == [2, 2], str(group)
        for index in (0, 1):
            assert "does not fit 8 device" in group.complained(index)
            assert group.complained(index).count("\n") == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("not a run")
    with two(tmp_path / "b", tmp_path / "logs_b", *SMALL) as group:
        assert group.ended(120) == [2, 2], str(group)
        assert "is not empty" in group.complained(0)
        assert "process 0 ended early: --workdir" in group.complained(1)
