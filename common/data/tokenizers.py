"""Text to token ids and back, without loss.

Ids 0 to 3 are padding, end of sequence, beginning of sequence and unknown, as in Gemma. `encode`
adds none of them; a document in the training data is [bos] + ids + [eos].
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from common.data.files import write_atomically
from common.errors import UserError

PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3
_BYTES_HEADER = {"format": "tenfold-bytes", "version": 1}
_SPACE = "\u2581"  # What SentencePiece writes for a space.


@runtime_checkable
class Tokenizer(Protocol):
    """What the workspace asks of a tokenizer. A missing special id is -1."""

    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of many texts, on several threads."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; ids beyond the vocabulary become U+FFFD."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal digest; equal for tokenizers that give equal ids."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that `load_tokenizer` reads."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 4 to 259: no file, no training, any text."""

    vocab_size = 260
    pad_id, eos_id, bos_id = PAD_ID, EOS_ID, BOS_ID
    _first = 4

    def encode(self, text: str) -> list[int]:
        return [byte + self._first for byte in _utf8(text)]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        pieces, run = [], bytearray()
        for token in ids:
            if self._first <= token < self.vocab_size:
                run.append(int(token) - self._first)
                continue
            pieces.append(run.decode(errors="replace"))
            run.clear()
            if not 0 <= token < self.vocab_size:
                pieces.append("\ufffd")
            elif not skip_special:
                pieces.append(("<pad>", "<eos>", "<bos>", "<unk>")[token])
        return "".join(pieces) + run.decode(errors="replace")

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(_BYTES_HEADER).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(path, json.dumps(_BYTES_HEADER).encode() + b"\n")


class SentencePieceTokenizer:
    """A SentencePiece model: Gemma's own file, or one trained here."""

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """Loads serialised model bytes; `name` stands in error messages.

        Raises:
            UserError: The bytes are not one whole SentencePiece model.
        """
        sentencepiece = _import_sentencepiece()
        _check_model_bytes(model, name)
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name} is not a SentencePiece model") from error
        self._model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.eos_id: int = self._processor.eos_id()
        self.bos_id: int = self._processor.bos_id()
        self._special = np.array([self.pad_id, self.eos_id, self.bos_id])
        space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        has_bytes = all(self._processor.is_byte(token) for token in space)
        # A "▁" in the text would come back as a space; spelt in bytes it survives.
        self._space_ids = space if has_bytes else None

    @classmethod
    def train(
        cls,
        documents: Iterable[str],
        vocab_size: int,
        path: str | os.PathLike[str] | None = None,
        *,
        max_characters: int = 6_000_000,
    ) -> "SentencePieceTokenizer":
        """Trains a lossless byte-pair model on the first `max_characters` of `documents`.

        The same documents give the same bytes. No normalisation, no dummy prefix, runs of spaces
        and line breaks kept, digits one by one, what is rare spelt in bytes.

        Args:
            documents: Text; see `sources.sample_documents` for a spread-out sample.
            vocab_size: Number of pieces, the 4 special ones and 256 bytes included.
            path: Where to save the model as well.
            max_characters: How much text to look at.

        Raises:
            UserError: There is no text, or too little or too varied text for `vocab_size`.
        """
        sentencepiece = _import_sentencepiece()
        lines = list(_training_lines(documents, max_characters))
        if not lines:
            raise UserError("there is no text to train a tokenizer on")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                **_TRAINER_OPTIONS,
            )
        except RuntimeError as error:
            reason = str(error).rsplit(") ", 1)[-1].strip().splitlines()[0]
            raise UserError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
        tokenizer = cls(model.getvalue())
        if path is not None:
            tokenizer.save(path)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        if self._space_ids is None or _SPACE not in text:
            return self._processor.encode(text)
        first, *others = text.split(_SPACE)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._space_ids + self._processor.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        threads = threads or min(os.cpu_count() or 1, 16)
        plain = [index for index, text in enumerate(texts) if _SPACE not in text]
        for text in texts:
            _utf8(text)
        fast = self._processor.encode([texts[index] for index in plain], num_threads=threads)
        encoded = dict(zip(plain, fast))
        return [encoded[i] if i in encoded else self.encode(texts[i]) for i in range(len(texts))]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        tokens = np.asarray(ids, np.int64)
        if skip_special:
            tokens = tokens[~np.isin(tokens, self._special)]
        pieces, start = [], 0
        for stop in np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size)):
            pieces += [self._decode_known(tokens[start:stop], skip_special), "\ufffd"]
            start = stop + 1
        return "".join(pieces) + self._decode_known(tokens[start:], skip_special)

    def _decode_known(self, tokens: np.ndarray, skip_special: bool) -> str:
        if skip_special:
            return self._processor.decode(tokens.tolist())
        # SentencePiece decodes control pieces to nothing; here they are spelt out.
        pieces, start = [], 0
        for stop in np.flatnonzero(np.isin(tokens, self._special)):
            pieces.append(self._processor.decode(tokens[start:stop].tolist()))
            pieces.append(self._processor.id_to_piece(int(tokens[stop])))
            start = stop + 1
        return "".join(pieces) + self._processor.decode(tokens[start:].tolist())

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(path, self._model)


_TRAINER_OPTIONS = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "byte_fallback": True,
    "character_coverage": 0.9995,
    "user_defined_symbols": ["\n", "\n\n", "\t"],
    "pad_id": PAD_ID,
    "eos_id": EOS_ID,
    "bos_id": BOS_ID,
    "unk_id": UNK_ID,
    "pad_piece": "<pad>",
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "unk_piece": "<unk>",
    "max_sentence_length": 1 << 16,
    "num_threads": 1,
    "minloglevel": 2,
}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer file, or the `tokenizer.model` of a folder.

    Raises:
        UserError: The file is missing, cut short, or not a tokenizer.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.model"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer '{file}': {error.strerror}") from error
    except ValueError as error:  # A null character in the path.
        raise UserError(f"cannot read the tokenizer {str(file)!r}: {error}") from error
    if data.startswith(b"{"):
        try:
            header = json.loads(data)
        except ValueError as error:
            raise UserError(f"tokenizer '{file}' is neither JSON nor SentencePiece") from error
        if header != _BYTES_HEADER:
            raise UserError(f"tokenizer '{file}' is JSON of a kind that is not read here")
        return ByteTokenizer()
    return SentencePieceTokenizer(data, f"tokenizer '{file}'")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, padding: int = 1024) -> None:
    """Raises unless a model with `vocab_size` rows can have been made for `tokenizer`.

    Args:
        tokenizer: The tokenizer about to be used.
        vocab_size: Rows of the model's embedding table.
        padding: How many unused rows a model may have for the sake of round sizes.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {vocab_size};"
            " use the tokenizer that the model was trained with"
        )
    if tokenizer.vocab_size + padding < vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, far from the model's {vocab_size};"
            " use the tokenizer that the model was trained with"
        )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise UserError(
            f"the text is not valid Unicode: {character} at character {error.start}"
        ) from error


def _training_lines(documents: Iterable[str], max_characters: int) -> Iterator[str]:
    """Cuts documents into what the trainer calls sentences; line breaks are fixed pieces anyway."""
    for document in documents:
        for line in document[:max_characters].splitlines():
            for start in range(0, len(line), 4096):
                yield line[start : start + 4096]
        max_characters -= len(document)
        if max_characters <= 0:
            return


def _check_model_bytes(model: bytes, name: str) -> None:
    """Walks the outermost fields of the file, which are pieces (1), trainer (2), normaliser (3).

    A file cut between two fields still parses as a model with fewer pieces, so the library alone
    does not notice.
    """
    cut = UserError(f"{name} is cut short or not a SentencePiece model")
    seen, position = set(), 0
    while position < len(model):
        tag, position = _varint(model, position, cut)
        if tag & 7 != 2:
            raise cut
        length, position = _varint(model, position, cut)
        position += length
        seen.add(tag >> 3)
    if position != len(model) or not {1, 2, 3} <= seen:
        raise cut


def _varint(data: bytes, position: int, error: UserError) -> tuple[int, int]:
    value, shift = 0, 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise error


def _import_sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError("this tokenizer needs `pip install sentencepiece`") from error
    return sentencepiece
