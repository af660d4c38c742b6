"""Prefill and decode in one compiled loop, for every language model of the workspace."""

from common.generate.generate import Generation, generate
from common.generate.sampling import Sampling

__all__ = ["Generation", "Sampling", "generate"]
