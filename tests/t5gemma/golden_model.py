"""The appendix's tiny model and its filling (specification, appendix B)."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.checkpoint import load_tensors
from common.checkpoint.reader import ArrayTensors
from common.models.decoder import GEMMA2_PATTERN, DecoderConfig
from t5gemma.convert import huggingface_rows
from t5gemma.model import T5Gemma, T5GemmaConfig

ENCODER = DecoderConfig(
    vocab_size=40,
    width=32,
    mlp_width=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_layers=2,
    pattern=GEMMA2_PATTERN,
    window=64,
    attention_softcap=50.0,
    post_norms=True,
    bfloat16_scale=False,
    logits_softcap=30.0,
)
CONFIG = T5GemmaConfig(ENCODER, dataclasses.replace(ENCODER, width=24, mlp_width=40, head_dim=8))
ENCODER_TOKENS = jnp.array(
    [[2, 5, 9, 13, 17, 21, 25, 29, 33, 37], [2, 7, 11, 4, 8, 12, 3, 0, 0, 0]], jnp.int32
)
DECODER_TOKENS = jnp.array([[2, 6, 10, 14, 18, 22], [2, 30, 31, 32, 33, 34]], jnp.int32)


def shapes(config: T5GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face format, [out, in] as torch has it."""
    found: dict[str, tuple[int, ...]] = {}
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        d, f = stack.width, stack.mlp_width
        q, kv = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
        found[f"model.{side}.embed_tokens.weight"] = (stack.vocab_size, d)
        found[f"model.{side}.norm.weight"] = (d,)
        for i in range(stack.num_layers):
            layer = f"model.{side}.layers.{i}"
            norms = ["self_attn", "feedforward"]
            inward = {"self_attn": d}
            if side == "decoder":
                norms.append("cross_attn")
                inward["cross_attn"] = config.encoder.width
            for norm in norms:
                for place in ("pre", "post"):
                    found[f"{layer}.{place}_{norm}_layernorm.weight"] = (d,)
            for name, width in inward.items():
                found[f"{layer}.{name}.q_proj.weight"] = (q, d)
                found[f"{layer}.{name}.k_proj.weight"] = (kv, width)
                found[f"{layer}.{name}.v_proj.weight"] = (kv, width)
                found[f"{layer}.{name}.o_proj.weight"] = (d, q)
            found[f"{layer}.mlp.gate_proj.weight"] = (f, d)
            found[f"{layer}.mlp.up_proj.weight"] = (f, d)
            found[f"{layer}.mlp.down_proj.weight"] = (d, f)
    return found


def tensors(config: T5GemmaConfig) -> dict[str, np.ndarray]:
    """The appendix's filling: tensor n of the sorted names is a sin(.37 j + n)."""
    filled = {}
    for n, (name, shape) in enumerate(sorted(shapes(config).items())):
        scale = 0.3 if len(shape) > 1 else 0.2
        flat = scale * np.sin(0.37 * np.arange(np.prod(shape)) + n)
        filled[name] = flat.astype(np.float32).reshape(shape)
    return filled


def build(config: T5GemmaConfig, values: dict[str, np.ndarray]) -> T5Gemma:
    """A model filled through the key map of the Hugging Face format."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0))))
    reader = ArrayTensors(Path("appendix"), values)
    params = load_tensors(reader, huggingface_rows(config), nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def golden(window: int = 64, encoder_window: str = "published", stressed: bool = False) -> T5Gemma:
    """The model of cases (a), (b: W = 4), (c: W = 4, transformers) and (d: stressed)."""
    config = dataclasses.replace(CONFIG.with_stacks(window=window), encoder_window=encoder_window)
    values = tensors(config)
    if stressed:
        for name in values:
            values[name] = values[name] * (40 if name.endswith("q_proj.weight") else 1)
        values["model.decoder.embed_tokens.weight"] *= 5
    return build(config, values)


def randomised(config: T5GemmaConfig, seed: int = 0) -> T5Gemma:
    """A model all of whose parameters are random, norms too."""
    graphdef, state = nnx.split(T5Gemma(config, rngs=nnx.Rngs(seed)))
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, noisy))
