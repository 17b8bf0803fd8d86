"""Modification texts: the clean-up of LAVIS's ``blip_caption`` and each dataset's joining rule."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qure_core.base.config import Texts

MAX_WORDS = 50


def clean_text(text: str) -> str:
    """LAVIS ``blip_caption`` (eval): lower-case, drop punctuation, keep the first 50 words."""
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text)
    text = text.rstrip("\n").strip(" ")
    words = text.split(" ")
    return " ".join(words[:MAX_WORDS])


def join_fashioniq(captions: Sequence[str], texts: Texts = "released") -> str:
    """FashionIQ's two captions as one text, as the released QuRe program joins them.

    "tidy" leaves a blank caption out, where the program writes "Is red and ".
    """
    first, second = (caption.strip(".?, ") for caption in captions)
    if texts == "tidy" and not (first and second):
        return (first or second).capitalize()
    return f"{first.capitalize()} and {second}"


def random_fashioniq(captions: Sequence[str], draw: float) -> str:
    """FashionIQ's two captions as CLIP4CIR and SPRC train on them: both in either order, or one.

    ``draw`` is uniform over [0, 1). As in the program, a draw of exactly a quarter, half or three
    quarters takes the second caption alone.
    """
    first, second = (caption.strip(".?, ") for caption in captions)
    if draw < 0.25:
        return f"{first.capitalize()} and {second}"
    if 0.25 < draw < 0.5:
        return f"{second.capitalize()} and {first}"
    return (first if 0.5 < draw < 0.75 else second).capitalize()


def circo_prompt(caption: str) -> str:
    """CIRCO's relative caption as the released QuRe program prompts with it."""
    return f"a photo of $ that {caption}"
