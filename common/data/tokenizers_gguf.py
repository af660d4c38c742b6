"""Tokenizers out of the metadata of .gguf files.

Two kinds are read: "llama" (pieces with scores) becomes a SentencePiece model, "gpt2" (byte-level
pairs) a tokenizer of the `tokenizers` library. What the file says is what such a file could say of
itself: lists of tokens, their kinds, scores or merges, and which of them begin and end a text.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from common.data.tokenizers_huggingface import HuggingFaceTokenizer, TokenRoles
from common.data.tokenizers_sentencepiece import SPACE, SentencePieceTokenizer, model_bytes
from common.errors import UserError, nearest

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KINDS = {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
MAX_TOKENS = 1 << 22


class GGUFMetadata(Protocol):
    """What this asks of an open .gguf file; each call refuses a value of another kind."""

    path: Path
    metadata: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None) -> int: ...

    def boolean(self, key: str, default: bool | None = None) -> bool: ...

    def string(self, key: str, default: str | None = None) -> str: ...

    def strings(self, key: str, default: Sequence[str] | None = None) -> Sequence[str]: ...

    def numbers(self, key: str, default: Sequence[float] | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How a byte-level vocabulary cuts a text into the words within which it merges pairs.

    Attributes:
        pattern: Regular expression of the words; None is GPT-2's.
        single_digits: Whether every digit is a word, whatever the pattern says.
        whole_words: Whether a word that is a token is that token, however its pairs would merge.
        add_bos: Whether texts have a beginning unless the file says otherwise.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = Splitting()
_DIGITS = Splitting(single_digits=True)
_LLAMA = Splitting(_LLAMA3, whole_words=True, add_bos=True)
# By the names that llama.cpp gives them.
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA,
    "llama3": _LLAMA,
    "llama-v3": _LLAMA,
    "falcon3": _LLAMA,
    "dbrx": Splitting(_LLAMA3),
    "smaug-bpe": Splitting(_LLAMA3),
    "qwen2": Splitting(_QWEN2),
    "deepseek-r1-qwen": Splitting(_QWEN2),
    "stablelm2": Splitting(_QWEN2),
    "tekken": Splitting(_TEKKEN, whole_words=True, add_bos=True),
}


def gguf_tokenizer(file: GGUFMetadata) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """Returns the tokenizer that a .gguf file holds.

    Raises:
        UserError: There is none, of another kind, or its parts do not fit together.
    """
    kind = file.string("tokenizer.ggml.model")
    readers: dict[str, Callable] = {"llama": _pieces, "gpt2": _pairs}
    if kind not in readers:
        raise UserError(
            f"{file.path} has a tokenizer of the kind {kind!r}; 'llama' and 'gpt2' are read here"
        )
    tokens = file.strings("tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise UserError(f"{file.path} has a tokenizer of {len(tokens)} tokens, which cannot be")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{file.path} lists a token of its tokenizer twice")
    kinds = file.numbers("tokenizer.ggml.token_type", [NORMAL] * len(tokens)).tolist()
    if len(kinds) != len(tokens):
        raise UserError(
            f"{file.path} has {len(tokens)} tokens but {len(kinds)} kinds of tokens; copy it again"
        )
    if not set(kinds) <= KINDS:
        raise UserError(f"{file.path} has a token of the unknown kind {max(set(kinds) - KINDS)}")
    return readers[kind](file, tokens, [int(kind) for kind in kinds])


def _pieces(file: GGUFMetadata, tokens: Sequence[str], kinds: list[int]) -> SentencePieceTokenizer:
    """Pieces that are merged in the order of their scores, as SentencePiece's pair models."""
    scores = file.numbers("tokenizer.ggml.scores").astype(np.float32).tolist()
    if len(scores) != len(tokens):
        raise UserError(
            f"{file.path} has {len(tokens)} tokens but {len(scores)} scores; copy it again"
        )
    special = {
        "unk": _special(file, "unknown", tokens, 0),
        "bos": _special(file, "bos", tokens, 1),
        "eos": _special(file, "eos", tokens, 2),
        "pad": _special(file, "padding", tokens),
    }
    for role, token in special.items():
        if token is not None:
            kinds[tokens.index(token)] = UNKNOWN if role == "unk" else CONTROL
    if not file.boolean("tokenizer.ggml.add_bos_token", True):
        special["bos"] = None
    # llama.cpp's converter writes plain spaces into the pieces that it looks for in raw text.
    spelt = [t.replace(" ", SPACE) if k == USER_DEFINED else t for t, k in zip(tokens, kinds)]
    if len(set(spelt)) < len(spelt):
        raise UserError(f"{file.path} lists a token of its tokenizer twice, spelt two ways")
    data = model_bytes(
        list(zip(spelt, scores, kinds)),
        special,
        add_prefix=file.boolean("tokenizer.ggml.add_space_prefix", True),
        strip=file.boolean("tokenizer.ggml.remove_extra_whitespaces", False),
    )
    template = file.metadata.get("tokenizer.chat_template")
    name = f"the tokenizer of {file.path}"
    return SentencePieceTokenizer(
        data, name, chat_template=template if isinstance(template, str) else None
    )


def _pairs(file: GGUFMetadata, tokens: Sequence[str], kinds: list[int]) -> HuggingFaceTokenizer:
    """Byte-level pairs."""
    pre = file.string("tokenizer.ggml.pre", "default")
    if pre not in SPLITTINGS:
        raise UserError(
            f"{file.path} cuts texts into words by the rule {pre!r}, which is not known here"
            f"{nearest(pre, SPLITTINGS)}; known are {', '.join(SPLITTINGS)}"
        )
    splitting = SPLITTINGS[pre]
    merges = [_pair(file, merge) for merge in file.strings("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    name = f"the tokenizer of {file.path}"
    for part in (part for pair in merges for part in (*pair, "".join(pair))):
        if part not in vocabulary:
            raise UserError(f"{name} merges into or from {part!r}, which is not a token of it")
    model = models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = _words(splitting)
    library.decoder = decoders.ByteLevel()
    library.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind in (CONTROL, UNKNOWN))
            for token, kind in zip(tokens, kinds)
            if kind in (CONTROL, UNKNOWN, USER_DEFINED) and token
        ]
    )
    bos = _special(file, "bos", tokens)
    if not file.boolean("tokenizer.ggml.add_bos_token", splitting.add_bos):
        bos = None
    if bos is not None:  # So that whoever loads it elsewhere gets the beginning too.
        library.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocabulary[bos])]
        )
    template = file.metadata.get("tokenizer.chat_template")
    roles = TokenRoles(
        bos,
        _special(file, "eos", tokens),
        _special(file, "padding", tokens),
        template if isinstance(template, str) else None,
    )
    return HuggingFaceTokenizer(library.to_str(), roles, name)


def _words(splitting: Splitting) -> Any:
    words: Any
    if splitting.pattern is not None:
        words = pre_tokenizers.Split(Regex(splitting.pattern), "isolated")
    elif splitting.single_digits:
        words = pre_tokenizers.Digits(individual_digits=True)
    else:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)
    return pre_tokenizers.Sequence([words, level])


def _pair(file: GGUFMetadata, merge: str) -> tuple[str, str]:
    """The two tokens of a merge; a space is between them and nowhere else in them."""
    first, _, second = merge.partition(" ")
    if not first or not second or " " in second:
        raise UserError(f"{file.path} has the merge {merge[:80]!r}, which is not two tokens")
    return first, second


def _special(
    file: GGUFMetadata, role: str, tokens: Sequence[str], default: int | None = None
) -> str | None:
    """The text of the token that the file gives a role, if any."""
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in file.metadata and (default is None or default >= len(tokens)):
        return None
    number = file.integer(key, default)
    if number >= len(tokens):
        raise UserError(
            f"{file.path}: metadata {key} is {number}, but there are {len(tokens)} tokens"
        )
    return tokens[number]
