"""Whole runs: resume after any end, signals, damage, other meshes, and what is refused."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_task
from tiny_task import Batches, NoisyTask, TinyTask, batch_at, heldout, tiny_config

from common.checkpoint.store import load_params, save_params
from common.errors import UserError
from common.sharding import MeshConfig
from common.train import Trainer, TrainResult, read_metrics
from common.train.preemption import Preemption

PROGRAM = Path(tiny_task.__file__)


def train(workdir: Path, batches: Any = None, devices: int = 1, **changes: Any) -> TrainResult:
    return Trainer(
        NoisyTask(),
        tiny_config(**changes),
        workdir,
        batches or Batches(),
        {"heldout": heldout},
        devices=jax.devices()[:devices],
        resume_command="python -m this.again",
    ).run()


def trace(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    text = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of twelve steps that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(workdir)
    return workdir


@pytest.fixture(autouse=True, scope="module")
def _keep_every_program():
    """These runs compile the same small programs again and again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    yield
    jax.config.update(name, before)


class Crash(Exception):
    pass


class Crashing(Batches):
    """Ends the run where a batch is drawn, or sends this process a signal there."""

    def __init__(self, at: int, number: signal.Signals | None = None):
        super().__init__()
        self.at = at
        self.number = number

    def __next__(self) -> dict[str, np.ndarray]:
        if self.index == self.at and self.number is None:
            raise Crash
        if self.index == self.at:
            os.kill(os.getpid(), self.number)
        return super().__next__()


@pytest.mark.smoke
def test_a_run_learns_and_leaves_its_results(whole):
    lines = trace(whole)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    evaluated = [line["step"] for line in lines if "eval/heldout/loss" in line]
    assert evaluated == [4, 8, 12]
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [
        "step_00000006", "step_00000009", "step_00000012",
    ]  # fmt: skip
    assert list((whole / "tensorboard").iterdir())


@pytest.mark.parametrize("at", [1, 3, 8, 11])
def test_resumed_after_a_crash_the_trace_is_the_same(whole, tmp_path, at):
    with pytest.raises(Crash):
        train(tmp_path, Crashing(at))
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')  # as a line torn by a kill
    result = train(tmp_path)
    assert (result.step, result.preempted) == (12, False)
    assert trace(tmp_path) == trace(whole)


def test_killed_and_restarted_the_trace_is_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config, sets = tiny_task.killed_config(), {"heldout": heldout}
    Trainer(NoisyTask(), config, whole, Batches(), sets, devices=jax.devices()[:1]).run()
    root = PROGRAM.parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    kills = iter([7, 19])
    for _ in range(6):
        process = subprocess.Popen([sys.executable, PROGRAM, killed], env=environment)
        after = next(kills, None)
        while process.poll() is None:
            time.sleep(0.02)
            lines = read_metrics(killed)
            if after is not None and lines and lines[-1]["step"] >= after:
                time.sleep(random.random() * 0.1)
                process.kill()
                process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert next(kills, None) is None
    assert trace(killed) == trace(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_within_one_step_and_says_how_to_resume(whole, tmp_path, capsys, number):
    before = signal.getsignal(number)
    result = train(tmp_path, Crashing(4, number))
    assert result.preempted
    assert result.step == 5
    assert (tmp_path / "checkpoints" / "step_00000005").is_dir()
    assert "python -m this.again" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert not train(tmp_path).preempted
    assert trace(tmp_path) == trace(whole)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_signal_ends_the_run_at_once(tmp_path, monkeypatch, before):
    """However the process was started: a shell lets those in the background ignore SIGINT."""
    inherited = signal.signal(signal.SIGINT, before)
    noticed, handle = threading.Event(), Preemption._handle

    def handle_and_tell(*arguments: Any) -> None:
        handle(*arguments)
        noticed.set()

    class Impatient(Batches):
        def __next__(self) -> dict[str, np.ndarray]:
            if self.index == 4:
                os.kill(os.getpid(), signal.SIGINT)
                assert noticed.wait(60)  # Two at once would count as one.
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    monkeypatch.setattr(Preemption, "_handle", handle_and_tell)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, Impatient())
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_damage_to_the_newest_checkpoint_costs_its_steps_alone(whole, tmp_path, caplog):
    with pytest.raises(Crash):
        train(tmp_path, Crashing(10))
    newest = tmp_path / "checkpoints" / "step_00000009"
    for file in newest.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    train(tmp_path)
    assert "step 9 is damaged" in caplog.text
    assert trace(tmp_path) == trace(whole)
    assert newest.is_dir()


def test_a_finished_run_tells_its_results_and_changes_nothing(whole, capsys):
    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}

    before = files()
    result = train(whole)
    assert files() == before
    last = trace(whole)[-1]
    assert result.step == 12
    assert result.metrics["loss"] == last["loss"]
    assert f"eval/heldout/loss {last['eval/heldout/loss']:.4f}" in capsys.readouterr().out


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(tmp_path):
    train(tmp_path, steps=6)
    wanted = trace(tmp_path)
    (tmp_path / "checkpoints" / "step_00000006" / "checkpoint.json").unlink()
    train(tmp_path, steps=6)
    assert trace(tmp_path) == wanted


def test_a_run_goes_on_on_another_mesh(whole, tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, Crashing(7), devices=8, mesh=MeshConfig(2, 2, 2))
    train(tmp_path, devices=4, mesh=MeshConfig(1, 2, 2), accumulation=1)
    losses = [line["loss"] for line in trace(tmp_path)]
    assert losses == pytest.approx([line["loss"] for line in trace(whole)], rel=1e-4)


def test_evaluation_divides_sums_by_all_weights(whole):
    model_task = TinyTask()
    trainer = Trainer(model_task, tiny_config(), whole, Batches(), devices=jax.devices()[:1])
    from common.train import ModelParts

    parts = ModelParts(model_task, 0)
    from flax import nnx

    params = load_params(trainer.store.folder, nnx.to_pure_dict(parts.abstract_params))
    model = parts.merge(params, {"calls": jax.numpy.zeros((), jax.numpy.int32)})
    total = weight = 0.0
    for index, batch in enumerate(heldout()):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0x5EED), index)
        loss = NoisyTask().loss(model, batch, key)
        total, weight = total + float(loss.total), weight + float(loss.weight)
    assert trace(whole)[-1]["eval/heldout/loss"] == pytest.approx(total / weight, rel=1e-5)


def test_updates_that_are_not_finite_are_counted_and_written_as_null(tmp_path):
    result = train(tmp_path, Batches(poison=(2, 3, 6)), max_nonfinite=3)
    lines = trace(tmp_path)
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 7]
    assert lines[-1]["skipped"] == 3
    assert result.metrics["loss"] is not None


def test_too_many_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        train(tmp_path, Batches(poison=tuple(range(4, 100))), max_nonfinite=3)
    assert (tmp_path / "checkpoints" / "step_00000003").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, "multiple of data × fsdp × accumulation"),
        ({"accumulation": 3}, "multiple of data × fsdp × accumulation"),
        ({"mesh": MeshConfig(data=3)}, "does not fit"),
        ({"steps": 0}, "steps must be"),
        ({"eval_batches": -1}, "eval_batches"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train(tmp_path / "run", devices=4, **changes)
    assert not (tmp_path / "run").exists()


def test_batches_of_another_size_are_refused(tmp_path):
    with pytest.raises(UserError, match="batches of 16 rows, not 8"):
        train(tmp_path, Batches(rows=16))


def test_data_that_ends_early_is_a_user_error(tmp_path):
    class Short(Batches):
        def __next__(self) -> dict[str, np.ndarray]:
            if self.index == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(UserError, match="ended after 2 of 12 steps"):
        train(tmp_path, Short())


def test_a_checkpoint_of_another_model_is_a_user_error(tmp_path):
    train(tmp_path, steps=3)
    with pytest.raises(UserError, match="another model or optimizer"):
        train(tmp_path, optimizer=tiny_task.OptimizerConfig("lion"))


def test_initial_parameters_start_a_run_and_do_not_touch_a_resumed_one(tmp_path):
    trained = Trainer(
        TinyTask(), tiny_config(steps=3), tmp_path / "first", Batches(),
        devices=jax.devices()[:1],
    )  # fmt: skip
    trained.run()
    save_params(tmp_path / "start", trained.state.params)

    def second(steps: int, load: Any) -> list[float]:
        config = tiny_config(steps=steps, batch_size=8, log_every=1)
        batches = Batches()
        Trainer(
            TinyTask(), config, tmp_path / "second", batches, initial_params=load,
            devices=jax.devices()[:1],
        ).run()  # fmt: skip
        return [line["loss"] for line in trace(tmp_path / "second")]

    first = second(1, lambda abstract: load_params(tmp_path / "start", abstract))
    wanted = TinyTask().loss(
        trained._parts.merge(trained.state.params, trained.state.rest), batch_at(0), None
    )
    assert first[0] == pytest.approx(float(wanted.total / wanted.weight), rel=1e-5)
    second(2, lambda abstract: pytest.fail("a resumed run loads its own parameters"))


def test_log_every_and_missing_tensorboard(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(Crash):
        train(tmp_path, Crashing(8), log_every=5, checkpoint_every=7)
    train(tmp_path, log_every=5, checkpoint_every=7)
    assert [line["step"] for line in trace(tmp_path)] == [4, 5, 8, 10, 12]
    assert [r.getMessage() for r in caplog.records if "tensorboardX" in r.getMessage()] == [
        "no TensorBoard events: tensorboardX is not installed"
    ] * 2
