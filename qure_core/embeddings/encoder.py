"""From images and texts to vectors, in this process: what every stage encodes with.

    from qure_core import Encoder

    encoder = Encoder.load("runs/quickstart/checkpoints/train-0008")
    images = encoder.encode_images(["a.jpg", "b.jpg", "c.jpg"])  # [3, T, D]
    query = encoder.encode_queries(["a.jpg"], ["the same in red"])  # [1, D]
    scores, places = encoder.top_k(query, images, k=2)  # the two best for each query

Shapes: Q queries, M images, T query tokens, D embedding width, B batch, P patches, W vision width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike, fspath
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from qure_core.base.errors import InputError
from qure_core.data.loader import ImageLoader, VisionLoader
from qure_core.model import ComposedModel, QuReProcessor, encode_frozen, load_model
from qure_core.model.relevance import relevance_scores
from qure_core.runtime.prefetch import prefetched

Picture = str | PathLike[str] | Image.Image
_CHUNK = 1024  # images whose scores are held at a time


class Encoder:
    """A model and its processor on one device; parts of the model move there when first used.

    precision: of the frozen vision encoder's output, "fp16" or "fp32" (`encode_frozen`); a
    checkpoint is to be used with the one that it was trained with (``model.vision_precision``).
    max_pixels: images with more are refused. threads: decode at a time.
    """

    def __init__(
        self,
        model: ComposedModel,
        processor: QuReProcessor,
        device: torch.device | str = "cpu",
        precision: str = "fp16",
        max_pixels: int = 50_000_000,
        threads: int = 4,
    ) -> None:
        self.model, self.processor = model, processor
        self.device, self.precision = torch.device(device), precision
        self.max_pixels, self.threads = max_pixels, threads

    @classmethod
    def load(
        cls,
        checkpoint: str | PathLike[str],
        device: torch.device | str | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> Encoder:
        """An encoder of a checkpoint: a directory, its URI, or what `load_model` takes.

        ``device`` is a GPU where there is one, unless given; ``options`` go to the constructor.
        Raises `InputError` if the checkpoint is damaged or is none.
        """
        model, processor = load_model(fspath(checkpoint), tokenizer)
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.eval(), processor, chosen, **options)

    # Batches, as the stages use them.

    @cached_property
    def _vision_encoder(self) -> nn.Module:
        return self.model.vision_encoder.eval().to(self.device)

    @cached_property
    def _trained(self) -> ComposedModel:
        self.model.trained_part().to(self.device)
        return self.model

    def features(self, pixel_values: Tensor) -> Tensor:
        """The frozen encoder's features [B, P, W] of its input [B, 3, S, S]."""
        return encode_frozen(self._vision_encoder, pixel_values.to(self.device), self.precision)

    def vision(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features [B, P, W] as a loader's input gives them: themselves, or of its pixels."""
        if "vision" in inputs:
            return inputs["vision"].to(self.device)
        return self.features(inputs["pixel_values"])

    def vision_batches(
        self, load: VisionLoader, batches: Sequence[Sequence[str]]
    ) -> Iterator[Tensor]:
        """Features of batches of images by id, of which the next is loaded meanwhile."""
        for values in prefetched([partial(load, batch) for batch in batches], depth=1):
            yield self.vision({load.name: values})

    def images(self, vision_BPW: Tensor) -> Tensor:
        """Image embeddings [B, T, D] of features."""
        return self._trained.embed_images(vision_BPW)

    def queries(self, vision_BPW: Tensor, texts: Sequence[str]) -> Tensor:
        """Query embeddings [B, D] of reference images' features and modification texts."""
        input_ids, mask = self.processor.texts(texts)
        return self._trained.embed_queries(
            vision_BPW, input_ids.to(self.device), mask.to(self.device)
        )

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, D] of texts alone."""
        input_ids, mask = self.processor.texts(texts)
        return self._trained.embed_texts(input_ids.to(self.device), mask.to(self.device))

    # Whole lists, as people use them.

    @torch.inference_mode()
    def attention_grids(self, image: Picture) -> Tensor:
        """Where each of an image's vectors looked, [T, rows, columns] of its square input: the
        cross-attention of the last layer, without the class token's share.

        What it is not: a proof of why an image was found. Raises `InputError` of an image that
        cannot be read, or a model that has no such grid.
        """
        ((vision_BPW, _),) = self._batches([image], 1, show_progress=False)
        map_TP = self._trained.attention_maps(vision_BPW)[0].float().cpu()
        side = math.isqrt(map_TP.shape[1])
        if side < 2:
            raise InputError("this model takes an image as one vector: there is no grid to show")
        return map_TP[:, map_TP.shape[1] - side * side :].unflatten(1, (side, side))

    @torch.inference_mode()
    def encode_images(
        self, images: Sequence[Picture], batch_size: int = 16, show_progress: bool | None = None
    ) -> Tensor:
        """Image embeddings [M, T, D] of paths, URIs or PIL images, float32 on the CPU.

        ``show_progress`` True shows a bar, None only on a terminal. Raises `InputError` naming an
        image that is missing or cannot be decoded.
        """
        parts = [
            self.images(vision_BPW).float().cpu()
            for vision_BPW, _ in self._batches(images, batch_size, show_progress)
        ]
        config = self.model.config
        return torch.cat(parts) if parts else torch.empty(0, config.query_tokens, config.embed_dim)

    @torch.inference_mode()
    def encode_queries(
        self,
        images: Sequence[Picture] | None = None,
        texts: Sequence[str] | None = None,
        batch_size: int = 16,
        show_progress: bool | None = None,
    ) -> Tensor:
        """Query embeddings [Q, D] of reference images with modification texts, float32 on the CPU.

        Of texts alone: their embeddings as captions, which image-text pretraining set beside the
        images' (fine-tuning does not train them). Of images alone: with an empty text.
        """
        if images is None and texts is None:
            raise InputError("encode_queries: give images, texts, or both")
        if images is None:
            assert texts is not None
            starts = range(0, len(texts), batch_size)
            bar = self._bar(len(texts), "queries", show_progress)
            parts = []
            with bar:
                for start in starts:
                    some = texts[start : start + batch_size]
                    parts.append(self.texts(some).float().cpu())
                    bar.update(len(some))
        else:
            words = [""] * len(images) if texts is None else list(texts)
            if len(words) != len(images):
                raise InputError(
                    f"encode_queries: {len(images):,} images and {len(words):,} texts; give one "
                    "text for each image"
                )
            parts = [
                self.queries(vision_BPW, [words[place] for place in places]).float().cpu()
                for vision_BPW, places in self._batches(images, batch_size, show_progress)
            ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.config.embed_dim)

    def score(self, query_QD: Tensor, image_MTD: Tensor) -> Tensor:
        """Relevance of every image to every query, [Q, M]: the larger, the better it fits."""
        return torch.cat([scores for _, scores in self._scores(query_QD, image_MTD)], dim=1)

    def top_k(self, query_QD: Tensor, image_MTD: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """Scores and places of each query's best images, [Q, k] each, best first.

        Equal scores are in the order of the images; fewer than ``k`` images give them all.
        """
        best_QK = torch.empty(len(query_QD), 0)
        place_QK = torch.empty(len(query_QD), 0, dtype=torch.int64)
        for first, scores_QC in self._scores(query_QD, image_MTD):
            columns = torch.arange(first, first + scores_QC.shape[1])
            both = torch.cat([best_QK, scores_QC], dim=1)
            places = torch.cat([place_QK, columns.expand(len(query_QD), -1)], dim=1)
            # What was found before stands first, so that equal scores stay in order.
            both, order = both.sort(dim=1, descending=True, stable=True)
            best_QK, place_QK = both[:, :k], places.gather(1, order[:, :k])
        return best_QK, place_QK

    def _scores(self, query_QD: Tensor, image_MTD: Tensor) -> Iterator[tuple[int, Tensor]]:
        query_QD, image_MTD = torch.as_tensor(query_QD), torch.as_tensor(image_MTD)
        if query_QD.ndim != 2 or image_MTD.ndim != 3 or query_QD.shape[1] != image_MTD.shape[2]:
            raise InputError(
                f"queries {tuple(query_QD.shape)} and images {tuple(image_MTD.shape)} are not "
                "embeddings [Q, D] and [M, T, D] of one model"
            )
        query_QD = query_QD.to(self.device)
        for first in range(0, max(len(image_MTD), 1), _CHUNK):
            chunk = image_MTD[first : first + _CHUNK].to(self.device)
            yield first, relevance_scores(query_QD, chunk).cpu()

    def _batches(
        self, images: Sequence[Picture], batch_size: int, show_progress: bool | None
    ) -> Iterator[tuple[Tensor, range]]:
        """Features of consecutive images, and their places."""
        known = {
            str(place): image if isinstance(image, Image.Image) else fspath(image)
            for place, image in enumerate(images)
        }
        load = ImageLoader(
            known,
            self.processor.image_size,
            self.processor.pixels,
            self.max_pixels,
            self.threads,
        )
        places = [
            range(start, min(start + batch_size, len(images)))
            for start in range(0, len(images), batch_size)
        ]
        names = [[str(place) for place in part] for part in places]
        with self._bar(len(images), "images", show_progress) as bar:
            for part, vision_BPW in zip(places, self.vision_batches(load, names), strict=True):
                yield vision_BPW, part
                bar.update(len(part))

    @staticmethod
    def _bar(total: int, unit: str, show: bool | None) -> tqdm[Any]:
        return tqdm(total=total, unit=f" {unit}", disable=None if show is None else not show)
