"""Tokenizers of the `tokenizers` library: Hugging Face's tokenizer.json, and byte-level BPE.

A file of the workspace's own is a JSON object that holds the library's next to what Hugging Face
keeps in tokenizer_config.json.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Library

from common.data.files import write_atomically
from common.data.special_tokens import stop_tokens, utf8
from common.errors import UserError

FORMAT = {"format": "tenfold-tokenizer", "version": 1}
MAX_TOKENS = 1 << 24


@dataclasses.dataclass(frozen=True)
class TokenRoles:
    """What a vocabulary itself does not say of its tokens.

    Attributes:
        bos: Text of the token that every text begins with, if there is one.
        eos: Text of the token that ends a text.
        pad: Text of the token that fills up a row.
        chat_template: How a conversation becomes text (Jinja); kept as it is, never run.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    chat_template: str | None = None


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    Bytes that a vocabulary has no token for are left out of the ids, as they are everywhere that
    such a file is read; of the public vocabularies a few lack control characters.
    """

    file_name = "tokenizer.json"

    def __init__(self, data: str, roles: TokenRoles, name: str = "the tokenizer"):
        """Loads what the library calls a tokenizer.

        Args:
            data: Its JSON.
            roles: Which of its tokens mean what.
            name: Stands in error messages.

        Raises:
            UserError: The library refuses `data`, or a token of `roles` is not in it.
        """
        self._name = name
        self._library = library_tokenizer(data, name)
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # As text, that is.
        self._roles = roles
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        if not 0 < self.vocab_size <= MAX_TOKENS:
            raise UserError(f"{name} has ids up to {self.vocab_size - 1}, which cannot be")
        added = self._library.get_added_tokens_decoder()
        self.special_tokens: Mapping[str, int] = {
            token.content: number for number, token in sorted(added.items()) if token.special
        }
        self.pad_id = _id_of(roles.pad, vocabulary, "padding", name)
        self.eos_id = _id_of(roles.eos, vocabulary, "end", name)
        self.bos_id = _id_of(roles.bos, vocabulary, "beginning", name)
        self.stop_tokens = stop_tokens(self.eos_id, self.special_tokens)
        self.chat_template = roles.chat_template
        self._known = np.zeros(self.vocab_size, bool)
        self._known[list(vocabulary.values())] = True
        self._reads_special: Any = None

    def encode(self, text: str, special: bool = False) -> list[int]:
        utf8(text)
        library = self._special_library() if special else self._library
        with _refusing(self._name):
            return library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        for text in texts:
            utf8(text)
        if threads == 1:
            return [self.encode(text) for text in texts]
        with _refusing(self._name):
            found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        tokens = np.asarray(ids, np.int64)
        inside = (tokens >= 0) & (tokens < self.vocab_size)
        known = inside & self._known[np.where(inside, tokens, 0)]
        pieces, start = [], 0
        for stop in np.flatnonzero(~known):
            pieces += [self._decode_known(tokens[start:stop], skip_special), "\ufffd"]
            start = stop + 1
        return "".join(pieces) + self._decode_known(tokens[start:], skip_special)

    def fingerprint(self) -> str:
        data = json.dumps([self._library.to_str(), dataclasses.astuple(self._roles)])
        return hashlib.sha256(data.encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        roles = dataclasses.asdict(self._roles)
        data = FORMAT | {"roles": roles, "tokenizer": json.loads(self._library.to_str())}
        write_atomically(path, json.dumps(data, ensure_ascii=False).encode() + b"\n")

    def save_huggingface(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
        write_atomically(Path(folder) / self.file_name, self._library.to_str().encode())
        roles = self._roles
        config = {"bos_token": roles.bos, "eos_token": roles.eos, "pad_token": roles.pad}
        config |= {"chat_template": roles.chat_template}
        config = {key: value for key, value in config.items() if value is not None}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        data = json.dumps(config, indent=2, ensure_ascii=False)
        write_atomically(Path(folder) / "tokenizer_config.json", data.encode() + b"\n")

    def _decode_known(self, tokens: np.ndarray, skip_special: bool) -> str:
        with _refusing(self._name):
            return self._library.decode(tokens.tolist(), skip_special_tokens=skip_special)

    def _special_library(self) -> Any:
        """The tokenizer once more, with the text of special tokens read as such."""
        if self._reads_special is None:
            self._reads_special = library_tokenizer(self._library.to_str(), self._name)
            self._reads_special.encode_special_tokens = False
        return self._reads_special


def library_tokenizer(data: str, name: str) -> Any:
    """Returns the library's tokenizer of `data`; UserError where it refuses."""
    with _refusing(name):
        return Library.from_str(data)


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turns what the library raises, of a file that contradicts itself, into a UserError.

    It looks at some parts only when they are used, and then may panic, which Python sees as an
    exception outside of the class Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{name} is not one that the tokenizers library reads ({reason})") from None


def read_saved(data: Mapping[str, Any], name: str) -> HuggingFaceTokenizer:
    """Returns the tokenizer of a file that `save` wrote, already parsed."""
    roles, library = data.get("roles"), data.get("tokenizer")
    fields = {field.name for field in dataclasses.fields(TokenRoles)}
    texts = roles.values() if isinstance(roles, dict) and set(roles) == fields else [0]
    fine = isinstance(library, dict) and all(t is None or isinstance(t, str) for t in texts)
    if not isinstance(roles, dict) or not fine:
        raise UserError(f"{name} is damaged: copy it again")
    return HuggingFaceTokenizer(json.dumps(library), TokenRoles(**roles), name)


def roles_of_folder(library: Any, config: Mapping[str, Any], name: str) -> TokenRoles:
    """Returns the roles that a Hugging Face folder gives its tokens.

    Args:
        library: The tokenizer of its tokenizer.json, which knows whether texts get a beginning.
        config: Its tokenizer_config.json, `{}` if there is none.
        name: Stands in error messages.
    """
    bos = _content(config.get("bos_token"))
    if "add_bos_token" in config:
        begins = config["add_bos_token"] is True
    else:
        # Asked with a text, not without one: some put their end behind the beginning.
        with _refusing(name):
            plain = library.encode("a", add_special_tokens=False).ids
            framed = library.encode("a", add_special_tokens=True).ids
        first = library.id_to_token(framed[0]) if len(framed) > len(plain) else None
        begins = first is not None and first == (bos or first) and framed[:1] != plain[:1]
        bos = first if begins else bos
    template = config.get("chat_template")
    if isinstance(template, list):  # Several by name; the first of the name "default".
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    return TokenRoles(
        bos if begins else None,
        _content(config.get("eos_token")),
        _content(config.get("pad_token")),
        template if isinstance(template, str) else None,
    )


def _content(token: Any) -> str | None:
    """The text of a token that a configuration names, directly or in an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _id_of(text: str | None, vocabulary: Mapping[str, int], role: str, name: str) -> int:
    if text is None:
        return -1
    if text not in vocabulary:
        raise UserError(f"{name} names the token {text!r} as its {role}, but has none of that name")
    return vocabulary[text]
