"""Examples of an encoder-decoder, and the corpus cut into pieces that become examples.

An objective is a grain transform: a piece of text and a random stream give one example. What an
example will measure is known from the piece's length and one number drawn for it, so that rows are
planned without making a single example (`packing`).
"""

import abc
from typing import NamedTuple, Protocol

import grain
import numpy as np

from common.data.shuffle import mix
from common.data.token_store import TokenStore
from common.errors import UserError


class Example(NamedTuple):
    """What the encoder reads and what the decoder has to say.

    Attributes:
      encoder: int32 [E].
      targets: int32 [D]; the decoder reads them one place later, behind its start token.
    """

    encoder: np.ndarray
    targets: np.ndarray


class Examples(Protocol):
    """A fixed sequence of examples, each made from its number alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """E and D of every example, int64 [N] each."""
        ...


class Objective(grain.transforms.RandomMap):
    """Makes an example of a piece of text, int32 [L] with L of 2 or more.

    Attributes:
      takes_eos: whether the end of a document is part of its text; otherwise the objective says
        itself where an example ends.
      extremes: draws in [0, 1) between which sizes take every value they can.
    """

    takes_eos: bool
    extremes: tuple[float, ...]

    @abc.abstractmethod
    def sizes(self, lengths: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E and D of the examples of pieces of `lengths` [N], for `draws` [N] in [0, 1)."""

    @abc.abstractmethod
    def example(self, tokens: np.ndarray, draw: float, rng: np.random.Generator) -> Example:
        """The example of one piece; its sizes are those that `sizes` gives for `draw`."""

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> Example:
        """The example of one piece, as a step of any grain pipeline."""
        return self.example(np.asarray(element, np.int32), rng.random(), rng)

    def longest_piece(self, encoder_length: int, decoder_length: int) -> int:
        """The length up to which every piece fits the two sides, whatever is drawn.

        Raises:
          UserError: not even a piece of 3 tokens does.
        """
        lengths = np.arange(2, encoder_length + decoder_length + 1)
        fits = np.ones(len(lengths), bool)
        for draw in self.extremes:
            encoder, targets = self.sizes(lengths, np.full(len(lengths), draw))
            fits &= (encoder <= encoder_length) & (targets <= decoder_length)
        longest = 1 + int(np.argmin(np.append(fits, False)))
        if longest < 3:
            raise UserError(
                f"rows of {encoder_length} tokens for the encoder and {decoder_length} for the "
                "decoder are too short for this objective: make them longer"
            )
        return longest


class CorpusExamples:
    """Every token of a corpus in exactly one example a pass.

    Documents longer than `piece_length` are cut; those of fewer than two tokens, which leave
    nothing to predict, are left out and counted.

    Args:
      store: the tokenised documents.
      objective: makes the examples.
      piece_length: most tokens of a document in one example.
      seed: of all draws; an example depends on it and on its own number, on nothing else.
      passes: how many times the corpus goes by before draws repeat: example `n` of the corpus is
        drawn anew in each pass.
      has_bos, has_eos: whether documents of the store begin and end with these tokens.

    Attributes:
      pieces: examples of one pass.
      left_out: documents too short for an example.
    """

    def __init__(
        self,
        store: TokenStore,
        objective: Objective,
        *,
        piece_length: int,
        seed: int = 0,
        passes: int = 1,
        has_bos: bool = True,
        has_eos: bool = True,
    ):
        if piece_length < 3:
            raise UserError(f"pieces of {piece_length} tokens are too short: use 3 or more")
        if passes < 1:
            raise UserError(f"passes is {passes}; use 1 or more")
        self._store, self._objective, self._seed = store, objective, seed
        begins = store.offsets[:-1] + int(has_bos)
        ends = store.offsets[1:] - int(has_eos and not objective.takes_eos)
        sizes = np.maximum(ends - begins, 0)
        self.left_out = int(np.count_nonzero(sizes < 2))
        self._starts, self._lengths = _cut(begins[sizes >= 2], sizes[sizes >= 2], piece_length)
        self.pieces, self.passes = len(self._starts), passes
        if not self.pieces:
            raise UserError("the corpus has no document of two tokens or more")

    def __len__(self) -> int:
        return self.pieces * self.passes

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        draws = self._draws(np.arange(len(self)))
        return self._objective.sizes(np.tile(self._lengths, self.passes), draws)

    def tokens(self, index: int) -> np.ndarray:
        """The piece that example `index` is made of, int32 [L]."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, length = (int(a[index % self.pieces]) for a in (self._starts, self._lengths))
        return self._store.tokens[start : start + length].astype(np.int32)

    def __getitem__(self, index: int) -> Example:
        draw = float(self._draws(np.array([index]))[0])
        rng = np.random.Generator(np.random.PCG64([self._seed, index]))
        return self._objective.example(self.tokens(index), draw, rng)

    def _draws(self, indices: np.ndarray) -> np.ndarray:
        """One number in [0, 1) for each example, in 53 bits."""
        own = mix(np.array([self._seed % 2**64], np.uint64))
        bits = mix(own ^ mix(indices.astype(np.uint64)))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _cut(begins: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces: full ones, then what is left of the document.

    A single token left over is no example, so the piece before it gives one of its own.
    """
    counts = -(-sizes // length)
    last = np.cumsum(counts) - 1
    number = np.arange(counts.sum()) - np.repeat(last + 1 - counts, counts)
    starts = np.repeat(begins, counts) + number * length
    lengths = np.full(len(starts), length, np.int64)
    lengths[last] = sizes - (counts - 1) * length
    lone = last[lengths[last] == 1]
    starts[lone] -= 1
    lengths[lone] += 1
    lengths[lone - 1] -= 1
    return starts, lengths
