"""The text a run trains on: a corpus, its tokenizer, packed rows for training and evaluation."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from common.data.corpus import CorpusConfig, open_corpus
from common.data.packing import PackedRows
from common.data.text import packed_rows, tokenizer_for
from common.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from common.data.unigram import count_targets, unigram_cross_entropy
from common.errors import UserError

TOKENIZER_FILE = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how to cut it.

    Attributes:
      corpus: where documents come from; its `split` is set by the launcher.
      tokenizer: a SentencePiece model or a folder with one; None trains one on the corpus.
      sequence_length: L, positions of a row.
      packing: "split" cuts documents at row ends, "whole" keeps them in one piece where they fit.
      tokenizer_characters: how much text a tokenizer is trained on.
    """

    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    tokenizer: str | None = None
    sequence_length: int = 512
    packing: Literal["split", "whole"] = "split"
    tokenizer_characters: int = 6_000_000

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise UserError("data.sequence_length must be at least 2")


@dataclasses.dataclass(frozen=True)
class TextData:
    """A tokenised corpus.

    Attributes:
      tokenizer: of both splits.
      train, heldout: packed rows; no document is in both.
      corpus, length, packing, cache: how they were made, for rows of another length.
    """

    tokenizer: Tokenizer
    train: PackedRows
    heldout: PackedRows
    config: DataConfig
    cache: Path

    def heldout_rows(self, length: int) -> PackedRows:
        """The held-out documents in rows of another length."""
        return PackedRows(self.heldout.store, length, self.config.packing)

    def describe(self) -> str:
        """How much of what there is, as one line."""
        sizes = (f"{s.store.tokens.size:,}" for s in (self.train, self.heldout))
        return "{} tokens for training and {} held out".format(*sizes)

    def unigram_loss(self) -> float:
        """Held-out cross-entropy of token frequencies alone, in nats per token."""
        size = self.tokenizer.vocab_size
        return unigram_cross_entropy(
            self.train.store.target_counts(), count_targets(self.heldout, size)
        )


def check_data(config: DataConfig, vocab_size: int) -> None:
    """Opens what the user named, writing nothing, so that mistakes show before a run begins."""
    for split in ("train", "heldout"):
        open_corpus(dataclasses.replace(config.corpus, split=split))
    if config.tokenizer is not None:
        check_vocabulary(load_tokenizer(config.tokenizer), vocab_size)


def prepare_data(
    config: DataConfig, vocab_size: int, folder: Path, say: Callable[[str], None]
) -> TextData:
    """Trains or copies the tokenizer into `folder` and tokenises the corpus, once.

    Args:
      config: what to read.
      vocab_size: the model's; a trained tokenizer has exactly as many pieces.
      folder: the run folder; holds the tokenizer and the token arrays.
      say: prints a line.
    """
    path = folder / TOKENIZER_FILE
    train = dataclasses.replace(config.corpus, split="train")
    if not path.exists():
        if config.tokenizer is not None:
            load_tokenizer(config.tokenizer).save(path)
        else:
            say(f"training a tokenizer of {vocab_size} pieces on the {train.kind} corpus")
    tokenizer = tokenizer_for(train, vocab_size, path, max_characters=config.tokenizer_characters)
    check_vocabulary(tokenizer, vocab_size)
    cache = folder / "data"
    rows = {}
    for split in ("train", "heldout"):
        corpus = dataclasses.replace(config.corpus, split=split)
        rows[split] = packed_rows(
            corpus, tokenizer, length=config.sequence_length, cache=cache, strategy=config.packing
        )
        say(f"{split}: {rows[split].store.tokens.size:,} tokens, {len(rows[split]):,} rows")
    return TextData(tokenizer, rows["train"], rows["heldout"], config, cache)
