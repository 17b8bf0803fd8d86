"""The settings of every stage: their schema and defaults (`runtime.settings` reads them)."""

from __future__ import annotations

import getpass
import tempfile
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliUnknownArgs,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

Pixels = Literal["upright", "released"]
"""How images are taken (`data.pixels`)."""
Texts = Literal["tidy", "released"]
"""How two captions are joined (`data.texts`)."""
QueryEncoder = Literal["qformer", "sprc", "combiner", "sum"]
"""What makes a query of an image and a text (`model.query_encoder`)."""

_FREE: dict[str, Any] = {"free": True}


def _free(default: Any, **options: Any) -> Any:
    """A setting that may change between a run and its resumption: the result stays the same."""
    return Field(default, json_schema_extra=_FREE, **options)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RunSettings(_Section):
    dir: str = _free(
        "runs/quickstart", description="run directory: a path or URI that all nodes see"
    )
    seed: int = Field(1000, ge=0, description="seed of every random choice (the paper's is 1000)")


class WorldSettings(_Section):
    images: int = Field(2000, ge=60, description="images to draw, train and val together")
    images_per_combination: int = Field(
        10, ge=1, description="images that share all their attributes, so are relevant together"
    )
    val_fraction: float = Field(0.3, gt=0, lt=1, description="share of the combinations held out")
    train_triplets: int = Field(3000, ge=1, description="training triplets")
    val_triplets: int = Field(600, ge=1, description="validation triplets")
    image_size: int = Field(64, ge=16, le=1024, description="side of an image, pixels")
    seed: int = Field(0, ge=0, description="seed of the world, separate from the run's")


class DataSettings(_Section):
    format: Literal["world", "fashioniq", "cirr", "circo", "jsonl"] = Field(
        "world", description="layout of the data; 'world' is drawn at data.root if it is not there"
    )
    root: str = _free("data/world", description="dataset directory: a path or URI")
    images: str | None = _free(
        None,
        description="images instead of the layout's own folders, by the same names: a directory of "
        "image files, of Parquet or Arrow shards (image_id, image), or of WebDataset tars; a path "
        "or URI",
    )
    index_dir: str = _free(
        "image-indexes", description="directory of the indexes of packed images: a path or URI"
    )
    categories: list[str] | None = Field(
        None,
        description="FashionIQ and JSONL layouts: categories to use (default: all that are there)",
    )
    mining_corpus: Literal["targets", "split"] | None = Field(
        None,
        description="images mined among: the category's training targets or its whole split "
        "(default: targets for the FashionIQ layout, split otherwise, as the paper does)",
    )
    descriptions: str | None = Field(
        "descriptions.json",
        description="image captions {image id: caption}, relative to data.root, for pretraining",
    )
    pixels: Pixels = Field(
        "upright",
        description="how images are taken: upright (as people see them: EXIF orientation, 16-bit "
        "and float values scaled, transparency laid on white, CMYK converted first) or released "
        "(as stored, bit-equal to the authors' program)",
    )
    texts: Texts = Field(
        "tidy",
        description="FashionIQ's two captions joined: tidy leaves a blank one out, released writes "
        "'Is red and ' as the authors' program",
    )
    max_image_pixels: int = Field(
        50_000_000, ge=1, description="images with more pixels are refused"
    )
    world: WorldSettings = WorldSettings()


class ModelSizes(_Section):
    query_tokens: int | None = Field(None, ge=1, description="vectors of an image")
    embed_dim: int | None = Field(None, ge=1, description="width of an embedding")
    max_text_tokens: int | None = Field(None, ge=2, description="texts are cut to so many tokens")
    num_hidden_layers: int | None = Field(
        None,
        ge=1,
        description="layers of the Q-Former or the text model (default here as of all sizes: the "
        "preset's, or those of model.text, of which the first are taken)",
    )
    num_attention_heads: int | None = Field(None, ge=1, description="heads of those layers")
    hidden_size: int | None = Field(None, ge=1, description="width of those layers")
    intermediate_size: int | None = Field(
        None, ge=1, description="width of those layers' feed-forward"
    )


class ModelSettings(_Section):
    query_encoder: QueryEncoder | None = Field(
        None,
        description="what makes a query of an image and a text: qformer (QuRe), sprc (sentence-"
        "level prompts), combiner (CLIP4CIR) or sum (of both features) (default: the one that "
        "the weights have, else qformer)",
    )
    encoder_options: dict[str, Any] = Field(
        {},
        description="the query encoder's own settings, by name, as in its file in qure_core/model",
    )
    vision: str | None = Field(
        None,
        description="frozen vision encoder in place of the preset's: any Hugging Face vision model "
        "as a directory, a URI or a hub id, or sample:mobilenet-v2",
    )
    vision_size: int | None = Field(
        None,
        ge=16,
        le=2048,
        description="side of its input, pixels (default: its own image processor's)",
    )
    text: str | None = Field(
        None,
        description="BERT that the Q-Former's text side, or the text model of combiner and sum, "
        "starts from: a directory, a URI or a hub id, or sample:minilm",
    )
    sizes: ModelSizes = ModelSizes()
    preset: Literal["tiny", "blip2-vit-l", "blip2-vit-g"] = Field(
        "tiny", description="architecture when no pretrained weights are configured"
    )
    pretrained: str | None = Field(
        None,
        description="weights to fine-tune: a directory saved by this project, a Hugging Face "
        "BLIP-2 image-text-retrieval model, or, for combiner and sum, a CLIP; as a path, a URI "
        "or a hub id; skips pretraining",
    )
    tokenizer: str | None = Field(
        None,
        description="BERT tokenizer as a path, a URI or a hub id, e.g. bert-base-uncased "
        "(default: the one beside the weights or model.text, else a WordPiece vocabulary of the "
        "training text)",
    )
    vocabulary_size: int = Field(
        1000,
        ge=64,
        description="WordPiece vocabulary size when it is learned from the data, tokens",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the Q-Former while training")
    vision_precision: Literal["fp16", "fp32"] = Field(
        "fp16",
        description="of the frozen vision encoder's features, stored or not; fp16 is BLIP-2's",
    )


class PretrainSettings(_Section):
    epochs: int = Field(15, ge=0, description="passes over the captioned training images")
    batch_size: int = Field(64, ge=2, description="image-caption pairs per step, all workers")
    lr: float = Field(1e-3, gt=0, description="peak learning rate; cosine per epoch to a hundredth")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of the contrastive targets")


class TrainSettings(_Section):
    epochs: int = Field(30, ge=1, description="passes over the training triplets")
    mining_definitions: int = Field(
        6, ge=1, description="n_def: negatives are mined every floor(epochs / n_def) epochs"
    )
    warmup_epochs: int | None = Field(
        None,
        ge=0,
        description="epochs with random negatives before the first mining; 0 mines at once "
        "(default: floor(epochs / n_def), as in the paper)",
    )
    negatives: Literal["mined", "random"] = Field(
        "mined",
        description="negatives after the warm-up: mined by mining.rule, or random as during the "
        "warm-up (for comparison)",
    )
    negatives_per_triplet: int = Field(
        1, ge=1, description="K: negatives that a triplet meets in a step (the paper's is 1)"
    )
    captions: Literal["joined", "random"] = Field(
        "joined",
        description="FashionIQ's two captions while training: joined, or in either order or one "
        "of them, drawn anew in every epoch (as CLIP4CIR and SPRC do)",
    )
    batch_size: int = Field(32, ge=1, description="triplets per optimizer step, all workers")
    lr: float = Field(5e-6, gt=0, description="learning rate of epoch 0; cosine per epoch")
    final_lr_ratio: float = Field(0.01, gt=0, le=1, description="final learning rate / lr")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay of every parameter")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="autocast type; auto: bf16 or fp16 on a GPU, fp32 on a CPU"
    )
    compile: bool = Field(
        False, description="compile the step with torch.compile (needs a C++ compiler)"
    )
    eval_every: int | None = Field(
        None,
        ge=1,
        description="evaluate every so many epochs, besides the start, the end of the warm-up "
        "and the end",
    )
    control: bool = _free(
        False,
        description="at the end train the epochs after the warm-up once more, with random "
        "negatives, and say what mining added",
    )
    keep_checkpoints: int = _free(
        2, ge=1, description="newest epoch checkpoints kept, besides those of stage boundaries"
    )
    log_every: int = _free(20, ge=1, description="steps between progress lines")

    @field_validator("negatives", mode="before")
    @classmethod
    def _earlier_name(cls, value: Any) -> Any:
        return "mined" if value == "steep_drops" else value  # while there was one rule


class ObjectiveSettings(_Section):
    name: str = Field(
        "bradley_terry",
        description="loss of fine-tuning. Of a triplet and its negatives: bradley_terry (the "
        "paper's), hinge, plackett_luce. Over the batch: info_nce, hn_nce, dcl, hcl, fnc",
    )
    options: dict[str, Any] = Field(
        {},
        description="the objective's own settings, by name: temperature (a constant; null takes "
        "the model's), and those in its file in qure_core/objectives",
    )


class MiningSettings(_Section):
    rule: str = Field(
        "steep_drops",
        description="which images are hard negatives: steep_drops (the paper's), top_k, "
        "margin_pos, perc_pos, simans, target_drop, random",
    )
    options: dict[str, Any] = Field(
        {},
        description="the rule's own settings, by name, as in its file in qure_core/mining/rules "
        "(steep_drops has those below)",
    )
    veto: str | None = Field(
        None,
        description="a second checkpoint's directory, a path or URI: images that it scores above a "
        "query's target are never its negatives",
    )
    corpus: str | None = _free(
        None,
        description="more images to mine among, as data.images: those that no triplet names",
    )
    exclude_reference: bool = Field(
        True, description="drop a query's reference image from its corpus before mining"
    )
    exclude_known_positives: bool = Field(
        True,
        description="images known to answer a query are never its negatives, mined or not: other "
        "targets of the same query, those the data labels, the same picture under another name",
    )
    window_ranks: int | None = Field(
        None,
        ge=4,
        description="steep_drops: seek drops among so many images below the target (default: all, "
        "as released)",
    )
    window_quantile: float | None = Field(
        None,
        gt=0,
        le=1,
        description="steep_drops: seek drops in this share of the images below the target "
        "(default: all)",
    )
    min_steepness: float | None = Field(
        None,
        gt=0,
        description="steep_drops: below this ratio of both drops to the typical gap beside them a "
        "query takes the named fallback 'smooth': all images below the target, within the window "
        "(default: any drop will do)",
    )
    max_negatives: int | None = Field(
        None,
        ge=1,
        description="keep at most so many of a query's negatives, a uniform sample, or of weighted "
        "ones those of the largest weights (default: all)",
    )
    engine: Literal["auto", "sort", "streaming"] = _free(
        "auto",
        description="sort ranks a corpus in one task, streaming in parts; the sets are the same "
        "(auto: streaming from 100,000 images)",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="of the scores' products; below fp32 the round reports how many of a sample "
        "of queries have other drops than in fp32",
    )
    stored: Literal["fp32", "fp16"] = Field(
        "fp32", description="of the images' embeddings on disk; fp16 halves what is read"
    )
    corpus_range: int | None = _free(
        None,
        ge=1,
        description="images that one streaming task summarises (default: by corpus and "
        "cluster, at most 262,144)",
    )
    corpus_shards: int | None = _free(
        None, ge=1, description="files the embeddings are split into (default: by size)"
    )
    memory_mb: int = _free(
        1024, ge=64, description="working memory of one scoring task, MB; sets the query block"
    )
    query_block: int | None = _free(
        None, ge=1, description="queries scored together (default: what memory_mb allows)"
    )


class EvaluationSettings(_Section):
    gallery: Literal["split", "union"] = Field(
        "split",
        description="images ranked per category: its whole split, or the union of the split's "
        "references and targets",
    )
    top_k: int = Field(50, ge=1, description="ranked images kept per query")


class ClusterSettings(_Section):
    in_process: bool = _free(
        False,
        description="run every stage in this process and start no workers, for data so small that "
        "starting them takes longest; what is written is the same",
    )
    train_workers: int = _free(1, ge=1, description="training workers (one per GPU)")
    gpus: Literal["auto", "none"] | int = _free(
        "auto",
        description="GPUs per training and per embedding worker: auto is 1 if the cluster "
        "has any, else none",
    )
    cpus_per_train_worker: int = _free(1, ge=1, description="CPUs and threads of a training worker")
    embed_actors: int = _free(
        1, ge=1, description="workers that embed images and queries: actors on GPUs, tasks without"
    )
    cpus_per_embed_actor: int = _free(
        1, ge=1, description="CPUs and threads of an embedding worker"
    )
    embed_batch: int = Field(64, ge=1, description="images embedded together, per worker")
    decode_threads: int = _free(2, ge=1, description="image decoding threads per worker")
    image_cache_mb: int = _free(
        512, ge=0, description="preprocessed images a training worker keeps in memory, MB"
    )
    max_failures: int = _free(2, ge=0, description="training worker failures survived per stage")
    scale_up_seconds: int = _free(
        0, ge=0, description="how long to wait for nodes that an autoscaler still has to start"
    )


class FeatureStoreSettings(_Section):
    dir: str = _free(
        "features", description="directory of feature stores: a path or URI that all nodes see"
    )
    cache_dir: str = _free(
        f"{tempfile.gettempdir()}/qure-features-{getpass.getuser()}",
        description="local directory in which a node keeps what it fetches of a remote store",
    )
    shard_images: int = _free(256, ge=1, description="images in one file of a store")


class SearchSettings(_Section):
    kind: Literal["auto", "exact", "faiss"] = _free(
        "auto",
        description="an index scores every image of a query (exact), or candidates that FAISS "
        "finds; auto is exact below 200,000 vectors",
    )
    factory: str | None = _free(
        None,
        description="FAISS index_factory string, with an IVF (default: by the number of vectors)",
    )
    recall: float = _free(
        0.99,
        gt=0,
        le=1,
        description="share of the 10 and of the 50 best images that FAISS is to find; sets how "
        "many lists are looked through",
    )
    tokens: int | None = _free(
        None,
        ge=1,
        description="vectors of an image that FAISS holds (default: those that win); scores are of "
        "all of them",
    )
    questions: int = _free(200, ge=20, description="queries on which the recall is measured")


class ReportSettings(_Section):
    examples: int = _free(6, ge=0, le=100, description="example queries shown in the report")


class TrackingSettings(_Section):
    backend: Literal["none", "mlflow", "wandb"] = _free(
        "none", description="also send settings and metrics there, through its own client"
    )
    project: str = _free("qure", description="MLflow experiment or Weights & Biases project")
    uri: str | None = _free(
        None, description="MLflow tracking server (default: MLFLOW_TRACKING_URI, else MLflow's own)"
    )


class Settings(BaseSettings):
    """All settings of a run."""

    model_config = SettingsConfigDict(
        extra="forbid", cli_ignore_unknown_args=True, cli_avoid_json=True, cli_hide_none_type=True
    )

    unknown_arguments: CliUnknownArgs = []
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    train: TrainSettings = TrainSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    mining: MiningSettings = MiningSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    cluster: ClusterSettings = ClusterSettings()
    features: Literal["auto", "required", "build", "off"] = _free(
        "auto",
        description="the frozen encoder's features: auto reads a feature store that has all that "
        "is needed, required insists on one, build fills it first, off computes them",
    )
    feature_store: FeatureStoreSettings = FeatureStoreSettings()
    search: SearchSettings = SearchSettings()
    report: ReportSettings = ReportSettings()
    tracking: TrackingSettings = TrackingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in counts: an environment variable named DATA must not."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_schedule(self) -> Settings:
        train = self.train
        if train.mining_definitions > train.epochs:
            raise ValueError(
                f"train.mining_definitions={train.mining_definitions} exceeds "
                f"train.epochs={train.epochs}: there would be no epoch to mine at"
            )
        if train.warmup_epochs is not None and train.warmup_epochs > train.epochs:
            raise ValueError(
                f"train.warmup_epochs={train.warmup_epochs} exceeds train.epochs={train.epochs}"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """The settings as plain data, without the command line's remains."""
        return self.model_dump(mode="json", exclude={"unknown_arguments"})


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def free_settings(model: type[BaseModel] = Settings, prefix: str = "") -> set[str]:
    """The dotted names of the settings that are `_free`."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= free_settings(field.annotation, f"{prefix}{name}.")
        elif field.json_schema_extra == _FREE:
            found.add(f"{prefix}{name}")
    return found
