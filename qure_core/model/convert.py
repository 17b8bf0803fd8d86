"""Convert weights to a directory that `from_pretrained` reads.

    python -m qure_core.model.convert model.pth TARGET --tokenizer bert-base-uncased
    python -m qure_core.model.convert blip2_pretrain.pth TARGET --clip DIR --blip2 DIR ...

SOURCE is a LAVIS-named checkpoint of BLIP-2, QuRe or SPRC, or a Combiner's weights (CLIP4CIR), for
which ``--combiner`` names its Hugging Face CLIP. Of the others ``--clip`` fills a ViT-L encoder
from a Hugging Face CLIP ViT-L/14 directory, ``--blip2`` the Q-Former from a Hugging Face BLIP-2
image-text-retrieval one.
"""

from __future__ import annotations

import argparse

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.model.base import ComposedModel, check_finite
from qure_core.model.checkpoint_files import CHECKPOINT_KIND
from qure_core.model.checkpoints import save_checkpoint
from qure_core.model.clip import load_combiner
from qure_core.model.lavis import load_lavis_checkpoint
from qure_core.model.pretrained import (
    check_vocabulary,
    fill_qformer,
    fill_vision_encoder,
    load_tokenizer,
)
from qure_core.model.processing import QuReProcessor
from qure_core.runtime.command import run_main


def check_target(target: str, source: str) -> None:
    """Raise `InputError` if anything but an earlier conversion of ``source`` is at ``target``."""
    storage.check_place(target, CHECKPOINT_KIND, "target")
    if storage.is_committed(target):
        found = storage.read_manifest(target, CHECKPOINT_KIND)
        if (found.get("epoch"), found.get("origin")) != (0, source):
            raise InputError(
                f"target: {target} holds another checkpoint, made from {found.get('origin')!r}; "
                "choose another directory"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qure_core.model.convert", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", help="LAVIS-named checkpoint (.pth): a path or URI")
    parser.add_argument("target", help="directory to write: a path or URI")
    parser.add_argument(
        "--tokenizer",
        default="bert-base-uncased",
        help="BERT tokenizer as a path, a URI or a hub id (default: %(default)s)",
    )
    parser.add_argument("--vision-heads", type=int, help="if not ViT-L's or ViT-g's")
    parser.add_argument("--qformer-heads", type=int, help="if not BERT-base's")
    parser.add_argument("--clip", help="Hugging Face CLIP for the encoder: path, URI, hub id")
    parser.add_argument("--blip2", help="Hugging Face BLIP-2 for the Q-Former: path, URI, hub id")
    parser.add_argument(
        "--combiner", metavar="CLIP", help="SOURCE is a Combiner over this Hugging Face CLIP"
    )
    chosen = parser.parse_args()
    target = storage.resolve(chosen.target)
    check_target(target, chosen.source)
    model, processor = _converted(chosen)
    processor.pixels = "released"  # as these weights were trained
    facts = {"stage": "train", "epoch": 0, "origin": str(chosen.source)}
    save_checkpoint(target, model, processor, facts)
    count = sum(p.numel() for p in model.parameters())
    print(f"converted {count:,} parameters: {target}", flush=True)


def _converted(chosen: argparse.Namespace) -> tuple[ComposedModel, QuReProcessor]:
    with storage.local_copy(chosen.source) as file:
        if chosen.combiner:
            return load_combiner(file, chosen.combiner)
        model = load_lavis_checkpoint(
            file, vision_heads=chosen.vision_heads, qformer_heads=chosen.qformer_heads
        )
    if chosen.clip:
        fill_vision_encoder(model, chosen.clip)
    if chosen.blip2:
        fill_qformer(model, chosen.blip2)
    tokenizer = load_tokenizer(chosen.tokenizer)
    check_finite(model, chosen.source)
    check_vocabulary(tokenizer, model, chosen.tokenizer)
    return model, QuReProcessor(tokenizer, model.config.image_size, model.config.max_text_tokens)


if __name__ == "__main__":
    run_main(main)
