"""The claims ledger on findings whose verdicts are known, and the sentence that must follow the verdicts."""

import json
import re
import subprocess
from types import SimpleNamespace

import jsonschema
import numpy as np
import pandas as pd
import pytest
from professions import QUESTION
from pydantic import ValidationError

from lib import records, stats
from pipeline import keys, params, units
from pipeline import step as steps
from report import front
from steps.__main__ import Build, main
from steps.registry import PLAN
from steps.story import circuits_page, claims, fresh, measure, sentences
from steps.story import front as first_page
from steps.story import page as story
from steps.story.claims import CLAIMS, LINKS, NOT_SUPPORTED, NOT_TESTABLE, NOT_TESTED, SUPPORTED

ROOT = params.ROOT


def span(estimate, reach=0.05, **more):
    """An estimate with its interval, as findings hold it."""
    return {"estimate": estimate, "low": estimate - reach, "high": estimate + reach, **more}


def few(estimate, **more):
    """An estimate from too few quads."""
    return {"estimate": estimate, "low": None, "high": None, **more}


def carried(value, senders, receivers, mlps):
    return span(value, senders=senders, receivers=f"{receivers} at names", mlps=mlps)


def controls():
    kinds = ("invented names", "things", "two supersets", "mixed", "shuffled labels", "random heads")
    row = {"scoring": "centred", "met": True, "verdict": "silent", "p": 1e-6, "power": 0.9}
    rows = [row | {"control": kind} for kind in kinds]
    return [rows[0] | {"met": False, "verdict": "active", "p": 1.0}, rows[1] | {"met": None}, *rows[2:]]


def found():
    """Findings of every step, with the columns that the steps write, of a model that does what the plan hopes."""
    accuracy = [span(0.5, task=task, template=name, p=1e-9) for task, name in
                (("superset", "profession_both"), ("odd_one_out", "odd_one_out"))]  # fmt: skip
    rows = [span(0.7 + 0.1 * (name == "artist"), kind="superset", group=name) for name in ("artist", "writer")]
    rows += [few(0.1, kind="profession", group="poet"), span(0.8, kind="profession", group="actor")]
    rows += [span(0.1, kind="template", group="profession_both"), span(0.7, kind="template", group="both_famous")]
    rows = [row | {"quantity": "damage"} for row in rows] + [
        span(0.1, kind="superset", group="artist", quantity="mirror")
    ]
    coarse = {name: span(0.9) for name in ("critical_layers", "one_layer", "middle_layers")}
    return {
        "baselines": {"accuracy": accuracy, "measured": {"fame": span(0.1)}, "able": {
            "superset": {"able": True, "why": "yes"}, "odd_one_out": {"able": False, "why": "accuracy 0.37"}}},
        "coarse_sweep": {"between": {"parts": [span(0.2, position="between")], "fills": [4, 5]},
                         "critical_layers": [5, 7], "measured": coarse | {"layer": 5}},
        "sufficiency": {
            "joint": [span(0.8, quantity="recovery"), span(0.9, quantity="damage")], "restoring": [],
            "slice_restores": {"share": 0.9, "restores": True}, "measured": {"beyond_random": True},
            "specific": [{"attribute": "region", "choice": "kept", "direction": "denoise", "quotient_estimate": 0.8,
                          "quotient_low": 0.7, "quotient_high": 0.9, "placebo_estimate": 0.5, "placebo_low": 0.4,
                          "placebo_high": 0.6}],
            "sites": [{"component": kind, "ratio": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
                      for kind, ratio in (("head", 0.2), ("mlp", 0.6), ("attn", 0.95))],
            "critical_slice": [{"site": "5.3"}, {"site": "mlp 7"}], "model": {"n_layers": 10, "n_heads": 10}},
        "hydra": {"needed": [span(0.2, judges=False), span(0.9, judges=True)],
                  "compensation": [span(-0.2, half="confirmation", later="heads and MLPs")],
                  "missed": [{"rise": 0.01, "share": 0.02}, {"rise": 0.02, "share": 0.05}],
                  "backups": [{"site": "6.1", "stands_in": False}]},
        "retrieval_heads": {
            "verdicts": {"retrieval_heads": {"last": ["2.1"], "names": ["3.0", "1.4"]},
                         "slice_heads_that_retrieve": ["5.3"]},
            "two_stages": {"estimate": 3, "p": 1e-6, "smallest": 0.0}, "measured": {
                "path_ablation": span(0.6), "ablated": ["1.4"],
                "leading": {"mlp": ["mlp 0", "mlp 2"], "head": [], "embedding": True, "halves": 2, "few": False}},
            "one_stage": carried(0.7, "everything", "k and v", "recomputed"),
            "carried": [carried(0.7, "everything", "k and v", "recomputed"),
                        carried(0.7, "everything", "v", "recomputed"),
                        carried(0.1, "heads", "k and v", "frozen"), carried(0.4, "MLPs", "k and v", "frozen")],
            "written": [span(0.1, senders="heads", mlps="frozen"), span(0.6, senders="MLPs", mlps="frozen")]},
        "generality": {
            "classes": rows, "leave_one_out": rows[:2], "interaction": {"why": "one class"}, "controls": controls(),
            "rule": {"ratio": span(0.0, 0.1), "fitted": [span(2.0, term="one name")]}},
        "subspace": {"measured": {"profession_at_names": span(0.2, above_permuted=True),
                                  "superset_at_last": span(0.02, above_permuted=True),
                                  "low_rank": {"estimate": 0.25, "below_permuted": True}}, "directions": {
            "restores": True, "by_number": [span(0.8, method="class difference", k=1)]
            + [span(value, method="class means", k=k) for k, value in ((1, 0.3), (4, 0.9))],
            "single_classes": [span(0.6, class_name="artist", there=True), span(0.0, class_name="artist", there=False)],
            "against_random": [span(0.7, method="class difference", k=1)],
            "parts": [{"method": "class difference", "k": 1, "part": "inside", "share": 0.9, "share_low": 0.8,
                       "share_high": 1.0}],
            "slopes": [span(value, kind="mixed", added=added) for added, value in
                       (("artist", 2.0), ("writer", 0.1), ("random", 0.0))]}},
        "neurons": {"features": {
            "map": [span(value, superset="artist") for value in (0.95, 0.99)],
            "compared": [span(value, other=other, quantity="recovery") for other, value in
                         (("neurons", 1.0), ("neurons", -1.0), ("directions", -1.0), ("random features", 1.0))],
        }, "neurons": {"shares": [span(value, quantity="damage", kind="helping", n_sites=n) for n, value in
                                           ((1, 0.1), (10, 0.3))]}},
        "story": {
            "circuit": {"sites": ["5.3"], "size": 1, "faithfulness": span(0.9), "necessity": span(0.1),
                        "incompleteness": span(0.1),
                        "areas": [{"order": name, **span(0.5), "minus_estimate": 0.2, "minus_low": low,
                                   "minus_high": 0.3} for name, low in (("random", 0.1), ("recovery", -0.1))],
                        "members": [span(0.5, site="5.3", p=0.001), span(0.02, site="mlp 7", p=0.2)]},
            "attribution": {"methods": [span(value, nodes=nodes, method=method) for nodes, method, value in
                                        (("sites", "atp", 0.9), ("queries", "atp", 0.3), ("queries", "atp_qk", 0.8))]},
            "overlap": {"why": "published for another model"},
            "everywhere": {"size": 2, "nodes": 20, "judged": span(0.7), "roles": [
                {"role": "names", "nodes": 1, "of": 5}, {"role": "last", "nodes": 1, "of": 5}]}},
    }  # fmt: skip


PROFILE = params.load_profile("smollm2-135m")
THRESHOLDS = PROFILE["story"]["claims"]


RECORDED = {"general_floor": 0.5, "silence_margin": 0.2, "fame_tolerance": 0.25, "sae_selective": 0.8}
RECORDED |= {"specific_ratio": 0.5}


def story_params(folder, **changed):
    """Parameters of step 10 with the default profile's thresholds, and steps that recorded theirs in `folder`."""
    for step in ("baselines", "sufficiency", "generality", "neurons"):
        units.write_json(folder / f"{step}.run.json", {"parameters": RECORDED})
    base = PROFILE | {"results_dir": str(folder), "profile": "own"}
    section = base["story"] | {
        "claims": {key: value for key, value in (THRESHOLDS | changed).items() if value is not None}
    }
    return params.validate(PLAN.sections, "story", base | {"story": section})


def judged(folder, what=None, **changed):
    entries = claims.ledger(found() if what is None else what, PLAN, story_params(folder, **changed))
    return {entry.id: entry for entry in entries}


def test_a_claim_that_a_profile_leaves_out_is_not_tested(tmp_path):
    own = story_params(tmp_path).model_copy(update={"left_out": ("general_supersets",)})
    entry = next(entry for entry in claims.ledger(found(), PLAN, own) if entry.id == "general_supersets")
    assert entry.verdict == NOT_TESTED and "leaves it out" in entry.reason
    with pytest.raises(claims.ClaimError, match="there is no claim general_sets"):
        claims.thresholds(own.model_copy(update={"left_out": ("general_sets",)}))


def test_the_schema_committed_is_the_models_own():
    assert (ROOT / "data/claims.schema.json").read_text(encoding="utf-8") == claims.schema()


def test_the_list_of_claims_takes_no_unknown_field_and_every_name_in_it_once():
    with pytest.raises(ValidationError, match="treshold_from"):
        claims.Claim.model_validate(CLAIMS[0].model_dump() | {"treshold_from": "level"})
    names = [claim.id for claim in CLAIMS]
    assert len(set(names)) == len(names)
    assert {name for link in LINKS for name in (link.claim, *link.instead)} <= set(names)


def test_claims_json_validates_and_a_wrong_verdict_does_not(tmp_path):
    own = story_params(tmp_path)
    entries = claims.ledger(found(), PLAN, own)
    written = json.loads(json.dumps(story.document(entries, story.sentence(entries, found()), own)))
    schema = json.loads((ROOT / "data/claims.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(written, schema)
    assert [entry["id"] for entry in written["claims"]] == [claim.id for claim in CLAIMS]
    written["claims"][0]["verdict"] = "proved"
    with pytest.raises(jsonschema.ValidationError, match="proved"):
        jsonschema.validate(written, schema)


def test_another_threshold_is_another_verdict_and_another_sentence(tmp_path):
    plain, strict = judged(tmp_path), judged(tmp_path, one_layer=0.95, retrieval_heads=4)
    changed = {entry.id for entry in plain.values() if entry.verdict != strict[entry.id].verdict}
    assert changed == {"one_layer", "retrieval_heads"}
    assert (plain["one_layer"].verdict, strict["one_layer"].verdict) == (SUPPORTED, NOT_SUPPORTED)
    before, after = (story.sentence(list(own.values()), found()) for own in (plain, strict))
    assert (
        "layer 5 alone brings most of the answer to the last token" in before[0]
        and "3.0 and 1.4 retrieve the class" in before[0]
    )
    assert "layers 5 and 7 together bring most of" in after[0] and "MLPs at the names write directly" in after[0]
    assert "what the slice's own heads read there reaches the last token" in after[0]
    assert "write the class" not in after[0]
    assert "[not supported: " in after[0] and "open" not in after[0]  # a gap says which link it is
    assert any(text.startswith("The evidence does not support that one layer is the aggregator") for text in after)
    assert not any("one layer is the aggregator" in text for text in before)


def test_verdicts_of_every_kind(tmp_path):
    own = judged(tmp_path)
    expected = {
        "task_done": SUPPORTED, "single_suffices": NOT_SUPPORTED, "no_repair": SUPPORTED, "no_backup": SUPPORTED,
        "retrieval_heads": SUPPORTED, "heads_at_names": NOT_SUPPORTED, "control_invented_names": NOT_SUPPORTED,
        "control_things": NOT_TESTABLE, "control_mixed": SUPPORTED, "class_specific": NOT_TESTABLE,
        "superset_at_last": NOT_SUPPORTED, "low_rank": SUPPORTED,
        "feature_per_superset": SUPPORTED, "features_beat_neurons": NOT_SUPPORTED, "features_beat_random": SUPPORTED,
        "steering": NOT_SUPPORTED, "few_directions": SUPPORTED, "few_neurons": NOT_SUPPORTED,
        "circuit_minimal": NOT_SUPPORTED, "circuit_complete": SUPPORTED, "circuit_beats_random": SUPPORTED,
        "circuit_beats_recovery": NOT_SUPPORTED, "attribution_queries": SUPPORTED, "published_heads": NOT_TESTABLE,
        "rule_or": SUPPORTED, "rule_additive": NOT_SUPPORTED, "rule_and": NOT_SUPPORTED, "odd_one_out": NOT_TESTABLE,
    }  # fmt: skip
    assert {name: own[name].verdict for name in expected} == expected
    assert own["odd_one_out"].reason == "accuracy 0.37" and own["class_specific"].reason == "one class"
    assert "clean answer come first" in own["single_suffices"].reason  # its interval alone would do: 0.59 above 0.5
    assert own["single_suffices"].estimate == 0.6  # a whole attention module is no single site


def test_the_weakest_group_decides_and_the_own_template_does_not(tmp_path):
    own = judged(tmp_path)
    assert own["general_supersets"].low == pytest.approx(0.65)
    assert own["general_professions"].estimate == 0.8  # the one with an interval
    assert own["general_templates"].estimate == 0.7 and own["general_templates"].verdict == SUPPORTED


def test_without_any_interval_the_weakest_has_the_lowest_estimate(tmp_path):
    claim = next(claim for claim in CLAIMS if claim.id == "circuit_minimal")
    members = [few(cost, p=0.2) for cost in (0.69, 0.12, 0.3)]
    at = {"circuit": {"members": members}}
    assert claims.numbers_of(claim, at, story_params(tmp_path)).estimate == 0.12


def test_a_threshold_that_is_a_parameter_is_the_one_its_step_used(tmp_path):
    own = story_params(tmp_path)
    units.write_json(tmp_path / "generality.run.json", {"parameters": {"general_floor": 0.7, "silence_margin": 0.2}})
    entries = {entry.id: entry for entry in claims.ledger(found(), PLAN, own)}
    assert entries["general_supersets"].threshold == 0.7 and entries["general_supersets"].verdict == NOT_SUPPORTED
    assert entries["general_supersets"].threshold_from == "generality.general_floor"
    assert entries["critical_layers"].threshold_from == "critical_share"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"one_layer": None}, r"claim one_layer .* add `one_layer: <number>` under `claims:` in section story"),
        ({"one_layr": 0.5}, r"one_layr = 0.5: there is no such claim \(did you mean 'one_layer'\?\)"),
        ({"slice_necessary": 0.5}, r"slice_necessary = 0.5: its threshold is the parameter generality.general_floor"),
    ],
)
def test_thresholds_and_claims_belong_together(changed, message, tmp_path):
    with pytest.raises(claims.ClaimError, match=message):
        judged(tmp_path, **changed)


@pytest.mark.parametrize("profile", params.profiles())
def test_every_profile_has_the_threshold_of_every_claim(profile):
    claims.thresholds(params.validate(PLAN.sections, "story", params.load_profile(profile)))


def test_a_step_that_did_not_run_is_not_tested(tmp_path):
    own = judged(tmp_path, found() | {"hydra": None})
    assert own["no_repair"].verdict == NOT_TESTED and "step 05 (hydra) has not run" in own["no_repair"].reason
    assert own["no_repair"].figure is None and own["no_repair"].estimate is None
    assert own["slice_necessary"].verdict == NOT_TESTED and own["slice_sufficient"].verdict == SUPPORTED


def test_a_task_the_model_cannot_do_is_not_testable(tmp_path):
    unable = {"able": False, "sentences": ["Nothing was computed."], "task": "superset"}
    what = {step: unable for step in PLAN.names} | {"baselines": found()["baselines"]}
    own = judged(tmp_path, what)
    assert {entry.verdict for entry in own.values() if entry.step != "baselines"} == {NOT_TESTABLE}
    assert own["no_repair"].reason == "Nothing was computed."
    assert story.sentence(list(own.values()), what)[0].startswith("No link of the plan's chain")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_numbers_that_are_not_where_they_should_be_are_an_error(claim, tmp_path):
    with pytest.raises(claims.ClaimError, match=f"claim {claim.id}: the findings of step {claim.step} have no"):
        claims.numbers_of(
            claim.model_copy(update={"path": "nowhere[kind=x]"}), {"somewhere": []}, story_params(tmp_path)
        )


def test_a_column_that_is_not_there_is_an_error_and_rows_that_are_not_are_none(tmp_path):
    own, claim = story_params(tmp_path), next(claim for claim in CLAIMS if claim.id == "slice_sufficient")
    with pytest.raises(claims.ClaimError, match="'quantity'"):
        claims.numbers_of(claim, {"joint": [span(0.5)]}, own)
    with pytest.raises(claims.ClaimError, match="have no low"):
        claims.numbers_of(claim, {"joint": [{"quantity": "recovery", "estimate": 0.5}]}, own)
    assert claims.numbers_of(claim, {"joint": []}, own).why == "the step has no such numbers here"
    assert claims.numbers_of(claim, {"joint": None}, own).why == "the step has no such numbers here"


def test_too_few_quads_decide_nothing(tmp_path):
    what = found()
    what["sufficiency"]["joint"] = [few(0.99, quantity="recovery"), few(0.99, quantity="damage")]
    what["hydra"]["needed"] = [few(0.99, judges=True)]
    what["retrieval_heads"]["two_stages"] = {"why": "its tests were not made, or rest on too few quads"}
    own = judged(tmp_path, what)
    assert {own[name].verdict for name in ("slice_necessary", "slice_sufficient", "retrieval_heads")} == {NOT_TESTABLE}
    assert own["slice_necessary"].reason == "0.99; too few quads: an interval needs 20 of a half"
    what["hydra"]["needed"] = [few(0.99, judges=True, n=17, level=0.95)]
    assert judged(tmp_path, what)["slice_necessary"].reason.endswith("needs 20 of a half, and there are 17")


def emptied(value):
    """Findings without a single interval or p value, as a handful of quads leave them."""
    if isinstance(value, list):
        return [emptied(item) for item in value]
    if isinstance(value, dict):
        gone = (
            "low",
            "high",
            "p",
            "met",
            "ratio_low",
            "ratio_high",
            "share_low",
            "share_high",
            "minus_low",
            "quotient_low",
            "quotient_high",
        )
        return {key: None if key in gone else emptied(item) for key, item in value.items()}
    return value


def test_without_any_interval_nothing_is_decided_and_nothing_crashes(tmp_path):
    own = judged(
        tmp_path, emptied(found()) | {"hydra": found()["hydra"] | {"missed": [], "compensation": [], "needed": []}}
    )
    assert {entry.verdict for entry in own.values() if entry.id != "low_rank"} == {NOT_TESTABLE}
    assert story.forest(list(own.values())) is None and story.table(list(own.values())).to_html()
    undefined = {"joint": [{"quantity": "recovery", "estimate": None, "low": None, "high": None}]}
    claim = next(claim for claim in CLAIMS if claim.id == "slice_sufficient")
    assert claims.numbers_of(claim, undefined, story_params(tmp_path)).why == "its numbers are not defined here"


def test_what_must_or_must_not_be_there(tmp_path):
    what = found()
    what["retrieval_heads"]["verdicts"]["slice_heads_that_retrieve"] = []
    what["hydra"]["backups"][0]["stands_in"] = True
    own = judged(tmp_path, what)
    assert own["one_stage"].verdict == NOT_SUPPORTED and "no head of the slice" in own["one_stage"].reason
    assert own["no_backup"].verdict == NOT_SUPPORTED and "a backup stands in" in own["no_backup"].reason


def test_verdicts_hold_for_all_tested_claims_together(tmp_path):
    """One step supported by itself at p = 0.03 is not, among forty others; a check neither counts nor is corrected."""
    what = found()
    what["coarse_sweep"]["measured"]["one_layer"] = span(0.61, 0.1)
    what["subspace"]["directions"]["against_random"] = [span(0.06, 0.05, method="class difference", k=1)]
    own = judged(tmp_path, what)
    one, check = own["one_layer"], own["beats_random"]
    assert (one.alone, one.verdict) == (SUPPORTED, NOT_SUPPORTED) and 0.02 < one.p < 0.05 < one.p_holm
    assert "it holds alone, but not among" in one.reason and "times as many quads would show it" in one.reason
    assert one.p_from == "the interval"
    assert check.verdict == SUPPORTED and 0.01 < check.p < 0.05 and check.p_holm is None and check.check
    tested = [entry for entry in own.values() if entry.p_holm is not None]
    assert claims.holm([entry.p for entry in tested]) == pytest.approx([entry.p_holm for entry in tested])
    assert all(entry.p is not None and entry.check is None for entry in tested)
    said = story.tally(list(own.values()))
    checks = [entry for entry in own.values() if entry.check]
    counted = sum(entry.verdict == SUPPORTED for entry in own.values() if not entry.check)
    assert said.startswith(f"{counted} of the {len(own) - len(checks)} claims of the plan are supported, and ")
    assert f"people {counted} are supported once corrected for each other, and {counted + 1} each by itself" in said
    assert f"{len(checks)} checks are not counted" in said


def test_few_ledgers_support_a_claim_that_only_touches_its_threshold():
    """40 claims at their thresholds: alone, some claim is supported in most ledgers; corrected, in hardly any."""
    rng, claim = np.random.default_rng(0), CLAIMS[0].model_copy(update={"rule": "above"})
    spans = stats.mean_intervals(rng.normal(size=(24, 40 * 40)), stats.Settings(resamples=400))
    p = [claims.p_value(claim, claims.Numbers(x.estimate, x.low, x.high), 0.0, 0.95) for x in spans]
    ledgers = np.reshape(p, (40, 40))
    assert (ledgers.min(1) < 0.05).mean() > 0.4 and (40 * ledgers.min(1) < 0.05).mean() <= 0.05


def test_ranks_too_coarse_for_the_correction_decide_nothing(tmp_path):
    what = found()
    some = what["retrieval_heads"]["two_stages"] = {"estimate": 1, "p": 0.01, "smallest": 0.0}
    fine = judged(tmp_path, what)["retrieval_heads"]
    assert (fine.alone, fine.verdict) == (SUPPORTED, NOT_SUPPORTED)
    some["smallest"] = 0.01
    coarse = judged(tmp_path, what)["retrieval_heads"]
    assert (coarse.alone, coarse.verdict) == (SUPPORTED, NOT_TESTABLE) and "no p small enough" in coarse.reason
    some |= {"p": 0.069, "smallest": 0.034}
    alone = judged(tmp_path, what)["retrieval_heads"]
    assert (alone.alone, alone.verdict) == (NOT_SUPPORTED, NOT_SUPPORTED), "a head passes, but not by a p below 0.05"
    assert alone.reason == "1, p = 0.069; asked for: at least 1, with p below 0.05" and alone.p == 0.069
    some["smallest"] = 0.06
    open_ = judged(tmp_path, what)["retrieval_heads"]
    assert (open_.alone, open_.verdict) == (NOT_TESTABLE, NOT_TESTABLE) and "no p small enough" in open_.reason


def test_that_ranks_could_not_have_had_a_claim_supported_is_said(tmp_path):
    what, own = found(), story_params(tmp_path)
    some = what["retrieval_heads"]["two_stages"] = {"estimate": 1, "p": 0.069, "smallest": 0.034}
    entries = claims.ledger(what, PLAN, own)
    entry = next(entry for entry in entries if entry.id == "retrieval_heads")
    said = claims.coarse(entry, entries, what["retrieval_heads"], own)
    assert said.startswith(f"; its ranks {claims.COARSE}, at best 0.034, corrected ")
    some["smallest"] = 0.0
    assert claims.coarse(entry, entries, what["retrieval_heads"], own) == "", "finer ranks could have passed"
    assert not claims.coarse(entries[0], entries, found()["baselines"], own)
    entry.reason += said
    barred = f"found here: 1, by ranks that {claims.COARSE} once corrected"
    plan = "heads outside the slice retrieve the class of each name"
    assert f"Not supported: {plan} ({barred});" in story.not_so(entries, what)
    none = {"estimate": 0, "low": None, "high": None, "p": 1.0, "p_holm": 1.0, "reason": "0, p = 1"}
    entry.fresh = claims.Confirmed(**none, alone=NOT_SUPPORTED, verdict=NOT_SUPPORTED)
    entry.tier = claims.FRESH
    assert f"{plan} ({barred}; on fresh people, who decide: 0);" in story.not_so(entries, what)
    assert f"(on fresh people 0, p = 1; {barred}" in " ".join(story.sentence(entries, what))


def test_the_largest_of_several_pays_for_their_number():
    claim = next(claim for claim in CLAIMS if claim.id == "few_directions")
    n = claims.Numbers(0.6, 0.5, 0.7, of=1)
    one, ten = (claims.p_value(claim, n._replace(of=count), 0.45, 0.95) for count in (1, 10))
    assert ten == pytest.approx(10 * one) and claims.p_value(claim, n._replace(of=10**6), 0.45, 0.95) == 1


def test_exploratory_says_whose_results_had_been_seen(tmp_path):
    own = story_params(tmp_path)
    assert story.kinds_of_evidence(own) == claims.TIERS
    mine = own.model_copy(update={"pairs_file": "mine.csv", "model": "a/folder"})
    told = story.kinds_of_evidence(mine)
    assert "of another model and other pairs than here" in told[claims.EXPLORATORY]
    assert "profile `smollm2-135m`" in told[claims.EXPLORATORY] and told[claims.HALF] == claims.TIERS[claims.HALF]
    other = own.model_copy(update={"question": "cities"})
    assert "of another question than here" in story.kinds_of_evidence(other)[claims.EXPLORATORY]


@pytest.mark.parametrize(
    ("numbers", "rule", "words"),
    [
        ((0.6, 0.4, 0.8), "above", "were the estimate the truth, 8.2 times as many quads would show it"),
        ((0.51, 0.31, 0.71), "above", "were the estimate the truth, 820 times as many quads would show it"),
        ((0.3, 0.1, 0.45), "above", "the whole interval lies on the other side"),
        ((0.45, 0.3, 0.6), "above", "the estimate lies on the other side"),
        ((0.4, 0.2, 0.6), "below", "were the estimate the truth, 8.2 times as many quads would show it"),
        ((0.7, 0.6, 0.8), "below", "the whole interval lies on the other side"),
    ],
)
def test_what_an_interval_that_does_not_decide_says(numbers, rule, words):
    """(1.96 + 0.84)^2 / 1.96^2 = 2.04 times (reach / distance)^2 = 4 is 8.2."""
    claim = CLAIMS[0].model_copy(update={"rule": rule})
    assert words in claims.shortfall(claim, claims.Numbers(*numbers), 0.5, 0.05)


def test_an_interval_wider_than_the_margin_tests_nothing(tmp_path):
    what = found()
    what["generality"]["rule"]["ratio"] = span(0.1, 0.3)
    own = judged(tmp_path, what)
    assert own["rule_or"].verdict == NOT_TESTABLE and "an interval this wide" in own["rule_or"].reason
    # half the interval, 0.3, is 1.96 standard errors; 0.25 must hold 1.96 + 1.28 of them: (0.496 / 0.25)^2 = 3.9 times
    assert "were the truth 0, 3.9 times as many prompts would show it" in own["rule_or"].reason
    assert [claims.in_full(times) for times in (1.1, 9.96, 44.8, 2345.0, 1.2e6)] == [
        "1.1",
        "10",
        "45",
        "2,300",
        "1,200,000",
    ]
    what["generality"]["rule"]["ratio"] = span(0.1, 3)
    assert "were the truth 0, 390 times as many prompts would show it" in judged(tmp_path, what)["rule_or"].reason
    assert own["rule_additive"].verdict == NOT_SUPPORTED  # wide as it is, it lies outside


def test_the_power_of_an_equivalence_is_how_often_an_interval_as_wide_lies_within():
    rng, error = np.random.default_rng(0), 0.1
    drawn, reach = rng.normal(0, error, 100_000), 1.959964 * error
    power, times = claims.equivalence(claims.Numbers(0.2, 0.2 - reach, 0.2 + reach), 0.25)
    assert power == pytest.approx((np.abs(drawn) < 0.25 - reach).mean(), abs=0.01) and 0.3 < power < 0.5
    assert claims.equivalence(claims.Numbers(0, *(np.array([-1, 1]) * reach / times**0.5)), 0.25)[0] == pytest.approx(
        0.8
    )
    assert claims.equivalence(claims.Numbers(0, -0.3, 0.3), 0.25)[0] == 0  # wider than the margin


def test_a_slice_must_restore_the_answer_as_a_single_site_must(tmp_path):
    what = found()
    what["sufficiency"]["slice_restores"]["restores"] = False
    own = judged(tmp_path, what)["slice_sufficient"]
    assert own.verdict == NOT_SUPPORTED and own.low > own.threshold and "clean answer come first" in own.reason


def test_each_verdict_says_what_kind_of_evidence_it_is(tmp_path):
    own = judged(tmp_path)
    assert own["general_supersets"].came == "after" and own["general_supersets"].tier == claims.EXPLORATORY
    assert own["one_layer"].came == "after" and own["one_layer"].tier == claims.EXPLORATORY
    assert own["class_specific"].tier is None  # not testable
    assert story.when(own["one_layer"]) == "set after results (2cdf8c6, results of d637c5d seen): exploratory"


def test_what_was_frozen_came_before_until_a_threshold_or_a_rule_changes(tmp_path, monkeypatch):
    params_ = story_params(tmp_path)
    held = claims.thresholds(params_)
    frozen = params_.model_copy(update={"frozen": claims.fingerprint(held, params_)})
    entries = claims.ledger(found(), PLAN, frozen)
    assert {(entry.came, entry.tier) for entry in entries} <= {("before", claims.HALF), ("before", None)}
    assert "were frozen before" in story.fingerprint_sentence(frozen)
    other = held | {"one_layer": (0.51, "story.claims.one_layer")}
    assert claims.fingerprint(other, params_) != frozen.frozen
    for changed in ({"level": 0.99}, {"left_out": ("one_layer",)}):
        assert claims.fingerprint(held, params_.model_copy(update=changed)) != frozen.frozen
    words = [claim.model_copy(update={"text": "Other words.", "came": None}) for claim in CLAIMS]
    monkeypatch.setattr(claims, "CLAIMS", tuple(words))
    assert claims.fingerprint(held, params_) == frozen.frozen
    monkeypatch.setattr(claims, "CLAIMS", (words[0].model_copy(update={"rule": "above"}), *words[1:]))
    assert claims.fingerprint(held, params_) != frozen.frozen
    assert "is another now" in story.fingerprint_sentence(frozen)


def test_fresh_people_are_opened_once_under_frozen_rules(tmp_path):
    own = story_params(tmp_path).model_copy(update={"fresh": True})
    with pytest.raises(claims.ClaimError, match="under frozen rules alone"):
        fresh.open_once(own)
    frozen = own.model_copy(update={"frozen": claims.fingerprint(claims.thresholds(own), own)})
    fresh.open_once(frozen)
    fresh.open_once(frozen)  # the same again
    entries = claims.ledger(found(), PLAN, frozen)
    assert {entry.tier for entry in entries} == {claims.FRESH, None}
    assert fresh.confirm(entries, frozen) == ""
    used = {entry.id for entry in entries if entry.tier == claims.EXPLORATORY}  # their prompts' people or words were
    assert used and used <= fresh.NOT_ABOUT_THEM <= {claim.id for claim in CLAIMS}
    with pytest.raises(claims.ClaimError, match="in this template, they are not fresh"):
        fresh.open_once(frozen.model_copy(update={"template": "both_famous"}))
    other = story_params(tmp_path, one_layer=0.4).model_copy(update={"fresh": True})
    other = other.model_copy(update={"frozen": claims.fingerprint(claims.thresholds(other), other)})
    with pytest.raises(claims.ClaimError, match=f"opened under the thresholds and rules '{frozen.frozen}'"):
        fresh.open_once(other)


def asked_of_fresh_people(folder, what, **changed):
    """A run of a profile on fresh people whose findings are `what`: its record, and the profile that names it."""
    own = story_params(folder / "fresh", **changed)
    names = {"fresh": True, "fresh_claims": str(folder / "record.json"), "profile": "own-fresh"}
    own = own.model_copy(update=names)
    own = own.model_copy(update={"frozen": claims.fingerprint(claims.thresholds(own), own)})
    fresh.open_once(own)
    entries = claims.ledger(what, PLAN, own)
    assert fresh.confirm(entries, own) == "" and not any(entry.fresh for entry in entries)
    units.write_json(folder / "fresh" / "claims.json", story.document(entries, [], own))
    about = {
        "commit": "0123456789",
        "dirty": False,
        "started": "2026-11-27T18:00:00",
        "machine": {"cores": 2, "cpu": "x"},
    }
    units.write_json(folder / "fresh" / "story.run.json", about)
    people = {"inputs": {"people_file": keys.hash_file(keys.input_file(own.people_file))}}
    units.write_json(folder / "fresh" / "baselines.run.json", {"parameters": RECORDED, "ingredients": people})
    return own, story_params(folder).model_copy(update={"fresh_claims": names["fresh_claims"]})


def test_fresh_people_decide_what_was_set_after(tmp_path, monkeypatch):
    earlier = claims.CAME["neutral"].model_copy(update={"word": "before"})
    monkeypatch.setitem(claims.CAME, "neutral", earlier)  # one that came before, to set beside
    what = found()
    what["coarse_sweep"]["measured"]["one_layer"] = span(0.3)
    what["coarse_sweep"]["measured"]["critical_layers"] = few(0.9)
    what["generality"]["classes"] = [row | span(0.1) for row in found()["generality"]["classes"]]
    asked, own = asked_of_fresh_people(tmp_path, what)
    entries = claims.ledger(found(), PLAN, own)
    assert fresh.confirm(entries, own).startswith("No fresh people have been asked yet")
    assert fresh.write(asked) == tmp_path / "record.json"
    said, by_name = fresh.confirm(entries, own, ["Aamir Khan", "No One"]), {entry.id: entry for entry in entries}
    assert (
        "(1 of these 3210 came into quads of this report's task since; its placebo" in said
        and "(none of these 3210" in fresh.confirm(entries, own)
    )
    one = by_name["one_layer"]
    assert (one.alone, one.here, one.verdict, one.tier) == (SUPPORTED, SUPPORTED, NOT_SUPPORTED, claims.FRESH)
    general = by_name[
        "general_supersets"
    ]  # as if set before: the confirmation half decides, and fresh people stand beside
    assert (general.verdict, general.tier, general.fresh.verdict) == (SUPPORTED, claims.HALF, NOT_SUPPORTED)
    used = by_name["task_done"]
    assert (used.verdict, used.tier, used.fresh.verdict) == (SUPPORTED, claims.EXPLORATORY, claims.NOT_TESTED)
    assert used.fresh.estimate is used.fresh.p is used.fresh.p_holm is None
    untested = by_name["critical_layers"]
    assert (untested.verdict, untested.tier, untested.fresh.verdict) == (SUPPORTED, claims.EXPLORATORY, NOT_TESTABLE)
    check = by_name["no_illusion"]
    assert check.fresh.verdict == SUPPORTED and check.tier == claims.EXPLORATORY
    after = [entry for entry in entries if entry.came == "after" and not entry.check]
    decided = [entry for entry in after if entry.tier == claims.FRESH]
    assert f"Of the {len(after)} claims" in said and f"{len(decided)} are decided by *fresh people* alone" in said
    assert f"{sum(e.verdict == SUPPORTED for e in decided)} are supported there" in said and "commit 0123456" in said
    record = units.read_json(tmp_path / "record.json")["claims"]
    family = [name for name, one in record.items() if one["p_holm"] is not None]
    hidden = fresh.NOT_ABOUT_THEM & {*family}
    assert hidden and f"corrected for {len(family)} claims; {len(hidden)} of these rest on prompts used before" in said
    assert "in another way" not in said
    monkeypatch.setitem(fresh.MEASURED_ANEW, "a change", ("its layers are counted otherwise since", {"one_layer"}))
    entries = claims.ledger(found(), PLAN, own)
    assert "1 are measured in another way since, and" in fresh.confirm(entries, own)
    (anew,) = (entry for entry in entries if entry.id == "one_layer")
    assert (anew.verdict, anew.tier, anew.fresh.estimate) == (SUPPORTED, claims.EXPLORATORY, None)
    assert anew.fresh.reason == "its layers are counted otherwise since fresh people were asked"
    fresh.write(asked)  # measured again
    entries = claims.ledger(found(), PLAN, own)
    assert "in another way" not in fresh.confirm(entries, own)
    counted = sum(entry.verdict == SUPPORTED for entry in decided)
    assert f"Of those supported, {counted} {'is' if counted == 1 else 'are'} confirmed on fresh people" in story.tally(
        entries
    )
    page = story.table([entry for entry in entries if not entry.check]).to_html()
    assert "on fresh people" in page and "not supported<br>0.30 [0.25, 0.35]" in page
    assert "on fresh people" not in story.table(list(judged(tmp_path).values())).to_html()
    whole, *rest = story.sentence(entries, found())
    share = "of the recovery curve at `last`"
    untold = "exploratory, not testable on fresh people"
    assert (
        f"together bring most of the answer to the last token (0.90 of the whole rise at the last token; {untold})"
        in whole.replace(" [0.85, 0.95]", "")
    )
    assert "layer 5 alone" not in whole
    assert any(f"the superset (on fresh people 0.30 [0.25, 0.35] {share}). Asked for:" in text for text in rest)
    overruled = "on this book's people it holds, also corrected; on fresh people, who decide, it does not hold"
    assert sentences.standing(one) == overruled and f"Not supported ({overruled}): one layer" in story.not_so(
        entries, found()
    )
    both = "(0.80 [0.75, 0.85] of the gap; on fresh people 0.80 [0.75, 0.85])"
    assert both in " ".join(story.outline(entries, found()))
    document = json.loads(json.dumps(story.document(entries, [], own, said)))
    jsonschema.validate(document, json.loads((ROOT / "data/claims.schema.json").read_text(encoding="utf-8")))
    units.write_json(tmp_path / "book" / "claims.json", document)
    landing = front.verdicts(tmp_path / "book")
    assert landing.startswith("Of the ") and "| evidence | why | on fresh people |" in landing
    assert "| not supported: 0.30 [0.25, 0.35]; asked for: lower end of the interval above 0.5" in landing


def test_fresh_people_asked_under_other_rules_decide_nothing(tmp_path):
    asked, own = asked_of_fresh_people(tmp_path, found())
    fresh.write(asked)
    other = story_params(tmp_path, one_layer=0.4).model_copy(update={"fresh_claims": own.fresh_claims})
    entries = claims.ledger(found(), PLAN, other)
    said = fresh.confirm(entries, other)
    assert "under other thresholds and rules" in said and asked.frozen in said and "2026-11-27, commit 0123456" in said
    assert not any(entry.fresh for entry in entries) and claims.FRESH not in {entry.tier for entry in entries}
    more = own.model_copy(update={"left_out": ("one_layer",)})  # what another profile asks, too, is another's matter
    assert fresh.confirm(claims.ledger(found(), PLAN, more), more).startswith("Of the ")
    assert "another model" in fresh.confirm(entries, own.model_copy(update={"model": "./other"}))


def test_the_committed_record_refuses_a_second_opening_where_the_note_is_gone(tmp_path):
    asked, _ = asked_of_fresh_people(tmp_path, found())
    fresh.write(asked)
    fresh.opened(asked).unlink()
    fresh.open_once(asked)  # the same rules
    fresh.opened(asked).unlink()
    changed = asked.model_copy(update={"level": 0.99})
    changed = changed.model_copy(update={"frozen": claims.fingerprint(claims.thresholds(changed), changed)})
    with pytest.raises(claims.ClaimError, match=f"{asked.frozen}.*commit 0123456789.*started 2026-11-27T18:00:00"):
        fresh.open_once(changed)
    people = pd.read_csv(ROOT / "data/people.csv", dtype=str, keep_default_na=False)
    people.iloc[1:].to_csv(tmp_path / "others.csv", index=False)
    fresh.open_once(changed.model_copy(update={"people_file": str(tmp_path / "others.csv")}))


def test_fresh_people_are_asked_what_the_other_books_of_their_model_claim():
    """Else what they say would decide nothing there: thresholds and rules are the same, but for what is left out."""

    def fingerprint(name, **changed):
        build = Build(name)
        own = build.of("story").model_copy(update=changed)
        return claims.fingerprint(claims.thresholds(own, lambda step, _: build.of(step).model_dump()), own)

    asked, quick = Build("smollm2-135m-fresh").of("story"), params.load_profile("smollm2-135m-quick")
    given = params.load_profile(asked.profile)
    assert given.pop("people_file") and given["story"].pop("fresh") and given["story"].pop("frozen", True)
    assert quick["baselines"].pop("quads_per_half") > given["baselines"].pop("quads_per_half")
    assert given | {"profile": quick["profile"]} == quick  # as many pairs of as many people, but for that since
    assert asked.fresh and asked.people_file != Build("smollm2-135m").of("story").people_file
    for name in ("smollm2-135m", "smollm2-135m-quick"):
        assert Build(name).of("story").fresh_claims == asked.fresh_claims and not Build(name).of("story").fresh
        assert fingerprint(name, left_out=asked.left_out) == fingerprint(asked.profile)


def test_steps_do_not_look_at_fresh_people_before_rules_are_frozen(tmp_path, monkeypatch, capsys):
    given = params.load_profile("smollm2-135m-fresh") | {"results_dir": str(tmp_path), "people_file": "data/people.csv"}
    given["story"].pop("frozen", None)
    ran = []
    monkeypatch.setattr(params, "load_profile", lambda name: given)
    monkeypatch.setattr("steps.__main__.bring_up_to_date", lambda build, step: ran.append(step))
    asked = ["run", "coarse_sweep", "--profile", given["profile"]]
    assert main(asked) == 1 and "under frozen rules alone" in capsys.readouterr().err and not ran
    assert main(["run", "baselines", *asked[2:]]) == 0 and ran == ["baselines"]
    given["story"]["frozen"] = Build(given["profile"]).fingerprint()
    assert main(asked) == 0 and ran[1:] == ["baselines", "coarse_sweep"] and len([*tmp_path.glob("fresh.*.json")]) == 1


def test_only_a_run_on_fresh_people_is_written_down(tmp_path):
    asked, own = asked_of_fresh_people(tmp_path, found())
    with pytest.raises(claims.ClaimError, match="asks no fresh people"):
        fresh.write(own)
    run = tmp_path / "fresh" / "baselines.run.json"
    text = run.read_text(encoding="utf-8")
    units.write_json(run, json.loads(text) | {"ingredients": {"inputs": {"people_file": "0"}}})
    with pytest.raises(claims.ClaimError, match="are not of the people in"):
        fresh.write(asked)
    run.write_text(text, encoding="utf-8")
    document = json.loads((tmp_path / "fresh" / "claims.json").read_text(encoding="utf-8"))
    units.write_json(tmp_path / "fresh" / "claims.json", document | {"fingerprint": "0"})
    with pytest.raises(claims.ClaimError, match=r"judged by other rules \(0\)"):
        fresh.write(asked)
    (tmp_path / "fresh" / "claims.json").unlink()
    with pytest.raises(claims.ClaimError, match="run the profile own-fresh first"):
        fresh.write(asked)
    assert not (tmp_path / "record.json").exists()


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_when_thresholds_were_set_is_what_the_history_says():
    """The commits are there; before means half an hour or more before the numbers could be had."""
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no history here")
    assert {claim.came for claim in CLAIMS} == set(claims.CAME)
    for name, came in claims.CAME.items():
        dates = {}
        for commit in filter(None, (came.set, came.seen)):
            found = git("log", "-1", "--format=%ct", commit)
            assert found.returncode == 0 and git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit
            dates[commit] = int(found.stdout)
        if came.seen:
            assert (dates[came.seen] - dates[came.set] >= 30 * 60) == (came.word == "before"), name
        else:
            assert came.word == "after", name


@pytest.mark.parametrize(
    "profile", [name for name in params.profiles() if params.load_profile(name)["story"].get("frozen")]
)
def test_frozen_thresholds_and_rules_are_those_of_the_profile(profile, capsys):
    """Where this fails, a threshold or rule changed: if no result of that model has been seen, `python -m steps freeze`
    prints the new hash; else take `frozen` out of the profile."""
    assert main(["freeze", "--profile", profile]) == 0
    assert capsys.readouterr().out.strip() == params.load_profile(profile)["story"]["frozen"]


def test_the_circuit_in_three_sentences_by_the_verdicts(tmp_path):
    entries = list(judged(tmp_path).values())
    names, road, after = story.outline(entries, found())
    assert (
        names.startswith("**At the names**: MLPs there write directly most")
        and "(0.60 [0.55, 0.65] of what the slice's heads read at the names); all paths counted, "
        "mlp 0 and mlp 2 are significant by themselves in both"
        in names
    )
    assert "heads there" not in names  # of two that answer one question, the one that is supported speaks
    assert (
        "the slice (head 5.3 and mlp 7) at the last token, put into the other prompt's run, brings the answer back ("
        "0.80 [" in road
    )
    assert road.startswith("**From the names to the last token**:\n\n- part of") and road.count("\n- ") == 4
    assert "at the last token a circuit of 1 site, searched for, keeps most of the task when" in after
    assert (
        "of 2 of 20 heads and MLPs (one at the names and one at the last token), keeps most of it when all else is"
        in after
    )
    # the slice carries the placebo's gap as well: that is what is said, and not that it is about supersets
    assert (
        "as a whole the slice is an attribute read-out, and moves the names' region, too (0.50 "
        "[0.40, 0.60] of the region gap, 0.80 [0.70, 0.90] times its share of the superset gap)" in road
    )
    assert "little of the names' region" not in road
    what = found()
    what["retrieval_heads"]["written"] = [
        span(value, senders=senders, mlps="frozen") for senders, value in (("heads", 0.6), ("MLPs", 0.1))
    ]
    assert story.outline(list(judged(tmp_path, what).values()), what)[0].startswith(
        "**At the names**: heads there write directly"
    )
    what["retrieval_heads"]["written"] = [span(0.1, senders=senders, mlps="frozen") for senders in ("heads", "MLPs")]
    names = story.outline(list(judged(tmp_path, what).values()), what)[0]
    assert (
        "it is not supported that MLPs there" in names
        and "(0.10 [0.05, 0.15] of what the slice's heads read at the names; asked for" in names
    )
    what["sufficiency"]["joint"] = [few(0.99, quantity="recovery"), few(0.99, quantity="damage")]
    road = story.outline(list(judged(tmp_path, what).values()), what)[1]
    alone = [entry.model_copy(update={"alone": SUPPORTED}) for entry in judged(tmp_path, what).values()]
    shown_alone = "it is shown alone, but not once all claims are corrected together, that MLPs there write"
    assert shown_alone in story.outline(alone, what)[0]
    here = [entry.model_copy(update={"here": SUPPORTED}) for entry in alone]
    assert "it is not supported (it holds, also corrected) that MLPs there" in story.outline(here, what)[0]
    assert "not testable here is whether the slice (head 5.3 and mlp 7) at the last token, put" in road
    assert "brings the answer back (0.99; too few quads: an interval needs" in road
    assert "tokens between, laid down in layers 4 and 5 (0.20 [0.15, 0.25] of the gap; it overlaps with" in road
    assert "at the names, at the last token and on the way to it, reaches them by their values (0.70 [" in road
    what["coarse_sweep"]["between"]["fills"] = []
    assert "at the tokens between (0.20 [" in story.outline([*judged(tmp_path, what).values()], what)[1]
    unable = [entry.model_copy(update={"estimate": None}) for entry in judged(tmp_path, what).values()]
    assert "not testable here is whether the slice (head 5.3 and mlp 7)" in story.outline(unable, what)[1]
    unasked = {"verdict": NOT_TESTABLE, "estimate": None, "reason": "No placebo pairs are left here."}
    apart = ("slice_general", "slice_specific")
    entries = [entry.model_copy(update=unasked if entry.id in apart else {}) for entry in unable]
    row = {
        "attribute": "region",
        "choice": "kept",
        "direction": "denoise",
        "why": unasked["reason"],
    }  # as step 04 has it
    what = found() | {"sufficiency": found()["sufficiency"] | {"specific": [row]}}
    assert any(
        text.startswith("Not testable here is whether the slice is about") for text in story.sentence(entries, what)
    )
    said = story.outline(entries, what)[1].split("\n- ")[-1]
    assert said.startswith("not testable here is whether as a whole the slice is an attribute read-out, and ")
    assert said.endswith("moves the names' region, too (No placebo pairs are left here).") and ":" not in said


def test_what_leads_the_report_follows_the_verdicts(tmp_path):
    entries = list(judged(tmp_path).values())
    said, refused = story.answer(entries, found()), story.not_so(entries, found())
    assert (
        said.startswith("Put into the run of other names, one head and one MLP at the last token bring most")
        and "attribute read-out" in said
    )
    assert said.endswith("names' region, the one other attribute asked about, as well (exploratory).")
    before = [entry.model_copy(update={"tier": claims.HALF}) for entry in entries]
    assert story.answer(before, found()).endswith("the one other attribute asked about, as well.")
    assert refused.startswith("Not supported: the slice is about supersets and not about whatever the names differ in;")
    assert "Not testable" not in refused and "one layer is the aggregator" not in refused  # that one is supported

    def with_quotient(value):
        what = found()
        what["sufficiency"]["specific"][0] |= {f"quotient_{key}": at for key, at in span(value).items()}
        return story.answer(list(judged(tmp_path, what).values()), what)

    assert with_quotient(0.2).endswith(
        "and of the names' region, the one other attribute asked about, much less (exploratory)."
    )
    assert with_quotient(0.5).endswith("or about whatever the names differ in, is not decided here.")
    what = found()
    what["sufficiency"]["slice_restores"]["restores"] = False
    what["sufficiency"]["joint"][1] = few(0.9, quantity="damage")
    assert story.answer(list(judged(tmp_path, what).values()), what).startswith("It is not shown here that a few heads")
    alone = [entry.model_copy(update={"verdict": SUPPORTED}) for entry in entries]
    assert story.not_so(alone, found()) == ""
    kept = found()
    kept["story"]["everywhere"]["sets"] = {"slice": {"there": span(0.5), "alone": span(0.0)}}
    said = story.not_so(alone, kept)
    assert "at the last token resampled, the slice keeps 0.50 [0.45, 0.55] of what the model has" in said
    assert said.endswith("would have given it, 0.00 [-0.05, 0.05].")
    kept["story"]["everywhere"]["sets"]["slice"]["alone"] = span(0.0, 0.001)
    assert "would have given it, nothing, by construction." in story.not_so(alone, kept)
    nearly = [entry.model_copy(update={"alone": SUPPORTED}) for entry in entries]
    assert story.not_so(nearly, found()).startswith("Not supported (it holds alone, not corrected): the slice is about")


def test_the_rows_under_a_claim_are_those_that_its_number_is_made_of(tmp_path):
    what = found()
    what["hydra"]["needed"] = [span(0.2, judges=False, ablation="mean"), span(0.9, judges=True, ablation="resample")]
    what["story"]["circuit"] |= {"ablation": "resample"}
    entries = judged(tmp_path, what)
    assert entries["slice_sufficient"].rows.filter.endswith("site_set == 1")  # of two sites, counted from 0
    assert entries["slice_necessary"].rows.filter.endswith("ablation == 'resample'")
    assert "ablation == 'resample' and test in ['circuit'" in entries["circuit_faithful"].rows.filter
    rows = pd.DataFrame({"half": ["confirmation"] * 3, "ablation": ["resample", "resample", "mean"],
                         "test": ["circuit", "circuit 2", "circuit"]})  # fmt: skip
    assert rows.query(entries["circuit_faithful"].rows.filter, engine="python").index.tolist() == [0]


def test_a_read_out_carries_more_of_the_other_attribute_than_random_heads_do(tmp_path):
    what = found()
    what["sufficiency"]["measured"] = {"beyond_random": False}
    entry = judged(tmp_path, what)["slice_general"]
    assert entry.verdict == NOT_SUPPORTED and "random heads" in entry.reason
    what["sufficiency"]["measured"] = {"beyond_random": None}
    entry = judged(tmp_path, what)["slice_general"]
    assert entry.verdict == NOT_TESTABLE and "was not measured" in entry.reason
    what["sufficiency"]["measured"] = {"beyond_random": False, "beside": "random MLPs"}
    assert judged(tmp_path, what)["slice_general"].reason.endswith("more of the region than random MLPs do")

    def beyond(own, **random):
        rows = [{"set": name, "group": "all pairs", "attribute": "region", "template": "profession_both"} | ends
                for name, ends in (("the slice", own), *random.items())]  # fmt: skip
        params = SimpleNamespace(template="profession_both", topic=QUESTION)
        step = SimpleNamespace(params=params, beside=lambda name: {"specific": rows})
        return story.beyond_random(step, {})

    low, high = ({"placebo_low": at, "placebo_high": at + 0.1} for at in (0.0, 0.5))
    few = {"placebo_low": None, "placebo_high": None}
    for own, random, said in ((high, low, True), (low, high, False), (high, few, None)):
        verdicts = [beyond(own, **{name: random}) for name in ("random heads", "random MLPs")]
        assert [one["beyond_random"] for one in verdicts] == [said, said]
        assert [one["beside"] for one in verdicts] == ["random heads", "random MLPs"]
    both = {
        "random heads": low,
        "random heads and MLPs": high,
    }  # of a slice of both kinds the set of both is the control
    assert beyond(high, **both) == {"beyond_random": False, "beside": "random heads and MLPs"}


def test_class_and_region_in_directions_of_their_own_are_said_where_that_is_shown():
    row = {"method": "class difference", "attribute": "region", "verdict": "specific"} | span(0.9)
    row |= {f"placebo_{key}": value for key, value in span(0.1).items()}
    subspace = {"confounds": {"placebo": [row]}, "directions": {"layer": 7}}
    said = sentences.by_directions(subspace)
    assert (
        "after layer 7" in said and "0.90 [0.85, 0.95] of the superset gap and 0.10 [0.05, 0.15] of the region" in said
    )
    row["verdict"] = "general"
    assert sentences.by_directions(subspace) == "" == sentences.by_directions({})


def part(site, verdict, value):
    """What the placebo says of a part of the slice that moves half of the superset gap."""
    ends = {f"placebo_{end}": number for end, number in span(value).items()}
    return span(0.5, site=site, attribute="region", verdict=verdict) | ends


def test_of_single_sites_that_is_named_which_moves_most_of_the_other_attribute():
    rows = [part("its heads", "specific", 0.1), part("1.0", "general", 0.3), part("mlp 7", "general", 0.4)]
    said = sentences.by_parts([*rows, part("2.0", "open", 0.9)])
    assert said.startswith(
        ";\n- its heads by themselves move 0.10 [0.05, 0.15] of the region gap, along paths that were"
    )
    assert "0.50 [0.45, 0.55] of the superset gap: specific;\n- mlp 7 alone moves 0.40" in said
    assert said.endswith(": not specific") and "1.0" not in said and "2.0" not in said


def test_parts_of_the_slice_without_a_verdict_are_not_named():
    rows = [part("its heads", None, 0.1)]
    assert sentences.by_parts(rows) == sentences.by_parts([]) == ""
    rows += [part("its MLPs", "open", 0.2)]
    said = sentences.by_parts(rows)
    assert said.startswith(
        ";\n- its MLPs by themselves move 0.20 [0.15, 0.25] of the region gap, along paths that were"
    )
    assert said.endswith("0.50 [0.45, 0.55] of the superset gap: not decided") and "its heads" not in said
    rows = [{"choice": "kept", "direction": "denoise", "attribute": name, "verdict": "specific"} for name in "ab"]
    ends = {f"quotient_{end}": value for end, value in (("estimate", 0.3), ("low", 0.2), ("high", 0.4))}
    said = ";\n- against b it is specific to supersets (0.30 [0.20, 0.40] times its share of the superset gap)"
    assert sentences.beside_the_first([row | ends for row in rows]) == said and not sentences.beside_the_first([])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {},
            "; all paths counted, mlp 0 and mlp 2 are significant by themselves in both halves, and so is the "
            "embedding",
        ),
        ({"mlp": ["mlp 0"], "embedding": False, "halves": 1}, "; all paths counted, mlp 0 is significant by itself"),
        ({"mlp": []}, "; by itself no such sender is significant in both halves, but the embedding is"),
        ({"few": True}, "; which of them lead cannot be tested, of too few quads"),
        ({"why": "nothing was followed"}, ""),
    ],
)
def test_who_leads_at_the_names_is_said_of_what_is_significant(changed, said):
    about = found()["retrieval_heads"]["measured"]["leading"] | changed
    assert sentences.leading(about, "mlp") == said and sentences.leading(None, "mlp") == ""


def test_of_many_who_lead_at_the_names_the_first_are_named():
    about = found()["retrieval_heads"]["measured"]["leading"] | {"head": [f"1.{head}" for head in range(6)]}
    assert "; all paths counted, heads 1.0, 1.1, 1.2, 1.3 and 2 more are" in sentences.leading(about, "head")


def test_what_pruning_cost_the_circuit_over_all_tokens_is_said():
    curve = [span(value, nodes=nodes) for nodes, value in ((40, 0.2), (160, 0.9), (1200, 1.0))]
    about = {"size": 82, "grown": 130, "nodes": 1200, "curve": curve}
    about |= {"faithfulness": span(0.6), "faithfulness_discovery": span(0.8)}
    said = ";\n- the first 160 by attribution, before pruning, keep 0.90 [0.85, 0.95]"
    fitted = ";\n- on the discovery half it keeps 0.80 [0.75, 0.85] itself: pruning seems to have fitted that half"
    assert sentences.unpruned(about) == said + fitted
    assert sentences.unpruned(about | {"faithfulness_discovery": span(0.6)}) == said
    assert sentences.unpruned(about | {"faithfulness": span(0.87)}) == said
    assert sentences.unpruned(about | {"curve": [few(0.9, nodes=160)]}) == said.removesuffix(" [0.85, 0.95]")
    for none in ({"size": 130}, {"curve": curve[::2]}, {"curve": []}):
        assert sentences.unpruned(about | none) == ""
    assert sentences.unpruned({}) == ""


def test_what_a_number_rests_on_is_said_beside_it(tmp_path):
    what = found()
    what["neurons"]["measured"] = {"asked": {"top": 20, "neurons": 10752, "quads": 3}}
    said = "of 10,752 neurons the 20 of largest single effect in 3 quads were asked"
    assert sentences.basis("few_neurons", what) == said and sentences.basis("few_neurons", found()) == ""
    assert sentences.basis("path_ablation", what) == "the path of 1.4" and sentences.basis("task_done", what) == ""
    assert f"a few MLP neurons do the work of the slice's MLPs ({said})" in story.not_so(
        [*judged(tmp_path, what).values()], what
    )


def test_a_claim_of_prompts_or_people_does_not_ask_for_quads(tmp_path):
    what = found()
    what["subspace"]["measured"]["profession_at_names"] = span(0.04, 0.07, above_permuted=True)
    own = judged(tmp_path, what)["profession_at_names"]
    assert re.search(r"[\d.]+ times as many people would show it", own.reason) and "quads" not in own.reason
    what["generality"]["rule"]["ratio"] = few(0.1)
    assert judged(tmp_path, what)["rule_or"].reason == "0.10; too few prompts: an interval needs 20"


def followed(half, effects_of):
    """Records of senders' paths into the slice at the names: 24 quads, each sender's mean effect with some spread."""
    rng, rows = np.random.default_rng(0), []
    kept = dict.fromkeys(("profile", "task", "template", "ablation", "position"), "x") | {"direction": "noise"}
    for quad in range(24):
        for (sender, layer, head), effect in effects_of.items():
            before = {"logit_diff_before": 2.0, "logit_diff_clean": 2.0, "logit_diff_corrupt": -2.0, "sender": sender}
            rows.append(kept | before | {"layer": layer, "component": "path", "head": head, "half": half,
                                         "receivers": "slice at names", "pair_id": f"{half}{quad}",
                                         "quad_id": f"{half}{quad}",
                                         "logit_diff_after": 2 - effect - rng.normal(0, 0.1)})  # fmt: skip
    return pd.DataFrame(rows)


def test_senders_at_the_names_lead_where_both_halves_say_so(tmp_path):
    step = SimpleNamespace(params=story_params(tmp_path))
    assert "why" in story.lead(step)
    first = {("embed", -1, -1): 1.0, ("mlp", 0, -1): 0.5, ("mlp", 2, -1): 0.9, ("mlp", 1, -1): 0.0,
             ("head", 3, 1): 0.4, ("head", 3, 2): -0.5}  # fmt: skip
    names = ("retrieval_heads", "retrieval_heads.confirmed")
    again = first | {("mlp", 1, -1): 0.9, ("mlp", 0, -1): 0.6, ("head", 3, 2): 0.5}
    for name, half, table in zip(names, ("discovery", "confirmation"), (first, again), strict=True):
        records.write(tmp_path / f"{name}.parquet", followed(half, table), {}, schema=None)
    told = {"mlp": ["mlp 2", "mlp 0"], "head": ["3.1"], "embedding": True, "halves": 2, "few": False}
    assert story.lead(step) == told
    (tmp_path / "retrieval_heads.confirmed.parquet").unlink()
    assert story.lead(step) == told | {"halves": 1}
    few_rows = followed("discovery", first).query("quad_id in ['discovery0', 'discovery1']")
    records.write(tmp_path / "retrieval_heads.parquet", few_rows, {}, schema=None)
    assert story.lead(step) == {"mlp": [], "head": [], "embedding": False, "halves": 1, "few": True}


def test_how_many_neurons_were_asked_and_by_how_many_quads(tmp_path):
    step, own = SimpleNamespace(params=story_params(tmp_path)), {"neurons": {"top": [1, 2], "neurons": 100}}
    assert story.shortlist(step, own) == {}
    rows = pd.DataFrame({"half": ["discovery"] * 3 + ["confirmation"], "quad_id": ["a", "b", "b", "c"]})
    records.write(tmp_path / "neurons.parquet", rows, {}, schema=None)
    assert story.shortlist(step, own) == {"asked": {"top": 2, "neurons": 100, "quads": 2}}
    assert story.shortlist(step, {}) == {}


def test_a_reason_shows_what_decides(tmp_path):
    """Digits that keep an end of the interval off the threshold, the groups of which one decides, and the level."""
    what = found()
    what["coarse_sweep"]["measured"]["one_layer"] = span(0.67, 0.1709)
    reason = judged(tmp_path, what)["one_layer"].reason
    assert reason.startswith("0.670 [0.499, 0.841]; asked for: lower end of the interval above 0.5; were the estimate")
    assert reason.endswith("four times in five; corrected with the other claims it takes more")
    assert claims.estimated(claims.Numbers(0.3, 0.2, 0.4), 0.5) == "0.30 [0.20, 0.40]"
    supersets = {row["group"] for row in found()["generality"]["classes"] if row["kind"] == "superset"}
    assert judged(tmp_path)["general_supersets"].reason.endswith(f"; the weakest of {len(supersets)}")
    for row in what["generality"]["classes"]:
        row |= {} if row["group"] == min(supersets) else {"low": None, "high": None}
    only = f"; the only one of {len(supersets)} with an interval"
    assert judged(tmp_path, what)["general_supersets"].reason.endswith(only)


def test_what_would_turn_a_verdict_follows_the_verdict():
    assert claims.turned(SUPPORTED, "a").startswith("Refuted") and "after all" in claims.turned(NOT_SUPPORTED, "a")


def test_holms_correction():
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert claims.holm([0.9, 0.8]) == pytest.approx([1, 1])


def test_figures_are_on_their_pages():
    for claim in CLAIMS:
        path = PLAN.notebook(claim.step)
        if path.exists():
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            names = {cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") for cell in cells}
            assert claim.figure in {*names, ""}, f"{claim.id}: {path.name} has no figure {claim.figure}"


def test_no_site_or_layer_stands_in_the_words():
    words = [claim.text for claim in CLAIMS] + [text for link in LINKS for text in (link.plan, link.here)]
    assert not [text for text in words if re.search(r"\d", text)]


def test_the_table_says_the_verdict_in_words_and_links_to_what_is_under_it(tmp_path):
    page = story.table(list(judged(tmp_path).values())).to_html()
    assert '<a href="04_sufficiency.html#fig-slice">04, fig-slice</a>' in page
    assert "sufficiency.slice.parquet: <code>direction == &#x27;denoise&#x27; and half" in page
    assert page.count(f">{NOT_SUPPORTED}<") == sum(e.verdict == NOT_SUPPORTED for e in judged(tmp_path).values())


def test_claims_and_checks_are_two_tables_on_one_page(tmp_path):
    """Their cells are coloured by identifiers that must not be the same."""
    made = story.Judged({}, list(judged(tmp_path).values()), [], [], "", "", None, None)
    pages = [story.table(part).to_html() for part in (made.claims, made.checks)]
    cells = [set(re.findall(r'id="(T_[^"]+)"', text)) for text in pages]
    assert all(cells) and not cells[0] & cells[1]
    assert "no claim, because pairs are matched in fame" in pages[1] and "no claim, because" not in pages[0]


def test_distances_are_positive_where_the_claim_holds(tmp_path):
    for entry in judged(tmp_path).values():
        row = story.distances(entry)
        if row and entry.verdict == SUPPORTED:
            known = [row[end] for end in ("low", "high") if np.isfinite(row[end])]
            assert min(known) > 0 and row["estimate"] > 0, entry.id
    bound = story.distances(judged(tmp_path)["no_backup"])  # no later site's rise is above 0.05; 0.1 was asked for
    assert bound["estimate"] == bound["low"] == pytest.approx((0.1 - 0.05) / 0.1) and np.isnan(bound["high"])
    assert story.distances(judged(tmp_path)["rule_or"])["low"] == pytest.approx((0.25 - 0.1) / 0.25)
    axes = story.forest(list(judged(tmp_path).values())).axes[0]
    assert "5" in {label.get_text() for label in axes.get_xticklabels()} and story.forest([]) is None


def swept(tmp_path):
    """A coarse sweep of 40 quads at layers 0, 4 and 8, in which layer 4 brings half of the answer."""
    rng, rows = np.random.default_rng(0), []
    for quad in range(40):
        for layer, level in ((0, 0.1), (4, 0.6), (8, 1.0)):
            gap = rng.uniform(2, 4)
            rows.append({"half": "confirmation", "direction": "denoise", "position": "last", "layer": layer,
                         "quad_id": f"q{quad}", "logit_diff_before": -gap, "logit_diff_after": gap * (2 * level - 1),
                         "logit_diff_clean": gap, "logit_diff_corrupt": -gap})  # fmt: skip
    records.write(tmp_path / "coarse_sweep.parquet", pd.DataFrame(rows), {}, schema=None)


def test_the_rises_of_layers_are_shares_of_the_curve(tmp_path):
    swept(tmp_path)
    step = SimpleNamespace(params=story_params(tmp_path))
    about = {"critical_layers": [4, 8], "critical_rises": [0.5, 0.4], "model": {"n_layers": 9}}
    out = story.layers(step, about)
    assert out["layer"] == 4 and out["one_layer"].estimate == pytest.approx(0.5, abs=0.1)
    assert out["critical_layers"].estimate == pytest.approx(0.9, abs=0.05) and out["one_layer"].low is not None
    assert out["middle_layers"].estimate == pytest.approx(0.6, abs=0.1)  # 4 is the last below two thirds of 9
    named = SimpleNamespace(params=step.params.model_copy(update={"aggregator_layer": 3}))
    assert story.layers(named, about)["one_layer"] == {"why": "the layer was not swept"}
    assert "why" in story.layers(SimpleNamespace(params=story_params(tmp_path / "empty")), about)["one_layer"]


def test_fame_and_flips_come_from_their_tables(tmp_path):
    step = SimpleNamespace(params=story_params(tmp_path))
    assert "why" in story.fame(step, {})["fame"] and "why" in story.flips(step, {})["path_ablation"]
    pairs = pd.DataFrame({"quad_id": [f"q{i // 2}" for i in range(60)], "fame_clean": 0.0,
                          "fame_corrupt": [0.1, -0.1] * 30})  # fmt: skip
    records.write(tmp_path / "pairs.parquet", pairs, {}, schema=None)
    assert story.fame(step, {})["fame"].estimate == pytest.approx(0.1)
    ablated = pd.DataFrame({"half": "confirmation", "position": "names", "site_set": [0, 1] * 40,
                            "quad_id": [f"q{i // 2}" for i in range(80)], "metric_before": 1.0,
                            "metric_after": [-1.0, 1.0] * 20 + [1.0, -1.0] * 20})  # fmt: skip
    records.write(tmp_path / "retrieval_heads.ablation.parquet", ablated, {}, schema=None)
    flipped = story.flips(step, {})["path_ablation"]
    assert flipped.estimate == 0.5 and flipped.n == 40 and flipped.low < 0.5 < flipped.high


def test_probes_stand_beside_the_better_baseline_at_the_slices_layer():
    key = {"kind": "pair", "target": "superset", "position": "last"}
    above = {f"beyond{end}": value for end, value in (("", 0.5), ("_low", 0.4), ("_high", 0.6))}
    row = key | {"layer": 5, "low rank": True, "rank needed": 2, "cap": 4}
    found = {
        "probes": {
            "accuracy": [key | above | {"layer": 4} | span(0.1), key | above | {"layer": 5} | span(0.9)],
            "thresholds": [key | {"threshold": 0.3}],
        },
        "rank": {"layer": 5, "verdicts": [row | {"effective rank": 2, "permuted effective rank": 1.5}]},
    }
    out = story.probes(None, found)
    wanted = {"estimate": 0.5, "low": 0.4, "high": 0.6, "above_permuted": True}
    assert out["superset_at_last"] == wanted and "why" in out["profession_at_names"]
    found["probes"]["thresholds"][0]["threshold"] = 0.9  # the interval goes down to below it
    assert not story.probes(None, found)["superset_at_last"]["above_permuted"]
    assert out["low_rank"] == {"estimate": 0.5, "below_permuted": False}
    found["rank"]["verdicts"][0]["low rank"] = None
    assert "why" in story.probes(None, found)["low_rank"]


def test_published_heads_against_chance(tmp_path):
    published = pd.read_csv(ROOT / story.PUBLISHED, comment="#")
    large = story_params(tmp_path).model_copy(update={"model": published["model"][0]})
    top = [f"{row.layer}.{row.head}" for row in published.head(2).itertuples()]
    out = story.overlap({"sites": [*top, "0.0", "mlp 3"]}, {"model": {"n_layers": 80, "n_heads": 64}}, large)
    n, k = 80 * 64, len(published)
    draws = [(k / n) * ((k - 1) / (n - 1)) * ((n - k) / (n - 2)) * 3, (k * (k - 1) * (k - 2)) / (n * (n - 1) * (n - 2))]
    assert k == 40 and out["estimate"] == 2 and out["shared"] == sorted(top) and out["p"] == pytest.approx(sum(draws))
    assert out["expected"] == pytest.approx(3 * k / n)
    assert "2 of the 3 heads of the circuit at the last token" in story.overlap_sentence(out)
    other = story.overlap({"sites": top}, {"model": {"n_layers": 80, "n_heads": 64}}, story_params(tmp_path))
    assert story.overlap_sentence(other).startswith("Overlap with published heads: not applicable")


def test_the_ledger_is_a_file_of_step_10_that_changed_thresholds_do_not_make_stale(tmp_path, monkeypatch):
    own = story_params(tmp_path)
    monkeypatch.setattr(keys, "find_pairs", lambda step, given: ROOT / "data/people.csv")
    step = steps.Step(PLAN, "story", own)
    assert json.loads(step.write_extra("claims.json", {"level": 0.95}).read_text()) == {"level": 0.95}
    assert set(keys.step_files(tmp_path, PLAN["story"])) == {tmp_path / "claims.json", tmp_path / "story.run.json"}
    changed = steps.Step(PLAN, "story", story_params(tmp_path, one_layer=0.9))
    assert changed.fresh and keys.page_key(PLAN, "story", own, "d") != keys.page_key(PLAN, "story", changed.params, "d")
    with pytest.raises(steps.StepError, match="may write claims.json"):
        step.write_extra("other.json", {})


def test_where_the_model_cannot_do_the_task_claims_are_judged_and_nothing_is_drawn(tmp_path):
    own = story_params(tmp_path)
    able = {"superset": {"able": False, "why": "accuracy 0.2"}}
    units.write_json(
        tmp_path / "baselines.findings.json", found()["baselines"] | {"able": able, "about": keys.about(own)}
    )
    step = steps.Step(PLAN, "story", own)
    assert measure.run(step) is None
    judged = story.judge(step, None)
    told = story.findings(step, judged)
    assert told["able"] is False and "accuracy 0.2" in told["sentences"][0]
    written = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert len(written["claims"]) == len(CLAIMS) and written["sentence"] == judged.sentence
    assert "no circuit was searched" in story.published_heads(judged).data
    figures = (circuits_page.circuit_curves, circuits_page.circuit_members, circuits_page.circuit_completeness)
    assert [draw(step, None) for draw in figures] == [None] * 3
    assert circuits_page.attribution(None) is None and circuits_page.statement(step, judged.circuit) is None


def test_checks_of_given_pairs_do_not_say_how_pairs_are_made(tmp_path):
    checks = []
    for own in (story_params(tmp_path), story_params(tmp_path).model_copy(update={"pairs_file": "data/controls.csv"})):
        able = {"able": {"superset": {"able": False, "why": "accuracy 0.2"}}, "about": keys.about(own)}
        units.write_json(tmp_path / "baselines.findings.json", found()["baselines"] | able)
        judged = story.judge(steps.Step(PLAN, "story", own), None)
        checks.append({entry.id: entry.check for entry in judged.entries})
    made, given = checks
    assert {name for name in made if made[name] != given[name]} == set(sentences.GIVEN)
    assert made["fame_matched"] == "pairs are matched in fame when they are made" and "kept" not in str(given)
    assert {name for name in made if made[name]} == {name for name in given if given[name]}


def test_the_first_pages_rows_say_what_the_verdicts_say(tmp_path):
    entries = {entry.id: entry for entry in judged(tmp_path).values()}
    table = pd.DataFrame({"pair_id": ["p0", "p1", "p1", "p2"], "quad_id": ["q0", "q0", "q0", "q1"], "position": "last"})
    table = table.assign(direction="denoise", half=["confirmation"] * 3 + ["discovery"])
    tables = {"coarse_sweep": table}
    read = {row["about"]: row for row in first_page.rows(list(entries.values()), found(), tables.get)}
    assert list(read) == ["When", "Which parts", "One part alone", "What they read", "How names add up", "Surprise"]
    when = read["When"]
    assert (
        when["number"] == "0.90 [0.85, 0.95] of the whole rise at the last token" and when["claim"] == "critical_layers"
    )
    assert when["sample"] == "2 pairs in 1 quad" and when["figure"] == "executed/02_coarse_sweep.ipynb#fig-coarse"
    assert when["words"].startswith("What layers ") and when["sure"] == "supported, exploratory"
    assert read["Which parts"]["sample"] == "", "its table is not there"
    entries["critical_layers"].verdict = NOT_SUPPORTED
    entries["slice_sufficient"].verdict, entries["slice_sufficient"].reason = NOT_TESTABLE, "too few {quads}"
    read = {row["about"]: row for row in first_page.rows(list(entries.values()), found(), tables.get)}
    assert "are not shown to bring" in read["When"]["words"] and read["When"]["number"]
    assert read["Which parts"]["words"].startswith("Not testable here: The critical slice is jointly sufficient")
    assert read["Which parts"]["words"].endswith("(too few {quads}).") and read["Which parts"]["number"] == ""


def test_the_first_page_says_whether_the_word_is_what_the_model_would_say():
    row = {"superset": "all", "scoring": "raw", "place": 7.0, "probability": 0.034}
    first = {"superset": "all", "scoring": "first word", "estimate": 0.1, "low": 0.05, "high": 0.2, "prompts": 60}
    said = first_page.spoken({"ability": [row, first, row | {"superset": "artist", "place": 1.0}]})
    assert said.startswith("**What it is not: the model's speech.** It is a leaning")
    assert "first in 0.10 [0.05, 0.20] of 60 prompts; its place in the median is 7, its probability 3.4%" in said
    assert "more than a leaning" in first_page.spoken({"ability": [row | {"place": 1.0}, first]})
    assert first_page.spoken({"ability": [row]}) == first_page.spoken(None) == ""
