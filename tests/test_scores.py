"""Scores of findings against a truth made by hand: whole, and with one thing wrong at a time."""

import copy
import json

import numpy as np
import pandas as pd
import pytest

from lib import records
from lib.errors import Refusal
from pipeline import units
from report import scores

EVEN = {"artist": 10.0, "writer": 10.0}
DIRECTIONS = {"artist": [1.0, 0.0, 0.0], "writer": [0.0, 1.0, 0.0]}


def site(layer: int, head: int | None, role: str, share: float, position: str = "last", **other: object) -> dict:
    effect = {"mean": 10 * share, "by_answer": {name: gap * share for name, gap in EVEN.items()}}
    component = "mlp" if head is None else "head"
    necessity = {"zero": effect, "counterfactual": effect}
    own = {"layer": layer, "head": head, "component": component, "role": role, "position": position, "placebo": 0.0}
    return own | {"necessity": necessity, "recovery": effect} | other


TRUTH = {
    "gap": {"mean": 10.0, "by_answer": EVEN},
    "rule": "additive",
    "arrived": [0.0, 0.0, 0.0, 6.0, 8.5, 8.5, 10.0],
    "rule_logits": {"first": 5.0, "second": 5.0, "both": 10.0},
    "placebo_gap": 5.0,
    "options": {"aggregator": "mlp"},
    "sites": [
        site(1, None, "writer", 1.0, "names"),
        site(3, 2, "retrieval", 0.6),
        site(4, 5, "retrieval", 0.4),
        site(5, None, "aggregator", 1.0),
        site(6, 0, "backup", 0.0),
        site(2, 7, "attends", 0.0),
    ],
    "paths": [
        {"sender": 0, "receiver": at, "input": "v", "noise": {"mean": loss}} for at, loss in ((1, 6.0), (2, 4.0))
    ],
    "neurons": [{"layer": 5, "neuron": n} for n in (3, 8)],
    "backup": {"site": 4, "reader": None, "ratio": 0.7, "ablations": ["resample"]},
    "readable": [
        {"what": "profession", "position": "names", "first": 1},
        {"what": "superset", "position": "last", "first": 3},
    ],
    "directions": {"superset": DIRECTIONS},
}


def effects(**shares: float) -> list[dict]:
    names = {name.replace("_", ".") if name[0] == "h" else name.replace("_", " "): v for name, v in shares.items()}
    return [
        {"site": name.removeprefix("h"), "component": "head" if name[0] == "h" else "mlp"}
        | {"estimate": 10 * share, "low": 10 * share - 0.01, "p": 0.001, "ratio": share}
        for name, share in names.items()
    ]


def accuracies(kind: str, target: str, position: str, first: int) -> list[dict]:
    own = {"kind": kind, "target": target, "position": position, "template": "t", "trained": "t"}
    return [own | {"layer": n, "estimate": float(n >= first), "low": float(n >= first)} for n in range(8)]


def found() -> dict:
    """What steps that find the whole truth hand on."""
    found = {
        "coarse_sweep": {"critical_layers": [3, 4], "between": {"parts": []}},
        "necessity": {"sites": effects(h3_2=0.6, h4_5=0.4, mlp_5=0.3)},
        "sufficiency": {"sites": effects(h3_2=0.6, h4_5=0.4, mlp_5=1.0), "specific": []},
        "hydra": {"backups": [{"site": "6.0", "stands_in": True, "ratio_estimate": 0.7004}]},
        "retrieval_heads": {"verdicts": {"slice_heads_that_retrieve": ["3.2", "4.5"], "retrieval_heads": {}}},
        "generality": {
            "interaction": {"sites": [{"site": "mlp 5", "sure": False}]},
            "rule": {"verdict": {"number": "additive"}},
        },
        "subspace": {
            "probes": {
                "accuracy": [
                    *accuracies("one-name", "profession", "names", 1),
                    *accuracies("pair", "superset", "last", 3),
                ],
                "thresholds": [
                    {"kind": "one-name", "target": "profession", "position": "names", "threshold": 0.3},
                    {"kind": "pair", "target": "superset", "position": "last", "threshold": 0.3},
                ],
            },
            "directions": {"layer": 6, "by_number": [{"method": "class difference", "k": 1, "estimate": 0.99}]},
            "cosine": 0.999,
            "carried": 0.98,
        },
        "neurons": {"neurons": {"significant": {"mean": {"neuron 5.3": 1, "neuron 5.8": 1}}}},
        "story": {"circuit": {"members": [{"site": s, "matters": True} for s in ("3.2", "4.5", "mlp 5")]}},
    }
    found["sufficiency"]["specific"] = [{"choice": "kept", "direction": "denoise", "verdict": "specific"}]
    found["sufficiency"]["critical_slice"] = [{"site": "3.2"}, {"site": "4.5"}, {"site": "mlp 5"}]
    found["retrieval_heads"]["slice"] = ["3.2", "4.5", "mlp 5"]
    found["retrieval_heads"]["carried"] = [
        {"senders": "everything", "mlps": "recomputed", "receivers": f"{kind} at names", "low": share}
        for kind, share in (("v", 0.9), ("k", 0.0))
    ]
    decided = sorted(scores.planted_claims(TRUTH, found | {"claims": {"claims": []}}).must)
    claims = [dict(zip(("id", "verdict"), one.split(": "), strict=True)) for one in decided]
    return found | {"claims": {"claims": [*claims, {"id": "fame_matched", "verdict": "supported"}]}}


def scored(found: dict, truth: dict = TRUTH) -> dict[str, scores.Score]:
    return {score.method: score for score in scores.score(truth, found)}


def test_findings_that_are_the_truth_are_right():
    own = scored(found())
    assert {name for name, score in own.items() if not score.right} == set()
    assert set(own) == set(scores.METHODS) - {"circuit", "backups in the slice"}, "with a backup there are two circuits"
    assert own["backups, ratio"].error == pytest.approx(0.0004)
    assert scored(found(), TRUTH | {"backup": None})["circuit"].wanted == ["3.2", "4.5", "mlp 5"]


WRONG = {
    "a decoy is found": ("necessity", lambda f: f["necessity"]["sites"].extend(effects(h2_7=0.1)), 3 / 4, 1),
    "a site is missed": ("sufficiency", lambda f: f["sufficiency"]["sites"].pop(0), 1, 2 / 3),
    "a small effect is none": ("sufficiency", lambda f: f["sufficiency"]["sites"][0].update(ratio=0.01), 1, 2 / 3),
    "an unsure one is none": ("necessity", lambda f: f["necessity"]["sites"][0].update(p=0.2), 1, 2 / 3),
    "a layer too many": ("critical layers", lambda f: f["coarse_sweep"]["critical_layers"].append(7), 2 / 3, 1),
    "no backup": ("backups", lambda f: f["hydra"]["backups"].clear(), 1, 0),
    "it does not stand in": ("backups", lambda f: f["hydra"]["backups"][0].update(stands_in=False), 1, 0),
    "another rule": ("rule", lambda f: f["generality"]["rule"]["verdict"].update(number="OR"), 0, 0),
    "a route by keys": ("routes", lambda f: f["retrieval_heads"]["carried"][1].update(low=0.5), 1 / 2, 1),
    "the other verdict": ("specificity", lambda f: f["sufficiency"]["specific"][0].update(verdict="general"), 0, 0),
    "a probe that cannot": (
        "probes, above chance",
        lambda f: f["subspace"]["probes"]["accuracy"][0].update(low=0.4),
        12 / 13,
        1,
    ),
    "a neuron is missed": ("neurons", lambda f: f["neurons"]["neurons"]["significant"]["mean"].popitem(), 1, 1 / 2),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_costs_its_own_method(fault):
    method, break_it, precision, recall = WRONG[fault]
    broken = found()
    break_it(broken)
    own = scored(broken)
    assert {name for name, score in own.items() if not score.right} - {"claims", "backups, ratio"} == {method}
    assert (own[method].precision, own[method].recall) == pytest.approx((precision, recall))


def test_a_claim_that_contradicts_the_truth_is_no_claim_left_open():
    ids = [row["id"] for row in found()["claims"]["claims"]]
    against, left = found(), found()
    against["claims"]["claims"][ids.index("no_backup")]["verdict"] = "supported"
    left["claims"]["claims"][ids.index("no_backup")]["verdict"] = "not testable here"
    assert scored(against)["claims"].precision < 1
    assert scored(left)["claims"].precision == 1 and scored(left)["claims"].recall < 1


def test_a_number_must_be_the_planted_one():
    broken = found()
    broken["hydra"]["backups"][0]["ratio_estimate"] = 0.702
    assert not scored(broken)["backups, ratio"].right
    broken["hydra"]["backups"][0]["ratio_estimate"] = None
    assert not scored(broken)["backups, ratio"].right


def test_a_model_without_a_circuit_has_false_positives_alone():
    nothing = {step: {"able": False} for step in found()} | {"claims": {"claims": []}}
    assert all(score.found == [] for score in scores.picked(nothing))
    nothing |= {"sufficiency": found()["sufficiency"]}
    own = {score.method: score.found for score in scores.picked(nothing)}
    assert own["sufficiency"] == ["3.2", "4.5", "mlp 5"] and own["necessity"] == []


def test_a_backup_that_sleeps_is_not_asked_for():
    truth = copy.deepcopy(TRUTH)
    truth["backup"]["ablations"] = ["zero"]
    asked = scores.planted_backups(truth, found())
    assert asked.must == set() and asked.may == {"6.0"} and scores.planted_ratio(truth, found()) == 0


def test_a_backup_that_is_a_member_of_the_slice_is_asked_for_inside_it():
    own = found()
    own["sufficiency"]["critical_slice"].append({"site": "6.0"})
    own["hydra"] |= {"backups": [], "inside": [{"site": "6.0", "backup": True, "stands_in": True}]}
    asked = scored(own)
    assert "backups, ratio" not in asked and asked["backups"].wanted == [] and asked["backups in the slice"].right
    assert not {"no_backup: not supported", "no_repair: not supported"} & set(asked["claims"].wanted)
    own["hydra"]["inside"][0]["stands_in"] = False
    assert scored(own)["backups in the slice"].recall == 0
    assert "backups in the slice" not in scored(found())
    own["hydra"]["backups"] = found()["hydra"]["backups"] + [{"site": "5.5", "stands_in": True, "ratio_estimate": 0.4}]
    assert scored(own)["backups"].precision == 0  # nothing stands in outside
    asleep = copy.deepcopy(TRUTH)
    asleep["backup"]["ablations"] = ["zero"]
    assert scored(own, asleep)["backups in the slice"].recall == 1


def test_critical_layers_are_those_of_the_largest_rises():
    assert scores.arriving_layers({"arrived": [0, 6.0, 6.5, 6.5, 10.0]}) == scores.Wanted({"layer 1", "layer 4"})
    edge = scores.arriving_layers({"arrived": [0, 5.0, 7.9, 10.0]})  # of 79% a little noise makes 80%
    assert edge == scores.Wanted({"layer 1", "layer 2"}, {"layer 3"})
    over = scores.arriving_layers({"arrived": [0, 9.0, 12.0, 10.0]})  # a site that takes away comes last
    assert over.must == {"layer 1"}


def test_the_cosine_is_of_what_is_planted_within_the_supersets(tmp_path):
    vectors = {"artist": [2.0, 0.0, 5.0], "writer": [0.0, 2.0, -5.0]}
    frame = pd.DataFrame({"layer": 6, "class_name": list(vectors), "vector": list(vectors.values())})
    records.write(tmp_path / "subspace.class_means.parquet", frame, {}, schema=None)
    means = scores.class_means({"directions": {"layer": 6}}, tmp_path)

    def cosine(**there: list[float]) -> float:
        return scores.cosine(TRUTH | {"directions": {"superset": DIRECTIONS, "at last": there}}, means)

    assert cosine(artist=[1.0, 0.0, 0.0], writer=[0.0, 1.0, 0.0]) == pytest.approx(1)
    assert cosine(artist=[1.0, 0.0, 0.0], writer=[1.0, -1.0, 0.0]) == pytest.approx(-np.sqrt(0.5))
    unequal = cosine(artist=[2.0, 0.0, 0.0], writer=[0.0, 1.0, 0.0])  # a head for artists: planted is (2, -1)
    assert unequal == pytest.approx(3 / np.sqrt(10))


def test_a_direction_of_blurred_means_brings_less_than_the_planted_one():
    there = {"artist": [1.0, 0.0, 2.0], "writer": [0.0, 1.0, 0.0]}
    truth = TRUTH | {"directions": {"superset": DIRECTIONS, "at last": there}}
    exact = {name: np.array(own) for name, own in there.items()}
    assert scores.carried(truth, exact) == pytest.approx(1)
    blurred = exact | {"artist": np.array([1.0, 0.0, 3.0])}  # f = (1, -1, 3), d = (1, -1, 2), s = (1, -1, 0)
    assert scores.carried(truth, blurred) == pytest.approx(2 * 8 / (11 * 2))


def test_routes_are_asked_of_the_slices_heads_alone():
    own = found()
    own["retrieval_heads"]["slice"] = ["mlp 5"]
    assert "routes" not in scored(own)
    truth = copy.deepcopy(TRUTH)
    truth["sites"].append(site(5, 1, "query_routed", 0.1))
    query = {"sender": 1, "receiver": 6, "input": "q", "noise": {"mean": 1.0}}
    asked = scores.planted_routes(truth | {"paths": [query]}, {"slice": ["5.1"]})
    against = scores.planted_routes(truth | {"paths": [query | {"noise": {"mean": -1.0}}]}, {"slice": ["5.1"]})
    assert asked == scores.Wanted({"q"}) and against == scores.Wanted(set(), {"q"})
    row = {"senders": "everything", "mlps": "recomputed", "receivers": "q at last", "low": 0.05}
    assert scores.routes({"carried": [row]}) == {"q"} and scores.routes({"carried": [row | {"low": None}]}) == set()
    truth["paths"][1]["input"] = "k"
    assert scores.planted_routes(truth, {"slice": ["3.2", "4.5"]}).must == {"k", "v"}
    assert scores.planted_routes(truth, {"slice": ["3.2"]}).must == {"v"}
    assert scores.sliced(own, {"parameters": {"slice_sites": ["4.5"]}}) == ["4.5"]


def test_a_circuit_that_leaves_planted_sites_to_the_model_need_not_be_complete():
    truth = TRUTH | {"backup": None}

    def wanted(*members: str) -> bool:
        own = found() | {"story": {"circuit": {"members": [{"site": name} for name in members]}}}
        return "circuit_complete: supported" in scores.planted_claims(truth, own).must

    assert wanted("3.2", "4.5", "mlp 5") and not wanted("3.2", "mlp 5") and not wanted("mlp 5")


@pytest.mark.parametrize(
    ("first", "second", "both", "rule", "additive"),
    [
        (5, 5, 10, {"additive"}, "supported"),
        (7, 3, 10, {"additive"}, "supported"),
        (6.3, 6.2, 10, {"neither"}, "not supported"),
        (5, 5, 9.7, {"neither"}, "supported"),  # as a soft cap has it: nearly a sum, and surely none
        (5.5, 5.5, 10, None, None),
        (10, 10, 10, {"OR"}, "not supported"),
        (0, 0, 10, {"AND"}, None),
        (10, 0, 10, {"first name"}, "not supported"),
        (0, 10, 10, {"second name"}, "not supported"),
    ],
)
def test_the_rule_is_what_the_weights_do_with_names(first, second, both, rule, additive):
    """Whatever was planted: noise may wake a backup in prompts of two classes."""
    truth = TRUTH | {"rule_logits": {"first": first, "second": second, "both": both}}
    wanted = scores.planted_rule(truth)
    assert wanted == (rule and scores.Wanted(rule))
    claims = scores.planted_claims(truth, found())
    said = {said for said in claims.must if said.startswith("rule_additive")}
    if scores.name_steps(truth).one_alone:
        assert not said and f"rule_additive: {additive}" in claims.may
    else:
        assert said == ({f"rule_additive: {additive}"} if additive else set())


def test_no_claim_on_two_names_is_supported_where_one_is_read():
    truth = TRUTH | {"rule_logits": {"first": 10.0, "second": 0.0, "both": 10.0}}
    own = found()
    own["generality"]["rule"]["verdict"]["number"] = "first name"
    rows = [row for row in own["claims"]["claims"] if row["id"] not in ("either_name", "rule_additive")]
    for verdict, right in (("not testable here", True), ("not supported", True), ("supported", False)):
        said = [*rows, {"id": "rule_additive", "verdict": verdict}]
        mine = scored(own | {"claims": {"claims": said}}, truth)
        assert mine["claims"].right == right and mine["rule"].right


def test_a_site_that_serves_one_class_is_class_specific():
    truth = copy.deepcopy(TRUTH)
    truth["sites"][3]["recovery"]["by_answer"] = {"artist": 10.0, "writer": 7.0}
    assert scores.planted_classes(truth, found()["generality"]).must == {"mlp 5"}
    untested = {"interaction": {"why": "one site"}}
    assert scores.planted_classes(truth, untested).must == {"mlp 5"}, "missed, as it was not tested"
    assert scores.planted_classes(TRUTH, untested) is None


def test_a_truth_of_other_weights_is_refused(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH | {"sha256": "ab" * 32}), encoding="utf-8")
    units.write_json(tmp_path / "baselines.findings.json", {"model": {"sha256": "cd" * 32}})
    with pytest.raises(Refusal, match=r"^truth.json is of other weights \(abababababab\).*\(cdcdcdcdcdcd\): delete it"):
        scores.load(tmp_path)
    units.write_json(tmp_path / "baselines.findings.json", {"model": {"sha256": "ab" * 32}})
    assert scores.load(tmp_path)[0]["sha256"] == "ab" * 32
