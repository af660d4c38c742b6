"""Tasks with a known answer: induction heads and selective copying (Griffin, arXiv:2402.19427).

Each row is drawn from its own index, so these are row sources like any other; only the answer
positions have weight.
"""

import numpy as np

from common.data.rows import Batch, Rows
from common.errors import UserError

_NAMES = {"induction": 1, "selective_copy": 2}


class SyntheticRows(Rows):
    """What the tasks share: size, seed, and the layout of a row.

    Args:
        length: Positions in a row, L, answers included.
        vocabulary: Number of ordinary tokens, ids 0 to `vocabulary - 1`; the tasks add their own.
        rows: How many rows there are.
        seed: Rows of different seeds are unrelated: use another one for evaluation.
    """

    task: str
    extra_tokens: int

    def __init__(self, length: int, vocabulary: int = 16, rows: int = 1 << 20, seed: int = 0):
        if vocabulary < 2 or rows < 1:
            raise UserError(f"{self.task} needs 2 or more tokens and 1 or more rows")
        self.length = length
        self.vocabulary = vocabulary
        self.seed = seed
        self._rows = rows

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.vocabulary + self.extra_tokens

    def __len__(self) -> int:
        return self._rows

    def _generator(self, index: int) -> np.random.Generator:
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        return np.random.Generator(np.random.PCG64([_NAMES[self.task], self.seed, index]))

    def _row(self, tokens: np.ndarray, targets: np.ndarray, answers: np.ndarray) -> Batch:
        weights = np.zeros(self.length, np.float32)
        weights[answers] = 1.0
        return {
            "tokens": tokens.astype(np.int32),
            "targets": targets.astype(np.int32),
            "positions": np.arange(self.length, dtype=np.int32),
            "segment_ids": np.ones(self.length, np.int32),
            "weights": weights,
        }


class InductionHeads(SyntheticRows):
    """Random tokens with a special one somewhere and again at the end: what followed the first?

    The special token is id `vocabulary`. Only the last position is scored.
    """

    task = "induction"
    extra_tokens = 1

    def __init__(self, length: int, vocabulary: int = 16, rows: int = 1 << 20, seed: int = 0):
        if length < 3:
            raise UserError(f"induction needs rows of 3 or more tokens, not {length}")
        super().__init__(length, vocabulary, rows, seed)

    def __getitem__(self, index: int) -> Batch:
        generator = self._generator(index)
        tokens = generator.integers(0, self.vocabulary, self.length)
        place = generator.integers(0, self.length - 2)
        tokens[[place, -1]] = self.vocabulary
        targets = np.append(tokens[1:], tokens[place + 1])
        return self._row(tokens, targets, np.array([self.length - 1]))


class SelectiveCopy(SyntheticRows):
    """Data tokens strewn among noise, then as many marks: at each mark the next data token.

    Noise is id `vocabulary`, the mark `vocabulary + 1`. The last `copied` positions are scored.

    Args:
        length: Positions in a row, marks included.
        copied: Number of data tokens.
        vocabulary: See `SyntheticRows`.
        rows: See `SyntheticRows`.
        seed: See `SyntheticRows`.
    """

    task = "selective_copy"
    extra_tokens = 2

    def __init__(
        self,
        length: int,
        copied: int = 16,
        vocabulary: int = 16,
        rows: int = 1 << 20,
        seed: int = 0,
    ):
        if copied < 1 or length < 2 * copied:
            raise UserError(
                f"copying {copied} tokens needs rows of {2 * max(copied, 1)} or more, not {length}"
            )
        super().__init__(length, vocabulary, rows, seed)
        self.copied = copied

    def __getitem__(self, index: int) -> Batch:
        generator = self._generator(index)
        context = self.length - self.copied
        places = np.sort(generator.choice(context, self.copied, replace=False))
        data = generator.integers(0, self.vocabulary, self.copied)
        tokens = np.full(self.length, self.vocabulary)
        tokens[places] = data
        tokens[context:] = self.vocabulary + 1
        targets = np.concatenate([tokens[1 : context + 1], data])
        return self._row(tokens, targets, np.arange(context, self.length))
