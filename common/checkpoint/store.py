"""The workspace's own checkpoints: training state and bare parameters, kept by Orbax.

A checkpoint is one folder:

    step_00000120/
      params/  state/       arrays as Orbax trees; the parameters apart, so that they load alone
      checkpoint.json       the data iterator's position, and what every array and file must be

It is written under another name and renamed when complete, so a killed save leaves nothing that
looks like a checkpoint. Reading compares file sizes first, and a checksum of every restored array
last: a damaged checkpoint is noticed, never read as zeros.
"""

import functools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from common.checkpoint import array_folder as arrays
from common.checkpoint.array_folder import DamagedError
from common.checkpoint.model_folder import read_model_folder as read_model_folder
from common.checkpoint.model_folder import save_model_folder as save_model_folder
from common.checkpoint.model_folder import save_params as save_params
from common.errors import UserError
from common.sharding import barrier, everywhere, from_first

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d+)")


class CheckpointStore:
    """The checkpoints of one run, newest kept, written in the background.

    Every process of a run calls every method; process 0 alone renames and deletes.
    """

    def __init__(self, folder: Path, keep: int | None = 3):
        """Args:
        folder: where the `step_…` folders lie; made by the first save.
        keep: how many of the newest to keep; None keeps all.
        """
        if keep is not None and keep < 1:
            raise UserError(f"a run must keep at least one checkpoint, not {keep}")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._saving: _Background | None = None

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = [_STEP.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint, or None; does not read its arrays.

        The same in every process: process 0 looks.
        """
        steps = self._agreed_steps()
        return steps[-1] if steps else None

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, state: Any, data_state: Any, metadata: Any = None) -> None:
        """Starts writing a checkpoint; returns once the arrays may be donated or changed.

        Waits for the save before it. When this one is complete, older ones beyond `keep` go.

        Args:
          step: training step, larger than any step saved.
          state: pytree of arrays; what lies under its top-level `params` is stored apart.
          data_state: JSON-able position of the data iterator, the same in every process.
          metadata: anything JSON-able to lie beside it.

        Raises:
          UserError: the disk refused this save or the one before.
        """
        self.wait()
        final = self.path(step)
        if final.exists():
            raise ValueError(f"{final} exists already")
        partial = final.with_name(f"{final.name}.partial")
        if jax.process_index() == 0:
            try:
                self._sweep()
            except OSError as error:
                raise UserError(f"cannot write checkpoints in {self.folder}: {error}") from error
        barrier("checkpoint_swept")
        finish = arrays.start_writing(
            partial, state, {"step": step, "data": data_state, "metadata": metadata}
        )

        def commit() -> None:
            finish()
            if jax.process_index() == 0:
                partial.rename(final)
                self._prune()

        self._saving = _Background(commit)

    def wait(self) -> None:
        """Blocks until the save in progress is complete, and raises what went wrong in it."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except OSError as error:
            if error.errno is None:  # Not from the file system: another process was waited for.
                raise
            raise UserError(f"cannot write a checkpoint in {self.folder}: {error}") from error

    def restore(self, abstract_state: Any) -> tuple[int, Any, Any]:
        """Reads the newest checkpoint that is intact.

        A damaged one is passed over with a line in the log. Once an older one has been read, the
        damaged folders are renamed `damaged_step_…`, so that the run can write their steps anew.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with the shardings wanted, on any mesh.

        Returns:
          The step, the state, and the data iterator's position.

        Raises:
          UserError: there is none, none is readable, or it holds other arrays than asked for.
        """
        self.wait()
        damaged: list[int] = []
        reason = ""
        for step in reversed(self._agreed_steps()):
            try:
                state, record = arrays.read(self.path(step), abstract_state)
            except DamagedError as error:
                reason = reason or str(error)
                log.warning("checkpoint of step %d is damaged (%s); trying the one before",
                            step, error)  # fmt: skip
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return step, state, record["data"]
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is readable ({reason})")
        raise UserError(f"there is no checkpoint in {self.folder}")

    def is_intact(self, step: int) -> bool:
        """Returns whether a checkpoint's files are all there, without reading its arrays.

        The same in every process: each looks.
        """
        try:
            arrays.read_record(self.path(step))
        except DamagedError:
            return everywhere("intact", False)
        return everywhere("intact", True)

    def _agreed_steps(self) -> list[int]:
        # A network's file system may show a folder to one host sooner than to another.
        return json.loads(from_first("checkpoints", json.dumps(self.steps())))

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                path = self.path(step)
                aside = path.with_name(f"damaged_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        barrier("damaged_set_aside")

    def _sweep(self) -> None:
        """Removes what killed saves and deletions have left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("step_*.partial*", "step_*.deleted"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def _prune(self) -> None:
        steps = self.steps()
        for step in steps[: -self._keep] if self._keep else []:
            # Renamed first, so that a kill half-way leaves no torn checkpoint behind.
            doomed = self.path(step).rename(self.path(step).with_suffix(".deleted"))
            shutil.rmtree(doomed)


def load_params(path: Path, abstract: Any, within: Sequence[str] = ()) -> Any:
    """Reads parameters alone, or a branch of them.

    Args:
      path: what `save_params` wrote, one checkpoint of a run, or a run's `checkpoints` folder
        (its newest intact one).
      abstract: pure dict of `jax.ShapeDtypeStruct`; shardings are followed where given, and a
        leaf of another dtype is converted.
      within: names of the branch that `abstract` is; nothing else is read.

    Returns:
      A pure dict of arrays, shaped like `abstract`.

    Raises:
      UserError: nothing readable there, or parameters of another shape.
    """
    path = Path(path).absolute()
    candidates = [path]
    if not arrays.is_array_folder(path):
        store = CheckpointStore(path)
        candidates = [store.path(step) for step in reversed(store._agreed_steps())]
    if not candidates:
        raise UserError(f"{path} holds no parameters: there is no checkpoint in it")
    reason = ""
    for candidate in candidates:
        try:
            return _read_branch(candidate, abstract, ("params", *within))
        except DamagedError as error:
            reason = reason or str(error)
            log.warning("%s is damaged (%s)", candidate, error)
    raise UserError(f"no parameters in {path} are readable ({reason})")


def _read_branch(path: Path, abstract: Any, names: Sequence[str]) -> Any:
    for name in reversed(names):
        abstract = {name: abstract}
    found = arrays.read(path, abstract, cast=True, branch="/".join(names))[0]
    return functools.reduce(lambda tree, name: tree[name], names, found)


class _Background:
    """One function in a thread; `result` joins it and raises what it raised."""

    def __init__(self, function: Callable[[], None]):
        self._error: BaseException | None = None

        def run() -> None:
            try:
                function()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
