"""RecurrentGemma and Griffin: linear recurrence, local attention, a state of fixed size."""

from common.data.chat import chat_prompt, chat_tokens
from recurrentgemma.checkpoint import load, save
from recurrentgemma.model import GRIFFIN_PATTERN, HAWK_PATTERN, Griffin, GriffinConfig

__all__ = [
    "GRIFFIN_PATTERN",
    "HAWK_PATTERN",
    "Griffin",
    "GriffinConfig",
    "chat_prompt",
    "chat_tokens",
    "load",
    "save",
]
