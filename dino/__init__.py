"""DINOv2: self-supervised vision transformers, their training, features and evaluation."""
