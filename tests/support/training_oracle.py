"""An epoch of training from the method alone, that the training loop is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qure_core import storage
from qure_core.base.config import QueryEncoder
from qure_core.data import read_split
from qure_core.data.loader import ImageLoader
from qure_core.data.schema import Split, Triplet
from qure_core.model import ComposedModel, QuReProcessor, build_model, encode_frozen, load_model
from qure_core.training.batches import epoch_order
from qure_core.training.negatives import random_negatives


@dataclass(frozen=True)
class Recipe:
    """What an epoch is taken with. threshold: likeness from which an answer may fit a query."""

    batch_size: int
    objective: str = "bradley_terry"
    options: tuple[tuple[str, Any], ...] = ()
    negatives: int = 1
    query_encoder: QueryEncoder = "qformer"
    seed: int = 1000
    lr: float = 1e-3
    threshold: float | None = None


def parts(
    run_dir: Path, query_encoder: QueryEncoder = "qformer"
) -> tuple[ComposedModel, QuReProcessor, Split, dict[str, list[str]]]:
    start = str(run_dir / "checkpoints/train-0000")
    model, processor = load_model(start, dropout=0.0)
    if query_encoder == "sprc":
        model, _ = load_model(start, dropout=0.0, query_encoder=query_encoder)
    elif query_encoder == "combiner":
        options = {"dropout": 0.0, "train_towers": True}
        model, _ = build_model("tiny", processor.tokenizer, 0.0, 3, query_encoder, options)
    corpora = storage.read_json(str(run_dir / "data/corpora.json"))
    return model, processor, read_split(str(run_dir / "data/train")), corpora


def plain_loss(
    objective: str,
    triplet: Triplet,
    batch: Sequence[Triplet],
    known: Sequence[Triplet],
    negatives: dict[str, tuple[str, ...]],
    score: Callable[[str], Tensor],
    may_fit: Callable[[str], bool],
) -> Tensor:
    """One triplet's loss from its definition, in its batch and among all that are known.

    ``score`` gives an image's score, ``may_fit`` tells which images are to be left alone.
    """
    positive = score(str(triplet.target_id))
    own = negatives[triplet.query_id]
    if objective == "bradley_terry":
        losses = [-torch.nn.functional.logsigmoid(positive - score(name)) for name in own]
        return torch.stack(losses).mean()
    same = [other for other in batch if other.category == triplet.category]
    names = {name for o in same for name in (str(o.target_id), *negatives[o.query_id])}
    query = (triplet.category, triplet.reference_id, triplet.text)
    names -= {str(o.target_id) for o in known if (o.category, o.reference_id, o.text) == query}
    names = {name for name in (names - {triplet.reference_id}) | set(own) if not may_fit(name)}
    return torch.stack([positive, *map(score, sorted(names))]).logsumexp(dim=0) - positive


def plain_epoch(run_dir: Path, recipe: Recipe) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and mean losses of a run's first epoch, from the method alone.

    Each query and each image by itself through the model: no parts of batches, no scaling.
    """
    model, processor, split, corpora = parts(run_dir)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.05)
    load = ImageLoader(
        split.images, processor.image_size, processor.pixels, 10**7, threads=1, cache_mb=8
    )

    @cache
    def vision(name: str) -> Tensor:
        return encode_frozen(model.vision_encoder, load([name]), "fp16")

    order = epoch_order(len(split.triplets), recipe.seed, 0)
    losses = []
    for start in range(0, len(order), recipe.batch_size):
        batch = [split.triplets[i] for i in order[start : start + recipe.batch_size]]
        negatives = {
            t.query_id: random_negatives(t, corpora[t.category], recipe.seed, 0, recipe.negatives)
            for t in batch
        }
        optimizer.zero_grad()
        image = cache(lambda name: model.embed_images(vision(name))[0])
        total = torch.zeros(())
        for triplet in batch:
            ids, mask = processor.texts([triplet.text])
            query_D = model.embed_queries(vision(triplet.reference_id), ids, mask)[0]

            def score(
                name: str, query_D: Tensor = query_D, image: Callable[[str], Tensor] = image
            ) -> Tensor:
                return (image(name) @ query_D).max() / model.temperature

            def may_fit(
                name: str,
                target: str = str(triplet.target_id),
                image: Callable[[str], Tensor] = image,
            ) -> bool:
                likeness = torch.stack([(image(name) @ one).max() for one in image(target)]).mean()
                return recipe.threshold is not None and bool(likeness >= recipe.threshold)

            total = total + plain_loss(
                recipe.objective, triplet, batch, split.triplets, negatives, score, may_fit
            )
        (total / len(batch)).backward()
        optimizer.step()
        losses.append(total.item() / len(batch))
    return model.state_dict(), losses


def check_weights(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        difference = (ours[name] - value).abs().flatten()
        # AdamW divides a gradient by its own size, so where it is rounding noise, so is the
        # step: all of it for the biases of attention keys, which change no attention.
        assert difference.max() <= 5 * 1e-3, name
        if not name.endswith("key.bias"):
            assert difference.quantile(0.99) <= 1e-5, name
