"""CIRR, CIRCO and HP-FashionIQ against the released program's golden values and brute force."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.base.errors import InputError
from qure_core.data.schema import Split, Triplet
from qure_core.evaluation.metrics import (
    CIRCO_CUTS,
    average_precision,
    circo_summary,
    cirr_summary,
    preference_summary,
)
from qure_core.evaluation.protocols import PROTOCOLS, of_format, of_manifest
from qure_core.evaluation.protocols.circo import check_circo_submission, circo_submission
from qure_core.evaluation.protocols.cirr import check_cirr_submission, cirr_submission
from qure_core.evaluation.protocols.hp_fashioniq import parse_hp_fashioniq
from qure_core.evaluation.published import PUBLISHED, comparison_table, known_dataset
from qure_core.evaluation.rows import ranking_row

GOLDEN = json.loads((GOLDENS / "metrics.json").read_text())
ARRAYS = np.load(GOLDENS / "metrics.npz")


def golden_row(triplet: Triplet, scores: np.ndarray, names: list[str]) -> dict[str, Any]:
    """What an evaluation keeps of a golden row of scores, whose names are in no order."""
    order = np.argsort(np.asarray(names), kind="stable")
    corpus = [names[i] for i in order]
    columns = {name: column for column, name in enumerate(corpus)}
    own = torch.from_numpy(scores[order])
    return ranking_row(triplet, own, corpus, columns, top_k=len(names), drop_reference=True)


def cirr_case(case: str) -> tuple[dict[str, list[str]], dict[str, list[str]], list[int], list[int]]:
    """Our rankings of a golden CIRR case: names, subset names, ranks and subset ranks."""
    names = GOLDEN["cirr_val"][case]["index_names"]
    get = {
        key: ARRAYS[f"cirr__{case}__{key}"]
        for key in ("scores", "reference_col", "target_col", "member_cols", "pair_ids")
    }
    whole: dict[str, list[str]] = {}
    subset: dict[str, list[str]] = {}
    ranks, subset_ranks = [], []
    for q, scores in enumerate(get["scores"]):
        reference, target = names[get["reference_col"][q]], names[get["target_col"][q]]
        members = tuple(names[i] for i in get["member_cols"][q])
        pair = str(get["pair_ids"][q])
        row = golden_row(Triplet(pair, reference, "", target, "cirr", members), scores, names)
        whole[pair], subset[pair] = row["top_ids"], row["subset_ids"]
        ranks.append(row["target_rank"])
        subset_ranks.append(row["subset_ids"].index(target))
    return whole, subset, ranks, subset_ranks


def test_cirr_recalls_are_the_released_programs() -> None:
    # Only where no scores are equal: there its order is an accident of an unstable sort.
    _, _, ranks, subset_ranks = cirr_case("plain")
    golden = GOLDEN["cirr_val"]["plain"]["eval_utils_eval_cirr"]
    ours = cirr_summary(ranks, subset_ranks)
    pairs = {f"R@{k}": f"recall_at{k}" for k in (1, 5, 10, 50)}
    pairs |= {f"R_s@{k}": f"group_recall_at{k}" for k in (1, 2, 3)}
    pairs["mean(R@5, R_s@1)"] = "mean(R@5+R_s@1)"
    errors = [abs(ours[mine] - golden[theirs]) for mine, theirs in pairs.items()]
    print("\nlargest CIRR recall error, percent:", max(errors))
    assert max(errors) <= 1e-5


@pytest.mark.parametrize("case", ["ties_rounded", "all_equal"])
def test_cirr_ties_stay_within_the_possible(case: str) -> None:
    names = GOLDEN["cirr_val"][case]["index_names"]
    _, _, ranks, _ = cirr_case(case)
    tied = 0
    for q, scores in enumerate(ARRAYS[f"cirr__{case}__scores"]):
        target = int(ARRAYS[f"cirr__{case}__target_col"][q])
        reference = int(ARRAYS[f"cirr__{case}__reference_col"][q])
        others = [i for i in range(len(names)) if i not in (reference, target)]
        better = sum(scores[i] > scores[target] for i in others)
        equal = sum(scores[i] == scores[target] for i in others)
        assert better <= ranks[q] <= better + equal
        first = sum(scores[i] == scores[target] and names[i] < names[target] for i in others)
        assert ranks[q] == better + first
        triplet = Triplet("q", names[reference], "", names[target], "cirr")
        row = golden_row(triplet, scores, names)
        assert row["target_ties"] == equal
        tied += row["target_ties"] > 0
    assert tied


def test_cirr_submissions_are_the_released_programs() -> None:
    golden = GOLDEN["cirr_test"]["plain"]["submissions"]
    whole, subset, _, _ = cirr_case("plain")
    for metric, ranked in (("recall", whole), ("recall_subset", subset)):
        ours = cirr_submission(metric, ranked)
        theirs = golden[metric]
        assert (ours["version"], ours["metric"]) == (theirs["version"], theirs["metric"])
        for pair, names in theirs.items():
            if pair not in ("version", "metric"):
                assert ours[pair] == names, pair


def small_submission() -> tuple[dict[str, Any], list[str], dict[str, str]]:
    gallery = [f"test1-{i}" for i in range(60)]
    ranked = {"7": gallery[1:52], "8": gallery[5:56]}
    return cirr_submission("recall", ranked), gallery, {"7": "test1-0", "8": "test1-1"}


def test_cirr_submission_rules() -> None:
    value, gallery, references = small_submission()
    check_cirr_submission(value, ["7", "8"], gallery, references)

    def refused(match: str, changed: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=match):
            check_cirr_submission(changed, ["7", "8"], gallery, references)

    refused("1 pairs are missing, first 8", {k: v for k, v in value.items() if k != "8"})
    refused("pair 7: 49 distinct names", value | {"7": value["7"][:49]})
    refused("pair 7: 49 distinct names", value | {"7": value["7"][:49] + value["7"][:1]})
    refused("elsewhere is not in the gallery", value | {"7": [*value["7"][:49], "elsewhere"]})
    refused("pair 7: holds its own reference", value | {"7": [*value["7"][:49], "test1-0"]})
    refused("version None", {k: v for k, v in value.items() if k != "version"})
    refused("bytes exceed", value | {"9" * 6_000_000: value["7"]})


@pytest.mark.parametrize("case", ["strong", "weak", "perfect"])
def test_circo_map_is_the_released_programs(case: str, annotations: Path) -> None:
    rows = json.loads((annotations / "circo/annotations/val.json").read_text())
    predictions = {
        str(row["id"]): [str(name) for name in names]
        for row, names in zip(rows, ARRAYS[f"circo_map__{case}__predictions"], strict=True)
    }
    relevant = {str(row["id"]): [str(i) for i in row["gt_img_ids"]] for row in rows}
    targets = {str(row["id"]): str(row["target_img_id"]) for row in rows}
    ours = circo_summary(predictions, relevant, targets)
    errors = [
        abs(ours[f"{mine}@{k}"] / 100 - GOLDEN["circo_map"][case][theirs][str(k)])
        for mine, theirs in (("mAP", "map_at_k"), ("R", "recall_at_k"))
        for k in (5, 10, 25, 50)
    ]
    print("\nlargest CIRCO error:", max(errors))
    assert max(errors) <= 1e-9
    predictions["0"][1] = predictions["0"][0]
    with pytest.raises(InputError, match="query 0 has duplicate predictions"):
        circo_summary(predictions, relevant, targets)


@settings(deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 12))
def test_average_precision_by_hand(order: list[int], relevant: int, k: int) -> None:
    names = [str(i) for i in order]
    wanted = [str(i) for i in range(relevant)]
    precisions = [
        sum(n in wanted for n in names[:place]) / place
        for place in range(1, k + 1)
        if names[place - 1] in wanted
    ]
    expected = sum(precisions) / min(k, relevant)
    assert average_precision(names, wanted, k) == pytest.approx(expected)


def test_circo_submission_is_the_released_programs() -> None:
    golden = GOLDEN["circo_submission"]
    names = golden["index_names"]
    scores = ARRAYS["circo_submission__scores"]
    ranked = {
        str(q): [names[i] for i in np.argsort(-row, kind="stable")] for q, row in enumerate(scores)
    }
    ours = circo_submission(ranked)
    for query, expected in golden["submission"].items():
        assert ours[query] == [int(name) for name in expected]
    check_circo_submission(ours, list(golden["submission"]), names)
    for match, changed in (
        ("11 queries where 12", {k: v for k, v in ours.items() if k != "0"}),
        ("query 0: 49 distinct", ours | {"0": ours["0"][:49]}),
        ("query 0: ids must be integers", ours | {"0": [str(i) for i in ours["0"]]}),
        ("query 0: 999999999 is not", ours | {"0": [*ours["0"][:49], 999_999_999]}),
    ):
        with pytest.raises(InputError, match=match):
            check_circo_submission(changed, list(ours), names)


def test_preference_ratio_is_the_released_programs(annotations: Path) -> None:
    file = annotations / "hp_fashioniq/hpfiq.json"
    pairs = parse_hp_fashioniq(json.loads(file.read_text()), str(file))
    golden = GOLDEN["hpfiq"]
    preferred = np.asarray([pair.preferred for pair in pairs])
    assert len(pairs) == golden["n_pairs"] == 3050
    np.testing.assert_array_equal(preferred, ARRAYS["hpfiq__preferred"])
    participants = [pair.participant for pair in pairs]
    score1, score2 = ARRAYS["hpfiq__set1_score"], ARRAYS["hpfiq__set2_score"]
    ours = preference_summary(score1, score2, preferred, participants)
    assert ours["ratio"]["value"] == pytest.approx(golden["preference_ratio"], abs=1e-12)
    assert ours["ratio"]["pairs"] == golden["counted_pairs"]
    assert ours["ties"] == golden["exact_ties"]
    assert ours["participants"] == 61
    low, high = ours["ratio"]["interval_95"]
    assert low < ours["ratio"]["value"] < high
    first, second = score1 > score2, score2 > score1
    both = (preferred[first] == 1).sum() + (preferred[second] == 2).sum()
    assert ours["symmetric"]["value"] == pytest.approx(both / (first.sum() + second.sum()))
    swapped = preference_summary(score2, score1, preferred, participants)
    assert swapped["ratio"]["value"] == pytest.approx(
        1 - golden["preference_ratio_other_direction_not_official"], abs=1e-12
    )
    level = np.zeros(len(pairs))
    assert preference_summary(level, level, preferred, participants)["ratio"]["value"] == 0.0


def test_hp_fashioniq_texts_and_paths_are_mapped(annotations: Path) -> None:
    file = annotations / "hp_fashioniq/hpfiq.json"
    pairs = parse_hp_fashioniq(json.loads(file.read_text()), str(file))
    assert all(
        "mark" not in pair.text
        or "markings" in pair.text
        or "marks" in pair.text
        or "mark" in pair.text.split()
        for pair in pairs
    )
    assert any(pair.text.endswith(".") for pair in pairs)
    assert pairs[0].reference_id == "B000LUIBH8"
    assert all(len(pair.set1) == len(pair.set2) == 5 for pair in pairs)
    with pytest.raises(InputError, match=r"x\.json \[u\.q\]: malformed"):
        parse_hp_fashioniq({"u": {"q": {"sentences": []}}}, "x.json")


def test_a_benchmark_is_known_by_its_categories_and_sizes(annotations: Path) -> None:
    """Published figures stand beside the benchmarks' own data alone."""

    def split(root: str, categories: list[str]) -> Split:
        triplets: list[Triplet] = []
        galleries = {}
        for name in categories:
            folder = annotations / root
            rows = json.loads((folder / f"captions/cap.{name}.val.json").read_text())
            ids = json.loads((folder / f"image_splits/split.{name}.val.json").read_text())
            triplets += [Triplet(f"{name}{i}", "", "", "", name) for i in range(len(rows))]
            galleries[name] = tuple(ids)
        return Split("val", tuple(triplets), {}, galleries)

    fashioniq = split("fashioniq", ["dress", "shirt", "toptee"])
    assert known_dataset(fashioniq) == "fashioniq"
    assert known_dataset(split("fashioniq", ["dress", "shirt"])) is None
    fewer = {**fashioniq.galleries, "dress": fashioniq.galleries["dress"][1:]}
    assert known_dataset(replace(fashioniq, galleries=fewer)) is None
    assert known_dataset(replace(fashioniq, triplets=fashioniq.triplets[1:])) is None
    cirr = split("cirr/cirr", ["rc2"])
    named = [replace(triplet, category="cirr") for triplet in cirr.triplets]
    cirr = Split("val", tuple(named), {}, {"cirr": cirr.galleries["rc2"]})
    assert known_dataset(cirr) == "cirr"
    assert "published" not in comparison_table(None, {"R@10": 1.0}, "own")


def test_published_figures_are_labelled() -> None:
    table = comparison_table("fashioniq", {"R@10": 1.0, "R@50": 2.0, "mean": 1.5}, "mine")
    lines = table.splitlines()
    assert lines[1].startswith("mine (this run)")
    assert all("(published)" in line for line in lines[2:])
    assert len(lines) == 2 + len(PUBLISHED["fashioniq"])


def test_a_protocol_is_given_as_many_images_as_it_needs() -> None:
    """CIRCO's mAP@50 of ten kept images would be another number."""
    needs = {name: protocol.top_k for name, protocol in PROTOCOLS.items()}
    assert needs["circo"] == max(CIRCO_CUTS)
    assert needs["circo-test"] == needs["cirr-test"] == 50
    assert of_format("cirr").name == "cirr"
    assert of_format("jsonl").name == of_format("world").name == "own"
    assert of_manifest({}).name == "own"
