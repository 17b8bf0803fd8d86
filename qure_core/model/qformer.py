"""The Q-Former's pass over images and composed queries together, on transformers' parameters.

Both share their query tokens' weights, so they go through every layer as one batch; only
self-attention, which texts take part in, is apart. The trained layer norm before the Q-Former is
folded into the layers that read it: frozen features then need no gradient, which saves a product
as large as the keys' and values' own.

Shapes: R rows of query tokens (images first, then composed queries), B texts (of the last B rows,
or alone), T query tokens, L text tokens, P vision tokens, W vision width, H width, N all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel

_Module = Any  # transformers' attention and layers, whose parts have no static types


def qformer_hidden_states(
    qformer: Blip2QFormerModel,
    ln_vision: nn.LayerNorm,
    query_TH: Tensor | None,
    vision_RPW: Tensor | None,
    text_BLH: Tensor | None = None,
    mask_BL: Tensor | None = None,
    seen: list[Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Last hidden states of the query tokens [R, T, H] and of the text tokens [B, L, H].

    Without ``query_TH`` texts go alone; without ``text_BLH`` all rows are images. ``mask_BL`` is 1
    for a text's own tokens and 0 for its padding. To ``seen`` is added, for each layer of
    cross-attention, how much each query token attends to each vision token [R, T, P], the mean over
    heads.
    """
    rows = 0 if vision_RPW is None else vision_RPW.shape[0]
    length = 0 if query_TH is None else query_TH.shape[0]
    layout = _Layout(rows, length, text_BLH, mask_BL)
    parts = [] if query_TH is None else [query_TH.repeat(rows, 1)]
    if text_BLH is not None:
        parts.append(text_BLH.flatten(0, 1))
    hidden_NH = qformer.dropout(qformer.layernorm(torch.cat(parts)))
    if vision_RPW is not None:
        vision_RPW = F.layer_norm(
            vision_RPW.to(ln_vision.weight.dtype), ln_vision.normalized_shape, eps=ln_vision.eps
        )
    layer: _Module
    for layer in qformer.encoder.layer:
        attended_NH = layer.attention.output(
            layout.self_attention(layer.attention.attention, hidden_NH), hidden_NH
        )
        query_KH, text_KH = attended_NH.split(layout.sizes)
        outputs = []
        if rows:
            assert vision_RPW is not None
            if layer.has_cross_attention:
                cross = layer.crossattention
                context_KH = _cross_attention(
                    cross.attention, ln_vision, query_KH.view(rows, length, -1), vision_RPW, seen
                )
                query_KH = cross.output(context_KH, query_KH)
            outputs.append(layer.output_query(layer.intermediate_query(query_KH), query_KH))
        if text_BLH is not None:
            outputs.append(layer.output(layer.intermediate(text_KH), text_KH))
        hidden_NH = torch.cat(outputs)
    query_KH, text_KH = hidden_NH.split(layout.sizes)
    return (
        query_KH.view(rows, length, -1) if rows else None,
        None if text_BLH is None else text_KH.view_as(text_BLH),
    )


class _Layout:
    """Where each row's tokens are among the N of a pass, and what may attend to what."""

    def __init__(
        self, rows: int, length: int, text_BLH: Tensor | None, mask_BL: Tensor | None
    ) -> None:
        self.rows, self.length = rows, length
        self.texts = 0 if text_BLH is None else text_BLH.shape[0]
        self.text_length = 0 if text_BLH is None else text_BLH.shape[1]
        self.images = max(rows - self.texts, 0)
        self.sizes = [rows * length, self.texts * self.text_length]
        self.mask_B11X: Tensor | None = None
        if mask_BL is not None:
            own = length if rows else 0
            mask_BX = F.pad(mask_BL.bool(), (own, 0), value=True)
            self.mask_B11X = mask_BX[:, None, None, :]

    def _rows(self, values_NH: Tensor, heads: int) -> list[Tensor]:
        """``values_NH`` as rows [rows, heads, tokens, head width]: of images, of texts."""
        query_KH, text_KH = values_NH.split(self.sizes)
        width = values_NH.shape[-1]
        query_RTH = query_KH.view(self.rows, self.length, width)
        found = [query_RTH[: self.images]] if self.images else []
        if self.texts:
            text_BLH = text_KH.view(self.texts, self.text_length, width)
            both = [query_RTH[self.images :], text_BLH] if self.rows else [text_BLH]
            found.append(torch.cat(both, dim=1))
        return [_heads(part, heads) for part in found]

    def self_attention(self, attention: _Module, hidden_NH: Tensor) -> Tensor:
        """Context of every token among those of its own row, [N, H]."""
        heads = attention.num_attention_heads
        query, key, value = (
            self._rows(linear(hidden_NH), heads)
            for linear in (attention.query, attention.key, attention.value)
        )
        dropout = attention.attention_dropout if attention.training else 0.0
        query_parts, text_parts = [], []
        for number, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
            of_texts = self.texts and number == len(query) - 1
            mask = self.mask_B11X if of_texts else None
            context = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
            context_BXH = context.transpose(1, 2).flatten(2)
            own = self.length if self.rows else 0
            query_parts.append(context_BXH[:, :own].flatten(0, 1))
            if of_texts:
                text_parts.append(context_BXH[:, own:].flatten(0, 1))
        return torch.cat(query_parts + text_parts)


def _heads(values_BXH: Tensor, heads: int) -> Tensor:
    return values_BXH.unflatten(-1, (heads, -1)).transpose(1, 2)


def _folded(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``linear`` after ``norm``'s scale and shift.

    A sum, not a product with a vector, whose bits may depend on where the weights lie in memory.
    """
    return linear.weight * norm.weight, linear.bias + (linear.weight * norm.bias).sum(dim=1)


def _cross_attention(
    attention: _Module,
    ln_vision: nn.LayerNorm,
    query_RTH: Tensor,
    vision_RPW: Tensor,
    seen: list[Tensor] | None,
) -> Tensor:
    """Context of query tokens among their image's normalised features, [R x T, H]."""
    heads = attention.num_attention_heads
    query = _heads(attention.query(query_RTH), heads)
    key = _heads(F.linear(vision_RPW, *_folded(attention.key, ln_vision)), heads)
    if seen is not None:
        weights = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        seen.append(weights.softmax(dim=-1).mean(dim=1))
    context = F.scaled_dot_product_attention(
        query,
        key,
        _heads(F.linear(vision_RPW, *_folded(attention.value, ln_vision)), heads),
        dropout_p=attention.attention_dropout if attention.training else 0.0,
    )
    return context.transpose(1, 2).flatten(2).flatten(0, 1)
