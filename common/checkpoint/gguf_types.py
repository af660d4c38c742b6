"""How .gguf files store weights: plain numbers, or blocks of a few bits a weight with scales.

A block type lays out `block` weights in a fixed number of bytes, given here as a numpy record.
`d` is always the block's scale and `m` (or `dmin`) what is added (or, scaled, subtracted). The
types whose name ends in _K have blocks of 256 weights in groups with scales of their own.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

# The 16 levels of the IQ4 types.
_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_FLOAT = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class GGUFType:
    """One way to store weights.

    Attributes:
      name: as llama.cpp calls it.
      block: how many weights lie in a block; 1 for plain numbers.
      layout: dtype of a block's bytes.
      dtype: dtype of the weights that are read.
      unpack: records `[n]` -> weights float32 `[n, block]`; None for plain numbers.
    """

    name: str
    block: int
    layout: np.dtype
    dtype: np.dtype
    unpack: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def num_bytes(self) -> int:
        return self.layout.itemsize

    @property
    def is_quantised(self) -> bool:
        return self.unpack is not None

    def dequantise(self, blocks: np.ndarray) -> np.ndarray:
        """Returns the weights of records `[n]`, float32 `[n, block]`."""
        assert self.unpack is not None
        # Scales of a damaged file may be infinite; that is no reason to warn about.
        with np.errstate(invalid="ignore", over="ignore"):
            return self.unpack(blocks)


def gguf_type(number: int) -> GGUFType:
    """Returns the type that a file calls `number`; KeyError that says which are read here."""
    if number in _TYPES:
        return _TYPES[number]
    name = _NOT_READ.get(number)
    what = f"type {name}" if name else f"the unknown type {number}"
    known = ", ".join(stored.name for stored in _TYPES.values())
    raise KeyError(f"{what}, which is not read here; quantise the model to one of {known}")


# Bits and scales.


def _scale(blocks: np.ndarray, field: str = "d") -> np.ndarray:
    """Returns a float16 field as float32 `[n, 1]`."""
    return blocks[field].astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """`[..., k]` bytes -> `[..., 2, k]`: the low halves, then the high halves."""
    return np.stack([packed & 15, packed >> 4], axis=-2)


def _bits(words: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """`[..., k]` -> `[..., len(shifts), k]`: the bits under `mask` after each shift."""
    places = np.array(shifts, words.dtype)[:, None]
    return (words[..., None, :] >> places) & words.dtype.type(mask)


def _fifth_bit(blocks: np.ndarray) -> np.ndarray:
    """The 32 high bits of a Q5 block at their place: `[n, 32]` of 0 or 16."""
    return np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4


def _grouped(values: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """`values [n, g, k] * scale [n, g] - offset [n, g]` as float32 `[n, g * k]`."""
    weights = scale[..., None] * values
    if offset is not None:
        weights -= offset[..., None]
    return weights.reshape(len(values), -1)


# Blocks of 32.


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks["qs"]).reshape(-1, 32).view(np.int8) - np.int8(8)
    return _scale(blocks) * q


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks) * _nibbles(blocks["qs"]).reshape(-1, 32) + _scale(blocks, "m")


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks["qs"]).reshape(-1, 32) | _fifth_bit(blocks)
    return _scale(blocks) * (q.view(np.int8) - np.int8(16))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks["qs"]).reshape(-1, 32) | _fifth_bit(blocks)
    return _scale(blocks) * q + _scale(blocks, "m")


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks) * blocks["qs"]


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks) * _LEVELS[_nibbles(blocks["qs"]).reshape(-1, 32)]


# Blocks of 256, in groups of 32 or 16.


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits from 12 bytes: two `[n, 8]` of uint8."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = [low & 63, (high & 15) | (low >> 6 << 4)]
    minima = [middle & 63, (high >> 4) | (middle >> 6 << 4)]
    return np.concatenate(scales, axis=1), np.concatenate(minima, axis=1)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    q = _bits(blocks["qs"].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    scale = _scale(blocks) * (blocks["scales"] & 15)
    return _grouped(q, scale, _scale(blocks, "dmin") * (blocks["scales"] >> 4))


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks["scales"]
    low = _nibbles(packed[:, :8]).reshape(-1, 16)
    high = _bits(packed[:, 8:], (0, 2, 4, 6), 3).reshape(-1, 16)
    scale = (low | (high << 4)).view(np.int8) - np.int8(32)
    q = _bits(blocks["qs"].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16).view(np.int8)
    # A high bit that is not set takes 4 away.
    third = _bits(blocks["hmask"], tuple(range(8)), 1).reshape(-1, 16, 16).view(np.int8)
    return _grouped(q - ((third ^ 1) << 2), _scale(blocks) * scale)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _six_bit_pairs(blocks["scales"])
    q = _nibbles(blocks["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _grouped(q, _scale(blocks) * scales, _scale(blocks, "dmin") * minima)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _six_bit_pairs(blocks["scales"])
    low = _nibbles(blocks["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    q = low | (_bits(blocks["qh"], tuple(range(8)), 1) << 4)
    return _grouped(q, _scale(blocks) * scales, _scale(blocks, "dmin") * minima)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks["ql"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = _bits(blocks["qh"].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    q = (low | (high << 4)).reshape(-1, 16, 16).view(np.int8) - np.int8(32)
    return _grouped(q, _scale(blocks) * blocks["scales"])


def _q8_k(blocks: np.ndarray) -> np.ndarray:
    return blocks["d"][:, None] * blocks["qs"]


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks["scales_l"]).swapaxes(1, 2).reshape(-1, 8)
    high = _bits(blocks["scales_h"][:, None], tuple(range(0, 16, 2)), 3).reshape(-1, 8)
    scale = (low | (high.astype(np.uint8) << 4)).view(np.int8) - np.int8(32)
    q = _nibbles(blocks["qs"].reshape(-1, 8, 16)).reshape(-1, 8, 32)
    return _grouped(_LEVELS[q], _scale(blocks) * scale)


def _plain(name: str, dtype: str | type) -> GGUFType:
    return GGUFType(name, 1, np.dtype(dtype), np.dtype(dtype))


def _blocks(name: str, block: int, unpack: Callable, *fields: tuple) -> GGUFType:
    return GGUFType(name, block, np.dtype(list(fields)), _FLOAT, unpack)


def _bytes(name: str, count: int) -> tuple[str, str, tuple[int]]:
    return (name, "u1", (count,))


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")
_TYPES = {
    0: _plain("F32", "<f4"),
    1: _plain("F16", "<f2"),
    2: _blocks("Q4_0", 32, _q4_0, _D, _bytes("qs", 16)),
    3: _blocks("Q4_1", 32, _q4_1, _D, _M, _bytes("qs", 16)),
    6: _blocks("Q5_0", 32, _q5_0, _D, _bytes("qh", 4), _bytes("qs", 16)),
    7: _blocks("Q5_1", 32, _q5_1, _D, _M, _bytes("qh", 4), _bytes("qs", 16)),
    8: _blocks("Q8_0", 32, _q8_0, _D, ("qs", "i1", (32,))),
    10: _blocks("Q2_K", 256, _q2_k, _bytes("scales", 16), _bytes("qs", 64), _D, _DMIN),
    11: _blocks(
        "Q3_K", 256, _q3_k, _bytes("hmask", 32), _bytes("qs", 64), _bytes("scales", 12), _D
    ),
    12: _blocks("Q4_K", 256, _q4_k, _D, _DMIN, _bytes("scales", 12), _bytes("qs", 128)),
    13: _blocks(
        "Q5_K", 256, _q5_k, _D, _DMIN, _bytes("scales", 12), _bytes("qh", 32), _bytes("qs", 128)
    ),
    14: _blocks(
        "Q6_K", 256, _q6_k, _bytes("ql", 128), _bytes("qh", 64), ("scales", "i1", (16,)), _D
    ),
    15: _blocks("Q8_K", 256, _q8_k, ("d", "<f4"), ("qs", "i1", (256,)), ("sums", "<i2", (16,))),
    20: _blocks("IQ4_NL", 32, _iq4_nl, _D, _bytes("qs", 16)),
    23: _blocks(
        "IQ4_XS", 256, _iq4_xs, _D, ("scales_h", "<u2"), _bytes("scales_l", 4), _bytes("qs", 128)
    ),
    24: _plain("I8", "i1"),
    25: _plain("I16", "<i2"),
    26: _plain("I32", "<i4"),
    27: _plain("I64", "<i8"),
    28: _plain("F64", "<f8"),
    30: _plain("BF16", ml_dtypes.bfloat16),
}
_NOT_READ = {
    9: "Q8_1",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
