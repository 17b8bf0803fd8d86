"""QuRe: composed image retrieval trained with hard negatives between two steep drops.

The method is "QuRe: Query-Relevant Retrieval through Hard Negative Sampling in Composed Image
Retrieval" (ICML 2025, arXiv 2507.12416). This package holds the library; the scripts that run it
are in ``pipelines/``.
"""

__version__ = "0.1.0"
