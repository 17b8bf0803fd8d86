"""The joint pass through the Q-Former against transformers' own forward, part by part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from qure_core.model.qformer import qformer_hidden_states

IMAGES, TEXTS, TOKENS, LENGTH, PATCHES, WIDTH = 3, 2, 4, 6, 7, 10


@pytest.fixture
def qformer() -> Blip2QFormerModel:
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=24,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=2,
        use_qformer_text_input=True,
        initializer_range=0.5,
    )
    return Blip2QFormerModel(config).double().eval()


@pytest.fixture
def norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    query_TH = torch.randn(TOKENS, 16, dtype=torch.float64, requires_grad=True)
    vision_RPW = torch.randn(IMAGES + TEXTS, PATCHES, WIDTH).double()
    text_BLH = torch.randn(TEXTS, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    mask_BL = torch.tensor([[1] * LENGTH, [1, 1, 1, 0, 0, 0]])
    return query_TH, vision_RPW, text_BLH, mask_BL


def reference(
    qformer: Blip2QFormerModel, norm: nn.LayerNorm, joint: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Images and queries one after the other, as transformers runs them."""
    query_TH, vision_RPW, text_BLH, mask_BL = joint
    images = qformer(
        query_embeds=query_TH.expand(IMAGES, -1, -1),
        query_length=TOKENS,
        encoder_hidden_states=norm(vision_RPW[:IMAGES]),
    ).last_hidden_state
    own = query_TH.expand(TEXTS, -1, -1)
    queries = qformer(
        query_embeds=torch.cat([own, text_BLH], dim=1),
        query_length=TOKENS,
        attention_mask=torch.cat([mask_BL.new_ones(TEXTS, TOKENS), mask_BL], dim=1),
        encoder_hidden_states=norm(vision_RPW[IMAGES:]),
    ).last_hidden_state
    return torch.cat([images, queries[:, :TOKENS]]), queries[:, TOKENS:]


def test_equals_transformers_with_gradients(qformer: Blip2QFormerModel, norm: nn.LayerNorm) -> None:
    query_TH, vision_RPW, text_BLH, mask_BL = inputs()
    ours = qformer_hidden_states(qformer, norm, query_TH, vision_RPW, text_BLH, mask_BL)
    theirs = reference(qformer, norm, (query_TH, vision_RPW, text_BLH, mask_BL))
    parameters = [query_TH, text_BLH, *norm.parameters(), *qformer.parameters()]
    gradients = []
    for query_RTH, text in (ours, theirs):
        assert query_RTH is not None
        assert text is not None
        weights = torch.linspace(-1, 1, query_RTH.numel()).double().view_as(query_RTH)
        # A text's padding is attended to by nothing, but has outputs: they count for nothing.
        kept = text * mask_BL[..., None]
        loss = (query_RTH * weights).sum() + kept.pow(2).sum()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    torch.testing.assert_close(ours[0], theirs[0])
    own_tokens = mask_BL.bool()
    assert ours[1] is not None
    torch.testing.assert_close(ours[1][own_tokens], theirs[1][own_tokens])
    for ours_of, theirs_of in zip(*gradients, strict=True):
        assert (ours_of is None) == (theirs_of is None)
        if ours_of is not None:
            torch.testing.assert_close(ours_of, theirs_of, rtol=1e-9, atol=1e-9)


def test_images_alone_queries_alone_and_texts_alone(
    qformer: Blip2QFormerModel, norm: nn.LayerNorm
) -> None:
    query_TH, vision_RPW, text_BLH, mask_BL = inputs()
    theirs, theirs_text = reference(qformer, norm, (query_TH, vision_RPW, text_BLH, mask_BL))
    images, none = qformer_hidden_states(qformer, norm, query_TH, vision_RPW[:IMAGES])
    assert none is None
    torch.testing.assert_close(images, theirs[:IMAGES])
    queries, texts = qformer_hidden_states(
        qformer, norm, query_TH, vision_RPW[IMAGES:], text_BLH, mask_BL
    )
    torch.testing.assert_close(queries, theirs[IMAGES:])
    torch.testing.assert_close(texts, theirs_text)
    none, alone = qformer_hidden_states(qformer, norm, None, None, text_BLH, mask_BL)
    assert none is None
    expected = qformer(
        query_embeds=text_BLH, query_length=0, attention_mask=mask_BL
    ).last_hidden_state
    torch.testing.assert_close(alone, expected)


def test_dropout_falls_on_every_part_in_training(
    qformer: Blip2QFormerModel, norm: nn.LayerNorm
) -> None:
    joint = inputs()
    qformer.train()
    torch.manual_seed(0)
    first, _ = qformer_hidden_states(qformer, norm, *joint)
    second, _ = qformer_hidden_states(qformer, norm, *joint)
    torch.manual_seed(0)
    again, _ = qformer_hidden_states(qformer, norm, *joint)
    assert first is not None
    assert second is not None
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert (first != second).any(dim=-1).all()
