"""Hard negatives between two steep drops of each query's sorted relevance scores."""

from typing import TYPE_CHECKING

from qure_core.base.lazy import lazy

if TYPE_CHECKING:
    from qure_core.mining.mined_set import MinedSet, read_mined_set
    from qure_core.mining.rules.steep_drops import (
        STATUSES,
        DropRule,
        SteepDrops,
        steep_drop_negatives,
    )

__all__ = [
    "STATUSES",
    "DropRule",
    "MinedSet",
    "SteepDrops",
    "read_mined_set",
    "steep_drop_negatives",
]
__getattr__ = lazy(
    __name__,
    {
        "STATUSES": "rules.steep_drops",
        "DropRule": "rules.steep_drops",
        "MinedSet": "mined_set",
        "SteepDrops": "rules.steep_drops",
        "read_mined_set": "mined_set",
        "steep_drop_negatives": "rules.steep_drops",
    },
)
