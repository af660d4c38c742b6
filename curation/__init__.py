"""Automatic data curation: clusters of clusters of embeddings, and balanced samples of them."""

import sys
import types
from typing import Any

from curation.clusters import Hierarchy, Level
from curation.deduplication import decontaminate, deduplicate, duplicate_components
from curation.hierarchy import hierarchical_kmeans
from curation.hierarchy_files import load, save
from curation.kmeans import KMeans, kmeans
from curation.retrieval import retrieve, retrieve_clusters
from curation.sampling import balanced_sample, flat_sample

__all__ = [
    "Hierarchy",
    "KMeans",
    "Level",
    "balanced_sample",
    "decontaminate",
    "deduplicate",
    "duplicate_components",
    "flat_sample",
    "hierarchical_kmeans",
    "kmeans",
    "load",
    "retrieve",
    "retrieve_clusters",
    "save",
]


class _Package(types.ModuleType):
    """Keeps names of functions: importing the launchers of those names would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
