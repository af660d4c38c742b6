"""Documents by number: what every text corpus looks like to the rest of the workspace.

A source is random access, so that order, sharding and resuming are arithmetic on indices and never
the state of a reader. Concrete sources live beside this file: `file_sources`, `record_sources`,
`python_corpus`; `corpus.open_corpus` picks one from a configuration.
"""

import abc
import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np

from common.data.shuffle import mix, permute
from common.errors import UserError

SPLITS = ("train", "heldout", "all")


class DamagedRecord(UserError):
    """One record that cannot be read; its message names the file and the record."""


class DocumentSource(abc.ABC):
    """A fixed sequence of documents."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records, damaged ones included."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> str:
        """Text of record `index`; "" where there is nothing to learn from.

        Raises:
            DamagedRecord: The record cannot be read as text.
        """

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """Where record `index` comes from, for a person: file and record number."""

    @abc.abstractmethod
    def keys(self) -> np.ndarray:
        """One uint64 per record that depends on its place in the corpus, not on the machine."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the records may have changed."""

    def damaged(self, index: int, reason: object) -> DamagedRecord:
        """Builds the exception for record `index`."""
        return DamagedRecord(f"{self.describe(index)}: {reason}")


class Selection(DocumentSource):
    """Some records of another source, in the same order."""

    def __init__(self, source: DocumentSource, indices: np.ndarray, label: str):
        self._source = source
        self._indices = indices
        self._label = label

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> str:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def keys(self) -> np.ndarray:
        return self._source.keys()[self._indices]

    def fingerprint(self) -> str:
        return digest(self._source.fingerprint(), self._label)


def select(
    source: DocumentSource,
    split: str = "all",
    heldout_fraction: float = 0.0,
    max_documents: int | None = None,
) -> DocumentSource:
    """Keeps one side of the held-out split, and of that at most `max_documents` records.

    Both choices hash the record's place in the corpus: "train" and "heldout" are disjoint and
    together everything, a new file moves no old one across, and a cap is a spread-out sample
    instead of the first records in the alphabet.
    """
    indices = selected(source.keys, split, heldout_fraction, max_documents, "max_documents")
    if indices is None:
        return source
    return Selection(source, indices, f"{split}:{heldout_fraction}:{max_documents}")


def selected(
    keys_of: Callable[[], np.ndarray],
    split: str,
    heldout_fraction: float,
    most: int | None,
    most_name: str,
) -> np.ndarray | None:
    """Numbers of the records that `select` keeps, ascending, by their keys; None: all of them."""
    if split not in SPLITS:
        raise UserError(f"split is '{split}'; use one of {', '.join(SPLITS)}")
    if not 0.0 <= heldout_fraction <= 1.0:
        raise UserError(f"heldout_fraction is {heldout_fraction}; use a number between 0 and 1")
    if most is not None and most < 1:
        raise UserError(f"{most_name} is {most}; use 1 or more, or None for all")
    if split == "all" and most is None:
        return None
    keys = keys_of()
    heldout = keys.astype(np.float64) / 2.0**64 < heldout_fraction
    kept = {"train": ~heldout, "heldout": heldout, "all": np.ones_like(heldout)}[split]
    indices = np.flatnonzero(kept)
    if most is not None and most < len(indices):
        # Mixed again: within a split the keys themselves are confined to one side.
        chosen = np.argsort(mix(keys[indices]), kind="stable")[:most]
        indices = indices[np.sort(chosen)]
    return indices


class HealthyDocuments:
    """Iterates over the non-empty documents of a source and skips damaged records within a budget.

    Args:
        source: Where the documents come from.
        error_budget: How many records may be damaged: below 1 a fraction of the source, from 1 on
            a number of records.
        indices: The records to visit, in order; None visits all.

    Attributes:
        skipped: Damaged records met so far.
        visited: Records looked at so far.
    """

    def __init__(
        self,
        source: DocumentSource,
        error_budget: float = 0.0,
        indices: Iterator[int] | None = None,
    ):
        if error_budget < 0:
            raise UserError(f"error_budget is {error_budget}; use 0 or more")
        self._source = source
        self._allowed = int(error_budget if error_budget >= 1 else error_budget * len(source))
        self._indices = indices
        self.skipped = 0
        self.visited = 0

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self._source)) if self._indices is None else self._indices:
            self.visited += 1
            try:
                text = self._source[index]
            except DamagedRecord as error:
                self.skipped += 1
                if self.skipped > self._allowed:
                    raise UserError(self._refusal(error)) from error
                continue
            if text:
                yield text

    def _refusal(self, error: DamagedRecord) -> str:
        if not self._allowed:
            return f"{error} (repair or remove it, or set error_budget to skip damaged records)"
        return (
            f"{error} (damaged record number {self.skipped} of {len(self._source)} records;"
            f" error_budget allows {self._allowed})"
        )


def sample_documents(
    source: DocumentSource, characters: int, error_budget: float = 0.0
) -> Iterator[str]:
    """Yields documents from all over the corpus until `characters` have been given out."""
    order = (int(permute(np.array([i]), len(source), 0)[0]) for i in range(len(source)))
    for text in HealthyDocuments(source, error_budget, order):
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def digest(*parts: str | bytes) -> str:
    """Hexadecimal digest of a sequence of strings; the cuts between them count."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else os.fsencode(part)
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def key_of(name: str) -> np.uint64:
    """The uint64 key of a named thing, the same on every machine."""
    return np.uint64(int(digest(name)[:16], 16))


def record_keys(names: list[str], counts: list[int]) -> np.ndarray:
    """Keys of the records of several files: by file name and number within the file."""
    parts = [
        mix(key_of(name) + np.arange(count, dtype=np.uint64)) for name, count in zip(names, counts)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def refuse_empty(source: DocumentSource, name: str, hint: str = "") -> DocumentSource:
    """Returns `source`, or raises the error a user should see when it has no records."""
    if not len(source):
        raise UserError(f"{name} holds no documents{hint}")
    return source


Progress = Callable[[int, int], None]
"""Called with (records done, records in all)."""
