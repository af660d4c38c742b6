"""Kernels: one public function each, an oracle, and the fastest forms per platform."""

from common.kernels.attention import attention
from common.kernels.linear_scan import linear_scan

__all__ = ["attention", "linear_scan"]
