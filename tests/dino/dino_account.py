"""The paper's formulas in float64 numpy, written from its text; they share no code with dino."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def sinkhorn(logits, temperature, iterations=3):
    """Section 3.5, division by division; `logits [R, K]`."""
    q = np.exp(np.float64(logits) / temperature).T
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True)
        q /= prototypes
        q /= q.sum(0, keepdims=True)
        q /= rows
    return (q * rows).T


def cross_entropy(target, student, temperature=0.1):
    """`[R]`."""
    return -(target * log_softmax(student / temperature)).sum(-1)


def dino(targets, students, temperature=0.1):
    """Section 3.2 for `targets [B, 2, K]` and `students [B, 2 + V, K]`: global and local loss."""
    views = students.shape[1]
    terms = 2 + max(2 * (views - 2), 1)
    swapped = targets[:, ::-1]
    on_global = np.mean(
        [cross_entropy(swapped[:, v], students[:, v], temperature) for v in range(2)]
    )
    on_local = sum(
        cross_entropy(targets[:, v], students[:, j], temperature).mean()
        for j in range(2, views)
        for v in range(2)
    )
    return 2 * on_global / terms, on_local / terms


def ibot(targets, students, masks, temperature=0.1):
    """Section 3.2 for rows `[M, K]` of the masked patches of `masks [crops, N]`, in their order."""
    weights = np.repeat(1 / np.maximum(masks.sum(1), 1), masks.sum(1))
    return (weights * cross_entropy(targets, students, temperature)).sum() / len(masks)


def neighbours(x):
    z = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
    similar = z @ z.T
    np.fill_diagonal(similar, -1)
    return z, similar.argmax(1)


def koleo(x):
    """Section 3.4 for `x [B, D]`."""
    z, nearest = neighbours(np.float64(x))
    distance = np.sqrt(((z - z[nearest] + 1e-8) ** 2).sum(1))
    return -np.log(distance + 1e-8).mean()


def head_bottleneck(x, layers):
    """Section 2.8: `layers` are three pairs of kernel `[in, out]` and bias."""
    for number, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        if number < 2:
            x = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def prototypes(z, g, v):
    return z @ (g[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)).T
