"""State of a long clustering on disk: arrays by name, written whole or not at all.

A state is one `.npz` file in a folder, put in place by a rename once all of it is on disk, with the
settings it belongs to. Process 0 writes, and all processes read what it wrote.
"""

import io
import json
import logging
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.data.files import write_atomically
from common.errors import UserError
from common.sharding import barrier, from_first

log = logging.getLogger(__name__)

SECONDS = 60.0  # between two states of the same work


class Checkpoints:
    """States of one clustering in a folder."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, seconds: float | None = None
    ) -> None:
        """States are read only if they were written with the same `settings`, JSON-able.

        Args:
          folder: made if need be; all processes must see the same.
          settings: of the clustering and its data.
          seconds: between two states; None for `SECONDS`.
        """
        self.folder = folder
        self._settings = json.dumps(dict(settings), sort_keys=True)
        self._seconds = SECONDS if seconds is None else seconds
        self._saved = time.monotonic()

    def below(self, name: str, settings: Mapping[str, Any]) -> "Checkpoints":
        """Returns the states of a part of the work, in a folder of its own."""
        both = {"whole": json.loads(self._settings), "part": dict(settings)}
        return Checkpoints(self.folder / name, both, seconds=self._seconds)

    def due(self) -> bool:
        """Whether it is time for another state; the same answer in every process."""
        now = time.monotonic() - self._saved >= self._seconds
        if jax.process_count() > 1:
            now = from_first("checkpoint is due", str(now)) == "True"
        return now

    def save(self, name: str, **arrays: np.ndarray) -> None:
        """Writes a state, which takes the place of the one of that name.

        Raises:
          UserError: it cannot be written; the former one is still there.
        """
        if jax.process_index() == 0:
            stream = io.BytesIO()
            np.savez(stream, settings=np.asarray(self._settings), **arrays)
            try:
                write_atomically(self._path(name), stream.getvalue())
            except OSError as error:
                raise UserError(
                    f"cannot write {self._path(name)}: {error.strerror or error}; free some space "
                    "and run again, it goes on where it was"
                ) from error
        self._saved = time.monotonic()

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """Returns the arrays of a state; None if there is none, or a damaged one.

        Raises:
          UserError: it belongs to other data or settings.
        """
        barrier("states are written")
        path = self._path(name)
        # A CRC of every array is part of the format.
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            settings = str(arrays.pop("settings"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged and not used: %s", path, error)
            return None
        if settings != self._settings:
            raise UserError(
                f"{path} belongs to another clustering ({_difference(settings, self._settings)}): "
                "give another folder, or delete this one to begin anew"
            )
        return arrays

    def remove(self, name: str) -> None:
        """Removes a state that nobody needs any more."""
        if jax.process_index() == 0:
            self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all states and the folder, if nothing else is in it."""
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.glob("*.npz"):
                path.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _difference(there: str, here: str) -> str:
    try:
        there_flat, here_flat = (_flat(json.loads(text)) for text in (there, here))
    except ValueError:
        return "its settings cannot be read"
    for name, value in here_flat.items():
        if there_flat.get(name) != value:
            return f"{name} is {there_flat.get(name)} there and {value} here"
    return "it has further settings"


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, str(key))
    return flat
