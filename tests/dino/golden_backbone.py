"""The specification's tiny backbones and their filling (2.9), in every spelling."""

import numpy as np

from common.models.vit import ViTConfig

BASE = ViTConfig(width=24, num_layers=3, num_heads=3, image_size=56)
REGISTERS = ViTConfig(
    width=24, num_layers=3, num_heads=3, image_size=56, registers=2, interpolation="antialias"
)
SWIGLU = ViTConfig(width=24, num_layers=3, num_heads=3, image_size=56, mlp="swiglu")
SIZES = {"base": BASE, "registers": REGISTERS, "swiglu": SWIGLU}


def shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of an original checkpoint, as torch has it."""
    d, f, p = config.width, config.hidden, config.patch_size
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + config.table_size**2, d),
        "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, p, p),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    if config.registers:
        found["register_tokens"] = (1, config.registers, d)
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d)}
    if config.mlp == "mlp":
        linears |= {"mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    else:
        linears |= {"mlp.w12": (2 * f, d), "mlp.w3": (d, f)}
    for n in range(config.num_layers):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[f"blocks.{n}.{name}"] = (d,)
        for name in ("ls1.gamma", "ls2.gamma"):
            found[f"blocks.{n}.{name}"] = (d,)
        for name, shape in linears.items():
            found[f"blocks.{n}.{name}.weight"] = shape
            found[f"blocks.{n}.{name}.bias"] = shape[:1]
    return found


def tensors(config: ViTConfig) -> dict[str, np.ndarray]:
    """The filling: 0.05 sin(0.37 j + n) for element j of the n-th tensor, plus 1 for scales."""
    filled = {}
    found = shapes(config)
    for n, name in enumerate(sorted(found)):
        values = 0.05 * np.sin(0.37 * np.arange(np.prod(found[name])) + n)
        scales = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma"))
        filled[name] = (values + scales).reshape(found[name]).astype(np.float32)
    return filled


def images(height: int, width: int) -> np.ndarray:
    """`[2, H, W, 3]` float32, whose elements count channel by channel."""
    flat = np.sin(0.7 * 0.13 * np.arange(2 * 3 * height * width)).astype(np.float32)
    return flat.reshape(2, 3, height, width).transpose(0, 2, 3, 1)


def timm(original: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same model as timm spells it."""
    left = dict(original)
    del left["mask_token"]
    if "register_tokens" in left:
        left["reg_token"] = left.pop("register_tokens")
        left["cls_token"] = left["cls_token"] + left["pos_embed"][:, :1]
        left["pos_embed"] = left["pos_embed"][:, 1:]
    return {k.replace("w12", "fc1").replace("w3", "fc2"): v for k, v in left.items()}


def huggingface(original: dict[str, np.ndarray], in_memory: bool = False) -> dict[str, np.ndarray]:
    """The same model as Hugging Face spells it: on disk, or as its modules are called since 5."""
    names = {
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "attn.proj": "attention.o_proj" if in_memory else "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.down_proj" if in_memory else "mlp.weights_out",
    }
    found = {}
    for name, array in original.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name.endswith(("_token", "_tokens")):
            name = f"embeddings.{name}"
        if name.startswith("norm."):
            name = f"layer{name}"
        name = name.replace("blocks.", "encoder.layer.")
        if "attn.qkv" in name:
            parts = ("q_proj", "k_proj", "v_proj")
            if not in_memory:
                parts = ("attention.query", "attention.key", "attention.value")
            for part, third in zip(parts, np.split(array, 3)):
                found[name.replace("attn.qkv", f"attention.{part}")] = third
        elif in_memory and "weights_in" in name:
            for part, half in zip(("gate_proj", "up_proj"), np.split(array, 2)):
                found[name.replace("weights_in", part)] = half
        else:
            found[name] = array
    return found
