"""T5Gemma: decoder-only language models adapted into encoder-decoders."""
