"""RecurrentGemma's checkpoints: key maps and configurations of the public formats, both ways.

Blocks 3u, 3u+1, 3u+2 of a checkpoint are the blocks of unit u here; a stacked leaf is filled one
unit at a time. What the maps transpose is written in the specification's table.
"""

from collections.abc import Iterator
from typing import Any

from common.checkpoint import (
    DEPTHWISE_CONV,
    IDENTITY,
    TRANSPOSE,
    Reshape,
    Row,
    Stack,
    TensorReader,
    Transform,
    Transpose,
    chain,
)
from common.errors import UserError
from recurrentgemma.model import GRIFFIN_PATTERN, HAWK_PATTERN, GriffinConfig, Mixer

# The tied head, which some exporters write out again.
HUGGINGFACE_TIED = ("lm_head.weight",)


def _blocks(config: GriffinConfig) -> Iterator[tuple[int, Mixer, str, int | None]]:
    """Yields each block's number, mixer, path in our tree, and its index in the stack, if any."""
    size = len(config.pattern)
    stacked = config.num_layers // size * size
    for layer, mixer in enumerate(config.mixers()):
        if layer < stacked:
            yield layer, mixer, f"units.blocks.{layer % size}", layer // size
        else:
            yield layer, mixer, f"rest.blocks.{layer - stacked}", None


def huggingface_rows(config: GriffinConfig) -> list[Row]:
    """Key map of `RecurrentGemmaForCausalLM` (specification 4.2)."""
    rows = [
        Row("model.embed_tokens.weight", "embed.table"),
        Row("model.final_norm.weight", "final_norm.scale"),
    ]
    both = chain(Stack(0), Transpose((2, 0, 1)))  # two [F, D] -> [D, 2, F]
    for layer, mixer, ours, index in _blocks(config):
        theirs = f"model.layers.{layer}"
        inner = f"{theirs}.temporal_block"

        def add(source, target, transform=IDENTITY, ours=ours, index=index):
            rows.append(Row(source, f"{ours}.{target}", transform, index))

        def linear(source: str, target: str, add=add) -> None:
            add(f"{source}.weight", f"{target}.kernel", TRANSPOSE)

        def biased(source: str, target: str, add=add, linear=linear) -> None:
            linear(source, target)
            add(f"{source}.bias", f"{target}.bias")

        for norm in ("temporal_pre_norm", "channel_pre_norm"):
            add(f"{theirs}.{norm}.weight", f"{norm}.scale")
        pair = [f"{theirs}.mlp_block.{half}_proj" for half in ("gate", "up")]
        add(tuple(f"{name}.weight" for name in pair), "mlp.up", both)
        add(tuple(f"{name}.bias" for name in pair), "mlp.up_bias", Stack(0))
        biased(f"{theirs}.mlp_block.down_proj", "mlp.down")
        if mixer == "attention":
            for name in "qkv":
                linear(f"{inner}.{name}_proj", f"mixer.{name}")
            biased(f"{inner}.o_proj", "mixer.o")
            continue
        for name in ("linear_x", "linear_y", "linear_out"):
            biased(f"{inner}.{name}", f"mixer.{name}")
        add(f"{inner}.conv_1d.weight", "mixer.conv.w", DEPTHWISE_CONV)
        add(f"{inner}.conv_1d.bias", "mixer.conv.b")
        add(f"{inner}.rg_lru.recurrent_param", "mixer.rg_lru.a_param")
        for source, target in (("input", "input"), ("recurrent", "a")):
            gate = f"mixer.rg_lru.{target}_gate"
            add(f"{inner}.rg_lru.{source}_gate_weight", f"{gate}.w")
            add(f"{inner}.rg_lru.{source}_gate_bias", f"{gate}.b")
    return rows


def release_rows(config: GriffinConfig, *, separator: str = "/", torch: bool = False) -> list[Row]:
    """Key map of the original release's tree, flax (`blocks.0/…`) or torch (`blocks.0.…`).

    Args:
      config: the model's shape.
      separator: what joins the keys of the tree.
      torch: whether dense layers are stored as torch does, `weight [out, in]`.
    """
    dense: Transform = TRANSPOSE if torch else IDENTITY
    kernel = "weight" if torch else "kernel"
    rows = [
        Row(separator.join(("embedder", "input_embedding")), "embed.table"),
        Row(separator.join(("final_norm", "scale")), "final_norm.scale"),
    ]
    for layer, mixer, ours, index in _blocks(config):

        def add(source, target, transform=IDENTITY, layer=layer, ours=ours, index=index):
            name = separator.join((f"blocks.{layer}", *source))
            rows.append(Row(name, f"{ours}.{target}", transform, index))

        def linear(source: tuple[str, ...], target: str, add=add) -> None:
            add((*source, kernel), f"{target}.kernel", dense)

        def biased(source: tuple[str, ...], target: str, add=add, linear=linear) -> None:
            linear(source, target)
            add((*source, "bias"), f"{target}.bias")

        for norm in ("temporal_pre_norm", "channel_pre_norm"):
            add((norm, "scale"), f"{norm}.scale")
        add(("mlp_block", "ffw_up", "w"), "mlp.up", Transpose((1, 0, 2)))  # [2, D, F] -> [D, 2, F]
        add(("mlp_block", "ffw_up", "b"), "mlp.up_bias", Reshape((2, 1, 1, config.mlp_width)))
        biased(("mlp_block", "ffw_down"), "mlp.down")
        if mixer == "attention":
            for name in "qkv":
                linear(("attention_block", f"proj_{name}"), f"mixer.{name}")
            biased(("attention_block", "proj_final"), "mixer.o")
            continue
        for name in ("linear_x", "linear_y", "linear_out"):
            biased(("recurrent_block", name), f"mixer.{name}")
        for name in "wb":
            add(("recurrent_block", "conv_1d", name), f"mixer.conv.{name}")
        add(("recurrent_block", "rg_lru", "a_param"), "mixer.rg_lru.a_param")
        for gate in ("input_gate", "a_gate"):
            for name in "wb":
                add(("recurrent_block", "rg_lru", gate, name), f"mixer.rg_lru.{gate}.{name}")
    return rows


def config_from_huggingface(data: dict[str, Any], where: str) -> GriffinConfig:
    """The shape that a `config.json` states. Everything in it is checked: it is somebody's file."""

    def number(name: str, default: Any = None, kind: type = int, group: str | None = None) -> Any:
        inner = data.get(group) if group is not None else None
        value = inner.get(name) if isinstance(inner, dict) else data.get(name)
        value = default if value is None else value
        allowed = (int, float) if kind is float else (int,)
        if not isinstance(value, allowed) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{where}: '{name}' should be a positive number, not {value!r}")
        return kind(value)

    if data.get("model_type", "recurrent_gemma") != "recurrent_gemma":
        raise UserError(f"{where} describes a {data['model_type']!r} model, not a recurrent_gemma")
    if data.get("attention_bias"):
        raise UserError(
            f"{where}: biases of the attention inputs (attention_bias) are not supported"
        )
    activation = data.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UserError(f"{where}: hidden_activation {activation!r} is not supported")
    if data.get("embeddings_scale_by_sqrt_dim", True) is not True:
        raise UserError(f"{where}: embeddings_scale_by_sqrt_dim must be true")
    width, heads = number("hidden_size"), number("num_attention_heads")
    if data.get("head_dim") not in (None, width // heads):
        raise UserError(f"{where}: head_dim must be hidden_size / num_attention_heads")
    fused = number("intermediate_size")
    if fused % 2:
        raise UserError(f"{where}: intermediate_size counts both branches and must be even")
    blocks = data.get("block_types") or data.get("_block_types") or list(GRIFFIN_PATTERN)
    if not isinstance(blocks, list) or not set(map(str, blocks)) <= {"recurrent", "attention"}:
        raise UserError(f"{where}: 'block_types' must list 'recurrent' and 'attention'")
    return GriffinConfig(
        vocab_size=number("vocab_size"),
        width=width,
        mlp_width=fused // 2,
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        lru_width=number("lru_width", width),
        num_layers=number("num_hidden_layers"),
        pattern=tuple(blocks),
        attention_window=number("attention_window_size", 2048),
        logits_softcap=number("logits_soft_cap", 30.0, float),
        rope_base=number("rope_theta", 10_000.0, float, "rope_parameters"),
        rope_fraction=number("partial_rotary_factor", 0.5, float, "rope_parameters"),
        conv_taps=number("conv1d_width", 4),
        norm_epsilon=number("rms_norm_eps", 1e-6, float),
    )


def config_to_huggingface(config: GriffinConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` with which the transformers library loads our export."""
    if not config.scale_embedding or config.logits_softcap is None:
        raise UserError(
            "the transformers library always scales embeddings and caps logits: "
            "a model without either cannot be exported to it"
        )
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 2 * config.mlp_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "lru_width": config.lru_width,
        "num_hidden_layers": config.num_layers,
        "block_types": list(config.pattern),
        "_block_types": list(config.pattern),
        "attention_window_size": config.attention_window,
        "logits_soft_cap": config.logits_softcap,
        "embeddings_scale_by_sqrt_dim": True,
        "rope_theta": config.rope_base,
        "partial_rotary_factor": config.rope_fraction,
        "conv1d_width": config.conv_taps,
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "w_init_variance_scale": 0.01,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": dtype,
    }


def config_from_shapes(reader: TensorReader, separator: str, torch: bool) -> GriffinConfig:
    """The shape that an original release's tensors imply.

    What shapes cannot tell is RecurrentGemma's: window 2048, scaled embedding, logit cap 30.
    """
    names = set(reader.keys())

    def shape(*parts: str) -> tuple[int, ...]:
        name = separator.join(parts)
        if name not in names:
            raise UserError(f"{reader.path} has no tensor '{name}': not a RecurrentGemma release")
        return reader.shape(name)

    layers = 0
    mixers: list[Mixer] = []
    while separator.join((f"blocks.{layers}", "temporal_pre_norm", "scale")) in names:
        is_attention = separator.join((f"blocks.{layers}", "attention_block", "proj_final", "bias"))
        mixers.append("attention" if is_attention in names else "recurrent")
        layers += 1
    if not layers or "recurrent" not in mixers:
        raise UserError(f"{reader.path} has no recurrent blocks: not a RecurrentGemma release")
    first = f"blocks.{mixers.index('recurrent')}"
    vocab_size, width = _dims(reader, shape("embedder", "input_embedding"), 2)
    (lru_width,) = _dims(reader, shape(first, "recurrent_block", "rg_lru", "a_param"), 1)
    gate = _dims(reader, shape(first, "recurrent_block", "rg_lru", "a_gate", "w"), 3)
    up = _dims(reader, shape(first, "mlp_block", "ffw_up", "w"), 3)
    taps = _dims(reader, shape(first, "recurrent_block", "conv_1d", "w"), 2)
    kv_heads = 1
    if "attention" in mixers:
        block = (f"blocks.{mixers.index('attention')}", "attention_block", "proj_k")
        keys = _dims(reader, shape(*block, "weight" if torch else "kernel"), 2)
        kv_heads = max(1, keys[0 if torch else 1] * gate[0] // width)
    return GriffinConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=up[2],
        num_heads=gate[0],
        num_kv_heads=kv_heads,
        lru_width=lru_width,
        num_layers=layers,
        pattern=_pattern(mixers),
        conv_taps=taps[0],
    )


def _dims(reader: TensorReader, shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    if len(shape) != ndim or 0 in shape:
        raise UserError(f"{reader.path}: a tensor has shape {shape}: not a RecurrentGemma release")
    return shape


def _pattern(mixers: list[Mixer]) -> tuple[Mixer, ...]:
    """The shortest known pattern that repeats to `mixers`, else the whole sequence."""
    for pattern in (HAWK_PATTERN, GRIFFIN_PATTERN):
        if all(m == pattern[i % len(pattern)] for i, m in enumerate(mixers)):
            return pattern
    return tuple(mixers)
