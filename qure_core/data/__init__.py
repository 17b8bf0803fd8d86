"""Datasets as one schema: triplets and an image corpus."""

from qure_core.data.schema import Split, Triplet, read_split, write_split
from qure_core.data.sources import load_split, mining_galleries

__all__ = ["Split", "Triplet", "load_split", "mining_galleries", "read_split", "write_split"]
