"""State bytes against cache bytes: what decoding one document keeps, by context."""

from typing import Any

from common.generate.measure import cache_bytes
from recurrentgemma.config import recurrentgemma_2b, recurrentgemma_9b
from recurrentgemma.experiments.config import SpeedConfig
from recurrentgemma.experiments.contenders import ATTENTION, GRIFFIN, Contender, contenders
from recurrentgemma.model import GriffinConfig

MEGABYTE = 1e6


def measure_memory(config: SpeedConfig) -> dict[str, Any]:
    """Bytes for one document, exact: from the shapes of the cache that decoding really uses.

    Returns:
      `contexts`; `bytes` and `formula_bytes`, for each model a number per context; `parameters`;
      and `released_megabytes` of RecurrentGemma-2B and 9B in bfloat16.
    """
    models = contenders(config.model)
    return {
        "contexts": config.contexts,
        "bytes": {
            model.name: [cache_bytes(model.abstract(), n) for n in config.contexts]
            for model in models
        },
        "formula_bytes": {
            model.name: [formula_bytes(model, n) for n in config.contexts] for model in models
        },
        "parameters": {model.name: model.num_parameters() for model in models},
        "released_megabytes": {
            "2b": _released(recurrentgemma_2b().model),
            "9b": _released(recurrentgemma_9b().model),
        },
    }


def formula_bytes(model: Contender, context: int) -> int:
    """What the papers' architecture needs for a document of `context` tokens.

    A recurrent block keeps E fp32 values and the last inputs of its convolution; an attention
    block a key and a value for each token, at most W of them if it has a window.
    """
    config = model.config
    itemsize = 2 if config.dtype == "bfloat16" else 4
    per_token = 2 * config.num_kv_heads * config.head_dim * itemsize
    if not isinstance(config, GriffinConfig):
        return config.num_layers * context * per_token
    recurrent = config.lru_width * (4 + (config.conv_taps - 1) * itemsize)
    slots = min(context, config.window_keys - 1)
    mixers = config.mixers()
    return mixers.count("recurrent") * recurrent + mixers.count("attention") * slots * per_token


def crossover(memory: dict[str, Any]) -> float:
    """Context at which the full-attention cache has the size of Griffin's state."""
    per_token = memory["bytes"][ATTENTION][-1] / memory["contexts"][-1]
    return memory["bytes"][GRIFFIN][-1] / per_token


def _released(config: GriffinConfig) -> float:
    return formula_bytes(Contender(GRIFFIN, config), config.attention_window) / MEGABYTE
