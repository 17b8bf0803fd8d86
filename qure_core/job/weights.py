"""The weights that fine-tuning starts from: given, random, or pretrained on captions."""

from __future__ import annotations

from qure_core import storage
from qure_core.base.config import ModelSettings, Settings
from qure_core.base.errors import InputError
from qure_core.base.seeds import derive
from qure_core.data import Split, read_split
from qure_core.embeddings.feature_use import usable_store
from qure_core.model import build_model, learn_tokenizer, load_model, samples
from qure_core.model.checkpoint_files import checkpoint_uri, latest_epoch
from qure_core.model.checkpoints import save_checkpoint
from qure_core.model.pretrained import load_tokenizer
from qure_core.runtime.resources import Plan
from qure_core.training.segment import Segment
from qure_core.training.trainer import run_segment


def first_checkpoint(settings: Settings, train: Split) -> None:
    """Commit the weights that a run starts with, unless it has some: given, or random."""
    run_dir, model_settings = settings.run.dir, settings.model
    if any(latest_epoch(run_dir, stage) is not None for stage in ("pretrain", "train")):
        return
    if model_settings.pretrained:
        _check_alone(model_settings)
        model, processor = load_model(
            model_settings.pretrained,
            model_settings.tokenizer,
            model_settings.dropout,
            model_settings.query_encoder,
            model_settings.encoder_options,
            derive(settings.run.seed, "weights"),
        )
        processor.pixels = settings.data.pixels
        facts = {"stage": "train", "epoch": 0, "origin": model_settings.pretrained}
        save_checkpoint(checkpoint_uri(run_dir, "train", 0), model, processor, facts)
        return
    captions = storage.read_json(storage.join(run_dir, "data", "captions.json"))
    if settings.pretrain.epochs and len(captions) < settings.pretrain.batch_size:
        raise InputError(
            f"data.descriptions: {len(captions)} captioned training images are fewer than "
            f"pretrain.batch_size={settings.pretrain.batch_size}. Give captions "
            "({image id: caption} in data.descriptions), or weights (model.pretrained), or start "
            "from random weights with --pretrain.epochs 0"
        )
    if words := model_settings.tokenizer or model_settings.text:
        tokenizer = load_tokenizer(samples.text(words) or words)
    else:
        texts = sorted({*captions.values(), *(t.text for t in train.triplets)})
        tokenizer = learn_tokenizer(texts, model_settings.vocabulary_size)
    model, processor = build_model(
        model_settings.preset,
        tokenizer,
        model_settings.dropout,
        derive(settings.run.seed, "weights"),
        model_settings.query_encoder or "qformer",
        model_settings.encoder_options,
        model_settings.vision,
        model_settings.vision_size,
        model_settings.text,
        model_settings.sizes,
    )
    processor.pixels = settings.data.pixels
    facts = {"stage": "pretrain", "epoch": 0, "origin": "random weights"}
    save_checkpoint(checkpoint_uri(run_dir, "pretrain", 0), model, processor, facts)


def _check_alone(model: ModelSettings) -> None:
    """Raise `InputError` for parts of a model beside whole weights, which have their own."""
    parts = {name: getattr(model, name) for name in ("vision", "vision_size", "text")}
    parts |= {f"sizes.{name}": value for name, value in model.sizes.model_dump().items()}
    if given := [name for name, value in parts.items() if value is not None]:
        raise InputError(
            f"model.{given[0]}: model.pretrained {model.pretrained!r} has its own; leave "
            f"{', '.join(f'model.{name}' for name in given)} out, or model.pretrained"
        )


def pretrain(settings: Settings, plan: Plan) -> None:
    """Commit the checkpoint that fine-tuning starts from (stage "train", epoch 0)."""
    run_dir = settings.run.dir
    if latest_epoch(run_dir, "train") is not None:
        return
    done = settings.pretrain.epochs
    if (latest_epoch(run_dir, "pretrain") or 0) < done:
        features = None
        if settings.model.vision:  # the encoder stays as it is
            train = read_split(storage.join(run_dir, "data", "train"))
            captions = storage.read_json(storage.join(run_dir, "data", "captions.json"))
            images = {name: train.images[name] for name in captions}
            begun = checkpoint_uri(run_dir, "pretrain", 0)
            features = usable_store(settings, plan, begun, images)
        segment = Segment("pretrain", run_dir, settings.resolved(), done, features=features)
        run_segment(segment, settings.cluster, plan)
    model, processor = load_model(checkpoint_uri(run_dir, "pretrain", done))
    model.freeze_vision_encoder()
    captions = storage.read_json(storage.join(run_dir, "data", "captions.json"))
    origin = f"{done} epochs of image-text pretraining on {len(captions)} captions"
    facts = {"stage": "train", "epoch": 0, "origin": origin}
    save_checkpoint(checkpoint_uri(run_dir, "train", 0), model, processor, facts)
