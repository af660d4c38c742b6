"""Kernels: one public function each, an oracle, and the fastest forms per platform."""

from common.kernels.attention import attention
from common.kernels.decode_attention import decode_attention
from common.kernels.linear_scan import linear_scan
from common.kernels.nearest_centroid import nearest_centroid
from common.kernels.rg_lru import rg_lru

__all__ = ["attention", "decode_attention", "linear_scan", "nearest_centroid", "rg_lru"]
