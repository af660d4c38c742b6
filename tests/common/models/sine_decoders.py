"""Small checkpoints of every family whose weights are sines: the same numbers everywhere.

The n-th tensor by name holds `a sin(0.37 j + n)` at flat index j, computed in float64, with a = 0.3
for matrices and 0.2 for vectors, to which Llama's norms add 1.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import LazyTensor, write_safetensors
from common.models.decoder_huggingface import config_from_huggingface, huggingface_rows

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
ROPE3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA2 = {
    **SHAPE,
    "model_type": "gemma2",
    "num_hidden_layers": 5,
    "sliding_window": 4,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {
    **SHAPE,
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    # A shorter pattern than the released one compiles faster.
    "layer_types": [("full" if n % 3 == 2 else "sliding") + "_attention" for n in range(7)],
    "sliding_window": 4,
    "query_pre_attn_scalar": 5,
    "rope_parameters": ROPE3,
}
LLAMA = {**SHAPE, "model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": False}
QWEN2 = {
    **SHAPE,
    "model_type": "qwen2",
    "head_dim": 6,
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
FAMILIES = {"gemma2": GEMMA2, "gemma3": GEMMA3, "llama": LLAMA, "qwen2": QWEN2}


def shapes(data: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a config.json, as the transformers library has them."""
    config = config_from_huggingface(data, "config.json")
    d, f, h = config.width, config.mlp_width, config.head_dim
    projections = {"q": config.num_heads * h, "k": config.num_kv_heads * h}
    projections["v"] = projections["k"]

    def shape(name: str) -> tuple[int, ...]:
        part, kind = name.split(".")[-2:]
        if part in ("embed_tokens", "lm_head"):
            return (config.vocab_size, d)
        if part in ("q_norm", "k_norm"):
            return (h,)
        if part in ("gate_proj", "up_proj"):
            return (f, d)
        if part == "down_proj":
            return (d, f)
        if part == "o_proj":
            return (d, projections["q"])
        if part.endswith("_proj"):
            rows = projections[part[0]]
            return (rows,) if kind == "bias" else (rows, d)
        return (d,)

    names = {name for row in huggingface_rows(config) for name in row.parts}
    return {str(name): shape(str(name)) for name in names}


def tensors(data: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a config.json."""
    result = {}
    for n, (name, shape) in enumerate(sorted(shapes(data).items())):
        wave = np.sin(0.37 * np.arange(np.prod(shape)) + n).reshape(shape)
        if len(shape) > 1:
            wave = 0.3 * wave
        else:
            own = "norm" in name and "gemma" not in data["model_type"]
            wave = 0.2 * wave + (1.0 if own else 0.0)
        result[name] = wave.astype(np.float32)
    return result


def write(folder: Path, data: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> Path:
    """Writes a Hugging Face folder of `data` with these weights, or its sines."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors(data) if weights is None else weights
    lazy = {n: LazyTensor(w.shape, w.dtype, lambda w=w: w) for n, w in weights.items()}
    write_safetensors(folder, lazy)
    (folder / "config.json").write_text(json.dumps(data))
    return folder
