"""The model card of a checkpoint: its data and settings, what it reaches, how to load it."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qure_core import storage
from qure_core.base.config import Settings, flatten, free_settings
from qure_core.evaluation.protocols import of_manifest
from qure_core.job.layout import committed
from qure_core.model.checkpoint_files import CHECKPOINT_KIND

_TAGS = ["composed-image-retrieval", "image-retrieval", "qure", "blip-2"]
_OURS = re.compile(r"random weights|\d+ epochs of image-text pretraining on \d+ captions")
_BODY = """
# {title}

A composed-image retriever: a query is a reference image with a modification text, the answer ranks
images. It has BLIP-2's architecture, fine-tuned by [QuRe](https://arxiv.org/abs/2507.12416) with
`{objective}` against {negatives} negatives, after {epoch} of {epochs} epochs.

## How to load it

```python
from qure_core import Encoder

encoder = Encoder.load("{where}")
images = encoder.encode_images(["a.jpg", "b.jpg"])
queries = encoder.encode_queries(["a.jpg"], ["the same in red"])
scores, places = encoder.top_k(queries, images, k=2)
```

Images are taken as `{pixels}` (`data.pixels`), by {precision} features of the frozen encoder.

## Data

{data}

## Results

{results}

## Settings

```yaml
{settings}```

Weights: SHA-256 `{digest}`; started from {origin}.
"""


def make_card(
    settings: Settings, checkpoint: str, licence: str, where: str, title: str
) -> ModelCard:
    """The card of ``checkpoint``, of the run that ``settings`` are of.

    ``licence`` is a licence's identifier on the hub ("apache-2.0", "other"), ``where`` what the
    model is loaded by. Paths of the run are left out: a card is public.
    """
    manifest = storage.read_manifest(checkpoint, CHECKPOINT_KIND)
    evaluations = committed(settings.run.dir, "evaluations")
    dataset = settings.data.root.rstrip("/").rsplit("/", 1)[-1]
    origin = str(manifest.get("origin") or _origin(settings))
    data = ModelCardData(
        license=licence,
        library_name="qure-core",
        tags=_TAGS,
        model_name=title,
        base_model=settings.model.pretrained if _is_hub_id(settings.model.pretrained) else None,
        eval_results=_results(evaluations, dataset) or None,
    )
    body = _BODY.format(
        title=title,
        objective=settings.objective.name,
        negatives=settings.mining.rule if settings.train.negatives == "mined" else "random",
        epoch=manifest["epoch"],
        epochs=settings.train.epochs,
        where=where,
        pixels=manifest.get("pixels", "released"),
        precision=settings.model.vision_precision,
        data=_data(settings, dataset),
        results=_table(evaluations) or "The run had no validation split, so nothing was measured.",
        settings=yaml.safe_dump(_shown(settings), sort_keys=False),
        digest=manifest["files"]["model.safetensors"]["sha256"],
        origin=origin if _is_hub_id(origin) or _OURS.fullmatch(origin) else "its owner's weights",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _is_hub_id(name: str | None) -> bool:
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", name or "")
    return bool(plain) and not str(name).startswith(".") and not storage.exists(str(name))


def _origin(settings: Settings) -> str:
    first = storage.join(settings.run.dir, "checkpoints", "train-0000")
    if not storage.is_committed(first):
        return "unknown weights"
    return str(storage.read_manifest(first, CHECKPOINT_KIND).get("origin", "unknown weights"))


def _shown(settings: Settings) -> dict[str, Any]:
    """The settings that a result depends on, without paths."""
    free = free_settings()
    plain = {
        name: value
        for name, value in flatten(settings.resolved()).items()
        if name not in free | {"model.pretrained", "model.tokenizer"} and value is not None
    }
    return {name: value for name, value in plain.items() if not name.startswith("data.world.")}


def _data(settings: Settings, dataset: str) -> str:
    lines = []
    for name in ("train", "val"):
        uri = storage.join(settings.run.dir, "data", name)
        if storage.is_committed(uri):
            facts = storage.read_json(str(storage.manifest_uri(uri)))
            lines.append(
                f"- {name}: {facts['triplets']:,} triplets over {facts['images']:,} images"
            )
    return "\n".join([f"`{dataset}`, {settings.data.format} layout.", "", *lines])


def _results(evaluations: list[dict[str, Any]], dataset: str) -> list[EvalResult]:
    """The last evaluation's figures, as the hub lists them."""
    if not evaluations:
        return []
    last = evaluations[-1]
    return [
        EvalResult(
            task_type="composed-image-retrieval",
            dataset_type=dataset,
            dataset_name=f"{dataset} ({last['split']}, gallery: {last['gallery']})",
            dataset_split=last["split"],
            metric_type=name,
            metric_value=round(float(value), 4),
        )
        for name, value in of_manifest(last).headline(last["metrics"]).items()
    ]


def _table(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return ""
    figures = [of_manifest(row).headline(row["metrics"]) for row in evaluations]
    names = [n for n in of_manifest(evaluations[-1]).columns if n in figures[-1]]
    lines = [f"| | gallery | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for row, values in zip(evaluations, figures, strict=True):
        cells = " | ".join(f"{values[n]:.2f}" if n in values else "" for n in names)
        lines.append(f"| {row['name']} | {row['gallery']} | {cells} |")
    return "\n".join(lines)
