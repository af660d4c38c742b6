"""Runs of two processes over loopback: the numbers of one, saved together, ended together."""

import json
import signal
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_launcher
from process_group import ProcessGroup
from tiny_launcher import MESHES, STEPS, LocalBatches, config_of_run, eval_sets
from tiny_task import NoisyTask, tiny_config

from common.launch.peers import LOST
from common.sharding import make_mesh
from common.train import Trainer, TrainResult, read_metrics

PROGRAM = Path(tiny_launcher.__file__)
KEEP_EVERY_PROGRAM = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def alone(workdir: Path, devices: int, config: Any = None, **batches: Any) -> TrainResult:
    """The same run in this process."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    return Trainer(
        NoisyTask(),
        config or config_of_run(),
        workdir,
        LocalBatches(mesh, **batches),
        eval_sets(mesh),
        devices=jax.devices()[:devices],
    ).run()


def numbers(workdir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def same(trace: list[dict[str, float]], wanted: list[dict[str, float]]) -> bool:
    """Equal to fp32's tolerance: sums over devices are added in another order."""
    return len(trace) == len(wanted) and all(
        a == pytest.approx(b, rel=2e-5, abs=1e-6) for a, b in zip(trace, wanted)
    )


def steps_written(workdir: Path) -> int:
    lines = read_metrics(workdir)
    return lines[-1]["step"] if lines else 0


def two(workdir: Path, logs: Path, pause: float = 0.05) -> ProcessGroup:
    arguments = [PROGRAM, "train", workdir, str(pause)]
    return ProcessGroup(arguments, logs, **KEEP_EVERY_PROGRAM)


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The numbers of the run that one process makes on one device, undisturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    alone(workdir, devices=1)
    return numbers(workdir)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "trained_on", [["uneven"], pytest.param(list(MESHES), marks=pytest.mark.slow)]
)
def test_rows_lie_on_any_mesh_as_one_process_puts_them(tmp_path, trained_on):
    """Also where they are not together, and where other axes than the batch's cross processes."""
    arguments = [PROGRAM, "meshes", tmp_path, *trained_on]
    with ProcessGroup(arguments, tmp_path / "logs", **KEEP_EVERY_PROGRAM) as group:
        assert group.ended() == [0, 0], str(group)
        rows = [
            {line.split(": rows ")[0]: json.loads(line.split(": rows ")[1])
             for line in group.said(index).splitlines() if ": rows " in line}
            for index in (0, 1)
        ]  # fmt: skip
    assert [list(r) for r in rows] == [list(MESHES)] * 2
    assert (rows[0]["apart"], rows[1]["apart"]) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert (rows[0]["interleaved"], rows[1]["interleaved"]) == ([0, 2, 4, 6], [1, 3, 5, 7])
    assert (rows[0]["scattered"], rows[1]["scattered"]) == ([0, 1, 6, 7], [2, 3, 4, 5])
    assert rows[0]["tensor across"] == rows[1]["tensor across"] == list(range(8))
    assert (rows[0]["uneven"], rows[1]["uneven"]) == ([0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7])
    alone(tmp_path / "one device", 1, tiny_config(steps=3, eval_every=3))
    for name in trained_on:
        assert same(numbers(tmp_path / name), numbers(tmp_path / "one device")), name


def test_a_killed_process_ends_the_run_and_any_number_of_processes_resumes_it(whole, tmp_path):
    """Two, of which one is killed; then one, which a signal stops; then two to the end."""
    workdir = tmp_path / "run"
    with two(workdir, tmp_path / "first") as group:
        group.wait_for(lambda: steps_written(workdir) > 12)
        group.signal(1, signal.SIGKILL)
        # Half of what it would take if the heartbeat were not as we have set it.
        assert group.ended(50) == [LOST, -signal.SIGKILL], str(group)
        said = group.complained(0)
        assert said.startswith("error: ")
        assert said.count("\n") == 1, said
        assert "metrics.jsonl" not in group.said(1)  # Process 0 speaks for all.
    assert same(numbers(workdir), whole[: steps_written(workdir)])

    stop_at = steps_written(workdir) + 3
    result = alone(workdir, devices=8, stop_at=stop_at)
    assert (result.step, result.preempted) == (stop_at + 1, True)

    with two(workdir, tmp_path / "last", pause=0) as group:
        assert group.ended() == [0, 0], str(group)
        assert f"resumed from step {result.step} of {STEPS}" in group.said(0)
        assert (group.complained(0), group.complained(1)) == ("", "")
    assert same(numbers(workdir), whole)
    assert len(list((workdir / "checkpoints").iterdir())) == config_of_run().keep_checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_one_process_stops_and_saves_all_at_one_step(whole, tmp_path, index):
    workdir = tmp_path / "run"
    with two(workdir, tmp_path / "first", pause=0.15) as group:  # JAX looks once a second.
        group.wait_for(lambda: steps_written(workdir) > 7)
        group.signal(index, signal.SIGTERM if index else signal.SIGINT)
        assert group.ended(60) == [0, 0], str(group)
        (step,) = {_stopped_at(group.said(i)) for i in (0, 1)}
    assert (workdir / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").is_file()
    assert steps_written(workdir) == step
    with two(workdir, tmp_path / "last", pause=0) as group:
        assert group.ended() == [0, 0], str(group)
    assert same(numbers(workdir), whole)


def _stopped_at(said: str) -> int:
    line, command = said.split("stopped at step ")[1].splitlines()[:2]
    assert "tiny_launcher.py" in command or "tiny.train" in command
    return int(line.split()[0])


@pytest.mark.slow
def test_undisturbed_and_killed_runs_of_two_are_equal_bit_for_bit(tmp_path):
    with two(tmp_path / "whole", tmp_path / "whole_logs", pause=0) as group:
        assert group.ended() == [0, 0], str(group)
    for number, moment in enumerate((8, 17, 31)):
        with two(tmp_path / "killed", tmp_path / f"logs_{number}") as group:
            group.wait_for(lambda m=moment: steps_written(tmp_path / "killed") > m)
            group.signal(number % 2, signal.SIGKILL)
            assert group.ended(60)[1 - number % 2] == LOST, str(group)
    with two(tmp_path / "killed", tmp_path / "last_logs", pause=0) as group:
        assert group.ended() == [0, 0], str(group)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
