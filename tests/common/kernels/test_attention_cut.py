"""Which tiles a cut visits, against all pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.kernels.attention.cut import ACTIVE, FIRST, LAST, WHOLE, Cut, visits
from common.kernels.attention.options import Options

BOUNDS = [(None, None), (None, 0), (0, 0), (9, 0), (5, 7), (30, None), (None, 6), (100, 3)]
SIZES = [(32, 32), (20, 45), (45, 20), (1, 40)]
# Query 0 at the end, before, and in the midst of the keys.
OFFSETS = [None, -7, 4]


def cases():
    for (before, after), (queries, keys), offset in itertools.product(BOUNDS, SIZES, OFFSETS):
        options = Options(1.0, None, before, after)
        yield Cut(options, 8, 16, queries, keys, keys - queries if offset is None else offset)


def tiles(cut):
    """Returns for each tile whether any and whether all of its pairs count."""
    rows, columns = cut.blocks
    position = np.arange(rows * cut.block_q)[:, None] + cut.offset
    key = np.arange(columns * cut.block_k)[None]
    seen = np.broadcast_to(key < cut.keys, (position.size, key.size)).copy()
    if cut.options.before is not None:
        seen &= position - key <= cut.options.before
    if cut.options.after is not None:
        seen &= key - position <= cut.options.after
    cut_up = seen.reshape(rows, cut.block_q, columns, cut.block_k)
    return cut_up.any((1, 3)), cut_up.all((1, 3))


def test_ranges_hold_every_tile_that_counts_and_whole_ones_need_no_mask():
    for cut in cases():
        some, whole = tiles(cut)
        rows, columns = cut.blocks
        for i in range(rows):
            first, end = cut.keys_of(i)
            low, high = cut.whole_keys_of(i)
            assert set(np.flatnonzero(some[i])) <= set(range(first, end)), (cut, i)
            assert first <= low <= high <= end or first >= end
            assert set(range(low, high)) <= set(np.flatnonzero(whole[i])), (cut, i)
            assert [cut.whole(i, j) for j in range(columns)] == whole[i].tolist(), (cut, i)
        for j in range(columns):
            first, end = cut.queries_of(j)
            low, high = cut.whole_queries_of(j)
            assert set(np.flatnonzero(some[:, j])) <= set(range(first, end)), (cut, j)
            # Padded queries may lie in a whole tile: their gradients are zero.
            assert set(range(low, high)) <= set(np.flatnonzero(whole[:, j])), (cut, j)


@pytest.mark.parametrize("by_keys", [False, True])
def test_visits_are_the_tiles_that_count(by_keys):
    for cut in cases():
        some, whole = tiles(cut)
        some, whole = (some.T, whole.T) if by_keys else (some, whole)
        listed = visits(cut, by_keys=by_keys)
        check_visits(listed, some, whole)
        active = listed.flags & ACTIVE > 0
        # Exactly: at most one tile at either end holds padding alone.
        assert active.sum() <= some.sum() + 2 * some.shape[0]
        assert len(active) - active.sum() <= some.shape[0]


@pytest.mark.parametrize("by_keys", [False, True])
def test_visits_from_an_offset_known_only_when_running(by_keys):
    for cut in list(cases())[::5]:
        listed = jax.jit(lambda o, c=cut: visits(c._replace(offset=o), by_keys=by_keys))(
            jnp.int32(cut.offset)
        )
        some, whole = tiles(cut)
        check_visits(
            type(listed)(*(np.asarray(part) for part in listed)),
            some.T if by_keys else some,
            whole.T if by_keys else whole,
        )


def check_visits(listed, some, whole):
    active = listed.flags & ACTIVE > 0
    pairs = list(zip(listed.outer[active].tolist(), listed.inner[active].tolist()))
    assert len(set(pairs)) == len(pairs)
    assert set(zip(*(axis.tolist() for axis in np.nonzero(some)))) <= set(pairs)
    for pair, flag in zip(pairs, listed.flags[active]):
        assert bool(flag & WHOLE) == whole[pair]
    # Each outer block begins and ends once, in order, and nothing is computed outside.
    assert listed.outer[listed.flags & FIRST > 0].tolist() == list(range(some.shape[0]))
    assert listed.outer[listed.flags & LAST > 0].tolist() == list(range(some.shape[0]))
    assert (np.diff(listed.outer) >= 0).all()
    for outer in range(some.shape[0]):
        flags = listed.flags[listed.outer == outer]
        last = int(np.flatnonzero(flags & LAST)[0])
        assert flags[0] & FIRST
        assert not (flags[last + 1 :] & ACTIVE).any()
