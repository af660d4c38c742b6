"""Prefill and decode in one compiled loop, for every language model of the workspace."""

from common.generate.beam import BeamSearch
from common.generate.generate import EncoderDecoder, Generation, generate
from common.generate.sampling import Sampling

__all__ = ["BeamSearch", "EncoderDecoder", "Generation", "Sampling", "generate"]
