"""DINOv2's networks in torch, written for the benchmark from the specification (section 2).

Crops of both sizes are packed: norms and linear layers see all of their tokens at once, attention
each kind by itself; and drop path computes a part of the rows only, as in the paper's code.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from common.models.vit import ViTConfig
from dino.heads import HeadConfig
from dino.networks import NetworkConfig

Tokens = list[torch.Tensor]  # Of each kind of crop, `[rows, T, D]`.


class Block(nn.Module):
    """A pre-norm block with factors of its branches."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        d, epsilon = config.width, config.norm_epsilon
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=epsilon) for _ in range(2))
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, config.hidden), nn.Linear(config.hidden, d)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(d)) for _ in range(2))
        self.heads, self.drop_path = config.num_heads, config.drop_path

    def forward(self, x: Tokens) -> Tokens:
        return self._add(self._add(x, self._attend), self._feed)

    def _add(self, x: Tokens, branch: Any) -> Tokens:
        if not self.training or not self.drop_path:
            return [a + b for a, b in zip(x, branch(x))]
        kept = [max(int(len(a) * (1 - self.drop_path)), 1) for a in x]
        rows = [torch.randperm(len(a), device=a.device)[:n] for a, n in zip(x, kept)]
        added = branch([a[chosen] for a, chosen in zip(x, rows)])
        return [
            a.index_add(0, chosen, b.to(a.dtype), alpha=len(a) / n)
            for a, b, chosen, n in zip(x, added, rows, kept)
        ]

    def _attend(self, x: Tokens) -> Tokens:
        flat, shapes = _packed(x)
        three = _unpacked(self.qkv(self.norm1(flat)), shapes)
        out = []
        for rows in three:
            b, t, _ = rows.shape
            q, k, v = rows.reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            found = functional.scaled_dot_product_attention(q, k, v)
            out.append(found.transpose(1, 2).reshape(b, t, -1))
        return _unpacked(self.gamma1 * self.proj(_packed(out)[0]), shapes)

    def _feed(self, x: Tokens) -> Tokens:
        flat, shapes = _packed(x)
        hidden = functional.gelu(self.fc1(self.norm2(flat)))
        return _unpacked(self.gamma2 * self.fc2(hidden), shapes)


class Backbone(nn.Module):
    """The vision transformer, over several kinds of crops at once."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        d = config.width
        self.patch_embed = nn.Conv2d(3, d, config.patch_size, config.patch_size)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(d)) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.zeros(1 + config.table_size**2, d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d, eps=config.norm_epsilon)
        self.table_size = config.table_size

    def forward(self, crops: Sequence[torch.Tensor], masks: torch.Tensor | None = None) -> Tokens:
        """Crops `[rows, 3, H, W]` of each kind, masks of the first -> normed tokens of each."""
        x = [self._embed(crop, masks if n == 0 else None) for n, crop in enumerate(crops)]
        for block in self.blocks:
            x = block(x)
        flat, shapes = _packed(x)
        return _unpacked(self.norm(flat), shapes)

    def _embed(self, crop: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        patches = self.patch_embed(crop)
        h, w = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2).float()
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token, patches)
        first, rest = (self.cls_token + self.pos_embed[0]).expand(len(crop), 1, -1), None
        rest = patches + self._positions(h, w)
        return torch.cat([first, rest], dim=1)

    def _positions(self, h: int, w: int) -> torch.Tensor:
        size, table = self.table_size, self.pos_embed[1:]
        if (h, w) == (size, size):
            return table
        grid = table.reshape(1, size, size, -1).permute(0, 3, 1, 2)
        scale = ((h + 0.1) / size, (w + 0.1) / size)
        with torch.autocast(table.device.type, enabled=False):
            grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        return grid.flatten(2).transpose(1, 2)[0]


class Head(nn.Module):
    """The projection head, up to its logits."""

    def __init__(self, width: int, config: HeadConfig):
        super().__init__()
        hidden, last = config.hidden, config.bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, last),
        )
        self.weight_g = nn.Parameter(torch.ones(config.prototypes))
        self.weight_v = nn.Parameter(torch.zeros(config.prototypes, last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = functional.normalize(self.mlp(x).float(), dim=-1, eps=1e-12)
        table = self.weight_g[:, None] * functional.normalize(self.weight_v, dim=-1)
        return functional.linear(z, table).float()


class Network(nn.Module):
    """A backbone with the heads of class tokens and of masked patches."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        assert config.ibot_head is not None
        self.backbone = Backbone(config.backbone)
        self.dino_head = Head(config.backbone.width, config.dino_head)
        self.ibot_head = Head(config.backbone.width, config.ibot_head)


def load(network: Network, params: Mapping[str, Any]) -> None:
    """Gives a network the parameters of one of ours, a pure dict."""
    vit = params["backbone"]
    patch = math.isqrt(len(vit["patch_embed"]["kernel"]) // 3)
    kernel = np.asarray(vit["patch_embed"]["kernel"]).reshape(patch, patch, 3, -1)
    state = {
        "backbone.patch_embed.weight": kernel.transpose(3, 2, 0, 1),
        "backbone.patch_embed.bias": vit["patch_embed"]["bias"],
        "backbone.norm.weight": vit["norm"]["scale"],
        "backbone.norm.bias": vit["norm"]["bias"],
        **{f"backbone.{name}": vit[name] for name in ("cls_token", "mask_token", "pos_embed")},
    }
    blocks = vit["blocks"]
    for n in range(len(blocks["gamma1"])):
        own = {
            "qkv.weight": blocks["attention"]["qkv"][n].reshape(kernel.shape[-1], -1).T,
            "qkv.bias": blocks["attention"]["qkv_bias"][n].reshape(-1),
            "gamma1": blocks["gamma1"][n],
            "gamma2": blocks["gamma2"][n],
        }
        linear = {
            "proj": blocks["attention"]["out"],
            "fc1": blocks["mlp"]["up"],
            "fc2": blocks["mlp"]["down"],
        }
        for name, layer in linear.items():
            own[f"{name}.weight"], own[f"{name}.bias"] = layer["kernel"][n].T, layer["bias"][n]
        for name in ("norm1", "norm2"):
            own[f"{name}.weight"], own[f"{name}.bias"] = (
                blocks[name][part][n] for part in ("scale", "bias")
            )
        state |= {f"backbone.blocks.{n}.{name}": value for name, value in own.items()}
    for head in ("dino_head", "ibot_head"):
        for n, layer in params[head]["mlp"].items():
            state[f"{head}.mlp.{2 * int(n)}.weight"] = layer["kernel"].T
            state[f"{head}.mlp.{2 * int(n)}.bias"] = layer["bias"]
        for name in ("weight_g", "weight_v"):
            state[f"{head}.{name}"] = params[head]["last_layer"][name]
    network.load_state_dict(
        {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}
    )


def _packed(x: Tokens) -> tuple[torch.Tensor, list[torch.Size]]:
    if len(x) == 1:
        return x[0].flatten(0, 1), [x[0].shape]
    return torch.cat([a.flatten(0, 1) for a in x]), [a.shape for a in x]


def _unpacked(flat: torch.Tensor, shapes: Sequence[torch.Size]) -> Tokens:
    parts = flat.split([shape[0] * shape[1] for shape in shapes])
    return [part.reshape(shape[0], shape[1], -1) for part, shape in zip(parts, shapes)]
