"""Debiased contrast (DCL, Chuang et al., arXiv 2007.00224): HCL without hardness."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qure_core.objectives import options as shared
from qure_core.objectives.hcl import HCL


class DCL(HCL):
    """`HCL` whose negatives all weigh the same."""

    class Options(shared.InBatchOptions):
        """As `HCL.Options` has them."""

        temperature: float | None = Field(0.5, gt=0)
        tau_plus: float = Field(0.1, ge=0, lt=1)
        form: Literal["query", "both"] = "query"

    def __init__(self, options: Options) -> None:
        super().__init__(HCL.Options(beta=0.0, **options.model_dump()))
