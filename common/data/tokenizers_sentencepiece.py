"""SentencePiece models: Gemma's and Llama's own files, and lossless ones trained here."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import write_atomically
from common.data.special_tokens import SPECIAL, split_special, stop_tokens, utf8
from common.errors import UserError

PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3
SPACE = "\u2581"  # What SentencePiece writes for a space.
# Kinds of pieces.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


class SentencePieceTokenizer:
    """A SentencePiece model: Gemma's own file, or one trained here.

    Its control pieces are the special tokens, and so are those of its user-defined pieces that are
    named like one (`<start_of_turn>`), which SentencePiece itself would find in any text.
    """

    file_name = "tokenizer.model"

    def __init__(
        self,
        model: bytes,
        name: str = "the tokenizer",
        *,
        add_bos: bool = True,
        chat_template: str | None = None,
    ):
        """Loads serialised model bytes.

        Args:
            model: The bytes.
            name: Stands in error messages.
            add_bos: Whether texts begin with the model's beginning of sequence; else it is an
                ordinary special token and `bos_id` is -1.
            chat_template: How a conversation becomes text; kept as it is.

        Raises:
            UserError: The bytes are not one whole SentencePiece model.
        """
        _check_model_bytes(model, name)
        proto = _parse(model, name)
        if not add_bos:
            proto.trainer_spec.bos_piece = ""
            model = proto.SerializeToString()
        self._model = model
        named = [piece for piece in proto.pieces if piece.type in (_USER_DEFINED, _CONTROL)]
        if not all(isinstance(piece.piece, str) for piece in named):  # Bytes if it is not UTF-8.
            raise UserError(f"{name} is not a SentencePiece model")
        found = [p for p in named if p.type == _USER_DEFINED and SPECIAL.fullmatch(p.piece)]
        for piece in found:
            piece.type = _CONTROL
        self._hardened = bool(found)
        # The space in front of a text goes there once, not to every part that is encoded alone.
        normaliser = proto.normalizer_spec
        self._prefix = normaliser.add_dummy_prefix and not normaliser.remove_extra_whitespaces
        if self._prefix:
            normaliser.add_dummy_prefix = False
        self._processor = _processor(proto.SerializeToString(), name)
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.eos_id: int = self._processor.eos_id()
        self.bos_id: int = self._processor.bos_id()
        self.special_tokens: Mapping[str, int] = {
            piece.piece: token for token, piece in enumerate(proto.pieces) if piece.type == _CONTROL
        }
        self.stop_tokens = stop_tokens(self.eos_id, self.special_tokens)
        self.chat_template = chat_template
        self._special = np.array(sorted(self.special_tokens.values()), np.int64)
        space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
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
        lines = list(_training_lines(documents, max_characters))
        if not lines:
            raise UserError("there is no text to train a tokenizer on")
        model = io.BytesIO()
        try:
            _import_sentencepiece().SentencePieceTrainer.train(
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

    def encode(self, text: str, special: bool = False) -> list[int]:
        utf8(text)
        parts = split_special(text, self.special_tokens) if special else iter((text,))
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._encode_plain(part, first=not ids)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        threads = threads or min(os.cpu_count() or 1, 16)
        for text in texts:
            utf8(text)
        plain = [index for index, text in enumerate(texts) if SPACE not in text]
        prefixed = [self._with_prefix(texts[index]) for index in plain]
        encoded = dict(zip(plain, self._processor.encode(prefixed, num_threads=threads)))
        return [encoded[i] if i in encoded else self.encode(texts[i]) for i in range(len(texts))]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        tokens = np.asarray(ids, np.int64)
        if skip_special:
            tokens = tokens[~np.isin(tokens, self._special)]
        pieces, start = [], 0
        for stop in np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size)):
            pieces += [self._decode_known(tokens[start:stop], skip_special), "\ufffd"]
            start = stop + 1
        text = "".join(pieces) + self._decode_known(tokens[start:], skip_special)
        return text.removeprefix(" ") if self._prefix else text

    def save_huggingface(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.model and tokenizer_config.json as transformers reads them."""
        self.save(Path(folder) / self.file_name)
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        config: dict[str, object] = {
            f"{role}_token": self._processor.id_to_piece(token)
            for role, token in ids.items()
            if token >= 0
        }
        config["add_bos_token"] = self.bos_id >= 0
        # Which of theirs puts a space in front of a text, or none.
        config["tokenizer_class"] = "LlamaTokenizer" if self._prefix else "GemmaTokenizer"
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        data = json.dumps(config, indent=2, ensure_ascii=False)
        write_atomically(Path(folder) / "tokenizer_config.json", data.encode() + b"\n")

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        text = self._with_prefix(text) if first else text
        if self._space_ids is None or SPACE not in text:
            return self._processor.encode(text)
        head, *others = text.split(SPACE)
        ids = self._processor.encode(head)
        for part in others:
            ids += self._space_ids + self._processor.encode(part)
        return ids

    def _with_prefix(self, text: str) -> str:
        return f" {text}" if self._prefix and text else text

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
        hardened = ",".join(sorted(self.special_tokens)) if self._hardened else ""
        return hashlib.sha256(self._model + hardened.encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(path, self._model)


def model_bytes(
    pieces: Sequence[tuple[str, float, int]],
    special: Mapping[str, str | None],
    *,
    add_prefix: bool,
    strip: bool,
) -> bytes:
    """Makes a SentencePiece model that merges pairs in the order of their scores.

    Args:
        pieces: Text, score and kind of every piece, in the order of their ids.
        special: Texts of the pieces "unk", "bos", "eos" and "pad", None where there is none.
        add_prefix: Whether a space goes in front of every text.
        strip: Whether spaces at the ends and all but one of a run are dropped.
    """
    proto = _messages().ModelProto()
    for text, score, kind in pieces:
        proto.pieces.add(piece=text, score=score, type=kind)
    trainer, normaliser = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = any(kind == _BYTE for _, _, kind in pieces)
    for role in ("unk", "bos", "eos", "pad"):
        setattr(trainer, f"{role}_piece", special[role] or "")
    normaliser.name = "identity"
    normaliser.add_dummy_prefix = add_prefix
    normaliser.remove_extra_whitespaces = strip
    return proto.SerializeToString()


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


def _parse(model: bytes, name: str) -> Any:
    """Returns the model as a message whose fields can be changed."""
    messages = _messages()
    from google.protobuf.message import DecodeError

    try:
        return messages.ModelProto.FromString(model)
    except DecodeError as error:
        raise UserError(f"{name} is not a SentencePiece model") from error


def _messages() -> Any:
    """The library's own description of its files."""
    _import_sentencepiece()
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _processor(model: bytes, name: str) -> Any:
    try:
        return _import_sentencepiece().SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeDecodeError) as error:  # Of its message, which quotes a piece.
        raise UserError(f"{name} is not a SentencePiece model") from error


def _import_sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError("this tokenizer needs `pip install sentencepiece`") from error
    return sentencepiece
