"""Texts re-balanced: pieces of the packages of Python's own library, of some many, of others few.

A text is known by its words alone (counts weighted by rarity, projected to their main directions);
to which package it belongs is used only to see how evenly samples represent the packages.
"""

import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.data.python_corpus import PythonCorpus
from common.data.sources import DamagedRecord
from common.errors import UserError
from curation.balance import divergence_from_uniform, largest_share
from curation.experiments.clustering import cluster
from curation.experiments.config import DocumentsConfig
from curation.sampling import balanced_sample, flat_sample

POOL, RANDOM, FLAT, TWO = "the pool", "random sample", "flat", "two levels"
RESAMPLED = "two levels, resampled"
NAMES = (POOL, RANDOM, FLAT, TWO, RESAMPLED)
_WORDS = 1024


def measure_documents(config: DocumentsConfig) -> dict[str, Any]:
    """Divergence of the sampled packages from equal shares, and the largest share, of each way."""
    texts, labels, packages = pieces(config)
    divergence: dict[str, list[float]] = {name: [] for name in NAMES}
    shares: dict[str, list[float]] = {name: [] for name in NAMES}
    counts: dict[str, list[int]] = {}
    pool = np.zeros(0, int)
    for seed in config.seeds:
        pool = long_tail(labels, config, seed)
        x = vectors([texts[number] for number in pool], config.width)
        for name, choose in _ways(x, config, seed).items():
            found = np.bincount(labels[pool][choose()], minlength=len(packages))
            divergence[name].append(divergence_from_uniform(found))
            shares[name].append(largest_share(found))
            counts[name] = np.sort(found)[::-1].tolist()
    return {
        "packages": packages,
        "pool": len(pool),
        "divergence": {name: float(np.mean(values)) for name, values in divergence.items()},
        "largest_share": {name: float(np.mean(values)) for name, values in shares.items()},
        "counts": counts,
    }


def pieces(config: DocumentsConfig) -> tuple[list[str], np.ndarray, list[str]]:
    """Pieces of the largest packages' sources, the number of each one's package, and their names.

    Raises:
      UserError: this Python has too little of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = PythonCorpus(("source",), str(root))
    found: list[tuple[str, str]] = []
    for number in range(len(corpus)):
        path = Path(corpus.describe(number).rpartition(" (")[0].strip("'")).relative_to(root)
        if len(path.parts) < 2:
            continue
        try:
            text = corpus[number]
        except DamagedRecord:
            continue
        step = config.characters
        found += [
            (path.parts[0], text[a : a + step]) for a in range(0, len(text) - step // 2, step)
        ]
    sizes = Counter(package for package, _ in found).most_common(config.packages)
    if len(sizes) < config.packages or sizes[-1][1] < config.smallest:
        raise UserError("documents: this Python comes with too few sources for the experiment")
    packages = [name for name, _ in sizes]
    kept = [(packages.index(name), text) for name, text in found if name in packages]
    return [text for _, text in kept], np.array([label for label, _ in kept]), packages


def long_tail(labels: np.ndarray, config: DocumentsConfig, seed: int) -> np.ndarray:
    """Numbers of random pieces, fewer of each package than of the one before, in random order."""
    rng = np.random.default_rng(seed)
    parts = []
    for rank, label in enumerate(rng.permutation(config.packages)):
        size = max(round(config.largest * config.ratio**rank), config.smallest)
        parts.append(rng.permutation(np.flatnonzero(labels == label))[:size])
    return np.concatenate(parts)


def vectors(texts: list[str], width: int) -> np.ndarray:
    """Texts as unit rows [N, width]: their words' weighted counts on the main directions of all."""
    counts = np.zeros((len(texts), _WORDS))
    for row, text in enumerate(texts):
        for word, count in Counter(re.findall(r"[a-z]{2,}", text.lower())).items():
            counts[row, zlib.crc32(word.encode()) % _WORDS] += np.log1p(count)
    present = np.count_nonzero(counts, axis=0)
    weighted = counts * np.log(len(texts) / np.maximum(present, 1))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)
    _, directions = np.linalg.eigh(weighted.T @ weighted)
    rows = weighted @ directions[:, -width:]
    norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return (rows / norms).astype(np.float32)


def _ways(x: np.ndarray, config: DocumentsConfig, seed: int) -> dict[str, Callable[[], np.ndarray]]:
    rng = np.random.default_rng([seed, 1])
    size, clusters = config.size, config.clusters
    return {
        POOL: lambda: np.arange(len(x)),
        RANDOM: lambda: rng.choice(len(x), size, replace=False),
        FLAT: lambda: flat_sample(cluster(x, clusters[1:], seed=seed), size, seed=seed),
        TWO: lambda: balanced_sample(cluster(x, clusters, seed=seed), size, seed=seed),
        RESAMPLED: lambda: balanced_sample(
            cluster(x, clusters, seed=seed, resamplings=5), size, seed=seed
        ),
    }
