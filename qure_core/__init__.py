"""QuRe: composed image retrieval trained with hard negatives between two steep drops.

The method is "QuRe: Query-Relevant Retrieval through Hard Negative Sampling in Composed Image
Retrieval" (ICML 2025, arXiv 2507.12416). This package holds the library; the scripts that run it
are in ``pipelines/``. `Encoder` turns images and texts into vectors.
"""

from typing import TYPE_CHECKING

from qure_core.base.lazy import lazy

if TYPE_CHECKING:
    from qure_core.embeddings.encoder import Encoder

__all__ = ["Encoder"]
__version__ = "0.1.0"
__getattr__ = lazy(__name__, {"Encoder": "embeddings.encoder"})
