"""What is differentiated: per-sample losses of the two stages, as modules that DDP can wrap."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn

from qure_core.model import ComposedModel, Embedded
from qure_core.model.relevance import relevance_scores, token_likeness
from qure_core.objectives import Objective, Outputs
from qure_core.objectives.contrastive import contrastive_losses
from qure_core.objectives.options import InBatchOptions


def gathered(local: Tensor, send: Tensor, take: Tensor) -> Tensor:
    """Rows of all workers with their gradients, as `batches.exchange` says."""
    assert dist.is_initialized(), "a batch of several workers"
    return torch.cat(list(dist_nn.all_gather(local[send].contiguous())))[take]


_HELD = 2**24  # products of tokens at a time


@torch.no_grad()
def _as_like(image_ATD: Tensor, target_B: Tensor, threshold_B: Tensor) -> Tensor:
    """Which images are as like each target as its threshold says, [B, A]."""
    with torch.autocast(image_ATD.device.type, enabled=False):
        image_ATD = image_ATD.float()
        images, tokens, _ = image_ATD.shape
        rows = target_B.split(max(1, _HELD // (images * tokens * tokens)))
        likeness_BA = torch.cat([token_likeness(image_ATD[own], image_ATD) for own in rows])
    return likeness_BA >= threshold_B[:, None]


class TripletStep(nn.Module):
    """An objective's losses of triplets, with figures of each.

    Only what is trained belongs to this module: the frozen encoder is neither moved nor exchanged
    between workers.
    """

    def __init__(self, model: ComposedModel, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        if objective.options.temperature is not None:
            # The model's gets no gradient, which workers would wait for, and is not to decay.
            model.temperature.requires_grad_(False)
        self._model = (model,)  # in a tuple, which registers nothing
        self.trained = model.trained_part()
        options = objective.options
        self._masks = not isinstance(options, InBatchOptions) or options.mask_likely
        self._drops_out = any(
            isinstance(part, nn.Dropout) and part.p > 0 for part in self.trained.modules()
        )

    @torch.no_grad()
    def _as_mined(self, vision: Tensor, answer_A: Tensor) -> Tensor:
        """Answers [A, T, D] as mining embeds them, where the step does not: two draws of dropout
        make an image unlike itself, and half precision loses those at the threshold."""
        training = self.trained.training
        self.trained.eval()
        with torch.autocast(vision.device.type, enabled=False):
            image_ATD: Tensor = self._model[0].embed_images(vision[answer_A])
        self.trained.train(training)
        return image_ATD

    def forward(
        self,
        vision: Tensor,
        reference_B: Tensor,
        answer_A: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        **labels: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [B] and figures [B] by name: the objective's, and of all objectives

        accuracy: the share of a triplet's negatives that score below its target;
        margin: by how much they do, on average;
        likely: with thresholds of a mined set, candidates of the batch that may fit.
        """
        embedded: Embedded = self._model[0](
            vision, reference_B, answer_A, input_ids, attention_mask
        )
        whole = "own_B" in labels

        def of_all(what: str, values: Tensor) -> Tensor:
            return (
                gathered(values, labels[f"send_{what}"], labels[f"take_{what}"])
                if whole
                else values
            )

        query_BD = of_all("queries", embedded.query_BD)
        image_ATD = of_all("answers", embedded.image_ATD)
        candidate_BA, likely_BA = labels.get("candidate_BA"), None
        if candidate_BA is not None and "threshold_B" in labels and self._masks:
            own_ATD = embedded.image_ATD
            if self._drops_out or torch.is_autocast_enabled(vision.device.type):
                own_ATD = self._as_mined(vision, answer_A)
            with torch.no_grad():
                settled_ATD = of_all("answers", own_ATD.detach())
            likely_BA = candidate_BA & _as_like(
                settled_ATD, labels["target_B"], labels["threshold_B"]
            )
        outputs = Outputs(
            query_BD,
            image_ATD,
            relevance_scores(query_BD, image_ATD),
            labels["target_B"],
            labels["negative_BK"],
            labels["valid_B"],
            self._model[0].temperature,
            candidate_BA,
            likely_BA,
        )
        losses_B, figures = self.objective(outputs)
        if embedded.second_BD is not None:
            second_BD = of_all("queries", embedded.second_BD)
            second_BA = relevance_scores(second_BD, image_ATD)
            second = replace(outputs, query_BD=second_BD, scores_BA=second_BA)
            losses_B = losses_B + embedded.second_weight * self.objective(second)[0]
        margin_BK = (outputs.target_scores() - outputs.negative_scores()).detach().float()
        figures = figures | {
            "accuracy": (margin_BK > 0).float().mean(dim=1),
            "margin": margin_BK.mean(dim=1),
        }
        if likely_BA is not None:
            figures["likely"] = likely_BA.sum(dim=1).float()
        if whole:
            own_B = labels["own_B"]
            losses_B = losses_B[own_B]
            figures = {name: value[own_B] for name, value in figures.items()}
        if embedded.penalty_B is not None:
            losses_B = losses_B + embedded.penalty_B
        return losses_B, figures


class CaptionStep(nn.Module):
    """BLIP-2's image-text contrastive loss of each pair over the global batch."""

    def __init__(self, model: ComposedModel, smoothing: float) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        same_BN: Tensor,
        pixel_values: Tensor | None = None,
        vision: Tensor | None = None,
        send_pairs: Tensor | None = None,
        take_pairs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [B]; ``same_BN`` is 1 where a pair of the global batch has the pair's caption.

        Images are given as ``pixel_values`` where the encoder is trained, else as its features.
        """
        model = self.model
        if vision is None:
            assert pixel_values is not None, "images of pairs"
            vision = model.encode_vision(pixel_values).float()
        image_BTD = model.embed_images(vision)
        text_BD = model.embed_texts(input_ids, attention_mask)
        image_NTD, text_ND = image_BTD, text_BD
        if send_pairs is not None and take_pairs is not None:
            image_NTD = gathered(image_BTD, send_pairs, take_pairs)
            text_ND = gathered(text_BD, send_pairs, take_pairs)
        image_to_text_BN = torch.einsum("btd,nd->bnt", image_BTD, text_ND).amax(dim=-1)
        text_to_image_BN = relevance_scores(text_BD, image_NTD)
        losses_B = contrastive_losses(
            image_to_text_BN / model.temperature,
            text_to_image_BN / model.temperature,
            same_BN / same_BN.sum(dim=1, keepdim=True),
            self.smoothing,
        )
        return losses_B, {}
