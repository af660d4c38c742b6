"""The transformers library's side of the T5Gemma benchmark."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.peers.contender import Run, Setting
from benchmarks.peers.torch_step import torch_step, use_all_cores


class Transformers:
    """See `Contender`. Its attention is "eager": the only one with a cap, beside a GPU's."""

    compile_seconds = 0.0

    def __init__(self, folder: Path, *, beams: int):
        use_all_cores()
        self._model = transformers.T5GemmaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._model.generation_config.eos_token_id = None  # All texts of the same length.
        self._beams = beams
        self.vocab_size = self._model.config.vocab_size

    def describe(self) -> str:
        return (
            f"{transformers.__version__} with torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads; its `generate`, and for decoding alone its "
            "forward pass in a loop; bf16 training by autocast, fused AdamW"
        )

    def last_logits(self, tokens: np.ndarray) -> np.ndarray:
        half = tokens.shape[1] // 2
        sides = (torch.tensor(part) for part in (tokens[:, :half], tokens[:, half:-1]))
        with torch.inference_mode():
            return _forward(self._model, *sides).logits[:, -1].numpy()

    def prepare(self, setting: Setting, tokens: np.ndarray) -> Run:
        rows = torch.tensor(tokens.astype(np.int64))
        if setting.task == "train":
            half = rows.shape[1] // 2
            return torch_step(
                copy.deepcopy(self._model),
                lambda model: _forward(model, rows[:, :half], rows[:, half:-1]).logits,
                rows[:, half + 1 :],
                setting.dtype,
            )
        model = copy.deepcopy(self._model).to(getattr(torch, setting.dtype))
        read = rows[:, :-1]
        mask = torch.ones_like(read)
        if setting.task == "encode":
            return _timed(lambda: model.get_encoder()(read, attention_mask=mask))
        if setting.task == "decode":
            return _decoding(model, read, mask, setting.new_tokens)
        new = 1 if setting.task == "first token" else setting.new_tokens
        beams = self._beams if setting.task == "beam search" else 1
        return _timed(
            lambda: model.generate(
                read, attention_mask=mask, max_new_tokens=new, do_sample=False, num_beams=beams
            )
        )

    def close(self) -> None:
        del self._model


def _forward(model: Any, read: torch.Tensor, written: torch.Tensor) -> Any:
    return model(
        read, attention_mask=torch.ones_like(read), decoder_input_ids=written, use_cache=False
    )


def _decoding(model: Any, read: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> Run:
    """The tokens behind the first, the encoder's states and their keys being there."""

    @torch.inference_mode()
    def run() -> float:
        states = BaseModelOutput(model.get_encoder()(read, attention_mask=mask).last_hidden_state)
        cache = transformers.EncoderDecoderCache(
            transformers.DynamicCache(config=model.config.decoder), transformers.DynamicCache()
        )

        def step(token: torch.Tensor) -> torch.Tensor:
            out = model(
                attention_mask=mask,
                encoder_outputs=states,
                decoder_input_ids=token,
                past_key_values=cache,
                use_cache=True,
            )
            return out.logits[:, -1:].argmax(-1)

        token = step(torch.full((len(read), 1), 2))
        start = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = step(token)
        return time.perf_counter() - start

    return run


def _timed(run: Callable[[], Any]) -> Run:
    @torch.inference_mode()
    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed
