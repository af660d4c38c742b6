"""DINOv2: self-supervised vision transformers, their training, features and evaluation."""

from dino.checkpoint import as_backbone, load, save
from dino.config import MODELS, BackboneConfig
from dino.model import Backbone

__all__ = ["MODELS", "Backbone", "BackboneConfig", "as_backbone", "load", "save"]
