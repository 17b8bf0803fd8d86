"""Negatives near the target's score, by a distribution (SimANS, Zhou et al., arXiv 2210.11773)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field

from qure_core.base.config import MiningSettings
from qure_core.base.options import read_options
from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules.rule import Selection


class SimANSOptions(BaseModel, extra="forbid", allow_inf_nan=False):
    """law: "square", ``exp(-a (s - s+ + b)^2)`` of a score s and the target's s+, or "absolute",
    ``exp(-a |s - s+ + b|)`` (the program's, for passages, with a = 3 and b = 0). A positive b asks
    for negatives below the target, as in the program; the paper's formula has the other sign.
    a: the paper's 0.5 is for inner products of 5 to 100; 100 is about that for cosines over a
    temperature of 0.07. candidates: so many best images are drawn from, the target apart.
    """

    law: Literal["square", "absolute"] = "square"
    a: float = Field(100.0, gt=0)
    b: float = 0.0
    candidates: int = Field(200, ge=1)


class SimANS:
    """A weight for each of the best images, the larger the nearer its score is to the target's.

    Negatives are drawn by these weights, without replacement within an epoch. One sort.
    """

    name: ClassVar[str] = "simans"
    version: ClassVar[int] = 1
    statuses: ClassVar[tuple[str, ...]] = ("weighted",)
    found: ClassVar[str] = "by weights"
    details: ClassVar[Mapping[str, Any]] = {
        "effective": "float64",  # how many equally likely images are as hard to guess
    }
    figures: ClassVar[Mapping[str, str]] = {"effective": "effective negatives"}
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = False

    def __init__(self, chosen: SimANSOptions) -> None:
        self.chosen = chosen

    @classmethod
    def of(cls, mining: MiningSettings) -> SimANS:
        """The rule as the settings have it."""
        return cls(read_options(SimANSOptions, mining.options, "mining.options", cls.name))

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return self.chosen.model_dump()

    def weights(self, scores_N: np.ndarray, target_score: float) -> np.ndarray:
        """Weights [N] of scores, the largest 1: they underflow where no score is near."""
        away = np.asarray(scores_N, np.float64) - target_score + self.chosen.b
        log_N = -self.chosen.a * (away**2 if self.chosen.law == "square" else np.abs(away))
        weights: np.ndarray = np.exp(log_N - log_N.max())
        return weights

    def select(self, ranked: Ranked) -> Selection:
        """The weights of every query's best images."""
        members, weights, details, spans = {}, {}, [], []
        scores_QM = ranked.scores_QM.cpu().numpy()
        length, target = ranked.length_Q.tolist(), ranked.target_rank_Q.tolist()
        for query, (images, rank) in enumerate(zip(length, target, strict=True)):
            others = np.arange(min(images, self.chosen.candidates + 1))
            others = others[others != rank][: self.chosen.candidates]
            own = self.weights(scores_QM[query, others], float(scores_QM[query, rank]))
            share = own / own.sum()
            some = share[share > 0]
            members[query], weights[query] = others, own
            spans.append((int(others[0]), int(others[-1]) + 1))
            details.append({"effective": float(np.exp(-(some * np.log(some)).sum()))})
        start_Q, stop_Q = torch.tensor(spans).unbind(dim=1)
        status_Q = torch.zeros(len(spans), dtype=torch.int64)
        marks: list[list[int]] = [[] for _ in spans]
        return Selection(status_Q, start_Q, stop_Q, details, marks, members, weights)

    @staticmethod
    def cut(details: Mapping[str, Any], target_rank: int) -> Any:
        """The target's rank: what is drawn from is otherwise always the same ranks."""
        del details
        return target_rank

    @staticmethod
    def describe(details: Mapping[str, Any]) -> list[str]:
        """How many images share the weight."""
        return [f"as uncertain as {details['effective']:.1f} equally likely negatives"]
