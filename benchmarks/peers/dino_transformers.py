"""The transformers library's side of the DINOv2 benchmark: features."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.peers.contender import Run
from benchmarks.peers.dino_workload import Setting
from benchmarks.peers.torch_step import use_all_cores


class Transformers:
    """`Dinov2Model` and `Dinov2WithRegistersModel` as they are loaded; attention is torch's own."""

    def __init__(self) -> None:
        use_all_cores()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def describe(self) -> str:
        return (
            f"{transformers.__version__} with torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, `scaled_dot_product_attention`"
        )

    def features(self, setting: Setting, folder: Path, images: np.ndarray) -> np.ndarray:
        """`[B, T, D]` fp32: all tokens of the last block behind the final norm."""
        with torch.inference_mode():
            found = self._model(setting, folder)(self._placed(setting, images))
        return found.last_hidden_state.float().cpu().numpy()

    def prepare_features(self, setting: Setting, folder: Path, images: np.ndarray) -> Run:
        """One repeat: features of the images, which lie on the device in the compute dtype."""
        model, placed = self._model(setting, folder), self._placed(setting, images)

        @torch.inference_mode()
        def run() -> float:
            start = time.perf_counter()
            model(placed)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return run

    def _model(self, setting: Setting, folder: Path) -> Any:
        model = transformers.AutoModel.from_pretrained(
            folder, dtype=getattr(torch, setting.dtype), attn_implementation="sdpa"
        )
        return model.eval().to(self._device)

    def _placed(self, setting: Setting, images: np.ndarray) -> torch.Tensor:
        rows = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        return rows.to(self._device, getattr(torch, setting.dtype))
