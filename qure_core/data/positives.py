"""Images known to answer a query besides its target: they must not be its negatives.

Known are the targets of other triplets with the same query, what the data itself lists
(``relevant`` in JSON lines, CIRR's ``target_soft`` of 1.0), and files that hold the very picture of
one of these. FashionIQ-style ``relevance/`` files are no labels: they measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qure_core.data.schema import Split, Triplet

Query = tuple[str, str, str]


def query_of(triplet: Triplet) -> Query:
    """What is asked, whatever the answer."""
    return triplet.category, triplet.reference_id, triplet.text


def with_known_positives(split: Split, digest_of: Mapping[str, str]) -> Split:
    """``split`` with `Triplet.positive_ids` complete; ``digest_of`` is a content by image id."""
    twins: dict[str, list[str]] = {}
    for image, digest in sorted(digest_of.items()):
        twins.setdefault(digest, []).append(image)
    targets: dict[Query, set[str]] = {}
    for triplet in split.triplets:
        if triplet.target_id is not None:
            targets.setdefault(query_of(triplet), set()).add(triplet.target_id)

    def known(triplet: Triplet) -> Triplet:
        answers = targets.get(query_of(triplet), set()) | set(triplet.positive_ids)
        for image in tuple(answers):
            if image in digest_of:
                answers.update(twins[digest_of[image]])
        return replace(triplet, positive_ids=tuple(sorted(answers - {triplet.target_id})))

    return replace(split, triplets=tuple(map(known, split.triplets)))


def without_known_positives(split: Split) -> Split:
    """``split`` as if nothing but targets were known, as the released program takes it."""
    triplets = tuple(replace(triplet, positive_ids=()) for triplet in split.triplets)
    return replace(split, triplets=triplets)


def rows_said(triplets: Sequence[Triplet], split: str) -> list[str]:
    """What a person would want to know of a split's rows, each with its count."""
    notes = []
    same = sum(t.reference_id == t.target_id for t in triplets)
    if same:
        notes.append(f"{same:,} row(s) of {split!r} have their target as reference")
    if empty := sum(not t.text.strip() for t in triplets):
        notes.append(f"{empty:,} row(s) of {split!r} have an empty text")
    answers: dict[Query, set[str | None]] = {}
    for triplet in triplets:
        answers.setdefault(query_of(triplet), set()).add(triplet.target_id)
    if again := len(triplets) - sum(map(len, answers.values())):
        notes.append(f"{again:,} row(s) of {split!r} repeat another one exactly")
    several = [query for query, targets in answers.items() if len(targets) > 1]
    if several:
        rows = sum(len(answers[query_of(triplet)]) > 1 for triplet in triplets)
        notes.append(
            f"{len(several):,} queries of {split!r} ({rows:,} rows) have two or more targets"
        )
    return notes


def twins_said(digest_of: Mapping[str, str]) -> list[str]:
    """How many images are the same picture under several names, and the commonest of them."""
    names: dict[str, list[str]] = {}
    for image, digest in sorted(digest_of.items()):
        names.setdefault(digest, []).append(image)
    several = sorted((own for own in names.values() if len(own) > 1), key=len, reverse=True)
    if not several:
        return []
    most = ", ".join(map(repr, several[0][:5])) + (", ..." if len(several[0]) > 5 else "")
    return [
        f"{sum(map(len, several)):,} images are {len(several):,} picture(s) under several names; "
        f"the commonest has {len(several[0]):,} ({most}): if it is a placeholder of lost images, "
        "remove their rows"
    ]
