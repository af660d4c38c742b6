"""A folder of embeddings: an array that is mapped, not read, and an index of what its rows are.

settings.json   what the rows depend on; another run with the same goes on where one stopped
features.npy    [rows, ...], there once everything is done
index.jsonl     a line for each item: {"path", "row", "rows", "size", "grid", "error"}
partial/        until then: the array as far as it is, and which items are in it

An item has as many rows as was planned for it. Items that could not be read have none in the end
and `row` null; the others keep their order.
"""

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.data.files import write_atomically
from common.errors import UserError

FEATURES, INDEX, SETTINGS = "features.npy", "index.jsonl", "settings.json"
_PARTIAL, _DONE, _LOCK = "partial", "done.jsonl", ".lock"
_COPIED = 1 << 26  # Bytes of rows moved at a time.


@dataclass(frozen=True)
class Item:
    """What became of one item.

    Attributes:
      size: of the image, [height, width] in pixels, or None.
      error: why it could not be read, or None.
    """

    size: tuple[int, int] | None = None
    error: str | None = None


class EmbeddingFolder:
    """Embeddings of items in a fixed order, written in any order, and over several runs.

    Args:
      path: the folder; new, empty, or one of embeddings with the same settings.
      settings: JSON-able fields that the rows depend on.
      names: of the items.
      rows: `[N]` how many rows each item has.
      shape: of one row.
      dtype: of the array.
      grids: `[N, 2]` how an item's rows lie in its image, for the index, or None.

    Raises:
      UserError: the folder holds something else, or embeddings with other settings, or another
        process is writing to it.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        names: Sequence[str],
        rows: np.ndarray,
        shape: tuple[int, ...],
        dtype: np.dtype,
        grids: np.ndarray | None = None,
    ):
        self.path = Path(path)
        self.items: dict[int, Item] = {}
        self._names, self._rows, self._grids = names, np.asarray(rows, np.int64), grids
        self._starts = np.concatenate([[0], np.cumsum(self._rows)])
        self._shape = (int(self._starts[-1]), *shape)
        self._dtype = np.dtype(dtype)
        self._lock: IO[str] | None = None
        self._log: IO[str] | None = None
        self._array: np.memmap | None = None
        self._claim(json.loads(json.dumps(settings)))
        self.complete = (self.path / FEATURES).exists()
        if self.complete:
            shutil.rmtree(self.path / _PARTIAL, ignore_errors=True)
            self.items = self._indexed()
        else:
            self._resume()

    def __enter__(self) -> "EmbeddingFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def missing(self) -> np.ndarray:
        """Numbers of the items that are not done, ascending."""
        left = np.ones(len(self._names), bool)
        left[list(self.items)] = False
        return np.flatnonzero(left)

    @property
    def failed(self) -> dict[int, str]:
        """What is wrong with each item that could not be read."""
        return {n: item.error for n, item in self.items.items() if item.error is not None}

    def write(self, numbers: Sequence[int], values: Sequence[Any], items: Sequence[Item]) -> None:
        """Keeps some items; they are done once this returns.

        Args:
          numbers: which.
          values: the rows of each, `[rows, ...]`; None for one that could not be read.
          items: what to say of each.
        """
        assert self._array is not None
        assert self._log is not None
        checks = []
        for number, value in zip(numbers, values):
            if value is None:
                checks.append(0)
                continue
            place = self._array[self._starts[number] : self._starts[number + 1]]
            place[...] = np.asarray(value).reshape(place.shape)
            checks.append(_checksum(place))
        for number, item in zip(numbers, items):
            self.items[int(number)] = item
        line = {
            "items": [int(number) for number in numbers],
            "sums": checks,
            "sizes": [item.size for item in items],
            "errors": [item.error for item in items],
        }
        # The rows first: of what this line says, nothing may be missing.
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def finish(self) -> None:
        """Makes the array and the index of all items appear."""
        assert self._array is not None
        if len(self.missing):
            raise ValueError(f"{len(self.missing)} items are not done")
        partial = self.path / _PARTIAL / FEATURES
        self._array.flush()
        kept = self._rows.copy()
        kept[list(self.failed)] = 0
        if self.failed:
            partial = self._without_failed(kept)
        write_atomically(self.path / INDEX, self._index_lines(kept))
        self._array = None
        os.replace(partial, self.path / FEATURES)
        self.complete = True
        self.close()
        shutil.rmtree(self.path / _PARTIAL)

    def close(self) -> None:
        """Lets other processes write to the folder."""
        for file in (self._log, self._lock):
            if file is not None:
                file.close()
        self._log = self._lock = None
        self._array = None

    def _claim(self, settings: dict[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            others = sorted(entry.name for entry in self.path.iterdir() if entry.name != _LOCK)
            if others and not (self.path / SETTINGS).is_file():
                raise UserError(
                    f"{self.path} is not empty and holds no embeddings (there is '{others[0]}'): "
                    "give another folder"
                )
            self._lock = (self.path / _LOCK).open("a")
        except OSError as error:
            raise UserError(f"cannot write in {self.path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another process is writing to {self.path}") from error
        except OSError:
            pass  # A file system without locks.
        if (self.path / SETTINGS).is_file():
            self._compare(settings)
        else:
            write_atomically(self.path / SETTINGS, f"{json.dumps(settings, indent=2)}\n".encode())

    def _compare(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            differing = [name for name in settings if before.get(name) != settings[name]]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path / SETTINGS} cannot be read: {error}") from error
        if differing:
            shown = ", ".join(
                f"{name} {json.dumps(before.get(name))} → {json.dumps(settings[name])}"
                for name in differing
            )
            raise UserError(
                f"{self.path} holds embeddings of other settings ({shown}): give another folder, "
                "or remove this one"
            )

    def _resume(self) -> None:
        """Opens the partial array and finds out which items in it are as they were written."""
        folder = self.path / _PARTIAL
        folder.mkdir(exist_ok=True)
        file, log = folder / FEATURES, folder / _DONE
        with contextlib.suppress(OSError, ValueError):
            found = np.lib.format.open_memmap(file, mode="r+")
            if found.shape == self._shape and found.dtype == self._dtype:
                self._array = found
        if self._array is None:
            log.unlink(missing_ok=True)
            self._array = np.lib.format.open_memmap(
                file, mode="w+", dtype=self._dtype, shape=self._shape
            )
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        for line in text.splitlines():
            self._take(line)
        self._log = log.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._log.write("\n")  # A line that a kill cut off.

    def _take(self, line: str) -> None:
        """Believes a line of the log as far as the array agrees with it."""
        assert self._array is not None
        try:
            data = json.loads(line)
            entries = list(zip(data["items"], data["sums"], data["sizes"], data["errors"]))
        except (ValueError, KeyError, TypeError):
            return
        for number, check, size, error in entries:
            if type(number) is not int or not 0 <= number < len(self._names):
                continue
            place = self._array[self._starts[number] : self._starts[number + 1]]
            # What could not be read is tried again: the storage may have been away.
            if error is None and _checksum(place) == check:
                self.items[number] = Item(tuple(size) if size else None)

    def _without_failed(self, kept: np.ndarray) -> Path:
        """Writes a second array of the rows that remain."""
        assert self._array is not None
        file = self.path / _PARTIAL / f"kept-{FEATURES}"
        shape = (int(kept.sum()), *self._shape[1:])
        if not shape[0]:
            np.save(file, np.zeros(shape, self._dtype))
            return file
        target = np.lib.format.open_memmap(file, mode="w+", dtype=self._dtype, shape=shape)
        good = np.repeat(kept > 0, self._rows)
        at, step = 0, max(1, _COPIED // max(1, self._array[:1].nbytes))
        for start in range(0, len(good), step):
            rows = self._array[start : start + step][good[start : start + step]]
            target[at : at + len(rows)] = rows
            at += len(rows)
        target.flush()
        return file

    def _index_lines(self, kept: np.ndarray) -> bytes:
        starts = np.concatenate([[0], np.cumsum(kept)])
        lines = []
        for number, name in enumerate(self._names):
            item = self.items[number]
            lines.append(
                json.dumps(
                    {
                        "path": name,
                        "row": int(starts[number]) if item.error is None else None,
                        "rows": int(kept[number]),
                        "size": item.size,
                        "grid": None if self._grids is None else self._grids[number].tolist(),
                        "error": item.error,
                    }
                )
            )
        return "".join(f"{line}\n" for line in lines).encode()

    def _indexed(self) -> dict[int, Item]:
        rows = read_index(self.path)
        return {n: Item(row["size"], row["error"]) for n, row in enumerate(rows)}


def read_index(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a folder's index.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = Path(path) / INDEX
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no complete embeddings: {error}") from error


def _checksum(rows: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).view(np.uint8).data)
