"""T5Gemma: decoder-only language models adapted into encoder-decoders."""

from t5gemma.checkpoint import load, save
from t5gemma.config import T5GemmaConfig
from t5gemma.model import T5Gemma

__all__ = ["T5Gemma", "T5GemmaConfig", "load", "save"]
