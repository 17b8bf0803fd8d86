"""Published figures, to set beside one's own. Never part of a result. Percent.

Sources: the QuRe paper (arXiv 2507.12416) for its own figures and those it compares with.
"""

from __future__ import annotations

from collections import Counter

from qure_core.data.schema import Split

# Val queries and gallery images of each category, by which a data set is known to be the one that
# the figures were published for.
_SIZES = {
    "fashioniq": {"dress": (2017, 3817), "shirt": (2038, 6346), "toptee": (1961, 5373)},
    "cirr": {"cirr": (4181, 2297)},
}


def known_dataset(split: Split) -> str | None:
    """The benchmark whose val split this is, told by its categories and their sizes, or None."""
    queries = Counter(triplet.category for triplet in split.triplets)
    sizes = {name: (queries[name], len(ids)) for name, ids in split.galleries.items()}
    return next((name for name, known in _SIZES.items() if known == sizes), None)


PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "fashioniq": {
        "CLIP4CIR": {"R@10": 43.30, "mean": 55.03},
        "SPRC": {"R@10": 50.86, "mean": 62.13},
        "QuRe": {"R@10": 52.60, "mean": 63.04},
    },
    "cirr": {
        "SPRC (test1)": {"R@1": 50.75, "R@5": 80.58, "R@10": 88.72, "R_s@1": 79.57},
        "QuRe (test1)": {"R@1": 52.22, "R@5": 82.53, "R@10": 90.31, "R_s@1": 78.51},
    },
}


def comparison_table(dataset: str | None, ours: dict[str, float], label: str) -> str:
    """Our figures over those published for ``dataset``, each row labelled as what it is.

    None where the data are no known benchmark's: nothing is then comparable.
    """
    names = list(ours)
    rows = [(f"{label} (this run)", ours)]
    rows += [(f"{name} (published)", row) for name, row in PUBLISHED.get(dataset or "", {}).items()]
    width = max(len(name) for name, _ in rows) + 2
    lines = [" " * width + "".join(f"{name:>18}" for name in names)]
    for name, row in rows:
        cells = "".join(f"{row[key]:>18.2f}" if key in row else f"{'-':>18}" for key in names)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)
