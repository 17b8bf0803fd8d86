"""Mining from cheaper products: fp32's own answers from half precision with a proven error bound.

    python tests/benchmarks/halves.py [--images 100000] [--queries 1000] [--top 512]

Clustered embeddings of 32 x 256 numbers an image, stored as fp16; on the GPU if there is one.
Scores are computed in fp32 and, in the same run, from bf16 (CPU) or fp16 products (GPU; there also
from a query's two fp16 halves, which together hold its fp32). By Cauchy and Schwarz a score is then
wrong by at most e = |q - q~| |t| + |q~| |t - t~|, besides the rounding of sums. Two kinds of rule:

- of the best ``top`` images (`target_drop`, windows): whatever may be among them by its bound is
  scored again in fp32, and the answer is held against that of fp32 products alone;
- of the steepest drops of the whole curve: a query is certain if its second drop is steeper than
  its third by more than the bound can take away. Any other has to be scored again whole.

Besides, how many images could be passed over unseen: an image's best token scores at most
q.c + |q| r,
where c is its tokens' centroid and r the largest distance from it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from synthetic import clustered_vectors
from torch import Tensor

TOKENS, WIDTH = 32, 256
CHUNK = 2048
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
# Sums of WIDTH products in fp32 are off by at most so much of |q| |t|, and both ways' sums are.
SUMS = 2 * WIDTH * 2.0**-23


@dataclass(frozen=True)
class Way:
    """Gives the scores [Q, m] of a chunk of image vectors [m * T, D]; ``bound_Q`` holds of each."""

    score: Callable[[Tensor], Tensor]
    bound_Q: Tensor


def best_token(scores_QN: Tensor) -> Tensor:
    return scores_QN.unflatten(1, (-1, TOKENS)).amax(dim=-1).float()


def product(one: Tensor, other: Tensor) -> Tensor:
    """Summed in fp32; on a GPU also given so, on a CPU rounded to what it is made of."""
    if DEVICE.type == "cuda" and one.dtype != torch.float32:
        return torch.mm(one, other.T, out_dtype=torch.float32)
    return torch.mm(one, other.T)


def ways(query_QD: Tensor, image_MTD: Tensor) -> dict[str, Way]:
    norm_Q = query_QD.norm(dim=1)
    half_QD = query_QD.to(HALF)
    rest_QD = query_QD - half_QD.float()
    least = float(torch.finfo(HALF).eps) / 2
    # fp16 holds what is stored exactly; bf16 takes its rounding of |t| <= 1, and of the score's.
    stored = 0.0 if torch.float16 == HALF else least
    given = 0.0 if DEVICE.type == "cuda" else least
    once_Q = rest_QD.norm(dim=1) + half_QD.float().norm(dim=1) * stored + norm_Q * (given + SUMS)
    found = {
        "fp32": Way(lambda t: best_token(product(query_QD, t.float())), norm_Q * SUMS),
        f"{HALF}": Way(lambda t: best_token(product(half_QD, t.to(HALF))), once_Q),
    }
    if DEVICE.type == "cuda":
        low_QD = rest_QD.half()
        left_Q = (rest_QD - low_QD.float()).norm(dim=1)
        found["two fp16"] = Way(
            lambda t: best_token(product(half_QD, t) + product(low_QD, t)),
            left_Q + norm_Q * 2 * SUMS,
        )
    return found


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def scored(way: Way, image_MTD: Tensor) -> tuple[float, Tensor]:
    """Seconds and scores [Q, M] of a pass over the corpus; the second of two."""
    for _ in range(2):
        synchronise()
        started = time.perf_counter()
        chunks = [way.score(part.flatten(0, 1)) for part in image_MTD.split(CHUNK)]
        synchronise()
        seconds = time.perf_counter() - started
    return seconds, torch.cat(chunks, dim=1)


def again(query_QD: Tensor, image_MTD: Tensor, scores_QM: Tensor, open_QM: Tensor) -> Tensor:
    """The scores with those that are open in fp32, and all others below them."""
    result_QM = torch.full_like(scores_QM, -torch.inf)
    for query, open_M in enumerate(open_QM):
        places = open_M.nonzero().flatten()
        vectors = image_MTD[places].float().flatten(0, 1)
        result_QM[query, places] = best_token(product(query_QD[query : query + 1], vectors))[0]
    return result_QM


def left_by_balls(query_QD: Tensor, image_MTD: Tensor, least_Q1: Tensor) -> float:
    """Share of the images that may score ``least_Q1`` or more, by their tokens' ball."""
    left, pairs = 0, 0
    for part_MTD in image_MTD.split(CHUNK):
        tokens_MTD = part_MTD.float()
        centre_MD = tokens_MTD.mean(dim=1)
        radius_M = (tokens_MTD - centre_MD[:, None]).norm(dim=-1).amax(dim=1)
        most_QM = product(query_QD, centre_MD) + query_QD.norm(dim=1)[:, None] * radius_M
        left += int((most_QM >= least_Q1).sum())
        pairs += most_QM.numel()
    return left / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--top", type=int, default=512)
    chosen = parser.parse_args()
    image_MTD = torch.empty(chosen.images, TOKENS, WIDTH, dtype=torch.float16, device=DEVICE)
    for number, part_MTD in enumerate(image_MTD.split(CHUNK)):
        shape = (len(part_MTD), TOKENS, WIDTH)
        part_MTD.copy_(torch.from_numpy(clustered_vectors(shape, number, torch.float16)))
    query_QD = torch.from_numpy(clustered_vectors((chosen.queries, WIDTH), 4242, torch.float32))
    query_QD = query_QD.to(DEVICE)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()}"
    print(f"{chosen.images:,} images, {chosen.queries:,} queries; {DEVICE.type} ({name})")
    exact, exact_QM = 0.0, torch.empty(0)
    for name, way in ways(query_QD, image_MTD).items():
        seconds, scores_QM = scored(way, image_MTD)
        if name == "fp32":
            exact, exact_QM = seconds, scores_QM
            print(f"fp32 products and maxima: {seconds:.3f} s")
            least_Q1 = scores_QM.topk(chosen.top, dim=1).values[:, -1:]
            left = left_by_balls(query_QD, image_MTD, least_Q1)
            print(f"centroids and radii leave {left:.1%} of the images for the best {chosen.top}")
            continue
        wrong_QM = (scores_QM - exact_QM).abs()
        assert (wrong_QM <= way.bound_Q[:, None]).all(), "the bound does not hold"
        synchronise()
        started = time.perf_counter()
        least_Q1 = scores_QM.topk(chosen.top, dim=1).values[:, -1:]
        open_QM = scores_QM >= least_Q1 - 2 * way.bound_Q[:, None]
        ours_QM = again(query_QD, image_MTD, scores_QM, open_QM)
        synchronise()
        more = time.perf_counter() - started
        expected = exact_QM.topk(chosen.top, dim=1)
        ours = ours_QM.topk(chosen.top, dim=1)
        same = torch.isclose(ours.values, expected.values, rtol=0, atol=SUMS).all(dim=1)
        drops_QM = exact_QM.sort(dim=1, descending=True).values.diff(dim=1).neg()
        third = drops_QM.topk(3, dim=1).values
        certain = (third[:, 1] - third[:, 2]) > 4 * way.bound_Q
        print(
            f"{name}: {seconds:.3f} s, {exact / seconds:.2f} x as fast; largest error "
            f"{float(wrong_QM.max()):.1e}, proven {float(way.bound_Q.max()):.1e}\n"
            f"  best {chosen.top}: {open_QM.float().sum(dim=1).mean():,.0f} scored again "
            f"({open_QM.float().mean():.2%}) in {more:.3f} s; in all "
            f"{exact / (seconds + more):.2f} x fp32, {same.float().mean():.1%} of the queries as "
            "by fp32\n"
            f"  steepest drops: {certain.float().mean():.1%} of the queries certain"
        )


if __name__ == "__main__":
    main()
