"""DINOv2's checkpoints: key maps and configurations of the public formats (specification, 4).

Three spellings of the same tensors: the original's, in which a whole training state may be wrapped
around the backbone; timm's, which is the original's but for registers and SwiGLU; Hugging Face's.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from common.checkpoint import (
    IDENTITY,
    TRANSPOSE,
    LeadingZeros,
    RenamedTensors,
    Reshape,
    Row,
    Stack,
    TensorReader,
    Transform,
    Transpose,
    chain,
)
from common.errors import UserError
from common.models.vit import ViTConfig

HEAD_DIM = 64  # of every released model; a file of tensors does not tell.
MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# Beside a bare backbone: heads that were trained with it or on it.
IGNORED = ("dino_head.*", "ibot_head.*", "head.*")
IGNORED_HUGGINGFACE = ("classifier.*",)
# What files may state, far beyond every model and still cheap to describe.
LARGEST = 1_000_000
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_fsdp_wrapped_module|_orig_mod)\.")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+\.)")
_SHOWN = 4

# Of one block: names of tensors -> the parameter that they make up, and how.
_Block = dict[tuple[str, ...], tuple[str, Transform]]


def backbone_tensors(reader: TensorReader) -> TensorReader:
    """The tensors of the backbone in a checkpoint of the original code, under their bare names.

    Finds it below wrappers ("teacher.", "model.", "module.", "backbone." …) and takes the teacher
    where a student is there as well; renumbers blocks that are kept in chunks.

    Raises:
      UserError: no backbone of this kind, or several.
    """
    bare: dict[str, str] = {}
    for name in sorted(reader.keys()):
        clean = _WRAPPERS.sub("", name)
        if clean in bare:
            raise UserError(f"{reader.path} holds {clean!r} twice: as {bare[clean]!r} and {name!r}")
        bare[clean] = name
    root = _backbone_root(reader, bare)
    found: dict[str, str] = {}
    for clean, name in bare.items():
        if clean.startswith(root):
            inner = _CHUNK.sub(r"blocks.\1", clean.removeprefix(root))
            if inner in found:
                raise UserError(f"{reader.path} holds {inner!r} in two chunks of blocks")
            found[inner] = name
    return RenamedTensors(reader, found)


def _backbone_root(reader: TensorReader, names: Collection[str]) -> str:
    """The prefix of the backbone's names."""
    last = "cls_token"
    roots = [name.removesuffix(last) for name in names if f".{name}".endswith(f".{last}")]
    roots = [root for root in roots if f"{root}patch_embed.proj.weight" in names]
    for wanted in (
        [root for root in roots if "teacher" in root.split(".")],
        [root for root in roots if "student" not in root.split(".")],
        roots,
    ):
        if len(wanted) > 1:
            listed = ", ".join(repr(root) for root in sorted(wanted)[:_SHOWN])
            raise UserError(f"{reader.path} holds several backbones ({listed}): save one of them")
        if wanted:
            return wanted[0]
    raise UserError(
        f"{reader.path} holds no backbone of DINOv2: it has no cls_token beside a "
        "patch_embed.proj.weight"
    )


def config_from_tensors(reader: TensorReader, num_heads: int | None) -> ViTConfig:
    """The shape that a bare backbone's tensors have; its heads cannot be seen in them."""
    names = set(reader.keys())

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = reader.shape(name)
        if len(found) != rank or 0 in found:
            raise UserError(f"{reader.path}: {name} is {list(found)}, not of {rank} dimensions")
        return found

    width, channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    registers_name = next((n for n in ("register_tokens", "reg_token") if n in names), None)
    registers = 0 if registers_name is None else shape(registers_name, 3)[1]
    # In timm's models with registers the class token has its position added to it already.
    entries = shape("pos_embed", 3)[1] - (0 if registers_name == "reg_token" else 1)
    table = math.isqrt(max(entries, 0))
    if table**2 != entries or not table:
        raise UserError(f"{reader.path}: pos_embed has {entries} patches, which are no square")
    blocks = {match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    if not blocks:
        raise UserError(f"{reader.path} has a patch embedding, but no blocks")
    up, down = _mlp_names(names)
    wide, narrow = shape(f"blocks.0.mlp.{up}.weight", 2)[0], shape(f"blocks.0.mlp.{down}.weight", 2)
    heads = num_heads if num_heads is not None else max(width // HEAD_DIM, 1)
    if num_heads is None and width % HEAD_DIM:
        raise UserError(
            f"{reader.path} does not tell how many heads its width of {width} has: give num_heads"
        )
    return ViTConfig(
        width=width,
        num_layers=len(blocks),
        num_heads=heads,
        mlp_width=narrow[1],
        mlp="mlp" if wide == narrow[1] else "swiglu",
        patch_size=patch_size,
        image_size=patch_size * table,
        channels=channels,
        registers=registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in names else None,
        mask_token="mask_token" in names,
        interpolation="antialias" if registers else "offset",
    )


def _mlp_names(names: Collection[str]) -> tuple[str, str]:
    return ("w12", "w3") if "blocks.0.mlp.w12.weight" in names else ("fc1", "fc2")


def original_rows(config: ViTConfig, names: Collection[str]) -> list[Row]:
    """Key map of a bare backbone, in the original's spelling or timm's, whichever `names` are."""
    timm = "reg_token" in names
    d, p, c = config.width, config.patch_size, config.channels
    pixels = chain(Transpose((2, 3, 1, 0)), Reshape((p, p, c, d)))
    rows = [
        Row("patch_embed.proj.weight", "patch_embed.kernel", pixels),
        Row("patch_embed.proj.bias", "patch_embed.bias"),
        Row("cls_token", "cls_token", Reshape((1, 1, -1))),
        Row("norm.weight", "norm.scale"),
        Row("norm.bias", "norm.bias"),
    ]
    entries = (1, -1, d)
    positions: Transform = Reshape(entries)
    if timm:
        positions = chain(Reshape(entries), LeadingZeros(1))
    rows.append(Row("pos_embed", "pos_embed", positions))
    if config.registers:
        tokens = "reg_token" if timm else "register_tokens"
        rows.append(Row(tokens, "register_tokens", Reshape(entries)))
    if config.mask_token:
        rows.append(Row("mask_token", "mask_token", Reshape((1, -1))))
    up, down = _mlp_names(names)
    block: _Block = {
        ("attn.qkv.weight",): ("attention.qkv", _side_by_side(3, d)),
        ("attn.qkv.bias",): ("attention.qkv_bias", Reshape((3 * d,))),
        ("attn.proj.weight",): ("attention.out.kernel", TRANSPOSE),
        ("attn.proj.bias",): ("attention.out.bias", IDENTITY),
        ("ls1.gamma",): ("gamma1", IDENTITY),
        ("ls2.gamma",): ("gamma2", IDENTITY),
        **_mlp(config, f"mlp.{up}", f"mlp.{down}"),
    }
    if config.layer_scale is None:
        del block["ls1.gamma",], block["ls2.gamma",]
    return rows + _block_rows("blocks", block, config.num_layers)


def huggingface_rows(config: ViTConfig, names: Collection[str] = ()) -> list[Row]:
    """Key map of `Dinov2Model` and `Dinov2WithRegistersModel`.

    Args:
      config: of the model.
      names: tensors of the checkpoint, which tell whether it is spelled as in memory since
        transformers 5 ("q_proj", "gate_proj") or as on disk; none: as on disk.
    """
    d, p, c = config.width, config.patch_size, config.channels
    pixels = chain(Transpose((2, 3, 1, 0)), Reshape((p, p, c, d)))
    patches = "embeddings.patch_embeddings.projection"
    rows = [
        Row(f"{patches}.weight", "patch_embed.kernel", pixels),
        Row(f"{patches}.bias", "patch_embed.bias"),
        Row("embeddings.cls_token", "cls_token", Reshape((1, 1, -1))),
        Row("embeddings.position_embeddings", "pos_embed", Reshape((1, -1, d))),
        Row("layernorm.weight", "norm.scale"),
        Row("layernorm.bias", "norm.bias"),
    ]
    if config.registers:
        tokens = "embeddings.register_tokens"
        rows.append(Row(tokens, "register_tokens", Reshape((1, -1, d))))
    if config.mask_token:
        rows.append(Row("embeddings.mask_token", "mask_token", Reshape((1, -1))))
    block: _Block = {
        ("layer_scale1.lambda1",): ("gamma1", IDENTITY),
        ("layer_scale2.lambda1",): ("gamma2", IDENTITY),
    }
    in_memory = any(".attention.q_proj." in name for name in names)
    queries, out = "attention.attention.{}", "attention.output.dense"
    each = ("query", "key", "value")
    if in_memory:
        queries, out, each = "attention.{}_proj", "attention.o_proj", ("q", "k", "v")
    apart = chain(Stack(0), Transpose((2, 0, 1)))  # several [out, in] -> [in, several, out]
    weights = tuple(f"{queries.format(name)}.weight" for name in each)
    block[weights] = ("attention.qkv", apart)
    block[tuple(f"{queries.format(name)}.bias" for name in each)] = (
        "attention.qkv_bias",
        Stack(0),
    )
    block[f"{out}.weight",] = ("attention.out.kernel", TRANSPOSE)
    block[f"{out}.bias",] = ("attention.out.bias", IDENTITY)
    if config.mlp == "mlp":
        block |= _mlp(config, "mlp.fc1", "mlp.fc2")
    elif in_memory:
        block["mlp.gate_proj.weight", "mlp.up_proj.weight"] = ("mlp.up", apart)
        block["mlp.gate_proj.bias", "mlp.up_proj.bias"] = ("mlp.up_bias", Stack(0))
        block["mlp.down_proj.weight",] = ("mlp.down.kernel", TRANSPOSE)
        block["mlp.down_proj.bias",] = ("mlp.down.bias", IDENTITY)
    else:
        block |= _mlp(config, "mlp.weights_in", "mlp.weights_out")
    return rows + _block_rows("encoder.layer", block, config.num_layers)


def _side_by_side(count: int, width: int) -> Transform:
    """Torch's weights of `count` maps to `width`, one below the other -> `[in, count, width]`."""
    return chain(TRANSPOSE, Reshape((-1, count * width)))


def _mlp(config: ViTConfig, up: str, down: str) -> _Block:
    """The feed-forward layer, both of whose ways up are one tensor if there are two."""
    ways: _Block = {
        (f"{up}.weight",): ("mlp.up.kernel", TRANSPOSE),
        (f"{up}.bias",): ("mlp.up.bias", IDENTITY),
    }
    if config.mlp == "swiglu":
        ways = {
            (f"{up}.weight",): ("mlp.up", _side_by_side(2, config.hidden)),
            (f"{up}.bias",): ("mlp.up_bias", Reshape((2 * config.hidden,))),
        }
    return {
        **ways,
        (f"{down}.weight",): ("mlp.down.kernel", TRANSPOSE),
        (f"{down}.bias",): ("mlp.down.bias", IDENTITY),
    }


def _block_rows(prefix: str, block: _Block, layers: int) -> list[Row]:
    """The rows of every block; its norms are called the same everywhere."""
    norms: _Block = {
        (f"{norm}.{theirs}",): (f"{norm}.{ours}", IDENTITY)
        for norm in ("norm1", "norm2")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    }
    return [
        Row(tuple(f"{prefix}.{n}.{part}" for part in parts), f"blocks.{target}", transform, n)
        for n in range(layers)
        for parts, (target, transform) in (norms | block).items()
    ]


def config_from_huggingface(data: Mapping[str, Any], where: str) -> ViTConfig:
    """The shape that a config.json states; `where` is the file.

    Raises:
      UserError: another model's, or one of a kind that is not supported.
    """
    kind = data.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{where}: model_type is {kind!r}, not one of {', '.join(MODEL_TYPES)}")

    def natural(name: str, default: int) -> int:
        value = data.get(name, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise UserError(f"{where}: {name} is {value!r}, not a natural number")
        return value

    def flag(name: str, default: bool) -> bool:
        value = data.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} is {value!r}, not true or false")
        return value

    for name, known in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if data.get(name, known) != known:
            raise UserError(f"{where}: {name} {data[name]!r} is not supported, only {known!r}")
    registers = natural("num_register_tokens", 4) if kind == MODEL_TYPES[1] else 0
    width, gated = natural("hidden_size", 768), flag("use_swiglu_ffn", False)
    epsilon, ratio = data.get("layer_norm_eps", 1e-6), data.get("mlp_ratio", 4)
    for name, value in (("layer_norm_eps", epsilon), ("mlp_ratio", ratio)):
        if type(value) not in (int, float) or not 0 < value < LARGEST:
            raise UserError(f"{where}: {name} is {value!r}, not a positive number")
    full = int(width * ratio)
    return ViTConfig(
        width=width,
        num_layers=natural("num_hidden_layers", 12),
        num_heads=natural("num_attention_heads", 12),
        mlp_width=(int(full * 2 / 3) + 7) // 8 * 8 if gated else full,
        mlp="swiglu" if gated else "mlp",
        patch_size=natural("patch_size", 14 if kind == MODEL_TYPES[0] else 16),
        image_size=natural("image_size", 224),
        channels=natural("num_channels", 3),
        registers=registers,
        mask_token=flag("use_mask_token", True),
        norm_epsilon=float(epsilon),
        interpolation="antialias" if registers else "offset",
    )


def config_to_huggingface(config: ViTConfig, dtype: str) -> dict[str, Any]:
    """What config.json says of a model whose tensors are `dtype`.

    Raises:
      UserError: the format cannot express the model.
    """
    if config.layer_scale is None:
        raise UserError("Hugging Face's DINOv2 has LayerScale in every block: this model has none")
    ratio = _mlp_ratio(config)
    kind, architecture = MODEL_TYPES[0], "Dinov2Model"
    if config.registers:
        kind, architecture = MODEL_TYPES[1], "Dinov2WithRegistersModel"
    data = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": ratio,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": config.norm_epsilon,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": config.mlp == "swiglu",
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "torch_dtype": dtype,
    }
    if config.registers:
        return data | {"num_register_tokens": config.registers}
    return data | {"use_mask_token": config.mask_token}


def _mlp_ratio(config: ViTConfig) -> int:
    """The whole number from which transformers computes the MLP's width."""
    for ratio in range(1, 65):
        full = config.width * ratio
        if config.hidden == (full if config.mlp == "mlp" else (int(full * 2 / 3) + 7) // 8 * 8):
            return ratio
    raise UserError(
        f"Hugging Face's DINOv2 cannot express an MLP of {config.hidden} for a width of "
        f"{config.width}: it needs a whole ratio"
    )


def preprocessor_to_huggingface(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> dict[str, Any]:
    """What preprocessor_config.json says: the published evaluation's transform (5.4)."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
