"""Text to token ids and back: what every tokenizer offers, and finding one in a file.

`encode` adds no beginning and no end; a document in the training data is [bos] + ids + [eos].
Tokenizers made here have ids 0 to 3 for padding, end, beginning and unknown, as Gemma's.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from common.data.files import write_atomically
from common.data.special_tokens import split_special, utf8
from common.data.tokenizers_gguf import gguf_tokenizer
from common.data.tokenizers_huggingface import (
    FORMAT,
    HuggingFaceTokenizer,
    library_tokenizer,
    read_saved,
    roles_of_folder,
)
from common.data.tokenizers_sentencepiece import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    SentencePieceTokenizer,
)
from common.errors import UserError

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "PAD_ID",
    "UNK_ID",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Special",
    "Tokenizer",
    "check_vocabulary",
    "encode_parts",
    "folder_tokenizer",
    "load_tokenizer",
]

_BYTES_HEADER = {"format": "tenfold-bytes", "version": 1}
_GGUF_MAGIC = b"GGUF"
_FOLDER_FILES = ("tokenizer.json", "tokenizer.model")
MAX_FILE_BYTES = 1 << 28


@runtime_checkable
class Tokenizer(Protocol):
    """What the workspace asks of a tokenizer. A missing special id is -1.

    Attributes:
        vocab_size: The highest id and one.
        pad_id: Fills up a row.
        eos_id: Ends a text.
        bos_id: Every text begins with it; -1 where texts of this vocabulary begin without one.
        stop_tokens: Every token that ends an answer, eos among them.
        special_tokens: Text of every special token -> its id.
        chat_template: How a conversation becomes text (Jinja); data, never run here.
        file_name: What Hugging Face calls the file of such a tokenizer.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int
    stop_tokens: tuple[int, ...]
    special_tokens: Mapping[str, int]
    chat_template: str | None
    file_name: str

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`, without bos or eos.

        The text of a special token in it is text like any other, unless `special` is true: then it
        becomes that token. Say so of texts of your own making only.
        """
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

    def save_huggingface(self, folder: str | os.PathLike[str]) -> None:
        """Writes what a Hugging Face folder has of a tokenizer; UserError if it cannot say it."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 4 to 259: no file, no training, any text."""

    vocab_size = 260
    pad_id, eos_id, bos_id = PAD_ID, EOS_ID, BOS_ID
    stop_tokens: tuple[int, ...] = (EOS_ID,)
    special_tokens: Mapping[str, int] = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    chat_template: str | None = None
    file_name = "tokenizer.model"
    _first = 4

    def encode(self, text: str, special: bool = False) -> list[int]:
        parts = split_special(text, self.special_tokens) if special else iter((text,))
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else [b + self._first for b in utf8(part)]
        return ids

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
                pieces.append(tuple(self.special_tokens)[token])
        return "".join(pieces) + run.decode(errors="replace")

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(_BYTES_HEADER).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(path, json.dumps(_BYTES_HEADER).encode() + b"\n")

    def save_huggingface(self, folder: str | os.PathLike[str]) -> None:
        raise UserError("Hugging Face has no tokenizer of plain bytes; train a SentencePiece model")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer: a file that `save` wrote, a .gguf file's, or that of a folder.

    Of a folder it is the tokenizer.json, else the tokenizer.model, with what tokenizer_config.json
    says of their tokens.

    Raises:
        UserError: The file is missing, cut short, or not a tokenizer.
    """
    file, config = Path(path), dict[str, Any]()
    if file.is_dir():
        folder = file
        found = [folder / name for name in _FOLDER_FILES]
        file = next((file for file in found if file.is_file()), found[-1])
        config = _folder_config(folder)
    name, data = f"tokenizer '{file}'", _read(file)
    if data.startswith(_GGUF_MAGIC):
        from common.checkpoint.gguf import open_gguf_file  # Which brings jax with it.

        return gguf_tokenizer(open_gguf_file(file))
    if not data.startswith(b"{"):
        template = config.get("chat_template")
        return SentencePieceTokenizer(
            data,
            name,
            add_bos=config.get("add_bos_token") is not False,
            chat_template=template if isinstance(template, str) else None,
        )
    fields = _parse(data, f"{name} is neither JSON nor SentencePiece")
    if fields == _BYTES_HEADER:
        return ByteTokenizer()
    if FORMAT.items() <= fields.items():
        return read_saved(fields, name)
    if "model" not in fields:
        raise UserError(f"{name} is JSON of a kind that is not read here")
    text = data.decode()
    config = config or _folder_config(file.parent)
    roles = roles_of_folder(library_tokenizer(text, name), config, name)
    return HuggingFaceTokenizer(text, roles, name)


def folder_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a model's folder, or None where there is none."""
    if not any((Path(folder) / name).is_file() for name in _FOLDER_FILES):
        return None
    return load_tokenizer(folder)


def _read(file: Path) -> bytes:
    """The bytes of a tokenizer's file; of a .gguf file the first few alone."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_GGUF_MAGIC))
            data = start if start == _GGUF_MAGIC else start + stream.read(MAX_FILE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer '{file}': {error.strerror}") from error
    except ValueError as error:  # A null character in the path.
        raise UserError(f"cannot read the tokenizer {str(file)!r}: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"'{file}' is too large to be a tokenizer")
    return data


def _parse(data: bytes, otherwise: str) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(otherwise) from error
    if not isinstance(fields, dict):
        raise UserError(otherwise)
    return fields


def _folder_config(folder: Path) -> dict[str, Any]:
    """What a Hugging Face folder says beside its tokenizer, its chat template in any place."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _parse(_read(file), f"'{file}' is not a JSON object") if file.is_file() else {}
    if "chat_template" not in config and template.is_file():
        config["chat_template"] = _read(template).decode(errors="replace")
    return config


class Special(str):
    """The text of a special token where that token is meant; see `encode_parts`."""


def encode_parts(tokenizer: Tokenizer, parts: Iterable[str | Special]) -> list[int]:
    """Token ids of a text of which some parts are special tokens and the others anything.

    What a user typed is a plain part: however it is spelt, it cannot end the user's turn.

    Raises:
        UserError: The tokenizer lacks one of the special tokens.
    """
    ids: list[int] = []
    for special, run in itertools.groupby(parts, lambda part: isinstance(part, Special)):
        if not special:
            ids += tokenizer.encode("".join(run))  # Whole, for tokens across the parts' borders.
            continue
        for part in run:
            if part not in tokenizer.special_tokens:
                raise UserError(f"this tokenizer has no {part} token: use another template")
            ids.append(tokenizer.special_tokens[part])
    return ids


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
