"""The whole way of a text corpus: documents to tokens to packed rows."""

import os
from pathlib import Path

from common.data.corpus import CorpusConfig, open_corpus
from common.data.packing import PackedRows
from common.data.sources import Progress, sample_documents
from common.data.token_store import TokenStore, tokenize
from common.data.tokenizers import (
    SentencePieceTokenizer,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
)


def tokenize_corpus(
    config: CorpusConfig,
    tokenizer: Tokenizer,
    cache: str | os.PathLike[str],
    progress: Progress | None = None,
) -> TokenStore:
    """Opens the corpus and tokenises it, or finds that this was done before."""
    source = open_corpus(config)
    budget = config.error_budget
    return tokenize(source, tokenizer, cache, error_budget=budget, progress=progress)


def packed_rows(
    config: CorpusConfig,
    tokenizer: Tokenizer,
    *,
    length: int,
    cache: str | os.PathLike[str],
    strategy: str = "split",
    progress: Progress | None = None,
) -> PackedRows:
    """Rows of `length` positions from the corpus that `config` describes.

    Raises:
        UserError: See `corpus.open_corpus`, `token_store.tokenize` and `packing.PackedRows`.
    """
    return PackedRows(tokenize_corpus(config, tokenizer, cache, progress), length, strategy)


def tokenizer_for(
    config: CorpusConfig,
    vocab_size: int,
    path: str | os.PathLike[str],
    *,
    max_characters: int = 6_000_000,
) -> Tokenizer:
    """Loads the tokenizer at `path`, or trains one of `vocab_size` pieces there on the corpus.

    Raises:
        UserError: The file is damaged or does not go with `vocab_size`, or training failed.
    """
    if Path(path).exists():
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, vocab_size)
        return tokenizer
    sample = sample_documents(open_corpus(config), max_characters, config.error_budget)
    return SentencePieceTokenizer.train(sample, vocab_size, path, max_characters=max_characters)
