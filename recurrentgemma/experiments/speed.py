"""Decode and prefill time as the context grows."""

from typing import Any

import jax

from common.generate.measure import Reader, Writer, median_seconds
from recurrentgemma.experiments.config import SpeedConfig
from recurrentgemma.experiments.contenders import contenders


def measure_speed(config: SpeedConfig, seed: int) -> dict[str, Any]:
    """Times untrained models, all of them in turns.

    Returns:
      `contexts` and `decode_seconds` per token (of all rows of the batch), `prompts` and
      `prefill_seconds` per prompt, each a list for each model, and the `device`.
    """
    models = {c.name: c.filled(seed) for c in contenders(config.model)}
    print(f"timing decoding at contexts {config.contexts}", flush=True)
    writers = {
        name: Writer(model, config.batch_size, config.decode_steps)
        for name, model in models.items()
    }
    decode = median_seconds(
        {(name, n): w.at(n) for name, w in writers.items() for n in config.contexts},
        repeats=config.repeats,
    )
    del writers
    print(f"timing prompts of {config.prompts} tokens", flush=True)
    readers = {name: Reader(model) for name, model in models.items()}
    prefill = median_seconds(
        {(name, n): r.at(n) for name, r in readers.items() for n in config.prompts},
        repeats=config.repeats,
    )
    return {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "contexts": config.contexts,
        "decode_seconds": {
            name: [decode[name, n] / config.decode_steps for n in config.contexts]
            for name in models
        },
        "prompts": config.prompts,
        "prefill_seconds": {name: [prefill[name, n] for n in config.prompts] for name in models},
    }
