"""The processor beside the model: image preprocessing and tokenisation, saved together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, trainers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from qure_core.base.config import Pixels
from qure_core.base.errors import InputError
from qure_core.data.images import preprocess_to_bytes
from qure_core.data.loader import pixel_values
from qure_core.data.pixels import upright
from qure_core.data.text import clean_text

PROCESSOR_FILE = "qure_processor.json"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DECODER_TOKEN = "[DEC]"  # BLIP-2 appends it to BERT's vocabulary; QuRe never uses it


class QuReProcessor:
    """Turns images into ``pixel_values`` and texts into ``input_ids`` and ``attention_mask``.

    ``pixels``: how images are taken (``data.pixels``). A model is to be asked as it was trained.
    Texts are cleaned for BERT's tokenizer as BLIP-2 does, and left to CLIP's as they are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        max_text_tokens: int = 32,
        pixels: Pixels = "upright",
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_text_tokens = max_text_tokens
        self.pixels: Pixels = pixels

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images to ``pixel_values`` [B, 3, S, S]."""
        if self.pixels == "upright":
            images = [upright(image) for image in images]
        pixels = [preprocess_to_bytes(image, self.image_size) for image in images]
        return pixel_values(np.stack(pixels))

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Clean and tokenise: ``input_ids`` and ``attention_mask``, both int64 [B, L].

        Padded to the longest of the batch: the released program pads to the maximum, but masked
        tokens are attended to by nothing, so only time differs.
        """
        clip = isinstance(self.tokenizer, CLIPTokenizer)
        encoded = self.tokenizer(
            list(texts) if clip else [clean_text(text) for text in texts],
            truncation=True,
            max_length=self.max_text_tokens,
        )
        longest = max(map(len, encoded["input_ids"]))
        # A multiple of 8, but no position that the model has not: CLIP has 77.
        length = min(-(-longest // 8) * 8, self.max_text_tokens)
        encoded = self.tokenizer.pad(
            encoded, padding="max_length", max_length=length, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def save_pretrained(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "image_size": self.image_size,
            "max_text_tokens": self.max_text_tokens,
            "pixels": self.pixels,
        }
        if isinstance(self.tokenizer, CLIPTokenizer):
            facts["tokenizer"] = "clip"
        (directory / PROCESSOR_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        self.tokenizer.save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> QuReProcessor:
        directory = Path(directory)
        file = directory / PROCESSOR_FILE
        if not file.exists():
            raise InputError(f"{file}: no such file; {directory} holds no QuRe processor")
        # Until it was said how, images were taken as stored.
        facts = {"pixels": "released"} | json.loads(file.read_text())
        kind = CLIPTokenizer if facts.pop("tokenizer", None) == "clip" else BertTokenizer
        return cls(kind.from_pretrained(directory), **facts)


def learn_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """A BERT WordPiece tokenizer learned from ``texts``, for models that start from nothing.

    The same texts give the same vocabulary.
    """
    cleaned = [clean_text(text) for text in texts]
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizer = BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = splitter = BertPreTokenizer()
    # The trainer numbers continuing letters as it meets them, in the order of a randomly seeded
    # hash table, and equally frequent pairs by those numbers: it is given the letters in order.
    letters = {
        letter
        for text in cleaned
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
        for letter in word[1:]
    }
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in sorted(letters))],
        show_progress=False,
    )
    wordpiece.train_from_iterator(cleaned, trainer)
    return with_decoder_token(BertTokenizer(vocab=wordpiece.get_vocab()))


def with_decoder_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Append BLIP-2's [DEC] token, so that ids and the vocabulary size match its weights."""
    tokenizer.add_special_tokens({"bos_token": DECODER_TOKEN})
    return tokenizer
