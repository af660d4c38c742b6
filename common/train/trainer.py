"""The Trainer: everything about a run that is not the paper's.

Its loop keeps one order, on which exact resume rests: a batch is drawn, the step on it is started,
and while the devices work the numbers of the step before are fetched and written. Evaluation and
checkpoints come between steps, when the line of the last step has been written; so whatever step a
checkpoint holds, `metrics.jsonl` holds all lines up to it, and later ones are cut off on resume.
"""

import contextlib
import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from common.checkpoint.store import CheckpointStore
from common.errors import UserError
from common.sharding import (
    MeshConfig,
    barrier,
    batch_shards,
    make_mesh,
    place_rows,
    use_mesh,
)
from common.train.evaluate import EvalSets, HostBatch, evaluate
from common.train.flops import utilisation
from common.train.goodput import Goodput
from common.train.metrics import MetricsWriter, read_metrics
from common.train.optimizer import OptimizerConfig, learning_rate
from common.train.preemption import Preemption
from common.train.progress import Progress
from common.train.rate import RateMeter
from common.train.state import (
    ModelParts,
    TrainState,
    abstract_train_state,
    init_state,
    shardings_of,
)
from common.train.step import make_eval_step, make_train_step
from common.train.task import PureDict, Task

_EVAL_STREAM = 0x5EED  # Keeps the random keys of evaluation apart from those of steps.


class TrainBatches(Protocol):
    """An endless iterator of host batches whose position can be saved.

    Each process gets its own rows (`common.sharding.local_rows`); the position must be the same
    in all of them.
    """

    def __next__(self) -> HostBatch: ...

    def get_state(self) -> Any:
        """Returns the position after the batches drawn so far, JSON-able."""

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` has given."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how a run trains.

    Attributes:
      steps: length of the run.
      batch_size: rows of a batch over all processes.
      accumulation: micro-batches a batch is worked off in.
      log_every: steps from one line of `metrics.jsonl` to the next.
      eval_every: steps between evaluations; 0 evaluates at the end alone.
      eval_batches: batches of each evaluation set; 0 takes all.
      checkpoint_every: steps between checkpoints; there is always one at the end.
      keep_checkpoints: how many of the newest are kept.
      max_nonfinite: updates in a row that may be skipped because loss or gradient is not finite,
        before the run gives up.
      log_param_norm: also log the norm of the parameters.
      optimizer: how parameters are updated.
      mesh: how devices are divided among data, parameters, matrices and sequence.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    max_nonfinite: int = 10
    log_param_norm: bool = False
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: the last step done, and saved.
      metrics: the last line of `metrics.jsonl`, with `loss` and `eval/<set>/loss`.
      preempted: True if a signal stopped the run before its last step.
      seconds: time of each phase in this process; empty if there was nothing left to do.
      workdir: where everything lies.
    """

    step: int
    metrics: dict[str, Any]
    preempted: bool
    seconds: dict[str, float]
    workdir: Path


class Trainer:
    """Trains a task in a run folder, from where the folder's last checkpoint stands."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        workdir: Path,
        train_batches: TrainBatches,
        eval_sets: EvalSets | None = None,
        *,
        seed: int = 0,
        initial_params: Callable[[PureDict], PureDict] | None = None,
        resume_command: str | None = None,
        devices: list[jax.Device] | None = None,
    ):
        """Args:
          task: model and loss.
          config: of the run.
          workdir: the run folder; nothing is written before `run`.
          train_batches: host batches `{name: [N, ...]}`, the rows that `local_rows` names.
          eval_sets: for each name a function that gives finite batches.
          seed: of parameters and of everything random in a step.
          initial_params: gives a new run's parameters for their `jax.ShapeDtypeStruct`s (with
            shardings), e.g. by `load_params`, or a part of them; the others are the task's fresh
            ones.
          resume_command: printed when a signal stops the run; by default this process's own.
          devices: all by default.

        Raises:
          UserError: mesh, batch size and processes do not fit, or a field is out of range.
        """
        self.task = task
        self.config = config
        self.seed = seed
        self.workdir = Path(workdir)
        self.store = CheckpointStore(self.workdir / "checkpoints", config.keep_checkpoints)
        self.mesh = make_mesh(config.mesh, devices)
        self.state: TrainState | None = None
        self._batches = train_batches
        self._eval_sets = dict(eval_sets or {})
        self._initial_params = initial_params
        self._resume_command = resume_command or shlex.join(sys.orig_argv)
        self._main = jax.process_index() == 0
        self._goodput = Goodput()
        check_config(config, self.mesh)

    def run(self) -> TrainResult:
        """Trains to the last step, or until a signal; a finished run only tells its results.

        Raises:
          UserError: too many updates in a row were not finite, the data ended early, or the
            checkpoints there are not readable or of another model.
        """
        latest = self.store.latest()
        if latest is not None and latest >= self.config.steps and self.store.is_intact(latest):
            return self._tell_finished(latest)
        with self._goodput.phase("init"):
            self._parts = ModelParts(self.task, self.seed)
            optimizer = self._parts.optimizer(self.config.optimizer, self.config.steps)
            abstract = abstract_train_state(self._parts, optimizer, self.mesh)
            self._make_steps(optimizer, abstract)
        step = self._start_state(optimizer, abstract, latest)
        if self._main:
            self.workdir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.callback(self.store.wait)
            with self._goodput.phase("init"):
                self._writer = MetricsWriter(self.workdir, step, active=self._main)
            stack.callback(self._writer.close)
            self._progress = Progress(
                step, self.config.steps, unit=self.task.unit, active=self._main
            )
            stack.callback(self._progress.close)
            self._introduce(step)
            step, preempted = self._train(step)
            with self._goodput.phase("save"):
                self.store.wait()
        return self._tell_result(step, preempted)

    def _make_steps(self, optimizer: Any, abstract: TrainState) -> None:
        config = self.config
        self._train_step = make_train_step(
            self._parts,
            optimizer,
            learning_rate(config.optimizer, config.steps),
            self.mesh,
            abstract,
            seed=self.seed,
            accumulation=config.accumulation,
            log_param_norm=config.log_param_norm,
        )
        self._eval_step = make_eval_step(self._parts, self.mesh, abstract)

    def _start_state(self, optimizer: Any, abstract: TrainState, latest: int | None) -> int:
        """Sets `state` to the last checkpoint's or a fresh one; returns its step."""
        if latest is not None:
            with self._goodput.phase("restore"):
                step, self.state, data_state = self.store.restore(abstract)
                self._batches.set_state(data_state)
            return step
        with self._goodput.phase("init"), use_mesh(self.mesh, self.task.rules):
            params = self._initial_params(abstract.params) if self._initial_params else None
            self._initial_params = None  # What it holds on to would stay beside the parameters.
            rest = self.task.initial_rest(abstract.rest)
            init = jax.jit(
                lambda params, rest: init_state(self._parts, optimizer, params, rest),
                out_shardings=shardings_of(abstract),
                compiler_options=_quick_compilation(self.mesh),
            )
            self.state = jax.block_until_ready(init(params, rest))
        return 0

    def _train(self, step: int) -> tuple[int, bool]:
        """Runs steps until the last or a signal; returns the last step and whether it was that.

        The order inside the loop is what exact resume rests on: do not change it.
        """
        config = self.config
        self._rate = RateMeter(self._goodput, self.task.unit)
        previous: tuple[int, Any] | None = None
        compiled = None
        with Preemption() as preemption:
            while step < config.steps:
                with self._goodput.phase("data"):
                    batch = self._next_batch(step)
                if compiled is None:
                    compiled = self._compile(batch)
                step += 1
                with self._goodput.phase("step"), jax.transfer_guard("disallow"):
                    self.state, metrics = compiled(self.state, batch)
                    if previous is not None:
                        self._report(*previous)
                    previous = (step, metrics)
                last = step == config.steps
                evaluating = bool(self._eval_sets) and (last or _due(step, config.eval_every))
                results = self._evaluate(previous) if evaluating else {}
                stopping = preemption.reached(step)
                if last or stopping or evaluating or _due(step, config.checkpoint_every):
                    with self._goodput.phase("step"):
                        self._report(step, metrics, results)
                    previous = None
                if last or stopping or _due(step, config.checkpoint_every):
                    self._save(step)
                if stopping and not last:
                    return step, True
        return step, False

    def _next_batch(self, step: int) -> Any:
        try:
            return self._place(next(self._batches))
        except StopIteration:
            raise UserError(
                f"the training data ended after {step} of {self.config.steps} steps: lower the "
                "steps, or let the data repeat"
            ) from None

    def _place(self, batch: HostBatch) -> Mapping[str, jax.Array]:
        return place_rows(self.mesh, batch)

    def _compile(self, batch: Mapping[str, jax.Array]) -> Any:
        rows = len(next(iter(batch.values())))
        if rows != self.config.batch_size:
            raise UserError(f"the data gives batches of {rows} rows, not {self.config.batch_size}")
        with self._goodput.phase("compile"):
            compiled = self._train_step.lower(self.state, batch).compile()
            # Some processes may have found the program compiled: on CPU a collective does not wait
            # for the others longer than half a minute.
            barrier("compiled")
        seconds = self._goodput.seconds["compile"]
        self._progress.say(f"compiled the training step in {seconds:.1f} s")
        self._flops = self.task.flops_per_step(
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        )
        self._rate.restart()
        return compiled

    def _report(self, step: int, metrics: Any, results: Mapping[str, float] | None = None) -> None:
        """Fetches the numbers of a step, watches that they are finite, and writes them if due."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self._rate.count(values.pop("weight"))
        in_a_row = values.pop("skipped_in_a_row")
        if in_a_row >= self.config.max_nonfinite:
            raise UserError(
                f"loss or gradient was not finite in {in_a_row} steps in a row (up to step {step}):"
                " lower the learning rate or look at the data; checkpoints before it are intact"
            )
        if not (results or step == self.config.steps or _due(step, self.config.log_every)):
            return
        seconds, rates = self._rate.take()
        used = utilisation(self._flops, seconds, self.mesh.devices.flatten().tolist())
        values |= rates | ({} if used is None else {"perf/mfu": used}) | dict(results or {})
        self._writer.write(step, values)
        self._progress.update(step, values, force=bool(results) or step == self.config.steps)

    def _evaluate(self, previous: tuple[int, Any]) -> dict[str, float]:
        """Returns `eval/<set>/<name>` of all sets, for the state after the last step."""
        results: dict[str, float] = {}
        with self._goodput.phase("eval"), self._rate.paused(previous[1]):
            key = jax.random.fold_in(jax.random.key(self.seed), _EVAL_STREAM)
            for name, batches in self._eval_sets.items():
                limit = self.config.eval_batches or None
                means = evaluate(self._eval_step, self.state, batches(), self._place, key, limit)
                results |= {f"eval/{name}/{metric}": value for metric, value in means.items()}
        return results

    def _save(self, step: int) -> None:
        with self._goodput.phase("save"), self._rate.paused():
            self._writer.sync()
            self.store.save(step, self.state, self._batches.get_state())

    def _introduce(self, step: int) -> None:
        assert self.state is not None
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(self.state.params))
        mesh = " × ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        say = self._progress.say
        say(f"{count:,} parameters on {self.mesh.size} device(s){f' ({mesh})' if mesh else ''}")
        say(f"run folder {self.workdir}: metrics.jsonl, checkpoints/, tensorboard/")
        if step:
            say(f"resumed from step {step} of {self.config.steps}")

    def _tell_finished(self, step: int) -> TrainResult:
        lines = read_metrics(self.workdir)
        result = TrainResult(step, lines[-1] if lines else {}, False, {}, self.workdir)
        self._tell(f"this run was finished before, at step {step}: {_figures(result.metrics)}")
        return result

    def _tell_result(self, step: int, preempted: bool) -> TrainResult:
        lines = read_metrics(self.workdir)
        result = TrainResult(
            step, lines[-1] if lines else {}, preempted, self._goodput.seconds, self.workdir
        )
        self._tell(self._goodput.describe())
        if preempted:  # Told by every process: each host may have its own log.
            print(f"stopped at step {step} of {self.config.steps}, which is saved; resume by:")
            print(f"  {self._resume_command}", flush=True)
        else:
            self._tell(f"trained {step} steps: {_figures(result.metrics)}; all in {self.workdir}")
        return result

    def _tell(self, text: str) -> None:
        if self._main:
            print(text, flush=True)


def _quick_compilation(mesh: jax.sharding.Mesh) -> dict[str, Any] | None:
    """Options for a program that runs once: on CPU optimising it takes longer than running it."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 0} if on_cpu else None


def check_config(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if a field is out of range or batch, mesh and processes do not fit."""
    shards = batch_shards(mesh)
    for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every",
                 "keep_checkpoints", "max_nonfinite"):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")
    for name in ("eval_every", "eval_batches"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} must not be negative")
    if config.batch_size % (shards * config.accumulation):
        raise UserError(
            f"batch_size {config.batch_size} must be a multiple of data × fsdp × accumulation = "
            f"{shards} × {config.accumulation} = {shards * config.accumulation}"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _figures(metrics: Mapping[str, Any]) -> str:
    names = ["loss", *(n for n in metrics if n.startswith("eval/") and n.endswith("/loss"))]
    shown = [(name, metrics[name]) for name in names if metrics.get(name) is not None]
    return ", ".join(f"{name} {value:.4f}" for name, value in shown) or "no metrics"
