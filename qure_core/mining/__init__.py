"""Hard negatives between two steep drops of each query's sorted relevance scores."""

from qure_core.mining.mined_set import MinedSet, read_mined_set
from qure_core.mining.rule import STATUSES, DropRule
from qure_core.mining.steep_drops import SteepDrops, steep_drop_negatives

__all__ = [
    "STATUSES",
    "DropRule",
    "MinedSet",
    "SteepDrops",
    "read_mined_set",
    "steep_drop_negatives",
]
