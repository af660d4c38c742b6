"""Encoder-decoder examples packed into rows: two lengths to fill, segments on both sides.

Without packing most of the decoder's work on UL2's short targets would be padding (section 7.21).
The plan is made once, from sizes alone; a row then makes its own examples, so that rows can be read
in any order and by any process.
"""

import numpy as np

from common.data.rows import Batch, Rows
from common.errors import UserError
from t5gemma.examples import Example, Examples

OPEN_ROWS = 64


class PackedExamples(Rows):
    """Rows of `encoder_length` and `decoder_length` positions, each example in exactly one.

    A row holds `encoder_tokens`, `encoder_positions`, `encoder_segments` [S], `decoder_tokens`,
    `decoder_positions`, `decoder_segments`, `targets` [T], all int32, and `weights` [T] float32.
    Examples of a row are segments 1, 2, … on both sides, positions count from 0 in each, and
    padding is segment 0 at the end.

    Args:
      examples: what to pack.
      encoder_length: S.
      decoder_length: T.
      start_id: what the decoder reads first in every example.
      pad_id: fills rows.

    Attributes:
      examples: how many there are.
      efficiency: share of the positions of either side that hold a token.

    Raises:
      UserError: an example does not fit a row.
    """

    def __init__(
        self,
        examples: Examples,
        encoder_length: int,
        decoder_length: int,
        *,
        start_id: int,
        pad_id: int = 0,
    ):
        self._examples, self.examples = examples, len(examples)
        self.encoder_length, self.decoder_length = encoder_length, decoder_length
        self._start_id, self._pad_id = start_id, pad_id
        encoder, decoder = examples.sizes()
        _check_sizes(encoder, decoder, encoder_length, decoder_length)
        rows = pack(encoder, decoder, encoder_length, decoder_length)
        self._members = np.argsort(rows, kind="stable")
        self._first = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        self.efficiency = (
            float(encoder.sum() / (len(self) * encoder_length)),
            float(decoder.sum() / (len(self) * decoder_length)),
        )

    def __len__(self) -> int:
        return len(self._first) - 1

    def members(self, index: int) -> np.ndarray:
        """Numbers of the examples in row `index`, in the order of their segments."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._members[self._first[index] : self._first[index + 1]]

    def __getitem__(self, index: int) -> Batch:
        examples = [self._examples[int(number)] for number in self.members(index)]
        return pack_row(
            examples,
            self.encoder_length,
            self.decoder_length,
            start_id=self._start_id,
            pad_id=self._pad_id,
        )


def pack_row(
    examples: list[Example], encoder_length: int, decoder_length: int, *, start_id: int, pad_id: int
) -> Batch:
    """One row of these examples, which together fit it; see `PackedExamples`."""
    encoder = [example.encoder for example in examples]
    targets = [example.targets for example in examples]
    shifted = [np.concatenate([[start_id], target[:-1]]) for target in targets]
    return {
        "encoder_tokens": _joined(encoder, encoder_length, pad_id),
        "encoder_positions": _positions(encoder, encoder_length),
        "encoder_segments": _numbers(encoder, encoder_length),
        "decoder_tokens": _joined(shifted, decoder_length, pad_id),
        "decoder_positions": _positions(targets, decoder_length),
        "decoder_segments": (segments := _numbers(targets, decoder_length)),
        "targets": _joined(targets, decoder_length, pad_id),
        "weights": (segments > 0).astype(np.float32),
    }


def pack(
    encoder: np.ndarray, decoder: np.ndarray, encoder_length: int, decoder_length: int
) -> np.ndarray:
    """A row for each example: the fullest of the open rows that has room on both sides.

    At most `OPEN_ROWS` rows are open; where an example fits none, the fullest is closed.

    Args:
      encoder, decoder: sizes of the examples, int64 [N] each, from 1 on.
      encoder_length, decoder_length: of a row.

    Returns:
      Row numbers, int64 [N]; rows are numbered without gaps.
    """
    rows = np.empty(len(encoder), np.int64)
    # Nothing else fits beside these, so that they need no search.
    alone = (encoder + encoder.min(initial=0) > encoder_length) | (
        decoder + decoder.min(initial=0) > decoder_length
    )
    rows[alone] = np.arange(np.count_nonzero(alone))
    opened = int(np.count_nonzero(alone))
    capacity = np.array([encoder_length, decoder_length])
    room = np.zeros((OPEN_ROWS, 2), np.int64)
    number = np.zeros(OPEN_ROWS, np.int64)
    others = np.flatnonzero(~alone)
    for index, size in zip(others.tolist(), np.stack([encoder, decoder], axis=1)[others]):
        left = room - size
        # Both sides count by the share of a row that stays empty.
        unused = np.where((left >= 0).all(axis=1), (left / capacity).sum(axis=1), np.inf)
        place = int(unused.argmin())
        if unused[place] == np.inf:
            place = int((room / capacity).sum(axis=1).argmin())
            room[place], number[place] = capacity, opened
            opened += 1
        room[place] -= size
        rows[index] = number[place]
    return rows


def _check_sizes(encoder: np.ndarray, decoder: np.ndarray, most_e: int, most_d: int) -> None:
    if not len(encoder):
        raise UserError("there are no examples to pack")
    if min(encoder.min(), decoder.min()) < 1:
        raise ValueError("an example must have a token on both sides")
    too_long = np.flatnonzero((encoder > most_e) | (decoder > most_d))
    if len(too_long):
        worst = int(too_long[0])
        raise UserError(
            f"example {worst} has {encoder[worst]} tokens for the encoder and {decoder[worst]} for "
            f"the decoder, but a row has room for {most_e} and {most_d}"
        )


def _joined(parts: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    row = np.full(length, fill, np.int32)
    joined = np.concatenate(parts)
    row[: len(joined)] = joined
    return row


def _positions(parts: list[np.ndarray], length: int) -> np.ndarray:
    return _joined([np.arange(len(part)) for part in parts], length, 0)


def _numbers(parts: list[np.ndarray], length: int) -> np.ndarray:
    numbers = np.arange(1, len(parts) + 1)
    return _joined([np.repeat(numbers, [len(part) for part in parts])], length, 0)
