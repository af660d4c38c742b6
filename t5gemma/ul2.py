"""UL2 (section 3.3; Tay et al., arXiv:2205.05131): spans to fill in, by a mixture of denoisers.

Each denoiser takes a share of the tokens out, in so many spans that they have a certain mean
length. The encoder reads the text with one sentinel in the place of each span, behind a token that
names the mode; the decoder says each sentinel and what it stands for, then the end of the sequence.
"""

import dataclasses
from typing import Literal

import numpy as np

from common.errors import UserError
from t5gemma.examples import Example, Objective

MODES = ("R", "S", "X")


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text.

    Attributes:
      mode: "R" (regular), "S" (sequential) or "X" (extreme).
      rate: share of the tokens that are taken out.
      mean_span: mean length of a span; None for a single span, which is the end of the text.
      weight: how often, relative to the other denoisers.
    """

    mode: Literal["R", "S", "X"]
    rate: float
    mean_span: float | None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"a denoiser's mode is one of {', '.join(MODES)}, not '{self.mode}'")
        if not 0.0 < self.rate < 1.0:
            raise UserError(f"a denoiser's rate lies between 0 and 1; got {self.rate}")
        if self.mean_span is not None and self.mean_span < 1.0:
            raise UserError(f"a denoiser's mean_span must be at least 1, not {self.mean_span}")
        if not self.weight > 0.0:
            raise UserError(f"a denoiser's weight must be positive, not {self.weight}")


UL2_MIXTURE = (
    Denoiser("R", 0.15, 3.0),
    Denoiser("R", 0.15, 8.0),
    Denoiser("S", 0.25, None),
    Denoiser("X", 0.5, 3.0),
    Denoiser("X", 0.5, 8.0),
    Denoiser("X", 0.15, 64.0),
    Denoiser("X", 0.5, 64.0),
)
# Of T5Gemma 2 (appendix A), where the single span is three quarters of the text.
T5GEMMA2_MIXTURE = (
    Denoiser("R", 0.15, 3.0),
    Denoiser("X", 0.5, 12.0),
    Denoiser("X", 0.15, 32.0),
    Denoiser("X", 0.5, 32.0),
    Denoiser("S", 0.75, None, weight=4.0),
)


@dataclasses.dataclass(frozen=True)
class UL2Tokens:
    """Ids that text never has. Those the released models were trained with are unpublished.

    The default suits Gemma 2's tokenizer: its `<unused0>` to `<unused98>` are ids 7 to 105.

    Attributes:
      modes: of the denoisers "R", "S" and "X"; None for no mode token.
      first_sentinel: of the first span; the next ones count downwards from it.
      sentinels: how many there are. A text of more spans uses them again from the first: the
        decoder's spans come in the order of the text, so it is still said which is which.
    """

    modes: tuple[int, int, int] | None = (7, 8, 9)
    first_sentinel: int = 105
    sentinels: int = 96

    def __post_init__(self) -> None:
        if self.sentinels < 1:
            raise UserError(f"UL2 needs at least one sentinel, not {self.sentinels}")
        ids = self.ids()
        if min(ids) < 0 or len(set(ids)) != len(ids):
            raise UserError(
                f"UL2's modes {self.modes} and its {self.sentinels} sentinels from "
                f"{self.first_sentinel} downwards must be different ids from 0 on"
            )

    def ids(self) -> tuple[int, ...]:
        """All of them: modes, then sentinels."""
        last = self.first_sentinel - self.sentinels
        return (*(self.modes or ()), *range(self.first_sentinel, last, -1))


class UL2(Objective):
    """Corrupts a piece by a denoiser drawn from a mixture.

    Args:
      bos_id: put in front of the encoder's tokens; None for nothing.
      eos_id: ends the targets.
      mixture: the denoisers.
      special: mode and sentinel ids.
    """

    takes_eos = False

    def __init__(
        self,
        bos_id: int | None,
        eos_id: int,
        *,
        mixture: tuple[Denoiser, ...] = UL2_MIXTURE,
        special: UL2Tokens = UL2Tokens(),
    ):
        if not mixture:
            raise UserError("UL2 needs at least one denoiser in its mixture")
        self.mixture, self.special = mixture, special
        start = [] if bos_id is None else [bos_id]
        modes = special.modes
        self._heads = [
            np.array(start if modes is None else [*start, modes[MODES.index(d.mode)]], np.int32)
            for d in mixture
        ]
        self._eos = np.array([eos_id], np.int32)
        self._rates = np.array([d.rate for d in mixture])
        self._means = np.array([d.mean_span or np.inf for d in mixture])
        weights = np.array([d.weight for d in mixture])
        self._edges = np.cumsum(weights / weights.sum())
        self.extremes = tuple((self._edges - weights / weights.sum() / 2).tolist())

    def denoiser(self, draws: np.ndarray) -> np.ndarray:
        """Numbers within the mixture, int64 [N], that `draws` [N] in [0, 1) choose."""
        chosen = np.searchsorted(self._edges, draws, side="right")
        return np.minimum(chosen, len(self.mixture) - 1)  # The last edge may round below 1.

    def noise(self, lengths: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens are taken out, in how many spans: int64 [N] each."""
        chosen = self.denoiser(draws)
        noise = np.clip(_rounded(lengths * self._rates[chosen]), 1, lengths - 1)
        spans = np.maximum(_rounded(noise / self._means[chosen]), 1)
        # Each span, and what stands before it, has a token at least.
        return noise, np.minimum(spans, np.minimum(noise, lengths - noise))

    def sizes(self, lengths: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise, spans = self.noise(lengths, draws)
        return len(self._heads[0]) + lengths - noise + spans, noise + spans + 1

    def example(self, tokens: np.ndarray, draw: float, rng: np.random.Generator) -> Example:
        draws = np.array([draw])
        noise, spans = (int(n[0]) for n in self.noise(np.array([len(tokens)]), draws))
        kept = _segments(len(tokens) - noise, spans, rng)
        taken = _segments(noise, spans, rng)
        # Kept and taken segments take turns, a kept one first.
        turns = np.stack([kept, taken], axis=1).ravel()
        is_noise = np.repeat(np.tile([False, True], spans), turns)
        begins = np.cumsum(turns)[::2]  # Of each taken segment, in the text.
        numbers = np.arange(spans) % self.special.sentinels
        sentinels = (self.special.first_sentinel - numbers).astype(np.int32)
        marked = tokens.copy()
        marked[begins] = sentinels
        stays = ~is_noise
        stays[begins] = True
        said = np.insert(tokens[is_noise], np.cumsum(taken) - taken, sentinels)
        head = self._heads[int(self.denoiser(draws)[0])]
        return Example(np.concatenate([head, marked[stays]]), np.concatenate([said, self._eos]))


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.floor(x + 0.5).astype(np.int64)


def _segments(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` lengths of 1 or more that sum to `total`, all ways equally likely."""
    if count == 1:
        return np.array([total])
    # The places of the cuts: those of the smallest of as many random numbers as there are places.
    cuts = np.sort(np.argpartition(rng.random(total - 1), count - 2)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
