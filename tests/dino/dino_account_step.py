"""A whole training step of the paper in float64 numpy: forward, numerical gradients, AdamW, EMA.

Parameters are dictionaries from "/"-joined names to arrays, as the run's pure dicts flatten.
"""

import dino_account as account
import numpy as np

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + account.erf(x / np.sqrt(2)))


def bicubic(source, target):
    """Section 2.6, with the offset: `[target, source]`."""
    matrix = np.zeros((target, source))
    a = -0.75
    for i in range(target):
        at = (i + 0.5) * source / (target + 0.1) - 0.5
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            u = abs(at - tap)
            near = (a + 2) * u**3 - (a + 3) * u**2 + 1
            far = a * u**3 - 5 * a * u**2 + 8 * a * u - 4 * a
            matrix[i, min(max(tap, 0), source - 1)] += near if u <= 1 else far
    return matrix


def positions(table, side):
    size = round(np.sqrt(len(table) - 1))
    grid = table[1:].reshape(size, size, -1)
    if side != size:
        resize = bicubic(size, side)
        grid = np.einsum("hy,wx,yxd->hwd", resize, resize, grid)
    return table[0], grid.reshape(side * side, -1)


def vit(p, crops, masks=None, *, heads, patch):
    """Tokens `[B, 1 + N, D]` after the final norm, of uint8 crops `[B, H, W, 3]`."""
    x = (crops / 255 - MEAN) / STD
    rows, side = len(x), x.shape[1] // patch
    x = x.reshape(rows, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(rows, side * side, -1) @ p["patch_embed/kernel"] + p["patch_embed/bias"]
    if masks is not None:
        x = np.where(masks[..., None], p["mask_token"], x)
    first, others = positions(p["pos_embed"], side)
    cls = np.broadcast_to(p["cls_token"] + first, (rows, 1, x.shape[-1]))
    x = np.concatenate([cls, x + others], axis=1)
    for layer in range(len(p["blocks/gamma1"])):
        b = {n.removeprefix("blocks/"): v[layer] for n, v in p.items() if n.startswith("blocks/")}
        y = layer_norm(x, b["norm1/scale"], b["norm1/bias"])
        q, k, v = (
            (y @ b["attention/qkv"][:, n] + b["attention/qkv_bias"][n])
            .reshape(rows, -1, heads, y.shape[-1] // heads)
            .transpose(0, 2, 1, 3)
            for n in range(3)
        )
        seen = account.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]))
        y = (seen @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + b["gamma1"] * (y @ b["attention/out/kernel"] + b["attention/out/bias"])
        y = layer_norm(x, b["norm2/scale"], b["norm2/bias"])
        y = gelu(y @ b["mlp/up/kernel"] + b["mlp/up/bias"])
        x = x + b["gamma2"] * (y @ b["mlp/down/kernel"] + b["mlp/down/bias"])
    return layer_norm(x, p["norm/scale"], p["norm/bias"])


def branch(p, name):
    return {n.removeprefix(f"{name}/"): v for n, v in p.items() if n.startswith(f"{name}/")}


def head(p, x):
    layers = [(p[f"mlp/{n}/kernel"], p[f"mlp/{n}/bias"]) for n in range(3)]
    z = account.head_bottleneck(x, layers)
    return account.prototypes(z, p["last_layer/weight_g"], p["last_layer/weight_v"])


def targets(teacher, batch, temperature, *, shape, chosen):
    """Teacher's assignments: of images `[B, 2, K]`, of the `chosen` patches `[M, K]`."""
    crops = batch["global_crops"]
    tokens = vit(branch(teacher, "backbone"), crops.reshape(-1, *crops.shape[2:]), **shape)
    said = head(branch(teacher, "dino_head"), tokens[:, 0])
    images = account.sinkhorn(said, temperature).reshape(len(crops), 2, -1)
    patch_head = "ibot_head" if "ibot_head/mlp/0/bias" in teacher else "dino_head"
    patches = head(branch(teacher, patch_head), tokens[:, 1:][chosen])
    return images, account.sinkhorn(patches, temperature)


def loss(student, batch, of_images, of_patches, *, shape, chosen, masks, koleo=0.1):
    """Section 3.2's loss; `chosen [2B, N]` are the patches of L_ibot."""
    crops, local = batch["global_crops"], batch["local_crops"]
    backbone = branch(student, "backbone")
    tokens = vit(backbone, crops.reshape(-1, *crops.shape[2:]), masks, **shape)
    cls = tokens[:, 0].reshape(len(crops), 2, -1)
    of_local = vit(backbone, local.reshape(-1, *local.shape[2:]), **shape)[:, 0]
    every = np.concatenate([cls, of_local.reshape(len(crops), -1, cls.shape[-1])], axis=1)
    on_global, on_local = account.dino(of_images, head(branch(student, "dino_head"), every))
    patch_head = "ibot_head" if "ibot_head/mlp/0/bias" in student else "dino_head"
    patches = head(branch(student, patch_head), tokens[:, 1:][chosen])
    spread = sum(account.koleo(cls[:, v]) for v in range(2))
    return on_global + on_local + account.ibot(of_patches, patches, chosen) + koleo * spread


def gradients(function, params, step=1e-5):
    """Central differences of every parameter."""
    found = {}
    for name, value in params.items():
        slopes = np.zeros(value.size)
        for i in range(value.size):
            sides = []
            for sign in (1, -1):
                moved = value.copy()
                moved.flat[i] += sign * step
                sides.append(function({**params, name: moved}))
            slopes[i] = (sides[0] - sides[1]) / (2 * step)
        found[name] = slopes.reshape(value.shape)
    return found


def clipped(grads, most=3.0):
    """Each of backbone, dino_head and ibot_head by itself."""
    factors = {}
    for top in {name.split("/")[0] for name in grads}:
        norm = np.sqrt(sum((g**2).sum() for n, g in grads.items() if n.split("/")[0] == top))
        factors[top] = min(1.0, most / norm)
    return {name: g * factors[name.split("/")[0]] for name, g in grads.items()}


class AdamW:
    """Section 3.9."""

    def __init__(self, depth, layer_decay, b1=0.9, b2=0.999, epsilon=1e-8):
        self.depth, self.layer_decay = depth, layer_decay
        self.b1, self.b2, self.epsilon = b1, b2, epsilon
        self.m, self.v, self.count = {}, {}, 0

    def factor(self, name, value):
        if not name.startswith("backbone/") or name.startswith("backbone/norm"):
            return 1.0
        if name.startswith("backbone/blocks"):
            ids = np.arange(self.depth) + 1
            factors = self.layer_decay ** (self.depth + 1 - ids)
            return factors.reshape(-1, *[1] * (value.ndim - 1))
        whole = self.layer_decay ** (self.depth + 1)
        return whole * (0.2 if "patch_embed" in name else 1.0)

    def __call__(self, params, grads, rate, decay, *, frozen_last):
        self.count += 1
        moved = {}
        for name, value in params.items():
            g = grads[name]
            self.m[name] = self.b1 * self.m.get(name, 0) + (1 - self.b1) * g
            self.v[name] = self.b2 * self.v.get(name, 0) + (1 - self.b2) * g**2
            m = self.m[name] / (1 - self.b1**self.count)
            v = self.v[name] / (1 - self.b2**self.count)
            own = 0.0 if frozen_last and "last_layer" in name else rate * self.factor(name, value)
            kept = name.endswith("bias") or "norm" in name or "gamma" in name
            value = value * (1 - own * (0.0 if kept else decay))
            moved[name] = value - own * m / (np.sqrt(v) + self.epsilon)
        return moved
