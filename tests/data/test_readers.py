"""The dataset readers, on small hand-made directories and on every kind of fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError
from qure_core.data import load_split, mining_galleries, read_split, write_split
from qure_core.data.circo import read_circo
from qure_core.data.cirr import read_cirr
from qure_core.data.fashioniq import read_fashioniq
from qure_core.data.jsonl import read_jsonl
from qure_core.data.validate import validate_dataset


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, str):
        path.write_text(value)
    else:
        path.write_text(json.dumps(value))


def picture(path: Path, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 10)).save(path)


def row(candidate: str, target: str, *captions: str) -> dict[str, Any]:
    return {"candidate": candidate, "target": target, "captions": list(captions or ("x", "y"))}


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Two categories: bags flat as .png, hats in a folder of their own as .jpg."""
    for split in ("train", "val"):
        put(tmp_path / f"image_splits/split.bag.{split}.json", ["b1", "b2", "b3"])
        put(tmp_path / f"image_splits/split.hat.{split}.json", ["h1", "h2", "h3"])
        put(tmp_path / f"captions/cap.bag.{split}.json", [row("b1", "b2", "is red.", "Bigger ")])
        put(tmp_path / f"captions/cap.hat.{split}.json", [row("h1", "h3"), row("h2", "h3")])
    for name in ("b1", "b2", "b3"):
        picture(tmp_path / f"images/{name}.png")
    for name in ("h1", "h2", "h3"):
        picture(tmp_path / f"images/hat/{name}.jpg")
    return tmp_path


def test_fashioniq_layout(fashion: Path) -> None:
    split = load_split(DataSettings(format="fashioniq", root=str(fashion)), "train")
    assert [t.query_id for t in split.triplets] == [
        "bag.train.000000",
        "hat.train.000000",
        "hat.train.000001",
    ]
    assert split.triplets[0].text == "Is red and Bigger"
    assert split.galleries == {"bag": ("b1", "b2", "b3"), "hat": ("h1", "h2", "h3")}
    assert split.images["h1"].endswith("images/hat/h1.jpg")
    assert split.images["b1"].endswith("images/b1.png")


def test_mining_corpus_is_targets_or_split(fashion: Path) -> None:
    data = DataSettings(format="fashioniq", root=str(fashion))
    split = load_split(data, "train")
    assert mining_galleries(data, split) == {"bag": ("b2",), "hat": ("h3",)}
    data.mining_corpus = "split"
    assert mining_galleries(data, split) == split.galleries


def test_splits_survive_parquet(fashion: Path, tmp_path: Path) -> None:
    split = load_split(DataSettings(format="fashioniq", root=str(fashion)), "val")
    write_split(str(tmp_path / "copy"), split)
    assert read_split(str(tmp_path / "copy")) == split


def problems_of(root: Path, split: str = "train") -> str:
    return "\n".join(map(str, read_fashioniq(str(root), split)[1]))


def test_fashioniq_faults_name_file_and_row(fashion: Path) -> None:
    put(
        fashion / "captions/cap.hat.train.json",
        [
            {"candidate": "h1", "captions": ["x", "y"]},
            row("h1", "nowhere"),
            {"candidate": "h1", "target": "h2", "captions": ["one"]},
            "text",
            {"candidate": 5, "target": "h2", "captions": ["x", "y"]},
        ],
    )
    (fashion / "images/b3.png").unlink()
    found = problems_of(fashion)
    assert "cap.hat.train.json [0]: key 'target' is missing" in found
    assert "cap.hat.train.json [1]: target 'nowhere' is not in split.hat.train.json" in found
    assert "cap.hat.train.json [2]: captions are not two texts" in found
    assert "cap.hat.train.json [3]: is a str, where a mapping is needed" in found
    assert "cap.hat.train.json [4]: 'candidate' is a int: 5" in found
    assert "split.bag.train.json [2]: image 'b3' is missing" in found
    with pytest.raises(InputError, match=r"6 problem\(s\)"):
        load_split(DataSettings(format="fashioniq", root=str(fashion)), "train")


def test_fashioniq_empty_categories_and_bad_json(fashion: Path) -> None:
    put(fashion / "image_splits/split.bag.train.json", [])
    put(fashion / "captions/cap.hat.train.json", "[{]")
    found = problems_of(fashion)
    assert "split.bag.train.json: category 'bag' has no images" in found
    assert "cap.hat.train.json: not valid JSON" in found
    with pytest.raises(InputError, match=r"for shoe \(found: bag, hat\)"):
        read_fashioniq(str(fashion), "train", ["shoe"])


def test_relevance_must_match_its_triplets(fashion: Path) -> None:
    put(fashion / "relevance/rel.hat.val.json", [["h3", "h2"], ["h3"]])
    split, problems = read_fashioniq(str(fashion), "val")
    assert not problems
    assert split.triplets[1].relevant_ids == ("h3", "h2")
    put(fashion / "relevance/rel.hat.val.json", [["h3"]])
    assert "1 rows for 2 triplets" in problems_of(fashion, "val")


def cirr_row(**changes: Any) -> dict[str, Any]:
    base = {
        "pairid": 7,
        "reference": "a",
        "target_hard": "b",
        "caption": "more dogs",
        "img_set": {"members": ["a", "b", "c"]},
    }
    return base | changes


def test_cirr_layout(tmp_path: Path) -> None:
    paths = {"a": "./dev/a.png", "b": "./dev/b.png", "c": "./dev/sub/c.png"}
    for path in paths.values():
        picture(tmp_path / path)
    put(tmp_path / "cirr/image_splits/split.rc2.val.json", paths)
    put(tmp_path / "cirr/captions/cap.rc2.val.json", [cirr_row()])
    split, problems = read_cirr(str(tmp_path), "val")
    assert not problems
    assert split.triplets[0].query_id == "7"
    assert split.triplets[0].group == ("a", "b", "c")
    put(
        tmp_path / "cirr/captions/cap.rc2.val.json",
        [cirr_row(reference="z"), cirr_row(pairid="x")],
    )
    put(
        tmp_path / "cirr/image_splits/split.rc2.val.json",
        paths | {"d": "../../etc/passwd", "e": "./dev/e.png"},
    )
    found = "\n".join(map(str, read_cirr(str(tmp_path), "val")[1]))
    assert "[0]: reference 'z' is not in" in found
    assert "[1]: 'pairid' is a str" in found
    assert "[d]: path '../../etc/passwd' is not inside the data root" in found
    assert "[e]: image 'e.png' is missing" in found


def test_circo_layout(tmp_path: Path) -> None:
    info = {"images": [{"id": 1}, {"id": 2}]}
    put(tmp_path / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", info)
    for number in (1, 2):
        picture(tmp_path / f"COCO2017_unlabeled/unlabeled2017/{number:012d}.jpg")
    query = {"id": 0, "reference_img_id": 1, "relative_caption": "two cats"}
    put(tmp_path / "annotations/test.json", [query])
    put(
        tmp_path / "annotations/val.json",
        [query | {"target_img_id": 2, "gt_img_ids": [2, 3]}],
    )
    test, problems = read_circo(str(tmp_path), "test")
    assert not problems
    assert test.triplets[0].text == "a photo of $ that two cats"
    assert test.triplets[0].target_id is None
    _, problems = read_circo(str(tmp_path), "val")
    assert [p.message for p in problems] == [
        "relevant names 1 unknown image(s), first '3'; the nearest name there is '2'"
    ]


def test_jsonl_layout(tmp_path: Path) -> None:
    for name in ("shoes/a", "shoes/b", "c"):
        picture(tmp_path / f"images/{name}.png")
    good = {"reference": "shoes/a", "text": "red", "target": "shoes/b", "category": "shoes"}
    lines = [json.dumps(good), "", json.dumps(good | {"split": "val", "query_id": "q9"})]
    put(tmp_path / "triplets.jsonl", "\n".join(lines))
    split, problems = read_jsonl(str(tmp_path), "train")
    assert not problems
    assert split.triplets[0].query_id == "train.000001"
    assert split.galleries == {"shoes": ("shoes/a", "shoes/b")}
    assert read_jsonl(str(tmp_path), "val")[0].triplets[0].query_id == "q9"
    faults = ['{"reference": "c"', json.dumps({"reference": "c", "text": "x"})]
    faults += [json.dumps(good | {"target": "nowhere"}), json.dumps(good | {"target": "c"})]
    put(tmp_path / "triplets.jsonl", "\n".join(faults))
    found = "\n".join(map(str, read_jsonl(str(tmp_path), "train")[1]))
    assert "[line 1]: not valid JSON" in found
    assert "[line 2]: key 'target' is missing" in found
    assert "[line 3]: target image 'nowhere' is missing" in found
    assert "target 'c' is outside images/shoes/" in found


def test_validate_decodes_every_image(fashion: Path, local_ray: str) -> None:
    data = DataSettings(format="fashioniq", root=str(fashion))
    picture(fashion / "images/b2.png", "P")
    Image.new("CMYK", (5, 5)).save(fashion / "images/hat/h2.jpg")
    assert validate_dataset(data, ["train", "val"]).problems == []
    file = fashion / "images/b1.png"
    Image.effect_noise((64, 64), 80).save(file)
    file.write_bytes(file.read_bytes()[:1000])
    (fashion / "images/hat/h3.jpg").unlink()
    found = [str(p) for p in validate_dataset(data, ["train"]).problems]
    assert len(found) == 2
    assert "image 'h3' is missing" in found[0]
    assert found[1].startswith(f"{file}: cannot be decoded")
