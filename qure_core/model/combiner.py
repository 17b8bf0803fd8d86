"""CLIP4CIR's Combiner (Baldrati et al., arXiv 2308.11485), by its released program's names.

Shapes: B batch, F feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Combiner(nn.Module):
    """A query from an image's and a text's features: a learned mixture, and a learned residual.

    ``unit(v + s t + (1 - s) x)`` of image features x and text features t, which are not normalised;
    v and the scalar s are made from both. Its state has the names of the released weights.
    """

    def __init__(self, features: int, projection: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.text_projection_layer = nn.Linear(features, projection)
        self.image_projection_layer = nn.Linear(features, projection)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.combiner_layer = nn.Linear(2 * projection, hidden)
        self.output_layer = nn.Linear(hidden, features)
        self.dropout3 = nn.Dropout(dropout)
        self.dynamic_scalar = nn.Sequential(
            nn.Linear(2 * projection, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
            nn.Sigmoid(),
        )

    def forward(self, image_BF: Tensor, text_BF: Tensor) -> Tensor:
        """Queries [B, F], not normalised."""
        text = self.dropout1(F.relu(self.text_projection_layer(text_BF)))
        image = self.dropout2(F.relu(self.image_projection_layer(image_BF)))
        both = torch.cat([text, image], dim=-1)
        residual_BF = self.output_layer(self.dropout3(F.relu(self.combiner_layer(both))))
        share_B1 = self.dynamic_scalar(both)
        query_BF: Tensor = residual_BF + share_B1 * text_BF + (1 - share_B1) * image_BF
        return query_BF
