"""The run folder: where a run writes, and the guard that only the same run writes there again."""

import contextlib
import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from common.errors import UserError
from common.launch import config as configs

_LOCK = ".lock"


class RunFolder:
    """A folder with `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `report/`.

    `open` claims it for a configuration; the paths can be read before.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report"
        self._lock: IO[str] | None = None

    def open(self, config: Any, may_change: Collection[str] = ()) -> bool:
        """Claims the folder for a run of `config`, creating it if need be.

        Of several processes the first claims it; the others wait until it has, write nothing, and
        check that they see the same folder and were started with the same configuration.

        Args:
          config: the configuration dataclass of this run.
          may_change: dotted fields (or groups of fields) that may differ from those of the run
            being resumed; the new values are kept.

        Returns:
          True if a run with this configuration has been here before.

        Raises:
          UserError: the folder holds something else, another configuration, cannot be written, is
            not the first process's folder, or another run is writing to it.
        """
        import jax

        from common.sharding import from_first

        if jax.process_index() > 0:
            mark, resumed = json.loads(from_first("run folder", ""))
            self._check_shared(jax.process_index(), mark, config)
            return resumed
        resumed = self._claim(config, may_change)
        if jax.process_count() > 1:
            from_first("run folder", json.dumps([self._leave_mark(), resumed]))
        return resumed

    def _claim(self, config: Any, may_change: Collection[str]) -> bool:
        self._create()
        self._take_lock()
        data = configs.to_dict(config)
        if not self.config.exists():
            write_atomically(self.config, configs.to_json(config))
            return False
        differing = configs.diff(self._read_config(), data)
        refused = {field: pair for field, pair in differing.items() if not _in(field, may_change)}
        if refused:
            raise UserError(
                f"{self.path} holds a run of another configuration ({_shown(refused)}): "
                "give another --workdir, or the configuration of that run"
            )
        if differing:
            write_atomically(self.config, configs.to_json(config))
        return True

    def has_trained(self) -> bool:
        """Whether there is a checkpoint or a line of metrics, here or in a folder below."""
        found = (self.path.rglob(kind.name) for kind in (self.checkpoints, self.metrics))
        return any(True for paths in found for _ in paths)

    def abandon(self) -> None:
        """Gives up the claim of a run that failed before it trained, so that it can be corrected.

        Does nothing once it has trained.
        """
        if self.has_trained():
            return
        self.config.unlink(missing_ok=True)
        self.close()
        (self.path / _LOCK).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def close(self) -> None:
        """Lets other processes write to the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _create(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir: {self.path} is a file, not a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = sorted(entry.name for entry in self.path.iterdir() if entry.name != _LOCK)
        except OSError as error:
            raise UserError(f"--workdir: cannot use {self.path}: {error.strerror}") from error
        if strangers and not self.config.is_file():
            raise UserError(
                f"--workdir: {self.path} is not empty and holds no run (there is "
                f"'{strangers[0]}' but no config.json): give another folder"
            )

    def _take_lock(self) -> None:
        """Holds a lock that the system drops when this process ends, however it ends."""
        try:
            self._lock = (self.path / _LOCK).open("a")
        except OSError as error:
            raise UserError(f"--workdir: cannot write in {self.path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.close()
            raise UserError(f"--workdir: another process is writing to {self.path}") from error
        except OSError:
            self.close()  # A file system without locks: the run goes on without one.

    def _leave_mark(self) -> str:
        """Writes into the lock's file, for the other processes, what no other folder holds."""
        mark = secrets.token_hex(8)
        # Opened anew, the file would lose the lock when it is closed.
        with contextlib.ExitStack() as stack:
            file = self._lock or stack.enter_context((self.path / _LOCK).open("a"))
            file.truncate(0)
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        return mark

    def _check_shared(self, process: int, mark: str, config: Any) -> None:
        try:
            shared = (self.path / _LOCK).read_text() == mark
        except OSError:
            shared = False
        if not shared:
            raise UserError(
                f"process {process} does not find process 0's run in {self.path.absolute()}: "
                "--workdir must lie on storage that all hosts share"
            )
        differing = configs.diff(self._read_config(), configs.to_dict(config))
        if differing:
            raise UserError(
                f"process {process} was started with another configuration than process 0 "
                f"({_shown(differing)}): give all of them the same command"
            )

    def _read_config(self) -> dict[str, Any]:
        try:
            data = json.loads(self.config.read_text())
        except (ValueError, OSError) as error:
            raise UserError(f"--workdir: {self.config} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise UserError(f"--workdir: {self.config} is not a configuration")
        return data


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is, at every moment, either the former one or the whole new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _in(field: str, groups: Collection[str]) -> bool:
    return any(field == group or field.startswith(f"{group}.") for group in groups)


def _shown(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{field} {_show(a)} → {_show(b)}" for field, (a, b) in differing.items())


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
