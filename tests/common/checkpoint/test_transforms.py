"""Transforms: there and back exactly, and parts read alone equal parts of the whole."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from common.checkpoint.transforms import (
    DEPTHWISE_CONV,
    IDENTITY,
    PLUS_ONE,
    TRANSPOSE,
    Concat,
    FirstRows,
    Reshape,
    Stack,
    Transpose,
    chain,
)

CASES = {
    "identity": (IDENTITY, (4, 6), [(4, 6)]),
    "transpose": (TRANSPOSE, (4, 6), [(6, 4)]),
    "transpose axes": (Transpose((2, 0, 1)), (4, 6, 2), [(6, 2, 4)]),
    "stack": (Stack(), (2, 4, 3), [(4, 3)] * 2),
    "stack last": (Stack(-1), (4, 3, 2), [(4, 3)] * 2),
    "concat": (Concat(1), (4, 6), [(4, 2)] * 3),
    "concat sizes": (Concat(0, (1, 4)), (5, 3), [(1, 3), (4, 3)]),
    "reshape": (Reshape((2, 1, 1, -1)), (2, 6), [(2, 1, 1, 6)]),
    "depthwise": (DEPTHWISE_CONV, (4, 6), [(6, 1, 4)]),
    "stack of transposed": (chain(Stack(), Transpose((0, 2, 1))), (2, 4, 3), [(3, 4)] * 2),
    "heads": (chain(TRANSPOSE, Reshape((6, 8))), (6, 2, 4), [(8, 6)]),
    "three": (chain(Concat(0), TRANSPOSE, TRANSPOSE), (4, 3), [(2, 3)] * 2),
    "reshape then transpose": (chain(Reshape((12,)), TRANSPOSE), (4, 3), [(12,)]),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    transform, shape, source_shapes = CASES[case]
    count = len(source_shapes)
    assert transform.source_shapes(shape, count) == source_shapes
    sources = [
        np.arange(np.prod(s), dtype=np.float32).reshape(s) + 1000 * i
        for i, s in enumerate(source_shapes)
    ]
    target = transform.forward(sources, shape)
    assert target.shape == shape
    assert sorted(target.ravel()) == sorted(np.concatenate([s.ravel() for s in sources]))
    for found, expected in zip(transform.inverse(target, count), sources, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_parts_equal_parts_of_the_whole(case):
    transform, shape, source_shapes = CASES[case]
    sources = [
        np.arange(np.prod(s), dtype=np.float32).reshape(s) + 1000 * i
        for i, s in enumerate(source_shapes)
    ]
    whole = transform.forward(sources, shape)
    halves = [[slice(0, d, 1), slice(d // 2, d, 1), slice(0, d // 2 + 1, 1)] for d in shape]
    for index in itertools.product(*halves):
        reads = transform.reads(index, shape, len(sources))
        if reads is None:
            assert "heads" in case or "reshape" in case
            continue
        part_shape = tuple(s.stop - s.start for s in index)
        arrays = [sources[i][part] for i, part in reads]
        assert sum(a.size for a in arrays) == np.prod(part_shape)  # Nothing is read in vain.
        np.testing.assert_array_equal(transform.forward(arrays, part_shape), whole[index])


def test_the_known_layouts():
    weight = np.arange(6.0).reshape(2, 1, 3)
    np.testing.assert_array_equal(
        DEPTHWISE_CONV.forward([weight], (3, 2)), [[0, 3], [1, 4], [2, 5]]
    )
    gate, up = np.zeros((3, 4)), np.ones((3, 4))
    both = chain(Stack(), Transpose((0, 2, 1))).forward([gate, up], (2, 4, 3))
    assert both[0].max() == 0
    assert both[1].min() == 1


def test_first_rows():
    stored = np.arange(12.0).reshape(6, 2)
    first = FirstRows(6)
    assert first.source_shapes((4, 2), 1) == [(6, 2)]
    np.testing.assert_array_equal(first.forward([stored], (4, 2)), stored[:4])
    [(_, part)] = first.reads((slice(1, 3, 1), slice(0, 2, 1)), (4, 2), 1)
    np.testing.assert_array_equal(first.forward([stored[part]], (2, 2)), stored[1:3])
    (back,) = first.inverse(stored[:4], 1)
    np.testing.assert_array_equal(back, [*stored[:4], [0, 0], [0, 0]])


def test_norm_plus_one_keeps_bfloat16_bits():
    stored = np.random.default_rng(0).normal(size=1000).astype(ml_dtypes.bfloat16)
    kept = PLUS_ONE.forward([stored], (1000,)).astype(np.float32)
    np.testing.assert_allclose(kept, stored.astype(np.float32) + 1)
    (back,) = PLUS_ONE.inverse(kept, 1)
    assert back.astype(ml_dtypes.bfloat16).tobytes() == stored.tobytes()


@pytest.mark.parametrize(
    ("transform", "shape", "count"),
    [
        (IDENTITY, (3,), 2),
        (Stack(), (3, 2), 2),
        (Stack(2), (3, 2), 2),
        (Concat(), (3,), 2),
        (Concat(0, (1, 1)), (3,), 2),
        (Concat(), (), 1),
        (Reshape((2, -1)), (3,), 1),
        (Reshape((4,)), (3,), 1),
        (Transpose((1, 0)), (3,), 1),
        (DEPTHWISE_CONV, (3,), 1),
        (FirstRows(4), (5, 2), 1),
        (chain(TRANSPOSE, DEPTHWISE_CONV), (3,), 1),
    ],
)
def test_impossible_targets_are_refused(transform, shape, count):
    with pytest.raises(ValueError, match=r"cannot give|takes one|gives 2"):
        transform.source_shapes(shape, count)
