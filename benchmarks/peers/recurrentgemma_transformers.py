"""The transformers library's side of the RecurrentGemma benchmark."""

import copy
import os
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.peers.contender import Run, Setting


class Transformers:
    """See `Contender`. Runs as `generate` does: its cache, one forward a token, greedy."""

    compile_seconds = 0.0

    def __init__(self, folder: Path):
        torch.set_num_threads(os.cpu_count() or 1)
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
            return self._train(setting, rows)
        model = copy.deepcopy(self._model).to(getattr(torch, setting.dtype))
        if setting.task == "prefill":
            return lambda: _prefill(model, rows[:, :-1])[2]
        return lambda: _decode(model, rows[:, :-1], setting.new_tokens)

    def close(self) -> None:
        del self._model

    def _train(self, setting: Setting, rows: torch.Tensor) -> Run:
        model = copy.deepcopy(self._model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        mixed = setting.dtype == "bfloat16"

        def run() -> float:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                logits = model(rows[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), rows[:, 1:].flatten()
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - start

        return run


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
