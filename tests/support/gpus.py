"""What tests on a GPU share."""

from __future__ import annotations

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
