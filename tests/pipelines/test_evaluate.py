"""pipelines/evaluate.py on the real annotation files, with images made for the names they list."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Runner
from PIL import Image

from qure_core.evaluation.protocols.circo import check_circo_submission
from qure_core.evaluation.protocols.cirr import MAX_SUBMISSION_BYTES, check_cirr_submission
from qure_core.model import QuReConfig, QuReModel, QuReProcessor, learn_tokenizer
from qure_core.model.checkpoints import save_checkpoint

pytestmark = pytest.mark.usefixtures("standing_cluster")
IMAGE_PATH = r'/-/image_data/[^"]+'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model small enough that thousands of images take seconds."""
    tokenizer = learn_tokenizer(["a dog on the left and two cats", "is red and longer"], 80)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = QuReConfig(
        vision={**narrow, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
        qformer={
            **narrow,
            "num_hidden_layers": 1,
            "encoder_hidden_size": 16,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
        },
        query_tokens=2,
        embed_dim=8,
        initializer_range=0.3,
    )
    uri = tmp_path_factory.mktemp("checkpoint") / "train-0000"
    torch.manual_seed(0)
    save_checkpoint(
        str(uri), QuReModel(config), QuReProcessor(tokenizer, 8), {"stage": "train", "epoch": 0}
    )
    return uri


def make_images(paths: Iterable[Path]) -> None:
    """A picture for every path: links to a hundred different ones."""
    rng = np.random.default_rng(0)
    originals: list[Path] = []
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(originals) < 100:
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path, "PNG")
            originals.append(path)
        else:
            os.link(originals[number % 100], path)


def evaluate(
    run_pipeline: Runner, checkpoint: Path, output: Path, protocol: str, *more: str
) -> tuple[dict[str, object], str]:
    result = run_pipeline(
        "evaluate",
        f"--checkpoint={checkpoint}",
        f"--protocol={protocol}",
        f"--output={output}",
        "--cluster.embed_batch=256",
        "--cluster.gpus=none",
        *more,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((output / f"{protocol}.json").read_text()), result.stdout


@pytest.fixture(scope="module")
def cirr(annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cirr")
    shutil.copytree(annotations / "cirr/cirr", root / "cirr")
    for split in ("val", "test1"):
        paths = json.loads((root / f"cirr/image_splits/split.rc2.{split}.json").read_text())
        make_images(root / path for path in paths.values())
    return root


@pytest.mark.timeout(500)
def test_cirr_val(run_pipeline: Runner, checkpoint: Path, cirr: Path, tmp_path: Path) -> None:
    data = f"--data.root={cirr}"
    value, output = evaluate(run_pipeline, checkpoint, tmp_path, "cirr", data)
    result = value["result"]
    assert isinstance(result, dict)
    assert result["queries"] == 4181
    recall = result["recall"]
    assert 0 < recall["R@10"] < recall["R@50"] < 100
    # A model that knows nothing finds one of five others in about one case of five.
    assert 10 < recall["R_s@1"] < 30
    assert recall["mean(R@5, R_s@1)"] == pytest.approx((recall["R@5"] + recall["R_s@1"]) / 2)
    assert "[rank cirr] 4,181/4,181 queries" in output
    assert "QuRe (test1) (published)" in output


@pytest.mark.timeout(400)
def test_cirr_test_submissions(
    run_pipeline: Runner, checkpoint: Path, cirr: Path, annotations: Path, tmp_path: Path
) -> None:
    value, output = evaluate(run_pipeline, checkpoint, tmp_path, "cirr-test", f"--data.root={cirr}")
    rows = json.loads((cirr / "cirr/captions/cap.rc2.test1.json").read_text())
    gallery = list(json.loads((cirr / "cirr/image_splits/split.rc2.test1.json").read_text()))
    references = {str(row["pairid"]): row["reference"] for row in rows}
    sample = json.loads((annotations / "cirr/test1_pred_ranks_recall_subset.json").read_text())
    for name in ("recall", "recall_subset"):
        file = Path(str(value["uri"])) / f"{name}.json"
        assert f"file:   {file}" in output
        assert file.stat().st_size <= MAX_SUBMISSION_BYTES
        submission = json.loads(file.read_text())
        check_cirr_submission(submission, list(references), gallery, references)
        assert set(submission) == set(sample)  # the same pairs as the server's own sample
    members = {str(row["pairid"]): set(row["img_set"]["members"]) for row in rows}
    assert all(
        set(names) <= members[pair] - {references[pair]}
        for pair, names in submission.items()
        if pair in members
    )


@pytest.fixture(scope="module")
def fashioniq(annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FashionIQ's real val files and HP-FashionIQ's images in one folder, as users have them."""
    root = tmp_path_factory.mktemp("fashioniq")
    names: set[str] = set()
    for folder in ("captions", "image_splits"):
        (root / folder).mkdir()
        for file in (annotations / "fashioniq" / folder).glob("*.val.json"):
            shutil.copy(file, root / folder)
            if folder == "image_splits":
                names |= set(json.loads(file.read_text()))
    judged = json.loads((annotations / "hp_fashioniq/hpfiq.json").read_text())
    for user in judged.values():
        for questions in user.values():
            names |= {Path(path).stem for path in re.findall(IMAGE_PATH, json.dumps(questions))}
    make_images(root / f"images/{name}.png" for name in sorted(names))
    return root


@pytest.mark.timeout(500)
def test_fashioniq_val_over_both_galleries(
    run_pipeline: Runner, checkpoint: Path, fashioniq: Path, tmp_path: Path
) -> None:
    value, output = evaluate(
        run_pipeline, checkpoint, tmp_path, "fashioniq", f"--data.root={fashioniq}"
    )
    result = value["result"]
    assert isinstance(result, dict)
    assert set(result) == {"split", "union"}
    for gallery, part in result.items():
        assert part["queries"] == 6016
        assert f"gallery: {gallery}" in output
        assert f"[rank fashioniq {gallery}] 6,016/6,016 queries" in output
        recall = part["recall"]
        assert set(recall) == {"dress", "shirt", "toptee", "average"}
        assert 0 < recall["average"]["R@10"] < recall["average"]["R@50"] < 20
    # The union of references and targets is the smaller gallery, so the easier one.
    split, union = (result[name]["recall"]["average"]["R@50"] for name in ("split", "union"))
    assert split < union
    assert "15,415 images" in output
    assert "QuRe (published)" in output


@pytest.mark.timeout(500)
def test_hp_fashioniq(
    run_pipeline: Runner, checkpoint: Path, fashioniq: Path, annotations: Path, tmp_path: Path
) -> None:
    judged = annotations / "hp_fashioniq/hpfiq.json"
    value, output = evaluate(
        run_pipeline,
        checkpoint,
        tmp_path,
        "hp-fashioniq",
        f"--data.root={fashioniq}",
        f"--judged={judged}",
    )
    result = value["result"]
    assert isinstance(result, dict)
    assert result["participants"] == 61
    assert result["symmetric"]["pairs"] + result["ties"] == 3050
    for part in (result["ratio"], result["symmetric"]):
        low, high = part["interval_95"]
        # A model that knows nothing agrees with people about half of the time. Its choices are
        # few, a hundred pictures, so it can be off by more than its interval says.
        assert 0.35 < low < part["value"] < high < 0.65
    assert "intervals resample 61 participants" in output


@pytest.fixture(scope="module")
def circo(annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIRCO's real queries over a gallery of every image that they and the samples name."""
    root = tmp_path_factory.mktemp("circo")
    shutil.copytree(annotations / "circo/annotations", root / "annotations")
    ids: set[int] = set()
    for split in ("val", "test"):
        for row in json.loads((root / f"annotations/{split}.json").read_text()):
            ids |= {row["reference_img_id"], *row.get("gt_img_ids", [])}
    coco = root / "COCO2017_unlabeled"
    (coco / "annotations").mkdir(parents=True)
    info = {"images": [{"id": number} for number in sorted(ids)]}
    (coco / "annotations/image_info_unlabeled2017.json").write_text(json.dumps(info))
    make_images(coco / f"unlabeled2017/{number:012d}.jpg" for number in sorted(ids))
    return root


@pytest.mark.timeout(400)
def test_circo(
    run_pipeline: Runner, checkpoint: Path, circo: Path, annotations: Path, tmp_path: Path
) -> None:
    data = f"--data.root={circo}"
    value, _ = evaluate(run_pipeline, checkpoint, tmp_path, "circo", data)
    result = value["result"]
    assert isinstance(result, dict)
    assert result["queries"] == 220
    assert set(result["map"]) == {f"{m}@{k}" for m in ("mAP", "R") for k in (5, 10, 25, 50)}
    # Asked again, it is not computed again; one changed pixel is another question.
    again, output = evaluate(run_pipeline, checkpoint, tmp_path, "circo", data)
    assert again == value
    assert "[rank circo]" not in output
    image = min((circo / "COCO2017_unlabeled/unlabeled2017").glob("*.jpg"))
    image.unlink()
    Image.new("RGB", (8, 8), "red").save(image, "PNG")
    changed, output = evaluate(run_pipeline, checkpoint, tmp_path, "circo", data)
    assert changed["data"] != value["data"]
    assert "[rank circo] 220/220 queries" in output
    value, _ = evaluate(run_pipeline, checkpoint, tmp_path, "circo-test", data)
    submission = json.loads((Path(str(value["uri"])) / "submission.json").read_text())
    info = circo / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    gallery = [str(row["id"]) for row in json.loads(info.read_text())["images"]]
    queries = [str(row["id"]) for row in json.loads((circo / "annotations/test.json").read_text())]
    assert len(queries) == 800
    check_circo_submission(submission, queries, gallery)
    sample = json.loads(
        (annotations / "circo/submission_examples/submission_test.json").read_text()
    )
    assert set(submission) == set(sample)


def test_a_wrong_place_is_named(run_pipeline: Runner, checkpoint: Path, tmp_path: Path) -> None:
    result = run_pipeline(
        "evaluate",
        f"--checkpoint={checkpoint}",
        "--protocol=hp-fashioniq",
        f"--output={tmp_path}",
        "--cluster.gpus=none",
    )
    assert result.returncode == 2
    assert "--judged: the hp-fashioniq protocol needs the path of hpfiq.json" in result.stderr
    result = run_pipeline(
        "evaluate", f"--checkpoint={tmp_path}", "--protocol=cirr", f"--output={tmp_path}"
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
