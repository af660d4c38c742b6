"""Models that several papers need, and the protocol they share."""

from common.models.decoder import Decoder, DecoderConfig
from common.models.decoder_checkpoint import load as load_decoder
from common.models.decoder_checkpoint import save as save_decoder
from common.models.language_model import CausalLM, DecodeCache, LanguageModel

__all__ = [
    "CausalLM",
    "DecodeCache",
    "Decoder",
    "DecoderConfig",
    "LanguageModel",
    "load_decoder",
    "save_decoder",
]
