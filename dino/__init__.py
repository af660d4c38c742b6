"""DINOv2: self-supervised vision transformers, their training, features and evaluation."""

from dino.checkpoint import as_backbone, load, save
from dino.config import MODELS, BackboneConfig
from dino.model import Backbone
from dino.pictures import attention_colors, principal_colors
from dino.preparation import Preparation

__all__ = [
    "MODELS",
    "Backbone",
    "BackboneConfig",
    "Preparation",
    "as_backbone",
    "attention_colors",
    "load",
    "principal_colors",
    "save",
]
