"""PrefixLM (section 3.2): the encoder reads the first part of a text, the decoder continues it."""

import numpy as np

from common.errors import UserError
from t5gemma.examples import Example, Objective


class PrefixLM(Objective):
    """Splits a piece in two.

    Args:
      bos_id: put in front of the prefix; None for nothing.
      shortest, longest: the prefix's share of the piece is drawn evenly between the two; equal ones
        always split at the same place. The paper splits in equal halves.

    Raises:
      UserError: the shares are not in order or not between 0 and 1.
    """

    takes_eos = True
    extremes = (0.0, 1.0 - 2.0**-53)

    def __init__(self, bos_id: int | None, *, shortest: float = 0.5, longest: float = 0.5):
        if not 0.0 <= shortest <= longest <= 1.0:
            raise UserError(
                f"the prefix's share is {shortest} to {longest}; use 0 ≤ shortest ≤ longest ≤ 1"
            )
        self._head = np.array([] if bos_id is None else [bos_id], np.int32)
        self._shortest, self._spread = shortest, longest - shortest

    def sizes(self, lengths: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = self._shortest + self._spread * draws
        # Both sides get a token at least: without one there is nothing to read, or to say.
        prefix = np.clip(np.floor(lengths * share + 0.5).astype(np.int64), 1, lengths - 1)
        return prefix + len(self._head), lengths - prefix

    def example(self, tokens: np.ndarray, draw: float, rng: np.random.Generator) -> Example:
        _, targets = self.sizes(np.array([len(tokens)]), np.array([draw]))
        cut = len(tokens) - int(targets[0])
        return Example(np.concatenate([self._head, tokens[:cut]]), tokens[cut:])
