"""Ranking a gallery by cosine similarity to queries (specification, section 6.4)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from dino.evaluation.knn import unit
from dino.evaluation.metrics import average_precision


@dataclass(frozen=True)
class Relevance:
    """What a query should find.

    Attributes:
        positive: Numbers of the gallery's images that are right.
        ignored: Numbers that are taken out of the ranking: neither right nor wrong.
    """

    positive: np.ndarray
    ignored: np.ndarray


def rankings(queries: np.ndarray, gallery: np.ndarray, batch: int = 256) -> np.ndarray:
    """The gallery's numbers by falling similarity to each query, int64 [Q, N].

    Of equally similar images the one with the lower number comes first.
    """
    base = unit(jnp.asarray(gallery, jnp.float32))
    found = []
    for start in range(0, len(queries), batch):
        part = np.asarray(queries[start : start + batch], np.float32)
        similar = np.asarray(_similar(jnp.asarray(part), base))
        found.append(np.argsort(-similar, axis=1, kind="stable"))
    return np.concatenate(found)


@jax.jit
def _similar(queries: jax.Array, base: jax.Array) -> jax.Array:
    return jnp.matmul(unit(queries), base.T, precision=jax.lax.Precision.HIGHEST)


def retrieval_scores(
    ranked: np.ndarray,
    relevance: Sequence[Relevance],
    *,
    trapezoid: bool = False,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Mean average precision, and precision of the first k, over queries with something to find.

    Raises:
        UserError: No query has.
    """
    precisions, firsts = [], []
    for order, wanted in zip(ranked, relevance, strict=True):
        if not len(wanted.positive):
            continue
        order = order[~np.isin(order, wanted.ignored)]
        right = np.isin(order, wanted.positive)
        precisions.append(average_precision(right, len(wanted.positive), trapezoid))
        firsts.append([right[:k].sum() / min(k, max(len(right), 1)) for k in ks])
    if not precisions:
        raise UserError("no query has an image of the gallery to find")
    means = np.mean(firsts, 0)
    return {"mAP": float(np.mean(precisions))} | {
        f"precision@{k}": float(value) for k, value in zip(ks, means, strict=True)
    }


def by_class(query_labels: np.ndarray, gallery_labels: np.ndarray) -> list[Relevance]:
    """Of each query, the gallery's images of the same class are right."""
    of_class = {c: np.flatnonzero(gallery_labels == c) for c in np.unique(query_labels)}
    return [Relevance(of_class[c], np.zeros(0, np.int64)) for c in query_labels]


def read_ground_truth(
    path: str | Path, queries: Sequence[str], gallery: Sequence[str]
) -> dict[str, list[Relevance]]:
    """Protocols of a JSON file that names what each query should find.

    The file is a list of objects with `query`, and lists `easy`, `hard` and `junk` of the gallery's
    names; all but `query` may be missing. As in the revisited Oxford and Paris benchmarks,
    "medium" looks for easy and hard images and leaves out junk, "hard" looks for hard ones and
    leaves out easy ones too.

    Args:
        path: The file.
        queries: Names of the query images, in order.
        gallery: Names of the gallery's images, in order.

    Raises:
        UserError: It is no such file, or names images that are not there.
    """
    try:
        entries = json.loads(Path(path).read_text("utf-8"))
        named = {entry["query"]: entry for entry in entries}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is no list of queries with what they find: {error}") from error
    number = {name: i for i, name in enumerate(gallery)}
    protocols: dict[str, list[Relevance]] = {"medium": [], "hard": []}
    for name in queries:
        if name not in named:
            raise UserError(f"{path} does not say what the query {name!r} finds")
        lists = {}
        for kind in ("easy", "hard", "junk"):
            names = named[name].get(kind, [])
            missing = next((n for n in names if n not in number), None)
            if missing is not None:
                raise UserError(f"{path}: {missing!r}, for {name!r}, is not in the gallery")
            lists[kind] = np.array([number[n] for n in names], np.int64)
        both = np.concatenate([lists["easy"], lists["hard"]])
        protocols["medium"].append(Relevance(both, lists["junk"]))
        left_out = np.concatenate([lists["easy"], lists["junk"]])
        protocols["hard"].append(Relevance(lists["hard"], left_out))
    return protocols
