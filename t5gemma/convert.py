"""T5Gemma's checkpoints: key maps and configurations of the public formats, both ways.

A checkpoint's layer l is block `l mod p` of unit `l div p` here, p being the length of the stack's
pattern; a stacked leaf is filled one unit at a time. Specification, 4.2.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from common.checkpoint import (
    IDENTITY,
    TRANSPOSE,
    FirstRows,
    Piece,
    Reshape,
    Row,
    Stack,
    TensorReader,
    Transpose,
    chain,
)
from common.errors import UserError
from common.models.decoder import GEMMA2_PATTERN, DecoderConfig, Reach
from t5gemma.config import EncoderWindow, T5GemmaConfig

HEAD = "lm_head.out_proj.weight"
TABLE = "model.decoder.embed_tokens.weight"
# Files may state any number; these are far beyond every model and still cheap to describe.
MOST_LAYERS = 10_000
LARGEST = 100_000_000
# Rows of the table that are compared at a time with those of a head that should be the same.
_COMPARED = 16_384
_REACHES: Mapping[str, Reach] = {"sliding_attention": "local", "full_attention": "global"}
_LAYER_TYPES = {reach: name for name, reach in _REACHES.items()}
# What marks an export whose encoder's window is stated as transformers 5 reads it.
_WINDOW_KEY = "encoder_window"
_NORMS = {
    "pre_self_attn_layernorm": "attention_norm",
    "post_self_attn_layernorm": "attention_post_norm",
    "pre_cross_attn_layernorm": "cross_norm",
    "post_cross_attn_layernorm": "cross_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def blocks_of(config: DecoderConfig) -> Iterator[tuple[int, str, int | None]]:
    """Yields each layer's number, its block's path in a stack, and its index there, if any."""
    size = len(config.pattern)
    stacked = config.num_layers // size * size
    for layer in range(config.num_layers):
        if layer < stacked:
            yield layer, f"units.blocks.{layer % size}", layer // size
        else:
            yield layer, f"rest.blocks.{layer - stacked}", None


def huggingface_rows(config: T5GemmaConfig) -> list[Row]:
    """Key map of `T5GemmaForConditionalGeneration`."""
    rows = []
    both = chain(Stack(0), Transpose((2, 0, 1)))  # two [F, D] -> [D, 2, F]
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        rows.append(Row(f"model.{side}.embed_tokens.weight", f"{side}.embed.table"))
        rows.append(Row(f"model.{side}.norm.weight", f"{side}.final_norm.scale"))
        attentions = {"self_attn": "attention"}
        if side == "decoder":
            attentions["cross_attn"] = "cross"
        for layer, block, index in blocks_of(stack):
            theirs, ours = f"model.{side}.layers.{layer}", f"{side}.{block}"
            for source, target in _NORMS.items():
                if side == "decoder" or "cross" not in source:
                    rows.append(
                        Row(f"{theirs}.{source}.weight", f"{ours}.{target}.scale", IDENTITY, index)
                    )
            for source, target in attentions.items():
                rows.extend(
                    Row(
                        f"{theirs}.{source}.{name}_proj.weight",
                        f"{ours}.{target}.{name}.kernel",
                        TRANSPOSE,
                        index,
                    )
                    for name in "qkvo"
                )
            pair = tuple(f"{theirs}.mlp.{half}_proj.weight" for half in ("gate", "up"))
            rows.append(Row(pair, f"{ours}.mlp.up", both, index))
            down = f"{theirs}.mlp.down_proj.weight"
            rows.append(Row(down, f"{ours}.mlp.down.kernel", TRANSPOSE, index))
    if not config.decoder.tied:
        rows.append(Row(HEAD, "decoder.head.table"))
    return rows


def check_tied_head(reader: TensorReader) -> None:
    """Refuses a folder that calls its head tied but holds another one than the decoder's table."""
    names = reader.keys()
    if HEAD not in names or TABLE not in names:
        return
    shape = reader.shape(TABLE)
    same = reader.shape(HEAD) == shape and all(
        np.array_equal(reader.read(HEAD, rows), reader.read(TABLE, rows))
        for start in range(0, shape[0], _COMPARED)
        for rows in [(slice(start, min(start + _COMPARED, shape[0]), 1), slice(0, shape[1], 1))]
    )
    if not same:
        raise UserError(
            f"{reader.path}: {HEAD} differs from {TABLE}, but config.json calls them tied: "
            "set its tie_word_embeddings to false"
        )


def flax_rows(config: T5GemmaConfig, reader: TensorReader) -> list[Row]:
    """Key map of the published flax tree, `encoder/layer_0/attn/q_einsum/w` and so on.

    Self-attention's q, k and v are one tensor where there are as many key heads as query heads; the
    9B stacks hold their gates transposed, and tables have rows behind the vocabulary's.
    """
    names = set(reader.keys())
    rows = []
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        d, f, h = stack.width, stack.mlp_width, stack.head_dim
        heads, kv_heads = stack.num_heads, stack.num_kv_heads
        table = f"{side}/embedder/input_embedding"
        stored = reader.shape(table)[0] if table in names else stack.vocab_size
        rows.append(Row(table, f"{side}.embed.table", FirstRows(stored)))
        rows.append(Row(f"{side}/final_norm/scale", f"{side}.final_norm.scale"))

        def projected(count: int, width: int, h: int = h):
            """One of several [count, width, h] side by side -> [width, count h]."""
            return chain(
                Reshape((1, count, width, h)), Transpose((1, 0, 2)), Reshape((width, count, h))
            )

        for layer, block, index in blocks_of(stack):
            theirs, ours = f"{side}/layer_{layer}", f"{side}.{block}"

            def add(source, target, transform=IDENTITY, theirs=theirs, ours=ours, index=index):
                if isinstance(source, Piece):
                    source = Piece(f"{theirs}/{source.name}", 0, source.start, source.stop)
                else:
                    source = f"{theirs}/{source}"
                rows.append(Row(source, f"{ours}.{target}", transform, index))

            norms = {"attention": "attention", "mlp": "ffw"}
            attentions = [("attn", "attention", d, heads == kv_heads)]
            if side == "decoder":
                norms["cross"] = "cross_attention"
                attentions.append(("cross_attn", "cross", config.encoder.width, False))
            for target, source in norms.items():
                add(f"pre_{source}_norm/scale", f"{target}_norm.scale")
                add(f"post_{source}_norm/scale", f"{target}_post_norm.scale")
            for source, target, kv_width, fused in attentions:
                if fused:
                    for n, name in enumerate("qkv"):
                        piece = Piece(f"{source}/qkv_einsum/w", 0, n, n + 1)
                        add(piece, f"{target}.{name}.kernel", projected(heads, d))
                else:
                    to_q = chain(Transpose((1, 0, 2)), Reshape((d, heads, h)))
                    add(f"{source}/q_einsum/w", f"{target}.q.kernel", to_q)
                    for n, name in enumerate("kv"):
                        piece = Piece(f"{source}/kv_einsum/w", 0, n, n + 1)
                        add(piece, f"{target}.{name}.kernel", projected(kv_heads, kv_width))
                to_o = Reshape((heads, h, d))
                add(f"{source}/attn_vec_einsum/w", f"{target}.o.kernel", to_o)
            gates = f"{theirs}/mlp/gating_einsum"
            turned = gates in names and reader.shape(gates) == (2, f, d)
            add("mlp/gating_einsum", "mlp.up", Transpose((2, 0, 1) if turned else (1, 0, 2)))
            add("mlp/linear", "mlp.down.kernel")
    return rows


def config_from_huggingface(data: Mapping[str, Any], where: str) -> T5GemmaConfig:
    """The shape that a `config.json` states. Everything in it is checked: it is somebody's file."""
    if data.get("model_type") != "t5gemma":
        raise UserError(f"{where} describes a {data.get('model_type')!r} model, not a t5gemma")
    sides = {}
    for side in ("encoder", "decoder"):
        inner = data.get(side)
        if not isinstance(inner, dict):
            raise UserError(f"{where}: '{side}' should be an object that describes a stack")
        sides[side] = inner
    tied = data.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise UserError(f"{where}: 'tie_word_embeddings' should be true or false, not {tied!r}")
    window: EncoderWindow = data.get(_WINDOW_KEY, "published")

    decoder = sides["decoder"]

    def token(name: str, default: int) -> int:
        value = decoder.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{where}: 'decoder.{name}' should be a token, not {value!r}")
        return value

    return T5GemmaConfig(
        encoder=_stack_from_huggingface(sides["encoder"], f"{where}: 'encoder'", True),
        decoder=_stack_from_huggingface(sides["decoder"], f"{where}: 'decoder'", tied),
        encoder_window=window,
        bos_token=token("bos_token_id", 2),
        pad_token=-1 if decoder.get("pad_token_id", 0) is None else token("pad_token_id", 0),
    )


def _stack_from_huggingface(data: Mapping[str, Any], where: str, tied: bool) -> DecoderConfig:
    def number(name: str, default: Any = None, kind: type = int, source: Any = data) -> Any:
        value = source.get(name)
        value = default if value is None else value
        allowed = (int, float) if kind is float else (int,)
        if not isinstance(value, allowed) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise UserError(f"{where}: '{name}' should be a positive number, not {value!r}")
        return kind(value)

    def cap(name: str, default: float) -> float | None:
        return None if name in data and data[name] is None else number(name, default, float)

    if data.get("attention_bias"):
        raise UserError(f"{where}: biases of the attention (attention_bias) are not supported")
    activation = data.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UserError(f"{where}: hidden_activation {activation!r} is not supported")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UserError(f"{where}: only default rope is supported, not {rope!r}")
    layers, heads = number("num_hidden_layers"), number("num_attention_heads")
    if layers > MOST_LAYERS:
        raise UserError(f"{where}: {layers} layers are not believed")
    types = data.get("layer_types")
    if types is None:
        types = ["sliding_attention", "full_attention"] * ((layers + 1) // 2)
        types = types[:layers]
    if not isinstance(types, list) or len(types) != layers or set(map(str, types)) - set(_REACHES):
        raise UserError(
            f"{where}: 'layer_types' should name sliding_attention or full_attention for each of "
            f"the {layers} layers"
        )
    reaches = [_REACHES[name] for name in types]
    head_dim = number("head_dim", 256)
    return DecoderConfig(
        vocab_size=number("vocab_size", 256_000),
        width=number("hidden_size"),
        mlp_width=number("intermediate_size"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_dim=head_dim,
        num_layers=layers,
        max_length=number("max_position_embeddings", 8192),
        pattern=_pattern(reaches),
        window=number("sliding_window", 4096) if "local" in reaches else None,
        rope_base=number(
            "rope_theta", 10_000.0, float, rope if rope.get("rope_theta") is not None else data
        ),
        query_scale=_query_scale(number("query_pre_attn_scalar", 256.0, float), head_dim),
        attention_softcap=cap("attn_logit_softcapping", 50.0),
        post_norms=True,
        norm_epsilon=number("rms_norm_eps", 1e-6, float),
        tied=tied,
        bfloat16_scale=False,
        logits_softcap=cap("final_logit_softcapping", 30.0),
    )


def _pattern(reaches: list[Reach]) -> tuple[Reach, ...]:
    """The shortest pattern that repeats to `reaches`; of Gemma's length where that fits."""
    sizes = (len(GEMMA2_PATTERN), *range(1, len(reaches) + 1))
    for size in (size for size in sizes if size <= len(reaches)):
        if all(reach == reaches[i % size] for i, reach in enumerate(reaches)):
            return tuple(reaches[:size])
    return tuple(reaches)


def _query_scale(scalar: float, head_dim: int) -> float | None:
    return None if scalar == head_dim else scalar**-0.5


def config_to_huggingface(config: T5GemmaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` with which transformers 5 computes what our model does.

    Its encoder sees W keys on each side where the published weights mean W - 1. So that is written
    as its window, and said beside it, for `config_from_huggingface`.
    """
    if config.causal_encoder:
        raise UserError("a model whose encoder is causal cannot be exported: transformers has none")
    encoder = config.encoder_stack
    window = None if encoder.window is None else encoder.window - 1
    if window == 0:
        raise UserError("an encoder's window of 1 cannot be exported: transformers has none")
    pad = config.pad_token if config.pad_token >= 0 else None
    tokens = {"bos_token_id": config.bos_token, "pad_token_id": pad}
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "is_encoder_decoder": True,
        "encoder": _stack_to_huggingface(encoder, "encoder", window) | tokens,
        "decoder": _stack_to_huggingface(config.decoder, "decoder", config.decoder.window)
        | tokens
        | {"is_decoder": True, "cross_attention_hidden_size": config.encoder.width},
        _WINDOW_KEY: "transformers",
        "vocab_size": config.decoder.vocab_size,
        "tie_word_embeddings": config.decoder.tied,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "eos_token_id": 1,
        "torch_dtype": dtype,
        **tokens,
    }


def _stack_to_huggingface(stack: DecoderConfig, side: str, window: int | None) -> dict[str, Any]:
    exact = float(np.asarray(stack.width**0.5, np.float32))
    wanted: dict[str, tuple[Any, Any]] = {
        "post_norms": (stack.post_norms, True),
        "zero_centred_norm": (stack.zero_centred_norm, True),
        "qk_norm": (stack.qk_norm, False),
        "qkv_bias": (stack.qkv_bias, False),
        "activation": (stack.activation, "gelu_tanh"),
        "scale_embedding": (stack.scale_embedding, True),
        "rope_scaling": (stack.rope_scaling, None),
        "local_rope_base": (stack.local_rope_base, None),
        "bfloat16_scale": (stack.bfloat16_scale and exact % 0.25 != 0, False),
    }
    for name, (have, need) in wanted.items():
        if have != need:
            raise UserError(
                f"the transformers library's T5Gemma has {name} {need}: a model whose {side} has "
                f"{have} cannot be exported to it"
            )
    scale = stack.head_dim**-0.5 if stack.query_scale is None else stack.query_scale
    return {
        "model_type": "t5_gemma_module",
        "vocab_size": stack.vocab_size,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp_width,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        "head_dim": stack.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": stack.max_length or 8192,
        "rms_norm_eps": stack.norm_epsilon,
        "rope_theta": stack.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dropout_rate": 0.0,
        "query_pre_attn_scalar": _whole(scale**-2, side),
        "sliding_window": window,
        "layer_types": [_LAYER_TYPES[reach] for reach in stack.reaches()],
        "final_logit_softcapping": stack.logits_softcap,
        "attn_logit_softcapping": stack.attention_softcap,
        "initializer_range": 0.02,
        "eos_token_id": 1,
    }


def _whole(scalar: float, side: str) -> int:
    """`query_pre_attn_scalar`, which transformers wants to be an integer."""
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise UserError(
            f"the transformers library wants a whole number as query scale^-2, not the {side}'s "
            f"{scalar:.6g}"
        )
    return round(scalar)


def config_from_shapes(reader: TensorReader) -> T5GemmaConfig:
    """The shape that a published flax tree's tensors imply; the rest is as in every release."""
    return T5GemmaConfig(
        _stack_from_shapes(reader, "encoder"), _stack_from_shapes(reader, "decoder")
    )


def _stack_from_shapes(reader: TensorReader, side: str) -> DecoderConfig:
    names = set(reader.keys())

    def shape(name: str, rank: int) -> tuple[int, ...]:
        full = f"{side}/{name}"
        if full not in names:
            raise UserError(f"{reader.path} has no tensor '{full}': not a T5Gemma release")
        found = reader.shape(full)
        if len(found) != rank or 0 in found:
            raise UserError(
                f"{reader.path}: '{full}' has shape {list(found)}: not a T5Gemma release"
            )
        return found

    layers = 0
    while f"{side}/layer_{layers}/mlp/linear" in names:
        layers += 1
    rows, width = shape("embedder/input_embedding", 2)
    mlp_width, _ = shape("layer_0/mlp/linear", 2)
    heads, head_dim, _ = shape("layer_0/attn/attn_vec_einsum/w", 3)
    fused = f"{side}/layer_0/attn/qkv_einsum/w" in names
    kv_heads = heads if fused else shape("layer_0/attn/kv_einsum/w", 4)[1]
    return DecoderConfig(
        vocab_size=256_000 if rows == 256_128 else rows,
        width=width,
        mlp_width=mlp_width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_layers=layers,
        pattern=GEMMA2_PATTERN,
        window=4096,
        attention_softcap=50.0,
        post_norms=True,
        bfloat16_scale=False,
        logits_softcap=30.0,
    )
