"""Automatic data curation: clusters of clusters of embeddings, and balanced samples of them."""

from curation.clusters import Hierarchy, Level
from curation.hierarchy_files import load, save
from curation.sampling import balanced_sample, flat_sample

__all__ = ["Hierarchy", "Level", "balanced_sample", "flat_sample", "load", "save"]
