"""A corpus tokenised once: all token ids in one memory-mapped array, and where documents begin.

A store lies in a folder named by the fingerprint of corpus and tokenizer:

    tokens.bin    uint16 or uint32, documents one after the other, each [bos] + ids + [eos]
    offsets.bin   int64 [documents + 1], where each begins and the last one ends
    store.json    sizes and checksums of both, written before the folder gets its name
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.data.sources import DocumentSource, HealthyDocuments, Progress, digest
from common.data.tokenizers import Tokenizer
from common.errors import UserError

_FORMAT = 1
_BATCH_CHARACTERS = 1_000_000
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Header:
    format: int
    dtype: str
    tokens: int
    documents: int
    vocab_size: int
    pad_id: int
    skipped: int
    tokens_checksum: int
    offsets_checksum: int


class TokenStore:
    """Tokenised documents by number.

    Attributes:
        tokens: Unsigned [T], all documents one after the other.
        offsets: int64 [documents + 1].
        vocab_size: Ids are below this.
        pad_id: What to fill rows with.
        skipped: Damaged records that were left out when the store was made.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        vocab_size: int,
        pad_id: int = 0,
        skipped: int = 0,
    ):
        self.tokens = tokens
        self.offsets = offsets
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.skipped = skipped

    @classmethod
    def of(
        cls, documents: Sequence[Sequence[int]], vocab_size: int, pad_id: int = 0
    ) -> "TokenStore":
        """A store in memory from whole documents, bos and eos included."""
        offsets = np.cumsum([0] + [len(document) for document in documents])
        flat = [np.asarray(document, np.int64) for document in documents]
        tokens = np.concatenate([np.zeros(0, np.int64), *flat])
        return cls(tokens.astype(_dtype(vocab_size)), offsets, vocab_size, pad_id)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def target_counts(self) -> np.ndarray:
        """How often each id is predicted: int64 [vocab_size]; first tokens of documents are not."""
        counts = np.zeros(self.vocab_size, np.int64)
        for start in range(0, len(self.tokens), 1 << 24):
            part = self.tokens[start : start + (1 << 24)]
            counts += np.bincount(part, minlength=self.vocab_size)
        firsts = self.tokens[self.offsets[:-1][np.diff(self.offsets) > 0]]
        return counts - np.bincount(firsts, minlength=self.vocab_size)


def tokenize(
    source: DocumentSource,
    tokenizer: Tokenizer,
    cache: str | os.PathLike[str],
    *,
    error_budget: float = 0.0,
    progress: Progress | None = None,
) -> TokenStore:
    """Returns the tokenised corpus, from `cache` if it is there, else made and kept there.

    Any number of processes may call this at once: one does the work and the others wait for it.

    Args:
        source: The documents.
        tokenizer: Turns them into ids.
        cache: Folder that holds stores; made if missing.
        error_budget: Damaged records to put up with; see `sources.HealthyDocuments`.
        progress: Called with (records done, records in all) while a store is being made.

    Raises:
        UserError: The corpus has no text, too many damaged records, or `cache` cannot be written.
    """
    name = digest(str(_FORMAT), source.fingerprint(), tokenizer.fingerprint(), str(error_budget))
    root = Path(cache)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{name}.lock"):
            store = _open_store(root / name)
            if store is None:
                _build(source, tokenizer, root / name, error_budget, progress)
                store = _open_store(root / name)
    except OSError as error:
        raise UserError(f"cannot keep tokens in '{cache}': {error.strerror or error}") from error
    if store is None:
        raise UserError(f"tokens written to '{root / name}' do not read back; check that disk")
    return store


def _open_store(folder: Path) -> TokenStore | None:
    """Maps a finished store into memory; None when there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        header = _Header(**json.loads((folder / "store.json").read_text()))
        tokens = np.memmap(folder / "tokens.bin", header.dtype, "r")
        offsets = np.memmap(folder / "offsets.bin", np.int64, "r")
        whole = (
            header.format == _FORMAT
            and (len(tokens), len(offsets)) == (header.tokens, header.documents + 1)
            and _checksum(tokens) == header.tokens_checksum
            and _checksum(offsets) == header.offsets_checksum
        )
    except (OSError, ValueError, TypeError) as error:
        log.warning("Cached tokens in %s cannot be read (%s); making them again.", folder, error)
        return None
    if not whole:
        log.warning("Cached tokens in %s are damaged; making them again.", folder)
        return None
    # Plain arrays over the same memory: indexing the memmap class is several times slower.
    return TokenStore(
        np.asarray(tokens), np.asarray(offsets), header.vocab_size, header.pad_id, header.skipped
    )


def _build(
    source: DocumentSource,
    tokenizer: Tokenizer,
    folder: Path,
    error_budget: float,
    progress: Progress | None,
) -> None:
    """Writes a store under a temporary name and moves it into place."""
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        documents = HealthyDocuments(source, error_budget)
        dtype = _dtype(tokenizer.vocab_size)
        offsets, checksum = [np.zeros(1, np.int64)], 0
        with open(temporary / "tokens.bin", "wb") as stream:
            for texts in _batches(documents):
                lengths, checksum = _write(texts, tokenizer, dtype, stream, checksum)
                offsets.append(lengths)
                if progress is not None:
                    progress(documents.visited, len(source))
            _sync(stream)
        edges = np.cumsum(np.concatenate(offsets))
        if len(edges) == 1:
            raise UserError("there is no text in the corpus")
        with open(temporary / "offsets.bin", "wb") as stream:
            edges.tofile(stream)
            _sync(stream)
        if documents.skipped:
            log.warning("Skipped %d damaged of %d records.", documents.skipped, len(source))
        header = _Header(
            format=_FORMAT,
            dtype=np.dtype(dtype).name,
            tokens=int(edges[-1]),
            documents=len(edges) - 1,
            vocab_size=tokenizer.vocab_size,
            pad_id=max(tokenizer.pad_id, 0),
            skipped=documents.skipped,
            tokens_checksum=checksum,
            offsets_checksum=_checksum(edges),
        )
        (temporary / "store.json").write_text(json.dumps(asdict(header), indent=1))
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    texts: list[str], tokenizer: Tokenizer, dtype: type, stream: BinaryIO, checksum: int
) -> tuple[np.ndarray, int]:
    """Appends documents to `stream`; returns their lengths and the checksum so far."""
    head = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    tail = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []
    documents = [np.array(head + ids + tail, dtype) for ids in tokenizer.encode_batch(texts)]
    for document in documents:
        checksum = zlib.crc32(document, checksum)
        document.tofile(stream)
    return np.array([len(document) for document in documents], np.int64), checksum


def _batches(documents: HealthyDocuments) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes, a bounded part at a time."""
    value = 0
    for start in range(0, len(array), 1 << 24):
        value = zlib.crc32(np.asarray(array[start : start + (1 << 24)]), value)
    return value


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the system lets go of it when the process ends."""
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Another process is making %s; waiting for it.", path.stem)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
