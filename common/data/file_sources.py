"""Text files and JSON lines as documents."""

import fnmatch
import glob
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.sources import DocumentSource, digest, record_keys
from common.errors import UserError

UNITS = ("file", "line", "paragraph")
_BREAKS = {"line": re.compile(rb"\r?\n"), "paragraph": re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")}


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus: where it is, and its name that does not depend on where."""

    path: str
    name: str


def find_files(path: str | None, pattern: str) -> list[CorpusFile]:
    """Lists the regular files that `path` names, sorted by name.

    Args:
        path: A file, a folder (searched to the bottom, hidden names left out), or a glob pattern
            in which `**` goes down any number of folders.
        pattern: The file names to take from a folder, such as `*.jsonl`.

    Raises:
        UserError: Nothing is there, or nothing that can be read.
    """
    if not path:
        raise UserError("this kind of corpus needs a path: a file, a folder or a glob pattern")
    if "\0" in path:
        raise UserError(f"corpus path {path!r} has a null character in it")
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        root, found = expanded, _walk(expanded, pattern)
    elif os.path.exists(expanded):
        root, found = os.path.dirname(expanded), [expanded]
    else:
        root = os.path.dirname(re.split(r"[*?\[]", expanded)[0])
        found = [name for name in glob.glob(expanded, recursive=True) if not os.path.isdir(name)]
    if not found:
        what = f"a file named {pattern}" if os.path.isdir(expanded) else "a file, folder or glob"
        raise UserError(f"no corpus at '{path}': {what} was expected there")
    for name in found:
        if not os.path.isfile(name):
            raise UserError(f"corpus file '{name}' is not a regular file")
        if not os.access(name, os.R_OK):
            raise UserError(f"corpus file '{name}' cannot be read: permission denied")
    files = [
        CorpusFile(name, Path(os.path.relpath(name, root or ".")).as_posix()) for name in found
    ]
    return sorted(files, key=lambda file: os.fsencode(file.name))


def files_digest(files: list[CorpusFile], *settings: str) -> str:
    """Digest of names, sizes and modification times: what a build tool looks at."""
    parts = list(settings)
    for file in files:
        status = os.stat(file.path)
        parts += [file.name, str(status.st_size), str(status.st_mtime_ns)]
    return digest(*parts)


class TextFiles(DocumentSource):
    """UTF-8 text: one document per file, line or paragraph; line ends are kept as they are."""

    def __init__(self, files: list[CorpusFile], unit: str = "file"):
        if unit not in UNITS:
            raise UserError(f"unit is '{unit}'; use one of {', '.join(UNITS)}")
        self._files = files
        self._unit = unit
        self._spans = [_spans(file, unit) for file in files]
        self._first = np.cumsum([0] + [len(spans) for spans in self._spans])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> str:
        try:
            data = self._read(index)
        except OSError as error:
            raise self.damaged(index, error.strerror) from error
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.damaged(
                index, f"not UTF-8 ({error.reason} at byte {error.start})"
            ) from error

    def _read(self, index: int) -> bytes:
        file, record = locate(self._first, index)
        start, stop = self._spans[file][record].tolist()
        with open(self._files[file].path, "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def describe(self, index: int) -> str:
        file, record = locate(self._first, index)
        where = "" if self._unit == "file" else f", {self._unit} {record}"
        return f"{self._files[file].path!r}{where}"

    def keys(self) -> np.ndarray:
        return record_keys([file.name for file in self._files], np.diff(self._first).tolist())

    def fingerprint(self) -> str:
        return files_digest(self._files, "text", self._unit)


class JsonLines(TextFiles):
    """One JSON object per line, the text in one of its fields."""

    def __init__(self, files: list[CorpusFile], field: str):
        super().__init__(files, "line")
        self._field = field

    def __getitem__(self, index: int) -> str:
        try:
            return text_field(super().__getitem__(index), self._field)
        except (ValueError, RecursionError) as error:
            raise self.damaged(index, error) from error

    def fingerprint(self) -> str:
        return files_digest(self._files, "jsonl", self._field)


def text_field(record: str, field: str) -> str:
    """The string under `field` of a JSON object, or the whole record when `field` is empty.

    Raises:
        ValueError: The record is not JSON, not an object, or has no such string.
    """
    if not field:
        return record
    value = json.loads(record)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, this is {type(value).__name__}")
    if field not in value:
        raise ValueError(f"no field '{field}'; it has {', '.join(map(str, value)) or 'none'}")
    if not isinstance(value[field], str):
        raise ValueError(f"field '{field}' is {type(value[field]).__name__}, not a string")
    # JSON can spell half of a surrogate pair, which no UTF-8 text holds.
    value[field].encode()
    return value[field]


def _walk(root: str, pattern: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        found += [os.path.join(folder, name) for name in fnmatch.filter(visible, pattern)]
    return found


def _spans(file: CorpusFile, unit: str) -> np.ndarray:
    """Byte ranges [N, 2] of the documents in one file; empty ones are left out."""
    size = os.path.getsize(file.path)
    if unit == "file" or not size:
        return np.array([[0, size]], np.int64)[: 1 if size else 0]
    data = np.memmap(file.path, np.uint8, "r")
    breaks = [match.span() for match in _BREAKS[unit].finditer(data)]
    edges = np.array([[0, 0], *breaks, [size, size]], np.int64)
    spans = np.stack([edges[:-1, 1], edges[1:, 0]], axis=1)
    return spans[spans[:, 1] > spans[:, 0]]


def locate(first: np.ndarray, index: int) -> tuple[int, int]:
    """(file, record within it) of a global record number; `first` [files + 1] counts records."""
    if not 0 <= index < first[-1]:
        raise IndexError(f"record {index} of {first[-1]}")
    file = int(np.searchsorted(first, index, side="right")) - 1
    return file, index - int(first[file])
