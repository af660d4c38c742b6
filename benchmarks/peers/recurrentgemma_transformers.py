"""The transformers library's side of the RecurrentGemma benchmark."""

import copy
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.peers.contender import Run, Setting
from benchmarks.peers.torch_step import torch_step, use_all_cores


class Transformers:
    """See `Contender`. Runs as `generate` does: its cache, one forward a token, greedy."""

    compile_seconds = 0.0

    def __init__(self, folder: Path):
        use_all_cores()
        self._model = transformers.RecurrentGemmaForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.vocab_size = self._model.config.vocab_size

    def describe(self) -> str:
        return (
            f"{transformers.__version__} with torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads; bf16 training by autocast, fused AdamW"
        )

    def last_logits(self, tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rows = torch.tensor(tokens[:, :-1])
            return self._model(rows, use_cache=False, logits_to_keep=1).logits[:, 0].numpy()

    def prepare(self, setting: Setting, tokens: np.ndarray) -> Run:
        rows = torch.tensor(tokens.astype(np.int64))
        if setting.task == "train":
            return torch_step(
                copy.deepcopy(self._model),
                lambda model: model(rows[:, :-1], use_cache=False).logits,
                rows[:, 1:],
                setting.dtype,
            )
        model = copy.deepcopy(self._model).to(getattr(torch, setting.dtype))
        if setting.task == "prefill":
            return lambda: _prefill(model, rows[:, :-1])[2]
        return lambda: _decode(model, rows[:, :-1], setting.new_tokens)

    def close(self) -> None:
        del self._model


@torch.inference_mode()
def _prefill(model, rows: torch.Tensor) -> tuple[torch.Tensor, transformers.Cache, float]:
    start = time.perf_counter()
    cache = transformers.DynamicCache(config=model.config)
    out = model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), cache, time.perf_counter() - start


@torch.inference_mode()
def _decode(model, rows: torch.Tensor, new_tokens: int) -> float:
    token, cache, _ = _prefill(model, rows)
    start = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
    return time.perf_counter() - start
