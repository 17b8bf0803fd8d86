"""Counted floating-point operations against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qure_core.model import QuReModel, preset
from qure_core.model.flops import encoder_flops, step_flops, vision_tokens
from qure_core.objectives import make_objective
from qure_core.training.steps import TripletStep


@pytest.mark.parametrize(("answers", "queries", "length"), [(6, 3, 8), (10, 7, 16)])
def test_a_step(answers: int, queries: int, length: int) -> None:
    model = QuReModel(preset("tiny", vocabulary_size=80, dropout=0.0))
    config = model.config
    step = TripletStep(model, make_objective("bradley_terry", {}))
    vision = torch.randn(answers + queries, vision_tokens(config), config.vision["hidden_size"])
    rows = torch.arange(queries)
    # The counter does not see inside the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses, _ = step(
            vision=vision,
            reference_B=rows + answers,
            answer_A=torch.arange(answers),
            target_B=rows % answers,
            negative_BK=(rows[:, None] + 1) % answers,
            valid_B=torch.ones(queries, dtype=torch.bool),
            input_ids=torch.ones(queries, length, dtype=torch.long),
            attention_mask=torch.ones(queries, length, dtype=torch.long),
        )
        losses.mean().backward()
    ours = step_flops(config, answers, queries, length)
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.03)


def test_the_encoder() -> None:
    model = QuReModel(preset("tiny", vocabulary_size=80)).eval()
    kernel = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), kernel, FlopCounterMode(display=False) as counter:
        model.encode_vision(torch.randn(2, 3, 64, 64))
    assert counter.get_total_flops() == 2 * encoder_flops(model.config)
