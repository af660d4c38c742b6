"""Automatic data curation: clusters of clusters of embeddings, and balanced samples of them."""

from curation.clusters import Hierarchy, Level
from curation.hierarchy_files import load, save

__all__ = ["Hierarchy", "Level", "load", "save"]
