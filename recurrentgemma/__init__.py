"""RecurrentGemma and Griffin: linear recurrences with local attention, decoding in a fixed-size state."""

from recurrentgemma.chat import chat_prompt
from recurrentgemma.checkpoint import load, save
from recurrentgemma.model import GRIFFIN_PATTERN, HAWK_PATTERN, Griffin, GriffinConfig

__all__ = [
    "GRIFFIN_PATTERN",
    "HAWK_PATTERN",
    "Griffin",
    "GriffinConfig",
    "chat_prompt",
    "load",
    "save",
]
