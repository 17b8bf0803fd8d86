"""Exact steep drops from summaries, without a ranking of the whole corpus anywhere.

`QueryRanking` knows a query's ranking below the target as segments: runs of neighbouring images of
which the first key, the last key and the count are known. Every gap between segments is a drop at a
known position. A gap inside a segment of three or more is hidden, but no larger than the segment's
score range, so a pair of drops found among the visible ones is certain when the lower of both is
larger than every such range. Where it is not, `QueryRanking.settle` returns a `Request` for just
the segments concerned; `answer` fulfils it from a second look at the scores of that query, listing
the keys of small segments and cutting large ones finer. It ends: keys are integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qure_core.mining.engines.keys import LAST_KEY, key_columns, key_scores, sort_keys_
from qure_core.mining.engines.ranked import RankedEnds
from qure_core.mining.engines.sketch import (
    BUCKETS,
    FIRST_KEY,
    Anchors,
    Summary,
    bucketed,
    ranked_keys,
)
from qure_core.mining.rows import MinedRow, curve_ranks, rows_of, sample_keys
from qure_core.mining.rules.rule import EndsRule
from qure_core.mining.rules.steep_drops import (
    STEEP,
    DropRule,
    drop_details,
    neighbourhood,
    relative_height,
)
from qure_core.mining.sampling import HIGHEST, priorities, threshold_for

_NO_KEYS = np.empty(0, np.int64)
LIST_AT_MOST = 65_536  # keys of one query that a request lists; more are cut finer first

Chunks = Callable[[Sequence[int]], Iterable[tuple[int, Tensor]]]
"""Given rows of queries, yields (first column, scores [rows, C]) over the whole corpus."""


def _scores(keys: np.ndarray) -> np.ndarray:
    return key_scores(torch.from_numpy(np.ascontiguousarray(keys))).numpy()


@dataclass
class Request:
    """What a query needs to know of its scores.

    listed: (first key, last key, priority threshold) of ranges whose keys are to be listed.
    cut: sorted edges of buckets that are to be counted, of all segments that are cut finer.
    members: whether the listed range is the query's set, which is all that is still missing.
    """

    listed: list[tuple[int, int, int]] = field(default_factory=list)
    cut: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    members: bool = False


@dataclass
class Answer:
    """What a `Request` asked for: sorted keys per range; count, first and last key per bucket."""

    listed: list[np.ndarray]
    cut: tuple[np.ndarray, np.ndarray, np.ndarray]


class _Unknown(Exception):
    """Raised inside `QueryRanking` when segments must be looked into."""

    def __init__(self, segments: np.ndarray) -> None:
        self.segments = segments


@dataclass
class QueryRanking:
    """One query's ranking below its target, as far as it is known.

    first_S, last_S, count_S: the segments, best first. sample: keys below the target with a
    priority under ``threshold``. ``answers`` holds listed ranges by (first, last, threshold).
    """

    target_key: int
    target_rank: int
    first_S: np.ndarray
    last_S: np.ndarray
    count_S: np.ndarray
    sample: np.ndarray
    word: int
    image_words: Tensor | None
    answers: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tidy()

    def _tidy(self) -> None:
        """Drop empty segments and part those of two, which hide nothing."""
        full = self.count_S > 0
        first, last, count = self.first_S[full], self.last_S[full], self.count_S[full]
        copies = np.where(count == 2, 2, 1)
        place = np.repeat(np.arange(len(count)), copies)
        second = np.diff(place, prepend=-1) == 0
        pair = (count == 2)[place]
        self.first_S = np.where(pair & second, last[place], first[place])
        self.last_S = np.where(pair & ~second, first[place], last[place])
        self.count_S = np.where(pair, 1, count[place])
        self.start_S = np.cumsum(self.count_S) - self.count_S
        self.below = int(self.count_S.sum())
        self.score_first_S, self.score_last_S = _scores(self.first_S), _scores(self.last_S)
        self.range_S = self.score_first_S - self.score_last_S
        # Images of one score hide only drops of nothing, whose positions are known.
        self.open_S = (self.count_S > 2) & (self.range_S > 0)

    def replace(self, chosen_S: np.ndarray, *parts: np.ndarray) -> None:
        """Put other segments, (first, last, count), in the place of those at ``chosen_S``."""
        keep = np.ones(len(self.count_S), bool)
        keep[chosen_S] = False
        columns = [
            np.concatenate([column[keep], part])
            for column, part in zip((self.first_S, self.last_S, self.count_S), parts, strict=True)
        ]
        order = np.argsort(columns[0], kind="stable")
        self.first_S, self.last_S, self.count_S = (column[order] for column in columns)
        self._tidy()

    def list_keys(self, keys: np.ndarray) -> None:
        """Replace every segment that sorted ``keys``, gapless in the ranking, cover in whole."""
        if not len(keys):
            return
        covered = np.flatnonzero((self.first_S >= keys[0]) & (self.last_S <= keys[-1]))
        if len(covered):
            low, high = self.first_S[covered[0]], self.last_S[covered[-1]]
            own = keys[(keys >= low) & (keys <= high)]
            self.replace(covered, own, own, np.ones(len(own), np.int64))

    def key_at(self, position: int) -> int:
        """The key at a position below the target, 0 the first."""
        segment = int(np.searchsorted(self.start_S, position, side="right")) - 1
        offset = position - int(self.start_S[segment])
        if offset == 0:
            return int(self.first_S[segment])
        if offset == self.count_S[segment] - 1:
            return int(self.last_S[segment])
        raise _Unknown(np.asarray([segment]))

    def score_at(self, position: int) -> float:
        segment = int(np.searchsorted(self.start_S, position, side="right")) - 1
        if self.range_S[segment] == 0:
            return float(self.score_first_S[segment])
        return float(_scores(np.asarray([self.key_at(position)]))[0])

    def _steepest_pair(self, window: int) -> tuple[int, int] | None:
        """Positions above both drops; `_Unknown` where hidden drops could change them."""
        gap_G = self.score_last_S[:-1] - self.score_first_S[1:]
        position_G = self.start_S[1:] - 1
        flat = np.flatnonzero((self.count_S > 2) & (self.range_S == 0))
        if len(flat):
            inside = [
                np.arange(s, s + c - 1)
                for s, c in zip(self.start_S[flat], self.count_S[flat], strict=True)
            ]
            position_G = np.concatenate([position_G, *inside])
            gap_G = np.concatenate([gap_G, np.zeros(len(position_G) - len(gap_G), np.float32)])
        within = position_G <= window - 2
        gap_G, position_G = gap_G[within], position_G[within]
        order = np.lexsort((position_G, -gap_G))
        apart = np.abs(np.diff(position_G[order])) > 1
        open_S = self.open_S & (self.start_S <= window - 2)
        if not apart.any():
            if open_S.any():
                raise _Unknown(np.flatnonzero(open_S))
            return None
        place = int(apart.argmax())
        doubtful = open_S & (self.range_S >= gap_G[order[place + 1]])
        if doubtful.any():
            raise _Unknown(np.flatnonzero(doubtful))
        one, other = position_G[order[place : place + 2]].tolist()
        return min(one, other), max(one, other)

    def _steepness(self, positions: Sequence[int]) -> float:
        position_2 = torch.tensor(positions)
        below = torch.tensor(self.below)
        start_2, stop_2 = neighbourhood(position_2, below)
        places_42 = torch.stack([start_2, position_2, position_2 + 1, stop_2])
        scores_42 = torch.tensor(
            [[self.score_at(p) for p in row] for row in places_42.tolist()], dtype=torch.float64
        )
        return float(relative_height(position_2, below, *scores_42).min())

    def _members(self, first: int, last: int, size: int, wanted: int | None) -> np.ndarray:
        """Keys of the range ``first .. last``, all ``size`` of them or the sample of ``wanted``."""
        word = torch.tensor(self.word, dtype=torch.int32)
        inside = (self.first_S >= first) & (self.last_S <= last)
        if self.count_S[inside].sum() == size and (self.count_S[inside] == 1).all():
            return sample_keys(self.first_S[inside], word, self.image_words, wanted)
        threshold = HIGHEST
        if wanted is not None and wanted < size:
            kept = self.sample[(self.sample >= first) & (self.sample <= last)]
            if len(kept) >= wanted:
                return sample_keys(kept, word, self.image_words, wanted)
            threshold = threshold_for(wanted, size)
        while (first, last, threshold) in self.answers:
            keys = self.answers[first, last, threshold]
            if threshold == HIGHEST:
                _check_count(len(keys), size)
            if threshold == HIGHEST or len(keys) >= (wanted or 0):
                return sample_keys(keys, word, self.image_words, wanted)
            threshold = min(HIGHEST, 2 * threshold)
        raise _Listing((first, last, threshold))

    def settle(self, rule: DropRule, wanted: int | None) -> MinedRow | Request:
        """The query's row of the mined set, or what must be known first."""
        try:
            return self._settle(rule, wanted)
        except _Listing as listing:
            return Request(listed=[listing.range], members=True)
        except _Unknown as unknown:
            chosen = unknown.segments
            if self.count_S[chosen].sum() <= LIST_AT_MOST:
                ranges = zip(
                    self.first_S[chosen].tolist(), self.last_S[chosen].tolist(), strict=True
                )
                return Request(listed=[(first, last, HIGHEST) for first, last in ranges])
            pieces = max(16, BUCKETS // len(chosen))
            edges = [_cut(int(self.first_S[s]), int(self.last_S[s]), pieces) for s in chosen]
            return Request(cut=np.unique(np.concatenate(edges)))

    def _settle(self, rule: DropRule, wanted: int | None) -> MinedRow:
        target_score = float(_scores(np.asarray([self.target_key]))[0])
        below = self.below
        window = rule.window(below)
        pair = self._steepest_pair(window) if below else None
        steepness = self._steepness(pair) if pair else None
        status = rule.status(below, steepness)
        if below == 0:
            size = self.target_rank
            first, last = FIRST_KEY, self.target_key - 1
        else:
            start, stop = (pair[0] + 1, pair[1]) if status == STEEP and pair else (0, window - 1)
            size = stop - start + 1
            first, last = self.key_at(start), self.key_at(stop)
        keys = self._members(first, last, size, wanted)
        drops = None
        marks = [self.target_rank]
        if status == STEEP and pair:
            base = self.target_rank + 1
            marks += [base + position for position in pair]
            upper, lower = (
                (base + position, self.score_at(position), self.score_at(position + 1))
                for position in pair
            )
            drops = (upper, lower)
        return MinedRow(
            target_score=target_score,
            target_rank=self.target_rank,
            status=rule.statuses[status],
            details=drop_details(drops, steepness),
            size=size,
            negative_keys=keys,
            curve=self.curve(marks),
        )

    def curve(
        self, marks: Sequence[int], top: np.ndarray = _NO_KEYS
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points of the curve at ranks that the segments know, from the target down; and of the
        ranking's best keys, ``top``, where they are given."""
        target_score = float(_scores(np.asarray([self.target_key]))[0])
        base = self.target_rank + 1
        ranks = np.concatenate(
            [
                np.arange(len(top)),
                [self.target_rank],
                base + self.start_S,
                base + self.start_S + self.count_S - 1,
            ]
        )
        scores = np.concatenate(
            [_scores(top), [target_score], self.score_first_S, self.score_last_S]
        )
        ranks, place = np.unique(ranks, return_index=True)
        nearest = np.searchsorted(ranks, curve_ranks(base + self.below, marks))
        chosen = np.unique(nearest[nearest < len(ranks)])
        return ranks[chosen].astype(np.int64), scores[place][chosen].astype(np.float32)

    def asked(self, request: Request) -> int:
        """About how many keys a request brings at most."""
        inside = 0
        for first, last, threshold in request.listed:
            within = (self.last_S >= first) & (self.first_S <= last)
            count = int(self.count_S[within].sum()) if first > FIRST_KEY else self.target_rank
            inside += int(count * (threshold / HIGHEST)) + 1
        return inside + 3 * len(request.cut)

    def take(self, request: Request, answer: Answer) -> None:
        """Use what a request brought; `RuntimeError` if the second look saw other scores."""
        known: list[int] = []
        listed: list[np.ndarray] = []
        for (first, last, threshold), keys in zip(request.listed, answer.listed, strict=True):
            if request.members:
                self.answers[first, last, threshold] = keys
                continue
            segment = int(np.searchsorted(self.first_S, first))
            _check_count(len(keys), int(self.count_S[segment]))
            known.append(segment)
            listed.append(keys)
        if known:
            keys = np.concatenate(listed)
            self.replace(np.asarray(known), keys, keys, np.ones(len(keys), np.int64))
        if len(request.cut):
            count, low, high = answer.cut
            own = np.searchsorted(self.first_S, request.cut[:-1], side="right") - 1
            # Buckets between the segments that are cut hold segments that stay as they are.
            inside = (own >= 0) & (request.cut[1:] - 1 <= self.last_S[own])
            chosen, place = np.unique(own[inside], return_inverse=True)
            found = np.bincount(place, weights=count[inside]).astype(np.int64)
            for one, expected in zip(found.tolist(), self.count_S[chosen].tolist(), strict=True):
                _check_count(one, expected)
            self.replace(chosen, low[inside], high[inside], count[inside])


class _Listing(Exception):
    """Raised inside `QueryRanking` when the members of a range must be listed."""

    def __init__(self, wanted: tuple[int, int, int]) -> None:
        self.range = wanted


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(
            f"a second look at a query's scores found {found} images where the first counted "
            f"{expected}: the same product gave other bits, as it may on nodes with different "
            "processors. Mine on nodes of one kind, or set mining.engine to 'sort'"
        )


def _cut(first: int, last: int, pieces: int) -> np.ndarray:
    """Edges that cut the keys ``first .. last`` into equal ranges."""
    span = last + 1 - first
    return np.unique(np.asarray([first + span * i // pieces for i in range(pieces + 1)], np.int64))


def rankings(summary: Summary, anchors: Anchors, image_words: Tensor | None) -> list[QueryRanking]:
    """Each query's ranking as its summary knows it."""
    queries = len(anchors.word_Q)
    order = torch.argsort(summary.sample_row_N, stable=True)
    row_N, key_N = summary.sample_row_N[order], summary.sample_key_N[order].numpy()
    bounds = torch.searchsorted(row_N, torch.arange(queries + 1)).tolist()
    result = []
    for q in range(queries):
        ranking = QueryRanking(
            target_key=int(anchors.target_key_Q[q]),
            target_rank=int(summary.above_Q[q]),
            first_S=summary.first_QB[q].numpy(),
            last_S=summary.last_QB[q].numpy(),
            count_S=summary.count_QB[q].numpy(),
            sample=np.sort(key_N[bounds[q] : bounds[q + 1]]),
            word=int(anchors.word_Q[q]),
            image_words=image_words,
        )
        near, far = summary.near_QR[q].numpy(), summary.far_QR[q].numpy()
        ranking.list_keys(near[near < LAST_KEY])
        ranking.list_keys(far[far > FIRST_KEY])
        result.append(ranking)
    return result


def answer(
    requests: dict[int, Request], anchors: Anchors, chunks: Chunks, image_words: Tensor | None
) -> dict[int, Answer]:
    """Fulfil the requests of some rows by a second look at their scores."""
    rows = sorted(requests)
    own = anchors.rows(torch.tensor(rows))
    listed: dict[int, list[list[np.ndarray]]] = {r: [[] for _ in requests[r].listed] for r in rows}
    bounds = {r: np.asarray(requests[r].listed, np.int64).reshape(-1, 3) for r in rows}
    cut = {r: _no_buckets(len(requests[r].cut) - 1) for r in rows}
    for first_column, scores_RC in chunks(rows):
        keys_RC = sort_keys_(ranked_keys(scores_RC, first_column, own)).cpu().numpy()
        for row, keys in zip(rows, keys_RC, strict=True):
            starts = keys.searchsorted(bounds[row][:, 0])
            stops = keys.searchsorted(bounds[row][:, 1], side="right")
            for place in np.flatnonzero(stops > starts).tolist():
                some = keys[starts[place] : stops[place]]
                threshold = requests[row].listed[place][2]
                if threshold < HIGHEST:
                    assert image_words is not None
                    words = image_words[key_columns(torch.from_numpy(some))]
                    some = some[(priorities(anchors.word_Q[row], words) < threshold).numpy()]
                listed[row][place].append(some.copy())
            if len(requests[row].cut):
                count, low, high = cut[row]
                one, edges = (torch.from_numpy(x)[None] for x in (keys, requests[row].cut))
                more, first, last = (x[0].numpy() for x in bucketed(one, edges)[:3])
                count += more
                np.minimum(low, first, out=low)
                np.maximum(high, last, out=high)
    return {
        row: Answer(
            [np.sort(np.concatenate([_NO_KEYS, *parts])) for parts in listed[row]], cut[row]
        )
        for row in rows
    }


def _no_buckets(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = max(count, 0)
    return (
        np.zeros(shape, np.int64),
        np.full(shape, LAST_KEY, np.int64),
        np.full(shape, FIRST_KEY, np.int64),
    )


def summarise_chunks(
    chunks: Iterable[tuple[int, Tensor]],
    anchors: Anchors,
    image_words: Tensor | None,
) -> Summary:
    """The summary of all queries over the chunks."""
    summary = Summary.empty(len(anchors.word_Q), anchors.word_Q.device, anchors.top)
    edges_QE = anchors.edges()
    for first_column, scores_QC in chunks:
        words = None
        if image_words is not None:
            words = image_words[first_column : first_column + scores_QC.shape[1]]
        summary.add(scores_QC, first_column, anchors, edges_QE, words)
    return summary


def settle_all(
    summary: Summary,
    anchors: Anchors,
    rule: DropRule,
    wanted: int | None,
    chunks: Chunks,
    image_words: Tensor | None,
    rows_at_once: Callable[[Sequence[int]], int],
) -> Iterator[tuple[MinedRow, bool]]:
    """Yield every query's row, in order, and whether its scores were looked at a second time.

    ``rows_at_once`` tells, from how many keys each query asks for, how many are looked at together.
    Sets that must be listed are, in groups of so many, when their turn comes.
    """
    known = dict(enumerate(rankings(summary, anchors, image_words)))
    outcomes = {row: ranking.settle(rule, wanted) for row, ranking in known.items()}
    looked = {row for row, outcome in outcomes.items() if isinstance(outcome, Request)}

    def waiting(members: bool) -> dict[int, Request]:
        return {
            row: outcome
            for row, outcome in outcomes.items()
            if isinstance(outcome, Request) and outcome.members == members
        }

    def look(requests: dict[int, Request]) -> None:
        """Fulfil the first of ``requests``, as many as go together."""
        count = rows_at_once([known[row].asked(request) for row, request in requests.items()])
        some = dict(itertools.islice(requests.items(), count))
        found = answer(some, anchors, chunks, image_words)
        for row, request in some.items():
            known[row].take(request, found[row])
            outcomes[row] = known[row].settle(rule, wanted)

    while requests := waiting(members=False):
        look(requests)
    for row in range(len(known)):
        while isinstance(outcomes[row], Request):
            look(waiting(members=True))
        outcome = outcomes.pop(row)
        assert isinstance(outcome, MinedRow)
        del known[row]
        yield outcome, row in looked


def settle_ends(
    summary: Summary,
    anchors: Anchors,
    rule: EndsRule,
    wanted: int | None,
    image_words: Tensor | None,
    image_tokens: Callable[[Tensor], Tensor],
    images_at_once: int,
) -> Iterator[MinedRow]:
    """Yield every query's row, in order, by a rule that looks at the top and below the target."""
    below_Q = summary.count_QB.sum(dim=1)
    ranked = RankedEnds(
        summary.top_QT,
        summary.near_QR,
        anchors.target_key_Q,
        summary.above_Q + 1 + below_Q,
        summary.above_Q,
        image_tokens,
        images_at_once,
    )
    known = rankings(summary, anchors, image_words)

    def curve(query: int, marks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        target = int(ranked.target_rank_Q[query])
        top = ranked.keys(query, slice(0, min(target, ranked.top_QR.shape[1])))
        return known[query].curve(marks, top.numpy())

    selection = rule.select(ranked)
    yield from rows_of(ranked, selection, rule.statuses, anchors.word_Q, image_words, wanted, curve)
