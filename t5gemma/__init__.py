"""T5Gemma: decoder-only language models adapted into encoder-decoders."""

import sys
import types
from typing import Any

from t5gemma.adaptation import adapt
from t5gemma.checkpoint import load, save
from t5gemma.config import T5GemmaConfig
from t5gemma.model import T5Gemma

__all__ = ["T5Gemma", "T5GemmaConfig", "adapt", "load", "save"]


class _Package(types.ModuleType):
    """Keeps `t5gemma.adapt` the function: importing the launcher of that name would replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "adapt" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
